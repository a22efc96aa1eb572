"""The layer-parallel network equals a serial torch copy of itself: values, gradients, bits."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="pint_fem.resnet needs torch (pip install 'pint_fem[resnet]')")

from mpi4py import MPI
from torch import nn

from pint_fem.errors import InputError
from pint_fem.mgrit import SolverFailure
from pint_fem.resnet import Adaptive, Convolution, Dense, Grid, LayerParallelResNet, SerialResNet, activation

RANKS = [1, 2, 3, 4]
COMM = MPI.COMM_WORLD


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Ranks share the cores, and bits are those of one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def parts(kind, activation="tanh"):
    """Opening, layer, closing, batch and labels."""
    torch.manual_seed(3)
    if kind == "dense":
        x = torch.randn(7, 2, dtype=torch.float64)
        return nn.Linear(2, 5), Dense(5, activation), nn.Linear(5, 4), x, torch.arange(7) % 4
    x = torch.randn(3, 1, 6, 5, dtype=torch.float64)
    closing = nn.Sequential(nn.Flatten(), nn.Linear(2 * 6 * 5, 4))
    return nn.Conv2d(1, 2, 3, padding=1), Convolution(2, 3, activation), closing, x, torch.arange(3)


def build(kind, nlayers, grid=None, act="tanh", dtype=torch.float64, T=2.0, **options):
    """A network, its batch and labels."""
    opening, layer, closing, x, y = parts(kind, act)
    net = LayerParallelResNet(opening, layer, nlayers, closing, final_time=T, grid=grid or Grid(), dtype=dtype, **options)
    return net, x, y


def serial_copy(kind, nlayers, act="tanh", dtype=torch.float64, T=2.0):
    """Its serial copy."""
    opening, layer, closing, *_ = parts(kind, act)
    return SerialResNet(opening, layer, nlayers, closing, final_time=T, dtype=dtype)


def step(net, x, y, **flags):
    """Logits, loss and gradients by name."""
    net.zero_grad()
    out = net(x, **flags)
    loss = nn.functional.cross_entropy(out, y)
    loss.backward()
    return out.detach().numpy(), loss.item(), {name: p.grad.numpy().copy() for name, p in net.named_parameters()}


def same(net, ours, theirs, tolerance):
    """Values and all own gradients are the serial copy's."""
    assert np.abs(ours[0] - theirs[0]).max() <= tolerance * np.abs(theirs[0]).max()
    names = set(ours[2])
    assert {n for n in names if n.startswith("theta")} == {f"theta.{n}" for n in net.layer.shapes}
    assert ("opening.weight" in names) == net.grid.is_first
    for name, g in ours[2].items():
        full = theirs[2][name]
        assert np.abs(g - (full[net.lo : net.hi] if name.startswith("theta") else full)).max() <= tolerance * np.abs(full).max()


LEVELS = {1: {"levels": 1}, 2: {"levels": 2, "coarsening": 4}, 3: {"coarsening": (3, 2), "levels": 3}, 4: {"coarsening": 2, "levels": 4}}


@pytest.mark.parallel(RANKS)
@pytest.mark.parametrize("levels", [1, 2, 3, 4])
@pytest.mark.parametrize(("kind", "nlayers"), [("dense", 12), ("dense", 64), ("dense", 37), ("conv", 12), ("conv", 29)])
def test_equals_the_serial_copy(kind, nlayers, levels):
    """Acceptance: forward values and every parameter gradient to 1e-12, any split, any number of levels."""
    net, x, y = build(kind, nlayers, mgrit={"rtol": 1e-14, **LEVELS[levels]})
    same(net, step(net, x, y), step(serial_copy(kind, nlayers), x, y), 1e-12)
    assert net.results["forward"].converged
    assert net.results["backward"].converged


@pytest.mark.parallel(RANKS)
@pytest.mark.parametrize("kind", ["dense", "conv"])
def test_deep_networks(kind):
    """256 layers."""
    net, x, y = build(kind, 256, mgrit={"rtol": 1e-14, "coarsening": (8, 4), "levels": 3, "relax": "F"})
    same(net, step(net, x, y), step(serial_copy(kind, 256), x, y), 1e-12)


@pytest.mark.parallel(RANKS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("kind", "act"), [("dense", "tanh"), ("dense", "gelu"), ("conv", "relu")])
def test_same_bits_for_every_number_of_ranks(kind, act, dtype):
    """Logits, loss and gradients of inexact sweeps, warm starts included, beside the same on this rank alone."""
    options = dict(act=act, dtype=dtype, forward_iterations=2, backward_iterations=1)
    options["mgrit"] = {"coarsening": (3, 2), "levels": 3}
    here, x, y = build(kind, 37, **options)
    alone, *_ = build(kind, 37, grid=Grid(comm=MPI.COMM_SELF), **options)
    for _ in range(2):
        (out, loss, g), (out1, loss1, g1) = step(here, x, y, batch=0), step(alone, x, y, batch=0)
        assert np.array_equal(out, out1)
        assert loss == loss1
        for name, value in g.items():
            full = g1[name]
            assert np.array_equal(value, full[here.lo : here.hi] if name.startswith("theta") else full), name
        for kind_, result in here.results.items():
            assert result.residuals == alone.results[kind_].residuals

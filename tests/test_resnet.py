"""The layer-parallel network equals a serial torch copy of itself: values, gradients, bits."""

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("torch", reason="pint_fem.resnet needs torch (pip install 'pint_fem[resnet]')")

import torch
from mpi4py import MPI
from torch import nn

from pint_fem.errors import InputError
from pint_fem.mgrit import SolverFailure
from pint_fem.resnet import Adaptive, Convolution, Dense, Grid, LayerParallelResNet, SerialResNet, activation

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
    options = dict(final_time=T, grid=grid or Grid(), dtype=dtype) | options
    return LayerParallelResNet(opening, layer, nlayers, closing, **options), x, y


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
        own = full[net.lo : net.hi] if name.startswith("theta") else full
        assert np.abs(g - own).max() <= tolerance * np.abs(full).max()


LEVELS = {1: {"levels": 1}, 2: {"levels": 2, "coarsening": 4}, 3: {"levels": 3, "coarsening": (3, 2)}}
LEVELS[4] = {"levels": 4, "coarsening": 2}


@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize("levels", [1, 2, 3, 4])
@pytest.mark.parametrize(("kind", "nlayers"), [("dense", 12), ("dense", 64), ("dense", 37), ("conv", 12), ("conv", 29)])
def test_equals_the_serial_copy(kind, nlayers, levels):
    """Acceptance: forward values and every parameter gradient to 1e-12, any split, any number of levels."""
    net, x, y = build(kind, nlayers, mgrit={"rtol": 1e-14, **LEVELS[levels]})
    same(net, step(net, x, y), step(serial_copy(kind, nlayers), x, y), 1e-12)
    assert net.results["forward"].converged
    assert net.results["backward"].converged


@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize("kind", ["dense", "conv"])
def test_deep_networks(kind):
    """256 layers."""
    net, x, y = build(kind, 256, mgrit={"rtol": 1e-14, "coarsening": (8, 4), "levels": 3, "relax": "F"})
    same(net, step(net, x, y), step(serial_copy(kind, 256), x, y), 1e-12)


@pytest.mark.parallel([1, 3])
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


def finite_difference(f, z, e=1e-6):
    """Central."""
    return (f(z + e) - f(z - e)) / (2 * e)


@pytest.mark.parametrize(
    "name", ["tanh", "sigmoid", "relu", "leaky_relu", "linear", "gelu", "silu", "softplus", "elu", "sin"]
)
def test_activations_and_their_derivatives(name):
    """Value, slope and curvature from what a layer keeps."""
    act = activation(name)
    z = torch.linspace(-2.1, 2.2, 12, dtype=torch.float64)
    kept = act.in_scale * z
    y = act.out_scale * act.output(kept)
    assert torch.allclose(y, act.function(z), rtol=0, atol=1e-15)
    slope = finite_difference(act.function, z)
    assert torch.allclose(act.slope(kept), slope, atol=1e-8)
    written = torch.empty(2, 12, dtype=torch.float64)[::2]
    act.write_slope(kept[None], written)
    assert torch.equal(written[0], act.slope(kept))
    if name not in ("relu", "leaky_relu", "elu"):
        curvature = finite_difference(lambda x: finite_difference(act.function, x, 1e-4), z, 1e-4)
        assert torch.allclose(act.curvature(kept), curvature, atol=1e-6)


@pytest.mark.parallel([1, 3])
def test_activation_by_callable():
    """Any elementwise function of torch; others are refused."""
    act = lambda z: z / (1 + z * z)
    net, x, y = build("dense", 12, act=act, mgrit={"rtol": 1e-14, "coarsening": 2, "levels": 2})
    same(net, step(net, x, y), step(serial_copy("dense", 12, act), x, y), 1e-12)
    with pytest.raises(InputError, match="not elementwise"):
        Dense(3, lambda z: torch.softmax(z, -1))
    with pytest.raises(InputError, match="did you mean 'relu'"):
        Dense(3, "rlu")


@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize(("kind", "act"), [("dense", "gelu"), ("conv", "relu")])
def test_sweeps_to_a_tolerance_take_slopes_once(kind, act, keep):
    """Each layer's, whatever the cycles; the bits are those of slopes taken in every relaxation."""
    found, plain = [], activation(act)
    for name in ("slope", "slope_out"):  # taken when all is known, and wherever it might be the last time
        taken = []

        def slope(z, taken=taken):
            taken.append(len(z))
            return plain.slope(z)

        write = lambda z, out, slope=slope: out.copy_(slope(z))
        given = replace(plain, slope=slope, slope_out=None if name == "slope" else write)
        net, x, _ = build(kind, 37, act=given, mgrit={"levels": 2, "coarsening": 4, "rtol": 1e-13})
        u0 = net.layer.pack(net.opening(x)).detach().numpy().copy() if net.grid.is_first else None
        shape = net.grid.layer_comm.bcast(None if u0 is None else u0.shape)
        t = net.sweeps.trajectory(shape, np.float64, curvatures=keep)
        assert net.sweeps.forward(net.stack, u0, t).cycles > 2
        found.append((t, sum(taken)))
    (once, few), (often, many) = found
    assert few == net.hi - net.lo < many / 2
    assert torch.equal(once.slopes, often.slopes)
    assert np.array_equal(once.U, often.U)
    assert not keep or torch.equal(once.records, often.records)


@pytest.mark.parallel([1, 3])
def test_evaluation_is_exact_and_keeps_no_graph():
    """Whatever the training's iterations; 'same' takes those."""
    options = dict(forward_iterations=1, backward_iterations=1, T=8.0)
    options["mgrit"] = {"coarsening": 6, "relax": "F", "levels": 2}
    net, x, _ = build("dense", 36, **options)
    with torch.no_grad():
        exact = net(x)
        theirs = serial_copy("dense", 36, T=8.0)(x)
        assert torch.allclose(exact, theirs, rtol=1e-12, atol=1e-13)
        alike, *_ = build("dense", 36, evaluation="same", **options)
        assert not torch.allclose(alike(x), theirs, rtol=1e-6)


@pytest.mark.parallel([1, 3])
def test_several_batches_before_one_backward():
    """Graphs that live at the same time do not share memory."""
    net, x, y = build("dense", 12, mgrit={"rtol": 1e-14, "coarsening": 2, "levels": 2})
    copy = serial_copy("dense", 12)
    results = []
    for model in (net, copy):
        outs = [model(s * x) for s in (1.0, -0.5, 2.0)]
        sum(nn.functional.cross_entropy(out, y) for out in outs).backward()
        results.append({n: p.grad.clone() for n, p in model.named_parameters()})
    for name, g in results[0].items():
        full = results[1][name]
        assert torch.allclose(g, full[net.lo : net.hi] if name.startswith("theta") else full, rtol=1e-12, atol=1e-14)


@pytest.mark.parallel([1, 3])
def test_bad_input_is_refused_on_every_rank():
    """No hang: the same error everywhere, whichever rank finds it."""
    opening, layer, closing, x, _ = parts("dense")
    with pytest.raises(InputError, match="width 4 take"):
        LayerParallelResNet(opening, Dense(4), 9, closing, dtype=torch.float64)(x)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):  # torch's, on all ranks
        LayerParallelResNet(opening, layer, 9, nn.Linear(3, 4), dtype=torch.float64)(x)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        LayerParallelResNet(nn.Linear(5, 5), layer, 9, closing, dtype=torch.float64)(x)
    for bad, match in (
        (dict(mgrit={"storage": "C"}), "storage"),
        (dict(mgrit={"coarsenning": 2}), "coarsening"),
        (dict(forward_iterations=0), "iterations"),
        (dict(adaptive=Adaptive()), "number to begin with"),
        (dict(dtype=torch.float16), "float64"),
    ):
        with pytest.raises(InputError, match=match):
            LayerParallelResNet(opening, layer, 9, closing, **bad)
    with pytest.raises(InputError, match="at most one rank per layer" if COMM.size > 1 else "positive"):
        LayerParallelResNet(opening, layer, 1 if COMM.size > 1 else 0, closing)
    net, *_ = build("dense", 9, mgrit={"levels": 2, "coarsening": 2})
    if COMM.size > 1:
        with pytest.raises(InputError, match="give all the same"):
            net(x[: 3 + COMM.rank])
        with pytest.raises(InputError, match="DATAxLAYERS"):
            Grid("all")
    with torch.no_grad():
        net.stack[0][-1] = float("nan")
    with pytest.raises(SolverFailure, match="not finite"):
        net(x)

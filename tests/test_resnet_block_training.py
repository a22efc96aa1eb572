"""Checkpoints, refinement in depth, regularisation and optimisers of networks whose layers are modules."""

from itertools import pairwise

import numpy as np
import pytest

pytest.importorskip("torch", reason="pint_fem.resnet needs torch (pip install 'pint_fem[resnet]')")

import torch
from mpi4py import MPI
from torch import nn

from pint_fem.errors import InputError
from pint_fem.resnet import (
    Grid,
    LayerParallel,
    Regularisation,
    Repeat,
    load_checkpoint,
    refine,
    save_checkpoint,
)
from tests.broken_files import shared
from tests.limits import time_limit
from tests.test_resnet import COMM, one_thread  # noqa: F401

LABELS = torch.tensor([0, 1, 2, 0, 1, 2])


class Block(nn.Module):
    """A convolution with batch normalisation, dropout and a parameter that is a number."""

    def __init__(self, channels, p=0.0, act=nn.Tanh):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.scale, self.drop, self.act = nn.Parameter(torch.tensor(0.9)), nn.Dropout(p), act()

    def forward(self, u):
        return self.scale * self.drop(self.act(self.norm(self.conv(u))))


class Other(nn.Module):
    """A second stage with another structure."""

    def __init__(self, channels):
        super().__init__()
        self.mix = nn.Conv2d(channels, channels, 1, bias=False)

    def forward(self, u):
        return torch.tanh(self.mix(u))


def network(counts=(5, 4), *, grid=None, dtype=torch.float64, act=nn.Tanh, h=None, p=0.2, **options):
    torch.manual_seed(4)
    stages = [Repeat(lambda n: Block(2, p, act).to(dtype), counts[0])]
    transitions = []
    if len(counts) > 1:
        stages.append(Repeat(lambda n: Other(3).to(dtype), counts[1], seed=1))
        transitions = [nn.Conv2d(2, 3, 2, stride=2).to(dtype)]
    closing = nn.Sequential(nn.Flatten(), nn.Linear(12 if len(counts) > 1 else 32, 3)).to(dtype)
    options = dict(h=0.2 if h is None else h, mgrit={"levels": 2, "coarsening": 2}) | options
    return LayerParallel(
        stages,
        opening=nn.Conv2d(1, 2, 3, padding=1).to(dtype),
        closing=closing,
        transitions=transitions,
        grid=grid or Grid(),
        **options,
    )


def batch(dtype=torch.float64):
    return torch.randn(6, 1, 4, 4, dtype=dtype, generator=torch.Generator().manual_seed(2))


def go(net, optimizer, count, x=None, scheduler=None):
    losses = []
    for _ in range(count):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(batch() if x is None else x), LABELS)
        loss.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        losses.append(loss.item())
    return losses


def equal(net, other, tolerance):
    """The own part of a network beside another one, buffers included."""
    theirs = other.full_state_dict() if other.grid.layer_size > 1 else other.state_dict()
    for name, t in net.state_dict().items():
        a, b = t.double(), theirs[name].double()
        assert torch.equal(a, b) if not tolerance else torch.allclose(a, b, rtol=0, atol=tolerance), name


def rates_by_layer(net):
    """An optimiser with a group for each layer, and one for the rest."""
    groups = [{"params": list(m.parameters()), "lr": 0.01 * (1 + n)} for n, m in enumerate(net.layers)]
    rest = [p for name, p in net.named_parameters() if not name.startswith("layers.")]
    return torch.optim.AdamW([*groups, {"params": rest, "weight_decay": 0.1}], lr=0.02)


OPTIMISERS = {
    "adam": lambda net: torch.optim.Adam(net.parameters(), lr=0.01),
    "sgd": lambda net: torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9),
    "adafactor": lambda net: torch.optim.Adafactor(net.parameters(), lr=0.01),
    "by layer": rates_by_layer,
}


@pytest.mark.parallel([1, 2, 3])
@time_limit(120)
@pytest.mark.parametrize("kind", OPTIMISERS)
def test_a_training_goes_on(tmp_path, kind):
    """Two steps, a restart on the same number of ranks and on one, and two more are four: dropout masks, statistics of
    batch normalisation, states and rates.
    """
    path, make = shared(tmp_path) / "run", OPTIMISERS[kind]
    net = network()
    optimizer = make(net)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
    go(net, optimizer, 2, scheduler=scheduler)
    save_checkpoint(path, net, optimizer, {"epoch": 2}, scheduler=scheduler)
    losses = go(net, optimizer, 2, scheduler=scheduler)
    for grid, tolerance in ((Grid(), 0.0), (Grid(comm=MPI.COMM_SELF), 1e-9)):
        again = network(grid=grid)
        with torch.no_grad():
            for t in (*again.parameters(), *again.buffers()):
                t.fill_(7)
        other = make(again)
        for group in other.param_groups:
            group["lr"] = 9.0
        second = torch.optim.lr_scheduler.ExponentialLR(other, 0.1)
        assert load_checkpoint(path, again, other, scheduler=second) == {"epoch": 2}
        assert go(again, other, 2, scheduler=second) == pytest.approx(losses, rel=1e-9)
        equal(net, again, tolerance)
    COMM.barrier()


@pytest.mark.parallel([2, 3])
@time_limit(60)
def test_fewer_and_more_ranks(tmp_path):
    """Written by all ranks, read by the first two, and the other way round; warm starts are discarded."""
    path, net = shared(tmp_path) / "run", network((4, 3), forward_iterations=2, backward_iterations=1)
    optimizer = torch.optim.Adam(net.parameters())
    x = batch()
    for _ in range(2):
        nn.functional.cross_entropy(net(x, batch=0), LABELS).backward()
        optimizer.step()
    save_checkpoint(path, net, optimizer)
    state = net.full_state_dict()
    pair = COMM.Split(COMM.rank < 2)
    if COMM.rank < 2:
        two = network((4, 3), grid=Grid(comm=pair))
        other = torch.optim.Adam(two.parameters())
        load_checkpoint(path, two, other)
        assert all(torch.equal(t, state[name]) for name, t in two.state_dict().items())
        for name, p in two.named_parameters():
            assert float(other.state[p]["step"]) == 2, name
        save_checkpoint(path.with_name("two"), two, other)
    COMM.barrier()
    more = network((4, 3))
    third = torch.optim.Adam(more.parameters())
    load_checkpoint(path.with_name("two"), more, third)
    for (name, p), q in zip(net.named_parameters(), more.parameters(), strict=True):
        assert torch.equal(p, q), name
        assert torch.equal(optimizer.state[p]["exp_avg_sq"], third.state[q]["exp_avg_sq"])
    assert all(not stage.warm_starts for stage in more.stages)
    assert any(stage.warm_starts for stage in net.stages)
    load_checkpoint(path, net, optimizer)
    assert all(not stage.warm_starts for stage in net.stages)
    pair.Free()


@pytest.mark.parallel([1, 3])
@time_limit(60)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_types(tmp_path, dtype):
    """Rows of types that numpy does not have come back as they were."""
    path, net = shared(tmp_path) / "run", network(dtype=dtype)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for p in net.parameters():
        p.grad = torch.linspace(0, 1, p.numel()).reshape(p.shape).to(p.dtype)
    optimizer.step()
    save_checkpoint(path, net, optimizer)
    again = network(dtype=dtype)
    other = torch.optim.SGD(again.parameters(), lr=0.1, momentum=0.9)
    load_checkpoint(path, again, other)
    equal(net, again, 0.0)
    for p, q in zip(net.parameters(), again.parameters(), strict=True):
        a, b = optimizer.state[p]["momentum_buffer"], other.state[q]["momentum_buffer"]
        assert a.dtype == b.dtype == dtype
        assert torch.equal(a, b)


@pytest.mark.parallel([1, 3])
@time_limit(60)
def test_frozen_layers(tmp_path):
    """From the beginning, and after a step: states are those of each layer, on any number of ranks."""
    path, net = shared(tmp_path) / "run", network((6, 3))
    net.layers[1].requires_grad_(False)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    go(net, optimizer, 1)
    net.layers[4].requires_grad_(False)
    go(net, optimizer, 1)
    save_checkpoint(path, net, optimizer)
    alone = network((6, 3), grid=Grid(comm=MPI.COMM_SELF))
    other = torch.optim.Adam(alone.parameters(), lr=0.01)
    load_checkpoint(path, alone, other)
    count = [float(other.state[m.conv.weight]["step"]) if m.conv.weight in other.state else 0 for m in alone.layers[:6]]
    assert count == [2, 0, 2, 2, 1, 2]
    COMM.barrier()


@pytest.mark.parallel([1, 3])
@time_limit(60)
def test_other_networks_are_refused(tmp_path):
    path, net = shared(tmp_path) / "run", network()
    save_checkpoint(path, net)
    for changes, what in (
        (dict(counts=(5, 3)), "layers"),
        (dict(counts=(5,)), "layers"),
        (dict(act=nn.ReLU), "first layers"),
        (dict(dtype=torch.float32), "parameters and buffers"),
        (dict(h=0.1), "h"),
    ):
        with pytest.raises(InputError, match=f"of another network: .*{what}: the file has"):
            load_checkpoint(path, network(**changes))
    odd = LayerParallel([*(nn.Linear(2, 2, bias=n < 3) for n in range(4))], mgrit={"coarsening": 2})
    with pytest.raises(InputError, match="give stages of layers of one structure"):
        save_checkpoint(path, odd)
    assert load_checkpoint(path, net) == {}


@pytest.mark.parallel([1, 2, 3])
@time_limit(60)
@pytest.mark.parametrize(("coarse", "fine"), [((4, 3), (8, 6)), ((3,), (7,))])
def test_refinement_interpolates_in_depth(coarse, fine):
    """Weights and statistics that are linear in depth stay so; counts are those of the layer before."""
    a, b = network(coarse, h=0.2), network(fine, h=0.2 * coarse[0] / fine[0])
    numbers = [n for count in coarse for n in range(count)]
    with torch.no_grad():
        for n, m in zip(numbers, a.layers, strict=True):
            for t in (*m.parameters(), *m.buffers()):
                t.fill_(n)
    refine(a, b)
    places = [(n * c / f, c) for c, f in zip(coarse, fine, strict=True) for n in range(f)]
    for (t, count), m in zip(places, b.layers, strict=True):
        for name, values in m.state_dict().items():
            expected = np.floor(t + 1e-12) if "num_batches" in name else min(t, count - 1)
            assert torch.allclose(
                values.double(), torch.full(values.shape, expected, dtype=torch.float64), rtol=1e-14
            ), name
    for name, values in b.state_dict().items():
        if not name.startswith("layers."):
            assert torch.equal(values, a.state_dict()[name])
    with pytest.raises(InputError, match="refine from the same kind of layers and the same final time"):
        refine(a, network(fine, h=0.2))


@pytest.mark.parallel([1, 2, 3])
@time_limit(60)
def test_regularisation_is_its_formula():
    """Value and gradients beside plain torch on the serial copy; no difference from one stage to the next."""
    net = network()
    copy = net.serial_copy()
    R = Regularisation(net, 0.3, 0.2, 0.1)()
    R.backward()
    exact, h = 0.0, 0.2
    for layers in (copy.layers[:5], copy.layers[5:]):
        for m in layers:
            exact = exact + 0.15 * h * sum((p**2).sum() for p in m.parameters())
        for m, n in pairwise(layers):
            exact = exact + 0.1 / h * sum(
                ((q - p) ** 2).sum() for p, q in zip(m.parameters(), n.parameters(), strict=True)
            )
    exact = exact + 0.05 * sum((p**2).sum() for p in copy.closing.parameters())
    exact.backward()
    assert R.item() == pytest.approx(exact.item(), rel=1e-13)
    theirs = dict(copy.named_parameters())
    for name, p in net.named_parameters():
        g = theirs[name].grad
        assert p.grad is None or g is None or torch.allclose(p.grad, g, rtol=1e-12, atol=1e-14), name
        assert (p.grad is None) == (g is None) or not p.grad.any(), name
    other = Regularisation(net, 0.3)
    loss = nn.functional.cross_entropy(net(batch()), LABELS) + other()
    loss.backward()
    assert len(set(COMM.allgather(loss.item()))) == 1


@pytest.mark.parallel(2)
@time_limit(60)
def test_data_groups_and_ranks_in_other_calls(tmp_path):
    """One of two groups writes; a rank that saves while the other evaluates the network raises, and so does that."""
    path, net = shared(tmp_path) / "run", network((3, 2), grid=Grid((2, 1)))
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    go(net, optimizer, 2)
    save_checkpoint(path, net, optimizer)
    layers = network((3, 2))
    other = torch.optim.Adam(layers.parameters(), lr=0.01)
    load_checkpoint(path, layers, other)
    for name, t in layers.state_dict().items():
        assert torch.equal(t, net.state_dict()[name]), name
    for work in (
        lambda: save_checkpoint(path, layers),
        lambda: load_checkpoint(path, layers),
        Regularisation(layers, 1),
    ):
        with pytest.raises(InputError, match="all ranks have to make the same calls"):
            work() if COMM.rank == 0 else layers(batch())
    go(layers, other, 1)

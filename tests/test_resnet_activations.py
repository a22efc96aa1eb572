"""Activations with parameters: every layer trains its own, as in a loop over modules of torch."""

import copy
import pickle
from itertools import pairwise

import numpy as np
import pytest

pytest.importorskip("torch", reason="pint_fem.resnet needs torch (pip install 'pint_fem[resnet]')")

import torch
from mpi4py import MPI
from torch import nn

from pint_fem.errors import InputError
from pint_fem.resnet import (
    Convolution,
    Dense,
    Grid,
    Layer,
    LayerParallelResNet,
    Regularisation,
    SerialResNet,
    TrainingProblem,
    load_checkpoint,
    refine,
    save_checkpoint,
)
from tests.broken_files import shared
from tests.limits import time_limit
from tests.test_resnet import COMM, LEVELS, one_thread  # noqa: F401

N, T = 9, 1.5


class Scaled(nn.Module):
    """``a tanh(b z)`` with ``a`` in a module of its own."""

    class Factor(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Parameter(torch.tensor(0.8))

    def __init__(self):
        super().__init__()
        self.factor, self.b = self.Factor(), nn.Parameter(torch.tensor([1.3]))

    def forward(self, z):
        return self.factor.a * torch.tanh(self.b * z)


class Branches(Scaled):
    """The same, with a branch on values, which no batched call takes."""

    def forward(self, z):
        return super().forward(z) if float(self.b.detach()) > 0 else z


class Decay(nn.Module):
    """A user's activation of Dense layers with a parameter for each feature."""

    def __init__(self, width):
        super().__init__()
        self.c = nn.Parameter(torch.linspace(-0.5, 1.0, width))

    def forward(self, z):
        return z * torch.exp(-self.c * z**2)


CASES = {
    "prelu": lambda: Dense(5, nn.PReLU()),
    "prelu of features": lambda: Dense(5, nn.PReLU(5, init=0.3)),
    "nested": lambda: Dense(5, Scaled()),
    "branches": lambda: Dense(5, Branches()),
    "features": lambda: Dense(5, Decay(5)),
    "conv": lambda: Convolution(2, 3, nn.PReLU(init=0.1)),
    "conv of channels": lambda: Convolution(2, 3, nn.PReLU(2)),
}


def ends(layer):
    """Opening and classification layer, batch and labels."""
    torch.manual_seed(3)
    if isinstance(layer, Dense):
        return nn.Linear(2, 5), nn.Linear(5, 4), torch.randn(7, 2, dtype=torch.float64), torch.arange(7) % 4
    closing = nn.Sequential(nn.Flatten(), nn.Linear(2 * 6 * 5, 4))
    return nn.Conv2d(1, 2, 3, padding=1), closing, torch.randn(3, 1, 6, 5, dtype=torch.float64), torch.arange(3)


def network(case, nlayers=N, *, grid=None, levels=3, dtype=torch.float64, **options):
    layer = CASES[case]()
    opening, closing, x, y = ends(layer)
    options = dict(final_time=T, grid=grid or Grid(), dtype=dtype, mgrit=LEVELS[levels]) | options
    return LayerParallelResNet(opening, layer, nlayers, closing, **options), x, y


class Loop(nn.Module):
    """The same network as a list of modules, each with an activation of its own."""

    def __init__(self, case, nlayers=N):
        super().__init__()
        layer = CASES[case]()
        self.opening, self.closing, *_ = ends(layer)
        first = layer.initial(range(nlayers), 0, torch.float64)
        make = (lambda: nn.Linear(5, 5)) if isinstance(layer, Dense) else (lambda: nn.Conv2d(2, 2, 3, padding=1))
        self.maps = nn.ModuleList(make() for _ in range(nlayers))
        given = dict(layer.activation.source[1][0].named_parameters())
        self.acts = nn.ModuleList(copy.deepcopy(layer.activation.source[1][0]) for _ in range(nlayers))
        self.double()
        assert given
        with torch.no_grad():
            for n, m in enumerate(self.maps):
                m.weight.copy_(first["weight"][n])
                m.bias.copy_(first["bias"][n])
        self.nlayers = nlayers

    def forward(self, x):
        u = self.opening(x)
        for m, act in zip(self.maps, self.acts, strict=True):
            u = u + T / self.nlayers * act(m(u))
        return self.closing(u)

    def stacked(self, of=lambda p: p):
        """Parameters, or what belongs to them, by the names of a layer-parallel network."""
        stack = lambda parameters: torch.stack([of(p).detach() for p in parameters])
        out = {f"theta.{name}": stack([getattr(m, name) for m in self.maps]) for name in ("weight", "bias")}
        for name, _ in self.acts[0].named_parameters():
            values = [dict(act.named_parameters())[name] for act in self.acts]
            out[f"theta.activation_{name.replace('.', '_')}"] = stack(values)
        for part in ("opening", "closing"):
            out |= {f"{part}.{name}": of(p).detach() for name, p in getattr(self, part).named_parameters()}
        return out


def equal(net, ours, theirs, tolerance=1e-12):
    assert {name for name in ours if name.startswith("theta")} == {n for n in theirs if n.startswith("theta")}
    for name, p in ours.items():
        q = theirs[name]
        own = q[getattr(net, "lo", 0) : getattr(net, "hi", None)] if name.startswith("theta") else q
        assert (p.detach() - own).abs().max() <= tolerance * q.abs().max(), name


def train(net, x, y, steps=3, make=lambda parameters: torch.optim.Adam(parameters, lr=0.05)):
    optimizer = make(net.parameters())
    for _ in range(steps):
        optimizer.zero_grad()
        out = net(x)
        nn.functional.cross_entropy(out, y).backward()
        optimizer.step()
    return out


@pytest.mark.parallel([1, 2, 3])
@pytest.mark.parametrize("case", CASES)
def test_values_gradients_and_steps_are_those_of_a_loop_over_modules(case):
    """Forward, all gradients, and three steps of Adam; the serial network as well."""
    loop, (net, x, y) = Loop(case), network(case)
    serial = SerialResNet(*[p for p in (ends(CASES[case]())[0], CASES[case](), N, ends(CASES[case]())[1])],
                          final_time=T, dtype=torch.float64)  # fmt: skip
    for other in (net, serial):
        other.zero_grad(), loop.zero_grad()
        out, exact = other(x), loop(x)
        assert (out - exact).abs().max() < 1e-12 * exact.abs().max()
        nn.functional.cross_entropy(out, y).backward()
        nn.functional.cross_entropy(exact, y).backward()
        equal(other, {n: p.grad for n, p in other.named_parameters()}, loop.stacked(lambda p: p.grad))
    before = {n: p.detach().clone() for n, p in net.named_parameters() if "activation" in n}
    assert before
    for other in (net, serial, loop):
        train(other, x, y)
    for other in (net, serial):
        equal(other, dict(other.named_parameters()), loop.stacked(), 1e-9)
    assert all((p.detach() - before[n]).abs().max() > 0.01 for n, p in net.named_parameters() if n in before)


@pytest.mark.parallel(3)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", ["nested", "prelu of features", "conv of channels"])
def test_results_do_not_depend_on_the_ranks(case, dtype):
    """Bitwise, with a fixed number of cycles and after steps of Adam."""
    its = dict(forward_iterations=2, backward_iterations=1, levels=2, dtype=dtype)
    net, x, y = network(case, 13, **its)
    alone, *_ = network(case, 13, grid=Grid(comm=MPI.COMM_SELF), **its)
    x = x.to(dtype)
    outs = [train(n, x, y) for n in (net, alone)]
    assert torch.equal(*outs)
    for name, p in net.theta.items():
        assert torch.equal(p, alone.theta[name][net.lo : net.hi]), name


@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize("case", ["nested", "prelu of features", "features", "branches", "conv of channels"])
def test_hessian_actions_are_those_of_autograd(case):
    """Of the loss of the loop over modules, and of the regularisation, of which each value counts once."""
    net, x, y = network(case)
    loop = Loop(case)
    problem = TrainingProblem(net, x, y, regularisation=Regularisation(net, 0.1, 0.05, 0.2))
    generator = torch.Generator().manual_seed(1)
    direction = {p: torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in loop.parameters()}
    layered = [[*m.parameters(), *act.parameters()] for m, act in zip(loop.maps, loop.acts, strict=True)]
    h = T / N
    loss = nn.functional.cross_entropy(loop(x), y)
    loss = loss + 0.05 * h * sum((p**2).sum() for layer in layered for p in layer)
    for a, b in pairwise(layered):
        loss = loss + 0.025 / h * sum(((q - p) ** 2).sum() for p, q in zip(a, b, strict=True))
    loss = loss + 0.1 * sum((p**2).sum() for p in loop.closing.parameters())
    parameters = list(direction)
    g = torch.autograd.grad(loss, parameters, create_graph=True)
    slope = sum((a * d).sum() for a, d in zip(g, direction.values(), strict=True))
    H = dict(zip(parameters, torch.autograd.grad(slope, parameters), strict=True))
    G = dict(zip(parameters, g, strict=True))

    def vector(values):
        own = {n: v[net.lo : net.hi] if n.startswith("theta") else v for n, v in loop.stacked(values.get).items()}
        return problem._join([own[name] for name, _ in net.named_parameters()])

    assert problem.value(problem.x0) == pytest.approx(loss.item(), rel=1e-12)
    gradient, action = problem.gradient(problem.x0), problem.hessian_action(problem.x0, vector(direction))
    assert np.abs(gradient - vector(G)).max() < 1e-11 * max(np.abs(vector(G)).max(), 0.1)
    assert np.abs(action - vector(H)).max() < 1e-11 * np.abs(vector(H)).max()


@pytest.mark.parallel([1, 3])
@time_limit(60)
def test_checkpoints_and_refinement_carry_them(tmp_path):
    """Written by all ranks and read by one; another module is refused; refined linearly in depth."""
    path = shared(tmp_path) / "run"
    net, x, y = network("nested")
    optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
    train(net, x, y, make=lambda _: optimizer)
    save_checkpoint(path, net, optimizer)
    values = {n: np.concatenate(COMM.allgather(p.detach().numpy())) for n, p in net.theta.items()}
    alone, *_ = network("nested", grid=Grid(comm=MPI.COMM_SELF))
    other = torch.optim.Adam(alone.parameters(), lr=0.05)
    assert load_checkpoint(path, alone, other) == {}
    assert all(np.array_equal(p.detach().numpy(), values[n]) for n, p in alone.theta.items())
    for name, p in net.theta.items():
        moments = other.state[alone.theta[name]]["exp_avg"][net.lo : net.hi]
        assert torch.equal(optimizer.state[p]["exp_avg"], moments)
    with pytest.raises(InputError, match=r"of another network: parameters: .*activation"):
        load_checkpoint(path, network("features")[0])
    deep, *_ = network("nested", 2 * N)
    refine(net, deep)
    t = np.arange(2 * N) / 2
    for name in ("activation_factor_a", "activation_b"):
        expected = np.interp(t, np.arange(N), values[name].ravel())[deep.lo : deep.hi]
        assert np.allclose(deep.theta[name].detach().numpy().ravel(), expected, rtol=1e-14)


def test_frozen_parameters_stay():
    act = nn.PReLU()
    act.weight.requires_grad_(False)
    opening, closing, x, y = ends(Dense(5))
    for kind in (LayerParallelResNet, SerialResNet):
        net = kind(opening, Dense(5, act), N, closing, dtype=torch.float64)
        assert not net.theta["activation_weight"].requires_grad
        train(net, x, y)
        assert torch.equal(net.theta["activation_weight"].detach(), torch.full((N, 1), 0.25, dtype=torch.float64))


def test_the_module_that_is_given_is_copied():
    """It can be used elsewhere; layers are copied and pickled with it, and with named activations."""
    given = nn.PReLU()
    layer = Dense(5, given)
    with torch.no_grad():
        given.weight.fill_(9.0)
    first = layer.initial(range(2), 0, torch.float64)["activation_weight"]
    assert torch.equal(first, torch.full((2, 1), 0.25, dtype=torch.float64))
    z = torch.linspace(-2, 2, 10, dtype=torch.float64).reshape(5, 2)
    for act in (nn.PReLU(init=0.3), Scaled(), "tanh", "gelu", torch.sin, nn.ReLU()):
        layer = Dense(5, act)
        own = [p.double() for p in layer.activation.initial.values()]
        values = layer.activation.serial(z.t(), own)
        for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert torch.equal(again.activation.serial(z.t(), own), values)
            assert again.shapes == layer.shapes


@pytest.mark.parallel([1, 2])
def test_modules_without_parameters_are_elementwise_functions():
    """One that overwrites its argument, too."""
    opening, closing, x, y = ends(Dense(5))
    found = []
    for act in ("relu", nn.ReLU(), nn.ReLU(inplace=True), nn.Dropout(0.5).eval(), nn.RReLU(0.1, 0.2).eval()):
        net = LayerParallelResNet(opening, Dense(5, act), N, closing, dtype=torch.float64, mgrit=LEVELS[2])
        assert set(net.theta) == {"weight", "bias"}
        found.append(train(net, x, y).detach())
    assert all(torch.allclose(a, found[0], rtol=1e-13) for a in found[1:3])
    assert not torch.allclose(found[3], found[0])


class Overwrites(nn.PReLU):
    def forward(self, z):
        return z.copy_(super().forward(z))


class Centred(nn.PReLU):
    """A value depends on the others."""

    def forward(self, z):
        return super().forward(z - z.mean())


class Normed(nn.PReLU):
    """A value depends on the other features of its sample."""

    def forward(self, z):
        return super().forward(z) / (1 + z.norm(dim=1, keepdim=True))


class Noisy(nn.PReLU):
    def forward(self, z):
        return super().forward(z) + torch.rand_like(z)


class Counted(nn.PReLU):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))


hidden = nn.PReLU().double()
REFUSED = {
    "batch norm": (lambda: nn.BatchNorm1d(5), "BatchNorm1d has buffers .running_mean, .*block of LayerParallel"),
    "buffer": (Counted, "Counted has buffers .calls"),
    "dropout": (lambda: nn.Dropout(0.1), "Dropout is random, .*give one that is not .module.eval"),
    "rrelu": (nn.RReLU, "RReLU is random"),
    "dropout inside": (lambda: nn.Sequential(nn.PReLU(), nn.Dropout(0.1)), "Sequential: Dropout is random"),
    "noise": (Noisy, "Noisy: it is random"),
    "random function": (lambda: lambda z: nn.functional.dropout(z, 0.5), "it is random"),
    "hidden parameters": (lambda: lambda z: hidden(z), "depends on parameters that would not be trained: give the"),
    "mean": (Centred, "Centred is not elementwise"),
    "norm": (Normed, "Normed is not elementwise: a value depends on others"),
    "wrong number of channels": (lambda: nn.PReLU(3), r"PReLU on a batch \(5, 5\): RuntimeError"),
    "another shape": (lambda: nn.Linear(5, 2), r"not elementwise: it gives \(5, 2\) for a tensor \(5, 5\)"),
    "a full matrix": (lambda: nn.Linear(5, 5), "Linear is not elementwise"),
    "overwrites": (Overwrites, "Overwrites overwrites its argument"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case):
    make, message = REFUSED[case]
    torch.manual_seed(0)
    state = torch.get_rng_state()
    given = make()
    torch.set_rng_state(state)
    with pytest.raises(InputError, match=message), torch.no_grad():
        Dense(5, given)
    assert torch.equal(torch.get_rng_state(), state)


def test_kinds_of_layers_of_users_take_none_with_parameters():
    class Own(Layer):
        def __init__(self, act):
            super().__init__(act)

    Own("tanh")
    with pytest.raises(InputError, match="PReLU: Own layers take none with parameters"):
        Own(nn.PReLU())


@pytest.mark.parallel(2)
@time_limit(60)
def test_values_that_differ_between_ranks_are_refused():
    opening, closing, *_ = ends(Dense(5))
    with pytest.raises(InputError, match="activation is not the same on all ranks"):
        LayerParallelResNet(opening, Dense(5, nn.PReLU(init=0.1 * (1 + COMM.rank))), N, closing)

"""What users do with torch modules, in layer-parallel networks: the results are those of a plain loop, or refused."""

import copy

import pytest

pytest.importorskip("torch", reason="pint_fem.resnet needs torch (pip install 'pint_fem[resnet]')")

import torch
from mpi4py import MPI
from torch import nn

from pint_fem.errors import InputError
from pint_fem.resnet import Dense, LayerParallel, LayerParallelResNet, Repeat
from tests.limits import time_limit
from tests.test_resnet import one_thread  # noqa: F401

COMM = MPI.COMM_WORLD
MGRIT = {"levels": 2, "coarsening": 2}
FIXED = {"forward_iterations": 6, "backward_iterations": 6}  # as many as are exact with 12 layers
VARIANTS = {"plain": {}, "checkpoint": {"checkpoint": True}, "batched": {"batched": True, **FIXED}}


class Plain(nn.Module):
    """A loop over the modules of a network."""

    def __init__(self, blocks, opening, closing):
        super().__init__()
        self.layers, self.opening, self.closing = nn.ModuleList(blocks), opening, closing

    def forward(self, x):
        u = self.opening(x)
        for layer in self.layers:
            u = u + 0.3 * layer(u)
        return self.closing(u)


def both(make, layers=12, opening=None, closing=None, **options):
    """A layer-parallel network and the same one as a plain loop, in float64."""
    torch.manual_seed(1)
    opening, closing = opening or nn.Linear(4, 4), closing or nn.Linear(4, 3)
    plain = Plain([make(n) for n in range(layers)], opening, closing)
    plain.double()
    net = LayerParallel(
        list(plain.layers), opening=opening, closing=closing, h=0.3, **{"mgrit": MGRIT, **options}
    )  # fmt: skip
    return net, plain


def samples(count=6):
    return torch.randn(count, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def square(out):
    return (out**2).sum()


def require_equal(mine, theirs, tolerance=1e-9):
    """Gradients of some named tensors, or their values where there are none to compare."""
    for name, t in mine.items():
        want = theirs[name]
        assert (t is None) == (want is None), name
        worst = 0.0 if t is None else (t.detach() - want.detach()).abs().max().item()
        assert worst <= tolerance, f"{name}: {worst:.1e}"


def gradients(module):
    return {name: p.grad for name, p in module.named_parameters()}


def train_alike(net, plain, steps=3, x=None):
    """Steps of gradient descent with both; parameters, gradients and buffers agree."""
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.01) for m in (net, plain)]
    for _ in range(steps):
        for module, optimizer in zip((net, plain), optimizers, strict=True):
            optimizer.zero_grad()
            square(module(samples() if x is None else x)).backward()
            optimizer.step()
        require_equal(gradients(net), gradients(plain))
        require_equal(dict(net.named_buffers()), dict(plain.named_buffers()))


def tanh_layer(n):
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh())


@pytest.mark.parallel([1, 2, 3])
@time_limit(60)
@pytest.mark.parametrize("how", VARIANTS)
def test_hooks_of_parameters_are_called_once(how):
    net, plain = both(tanh_layer, **VARIANTS[how])
    handles = [p.register_hook(lambda g: 0.5 * g) for m in (net, plain) for p in m.parameters()]
    train_alike(net, plain)
    for handle in handles:
        handle.remove()
    train_alike(net, plain, steps=1)


class Shifted(nn.Module):
    """A layer that every second one differs from, as windows of attention do."""

    def __init__(self, shift):
        super().__init__()
        self.linear, self.shift = nn.Linear(4, 4), shift

    def forward(self, u):
        return torch.tanh(self.linear(torch.roll(u, self.shift, 1)))


@pytest.mark.parallel([1, 2, 3])
@time_limit(60)
def test_attributes_of_layers_differ():
    """All layers that are evaluated together have the same shift, but not that of the first layer."""
    net, plain = both(lambda n: Shifted(n % 2))
    train_alike(net, plain, steps=4)
    assert net.batching[0].startswith("layer by layer")
    net, _ = both(lambda n: Shifted(n % 2), batched=True)
    with pytest.raises(InputError, match=r"attributes.*batched=False"):
        net(samples())
    net, plain = both(lambda n: Shifted(1), batched=True, **FIXED)  # copies of one attribute are one structure
    train_alike(net, plain)


@pytest.mark.parallel([1, 2, 3])
@time_limit(60)
def test_hooks_of_layers_are_called_layer_by_layer():
    net, plain = both(tanh_layer)
    for module in (net, plain):
        for n in (1, 5):
            module.layers[n].register_forward_hook(lambda m, args, out: 2 * out if torch.is_tensor(out) else out)
    train_alike(net, plain, steps=4)
    net, _ = both(tanh_layer, batched=True)
    for layer in net.layers:
        layer.register_forward_hook(lambda m, args, out: out)
    with pytest.raises(InputError, match="hooks"):
        net(samples())


@pytest.mark.parallel([1, 2, 3])
@time_limit(60)
def test_shared_parameters_are_refused():
    one, ends = tanh_layer(0), nn.Linear(4, 4)
    tied = nn.Linear(4, 4)
    tied.weight = ends.weight
    with pytest.raises(InputError, match="layer 0 and layer 1 share"):
        LayerParallel([one] * 4)
    with pytest.raises(InputError, match="opening and closing share"):
        LayerParallel([tanh_layer(0) for _ in range(4)], opening=ends, closing=tied)
    with pytest.raises(InputError, match="opening and closing share"):
        LayerParallelResNet(ends, Dense(4, "tanh"), 8, tied)
    with pytest.raises(InputError, match="share the parameter"):
        LayerParallel(Repeat(lambda n: one, 2 * COMM.size))


class Spectral(nn.Module):
    """A Fourier layer: complex parameters, real states."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(0.3 * torch.randn(3, dtype=torch.complex128))

    def forward(self, u):
        return torch.tanh(torch.fft.irfft(torch.fft.rfft(u) * self.weight, n=u.shape[-1]))


@pytest.mark.parallel([1, 2, 3])
@time_limit(60)
def test_complex_parameters():
    net, plain = both(lambda n: Spectral())
    for module in (net, plain):
        square(module(samples())).backward()
    require_equal(gradients(net), gradients(plain))
    norm = net.clip_grad_norm_(0.1)
    assert norm == pytest.approx(torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.1).item(), rel=1e-10)
    require_equal(gradients(net), gradients(plain))


class Averaging(nn.Module):
    """A layer with a running mean, written in place or replaced."""

    def __init__(self, replaces):
        super().__init__()
        self.linear, self.replaces = nn.Linear(4, 4), replaces
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, u):
        if self.training:
            mean = 0.9 * self.mean + 0.1 * u.detach().mean(0)
            if self.replaces:
                self.mean = mean
            else:
                self.mean.copy_(mean)
        return torch.tanh(self.linear(u) - self.mean)


@pytest.mark.parallel([1, 2, 3])
@time_limit(60)
@pytest.mark.parametrize("replaces", [False, True])
@pytest.mark.parametrize("how", VARIANTS)
def test_running_means(how, replaces):
    net, plain = both(lambda n: Averaging(replaces), **VARIANTS[how])
    train_alike(net, plain)


class Heads(nn.Module):
    """Two outputs."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 2)

    def forward(self, u):
        return {"a": self.a(u), "b": self.b(u)}


@pytest.mark.parallel([1, 2, 3])
@time_limit(60)
def test_parameters_behind_an_unused_output_have_no_gradient():
    net, plain = both(tanh_layer, closing=Heads())
    for module in (net, plain):
        square(module(samples())["b"]).backward()
    require_equal(gradients(net), gradients(plain))


@pytest.mark.parallel([1, 2, 3])
@time_limit(60)
@pytest.mark.parametrize("how", VARIANTS)
@pytest.mark.parametrize("frozen", [False, True])
def test_functional_calls(how, frozen):
    """With other parameters than the network's own, which may be frozen."""
    net, plain = both(tanh_layer, **VARIANTS[how])
    found = []
    for module in (net, plain):
        module.requires_grad_(not frozen)
        given = {name: (1.1 * p.detach()).requires_grad_() for name, p in module.named_parameters()}
        square(torch.func.functional_call(module, given, (samples(),))).backward()
        found.append({name: p.grad for name, p in given.items()})
    require_equal(*found)


@pytest.mark.parallel([1, 2, 3])
@time_limit(60)
@pytest.mark.parametrize("how", VARIANTS)
def test_parameters_frozen_before_the_backward_pass(how):
    net, plain = both(tanh_layer, **VARIANTS[how])
    for module in (net, plain):
        loss = square(module(samples()))
        for layer in module.layers[::2]:
            layer.requires_grad_(False)
        loss.backward()
    require_equal(gradients(net), gradients(plain))


@pytest.mark.parallel([1, 2, 3])
@time_limit(60)
@pytest.mark.parametrize("batched", [False, True])
def test_warm_starts_of_batches_that_change_their_size(batched):
    net, plain = both(tanh_layer, batched=batched, **FIXED)
    for count in (6, 3, 1, 1, 5):
        for module, name in ((net, {"batch": 0}), (plain, {})):
            module.zero_grad()
            square(module(samples(count), **name)).backward()
        require_equal(gradients(net), gradients(plain))


@pytest.mark.parallel([1, 2, 3])
@time_limit(60)
def test_states_with_unknown_names_are_refused():
    net, _ = both(tanh_layer)
    state, other = net.full_state_dict(), torch.zeros(4, 4, dtype=torch.float64)
    net.load_state_dict(copy.copy(state))
    for name in ("layers.12.0.weight", "opening.scale", "layers.3.0.wieght"):
        try:
            net.load_state_dict({**state, name: other})
            refused = False
        except RuntimeError:
            refused = True
        assert COMM.allreduce(refused, op=MPI.LOR), name  # by the rank that has the layer


@pytest.mark.parallel([1, 2, 3])
@time_limit(60)
def test_layers_that_write_to_their_input():
    net, _ = both(lambda n: nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4)), mgrit={"levels": 1})
    with pytest.raises(Exception, match="writes to its input"):
        net(samples())

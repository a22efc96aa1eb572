"""Small layer-parallel networks of all kinds, each beside the same network in plain torch, written here as a loop."""

from dataclasses import dataclass, field

import torch
from mpi4py import MPI
from torch import nn

from pint_fem.resnet import Convolution, Dense, LayerParallel, LayerParallelResNet
from pint_fem.resnet.parallel.parameters import Elsewhere

__all__ = ["COMM", "KINDS", "PlainLayers", "PlainStack", "Task", "make", "own_part", "require_same_state", "take_step"]

COMM = MPI.COMM_WORLD
DEPTH = 7


class PlainLayers(nn.Module):
    """A loop over modules; keys of its state are those of the layer-parallel network."""

    def __init__(self, opening, stages, transitions, closing, residual, h):
        super().__init__()
        self.opening, self.closing, self.transitions = opening, closing, nn.ModuleList(transitions)
        self.layers, self.counts = nn.ModuleList(f for stage in stages for f in stage), [len(s) for s in stages]
        self.residual, self.h = residual, h

    def forward(self, x, *extra):
        u, layers = self.opening(x), iter(self.layers)
        for number, count in enumerate(self.counts):
            u = self.transitions[number - 1](u) if number else u
            for _ in range(count):
                f = next(layers)(u, *extra)
                if not self.residual:
                    u = f
                elif torch.is_tensor(u):
                    u = u + self.h * f
                else:
                    u = tuple(a + self.h * b for a, b in zip(u, f, strict=True))
        return self.closing(u)


class PlainStack(nn.Module):
    """A loop over the rows of stacked parameters: u + h tanh(W u + b), W a matrix or a convolution."""

    def __init__(self, opening, closing, state, h):
        super().__init__()
        self.opening, self.closing, self.h = opening, closing, h
        self.theta = nn.ParameterDict({k[6:]: nn.Parameter(t) for k, t in state.items() if k.startswith("theta.")})

    def forward(self, x):
        u = self.opening(x)
        for weight, bias in zip(self.theta["weight"], self.theta["bias"], strict=True):
            flat = weight.ndim == 2
            z = nn.functional.linear(u, weight, bias) if flat else nn.functional.conv2d(u, weight, bias, padding=1)
            u = u + self.h * torch.tanh(z)
        return self.closing(u)


class GroupNormBlock(nn.Module):
    """Two convolutions with normalisation, as users write them."""

    def __init__(self, channels):
        super().__init__()
        self.first, self.second = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.norm = nn.GroupNorm(2, channels)

    def forward(self, u):
        return self.second(torch.tanh(self.norm(self.first(u))))


class Attention(nn.Module):
    """A pre-norm transformer block with dropout and a mask as extra input; its output, not a residual."""

    def __init__(self, width, p):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out, self.p = nn.Linear(width, 3 * width), nn.Linear(width, width), p
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width), nn.Dropout(p))

    def forward(self, u, mask):
        q, k, v = self.qkv(self.norm1(u)).chunk(3, dim=-1)
        weights = torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + mask, dim=-1)
        u = u + 0.2 * self.out(nn.functional.dropout(weights, self.p, self.training) @ v)
        return u + 0.2 * self.mlp(self.norm2(u))


class Pair(nn.Module):
    """A block whose state is a tuple."""

    def __init__(self):
        super().__init__()
        self.ab, self.ba = nn.Linear(4, 3), nn.Linear(3, 4)

    def forward(self, u):
        a, b = u
        return torch.tanh(self.ba(b).mean(1)), torch.tanh(self.ab(a)).unsqueeze(1) - b


class OpenPair(nn.Module):
    """To a tuple of tensors."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(2, 4), nn.Linear(2, 6)

    def forward(self, x):
        return self.a(x), self.b(x).reshape(len(x), 2, 3)


class ClosePair(nn.Module):
    """From a tuple of tensors."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(3, 3)

    def forward(self, u):
        return self.a(u[0]) + self.b(u[1]).sum(1)


@dataclass
class Task:
    """A network, the same one in plain torch, and data."""

    net: nn.Module
    plain: nn.Module
    x: torch.Tensor
    y: torch.Tensor
    extra: tuple = field(default_factory=tuple)

    def loss(self, module, part=slice(None)):
        """Cross entropy of a module's output."""
        return nn.functional.cross_entropy(module(self.x[part], *self.extra), self.y[part])


def _modules(kind, p):
    """Opening, stages of blocks, transitions, closing, batch, extra inputs and options."""
    flat = dict(x=torch.randn(6, 2), options=dict(h=0.3))
    image = dict(x=torch.randn(4, 1, 4, 4), options=dict(h=0.3))
    head = lambda n: nn.Sequential(nn.Flatten(), nn.Linear(n, 3))
    if kind == "groupnorm":
        blocks = [GroupNormBlock(2) for _ in range(DEPTH)]
        return dict(opening=nn.Conv2d(1, 2, 3, padding=1), stages=[blocks], closing=head(32), **image)
    if kind == "batchnorm":
        blocks = [nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh()) for _ in range(DEPTH)]
        opening = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Dropout(p))
        return dict(opening=opening, stages=[blocks], closing=nn.Linear(4, 3), **flat)
    if kind == "attention":
        blocks = [Attention(4, p) for _ in range(DEPTH)]
        mask = torch.full((5, 5), -torch.inf).triu(1)
        opening = nn.Sequential(nn.Linear(2, 4), nn.Dropout(p))
        return dict(
            opening=opening, stages=[blocks], closing=head(20), x=torch.randn(4, 5, 2), extra=(mask,),
            options=dict(residual=False),
        )  # fmt: skip
    if kind == "tuple":
        return dict(opening=OpenPair(), stages=[[Pair() for _ in range(DEPTH)]], closing=ClosePair(), **flat)
    stage = lambda n: [nn.Sequential(nn.Conv2d(n, n, 3, padding=1), nn.BatchNorm2d(n), nn.Tanh()) for _ in range(4)]
    return dict(
        opening=nn.Conv2d(1, 2, 3, padding=1), stages=[stage(2), stage(3)],
        transitions=[nn.Conv2d(2, 3, 3, stride=2, padding=1)], closing=head(12), **image,
    )  # fmt: skip


KINDS = ("dense", "conv", "groupnorm", "batchnorm", "attention", "tuple", "stages")


def make(kind, *, p=0.0, dtype=torch.float64, **options):
    """A task of a kind (of :data:`KINDS`), with dropout of probability ``p`` where its blocks have any.

    The plain network of one with dropout is the serial copy, which draws the same masks.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        options = {"mgrit": {"levels": 2, "coarsening": 2}, **options}
        if kind in ("dense", "conv"):
            flat = kind == "dense"
            x = torch.randn(6, 2, dtype=dtype) if flat else torch.randn(4, 1, 4, 4, dtype=dtype)
            opening = nn.Sequential(nn.Linear(2, 5), nn.Dropout(p)) if flat else nn.Conv2d(1, 2, 3, padding=1)
            closing = nn.Linear(5, 3) if flat else nn.Sequential(nn.Flatten(), nn.Linear(32, 3))
            layer = Dense(5, "tanh") if flat else Convolution(2, 3, "tanh")
            net = LayerParallelResNet(opening, layer, DEPTH, closing, final_time=2.0, dtype=dtype, **options)
            plain = PlainStack(opening.to(dtype), closing.to(dtype), net.full_state_dict(), 2.0 / DEPTH)
            extra = ()
        else:
            parts = _modules(kind, p)
            x, extra = parts["x"].to(dtype), tuple(t.to(dtype) for t in parts.get("extra", ()))
            own = {"residual": True, "h": 1.0, **parts["options"]}
            modules = nn.ModuleList([parts["opening"], *(nn.ModuleList(s) for s in parts["stages"]), parts["closing"]])
            modules.to(dtype)
            transitions = [t.to(dtype) for t in parts.get("transitions", ())]
            stages = [list(s) for s in parts["stages"]]
            net = LayerParallel(
                stages if len(stages) > 1 else stages[0], opening=parts["opening"], closing=parts["closing"],
                transitions=transitions, **own, **options,
            )  # fmt: skip
            plain = PlainLayers(parts["opening"], stages, transitions, parts["closing"], own["residual"], own["h"])
            if p:
                plain = net.serial_copy()
    return Task(net, plain, x, torch.arange(len(x)) % 3, extra)


def own_part(net, name, t):
    """The rows of a tensor of the plain network that this rank has."""
    return t[net.lo : net.hi] if name.startswith("theta.") else t


def require_same_state(net, plain, tolerance=1e-10, *, gradients=False):
    """The network's own parameters and buffers, or gradients, are those of the plain one."""
    theirs = {**dict(plain.named_parameters()), **dict(plain.named_buffers())}
    mine = {**dict(net.named_parameters()), **({} if gradients else dict(net.named_buffers()))}
    for name, t in mine.items():
        want = theirs[name].grad if gradients else theirs[name]
        t = t.grad if gradients else t
        if want is None or t is None:
            assert want is t, f"{name}: {t} instead of {want}"
            continue
        want = own_part(net, name, want)
        worst = (t - want).abs().max().item()
        assert worst <= tolerance * max(1.0, want.abs().max().item()), f"{name}: {worst:.1e}"
    counted = COMM.allreduce(sum(p.numel() for p in net.parameters()))
    assert counted == sum(p.numel() for p in plain.parameters())


def take_step(task, module, optimizer, part=slice(None)):
    """One step of an ordinary loop; returns the loss."""
    optimizer.zero_grad()
    loss = task.loss(module, part)
    loss.backward()
    optimizer.step()
    return loss.item()


def is_here(module):
    """Whether this rank has a module of a network."""
    return not isinstance(module, Elsewhere)

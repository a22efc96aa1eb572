"""Users' blocks for tests of layer-parallel networks, and their comparison with the same network in plain torch."""

import torch
from mpi4py import MPI
from torch import nn

from pint_fem.resnet import LayerParallel

COMM = MPI.COMM_WORLD


class ConvolutionBlock(nn.Module):
    """Two convolutions with a normalisation between them."""

    def __init__(self, channels=4, norm="group"):
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.GroupNorm(2, channels) if norm == "group" else nn.BatchNorm2d(channels)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, u):
        return self.second(torch.relu(self.norm(self.first(u))))


class AttentionBlock(nn.Module):
    """A pre-norm transformer block with a mask and dropout."""

    def __init__(self, width=8, dropout=0.2):
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.attention = nn.MultiheadAttention(width, 2, dropout=dropout, batch_first=True)
        wide = 2 * width
        self.mlp = nn.Sequential(nn.Linear(width, wide), nn.GELU(), nn.Dropout(dropout), nn.Linear(wide, width))

    def forward(self, u, mask):
        v = self.norms[0](u)
        u = u + 0.2 * self.attention(v, v, v, attn_mask=mask, need_weights=False)[0]
        return u + 0.2 * self.mlp(self.norms[1](u))


class CouplingBlock(nn.Module):
    """A reversible block: its state is a pair of tensors."""

    def __init__(self, width=6):
        super().__init__()
        self.f, self.g = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, state):
        a, b = state
        a = a + 0.3 * torch.tanh(self.f(b))
        return a, b + 0.3 * torch.tanh(self.g(a))


class Split(nn.Module):
    """The opening layer of coupling blocks."""

    def __init__(self, features=3, width=6):
        super().__init__()
        self.linear = nn.Linear(features, 2 * width)

    def forward(self, x):
        return tuple(self.linear(x).chunk(2, dim=1))


class Join(nn.Module):
    """The classification layer of coupling blocks."""

    def __init__(self, width=6, classes=3):
        super().__init__()
        self.linear = nn.Linear(2 * width, classes)

    def forward(self, state):
        return self.linear(torch.cat(state, dim=1))


class MeanHead(nn.Module):
    """The classification layer of a transformer."""

    def __init__(self, width=8, classes=3):
        super().__init__()
        self.linear = nn.Linear(width, classes)

    def forward(self, u):
        return self.linear(u.mean(1))


def image_batch(count=6, seed=3):
    """Images and labels, the same on all ranks."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(count, 1, 6, 6, generator=g, dtype=torch.float64), torch.randint(3, (count,), generator=g)


def network(kind, layers=9, *, seed=1, **options):
    """A network of a kind in float64, a batch, labels and extra inputs; the same on all ranks."""
    torch.manual_seed(seed)
    options = {"mgrit": {"levels": 2, "coarsening": 3}, **options}
    x, y = image_batch()
    extra = ()
    if kind in ("group", "batch"):
        net = LayerParallel(
            [ConvolutionBlock(4, kind) for _ in range(layers)], opening=nn.Conv2d(1, 4, 3, padding=1),
            closing=nn.Sequential(nn.Flatten(), nn.Linear(4 * 36, 3)), h=0.2, **options,
        )  # fmt: skip
    elif kind == "stages":
        net = LayerParallel(
            [[ConvolutionBlock(4, "batch") for _ in range(layers)], [ConvolutionBlock(6) for _ in range(layers - 2)]],
            transitions=[nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.Dropout(0.3))],
            opening=nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Dropout(0.3)),
            closing=nn.Sequential(nn.Flatten(), nn.Dropout(0.3), nn.Linear(6 * 9, 3)), h=0.2, **options,
        )  # fmt: skip
    elif kind == "attention":
        g = torch.Generator().manual_seed(4)
        x, y = torch.randn(5, 7, 3, generator=g, dtype=torch.float64), torch.randint(3, (5,), generator=g)
        extra = (torch.triu(torch.ones(7, 7, dtype=torch.bool), 1),)
        net = LayerParallel(
            [AttentionBlock() for _ in range(layers)], opening=nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.2)),
            closing=MeanHead(), residual=False, **options,
        )  # fmt: skip
    else:
        x = x.flatten(1)[:, :3].clone()
        net = LayerParallel(
            [CouplingBlock() for _ in range(layers)], opening=Split(), closing=Join(), residual=False, **options
        )
    return net.double(), x, y, extra


def largest_difference(net, serial, x, y, extra=(), loss=nn.functional.cross_entropy):
    """Largest difference of outputs, derivatives of the input, all gradients and buffers after a training step, on all
    ranks.
    """
    x = x.clone().requires_grad_()
    net.zero_grad()
    out = net(x, *extra)
    loss(out, y).backward()
    of_input, x.grad = x.grad, None
    serial.zero_grad()
    expected = serial(x, *extra)
    loss(expected, y).backward()
    worst = max(_difference(out, expected), _difference(of_input, x.grad))
    parameters, buffers = dict(serial.named_parameters()), dict(serial.named_buffers())
    for name, p in net.named_parameters():
        assert (p.grad is None) == (parameters[name].grad is None), name
        worst = max(worst, 0.0 if p.grad is None else _difference(p.grad, parameters[name].grad))
    for name, b in net.named_buffers():
        worst = max(worst, _difference(b, buffers[name]))
    return COMM.allreduce(worst, op=MPI.MAX)


def _difference(a, b):
    return (a.detach().double() - b.detach().double()).abs().max().item()

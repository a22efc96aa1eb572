r"""Deep networks of blocks for measurements, :math:`u_{n+1} = u_n + h f_n(u_n)` with :math:`h = 1/N`, on any device.

============== =================================================== ==============================
kind           f                                                   state
============== =================================================== ==============================
``dense``      tanh of a linear map                                ``(batch, width)``
``conv``       convolution, GroupNorm, ReLU, convolution           ``(batch, width, size, size)``
``transformer`` attention and a hidden layer of the same LayerNorm  ``(batch, size, width)``
============== =================================================== ==============================

The transformer block adds attention and hidden layer in parallel, as in GPT-J and PaLM (arXiv:2204.02311, Sec. 2), so
that it is one residual function.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pint_fem.errors import InputError
from problems.serial_networks import EagerLoop, residual_network

__all__ = ["KINDS", "BlockProblem", "ConvolutionBlock", "ParallelAttentionBlock", "block_problem"]

KINDS = ("dense", "conv", "transformer")
CLASSES = 4


class ConvolutionBlock(nn.Module):
    """``f`` of two convolutions with 3 x 3 kernels, GroupNorm and ReLU between them.

    Parameters
    ----------
    channels
        Channels of a state ``(batch, channels, height, width)``, a multiple of four.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.GroupNorm(4, channels)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, u: Tensor) -> Tensor:
        """``f(u)``."""
        return self.second(F.relu(self.norm(self.first(u))))


class ParallelAttentionBlock(nn.Module):
    """``f`` of self-attention and a network with one hidden layer of twice the width, both of the normalised state.

    Parameters
    ----------
    width
        Features of a state ``(batch, places, width)``, a multiple of the heads.
    heads
        Number of heads.
    fused
        Whether attention is torch's fused function, which has no batched form on CPUs, or products and a softmax.
    """

    def __init__(self, width: int, heads: int = 4, *, fused: bool = False):
        super().__init__()
        self.heads, self.fused = heads, fused
        self.norm = nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.expand, self.contract = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, u: Tensor) -> Tensor:
        """``f(u)``."""
        v = self.norm(u)
        batch, places, width = v.shape
        q, k, values = self.qkv(v).view(batch, places, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        if self.fused:
            mixed = F.scaled_dot_product_attention(q, k, values)
        else:
            mixed = torch.softmax(q @ k.transpose(-1, -2) * (width // self.heads) ** -0.5, dim=-1) @ values
        mixed = mixed.transpose(1, 2).reshape(batch, places, width)
        return self.project(mixed) + self.contract(F.gelu(self.expand(v)))


class _MeanOfPlaces(nn.Module):
    """Mean over all axes but the first and that of the features."""

    def __init__(self, axis: int):
        super().__init__()
        self.axis = axis

    def forward(self, u: Tensor) -> Tensor:
        """``(batch, features)``."""
        return u.movedim(self.axis, -1).flatten(1, -2).mean(1)


@dataclass
class BlockProblem:
    """A network of blocks and a batch.

    Attributes
    ----------
    opening, closing : Module
    blocks : list of Module
    h : float
    x, y : Tensor
        Batch and labels.
    """

    opening: nn.Module
    blocks: list[nn.Module]
    closing: nn.Module
    h: float
    x: Tensor
    y: Tensor

    def serial(self) -> EagerLoop:
        """The plain network."""
        return residual_network(self.opening, self.blocks, self.closing, h=self.h)


def block_problem(
    kind: str,
    depth: int,
    width: int,
    *,
    batch: int = 32,
    size: int = 8,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> BlockProblem:
    """A network of ``depth`` blocks with random parameters, and random data.

    Parameters
    ----------
    kind
        One of :data:`KINDS`.
    depth, width
        Blocks; width or channels of a state.
    batch, size
        Samples; height and width of images, or number of places.
    dtype, device
        Of parameters and data, which are the same numbers everywhere.
    seed
        Of the random numbers.

    Raises
    ------
    InputError
        On another kind, or a width that does not divide by four.
    """
    if kind not in KINDS:
        raise InputError(f"kind {kind!r}: give one of {KINDS}")
    if width % 4:
        raise InputError(f"width {width}: give a multiple of 4")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "dense":
            opening, made = nn.Linear(2, width), lambda: nn.Sequential(nn.Linear(width, width), nn.Tanh())
            closing, x = nn.Linear(width, CLASSES), torch.randn(batch, 2)
        elif kind == "conv":
            opening, made = nn.Conv2d(1, width, 3, padding=1), lambda: ConvolutionBlock(width)
            closing = nn.Sequential(_MeanOfPlaces(1), nn.Linear(width, CLASSES))
            x = torch.randn(batch, 1, size, size)
        else:
            fused = torch.device(device).type == "cuda"
            opening, made = nn.Linear(2, width), lambda: ParallelAttentionBlock(width, fused=fused)
            closing = nn.Sequential(_MeanOfPlaces(2), nn.Linear(width, CLASSES))
            x = torch.randn(batch, size, 2)
        y = torch.randint(CLASSES, (batch,))
        blocks = [made() for _ in range(depth)]
    to = dict(dtype=dtype, device=device)
    modules = [module.to(**to) for module in (opening, *blocks, closing)]
    return BlockProblem(modules[0], modules[1:-1], modules[-1], 1.0 / depth, x.to(**to), y.to(device))

"""The same network in plain torch, differentiated by autograd: reference of tests, baseline of benchmarks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from pint_fem.resnet.parallel.random_numbers import (
    count_pass,
    devices_of,
    mixed_seed,
    own_random_numbers,
    pass_number,
    seed_generators,
)

__all__ = ["SerialLayers"]


class SerialLayers(nn.Module):
    """A network whose layers are evaluated in a loop on one process.

    Parameters
    ----------
    layers
        All layers, copied.
    counts
        Number of layers in each stage.
    opening, closing, transitions, residual, h, seed
        As for :class:`~pint_fem.resnet.LayerParallel`.
    passes
        Number of passes with random numbers so far.
    """

    def __init__(
        self, layers: Sequence[nn.Module], counts: Sequence[int], opening: nn.Module, closing: nn.Module,
        transitions: Sequence[nn.Module] = (), *, residual: bool = True, h: float = 1.0, seed: int = 0, passes: int = 0,
    ):  # fmt: skip
        super().__init__()
        self.layers = nn.ModuleList(copy.deepcopy(m) for m in layers)
        self.opening, self.closing = copy.deepcopy(opening), copy.deepcopy(closing)
        self.transitions = nn.ModuleList(copy.deepcopy(t) for t in transitions)
        self.counts, self.residual, self.h = list(counts), residual, h
        self.seed, self.passes, self.evaluations = seed, passes, 0

    def extra_repr(self) -> str:
        """Depth, for torch's ``repr`` of modules."""
        return f"{len(self.layers)} layers"

    def forward(self, x: Any, *extra: Any) -> Any:
        """Output of the network for a batch ``x`` and extra inputs of the layers."""
        devices = devices_of(self.parameters())
        with own_random_numbers(devices):
            seed = lambda place: seed_generators(mixed_seed(self.seed, *pass_number(self), place), devices)
            seed(0)
            u, n = self.opening(x), 0
            for number, count in enumerate(self.counts):
                if number:
                    seed(-number)
                    u = self.transitions[number - 1](u)
                for layer in self.layers[n : n + count]:
                    seed(1 + n)
                    u = self._step(u, layer(u, *extra))
                    n += 1
            seed(1 << 62)
            out = self.closing(u)
        count_pass(self)
        return out

    def _step(self, u: Any, y: Any) -> Any:
        if not self.residual:
            return y
        if torch.is_tensor(u):
            return torch.add(u, y, alpha=self.h)
        return tuple(torch.add(a, b, alpha=self.h) for a, b in zip(u, y, strict=True))

    def apply(self, fn: Callable[[nn.Module], None]) -> SerialLayers:
        """``fn`` of every module, with the random numbers of the layer-parallel network."""
        base = int(torch.randint(1 << 62, ()))
        devices = devices_of(self.parameters())
        with own_random_numbers(devices):
            for place, module in (
                (0, self.opening), *((-1 - i, t) for i, t in enumerate(self.transitions)), (1 << 62, self.closing),
                *((1 + n, m) for n, m in enumerate(self.layers)),
            ):  # fmt: skip
                seed_generators(mixed_seed(base, place), devices)
                module.apply(fn)
        fn(self)
        return self

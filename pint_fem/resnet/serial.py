"""The same network in plain torch: the oracle of the tests and the opponent of the benchmarks."""

from __future__ import annotations

import copy

import torch
from torch import nn

from pint_fem.resnet.layers import Layer
from pint_fem.resnet.network import initial_parameters

__all__ = ["SerialResNet"]


class SerialResNet(nn.Module):
    """A loop over one stacked parameter, differentiated by autograd; arguments as of ``LayerParallelResNet``.

    With the same seed and modules it has the same parameters. (Taking the stack apart once, by ``unbind``, is the
    fastest of the plain loops: indexing it layer by layer, or a module a layer, take a third more.)
    """

    def __init__(
        self,
        opening: nn.Module,
        layer: Layer,
        nlayers: int,
        closing: nn.Module,
        *,
        final_time: float = 1.0,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        self.layer, self.nlayers, self.h, self.dtype = layer, nlayers, final_time / nlayers, dtype
        own = initial_parameters(layer, range(nlayers), seed, dtype)
        self.theta = nn.ParameterDict({name: nn.Parameter(p) for name, p in own.items()})
        self.opening = copy.deepcopy(opening).to(dtype)
        self.closing = copy.deepcopy(closing).to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What the network gives for a batch."""
        u = self.opening(x.to(self.dtype) if x.is_floating_point() else x)
        act, h = self.layer.activation.function, self.h
        for theta in zip(*(self.theta[name].unbind(0) for name in self.layer.shapes), strict=True):
            u = torch.add(u, act(self.layer.serial(theta, u)), alpha=h)
        return self.closing(u)

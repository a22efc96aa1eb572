"""The same residual network in plain torch, differentiated by autograd: reference of tests, baseline of benchmarks."""

from __future__ import annotations

import copy

import torch
from torch.nn import Module, Parameter, ParameterDict

from pint_fem.resnet.layers import Layer

__all__ = ["SerialResNet"]


class SerialResNet(Module):
    """A residual network whose layers are evaluated in a loop on one process.

    With the same seed and modules it has the same parameters as a :class:`~pint_fem.resnet.LayerParallelResNet`. They
    are one stacked tensor, taken apart once by ``unbind``, which is the fastest of the plain loops.

    Parameters
    ----------
    opening, layer, nlayers, closing, final_time, seed, dtype
        As for :class:`~pint_fem.resnet.LayerParallelResNet`.
    """

    def __init__(
        self,
        opening: Module,
        layer: Layer,
        nlayers: int,
        closing: Module,
        *,
        final_time: float = 1.0,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        self.layer, self.nlayers, self.h, self.dtype = layer, nlayers, final_time / nlayers, dtype
        own = layer.initial(range(nlayers), seed, dtype)
        self.theta = ParameterDict({name: Parameter(p, name not in layer.activation.frozen) for name, p in own.items()})
        self.opening = copy.deepcopy(opening).to(dtype)
        self.closing = copy.deepcopy(closing).to(dtype)

    def extra_repr(self) -> str:
        """Depth, for torch's ``repr`` of modules."""
        return f"{self.nlayers} {type(self.layer).__name__} layers"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Output of the network for a batch ``x``."""
        u = self.opening(x.to(self.dtype) if x.is_floating_point() else x)
        layer, h = self.layer, self.h
        act = layer.activation.serial
        for theta in zip(*(self.theta[name].unbind(0) for name in layer.shapes), strict=True):
            u = torch.add(u, act(layer.serial(theta, u), layer.of_activation(theta)), alpha=h)
        return self.closing(u)

"""Layers of coarse levels whose parameters are the means over the layers of their intervals."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import nn

from pint_fem.resnet.parallel.interval_means import coarse_means
from pint_fem.resnet.parallel.solvers import SweepSolvers

__all__ = ["MeanKey", "MeanLayers", "tensor_shapes"]

Tensor = torch.Tensor
MeanKey = tuple[str, int, int]
"""Sweep (``"forward"`` or ``"backward"``), distance in layers of the level's points, and step on that level."""


def _averaged(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers that have a mean."""
    named = [*module.named_parameters(), *module.named_buffers()]
    return {name: t for name, t in named if t.is_floating_point() or t.is_complex()}


def tensor_shapes(module: nn.Module) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of what is averaged, which have to be the same in all layers of a stage."""
    return [(name, tuple(t.shape)) for name, t in _averaged(module).items()]


class MeanLayers:
    """The layers of the own steps of all coarse levels.

    Parameters
    ----------
    solvers
        Of the stage.
    own
        The own layers by number, all with tensors of the same names and shapes. What is not averaged is that of the own
        layer at the end of the interval where the interval belongs to this rank.
    """

    def __init__(self, solvers: SweepSolvers, own: Mapping[int, nn.Module]):
        N = solvers.nlayers
        self._plans = coarse_means(solvers, solvers.grid)
        self._strides = solvers.strides[1:]
        self._likes: dict[MeanKey, int] = {}
        self.modules: dict[MeanKey, nn.Module] = {}
        for sweep in ("forward", "backward"):
            for level, stride in zip(solvers.solvers[sweep].levels[1:], self._strides, strict=True):
                for i in range(level.lo, level.hi):
                    like = (i + 1) * stride - 1 if sweep == "forward" else N - (i + 1) * stride
                    self._likes[sweep, stride, i] = like
                    made = copy.deepcopy(own[like])
                    self.modules[sweep, stride, i] = made.requires_grad_(requires_grad=False)

    def update(self, sweep: str, own: Mapping[int, nn.Module]) -> dict[MeanKey, nn.Module]:
        """The layers of a sweep with the present means (collective over the ranks that share the layers)."""
        found = {key: module for key, module in self.modules.items() if key[0] == sweep}
        with torch.no_grad():
            each = [_averaged(m) for m in own.values()]
            targets = {key: dict([*m.named_parameters(), *m.named_buffers()]) for key, m in found.items()}
            for name in each[0]:
                stacked = torch.stack([tensors[name] for tensors in each])
                for stride, means in zip(self._strides, self._plans[sweep], strict=True):
                    keys = [key for key in found if key[1] == stride]
                    for key, mean in zip(keys, means([stacked])[0], strict=True):
                        _put(targets[key][name], mean)
            for key, module in found.items():
                like = own[self._likes[key]]
                for part, other in zip(module.modules(), like.modules(), strict=True):
                    part.training = other.training
                for name, t in like.named_buffers():
                    if name not in each[0]:
                        targets[key][name].copy_(t)
        return found


def _put(target: Tensor, values: Tensor) -> None:
    """Set a tensor's values, and its type and device to theirs."""
    if target.dtype == values.dtype and target.device == values.device:
        target.copy_(values)
    else:
        target.data = values.clone()

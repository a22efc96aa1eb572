"""Layers of any kind as the steps of an evolution: the maps that MGRIT calls on each level."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from pint_fem.resnet.blocks.batched_layers import BatchedLayers

__all__ = ["BlockAdjoint", "BlockForward", "as_tensor"]

Tensor = torch.Tensor


def as_tensor(array: Any) -> Tensor:
    """A tensor on the memory of an array; a tensor as it is."""
    return torch.from_numpy(array) if isinstance(array, np.ndarray) else array


class _Step:
    """Base of the maps of a level.

    Parameters
    ----------
    stride
        Distance in layers of the level's points.
    propagates_nonfinite
        Whether values that are not finite stay so in all later layers.

    Attributes
    ----------
    graphs : LayerGraphs
        Of the present pass; ``None`` between passes.
    batched : BatchedLayers or None
        Evaluates several layers in one call.
    """

    keeps_input = True  # torch takes no read-only arrays
    graphs: Any = None
    batched: BatchedLayers | None = None
    sweep_name: str
    has_means = False
    """Whether a layer of a coarse level is the mean of those of its interval."""

    def __init__(self, stride: int, *, propagates_nonfinite: bool):
        self.stride, self.propagates_nonfinite = stride, propagates_nonfinite

    @property
    def is_fine(self) -> bool:
        """Whether this is the finest level."""
        return self.stride == 1

    def _layer(self, i: int) -> int:
        """Number of the layer of a step, the first of those that it stands for."""
        raise NotImplementedError

    def _layers(self, steps: range) -> Sequence[Any]:
        """Numbers of the layers of some steps, of mean layers on coarse levels that have them."""
        if self.has_means and not self.is_fine:
            return [(self.sweep_name, self.stride, i) for i in steps]
        return [self._layer(i) for i in steps]


class BlockForward(_Step):
    """The layers of a level; on the finest they are recorded, where a backward sweep follows.

    Attributes
    ----------
    may_be_last : bool
        Whether a step may be the last one at its point in this sweep (MGRIT sets it).
    records : bool
        Whether steps that may be the last are recorded.
    """

    sweep_name = "forward"

    def __init__(self, stride: int, *, propagates_nonfinite: bool):
        super().__init__(stride, propagates_nonfinite=propagates_nonfinite)
        self.may_be_last, self.records = True, False

    def _layer(self, i: int) -> int:
        return i * self.stride

    @property
    def _record(self) -> bool:
        return self.is_fine and self.records and self.may_be_last

    def step(self, steps: range, u: Any, out: Any) -> None:
        """Write the results of some steps to ``out``."""
        layers, u, out = self._layers(steps), as_tensor(u), as_tensor(out)
        if self.batched is not None and len(layers) > 1 and self.batched.has(layers):
            out.copy_(self.batched.step(self.graphs, layers, u, self.stride, record=self._record))
            return
        for i, n in enumerate(layers):
            out[i] = self.graphs.step(n, u[i], self.stride, record=self._record)

    def sweep(self, first: int, U: Any, G: Any) -> None:
        """Take consecutive steps from ``U[0]`` in place, and add ``G``."""
        states, G = as_tensor(U), None if G is None else as_tensor(G)
        for i, n in enumerate(self._layers(range(first, first + len(states) - 1))):
            out = self.graphs.step(n, states[i], self.stride, record=self._record)
            states[i + 1] = out if G is None else out + G[i]


class BlockAdjoint(_Step):
    """The adjoint layers of a level, from the last to the first: step ``i`` is through layer ``N - (i + 1) stride``.

    Attributes
    ----------
    may_be_last : bool
        Whether a step may be the last one at its point in this sweep (MGRIT sets it).
    differentiates : bool
        Whether steps that may be the last also compute the derivatives with respect to the parameters.
    """

    sweep_name = "backward"

    def __init__(self, stride: int, nlayers: int, *, propagates_nonfinite: bool):
        super().__init__(stride, propagates_nonfinite=propagates_nonfinite)
        self.nlayers, self.may_be_last, self.differentiates = nlayers, True, False

    def _layer(self, i: int) -> int:
        return self.nlayers - (i + 1) * self.stride

    @property
    def _gradients(self) -> bool:
        return self.is_fine and self.differentiates and self.may_be_last

    def step(self, steps: range, u: Any, out: Any) -> None:
        """Write the results of some steps to ``out``."""
        found = self.graphs.adjoint(self._layers(steps), as_tensor(u), self.stride, gradients=self._gradients)
        as_tensor(out).copy_(found)

    def sweep(self, first: int, U: Any, G: Any) -> None:
        """Take consecutive steps from ``U[0]`` in place, and add ``G``."""
        lam, G = as_tensor(U), None if G is None else as_tensor(G)
        for i, n in enumerate(self._layers(range(first, first + len(lam) - 1))):
            out = self.graphs.adjoint([n], lam[i : i + 1], self.stride, gradients=self._gradients)[0]
            lam[i + 1] = out if G is None else out + G[i]

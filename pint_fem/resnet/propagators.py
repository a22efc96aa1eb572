r"""Layers as the steps of an evolution: what MGRIT calls on each level.

.. math::
    \Phi_n(u) &= u + h\, \sigma(z_n), \qquad z_n = L_n u + b_n, \\
    \Phi_{n,u}^T \lambda &= \lambda + h\, L_n^T (\sigma'(z_n) \lambda), \\
    \Phi_{n,u}\, \delta u &= \delta u + h\, \sigma'(z_n)\, L_n \delta u .

A coarse level steps with the layers at its points and as many times ``h``. The adjoint runs on the reversed layers:
its arrays hold the layers from the last to the first (parameters are turned round, they are small; the slopes are read
backwards by numpy).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from pint_fem.resnet.layers import Layer

__all__ = ["AdjointStep", "ForwardStep", "TangentStep"]


class _Step:
    """A level's layers; ``lo`` is the number of the first own step.

    Parameters
    ----------
    layer
        The kind.
    h
        Step of the level.
    """

    def __init__(self, layer: Layer, h: float):
        self.layer, self.h, self.lo = layer, h, 0
        self.theta: Sequence[torch.Tensor] = ()
        self._work: torch.Tensor | None = None

    def rows(self, steps: range) -> slice:
        """Where the own rows of some steps are."""
        return slice(steps.start - self.lo, steps.stop - self.lo, steps.step)

    def work(self, count: int, like: np.ndarray) -> torch.Tensor:
        """Room for some states, contiguous: matrix products that write to every ``m``-th state take twice as long."""
        w = self._work
        if w is None or len(w) < count or w.shape[1:] != like.shape[1:] or w.numpy().dtype != like.dtype:
            w = self._work = torch.from_numpy(np.empty((count, *like.shape[1:]), like.dtype))
        return w[:count]


class ForwardStep(_Step):
    """``Phi``; where ``kept`` is set, it keeps there what the slopes follow from."""

    def __init__(self, layer: Layer, h: float):
        super().__init__(layer, h)
        self.kept: torch.Tensor | None = None

    def step(self, steps: range, u: np.ndarray, out: np.ndarray) -> None:
        """See :class:`pint_fem.mgrit.levels.Propagator`."""
        rows, act = self.rows(steps), self.layer.activation
        z, old, new = self.work(len(steps), u), torch.from_numpy(u), torch.from_numpy(out)
        self.layer.linear([p[rows] for p in self.theta], old, z, act.in_scale)
        y = act.output(z)
        torch.add(old, y, alpha=self.h * act.out_scale, out=new)
        if act.shift:
            new += self.h * act.shift
        if self.kept is not None:
            self.kept[rows] = z


class AdjointStep(_Step):
    """``Phi_u^T`` with ``slopes`` of the own layers, both in the order of the reversed layers (slopes: any strides)."""

    def __init__(self, layer: Layer, h: float):
        super().__init__(layer, h)
        self.slopes: np.ndarray | None = None

    def step(self, steps: range, u: np.ndarray, out: np.ndarray) -> None:
        """See :class:`pint_fem.mgrit.levels.Propagator`."""
        rows, t = self.rows(steps), self.work(len(steps), u)
        np.multiply(self.slopes[rows], u, out=t.numpy())
        self.layer.adjoint([p[rows] for p in self.theta], t, torch.from_numpy(u), self.h, torch.from_numpy(out))


class TangentStep(_Step):
    """``Phi_u`` with the slopes of the own layers."""

    def __init__(self, layer: Layer, h: float):
        super().__init__(layer, h)
        self.slopes: np.ndarray | None = None
        self._no_bias: torch.Tensor | None = None

    def step(self, steps: range, u: np.ndarray, out: np.ndarray) -> None:
        """See :class:`pint_fem.mgrit.levels.Propagator`."""
        rows, z = self.rows(steps), self.work(len(steps), u)
        weight, bias = (p[rows] for p in self.theta)
        self.layer.linear((weight, torch.zeros_like(bias)), torch.from_numpy(u), z, 1.0)
        z *= torch.from_numpy(self.slopes[rows])
        torch.add(torch.from_numpy(u), z, alpha=self.h, out=torch.from_numpy(out))

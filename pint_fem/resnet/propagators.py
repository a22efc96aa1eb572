r"""Residual layers as the steps of an evolution: the maps :math:`\Phi_n` that MGRIT calls on each level.

.. math::
    \Phi_n(u) &= u + h\, \sigma(z_n), \qquad z_n = L_n u + b_n, \\
    \Phi_{n,u}^T \lambda &= \lambda + h\, L_n^T (\sigma'(z_n) \lambda), \\
    \Phi_{n,u}\, \delta u &= \delta u + h\, \sigma'(z_n)\, L_n \delta u .

A coarse level steps with the layers at its points and a correspondingly larger ``h``. The adjoint runs on the reversed
layers. The classes implement :class:`pint_fem.all_at_once.propagator.Propagator`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from pint_fem.resnet.layers import Layer, ScratchBuffer

__all__ = ["AdjointStep", "ForwardStep", "TangentStep"]


class _Step:
    """Base of the maps of a level's layers.

    Parameters
    ----------
    layer, h
        Kind of the layers, and step size of the level.

    Attributes
    ----------
    lo : int
        Number of the first own step.
    slopes : Tensor or None
        Derivatives of the activation in the own layers.
    """

    propagates_nonfinite = True  # u + f(u)
    keeps_input = True  # torch takes no read-only arrays
    block = 1024  # states of a block: a call for one state costs half of that for sixteen, so all intervals advance

    def __init__(self, layer: Layer, h: float):
        self.layer, self.h, self.lo = layer, h, 0
        self.slopes: torch.Tensor | None = None
        self._theta: Sequence[torch.Tensor] = ()
        self._selected: dict[range, tuple[slice, list[torch.Tensor]]] = {}
        self._scratch = ScratchBuffer()  # contiguous: matrix products that write to every m-th state take longer

    @property
    def theta(self) -> Sequence[torch.Tensor]:
        """Stacked parameters of the own layers."""
        return self._theta

    @theta.setter
    def theta(self, theta: Sequence[torch.Tensor]) -> None:
        self._theta, self._selected = theta, {}

    def rows(self, steps: range) -> slice:
        """Rows of the stacked parameters and slopes that belong to some steps."""
        return slice(steps.start - self.lo, steps.stop - self.lo, steps.step)

    def _select(self, steps: range) -> tuple[slice, list[torch.Tensor]]:
        """Rows and parameters of some steps, cached because every relaxation uses the same ones."""
        found = self._selected.get(steps)
        if found is None:
            rows = self.rows(steps)
            found = self._selected[steps] = rows, [p[rows] for p in self._theta]
        return found

    def _single(self, first: int, count: int) -> tuple[int, Iterator]:
        """Row of the first of consecutive steps, and an iterator over the parameters of each."""
        rows = self.rows(range(first, first + count))
        return rows.start, zip(*(p[rows].unbind(0) for p in self._theta), strict=True)


class ForwardStep(_Step):
    r"""The layer :math:`\Phi_n`; it writes ``slopes`` and ``records`` where they are given.

    Attributes
    ----------
    slopes, records : Tensor or None
        Derivatives of the activation, and what they (and curvatures) are evaluated from.
    may_be_last : bool
        Whether a step may be the last one at its point in this sweep (MGRIT sets it); others write nothing.
    defers_slopes : bool
        Write the records in place of the slopes, or to ``records`` alone, for sweeps whose last relaxation is not
        determined beforehand; slopes are evaluated once afterwards.
    """

    def __init__(self, layer: Layer, h: float):
        super().__init__(layer, h)
        self.records: torch.Tensor | None = None
        self.may_be_last, self.defers_slopes = True, False

    def _store(self, rows: slice | int, record: torch.Tensor, own: Sequence[torch.Tensor]) -> None:
        """Write what is stored of an evaluation of the activation."""
        if self.slopes is not None and not self.defers_slopes:
            self.layer.activation.write_slope(record, self.slopes[rows], own)
        elif self.slopes is not None and self.records is None:
            self.slopes[rows] = record
        if self.records is not None:
            self.records[rows] = record

    def step(self, steps: range, u: np.ndarray, out: np.ndarray) -> None:
        """Write the results of some steps to ``out``."""
        act, (rows, theta), old = self.layer.activation, self._select(steps), torch.from_numpy(u)
        z = self._scratch(old)
        self.layer.linear(theta, old, z, act.in_scale)
        own = self.layer.of_activation(theta)
        y = act.output(z, own)
        if self.may_be_last:
            self._store(rows, z, own)
        torch.add(old, y, alpha=self.h * act.out_scale, out=torch.from_numpy(out))

    def sweep(self, first: int, U: np.ndarray, G: np.ndarray | None) -> None:
        """Take consecutive steps from ``U[0]`` in place, and add ``G``."""
        layer, act, states = self.layer, self.layer.activation, torch.from_numpy(U)
        z, scale = self._scratch(states[:1])[0], self.h * act.out_scale
        states = states.unbind(0)
        row, parameters = self._single(first, len(states) - 1)
        for i, theta in enumerate(parameters):
            layer.linear_single(theta, states[i], z, act.in_scale)
            own = layer.of_activation(theta)
            y = act.output(z, own)
            if self.may_be_last:
                self._store(row + i, z, own)
            torch.add(states[i], y, alpha=scale, out=states[i + 1])
            if G is not None:
                U[i + 1] += G[i]


class AdjointStep(_Step):
    r"""The adjoint layer :math:`\Phi_{n,u}^T`.

    Attributes
    ----------
    backwards : bool
        Whether the solver's arrays are views that run backwards through memory while parameters and slopes are in the
        order of the layers, so that both fit each other without a copy. Else all are in the reversed order.
    """

    def __init__(self, layer: Layer, h: float):
        super().__init__(layer, h)
        self.backwards = False

    def rows(self, steps: range) -> slice:
        """Rows of the stacked parameters and slopes that belong to some steps."""
        if not self.backwards:
            return super().rows(steps)
        last = len(self.slopes) - 1 + self.lo
        return slice(last - steps[-1], last - steps[0] + 1, steps.step)

    def step(self, steps: range, u: np.ndarray, out: np.ndarray) -> None:
        """Write the results of some steps to ``out``."""
        (rows, theta), lam = self._select(steps), torch.from_numpy(u[::-1] if self.backwards else u)
        t = torch.mul(self.slopes[rows], lam, out=self._scratch(lam))
        if self.backwards and out.strides[0] > 0:  # a residual, whose rows are in the order of the steps
            out[...] = self.layer.adjoint(theta, t, lam, self.h, t).numpy()[::-1]
            return
        self.layer.adjoint(theta, t, lam, self.h, torch.from_numpy(out[::-1] if self.backwards else out))

    def sweep(self, first: int, U: np.ndarray, G: np.ndarray | None) -> None:
        """Take consecutive steps from ``U[0]`` in place, and add ``G``."""
        states = torch.from_numpy(U[::-1] if self.backwards else U)
        t, count = self._scratch(states[:1])[0], len(states) - 1
        row, parameters = self._single(first, count)
        parts = list(zip(self.slopes[row : row + count].unbind(0), parameters, strict=True))
        states = states.unbind(0)
        if self.backwards:
            parts, states = parts[::-1], states[::-1]
        for i, (slope, theta) in enumerate(parts):
            torch.mul(slope, states[i], out=t)
            self.layer.adjoint_single(theta, t, states[i], self.h, states[i + 1])
            if G is not None:
                U[i + 1] += G[i]


class TangentStep(_Step):
    r"""The derivative :math:`\Phi_{n,u}` of a layer with respect to its state."""

    def step(self, steps: range, u: np.ndarray, out: np.ndarray) -> None:
        """Write the results of some steps to ``out``."""
        (rows, (weight, bias, *_)), old = self._select(steps), torch.from_numpy(u)
        z = self._scratch(old)
        self.layer.linear((weight, torch.zeros_like(bias)), old, z, 1.0)
        z *= self.slopes[rows]
        torch.add(old, z, alpha=self.h, out=torch.from_numpy(out))

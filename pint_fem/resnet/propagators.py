r"""Layers as the steps of an evolution: what MGRIT calls on each level.

.. math::
    \Phi_n(u) &= u + h\, \sigma(z_n), \qquad z_n = L_n u + b_n, \\
    \Phi_{n,u}^T \lambda &= \lambda + h\, L_n^T (\sigma'(z_n) \lambda), \\
    \Phi_{n,u}\, \delta u &= \delta u + h\, \sigma'(z_n)\, L_n \delta u .

A coarse level steps with the layers at its points and as many times ``h``. The adjoint runs on the reversed layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from pint_fem.resnet.layers import Layer, Room

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

    #: ``u + f(u)``: what is not finite stays so.
    propagates_nonfinite = True
    #: torch takes no read-only arrays.
    keeps_input = True
    #: States that go together: calls for one cost half of those for sixteen, so no interval goes ahead of the others.
    block = 1024

    def __init__(self, layer: Layer, h: float):
        self.layer, self.h, self.lo = layer, h, 0
        self._theta: Sequence[torch.Tensor] = ()
        self._parts: dict[range, tuple[slice, list[torch.Tensor]]] = {}
        #: Matrix products that write to every ``m``-th state take twice as long.
        self.work = Room()

    @property
    def theta(self) -> Sequence[torch.Tensor]:
        """Parameters of the own layers."""
        return self._theta

    @theta.setter
    def theta(self, theta: Sequence[torch.Tensor]) -> None:
        self._theta, self._parts = theta, {}

    def rows(self, steps: range) -> slice:
        """Where the own rows of some steps are."""
        return slice(steps.start - self.lo, steps.stop - self.lo, steps.step)

    def part(self, steps: range) -> tuple[slice, list[torch.Tensor]]:
        """Rows and parameters of some steps, cut once: relaxations come back to the same ones."""
        found = self._parts.get(steps)
        if found is None:
            rows = self.rows(steps)
            found = self._parts[steps] = rows, [p[rows] for p in self._theta]
        return found

    def one_by_one(self, first: int, count: int) -> tuple[int, Iterator]:
        """Row of the first of some steps, and the parameters of each."""
        rows = self.rows(range(first, first + count))
        return rows.start, zip(*(p[rows].unbind(0) for p in self._theta), strict=True)


class ForwardStep(_Step):
    """``Phi``; where they are set, it writes ``slopes``, and ``kept``, which they (and curvatures) follow from.

    Attributes
    ----------
    later : bool
        Write what slopes follow from in their place, or to ``kept`` alone: for sweeps of which nobody knows which
        relaxation is the last. Who asks for that takes slopes of it once, afterwards.
    """

    def __init__(self, layer: Layer, h: float):
        super().__init__(layer, h)
        self.slopes: torch.Tensor | None = None
        self.kept: torch.Tensor | None = None
        self.may_be_last, self.later = True, False

    def _keep(self, rows: slice | int, z: torch.Tensor) -> None:
        if self.slopes is not None and not self.later:
            self.layer.activation.write_slope(z, self.slopes[rows])
        elif self.slopes is not None and self.kept is None:
            self.slopes[rows] = z
        if self.kept is not None:
            self.kept[rows] = z

    def step(self, steps: range, u: np.ndarray, out: np.ndarray) -> None:
        """See :class:`pint_fem.all_at_once.levels.Propagator`."""
        act, (rows, theta), old = self.layer.activation, self.part(steps), torch.from_numpy(u)
        z = self.work(old)
        self.layer.linear(theta, old, z, act.in_scale)
        y = act.output(z)
        if self.may_be_last:
            self._keep(rows, z)
        torch.add(old, y, alpha=self.h * act.out_scale, out=torch.from_numpy(out))

    def sweep(self, first: int, U: np.ndarray, G: np.ndarray | None) -> None:
        """See :class:`pint_fem.all_at_once.levels.Propagator`."""
        layer, act, states = self.layer, self.layer.activation, torch.from_numpy(U)
        z, scale = self.work(states[:1])[0], self.h * act.out_scale
        states = states.unbind(0)
        row, parameters = self.one_by_one(first, len(states) - 1)
        for i, theta in enumerate(parameters):
            layer.linear_of_one(theta, states[i], z, act.in_scale)
            y = act.output(z)
            if self.may_be_last:
                self._keep(row + i, z)
            torch.add(states[i], y, alpha=scale, out=states[i + 1])
            if G is not None:
                U[i + 1] += G[i]


class AdjointStep(_Step):
    """``Phi_u^T`` with ``slopes`` of the own layers.

    Attributes
    ----------
    backwards : bool
        The solver's arrays are views that run backwards through memory, and parameters and slopes are in the layers'
        own order: turned round, they fit each other with no copy. Else all are in the order of the reversed layers.
    """

    def __init__(self, layer: Layer, h: float):
        super().__init__(layer, h)
        self.slopes: torch.Tensor | None = None
        self.backwards = False

    def rows(self, steps: range) -> slice:
        """See :class:`_Step`."""
        if not self.backwards:
            return super().rows(steps)
        last = len(self.slopes) - 1 + self.lo
        return slice(last - steps[-1], last - steps[0] + 1, steps.step)

    def step(self, steps: range, u: np.ndarray, out: np.ndarray) -> None:
        """See :class:`pint_fem.all_at_once.levels.Propagator`."""
        (rows, theta), lam = self.part(steps), torch.from_numpy(u[::-1] if self.backwards else u)
        t = torch.mul(self.slopes[rows], lam, out=self.work(lam))
        if self.backwards and out.strides[0] > 0:  # a residual, whose rows are in the order of the steps
            out[...] = self.layer.adjoint(theta, t, lam, self.h, t).numpy()[::-1]
            return
        self.layer.adjoint(theta, t, lam, self.h, torch.from_numpy(out[::-1] if self.backwards else out))

    def sweep(self, first: int, U: np.ndarray, G: np.ndarray | None) -> None:
        """See :class:`pint_fem.all_at_once.levels.Propagator`."""
        states = torch.from_numpy(U[::-1] if self.backwards else U)
        t, count = self.work(states[:1])[0], len(states) - 1
        row, parameters = self.one_by_one(first, count)
        parts = list(zip(self.slopes[row : row + count].unbind(0), parameters, strict=True))
        states = states.unbind(0)
        if self.backwards:
            parts, states = parts[::-1], states[::-1]
        for i, (slope, theta) in enumerate(parts):
            torch.mul(slope, states[i], out=t)
            self.layer.adjoint_of_one(theta, t, states[i], self.h, states[i + 1])
            if G is not None:
                U[i + 1] += G[i]


class TangentStep(_Step):
    """``Phi_u`` with the slopes of the own layers."""

    def __init__(self, layer: Layer, h: float):
        super().__init__(layer, h)
        self.slopes: torch.Tensor | None = None

    def step(self, steps: range, u: np.ndarray, out: np.ndarray) -> None:
        """See :class:`pint_fem.all_at_once.levels.Propagator`."""
        (rows, (weight, bias)), old = self.part(steps), torch.from_numpy(u)
        z = self.work(old)
        self.layer.linear((weight, torch.zeros_like(bias)), old, z, 1.0)
        z *= self.slopes[rows]
        torch.add(old, z, alpha=self.h, out=torch.from_numpy(out))

"""Solves for the trajectories of several evolutions with the same operators as one batch.

Each evolution has its own right-hand side. The sweeps of all are those of a batch (:mod:`~pint_fem.sweeps.batches`),
with states ``(points, evolutions, n)``: sequential steps take all evolutions at once, and each of them satisfies the
stopping criterion by itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pint_fem.all_at_once.stopping import SolveResult
from pint_fem.sweeps.batches import stacked, stacked_levels
from pint_fem.sweeps.sweeps import Controls, Source, Sweeps

__all__ = ["JointSweeps"]


class JointSweeps:
    """Sweeps of several evolutions with the same operators.

    In all methods lists have an entry for each evolution; trajectories are solved for in place.

    Parameters
    ----------
    sweeps
        Those of each evolution (:func:`~pint_fem.sweeps.shared.operators.can_be_solved_as_one`); the solvers of the
        first are used.
    """

    def __init__(self, sweeps: Sequence[Sweeps]):
        self.sweeps, self._first = list(sweeps), sweeps[0]
        self._arrays: dict[str, np.ndarray] = {}

    def part(self, numbers: Sequence[int]) -> JointSweeps:
        """The sweeps of some of the evolutions."""
        if len(numbers) == len(self.sweeps):
            return self
        return JointSweeps([self.sweeps[i] for i in numbers])

    def _scratch(self, name: str, shape: tuple[int, int]) -> np.ndarray:
        """The work array ``(points, evolutions, n)`` for arrays ``(points, n)``, which later calls of this name reuse:
        the system hands out memory more slowly than it is filled.
        """
        shape = (shape[0], len(self.sweeps), *shape[1:])
        if name not in self._arrays or self._arrays[name].shape != shape:
            self._arrays[name] = np.empty(shape)
        return self._arrays[name]

    def state(
        self, z: list[Controls], U: list[np.ndarray], initial: list[np.ndarray | None], *, cold: bool, **accuracy: float
    ) -> SolveResult:
        """Solve for states; arguments as for :meth:`~pint_fem.sweeps.sweeps.Sweeps.state`."""
        sources = [s.state_source(*own) for s, *own in zip(self.sweeps, z, U, initial, strict=True)]
        return self._solve("state", self._first.solvers.state, U, sources, cold=cold, **accuracy)

    def tangent(
        self,
        z: list[Controls],
        U: list[np.ndarray],
        dz: list[Controls],
        dU: list[np.ndarray],
        initial: list[np.ndarray | None],
        **accuracy: float,
    ) -> SolveResult:
        """Solve for tangents from zero; arguments as for :meth:`~pint_fem.sweeps.sweeps.Sweeps.tangent`."""
        each = zip(self.sweeps, z, U, dz, dU, initial, strict=True)
        sources = [s.tangent_source(*own) for s, *own in each]
        return self._solve("tangent", self._first.solvers.tangent, dU, sources, cold=True, **accuracy)

    def adjoint(
        self,
        z: list[Controls],
        U: list[np.ndarray],
        gradient: list[np.ndarray],
        L: list[np.ndarray],
        *,
        cold: bool,
        **accuracy: float,
    ) -> SolveResult:
        """Solve for adjoints; arguments as for :meth:`~pint_fem.sweeps.sweeps.Sweeps.adjoint`."""
        self._first.bind_adjoint(z[0], U[0])
        if self._first.slab.is_last:
            for own, rows in zip(L, gradient, strict=True):
                own[-1] = rows[-1]
        sources: list[Source] = [(rows[:-1][::-1], None) for rows in gradient]
        backwards = [own[::-1] for own in L]
        return self._solve("adjoint", self._first.solvers.adjoint, backwards, sources, cold=cold, **accuracy)

    def adjoint_by_transposed_cycles(
        self, z: list[Controls], U: list[np.ndarray], gradient: list[np.ndarray], *, cycles: int
    ) -> tuple[list[np.ndarray], SolveResult]:
        """Adjoints by the transposes of ``cycles`` cycles from zero, as
        :meth:`~pint_fem.sweeps.sweeps.Sweeps.adjoint_by_transposed_cycles`.
        """
        rows, result = self._first.adjoint_by_transposed_cycles(z[0], U[0], stacked(gradient), cycles=cycles)
        return [np.ascontiguousarray(rows[:, e]) for e in range(len(self.sweeps))], result

    def _solve(
        self, kind: str, solver: object, arrays: list[np.ndarray], sources: list[Source], *, cold: bool, **given
    ) -> SolveResult:
        """Solve for the trajectories of all evolutions at once."""
        rows, coarse = [G for G, _ in sources], [levels for _, levels in sources]
        U = self._scratch("trajectories", arrays[0].shape)
        for e, own in enumerate(arrays):  # sequential steps depend on no first guess but the start
            given_rows = slice(0, 1) if self._first.solvers.is_sequential else slice(None)
            U[given_rows, e] = own[given_rows]
        G = None
        if any(own is not None for own in rows):
            G = self._scratch("sources", next(own.shape for own in rows if own is not None))
            for e, own in enumerate(rows):
                G[:, e] = 0.0 if own is None else own
        levels = None
        if all(own is not None for own in coarse):
            levels = lambda: stacked_levels([own() for own in coarse])
        result = self._first.solve(solver, kind, U, G, cold=cold, coarse_rhs=levels, **given)
        for e, own in enumerate(arrays):
            own[...] = U[:, e]
        for s in self.sweeps[1:]:
            s.counts[kind] += 1
            s.counts["cycles"] += result.cycles
        return result

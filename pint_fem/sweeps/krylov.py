"""Linear sweeps by a Krylov method of PETSc with an MGRIT cycle as preconditioner, as a time solver."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from pint_fem.all_at_once.levels import Level
from pint_fem.all_at_once.stopping import SolveResult
from pint_fem.mgrit.krylov import KrylovMGRIT

__all__ = ["AcceleratedSweep"]


class AcceleratedSweep(KrylovMGRIT):
    """:class:`~pint_fem.mgrit.krylov.KrylovMGRIT` with the interface :class:`~pint_fem.sweeps.time_solver.TimeSolver`.

    The norm is PETSc's, and the first rank of ``petsc_comm`` prints. Arrays of adjoint sweeps, which run backwards in
    memory, are copied once per solve, as PETSc's vectors are contiguous.

    Parameters
    ----------
    propagators, nsteps, **given
        As for :class:`~pint_fem.mgrit.krylov.KrylovMGRIT`; arguments of MGRIT that it does not take are ignored.
    """

    def __init__(self, propagators: Sequence, nsteps: int, **given: Any):
        for unused in ("everyone", "linear", "point_norms", "is_root"):
            given.pop(unused, None)
        super().__init__(propagators, nsteps, **given)

    @property
    def levels(self) -> Sequence[Level]:
        """Levels of the hierarchy."""
        return self.operator.solver.levels

    def solve(
        self, U: np.ndarray, G: np.ndarray | None = None, *, start: str | None = None,
        coarse_rhs: Sequence[np.ndarray | None] | None = None, rtol: float | None = None, cycles: int | None = None,
        batch: bool = False,
    ) -> SolveResult:  # fmt: skip
        """Solve in place (collective); right-hand sides of a first guess are restricted from ``G``. The members of a
        batch are solved one after another, as PETSc's method has one right-hand side.

        Raises
        ------
        ValueError
            On a tolerance or a number of cycles for this solve alone.
        SolverFailure
            On every rank, if a step failed or a value is not finite on any.
        """
        if rtol is not None or cycles is not None:
            raise ValueError("krylov: its tolerance is PETSc's (ksp_rtol), for all solves; leave krylov out")
        if batch:
            return self._solve_members(U, G, start)
        slab = np.ascontiguousarray(U)
        try:
            return super().solve(slab, G, start=start)
        finally:
            if slab is not U:
                U[...] = slab

    def _solve_members(self, U: np.ndarray, G: np.ndarray | None, start: str | None) -> SolveResult:
        """Solve for each member of a batch; the result is that of the member with the largest relative residual."""
        results = []
        for member in range(U.shape[1]):
            g = None if G is None else np.ascontiguousarray(G[:, member])
            results.append(self.solve(U[:, member], g, start=start))
        worst = max(results, key=lambda result: (not result.converged, result.relative_residual))
        return replace(worst, cycles=sum(result.cycles for result in results), members=results)

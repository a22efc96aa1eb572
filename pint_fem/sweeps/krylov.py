"""Krylov-accelerated sweeps behind the interface of plain ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from pint_fem.all_at_once.stopping import SolveResult
from pint_fem.mgrit.krylov import KrylovMGRIT

__all__ = ["AcceleratedSweep"]


class AcceleratedSweep:
    """A linear sweep in either direction, solved by :class:`~pint_fem.mgrit.krylov.KrylovMGRIT`.

    Slabs of adjoint sweeps run backwards in memory, PETSc's vectors do not: such a slab is copied, once a solve.

    Parameters
    ----------
    propagators, nsteps
        As for MGRIT.
    solver_parameters
        PETSc options of the ``KSP``.
    name, **options
        As for MGRIT; ``everyone``, ``linear``, ``point_norms`` and ``is_root`` are left out: the norm is PETSc's, and
        the first rank of ``petsc_comm`` prints.
    """

    def __init__(self, propagators: Sequence, nsteps: int, *, solver_parameters: Mapping, name: str, **options):
        for unused in ("everyone", "linear", "point_norms", "is_root"):
            options.pop(unused, None)
        self.name = name
        self._solver = KrylovMGRIT(propagators, nsteps, solver_parameters=solver_parameters, name=name, **options)

    @property
    def mgrit(self):
        """The hierarchy's solver."""
        return self._solver.hierarchies.solver

    @property
    def levels(self):
        """Levels of the hierarchy."""
        return self.mgrit.levels

    @property
    def options(self):
        """MGRIT options."""
        return self._solver.options

    def solve(
        self, U: np.ndarray, G: np.ndarray | None = None, *, start=None, coarse_rhs=None, rtol=None, cycles=None
    ) -> SolveResult:
        """See :meth:`pint_fem.mgrit.MGRIT.solve`; right-hand sides of a first guess are restricted from ``G``.

        Raises
        ------
        ValueError
            On a tolerance or a number of cycles for this solve alone.
        """
        if rtol is not None or cycles is not None:
            raise ValueError("krylov: its tolerance is PETSc's (ksp_rtol), for all solves; leave krylov out")
        self._solver.name = self.name
        slab = np.ascontiguousarray(U)
        try:
            return self._solver.solve(slab, G, start=start)
        finally:
            if slab is not U:
                U[...] = slab

    def view(self, state_nbytes: int | None = None) -> str:
        """Describe the hierarchy and what accelerates it."""
        return self._solver.view(state_nbytes)

"""The interface of a time solver, which solves one sweep over all time steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from pint_fem.all_at_once.levels import Level
from pint_fem.all_at_once.stopping import SolveResult

__all__ = ["TimeSolver"]


class TimeSolver(Protocol):
    r"""Solves :math:`U_{n+1} = \Phi_n(U_n) + G_n`, ``n = 0..N-1``, for all steps at once, distributed over time ranks.

    :class:`~pint_fem.mgrit.solver.MGRIT`, :class:`~pint_fem.paradiag.solver.ParaDiag` and
    :class:`~pint_fem.sweeps.krylov.AcceleratedSweep` have this interface. Their constructors take the steps of each
    level (:mod:`~pint_fem.sweeps.steps`), the number of steps and keyword arguments: communicators and ``bounds`` of
    the ranks' steps, ``transfers`` between meshes, norm of states, ``options`` and ``trace``. An adjoint
    sweep is solved by the same class: its steps run backwards in time, on the reversed communicator.

    Attributes
    ----------
    name : str
        The sweep in monitor lines and errors.
    levels : sequence of Level
        Time grids, the finest first; ``levels[i].propagator`` is the step of the level.
    options
        Stopping criterion (``rtol``, ``max_it`` ...) and what is printed (``monitor``, ``view``).
    """

    name: str
    levels: Sequence[Level]
    options: object

    def solve(
        self,
        U: np.ndarray,
        G: np.ndarray | None = None,
        *,
        start: str | None = None,
        coarse_rhs: Sequence[np.ndarray] | None = None,
        rtol: float | None = None,
        cycles: int | None = None,
        batch: bool = False,
    ) -> SolveResult:
        """Solve in place (collective); a ``SolverFailure`` on every rank where a step fails or values are not finite.

        Parameters
        ----------
        U
            ``(k + 1, n)`` for ``k`` own steps: first guess in, solution out. Row 0 is the initial value on the first
            rank and the left neighbour's last point on the others.
        G
            Right-hand side of the own steps, ``(k, n)``; ``None`` for zero.
        start, coarse_rhs
            ``"guess"`` starts from ``U``, ``"skip"`` and ``"nested"`` from a coarse solution with these right-hand
            sides of the coarse levels; default: the option.
        rtol, cycles
            Tolerance or number of iterations of this solve instead of the options'.
        batch
            Whether arrays are ``(k + 1, members, n)`` and ``(k, members, n)``, for several right-hand sides at once;
            each of them has to satisfy the stopping criterion.
        """

    def view(self, state_nbytes: int | None = None) -> str:
        """Describe the solver in a few lines, with memory estimates for states of a size in bytes."""

"""ParaDiag as a time solver of sweeps, and as the solver of MGRIT's coarsest level."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pint_fem.all_at_once.levels import Level
from pint_fem.paradiag.circulant import AlphaCirculant
from pint_fem.paradiag.guarded_solves import GuardedBlocks, GuardedSolve
from pint_fem.paradiag.options import ParaDiagOptions
from pint_fem.paradiag.solver import ParaDiag
from pint_fem.paradiag.systems import FrequencyBlocks, ShiftedSteps
from pint_fem.sweeps.frequencies.systems import AveragedSystems

__all__ = ["CoarsestParaDiag", "paradiag_solver"]


def paradiag_solver(
    steps: Sequence, nsteps: int, *, paradiag: ParaDiagOptions, systems: ShiftedSteps | AveragedSystems, **given: Any
) -> ParaDiag:
    """A solver for the single level ``steps[0]`` with options ``paradiag`` and the systems of the frequencies.

    ``given`` are arguments of MGRIT, of which those that concern a hierarchy are ignored.
    """
    for unused in ("transfers", "linear", "options"):
        given.pop(unused, None)
    (step,) = steps
    solve = systems.solve_transposed if step.transposed else systems.solve
    blocks = FrequencyBlocks(systems, transposed=step.transposed)
    return ParaDiag(step, nsteps, solve, options=paradiag, backwards=step.transposed, blocks=blocks, **given)


class CoarsestParaDiag:
    """Solves MGRIT's coarsest level by iterations of ParaDiag (``coarse_solver="paradiag"``), without sequential steps.

    Parameters
    ----------
    systems, options
        The systems of the frequencies of the level's propagator; options of ParaDiag, of which ``alpha`` and
        ``precision`` are used.
    transposed
        Whether the level is that of an adjoint sweep.
    """

    def __init__(self, systems: ShiftedSteps, options: ParaDiagOptions, *, transposed: bool):
        self._solve = GuardedSolve(systems.solve_transposed if transposed else systems.solve, self._note)
        self._blocks = GuardedBlocks(FrequencyBlocks(systems, transposed=transposed), self._solve, self._note)
        self.alpha, self._transposed = options.alpha, transposed
        self._single = options.precision == "single"  # a given number of iterations
        self._circulant: AlphaCirculant | None = None
        self._level: Level | None = None
        self._size = 0

    def __call__(self, level: Level, iterations: int) -> None:
        """Do some iterations for ``level.U`` and ``level.G``, on every rank of the level's communicator."""
        k, size = len(level.G), level.U[0].size
        self._solve.members = level.U.shape[1] if level.U.ndim > 2 else 1
        if self._level is not level or self._size != size:
            self._level, self._size = level, size
            self._circulant = AlphaCirculant(
                level.nsteps, self.alpha, self._solve, size, comm=level.comm, bounds=level.bounds,
                blocks=self._blocks, backwards=self._transposed, trace=level.trace,
            )  # fmt: skip
        r = np.empty_like(level.G)
        for _ in range(iterations):
            level.phi_of_all(level.U, r)
            r += level.G
            r -= level.U[1:]
            self._circulant.add(r.reshape(k, size), level.U[1:], single=self._single)
        level.exchange(level.U)

    def _note(self, where: str, error: BaseException) -> None:
        self._level.note(where, error)

"""Failures of a solve: noted where they happen, raised on every rank that solves.

A step that fails, or a value that is not finite, must not end a rank's part in a solve: the others would wait for its
messages. It is noted on its rank and goes on as NaN, and norms, which are global over space, carry that to all ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from pint_fem.mgrit.agreement import all_alike
from pint_fem.mgrit.callbacks import read_only, require_block
from pint_fem.mgrit.levels import Level
from pint_fem.mgrit.norms import PointNorms
from pint_fem.mgrit.stopping import SolverFailure

__all__ = ["MEETINGS", "Failures"]

MEETINGS = frozenset(2**i for i in range(3, 40))
"""Fixed numbers of cycles, where nobody waits for norms: behind so many all ranks hear whether one has failed. A failed
solve takes at most twice the cycles it had, few cycles (training's) never meet, and many meet a few times.
"""


class Failures:
    """What has failed on the levels of a solver.

    Parameters
    ----------
    levels
        Finest first.
    comm
        Time communicator.
    point_norms
        Squared norms of states, global over space.
    name
        Of the sweep, for errors.
    keeps_all
        The finest level's array has all own points, not C-points only.

    Attributes
    ----------
    everywhere : bool
        Values travel between all ranks, not from left to right only: a failure on any is the cause of what is not
        finite on all.
    """

    def __init__(self, levels: Sequence[Level], comm, point_norms: PointNorms, name: str, *, keeps_all: bool = True):
        self.levels, self.comm, self.point_norms, self.name = levels, comm, point_norms, name
        self.keeps_all, self.everywhere = keeps_all, False

    def forget(self) -> None:
        """Begin anew."""
        self.levels[0].failure = None
        self.in_cycle(0)

    def in_cycle(self, cycle: int) -> None:
        """What is noted from here on is of this cycle."""
        self.levels[0].first_failure.now = cycle

    def squares(self, block: np.ndarray, norms: PointNorms | None = None) -> np.ndarray:
        """Squared norms of some states; NaN where the user's function fails (no hang), and once a step has failed.

        A failed step's NaN may be gone by now, as relaxation replaces points. Handing NaN to the norm rather than
        returning it tells the ranks that share the states in space as well.
        """
        if not len(block):
            return np.zeros(0)
        if self.levels[0].failure:
            block = np.full_like(block, np.nan)
        try:
            squares = (norms or self.point_norms)(read_only(block))
            return np.asarray(require_block("point_norms", squares, (len(block),)), dtype=float)
        except Exception as error:
            self.levels[0].failure = self.levels[0].failure or f"point_norms: {type(error).__name__}: {error}"
            return np.full(len(block), np.nan)

    def raise_unless(self, finite: bool) -> None:
        """Raise on every rank if ``finite`` is false on any.

        ``finite`` comes from ``point_norms``, so it is the same on all ranks that share a state in space.
        """
        fine = self.levels[0]
        if self.everywhere:
            causes = self.comm.allgather(fine.failure)
            fine.failure = fine.failure or next((cause for cause in causes if cause), None)
        if all_alike(self.comm, finite):
            return
        first = fine.first_failure
        report = None if finite else (first.cycle, first.text) if first.text else self._in_array()
        # of those in the earliest cycle: values travel from left to right only, so the first rank has the cause
        reports = [found for found in self.comm.allgather(report) if found]
        cause = min(reports, key=lambda found: found[0], default=(0, "values too large: their norm is not finite"))[1]
        raise SolverFailure(f"{self.name}: {cause}")

    def _in_array(self) -> tuple[float, str] | None:
        """The first own point that is not finite, which any failure that a rank has seen happen comes before."""
        fine = self.levels[0]
        if fine.U is None:  # given back to the caller
            return None
        bad = np.flatnonzero([not np.isfinite(row).all() for row in fine.U])
        if not len(bad):
            return None
        row = int(bad[0])
        point = fine.lo + row if self.keeps_all else int(fine.c_points[fine.coarse_bounds()[self.comm.rank] + row])
        return math.inf, f"level 0, steps {max(point - 1, 0)}: value not finite"

    def raise_noted(self, state: np.ndarray, *, finite: bool = True) -> None:
        """Raise on every rank if a step has failed, or ``finite`` is false, on any (collective).

        ``state`` ``(1, *state)``: any, for its shape.
        """
        noted = self.squares(np.zeros_like(state))  # zero, and NaN on all ranks in space where one has noted something
        self.raise_unless(finite and bool(np.isfinite(noted).all()))

    def raise_at_points(self, U: np.ndarray) -> None:
        """Raise on every rank if a step has failed or an own point is not finite on any."""
        norms = getattr(self.point_norms, "finite", self.point_norms)
        self.raise_unless(not self.levels[0].active or bool(np.isfinite(self.squares(U, norms)).all()))

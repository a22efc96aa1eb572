"""Failures of a solve: recorded on the rank where they happen, then raised on every rank that solves.

A step that fails, or a value that is not finite, must not end a rank's part in a solve: the others would wait for its
messages. It is recorded on its rank and continues as NaN, and norms, which are global over space, carry that to all
ranks. Then the ranks exchange their records, and all raise the same: a mistake in a program (``KeyError``, an unknown
PETSc type) as it is, a numerical failure as :class:`~pint_fem.errors.SolverFailure`, both with the first exception as
the cause.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from mpi4py import MPI

from pint_fem.all_at_once.arrays import Array, finite_rows, is_tensor, kind_of, sums_of_rows
from pint_fem.all_at_once.callbacks import returned_block
from pint_fem.all_at_once.levels import Level
from pint_fem.all_at_once.norms import PointNorms, euclidean
from pint_fem.collective import consistent_across_ranks, raise_report
from pint_fem.errors import FAILURES, FailureKind, FailureReport, SolverFailure, add_note

__all__ = ["EXCHANGE_AFTER", "Failures"]

_TOO_LARGE = FailureReport(FailureKind.NUMERICAL, "values too large: their norm is not finite")

EXCHANGE_AFTER = frozenset(2**i for i in range(3, 40))
"""Numbers of cycles after which ranks exchange failures where no norm does so. A failed solve then takes at most twice
the cycles it had until the failure, and a few cycles, as in training, exchange nothing.
"""


class Failures:
    """The failures on the levels of a solver.

    Parameters
    ----------
    levels
        Finest first.
    comm
        Time communicator.
    everyone
        All ranks that take part in the solve, those that share its states in space included.
    point_norms
        Squared norms of states, global over space.
    name
        Name of the sweep in errors.
    keeps_all
        Whether the finest level's array has all own points rather than C-points only.
    """

    def __init__(
        self,
        levels: Sequence[Level],
        comm: MPI.Comm,
        point_norms: PointNorms,
        name: str,
        *,
        everyone: MPI.Comm | None,
        keeps_all: bool = True,
    ):
        self.levels, self.comm, self.point_norms, self.name = levels, comm, point_norms, name
        self.everyone = everyone
        self.keeps_all = keeps_all
        #: Whether the first axis of a state numbers the members of a batch.
        self.batch = False

    def clear(self) -> None:
        """Remove what an earlier solve has recorded."""
        self.levels[0].first_failure.clear()

    def set_cycle(self, cycle: int) -> None:
        """Set the number of the cycle in which failures happen from here on."""
        self.levels[0].first_failure.now = cycle

    def note(self, what: str, error: BaseException) -> None:
        """Record what a function of the user other than a step has raised."""
        self.levels[0].first_failure.note(f"{what}: {type(error).__name__}: {error}", error)

    def squares(self, block: Array, norms: PointNorms | None = None) -> np.ndarray:
        """Squared norms of some states ``(k,)``; NaN where the user's function fails, and once a step has failed. Of a
        batch those of each member, ``(k, members)``.

        Relaxation may have replaced a failed step's NaN meanwhile. The norm of NaN, rather than NaN itself, carries the
        failure to the ranks that share the states in space as well.
        """
        return self.read(self.unread_squares(block, norms))[0]

    def unread_squares(self, block: Array, norms: PointNorms | None = None) -> Array:
        """The same, but for tensors on their device, for :meth:`read`."""
        shape, norms, tensor = tuple(block.shape[: 1 + self.batch]), norms or self.point_norms, is_tensor(block)
        if not len(block):
            return np.zeros(shape)
        # values that wait are read here only where norms carry a failure to other ranks
        if (not tensor or self._carries(norms)) and self.levels[0].failure:
            block = kind_of(block).full(np.nan, *block.shape)
        if self.batch:
            block = block.reshape(shape[0] * shape[1], *block.shape[2:])
        try:
            squares = returned_block("point_norms", norms, (len(block),), block, on_device=False)
            return (
                squares.reshape(shape)
                if tensor and is_tensor(squares)
                else np.asarray(squares, dtype=float).reshape(shape)
            )
        except FAILURES as error:
            self.note("point_norms", error)
            return np.full(shape, np.nan)

    def _carries(self, norms: PointNorms) -> bool:
        """Whether a tensor's norms may be sums over ranks that share states in space."""
        return self.everyone is not self.comm and norms is not euclidean

    def read(self, *squares: Array) -> list[np.ndarray]:
        """Squared norms on the host, those of tensors in one copy with all that waits to be read; NaN once a step has
        failed.
        """
        if all([isinstance(values, np.ndarray) for values in squares]):
            return list(squares)
        first = self.levels[0].first_failure
        values = first.read(*squares)
        return values if first.text is None else [np.full_like(value, np.nan) for value in values]

    def raise_unless(self, finite: bool) -> None:
        """Raise on every rank if ``finite`` is false on any.

        ``finite`` comes from ``point_norms``, so it is the same on all ranks that share a state in space.
        """
        if consistent_across_ranks(self.comm, finite):
            return
        first = self.levels[0].first_failure
        first.read()
        error, found = first.error, None
        if first.text:
            found = first.cycle, first.text
        elif not finite:
            found = self._in_array()
        mine = None
        if found is not None:
            mine = found[0], self.comm.rank, first.call, FailureReport.of(error or SolverFailure(found[1]), found[1])
        reports = [mine] if self.everyone.size == 1 else self.everyone.allgather(mine)
        # the worst kind; of those in the earliest cycle: values travel from left to right only, the first has the cause
        order = lambda found: (found[-1].kind, *found[:-1])
        chosen = min(filter(None, reports), key=order, default=(0, 0, 0, _TOO_LARGE))
        report = chosen[-1]
        # all ranks with a mistake raise their own
        mine_too = mine is not None and mine[-1].kind == report.kind
        here = error if mine_too and (not report.is_numerical or mine[:-1] == chosen[:-1]) else None
        first.error = None
        if here is not None and not report.is_numerical:
            add_note(here, f"(sweep {self.name}: {report.text})")
        raise_report(self.everyone, report, f"{self.name}: {report.text}", here)

    def _in_array(self) -> tuple[float, str] | None:
        """The first own point that is not finite; any recorded failure precedes it."""
        fine = self.levels[0]
        if fine.U is None:  # returned to the caller
            return None
        bad = np.flatnonzero(~finite_rows(fine.U))
        if not len(bad):
            return None
        row = int(bad[0])
        point = fine.lo + row if self.keeps_all else int(fine.c_points[fine.coarse_bounds()[self.comm.rank] + row])
        return math.inf, f"level 0, steps {max(point - 1, 0)}: value not finite"

    def raise_noted(self, state: Array, *, finite: bool = True) -> None:
        """Raise on every rank if a step has failed, or ``finite`` is false, on any (collective).

        ``state`` ``(1, *state)`` may have any values.
        """
        if is_tensor(state) and not self._carries(self.point_norms):
            self.raise_unless(finite and self.levels[0].failure is None)
            return
        # zero, or NaN on all ranks in space where one has a failure
        squares = self.squares(kind_of(state).zeros(*state.shape))
        self.raise_unless(finite and bool(np.isfinite(squares).all()))

    def raise_at_points(self, U: Array) -> None:
        """Raise on every rank if a step has failed or an own point is not finite on any."""
        norms = getattr(self.point_norms, "finite", self.point_norms)
        if is_tensor(U) and norms is euclidean:
            norms = sums_of_rows
        self.raise_unless(not self.levels[0].active or bool(np.isfinite(self.squares(U, norms)).all()))

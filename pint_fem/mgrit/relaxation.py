"""Relaxation on blocks: the intervals of a slab advance in lock-step.

F-relaxation takes each interval's C-point through the F-points behind it; intervals are independent, so step ``j`` of
many of them is one call of the propagator on a block of states. C-relaxation updates the C-points from the F-points
before them.

Slabs may begin anywhere. Intervals go in groups, from the last to the first: what the right neighbour waits for is
sent as soon as it is computed, and only the group that begins with the row from the left waits for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np

from pint_fem.all_at_once.arrays import Array, finite_rows, kind_of, strided_rows
from pint_fem.all_at_once.levels import Level

__all__ = ["Relaxation", "Run", "runs"]


class Run(NamedTuple):
    """Steps of equal stride in one propagator call: numbers, rows they start from, their rows among the C-points."""

    steps: range
    rows: slice
    places: slice

    @property
    def targets(self) -> slice:
        """Rows that the steps lead to."""
        return slice(self.rows.start + 1, self.rows.stop + 1, self.rows.step)


class Interval(NamedTuple):
    """From a C-point to the next: its number, first step, and length (the trailing one may be cut short)."""

    number: int
    start: int
    length: int


def runs(intervals: list[Interval], j: int, lo: int, hi: int, first_number: int) -> Iterator[Run]:
    """Step ``j`` of some intervals where it is in ``lo..hi-1``, one run for neighbours of equal length."""
    some = [i for i in intervals if j < i.length and lo <= i.start + j < hi]
    for _, pairs in groupby(enumerate(some), key=lambda pair: (pair[1].length, pair[1].number - pair[0])):
        part = [i for _, i in pairs]
        length, start, stop = part[0].length, part[0].start + j, part[-1].start + j + 1
        place = part[0].number - first_number
        yield Run(range(start, stop, length), slice(start - lo, stop - lo, length), slice(place, place + len(part)))


class Chain(NamedTuple):
    """Successive steps to F-points from each of some rows, in one propagator call."""

    row: int  # the first
    stride: int
    count: int
    steps: int

    @property
    def rows(self) -> slice:
        """Rows that they start from."""
        return slice(self.row, self.row + (self.count - 1) * self.stride + 1, self.stride)

    def rows_of_steps(self, array: Array, first: int) -> Array:
        """Rows of each step ``(count, steps, ...)``, those of the first step beginning with row ``row + first``."""
        return strided_rows(array, self.row + first, self.stride, (self.count, self.steps))


class Group(NamedTuple):
    """Intervals that advance through relaxation in the same calls."""

    intervals: list[Interval]
    f_runs: list[Run]
    waits: bool  # needs row 0
    ends: bool  # contains the last row
    chains: Sequence[Chain] = ()


class Relaxation:
    """Relaxation of one level that stores all its points.

    Parameters
    ----------
    level
        A level with C-points.
    weight
        Weight of C-relaxation: ``U <- weight (Phi(U) + G) + (1 - weight) U``.
    """

    def __init__(self, level: Level, weight: float = 1.0):
        self.level, self.weight = level, weight
        lo, hi, c = level.lo, level.hi, level.c_points
        bounds = level.coarse_bounds()
        rank = level.comm.rank
        self.first_number, last_number = bounds[rank], bounds[rank + 1]  # of the intervals that end at own C-points
        self.count = last_number - self.first_number
        numbers = range(self.first_number, last_number + 1) if level.k else range(0)
        self.intervals = [Interval(i, int(c[i]), self._length(i)) for i in numbers if c[i] < hi]
        self.c_rows = self._rows(c, self.first_number + 1, last_number + 1)
        self.c_runs = [
            run
            for length in sorted({i.length for i in self.intervals})
            for run in runs([i for i in self.intervals if i.length == length], length - 1, lo, hi, self.first_number)
        ]
        #: A step from a C-point to the next reads what C-relaxation replaces.
        self.c_points_touch = any(i.length == 1 for i in self.intervals)
        self.groups = list(self._groups())
        self.last_is_c = int(c[last_number]) == hi
        self._work: Array | None = None
        self._index: tuple | None = None

    def _length(self, i: int) -> int:
        c, level = self.level.c_points, self.level
        if level.m:
            return level.m
        return int(c[i + 1] - c[i]) if i + 1 < len(c) else level.nsteps - int(c[i]) + 1

    def _rows(self, c, first: int, stop: int):
        """Rows of some C-points: a slice where they are evenly spaced."""
        if self.level.m:
            row = first * self.level.m - self.level.lo
            return slice(row, row + (stop - first) * self.level.m, self.level.m) if stop > first else slice(0, 0)
        return np.asarray(c[first:stop], dtype=int) - self.level.lo

    def _groups(self) -> Iterator[Group]:
        """Groups from the last to the first. The one that needs row 0 is as small as whole blocks allow."""
        level, lo, hi = self.level, self.level.lo, self.level.hi
        if level.advances:
            yield from self._chains()
            return
        partial = [i for i in self.intervals if i.start < lo]
        whole = [i for i in self.intervals if i.start >= lo]
        if level.block:
            parts = [list(g) for _, g in groupby(whole, key=lambda i: i.number // level.block)]
        elif level.left is not None and whole and whole[0].start == lo and len(whole) > 1:
            parts = [whole[:1], whole[1:]]
        else:
            parts = [whole] if whole else []
        for part in reversed(parts):
            steps = range(max(i.length for i in part) - 1)
            f = [run for j in steps for run in runs(self._f_steps(part, j), j, lo, hi, self.first_number)]
            yield Group(part, f, part[0].start == lo, part[-1] is self.intervals[-1])
        for i in partial:  # one state after another, in the lanes of the whole interval
            f = [run for j in range(i.length - 1) for run in runs([i], j, lo, hi, self.first_number)]
            yield Group(partial, f, True, i is self.intervals[-1])

    def _chains(self) -> Iterator[Group]:
        """Groups from the last to the first, of neighbouring intervals with as many steps to own F-points; a longer
        last one, which ends with the time axis, takes these steps with the others and then its own.
        """
        lo, hi = self.level.lo, self.level.hi

        def steps(i: Interval) -> int:
            return min(i.start + i.length - 1, hi) - max(i.start, lo)

        parts = [list(part) for _, part in groupby(self.intervals, key=lambda i: (i.start < lo, i.length, steps(i)))]
        longer = 0
        if len(parts) > 1 and parts[-2][0].start >= lo and len(parts[-1]) == 1:
            longer = max(steps(parts[-1][0]) - steps(parts[-2][0]), 0) if steps(parts[-2][0]) else 0
        if longer:
            parts[-2:] = [[*parts[-2], *parts[-1]]]
        for part in reversed(parts):
            row, count = max(part[0].start - lo, 0), steps(part[0])
            chains = [Chain(row, part[0].length, len(part), count)]
            if longer and part is parts[-1]:
                chains.append(Chain(part[-1].start - lo + count, part[-1].length, 1, longer))
            yield Group(part, [], row == 0, part[-1] is self.intervals[-1], chains)

    @staticmethod
    def _f_steps(part: list[Interval], j: int) -> list[Interval]:
        """Intervals in which step ``j`` leads to an F-point."""
        return [i for i in part if j + 1 < i.length]

    def c_values(self, U: Array) -> Array:
        """Values at the own C-points, a view where they are evenly spaced."""
        return U[self._c_index(U)]

    def set_c_values(self, U: Array, values: Array) -> None:
        """Replace the values at the own C-points."""
        U[self._c_index(U)] = values

    def _c_index(self, U: Array) -> Any:
        """Rows of the own C-points in the form that indexes arrays of the kind of ``U``."""
        if isinstance(self.c_rows, slice) or isinstance(U, np.ndarray):
            return self.c_rows
        kind = kind_of(U)
        if self._index is None or self._index[0] != kind:
            self._index = kind, kind.row_index(self.c_rows)
        return self._index[1]

    def _phi(self, run: Run, out: Array) -> None:
        """``Phi + G`` of some rows; ``out`` holds the points' values where the propagator uses a guess."""
        level = self.level
        G = None if level.G is None else level.G[run.rows]
        if G is not None and level.uses_guess and level.index == 0:
            out -= G
        level.phi(run.steps, level.U[run.rows], out)
        if G is not None:
            out += G

    def _advance(self, chain: Chain) -> None:
        """Update the F-points of some intervals in one call."""
        level, U = self.level, self.level.U
        if not chain.steps:
            return
        G = None if level.G is None else chain.rows_of_steps(level.G, 0)
        level.advance(level.lo + chain.row, chain.stride, U[chain.rows], chain.rows_of_steps(U, 1), G)

    def f_relax(self) -> None:
        """Update the F-points: ``U[n+1] = Phi_n(U[n]) + G[n]`` from each C-point on."""
        level = self.level
        if not level.active:
            return
        U = level.U
        receive, send = level.post_receive(U), None
        if self.last_is_c:  # the neighbour needs it as it is
            send = level.post_send(U)
        for group in self.groups:
            if group.waits:
                level.wait(receive)
                receive = None
            for run in group.f_runs:
                self._phi(run, U[run.targets])
            for chain in group.chains:
                self._advance(chain)
            if group.ends and not self.last_is_c:
                send = level.post_send(U)
        level.wait(receive, send)

    def c_relax(self) -> None:
        """Update the C-points from the points before them as these are."""
        U = self.level.U
        if self.weight == 1 and not self.c_points_touch:
            for run in self.c_runs:
                self._phi(run, U[run.targets])
            return
        if self._work is None or self._work.shape[1:] != U.shape[1:]:
            self._work = kind_of(U).empty(self.count, *U.shape[1:])
        if self.weight != 1:
            self.c_residual(self._work)
            self.c_relax_by(self._work)
            return
        for run in self.c_runs:
            part = self._work[run.places]
            if self.level.uses_guess:
                part[...] = U[run.targets]
            self._phi(run, part)
        for run in self.c_runs:
            U[run.targets] = self._work[run.places]

    def c_relax_by(self, residual: Array) -> None:
        """C-relaxation from a computed residual at the C-points, without a propagator call."""
        for run in self.c_runs:
            self.level.U[run.targets] += self.weight * residual[run.places]

    def c_residual(self, out: Array) -> None:
        """Write ``G + Phi(U) - U`` at the own C-points to ``out``; after F-relaxation that is the whole residual."""
        U, guess = self.level.U, self.level.uses_guess
        for run in self.c_runs:
            part = out[run.places]
            if guess:
                part[...] = U[run.targets]
            self._phi(run, part)
            part -= U[run.targets]

    def note_first_failure(self, residual: Array) -> None:
        """Record the first step from a finite state to one that is not, in an interval whose residual is not finite:
        for a level whose blocks are not checked one by one.
        """
        level, U = self.level, self.level.U
        bad = np.append(~finite_rows(residual), False)
        for i in self.intervals:
            if bad[min(i.number - self.first_number, self.count)]:
                rows = slice(max(i.start - level.lo, 0), i.start + i.length - level.lo)
                good = finite_rows(U[rows])
                if good[0]:  # all good: the step to the C-point, which holds another value
                    row = rows.stop if good.all() else rows.start + int(np.argmin(good))
                    level.note(f"steps {level.lo + row - 1}: value not finite")
                    return

    def relax(self, sweeps: int, *, f_is_done: bool = False, residual: Array | None = None) -> None:
        """Relax by ``F(CF)^sweeps``.

        Parameters
        ----------
        sweeps
            C-relaxations, each followed by an F-relaxation.
        f_is_done
            The first F-relaxation would change nothing.
        residual
            That of the current values, if it has been computed: the first C-relaxation uses it.
        """
        if not f_is_done:
            self.f_relax()
        for i in range(sweeps):
            if i == 0 and residual is not None:
                self.c_relax_by(residual)
            else:
                self.c_relax()
            self.f_relax()

    @property
    def extra_states(self) -> int:
        """States of work arrays on this rank."""
        return self.count if self.weight != 1 or self.c_points_touch else 0

    def is_condensed(self, G: Array | None) -> bool:
        """Whether a right-hand side has one row per interval: never where all points are stored."""
        return False

    def solve_sequentially(self) -> None:
        """Step through the level, whatever the present iterate."""
        self.level.solve_sequentially(fresh=True)

r"""Relaxation of a level that stores its C-points only: F-points are computed again where they are needed.

An F-relaxation followed by a C-step runs through each interval with a working block of one state per interval (of a
group of intervals), so a slab of ``k`` steps stores ``k / m`` states and makes as many propagator calls per cycle as
with all points stored: those saved after the correction are made before the residual.

The right-hand side may be *condensed*: a row for each own C-point, what enters in the interval before it taken to its
end, :math:`\hat g_j = \sum_i \Phi^{c_j - i} g_i` for linear ``Phi``. Then no array has a row for each step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

import numpy as np

from pint_fem.all_at_once.arrays import Array, kind_of, subtract
from pint_fem.all_at_once.levels import Level
from pint_fem.mgrit.relaxation import Relaxation, runs

__all__ = ["CPointRelaxation"]


class CPointRelaxation(Relaxation):
    """Relaxation of a level whose array ``U`` has the own C-points only, and the C-point before them in row 0.

    Parameters
    ----------
    level, weight
        The level, with C-points, and the weight ``w`` of C-relaxation, ``U <- w (Phi(U) + G) + (1 - w) U``.

    Raises
    ------
    ValueError
        On every rank, if a slab does not begin at a C-point.
    """

    def __init__(self, level: Level, weight: float = 1.0):
        super().__init__(level, weight)
        starts = [b for b in level.bounds[:-1] if b < level.nsteps]
        if not set(starts) <= set(np.asarray(level.c_points).tolist()):
            raise ValueError(
                f"storage of C-points only: the ranks' first steps {starts} are not all C-points; "
                "give bounds on C-points (see split_steps) or storage='all'"
            )
        self.c_rows = slice(1, self.count + 1)
        #: Groups of whole intervals: number, place of the first, whether they wait for row 0, and their runs, each with
        #: whether it leads to C-points.
        self._whole = []
        for group in self.groups:
            whole = [i for i in group.intervals if i.number < len(level.c_points) - 1]
            if whole:
                first = whole[0].number
                steps = [
                    (run, all(i.length == j + 1 for i in whole[run.places]))
                    for j in range(max(i.length for i in whole))
                    for run in runs(whole, j, level.lo, level.hi, first)
                ]
                self._whole.append((len(whole), first - self.first_number, group.waits, steps))
        self._largest = max((count for count, *_ in self._whole), default=0)
        self._send: Array | None = None
        self._buffers: tuple[Array, Array] | None = None

    def is_condensed(self, G: Array | None) -> bool:
        """Whether a right-hand side has one row per interval."""
        return G is not None and len(G) == self.count != self.level.k

    def _ends(self, emit: Callable[[slice, Array], None]) -> None:
        """Run through all own whole intervals; ``emit(places, values)`` takes ``Phi + G`` at their C-points."""
        level, U = self.level, self.level.U
        if not level.active:
            return
        if self._send is None or self._send.shape[1:] != U.shape[1:]:
            kind = kind_of(U)
            self._buffers = kind.empty(self._largest, *U.shape[1:]), kind.empty(self._largest, *U.shape[1:])
            self._send = kind.empty(1, *U.shape[1:])
        self._send[...] = U[-1:]  # the row may be replaced before it has left
        receive, send = level.post_receive(U), level.post_send(self._send)
        condensed = self.is_condensed(level.G)
        for count, place, waits, steps in self._whole:
            if waits:
                level.wait(receive)
                receive = None
            a, b = (buffer[:count] for buffer in self._buffers)
            a[...] = U[place : place + count]
            for run, ends in steps:
                G = None
                if level.G is not None and not condensed:
                    G = level.G[run.rows]
                elif condensed and ends:
                    G = level.G[place:][run.places]
                if level.uses_guess:  # before the last step: the state at the step's start
                    b[run.places] = U[place + 1 :][run.places] if ends else a[run.places]
                    if ends and G is not None:
                        b[run.places] -= G
                level.phi(run.steps, a[run.places], b[run.places])
                if G is not None:
                    b[run.places] += G
                a[run.places] = b[run.places]
            emit(slice(place, place + count), a)
        level.wait(receive, send)

    @property
    def extra_states(self) -> int:
        """Number of states in the working blocks of this rank."""
        return 2 * self._largest + 1

    def f_relax(self) -> None:
        """Do nothing: F-points are not stored."""

    def c_relax(self) -> None:
        """Update the C-points by running through the intervals."""

        def emit(places: slice, values: Array) -> None:
            target = self.level.U[places.start + 1 : places.stop + 1]
            if self.weight == 1:
                target[...] = values
            else:
                target += self.weight * (values - target)

        self._ends(emit)

    def c_relax_by(self, residual: Array) -> None:
        """C-relaxation from a computed residual at the C-points, without a propagator call."""
        self.level.U[1:] += self.weight * residual

    def c_residual(self, out: Array) -> None:
        """Write ``G + Phi(U) - U`` at the own C-points to ``out``, with F-points computed anew."""

        def emit(places: slice, values: Array) -> None:
            subtract(values, self.level.U[places.start + 1 : places.stop + 1], out[places])

        self._ends(emit)

    def solve_sequentially(self) -> None:
        """Step through all points and store the C-points."""
        level = self.level
        if not level.active:
            return
        level.wait(level.post_receive(level.U))
        deque(self._walk(level.U, level.G, store=True), maxlen=0)
        level.wait(level.post_send(level.U))

    def states(self, U: Array, G: Array | None) -> Iterator[tuple[int, Array]]:
        """The trajectory, interval by interval: the number of the first point and the states ``(length, *state)``.

        F-points are computed from the stored C-point in front of them; the array is used again by the next interval.
        """
        yield from self._walk(U, G, store=False)

    def _walk(self, U: Array, G: Array | None, *, store: bool) -> Iterator[tuple[int, Array]]:
        level = self.level
        longest = max((i.length for i in self.intervals), default=0)
        work = kind_of(U).empty(longest + 1, *U.shape[1:])
        for i in self.intervals:
            steps = range(i.start, min(i.start + i.length, level.hi))
            rows = work[: len(steps) + 1]
            rows[0] = U[i.number - self.first_number]
            whole = i.number < len(level.c_points) - 1
            taken = steps[:-1] if whole and not store else steps
            place = i.number - self.first_number + 1
            condensed = self.is_condensed(G)
            own_G = None if G is None or condensed else G[steps.start - level.lo : taken.stop - level.lo]
            level.sweep_steps(taken, rows[: len(taken) + 1], own_G, fresh=True)
            if condensed and store:
                rows[-1] += G[place - 1]
            if whole and store:
                U[place] = rows[-1]
            elif whole:
                rows[-1] = U[place]
            yield i.start + 1, rows[1:]

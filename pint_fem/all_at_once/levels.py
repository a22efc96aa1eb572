"""The levels of a hierarchy of time grids: which rank owns which steps, calls of propagators, and messages.

A level with ``N`` steps has the points ``0..N``. Rank ``r`` owns the steps ``lo[r] -> lo[r]+1, ..., hi[r]-1 -> hi[r]``
and the points ``lo[r]+1 .. hi[r]``; it also holds point ``lo[r]`` as the *ghost* row 0 of its array (on the first
rank that is the initial value). A local array therefore has ``k + 1`` rows, ``k = hi - lo``, and row ``i`` is point
``lo + i``.

A rank without a C-point has no step on the next level and stays out of the levels below, but for the first one, which
keeps the initial value.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from mpi4py import MPI

from pint_fem.all_at_once import messages
from pint_fem.all_at_once.arrays import Array, finite_rows, is_tensor, kind_of, sums_of_rows
from pint_fem.all_at_once.callbacks import StepCalls
from pint_fem.all_at_once.first_failure import FirstFailure
from pint_fem.all_at_once.grids import Bounds, Coarsening, coarse_points
from pint_fem.all_at_once.propagator import Propagator
from pint_fem.all_at_once.trace import Trace
from pint_fem.errors import FAILURES

__all__ = ["Level", "build_levels", "inject"]


class Level:
    """One time grid, the local part of its unknown ``U`` and right-hand side ``G``, and its messages.

    The equations of a level are ``U[n+1] - Phi_n(U[n]) = G[n]`` for ``n = 0..N-1`` with ``U[0]`` given. Row ``i`` of
    the local ``G`` belongs to row ``i + 1`` of the local ``U``. ``G = None`` stands for zero.

    Attributes
    ----------
    index : int
        0 is the finest level.
    c_points : range, ndarray or None
        The level's points that the next one has; ``None`` on the coarsest.
    m : int or None
        Their distance where it is the same everywhere.
    points : range or ndarray
        The level's points by their numbers on the finest.
    left, right : int or None
        Ranks that own the neighbouring points.
    """

    def __init__(
        self,
        index: int,
        bounds: Sequence[int],
        coarsening: Coarsening | None,
        points: Sequence[int] | np.ndarray,
        propagator: Propagator,
        comm: MPI.Comm,
    ):
        self.index, self.bounds, self.points = index, Bounds.make(bounds), points
        self.propagator, self.comm = propagator, comm
        self.nsteps = self.bounds[-1]
        self.m = coarsening if isinstance(coarsening, int) else None
        self.c_points = None
        if coarsening is not None:
            self.c_points = range(0, self.nsteps + 1, self.m) if self.m else np.asarray(coarsening, dtype=int)
        self.lo, self.hi = self.bounds[comm.rank], self.bounds[comm.rank + 1]
        self.k = self.hi - self.lo
        holds = lambda rank: rank == 0 or self.bounds[rank + 1] > self.bounds[rank]
        self.active = holds(comm.rank)
        self.left = self.right = None
        if self.active:
            self.left = next(filter(holds, range(comm.rank - 1, -1, -1)), None)
            self.right = next(filter(holds, range(comm.rank + 1, comm.size)), None)
        self.block = max(int(getattr(propagator, "block", 0)), 0)
        self.uses_guess = bool(getattr(propagator, "uses_guess", False))
        #: Whether each block is checked for values that are not finite.
        self.checks_blocks = index > 0 or not getattr(propagator, "propagates_nonfinite", False)
        self._calls = StepCalls(propagator)
        self.U: Array | None = None
        self.G: Array | None = None
        #: Shared by the levels of a hierarchy.
        self.first_failure = FirstFailure()
        self.phi_calls = 0  # states stepped, for reports
        self.trace: Trace | None = None

    @property
    def failure(self) -> str | None:
        """The first failure on this rank, on any level of the hierarchy; decides the checks that wait for values."""
        if self.first_failure.checks:
            self.first_failure.read()
        return self.first_failure.text

    def note(self, what: str, error: BaseException | None = None) -> None:
        """Record a failure on this level, and what was raised, if anything was."""
        text = f"level {self.index}, {what}"
        self.first_failure.note(text if error is None else f"{text}: {type(error).__name__}: {error}", error)

    @property
    def stride(self) -> int:
        """A step of this level in steps of the finest (of the first, where they differ)."""
        return int(self.points[1] - self.points[0])

    def coarse_bounds(self) -> Bounds:
        """Step bounds of the ranks on the next level."""
        if self.m:
            return self.bounds.coarsened(self.m)
        return Bounds(int(np.searchsorted(self.c_points, b, side="right")) - 1 for b in self.bounds)

    def set_may_be_last(self, last: bool) -> None:
        """Set the propagator's ``may_be_last``, where it has one: steps may be the solve's last at their points."""
        if hasattr(self.propagator, "may_be_last"):
            self.propagator.may_be_last = last

    def phi(self, steps: range, u: Array, out: Array) -> None:
        """Write ``Phi_n(u)`` to ``out`` for each ``n`` in ``steps``; NaN where the propagator fails."""
        if len(steps):
            self._call("phi", steps, u, out, self._calls.step, (steps, u, out), checks=self.checks_blocks)

    def _call(
        self,
        name: str,
        steps: range,
        u: Array,
        out: Array,
        method: Callable[..., None],
        args: Any,
        *,
        checks: bool,
    ) -> None:
        """Call the propagator for steps from ``u`` to ``out``; norms carry the NaN of a failure to every rank."""
        self.phi_calls += len(steps)
        self.first_failure.calls += 1
        begin = self.trace.now() if self.trace else 0.0
        try:
            method(*args)
        except FAILURES as error:
            out[...] = np.nan
            self._failed(steps, u[:1] if name == "sweep" else u, out, error)
        else:
            # what is not finite stays so in steps that are taken one after another by such a propagator
            if self._calls.found:
                self._refuse_later(steps)
            last = out[-1:] if name == "sweep" and self.advances else out
            if checks and not isinstance(last, np.ndarray):
                self._check_later(steps, u, out)
            elif checks and not np.isfinite(last).all():
                self._failed(steps, u, out)
        if self.trace:
            self.trace.work(name, self.index, begin, first=steps[0], states=len(steps))

    @property
    def advances(self) -> bool:
        """Whether the propagator takes several steps from many states in one call."""
        return hasattr(self.propagator, "advance") and not self.uses_guess and not self.block

    def advance(self, first: int, stride: int, u: Array, out: Array, G: Array | None) -> None:
        """Take steps one after another from each of ``k`` states, ``out[:, j] = Phi(out[:, j-1]) + G[:, j]``.

        Parameters
        ----------
        first, stride
            The first step from ``u[i]`` has the number ``first + i stride``.
        u, out, G
            ``(k, *state)``, and twice ``(k, steps, *state)``; ``G`` may be ``None``.
        """
        count = out.shape[1]
        if not count or not len(u):
            return
        steps = range(first, first + len(u) * stride, stride)
        self.first_failure.calls += 1
        begin = self.trace.now() if self.trace else 0.0
        self.phi_calls += len(u) * count
        try:
            self._calls.advance(first, stride, u, out, G)
        except FAILURES as error:
            out[...] = np.nan
            self._failed(steps, u, out[:, 0], error)
        else:
            if self._calls.found:
                self._refuse_later(steps)
            # what is not finite stays so
            if is_tensor(out):
                self._check_advance_later(first, stride, u, out)
            elif not np.isfinite(out[:, -1]).all():
                for j in range(count):
                    shifted = range(first + j, first + j + len(u) * stride, stride)
                    self._failed(shifted, out[:, j - 1] if j else u, out[:, j])
        if self.trace:
            self.trace.work("phi", self.index, begin, first=first, states=len(u) * count)

    def solve_sequentially(self, *, fresh: bool = False) -> None:
        """Take all steps of the level in turn, rank after rank; row 0 of the first rank is the initial value."""
        if self.active:
            self.wait(self.post_receive(self.U))
            self.sweep_steps(range(self.lo, self.hi), self.U, self.G, fresh=fresh)
            self.wait(self.post_send(self.U))

    def sweep_steps(self, steps: range, U: Array, G: Array | None, *, fresh: bool = False) -> None:
        """Take some steps one after another in place, ``U[0]`` being the state before the first.

        ``fresh``: what ``U`` holds behind it is no iterate; a step's first guess is then the state before it.
        """
        if not len(steps):
            return
        if not hasattr(self.propagator, "sweep") or (fresh and self.uses_guess):
            for i, n in enumerate(steps):
                if fresh and self.uses_guess:
                    U[i + 1] = U[i]
                elif self.uses_guess and self.index == 0 and G is not None:
                    U[i + 1] -= G[i]
                self.phi(range(n, n + 1), U[i : i + 1], U[i + 1 : i + 2])
                if G is not None:
                    U[i + 1] += G[i]
            return
        self._call("sweep", steps, U[:-1], U[1:], self._calls.sweep, (steps[0], U, G), checks=True)

    def _failed(self, steps: range, u: Array, out: Array, error: BaseException | None = None) -> None:
        """Record a failure of a step from finite data; failures of later steps follow from it."""
        good = finite_rows(u)
        if error is not None:
            # an exception may follow from data that are not finite, an exit does not
            if good.all() or not isinstance(error, Exception):
                self.note(f"steps {steps[0]}..{steps[-1]}", error)
            return
        self._note_bad(steps, good & ~finite_rows(out))

    def _note_bad(self, steps: range, bad: np.ndarray) -> None:
        """Record the steps for which ``bad`` is true."""
        places = np.flatnonzero(bad)
        if len(places):
            self.note(f"steps {', '.join(str(steps[i]) for i in places[:5])}: value not finite")

    # -- checks of tensors, whose values stay on the device until the next norm -------------------------------------
    def _check_later(self, steps: range, u: Array, out: Array) -> None:
        """Record the steps from finite data to values that are not, when values are read."""
        decide = lambda u, out: self._note_bad(steps, np.isfinite(u) & ~np.isfinite(out))
        self.first_failure.decide_later(decide, sums_of_rows(u), sums_of_rows(out))

    def _check_advance_later(self, first: int, stride: int, u: Array, out: Array) -> None:
        """The same for steps that are taken one after another from each of some states."""

        def decide(before: np.ndarray, values: np.ndarray) -> None:
            for j, after in enumerate(values.T):
                shifted = range(first + j, first + j + len(before) * stride, stride)
                self._note_bad(shifted, np.isfinite(before) & ~np.isfinite(after))
                before = after

        self.first_failure.decide_later(decide, sums_of_rows(u), sums_of_rows(out, 2))

    def _refuse_later(self, steps: range) -> None:
        """Record what the propagator leaves undone in a call, when values are read."""
        for found, error in self._calls.found:
            refuse = lambda value, error=error: self.note(f"steps {steps[0]}..{steps[-1]}", error) if value else None
            self.first_failure.decide_later(refuse, found)
        self._calls.found.clear()

    # -- messages: one row to the right, one from the left; the tag is the level -----------------------------------
    def post_receive(self, array: Array) -> messages.Request | None:
        """Start receiving row 0 of ``array`` from the left; ``None`` where there is no neighbour."""
        if self.left is None:
            return None
        if self.trace:
            self.trace.message("receive posted", self.index, self.comm, self.left, array[:1].nbytes)
        return messages.post_receive(self.comm, array[:1], self.left, self.index)

    def post_send(self, array: Array) -> messages.Request | None:
        """Start sending the last row of ``array`` to the right; ``None`` where there is no neighbour."""
        if self.right is None:
            return None
        if self.trace:
            self.trace.message("send", self.index, self.comm, self.right, array[-1:].nbytes)
        return messages.post_send(self.comm, array[-1:], self.right, self.index)

    def wait(self, *requests: messages.Request | None) -> None:
        """Wait for those of the requests that are not ``None``."""
        for request in requests:
            if request is not None:
                begin = self.trace.now() if self.trace else 0.0
                request.Wait()
                if self.trace:
                    self.trace.work("wait", self.index, begin)

    def exchange(self, array: Array) -> None:
        """Fill row 0 of ``array`` from the left neighbour's last row."""
        self.wait(self.post_receive(array), self.post_send(array))

    def phi_of_all(self, V: Array, out: Array) -> None:
        """``Phi`` of all own steps from the points ``V``, ``(k + 1, ...)``, while row 0 of ``V`` arrives."""
        if not self.active:
            return
        receive, send = self.post_receive(V), self.post_send(V)
        block = self.block or 1
        first = 0 if receive is None else min(block - self.lo % block, self.k)  # a group that needs row 0
        if self.uses_guess:
            out[...] = V[1:]
            if self.index == 0 and self.G is not None:
                out -= self.G
        self.phi(range(self.lo + first, self.hi), V[first:-1], out[first:])
        self.wait(receive)
        self.phi(range(self.lo, self.lo + first), V[:first], out[:first])
        self.wait(send)


def build_levels(
    propagators: Sequence[Propagator], coarsening: Sequence[Coarsening], bounds: Sequence[int], comm: MPI.Comm
) -> list[Level]:
    """Build the hierarchy from the finest bounds.

    Parameters
    ----------
    propagators
        One per level, finest first.
    coarsening
        ``len(propagators) - 1`` factors of at least 2, or C-points.
    bounds
        ``comm.size + 1`` step bounds on the finest level.
    comm
        Time communicator (mpi4py).

    Returns
    -------
    list of Level
    """
    points, levels = coarse_points(bounds[-1], coarsening), []
    for index, propagator in enumerate(propagators):
        m = coarsening[index] if index < len(coarsening) else None
        levels.append(Level(index, bounds, m, points[index], propagator, comm))
        levels[-1].first_failure = levels[0].first_failure
        if m is not None:
            bounds = levels[-1].coarse_bounds()
    return levels


def inject(levels: Sequence[Level], U: Array) -> list[Array]:
    """Values of a trajectory at the points of every level, ghost rows included.

    Parameters
    ----------
    levels
        A hierarchy.
    U
        ``(k + 1, *state)`` on the finest level, with a current ghost row.

    Returns
    -------
    list of ndarray
        One array per level; the first is ``U`` itself.
    """
    arrays = [U]
    for fine, coarse in pairwise(levels):
        out = kind_of(U).zeros(coarse.k + 1, *U.shape[1:])
        if coarse.active:
            first = coarse.lo + 1
            rows = np.asarray(fine.c_points[first : coarse.hi + 1], dtype=int) - fine.lo
            out[1:] = arrays[-1][kind_of(U).row_index(rows)]
            if coarse.left is None:
                out[0] = arrays[-1][0]
            coarse.exchange(out)
        arrays.append(out)
    return arrays

r"""Times of actions at the full speed of a machine whose speed varies during the measurement.

The cores of a virtual machine are shared with others, so that the same work takes different times from one second to
the next, and neither the least nor the median of a few repeats predicts a longer run. So a *reference loop* of fixed
length is timed at regular intervals during a measurement, on the same core, in the handler of a timer's signal. Its
least time over its time is the relative speed of the machine at that moment, and

.. math::  t = (T - B)\, \overline{v}

are the seconds at full speed of an action that took ``T`` seconds by the clock, ``B`` of them reference loops, at the
mean relative speed :math:`\overline{v}`. On several ranks that is the speed of the slowest one at each moment, as the
others wait for it; a rank that waits itself runs no reference loops and does not count. The loop uses registers and the
first cache only: it does not measure the speed of memory.
"""

from __future__ import annotations

import signal
import statistics
import threading
import time
from collections import namedtuple
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil

import numpy as np
from mpi4py import MPI

from pint_fem.errors import InputError

__all__ = ["Measured", "SpeedMonitor", "rounds"]

LOOP = 4000
"""Additions of a reference loop: about a tenth of a millisecond."""
SHORT = 0.01
"""Seconds below which an action is repeated within a measurement, as other actions have emptied the caches."""


Actions = Mapping[object, Callable[[], object]]
"""Actions by name."""


@dataclass(frozen=True)
class Measured:
    """The time of an action: ``seconds`` at full speed, by the ``clock``, and by the clock for ``each`` repeat."""

    seconds: float
    clock: float
    each: tuple[float, ...] = ()


_Span = namedtuple("_Span", "start end loop_seconds first last")
"""A measurement: start and end, seconds of the reference loops inside, and the range of their numbers."""


class SpeedMonitor:
    """Measures actions, which the ranks of ``comm`` do collectively, and meanwhile the speed of the machine, at
    intervals of ``every`` seconds; in the main thread.
    """

    def __init__(self, comm: MPI.Comm = MPI.COMM_SELF, every: float = 0.01):
        self.comm, self.every = comm, every
        self._starts: list[float] = []
        self._loops: list[float] = []

    def _run_loop(self, *_) -> None:
        start, n = time.perf_counter(), 0
        for i in range(LOOP):
            n += i
        self._loops.append(time.perf_counter() - start)
        self._starts.append(start)

    def time(self, action: Callable[[], object], times: int = 1) -> _Span:
        """Do an action ``times`` times (collective); :meth:`measured` evaluates the measurement later.

        Raises
        ------
        InputError
            Outside the main thread, which alone receives signals.
        """
        if threading.current_thread() is not threading.main_thread():
            raise InputError("timer signals reach the main thread only: calibrate and validate there")
        handler, timer = signal.signal(signal.SIGALRM, self._run_loop), (0.0, 0.0)
        first = len(self._loops)
        try:
            self.comm.Barrier()
            self._run_loop()
            timer = signal.setitimer(signal.ITIMER_REAL, self.every, self.every)
            inside, start = len(self._loops), time.perf_counter()
            for _ in range(times):
                action()
            self.comm.Barrier()
            end = time.perf_counter()
            loop_seconds = sum(self._loops[inside:])
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, signal.SIG_DFL if handler is None else handler)
            if timer[0]:  # a timer of the caller's continues
                signal.setitimer(signal.ITIMER_REAL, *timer)
        self._run_loop()
        return _Span(start, end, loop_seconds, first, len(self._loops))

    def measured(self, spans: list[_Span]) -> list[Measured]:
        """Times of measurements at full speed, which is that of the fastest reference loop so far (collective)."""
        least = self.comm.allreduce(min(self._loops), op=MPI.MIN)
        out = []
        for span in spans:
            start, end = self.comm.bcast((span.start, span.end))
            moments = np.linspace(start, end, 2 + int((end - start) / self.every))
            work = end - start - self.comm.allreduce(span.loop_seconds, op=MPI.MAX)
            out.append(Measured(work * float(self._speed(span, moments, least).mean()), end - start))
        return out

    def _speed(self, span: _Span, moments: np.ndarray, least: float) -> np.ndarray:
        """Relative speed of the slowest working rank; the clocks of processes on one machine agree."""
        starts = np.array(self._starts[span.first : span.last])
        slowest = np.interp(moments, starts, least / np.array(self._loops[span.first : span.last]))
        if self.comm.size == 1:
            return slowest
        behind = np.clip(np.searchsorted(starts, moments), 1, len(starts) - 1)
        waits = starts[behind] - starts[behind - 1] > 1.5 * self.every  # handlers run when MPI returns
        working = np.where(waits, np.inf, slowest)
        for speed in (slowest, working):
            self.comm.Allreduce(MPI.IN_PLACE, speed, op=MPI.MIN)
        return np.where(np.isinf(working), slowest, working)


def rounds(
    actions: Actions, repeats: int, *, comm: MPI.Comm = MPI.COMM_SELF, before: Actions | None = None
) -> dict[object, Measured]:
    """Median times of actions that are done in turn, so that a slow minute of the machine affects all of them
    (collective).

    Parameters
    ----------
    actions
        By name; the ranks of ``comm`` do them collectively.
    repeats
        Repeats of each action, after some that are not measured.
    before
        What is done before the action of a name, not measured.

    Returns
    -------
    dict of Measured
        By name, for one action.
    """
    monitor, before = SpeedMonitor(comm), before or {}
    spans: dict[object, list[_Span]] = {name: [] for name in actions}
    times = dict.fromkeys(actions, 1)
    for repeat in range(-1, repeats):
        for name, action in actions.items():
            before.get(name, lambda: None)()
            span = monitor.time(action, times[name])
            if repeat >= 0:
                spans[name].append(span)
            elif name not in before:  # the second one finds its data in the caches
                start = time.perf_counter()
                action()
                times[name] = comm.bcast(max(1, min(ceil(SHORT / (time.perf_counter() - start)), 1000)))
    out = {}
    for name, some in spans.items():
        found, n = monitor.measured(some), times[name]
        seconds, clock = (
            statistics.median(values) / n for values in zip(*((m.seconds, m.clock) for m in found), strict=True)
        )
        out[name] = Measured(seconds, clock, tuple(m.clock / n for m in found))
    return out

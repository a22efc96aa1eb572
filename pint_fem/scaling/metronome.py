"""Seconds at the machine's full speed, measured while it is slower.

A core shares its units with a neighbour's thread, its clock and its processes with others: on a virtual machine the
same block of states takes 0.48 ms in one second and 0.86 in the next, with no other process to be seen. Neither the
least nor the median of a few repeats says then what a longer solve takes. So a *beat*, a loop of fixed length, is timed
every few milliseconds of a measurement, on the same core, by a timer's signal; its least time over its time is the
speed of the machine at that moment, and

.. math::  t = (T - B)\\, \\overline{v}

are the seconds at full speed of something that took ``T`` by the clock, ``B`` of them beats, with the mean speed ``v``.
On several ranks that is the slowest one's at each moment, as the others wait for it; one that waits itself has no beats
then and does not count. Beats live in registers and the first cache: what is slow because of memory is not slower with
them.
"""

from __future__ import annotations

import signal
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil

import numpy as np
from mpi4py import MPI

from pint_fem.errors import InputError

__all__ = ["Measured", "Metronome", "rounds"]

LOOP = 4000
"""Additions of a beat: a tenth of a millisecond."""
SHORT = 0.01
"""Seconds below which an action is repeated within a measurement: what was done before it has left the caches cold."""


@dataclass(frozen=True)
class Measured:
    """What something took.

    Attributes
    ----------
    seconds : float
        At full speed.
    clock : float
        By the clock.
    each : tuple of float
        By the clock, of each repeat.
    """

    seconds: float
    clock: float
    each: tuple[float, ...] = ()

    @property
    def speed(self) -> float:
        """Of the machine, relative to its full one."""
        return self.seconds / self.clock


@dataclass(frozen=True)
class _Span:
    """A measurement: by the clock, beats inside, numbers of the first beat and behind the last."""

    start: float
    end: float
    beats: float
    first: int
    last: int


class Metronome:
    """Beats while it measures; in the main thread.

    Parameters
    ----------
    comm
        Ranks that do together what is measured.
    every
        Seconds between beats.
    """

    def __init__(self, comm=MPI.COMM_SELF, every: float = 0.01):
        self.comm, self.every = comm, every
        self._starts: list[float] = []
        self._beats: list[float] = []

    def _beat(self, *_) -> None:
        start, n = time.perf_counter(), 0
        for i in range(LOOP):
            n += i
        self._beats.append(time.perf_counter() - start)
        self._starts.append(start)

    def time(self, action: Callable[[], object], times: int = 1) -> _Span:
        """Do it so many times (collective over ``comm``); :meth:`measured` says later what that took."""
        if threading.current_thread() is not threading.main_thread():
            raise InputError("timer signals reach the main thread only: calibrate and validate there")
        before, timer = signal.signal(signal.SIGALRM, self._beat), (0.0, 0.0)
        first = len(self._beats)
        try:
            self.comm.Barrier()
            self._beat()
            timer = signal.setitimer(signal.ITIMER_REAL, self.every, self.every)
            inside, start = len(self._beats), time.perf_counter()
            for _ in range(times):
                action()
            self.comm.Barrier()
            end = time.perf_counter()
            beats = sum(self._beats[inside:])
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, signal.SIG_DFL if before is None else before)
            if timer[0]:  # somebody's own goes on
                signal.setitimer(signal.ITIMER_REAL, *timer)
        self._beat()
        return _Span(start, end, beats, first, len(self._beats))

    def measured(self, spans: list[_Span]) -> list[Measured]:
        """Seconds of measurements, by all beats so far (collective)."""
        least = self.comm.allreduce(min(self._beats), op=MPI.MIN)
        out = []
        for span in spans:
            start, end = self.comm.bcast((span.start, span.end))
            at = np.linspace(start, end, 2 + int((end - start) / self.every))
            work = end - start - self.comm.allreduce(span.beats, op=MPI.MAX)
            out.append(Measured(work * float(self._speed(span, at, least).mean()), end - start))
        return out

    def _speed(self, span: _Span, at: np.ndarray, least: float) -> np.ndarray:
        """Of the slowest rank that works, at some times; clocks of processes on one machine agree."""
        starts = np.array(self._starts[span.first : span.last])
        slowest = np.interp(at, starts, least / np.array(self._beats[span.first : span.last]))
        if self.comm.size == 1:
            return slowest
        behind = np.clip(np.searchsorted(starts, at), 1, len(starts) - 1)
        waits = starts[behind] - starts[behind - 1] > 1.5 * self.every  # signals are seen when MPI returns
        working = np.where(waits, np.inf, slowest)
        for speed in (slowest, working):
            self.comm.Allreduce(MPI.IN_PLACE, speed, op=MPI.MIN)
        return np.where(np.isinf(working), slowest, working)


def rounds(
    actions: Mapping[object, Callable[[], object]],
    repeats: int,
    *,
    comm=MPI.COMM_SELF,
    before: Mapping[object, Callable[[], object]] | None = None,
) -> dict[object, Measured]:
    """Medians of what some actions take, done in turn so that a slow minute of the machine falls on all alike
    (collective).

    Parameters
    ----------
    actions
        By name.
    repeats
        Of each, after some that warm up.
    comm
        Ranks that do them together.
    before
        What is done before one of that name, not measured.
    """
    metronome, before = Metronome(comm), before or {}
    spans: dict[object, list[_Span]] = {name: [] for name in actions}
    times = dict.fromkeys(actions, 1)
    for repeat in range(-1, repeats):
        for name, action in actions.items():
            before.get(name, lambda: None)()
            span = metronome.time(action, times[name])
            if repeat >= 0:
                spans[name].append(span)
            elif name not in before:  # the second one is warm
                start = time.perf_counter()
                action()
                times[name] = comm.bcast(max(1, min(ceil(SHORT / (time.perf_counter() - start)), 1000)))
    found = {name: metronome.measured(some) for name, some in spans.items()}
    median = lambda values, name: statistics.median(values) / times[name]
    return {
        name: Measured(
            median([m.seconds for m in some], name),
            median([m.clock for m in some], name),
            tuple(m.clock / times[name] for m in some),
        )
        for name, some in found.items()
    }

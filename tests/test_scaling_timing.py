"""Seconds at full speed: the speed of a slow machine is measured by reference loops, and divided out."""

import signal
import time

import pytest
from mpi4py import MPI

from pint_fem.scaling.timing import SpeedMonitor, _Span, rounds


def test_full_speed_follows_from_reference_loops():
    """By hand: loops take twice as long in the second half, and are taken out themselves."""
    found = SpeedMonitor(every=0.1)
    found._starts = [0.1 * i for i in range(21)]
    found._loops = [0.01 if t < 0.99 else 0.02 for t in found._starts]
    (whole,) = found.measured([_Span(0.0, 2.0, 0.3, 0, 21)])
    assert whole.clock == 2.0
    assert whole.seconds == pytest.approx((2.0 - 0.3) * 0.75, rel=0.03)
    (slow,) = found.measured([_Span(1.2, 1.8, 0.0, 0, 21)])
    assert slow.seconds == pytest.approx(0.3)
    assert slow.seconds / slow.clock == pytest.approx(0.5)


def test_reference_loops_run_in_a_measurement_and_nowhere_else():
    """None is lost while the process sleeps; the signal's handler is the old one behind it, after errors too."""
    before = signal.getsignal(signal.SIGALRM)
    found = SpeedMonitor(every=0.005)
    span = found.time(lambda: [time.sleep(0.01) for _ in range(10)])
    assert span.last - span.first >= 8
    assert 0 < span.loop_seconds < span.end - span.start
    with pytest.raises(ZeroDivisionError):
        found.time(lambda: 1 / 0)
    count = len(found._loops)
    time.sleep(0.02)
    assert len(found._loops) == count
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


@pytest.mark.parallel([1, 3])
def test_rounds_take_turns():
    """Each is done as often as the others, short ones several times in a measurement, on all ranks alike."""
    comm, order = MPI.COMM_WORLD, []
    actions = {"short": lambda: order.append("short"), "once": lambda: order.append("once")}
    found = rounds(actions, 3, comm=comm, before={"once": lambda: order.append("before")})
    once = [i for i, name in enumerate(order) if name == "once"]
    assert len(once) == order.count("before") == 4
    assert all(order[i - 1] == "before" and order[i - 2] == "short" for i in once)
    assert order.count("short") >= 2 + 3
    assert (order.count("short") - 2) % 3 == 0
    assert comm.allgather(order) == [order] * comm.size
    assert set(found) == set(actions)
    assert all(0 < m.seconds <= m.clock for m in found.values())
    assert comm.allgather(found) == [found] * comm.size


@pytest.mark.parallel(2)
def test_a_rank_that_waits_does_not_count():
    """One rank's loops stop while it waits in a message: the speed is that of the other one."""
    comm = MPI.COMM_WORLD
    found = SpeedMonitor(comm, every=0.1)
    loops = {0: [(0.1 * i, 0.01) for i in range(21)], 1: [(0.0, 0.04), (2.0, 0.04)]}[comm.rank]
    found._starts, found._loops = [list(x) for x in zip(*loops, strict=True)]
    (whole,) = found.measured([_Span(0.0, 2.0, 0.0, 0, len(loops))])
    assert whole.seconds / whole.clock == pytest.approx(1.0)
    found._starts, found._loops = [0.1 * i for i in range(21)], [0.01 * (1 + comm.rank)] * 21
    (both,) = found.measured([_Span(0.0, 2.0, 0.0, 0, 21)])
    assert both.seconds / both.clock == pytest.approx(0.5)

"""From noisy sensors to the recovered source: ours on all ranks, then serial pyadjoint with its best optimiser.

    mpiexec -n 2 python -m tests.benchmarks.end_to_end [--steps 512] [--gtol 1e-6]

The plate of the demo. Ours: inexact trust region with the learned preconditioner. The opponent: TAO's LMVM in the
prior's inner product on a tape of the same steps, on the first rank alone while the others sleep. Each is timed from
the files of mesh and readings to a gradient smaller by ``--gtol``. Kernels are compiled beforehand, on a few steps.
"""

from __future__ import annotations

import argparse
import sys
import time

from firedrake import COMM_SELF

import pint_fem as pf
from pint_fem.cli import wait_quietly
from problems.compare_serial import difference, together
from problems.heat_source import heat_source
from problems.serial_minimise import minimise
from problems.serial_pyadjoint import serial_heat_source
from tests.benchmarks.optimisers import LEARNED

__all__ = ["main"]

TARGET = 10


def ours(spacetime, steps: int, gtol: float, rtol: float, say=None):
    """The posed problem, its minimisation and the seconds of both."""
    start = time.perf_counter()
    problem = heat_source(spacetime, steps=steps, solver_parameters={"mgrit": {"rtol": rtol}})
    result = problem.rf.minimize_trust_region(inexact=True, gtol_rel=gtol, max_it=40, monitor=say, **LEARNED)
    spacetime.comm.barrier()
    return problem, result, time.perf_counter() - start


def theirs(steps: int, gtol: float, say=None, max_it: int = 200):
    """The serial minimisation and its seconds, with the recording of the tape."""
    start = time.perf_counter()
    serial = serial_heat_source(steps=steps, comm=COMM_SELF)
    result = minimise(serial, gttol=gtol, max_it=max_it, printer=say)
    return result, time.perf_counter() - start


def main(argv: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.end_to_end", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--gtol", type=float, default=1e-6, help="factor by which the gradient falls")
    parser.add_argument("--rtol", type=float, default=1e-9, help="best accuracy of the time-parallel solves")
    args = parser.parse_args(argv)
    spacetime = pf.SpaceTime()
    say = lambda text: print(text, flush=True) if spacetime.is_root else None
    ours(spacetime, 16, 1e-1, 1e-3, lambda text: None)
    if spacetime.is_root:
        theirs(2, 0.5, max_it=1)
    wait_quietly(spacetime.comm)

    say(f"ours, {spacetime.time_size} ranks in time, {args.steps} steps")
    problem, result, seconds = ours(spacetime, args.steps, args.gtol, args.rtol, say)
    say(f"ours: {result.reason.value}, {seconds:.1f} s, {problem.rf.problem.sweeps.counts}")
    source = together(spacetime, problem.evolution.V, result.x)
    if spacetime.is_root:
        say("serial pyadjoint")
        serial, their_seconds = theirs(args.steps, args.gtol, say)
        apart = abs(result.value - serial.value) / serial.value
        say(f"J: ours {result.value:.9e}, serial {serial.value:.9e}, relative difference {apart:.1e}")
        say(f"recovered source: relative difference {difference(source, serial.control):.1e}")
        ratio = their_seconds / seconds
        say(
            f"seconds: ours {seconds:.1f}, serial {their_seconds:.1f}, ratio {ratio:.1f} (target {TARGET}: "
            f"{'met' if ratio >= TARGET else 'missed'})"
        )
    wait_quietly(spacetime.comm)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What the heat and the Maxwell demos do alike: run the inversion with a progress line, and say on what it ran."""

from __future__ import annotations

import time
from importlib.metadata import version

from mpi4py import MPI

from demos.outputs import Progress

__all__ = ["invert", "summary_of"]


def invert(rf, opts, say, outputs, *, inexact: bool, **given):
    """Minimise, with the options of the command line.

    Returns
    -------
    result, seconds
    """
    sweeps, start = rf.problem.sweeps, time.perf_counter()
    with Progress(sweeps.spacetime.is_root) as progress:
        sweeps.on_sweep = lambda kind, result: progress(
            f"{kind} sweep: {result.cycles} cycles; so far " + ", ".join(f"{n} {k}" for k, n in sweeps.counts.items())
        )
        result = rf.minimize_trust_region(
            monitor=say,
            gtol_rel=opts.gtol,
            max_it=opts.max_iterations,
            inexact=inexact,
            preconditioner="limited-memory",
            preconditioner_memory=40,
            **given,
        )
    seconds = time.perf_counter() - start
    outputs("trace", sweeps.solvers.write_trace)
    rf.problem.value(result.x)
    say(f"{result.reason.value} after {result.iterations} iterations, {seconds:.1f} s")
    return result, seconds


def summary_of(name: str, settings: dict, spacetime, unknowns: int, seconds: dict) -> dict:
    """The beginning of ``summary.json``."""
    return {
        "problem": name,
        "settings": settings,
        "grid": {"space": spacetime.space_size, "time": spacetime.time_size},
        "unknowns": unknowns,
        "seconds": seconds,
        "versions": {name: version(name) for name in ("pint_fem", "firedrake", "petsc4py", "irksome", "pyadjoint-ad")},
        "mpi": MPI.Get_library_version().split(",")[0],
    }

"""What is counted by real runs, as it does not depend on the machine: cycles of solves, solves of an inversion."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from mpi4py import MPI

from pint_fem.mgrit import SolverFailure
from pint_fem.spacetime import SpaceTime

__all__ = ["count_cycles", "count_inversion", "solver_parameters"]

PARADIAG_STEPS = 512


def solver_parameters(options: Mapping, **more) -> dict:
    """The model's options as ``solver_parameters`` of a reduced functional."""
    options = {**options, **more}
    kind = options.pop("time_solver", "mgrit")
    return {"time_solver": kind, "paradiag" if kind == "paradiag" else "mgrit": options}


def count_cycles(pose: Callable, steps: int, menu: Sequence[dict], tolerances: Sequence[float]) -> list[dict]:
    """Cycles of cold state and adjoint solves by real runs on this process: one solve to the smallest tolerance a
    configuration, the residuals say when each other one was met; configurations that do not
    converge are left out. ParaDiag's do not depend on the number of steps: they
    are counted with :data:`PARADIAG_STEPS` at most.
    """
    out = []
    for options in menu:
        count = min(steps, PARADIAG_STEPS) if "time_solver" in options else steps
        rf = pose(SpaceTime("1x1", comm=MPI.COMM_SELF), count, solver_parameters(options, rtol=min(tolerances)))
        problem = rf.problem
        z = rf.array([c.control for c in rf.controls])
        problem.forget()
        z = z + 1.0
        try:
            problem.derivative(z)
        except SolverFailure:  # nothing for the menu
            continue
        point = problem.points[0]
        for kind, result in (("state", point.state), ("adjoint", point.adjoint)):
            for rtol in tolerances:
                met = next(i for i, r in enumerate(result.residuals) if r <= rtol * result.scale)
                first = {"kind": kind, "start": "nested", "options": options, "rtol": rtol, "cycles": met}
                out.append(first | {"steps": count, "unknowns": rf.evolution.V.dim()})
    return out


def count_inversion(pose: Callable, steps: int, options: dict) -> dict:
    """Solves of a whole inversion, by a real run on this process: how many of which ``[kind, start, cycles]``."""
    rf = pose(SpaceTime("1x1", comm=MPI.COMM_SELF), steps, solver_parameters(options))
    solves: dict[tuple, int] = {}
    seen: list[str] = []

    def see(kind, result):
        of_hessian = kind == "tangent" or seen[-1:] == ["tangent"]
        cold = of_hessian or kind not in seen  # the first state and the first gradient's adjoint
        key = kind, "nested" if cold else "guess", result.cycles
        solves[key] = solves.get(key, 0) + 1
        seen.append(kind)

    rf.problem.sweeps.on_sweep = see
    start = time.perf_counter()
    result = rf.minimize_trust_region(gtol_rel=1e-6)
    counts = {"values": result.value_calls, "gradients": result.gradient_calls, "hessians": result.hessian_calls}
    return {
        "solves": [[*key, n] for key, n in solves.items()],
        "counts": counts,
        "steps": steps,
        "unknowns": rf.evolution.V.dim(),
        "reason": result.reason.value,
        "seconds_one_rank": time.perf_counter() - start,
        "options": options,
    }

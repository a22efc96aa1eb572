"""What is counted by real runs, as it does not depend on the machine: cycles of solves, solves of inversions."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from mpi4py import MPI

from pint_fem.all_at_once.stopping import SolverFailure
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
        problem.invalidate()
        z = z + 1.0
        try:
            problem.derivative(z)
        except SolverFailure:  # nothing for the menu
            continue
        point = problem.evaluations[0]
        for kind, result in (("state", point.state), ("adjoint", point.adjoint)):
            for rtol in tolerances:
                met = next(i for i, r in enumerate(result.residuals) if r <= rtol * result.scale)
                first = {"kind": kind, "start": "nested", "options": options, "rtol": rtol, "cycles": met}
                out.append(first | {"steps": count, "unknowns": rf.evolution.V.dim()})
    return out


def count_inversion(pose: Callable, steps: int, options: Mapping, *, gtol: float, rtol: float) -> dict:
    """Tasks of a whole inversion, by a real run on this process with the optimiser of the demos: solves
    are inexact, but for sequential ones.

    Parameters
    ----------
    pose
        See ``problems.scaling_cases.Case``.
    steps, options
        Time steps; of the solver, as the model's.
    gtol, rtol
        Relative tolerances of the gradient, and of solves at their most accurate.

    Returns
    -------
    dict
        ``"solves"``: ``[task, [[kind, start, cycles], ...], how many]``, tasks being ``"value"`` (a state),
        ``"derivative"`` (an adjoint) and ``"hessian"`` (a tangent and an adjoint); how often the optimiser asked for
        values, gradients and Hessian actions; and where it was run.
    """
    serial = options.get("levels") == 1
    rf = pose(SpaceTime("1x1", comm=MPI.COMM_SELF), steps, solver_parameters(options, rtol=rtol))
    seen = _watched(rf.problem.sweeps)
    start = time.perf_counter()
    result = rf.minimize_trust_region(
        gtol_rel=gtol, inexact=not serial, preconditioner="limited-memory", preconditioner_memory=40
    )
    tasks, rest = Counter(), iter(seen)
    for solve in rest:
        if solve[0] == "tangent":
            tasks["hessian", (solve, next(rest))] += 1
        else:
            tasks["value" if solve[0] == "state" else "derivative", (solve,)] += 1
    return {
        "options": dict(options),
        "inexact": not serial,
        "solves": [[task, [list(solve) for solve in solves], n] for (task, solves), n in tasks.items()],
        "counts": {"values": result.value_calls, "gradients": result.gradient_calls, "hessians": result.hessian_calls},
        "steps": steps,
        "unknowns": rf.evolution.V.dim(),
        "gtol": gtol,
        "rtol": rtol,
        "value": result.value,
        "reason": result.reason.value,
        "seconds_one_rank": time.perf_counter() - start,
    }


def _watched(sweeps) -> list[tuple[str, str, int]]:
    """A list that gets kind, start and cycles of all sweeps from now on."""
    seen: list[tuple[str, str, int]] = []

    def watch(name: str, entry: Callable) -> None:
        sweep = getattr(sweeps, name)

        def run(*args, **given):
            out = sweep(*args, **given)
            seen.append(entry(out, given))
            return out

        setattr(sweeps, name, run)

    def plain(kind: str, usually: str) -> None:
        start = lambda given: given.get("start") or {True: "nested", False: "guess", None: usually}[given.get("cold")]
        watch(kind, lambda result, given: (kind, start(given), result.cycles))

    for kind, usually in (("state", "guess"), ("tangent", "nested"), ("adjoint", "guess")):
        plain(kind, usually)
    watch("adjoint_by_transposed_cycles", lambda out, given: ("adjoint", "transposed", out[1].cycles))
    return seen

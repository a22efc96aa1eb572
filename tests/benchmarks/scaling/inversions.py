"""Whole inversions: solves as real runs counted them, each as long as the model says.

An inversion is counted with the solver that it is predicted for (:func:`count_inversion`),
as another one, or another accuracy, takes other solves.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from mpi4py import MPI

from pint_fem.scaling.counting import solver_parameters
from pint_fem.scaling.model import Model, Solve
from pint_fem.scaling.network import Network
from pint_fem.spacetime import SpaceTime
from tests.benchmarks.scaling.records import Record

__all__ = ["Inversion", "best_inversion", "candidates", "count_inversion", "inversion_seconds", "serial_inversion"]

MEMORY = {"memory": 1e9}
"""Gigabytes of factors, of bounds."""


@dataclass(frozen=True)
class Inversion:
    """One on some ranks.

    Attributes
    ----------
    options : Mapping
        Of the solver.
    grid : tuple of int
        Space and time ranks.
    seconds : float
        Predicted.
    """

    options: Mapping
    grid: tuple[int, int]
    seconds: float


def inversion_seconds(
    calibration: Record,
    counted: Mapping,
    grid: tuple[int, int],
    *,
    nsteps: int | None = None,
    network: Network | None = None,
) -> float:
    """Seconds of a counted inversion, by one run of the virtual ranks.

    Each different task (with as many cycles) runs once, as tasks end with all ranks together (they do: norms); those
    that come again take as long. ParaDiag's run twice: what the first round takes more is factors that are kept.
    """
    model = Model(calibration, counted["options"], grid, nsteps=nsteps, network=network)
    tasks = [(task, [Solve(*solve) for solve in solves]) for task, solves, _ in counted["solves"]]
    rounds = 2 if model.solver == "paradiag" else 1
    found = model.run_all(tasks * rounds).task_seconds
    each = found[-len(tasks) :]
    total = sum(found[: len(tasks)]) - sum(each)
    total += sum(n * seconds for (*_, n), seconds in zip(counted["solves"], each, strict=True))
    counts = counted["counts"]
    vectors = 4 * counts["hessians"] + 2 * counts["gradients"]  # inner products and Riesz maps of the optimiser
    return total + vectors * calibration.extras.get("optimiser", 0.0) / grid[0]


def serial_inversion(calibration: Record) -> Mapping | None:
    """The one that was counted with sequential stepping."""
    return next((c for c in calibration.inversions if c["options"].get("levels") == 1), None)


def candidates(calibration: Record, **model) -> list[tuple[float, Mapping]]:
    """Inversions counted with solvers that are parallel in time, and what each takes at least on one rank: all its
    work, once, with all factors kept, as many ranks have the memory for.
    """
    some = [c for c in calibration.inversions if c["options"].get("levels") != 1]
    kept = [c if "time_solver" not in c["options"] else {**c, "options": {**c["options"], **MEMORY}} for c in some]
    work = [inversion_seconds(calibration, c, (1, 1), **model) for c in kept]
    return sorted(zip(work, some, strict=True), key=lambda pair: pair[0])


def best_inversion(
    calibration: Record, time_ranks: int, *, among: Sequence[tuple[float, Mapping]] | None = None, **model
) -> Inversion | None:
    """The fastest of the candidates, on one rank in space; ``None`` without. Those whose work, shared by all ranks,
    takes longer than what was found already are not run.

    Parameters
    ----------
    calibration, **model
        See :func:`inversion_seconds`.
    time_ranks
        All are used.
    among
        Default: all :func:`candidates`.
    """
    best = None
    for least, counted in candidates(calibration, **model) if among is None else among:
        if best is not None and least / time_ranks >= best.seconds:
            continue
        seconds = inversion_seconds(calibration, counted, (1, time_ranks), **model)
        if best is None or seconds < best.seconds:
            best = Inversion(counted["options"], (1, time_ranks), seconds)
    return best


def count_inversion(pose: Callable, steps: int, options: Mapping, *, gtol: float, rtol: float) -> dict:
    """Tasks of a whole inversion, by a real run on this process with the optimiser of the demos: solves
    are inexact, but for sequential ones.

    Parameters
    ----------
    pose
        As for :class:`~pint_fem.scaling.calibrate.Case`.
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

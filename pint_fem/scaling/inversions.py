"""Whole inversions: solves as real runs counted them, each as long as the model says.

An inversion is counted with the solver that it is predicted for (:func:`~pint_fem.scaling.counting.count_inversion`),
as another one, or another accuracy, takes other solves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pint_fem.scaling.costs import Calibration
from pint_fem.scaling.model import Model, Solve
from pint_fem.scaling.network import Network

__all__ = ["Inversion", "best_inversion", "candidates", "inversion_seconds", "serial_inversion"]

ROOM = {"memory": 1e9}
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
    calibration: Calibration,
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


def serial_inversion(calibration: Calibration) -> Mapping | None:
    """The one that was counted with sequential stepping."""
    return next((c for c in calibration.inversions if c["options"].get("levels") == 1), None)


def candidates(calibration: Calibration, **model) -> list[tuple[float, Mapping]]:
    """Inversions counted with solvers that are parallel in time, and what each takes at least on one rank: all its
    work, once, with all factors kept, as many ranks have the memory for.
    """
    some = [c for c in calibration.inversions if c["options"].get("levels") != 1]
    kept = [c if "time_solver" not in c["options"] else {**c, "options": {**c["options"], **ROOM}} for c in some]
    work = [inversion_seconds(calibration, c, (1, 1), **model) for c in kept]
    return sorted(zip(work, some, strict=True), key=lambda pair: pair[0])


def best_inversion(
    calibration: Calibration, time_ranks: int, *, among: Sequence[tuple[float, Mapping]] | None = None, **model
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

"""Whole inversions: solves as real runs counted them, each as long as the model says.

An inversion is counted with the solver that it is predicted for (:func:`~pint_fem.scaling.counting.count_inversion`),
as another one, or another accuracy, takes other solves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pint_fem.scaling.costs import Calibration
from pint_fem.scaling.model import Model, Solve
from pint_fem.scaling.network import Network

__all__ = ["Inversion", "best_inversion", "inversion_seconds", "serial_inversion"]


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
    that come again take as long. The first solve makes ParaDiag's factors.
    """
    model = Model(calibration, counted["options"], grid, nsteps=nsteps, network=network)
    tasks = [(task, [Solve(*solve) for solve in solves]) for task, solves, _ in counted["solves"]]
    cold, *each = model.run_all([tasks[0], *tasks]).task_seconds
    total = max(cold - each[0], 0.0)  # factors
    total += sum(n * seconds for (*_, n), seconds in zip(counted["solves"], each, strict=True))
    counts = counted["counts"]
    vectors = 4 * counts["hessians"] + 2 * counts["gradients"]  # inner products and Riesz maps of the optimiser
    return total + vectors * calibration.extras.get("optimiser", 0.0) / grid[0]


def serial_inversion(calibration: Calibration) -> Mapping | None:
    """The one that was counted with sequential stepping."""
    return next((c for c in calibration.inversions if c["options"].get("levels") == 1), None)


def best_inversion(calibration: Calibration, time_ranks: int, **model) -> Inversion | None:
    """The fastest of those counted with solvers that are parallel in time, on one rank in space; ``None`` without.

    Those whose work on one rank, shared by all, takes longer than what was found already are left out.
    """
    some = [c for c in calibration.inversions if c["options"].get("levels") != 1]
    work = [inversion_seconds(calibration, c, (1, 1), **model) for c in some]
    best = None
    for least, counted in sorted(zip(work, some, strict=True), key=lambda pair: pair[0]):
        if best is not None and least / time_ranks >= best.seconds:
            continue
        seconds = least if time_ranks == 1 else inversion_seconds(calibration, counted, (1, time_ranks), **model)
        if best is None or seconds < best.seconds:
            best = Inversion(counted["options"], (1, time_ranks), seconds)
    return best

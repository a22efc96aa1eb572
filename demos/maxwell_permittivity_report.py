"""Pictures of the radar inversion: permittivity and conductivity of the soil, and readings of shots beside the fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from firedrake import SpatialCoordinate, conditional, exp

from demos.pictures import Raster, plot_gathers, plot_values
from problems.experiments import CoefficientProblem
from problems.maxwell_soil import BACKGROUND, RECEIVERS, in_soil

__all__ = ["further_report"]

WIDTH_IN_PIXELS = 240
SHOTS = 4


def further_report(
    problem: CoefficientProblem, result, out: Path, summary: dict, say: Callable, *, shipped: bool
) -> Callable[[], None]:
    """Return what draws ``soil.png`` and ``gathers.png`` on the first rank (collective).

    Parameters
    ----------
    problem, result
        The posed problem and its minimisation.
    out
        Folder of the pictures.
    summary, say
        The summary and what prints a line, to which nothing is added.
    shipped
        Whether the true coefficients are known.
    """
    mesh = problem.coefficients[0].control.function_space().mesh()
    x, rows, extent = SpatialCoordinate(mesh), [], None
    if problem.spacetime.time_comm.rank == 0:
        raster = Raster(mesh, width=WIDTH_IN_PIXELS)
        labels = ("relative permittivity", "conductivity in 2.65 mS/m")
        controls = zip(problem.coefficients, problem.rf.function(result.x), BACKGROUND, labels, strict=True)
        for coefficient, found, value, label in controls:
            logarithms = [("true", coefficient.truth)] if shipped else []
            logarithms.append(("recovered", found))
            soil = lambda f, value=value: conditional(in_soil(x), value * exp(f), np.nan)
            rows.append((label, [(f"{name} {coefficient.name}", raster(soil(f))) for name, f in logarithms]))
        extent = raster.extent
    predicted, every = problem.predicted(result.x), problem.data.readings
    chosen = np.unique(np.linspace(0, len(every) - 1, min(SHOTS, len(every))).round().astype(int))

    def draw() -> None:
        plot_values(out / "soil.png", rows, extent, points=RECEIVERS, sources=problem.sources)
        shots = [(f"antenna {k}", every[k].points[:, 0], every[k].values, predicted[k][..., 0]) for k in chosen]
        plot_gathers(out / "gathers.png", every[0].times, shots, quantity="electric field")

    return draw

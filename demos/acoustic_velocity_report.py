"""The wave speed's error, and pictures of the speeds and of records of shots beside those of the fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import numpy as np
from firedrake import And, SpatialCoordinate, assemble, conditional, dx

from demos.pictures import Raster
from problems.acoustic_setting import DEPTH, WIDTH, start_speed, true_speed
from problems.acoustic_velocity import speed_of
from problems.experiments import CoefficientProblem

mpl.use("Agg")
import matplotlib.pyplot as plt

__all__ = ["further_report", "plot_shots", "plot_speeds", "speed_error"]

WIDTH_IN_PIXELS = 250


def speed_error(speed, mesh) -> float:
    """Return the relative L2 error of a speed in UFL within the section, without the absorbing layer (collective)."""
    x = SpatialCoordinate(mesh)
    inside = conditional(And(And(x[0] > 0, x[0] < WIDTH), x[1] > -DEPTH), 1.0, 0.0)
    square = lambda f: assemble(inside * f**2 * dx(domain=mesh, degree=8))
    return float(np.sqrt(square(speed - true_speed(x)) / square(true_speed(x))))


def further_report(
    problem: CoefficientProblem, result, out: Path, summary: dict, say: Callable, *, shipped: bool
) -> Callable[[], None]:
    """Add the speed's error to the summary, and return what draws ``speed.png`` and ``shots.png`` on the first rank
    (collective).

    Parameters
    ----------
    problem, result
        The posed problem of the last band and its minimisation.
    out
        Folder of the pictures.
    summary, say
        The summary, and what prints a line.
    shipped
        Whether the true speed is known.
    """
    control = problem.rf.function(result.x)
    mesh = control.function_space().mesh()
    x, images, extent = SpatialCoordinate(mesh), [], None
    if shipped:
        errors = {"recovered": speed_error(speed_of(control, x), mesh), "start": speed_error(start_speed(x), mesh)}
        summary["result"]["relative_speed_error"] = errors
        recovered, start = errors["recovered"], errors["start"]
        say(f"relative L2 error of the speed in the section {recovered:.3f}, of the start {start:.3f}")
    if problem.spacetime.time_comm.rank == 0:
        raster = Raster(mesh, width=WIDTH_IN_PIXELS)
        speeds = [("true", true_speed(x))] if shipped else []
        speeds += [("start", start_speed(x)), ("recovered", speed_of(control, x))]
        images, extent = [(name, raster(speed)) for name, speed in speeds], raster.extent
    predicted = [table[..., 0] for table in problem.predicted(result.x)]

    def draw() -> None:
        receivers = problem.data.readings[0].points
        plot_speeds(out / "speed.png", images, extent, receivers=receivers, shots=problem.sources)
        middle = len(problem.sources) // 2
        shown = [(f"shot {e}", problem.data.readings[e], predicted[e]) for e in (0, middle)]
        plot_shots(out / "shots.png", shown)

    return draw


def plot_speeds(path: Path, images, extent, *, receivers: np.ndarray, shots: np.ndarray) -> None:
    """Draw named images of speeds on one colour scale, with receivers, shots and the edge of the absorbing layer."""
    low, high = (f([f(image[np.isfinite(image)]) for _, image in images]) for f in (np.min, np.max))
    fig, axes = plt.subplots(1, len(images), figsize=(5 * len(images) + 0.8, 3.2), layout="constrained", squeeze=False)
    for ax, (name, image) in zip(axes.flat, images, strict=True):
        shown = ax.imshow(image, origin="lower", extent=extent, cmap="viridis", vmin=low, vmax=high)
        ax.plot([0, 0, WIDTH, WIDTH], [0, -DEPTH, -DEPTH, 0], "w--", lw=0.8)
        ax.plot(*receivers.T, "w.", ms=3)
        ax.plot(*shots.T, "^", color="gold", mec="k", mew=0.6, ms=7)
        ax.set(title=f"{name} speed", xlabel="x in km", aspect="equal")
    axes.flat[0].set_ylabel("y in km")
    fig.colorbar(shown, ax=axes, label="wave speed in km/s", shrink=0.9)
    fig.suptitle("dots: receivers; triangles: shots; dashed: absorbing layer", fontsize=10)
    fig.savefig(path, dpi=110)
    plt.close(fig)


def plot_shots(path: Path, shots) -> None:
    """Draw the records of shots: readings, fit and their difference, on one colour scale for each shot.

    Parameters
    ----------
    path
        File to write.
    shots
        Title, :class:`~problems.readings.Readings` and predicted values ``(nt, ns)`` of each shot.
    """
    fig, axes = plt.subplots(len(shots), 3, figsize=(11, 3.6 * len(shots)), layout="constrained", squeeze=False)
    for row, (title, readings, predicted) in zip(axes, shots, strict=True):
        measured, offsets = np.ma.filled(readings.values, np.nan), readings.points[:, 0]
        limit = np.nanquantile(np.abs(measured), 0.995)
        half = 0.5 * (offsets[-1] - offsets[0]) / max(len(offsets) - 1, 1)
        extent = (offsets[0] - half, offsets[-1] + half, readings.times[-1], readings.times[0])
        panels = (("readings", measured), ("fit", predicted), ("readings - fit", measured - predicted))
        for ax, (name, values) in zip(row, panels, strict=True):
            shown = ax.imshow(values, extent=extent, aspect="auto", cmap="gray", vmin=-limit, vmax=limit)
            ax.set(title=f"{title}: {name}", xlabel="receiver's x in km")
        row[0].set_ylabel("time in s")
        fig.colorbar(shown, ax=row, label="pressure", shrink=0.9, extend="both")
    fig.savefig(path, dpi=110)
    plt.close(fig)

"""The posterior after each reading time in pictures: an animation, a window, some frames side by side, a summary."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from firedrake import Function, assemble, dx, inner
from mpi4py import MPI

from demos.heat_source_report import UNIT
from demos.inversion import mean_over_coefficients
from demos.outputs import write_json
from demos.pictures import PillowWriter, Raster, plt
from problems.heat_readings import READINGS
from problems.readings import Readings

__all__ = ["Frame", "LivePicture", "play", "report", "write_animation", "write_frames"]

KEPT = 4
"""Number of times in the picture of some frames."""
WIDTH = 160
"""Pixels of a field along its longer side."""
MOST = 65
"""Number of frames of an animation, at most."""
BACKENDS = ("macosx",) if sys.platform == "darwin" else ("qtagg", "gtk4agg", "gtk3agg", "tkagg", "wxagg")


@dataclass(frozen=True)
class Frame:
    """The posterior of the readings up to a time.

    Attributes
    ----------
    time : float
        Of the last reading; 0 before the first.
    seconds : float
        Of the update with mean and standard deviation.
    mean, deviation : ndarray or None
        Images on the first rank.
    predicted, band : ndarray, shape (times, sensors shown)
        Readings at the mean, past and to come, and their standard deviations without noise.
    average : float
        Mean of the standard deviations of the coefficients.
    error : float or None
        Relative L2 error of the mean, where the true source is known.
    """

    time: float
    seconds: float
    mean: np.ndarray | None
    deviation: np.ndarray | None
    predicted: np.ndarray
    band: np.ndarray
    average: float
    error: float | None


@dataclass(frozen=True)
class Setting:
    """What all frames have in common.

    Attributes
    ----------
    readings : Readings
        All readings.
    sensors : ndarray of int
        Numbers of those that are drawn.
    extent : sequence of float
        Of the images.
    limit : float
        The largest source of the colour scale.
    deviations : tuple of float
        The least and the largest standard deviation of the colour scale.
    """

    readings: Readings
    sensors: np.ndarray
    extent: Sequence[float]
    limit: float
    deviations: tuple[float, float]


def play(problem, posterior, sensors: np.ndarray, say, *, window: bool) -> tuple[list[Frame], Setting, np.ndarray]:
    """Add the readings of one time after the other (collective).

    Parameters
    ----------
    problem, posterior
        The ready problem, and the posterior of all its readings, from whose mean the colour scale follows.
    sensors
        Numbers of the sensors that the map of ``posterior`` predicts.
    say
        Prints a line on the first rank.
    window
        Whether to draw in a window, where there is one.

    Returns
    -------
    frames, setting, x
        The frame before the first reading and one for each time, what they have in common, and the last mean.
    """
    spacetime, stream, comm = problem.spacetime, posterior.stream(), problem.spacetime.comm
    raster = Raster(problem.evolution.V.mesh(), width=WIDTH)
    setting = _setting(problem, posterior, sensors, raster, stream.times[0])
    view, frames = None, []
    for n in range(len(stream.times) + 1):
        comm.barrier()
        start = time.perf_counter()
        law = stream.update() if n else stream.posterior
        deviation = np.sqrt(law.variance())
        frames.append(_frame(problem, law, deviation, raster, time.perf_counter() - start))
        if n == 0 and window and spacetime.is_root:
            view = _window(setting, frames[0], say)
        if view is not None:
            view.show(frames)
            plt.pause(0.001)
    if view is not None:
        plt.pause(2.0)
        view.close()
    return frames, setting, stream.posterior.x


def _setting(problem, posterior, sensors: np.ndarray, raster: Raster, first_time: float) -> Setting:
    """Colour scales for the posteriors from the first time to the last (collective). That of the prior is beyond."""
    largest = problem.spacetime.comm.allreduce(float(np.abs(posterior.x).max(initial=0.0)), MPI.MAX)
    last, first = (raster(law.standard_deviation()) for law in (posterior, posterior.until(first_time)))
    limits = (0.0, 1.0) if last is None else (float(np.nanmin(last)), float(np.nanquantile(first, 0.99)))
    return Setting(problem.readings, sensors, raster.extent, 1.2 * largest, limits)


def _frame(problem, law, deviation: np.ndarray, raster: Raster, seconds: float) -> Frame:
    """The frame of a posterior (collective)."""
    rf, truth, error = problem.rf, problem.true_source, None
    mean = rf.function(law.x)
    if str(problem.readings.path) == str(READINGS):  # the true source is known
        difference = Function(truth.function_space()).assign(mean - truth)
        square = lambda f: assemble(inner(f, f) * dx)
        error = float(np.sqrt(square(difference) / square(truth)))
    predicted = law.predict()
    (values,), (band,) = (predicted.split(part) for part in (predicted.mean, predicted.standard_deviation))
    images = raster(mean), raster(rf.function(deviation))
    average = mean_over_coefficients(deviation, problem.spacetime.space_comm)
    return Frame(law.time or 0.0, seconds, *images, np.asarray(values), np.asarray(band), average, error)


def _window(setting: Setting, first: Frame, say):
    """A picture in a window; ``None``, with a line that has the reason, where there is no display or terminal."""
    if not sys.stdout.isatty():
        say("no window: the output is no terminal")
        return None
    if sys.platform.startswith("linux") and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        say("no window: there is no display (DISPLAY is not set)")
        return None
    for backend in BACKENDS:
        try:
            plt.switch_backend(backend)
            view = LivePicture(setting, first)
            plt.pause(0.001)
            return view
        except Exception:  # a toolkit that is missing, a display that cannot be reached: each has its own error
            plt.close("all")
    plt.switch_backend("Agg")
    say("no window: matplotlib finds no toolkit that can open one, such as PyQt6 or tkinter")
    return None


# -- pictures ----------------------------------------------------------------------------------------------------------
class LivePicture:
    """Source, standard deviation, readings with their prediction, and how error and deviation decrease.

    Parameters
    ----------
    setting
        What all frames have in common.
    first
        The frame before the first reading, whose standard deviation is the largest one.
    """

    def __init__(self, setting: Setting, first: Frame):
        self._setting, self._known = setting, first.error is not None
        self.figure, axes = plt.subplots(2, 2, figsize=(10.5, 6.6), layout="constrained")
        (source, spread), (self._data, self._history) = axes
        self._mean = _show_mean(source, first, setting)
        self._deviation = _show_deviation(spread, first, setting)
        for ax, image, name in ((source, self._mean, "mean"), (spread, self._deviation, "standard deviation")):
            ax.set(title=f"source: {name}", xlabel="x", ylabel="y")
            self.figure.colorbar(image, ax=ax, shrink=0.85, label=UNIT, extend="max" if ax is spread else "neither")

    def show(self, frames: list[Frame]) -> None:
        """Draw the last of some frames, with the history of all."""
        frame, times = frames[-1], [f.time for f in frames]
        self._mean.set_data(frame.mean)
        self._deviation.set_data(frame.deviation)
        self.figure.suptitle(f"posterior of the readings up to t = {frame.time:.3f} (dots: sensors)\n", fontsize=11)
        self._show_data(frame)
        ax = self._history
        ax.clear()
        relative = [f.average / frames[0].average for f in frames]
        ax.plot(times, relative, "C0-", label="mean standard deviation, relative to the prior's")
        if self._known:
            ax.plot(times, [f.error for f in frames], "C3-", label="relative error of the mean")
        ax.set(xlim=(0, self._setting.readings.times[-1]), ylim=(0, 1.05), xlabel="t", title="uncertainty and error")
        ax.legend(fontsize=8, loc="lower left")

    def _show_data(self, frame: Frame) -> None:
        """Readings so far, and what the posterior predicts for all times."""
        ax, read = self._data, self._setting.readings
        past = read.times <= frame.time * (1 + 1e-12)
        ax.clear()
        for n, s in enumerate(self._setting.sensors):
            mean, width = frame.predicted[:, n], 2 * frame.band[:, n]
            ax.fill_between(read.times, mean - width, mean + width, color=f"C{n}", alpha=0.25, lw=0)
            ax.plot(read.times, mean, color=f"C{n}", lw=1, label=f"sensor {read.sensors[s]}")
            ax.plot(read.times[past], read.values[past, s], ".", ms=4, color=f"C{n}")
        ax.axvline(frame.time, color="k", lw=0.5)
        low, high = read.values.min(), read.values.max()
        margin = 0.3 * (high - low)
        ax.set(xlim=(0, read.times[-1]), ylim=(low - 1.5 * margin, high + margin))
        ax.set(xlabel="t", ylabel="temperature rise in K")
        ax.set_title("readings, fit and prediction ± 2 standard deviations")
        ax.legend(fontsize=8, ncols=2, loc="lower right")

    def close(self) -> None:
        """Close the window."""
        plt.close(self.figure)
        plt.switch_backend("Agg")


def _show_mean(ax, frame: Frame, setting: Setting):
    ax.plot(*setting.readings.points.T, "k.", ms=3)
    look = dict(cmap="RdBu_r", vmin=-setting.limit, vmax=setting.limit)
    return ax.imshow(frame.mean, origin="lower", extent=setting.extent, **look)


def _show_deviation(ax, frame: Frame, setting: Setting):
    ax.plot(*setting.readings.points.T, "w.", ms=3)
    low, high = setting.deviations
    return ax.imshow(frame.deviation, origin="lower", extent=setting.extent, cmap="viridis", vmin=low, vmax=high)


def write_animation(path, frames: list[Frame], setting: Setting) -> None:
    """Write at most :data:`MOST` of the frames as an animated GIF; the last one stays for a second."""
    view, writer = LivePicture(setting, frames[0]), PillowWriter(fps=8)
    numbers = np.unique(np.linspace(0, len(frames) - 1, min(len(frames), MOST)).round().astype(int)).tolist()
    with writer.saving(view.figure, path, dpi=72):
        for n in numbers + 7 * numbers[-1:]:
            view.show(frames[: n + 1])
            writer.grab_frame()
            view.figure.set_layout_engine("none")  # that of the first frame is kept
    plt.close(view.figure)


def write_frames(path, frames: list[Frame], setting: Setting) -> None:
    """Draw mean and standard deviation at some times."""
    ends = np.unique(np.geomspace(1, len(frames) - 1, KEPT).round().astype(int))
    left, right, bottom, top = setting.extent
    size = 3.3 * len(ends) + 1, 6.0 * (top - bottom) / (right - left) + 1.2
    fig, axes = plt.subplots(2, len(ends), figsize=size, layout="constrained", squeeze=False, sharey=True)
    for column, n in enumerate(ends):
        frame = frames[n]
        means, deviations = axes[:, column]
        error = "" if frame.error is None else f", error {frame.error:.2f}"
        mean = _show_mean(means, frame, setting)
        deviation = _show_deviation(deviations, frame, setting)
        means.set_title(f"mean, t = {frame.time:.3g}{error}", fontsize=10)
        deviations.set_title(f"standard deviation, {frame.average:.3g} on average", fontsize=10)
        deviations.set_xlabel("x")
    for row, shown, extend in ((axes[0], mean, "neither"), (axes[1], deviation, "max")):
        row[0].set_ylabel("y")
        fig.colorbar(shown, ax=row, shrink=0.9, label=UNIT, extend=extend)
    fig.savefig(path, dpi=110)
    plt.close(fig)


def report(
    frames: list[Frame], setting: Setting, difference: float, out, summary: dict, say, outputs, next_step: str
) -> None:
    """Print and write what was played (collective); what cannot be written is reported at the end.

    Parameters
    ----------
    frames, setting
        Of :func:`play`.
    difference
        Relative difference of the last mean from that of all readings at once.
    out, summary, say, outputs, next_step
        The folder, the summary, which is completed, what prints a line, the files, and what to do next.
    """
    took = 1e3 * np.array([frame.seconds for frame in frames[1:]])
    each = f"{np.median(took):.2f} ms each, at most {took.max():.2f}"
    say(f"{len(took)} updates with mean and standard deviation: {each}")
    for frame in frames[:: max(1, len(frames) // 8)]:
        error = "" if frame.error is None else f", relative error of the source {frame.error:.3f}"
        say(f"  t = {frame.time:.3f}: standard deviation {frame.average:.3g} on average{error}")
    summary["result"] = {
        "relative_source_error": frames[-1].error,
        "difference_from_all_readings_at_once": difference,
        "milliseconds_per_update": {"median": np.median(took), "largest": took.max()},
    }
    summary["updates"] = [
        {
            "time": frame.time,
            "milliseconds": 1e3 * frame.seconds,
            "relative_source_error": frame.error,
            "mean_standard_deviation": frame.average,
        }
        for frame in frames
    ]
    outputs.on_root("summary.json", write_json, out / "summary.json", summary)

    def pictures():
        write_frames(out / "sharpening.png", frames, setting)
        write_animation(out / "live.gif", frames, setting)

    outputs.on_root(f"pictures in {out}", pictures)
    outputs.finish(out, next_step)

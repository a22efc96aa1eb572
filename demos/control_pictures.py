"""Pictures of optimal control: controls over time with their bounds, and states beside what they have to be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

__all__ = ["Course", "Row", "active_runs", "plot_controls", "plot_rows"]

_POWER = plt.get_cmap("YlOrRd")
LOWER, UPPER = "#4c9be8", "#f2855e"
"""Colours of the active sets."""


@dataclass(frozen=True)
class Course:
    """What a control is over time.

    Attributes
    ----------
    name : str
    low, high : ndarray, shape (N,)
        Its least and largest value in each step; the same where it is a number.
    size : ndarray, shape (N,)
        Its norm in each step.
    at_lower, at_upper : ndarray, shape (N,)
        Fractions of its values that are at the bounds.
    """

    name: str
    low: np.ndarray
    high: np.ndarray
    size: np.ndarray
    at_lower: np.ndarray
    at_upper: np.ndarray

    @property
    def is_number(self) -> bool:
        """Whether the control is a number in each step."""
        return bool(np.array_equal(self.low, self.high))


@dataclass(frozen=True)
class Row:
    """A row of images in :func:`plot_rows`.

    Attributes
    ----------
    name : str
    images : sequence of ndarray
        One for each time.
    scale : str
        Rows of one scale have the same limits of colours, and its name is that of their bar; ``""``: the images are
        active sets, -1 at the lower bound, 1 at the upper one, 0 in between.
    """

    name: str
    images: Sequence[np.ndarray]
    scale: str


def active_runs(active: np.ndarray) -> list[tuple[int, int]]:
    """Return the first step and the one after the last of each run of ``True``, counted from 0."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], active, [False]]).astype(int)))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def plot_controls(
    path: Path,
    edges: np.ndarray,
    courses: Sequence[Course],
    tracked: Mapping[str, np.ndarray],
    *,
    bounds: tuple[float | None, float | None] | None,
    quantity: str,
    tracked_quantity: str,
) -> None:
    """Draw controls over time with their bounds and active sets, and below them what is to be small.

    Parameters
    ----------
    path
        File to write.
    edges
        Times of all points, ``(N + 1,)``; a control has one value in each interval.
    courses
        Of the controls: numbers, or one field.
    tracked
        Curves over ``edges[1:]`` by their names.
    bounds
        Of all controls.
    quantity, tracked_quantity
        Labels of the axes.
    """
    numbers = all(course.is_number for course in courses)
    panels = len(courses) + (0 if numbers or bounds is None else len(courses)) + 1
    heights = [1.0 if numbers else 1.6] * (panels - 1) + [1.8]
    fig, axes = plt.subplots(
        panels, 1, figsize=(9, 1.5 * sum(heights) + 0.6), layout="constrained", sharex=True, height_ratios=heights
    )
    axes = list(axes)
    top = axes[0]
    for course in courses:
        ax = axes.pop(0)
        if numbers:
            ax.stairs(course.high, edges, color="k", lw=1.4, baseline=None)
            _shade(ax, edges, course)
            ax.set_title(course.name, fontsize=10, loc="left", pad=3)
        else:
            ax.fill_between(edges, *(np.append(v, v[-1]) for v in (course.low, course.high)), step="post", color="0.85")
            for values, style in ((course.low, "-"), (course.high, "-")):
                ax.stairs(values, edges, color="0.45", lw=1, ls=style, baseline=None)
            ax.set_title(f"{course.name}: between its least and largest value in space", fontsize=10, loc="left", pad=3)
        for bound in bounds or ():
            if bound is not None:
                ax.axhline(bound, color="k", ls="--", lw=0.8)
        ax.set_ylabel(quantity)
        ax.margins(y=0.12)
        if numbers or bounds is None:
            continue
        ax = axes.pop(0)
        for fraction, colour, name in ((course.at_lower, LOWER, "lower"), (course.at_upper, UPPER, "upper")):
            ax.stairs(fraction, edges, color=colour, lw=1.6, label=f"at the {name} bound", baseline=None)
        ax.set_title("active sets", fontsize=10, loc="left", pad=3)
        ax.set_ylabel("fraction of values")
        ax.legend(fontsize=8)
    if numbers and bounds is not None:
        names = [("lower bound active", LOWER), ("upper bound active", UPPER)]
        handles = [Patch(color=colour, alpha=0.45, label=name) for name, colour in names]
        top.legend(handles=handles, fontsize=8, ncols=2, loc="lower right", bbox_to_anchor=(1.0, 1.0), frameon=False)
    (ax,) = axes
    for n, (name, values) in enumerate(tracked.items()):
        ax.plot(edges[1:], values, color=f"C{n}", lw=1.6, label=name)
    later = np.concatenate([v[len(v) // 4 :] for v in tracked.values()])
    if later.max() > 50 * later.min() > 0:
        ax.set_yscale("log")
    ax.set(xlabel="t", ylabel=tracked_quantity, xlim=(edges[0], edges[-1]))
    ax.legend(fontsize=8)
    fig.savefig(path, dpi=110)
    plt.close(fig)


def _shade(ax, edges: np.ndarray, course: Course) -> None:
    """Colour the times at which a number is at a bound."""
    for fraction, colour in ((course.at_lower, LOWER), (course.at_upper, UPPER)):
        for first, last in active_runs(fraction > 0.5):
            ax.axvspan(edges[first], edges[last], color=colour, alpha=0.3, lw=0)


def plot_rows(
    path: Path,
    times: Sequence[float],
    rows: Sequence[Row],
    extent: Sequence[float],
    *,
    edges: Sequence[tuple[np.ndarray, np.ndarray]] = (),
    edge_quantity: str = "",
    title: str = "",
) -> None:
    """Draw rows of images, a column for each time, and in the row ``state`` what acts on parts of the boundary.

    Parameters
    ----------
    path
        File to write.
    times
        Of the columns.
    rows
        Of the same number of images.
    extent
        Of the images.
    edges
        Ends ``(2, 2)`` of parts of the boundary, and a value for each time.
    edge_quantity
        Label of these values' colour bar.
    title
        Of the figure.
    """
    size = 1.75
    figure = (size * len(times) + 2.2, (size + 0.02) * len(rows) + 0.7)
    fig, axes = plt.subplots(len(rows), len(times), figsize=figure, layout="constrained", squeeze=False)
    limits = {scale: _limit([i for row in rows if row.scale == scale for i in row.images]) for scale in _scales(rows)}
    sets, shown = ListedColormap([LOWER, "0.92", UPPER]), {}
    every = np.concatenate([values for _, values in edges]) if edges else np.zeros(1)
    powers = min(0.0, float(every.min())), max(float(every.max()), 1e-12)
    for row, line in zip(rows, axes, strict=True):
        for n, (ax, image) in enumerate(zip(line, row.images, strict=True)):
            given = dict(origin="lower", extent=extent)
            if row.scale:
                given |= dict(cmap="RdBu_r", vmin=-limits[row.scale], vmax=limits[row.scale])
            else:
                given |= dict(cmap=sets, vmin=-1.5, vmax=1.5, interpolation="nearest")
            shown.setdefault(row.scale, (ax.imshow(image, **given), []))[1].append(ax)
            ax.set(xticks=[], yticks=[])
            for ends, values in edges if row.name == "state" else ():
                colour = _POWER((values[n] - powers[0]) / (powers[1] - powers[0]))
                ax.plot(*ends.T, color="0.3", lw=6, solid_capstyle="butt")
                ax.plot(*ends.T, color=colour, lw=4.5, solid_capstyle="butt")
        line[0].set_ylabel(row.name)
    for ax, t in zip(axes[0], times, strict=True):
        ax.set_title(f"t = {t:.2f}", fontsize=10)
    for scale, (image, own) in shown.items():
        long = len(own) // len(times)
        bar = fig.colorbar(image, ax=own, shrink=0.8, label=scale or "active set", pad=0.01, aspect=12 * long)
        if not scale:
            bar.set_ticks([-1, 0, 1], labels=["lower", "free", "upper"])
    if edges:
        scale = mpl.cm.ScalarMappable(mpl.colors.Normalize(*powers), _POWER)
        given = dict(location="bottom", shrink=0.4, aspect=30)
        fig.colorbar(scale, ax=axes, label=f"{edge_quantity} (bars at the edges)", **given)
    fig.suptitle(title, fontsize=11)
    fig.savefig(path, dpi=100, bbox_inches="tight")  # labels of bars beside a bar below
    plt.close(fig)


def _scales(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row.scale for row in rows if row.scale))


def _limit(images: Sequence[np.ndarray]) -> float:
    """The largest magnitude of images that a thousandth of the pixels exceeds at most."""
    every = np.abs(np.concatenate([image[np.isfinite(image)] for image in images]))
    return float(np.quantile(every, 0.999)) or 1.0

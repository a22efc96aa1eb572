"""Pictures of fields, which are sampled at the pixels of a raster: none is gathered. Curves: :mod:`demos.curves`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
import ufl
from firedrake import FunctionSpace, VertexOnlyMesh
from firedrake import interpolate as interpolate_
from firedrake.assemble import assemble
from firedrake.mesh import MeshGeometry
from mpi4py import MPI

from pint_fem.spacetime import SpaceTime

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.animation import FuncAnimation, PillowWriter

from demos.style import POSITIVE, SIGNED, use

use()

__all__ = [
    "Raster",
    "animate",
    "gather_images",
    "plot_fields",
    "plot_gathers",
    "plot_snapshots",
    "plot_values",
    "plt",
    "save",
]


class Raster:
    """Pixels over a plane mesh or over a section through a mesh in space, at which fields are sampled.

    Parameters
    ----------
    mesh
        Distributed over ``comm = mesh.comm``.
    width
        Pixels along the longer side.
    plane
        Number of the coordinate that is constant in the section, and its value; of a plane mesh ``None``.

    Attributes
    ----------
    extent, shape : tuple
        Left, right, bottom and top of the image in the mesh's coordinates; pixels by rows and columns.
    axes : list of int
        Numbers of the coordinates to the right and upwards.
    """

    def __init__(self, mesh: MeshGeometry, width: int = 280, plane: tuple[int, float] | None = None):
        self.comm = mesh.comm
        self.axes = [i for i in range(mesh.geometric_dimension) if plane is None or i != plane[0]]
        x = np.asarray(mesh.coordinates.dat.data_ro)[:, self.axes]
        low, high = np.full(2, np.inf), np.full(2, -np.inf)
        self.comm.Allreduce(x.min(axis=0), low, op=MPI.MIN)
        self.comm.Allreduce(x.max(axis=0), high, op=MPI.MAX)
        self.extent, pixel = (low[0], high[0], low[1], high[1]), (high - low).max() / width
        self.shape = tuple(np.maximum(1, np.ceil((high - low) / pixel - 1e-9).astype(int))[::-1])
        jy, jx = np.divmod(np.arange(self.shape[0] * self.shape[1]), self.shape[1])
        points = low + (np.stack([jx, jy], axis=1) + 0.5) * pixel
        if plane is not None:
            points = np.insert(points, plane[0], plane[1], axis=1)
        self._mesh = VertexOnlyMesh(mesh, points, missing_points_behaviour="ignore")
        self._space = FunctionSpace(self._mesh, "DG", 0)
        here = np.asarray(self._mesh.coordinates.dat.data_ro).reshape(-1, points.shape[1])[:, self.axes]
        place = np.rint((here - low) / pixel - 0.5).astype(int)
        self._index = place[:, 1] * self.shape[1] + place[:, 0]

    def __call__(self, f: ufl.core.expr.Expr) -> np.ndarray | None:
        """The image of a function or a scalar expression on the first rank, NaN outside the mesh (collective)."""
        local = np.full(self.shape[0] * self.shape[1], -np.inf)
        local[self._index] = assemble(interpolate_(f, self._space)).dat.data_ro
        image = np.empty_like(local) if self.comm.rank == 0 else None
        self.comm.Reduce(local, image, op=MPI.MAX, root=0)
        if image is None:
            return None
        image[np.isinf(image)] = np.nan
        return image.reshape(self.shape)


def save(fig, path: Path, dpi: int) -> None:
    """Write a figure and close it."""
    fig.savefig(path, dpi=dpi)
    plt.close(fig)


def _painter(images: Sequence[np.ndarray], extent: Sequence[float]):
    """A function that shows an image in an axis, on one colour scale for all images, symmetric about zero."""
    limit = max(np.nanmax(np.abs(image)) for image in images)
    return lambda ax, image: ax.imshow(image, origin="lower", extent=extent, cmap=SIGNED, vmin=-limit, vmax=limit)


def plot_fields(
    path: Path,
    images: Sequence[tuple[str, np.ndarray]],
    extent: Sequence[float],
    *,
    points: np.ndarray | None = None,
    sources: tuple[str, np.ndarray] | None = None,
    title: str = "",
    deviations: Sequence[tuple[str, np.ndarray]] = (),
    rows: int = 1,
    label: str = "",
) -> None:
    """Draw named images on one colour scale, zero in its middle, dots at ``points`` ``(count, 2)``, and triangles at
    ``sources``, which are named.

    Standard deviations follow on a colour scale of their own. Panels are in columns of ``rows``. ``label`` is that of
    the colour bars, the quantity with its unit.
    """
    paint, panels = _painter([image for _, image in images], extent), [*images, *deviations]
    columns = -(-len(panels) // rows)
    height = 4.0 * (extent[3] - extent[2]) / (extent[1] - extent[0]) + 0.8
    fig, axes = plt.subplots(
        rows, columns, figsize=(5.0 * columns + 0.8, height * rows + 0.3), layout="constrained", squeeze=False
    )
    for ax in axes.T.flat[len(panels) :]:
        ax.set_axis_off()
    for n, ((name, image), ax) in enumerate(zip(panels, axes.T.flat, strict=False)):
        if n < len(images):
            shown = paint(ax, image)
        else:
            shown = _paint_deviation(ax, image, extent, _deviation_limits([image for _, image in deviations]))
        ax.set(title=name, aspect="equal", xlabel="x" if n % rows == rows - 1 else "", ylabel="y" if n < rows else "")
        if points is not None:
            ax.plot(*points.T, "k." if n < len(images) else "w.", ms=4)
        ax.set_facecolor("0.8")  # holes, which are not to be taken for zero
        if sources is not None:
            ax.plot(*sources[1].T, "^", color="gold", mec="k", mew=0.8, ms=8)
        if deviations:
            fig.colorbar(shown, ax=ax, shrink=0.85, label=label, extend="neither" if n < len(images) else "max")
    if not deviations:
        fig.colorbar(shown, ax=axes, shrink=0.9, label=label)
    notes = [title, "dots: sensors" if points is not None else "", f"triangles: {sources[0]}" if sources else ""]
    fig.suptitle("; ".join(part for part in notes if part), fontsize=11)
    save(fig, path, 110)


def _paint_deviation(ax, image: np.ndarray, extent: Sequence[float], limits: tuple[float, float]):
    """Show a standard deviation between two limits."""
    return ax.imshow(image, origin="lower", extent=extent, cmap=POSITIVE, vmin=limits[0], vmax=limits[1])


def _deviation_limits(images: Sequence[np.ndarray]) -> tuple[float, float]:
    """The least standard deviation, and the one that a hundredth of the pixels exceeds, as corners of a domain do."""
    every = np.concatenate([image.ravel() for image in images])
    return float(np.nanmin(every)), float(np.nanquantile(every, 0.99))


def plot_values(
    path: Path,
    rows: Sequence[tuple[str, Sequence[tuple[str, np.ndarray]]]],
    extent: Sequence[float],
    *,
    points: np.ndarray,
    sources: np.ndarray,
) -> None:
    """Draw rows of named images of a positive quantity, of which each row has a colour scale and a label, with dots at
    ``points`` and triangles at ``sources``, both ``(count, 2)``; where an image is not a number nothing is drawn.
    """
    columns = len(rows[0][1])
    fig, axes = plt.subplots(
        len(rows), columns, figsize=(5 * columns + 1, 3.5 * len(rows)), layout="constrained", squeeze=False
    )
    for line, (label, images) in zip(axes, rows, strict=True):
        low, high = (f([f(image[np.isfinite(image)]) for _, image in images]) for f in (np.min, np.max))
        for ax, (name, image) in zip(line, images, strict=True):
            shown = ax.imshow(image, origin="lower", extent=extent, vmin=low, vmax=high, interpolation="nearest")
            ax.plot(*points.T, "k.", ms=3)
            ax.plot(*sources.T, "^", color="gold", mec="k", mew=0.6, ms=7)
            ax.set(
                title=name,
                aspect="equal",
                xlabel="x" if line is axes[-1] else "",
                ylabel="y" if ax is line[0] else "",
            )
        fig.colorbar(shown, ax=line, label=label, shrink=0.9)
    save(fig, path, 110)


def plot_gathers(
    path: Path,
    times: np.ndarray,
    gathers: Sequence[tuple[str, np.ndarray, np.ndarray, np.ndarray]],
    *,
    quantity: str,
) -> None:
    """Draw the readings of a line of sensors over time, their fit, and the difference, a column for each experiment.

    Parameters
    ----------
    path
        File to write.
    times
        ``(nt,)`` reading times.
    gathers
        Name of the experiment, ``(ns,)`` positions along the line, ``(nt, ns)`` readings and fit.
    quantity
        What is read.
    """
    every = np.ma.concatenate([np.ma.abs(measured).ravel() for _, _, measured, _ in gathers])
    limit = float(np.percentile(np.ma.compressed(every), 97))
    fig, axes = plt.subplots(
        3, len(gathers), figsize=(3.4 * len(gathers) + 1, 9), layout="constrained", squeeze=False, sharey=True
    )
    for column, (name, positions, measured, predicted) in zip(axes.T, gathers, strict=True):
        order = np.argsort(positions)
        x = positions[order]
        spacing = np.diff(x)
        usual = np.median(spacing)
        # without sensors nothing is drawn: a column without numbers at either end of each gap
        gaps = np.repeat(np.flatnonzero(spacing > 1.6 * usual) + 1, 2)
        ends = [side for g in gaps[::2] for side in (x[g - 1] + usual, x[g] - usual)]
        x = np.insert(x, gaps, ends)
        for ax, values, title in zip(
            column, (measured, predicted, measured - predicted), ("readings", "fit", "readings - fit"), strict=True
        ):
            table = np.insert(np.ma.filled(values[:, order].astype(float), np.nan), gaps, np.nan, axis=1)
            shown = ax.pcolormesh(x, times, table, cmap=SIGNED, vmin=-limit, vmax=limit, shading="nearest")
            ax.set(title=f"{title}, {name}", xlabel="x" if ax is column[-1] else "")
            ax.set_facecolor("0.85")
    for ax in axes[:, 0]:
        ax.set_ylabel("t")
    axes[0, 0].invert_yaxis()
    fig.colorbar(shown, ax=axes, shrink=0.6, label=quantity, extend="both")
    save(fig, path, 100)


def gather_images(own: dict[int, np.ndarray | None], spacetime: SpaceTime) -> dict[int, np.ndarray]:
    """Images of all time ranks on the first rank, by the number of their time point; empty on the others (collective).

    Each time rank gives the images of its ``own`` points on its first rank in space.
    """
    parts = spacetime.time_comm.gather(own) if spacetime.space_comm.rank == 0 else None
    return dict(sorted(pair for part in parts for pair in part.items())) if parts is not None else {}


def plot_snapshots(
    path: Path,
    images: Sequence[np.ndarray],
    titles: Sequence[str],
    extent: Sequence[float],
    *,
    label: str = "",
    columns: int = 4,
) -> None:
    """Draw images with their titles in rows of ``columns``, on one colour scale, symmetric about zero."""
    paint, rows = _painter(images, extent), -(-len(images) // columns)
    fig, axes = plt.subplots(
        rows, columns, figsize=(2.6 * columns + 0.8, 2.7 * rows), layout="constrained", squeeze=False
    )
    for ax in axes.flat:
        ax.set_axis_off()
    for ax, image, title in zip(axes.flat, images, titles, strict=False):
        shown = paint(ax, image)
        ax.set_title(title, fontsize=9)
    fig.colorbar(shown, ax=axes, shrink=0.8, label=label)
    save(fig, path, 100)


def animate(
    path: Path,
    images: Sequence[np.ndarray],
    titles: Sequence[str],
    extent: Sequence[float],
    *,
    label: str = "",
    size: tuple[float, float] = (4.6, 4.0),
) -> None:
    """Write images with their titles as an animated GIF of a size in inches, on one colour scale, symmetric about
    zero.
    """
    fig, ax = plt.subplots(figsize=size, layout="constrained")
    shown = _painter(images, extent)(ax, images[0])
    fig.colorbar(shown, ax=ax, label=label)
    title = ax.set_title(titles[0])

    def frame(i):
        shown.set_data(images[i])
        title.set_text(titles[i])

    FuncAnimation(fig, frame, frames=len(images)).save(path, writer=PillowWriter(fps=10), dpi=80)
    plt.close(fig)

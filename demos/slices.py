"""Pictures of fields in space: sections by three planes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from firedrake.mesh import MeshGeometry
from ufl.core.expr import Expr

from demos.pictures import Raster

mpl.use("Agg")
import matplotlib.pyplot as plt

__all__ = ["Sections", "plot_sections"]

_NAMES = "xyz"
_NEAR = 0.07
"""Distance of a sensor from a plane up to which it is drawn."""


class Sections:
    """Planes through a mesh in space, at whose pixels fields are sampled.

    Parameters
    ----------
    mesh
        Distributed over its communicator.
    planes
        Number of the constant coordinate and its value, for each plane.
    width, arrows
        Pixels along the longer side of a section, and arrows of a vector field.

    Attributes
    ----------
    planes : list of (int, float)
    rasters : list of Raster
    """

    def __init__(self, mesh: MeshGeometry, planes: Sequence[tuple[int, float]], *, width: int = 96, arrows: int = 18):
        self.planes = list(planes)
        self.rasters = [Raster(mesh, width, plane) for plane in planes]
        self._arrows = [Raster(mesh, arrows, plane) for plane in planes]

    def __call__(self, f: Expr) -> list[np.ndarray | None]:
        """Return the images of a scalar expression on the first rank (collective)."""
        return [raster(f) for raster in self.rasters]

    def arrows(self, f: Expr) -> list[list[np.ndarray | None]]:
        """Return the images of the two components of a vector along each plane, on few pixels (collective)."""
        return [[raster(f[i]) for i in raster.axes] for raster in self._arrows]


def plot_sections(
    path: Path,
    sections: Sections,
    rows: Sequence[tuple[str, Sequence[np.ndarray]]],
    *,
    label: str,
    deviations: Sequence[np.ndarray] | None = None,
    arrows: Sequence[Sequence[Sequence[np.ndarray]]] = (),
    points: np.ndarray | None = None,
    title: str = "",
    signed: bool = True,
) -> None:
    """Draw rows of named images, a column for each plane, on one colour scale, with contour lines of the first row's
    images in all rows.

    Parameters
    ----------
    path
        File to write.
    sections
        The planes.
    rows
        Name and images of each field, the true one first where it is known.
    label
        Of the colour bar, the quantity with its unit.
    deviations
        Standard deviations, a last row on a colour scale of its own.
    arrows
        Of each field the components along the planes.
    points
        ``(count, 3)`` sensors, of which those near a plane are drawn.
    title
        Of the figure.
    signed
        Whether the scale is symmetric about zero; otherwise it begins there.
    """
    count = len(rows) + (deviations is not None)
    columns = len(sections.planes)
    limit = max(float(np.nanmax(np.abs(image))) for _, images in rows for image in images)
    scale = dict(cmap="RdBu_r", vmin=-limit, vmax=limit) if signed else dict(cmap="magma_r", vmin=0, vmax=limit)
    fig, axes = plt.subplots(
        count, columns, figsize=(3.6 * columns + 1, 3.3 * count + 0.6), layout="constrained", squeeze=False
    )
    levels = np.array([0.25, 0.5, 0.75]) * max(float(np.nanmax(image)) for image in rows[0][1])
    for n, line in enumerate(axes):
        for c, (ax, raster, (axis, value)) in enumerate(zip(line, sections.rasters, sections.planes, strict=True)):
            of_deviation = n == len(rows)
            image = deviations[c] if of_deviation else rows[n][1][c]
            least, most = (
                ([f(image) for image in deviations] for f in (np.nanmin, np.nanmax)) if of_deviation else 2 * [0]
            )
            own = dict(cmap="viridis", vmin=min(least), vmax=max(most)) if of_deviation else scale
            shown = ax.imshow(image, origin="lower", extent=raster.extent, **own)
            if levels.min() > 0:
                colour = "w" if of_deviation else "k"
                ax.contour(rows[0][1][c], levels, extent=raster.extent, colors=colour, linewidths=0.8)
            if arrows and not of_deviation:
                _draw_arrows(ax, raster.extent, arrows, n, c)
            if points is not None:
                near = points[np.abs(points[:, axis] - value) < _NEAR][:, raster.axes]
                ax.plot(*near.T, ".", color="0.25", ms=4)
            right, up = (_NAMES[i] for i in raster.axes)
            name = "standard deviation" if of_deviation else rows[n][0]
            ax.set(title=f"{name}, {_NAMES[axis]} = {value:g}", xlabel=right, ylabel=up, aspect="equal")
        if n == len(rows) - 1:
            fig.colorbar(shown, ax=axes[: n + 1], shrink=0.8, label=label)
        elif n == len(rows):
            fig.colorbar(shown, ax=line, shrink=0.9, label=label)
    fig.suptitle(title, fontsize=11)
    fig.savefig(path, dpi=100)
    plt.close(fig)


def _draw_arrows(ax, extent: Sequence[float], arrows, row: int, column: int) -> None:
    """Draw a vector field's part along a plane, all rows and columns on one scale."""
    longest = max(float(np.nanmax(np.hypot(*pair))) for field in arrows for pair in field)
    U, V = arrows[row][column]
    x, y = (
        low + (np.arange(n) + 0.5) * (high - low) / n
        for low, high, n in zip(extent[::2], extent[1::2], U.shape[::-1], strict=True)
    )
    ax.quiver(x, y, U, V, color="k", angles="xy", scale_units="xy", scale=longest / (1.6 * (x[1] - x[0])), width=0.004)

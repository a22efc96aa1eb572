r"""Uniform refinement of tetrahedra along their shortest diagonals.

The edges' midpoints cut a tetrahedron into four corners, of its shape, and an octahedron in the middle, which one of
its three diagonals cuts into four more. PETSc takes the diagonal between the midpoints of the edges :math:`v_0 v_1` and
:math:`v_2 v_3` of a cell's vertices as it numbers them, whatever its length: on the cubes of Firedrake's box meshes
that is the longest one, which raises the largest ratio of the longest edge's cube to the volume from 31 to 88. Along
the shortest one it stays at 31 on all meshes of the hierarchy, as for Bey's refinement (J. Bey, Computing 55, 1995),
and multigrid requires fewer iterations. The order of a cell's vertices is therefore turned before each refinement.
"""

from __future__ import annotations

import numpy as np
from petsc4py import PETSc

__all__ = ["shorten_diagonals"]

_TURNS = {0: (0, 1, 2, 3), 1: (1, 2, 0, 3), 2: (2, 0, 1, 3)}
"""The order of a cell's vertices after each of PETSc's orientations of a tetrahedron without a change of its sign."""


def shorten_diagonals(plex: PETSc.DMPlex, _refinement: int = 0) -> None:
    """Turn the cells of a mesh of tetrahedra so that PETSc refines each along its shortest diagonal; other meshes are
    left as they are.

    Parameters
    ----------
    plex
        The mesh without overlap, before it is refined. Spaces and functions of Firedrake depend on the numbers of
        vertices, not on their order in PETSc's cells.
    _refinement
        Number of refinements before, as Firedrake gives it to callbacks of a ``MeshHierarchy``.
    """
    cells, (first, last) = plex.getHeightStratum(0), plex.getDepthStratum(0)
    if cells[0] == cells[1] or plex.getCellType(cells[0]) != PETSc.DM.PolytopeType.TETRAHEDRON:
        return
    section, dim = plex.getCoordinateSection(), plex.getCoordinateDim()
    points = plex.getCoordinatesLocal().array_r.reshape(-1, dim)
    starts = [section.getOffset(v) // dim for v in range(first, last)]
    corners = np.array(
        [[starts[p - first] for p in plex.getTransitiveClosure(cell)[0] if first <= p < last] for cell in range(*cells)]
    )
    x = points[corners]
    lengths = np.stack([_diagonal(x[:, turn]) for turn in _TURNS.values()])
    # equal lengths must not be told apart by round-off, which differs between copies of a cell
    shortest = np.argmax(lengths <= (1 + 1e-9) * lengths.min(axis=0), axis=0)
    for cell, turn in enumerate(shortest):
        if turn:
            plex.orientPoint(cells[0] + cell, int(turn))


def _diagonal(x: np.ndarray) -> np.ndarray:
    """Squared lengths ``(cells,)`` of the diagonals on which PETSc refines cells with vertices ``(cells, 4, dim)``."""
    return np.sum((x[:, 0] + x[:, 1] - x[:, 2] - x[:, 3]) ** 2, axis=1)

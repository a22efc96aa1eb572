"""Meshes from gmsh files, and points in them, checked.

Firedrake and PETSc read a mesh collectively, so an error that only one rank sees leaves the others waiting. Every rank
therefore first reads the file on its own, finds the same faults in it, and raises the same error. What is then read
collectively is known to be good.
"""

from pathlib import Path

import numpy as np
from firedrake import COMM_WORLD, Mesh, VertexOnlyMesh
from firedrake.exceptions import VertexOnlyMeshMissingPointsError
from firedrake.petsc import PETSc
from mpi4py import MPI

from pint_fem.errors import InputError
from pint_fem.files import require_regular

__all__ = ["locate", "read_mesh"]

# Firedrake's own default (0.5 of a cell's size) takes points in a small hole for points of the plate.
POINT_TOLERANCE = 1e-6
LARGEST_COORDINATE = 1e100
RESOLUTION = 1e-6
"""Round-off of the largest coordinate, at most, relative to the shortest edge."""
FLAT = 1e-10
"""Twice the area of a triangle, at least, relative to the square of its longest edge."""
_SPACE_DIMENSION = "dm_plex_gmsh_spacedim"


def read_mesh(path, comm=COMM_WORLD, required_regions=(), required_boundaries=(), distribution_parameters=None):
    """Read and check a gmsh file of triangles.

    ``spacetime.mesh(read_mesh, path)`` gives all groups of ranks in space the same parts of it.

    Parameters
    ----------
    path : str or pathlib.Path
        A .msh file.
    comm : mpi4py.MPI.Comm, optional
        Communicator of the mesh; collective over it.
    required_regions : iterable of int, optional
        Tags of physical surfaces. Each has to be there, and together they have to cover the mesh.
    required_boundaries : iterable of int, optional
        Tags of physical curves that have to be there.
    distribution_parameters : dict, optional
        How Firedrake divides the mesh over the ranks.

    Returns
    -------
    firedrake.mesh.MeshGeometry
        With a point location tolerance under which points outside the mesh are not found.

    Raises
    ------
    InputError
        If the file cannot be used; on every rank, in one line that names the file.
    """
    path = Path(path)
    _check_file(path)
    _check_mesh(path, sorted(required_regions), sorted(required_boundaries))
    return Mesh(str(path), comm=comm, tolerance=POINT_TOLERANCE, distribution_parameters=distribution_parameters)


def locate(points, mesh, names=None):
    """Check that all points are inside a mesh.

    Parameters
    ----------
    points : array_like, shape (n, dim)
        Coordinates of the sensors, the same on every rank.
    mesh : firedrake.mesh.MeshGeometry
        Of the plane or of space; in the plane preferably from `read_mesh`: a mesh with Firedrake's own tolerance finds
        points close to its boundary, too.
    names : sequence of str, optional
        Names of the sensors for the error message; otherwise they are counted from 0.

    Returns
    -------
    firedrake.mesh.MeshGeometry
        The `VertexOnlyMesh` of the points. Collective over the mesh's communicator.

    Raises
    ------
    InputError
        If a point is outside; on every rank, naming the first such sensor and its coordinates.
    """
    points = np.asarray(points, dtype=float)
    try:
        return VertexOnlyMesh(mesh, points, missing_points_behaviour="error")
    except VertexOnlyMeshMissingPointsError as error:  # raised by all ranks, from a number that they have agreed on
        missing = error.n_missing_points
    cells, _, _ = mesh.locate_cells_ref_coords_and_dists(points)
    found = np.zeros(len(points), dtype="i4")
    mesh.comm.Allreduce(np.asarray(cells >= 0, dtype="i4"), found, op=MPI.MAX)
    # rank 0's points are the ones that count above; argmin is the first point that no rank has
    first = int(found.argmin())
    name = first if names is None else names[first]
    place = ", ".join(f"{x:g}" for x in points[first])
    raise InputError(
        f"sensor {name} at ({place}) is outside the mesh ({missing} of {len(points)} sensors are; "
        "give places inside, not in holes or notches, in the mesh's units)"
    )


def _check_file(path):
    """Check what can be seen without understanding the mesh."""
    if path.is_dir():
        raise InputError(f"{path}: is a directory (give the .msh file in it)")
    if path.suffix.lower() != ".msh":
        raise InputError(f"{path}: not a .msh file (its name ends in '{path.suffix}'; give a mesh saved by gmsh)")
    require_regular(path, "mesh", links=True)  # every rank reads it: a FIFO would block
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file (give a mesh saved by gmsh)") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}; give a readable .msh file)") from None
    if b"$MeshFormat" not in content:
        raise InputError(f"{path}: not a gmsh mesh (it has no $MeshFormat header; save it by 'gmsh -2 -format msh22')")
    if b"$EndElements" not in content:
        raise InputError(f"{path}: truncated mesh (it has no $EndElements; save it again by 'gmsh -2 -format msh22')")
    _check_corners(path, content)


def _check_corners(path, content):
    """Check that elements have nodes for corners, as PETSc crashes where they have not (format 2 in ASCII only)."""
    lines = content.decode("latin-1").split("\n")
    section, nodes = "", set()
    for line, fields in enumerate(map(str.split, lines), start=1):
        if fields and fields[0].startswith("$"):
            section = fields[0]
        elif section == "$MeshFormat" and fields and not (fields[0].startswith("2") and fields[1:2] == ["0"]):
            return
        elif section == "$Nodes" and len(fields) == 4:
            nodes.add(fields[0])
        elif section == "$Elements" and len(fields) > 3:
            corners = fields[3 + int(fields[2]) :] if fields[2].isdecimal() else []
            if not corners or len(set(corners)) < len(corners) or not nodes.issuperset(corners):
                raise InputError(
                    f"{path}:{line}: not a readable mesh (an element's corners are "
                    f"'{' '.join(corners)}', which are not different nodes of the mesh; save it again by "
                    "'gmsh -2 -format msh22')"
                )


def _check_mesh(path, regions, boundaries):
    """Check the mesh, read by every rank on its own."""
    options = PETSc.Options()
    options[_SPACE_DIMENSION] = 3  # otherwise PETSc drops the z of plane cells, and flattens a bent surface silently
    try:
        plex = PETSc.DMPlex().createFromFile(str(path), comm=PETSc.COMM_SELF)
    except PETSc.Error as error:
        raise InputError(
            f"{path}: not a readable mesh (PETSc error {error.ierr}; save it again by 'gmsh -2 -format msh22')"
        ) from None
    finally:
        options.delValue(_SPACE_DIMENSION)
    try:
        _check_triangles(path, plex)
        _check_tags(path, plex, regions, boundaries)
    finally:
        plex.destroy()


def _check_triangles(path, plex):
    dimension, cells = plex.getDimension(), range(*plex.getHeightStratum(0))
    if dimension != 2 or any(plex.getCellType(c) != PETSc.DM.PolytopeType.TRIANGLE for c in cells):
        raise InputError(
            f"{path}: not a mesh of triangles (it has {len(cells)} cells of dimension {dimension}, or of "
            "other shapes; save a 2-D mesh with physical surfaces by 'gmsh -2 -format msh22')"
        )
    coordinates = plex.getCoordinatesLocal().array.reshape(-1, 3)
    if not np.isfinite(coordinates).all():
        raise InputError(
            f"{path}: not a readable mesh (it has coordinates that are not finite; save it again by "
            "'gmsh -2 -format msh22')"
        )
    height = np.ptp(coordinates[:, 2])
    if height:
        raise InputError(f"{path}: not a plane mesh (its z coordinates span {height:g}; draw it in the x-y plane)")
    _check_shapes(path, plex, coordinates[:, :2])


def _check_shapes(path, plex, x):
    """Check that the coordinates `x` of the vertices resolve the triangles, and that these do not overlap."""
    first_vertex = plex.getDepthStratum(0)[0]
    first_edge, end_edge = plex.getDepthStratum(1)
    ends = np.array([plex.getCone(e) for e in range(first_edge, end_edge)]).reshape(-1, 2) - first_vertex
    sides = np.array([plex.getCone(c) for c in range(*plex.getHeightStratum(0))]).reshape(-1, 3) - first_edge
    largest = np.abs(x).max()
    with np.errstate(over="ignore"):
        lengths = np.hypot(*(x[ends[:, 1]] - x[ends[:, 0]]).T)
    resolved = np.finfo(float).eps * largest <= RESOLUTION * lengths.min()
    if not (resolved and 1 / LARGEST_COORDINATE < largest < LARGEST_COORDINATE):
        raise InputError(
            f"{path}: coordinates do not resolve the triangles (they are as large as {largest:g}, the "
            f"shortest edge is {lengths.min():g}; move the mesh near the origin, or merge nodes that are "
            "the same)"
        )
    # twice the signed area of each triangle beside each of its edges: positive on the left of the edge
    owner, edge = np.repeat(np.arange(len(sides)), 3), sides.ravel()
    opposite = ends[sides].reshape(len(sides), 6).sum(axis=1)[owner] // 2 - ends[edge].sum(axis=1)
    a, b, c = (x[i] for i in (*ends[edge].T, opposite))
    area = (b - a)[:, 0] * (c - a)[:, 1] - (b - a)[:, 1] * (c - a)[:, 0]
    flat = np.abs(area) < FLAT * lengths[sides].max(axis=1)[owner] ** 2
    if flat.any():
        raise InputError(
            f"{path}: not a usable mesh ({_place(a, flat)} is a corner of a triangle without area; mesh "
            "the geometry again)"
        )
    count = np.bincount(edge, minlength=len(ends))
    left = np.bincount(edge, weights=area > 0, minlength=len(ends))
    wrong = (count > 2) | ((count == 2) & (left != 1))
    if wrong.any():
        raise InputError(
            f"{path}: a tangled mesh ({int(wrong.sum())} edges have both their triangles on one side, or "
            f"more than two, one at {_place(x[ends[:, 0]], wrong)}; mesh the geometry again)"
        )


def _place(x, found):
    return "({:g}, {:g})".format(*x[found.argmax()])


def _check_tags(path, plex, regions, boundaries):
    for label, kind, required in (("Cell Sets", "Surface", regions), ("Face Sets", "Curve", boundaries)):
        present = plex.getLabelIdIS(label).indices.tolist() if plex.hasLabel(label) else []
        missing = sorted(set(required) - set(present))
        if missing:
            raise InputError(
                f"{path}: no Physical {kind} {_listed(missing)} (it has {_listed(present) or 'none'}; tag "
                f"them {_listed(required)} in the .geo file)"
            )
    start, end = plex.getHeightStratum(0)
    others = end - start - sum(plex.getStratumSize("Cell Sets", tag) for tag in regions)
    if regions and others:
        raise InputError(
            f"{path}: {others} of {end - start} triangles are in none of the regions (the mesh should "
            f"consist of Physical Surface {_listed(regions)})"
        )


def _listed(tags):
    return ", ".join(str(tag) for tag in sorted(tags))

"""The plate's meshes are the plate: areas, lengths, tags and sensors against the drawing in meshes/plate.geo."""

import numpy as np
import pytest

pytest.importorskip("firedrake")

from firedrake import (
    COMM_WORLD,
    Constant,
    Function,
    FunctionSpace,
    MeshHierarchy,
    SpatialCoordinate,
    UnitCubeMesh,
    assemble,
    ds,
    dx,
    interpolate,
    norm,
    prolong,
)

import pint_fem as pf
from problems.meshfile import locate, read_mesh
from problems.plate import BOUNDARIES, MESH, MESH_FINE, REGIONS, SENSORS

RADII = {13: 0.16, 14: 0.14}
CENTRES = {13: (0.45, 0.80), 14: (1.50, 0.40)}
INSERT = 0.3 * 0.7
PLATE = 2 * 1.2 - 0.6 * 0.4 - INSERT - np.pi * sum(r**2 for r in RADII.values())
# Straight edges of length s in place of arcs take s^2 / (6 r^2) off a hole's area, s^2 / (24 r^2) off its length.
SIZES = {MESH: 0.048 / 2, MESH_FINE: 0.024 / 2}


@pytest.fixture(scope="module", params=SIZES, ids=lambda path: path.stem)
def plate(request):
    """A mesh and the size of its edges along the holes."""
    return read_mesh(request.param, COMM_WORLD, REGIONS, BOUNDARIES), SIZES[request.param]


def area(mesh, tag):
    """Area of a region."""
    return assemble(Constant(1.0) * dx(tag, domain=mesh))


def length(mesh, tag):
    """Length of a boundary."""
    return assemble(Constant(1.0) * ds(tag, domain=mesh))


def test_tags(plate):
    """The tags are all there, and cover the plate and its boundary."""
    mesh, _ = plate
    assert set(mesh.exterior_facets.unique_markers) == set(BOUNDARIES)
    assert assemble(Constant(1.0) * dx(domain=mesh)) == pytest.approx(sum(area(mesh, tag) for tag in REGIONS))
    assert assemble(Constant(1.0) * ds(domain=mesh)) == pytest.approx(sum(length(mesh, tag) for tag in BOUNDARIES))


def test_areas(plate):
    """Exact, but for the polygons that stand for the holes."""
    mesh, s = plate
    assert area(mesh, 2) == pytest.approx(INSERT, rel=1e-12)
    lost = sum(np.pi * r**2 * s**2 / (6 * r**2) for r in RADII.values())
    # polygons inscribed in the holes are smaller than the holes, so the plate is larger
    assert 0 < area(mesh, 1) - PLATE < 1.2 * lost


def test_lengths(plate):
    """Exact, but for the polygons that stand for the holes."""
    mesh, s = plate
    assert length(mesh, 12) == pytest.approx(1.2, rel=1e-12)
    assert length(mesh, 11) == pytest.approx(2 + 0.8 + 0.6 + 0.4 + 1.4, rel=1e-12)
    for tag, r in RADII.items():
        assert 0 < 2 * np.pi * r - length(mesh, tag) < 1.2 * 2 * np.pi * r * s**2 / (24 * r**2)


def test_sensors(plate):
    """Linear functions are read exactly at the sensors, in the given order."""
    mesh, _ = plate
    points = locate(SENSORS, mesh)
    values = FunctionSpace(points.input_ordering, "DG", 0)
    for i in range(2):
        at_points = assemble(interpolate(SpatialCoordinate(mesh)[i], FunctionSpace(points, "DG", 0)))
        np.testing.assert_allclose(assemble(interpolate(at_points, values)).dat.data_ro, SENSORS[:, i], atol=1e-12)


def test_sensors_are_well_inside():
    """At least 0.03 from the edges and the holes, and no two in the same place."""
    assert SENSORS.shape == (24, 2)
    corners = np.array([(0, 0), (2, 0), (2, 0.8), (1.4, 0.8), (1.4, 1.2), (0, 1.2)])
    for a, b in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        along = np.clip((SENSORS - a) @ (b - a) / np.dot(b - a, b - a), 0, 1)
        assert np.linalg.norm(SENSORS - a - along[:, None] * (b - a), axis=1).min() >= 0.03
    for tag, r in RADII.items():
        assert np.linalg.norm(SENSORS - CENTRES[tag], axis=1).min() >= r + 0.03
    apart = np.linalg.norm(SENSORS[:, None] - SENSORS, axis=2) + np.eye(24)
    assert apart.min() > 0.1


def longest_edge_to_volume(mesh):
    """The largest ratio of the longest edge's cube to the volume of a cell."""
    x = mesh.coordinates.dat.data_ro_with_halos[mesh.coordinates.cell_node_map().values]
    edges = [x[:, i] - x[:, j] for i in range(4) for j in range(i)]
    longest = np.max([np.linalg.norm(edge, axis=1) for edge in edges], axis=0)
    return float(np.max(longest**3 / (np.abs(np.linalg.det(x[:, 1:] - x[:, :1])) / 6)))


@pytest.mark.parallel([1, 2])
def test_tetrahedra_are_refined_along_their_shortest_diagonals():
    """Those of a cube are a path along its edges and its diagonal, sqrt(3): the shapes stay as good. Walls keep their
    numbers, and a quadratic field of a coarse mesh is one of the finer mesh.
    """
    plain = MeshHierarchy(UnitCubeMesh(2, 2, 2), 1)
    hierarchy = pf.SpaceTime("2x1" if COMM_WORLD.size == 2 else "1x1").mesh_hierarchy(2, UnitCubeMesh, 2, 2, 2)
    limit = 6 * np.sqrt(3) ** 3
    assert longest_edge_to_volume(plain[1]) > 2 * limit  # what PETSc does by itself
    assert max(map(longest_edge_to_volume, hierarchy)) < 1.0001 * limit
    assert [assemble(Constant(1) * ds(wall, domain=hierarchy[-1])) for wall in range(1, 7)] == pytest.approx([1.0] * 6)
    x, y, z = SpatialCoordinate(hierarchy[0])
    coarse, fine = (Function(FunctionSpace(mesh, "CG", 2)) for mesh in (hierarchy[0], hierarchy[1]))
    prolong(coarse.interpolate(x * y - z**2), fine)
    x, y, z = SpatialCoordinate(hierarchy[1])
    assert norm(fine - (x * y - z**2)) < 1e-13

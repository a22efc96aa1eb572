"""The plate's meshes are the plate: areas, lengths, tags and sensors against the drawing in meshes/plate.geo."""

import numpy as np
import pytest

pytest.importorskip("firedrake")

from firedrake import COMM_WORLD, Constant, FunctionSpace, SpatialCoordinate, assemble, ds, dx, interpolate

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

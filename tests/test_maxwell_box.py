"""The current in a cavity in space: the tape's values and derivatives, any grid, the shipped readings, the demo."""

import numpy as np
import pytest
from firedrake import COMM_SELF, Function, FunctionSpace, SpatialCoordinate, UnitCubeMesh, as_vector, assemble, cos, sin

import pint_fem as pf
from demos.maxwell_box_inversion import arguments
from problems.box import box_hierarchy
from problems.maxwell import B, E
from problems.maxwell_box import maxwell_box
from problems.maxwell_box_readings import NOISE, READINGS, simulate, write
from problems.maxwell_box_setting import ANTENNAS, CELLS, COLUMNS, SETTING, antenna_functionals
from problems.readings import Readings, noise_deviation, read_readings
from problems.serial_boxes import serial_maxwell_box
from tests.boxes import (
    TIGHT,
    assert_grids_agree,
    assert_options,
    assert_refused,
    assert_same_as_tape,
    assert_taylor,
    run_demo,
)

SMALL = dict(
    refine=0, degree=1, readings=READINGS, steps=32, integrator="ImplicitMidpoint", alpha=1e-3, beta=1e-3, noise=NOISE
)


def few(every=9):
    """The settings with the readings of a few antennas."""
    data = read_readings(READINGS, SETTING.final_time, COLUMNS)
    kept = slice(0, None, every)
    return SMALL | {
        "readings": Readings(data.points[kept], data.times, data.values[:, kept], data.path, data.sensors[kept])
    }


@pytest.mark.parallel([1, 2])
@pytest.mark.parametrize("integrator", ["ImplicitMidpoint", pytest.param("SDIRK2", marks=pytest.mark.grid)])
def test_against_pyadjoint(integrator):
    settings = few(21) | {"integrator": integrator}
    assert_same_as_tape(maxwell_box, serial_maxwell_box, settings, first_steps=3)


def test_taylor():
    assert_taylor(maxwell_box(pf.SpaceTime("1x1", comm=COMM_SELF), **few(), solver_parameters=TIGHT))


@pytest.mark.parallel(2)
def test_grids_agree():
    assert_grids_agree(maxwell_box, few(21) | {"steps": 16, "integrator": "SDIRK2"}, inversion=False)


def test_sizes_of_the_page():
    problem = maxwell_box(pf.SpaceTime("1x1", comm=COMM_SELF), **few(), solver_parameters=TIGHT)
    V = problem.evolution.V
    assert (V.sub(E).dim(), V.sub(B).dim()) == (604, 864)


def test_antennas_read_averages():
    """Of a constant field its components, of a linear one its value at the antenna but for the walls and quadrature."""
    mesh = box_hierarchy(pf.SpaceTime("1x1", comm=COMM_SELF), CELLS, 1)[-1]
    x, field = SpatialCoordinate(mesh), Function(FunctionSpace(mesh, "N1curl", 2))
    places = np.array([[0.5, 0.5, 0.5], [0.375, 0.5, 0.625]])
    forms = antenna_functionals(field, mesh, places)
    field.interpolate(as_vector((1.0, -2.0, 3.0)))
    np.testing.assert_allclose([assemble(f) for f in forms], 2 * [1, -2, 3], atol=1e-12)
    field.interpolate(as_vector((x[1], x[2], x[0])))
    found = np.reshape([assemble(f) for f in forms], (2, 3))
    np.testing.assert_allclose(found, places[:, [1, 2, 0]], atol=5e-3)


def test_readings_are_independent_of_the_numbering():
    """Those of a bell, which no rule integrates exactly, and so on other numbers of ranks, which number meshes anew."""
    found, cells = [], []
    for reorder in (False, True):
        mesh = UnitCubeMesh(CELLS, CELLS, CELLS, reorder=reorder, comm=COMM_SELF)
        x, space = SpatialCoordinate(mesh), FunctionSpace(mesh, "N1curl", 1)
        field = Function(space).interpolate(as_vector((sin(x[0] + 2 * x[1]), cos(x[1] * x[2]), x[2] ** 2)))
        found.append([assemble(f) for f in antenna_functionals(field, mesh, ANTENNAS[::9])])
        cells.append(mesh.coordinates.cell_node_map().values)
    assert not np.array_equal(*cells)
    np.testing.assert_allclose(*found, rtol=0, atol=1e-13)


def test_shipped_readings_are_those_of_the_true_current():
    """The misfit of the true current is that of the noise, 1/2, and of the discretisation error, which is large."""
    settings = few() | {"refine": 1, "degree": 2, "steps": 64}
    problem = maxwell_box(pf.SpaceTime("1x1", comm=COMM_SELF), **settings, solver_parameters=TIGHT)
    problem.rf.problem.value(problem.rf.array(problem.true_source))
    assert 0.4 < problem.rf.problem.parts["misfit"] < 1.0


def test_readings_are_written_and_read(tmp_path):
    """With noise of the given size."""
    values = simulate(4, steps=16, times=4, degree=1)
    write(tmp_path / "r.csv", values)
    data = read_readings(tmp_path / "r.csv", SETTING.final_time, COLUMNS)
    assert data.values.shape == (4, len(ANTENNAS), 3)
    np.testing.assert_allclose(data.points, ANTENNAS)
    sigma = noise_deviation(data.path, np.abs(values).max(), values.size, NOISE)
    assert 0.8 * sigma < (data.values - values).std() < 1.2 * sigma


def test_bad_settings_are_refused():
    assert_refused(maxwell_box, SMALL, [("refine", -1), ("refine", 4), ("degree", 0), ("noise", 0.0)])


def test_options(monkeypatch, capsys):
    assert_options(arguments, monkeypatch, capsys, most=3)


@pytest.mark.starts_mpi
def test_demo(tmp_path):
    options = ["--steps", 32, "--method", "trust-region", "--time-solver", "serial"]
    summary = run_demo("maxwell_box_inversion", "current", tmp_path, *options)
    assert summary["unknowns"] == 604 + 864
    assert summary["result"]["misfit"] < 0.2 * summary["result"]["history"][0]["J"]

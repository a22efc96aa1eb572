"""The heat source in a box: the tape's values and derivatives, any grid, the shipped readings, sections, the demo."""

import numpy as np
import pytest
from firedrake import COMM_SELF, COMM_WORLD, FunctionSpace, SpatialCoordinate

import pint_fem as pf
from demos.heat_box_inversion import arguments
from demos.slices import Sections
from pint_fem.errors import InputError
from problems.box import box_hierarchy, first_readings
from problems.heat_box import heat_box
from problems.heat_box_readings import NOISE, READINGS, simulate, write
from problems.heat_box_setting import CELLS, COLUMNS, FINAL_TIME, SENSORS
from problems.readings import noise_deviation, read_readings
from problems.serial_boxes import serial_heat_box
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
    refine=0, elements="P1", readings=READINGS, steps=16, integrator="SDIRK2", alpha=1e-4, beta=1e-5, noise=NOISE
)


@pytest.mark.parallel([1, 2])
@pytest.mark.parametrize("changes", [{}, {"elements": "P2", "integrator": "BackwardEuler"}], ids=["P1", "P2"])
def test_against_pyadjoint(changes):
    assert_same_as_tape(heat_box, serial_heat_box, SMALL | changes, first_steps=2)


def test_taylor():
    assert_taylor(heat_box(pf.SpaceTime("1x1", comm=COMM_SELF), **SMALL, solver_parameters=TIGHT))


@pytest.mark.parallel(2)
def test_grids_agree():
    assert_grids_agree(heat_box, SMALL)


def test_sizes_of_the_page():
    """Unknowns of each refinement, and a partition without cells that are nobody's."""
    st = pf.SpaceTime("1x1", comm=COMM_SELF)
    sizes = [FunctionSpace(mesh, "CG", 1).dim() for mesh in box_hierarchy(st, CELLS, 1)]
    assert sizes == [343, 2197]


def test_shipped_readings_are_those_of_the_true_source():
    """The misfit of the true source is that of the noise, 1/2, and of the discretisation error."""
    settings = SMALL | {"refine": 1, "elements": "P2", "steps": 32}
    problem = heat_box(pf.SpaceTime("1x1", comm=COMM_SELF), **settings, solver_parameters=TIGHT)
    problem.rf.problem.value(problem.rf.array(problem.true_source))
    assert 0.45 < problem.rf.problem.parts["misfit"] < 0.6


def test_readings_are_written_and_read(tmp_path):
    """With noise of the given size; time steps and cells change them by little."""
    values = simulate(6, steps=16, times=4, degree=1)
    write(tmp_path / "r.csv", values)
    data = read_readings(tmp_path / "r.csv", FINAL_TIME, COLUMNS)
    assert data.values.shape == (4, len(SENSORS))
    np.testing.assert_allclose(data.points, SENSORS)
    sigma = noise_deviation(data.path, np.abs(values).max(), values.size, NOISE)
    assert 0.8 * sigma < (data.values - values).std() < 1.2 * sigma
    shipped = read_readings(READINGS, FINAL_TIME, COLUMNS)
    apart = shipped.values[3::4] - values
    assert apart.std() < 2 * sigma
    assert len(first_readings(shipped, 0.5).times) == 8
    with pytest.raises(InputError, match=r"no reading until the time 0\.01"):
        first_readings(shipped, 0.01)


def test_bad_settings_are_refused():
    assert_refused(heat_box, SMALL, [("refine", -1), ("refine", 5), ("refine", 1.5), ("elements", "P3"),
        ("integrator", "Heun"), ("alpha", -1.0)])  # fmt: skip


@pytest.mark.parallel([1, 2])
def test_sections_are_samples():
    mesh = box_hierarchy(pf.SpaceTime((COMM_WORLD.size, 1)), 2, 1)[-1]
    x, y, z = SpatialCoordinate(mesh)
    sections = Sections(mesh, [(2, 0.3), (0, 0.5)], width=10)
    first, second = sections(x + 10 * y + 100 * z)
    if COMM_WORLD.rank == 0:
        centres = (np.arange(10) + 0.5) / 10
        np.testing.assert_allclose(first, centres[None] + 10 * centres[:, None] + 30, atol=1e-10)
        np.testing.assert_allclose(second, 0.5 + 10 * centres[None] + 100 * centres[:, None], atol=1e-10)
        assert [raster.axes for raster in sections.rasters] == [[0, 1], [1, 2]]


def test_options(monkeypatch, capsys):
    assert_options(arguments, monkeypatch, capsys, most=4)


@pytest.mark.starts_mpi
def test_demo(tmp_path):
    options = ["--steps", 16, "--method", "trust-region", "--time-solver", "serial", "--compare-serial", 2]
    summary = run_demo("heat_box_inversion", "source", tmp_path, *options)
    assert summary["unknowns"] == summary["controls"] == 343
    table = summary["compare_serial"]
    for name, limit in {"J": 1e-8, "gradient": 1e-8, "Hessian action": 1e-7}.items():
        assert table[name]["relative_difference"] < limit, name
    assert table["steps_multiplied_by"] == 8
    assert summary["result"]["relative_source_error"] < 0.7

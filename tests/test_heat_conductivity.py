"""Thermal tomography: readings of several experiments, derivatives, ranks, serial pyadjoint, and the demo."""

import json

import numpy as np
import pytest
from firedrake import COMM_SELF, COMM_WORLD, Constant, Function, SpatialCoordinate, exp
from pyadjoint import taylor_to_dict

import pint_fem as pf
from pint_fem.errors import InputError
from pint_fem.kernels.arrays import get
from problems.compare_experiments import formulas
from problems.experiments import (
    ExperimentReadings,
    Inclusion,
    point_misfits,
    read_experiments,
    relative_error,
    with_noise,
    write_experiments,
)
from problems.heat_conductivity import heat_conductivity
from problems.heat_conductivity_readings import NOISE, READINGS, SEED, TIMES, simulate
from problems.heat_conductivity_setting import COLUMNS, HEATERS, INCLUSIONS, THERMOCOUPLES, heater
from problems.meshfile import locate, read_mesh
from problems.plate import BOUNDARIES, FINAL_TIME, MESH, MESH_FINE, REGIONS
from problems.readings import Readings
from problems.serial_heat_conductivity import serial_heat_conductivity
from tests.pictures import assert_drawn
from tests.test_demo import run

HEADER = ",".join(COLUMNS)
GOOD = f"""# two experiments with sensors and times of their own

{HEADER}
0,a,0.1,0.2,0.5,1.0
0,a,0.1,0.2,1.0,2.0
1,a,0.3,0.4,0.25,3.0
1,b,0.3,0.5,0.25,4.0
"""


def csv_file(tmp_path, content):
    path = tmp_path / "readings.csv"
    path.write_text(content, encoding="utf-8")
    return path


# -- readings ----------------------------------------------------------------------------------------------------------
def test_experiments_have_sensors_and_times_of_their_own(tmp_path):
    data = read_experiments(csv_file(tmp_path, GOOD), 1.0, COLUMNS, count=2)
    assert data.names == ("0", "1")
    assert data.count == 4
    first, second = data.readings
    assert second.sensors == ("a", "b")
    np.testing.assert_array_equal(first.points, [[0.1, 0.2]])
    np.testing.assert_array_equal(first.values, [[1.0], [2.0]])
    np.testing.assert_array_equal(second.times, [0.25])
    np.testing.assert_array_equal(second.values, [[3.0, 4.0]])
    assert data.deviation(0.5) == 2.0  # of the largest reading of all experiments
    assert data.weight(0.5) == 1 / 16
    assert [m.weight for own in point_misfits(data, 0.5) for m in own] == [1 / 16] * 2


@pytest.mark.parametrize(
    ("old", "new", "line", "match"),
    [
        (HEADER, HEADER[11:], 3, "wrong columns .got 'sensor,x,y,time,temperature'"),
        ("0,a,0.1,0.2,1.0,2.0", "2,a,0.1,0.2,1.0,2.0", 5, "unknown experiment .got '2'; the 2 .* 0 to 1"),
        ("0,a,0.1,0.2,1.0,2.0", ",a,0.1,0.2,1.0,2.0", 5, "unknown experiment .got ''"),
        ("0,a,0.1,0.2,1.0,2.0", "0,a,0.1,0.2,1.0", 5, "wrong number of fields .got 5; should be 6"),
        ("0,a,0.1,0.2,1.0,2.0", "0,a,0.1,0.2,0.5,2.0", 5, "duplicate reading .sensor a at time 0.5 .* line 4"),
        ("0,a,0.1,0.2,1.0,2.0", "0,a,0.2,0.2,1.0,2.0", 5, "sensor a has moved"),
        ("1,b,0.3,0.5,0.25,4.0", "1,b,0.3,0.5,0.5,4.0", 6, "missing reading .sensor a"),
        ("1,b,0.3,0.5,0.25,4.0", "1,b,0.3,0.5,0.25,hot", 7, "temperature is not a number .got 'hot'"),
        ("1,b,0.3,0.5,0.25,4.0", "1,b,0.3,0.5,1.25,4.0", 7, "time is beyond the final time"),
    ],
)
def test_refuses_a_line(tmp_path, old, new, line, match):
    assert old in GOOD
    path = csv_file(tmp_path, GOOD.replace(old, new, 1))
    with pytest.raises(InputError, match=match) as excinfo:
        read_experiments(path, 1.0, COLUMNS, count=2)
    assert str(excinfo.value).startswith(f"{path}:{line}: ")
    assert "\n" not in str(excinfo.value)


def test_refuses_what_is_not_there(tmp_path):
    path = csv_file(tmp_path, GOOD)
    with pytest.raises(InputError, match="no readings of experiment 2, 3"):
        read_experiments(path, 1.0, COLUMNS, count=4)
    with pytest.raises(InputError, match="no such file"):
        read_experiments(tmp_path / "none.csv", 1.0, COLUMNS, count=2)
    zero = read_experiments(
        csv_file(tmp_path, GOOD.replace(".0\n", "\n").replace(",1\n", ",0\n")), 1.0, COLUMNS, count=2
    )
    with pytest.raises(InputError, match="out of range"):
        zero.deviation(1e-200)


def test_written_experiments_are_read_back(tmp_path):
    """Several quantities, and places that differ between experiments."""
    columns = (*COLUMNS[:-1], "ex", "ey")
    random = np.random.default_rng(0)
    points, times = [random.uniform(size=(3, 2)), random.uniform(size=(2, 2))], np.array([0.5, 1.0])
    values = [random.standard_normal((2, 3, 2)), random.standard_normal((2, 2, 2))]
    write_experiments(tmp_path / "r.csv", points, times, values, columns=columns, comments=["from a test"])
    assert (tmp_path / "r.csv").read_text().startswith("# from a test\n")
    data = read_experiments(tmp_path / "r.csv", 1.0, columns, count=2)
    for own, at, given in zip(data.readings, points, values, strict=True):
        np.testing.assert_allclose(own.points, at, rtol=1e-5)
        np.testing.assert_allclose(own.values, given, rtol=1e-4)
    fields = point_misfits(data, 0.1, [(0, 0), (0, 1)])
    assert [(m.field, m.component) for m in fields[1]] == [(0, 0), (0, 1)]
    np.testing.assert_array_equal(fields[1][1].data, data.readings[1].values[..., 1])


def test_shipped_readings_are_those_of_the_generator():
    """Their noise is known by its seed; without it they are those of a coarser run up to what a coarser mesh leaves."""
    data = read_experiments(READINGS, FINAL_TIME, COLUMNS, count=len(HEATERS))
    assert READINGS.stat().st_size < 1_000_000
    assert all(r.values.shape == (TIMES, len(THERMOCOUPLES)) for r in data.readings)
    np.testing.assert_array_equal(data.readings[0].points, THERMOCOUPLES)
    sigma = data.deviation(NOISE)
    noise, _ = with_noise([np.zeros_like(r.values) for r in data.readings[:1]] + [np.ones(1)], 1.0, SEED)
    stated = float(READINGS.read_text().split("absolute reading (")[1].split(")")[0])
    assert abs(sigma / stated - 1) < 0.1  # noise moves the largest reading
    clean = data.readings[0].values - stated * noise[0]
    coarse = simulate(read_mesh(MESH, COMM_SELF, REGIONS, BOUNDARIES), 0, steps=TIMES)
    assert np.abs(coarse - clean).max() < 0.02 * np.abs(clean).max()


def test_thermocouples_and_heaters_are_in_the_plate():
    for path in (MESH, MESH_FINE):
        plate = read_mesh(path, COMM_SELF, REGIONS, BOUNDARIES)
        locate(np.concatenate([THERMOCOUPLES, HEATERS, [i.centre for i in INCLUSIONS]]), plate)
        assert all(heater(SpatialCoordinate(plate), e) is not None for e in range(len(HEATERS)))


# -- what is measured of the coefficient -------------------------------------------------------------------------------
def test_contrast_and_error_are_those_of_known_functions():
    plate = read_mesh(MESH, COMM_SELF, REGIONS, BOUNDARIES)
    x, (first, *_) = SpatialCoordinate(plate), INCLUSIONS
    assert np.isclose(first.recovered(Constant(2.5), plate), 2.5)
    # the mean of a linear function over an ellipse is its value in the centre
    assert np.isclose(first.recovered(x[0] + 2 * x[1], plate), first.centre[0] + 2 * first.centre[1], atol=2e-3)
    turned = Inclusion("turned", (0.4, 0.3), (0.2, 0.05), 2.0, angle=np.pi / 2)
    assert [float(turned.inside(Constant(at))) for at in ((0.4, 0.45), (0.55, 0.3))] == [1, 0]
    q = Function(heat_space(plate)).interpolate(x[0])
    assert np.isclose(relative_error(q, 2 * x[0]), 0.5)


def heat_space(plate):
    from firedrake import FunctionSpace

    return FunctionSpace(plate, "CG", 1)


# -- the problem -------------------------------------------------------------------------------------------------------
def few_readings(times=4, experiments=2) -> ExperimentReadings:
    """Some readings that no conductivity explains, at every thermocouple and few times."""
    random = np.random.default_rng(1)
    at = FINAL_TIME * (np.arange(1, times + 1) - 0.3) / times
    names = tuple(map(str, range(len(THERMOCOUPLES))))
    made = [
        Readings(THERMOCOUPLES, at, random.uniform(size=(times, len(names))), READINGS, names)
        for _ in range(experiments)
    ]
    return ExperimentReadings(tuple(map(str, range(experiments))), tuple(made), READINGS)


SMALL = dict(steps=6, experiments=(0, 1))


def posed(comm=COMM_SELF, time_solver="serial", **more):
    solver = {"time_solver": time_solver, "mgrit": {"rtol": 1e-12, "coarsening": (2,)}}
    grid = pf.SpaceTime((1, comm.size), comm=comm)
    return heat_conductivity(grid, readings=few_readings(), **SMALL | more, solver_parameters=solver)


def test_taylor():
    rf = posed().rf
    (control,), (direction,) = formulas(rf.evolution.controls)
    rates = taylor_to_dict(rf, control, direction)
    assert min(rates["R1"]["Rate"]) > 1.9
    assert min(rates["R2"]["Rate"]) > 2.8


def test_beside_serial_pyadjoint():
    """Two experiments of the eight: J, gradient and a Hessian action."""
    ours, theirs = posed().rf, serial_heat_conductivity(readings=few_readings(), **SMALL).rf
    found = []
    for rf in (ours, theirs):
        (control,), (direction,) = formulas([c.control for c in rf.controls])
        J = float(rf(control))
        found.append((J, rf.derivative().dat.data_ro.copy(), rf.hessian(direction).dat.data_ro.copy()))
    for mine, serial, limit in zip(*found, (1e-8, 1e-8, 1e-7), strict=True):
        assert np.linalg.norm(mine - serial) <= limit * np.linalg.norm(serial)


@pytest.mark.parallel(2)
def test_time_ranks_do_not_matter():
    alone, shared = posed(time_solver="mgrit"), posed(COMM_WORLD, time_solver="mgrit")
    found = []
    for problem in (alone, shared):
        (control,), _ = formulas(problem.rf.evolution.controls)
        z, of = get(control), problem.rf.problem
        found.append((of.value(z), of.derivative(z), problem.predicted(z)))
    assert found[0][0] == found[1][0]
    np.testing.assert_allclose(found[0][1], found[1][1], rtol=1e-10, atol=1e-14)
    for a, b in zip(found[0][2], found[1][2], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)


def test_bounds_are_those_of_the_logarithm():
    problem = posed(bounds=(0.25, 4.0))
    np.testing.assert_allclose(problem.bounds, [-np.log(4), np.log(4)])
    assert float(exp(Constant(problem.bounds[1]))) == pytest.approx(4.0)


# -- the demo ----------------------------------------------------------------------------------------------------------
@pytest.mark.starts_mpi
def test_demo(tmp_path):
    """A few iterations from a start that is far from the readings, on two time ranks."""
    small = ["--steps", 8, "--time-solver", "serial", "--max-iterations", 3, "--grid", "1x2"]
    done = run(2, *small, "--out", tmp_path, program="heat_conductivity_inversion")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["experiments"] == 8
    found = summary["result"]["coefficients"]["conductivity"]
    assert found["relative_error"] < 1
    contrasts = [found["inclusions"][i.name]["contrast"] for i in INCLUSIONS]
    assert contrasts[0] > 1.2 > 0.9 > contrasts[1]
    history = summary["result"]["history"]
    assert history[-1]["J"] < history[0]["J"]
    assert "8 experiments" in done.stdout
    for name, panels in (("conductivity.png", 3), ("sensors.png", 1), ("convergence.png", 2)):
        assert_drawn(tmp_path / name, panels=panels)
    assert b"recovered_conductivity" in next((tmp_path / "fields").rglob("*.vtu")).read_bytes()

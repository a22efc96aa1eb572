"""The Maxwell source inversion: Taylor tests, agreement with serial pyadjoint, and theory of MGRIT on it."""

from dataclasses import replace

import numpy as np
import pytest
from firedrake import COMM_SELF, COMM_WORLD
from pyadjoint import taylor_to_dict

import pint_fem as pf
from demos.maxwell_source_report import points
from problems.maxwell_readings import COLUMNS, readings_file
from problems.maxwell_setting import setting
from problems.maxwell_source import maxwell_source
from problems.readings import read_readings
from problems.serial_maxwell import serial_maxwell_source
from tests.benchmarks.maxwell_table import evolution, measure

SMALL = dict(cells=8, degree=1, steps=64)


def posed(regime="lossy", *, comm=COMM_SELF, time_solver="mgrit", **more):
    return maxwell_source(
        pf.SpaceTime((1, comm.size), comm=comm), regime=regime, **SMALL | more,
        solver_parameters={"time_solver": time_solver, "mgrit": {"rtol": 1e-12, "coarsening": (4,)}},
    )  # fmt: skip


def test_taylor():
    rf = posed().rf
    control, direction = points(rf.evolution.control.function_space())
    found = taylor_to_dict(rf, control, direction)
    assert min(found["R1"]["Rate"]) > 1.9
    assert max(found["R2"]["Residual"]) < 1e-9 * abs(float(rf(control)))  # J is quadratic


@pytest.mark.parametrize(("regime", "time_solver"), [("lossy", "mgrit"), ("cavity", "serial")])
def test_against_pyadjoint(regime, time_solver):
    assert_same(regime, time_solver)


@pytest.mark.grid
def test_against_pyadjoint_with_missing_readings():
    """One component in three, and one probe's and one time's altogether."""
    read = read_readings(readings_file("cavity"), setting("cavity").final_time, COLUMNS)
    missing = np.random.default_rng(0).uniform(size=read.values.shape) < 1 / 3
    missing[4], missing[:, 3] = True, True
    values = np.ma.MaskedArray(np.where(missing, 1e9, read.values), missing)
    assert_same("cavity", "serial", readings=replace(read, values=values))


def assert_same(regime, time_solver, **readings):
    few = SMALL | {"steps": 16} | readings
    ours, theirs = posed(regime, time_solver=time_solver, **few).rf, serial_maxwell_source(regime=regime, **few).rf
    values = []
    for rf in (ours, theirs):
        V = rf.controls[0].control.function_space()
        control, _ = points(V)
        values.append((float(rf(control)), rf.derivative().dat.data_ro.copy()))
    (J, g), (J_serial, g_serial) = values
    assert abs(J - J_serial) < 1e-8 * abs(J_serial)
    assert np.linalg.norm(g - g_serial) < 1e-8 * np.linalg.norm(g_serial)


@pytest.mark.parallel(3)
def test_time_ranks_do_not_matter():
    """The same state on one time rank and on two."""
    alone, shared = posed().rf, posed(comm=COMM_WORLD).rf
    results = []
    for rf in (alone, shared):
        control, _ = points(rf.evolution.control.function_space())
        J = rf.problem.value(rf.array(control))
        slab = rf.problem.sweeps.slab
        results.append((J, rf.problem.U, slab, rf.problem.derivative(rf.array(control))))
    lo, hi = results[1][2].lo, results[1][2].hi
    assert results[0][0] == results[1][0]
    assert np.array_equal(results[0][1][lo : hi + 1], results[1][1])
    assert np.allclose(results[0][3], results[1][3], rtol=1e-10, atol=0)


@pytest.mark.parametrize(("sigma", "warned"), [(0.0, True), (40.0, False), (2000.0, False)])
def test_mgrit_is_under_its_bound(sigma, warned):
    case = measure(evolution(sigma, 32), sigma, 4, 2)
    assert case.holds
    assert case.warned == warned


def test_leapfrog_is_a_fine_propagator():
    """With implicit coarse levels the time-parallel solve gives what stepping gives."""
    given = dict(integrator="Leapfrog", cells=8, degree=1, steps=64)
    values = []
    for solver in ("serial", "mgrit"):
        rf = maxwell_source(
            pf.SpaceTime("1x1", comm=COMM_SELF), **given,
            solver_parameters={"time_solver": solver, "mgrit": {"rtol": 1e-12, "coarsening": (4,)}},
        ).rf  # fmt: skip
        control, _ = points(rf.evolution.control.function_space())
        values.append((float(rf(control)), rf.derivative().dat.data_ro.copy()))
    assert abs(values[0][0] - values[1][0]) < 1e-9 * abs(values[0][0])
    assert np.linalg.norm(values[0][1] - values[1][1]) < 1e-8 * np.linalg.norm(values[0][1])

"""Maps whose sensors are swept by groups of time ranks, against the sequential sweep of each sensor."""

import numpy as np
import pytest
from mpi4py import MPI

import pint_fem as pf
from pint_fem.errors import InputError
from pint_fem.inverse.sensor_groups import ranks_of_group
from tests.inverse_problems import heat, random_control, readings_by_sweep, readings_of, waves
from tests.limits import time_limit

COMM = MPI.COMM_WORLD
KINDS = ("source", "wind", "initial", "amplitude")
MGRIT = {"mgrit": {"coarsening": 3, "levels": 2, "rtol": 1e-12}}
SOLVERS = {
    "serial": ({"time_solver": "serial"}, 1e-13),
    "MGRIT": (MGRIT, 1e-10),
    "C-points": ({"mgrit": MGRIT["mgrit"] | {"storage": "C"}}, 1e-10),
    "ParaDiag": ({"time_solver": "paradiag", "paradiag": {"alpha": 1e-3, "rtol": 1e-11}}, 1e-9),
}


def solvers():
    return list(SOLVERS) if COMM.size < 4 else ["MGRIT"]


def compared(F, expected, J, tolerance):
    """Products with the map and with its transpose."""
    z, y = random_control(J), np.cos(np.arange(F.shape[0]))
    right = expected @ z
    np.testing.assert_allclose(F @ z, right, rtol=0, atol=tolerance * np.abs(right).max())
    dual = expected.T @ y
    np.testing.assert_allclose(F.T @ y, dual, rtol=0, atol=tolerance * np.abs(dual).max())


@pytest.mark.parallel([1, 2, 3, 4])
@pytest.mark.parametrize("name", solvers())
@time_limit(200)
def test_groups_of_time_ranks_give_the_map_of_sequential_sweeps(name):
    """All time ranks in one group, and on four ranks also two groups of two; static, initial and stepwise controls."""
    solver, tolerance = SOLVERS[name]
    J = heat(pf.SpaceTime(), KINDS, solver=solver, steps=12)
    expected = J.parameter_to_observable(time_ranks=1)
    for size in {COMM.size, 2} if COMM.size == 4 else [COMM.size]:
        F = J.parameter_to_observable(time_ranks=size)
        assert F.rows.shape == expected.rows.shape
        compared(F, expected, J, tolerance)
    z = random_control(J)
    np.testing.assert_allclose(F.predict(z), readings_by_sweep(J, z), rtol=0, atol=10 * tolerance)


@pytest.mark.parallel([3, 4])
@time_limit(150)
def test_one_sensor_on_several_time_ranks():
    """They are one group without being asked, where sweeps are exact enough; other ranks have no rows."""
    J = heat(pf.SpaceTime(), KINDS, solver=MGRIT, steps=12, sensors=lambda ev: readings_of(ev, [[0.31, 0.33]]))
    calls = J.problem.sweeps.counts["adjoint"]
    F, expected = J.parameter_to_observable(), J.parameter_to_observable(time_ranks=1)
    assert J.problem.sweeps.counts["adjoint"] == calls + 1
    assert [len(numbers) for numbers in COMM.allgather(F.numbers)].count(0) == COMM.size - 1
    compared(F, expected, J, 1e-10)


@pytest.mark.parallel(4)
@time_limit(150)
def test_groups_in_time_with_two_ranks_in_space():
    """A grid of sensors x time x space; a field is eliminated, and several misfits have readings."""
    J = waves(pf.SpaceTime((2, 2)), solver={"time_solver": "paradiag", "paradiag": {"alpha": 1e-3, "rtol": 1e-11}})
    expected = J.parameter_to_observable(time_ranks=1)
    compared(J.parameter_to_observable(time_ranks=2), expected, J, 1e-9)


@pytest.mark.parallel([1, 3, 4])
@time_limit(100)
def test_the_number_of_ranks_of_a_group():
    st = pf.SpaceTime()
    serial = heat(st, ("source",), steps=12).problem.sweeps
    rough = heat(st, ("source",), solver={"mgrit": {"coarsening": 3, "rtol": 1e-6}}, steps=12).problem.sweeps
    expected = {1: [1, 1, 1], 3: [3, 3, 1], 4: [4, 2, 2]}[COMM.size]
    assert [ranks_of_group(serial, sensors, None) for sensors in (1, 2, 3)] == expected
    assert ranks_of_group(serial, COMM.size, None) == 1
    assert ranks_of_group(rough, 1, None) == 1
    for wrong in (0, -1, 1.5, 5, True):
        if wrong is True and COMM.size == 1:
            continue
        with pytest.raises(
            InputError, match=rf"time_ranks = {wrong}: give a whole number that divides the {COMM.size}"
        ):
            ranks_of_group(serial, 3, wrong)


@pytest.mark.parallel(2)
@time_limit(150)
def test_batches_of_a_group_and_rows_on_a_disk(tmp_path, monkeypatch):
    """One sensor at a time, as where memory is short, gives the same map; a sweep that fails does so on all ranks."""
    J = heat(pf.SpaceTime(), KINDS, solver=MGRIT, steps=12)
    expected = J.parameter_to_observable(time_ranks=2)
    monkeypatch.setattr("pint_fem.inverse.sensor_groups.GROUP", 1)
    sweeps = J.problem.sweeps.counts["adjoint"]
    F = J.parameter_to_observable(time_ranks=2, rows="file", path=COMM.bcast(tmp_path))
    assert J.problem.sweeps.counts["adjoint"] == sweeps + 3
    compared(F, expected, J, 1e-10)

    def fails(*_):
        raise ArithmeticError("on one rank")

    if COMM.rank:
        monkeypatch.setattr(J.problem.sweeps.propagators[0], "apply_transposed", fails)
    with pytest.raises(pf.SolverFailure, match="rank 1: ArithmeticError: on one rank"):
        J.parameter_to_observable(time_ranks=2)

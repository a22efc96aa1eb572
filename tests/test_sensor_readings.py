"""Readings of sensors: what the map from sources to readings is made of, missing readings, weights of readings."""

import numpy as np
import pytest
from mpi4py import MPI

import pint_fem as pf
from pint_fem.errors import InputError
from tests.heat import heat
from tests.meshes import square

COMM = MPI.COMM_WORLD
STEPS, DT = 6, 4e-3
POINTS = np.array([[0.3, 0.3], [0.7, 0.6], [0.45, 0.8]])
TIMES = DT * np.array([0.0, 0.4, 2.0, 3.7, 6.0])
POINT, THETA = [1, 1, 2, 4, 6], [0.0, 0.4, 1.0, 0.7, 1.0]
"""The point at the end of the step of each reading time, and its share."""
DATA = 0.5 + np.random.default_rng(1).standard_normal((5, 3))


def bound(misfit, st):
    """A misfit of a heat problem, and a reproducible trajectory of the local points."""
    ev = heat(square(5, st.space_comm), steps=STEPS, dt=DT).private()
    slab = st.slab(STEPS)
    misfit.bind(ev, st, slab)
    first, _ = ev.V.dof_dset.layout_vec.getOwnershipRange()
    at = first + np.arange(ev.state_size)
    U = np.cos(np.arange(slab.lo, slab.hi + 1)[:, None] + 0.3 * at)
    return misfit, U, np.cos(np.arange(STEPS + 1)[:, None] + 0.3 * at)


@pytest.mark.parallel([1, 2, 3])
@pytest.mark.parametrize("in_space", [False, True])
def test_what_the_map_from_sources_to_readings_is_made_of(in_space):
    """Readings are the products of impulses with states, shared out in time as the times of the readings tell."""
    st = pf.SpaceTime((COMM.size, 1) if in_space else (1, COMM.size))
    sensors, U, everywhere = bound(pf.PointSensors(POINTS, TIMES, DATA, weight=2.5), st)
    assert sensors.sensors == 3
    rows = sensors.impulses(np.arange(3))
    np.testing.assert_array_equal(sensors.impulses([2, 0]), rows[[2, 0]])
    assert sensors.impulses([]).shape == (0, U.shape[1])
    n, theta = sensors.points_and_shares()
    assert n.tolist() == POINT
    np.testing.assert_allclose(theta, THETA, rtol=0, atol=1e-12)
    y = st.space_comm.allreduce(everywhere @ rows.T)
    expected = theta[:, None] * y[n] + (1 - theta)[:, None] * y[n - 1]
    np.testing.assert_allclose(sensors.predicted(sensors.read(U)), expected, rtol=0, atol=1e-13)
    np.testing.assert_array_equal(sensors.reading_times, TIMES)
    np.testing.assert_array_equal(sensors.measured, DATA)
    np.testing.assert_array_equal(sensors.weights, np.full((5, 3), 2.5))
    assert sensors.present.shape == (5, 3) and sensors.present.all()
    J = st.sum_over_time(np.array(sensors.values(U).sum()))
    assert J == pytest.approx(0.5 * np.sum(2.5 * (expected - DATA) ** 2), rel=1e-13)
    for wrong in ([3], [-1], [0.5], 1, [[0]]):
        with pytest.raises(InputError, match="give integers from 0 to 2"):
            sensors.impulses(wrong)

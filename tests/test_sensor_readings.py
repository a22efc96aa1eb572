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
    np.testing.assert_array_equal(sensors.present, np.ones((5, 3), dtype=bool))
    J = st.sum_over_time(np.array(sensors.values(U).sum()))
    assert J == pytest.approx(0.5 * np.sum(2.5 * (expected - DATA) ** 2), rel=1e-13)
    for wrong in ([3], [-1], [0.5], 1, [[0]]):
        with pytest.raises(InputError, match="give integers from 0 to 2"):
            sensors.impulses(wrong)


# -- missing readings and weights --------------------------------------------------------------------------------------
MISSING = np.zeros((5, 3), dtype=bool)
MISSING[1], MISSING[:, 2], MISSING[3, 0] = True, True, True
"""No reading at all at one time and of one sensor, and one more."""


def masked(data=DATA, missing=MISSING, there=np.nan):
    """Readings of which some are missing; the array's data have the value ``there`` in their place."""
    return np.ma.MaskedArray(np.where(missing, there, data), missing)


def functional(misfit, st):
    ev = heat(square(5, st.space_comm), steps=STEPS, dt=DT)
    return pf.TimeParallelReducedFunctional(ev, misfit, spacetime=st, solver_parameters={"mgrit": {"levels": 1}})


def numbers(rf):
    """J, its derivative along a direction, and the second derivative along it and another."""
    z, dz = (rf.layout.join([v]) for v in np.cos(np.arange(2)[:, None] + 0.01 * np.arange(rf.layout.size)))
    p, ones = rf.problem, np.ones(rf.layout.size)
    duals = p.derivative(z), p.hessian_action(z, dz)
    return np.array([p.value(z), *(rf.layout.pairing(dual, ones) for dual in duals)])


@pytest.mark.parallel([1, 2, 3])
@pytest.mark.parametrize("in_space", [False, True])
def test_missing_readings_are_left_out(in_space):
    """Each sensor with the readings that it has, as a misfit of its own, at its own times."""
    st = pf.SpaceTime((COMM.size, 1) if in_space else (1, COMM.size))
    sensors = pf.PointSensors(POINTS, TIMES, masked(), weight=3.0)
    there = [~MISSING[:, s] for s in range(2)]
    apart = [pf.PointSensors(POINTS[[s]], TIMES[r], DATA[r][:, [s]], weight=3.0) for s, r in enumerate(there)]
    whole, parts = functional(sensors, st), functional(apart, st)
    np.testing.assert_allclose(numbers(whole), numbers(parts), rtol=1e-12)
    np.testing.assert_array_equal(sensors.present, ~MISSING)
    np.testing.assert_array_equal(sensors.measured, np.where(MISSING, 0.0, DATA))
    np.testing.assert_array_equal(sensors.weights, np.where(MISSING, 0.0, 3.0))
    assert isinstance(sensors.measured, np.ndarray)
    assert not isinstance(sensors.measured, np.ma.MaskedArray)
    full = functional(other := pf.PointSensors(POINTS, TIMES, DATA), st)
    z = np.ones(full.layout.size)
    predicted = [s.readings(rf.problem.observations(z, s)) for rf, s in ((whole, sensors), (full, other))]
    np.testing.assert_allclose(*predicted, rtol=0, atol=1e-13)  # also where readings are missing


@pytest.mark.parallel([1, 3])
def test_missing_readings_have_no_part_in_the_offset():
    """States and readings near 300 are taken relative to 300, as without the missing ones."""
    st = pf.SpaceTime()
    large, there = 300 + 1e-3 * DATA, [0, 2, 4]
    values = []
    for data, at in ((masked(large, there=1e9), slice(None)), (large[there][:, :2], there)):
        misfit, U, _ = bound(pf.PointSensors(POINTS[: data.shape[1]], TIMES[at], data), st)
        weights = np.array([[1.0], [1.0], [1.0], [0.0], [1.0]])[at] * np.ones((1, data.shape[1]))
        misfit.weight = weights
        misfit.update_data(set(), own=True)
        values.append(st.sum_over_time(misfit.values(300 + 1e-3 * U).sum()))
        Y = misfit.read(300 + 1e-3 * U)
        assert np.abs(Y).max() < 0.1  # less the offset
    assert values[0] == pytest.approx(values[1], rel=1e-12)


@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize("weight", [4.0, np.array([1.0, 0.0, 2.5]), np.random.default_rng(0).uniform(0, 2, (5, 3))])
def test_weights_of_sensors_and_readings(weight):
    """The formula in numpy, and derivatives that are transposes of each other, of one direction and of several."""
    st = pf.SpaceTime()
    missing = np.zeros((5, 3), dtype=bool)
    missing[4, 1] = True
    sensors, U, everywhere = bound(pf.PointSensors(POINTS, TIMES, masked(missing=missing), weight=weight), st)
    rows, (n, theta) = sensors.impulses(range(3)), sensors.points_and_shares()
    read = lambda states: theta[:, None] * (states @ rows.T)[n] + (1 - theta)[:, None] * (states @ rows.T)[n - 1]
    full = np.where(missing, 0.0, np.broadcast_to(weight, (5, 3)))
    np.testing.assert_array_equal(sensors.weights, full)
    difference = read(everywhere) - DATA
    total = lambda own: st.sum_over_time(np.array(own.sum()))
    assert total(sensors.values(U)) == pytest.approx(0.5 * np.sum(full * difference**2), rel=1e-13)
    toward = np.random.default_rng(2).standard_normal((2, *everywhere.shape))
    expected = [np.sum(full * difference * read(d)) for d in toward]
    dU = toward[:, sensors.slab.lo : sensors.slab.hi + 1]
    used = slice(0, None if sensors.slab.is_last else -1)
    for d, number in zip(dU, expected, strict=True):
        assert total(sensors.directional(U, d)) == pytest.approx(number, rel=1e-12)
        assert total(sensors.gradient(U)[used] * d[used]) == pytest.approx(number, rel=1e-12)
    several = sensors.hessian(U, np.ascontiguousarray(np.moveaxis(dU, 0, 1)))
    for i, d in enumerate(dU):
        np.testing.assert_array_equal(several[used, i], sensors.hessian(U, d)[used])
        second = [np.sum(full * read(a) * read(toward[i])) for a in toward]
        np.testing.assert_allclose([total(several[used, i] * a[used]) for a in dU], second, rtol=1e-12)


@pytest.mark.parametrize(("change", "words"), [
    (dict(values=np.where(MISSING, np.nan, DATA)), "readings must be finite numbers; .*masked_invalid"),
    (dict(values=masked(missing=np.ones((5, 3), dtype=bool))), "all 15 readings are missing"),
    (dict(times=np.ma.MaskedArray(TIMES, TIMES > 0.01)), "masked in places, but only readings may be missing"),
    (dict(points=np.ma.MaskedArray(POINTS, POINTS > 0.7)), "sensors: points are masked in places"),
    (dict(weight=np.ma.MaskedArray(DATA, MISSING)), "masked in places"),
    (dict(weight=[1.0, 2.0]), r"weight of shape \(2,\): give a number, one for each of the sensors, \(3,\), or"),
    (dict(weight=np.ones(5)), r"weight of shape \(5,\)"),
    (dict(weight=[1.0, -2.0, 1.0]), "weight = -2: give a finite number that is not negative"),
    (dict(weight=-1.0), "weight = -1"),
    (dict(weight=np.where(MISSING, np.nan, 1.0)), "weight = nan"),
    (dict(weight=np.full((5, 3), 1e300), values=1e10 * DATA), r"with weight 1e\+300 overflow"),
])
def test_refused(change, words):
    given = dict(points=POINTS, times=TIMES, values=DATA) | change
    with pytest.raises(InputError, match=words):
        pf.PointSensors(given.pop("points"), given.pop("times"), given.pop("values"), **given)


def test_a_masked_array_in_a_list_keeps_its_mask():
    rows = list(masked())
    np.testing.assert_array_equal(pf.PointSensors(POINTS, TIMES, rows).present, ~MISSING)


@pytest.mark.parallel([1, 3])
@pytest.mark.filterwarnings("ignore:changed after the functional was made")
def test_a_change_of_the_mask_is_a_change_of_the_data():
    """Found by comparison, read by an explicit call, and compared between ranks; values under the mask are no data."""
    st, zero = pf.SpaceTime(), np.zeros((5, 3))
    sensors = pf.PointSensors(POINTS, TIMES, masked(zero), weight=2.0)
    rf = functional(sensors, st)
    (own,) = rf.problem.misfits
    before = numbers(rf)
    sensors.data = masked(zero, there=7.0)
    assert not own.has_changed()
    sensors.data = np.ma.MaskedArray(zero, ~MISSING)
    assert own.has_changed()
    np.testing.assert_array_equal(numbers(rf), before)
    assert rf.update_data() == ["what is given to PointSensors"]
    expected = numbers(functional(pf.PointSensors(POINTS, TIMES, np.ma.MaskedArray(zero, ~MISSING), weight=2.0), st))
    np.testing.assert_allclose(numbers(rf), expected, rtol=1e-13)
    assert abs(expected[0] - before[0]) > 1e-3 * before[0]
    sensors.weight = [1.0, 2.0, 3.0]
    assert rf.update_data() == ["what is given to PointSensors"]
    assert abs(numbers(rf)[0] - expected[0]) > 1e-3 * expected[0]
    if COMM.size > 1:
        sensors.data = masked(zero) if COMM.rank == 1 else zero
        with pytest.raises(InputError, match="missing readings of PointSensors"):
            rf.update_data()


def test_a_checkpoint_of_readings_with_another_mask_is_refused(tmp_path):
    st, path = pf.SpaceTime("1x1", comm=MPI.COMM_SELF), str(tmp_path / "run.h5")
    run = lambda data: functional(pf.PointSensors(POINTS, TIMES, data), st).minimize_trust_region(
        max_it=1, checkpoint=path
    )
    run(masked())
    with pytest.raises(InputError, match="another evolution, misfit, data or regularisation"):
        run(masked(missing=MISSING & (np.arange(3) > 0)))

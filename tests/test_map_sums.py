"""Maps of sums of functionals and of initial conditions that are expressions of controls; data that are read again."""

import numpy as np
import pytest
from firedrake import Function, FunctionSpace
from mpi4py import MPI

import pint_fem as pf
from pint_fem.errors import InputError
from tests.broken_files import shared
from tests.limits import time_limit
from tests.meshes import square
from tests.small_maps import DATA, POINTS, TIMES, a_control, posed

COMM = MPI.COMM_WORLD


def two(st, **changes):
    """Two experiments with one source: other conductivity, sensors, steps and starts; two sums' weights."""
    V = FunctionSpace(square(4, st.space_comm), "CG", 1)
    q = Function(V, name="source")
    first = posed(st, control=q)
    second = posed(
        st,
        control=q,
        conductivity=0.4,
        points=POINTS[1:],
        times=TIMES[1:4],
        steps=9,
        tableau=pf.BackwardEuler,
        **changes,
    )
    return first, second


def readings(J, z):
    """The readings of all evolutions at common controls by sweeps of their states."""
    out = []
    for _, leaf, own in J.problem.leaf_terms(z):
        for misfit in leaf.misfits:
            out.append(misfit.readings(leaf.observations(own, misfit)).ravel())
    return np.concatenate(out)


@pytest.mark.parallel([1, 2, 3])
@time_limit(150)
def test_the_map_of_a_sum_has_the_rows_of_all_evolutions(tmp_path):
    """Readings are those of sweeps; products are adjoint; the posterior's mean is the sum's stationary point."""
    path, st = shared(tmp_path) / "map.h5", pf.SpaceTime()
    J1, J2 = two(st)
    J = J1 + 2 * J2
    F = J.parameter_to_observable()
    z, y = a_control(J.layout), np.cos(np.arange(F.shape[0]))
    assert F.shape[0] == 20 + 9
    np.testing.assert_allclose(F.predict(z), readings(J, z), rtol=0, atol=1e-12)
    assert J.layout.pairing(F.T @ y, z) == pytest.approx(y @ (F @ z), rel=1e-12)
    if COMM.size > 1:  # each evolution's sensors by all time ranks together
        grouped = J.parameter_to_observable(time_ranks=COMM.size)
        np.testing.assert_allclose(grouped.rows, F.rows, rtol=0, atol=1e-14)
    np.testing.assert_array_equal(F.weights, [400.0] * 20 + [800.0] * 9)
    posterior = F.posterior()
    g, start = J.problem.derivative(posterior.x), J.problem.derivative(np.zeros(J.layout.size))
    size = lambda dual: np.sqrt(J.layout.pairing(dual, J.inner.primal(dual)))
    assert size(g) < 1e-9 * size(start)
    F.save(path)
    G = (two(st)[0] + 2 * two(st)[1] if COMM.size > 3 else J).parameter_to_observable(load=path)
    np.testing.assert_array_equal(G.rows, F.rows)
    np.testing.assert_array_equal(G.offset, F.offset)


@pytest.mark.parallel([1, 2])
@time_limit(150)
def test_an_initial_condition_that_is_an_expression_of_a_control():
    """Its rows are pulled back to the control; a multiple of the functional has other weights, and only these."""
    st = pf.SpaceTime()
    V = FunctionSpace(square(4, st.space_comm), "CG", 1)
    q = Function(V, name="source")
    J = posed(st, control=q, initial=1.5 * q + 0.25, regularise=False)
    F, z = J.parameter_to_observable(), a_control(J.layout)
    np.testing.assert_allclose(F.predict(z), readings(J, z), rtol=0, atol=1e-12)
    half = (0.5 * J).parameter_to_observable()
    np.testing.assert_array_equal(half.rows, F.rows)
    np.testing.assert_array_equal(half.weights, 0.5 * F.weights)
    twice = (J + J).parameter_to_observable()  # one evolution with twice the weight, not two
    np.testing.assert_array_equal(twice.rows, F.rows)
    np.testing.assert_array_equal(twice.weights, 2 * F.weights)


@time_limit(100)
def test_sums_without_a_map():
    st = pf.SpaceTime()
    J1, J2 = two(st)
    with pytest.raises(InputError, match=r"terms with weights \[-1.0\]: .* give positive ones"):
        (J1 - J2).parameter_to_observable()
    with pytest.raises(InputError, match=r"terms with weights \[0.0\]"):
        (J1 - J1).parameter_to_observable()
    q = Function(FunctionSpace(square(4, st.space_comm), "CG", 1))
    with pytest.raises(InputError, match="a nonlinear expression of controls: use minimize_trust_region"):
        posed(st, control=q, initial=q**2, regularise=False).parameter_to_observable()


@pytest.mark.parallel([1, 2])
@time_limit(100)
def test_readings_are_read_again_and_other_operators_are_refused():
    """After an update of data F.posterior() has the new readings and weights; an earlier posterior keeps its own."""
    J = posed(pf.SpaceTime())
    F = J.parameter_to_observable()
    before = F.posterior()
    x = before.x.copy()
    J.sensors.data = 2 * DATA + 0.1
    np.testing.assert_array_equal(F.posterior().x, x)  # not read yet
    J.update_data()
    after, expected = F.posterior(), posed(pf.SpaceTime(), data=2 * DATA + 0.1).parameter_to_observable().posterior()
    np.testing.assert_allclose(after.x, expected.x, rtol=1e-11, atol=1e-13)
    np.testing.assert_array_equal(before.x, x)
    np.testing.assert_array_equal(before.with_data().x, after.x)
    J.sensors.weight = 100.0
    J.update_data()
    np.testing.assert_array_equal(F.posterior().F.weights, np.full(20, 100.0))
    J.conductivity.assign(3.0)
    J.update_data()
    for ask in (F.posterior, before.with_data):
        with pytest.raises(InputError, match=r"before an update of data: other constants of residual .* make the map"):
            ask()
    np.testing.assert_allclose(J.parameter_to_observable().posterior().F.offset, readings(J, np.zeros(J.layout.size)))
    J.sensors.times = 0.9 * TIMES
    J.update_data()
    F = J.parameter_to_observable()
    J.sensors.times = TIMES
    J.update_data()
    with pytest.raises(InputError, match="other times of misfit 0"):
        F.posterior()

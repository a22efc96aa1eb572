"""Linear inverse problems as users pose them: weights of zero, readings of another shape, ranks that differ."""

import numpy as np
import pytest
from firedrake import DirichletBC, Function, FunctionSpace, TestFunction, dx, grad, inner
from irksome import Dt
from mpi4py import MPI

import pint_fem as pf
from pint_fem.errors import InputError
from tests.inverse_problems import POINTS, SERIAL, grid
from tests.meshes import square

TIMES = [0.0, 0.013, 0.03, 0.1]


def functional(*, weight=2.0, points=POINTS, course=False):
    """A heat source from three sensors at four times."""
    st = grid()
    mesh = square(3, st.space_comm)
    V = FunctionSpace(mesh, "CG", 1)
    u, v, q, t = Function(V), TestFunction(V), Function(V, name="q"), pf.time_function(mesh)
    F = Dt(u) * v * dx + inner(grad(u), grad(v)) * dx
    if not course:
        F -= q * v * dx
    bcs = DirichletBC(V, q * (1 + t), 1) if course else DirichletBC(V, 1, 1)
    ev = pf.Evolution(F, u, tableau=pf.SDIRK2(), dt=0.025, nsteps=4, control=q, t=t, bcs=bcs)
    values = np.cos(np.arange(len(TIMES) * len(points), dtype=float)).reshape(len(TIMES), len(points))
    misfit = pf.PointSensors(points, TIMES, values, weight=weight)
    return pf.TimeParallelReducedFunctional(
        ev, misfit, regularisation=0.1 * q**2 * dx, spacetime=st, solver_parameters=SERIAL
    )


@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize("weight", [[0, 1, 2.0], [[0, 0, 0], [1, 0, 1], [2, 2, 2], [0, 3, 0]], 0.0])
def test_readings_with_the_weight_zero_have_no_part_in_a_minimum(weight):
    expected = functional(weight=weight).minimize_trust_region(gtol_rel=1e-12).x
    J = functional(weight=weight)
    for found in (J.minimize("map").x, J.parameter_to_observable().minimize().x):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-8 * np.abs(expected).max(initial=1e-30))


def test_readings_are_not_read_in_another_order():
    posterior = (F := functional().parameter_to_observable()).posterior()
    table = F.data.reshape(4, 3)
    np.testing.assert_array_equal(posterior.with_data(table).x, posterior.x)
    with pytest.raises(InputError, match=r"shape \(3, 4\).*\(times, sensors\) = \(4, 3\)"):
        posterior.with_data(table.T)
    with pytest.raises(InputError, match=r"masked in places.*stream"):
        posterior.with_data(np.ma.masked_greater(F.data, 0.5))
    with pytest.raises(InputError, match="give 12 finite numbers"):
        posterior.with_data(["a"] * 12)
    with pytest.raises(InputError, match=r"F.T: readings of shape \(4, 3\).*values.ravel"):
        F.T @ table
    with pytest.raises(InputError, match="complex128"):
        F @ (1j * posterior.x)


def test_the_transpose_is_a_linear_operator():
    F = functional().parameter_to_observable()
    y, z = np.cos(np.arange(F.shape[0])), np.sin(np.arange(F.shape[1]))
    A = F @ np.eye(F.shape[1])
    for T in (F.T, F.H, F.T.T.T):
        np.testing.assert_allclose(T @ y, A.T @ y, rtol=1e-13)
        np.testing.assert_allclose(T @ np.eye(len(y)), A.T, rtol=1e-13)
    np.testing.assert_allclose(F.T.T @ z, A @ z, rtol=1e-13)
    np.testing.assert_allclose(F.T.rmatvec(z), A @ z, rtol=1e-13)
    np.testing.assert_allclose((F.T @ F) @ z, A.T @ (A @ z), rtol=1e-12)


@pytest.mark.parallel(2)
def test_what_differs_between_ranks_is_refused_on_all_of_them(tmp_path):
    posterior = (F := (J := functional()).parameter_to_observable()).posterior()
    sensors = pf.PointSensors(POINTS, [0.1], np.zeros((1, 3)))
    second, (m, n) = MPI.COMM_WORLD.rank == 1, F.shape
    cases = {
        "controls of shape": lambda: F @ np.ones(n + second),
        "readings of shape": lambda: F.T @ np.ones(m + second),
        "count is not the same": lambda: posterior.sample(1 + second),
        "seed is not the same": lambda: posterior.sample(1, seed=int(second)),
        "time is not the same": lambda: posterior.until(0.02 + 0.05 * second),
        "prior is not the same": lambda: F.posterior(prior="riesz_map" if second else None),
        "load is not the same": lambda: J.parameter_to_observable(load=tmp_path / "map.h5" if second else None),
        "time_ranks is not the same": lambda: J.parameter_to_observable(time_ranks=1 if second else None),
        "predictions is not the same": lambda: J.parameter_to_observable(predict=[] if second else sensors),
        "path is not the same": lambda: F.save(tmp_path / f"map{int(second)}.h5"),
        "mean is not the same": lambda: F.posterior(mean=np.ones(n) if second else None),
    }
    for match, call in cases.items():
        with pytest.raises(InputError, match=match):
            call()


def test_what_is_not_there_is_said_with_what_to_use():
    both = functional() + 2 * functional(points=POINTS[:2])
    posterior = (F := both.parameter_to_observable()).posterior()
    with pytest.raises(InputError, match="stream: the map is that of a sum"):
        posterior.until(0.05)
    with pytest.raises(InputError, match=r"use minimize_trust_region of the functional, or posterior\(\).mean"):
        F.minimize()
    with pytest.raises(InputError, match="until: time = 'now': give a number"):
        functional().parameter_to_observable().posterior().until("now")
    with pytest.raises(InputError, match="a boundary value without such a factor"):
        functional(course=True).parameter_to_observable()
    with pytest.raises(InputError, match="first controls as start="):
        functional().minimize(np.ones(16))


@pytest.mark.parallel([1])
def test_a_posterior_with_the_noise_of_other_weights_is_refused():
    J = functional()
    F = J.parameter_to_observable()
    posterior, given = F.posterior(), F.posterior(noise=0.3)
    J.problem.misfits[0]._users.weight = 5.0
    J.update_data()
    with pytest.raises(InputError, match=r"other weights.*F.posterior\(\)"):
        posterior.with_data()
    np.testing.assert_array_equal(given.with_data().x, given.x)
    np.testing.assert_allclose(F.posterior().x, J.minimize_trust_region(gtol_rel=1e-12).x, rtol=0, atol=1e-8)

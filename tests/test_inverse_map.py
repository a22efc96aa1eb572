"""The map from controls to readings equals the sweeps, for all kinds of controls, integrators and grids."""

import numpy as np
import pytest
from firedrake import (
    Function,
    FunctionSpace,
    SpatialCoordinate,
    TestFunction,
    VertexOnlyMesh,
    assemble,
    dot,
    dx,
    grad,
    inner,
    interpolate,
)
from irksome import Dt, TimeStepper
from mpi4py import MPI

import pint_fem as pf
from pint_fem.errors import InputError
from pint_fem.propagators.choice import leapfrog
from tests.inverse_problems import (
    POINTS,
    STATIC,
    dense_map,
    grid,
    heat,
    lossy,
    random_control,
    readings_by_sweep,
    readings_of,
    waves,
)
from tests.meshes import square

PROBLEMS = {
    **{f"heat {t}": lambda st, t=t: heat(st, tableau=t) for t in ("BE", "SDIRK2", "midpoint")},
    **{f"only {c}": lambda st, c=c: heat(st, (c,)) for c in STATIC},
    "a step": lambda st: heat(st, ("strength", "source", "initial", "amplitude")),
    "wave": waves,
    "wave SDIRK2": lambda st: waves(st, tableau="SDIRK2"),
    "leapfrog": lambda st: waves(st, propagator=leapfrog),
    "lossy": lossy,
}


def check(J, rtol=1e-12):
    """The map and its transpose are those of the sweeps, and adjoint to each other."""
    F, layout = J.parameter_to_observable(), J.problem.layout
    for seed in range(2):
        z = random_control(J, seed)
        expected, y = readings_by_sweep(J, z), F.predict(z)
        assert np.abs(y - expected).max() <= rtol * np.abs(expected).max()
        # the misfit's gradient is the transpose applied to the weighted residual
        r = F.weights * (expected - F.data)
        g = J.problem.derivative(z) - J.problem.regularisation.gradient(z)
        error, size = F.T @ r - g, np.abs(g).max(initial=0.0)
        largest = lambda x: J.spacetime.comm.allreduce(x, op=MPI.MAX)
        assert largest(np.abs(error).max(initial=0.0)) <= 20 * rtol * largest(size)
    w = np.cos(np.arange(F.shape[0]))
    left, right = w @ (F @ z), layout.pairing(F.T @ w, z)
    assert left == pytest.approx(right, rel=1e-13, abs=1e-13 * np.abs(w) @ np.abs(F @ z))


@pytest.mark.parallel([1])
@pytest.mark.parametrize("name", PROBLEMS)
def test_the_map_is_that_of_the_sweeps(name):
    check(PROBLEMS[name](grid()))


@pytest.mark.parallel(3)
@pytest.mark.parametrize("name", ["heat SDIRK2", "only initial", "a step", "leapfrog"])
def test_the_map_is_that_of_the_sweeps_on_three_ranks(name):
    check(PROBLEMS[name](grid()))


@pytest.mark.parallel(2)
@pytest.mark.parametrize("shape", ["1x2", "2x1"])
@pytest.mark.parametrize("name", ["heat SDIRK2", "wave", "lossy"])
def test_the_map_is_that_of_the_sweeps_on_two_ranks(name, shape):
    check(PROBLEMS[name](pf.SpaceTime(shape)), 1e-11 if shape == "2x1" else 1e-12)


@pytest.mark.parallel([1, 3])
def test_the_map_is_that_of_mgrit_to_its_tolerance():
    check(heat(grid(), solver={"mgrit": {"coarsening": (2,), "rtol": 1e-13}}), 1e-10)


@pytest.mark.parallel(3)
def test_rows_are_bitwise_the_same_for_every_number_of_time_ranks():
    alone = heat(pf.SpaceTime("1x1", comm=MPI.COMM_SELF)).parameter_to_observable()
    F = heat(grid()).parameter_to_observable()
    whole = dict(zip(alone.numbers, alone.rows, strict=True))
    for number, row in zip(F.numbers, F.rows, strict=True):
        np.testing.assert_array_equal(row, whole[number])
    assert sorted(np.concatenate(F.spacetime.time_comm.allgather(F.numbers))) == list(range(F.shape[0]))


@pytest.mark.parallel([1])
def test_the_map_is_that_of_a_loop_of_steps():
    """Irksome's time stepper and Firedrake's interpolation, for a source with a time course."""
    mesh = square(4, MPI.COMM_SELF)
    V = FunctionSpace(mesh, "CG", 2)
    u, v, q, t = Function(V), TestFunction(V), Function(V), pf.time_function(mesh)
    x, y = SpatialCoordinate(mesh)
    form = lambda q: inner(Dt(u), v) * dx + dot(grad(u), grad(v)) * dx + u * v * dx - t * (1 + t) * q * v * dx
    ev = pf.Evolution(form(q), u, tableau=pf.SDIRK2(), dt=0.05, nsteps=6, control=q, t=t)
    times = 0.05 * np.array([1.0, 2.25, 5.5, 6.0])
    sensors = pf.PointSensors(POINTS, times, np.zeros((4, 3)))
    st = pf.SpaceTime("1x1", comm=MPI.COMM_SELF)
    F = pf.TimeParallelReducedFunctional(ev, sensors, spacetime=st, solver_parameters={"time_solver": "serial"})
    F = F.parameter_to_observable()
    w = Function(V).interpolate(x * (1 - y) + x**2)
    u.assign(0)
    t.assign(0)
    stepper = TimeStepper(form(w), pf.SDIRK2(), t, pf.time_function(mesh).assign(0.05), u)
    at = FunctionSpace(VertexOnlyMesh(mesh, POINTS), "DG", 0)
    order = FunctionSpace(at.mesh().input_ordering, "DG", 0)
    read = lambda: assemble(interpolate(assemble(interpolate(u, at)), order)).dat.data_ro.copy()
    states = [read()]
    for n in range(6):
        stepper.advance()
        t.assign(0.05 * (n + 1))
        states.append(read())
    states = np.array(states)
    expected = [states[1], 0.75 * states[2] + 0.25 * states[3], 0.5 * states[5] + 0.5 * states[6], states[6]]
    np.testing.assert_allclose((F @ w).reshape(4, 3), expected, rtol=1e-10)


@pytest.mark.parallel([1])
def test_it_is_a_linear_operator():
    J = heat(grid(), ("source", "initial"))
    F = J.parameter_to_observable()
    D, zero = dense_map(J)
    np.testing.assert_allclose(F @ np.eye(F.shape[1]), D, atol=1e-12 * np.abs(D).max())
    np.testing.assert_allclose(F.T @ np.eye(F.shape[0]), D.T, atol=1e-12 * np.abs(D).max())
    np.testing.assert_allclose(F.offset, zero, atol=1e-13)
    functions = J.function(z := random_control(J))
    np.testing.assert_array_equal(F @ functions, F @ z)
    np.testing.assert_allclose(F.predict(functions), readings_by_sweep(J, z), rtol=1e-12)
    with pytest.raises(InputError, match="2"):
        F @ functions[0]


@pytest.mark.parallel([1, 3])
def test_where_there_is_no_map_what_to_use_is_named():
    st = grid()
    with pytest.raises(InputError, match="minimize_trust_region"):
        heat(st, sensors=lambda ev: [readings_of(ev), pf.TerminalMisfit(ev.u**2 * dx)]).parameter_to_observable()
    with pytest.raises(InputError, match="constant operators"):
        heat(st, ("source", "conductivity"), linear=False).parameter_to_observable()
    with pytest.raises(InputError, match="constant operators"):
        _moving(st)


def _moving(st):
    """A conductivity that depends on time."""
    mesh = square(3, st.space_comm)
    V = FunctionSpace(mesh, "CG", 1)
    u, v, q, t = Function(V), TestFunction(V), Function(V), pf.time_function(mesh)
    form = Dt(u) * v * dx + (1 + t) * dot(grad(u), grad(v)) * dx - q * v * dx
    ev = pf.Evolution(form, u, tableau=pf.BackwardEuler(), dt=0.1, nsteps=4, control=q, t=t)
    J = pf.TimeParallelReducedFunctional(ev, readings_of(ev), spacetime=st, solver_parameters={"time_solver": "serial"})
    return J.parameter_to_observable()

"""Functionals of coefficients (conductivity, permittivity, wave speed, heat capacity) are those that a serial pyadjoint
tape of the same steps differentiates: J, gradient and Hessian action, Taylor orders, and which propagator is chosen.
"""

import logging

import numpy as np
import pytest
from firedrake import COMM_SELF, Function, assemble, derivative, exp, grad, inner, sin
from mpi4py import MPI

import pint_fem as pf
from pint_fem.kernels.arrays import get
from pint_fem.propagators import CoefficientPropagator, FormPropagator
from tests.coefficients import (
    acoustics,
    assert_same,
    assert_same_as_serial,
    conduction,
    elastic,
    facet_diffusion,
    heat,
    heating_experiments,
    maxwell,
    point_and_direction,
    pressure_waves,
    results,
    serial_functional,
    time_parallel,
)
from tests.taylor import check_orders

ALONE = pf.SpaceTime("1x1", comm=COMM_SELF)
SERIAL = {"time_solver": "serial"}
MGRIT = {"mgrit": {"rtol": 1e-12, "coarsening": (3,)}}
C_POINTS = {"mgrit": {"rtol": 1e-12, "coarsening": (3,), "storage": "C"}}
PARADIAG = {"time_solver": "paradiag", "paradiag": {"rtol": 1e-12}}


def finest(rf):
    """The propagator of the finest level."""
    return rf.problem.sweeps.propagators[0]


def fast(*functionals):
    """Whether the operators are assembled once for each control."""
    return all(isinstance(finest(rf), CoefficientPropagator) for rf in functionals)


# -- conductivity and heat capacity ------------------------------------------------------------------------------------
def test_log_conductivity_by_all_time_solvers_also_where_the_control_is_zero():
    """Boundary values that depend on time; the tape is evaluated at two controls."""
    problem = heat(ALONE, conduction(exp))
    z, dz = point_and_direction(problem)
    nothing = [Function(c.function_space()) for c in problem.controls]
    tape = serial_functional(problem, "SDIRK2")
    theirs, at_zero = results(tape, z, dz), results(tape, nothing, dz)
    for parameters in (SERIAL, MGRIT, C_POINTS, PARADIAG):
        rf = time_parallel(problem, ALONE, "SDIRK2", **parameters)
        assert fast(rf)
        assert_same(results(rf, z, dz), theirs, COMM_SELF)
        assert_same(results(rf, nothing, dz), at_zero, COMM_SELF)
        assert_same(results(rf, z, dz), theirs, COMM_SELF)  # nothing of the other control is left


def capacity_and_convection(capacity):
    """``capacity(q)`` in front of the rate, and a coefficient of convection that is sought on two sides."""
    return lambda rate, u, v, t, q, dx, ds, x: (
        (capacity(q[0]) * rate * v + inner(grad(u), grad(v))) * dx + q[1] * (u - x[0]) * v * ds((2, 3))
    )


@pytest.mark.parametrize(
    ("capacity", "controls", "integrator", "given", "solvers"),
    [
        (exp, ("P2", "R"), "ImplicitMidpoint", {"walls": "inhomogeneous"}, (SERIAL, PARADIAG)),
        (lambda q: 0.2 + q, ("DG0", "P1"), "BackwardEuler", {"state": "P2", "walls": "homogeneous"}, (SERIAL, MGRIT)),
        pytest.param(
            lambda q: 1 + q**2, ("R", "R"), "SDIRK2", {"walls": "inhomogeneous"}, (MGRIT,), marks=pytest.mark.grid
        ),
    ],
)
def test_heat_capacity_and_convection(capacity, controls, integrator, given, solvers):
    """The second one with a quadratic state and coefficients in cells."""
    problem = heat(ALONE, capacity_and_convection(capacity), controls, **given)
    assert fast(*assert_same_as_serial(problem, ALONE, integrator, *solvers))


def test_stiffness_of_an_elastic_solid():
    assert fast(*assert_same_as_serial(elastic(ALONE), ALONE, "SDIRK2", MGRIT))


@pytest.mark.grid
@pytest.mark.parametrize(("control", "state"), [("R", "P1"), ("P2", "P1"), ("DG0", "P2")])
@pytest.mark.parametrize("integrator", ["BackwardEuler", "SDIRK2", "ImplicitMidpoint"])
def test_conductivity_in_other_spaces(control, state, integrator):
    problem = heat(ALONE, conduction(lambda q: 1 + q**2), (control,), state=state, walls="inhomogeneous")
    assert fast(*assert_same_as_serial(problem, ALONE, integrator, SERIAL, MGRIT, PARADIAG))


# -- controls in operators and in loads --------------------------------------------------------------------------------
def test_source_and_conductivity_at_once():
    term = lambda rate, u, v, t, q, dx, ds, x: (
        rate * v + exp(q[0]) * inner(grad(u), grad(v)) - (1 + sin(8 * t)) * q[1] * v
    ) * dx
    problem = heat(ALONE, term, ("P1", "P1"), moves=True)
    assert fast(*assert_same_as_serial(problem, ALONE, "BackwardEuler", SERIAL, MGRIT, PARADIAG))


def test_a_load_that_is_nonlinear_in_the_control_of_the_operator():
    """Any propagator, as long as the numbers are right."""
    term = lambda rate, u, v, t, q, dx, ds, x: (rate * v + exp(q[0]) * inner(grad(u), grad(v)) - q[0] ** 3 * v) * dx
    assert_same_as_serial(heat(ALONE, term), ALONE, "BackwardEuler", SERIAL, MGRIT)


def test_conductivity_on_interior_facets(caplog):
    """Discontinuous elements; any propagator, a slow one is reported."""
    problem = heat(ALONE, facet_diffusion, ("DG0",), walls="none", discontinuous=True)
    with caplog.at_level(logging.INFO, logger="pint_fem"):
        (rf,) = assert_same_as_serial(problem, ALONE, "BackwardEuler", SERIAL)
    assert fast(rf) != ("interior facets" in caplog.text)


def test_without_a_state_the_derivatives_are_those_of_the_regularisation():
    """No initial value, no source, no boundary value: the trajectory is zero for all controls."""
    problem = heat(ALONE, conduction(exp), walls="homogeneous", zero=True)
    z, dz = point_and_direction(problem)
    size = problem.regularisation(z)
    gradient = derivative(size, z[0])
    for parameters in (SERIAL, MGRIT):
        rf = time_parallel(problem, ALONE, "SDIRK2", **parameters)
        _, (g,), (h,) = results(rf, z, dz)
        assert fast(rf)
        assert np.abs(g - get(assemble(gradient))).max() < 1e-15
        assert np.abs(h - get(assemble(derivative(gradient, z[0], dz[0])))).max() < 1e-15


# -- waves -------------------------------------------------------------------------------------------------------------
def test_permittivity_and_conductivity():
    """Both at once, with an absorbing wall that depends on the permittivity; with and without eliminating B."""
    problem = maxwell(ALONE)
    z, dz = point_and_direction(problem)
    theirs = results(serial_functional(problem, "ImplicitMidpoint"), z, dz)
    for eliminate, solvers in ((None, (SERIAL, PARADIAG)), (1, (SERIAL, MGRIT, PARADIAG))):
        problem.eliminate = eliminate
        assert fast(*assert_same_as_serial(problem, ALONE, "ImplicitMidpoint", *solvers, theirs=theirs))


def test_permittivity_and_conductivity_by_leapfrog():
    assert_same_as_serial(maxwell(ALONE, eliminate=1), ALONE, "leapfrog", SERIAL, MGRIT)


def test_leapfrog_that_is_stable_for_some_controls_only():
    """A small permittivity makes fast waves: the trial is refused with the reason, and the next one is as before."""
    problem = maxwell(ALONE, eliminate=1)
    z, dz = point_and_direction(problem)
    rf = time_parallel(problem, ALONE, "leapfrog", **SERIAL)
    before = results(rf, z, dz)
    with pytest.raises(pf.SolverFailure, match="not stable"):
        rf([Function(z[0].function_space()).assign(-8.0), z[1]])
    assert_same(results(rf, z, dz), before, COMM_SELF)


@pytest.mark.parametrize(
    ("where", "control", "integrator"),
    [
        ("mass", "DG0", "ImplicitMidpoint"),
        pytest.param("stiffness", "P1", "SDIRK2", marks=pytest.mark.grid),
        pytest.param("mass", "R", "BackwardEuler", marks=pytest.mark.grid),
    ],
)
def test_wave_speed(where, control, integrator):
    """Acoustics, with the speed in the mass or in the stiffness of the field that is eliminated."""
    problem = acoustics(ALONE, where=where, control=control)
    z, dz = point_and_direction(problem)
    theirs = results(serial_functional(problem, integrator), z, dz)
    for eliminate, solvers in ((None, (SERIAL, PARADIAG)), (1, (SERIAL, PARADIAG))):
        problem.eliminate = eliminate
        assert fast(*assert_same_as_serial(problem, ALONE, integrator, *solvers, theirs=theirs))


def test_wave_speed_by_leapfrog():
    assert_same_as_serial(pressure_waves(ALONE), ALONE, "leapfrog", SERIAL, MGRIT)


@pytest.mark.parametrize("where", ["mass", "stiffness"])
def test_leapfrog_refuses_a_control_in_the_field_that_is_eliminated(where):
    problem = acoustics(ALONE, eliminate=1, where=where)
    with pytest.raises(pf.InputError, match="control 'q0' is in the rows or columns of field 1"):
        time_parallel(problem, ALONE, "leapfrog", **SERIAL)


# -- what stays with the form propagator -------------------------------------------------------------------------------
def test_a_coefficient_with_a_course_stays_with_the_form_propagator_which_reports_it(caplog):
    """``a(x) s(t)``: the operators of the steps differ."""
    term = lambda rate, u, v, t, q, dx, ds, x: (
        rate * v + exp(q[0]) * (1 + 0.5 * sin(9 * t)) * inner(grad(u), grad(v))
    ) * dx
    problem = heat(ALONE, term, moves=True)
    with caplog.at_level(logging.INFO, logger="pint_fem"):
        (rf,) = assert_same_as_serial(problem, ALONE, "BackwardEuler", MGRIT)
    assert isinstance(finest(rf), FormPropagator)
    assert "form propagator" in caplog.text
    assert "they depend on time" in caplog.text
    assert f"{problem.steps} matrices" in caplog.text


# -- Taylor orders -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("make", "integrator", "solver", "length"),
    [
        (lambda: heat(ALONE, conduction(exp)), "SDIRK2", MGRIT, 0.5),
        (lambda: heat(ALONE, capacity_and_convection(exp), ("P2", "R")), "ImplicitMidpoint", SERIAL, 0.5),
        (lambda: maxwell(ALONE, eliminate=1), "ImplicitMidpoint", PARADIAG, 0.5),
        (lambda: maxwell(ALONE, eliminate=1), "leapfrog", SERIAL, 0.3),
        (lambda: acoustics(ALONE), "ImplicitMidpoint", SERIAL, 0.3),
    ],
    ids=["conductivity", "capacity", "maxwell", "leapfrog", "acoustics"],
)
def test_taylor_orders(make, integrator, solver, length):
    problem = make()
    z, dz = point_and_direction(problem)
    for direction in dz:
        direction.assign(length * direction)
    one = lambda functions: functions[0] if len(functions) == 1 else functions
    check_orders(time_parallel(problem, ALONE, integrator, **solver), one(z), one(dz))


# -- process grids -----------------------------------------------------------------------------------------------------
GRIDS = {1: ["1x1"], 2: ["1x2", "2x1"], 4: ["2x2"]}.get(MPI.COMM_WORLD.size, [])
NOT_ON_FOUR = pytest.mark.grid if MPI.COMM_WORLD.size == 4 else ()


@pytest.mark.parallel([2, 4])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(
    ("make", "integrator", "solvers"),
    [  # the last two on two ranks only
        (lambda st: heat(st, conduction(exp)), "SDIRK2", (SERIAL, MGRIT, C_POINTS, PARADIAG)),
        (lambda st: maxwell(st, eliminate=1), "ImplicitMidpoint", (MGRIT, PARADIAG)),
        pytest.param(lambda st: maxwell(st, eliminate=1), "leapfrog", (MGRIT,), marks=NOT_ON_FOUR),
        pytest.param(
            lambda st: heat(st, capacity_and_convection(exp), ("P2", "R"), walls="inhomogeneous"),
            "BackwardEuler",
            (MGRIT,),
            marks=NOT_ON_FOUR,
        ),
    ],
    ids=["conductivity", "maxwell", "leapfrog", "capacity"],
)
def test_on_process_grids(make, integrator, solvers, grid):
    st = pf.SpaceTime(grid)
    assert_same_as_serial(make(st), st, integrator, *solvers)


GROUPS = {1: ["1x1"], 2: ["1x1x2", "1x2"], 4: ["1x2x2", "2x1x2"]}.get(MPI.COMM_WORLD.size, [])


@pytest.mark.parallel([1, 2, 4])
@pytest.mark.parametrize("grid", GROUPS)
def test_several_experiments(grid):
    """Three experiments with one conductivity, on one rank and divided over groups of ranks."""
    st = pf.SpaceTime(grid)
    assert_same_as_serial(heating_experiments(st, conduction(exp), 3), st, "BackwardEuler", SERIAL, MGRIT)

"""Coefficients and experiments as users pose them: values and derivatives are those of the form propagator, which
assembles each step by itself, experiment by experiment.
"""

import numpy as np
import pytest
from firedrake import (
    COMM_SELF,
    Constant,
    DirichletBC,
    Function,
    SpatialCoordinate,
    TensorFunctionSpace,
    TestFunction,
    as_tensor,
    conditional,
    dx,
    exp,
    grad,
    inner,
    ln,
)
from irksome import Dt

import pint_fem as pf
from pint_fem.kernels.arrays import get
from pint_fem.propagators import CoefficientPropagator, FormPropagator
from tests.coefficients import _space
from tests.meshes import square

ALONE = pf.SpaceTime("1x1", comm=COMM_SELF)
SERIAL = {"time_solver": "serial"}
MGRIT = {"mgrit": {"rtol": 1e-12, "coarsening": (2,)}}
C_POINTS = {"mgrit": {"rtol": 1e-12, "coarsening": (2,), "storage": "C"}}


class Heating:
    """Experiments with one control ``q``, posed from ``conduction(q, i)`` and ``load(q, i)`` of each experiment ``i``,
    and a factor of the values on the wall.
    """

    def __init__(self, count, conduction, load=lambda q, i: 0.0, wall=1.0):
        mesh = square(3, COMM_SELF)
        V, self.x = _space(mesh, "P1"), SpatialCoordinate(mesh)
        self.q, v = Function(V, name="q").assign(0.5), TestFunction(V)
        self.z, self.dz = (Function(V).interpolate(e) for e in (0.6 + self.x[0] * self.x[1], 0.5 - self.x[1]))
        self.evolutions, self.misfits = [], []
        for i in range(count):
            u = Function(V).interpolate(self.x[0] + i)
            form = Dt(u) * v + conduction(self.q, i) * inner(grad(u), grad(v))
            form = (form - (1 + i * self.x[0] + load(self.q, i)) * v) * dx(degree=4)
            given = dict(tableau=pf.BackwardEuler(), dt=0.05, nsteps=4, control=self.q)
            given |= dict(bcs=DirichletBC(V, wall * self.x[1], 1))
            self.evolutions.append(pf.Evolution(form, u, **given))
            self.misfits.append(pf.RunningMisfit((u**2 + u**4) * dx(degree=4)))

    def functional(self, **solver):
        """The functional of all experiments."""
        return pf.TimeParallelReducedFunctional(
            self.evolutions, self.misfits, spacetime=ALONE, solver_parameters=solver
        )

    def results(self, functional):
        """J, gradient and Hessian action."""
        return [float(functional(self.z)), get(functional.derivative()), get(functional.hessian(self.dz))]

    def expected(self):
        """The same by the form propagator, each experiment by itself."""
        each = [
            self.results(
                pf.TimeParallelReducedFunctional(
                    *pair, spacetime=ALONE, solver_parameters=SERIAL, propagator=FormPropagator
                )
            )
            for pair in zip(self.evolutions, self.misfits, strict=True)
        ]
        return [sum(of) for of in zip(*each, strict=True)]


def assert_same(ours, theirs):
    """Relative differences of J, gradient and Hessian action."""
    for name, a, b, tolerance in zip(("J", "gradient", "Hessian"), ours, theirs, (1e-9, 1e-8, 1e-7), strict=True):
        assert np.linalg.norm(np.subtract(a, b)) <= tolerance * np.linalg.norm(b), name


# -- experiments -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("source", [lambda q, i: 0.0, lambda q, i: q], ids=["operators", "sources"])
def test_operators_with_other_constants_are_not_shared(source):
    """Constants in the same place with other values, at first or after ``update_data()``."""
    k = [Constant(1.0), Constant(1.0), Constant(2.0)]
    controlled = source(1, 0) == 0
    problem = Heating(3, lambda q, i: k[i] * (exp(q) if controlled else 1.0), source)
    J = problem.functional(**SERIAL)
    for changed in (None, 0, 1, 2):
        if changed is not None:
            k[changed].assign(3.0 + changed)
            assert J.update_data()
        assert_same(problem.results(J), problem.expected())


def test_the_second_experiment_has_the_control_in_its_load_as_well():
    problem = Heating(2, lambda q, i: exp(q), lambda q, i: i * q)
    assert_same(problem.results(problem.functional(**SERIAL)), problem.expected())


# -- controls without operators ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("solver", [SERIAL, MGRIT])
def test_derivatives_at_the_accepted_point_after_a_trial_that_failed(solver):
    """The logarithm of zero: what was computed before is used again, with the operators' derivatives at that point."""
    problem = Heating(1, lambda q, i: 1 + ln(q))
    J = problem.functional(**solver)
    assert isinstance(J.problem.leaves[0].sweeps.propagators[0], CoefficientPropagator)
    before, nothing = problem.results(J), np.zeros(J.problem.layout.size)
    z, dz = get(problem.z), get(problem.dz)
    J.problem.keep_evaluations(2)
    before = problem.results(J)
    with pytest.raises(pf.SolverFailure, match="infinite or NaN"):
        J.problem.value(nothing)
    assert_same([J.problem.value(z), J.problem.derivative(z), J.problem.hessian_action(z, dz)], before)
    assert_same(before, problem.expected())


def test_operators_that_jump_with_the_control_have_no_derivative():
    """Derivatives are those of the load alone."""
    problem = Heating(1, lambda q, i: conditional(q > 0.9, 2.0, 1.0), lambda q, i: q)
    assert_same(problem.results(problem.functional(**SERIAL)), problem.expected())


# -- data --------------------------------------------------------------------------------------------------------------
def test_data_of_loads_and_walls_change_where_loads_are_compressed():
    """With C-points stored; the control stays the same, so that no operators are set anew."""
    source, wall = Constant(1.0), Constant(1.0)
    problem = Heating(1, lambda q, i: exp(q), lambda q, i: source, wall=wall)
    J = problem.functional(**C_POINTS)
    for changed in (None, source, wall):
        if changed is not None:
            changed.assign(-3.0)
            assert J.update_data()
        assert_same(problem.results(J), problem.expected())


# -- spaces ------------------------------------------------------------------------------------------------------------
def test_state_of_symmetric_tensors():
    mesh = square(2, COMM_SELF)
    V, x = TensorFunctionSpace(mesh, "CG", 1, symmetry=True), SpatialCoordinate(mesh)
    u, v, q = Function(V), TestFunction(V), Function(_space(mesh, "P1"), name="q")
    u.interpolate(as_tensor([[x[0], x[1]], [x[1], 1 - x[0]]]))
    form = inner(Dt(u), v) + exp(q) * inner(grad(u), grad(v)) - inner(as_tensor([[1, x[0]], [x[0], 2]]), v)
    evolution = pf.Evolution(form * dx(degree=4), u, tableau=pf.BackwardEuler(), dt=0.05, nsteps=3, control=q)
    z, dz = (Function(q.function_space()).interpolate(e) for e in (x[0] * x[1], 0.5 - x[1]))
    found = []
    for propagator in ({}, {"propagator": FormPropagator}):
        J = pf.TimeParallelReducedFunctional(
            evolution, pf.RunningMisfit((inner(u, u) + inner(u, u) ** 2) * dx(degree=4)), spacetime=ALONE,
            solver_parameters=SERIAL, **propagator,
        )  # fmt: skip
        found.append([float(J(z)), get(J.derivative()), get(J.hessian(dz))])
    assert_same(*found)


def test_initial_conditions_that_are_affine_in_one_control_only():
    """The second derivative of ``p + q**2`` by ``p`` is zero: Taylor remainder of the gradient by differences."""
    mesh = square(2, COMM_SELF)
    V, x = _space(mesh, "P1"), SpatialCoordinate(mesh)
    u, v, p, q = Function(V), TestFunction(V), Function(V, name="p"), Function(V, name="q")
    form = (Dt(u) * v + exp(q) * inner(grad(u), grad(v)) - x[0] * v) * dx(degree=4)
    given = dict(tableau=pf.BackwardEuler(), dt=0.05, nsteps=3, control=[q, p], initial=p + q**2)
    evolution, misfit = pf.Evolution(form, u, **given), pf.TerminalMisfit(u**4 * dx(degree=4))
    J = pf.TimeParallelReducedFunctional(evolution, misfit, spacetime=ALONE, solver_parameters=SERIAL).problem
    rng = np.random.default_rng(0)
    z, dz, h = rng.random(J.layout.size), rng.random(J.layout.size), 1e-5
    action = J.hessian_action(z, dz)
    difference = (J.derivative(z + h * dz) - J.derivative(z - h * dz)) / (2 * h)
    assert np.linalg.norm(action - difference) <= 1e-7 * np.linalg.norm(action)

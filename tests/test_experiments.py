"""Experiments with one evolution and other data: one solve for all, with the numbers of each by itself."""

import numpy as np
import pytest
from firedrake import (
    Cofunction,
    Constant,
    DirichletBC,
    Function,
    FunctionSpace,
    SpatialCoordinate,
    TestFunction,
    UnitSquareMesh,
    assemble,
    dx,
    exp,
    grad,
    inner,
    pi,
    replace,
    sin,
)  # fmt: skip
from irksome import Dt

import pint_fem as pf
from pint_fem.propagators import CoefficientPropagator, FormPropagator

D = dx(degree=4)


class Setting:
    """Heat conduction with everything that experiments may differ in."""

    def __init__(self, spacetime=None, *, tableau=None, coefficient=True):
        given = {} if spacetime is None else {"comm": spacetime.space_comm}
        self.mesh = UnitSquareMesh(4, 4, **given, distribution_parameters={"partitioner_type": "simple"})
        self.V = V = FunctionSpace(self.mesh, "CG", 1)
        self.x = SpatialCoordinate(self.mesh)
        x = self.x[0]
        self.u, v, self.q = Function(V), TestFunction(V), Function(V, name="q")
        self.source, self.strength, self.side = Function(V, name="source"), Constant(1.0), Constant(0.5)
        self.load = Cofunction(V.dual(), name="load")
        self.load.assign(assemble(x * v * D))
        self.u.interpolate(sin(pi * x))
        self.t = pf.time_function(self.mesh)
        conductivity = exp(self.q) if coefficient else 1.0
        form = Dt(self.u) * v * D + conductivity * inner(grad(self.u), grad(v)) * D
        form -= self.strength * sin(5 * self.t) * self.source * v * D
        if not coefficient:
            form -= self.q * v * D
        self.evolution = pf.Evolution(
            form - self.load, self.u, tableau=tableau or pf.SDIRK2(), dt=1 / 16, nsteps=8, control=self.q, t=self.t,
            bcs=DirichletBC(V, self.side * (1 + self.t), 1),
        )  # fmt: skip

    def function(self, expression):
        return Function(self.V).interpolate(expression)

    def pairs(self):
        """Data and misfits of three experiments."""
        x, y = self.x
        other = Cofunction(self.V.dual())
        other.assign(assemble(y * TestFunction(self.V) * D))
        data = [
            {self.source: self.function(x * y)},
            {self.source: self.function(sin(3 * y)), self.strength: 2.0, self.side: Constant(-1.0)},
            {self.load: other, self.strength: Constant(0.0)},
        ]
        data[1][self.u] = self.function(y)
        return [(d, pf.RunningMisfit((self.u - e * x) ** 2 * D)) for e, d in enumerate(data)]

    def by_hand(self, number, propagator):
        """The functional of one experiment, posed without Experiments."""
        made = Setting(coefficient=True, tableau=self.evolution.tableau)
        x, y = made.x
        if number == 0:
            made.source.interpolate(x * y)
        elif number == 1:
            made.source.interpolate(sin(3 * y))
            made.strength.assign(2.0)
            made.side.assign(-1.0)
            made.u.interpolate(y)
        else:
            made.load.assign(assemble(y * TestFunction(made.V) * D))
            made.strength.assign(0.0)
        misfit = pf.RunningMisfit((made.u - number * x) ** 2 * D)
        return pf.TimeParallelReducedFunctional(made.evolution, misfit, propagator=propagator)


def difference(a, b):
    return np.abs(a - b).max() / np.abs(b).max()


@pytest.mark.parametrize("solver", ["serial", "mgrit", "paradiag"])
def test_experiments_are_the_sum_of_each_by_itself(solver):
    given = Setting()
    options = {"time_solver": solver, "mgrit": {"levels": 2, "coarsening": 4, "rtol": 1e-13}}
    options["paradiag"] = {"rtol": 1e-13}
    J = pf.TimeParallelReducedFunctional(pf.Experiments(given.evolution, given.pairs()), solver_parameters=options)
    together = J.problem.terms[0].problem
    assert [group for group, _ in together._joint] == [[0, 1, 2]]
    assert all(isinstance(t.problem.sweeps.propagators[0], CoefficientPropagator) for t in together.terms)
    rng = np.random.default_rng(1)
    z, dz = 0.3 * rng.standard_normal((2, J.layout.size))
    alone = [given.by_hand(e, FormPropagator).problem for e in range(3)]
    problem = J.problem
    assert problem.value(z) == pytest.approx(sum(p.value(z) for p in alone), rel=1e-11)
    assert difference(problem.derivative(z), sum(p.derivative(z) for p in alone)) < 1e-10
    assert difference(problem.hessian_action(z, dz), sum(p.hessian_action(z, dz) for p in alone)) < 1e-10
    assert problem.tangent_value(z, dz) == pytest.approx(J.layout.pairing(problem.derivative(z), dz), rel=1e-10)


def test_one_factorisation_serves_all(monkeypatch):
    from pint_fem.propagators.coefficients import present_operators

    made, kind = [], present_operators.OperatorMatrices.assemble
    monkeypatch.setattr(present_operators.OperatorMatrices, "assemble", lambda self: made.append(1) or kind(self))
    given = Setting()
    J = pf.TimeParallelReducedFunctional(given.evolution, given.pairs(), solver_parameters={"time_solver": "serial"})
    z = 0.1 * np.random.default_rng(0).standard_normal(J.layout.size)
    J.problem.value(z), J.problem.derivative(z), J.problem.hessian_action(z, z)
    assert len(made) == 1


def test_states_and_adjoints_are_those_of_an_experiment():
    given = Setting()
    shots = pf.Experiments(given.evolution, given.pairs())
    J = pf.TimeParallelReducedFunctional(shots, solver_parameters={"time_solver": "serial"})
    J(given.q)
    expected = given.by_hand(1, FormPropagator)
    expected(Function(expected.evolution.V))
    found = J.state(times=0.25, evolution=shots.evolutions[1])
    reference = expected.state(times=0.25).dat.data_ro
    assert difference(found.dat.data_ro, reference) < 1e-12
    other = J.state(times=0.25, evolution=shots.evolutions[0]).dat.data_ro
    assert difference(other, reference) > 0.1


def test_an_expression_may_stand_in_the_place_of_a_function():
    given = Setting()
    expression = sin(3 * given.x[1]) * given.t
    misfit = pf.RunningMisfit(given.u**2 * D)
    J = pf.TimeParallelReducedFunctional(given.evolution, [({given.source: expression}, misfit)])
    by_hand = Setting()
    form = replace(by_hand.evolution.residual, {by_hand.source: sin(3 * by_hand.x[1]) * by_hand.t})
    load = by_hand.evolution.loads
    posed = pf.Evolution(
        replace(form, dict.fromkeys(load, 0 * by_hand.u)) - by_hand.load, by_hand.u, tableau=pf.SDIRK2(), dt=1 / 16,
        nsteps=8, control=by_hand.q, t=by_hand.t, bcs=by_hand.evolution.bcs,
    )  # fmt: skip
    K = pf.TimeParallelReducedFunctional(posed, pf.RunningMisfit(by_hand.u**2 * D), propagator=FormPropagator)
    assert J(given.q) == pytest.approx(K(by_hand.q), rel=1e-8)


def test_other_operators_are_not_solved_at_once():
    given = Setting()
    slow = pf.Evolution(
        given.evolution.residual, given.u, tableau=pf.SDIRK2(), dt=1 / 32, nsteps=8, control=given.q, t=given.t,
        bcs=given.evolution.bcs,
    )  # fmt: skip
    misfits = [pf.RunningMisfit(given.u**2 * D) for _ in range(2)]
    J = pf.TimeParallelReducedFunctional(
        [given.evolution, slow], misfits, solver_parameters={"time_solver": "serial"}
    )
    assert not J.problem.terms[0].problem._joint


def test_weighted_sums_are_solved_at_once():
    given = Setting()
    z = 0.2 * np.random.default_rng(3).standard_normal(25)
    made = [
        pf.TimeParallelReducedFunctional(
            pf.Experiments(given.evolution, [pair]).evolutions[0], pair[1], solver_parameters={"time_solver": "serial"}
        )
        for pair in given.pairs()
    ]
    J = made[0] + 2 * (made[1] - 0.5 * made[2])
    assert [group for group, _ in J.problem._joint] == [[0, 1, 2]]
    weights = (1.0, 2.0, -1.0)
    problems = [functional.problem for functional in made]
    assert J.problem.value(z) == pytest.approx(
        sum(w * p.value(z) for w, p in zip(weights, problems, strict=True)), rel=1e-12
    )
    expected = sum(w * p.hessian_action(z, z) for w, p in zip(weights, problems, strict=True))
    assert difference(J.problem.hessian_action(z, z), expected) < 1e-12


def test_a_failure_of_one_experiment_leaves_no_trace():
    given = Setting()
    pairs = given.pairs()
    J = pf.TimeParallelReducedFunctional(given.evolution, pairs, solver_parameters={"time_solver": "serial"})
    z = 0.1 * np.random.default_rng(0).standard_normal(J.layout.size)
    before = J.problem.value(z)
    with pytest.raises(pf.SolverFailure):
        J.problem.value(np.full_like(z, 800.0))  # exp overflows
    J.problem.invalidate()
    assert J.problem.value(z) == before


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (lambda s: {s.q: 1.0}, "control"),
        (lambda s: {s.t: 1.0}, "time"),
        (lambda s: {Constant(1.0): 2.0}, "is not in the residual"),
        (lambda s: {s.source: "x"}, "in the place of 'source'"),
        (lambda s: {s.source: s.x}, "shape"),
        (lambda s: {s.u: 1.0}, "initial condition"),
        (lambda s: {s.load: s.u}, "Cofunction"),
    ],
)
def test_data_that_do_not_fit_are_refused(data, text):
    given = Setting()
    with pytest.raises(pf.InputError, match=text):
        pf.Experiments(given.evolution, [(data(given), pf.RunningMisfit(given.u**2 * D))])


def test_arguments_that_are_no_experiments_are_refused():
    given = Setting()
    misfit = pf.RunningMisfit(given.u**2 * D)
    with pytest.raises(pf.InputError, match="pair"):
        pf.Experiments(given.evolution, [misfit])
    with pytest.raises(pf.InputError, match="leave them out"):
        pf.TimeParallelReducedFunctional(pf.Experiments(given.evolution, [({}, misfit)]), misfit)


@pytest.mark.parallel(2)
@pytest.mark.parametrize("grid", ["1x2", "2x1", "1x1x2"])
def test_experiments_on_two_ranks(grid):
    spacetime = pf.SpaceTime(grid)
    given = Setting(spacetime)
    options = {"time_solver": "serial"}
    J = pf.TimeParallelReducedFunctional(
        given.evolution, given.pairs(), spacetime=spacetime, solver_parameters=options,
        regularisation=1e-2 * given.q**2 * D,
    )  # fmt: skip
    given.q.interpolate(0.2 * sin(3 * given.x[0]))
    value, gradient = J(given.q), J.derivative(apply_riesz=True)
    from mpi4py import MPI

    alone = Setting(pf.SpaceTime((1, 1), comm=MPI.COMM_SELF))
    K = pf.TimeParallelReducedFunctional(
        alone.evolution, alone.pairs(), spacetime=pf.SpaceTime((1, 1), comm=MPI.COMM_SELF), solver_parameters=options,
        regularisation=1e-2 * alone.q**2 * D,
    )  # fmt: skip
    alone.q.interpolate(0.2 * sin(3 * alone.x[0]))
    assert value == pytest.approx(K(alone.q), rel=1e-12)
    norm = lambda f: assemble(inner(f, f) * dx)
    assert norm(gradient) == pytest.approx(norm(K.derivative(apply_riesz=True)), rel=1e-10)

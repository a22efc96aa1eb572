"""Newton's method for the KKT system of nonlinear evolutions: the minimisers of the reduced trust region."""

import numpy as np
import pytest
from firedrake import (
    COMM_SELF,
    DirichletBC,
    Function,
    FunctionSpace,
    SpatialCoordinate,
    TestFunction,
    UnitIntervalMesh,
    cos,
    dx,
    exp,
    pi,
    sin,
)
from irksome import Dt
from mpi4py import MPI

import pint_fem as pf
from pint_fem.adjoint.newton_kkt.averaged import AveragedKKT, AveragedModel, AveragedOperators
from pint_fem.adjoint.newton_kkt.constrained import ConstrainedEvolution
from pint_fem.errors import InputError, SolverFailure
from pint_fem.evolution.tableaux import named_tableau
from pint_fem.kkt.control_weights import ControlWeights
from pint_fem.propagators import make_propagator
from pint_fem.propagators.tape import TapePropagator
from tests.step_controls import vectors

SERIAL = {"time_solver": "serial"}
RANKS = pytest.mark.parallel([1, 2, 3])


def grid():
    return pf.SpaceTime((1, MPI.COMM_WORLD.size))


def reaction(u, v, q):
    """Logistic growth with diffusion."""
    return (Dt(u) * v + 0.02 * u.dx(0) * v.dx(0) - 2 * u * (1 - u) * v - q * v) * dx


def burgers(u, v, q):
    """Viscous Burgers."""
    return (Dt(u) * v + u * u.dx(0) * v + 0.05 * u.dx(0) * v.dx(0) - q * v) * dx


def radiation(u, v, q):
    """Heat conduction with losses of the third power."""
    return (Dt(u) * v + 0.1 * u.dx(0) * v.dx(0) + 5 * u**3 * v - q * v) * dx


PROBLEMS = {"reaction": reaction, "burgers": burgers, "radiation": radiation}


def functional(
    name, st=None, *, n=8, steps=6, dt=0.05, tableau="BackwardEuler", weight=1e-3, per_step=True, initial=False,
    linear=False, real=False, rates=False, cubic=False, propagator=make_propagator, **parameters,
):  # fmt: skip
    """A target that moves is tracked by a source in space and time, or by one in space."""
    st = st or pf.SpaceTime("1x1", comm=COMM_SELF)
    mesh = st.mesh(UnitIntervalMesh, n)
    V, t = FunctionSpace(mesh, "CG", 1), pf.time_function(mesh)
    (x,) = SpatialCoordinate(mesh)
    u, v, q = Function(V), TestFunction(V), Function(V, name="q")
    a = Function(FunctionSpace(mesh, "R", 0), name="a")
    load = q + a * x**2 if real else q
    form = (Dt(u) * v + 0.1 * u.dx(0) * v.dx(0) - load * v) * dx if linear else PROBLEMS[name](u, v, load)
    u0 = Function(V, name="u0").interpolate(sin(pi * x))
    conditions = [] if name == "reaction" else [DirichletBC(V, 0, "on_boundary")]
    ev = pf.Evolution(
        form, u, tableau=named_tableau(tableau), dt=dt, nsteps=steps,
        control=[q, *([u0] if initial else []), *([a] if real else [])], t=t,
        per_step=[q, *([a] if real else [])] if per_step else False, bcs=conditions, initial=u0,
    )  # fmt: skip
    target = exp(-20 * (x - 0.3 - t) ** 2) + 0.2 * cos(3 * x)
    regularisation = [0.5 * weight * q**2 * dx] if weight else []
    if real:
        regularisation.append(weight * a**2 * dx)
    if rates:
        regularisation.append(pf.RateOfChange(0.02 * weight * q**2 * dx))
    if initial:
        regularisation.append(0.05 * weight * (u0 - sin(pi * x)) ** 2 * dx)
    misfits = [pf.RunningMisfit(0.5 * (u - target) ** 2 * dx), pf.TerminalMisfit(0.05 * (u - target) ** 2 * dx)]
    if cubic:
        misfits = [pf.RunningMisfit(abs(u - target) ** 3 * dx)]
    return pf.TimeParallelReducedFunctional(
        ev, misfits, regularisation=regularisation, spacetime=st, solver_parameters=parameters or SERIAL,
        propagator=propagator,
    )  # fmt: skip


def distance(J, a, b):
    """The distance of two controls relative to the second, in the controls' inner product."""
    return np.sqrt(J.inner.inner(a - b, a - b) / J.inner.inner(b, b))


def expected(name, **given):
    J = functional(name, grid(), **given)
    return J.minimize_trust_region(gtol_rel=1e-11)


TOLERANCES = dict(gtol_rel=1e-11, ctol_rel=1e-11)


@RANKS
@pytest.mark.parametrize(
    ("name", "first_state"),
    [("reaction", "solved"), ("reaction", "initial"), ("burgers", "solved"), ("radiation", "initial")],
)
def test_the_minimiser_is_that_of_the_reduced_trust_region(name, first_state):
    J, lines = functional(name, grid()), []
    solved = J.problem.sweeps.counts["state"]
    result = J.minimize_newton_kkt(first_state=first_state, monitor=lines.append, **TOLERANCES)
    assert result.converged
    assert not result.breakdown
    assert result.choice.startswith("newton-kkt")
    assert distance(J, result.x, expected(name).x) < 1e-8
    # no nonlinear evolution was solved but the first one
    assert J.problem.sweeps.counts["state"] - solved == (1 if first_state == "solved" else 0)
    assert result.constraint_norm < 1e-9
    assert np.array_equal(J.array([c.control for c in J.controls]), result.x)
    assert (len(lines) == result.iterations + 2) == J.spacetime.is_root
    # the states are those of the control
    own = J.problem.cache.state(result.x).U
    assert np.abs(own - result.state).max() < 1e-8 * np.abs(own).max()


@pytest.mark.parallel([1, 2])
@pytest.mark.parametrize("given", [dict(initial=True), dict(per_step=False), dict(tableau="SDIRK2")])
def test_other_controls_and_integrators(given):
    J = functional("radiation", grid(), **given)
    result = J.minimize_newton_kkt(**TOLERANCES)
    assert result.converged
    assert not result.breakdown
    assert distance(J, result.x, expected("radiation", **given).x) < 1e-8


@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize(
    "parameters",
    [
        {"mgrit": {"rtol": 1e-12, "coarsening": (2,)}},
        {"time_solver": "paradiag", "paradiag": {"rtol": 1e-11}},
    ],
    ids=["mgrit", "paradiag"],
)
def test_time_solvers(parameters):
    J = functional("radiation", grid(), **parameters)
    result = J.minimize_newton_kkt(gtol_rel=1e-9)
    assert result.converged
    assert not result.breakdown
    assert distance(J, result.x, expected("radiation").x) < 1e-7


@pytest.mark.parallel([1, 2])
def test_a_linear_evolution_takes_one_step():
    J = functional("radiation", grid(), linear=True)
    result = J.minimize_newton_kkt(gtol_rel=1e-9)
    assert result.converged
    assert result.iterations <= 2
    reference = functional("radiation", grid(), linear=True).minimize_trust_region(gtol_rel=1e-10, cg_max_it=300)
    assert distance(J, result.x, reference.x) < 1e-7


@pytest.mark.parallel([1, 3])
def test_the_constrained_problem_is_consistent():
    """Derivatives by finite differences at states that satisfy no time step, and transposes of the linear solves."""
    J = functional("burgers", grid(), tableau="SDIRK2")
    c, layout = ConstrainedEvolution(J.problem, J.inner), J.layout
    z, dz, other = vectors(J, 3)
    slab = J.problem.sweeps.slab
    states = np.random.default_rng(5).standard_normal((4, J.evolution.nsteps + 1, J.evolution.state_size))
    states[..., [0, -1]] = 0  # boundary values
    u, du, r, mu = (np.ascontiguousarray(x[slab.lo : slab.hi + 1]) for x in states)
    h = 1e-5
    of_state, of_control = c.gradient(u, z)
    slope = (c.value(u + h * du, z + h * dz) - c.value(u - h * du, z - h * dz)) / (2 * h)
    assert slope == pytest.approx(c.pairing(of_state, du) + layout.pairing(of_control, dz), rel=1e-6)
    # A du = r and A t = -c_z dz: the derivative of c along (du + t, dz) is r
    step, _ = c.solve_linearised(u, z, r, None)
    along, _ = c.tangent(u, z, dz, None)
    moved = [c.constraint(u + s * h * (step + along), z + s * h * dz) for s in (1, -1)]
    difference = (moved[0] - moved[1]) / (2 * h) - r
    assert np.abs(difference).max() < 1e-6 * np.abs(step).max()
    # <A^-T mu, r> = <mu, A^-1 r>, and the pairing of c_z^T lam
    lam, _ = c.solve_adjoint(u, z, mu, None)
    assert c.pairing(lam, r) == pytest.approx(c.pairing(mu, step), rel=1e-10)
    assert layout.pairing(c.control_adjoint(u, z, lam), dz) == pytest.approx(-c.pairing(mu, along), rel=1e-10)
    # second derivatives are symmetric, along tangents and along states
    hu, hz = c.lagrangian_hessian(u, z, lam, along, dz)
    second, _ = c.tangent(u, z, other, None)
    ku, kz = c.lagrangian_hessian(u, z, lam, second, other)
    left = c.pairing(hu, second) + layout.pairing(hz, other)
    assert left == pytest.approx(c.pairing(ku, along) + layout.pairing(kz, dz), rel=1e-9)

    # and those of the Lagrangian, by differences of its derivative along a tangent
    def derivative(at_u, at_z):
        own = c.gradient(at_u, at_z)
        moved = [c.constraint(at_u + e * h * along, at_z + e * h * dz) for e in (1, -1)]
        direct = c.pairing(own[0], along) + layout.pairing(own[1], dz)
        return direct + c.pairing(lam, moved[0] - moved[1]) / (2 * h)

    h = 1e-2
    difference = (derivative(u + h * second, z + h * other) - derivative(u - h * second, z - h * other)) / (2 * h)
    assert difference == pytest.approx(left, rel=1e-3)
    nu, nz = c.lagrangian_hessian(u, z, lam, du, None)
    difference = (derivative(u + h * du, z) - derivative(u - h * du, z)) / (2 * h)
    assert difference == pytest.approx(c.pairing(nu, along) + layout.pairing(nz, dz), rel=1e-3)
    assert c.inner_states(du, r) == pytest.approx((states[1] * states[2]).sum(), rel=1e-12)
    assert c.multiplier_norm(mu) == pytest.approx(np.linalg.norm(states[3]), rel=1e-12)


@pytest.mark.parallel(2)
def test_ranks_in_space():
    J = functional("burgers", pf.SpaceTime((2, 1)))
    result = J.minimize_newton_kkt(**TOLERANCES)
    assert result.converged
    assert "there are several ranks in space" in result.choice
    reference = J.minimize_trust_region(J.function(np.zeros(J.layout.size)), gtol_rel=1e-11)
    assert distance(J, result.x, reference.x) < 1e-8


# -- KKT systems of averaged operators ---------------------------------------------------------------------------------
@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize(("tableau", "rates"), [("BackwardEuler", True), ("SDIRK2", False)])
def test_the_averaged_kkt_system_of_a_linear_evolution_is_the_inverse_hessian(tableau, rates):
    """Two controls, one of them a real number, and a misfit that is larger at the end; rates of change are regularised,
    too.
    """
    J = functional("radiation", grid(), linear=True, tableau=tableau, real=True, rates=rates)
    averaged, z = AveragedKKT(J.problem), vectors(J, 2)
    averaged.move_to(J.problem.cache.state(z[0]).U, z[0])
    c = J.inner.dual(z[1])
    dz, iterations, residual = averaged.solve(c)
    assert 0 < iterations < (40 if rates else 20)
    assert residual < 1e-5
    found = J.problem.hessian_action(z[0], dz)
    assert np.abs(found - c).max() < 1e-5 * np.abs(c).max()
    assert averaged.updates == 1


@pytest.mark.parallel([1, 2])
def test_steps_with_averaged_operators_are_those_of_the_linear_evolution():
    J = functional("radiation", grid(), linear=True, tableau="SDIRK2")
    operators, z = AveragedOperators(J.problem.sweeps), vectors(J, 1)[0]
    operators.average(J.layout.steps(z), J.problem.cache.state(z).U)
    controls = J.evolution.parameters
    weights = ControlWeights(J.problem.sweeps.evolution, [J.problem.regularisation_hessian(c) for c in controls])
    model = AveragedModel(J.problem.sweeps, J.problem.misfits, weights, operators)
    propagator, rows = J.problem.sweeps.propagators[0], np.cos(np.arange(2 * model.size) ** 2).reshape(2, -1)
    for apply, transposed in ((propagator.apply, False), (propagator.apply_transposed, True)):
        expected = np.empty_like(rows)
        apply(rows, expected)
        np.testing.assert_allclose(model.step(rows, transposed=transposed), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", ["burgers", "radiation"])
def test_products_do_not_grow_as_the_weight_falls(name):
    """Hessian products of the whole run, with KKT systems for weights 1e-3 and 1e-7, and without."""
    counts = {}
    for weight, kkt in ((1e-3, "averaged"), (1e-7, "averaged"), (1e-7, "none")):
        J = functional(name, weight=weight)
        result = J.minimize_newton_kkt(kkt=kkt, gtol_rel=1e-6)
        assert result.converged
        assert not result.breakdown
        assert (max(record.kkt_iterations for record in result.history) > 0) == (kkt == "averaged")
        counts[weight, kkt] = result.hessian_calls
    assert counts[1e-7, "averaged"] < 2 * counts[1e-3, "averaged"]
    assert counts[1e-7, "none"] > 2 * counts[1e-7, "averaged"]


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (dict(per_step=False), "the control 'q' is not one with a value in each step"),
        (dict(initial=True), "the initial condition is not one with a value"),
        (dict(propagator=TapePropagator), "TapePropagator has no stages"),
        (dict(cubic=True), "a misfit has no second derivative"),
        (dict(weight=0.0), "there is no regularisation"),
    ],
)
def test_why_there_is_no_averaged_kkt_system_is_named(given, why):
    J = functional("burgers", n=3, steps=2, **given)
    with pytest.raises(InputError, match=f"kkt='averaged': .*{why}.*; give kkt='auto'"):
        J.minimize_newton_kkt(kkt="averaged")
    result = J.minimize_newton_kkt(max_it=1)
    assert "conjugate gradients without preconditioner, as" in result.choice
    assert why in result.choice


# -- breakdowns --------------------------------------------------------------------------------------------------------
@pytest.mark.parallel([1, 2])
def test_a_kkt_iteration_that_does_not_contract_hands_over(monkeypatch):
    def solve(self, c):
        raise SolverFailure("GMRES stopped after 40 iterations at a residual of 9.0e-01")

    monkeypatch.setattr(AveragedKKT, "solve", solve)
    J, lines = functional("burgers", grid()), []
    result = J.minimize_newton_kkt(monitor=lines.append, **TOLERANCES)
    assert result.converged
    assert result.handed_over == "reduced trust region"
    assert "GMRES stopped after 40 iterations at a residual of 9.0e-01" in result.breakdown
    assert result.breakdown in result.message
    assert "then the reduced trust region" in result.choice
    assert 0 < result.composite_steps < result.iterations
    assert [record.iteration for record in result.history] == list(range(result.iterations + 1))
    if J.spacetime.is_root:
        assert any("hands over to the reduced trust region, from the last control" in line for line in lines)
    assert distance(J, result.x, expected("burgers").x) < 1e-8


def test_composite_steps_without_progress_hand_over():
    """Unstable growth over a long time: the constraint at distant controls can hardly be linearised."""
    given = dict(n=3, weight=1e-4, steps=10, dt=0.12)
    J = functional("reaction", **given)
    result = J.minimize_newton_kkt(gtol_rel=1e-10, max_it=80)
    assert result.converged
    assert "in 12 iterations" in result.breakdown
    assert result.handed_over == "reduced trust region"
    reference = functional("reaction", **given).minimize_trust_region(gtol_rel=1e-10, max_it=80)
    assert distance(J, result.x, reference.x) < 1e-8


def test_arguments_that_do_not_fit():
    J = functional("burgers")
    with pytest.raises(InputError, match="first_state"):
        J.minimize_newton_kkt(first_state="guessed")
    with pytest.raises(InputError, match="eta"):
        J.minimize_newton_kkt(eta=3)
    with pytest.raises(InputError, match="sum"):
        (J + functional("burgers")).minimize_newton_kkt()
    with pytest.raises(InputError, match="storage"):
        functional("burgers", mgrit={"storage": "C", "coarsening": (2,)}).minimize_newton_kkt()

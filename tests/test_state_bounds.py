"""Bounds on the state: the penalty against Firedrake's own forms, its minimisers against dense quadratic programs."""

import numpy as np
import pytest
from firedrake import (
    Constant,
    Function,
    FunctionSpace,
    SpatialCoordinate,
    TestFunction,
    VectorFunctionSpace,
    assemble,
    conditional,
    cos,
    ds,
    dx,
    grad,
    gt,
    inner,
    split,
)
from irksome import Dt
from mpi4py import MPI
from scipy.optimize import nnls
from ufl.domain import extract_unique_domain

import pint_fem as pf
from tests.meshes import square
from tests.ranks import cases
from tests.test_active_set_control import DT, Dense, control_of_heat

UPPER = 0.04


@pytest.fixture(scope="module")
def dense():
    return Dense()


def quadratic_program(H, b, S, upper):
    """The minimiser of ``1/2 z.H z - b.z`` for ``S z <= upper``, by the least-distance problem of Lawson and Hanson
    (Solving Least Squares Problems, 1974, ch. 23), and which constraints are active.
    """
    L = np.linalg.cholesky(H)
    free = np.linalg.solve(H, b)
    G, h = -np.linalg.solve(L, S.T).T, -(upper - S @ free)
    E, f = np.vstack([G.T, h]), np.append(np.zeros(len(b)), 1.0)
    multipliers, _ = nnls(E, f, maxiter=100 * len(b))
    r = E @ multipliers - f
    return free - np.linalg.solve(L.T, r[:-1] / r[-1]), multipliers > 0


# --- the penalty -----------------------------------------------------------------------------------------------------
def by_forms(J, z, y, upper, lower, gamma, measure):
    """The sum over the steps by assembled forms with the quadrature rule of the nodes."""
    total, V = 0.0, J.evolution.V
    u = Function(V)
    for number, block in J.problem.states(z):
        for i, row in enumerate(block):
            if number + i == 0:
                continue
            with u.dat.vec_wo as vec:
                vec.array[:] = row
            over, under = y(u) - upper, lower - y(u)
            form = conditional(gt(over, 0), over**2, 0) + conditional(gt(under, 0), under**2, 0)
            total += 0.5 * gamma * DT * assemble(form * measure)
    return total


def test_value_is_that_of_nodal_quadrature(dense):
    """For piecewise linear functions the rule with the vertices as its points, by Firedrake's forms."""
    J = control_of_heat(pf.SpaceTime(), misfits=[lambda u: pf.StateBounds(u, upper=UPPER, lower=-0.05, gamma=30.0)])
    other = control_of_heat(pf.SpaceTime())
    z = 20 * np.cos(np.arange(len(dense.b)))
    expected = by_forms(J, z, lambda u: u, UPPER, -0.05, 30.0, dx(scheme="KMV", degree=1))
    assert expected > 1e-3
    assert J.problem.value(z) - other.problem.value(z) == pytest.approx(expected, rel=1e-10)


def mixed(st, kind):
    """A state with several components or fields and bounds on a combination, on a part of the boundary, in time."""
    mesh = square(3, st.space_comm)
    x, t = SpatialCoordinate(mesh), pf.time_function(mesh)
    if kind == "vector":
        V = VectorFunctionSpace(mesh, "CG", 2)
    elif kind == "mixed":
        V = FunctionSpace(mesh, "CG", 1) * FunctionSpace(mesh, "CG", 2)
    else:
        V = FunctionSpace(mesh, "CG", 2)
    u, v, q = Function(V), TestFunction(V), Function(FunctionSpace(mesh, "CG", 1), name="q")
    data = Function(FunctionSpace(mesh, "CG", 1), name="data").interpolate(0.01 * x[1])
    if kind == "vector":
        parts = u[0], u[1]
        form = inner(Dt(u), v) * dx + inner(grad(u), grad(v)) * dx - q * (v[0] + x[0] * v[1]) * dx
    elif kind == "mixed":
        parts, (v0, v1) = split(u), split(v)
        form = (Dt(parts[0]) * v0 + Dt(parts[1]) * v1) * dx - q * (v0 + x[0] * v1) * dx
        form += inner(grad(parts[0]), grad(v0)) * dx + inner(grad(parts[1]), grad(v1)) * dx
    else:
        parts = u, 0.5 * u
        form = Dt(u) * v * dx + inner(grad(u), grad(v)) * dx - q * v * dx
    ev = pf.Evolution(form, u, tableau=pf.SDIRK2(), dt=DT, nsteps=5, control=q, per_step=True, t=t)
    y = parts[0] - 2 * x[0] * parts[1] + data
    bounds = pf.StateBounds(
        y,
        upper=0.02 + 0.01 * cos(5 * t) * x[0],
        lower=-data,
        gamma=40.0,
        measure=ds(1) if kind == "mixed" else None,
    )
    J = pf.TimeParallelReducedFunctional(
        ev, [bounds], regularisation=0.5e-2 * q**2 * dx, spacetime=st, riesz_map="lumped",
        solver_parameters={"time_solver": "serial"},
    )  # fmt: skip
    return J, bounds, data


@pytest.mark.parallel([1, 2])
@pytest.mark.parametrize("kind", cases(["scalar", "vector", "mixed"], on_ranks=["vector"]))
def test_derivatives(kind):
    """First and second derivatives by finite differences where no point changes sides; batches of directions."""
    J, _, _ = mixed(pf.SpaceTime(), kind)
    problem, slab = J.problem, J.layout.slab
    drawn = [np.random.default_rng(7 + n).standard_normal((3, J.layout.size // max(slab.k, 1))) for n in range(5)]
    z, dz, other = (np.concatenate([drawn[n][i] for n in range(slab.lo, slab.hi)]) for i in range(3))
    h = 1e-6
    difference = (problem.value(z + h * dz) - problem.value(z - h * dz)) / (2 * h)
    assert J.layout.pairing(problem.derivative(z), dz) == pytest.approx(difference, rel=1e-6)
    H = problem.hessian_action(z, dz)
    steps = (problem.derivative(z + h * dz) - problem.derivative(z - h * dz)) / (2 * h)
    np.testing.assert_allclose(H, steps, rtol=0, atol=1e-6 * np.abs(H).max())
    for product, direction in zip(problem.hessian_actions(z, [dz, other]), (dz, other), strict=True):
        np.testing.assert_allclose(product, problem.hessian_action(z, direction), rtol=0, atol=1e-12)
    assert problem.value(z) > 1e-3


def test_data_are_read_again():
    J, bounds, data = mixed(pf.SpaceTime(), "vector")
    z = np.cos(np.arange(J.layout.size))
    before = J.problem.value(z) - J.problem.parts["regularisation"]
    bounds.gamma = 80.0
    assert "what is given to StateBounds" in J.update_data()
    J.problem.value(z)
    assert J.problem.parts["misfit"] == pytest.approx(2 * before, rel=1e-12)
    data.assign(1.0)
    J.update_data()
    J.problem.value(z)
    fresh, other, values = mixed(pf.SpaceTime(), "vector")
    values.assign(1.0)
    other.gamma = 80.0
    fresh.update_data()
    fresh.problem.value(z)
    assert J.problem.parts["misfit"] == fresh.problem.parts["misfit"] != pytest.approx(2 * before, rel=1e-3)


# --- minimisers ------------------------------------------------------------------------------------------------------
@pytest.mark.parallel([1, 2, 3])
def test_the_limit_is_the_quadratic_program(dense):
    """A state that is forced to its bound: minimisers and violations converge as 1/gamma."""
    x, active = quadratic_program(dense.H, dense.b, dense.S, np.full(len(dense.b), UPPER))
    free = np.linalg.solve(dense.H, dense.b)
    assert 5 < active.sum() < len(active) / 2
    assert (dense.S @ free).max() > 1.5 * UPPER
    lines, bounds = [], []

    def bound(u):
        bounds.append(pf.StateBounds(u, upper=UPPER, gamma=1e2))
        return bounds[0]

    J = control_of_heat(pf.SpaceTime(), misfits=[bound])
    path = pf.follow_penalty(J, bounds[0], last=1e7, gtol_rel=1e-9, cg_max_it=1000, monitor=lines.append)
    assert path.converged
    assert [record.gamma for record in path.history] == pytest.approx([1e2, 1e3, 1e4, 1e5, 1e6, 1e7])
    violations = np.array([record.violation for record in path.history])
    assert (violations[3:-1] / violations[4:] > 9).all()
    assert (violations[3:-1] / violations[4:] < 11).all()
    state = dense.S @ np.concatenate(MPI.COMM_WORLD.allgather(path.result.x))
    assert violations[-1] == pytest.approx((state - UPPER).max(), rel=1e-5)
    np.testing.assert_allclose(path.result.x, dense.own(J, x), atol=2e-3 * np.abs(x).max())
    assert bounds[0].gamma == 1e7
    assert sum("largest violation" in line for line in lines) == (6 if J.spacetime.is_root else 0)


def penalised(dense, gamma, upper):
    """The minimiser with a penalty, by Newton's method with dense algebra."""
    m = np.tile(dense.nodal, dense.steps) * DT * gamma
    z = np.zeros(len(dense.b))
    for _ in range(100):
        over = dense.S @ z - upper
        D = np.where(over > 0, m, 0.0)
        g = dense.H @ z - dense.b + dense.S.T @ (D * over)
        if np.abs(g).max() < 1e-14:
            return z
        z = z - np.linalg.solve(dense.H + dense.S.T @ (D[:, None] * dense.S), g)
    raise AssertionError("not converged")


@pytest.mark.parallel([1, 2])
def test_penalty_with_bounds_on_the_control(dense):
    """Without bounds on the control the dense minimiser; with them the first-order conditions."""
    J = control_of_heat(pf.SpaceTime(), misfits=[lambda u: pf.StateBounds(u, upper=UPPER, gamma=1e4)])
    result = J.minimize_active_set(gtol_rel=1e-9, cg_max_it=500)
    assert result.converged
    np.testing.assert_allclose(result.x, dense.own(J, penalised(dense, 1e4, UPPER)), atol=1e-6)
    both = J.minimize_active_set(bounds=(-0.2, 0.3), gtol_rel=1e-9, cg_max_it=500)
    assert both.converged
    g = J.inner.primal(J.problem.derivative(both.x))
    np.testing.assert_allclose(both.x, np.clip(both.x - g, -0.2, 0.3), atol=1e-7)
    other = J.minimize_trust_region(bounds=(-0.2, 0.3), gtol_rel=1e-9, cg_max_it=500)
    np.testing.assert_allclose(both.x, other.x, atol=1e-6)


def test_steps_that_do_not_settle_are_noticed():
    """A large penalty from afar with rough conjugate gradients; with the path the same functional is minimised."""
    bounds, lines = [], []

    def bound(u):
        bounds.append(pf.StateBounds(u, upper=UPPER, gamma=1e6))
        return bounds[0]

    J = control_of_heat(pf.SpaceTime(), misfits=[bound])
    start = J.controls[0].control
    J.minimize_active_set(start, cg_rtol=1e-2, gtol_rel=1e-9, max_it=14, cg_max_it=500, monitor=lines.append)
    assert any("8 active-set steps have changed the sets without coming closer" in line for line in lines)
    bounds[0].gamma = 1e3
    path = pf.follow_penalty(J, bounds[0], last=1e6, gtol_rel=1e-9, cg_max_it=500, start=J.function(np.zeros(112)))
    assert path.converged
    assert [record.gamma for record in path.history] == pytest.approx([1e3, 1e4, 1e5, 1e6])


def test_the_path_ends_where_the_bounds_are_satisfied():
    bounds = []

    def bound(u):
        bounds.append(pf.StateBounds(u, upper=10.0, gamma=1.0))
        return bounds[0]

    J = control_of_heat(pf.SpaceTime(), misfits=[bound])
    path = pf.follow_penalty(J, bounds[0], last=1e4)
    assert len(path.history) == 1
    assert path.history[0].violation == 0
    assert path.control is path.result.control
    assert "largest violation 0.000e+00" in str(path.history[0])


# --- what is refused -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give lower= or upper="),
        ({"upper": "1"}, "upper = '1'"),
        ({"upper": np.nan}, "upper = nan"),
        ({"upper": 1.0, "gamma": 0.0}, "gamma = 0.0"),
        ({"upper": 1.0, "gamma": np.inf}, "gamma = inf"),
        ({"upper": 1.0, "measure": 3}, "measure = 3"),
        ({"expression": 3.0, "upper": 1.0}, "scalar expression"),
        ({"expression": lambda u, q: grad(u), "upper": 1.0}, "scalar expression"),
    ],
)
def test_bad_arguments(arguments, message):
    u = Function(FunctionSpace(square(2, MPI.COMM_SELF), "CG", 1))
    given = arguments.pop("expression", lambda u, q: u)
    with pytest.raises(pf.InputError, match=message):
        pf.StateBounds(given(u, None) if callable(given) else given, **arguments)


REFUSED = {
    "not affine": (lambda u, q: pf.StateBounds(u**2, upper=1.0), "not affine"),
    "no state": (
        lambda u, q: pf.StateBounds(0 * q + 1.0 + SpatialCoordinate(extract_unique_domain(u))[0], upper=1.0),
        "state u",
    ),
    "control": (lambda u, q: pf.StateBounds(u + q, upper=1.0), "contains a control"),
    "bound with the control": (lambda u, q: pf.StateBounds(u, upper=q), "contains a control"),
    "bound with the state": (lambda u, q: pf.StateBounds(u, upper=2 * u), "contains the state"),
    "no number": (lambda u, q: pf.StateBounds(u, upper=0.0, lower=Constant(1.0)), "no number is between"),
    "nan": (lambda u, q: pf.StateBounds(u, upper=Constant(np.nan)), "no number is between"),
    "negative weights": (
        lambda u, q: pf.StateBounds(u, upper=1.0, space=FunctionSpace(extract_unique_domain(u), "CG", 4)),
        "negative weight",
    ),
    "vectors": (
        lambda u, q: pf.StateBounds(u, upper=1.0, space=VectorFunctionSpace(extract_unique_domain(u), "CG", 1)),
        "several components",
    ),
}


@pytest.mark.parallel([1, 2])
@pytest.mark.parametrize("name", REFUSED)
def test_refused_when_a_functional_is_made(name):
    make, message = REFUSED[name]
    st = pf.SpaceTime()
    mesh = square(2, st.space_comm)
    V = FunctionSpace(mesh, "CG", 1)
    u, q, v = Function(V), Function(V), TestFunction(V)
    form = Dt(u) * v * dx + inner(grad(u), grad(v)) * dx - q * v * dx
    ev = pf.Evolution(form, u, tableau=pf.BackwardEuler(), dt=DT, nsteps=4, control=q, per_step=True)
    with pytest.raises(pf.InputError, match=message):
        pf.TimeParallelReducedFunctional(
            ev, [make(u, q)], spacetime=st, solver_parameters={"time_solver": "serial"}
        )  # fmt: skip


def test_a_path_needs_the_bounds_of_the_functional():
    J = control_of_heat(pf.SpaceTime(), misfits=[lambda u: pf.StateBounds(u, upper=UPPER)])
    stranger = pf.StateBounds(J.evolution.u, upper=UPPER)
    with pytest.raises(pf.InputError, match="no such bounds"):
        pf.follow_penalty(J, stranger)
    with pytest.raises(pf.InputError, match="give the StateBounds"):
        pf.follow_penalty(J, 3)
    own = J.problem.misfits[1]
    with pytest.raises(pf.InputError, match="factor"):
        pf.follow_penalty(J, own, factor=1.0)
    with pytest.raises(pf.InputError, match="last"):
        pf.follow_penalty(J, own, last=np.inf)

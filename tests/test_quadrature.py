"""A form is integrated with the degree that it has as given: values, derivatives and residuals that are taken apart
agree with plain Firedrake where the data have jumps and no rule is exact.
"""

import numpy as np
import pytest
from firedrake import (
    COMM_SELF,
    DirichletBC,
    FiniteElement,
    Function,
    FunctionSpace,
    SpatialCoordinate,
    TestFunction,
    TestFunctions,
    VectorFunctionSpace,
    as_vector,
    assemble,
    conditional,
    cos,
    derivative,
    div,
    ds,
    dx,
    exp,
    grad,
    inner,
    sin,
    solve,
    split,
)
from irksome import Dt

import pint_fem as pf
from pint_fem.evolution.quadrature import with_fixed_degrees
from tests.limits import time_limit
from tests.meshes import square
from tests.ranks import cases

STEPS, DT = 4, 1 / 16
# the Jacobian that Firedrake derives has another degree than the residual: iterate
DIRECT = {"ksp_type": "preonly", "pc_type": "lu", "snes_rtol": 0, "snes_atol": 1e-14, "snes_stol": 0}


def jump(x, y):
    """Data that jump inside cells."""
    return conditional(x + 0.3 * y < 0.37, exp(x), 0.0)


def _mesh(n, comm):
    return square(n, comm)


def _residual(u, rate, v, q):
    """Conductivity and source with jumps, of other degrees than each other and the mass term."""
    x, y = SpatialCoordinate(v.function_space().mesh())
    d = jump(x, y)
    return (
        rate * v * dx + (1 + d) * inner(grad(u), grad(v)) * dx - (q * d + conditional(y < 0.4, sin(5 * x), 0)) * v * dx
    )


def _misfit(u):
    x, y = SpatialCoordinate(u.function_space().mesh())
    return (u - jump(x, y)) ** 2 * dx + (u - cos(3 * x)) ** 2 * ds(2) + 2 * (u - jump(y, x)) ** 2 * dx(degree=3)


def _penalty(q):
    x, y = SpatialCoordinate(q.function_space().mesh())
    return 0.1 * (q - jump(x, y)) ** 2 * dx


def _functional(V, st, **given):
    u, v, q = Function(V), TestFunction(V), Function(V, name="q")
    ev = pf.Evolution(
        _residual(u, Dt(u), v, q), u, tableau=pf.BackwardEuler(), dt=DT, nsteps=STEPS, control=q,
        bcs=DirichletBC(V, 0, 1), **given,
    )  # fmt: skip
    misfits = [pf.TerminalMisfit(_misfit(u)), pf.RunningMisfit(_misfit(u))]
    parameters = {"time_solver": "serial"}
    return pf.TimeParallelReducedFunctional(
        ev, misfits, regularisation=_penalty(q), spacetime=st, solver_parameters=parameters
    )


def _plain(V, q):
    """``J`` by plain Firedrake, every form assembled as it is written."""
    u, new, J = Function(V), Function(V), assemble(_penalty(q))
    for _ in range(STEPS):
        F = _residual(new, (new - u) / DT, TestFunction(V), q)
        solve(F == 0, new, bcs=DirichletBC(V, 0, 1), solver_parameters=DIRECT)
        u.assign(new)
        J += DT * assemble(_misfit(u))
    return J + assemble(_misfit(u))


def _control(V, n):
    x, y = SpatialCoordinate(V.mesh())
    return Function(V).interpolate(5 * cos(n + x) * (1 + y))


def _pairing(dual, primal) -> float:
    with dual.dat.vec_ro as a, primal.dat.vec_ro as b:
        return a.dot(b)


@pytest.mark.slow_on_ranks
@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize("grid", cases(["1x1"], on_ranks=["3x1", "1x3"]))
@time_limit(120)
def test_values_are_those_of_the_forms_as_given(grid):
    st = pf.SpaceTime(grid)
    V = FunctionSpace(_mesh(4, st.space_comm), "CG", 1)
    rf, q, dq = _functional(V, st), _control(V, 0), _control(V, 1)
    J = _plain(V, q)
    assert abs(rf(q) - J) < 1e-12 * J
    # J is quadratic: differences over any distance are exact
    plus, minus = (_plain(V, Function(V).assign(q + s * dq)) for s in (1, -1))
    rf(q)
    assert abs(_pairing(rf.derivative(), dq) - (plus - minus) / 2) < 1e-10 * J
    assert abs(_pairing(rf.hessian(dq), dq) - (plus - 2 * J + minus)) < 1e-10 * J


def test_sum_of_squares_is_positive():
    """Put together of parts of other degrees it was -0.0066 and 0.0114."""
    for n, expected in (4, 0.03231), (16, 0.00803):
        mesh = _mesh(n, COMM_SELF)
        V = FunctionSpace(mesh, "CG", 1)
        x, _ = SpatialCoordinate(mesh)
        d = conditional(x < 0.3, cos(x), 0.0)
        u, v, q = Function(V).project(d), TestFunction(V), Function(V)
        ev = pf.Evolution(Dt(u) * v * dx - q * v * dx, u, tableau=pf.BackwardEuler(), dt=1.0, nsteps=1, control=q)
        rf = pf.TimeParallelReducedFunctional(
            ev, pf.TerminalMisfit((u - d) ** 2 * dx), solver_parameters={"time_solver": "serial"}
        )
        J = rf(q)
        assert J == pytest.approx(expected, abs=1e-5)
        assert J == pytest.approx(assemble((u - d) ** 2 * dx), rel=1e-12)


def test_form_with_fixed_degrees_is_assembled_alike():
    mesh = _mesh(3, COMM_SELF)
    x, y = SpatialCoordinate(mesh)
    V = FunctionSpace(mesh, "CG", 2)
    at_points = Function(FunctionSpace(mesh, FiniteElement("Quadrature", mesh.ufl_cell(), 3))).interpolate(x)
    u, d = Function(V).interpolate(sin(5 * x)), jump(x, y)
    for form in (
        u**2 * dx - 2 * u * d * dx + d**2 * dx,  # one degree for all: they are one integrand
        abs(u - d) * ds + (u - d) ** 2 * ds(1) + exp(x * y) * (u - d) ** 2 * ds((1, 2)) + abs(u - d) * ds(2, degree=3),
        (u - at_points) ** 2 * dx,
    ):
        fixed = with_fixed_degrees(form)
        assert abs(assemble(form) - assemble(fixed)) < 1e-15
        assert all("quadrature_degree" in integral.metadata() for integral in fixed.integrals())
        gradient = derivative(fixed, u)
        assert {i.metadata()["quadrature_degree"] for i in gradient.integrals()} == {
            i.metadata()["quadrature_degree"] for i in fixed.integrals()
        }
    W = VectorFunctionSpace(mesh, "CG", 2) * FunctionSpace(mesh, "CG", 1)
    z, (w, p) = Function(W).interpolate(as_vector([sin(3 * x), cos(4 * y), x * y])), TestFunctions(W)
    a, b = split(z)
    form = inner(exp(a[0]) * grad(a), grad(w)) * dx + inner(d * a, w) * dx + p * div(a) * exp(b) * abs(x - 0.3) * dx
    pair = assemble(form), assemble(with_fixed_degrees(form))
    for one, other in zip(*(f.subfunctions for f in pair), strict=True):  # blocks have degrees of their own
        assert np.abs(one.dat.data_ro - other.dat.data_ro).max() < 1e-15

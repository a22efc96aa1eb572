"""Optimal control problems as users pose them: minimisers by KKT systems beside dense algebra, and what is refused."""

import numpy as np
import pytest
from firedrake import (
    DirichletBC,
    Function,
    FunctionSpace,
    SpatialCoordinate,
    TestFunction,
    TestFunctions,
    TrialFunction,
    assemble,
    ds,
    dx,
    grad,
    inner,
    split,
)
from firedrake.petsc import PETSc
from irksome import Dt
from mpi4py import MPI

import pint_fem as pf
from pint_fem.adjoint.minimisation.kkt.preconditioner import KKTPreconditioner
from tests.meshes import square

DT = 0.05


def heat(st, *, steps=5, weight=1e-4, n=8, misfit=pf.RunningMisfit, cubic=0.0, where=dx, entry=dx, form=None):
    """Backward Euler for a plate with a cold wall and a source that is a field in each step.

    ``where`` and ``entry``: measures of the regularisation and of the control's load.
    """
    V = FunctionSpace(square(n, st.space_comm), "CG", 1)
    u, v, q = Function(V), TestFunction(V), Function(V, name="q")
    x, y = SpatialCoordinate(V.mesh())
    F = Dt(u) * v * dx + 0.1 * inner(grad(u), grad(v)) * dx - q * v * entry
    F = F + cubic * u**3 * v * dx if cubic else F
    bcs = DirichletBC(V, 0, 1)
    ev = pf.Evolution(
        F, u, tableau=pf.BackwardEuler(), dt=DT, nsteps=steps, control=q, per_step=True, bcs=bcs
    )  # fmt: skip
    return pf.TimeParallelReducedFunctional(
        ev, misfit((u - x * y) ** 2 / 2 * dx), regularisation=0.5 * weight * q**2 * where, spacetime=st,
        solver_parameters={"time_solver": "serial"},
    )  # fmt: skip


def dense_heat(*, steps=5, weight=1e-4, n=8, terminal=False, where=dx, entry=dx):
    """The minimiser of the same problem by numpy, ``(steps, n)``."""
    V = FunctionSpace(square(n, MPI.COMM_SELF), "CG", 1)
    u, v = TrialFunction(V), TestFunction(V)
    x, y = SpatialCoordinate(V.mesh())
    M, K = (assemble(a).M.values for a in (u * v * dx, 0.1 * inner(grad(u), grad(v)) * dx))
    B, R = (assemble(u * v * measure).M.values for measure in (entry, where))
    target = np.linalg.solve(M, assemble(x * y * v * dx).dat.data_ro)
    free = np.setdiff1d(np.arange(len(M)), DirichletBC(V, 0, 1).nodes)
    A = (M + DT * K)[np.ix_(free, free)]
    Phi, Psi = np.linalg.solve(A, M[np.ix_(free, free)]), np.linalg.solve(A, DT * B[free])
    S = np.zeros((steps, len(M), steps, len(M)))
    for m in range(steps):
        power = Psi
        for i in range(m, steps):
            S[i, free, m] = power
            power = Phi @ power
    S = S.reshape(steps * len(M), -1)
    weights = np.full(steps, DT)
    if terminal:
        weights = np.eye(steps)[-1]
    Q = np.kron(np.diag(weights), M)
    H = S.T @ Q @ S + weight * DT * np.kron(np.eye(steps), R)
    return np.linalg.lstsq(H, S.T @ Q @ np.tile(target, steps), rcond=1e-15)[0].reshape(steps, -1)


def dense_hessian(weight, *, steps=5, n=8):
    """The matrix of second derivatives by all steps' controls, by numpy."""
    V = FunctionSpace(square(n, MPI.COMM_SELF), "CG", 1)
    u, v = TrialFunction(V), TestFunction(V)
    M, K = (assemble(a).M.values for a in (u * v * dx, 0.1 * inner(grad(u), grad(v)) * dx))
    free = np.setdiff1d(np.arange(len(M)), DirichletBC(V, 0, 1).nodes)
    A = (M + DT * K)[np.ix_(free, free)]
    power, Phi, blocks = np.linalg.solve(A, DT * M[free]), np.linalg.solve(A, M[np.ix_(free, free)]), []
    for _ in range(steps):
        blocks.append(power)
        power = Phi @ power
    zero = np.zeros_like(power)
    S = np.block([[blocks[i - m] if i >= m else zero for m in range(steps)] for i in range(steps)])
    Q = DT * np.kron(np.eye(steps), M[np.ix_(free, free)])
    return S.T @ Q @ S + weight * DT * np.kron(np.eye(steps), M)


def own(J, z):
    """The part of the controls of all steps that belongs to this rank in time."""
    return z[J.layout.slab.lo : J.layout.slab.hi].ravel()


def assert_close(J, x, z, rtol=1e-6):
    np.testing.assert_allclose(x, own(J, z), rtol=0, atol=rtol * np.abs(z).max())


@pytest.mark.parallel([1, 2])
@pytest.mark.parametrize("method", ["kkt", "auto"])
def test_a_terminal_misfit_and_an_odd_number_of_steps(method):
    """The frequency with the real shift -1 has a double pole in its partial fractions: other systems solve it."""
    J = heat(pf.SpaceTime(), misfit=pf.TerminalMisfit)
    result = J.minimize(method, gtol_rel=1e-10)
    assert result.converged
    assert "coupled systems" in result.choice
    assert_close(J, result.x, dense_heat(terminal=True))


def test_a_control_in_the_first_equation_of_a_wave():
    """The state of a frequency does not vanish at infinity of its pencil: the minimiser is that of the trust region."""
    st = pf.SpaceTime()
    result = wave(st).minimize("kkt", gtol_rel=1e-10)
    other = wave(st).minimize_trust_region(preconditioner="regularisation", gtol_rel=1e-11, cg_max_it=2000)
    assert result.converged
    assert "coupled systems" in result.choice
    np.testing.assert_allclose(result.x, other.x, atol=1e-7 * np.abs(other.x).max())


def wave(st, *, steps=8):
    """Implicit midpoint for a membrane, whose displacement has a source."""
    V = FunctionSpace(square(8, st.space_comm), "CG", 1)
    W = V * V
    w, q = Function(W), Function(V)
    (u, p), (a, b), (x, y) = split(w), TestFunctions(W), SpatialCoordinate(V.mesh())
    F = Dt(u) * a * dx - p * a * dx + Dt(p) * b * dx + inner(grad(u), grad(b)) * dx - q * a * dx
    w.subfunctions[0].interpolate(x * (1 - x) * y * (1 - y))
    ev = pf.Evolution(
        F, w, tableau=pf.ImplicitMidpoint(), dt=DT, nsteps=steps, control=q, per_step=True,
        bcs=[DirichletBC(W.sub(i), 0, "on_boundary") for i in (0, 1)],
    )  # fmt: skip
    return pf.TimeParallelReducedFunctional(
        ev, pf.RunningMisfit(u**2 / 2 * dx), regularisation=5e-5 * q**2 * dx, spacetime=st,
        solver_parameters={"time_solver": "serial"},
    )  # fmt: skip


@pytest.mark.parallel([1, 2])
@pytest.mark.parametrize(("weight", "error"), [(1e-4, 1e-7), (1e-8, 1e-6), (1e-12, 1e-3)])
def test_kkt_solves_are_the_inverse_hessian_for_small_weights(weight, error):
    """Where the control is a small difference of the right-hand side and the adjoint's part of it."""
    J = heat(pf.SpaceTime(), weight=weight)
    inverse = KKTPreconditioner(J)
    z = np.random.default_rng(0).standard_normal(len(dense_hessian(weight))).reshape(5, -1)
    dual = (dense_hessian(weight) @ z.ravel()).reshape(z.shape)
    found = inverse(J.inner.primal(own(J, dual)))
    assert "shifted systems" in inverse.how
    np.testing.assert_allclose(found, own(J, z), atol=error * np.abs(z).max())


@pytest.mark.parallel([1, 2])
def test_a_weight_of_the_control_below_the_accuracy_of_the_solves():
    J = heat(pf.SpaceTime(), weight=1e-12)
    result = J.minimize("kkt", gtol_rel=1e-8)
    assert result.converged
    value = J(J.function(own(J, dense_heat(weight=1e-12))))
    assert result.value == pytest.approx(value, rel=1e-6)


@pytest.mark.parallel([1, 2])
@pytest.mark.parametrize(("method", "weight"), [("kkt", 1e-3), ("auto", 1e-3), ("auto", 10.0)])
def test_a_flux_that_is_regularised_on_the_boundary_only(method, weight):
    """Values in the domain are in neither the load nor the regularisation: the coupled system is singular, and so is
    the regularisation, which preconditions nothing.
    """
    J = heat(pf.SpaceTime(), where=ds(2), entry=ds(2), weight=weight)
    result = J.minimize(method, gtol_rel=1e-10)
    assert result.converged
    assert ("singular" in result.choice) == (weight < 1)  # few steps of conjugate gradients need no KKT system
    assert result.choice.startswith("trust-region")
    wall = DirichletBC(J.evolution.V, 0, 2).nodes  # the other values have no effect
    z = dense_heat(where=ds(2), entry=ds(2), weight=weight)
    rows = result.x.reshape(-1, z.shape[1])[:, wall]
    np.testing.assert_allclose(rows, own(J, z[:, wall]).reshape(rows.shape), atol=1e-5 * np.abs(z).max())


@pytest.mark.parametrize(
    ("method", "given", "message"),
    [
        ("kkt", {"gtol_rel": "small"}, "gtol_rel"),
        ("one-shot", {"bounds": (0, 1)}, "bounds=: use 'trust-region'"),
        ("one-shot", {"l1": 1e-3}, "l1=: use 'kkt'"),
        ("map", {"l1": 1e-3}, "l1=: use 'kkt'"),
        ("trust-region", {"l1": 1e-3}, "l1=: use 'kkt'"),
    ],
)
def test_what_a_method_does_not_have_is_refused(method, given, message):
    with pytest.raises(pf.InputError, match=message):
        heat(pf.SpaceTime(), n=3).minimize(method, **given)


def test_options_that_the_method_does_not_read_are_refused():
    options = PETSc.Options()
    options["kkt_ksp_rtol"] = 1e-3
    try:
        with pytest.raises(pf.InputError, match=r"-kkt_ksp_rtol: .*solve_kkt reads it"):
            heat(pf.SpaceTime()).minimize("kkt")
    finally:
        options.delValue("kkt_ksp_rtol")


def test_a_negative_weight_is_refused():
    """Such a functional may have no minimiser, and the regularisation preconditions nothing."""
    with pytest.raises(pf.InputError, match="not positive"):
        heat(pf.SpaceTime(), n=3, weight=-1e-4).minimize("kkt")


def test_sparse_controls_without_kkt_systems():
    """The L1 norm is minimised by active sets, also where there are no KKT systems."""
    J = heat(pf.SpaceTime(), n=3, cubic=1.0)
    result = J.minimize("auto", l1=1e-3, gtol_rel=1e-8)
    assert result.converged
    assert result.choice.startswith("active sets")
    lumped = heat(pf.SpaceTime(), n=3, cubic=1.0).minimize_active_set(l1=1e-3, gtol_rel=1e-8)
    np.testing.assert_allclose(result.x, lumped.x, atol=1e-9)
    assert 0 < np.count_nonzero(result.x) < result.x.size

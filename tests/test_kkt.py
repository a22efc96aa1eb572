"""KKT systems of all steps: transform, partial fractions, solves, minimisation; against numpy and the trust region."""

import logging

import numpy as np
import pytest
from firedrake import TestFunction, TrialFunction, assemble, dx, grad, inner
from mpi4py import MPI

import pint_fem as pf
from pint_fem.adjoint.minimisation.kkt.preconditioner import KKTPreconditioner
from pint_fem.errors import InputError
from pint_fem.evolution.tableaux import DIRK
from pint_fem.kkt.operator import KKTOperator
from pint_fem.kkt.partial_fractions import FieldCoefficients, partial_fractions, small_pencil
from pint_fem.kkt.transform import SkewCirculant
from pint_fem.misfits.base import hessian_products
from tests.heat import TABLEAUX
from tests.kkt_problems import cavity, convection, tracking

COMM_SELF = MPI.COMM_SELF


def alone():
    return pf.SpaceTime("1x1", comm=COMM_SELF)


# -- the transform -----------------------------------------------------------------------------------------------------
@pytest.mark.parallel([1, 2, 3])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 8, 12])
def test_the_transform_is_the_sum_that_defines_it(steps):
    comm = MPI.COMM_WORLD
    bounds = np.linspace(0, steps, comm.size + 1).astype(int).tolist()
    rows = np.random.default_rng(1).standard_normal((steps, 37))
    transform = SkewCirculant(steps, 37, comm=comm, bounds=bounds)
    own = slice(bounds[comm.rank], bounds[comm.rank + 1])
    spectrum = transform.forward(rows[own]).copy()
    # numbers k of the frequencies from the eigenvalues exp(-i pi (2k + 1) / N) of the shift
    angles = -np.angle(transform.mu)
    expected = np.exp(-1j * np.outer(angles, np.arange(1, steps + 1))) @ rows
    mine = slice(transform.own.start, transform.own.stop)
    np.testing.assert_allclose(spectrum, expected[mine], atol=1e-12)
    np.testing.assert_allclose(transform.backward(spectrum), rows[own], atol=1e-13)
    for step in {1, steps}:
        total = comm.allreduce((transform.weights(step)[mine] @ spectrum).real)
        np.testing.assert_allclose(total, rows[step - 1], atol=1e-12)
    odd = sorted(round(a * steps / np.pi) for a in angles)
    assert all(k % 2 == 1 for k in odd)
    pairs = {min(k, 2 * steps - k) for k in odd}
    assert len(pairs) == (steps + 1) // 2  # no frequency and its conjugate


# -- partial fractions -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("tableau", TABLEAUX)
@pytest.mark.parametrize("weight", [1.0, 1e-4, 1e-8])
@pytest.mark.parametrize(("steps", "largest", "allowed"), [(32, 1e5, 1e-9), (256, 5e3, 1e-8)])
def test_partial_fractions_are_the_inverse_of_the_small_pencil(tableau, weight, steps, largest, allowed):
    dirk, dt, one = DIRK(TABLEAUX[tableau]()), 1 / steps, np.eye(1)
    mu = np.exp(-1j * np.pi * (2 * np.arange(steps) + 1) / steps)[::2]
    fields = FieldCoefficients(one, 0 * one, one, dt * one, one / (dt * weight))
    found = partial_fractions(dirk, dt, fields, np.ones(len(mu)), mu, largest)
    assert found.poles.shape[1] == 2 * dirk.stages
    # the state vanishes at infinity for a right-hand side of the adjoint
    assert np.abs(found.constant[:, 0, 1]).max() <= 1e-14 * np.abs(found.constant).max()
    kappa = 10 ** np.random.default_rng(0).uniform(-1, np.log10(largest), 40)
    for k in range(len(mu)):
        L0, L1, end = small_pencil(dirk, dt, fields, fields.c, mu[k])
        right, taken, s = np.zeros((len(L0), 3)), np.zeros((len(L0), 3)), dirk.stages
        right[end, [0, 1]] = taken[end, [0, 1]] = 1
        right[:s, 2] = taken[s + 1 : -1, 2] = dt * dirk.diagonal  # the load of all stages, and its transpose
        T = np.array([taken.T @ np.linalg.solve(L0 + dt * x * L1, right) for x in kappa])
        terms = np.einsum("ij,jo,jq->ioq", 1 / (kappa[:, None] - found.poles[k]), found.outputs[k], found.inputs[k])
        error = np.abs(found.constant[k] + terms - T).max(axis=(1, 2)) / np.abs(T).max(axis=(1, 2))
        assert error.max() < allowed


# -- solves ------------------------------------------------------------------------------------------------------------
CASES = {
    "pencil": (dict(case="field", terminal=True), "4 shifted systems"),
    "one stage": (dict(case="field", tableau="BE", steps=7), "2 shifted systems"),
    "two fields": (dict(case="wave", tableau="midpoint"), "2 shifted systems"),
    "few controls": (dict(case="walls", terminal=True), "Hessians of 4"),
    "nonsymmetric": (dict(case="convection"), "Hessians of 25"),
    "coupled": (dict(case="convection", n=8), "coupled systems"),
    "rates of few": (dict(case="walls", rate=1e-3, steps=7), "Hessians of 4"),
    "rates": (dict(case="field", rate=1e-5, n=8, tableau="BE"), "coupled systems"),
}


def operator(J):
    """The KKT operator of a linear problem, which takes one step of all states."""
    P, z = J.problem, np.zeros(J.layout.size)
    P.value(z)
    U = P.evaluations[0].U
    source = lambda dU, dz: (sum(hessian_products(m, U, dU) for m in P.misfits), None)
    return KKTOperator(P.sweeps, P.layout, z, U, source, lambda dz: P.regularisation.hessian(z, dz))


def random_rows(J, seed):
    P = J.problem
    rng = np.random.default_rng((seed, P.spacetime.space_comm.rank))
    sizes = P.sweeps.evolution.state_size, P.sweeps.evolution.control_size
    rows = [rng.standard_normal((P.evolution.nsteps, size)) for size in (sizes[0], sizes[0], sizes[1])]
    own = slice(P.sweeps.slab.lo, P.sweeps.slab.hi)
    return [part[own].copy() for part in rows]


@pytest.mark.parallel([1, 2, 3, 4])
@pytest.mark.parametrize("case", CASES)
def test_solutions_satisfy_the_kkt_system(case):
    options, how = CASES[case]
    J = tracking(pf.SpaceTime(space=1), **options)
    P, systems = J.problem, KKTPreconditioner(J, rtol=1e-11)
    assert how in systems.how
    a, b, c = random_rows(J, 3)
    conditions = P.sweeps.propagators[0].bc_rows
    a[:, conditions] = b[:, conditions] = 0
    found = systems.kkt.solve(a, b, c)
    controls = P.sweeps.evolution.split_controls(found.z)
    results = operator(J)(found.u, P.layout.join(controls), found.lam)
    results[1][:, conditions] = 0
    for result, expected, scale in zip(results, (a, b, None), (found.u, found.lam, 1), strict=True):
        if expected is not None:
            size = MPI.COMM_WORLD.allreduce(np.abs(scale).max(initial=1.0), op=MPI.MAX)
            np.testing.assert_allclose(result, expected, atol=1e-8 * size)
    np.testing.assert_allclose(P.layout.steps(results[2]), c, atol=1e-8 * max(np.abs(c).max(initial=0), 1e-300))


@pytest.mark.parallel(4)
@pytest.mark.parametrize("case", ["pencil", "few controls", "two fields"])
def test_the_inverse_hessian_on_a_grid_of_two_by_two(case):
    J = tracking(pf.SpaceTime("2x2"), **CASES[case][0])
    systems = KKTPreconditioner(J)
    _, _, c = random_rows(J, 5)
    g = J.inner.primal(J.layout.join(J.problem.sweeps.evolution.split_controls(c)))
    back = J.inner.primal(J.problem.hessian_action(np.zeros(J.layout.size), systems(g)))
    error = np.sqrt(J.inner.inner(back - g, back - g) / J.inner.inner(g, g))
    assert error < 1e-6


def test_the_minimiser_is_that_of_a_dense_system():
    """Backward Euler in numpy: J = sum dt/2 |u_n - d_n|^2_M + sum dt weight/2 |q_n|^2_M."""
    J = tracking(alone(), "field", tableau="BE", steps=6, weight=1e-5)
    V, ev = J.evolution.V, J.evolution
    u, v = TrialFunction(V), TestFunction(V)
    M, K = (assemble(form, mat_type="aij").petscmat[:, :] for form in (u * v * dx, inner(grad(u), grad(v)) * dx))
    free = np.ones(len(M), bool)
    free[J.problem.sweeps.propagators[0].bc_rows] = False
    S, N, n, dt = (M + ev.dt * K)[np.ix_(free, free)], ev.nsteps, len(M), ev.dt
    step, load = np.linalg.inv(S) @ M[np.ix_(free, free)], dt * np.linalg.inv(S) @ M[free]
    G = np.zeros((N, free.sum(), N, n))
    for j in range(N):
        response = load
        for i in range(j, N):
            G[i, :, j] = response
            response = step @ response
    G = G.reshape(N * free.sum(), N * n)
    # the target's load follows from the derivative of J at zero, where states vanish
    target = -np.array([J.problem.misfits[0].gradient(np.zeros((N + 1, n)))[1:]])[0][:, free].ravel()
    H = G.T @ np.kron(dt * np.eye(N), M[np.ix_(free, free)]) @ G + 1e-5 * dt * np.kron(np.eye(N), M)
    expected = np.linalg.solve(H, G.T @ target)
    result = J.minimize("kkt", gtol_rel=1e-9)
    assert result.converged
    assert result.choice.startswith("kkt")
    np.testing.assert_allclose(result.x, expected, atol=1e-7 * np.abs(expected).max())


@pytest.mark.parallel([1, 2, 3])
@pytest.mark.parametrize("case", ["field", "walls", "wave", "convection"])
@pytest.mark.parametrize("solver", ["serial", "paradiag"])
def test_the_minimiser_is_that_of_the_trust_region(case, solver):
    st = pf.SpaceTime(space=1)
    given = dict(tableau="midpoint" if case == "wave" else "SDIRK2", weight=1e-3, terminal=True)
    J = tracking(st, case, solver=solver, **given)
    result = J.minimize("kkt", gtol_rel=1e-9)
    reduced = tracking(st, case, solver=solver, **given).minimize_trust_region(gtol_rel=1e-11, cg_max_it=1000)
    assert result.converged
    assert "KKT system" in result.choice
    difference, size = result.x - reduced.x, np.sqrt(J.inner.inner(reduced.x, reduced.x))
    assert np.sqrt(J.inner.inner(difference, difference)) < 1e-8 * size
    assert sum(record.cg_iterations for record in result.history) <= 3


# -- iterations --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("tableau", ["BE", "SDIRK2"])
@pytest.mark.parametrize("weight", [1.0, 1e-2, 1e-4, 1e-8])
def test_iterations_for_heat_do_not_depend_on_weight_steps_and_mesh(tableau, weight):
    for n, steps, degree in ((3, 16, 1), (6, 48, 1), (3, 16, 2)):
        J = tracking(alone(), "field", n=n, steps=steps, tableau=tableau, weight=weight, degree=degree)
        systems = KKTPreconditioner(J)
        z = np.zeros(J.layout.size)
        systems(J.inner.primal(J.problem.derivative(z)))
        assert 0 < systems.kkt.iterations <= 14


@pytest.mark.parametrize("weight", [1e-2, 1e-5])
def test_circulant_preconditioners_of_the_reduced_space(weight):
    given = dict(n=6, steps=32, weight=weight)
    J = tracking(alone(), "field", **given)
    options = dict(gtol_rel=1e-8, cg_rtol=1e-9, cg_max_it=500)
    result = J.minimize_trust_region(preconditioner="circulant", **options)
    plain = tracking(alone(), "field", **given).minimize_trust_region(**options)
    assert result.converged
    assert plain.converged
    steps = [sum(record.cg_iterations for record in r.history) for r in (result, plain)]
    assert steps[0] <= 14
    assert weight > 1e-4 or steps[1] > 3 * steps[0]
    assert np.linalg.norm(result.x - plain.x) < 1e-4 * np.linalg.norm(plain.x)


def test_waves_with_a_large_weight_are_handed_over_by_name():
    J = tracking(alone(), "wave", tableau="midpoint", n=10, steps=64, weight=1.0)
    result = J.minimize("kkt")
    assert result.converged
    assert "in the place of kkt" in result.choice
    assert "GMRES for the ends of time" in result.choice
    assert sum(record.cg_iterations for record in result.history) <= 10


# -- the choice --------------------------------------------------------------------------------------------------------
def test_auto_chooses_the_kkt_system_and_says_why(caplog):
    with caplog.at_level(logging.INFO, logger="pint_fem"):
        result = tracking(alone(), "wave", tableau="midpoint", n=6, steps=32, weight=1e-7).minimize("auto")
        few = tracking(alone(), "wave", tableau="midpoint", weight=1.0).minimize("auto")
    assert result.converged
    assert result.choice.startswith("kkt, as the misfits are the same at all steps and it is faster")
    assert "minimize auto: kkt" in caplog.text
    assert few.converged
    assert few.choice.startswith("trust-region, as conjugate gradients take about")
    assert sum(record.cg_iterations for record in few.history) <= 12


REFUSED = {
    "static control": (lambda: convection(alone(), static=True), "a control has no value in each step"),
    "odd midpoint": (lambda: tracking(alone(), "field", tableau="midpoint", steps=7), "number of steps has to be even"),
    "no misfit but the last": (lambda: convection(alone(), tracked=0), None),
}


@pytest.mark.parametrize("case", REFUSED)
def test_problems_without_a_kkt_system_are_refused_by_name(case):
    make, words = REFUSED[case]
    if words is None:  # the last point alone: the circulant system has no misfit, and the result is right
        J = make()
        result = J.minimize("kkt", gtol_rel=1e-8)
        reduced = make().minimize_trust_region(gtol_rel=1e-10, cg_max_it=1000)
        assert result.converged
        assert np.linalg.norm(result.x - reduced.x) < 1e-6 * np.linalg.norm(reduced.x)
        return
    with pytest.raises(InputError, match=words):
        make().minimize("kkt")
    result = make().minimize("auto", gtol_rel=1e-3)
    assert result.choice.startswith("trust-region")


@pytest.mark.parametrize("option", [dict(inexact=True), dict(preconditioner="limited-memory"), dict(constraints=[])])
def test_options_that_do_not_go_with_it_are_refused(option):
    with pytest.raises(InputError, match=f"'kkt' does not go with {next(iter(option))}="):
        tracking(alone(), "walls").minimize("kkt", **option)


@pytest.mark.parallel([1, 2])
def test_bounds_are_those_of_the_trust_region():
    st = pf.SpaceTime(space=1)
    given = dict(weight=1e-3, tableau="BE")
    J = tracking(st, "field", **given)
    result = J.minimize("kkt", bounds=(-0.2, 0.3), gtol_rel=1e-9)
    reduced = tracking(st, "field", **given).minimize_trust_region(bounds=(-0.2, 0.3), gtol_rel=1e-10)
    assert result.converged
    assert result.choice.startswith("kkt")
    total = st.comm.allreduce(np.array([np.sum((result.x - reduced.x) ** 2), np.sum(reduced.x**2)]))
    assert np.sqrt(total[0]) < 1e-6 * np.sqrt(total[1])
    largest = st.comm.allreduce(float(result.x.max(initial=0)), op=MPI.MAX)
    assert largest == pytest.approx(0.3)


def test_bounds_on_the_state_are_added_to_the_kkt_system():
    results = []
    for method in ("kkt", None):
        J = tracking(alone(), "field", tableau="BE", weight=1e-2, bound=0.01)
        results.append(J.minimize(method, gtol_rel=1e-9) if method else J.minimize_active_set(gtol_rel=1e-9))
    free = tracking(alone(), "field", tableau="BE", weight=1e-2).minimize("kkt")
    assert all(result.converged for result in results)
    assert results[0].choice.startswith("kkt")
    assert np.linalg.norm(results[0].x - results[1].x) < 1e-6 * np.linalg.norm(results[1].x)
    assert np.linalg.norm(results[0].x - free.x) > 1e-2 * np.linalg.norm(free.x)


def test_the_cavity_with_an_eliminated_field():
    J = cavity(alone(), steps=16)
    result = J.minimize("kkt", gtol_rel=1e-9)
    reduced = cavity(alone(), steps=16).minimize_trust_region(gtol_rel=1e-11, cg_max_it=2000)
    assert result.converged
    assert result.choice.startswith("kkt")
    assert np.linalg.norm(result.x - reduced.x) < 1e-7 * np.linalg.norm(reduced.x)

"""The low-rank preconditioner against dense matrices, and conjugate gradients with it on source inversions."""

import numpy as np
import pytest
from firedrake import (
    COMM_SELF,
    COMM_WORLD,
    Function,
    FunctionSpace,
    SpatialCoordinate,
    TestFunction,
    UnitIntervalMesh,
    UnitSquareMesh,
    assemble,
    dot,
    dx,
    exp,
    grad,
    inner,
)
from irksome import Dt
from scipy.linalg import eigh

import pint_fem as pf
from pint_fem.errors import InputError, InputTypeError
from pint_fem.optimize.low_rank import LowRankHessian, Pencil, probe


def dense_pencil(n=60, decay=2.0, size=1e6, seed=0, rank=None):
    """Matrices ``A`` and ``R`` with algebraically decaying eigenvalues, and what probing calls."""
    rng = np.random.default_rng(seed)
    B = rng.standard_normal((n, n))
    R = B @ B.T / n + np.eye(n)
    lam = size * np.arange(1, n + 1.0) ** -decay
    lam[n if rank is None else rank :] = 0.0
    L = np.linalg.cholesky(R)
    U = np.linalg.qr(rng.standard_normal((n, n)))[0]
    A = L @ (U * lam) @ U.T @ L.T
    A = 0.5 * (A + A.T)
    inverse, calls = np.linalg.inv(R), []

    def product(X):
        calls.append(len(X))
        return X @ A

    noise = lambda first, count: np.array(
        [np.random.default_rng((seed, i)).standard_normal(n) for i in range(first, first + count)]
    )
    pencil = Pencil(product, lambda X: X @ R, lambda Y: Y @ inverse, lambda D, X: D @ X.T, noise, n)
    return A, R, lam, pencil, calls


def operator(hessian, R):
    """The matrix of ``P``."""
    inverse, V = np.linalg.inv(R), hessian.vectors
    return np.array([hessian.apply(inverse @ y, V @ y) for y in np.eye(len(R))]).T


def condition(hessian, A, R, m=1.0, c=1.0):
    """The extreme eigenvalues of ``P (m A + c R)``."""
    values = eigh(m * A + c * R, np.linalg.inv(operator(hessian, R)), eigvals_only=True)
    return values[0], values[-1]


def test_it_is_the_inverse_where_the_rank_is_found():
    """Seven eigenvalues, blocks of four: the third block finds nothing more."""
    A, R, lam, pencil, calls = dense_pencil(rank=7)
    found = probe(pencil, tolerance=1e-3, block=4, most=60)
    assert found.complete
    assert calls == [4, 4, 4]
    assert np.allclose(found.eigenvalues[:7], lam[:7], rtol=1e-8)
    assert found.rank == 7
    V = found.vectors
    assert np.allclose(V @ R @ V.T, np.eye(7), atol=1e-9)
    assert np.allclose(operator(found, R) @ (A + R), np.eye(60), atol=1e-8)


@pytest.mark.parametrize("block", [4, 16])
@pytest.mark.parametrize("tolerance", [0.3, 3.0])
def test_the_condition_is_one_and_the_remainder(block, tolerance):
    A, R, lam, pencil, calls = dense_pencil(n=120, decay=3.0, size=1e4)
    found = probe(pencil, tolerance=tolerance, block=block, most=120)
    assert found.complete
    assert found.remainder <= tolerance
    assert found.products == sum(calls) < 120
    low, high = condition(found, A, R)
    assert 1 - 1e-6 <= low  # the remainder is positive
    assert high <= 1 + 2 * tolerance
    best = int((lam > tolerance).sum())
    assert found.products <= 3 * best + block


def test_other_weights_need_no_product():
    A, R, _, pencil, calls = dense_pencil(n=50, decay=4.0)
    found = probe(pencil, tolerance=0.1, block=8, most=50)
    before = len(calls)
    other = found.rescaled(misfit=3.0).rescaled(regularisation=40.0)
    assert (other.misfit, other.regularisation, other.ratio) == (3.0, 40.0, 0.075)
    low, high = condition(other, A, R, 3.0, 40.0)
    assert 1 - 1e-6 <= low <= high <= 1 + 2 * other.ratio * 0.1
    assert len(calls) == before


def test_the_vectors_of_a_similar_pencil_are_a_start():
    """A matrix larger by a tenth: one block beside the old vectors suffices."""
    A, R, _, pencil, _ = dense_pencil(n=120, decay=3.0, size=1e4)
    old = probe(pencil, tolerance=0.3, block=8, most=120)
    calls = []
    changed = pencil._replace(product=lambda X: calls.append(len(X)) or X @ (1.1 * A))
    keep = old.vectors[old.eigenvalues > 0.3]
    new = probe(changed, tolerance=0.3, block=8, most=120, start=keep)
    assert new.complete
    assert new.products < old.products
    assert calls[0] == len(keep)
    assert condition(new, 1.1 * A, R)[1] <= 1.6


def test_a_budget_leaves_the_largest_and_says_so():
    A, R, lam, pencil, calls = dense_pencil(n=60, decay=2.0)
    found = probe(pencil, tolerance=0.1, block=8, most=20)
    assert not found.complete
    assert found.products == sum(calls) == 20
    assert found.remainder > 0.1
    assert np.allclose(found.eigenvalues[:3], lam[:3], rtol=0.1)
    whole = condition(LowRankHessian(np.zeros(0), np.zeros((0, 60)), np.inf, 0, False), A, R)
    assert condition(found, A, R)[1] < 0.05 * whole[1]


def test_all_directions_are_exact_and_nothing_is_left():
    A, R, _, pencil, _ = dense_pencil(n=12, decay=1.0, size=1e8)
    found = probe(pencil, tolerance=1e-3, block=8, most=100)
    assert found.complete
    assert found.remainder == 0.0
    assert found.products == 12
    low, high = condition(found, A, R)
    assert max(abs(low - 1), abs(high - 1)) < 1e-5


def test_no_information_is_the_regularisation_alone():
    _, R, _, pencil, _ = dense_pencil(rank=0)
    found = probe(pencil, tolerance=0.1, block=5, most=60)
    assert found.complete
    assert found.rank == 0
    assert np.allclose(operator(found, R), np.linalg.inv(R))


# -- functionals -------------------------------------------------------------------------------------------------------
SERIAL = {"time_solver": "serial"}


def inversion(st, weight, *, linear=True, cells=6, steps=8, noise=1.0, solver=SERIAL, regularisation=None):
    """The source inversion of the optimisers' page, small: a static source of heat from the temperature everywhere."""
    mesh = st.mesh(UnitSquareMesh, cells, cells)
    V = FunctionSpace(mesh, "CG", 1)
    u, v, q, (x, y) = Function(V), TestFunction(V), Function(V), SpatialCoordinate(mesh)
    kappa = 1 if linear else 1 + u**2
    F = Dt(u) * v * dx + kappa * dot(grad(u), grad(v)) * dx + u * v * dx - 20 * q * v * dx
    ev = pf.Evolution(F, u, tableau=pf.SDIRK2(), dt=0.2 / steps, nsteps=steps, control=q)
    target = exp(-20 * ((x - 0.3) ** 2 + (y - 0.6) ** 2)) - 0.5 * exp(-30 * ((x - 0.7) ** 2 + (y - 0.4) ** 2))
    forms = regularisation or (lambda q: 0.5 * weight * (inner(grad(q), grad(q)) + q * q) * dx)
    return pf.TimeParallelReducedFunctional(
        ev, pf.RunningMisfit(noise**-2 * (u - target) ** 2 * dx), regularisation=forms(q), spacetime=st,
        riesz_map="H1", solver_parameters=solver,
    )  # fmt: skip


def steps_of(result):
    return sum(record.cg_iterations for record in result.history)


def distance(J, a, b):
    d = a - b
    return np.sqrt(J.inner.inner(d, d) / J.inner.inner(b, b))


def minimiser_of_quadratic(J):
    """By dense algebra from the gradient and the Hessian actions on unit vectors, on one rank."""
    n = J.layout.size
    H = np.array([J.problem.hessian_action(np.zeros(n), e) for e in np.eye(n)])
    return np.linalg.solve(H, -J.problem.derivative(np.zeros(n)))


@pytest.mark.parametrize("weight", [1e-1, 1e-3, 1e-5, 1e-8])
def test_a_linear_inversion_takes_few_steps_for_any_weight(weight):
    J = inversion(pf.SpaceTime("1x1", comm=COMM_SELF), weight)
    result = J.minimize_trust_region(gtol_rel=1e-8, preconditioner="low-rank")
    assert result.converged
    assert steps_of(result) <= 8
    assert distance(J, result.x, minimiser_of_quadratic(J)) < 1e-5
    assert result.preconditioner.startswith("low-rank preconditioner of rank ")


@pytest.mark.parametrize("weight", [1e-1, 1e-4, 1e-8])
def test_a_nonlinear_inversion_takes_few_steps_for_any_weight(weight):
    st = pf.SpaceTime("1x1", comm=COMM_SELF)
    J = inversion(st, weight, linear=False, cells=5, steps=6)
    plain = inversion(st, weight, linear=False, cells=5, steps=6)
    result = J.minimize_trust_region(gtol_rel=1e-8, preconditioner="low-rank")
    without = plain.minimize_trust_region(gtol_rel=1e-8, max_it=60, cg_max_it=300)
    assert result.converged
    assert without.converged
    assert steps_of(result) <= 20
    assert distance(J, result.x, without.x) < 1e-4
    assert abs(result.value - without.value) <= 1e-9 * without.value


def test_another_weight_takes_the_eigenpairs_that_are_there():
    """From a small weight to a large one no direction is probed; to a smaller one the old vectors are the start."""
    st = pf.SpaceTime("1x1", comm=COMM_SELF)
    P = pf.LowRankPreconditioner()
    for weight, more in ((1e-4, True), (1e-2, False), (1e-3, False), (1e-7, True)):
        J, before = inversion(st, weight), P.directions
        result = J.minimize_trust_region(gtol_rel=1e-8, preconditioner=P)
        assert result.converged
        assert steps_of(result) <= 8
        assert (P.directions > before) == more
        assert distance(J, result.x, minimiser_of_quadratic(J)) < 1e-5


def test_another_noise_level_takes_the_eigenpairs_that_are_there():
    st = pf.SpaceTime("1x1", comm=COMM_SELF)
    P = pf.LowRankPreconditioner(tolerance=1e-3)
    inversion(st, 1e-3).minimize_trust_region(gtol_rel=1e-8, preconditioner=P)
    scaled = P.rescaled(misfit=0.2**-2)
    J = inversion(st, 1e-3, noise=0.2)
    result = J.minimize_trust_region(gtol_rel=1e-8, preconditioner=scaled)
    assert result.converged
    assert steps_of(result) <= 6
    assert scaled.directions == P.directions
    assert distance(J, result.x, minimiser_of_quadratic(J)) < 1e-5


def test_it_is_computed_again_where_steps_are_many():
    """With the eigenpairs of weight 1e-2 and a tolerance that allows what is left out, the first path is long."""
    st = pf.SpaceTime("1x1", comm=COMM_SELF)
    P = pf.LowRankPreconditioner(tolerance=1e3, block=2, refresh_after=2)
    J = inversion(st, 1e-5)
    result = J.minimize_trust_region(gtol_rel=1e-9, preconditioner=P)
    assert result.converged
    assert P.computed > 1
    paths = [record.cg_iterations for record in result.history[1:]]
    assert P.computed <= 1 + sum(steps > 2 for steps in paths)


def test_a_budget_is_reported():
    J = inversion(pf.SpaceTime("1x1", comm=COMM_SELF), 1e-6)
    P = pf.LowRankPreconditioner(most=10, refresh_after=1000)
    result = J.minimize_trust_region(gtol_rel=1e-8, preconditioner=P, cg_max_it=300)
    assert result.converged
    assert P.directions == 10
    assert "above 0.3: 10 directions are the most that are allowed" in result.preconditioner


@pytest.mark.parametrize("kind", ["gradients", "nothing"])
def test_a_singular_regularisation_is_shifted(kind):
    """Gradients alone do not see constants, which the misfit does; without a regularisation of 16 values it decides."""
    forms = {"gradients": lambda q: 1e-4 * inner(grad(q), grad(q)) * dx, "nothing": lambda q: []}[kind]
    J = inversion(pf.SpaceTime("1x1", comm=COMM_SELF), 0, regularisation=forms, cells=3)
    P = pf.LowRankPreconditioner()
    result = J.minimize_trust_region(gtol_rel=1e-8, preconditioner=P)
    assert result.converged
    assert P.shift > 0
    assert "singular regularisation, shifted by" in result.preconditioner
    assert steps_of(result) <= 12
    assert distance(J, result.x, minimiser_of_quadratic(J)) < 1e-4


@pytest.mark.parallel([1, 2])
@pytest.mark.parametrize("solver", ["serial", "mgrit"])
def test_ranks_in_time_take_the_same_steps_to_the_same_minimiser(solver):
    options = SERIAL if solver == "serial" else {"mgrit": {"rtol": 1e-10, "coarsening": (2,)}}
    J = inversion(pf.SpaceTime(space=1), 1e-5, solver=options)
    alone = inversion(pf.SpaceTime("1x1", comm=COMM_SELF), 1e-5)
    for inexact in (None, True) if solver == "mgrit" else (None,):
        result = J.minimize_trust_region(gtol_rel=1e-7, preconditioner="low-rank",
                                         inexact=inexact)  # fmt: skip
        if inexact is None:
            here = alone.minimize_trust_region(gtol_rel=1e-7, preconditioner="low-rank")
            assert steps_of(result) == steps_of(here)
            assert result.preconditioner.split(";")[0] == here.preconditioner.split(";")[0]
        assert result.converged
        assert steps_of(result) <= 12
        assert distance(alone, result.x, minimiser_of_quadratic(alone)) < 1e-4
        J = inversion(pf.SpaceTime(space=1), 1e-5, solver=options)


@pytest.mark.parallel(2)
def test_ranks_in_space():
    J = inversion(pf.SpaceTime(time=1), 1e-5)
    alone = inversion(pf.SpaceTime("1x1", comm=COMM_SELF), 1e-5)
    result = J.minimize_trust_region(gtol_rel=1e-8, preconditioner="low-rank")
    assert result.converged
    assert steps_of(result) <= 8
    best = alone.problem.value(minimiser_of_quadratic(alone))
    assert abs(result.value - best) <= 1e-9 * best


def sources(st, weight):
    """A bar that a source with one value per step heats, beside a static one."""
    mesh = st.mesh(UnitIntervalMesh, 8)
    V = FunctionSpace(mesh, "CG", 1)
    u, v, q, s = Function(V), TestFunction(V), Function(V, name="q"), Function(V, name="s")
    (x,) = SpatialCoordinate(mesh)
    F = Dt(u) * v * dx + dot(grad(u), grad(v)) * dx - 20 * (q + s) * v * dx
    ev = pf.Evolution(F, u, tableau=pf.BackwardEuler(), dt=0.05, nsteps=6, control=[q, s], per_step=[q])
    return pf.TimeParallelReducedFunctional(
        ev, pf.RunningMisfit((u - x * (1 - x)) ** 2 * dx), spacetime=st, solver_parameters=SERIAL,
        regularisation=[weight * (q**2 + 0.01 * dot(grad(q), grad(q))) * dx, 2 * weight * s**2 * dx],
    )  # fmt: skip


@pytest.mark.parallel([1, 2])
@pytest.mark.parametrize("weight", [1e-2, 1e-6])
def test_controls_with_one_value_per_step_beside_static_ones(weight):
    J, alone = sources(pf.SpaceTime(space=1), weight), sources(pf.SpaceTime("1x1", comm=COMM_SELF), weight)
    result = J.minimize_trust_region(gtol_rel=1e-8, preconditioner="low-rank")
    assert result.converged
    assert steps_of(result) <= 10
    rows = np.concatenate(J.spacetime.time_comm.allgather(J.layout.part(result.x, J.evolution.stepwise[0])))
    best = minimiser_of_quadratic(alone)
    found = alone.layout.join([rows, J.layout.part(result.x, J.evolution.controls[1])])
    assert distance(alone, found, best) < 1e-4


def test_sums_constraints_and_bounds():
    """The sum of two functionals of one control; its integral is fixed; no value is negative."""
    st = pf.SpaceTime("1x1", comm=COMM_SELF)
    J = inversion(st, 1e-5)
    twice = J + 2 * J
    result = twice.minimize_trust_region(gtol_rel=1e-8, preconditioner="low-rank")
    assert result.converged
    assert steps_of(result) <= 8
    assert distance(J, result.x, minimiser_of_quadratic(J)) < 1e-5
    q = J.evolution.controls[0]
    runs = [J.minimize_trust_region(J.function(np.zeros(J.layout.size)), constraints=[(q * dx, 0.2)], gtol_rel=1e-8,
                                    cg_max_it=300, preconditioner=kind) for kind in (None, "low-rank")]  # fmt: skip
    assert all(run.converged for run in runs)
    assert distance(J, runs[1].x, runs[0].x) < 1e-4
    assert abs(assemble(runs[1].control * dx) - 0.2) < 1e-9
    runs = [J.minimize_trust_region(J.function(np.ones(J.layout.size)), bounds=(0, None), gtol_rel=1e-7, max_it=200,
                                    cg_max_it=300, preconditioner=kind) for kind in (None, "low-rank")]  # fmt: skip
    assert all(run.converged for run in runs)
    assert abs(runs[1].value - runs[0].value) <= 1e-7 * runs[0].value


@pytest.mark.parallel([1, 2])
def test_experiments_on_groups_of_ranks():
    """Two experiments that share the source, each on a rank of its own where there are two."""
    found = []
    for grid, comm in ((f"1x1x{COMM_WORLD.size}", COMM_WORLD), ("1x1", COMM_SELF)):
        st = pf.SpaceTime(grid, comm=comm)
        mesh = st.mesh(UnitSquareMesh, 5, 5)
        V = FunctionSpace(mesh, "CG", 1)
        q, (x, y) = Function(V, name="q"), SpatialCoordinate(mesh)
        evolutions, misfits = [], []
        for number in range(2):
            u, v = Function(V), TestFunction(V)
            F = Dt(u) * v * dx + dot(grad(u), grad(v)) * dx - 20 * (1 + number * x) * q * v * dx
            evolutions.append(pf.Evolution(F, u, tableau=pf.BackwardEuler(), dt=0.02, nsteps=5, control=q))
            misfits.append(pf.RunningMisfit((u - x * y) ** 2 * dx))
        J = pf.TimeParallelReducedFunctional(
            evolutions, misfits, regularisation=1e-5 * (q**2 + inner(grad(q), grad(q))) * dx, spacetime=st,
            solver_parameters=SERIAL,
        )  # fmt: skip
        result = J.minimize_trust_region(gtol_rel=1e-8, preconditioner="low-rank")
        assert result.converged
        assert steps_of(result) <= 8
        found.append(result)
    assert distance(J, found[0].x, minimiser_of_quadratic(J)) < 1e-5
    assert steps_of(found[0]) == steps_of(found[1])


def test_what_has_no_quadratic_regularisation_is_refused():
    st = pf.SpaceTime("1x1", comm=COMM_SELF)
    J = inversion(st, 0, regularisation=lambda q: q**4 * dx)
    with pytest.raises(InputError, match="'low-rank': the regularisation is not quadratic"):
        J.minimize_trust_region(preconditioner="low-rank")
    P = pf.LowRankPreconditioner()
    with pytest.raises(InputError, match="is for minimize_trust_region"):
        inversion(st, 1e-2, solver={"mgrit": {"coarsening": (2,)}}).minimize_one_shot(preconditioner=P)
    inversion(st, 1e-2).minimize_trust_region(preconditioner=P)
    with pytest.raises(InputError, match="for other controls"):
        inversion(st, 1e-2, cells=3).minimize_trust_region(preconditioner=P)


def test_options_are_checked():
    for options, kind in ((dict(tolerance=0.0), InputError), (dict(tolerance="1"), InputTypeError),
                          (dict(block=0), InputError), (dict(most=2.5), InputTypeError),
                          (dict(refresh_after=True), InputTypeError)):  # fmt: skip
        with pytest.raises(kind, match=f"LowRankPreconditioner: {next(iter(options))} = "):
            pf.LowRankPreconditioner(**options)
    with pytest.raises(InputError, match="rescaled: factors"):
        pf.LowRankPreconditioner().rescaled(misfit=-1.0)
    assert str(pf.LowRankPreconditioner()) == "low-rank preconditioner, not computed yet"

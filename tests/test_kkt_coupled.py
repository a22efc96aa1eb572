"""The KKT systems of the frequencies against dense algebra from the definition of a step."""

import numpy as np
import pytest
from petsc4py import PETSc
from scipy.sparse import csr_matrix, random_array

from pint_fem.errors import InputError, SolverFailure
from pint_fem.evolution.tableaux import DIRK, SDIRK2, BackwardEuler, ImplicitMidpoint, Repeated
from pint_fem.kkt.coupled.systems import CoupledSystems
from pint_fem.paradiag.sparse_system import SparseSystem

METHODS = {"euler": BackwardEuler(), "midpoint": ImplicitMidpoint(), "sdirk": SDIRK2(), "two": Repeated(SDIRK2(), 2)}
DT, N = 0.2, 6
PARTS = ["M", "K", "F", "Q", "R"]


class Unweighted:
    """Two stages of backward Euler with a last one that has no weight."""

    A, b, c = np.array([[0.5, 0, 0], [0.5, 0.5, 0], [0.2, 0.1, 0.3]]), np.array([0.5, 0.5, 0]), np.array([0.5, 1, 0.6])
    is_diagonally_implicit, is_stiffly_accurate = True, False


METHODS["unweighted"] = Unweighted()


def problem(seed=0, n=9, nz=4, conditions=2):
    """Random matrices: nonsymmetric K and M, semidefinite Q, rectangular F."""
    rng = np.random.default_rng(seed)
    sparse = lambda *shape: random_array(
        shape, density=0.3, rng=rng, data_sampler=lambda size: rng.uniform(-1, 1, size)
    )
    M = 4 * np.eye(n) + sparse(n, n).toarray()
    K = 3 * np.eye(n) + 2 * sparse(n, n).toarray()
    half = sparse(n // 2, n).toarray()
    R = sparse(nz, nz).toarray()
    free = np.ones(n, bool)
    free[rng.choice(n, conditions, replace=False)] = False
    given = M, K, sparse(n, nz).toarray() + 0.1, half.T @ half, 1e-2 * (np.eye(nz) + R.T @ R)
    return dict(zip(PARTS, given, strict=True)), 1e-3 * (np.eye(nz) + R @ R.T), free


def step(tableau, M, K, F, free, u, z):
    """One step of the homogeneous problem with the control z, stage by stage in terms of slopes of its definition."""
    A, b = np.asarray(tableau.A, float), np.asarray(tableau.b, float)
    dirk, d, values = DIRK(tableau), [], []
    for i in range(len(b)):
        h = A[i, i] * DT
        W = u + sum((A[i, j] / A[j, j] * d[j] for j in range(i)), np.zeros_like(u))
        S, right = M + h * K, M @ W + h * F @ z
        S[~free], S[:, ~free], right[~free] = 0, 0, 0
        S[~free, ~free] = 1
        values.append(np.linalg.solve(S, right))
        d.append(values[-1] - W)
    if dirk.stiffly_accurate:
        return values[-1]
    return u + sum(b[i] / A[i, i] * d[i] for i in range(len(b)))


def dense(tableau, parts, free):
    """Phi and Psi."""
    M, K, F = (parts[x] for x in "MKF")
    n, nz = F.shape
    columns = lambda count, f: np.array([f(row) for row in np.eye(count)]).T
    Phi = columns(n, lambda e: step(tableau, M, K, F, free, e, np.zeros(nz)))
    Psi = columns(nz, lambda e: step(tableau, M, K, F, free, np.zeros(n), e))
    return Phi, Psi


def shifts(steps):
    return np.exp(-1j * np.pi * (2 * np.arange(steps) + 1) / steps)


def systems(tableau, parts, free, steps=N, **kwargs):
    return CoupledSystems(DIRK(tableau), steps, *(csr_matrix(parts[x]) for x in PARTS), dt=DT, free=free, **kwargs)


def right_hand_sides(f, n, nz, seed=3):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((f, m)) + 1j * rng.standard_normal((f, m)) for m in (n, n, nz)]


def dense_solutions(Phi, Psi, Q, R, R_time, mu, a, b, c):
    n, nz = Psi.shape
    for m, *r in zip(mu, a, b, c, strict=True):
        A = np.eye(n) - m * Phi
        O = np.zeros
        Rk = R + abs(1 - m) ** 2 / DT**2 * R_time
        matrix = np.block([[A, -Psi, O((n, n))], [-Q, O((n, nz)), A.conj().T], [O((nz, n)), Rk, Psi.T]])
        yield np.linalg.solve(matrix, np.concatenate(r))


def assert_solved(found, expected, tol=1e-10):
    found = np.concatenate(found, axis=1)
    assert np.linalg.norm(found - expected) <= tol * np.linalg.norm(expected)


@pytest.mark.parametrize("conditions", [0, 2])
@pytest.mark.parametrize("in_time", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_every_frequency_is_solved_as_by_dense_matrices_of_the_step(name, in_time, conditions):
    parts, R_time, free = problem(conditions=conditions)
    Phi, Psi = dense(METHODS[name], parts, free)
    n, nz = Psi.shape
    a, b, c = right_hand_sides(N, n, nz)
    found = systems(METHODS[name], parts, free, R_time=csr_matrix(R_time) if in_time else None)
    expected = list(dense_solutions(Phi, Psi, parts["Q"], parts["R"], in_time * R_time, shifts(N), a, b, c))
    assert_solved(found.solve_all(range(N), shifts(N), a, b, c), expected)
    assert found.factorisations == N


@pytest.mark.parametrize("name", METHODS)
def test_frequencies_are_the_skew_circulant_system_of_all_steps(name):
    """P of all steps, solved by numpy, against transforms and the systems of half of the frequencies."""
    parts, R_time, free = problem(1)
    Phi, Psi = dense(METHODS[name], parts, free)
    n, nz = Psi.shape
    shift = np.diag(np.ones(N - 1), -1)
    shift[0, -1] = -1  # u_0 = -u_N
    I = np.eye(N)
    A, B = np.eye(N * n) - np.kron(shift, Phi), np.kron(I, Psi)
    D = I - shift
    R = np.kron(I, parts["R"]) + np.kron(D.T @ D, R_time) / DT**2
    O = np.zeros
    matrix = np.block(
        [[A, -B, O((N * n, N * n))], [-np.kron(I, parts["Q"]), O(B.shape), A.T], [O((N * nz, N * n)), R, B.T]]
    )
    rng = np.random.default_rng(2)
    a, b, c = (rng.standard_normal((N, m)) for m in (n, n, nz))
    x = np.linalg.solve(matrix, np.concatenate([a.ravel(), b.ravel(), c.ravel()]))
    expected = np.split(x, [N * n, N * (n + nz)])
    steps, half = np.arange(1, N + 1), range(N // 2)
    transform = np.exp(-1j * np.pi * np.outer(2 * np.arange(N // 2) + 1, steps) / N)
    solved = systems(METHODS[name], parts, free, R_time=csr_matrix(R_time)).solve_all(
        half, shifts(N), *(transform @ r for r in (a, b, c))
    )
    for hat, exact in zip(solved, expected, strict=True):
        back = 2 / N * (transform.conj().T @ hat).real
        assert np.linalg.norm(back.ravel() - exact) <= 1e-10 * np.linalg.norm(exact)


def test_a_frequency_where_the_evolution_itself_is_singular():
    """Midpoint rule without conditions, K = 0 and mu = 1: the state is determined by the misfit alone."""
    parts, _, _ = problem(conditions=0, nz=9)
    free = np.ones(9, bool)
    parts |= {"K": np.zeros((9, 9)), "Q": np.eye(9), "F": np.eye(9)}
    Phi, Psi = dense(ImplicitMidpoint(), parts, free)
    a, b, c = right_hand_sides(1, 9, 9)
    found = systems(ImplicitMidpoint(), parts, free).solve_all(range(1), np.ones(1), a, b, c)
    assert_solved(found, list(dense_solutions(Phi, Psi, parts["Q"], parts["R"], 0 * parts["R"], [1.0], a, b, c)))


def test_lanes_and_single_frequencies_agree_and_factors_beyond_the_memory_limit_are_made_again(monkeypatch):
    """With kernels for several frequencies and without, and a limit that two of six factors fit in."""
    parts, _, free = problem()
    data = right_hand_sides(N, 9, 4)
    on_lanes = systems(SDIRK2(), parts, free)
    reference = np.concatenate(on_lanes.solve_all(range(N), shifts(N), *data), axis=1)
    monkeypatch.setattr(SparseSystem, "has_lanes", False)
    cached = systems(SDIRK2(), parts, free)
    assert_solved(cached.solve_all(range(N), shifts(N), *data), reference, 1e-12)
    assert cached.factorisations == N
    one = cached.bytes / N
    few = systems(SDIRK2(), parts, free, memory=2.5 * one)
    for times in (1, 2):
        assert_solved(few.solve_all(range(N), shifts(N), *data), reference, 1e-12)
        assert few.factorisations == N + (times - 1) * (N - 2)
    assert few.bytes <= 2.5 * one
    few.release()
    assert few.bytes == 0


def test_results_of_a_frequency_do_not_depend_on_the_others():
    parts, _, free = problem()
    a, b, c = right_hand_sides(N, 9, 4)
    every = systems(SDIRK2(), parts, free).solve_all(range(N), shifts(N), a, b, c)
    some = systems(SDIRK2(), parts, free).solve_all(range(2, 5), shifts(N), a[2:5], b[2:5], c[2:5])
    for x, y in zip(every, some, strict=True):
        assert np.array_equal(x[2:5], y)


def test_weak_regularisation_is_solved_accurately():
    """Weights of 1e-10 and steps that are long for K: small pivots, so that a second solve is required."""
    parts, _, free = problem(5)
    parts["R"] *= 1e-8
    parts["K"] *= 1e4
    Phi, Psi = dense(SDIRK2(), parts, free)
    a, b, c = right_hand_sides(N, 9, 4)
    found = systems(SDIRK2(), parts, free).solve_all(range(N), shifts(N), a, b, c)
    assert_solved(
        found, list(dense_solutions(Phi, Psi, parts["Q"], parts["R"], 0 * parts["R"], shifts(N), a, b, c)), 1e-8
    )


def test_no_controls_right_hand_side_is_zero():
    parts, _, free = problem()
    a, b, c = right_hand_sides(N, 9, 4)
    found = systems(SDIRK2(), parts, free)
    without, zero = found.solve_all(range(N), shifts(N), a, b), found.solve_all(range(N), shifts(N), a, b, 0 * c)
    assert all(np.array_equal(x, y) for x, y in zip(without, zero, strict=True))


def test_matrices_of_petsc_on_one_rank_are_taken():
    parts, _, free = problem()
    data = right_hand_sides(N, 9, 4)
    given = [csr_matrix(parts[x]) for x in PARTS]
    petsc = [PETSc.Mat().createAIJ(X.shape, csr=(X.indptr, X.indices, X.data), comm=PETSc.COMM_SELF) for X in given]
    found = CoupledSystems(DIRK(SDIRK2()), N, *petsc, dt=DT, free=free).solve_all(range(N), shifts(N), *data)
    expected = systems(SDIRK2(), parts, free).solve_all(range(N), shifts(N), *data)
    assert all(np.array_equal(x, y) for x, y in zip(found, expected, strict=True))


def test_a_solution_that_is_not_accurate_is_improved(monkeypatch):
    """Factors with relative errors of 1e-6, as rounding makes them for waves."""
    parts, _, free = problem()
    data = right_hand_sides(N, 9, 4)
    found = systems(SDIRK2(), parts, free)
    exact = np.concatenate(found.solve_all(range(N), shifts(N), *data), axis=1)
    solve = found._solve
    monkeypatch.setattr(found, "_solve", lambda *args: (1 + 1e-6) * solve(*args))
    assert_solved(found.solve_all(range(N), shifts(N), *data), exact, 1e-11)
    monkeypatch.setattr(found, "_solve", lambda *args: 1.1 * solve(*args))
    with pytest.raises(SolverFailure, match="residual"):
        found.solve_all(range(N), shifts(N), *data)


def distributed(X, comm=PETSc.COMM_WORLD):
    """A matrix whose rows PETSc distributes."""
    made = PETSc.Mat().createAIJ(X.shape, comm=comm)
    made.setUp()
    for i in range(*made.getOwnershipRange()):
        made.setValues(i, list(range(X.shape[1])), X[i])
    made.assemble()
    return made


@pytest.mark.parallel([2, 3])
@pytest.mark.parametrize("name", ["midpoint", "two"])
def test_distributed_matrices_are_solved_as_dense_ones(name):
    """Rows of states, of controls and of conditions on several ranks."""
    parts, R_time, free = problem(4)
    Phi, Psi = dense(METHODS[name], parts, free)
    a, b, c = right_hand_sides(N, 9, 4)
    matrices = [distributed(parts[x]) for x in PARTS]
    rows, columns = (slice(*X.getOwnershipRange()) for X in (matrices[0], matrices[-1]))
    found = CoupledSystems(
        DIRK(METHODS[name]), N, *matrices, dt=DT, R_time=distributed(R_time), free=free[rows], memory=0.0
    )
    got = found.solve_all(range(N), shifts(N), a[:, rows], b[:, rows], c[:, columns])
    x = np.array(list(dense_solutions(Phi, Psi, parts["Q"], parts["R"], R_time, shifts(N), a, b, c)))
    u, z, lam = np.split(x, [9, 13], axis=1)
    assert_solved(got, np.concatenate([u[:, rows], z[:, columns], lam[:, rows]], axis=1))
    assert found.bytes == 0


@pytest.mark.parallel(2)
def test_a_singular_distributed_system_fails_on_every_rank():
    parts, _, free = problem()
    parts["F"][:, 1] = 0
    parts["R"][1] = parts["R"][:, 1] = 0
    matrices = [distributed(parts[x]) for x in PARTS]
    rows, columns = (slice(*X.getOwnershipRange()) for X in (matrices[0], matrices[-1]))
    found = CoupledSystems(DIRK(SDIRK2()), N, *matrices, dt=DT, free=free[rows])
    a, b, c = right_hand_sides(1, 9, 4)
    with pytest.raises(SolverFailure, match=r"frequency 1 of 6 steps: .* singular"):
        found.solve_all(range(1, 2), shifts(N), a[:, rows], b[:, rows], c[:, columns])


# -- what is refused ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("lanes", [True, False])
def test_a_singular_system_names_the_frequency_and_what_would_do(lanes, monkeypatch):
    """A control without load and regularisation."""
    if not lanes:
        monkeypatch.setattr(SparseSystem, "has_lanes", False)
    parts, _, free = problem()
    parts["F"][:, 1] = 0
    parts["R"][1] = parts["R"][:, 1] = 0
    with pytest.raises(SolverFailure, match=r"frequency 2 of 6 steps: .* singular .* regularisation"):
        systems(SDIRK2(), parts, free).solve_all(range(2, 4), shifts(N), *right_hand_sides(2, 9, 4))


def test_boundary_values_that_change_sign_in_an_odd_number_of_steps():
    """The midpoint rule multiplies them by -1, which is 1 / mu for the middle one of an odd number of frequencies."""
    parts, _, free = problem()
    found = systems(ImplicitMidpoint(), parts, free, steps=5)
    with pytest.raises(SolverFailure, match=r"frequency 2 of 5 steps: .* even number"):
        found.solve_all(range(3), shifts(5), *right_hand_sides(3, 9, 4))
    found.solve_all(range(2), shifts(5), *right_hand_sides(2, 9, 4))
    parts, _, free = problem(conditions=0)
    systems(ImplicitMidpoint(), parts, free, steps=5).solve_all(range(3), shifts(5), *right_hand_sides(3, 9, 4))


@pytest.mark.parametrize("name", ["K", "Q", "R", "R_time"])
def test_matrices_of_other_shapes_are_refused(name):
    parts, _, free = problem()
    wrong = csr_matrix(np.eye(5))
    extra = {"R_time": wrong} if name == "R_time" else {}
    parts |= {} if extra else {name: wrong}
    with pytest.raises(InputError, match=rf"^{name} of shape \(5, 5\)"):
        systems(SDIRK2(), parts, free, **extra)


@pytest.mark.parametrize("free", [np.ones(5, bool), np.arange(9)])
def test_unknowns_without_condition_are_booleans(free):
    with pytest.raises(InputError, match="free of shape"):
        systems(SDIRK2(), problem()[0], free)

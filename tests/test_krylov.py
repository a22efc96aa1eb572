"""The MGRIT cycle as a PETSc preconditioner: against dense matrices, plain cycles, other rank counts."""

import itertools
import math
import re

import numpy as np
import pytest
from mpi4py import MPI

pytest.importorskip("petsc4py")
pytest.importorskip("petsctools")

from petsc4py import PETSc

from pint_fem.mgrit import MGRIT, DivergedError, SolverFailure, split_steps
from pint_fem.mgrit.krylov import KrylovMGRIT
from pint_fem.mgrit.space_time_operator import MGRITPreconditioner, SpaceTimeOperator
from tests.logs import logged

GAMMA = 1 - 1 / math.sqrt(2)
TABLEAUX = {
    "backward Euler": ([[1]], [1]),
    "SDIRK2": ([[GAMMA, 0], [1 - GAMMA, GAMMA]], [1 - GAMMA, GAMMA]),
}


class Matrices:
    """``u -> M[n] u``, a matrix of its own for each step, one product a state: the same bits in any block."""

    def __init__(self, M):
        self.M = M

    def step(self, steps, u, out):
        assert len(steps) == len(u) == len(out)
        assert 0 <= steps[0] <= steps[-1] < len(self.M)
        for row, n, target in zip(u, steps, out, strict=True):
            target[...] = self.M[n] @ row


class Swept(Matrices):
    """With a ``sweep``; it counts its calls."""

    calls = 0

    def sweep(self, first, U, G):
        type(self).calls += 1
        for i in range(len(U) - 1):
            U[i + 1] = self.M[first + i] @ U[i]
            if G is not None:
                U[i + 1] += G[i]


class Same:
    """``u -> M u`` for all steps."""

    def __init__(self, M):
        self.M = np.asarray(M)

    def step(self, steps, u, out):
        for row, target in zip(u, out, strict=True):
            target[...] = self.M @ row


def level_steps(nsteps, coarsening):
    """Steps of each level."""
    steps = [nsteps]
    for m in coarsening:
        steps.append(steps[-1] // m if isinstance(m, int) else len(m) - 1)
    return steps


def random_propagators(rng, nsteps, coarsening, sizes, kind=Matrices):
    """Time-dependent, non-symmetric matrices of norm 0.9 on every level."""
    propagators = []
    for n, size in zip(level_steps(nsteps, coarsening), sizes, strict=True):
        M = rng.normal(size=(n, size, size))
        propagators.append(kind(0.9 * M / np.linalg.norm(M, 2, axis=(1, 2))[:, None, None]))
    return propagators


def dense(M):
    """The all-at-once matrix for ``u_1 .. u_N``."""
    N, n = len(M), M[0].shape[0]
    A = np.eye(N * n)
    for step in range(1, N):
        A[step * n : (step + 1) * n, (step - 1) * n : step * n] = -M[step]
    return A


def uneven(nsteps, size):
    """Several bounds: nearly equal, lopsided, with empty ranks."""
    yield split_steps(nsteps, size)
    if size > 1:
        yield [0, *sorted((1 + 3 * r) % (nsteps + 1) for r in range(size - 1)), nsteps]
        yield [0] * size + [nsteps]
        yield [0] + [nsteps] * size


def local(array, bounds, comm):
    """The own rows of an array with a row for each of ``u_1 .. u_N``."""
    return np.ascontiguousarray(array[bounds[comm.rank] : bounds[comm.rank + 1]])


def applied(function, x):
    """``function(x, y)`` on PETSc vectors, as an array of x's shape."""
    y = x.duplicate()
    y.set(np.nan)  # what was there must not matter
    function(x, y)
    return y.getArray().copy()


# -- the operator ----------------------------------------------------------------------------------------------------
@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize("nsteps", [1, 2, 7])
def test_products_are_those_of_the_dense_matrix(nsteps):
    comm, rng, n = MPI.COMM_WORLD, np.random.default_rng(nsteps), 3
    (fine,) = random_propagators(rng, nsteps, (), (n,))
    A, x = dense(fine.M), rng.normal(size=(nsteps, n))
    for bounds in uneven(nsteps, comm.size):
        operator = SpaceTimeOperator([fine], nsteps, options=dict(levels=1), comm=comm, bounds=bounds)
        operator.set_state((n,))
        matrix = operator.matrix()
        vec = operator.vec(local(x, bounds, comm))
        expected = local((A @ x.ravel()).reshape(nsteps, n), bounds, comm)
        np.testing.assert_allclose(applied(matrix.mult, vec), expected.ravel(), rtol=0, atol=1e-14)
        matrix.destroy()


@pytest.mark.parallel([1, 3])
def test_vector_is_the_slab():
    comm = MPI.COMM_WORLD
    (fine,) = random_propagators(np.random.default_rng(0), 6, (), (2,))
    h = SpaceTimeOperator([fine], 6, options=dict(levels=1), comm=comm)
    h.set_state((2,))
    U = np.zeros((h.level.k + 1, 2))
    vec = h.vec(U[1:])
    vec.set(3.0)
    assert np.shares_memory(vec.getArray(), U)
    assert (U[1:] == 3).all()
    assert (U[0] == 0).all()


# -- the preconditioner ----------------------------------------------------------------------------------------------
CASES = [  # steps, coarsening, sizes of the levels' states, options
    (12, (3,), (3, 3), {}),
    (11, (3,), (3, 3), dict(relax="F")),
    (13, (4,), (3, 3), dict(relax="FCFCF", c_weight=0.7)),
    (23, (3, 2), (3, 3, 3), dict(cycle="F", relax="F")),
    (23, (3, 2), (3, 3, 3), dict(relax=["FCF", "F"], c_weight=[1.3, 0.6])),
    (29, (2, 2, 2), (3, 3, 3, 3), dict(cycle="F", relax=["FCF", "FCFCF", "F"], c_weight=[0.8, 1.0, 1.2])),
    (31, (2, 3, 2), (2, 2, 2, 2), dict(cycle="F", coarse_solver="gathered")),
    (17, ((0, 1, 4, 9, 11, 16), 2), (3, 3, 3), dict(cycle="F")),
    (22, (2, 3), (4, 3, 2), dict(cycle="F", relax="FCF")),
    (25, (3, 2, 2), (4, 3, 3, 2), dict(cycle="F", relax="FCFCF", c_weight=0.9)),
    (61, (2, 2, 2), (2, 2, 2, 2), dict(cycle="F", relax="F")),
    (26, (2, 2), (3, 3, 3), dict(coarse_solver="relax", coarse_sweeps=2, c_weight=[1.1, 0.9], cycle="F")),
    (9, (4,), (2, 2), dict(coarse_solver="relax")),  # one interval on the coarsest level
    (5, (), (2,), {}),
    (5, (), (2,), dict(coarse_solver="relax", coarsening=2)),
]


def transfers_between(rng, sizes):
    """Matrices where the sizes differ."""
    pairs = itertools.pairwise(sizes)
    return [None if a == b else (rng.normal(size=(b, a)), 0.3 * rng.normal(size=(a, b))) for a, b in pairs]


def built(case, comm, bounds=None, kind=Matrices):
    nsteps, coarsening, sizes, options = case
    rng = np.random.default_rng(nsteps)
    propagators = random_propagators(rng, nsteps, coarsening, sizes, kind)
    h = SpaceTimeOperator(
        propagators,
        nsteps,
        options={"coarsening": coarsening or 2, "levels": len(sizes)} | options,
        comm=comm,
        bounds=bounds,
        transfers=transfers_between(rng, sizes),
    )
    h.set_state((sizes[0],))
    return h, rng.normal(size=(2, nsteps, sizes[0]))


def preconditioner(h, matrix):
    pc = PETSc.PC().create(h.petsc_comm)
    pc.setOperators(matrix)
    pc.setType("python")
    pc.setPythonContext(MGRITPreconditioner(h))
    pc.setUp()
    return pc


@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]}-{c[1]}-{c[3]}")
def test_bits_are_those_of_one_rank(case):
    alone, (x, _) = built(case, MPI.COMM_SELF)
    comm = MPI.COMM_WORLD
    expected = None
    for side, bounds in [(MPI.COMM_SELF, None), *((comm, b) for b in uneven(case[0], comm.size))]:
        h, _ = built(case, side, bounds) if bounds is not None else (alone, None)
        bounds = bounds or [0, case[0]]
        matrix = h.matrix()
        pc = preconditioner(h, matrix)
        own = h.vec(local(x, bounds, side))
        results = [applied(pc.apply, own), applied(matrix.mult, own)]
        if expected is None:
            expected = [r.reshape(x.shape) for r in results]
        for result, whole in zip(results, expected, strict=True):
            assert np.array_equal(result, local(whole, bounds, side).ravel())
        for thing in (pc, matrix):
            thing.destroy()


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]}-{c[1]}-{c[3]}")
def test_preconditioner_is_linear(case):
    """All entries, not only one bilinear form."""
    h, (x, _) = built(case, MPI.COMM_SELF)
    pc, n = preconditioner(h, h.matrix()), x.size
    columns = np.eye(n).reshape(n, *x.shape)
    B = np.array([applied(pc.apply, h.vec(e)) for e in columns]).T
    np.testing.assert_allclose(applied(pc.apply, h.vec(x)), B @ x.ravel(), rtol=0, atol=1e-13 * abs(B).max() * n)
    if not case[1] and not case[3]:
        np.testing.assert_allclose(B @ dense(h.level.propagator.M), np.eye(n), rtol=0, atol=1e-14)


@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize("case", [CASES[i] for i in (1, 2, 5, 9)], ids=str)
def test_apply_is_one_plain_cycle(case):
    comm = MPI.COMM_WORLD
    h, (x, _) = built(case, comm)
    pc = preconditioner(h, h.matrix())
    bounds = h.level.bounds
    G = local(x, bounds, comm)
    plain = MGRIT(
        [level.propagator for level in h.solver.levels],
        case[0],
        options={"coarsening": case[1], "max_it": 1, "residual": "none"} | case[3],
        comm=comm,
        transfers=h.solver.transfers,
        linear=True,
    )
    U = np.zeros((len(G) + 1, case[2][0]))
    assert plain.solve(U, G).cycles == 1
    assert np.array_equal(applied(pc.apply, h.vec(G)), U[1:].ravel())


@pytest.mark.parallel([1, 3])
def test_sweeps_of_propagators_are_used():
    case, comm = CASES[5], MPI.COMM_WORLD
    Swept.calls = 0
    h, (x, _) = built(case, comm, kind=Swept)
    plain, _ = built(case, comm)
    own = local(x, h.level.bounds, comm)
    a, b = (applied(preconditioner(side, side.matrix()).apply, h.vec(own)) for side in (h, plain))
    assert np.array_equal(a, b)
    assert comm.allreduce(Swept.calls) > 0


# -- the solver ------------------------------------------------------------------------------------------------------
def random_solver(comm, *, nsteps=19, coarsening=(3, 2), bounds=None, n=3, **kwargs):
    rng = np.random.default_rng(nsteps)
    propagators = random_propagators(rng, nsteps, coarsening, [n] * (len(coarsening) + 1))
    kwargs["options"] = {"coarsening": coarsening or 2, "rtol": 1e-12, "levels": len(propagators)} | kwargs.get(
        "options", {}
    )
    solver = KrylovMGRIT(
        propagators,
        nsteps,
        comm=comm,
        bounds=bounds,
        **kwargs,
    )
    return solver, propagators[0].M, rng.normal(size=(nsteps, n)), rng.normal(size=n)


def slab(solver, n, u0=None):
    fine = solver.operator.level
    U = np.zeros((fine.k + 1, n))
    if u0 is not None and fine.comm.rank == 0:
        U[0] = u0
    return U


def whole(points, bounds, comm):
    """Own rows with the ghost of ``u_0 .. u_N``."""
    return points[bounds[comm.rank] : bounds[comm.rank + 1] + 1]


@pytest.mark.usefixtures("array_kind")
@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize(("nsteps", "coarsening"), [(19, (3, 2)), (2, (2,)), (3, ())])
def test_solutions_are_those_of_stepping(nsteps, coarsening):
    comm, n = MPI.COMM_WORLD, 3
    for bounds in uneven(nsteps, comm.size):
        solver, M, G, u0 = random_solver(comm, nsteps=nsteps, coarsening=coarsening, bounds=bounds)
        U, own = slab(solver, n, u0), local(G, bounds, comm)
        expected = np.zeros((nsteps + 1, n))
        expected[0] = u0
        for k in range(nsteps):
            expected[k + 1] = M[k] @ expected[k] + G[k]
        result = solver.solve(U, own)
        assert result.converged
        assert result.reason in ("rtol", "exact")
        assert result.residuals[-1] <= 1e-12 * result.scale
        assert np.array_equal(own, local(G, bounds, comm))
        if len(own) or comm.rank == 0:  # another rank without steps has no neighbours
            np.testing.assert_allclose(U, whole(expected, bounds, comm), rtol=0, atol=1e-10)
        solver.destroy()


@pytest.mark.usefixtures("array_kind")
@pytest.mark.parallel([1, 3])
def test_guesses():
    comm, n = MPI.COMM_WORLD, 3
    solver, _, G, u0 = random_solver(comm)
    G = local(G, solver.operator.level.bounds, comm)
    U = slab(solver, n, u0)
    cold = solver.solve(U, G)
    assert cold.residuals[0] == pytest.approx(cold.scale, rel=1e-14)  # from zero
    again = solver.solve(U, G)  # from the solution
    assert (again.cycles, again.reason, len(again.residuals)) == (0, "rtol", 1)
    for start in ("skip", "nested"):
        V = slab(solver, n, u0)
        assert solver.solve(V, G, start=start).converged
        np.testing.assert_allclose(V, U, rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match="start 'other'"):
        solver.solve(U, G, start="other")
    solver.destroy()


@pytest.mark.parallel([1, 3])
def test_nested_iteration_is_exact_where_the_coarse_level_is():
    """With Phi^c = Phi^m and no right-hand side a skipped first down-cycle gives the solution."""
    comm, M = MPI.COMM_WORLD, np.array([[0.9, 0.3], [-0.2, 0.8]])
    P = [Same(M), Same(np.linalg.matrix_power(M, 4))]
    solver = KrylovMGRIT(P, 18, options=dict(coarsening=4, rtol=1e-13, start="skip"), comm=comm)
    result = solver.solve(slab(solver, 2, [1, 2]))
    assert (result.cycles, result.reason) == (0, "rtol")
    solver.destroy()


@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize("method", ["fgmres", "gcr", "gmres", "richardson", "bcgs"])
def test_methods(method):
    solver, M, G, u0 = random_solver(MPI.COMM_WORLD, solver_parameters={"ksp_type": method})
    A = dense(M)
    G_own = local(G, solver.operator.level.bounds, MPI.COMM_WORLD)
    U = slab(solver, 3, u0)
    result = solver.solve(U, G_own)
    assert result.converged
    assert solver.ksp.getType() == method
    assert result.cycles >= 1
    G[0] += M[0] @ u0
    assert result.scale == pytest.approx(np.linalg.norm(G), rel=1e-14)
    full = np.concatenate(MPI.COMM_WORLD.allgather(U[1:]))
    # the norm is that of b - A u
    true = np.linalg.norm(G.ravel() - A @ full.ravel())
    assert true <= 1e-12 * result.scale + 1e-13
    solver.destroy()


# -- beside the plain iteration --------------------------------------------------------------------------------------
def heat(tableau, dt, n=15):
    """1-D finite differences on (0, 1): the matrix of a Runge-Kutta step."""
    A, b = map(np.asarray, TABLEAUX[tableau])
    L = (np.diag([-2.0] * n) + np.diag([1.0] * (n - 1), 1) + np.diag([1.0] * (n - 1), -1)) * (n + 1) ** 2 * dt
    stages = np.linalg.solve(np.eye(len(b) * n) - np.kron(A, L), np.kron(np.ones((len(b), 1)), np.eye(n)))
    return np.eye(n) + np.kron(b[None, :], L) @ stages


def plain_residuals(propagators, nsteps, u0, options, tolerance):
    """Norms of the full residual after 0, 1, 2 ... plain cycles from zero, until the tolerance (relative to b)."""
    options = options | dict(residual="full", check="cycle", stagnation=None, dtol=1e300, rtol=0)
    scale = np.linalg.norm(propagators[0].M @ u0)
    solver = MGRIT(propagators, nsteps, options=options | dict(atol=tolerance * scale, max_it=nsteps))
    U = np.zeros((nsteps + 1, len(u0)))
    U[0] = u0
    return solver.solve(U), scale


@pytest.mark.parametrize("tableau", TABLEAUX)
@pytest.mark.parametrize("factors", [(4,), (8,), (4, 2), (2, 2, 2)])
@pytest.mark.parametrize("relax", ["F", "FCF"])
def test_krylov_never_needs_more_cycles_on_heat(tableau, factors, relax):
    """FGMRES minimises the residual over a space that holds the plain iterate."""
    nsteps, dt = 64, 1 / 64
    strides = [math.prod(factors[:i]) for i in range(len(factors) + 1)]
    propagators = [Same(heat(tableau, dt * s)) for s in strides]
    u0 = np.random.default_rng(0).normal(size=15)
    options = dict(coarsening=factors, relax=relax)
    for tolerance in (1e-4, 1e-6, 1e-8, 1e-10):
        plain, scale = plain_residuals(propagators, nsteps, u0, options, tolerance)
        solver = KrylovMGRIT(propagators, nsteps, options=options | dict(rtol=tolerance))
        result = solver.solve(slab(solver, 15, u0))
        assert plain.converged
        assert result.converged
        assert result.scale == pytest.approx(scale, rel=1e-13)
        assert result.cycles <= plain.cycles
        for krylov, other in zip(result.residuals[1:], plain.residuals[1:], strict=False):
            assert krylov <= other * (1 + 1e-8) + 1e-14 * scale


def rotation(z):
    return Same([[z.real, -z.imag], [z.imag, z.real]])


@pytest.mark.parametrize(
    ("damping", "angle", "m", "coarse"),
    [
        (0.9995, 0.15, 4, "backward Euler"),
        (0.9995, 0.15, 4, "exact but for the phase"),
        (0.999, 0.1, 4, "exact but for the phase"),
        (0.995, 0.05, 8, "exact but for the phase"),
    ],
)
def test_krylov_on_a_lightly_damped_oscillator(damping, angle, m, coarse):
    """The plain iteration stagnates or grows at first; FGMRES goes on falling and is done long before Nc = 64."""
    Nc, lam = 64, damping * np.exp(1j * angle)
    mu = 1 / (1 - m * np.log(lam)) if coarse == "backward Euler" else lam**m * np.exp(0.1j)
    nsteps, u0 = m * Nc, np.array([1.0, 0.0])
    propagators, options = [rotation(lam), rotation(mu)], dict(coarsening=m, relax="FCF")
    plain, _ = plain_residuals(propagators, nsteps, u0, options, 1e-8)
    solver = KrylovMGRIT(propagators, nsteps, options=options | dict(rtol=1e-8))
    result = solver.solve(slab(solver, 2, u0))
    factors = np.divide(result.residuals[1:], result.residuals[:-1])
    assert result.converged
    assert factors.max() <= 1 + 1e-12
    assert result.cycles <= min(Nc // 3, plain.cycles)
    r = plain.residuals  # what the plain one does meanwhile
    assert max(r[i + 1] / r[i] for i in range(1, 6)) >= 0.97


@pytest.mark.parametrize(("relax", "exact_after"), [("F", 64), ("FCF", 32)])
def test_krylov_ends_when_plain_cycles_do(relax, exact_after):
    """A coarse level that is off (bound 1.2): no cure, but no more iterations than exact termination."""
    lam = 0.9995 * np.exp(0.3j)
    propagators = [rotation(lam), rotation(1 / (1 - 4 * np.log(lam)))]
    solver = KrylovMGRIT(propagators, 256, options=dict(coarsening=4, relax=relax, rtol=1e-8, max_it=exact_after))
    result = solver.solve(slab(solver, 2, [1.0, 0.0]))
    assert result.converged
    assert np.divide(result.residuals[1:], result.residuals[:-1]).max() <= 1 + 1e-12


# -- failures --------------------------------------------------------------------------------------------------------
class Failing(Matrices):
    """Raises, or gives NaN, at one step."""

    def __init__(self, M, at=None, how="raise"):
        super().__init__(M)
        self.at, self.how = at, how

    def step(self, steps, u, out):
        super().step(steps, u, out)
        if self.at in steps:
            if self.how == "raise":
                raise ArithmeticError("no root found")
            out[list(steps).index(self.at)] = np.nan


@pytest.mark.usefixtures("array_kind")
@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize("how", ["raise", "nan"])
def test_failures_are_named_on_every_rank(how):
    nsteps, coarsening, n, comm = 13, (3, 2), 2, MPI.COMM_WORLD
    rng = np.random.default_rng(0)
    good = random_propagators(rng, nsteps, coarsening, (n, n, n))
    bad = [Failing(p.M, how=how) for p in good]
    given = {"ksp_error_if_not_converged": None} if how == "nan" else None  # PETSc must not stop on one rank alone
    options = dict(coarsening=coarsening)
    solver = KrylovMGRIT(bad, nsteps, options=options, comm=comm, solver_parameters=given)
    u0 = np.ones(n)
    G = np.ones((solver.operator.level.k, n))
    reference = slab(solver, n, u0)
    solver.solve(reference, G)
    for level, steps in enumerate(level_steps(nsteps, coarsening)):
        for at in range(steps):
            bad[level].at = at
            what = "ArithmeticError: no root found" if how == "raise" else "not finite"
            with pytest.raises(SolverFailure, match=rf"level {level}, steps .*{what}") as caught:
                solver.solve(slab(solver, n, u0), G)
            first, last = re.search(r"steps (\d+)(?:\.\.(\d+))?", str(caught.value)).groups()
            assert int(first) <= at <= int(last or first)
            assert len(set(comm.allgather(str(caught.value)))) == 1
            bad[level].at = None
    again = slab(solver, n, u0)  # nothing of it is left
    solver.solve(again, G)
    assert np.array_equal(again, reference)
    solver.destroy()


@pytest.mark.usefixtures("array_kind")
@pytest.mark.parallel([1, 3])
def test_bad_data_and_growth_are_failures():
    comm = MPI.COMM_WORLD
    solver, _, G, u0 = random_solver(comm)
    G = local(G, solver.operator.level.bounds, comm)
    for guess, rhs in ((np.nan, 0), (0, np.inf)):
        U, H = slab(solver, 3, u0), G.copy()
        if comm.rank == comm.size - 1:
            U[-1], H[-1] = guess, H[-1] + rhs
        with pytest.raises(SolverFailure, match="not finite"):
            solver.solve(U, H)
    solver.destroy()


# -- options ---------------------------------------------------------------------------------------------------------
@pytest.mark.usefixtures("array_kind")
@pytest.mark.parallel([1, 3])
def test_not_converged():
    comm = MPI.COMM_WORLD
    how = dict(rtol=1e-14, max_it=2)
    solver, _, G, u0 = random_solver(comm, options=how)
    G = local(G, solver.operator.level.bounds, comm)
    U = slab(solver, 3, u0)
    result = solver.solve(U, G)
    assert (result.converged, result.reason, result.cycles) == (False, "max_it", 2)
    assert "DIVERGED_MAX_IT after 2 cycles" in result.message
    assert len(result.residuals) == 3
    solver.destroy()
    solver = random_solver(comm, options=how, solver_parameters={"ksp_error_if_not_converged": None})[0]
    with pytest.raises(DivergedError, match="DIVERGED_MAX_IT"):
        solver.solve(U, G, start="skip")
    solver.destroy()
    solver = random_solver(comm, options=how | dict(on_divergence="serial"))[0]
    V = slab(solver, 3, u0)
    with logged() as said:
        result = solver.solve(V, G)
    assert (result.converged, result.reason) == (True, "serial")
    assert len(said) == (1 if comm.rank == 0 else 0)
    precise = random_solver(comm)[0]
    assert precise.solve(V, G).cycles == 0
    fixed = random_solver(comm, options=dict(residual="none", max_it=1))[0]
    result = fixed.solve(slab(fixed, 3, u0), G)
    assert (result.converged, result.reason, result.cycles) == (True, "its", 1)
    for s in (solver, precise, fixed):
        s.destroy()


@pytest.mark.parallel([1, 3])
def test_options_database_view_and_monitor(tmp_path_factory):
    comm, lines = MPI.COMM_WORLD, PETSc.Options()
    path = comm.bcast(str(tmp_path_factory.mktemp("view") / "view.txt"))
    given = {"ksp_type": "gcr", "ksp_view": f"ascii:{path}", "ksp_rtol": 1e-3}
    lines["mgrit_ksp_rtol"] = 1e-5  # the database comes first
    try:
        with logged() as said:
            solver, _, _, u0 = random_solver(comm, solver_parameters=given, options=dict(monitor=True, view=True))
            result = solver.solve(slab(solver, 3, u0))
    finally:
        del lines["mgrit_ksp_rtol"]
    assert solver.ksp.getType() == "gcr"
    assert solver.ksp.getTolerances()[0] == 1e-5
    comm.Barrier()
    with open(path) as file:
        text = file.read()
    for part in ("type: gcr", "relative=1e-05", "level 0: 19 steps, m = 3", "level 2: 3 steps"):
        assert part in text
    if comm.rank == 0:
        assert said[0] == solver.view()
        assert len(said) == 1 + len(result.residuals)
        assert f"residual {result.residuals[-1]:.6e}" in said[-1]
    else:
        assert not said
    solver.destroy()


class Affine(Matrices):
    def step(self, steps, u, out):
        super().step(steps, u, out)
        out += 1


@pytest.mark.parallel([1, 3])
def test_bad_input_is_refused_on_every_rank():
    comm, last = MPI.COMM_WORLD, MPI.COMM_WORLD.rank == MPI.COMM_WORLD.size - 1
    (fine,) = random_propagators(np.random.default_rng(0), 8, (), (2,))
    two = [fine, Same(np.eye(2))]
    for kwargs, message in (
        (dict(options=dict(storage="C", coarsening=2)), "storage 'C'"),
        (dict(options=dict(cycle="F", f_cycles=1, coarsening=2)), "f_cycles 1"),
        (dict(options=dict(coarsening=9)), "exceeds the 8 time steps"),
        (dict(bounds=[0, 7], options=dict(coarsening=2)), "bounds"),
    ):
        with pytest.raises(ValueError, match=message):
            KrylovMGRIT(two, 8, comm=comm, **kwargs)
    solver = KrylovMGRIT(two, 8, options=dict(coarsening=2), comm=comm)
    U = slab(solver, 2)
    k = len(U) - 1
    for good, bad, G, message in (
        (U, U[:-1], None, "for .* own steps"),
        (U, U.astype(np.float32), None, "float32"),
        (U, np.zeros((2 * k + 2, 2))[::2], None, "C-contiguous"),
        (U, U, np.zeros((k + 1, 2)), "own steps"),
    ):
        with pytest.raises(ValueError, match=message):
            solver.solve(bad if last else good, G if last else None)
    if comm.size > 1:
        with pytest.raises(ValueError, match="different shapes"):
            solver.solve(np.zeros((k + 1, 3)) if last else U)
    solver.destroy()
    solver = KrylovMGRIT([Affine(fine.M), two[1]], 8, options=dict(coarsening=2), comm=comm)
    for _ in range(2):  # not only the first time
        with pytest.raises(ValueError, match="affine"):
            solver.solve(U)
    solver.destroy()


@pytest.mark.usefixtures("array_kind")
@pytest.mark.parallel([1, 3])
def test_states_of_another_shape_and_numbers():
    comm, nsteps = MPI.COMM_WORLD, 12

    class Decay:
        def __init__(self, stride):
            self.factor = 0.9**stride + 0.01 * (stride > 1)

        def step(self, steps, u, out):
            np.multiply(u, self.factor, out=out)

    P = [Decay(1), Decay(4)]
    solver = KrylovMGRIT(P, nsteps, options=dict(coarsening=4, rtol=1e-13), comm=comm)
    fine = solver.operator.level
    for shape in ((), (2, 3), ()):
        U = np.zeros((fine.k + 1, *shape))
        U[0] = comm.rank == 0
        assert solver.solve(U).converged
        expected = 0.9 ** np.arange(fine.lo, fine.hi + 1).reshape(-1, *[1] * len(shape))
        np.testing.assert_allclose(U, np.broadcast_to(expected, U.shape), rtol=1e-12)
    solver.destroy()


@pytest.mark.parallel(4)
def test_space_and_time():
    """States shared by two ranks in space: vectors live on the whole grid, messages on the time communicator."""
    world, nsteps, n = MPI.COMM_WORLD, 14, 4
    space = world.Split(world.rank // 2, world.rank)
    time = world.Split(world.rank % 2, world.rank)
    M = 0.9 * np.linalg.qr(np.random.default_rng(3).normal(size=(n, n)))[0]
    own = slice(space.rank * n // 2, (space.rank + 1) * n // 2)

    class Shared:
        def __init__(self, A):
            self.A = A

        def step(self, steps, u, out):
            full = np.concatenate(space.allgather(np.ascontiguousarray(u)), axis=1)
            out[...] = full @ self.A[own].T

    coarse = np.linalg.matrix_power(M, 3) + 0.01
    solver = KrylovMGRIT(
        [Shared(M), Shared(coarse)],
        nsteps,
        options=dict(coarsening=3, rtol=1e-12),
        comm=time,
        petsc_comm=world,
    )
    alone = KrylovMGRIT([Same(M), Same(coarse)], nsteps, options=solver.options)
    fine = solver.operator.level
    u0, G = np.ones(n), np.random.default_rng(4).normal(size=(nsteps, n))
    U, V = np.zeros((fine.k + 1, n // 2)), slab(alone, n, u0)
    U[0] = u0[own] * (time.rank == 0)
    part = np.ascontiguousarray(G[fine.lo : fine.hi, own])
    shared, single = solver.solve(U, part), alone.solve(V, G)
    assert shared.cycles == single.cycles
    np.testing.assert_allclose(shared.residuals[:-1], single.residuals[:-1], rtol=1e-6)
    np.testing.assert_allclose(U, V[fine.lo : fine.hi + 1, own], rtol=0, atol=1e-11)
    solver.destroy()
    for comm in (space, time):
        comm.Free()


# -- finite elements -------------------------------------------------------------------------------------------------
class FiniteElements:
    """The linear part of a step of a :class:`LinearPropagator`."""

    def __init__(self, propagator):
        self.propagator = propagator

    def step(self, steps, u, out):
        self.propagator.apply(u, out)

    def sweep(self, first, U, G):
        self.propagator.sweep(U, G)


@pytest.mark.parallel([1, 3])
def test_heat_by_finite_elements():
    pytest.importorskip("firedrake")
    from firedrake import Function, FunctionSpace, TestFunction, UnitSquareMesh, dx, grad, inner
    from irksome import Dt

    from pint_fem.evolution import BackwardEuler, Evolution
    from pint_fem.propagators import LinearPropagator

    nsteps, comm = 26, MPI.COMM_WORLD
    V = FunctionSpace(UnitSquareMesh(8, 8, comm=MPI.COMM_SELF), "CG", 1)
    u, v = Function(V), TestFunction(V)
    evolution = Evolution(
        Dt(u) * v * dx + inner(grad(u), grad(v)) * dx, u, tableau=BackwardEuler(), dt=0.01, nsteps=nsteps
    )
    P = [FiniteElements(LinearPropagator(evolution, stride=s)) for s in (1, 4)]
    x = np.random.default_rng(0).normal(size=(nsteps, evolution.state_size))
    options, results = dict(coarsening=4, rtol=1e-10), []
    for side in (MPI.COMM_SELF, comm):
        solver = KrylovMGRIT(P, nsteps, options=options, comm=side)
        h = solver.operator
        h.set_state(x.shape[1:])
        bounds = h.level.bounds
        matrix = h.matrix()
        pc, own = preconditioner(h, matrix), h.vec(local(x, bounds, side))
        products = [applied(pc.apply, own), applied(matrix.mult, own)]
        results.append([p.reshape(-1, x.shape[1]) for p in products])
        U = slab(solver, x.shape[1], x[0])
        krylov = solver.solve(U)
        V = slab(solver, x.shape[1], x[0])
        MGRIT(P, nsteps, options=options | dict(rtol=1e-13), comm=side).solve(V)
        assert krylov.converged
        np.testing.assert_allclose(U, V, rtol=0, atol=1e-8 * abs(x).max())
        solver.destroy()
    for alone, part in zip(*results, strict=True):
        assert np.array_equal(part, local(alone, bounds, comm))

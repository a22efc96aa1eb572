"""MGRIT against its theory, XBraid's recorded runs, sequential stepping, and itself on other numbers of ranks."""

import functools
import itertools
import math
import warnings

import numpy as np
import pytest
from mpi4py import MPI

from pint_fem.errors import InputError
from pint_fem.mgrit import MGRIT, MGRITOptions, SolverFailure, split_steps
from pint_fem.theory import dirk_stability, two_level_bound
from tests.logs import logged
from tests.stepping import sequential

GAMMA = 1 - 1 / math.sqrt(2)
TABLEAUX = {
    "backward Euler": ([[1]], [1]),
    "SDIRK2": ([[GAMMA, 0], [1 - GAMMA, GAMMA]], [1 - GAMMA, GAMMA]),
}


class Diagonal:
    """``u -> lam * u``, one eigenvalue a component."""

    def __init__(self, lam):
        """Take the eigenvalues."""
        self.lam = np.asarray(lam)

    def step(self, steps, u, out):
        """Step."""
        out[...] = self.lam * u


class Counting:
    """Nonlinear, with coefficients that depend on the step number, elementwise: the same bits in any block.

    Step ``n`` of a level with ``stride`` starts at the fine point ``n * stride``, so a wrong number or a wrong stride
    of numbers changes the answer. The coarse step is a cheap approximation of the ``stride`` fine ones.
    """

    def __init__(self, stride=1, nonlinear=0.1):
        """Take fine steps per step, and the size of the nonlinear term."""
        self.stride, self.nonlinear = stride, nonlinear
        self.strided = False

    def step(self, steps, u, out):
        """Step."""
        assert len(steps) == len(u) == len(out)
        self.strided |= len(steps) > 1 and steps.step > 1
        n = np.arange(steps.start, steps.stop, steps.step, dtype=float).reshape(-1, *[1] * (u.ndim - 1)) * self.stride
        decay = 0.05 * self.stride * (1 + 1 / (1 + n))
        out[...] = (u + decay * (n % 7) / 7) / (1 + decay + self.nonlinear * self.stride * u * u)


class Swept(Counting):
    """The same with a ``sweep``."""

    def sweep(self, first, U, G):
        """Take all steps."""
        for i in range(len(U) - 1):
            self.step(range(first + i, first + i + 1), U[i : i + 1], U[i + 1 : i + 2])
            if G is not None:
                U[i + 1] += G[i]


class Failing(Counting):
    """Raises, or gives NaN, at some steps."""

    def __init__(self, stride, *, raises=(), nan=(), rank_only=True):
        """Take the steps that fail and whether this rank fails at all."""
        super().__init__(stride)
        self.raises, self.nan = (set(raises), set(nan)) if rank_only else (set(), set())

    def step(self, steps, u, out):
        """Step."""
        if self.raises & set(steps):
            raise ArithmeticError("no root found")
        super().step(steps, u, out)
        for i, n in enumerate(steps):
            if n in self.nan:
                out[i] = np.nan


class Picky(Failing):
    """Also raises when it is handed NaN, as a nonlinear solver would: that must not hide the cause."""

    def step(self, steps, u, out):
        """Step."""
        if not np.isfinite(u).all():
            raise FloatingPointError("NaN came in")
        super().step(steps, u, out)


def strides(factors):
    """Fine steps in a step of each level."""
    return [math.prod(factors[:i]) for i in range(len(factors) + 1)]


def guess(u0, nsteps, seed=0):
    """Initial value and noise."""
    U = np.random.default_rng(seed).uniform(-1, 1, (nsteps + 1, *np.shape(u0)))
    U[0] = u0
    return U


# -- published numbers -----------------------------------------------------------------------------------------------
def xbraid_residuals(nsteps, relax, levels, cycles, skip=False):
    """XBraid's ex-01: u' = -u, backward Euler, dt = 1/2, m = 2, from 0.456 everywhere.

    With ``skip`` (XBraid's default) the first way down does not relax: the C-points start from the coarse solution.
    """
    U = np.full((nsteps + 1, 1), 0.456)
    U[0] = 1
    if skip:
        U[::2] = sequential(Diagonal([1 / 2]), [1.0], nsteps // 2)
    options = dict(coarsening=2, relax=relax, rtol=0, max_it=cycles)
    return MGRIT([Diagonal([1 / (1 + 0.5 * 2**i)]) for i in range(levels)], nsteps, options=options).solve(U).residuals


@pytest.mark.parametrize(
    ("nsteps", "relax", "levels", "skip", "expected"),
    [
        (10, "FCF", 2, True, [2.845538e-2, 8.621939e-4]),
        (24, "FCF", 2, False, [3.560861e-1, 1.403540e-2]),
        (24, ("FCF", "FCFCF"), 3, False, [3.560861e-1, 1.420885e-2]),
    ],
)
def test_residuals_are_those_of_xbraid(nsteps, relax, levels, skip, expected):
    """Recorded runs of ex-01 and ex-01-expanded of XBraid, to the digits given."""
    residuals = xbraid_residuals(nsteps, relax, levels, len(expected) - 1, skip)
    assert [f"{r:.6e}" for r in residuals] == [f"{r:.6e}" for r in expected]


def test_ex01_ends_by_finite_termination():
    """Five coarse steps with FCF: two cycles and one more relaxation, and the residual is gone, as XBraid's is."""
    residuals = xbraid_residuals(10, "FCF", 2, 2, skip=True)
    assert residuals[1] > 1e-4
    assert residuals[2] < 1e-15


@pytest.mark.parametrize(
    ("method", "relax", "expected"),
    [
        ("backward Euler", "F", [0.1250, 0.2039, 0.2489, 0.2730, 0.2920]),
        ("backward Euler", "FCF", [0.0527, 0.0813, 0.0962, 0.1038, 0.1096]),
        ("SDIRK2", "F", [0.2946, 0.2612, 0.2614, 0.2615, 0.2615]),
        ("SDIRK2", "FCF", [0.0116, 0.0104, 0.0109, 0.0110, 0.0110]),
    ],
)
def test_two_level_theory(method, relax, expected):
    """Supremum over dt*kappa with infinitely many steps (Dobrev, Kolev, Petersson, Schroder 2017)."""
    z = -np.logspace(-6, 6, 20001)
    A, b = TABLEAUX[method]
    for m, value in zip([2, 4, 8, 16, 64], expected, strict=True):
        bound = two_level_bound(dirk_stability(A, b, z), dirk_stability(A, b, m * z), m, relax=relax)
        assert bound == pytest.approx(value, abs=6e-5)


def test_stability_functions_are_the_rational_ones():
    """Backward Euler 1/(1-z); Crank-Nicolson (1+z/2)/(1-z/2), explicit Euler 1+z; SDIRK2 is L-stable of order 2."""
    z = np.array([[-3.0, 0.5], [0.0, -1e3]]) + 0.7j
    np.testing.assert_allclose(dirk_stability([[1]], [1], z), 1 / (1 - z), rtol=1e-12)
    trapezoidal = dirk_stability([[0, 0], [0.5, 0.5]], [0.5, 0.5], z)
    np.testing.assert_allclose(trapezoidal, (1 + z / 2) / (1 - z / 2), rtol=1e-12)
    np.testing.assert_allclose(dirk_stability([[0]], [1], z), 1 + z)
    assert abs(dirk_stability(*TABLEAUX["SDIRK2"], -1e12)) < 1e-10
    defects = [abs(dirk_stability(*TABLEAUX["SDIRK2"], h) - math.exp(h)) for h in (0.02, 0.01)]
    assert defects[0] / defects[1] == pytest.approx(8, rel=0.05)


def test_bound_of_undamped_modes():
    """|mu| = 1 sums to Nc; lam = mu = 1 (a constant kept by both) has no error, with infinitely many steps too."""
    assert two_level_bound([1.0], [-1.0], 2, 16) == pytest.approx(2 * 16)
    assert two_level_bound([1j], [1.0], 2, 16, "FCF") == pytest.approx(2 * 15)
    assert two_level_bound([1.0, 0.5], [1.0, 0.3], 2) == pytest.approx(0.05 / 0.7)
    assert two_level_bound([0.5], [1.5], 2) == math.inf
    assert two_level_bound([0.5], [0.3], 2, 9, "FCFCF") == pytest.approx(0.05 * 0.25**2 * (1 - 0.3**7) / 0.7)
    with pytest.raises(ValueError, match="CFC"):
        two_level_bound([0.5], [0.5], 2, relax="CFC")


# -- linear theory on runs -------------------------------------------------------------------------------------------
class Rotation:
    """A normal, not symmetric propagator: rotations with damping, on pairs of components."""

    def __init__(self, lam):
        """Take complex eigenvalues."""
        self.lam = np.asarray(lam, dtype=complex)

    def step(self, steps, u, out):
        """Step."""
        z = self.lam * (u[..., 0] + 1j * u[..., 1])
        out[..., 0], out[..., 1] = z.real, z.imag


def random_eigenvalues(rng, n, largest=1.0):
    """Complex eigenvalues in a disk."""
    return largest * np.sqrt(rng.uniform(0, 1, n)) * np.exp(2j * np.pi * rng.uniform(0, 1, n))


@pytest.mark.usefixtures("array_kind")
@pytest.mark.parametrize("relax", ["F", "FCF"])
@pytest.mark.parametrize(("m", "coarse_steps", "extra"), [(2, 8, 0), (3, 6, 2), (4, 5, 1), (5, 1, 3)])
def test_exact_after_finitely_many_cycles(m, coarse_steps, extra, relax):
    """Exact after Nc cycles (F) or ceil(Nc/2) (FCF), whatever the coarse propagator."""
    rng = np.random.default_rng(m)
    N, last = m * coarse_steps + extra, coarse_steps if relax == "F" else math.ceil(coarse_steps / 2)
    fine, coarse = Rotation(random_eigenvalues(rng, 6)), Rotation(random_eigenvalues(rng, 6))
    exact = sequential(fine, np.ones((6, 2)), N)
    U = guess(np.ones((6, 2)), N)
    MGRIT([fine, coarse], N, options=dict(coarsening=m, relax=relax, rtol=0, max_it=last)).solve(U)
    np.testing.assert_allclose(U, exact, rtol=0, atol=1e-13)


@pytest.mark.parametrize(("relax", "last"), [("F", 8), ("FCF", 4)])
def test_not_exact_before(relax, last):
    """With |lam| = 1 and a bad coarse propagator the last point is wrong until the last cycle."""
    fine, coarse, N = Diagonal([1.0, -1.0]), Diagonal([0.5, -0.3]), 16
    exact = sequential(fine, np.ones(2), N)
    for cycles in range(1, last + 1):
        U = guess(np.ones(2), N)
        options = dict(coarsening=2, relax=relax, rtol=0, max_it=cycles)
        result = MGRIT([fine, coarse], N, options=options).solve(U)
        assert (abs(U - exact).max() > 1e-13) == (cycles < last)
        assert (result.reason == "atol") == (result.residuals[-1] == 0)


@pytest.mark.parametrize("relax", ["F", "FCF"])
@pytest.mark.parametrize("seed", range(5))
def test_error_contracts_by_the_bound(relax, seed):
    """|e_k| <= bound^k |e_0| in l2 over the C-points, each mode by its own bound, for arbitrary stable lam and mu."""
    rng = np.random.default_rng(seed)
    m, coarse_steps, modes = int(rng.integers(2, 6)), 12, 20
    N = m * coarse_steps + int(rng.integers(0, m))
    lam = rng.uniform(-1, 1, modes)
    mu = np.clip(lam**m + rng.uniform(-0.3, 0.3, modes), -1, 1)
    exact = sequential(Diagonal(lam), np.ones(modes), N)
    bounds = np.array([two_level_bound([a], [b], m, coarse_steps, relax) for a, b in zip(lam, mu, strict=True)])
    start = guess(np.ones(modes), N, seed)
    first = np.linalg.norm((start - exact)[::m], axis=0)
    for cycles in range(1, 8):
        U = start.copy()
        options = dict(coarsening=m, relax=relax, rtol=0, max_it=cycles, dtol=1e300)
        result = MGRIT([Diagonal(lam), Diagonal(mu)], N, options=options).solve(U)
        assert result.cycles == cycles
        error = np.linalg.norm((U - exact)[::m], axis=0)
        assert (error <= bounds**cycles * first * (1 + 1e-10) + 1e-14).all()


def test_adjoint_of_normal_propagator_converges_alike():
    """The adjoint steps with the conjugate eigenvalues: the same residual history from mirrored data."""
    rng = np.random.default_rng(5)
    lam = random_eigenvalues(rng, 8, 0.95)
    mu = 0.9 * lam**4
    start, options = guess(np.ones((8, 2)), 64), dict(coarsening=4, rtol=0, max_it=5)
    mirrored = start * [1, -1]
    forward = MGRIT([Rotation(lam), Rotation(mu)], 64, options=options).solve(start)
    backward = MGRIT([Rotation(lam.conj()), Rotation(mu.conj())], 64, options=options).solve(mirrored)
    np.testing.assert_allclose(backward.residuals, forward.residuals, rtol=1e-10)


# -- the same answer as stepping ------------------------------------------------------------------------------------
HIERARCHIES = [
    (24, (2,)),
    (24, (2, 3)),
    (37, (4, 2)),  # trailing F-points on two levels
    (41, (2, 2, 2)),
    (50, (7,)),
    (53, (3, 4, 2)),
    (9, (8,)),  # one coarse step
    (2, (2,)),
]


@pytest.mark.usefixtures("array_kind")
@pytest.mark.parametrize(("nsteps", "factors"), HIERARCHIES)
@pytest.mark.parametrize("relax", ["F", "FCF", ("FCF", "F"), ("F", "FCFCF")])
@pytest.mark.parametrize("kind", [Counting, Swept])
def test_solution_is_that_of_stepping(nsteps, factors, relax, kind):
    """Nonlinear, step-dependent, with a right-hand side: MGRIT (FAS) solves the sequential equations."""
    u0 = np.array([[1.0, -0.5, 0.2], [2.0, 0.0, -1.0]])
    G = 0.1 * np.random.default_rng(1).standard_normal((nsteps, *u0.shape))
    propagators = [kind(s) for s in strides(factors)]
    U = guess(u0, nsteps)
    options = dict(coarsening=factors, relax=relax, rtol=1e-14, dtol=1e12)
    result = MGRIT(propagators, nsteps, options=options).solve(U, G)
    assert result.converged
    assert result.cycles <= nsteps // factors[0] + 30
    np.testing.assert_allclose(U, sequential(kind(), u0, nsteps, G), rtol=0, atol=1e-12)
    if nsteps >= 4 * factors[0]:
        assert propagators[0].strided


@pytest.mark.usefixtures("array_kind")
@pytest.mark.parametrize("kind", [Counting, Swept])
def test_one_level_is_stepping(kind):
    """Bit for bit, with the count of steps."""
    G = np.linspace(-1, 1, 11).reshape(11, 1)
    solver, U = MGRIT([kind()], 11), guess([0.7], 11)
    result = solver.solve(U, G)
    assert (result.converged, result.reason, result.cycles) == (True, "exact", 0)
    assert math.isnan(result.factor)
    np.testing.assert_array_equal(U, sequential(kind(), [0.7], 11, G))
    assert solver.levels[0].phi_calls == 11


@pytest.mark.usefixtures("array_kind")
@pytest.mark.parametrize(("nsteps", "factors"), HIERARCHIES)
@pytest.mark.parametrize("relax", ["F", "FCF"])
def test_solution_is_a_fixed_point(nsteps, factors, relax):
    """A cycle from the solution stays there, however bad the coarse propagators."""
    propagators = [Counting(), *(Diagonal([-0.9, 0.4]) for _ in factors)]
    exact = sequential(propagators[0], [1.0, -2.0], nsteps)
    U = exact.copy()
    result = MGRIT(propagators, nsteps, options=dict(coarsening=factors, relax=relax, rtol=0, max_it=1)).solve(U)
    assert result.residuals[0] < 1e-15
    np.testing.assert_allclose(U, exact, rtol=0, atol=1e-14)


@pytest.mark.usefixtures("array_kind")
def test_states_may_be_numbers_and_the_time_axis_reversed():
    """``U`` of shape ``(N + 1,)``; reversed and strided views in place."""
    exact = sequential(Counting(), 0.5, 24)
    storage = np.zeros(49)
    U = storage[::-2]
    U[0] = 0.5
    assert MGRIT([Counting(), Counting(4)], 24, options=dict(coarsening=4, rtol=1e-15)).solve(U).converged
    np.testing.assert_allclose(storage[::-2], exact, rtol=0, atol=1e-13)
    assert not storage[1::2].any()


@pytest.mark.usefixtures("array_kind")
def test_solver_can_be_used_again():
    """A second solve, a failed one, and another shape of the state leave nothing behind."""
    trap = Failing(4)
    solver = MGRIT([Counting(), trap], 30, options=dict(coarsening=4))
    first, again = guess([1.0, 2.0], 30), guess([1.0, 2.0], 30)
    history = solver.solve(first).residuals
    trap.nan = {3}
    with pytest.raises(SolverFailure, match="level 1, steps 3: value not finite"):
        solver.solve(guess([1.0, 2.0], 30))
    trap.nan = set()
    solver.solve(guess([1.0], 30))
    assert solver.solve(again).residuals == history
    np.testing.assert_array_equal(first, again)


# -- what a cycle costs -----------------------------------------------------------------------------------------------
def theory_calls(nsteps, factors, relax, cycles):
    """Propagator calls of ``cycles`` V-cycles and the relaxation that finds them enough, a level each.

    Sweeps over F-points cost n - nc, over C-points (C-relaxation, residual) nc; a coarse right-hand side costs n. The
    finest level needs no F-relaxation on the way down after the first.
    """
    n = [nsteps]
    for m in factors:
        n.append(n[-1] // m)
    calls = []
    for i in range(len(n)):
        if i == len(n) - 1:
            calls.append(2 * n[i] * cycles)
            continue
        down = (n[i] if relax == "FCF" else 0) + n[i + 1]
        sweep = n[i] - n[i + 1]
        calls.append((cycles + 1) * (down + sweep) if i == 0 else cycles * (n[i] + sweep + down + sweep))
    return calls


@pytest.mark.parallel([1, 3])
def test_calls_are_those_of_the_theory():
    """Counted over all ranks, for any number of them."""
    comm = MPI.COMM_WORLD
    for (nsteps, factors), relax in itertools.product(HIERARCHIES[:6], ("F", "FCF")):
        options = dict(coarsening=factors, relax=relax, rtol=0, max_it=2)
        solver = MGRIT([Counting(s) for s in strides(factors)], nsteps, options=options, comm=comm)
        U = guess([1.0], nsteps)[: solver.local_rows]
        result = solver.solve(U)
        assert result.cycles == 2
        calls = [comm.allreduce(level.phi_calls) for level in solver.levels]
        assert calls == theory_calls(nsteps, factors, relax, 2)


# -- any number of ranks, the same bits ------------------------------------------------------------------------------
def splittings(nsteps, m, size):
    """Bounds: even, on C-points, inside one interval, all on one rank, random, idle ranks."""
    rng = np.random.default_rng(nsteps + size)
    yield split_steps(nsteps, size)
    coarse = nsteps // m
    yield [*(m * b for b in split_steps(coarse, size)[:-1]), nsteps]
    yield [*range(size), nsteps]  # single steps, then the rest
    yield [0, *(nsteps - size + 1 + r for r in range(size - 1)), nsteps]  # the other way round
    yield [0, *[nsteps] * size]  # all on the first rank
    yield [*[0] * size, nsteps]  # all on the last
    for _ in range(2):
        yield [0, *sorted(rng.integers(0, nsteps + 1, size - 1).tolist()), nsteps]


@functools.cache
def solve_alone(nsteps, factors, relax, kind, solver):
    """Options, first guess, right-hand side, solution and result of a solve of the whole on this rank."""
    u0 = np.array([[1.0, -0.5], [0.3, 2.0]])
    G = 0.1 * np.random.default_rng(2).standard_normal((nsteps, *u0.shape))
    options = dict(levels=len(factors) + 1, relax=relax, rtol=0, max_it=2, dtol=1e300)
    if factors:
        options["coarsening"] = factors
    start = guess(u0, nsteps)
    alone = start.copy()
    result = solver([kind(s) for s in strides(factors)], nsteps, options=options).solve(alone, G)
    return options, start, G, alone, result


def assert_same_as_alone(comm, bounds, nsteps, factors, relax, *, kind=Counting, backwards=False):
    """Compare bits of the slab, the ghost row and the history with a solve of the whole on this rank."""
    options, start, G, alone, expected = solve_alone(nsteps, factors, relax, kind, MGRIT)
    lo, hi = bounds[comm.rank], bounds[comm.rank + 1]
    solver = MGRIT([kind(s) for s in strides(factors)], nsteps, options=options, comm=comm, bounds=bounds)
    start = start[lo : hi + 1].copy()
    if lo:
        start[0] = np.nan  # a ghost row is never read before it is received
    G = G[lo:hi]
    if backwards:  # what an adjoint sweep does: views of arrays that run the other way
        start, G = start[::-1].copy()[::-1], G[::-1].copy()[::-1]
        assert start.strides[0] < 0
    result = solver.solve(start, G)
    assert result.residuals == expected.residuals
    assert (result.cycles, result.reason) == (expected.cycles, expected.reason)
    own = slice(0 if hi > lo or comm.rank == 0 else 1, None)  # a rank without steps has no ghost to keep
    np.testing.assert_array_equal(start[own], alone[lo : hi + 1][own])


@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize("relax", ["F", "FCF"])
@pytest.mark.parametrize("factors", [(), (2,), (4,), (5, 2), (2, 3), (2, 2, 2)])
@pytest.mark.parametrize("nsteps", [24, 29])
def test_same_bits_on_any_number_of_ranks(nsteps, factors, relax):
    """Solution, ghost rows and residual history, on slabs of all kinds, forwards and backwards in time."""
    comm = MPI.COMM_WORLD
    turned = comm.Split(0, -comm.rank)
    for i, bounds in enumerate(splittings(nsteps, (*factors, 2)[0], comm.size)):
        kind = (Counting, Swept)[i % 2]
        assert_same_as_alone(comm, bounds, nsteps, factors, relax, kind=kind)
        assert_same_as_alone(turned, bounds, nsteps, factors, relax, kind=kind, backwards=True)
    turned.Free()


@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize("relax", ["F", "FCF", "FCFCF"])
def test_same_bits_on_hardly_any_steps(relax):
    """3 ranks and 4 points, and fewer steps than ranks: every splitting there is."""
    comm = MPI.COMM_WORLD
    for nsteps in (2, 3, 5)[: 3 if comm.size < 4 else 2]:
        for inner in itertools.combinations_with_replacement(range(nsteps + 1), comm.size - 1):
            for factors in ((2,), (3,), (2, 2)):
                if math.prod(factors) <= nsteps:
                    assert_same_as_alone(comm, [0, *inner, nsteps], nsteps, factors, relax)


@pytest.mark.usefixtures("array_kind")
@pytest.mark.parallel(3)
def test_numbers_as_states_travel():
    """``U`` of shape ``(k + 1,)``: messages of single numbers."""
    comm, N = MPI.COMM_WORLD, 30
    solver = MGRIT([Counting(), Counting(4)], N, options=dict(coarsening=4, rtol=1e-14), comm=comm)
    level = solver.levels[0]
    U = guess(0.5, N)[level.lo : level.hi + 1]
    assert solver.solve(U).converged
    np.testing.assert_allclose(U, sequential(Counting(), 0.5, N)[level.lo : level.hi + 1], rtol=0, atol=1e-13)


@pytest.mark.parallel([1, 3])
def test_many_solvers_on_one_communicator():
    """Different hierarchies one after another do not take each other's messages."""
    comm = MPI.COMM_WORLD
    for nsteps, factors in HIERARCHIES:
        if nsteps >= comm.size:
            assert_same_as_alone(comm, split_steps(nsteps, comm.size), nsteps, factors, "FCF")


# -- failures: on every rank, naming the cause, never a hang --------------------------------------------------------
def failing_solve(comm, level, *, kind=Failing, relax="FCF", factors=(4, 2), nsteps=45, bounds=None, **failures):
    """Solve with one bad level; return the error's text, after checking that all ranks have the same."""
    options = dict(levels=len(factors) + 1, relax=relax, rtol=1e-10)
    if factors:
        options["coarsening"] = factors
    propagators = [kind(s, **(failures if i == level else {})) for i, s in enumerate(strides(factors))]
    solver = MGRIT(propagators, nsteps, options=options, comm=comm, bounds=bounds, name="state")
    slab = solver.levels[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(SolverFailure) as caught:
            solver.solve(guess([1.0, 2.0], nsteps)[slab.lo : slab.hi + 1])
    texts = comm.allgather(str(caught.value))
    assert len(set(texts)) == 1
    assert texts[0].startswith("state: ")
    return texts[0]


@pytest.mark.usefixtures("array_kind")
@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize("kind", [Failing, Picky])
@pytest.mark.parametrize("relax", ["F", "FCF"])
def test_failure_at_any_step_is_named_everywhere(relax, kind):
    """An exception or a NaN at one step of any level, the trailing points after the last C-point included."""
    comm = MPI.COMM_WORLD
    for level, nsteps in enumerate((45, 11, 5)):
        for n in range(0, nsteps, comm.size if level == 0 else 1):
            assert failing_solve(comm, level, kind=kind, relax=relax, nan=[n]).endswith(
                f"level {level}, steps {n}: value not finite"
            )
        for n in range(0, nsteps, 5):
            text = failing_solve(comm, level, kind=kind, relax=relax, raises=[n])
            assert f"level {level}, steps " in text
            assert text.endswith("ArithmeticError: no root found")
            first, last = map(int, text.split("steps ")[1].split(":")[0].split(".."))
            assert first <= n <= last


@pytest.mark.usefixtures("array_kind")
@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize("kind", [Failing, Picky])
def test_failure_while_stepping_is_named_everywhere(kind):
    """With one level, on any rank."""
    comm = MPI.COMM_WORLD
    for n in range(0, 45, 4):
        assert failing_solve(comm, 0, kind=kind, factors=(), nan=[n]).endswith(f"level 0, steps {n}: value not finite")
        text = failing_solve(comm, 0, kind=kind, factors=(), raises=[n])
        assert text.endswith(f"level 0, steps {n}..{n}: ArithmeticError: no root found")


@pytest.mark.usefixtures("array_kind")
@pytest.mark.parallel(3)
def test_failure_on_one_rank_only():
    """A rank that cannot step at all, each in turn; also with all steps on one rank."""
    comm = MPI.COMM_WORLD
    everything = range(45)
    for bad in range(comm.size):
        for factors in ((), (4,), (4, 2)):
            text = failing_solve(comm, 0, factors=factors, raises=everything, rank_only=comm.rank == bad)
            first = int(text.split("steps ")[1].split("..")[0])
            assert (45 * bad) // comm.size <= first < (45 * (bad + 1)) // comm.size
            bounds = [0] * (bad + 1) + [45] * (comm.size - bad)
            failing_solve(comm, 0, factors=factors, bounds=bounds, raises=everything, rank_only=comm.rank == bad)


class BadSweep(Counting):
    """Its ``sweep`` cannot even take no steps."""

    def sweep(self, first, U, G):
        """Fail."""
        raise ArithmeticError("no sweep today")


@pytest.mark.usefixtures("array_kind")
@pytest.mark.parallel([1, 3])
def test_failing_sweep_is_a_failure():
    """Of the coarsest level, or of the only one, where some ranks have no steps."""
    comm = MPI.COMM_WORLD
    for factors, bounds in itertools.product([(), (4,)], [None, [*[0] * comm.size, 45], [0, *[45] * comm.size]]):
        propagators = [BadSweep(s) for s in strides(factors)]
        solver = MGRIT(propagators, 45, options=dict(coarsening=factors or 2), comm=comm, bounds=bounds)
        with pytest.raises(SolverFailure, match=rf"level {len(factors)}, steps 0\.\.\d+: ArithmeticError: no sweep"):
            solver.solve(guess([1.0], 45)[: solver.local_rows])


class Hiding(Failing):
    """Maps NaN to 0, as ``where(u > 0, u, 0)`` does."""

    def step(self, steps, u, out):
        """Step."""
        super().step(steps, np.where(np.isfinite(u), u, 0), out)


@pytest.mark.usefixtures("array_kind")
@pytest.mark.parallel([1, 3])
def test_nan_that_the_next_step_hides_is_found():
    """The result would hold a NaN though all residuals are finite."""
    for relax in ("F", "FCF"):
        text = failing_solve(MPI.COMM_WORLD, 0, kind=Hiding, relax=relax, nan=[5])
        assert text.endswith("level 0, steps 5: value not finite")


@pytest.mark.usefixtures("array_kind")
@pytest.mark.parallel([1, 3])
def test_bad_data_is_found():
    """NaN in the initial value, the right-hand side, or a C-point of the first guess; the step is named."""
    comm, N = MPI.COMM_WORLD, 22
    for where, factors in itertools.product(("initial", "rhs", "guess"), ((), (4,))):
        if (where, factors) == ("guess", ()):
            continue  # stepping does not read it
        solver = MGRIT([Counting(s) for s in strides(factors)], N, options=dict(coarsening=factors or 2), comm=comm)
        lo, hi = solver.levels[0].lo, solver.levels[0].hi
        U, G = guess([1.0], N), np.zeros((N, 1))
        if where == "rhs":
            G[13] = np.nan
        else:
            U[0 if where == "initial" else 16] = np.nan
        step = {"initial": 0, "rhs": 13, "guess": r"\d+"}[where]
        with pytest.raises(SolverFailure, match=rf"level 0, steps {step}: value not finite"):
            solver.solve(U[lo : hi + 1], G[lo:hi])


@pytest.mark.usefixtures("array_kind")
@pytest.mark.parallel([1, 3])
def test_bad_arrays_are_refused_on_every_rank():
    """Wrong on the last rank only: the others do not wait for it."""
    comm = MPI.COMM_WORLD
    solver = MGRIT([Counting(), Counting(4)], 22, options=dict(coarsening=4), comm=comm)
    k, last = solver.local_rows - 1, comm.rank == comm.size - 1
    good = np.zeros((k + 1, 2))
    whole, strided = np.zeros((k + 1, 2), int), np.zeros((k + 1, 4))[:, ::2]
    for bad in (np.zeros((k + 2, 2)), whole, whole.astype(complex), strided):
        with pytest.raises(ValueError, match="mgrit: "):
            solver.solve(bad if last else good)
    with pytest.raises(ValueError, match=r"mgrit: U .* and G "):
        solver.solve(good, np.zeros((k + 1, 2)) if last else None)
    if comm.size > 1:
        with pytest.raises(ValueError, match="different shapes"):
            solver.solve(np.zeros((k + 1, 3)) if last else good)
        with pytest.raises(ValueError, match="None on some ranks only: give zeros"):
            solver.solve(good, np.zeros((k, 2)) if last else None)


@pytest.mark.usefixtures("array_kind")
@pytest.mark.parallel([1, 3])
def test_failing_norm_is_a_failure():
    """The user's norm fails on the last rank: numerically, or as it is not one number a state."""
    comm = MPI.COMM_WORLD

    def norms(block):
        if comm.rank == comm.size - 1:
            raise ArithmeticError("no norm")
        return np.ones(len(block))

    short = lambda block: np.ones(len(block) + (comm.rank == comm.size - 1))
    for factors, (bad, kind) in itertools.product(((), (4,)), ((norms, SolverFailure), (short, InputError))):
        options = dict(coarsening=factors or 2)
        solver = MGRIT([Counting(s) for s in strides(factors)], 22, options=options, comm=comm, point_norms=bad)
        with pytest.raises(kind, match=r"point_norms: |point_norms returned shape") as caught:
            solver.solve(np.zeros((solver.local_rows, 2)))
        assert type(caught.value.__cause__) is (ArithmeticError if bad is norms else InputError)


def test_cycles_run_out():
    """``max_it`` cycles: a given number with tolerances of 0; else not converged, and it says why."""
    for tolerances, outcome in ((dict(rtol=0), (True, "its")), (dict(rtol=1e-15, atol=1e-300), (False, "max_it"))):
        solver = MGRIT([Counting(), Counting(4)], 64, options=dict(coarsening=4, relax="F", max_it=2, **tolerances))
        result = solver.solve(guess([1.0], 64))
        assert (result.converged, result.reason, result.cycles, len(result.residuals)) == (*outcome, 2, 3)
        assert result.factor == pytest.approx((result.residuals[2] / result.residuals[0]) ** 0.5)


@pytest.mark.usefixtures("array_kind")
def test_reasons_are_true():
    """The last residual is below the tolerance it names, and those before are not."""
    exact = sequential(Counting(), [1.0, -1.0], 64)
    for reason, options in (("atol", dict(rtol=0, atol=1e-6)), ("rtol", dict(rtol=1e-6))):
        U = guess([1.0, -1.0], 64)
        result = MGRIT([Counting(), Counting(4)], 64, options=dict(coarsening=4, **options)).solve(U)
        tolerance = 1e-6 * (1 if reason == "atol" else np.linalg.norm(exact[4::4]))
        assert (result.converged, result.reason) == (True, reason)
        assert result.residuals[-1] <= tolerance * (1 + 1e-5) < result.residuals[-2]
        residual = U[1:] - sequential_step(U)
        assert np.linalg.norm(residual) == pytest.approx(result.residuals[-1], rel=1e-6)


def sequential_step(U):
    """``Phi_n(U[n])`` for all ``n``."""
    out = np.empty_like(U[1:])
    Counting().step(range(len(out)), U[:-1], out)
    return out


@pytest.mark.usefixtures("array_kind")
@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize("mu", [1.5, 40.0, 1e200])
def test_divergence_is_reported(mu):
    """A coarse propagator that grows: diverged, or a failure once numbers overflow; no warnings either way."""
    comm, N = MPI.COMM_WORLD, 512
    solver = MGRIT([Diagonal([0.99]), Diagonal([mu])], N, options=dict(coarsening=2, relax="F"), comm=comm)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            result = solver.solve(guess([1.0], N)[: solver.local_rows])
            outcome = result.reason
            assert not result.converged
        except SolverFailure as error:
            outcome = str(error)
    assert outcome == "diverged" or "level 1, steps" in outcome or "too large" in outcome
    assert len(set(comm.allgather(outcome))) == 1


def test_factor_is_the_geometric_mean():
    """NaN without two positive residuals; an exact zero at the end does not count."""
    from pint_fem.mgrit import SolveResult

    assert SolveResult(residuals=[8.0, 4.0, 0.5]).factor == pytest.approx(0.25)
    assert SolveResult(residuals=[8.0, 2.0, 0.0]).factor == pytest.approx(0.25)
    assert all(math.isnan(SolveResult(residuals=r).factor) for r in ([], [1.0], [0.0], [1.0, 0.0]))


# -- options -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(coarsenning=4), "unknown mgrit option 'coarsenning': did you mean 'coarsening'"),
        (dict(xyzzy=1), "unknown mgrit option 'xyzzy': the options are levels, coarsening"),
        *[(dict(coarsening=c), "coarsening") for c in (1, 0, -2, 2.5, (8, 1), (), None, "8", True, (2, 2.0))],
        *[(dict(levels=v), "levels") for v in (0, -1, 2.0, "2", True)],
        *[(dict(relax=v), "relax") for v in ("X", "CF", "", (), ("F", "X"), None, -1, 2.5)],
        *[(dict(rtol=v), "rtol") for v in (-1e-8, math.nan, math.inf, "1e-8", None, True)],
        *[(dict(atol=v), "atol") for v in (-1.0, math.nan, math.inf, "0", None)],
        *[(dict(dtol=v), "dtol") for v in (1, 0.5, -3, math.nan, "big", None)],
        *[(dict(max_it=v), "max_it") for v in (0, -1, 2.0, None, "3", True)],
        *[(dict(monitor=v), "monitor") for v in ("yes", None, 2)],
    ],
)
def test_bad_option_is_refused_by_name(options, message):
    """Also when it changes good options, and by the solver itself."""
    with pytest.raises(ValueError, match=f"mgrit.* {message}|{message}") as caught:
        MGRITOptions.make(options)
    assert "mgrit" in str(caught.value)
    with pytest.raises(ValueError, match=next(iter(options))):
        MGRITOptions.make(MGRITOptions(), **options)
    with pytest.raises(ValueError, match=next(iter(options))):
        MGRIT([Counting(), Counting(4)], 64, options=options)


def test_good_options():
    """Numbers for lists, numpy's integers, one string for all levels, infinite ``dtol``."""
    options = MGRITOptions.make(dict(coarsening=np.int64(4), relax="F", dtol=math.inf, rtol=np.float64(0)))
    assert (options.coarsening, options.relax, options.scheme(3)) == ((4,), ("F",), "F")
    assert MGRITOptions.make(dict(coarsening=[np.int32(8), 2])).coarsening == (8, 2)
    assert MGRITOptions.make(options, relax=["FCF", "F"]).scheme(0) == "FCF"
    assert MGRITOptions.make(options, levels=4).factors(64) == (4, 4, 4)
    assert MGRITOptions.make(None) == MGRITOptions()


@pytest.mark.parametrize(("nsteps", "factors"), [(512, (8, 4)), (128, (8, 4)), (127, (8,)), (32, (8,)), (16, (8,))])
def test_levels_chosen(nsteps, factors):
    """At least 4 steps on the coarsest of at most 3 levels, and never fewer than 2 levels."""
    assert MGRITOptions().factors(nsteps) == factors


@pytest.mark.parametrize(
    ("count", "nsteps", "options", "message"),
    [
        (2, 7, dict(coarsening=8), "coarsening 8 exceeds the 7 time steps"),
        (4, 31, dict(coarsening=(4, 2)), "coarsening 4x2x2 exceeds|coarsening 4x2x2"),
        (3, 20, dict(coarsening=(8, 4)), "coarsening 8x4 exceeds the 20 time steps"),
        (2, 64, dict(levels=3), "2 propagators for 3 mgrit levels"),
        (3, 64, dict(levels=1), "3 propagators for 1 mgrit levels"),
        (0, 64, {}, "levels"),
    ],
)
def test_hierarchy_that_does_not_fit_is_refused(count, nsteps, options, message):
    """Too coarse, or not one propagator a level."""
    if count == 4:
        nsteps = 15
    with pytest.raises(ValueError, match=message):
        MGRIT([Counting()] * count, nsteps, options=options)


@pytest.mark.parametrize("bounds", [[0], [0, 9], [1, 10], [0, 5, 10], [0, 11], [0, 10.0], [0, math.nan], [-1, 10]])
def test_bad_bounds_are_refused(bounds):
    """For one rank and ten steps."""
    with pytest.raises(ValueError, match=r"bounds .* do not split 10 steps over 1 ranks"):
        MGRIT([Counting()], 10, bounds=bounds)


@pytest.mark.parallel(3)
def test_bad_bounds_are_refused_on_every_rank():
    """Decreasing, or for another number of ranks."""
    comm = MPI.COMM_WORLD
    for bounds in ([0, 10], [0, *[7, 4][: comm.size - 1], 3], [0, *[11] * (comm.size - 1), 10]):
        with pytest.raises(ValueError, match="do not split"):
            MGRIT([Counting()], 10, bounds=bounds, comm=comm)


@pytest.mark.parallel([1, 3])
def test_monitor_prints_a_line_a_cycle():
    """On the first rank only, with the factor that the history gives."""
    comm = MPI.COMM_WORLD
    options = dict(coarsening=4, monitor=True, rtol=1e-10)
    solver = MGRIT([Counting(), Counting(4)], 32, options=options, comm=comm, name="state")
    with logged() as lines:
        result = solver.solve(guess([1.0], 32)[: solver.local_rows])
    assert len(lines) == (result.cycles + 1 if comm.rank == 0 else 0)
    if lines:
        assert lines[1].startswith("  state   1 residual ")
        assert f"factor {result.residuals[1] / result.residuals[0]:.3f}" in lines[1]
    assert "level 1: 8 steps, sequential" in solver.view()
    assert "level 0: 32 steps, m = 4, FCF-relaxation" in solver.view()


@pytest.mark.usefixtures("array_kind")
def test_the_step_that_is_not_finite_is_found_where_only_the_last_state_of_a_sweep_is_checked():
    """A propagator that takes several steps in one call: its values stay not finite once they are."""

    class Fails:
        def step(self, steps, u, out):
            out[...] = u

        def sweep(self, first, U, G):
            for i in range(len(U) - 1):
                U[i + 1] = np.nan if first + i == 5 else U[i]

        def advance(self, first, stride, u, out, G):
            out[...] = u[:, None]

    with pytest.raises(SolverFailure, match=r"steps 5: value not finite"):
        MGRIT([Fails()], 12, options={"levels": 1}).solve(np.ones((13, 1)))

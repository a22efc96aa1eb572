"""Properties of MGRIT on drawn problems: the two-level bounds, exact terminations, adjoint identities, the fixed point
of FAS, and the same bits on any number of time ranks.

All ranks draw the same examples (see conftest); :func:`together` checks it.
The number of ranks is that of the run, the slabs are drawn, empty ones included.
"""

import functools
import itertools
import math

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from mpi4py import MPI

from pint_fem.mgrit import MGRIT, Transfer, coarse_points
from pint_fem.theory import two_level_bound
from tests.stepping import sequential

COMM = MPI.COMM_WORLD
ENDLESS = dict(rtol=0, dtol=1e300, stagnation=None)
SCHEMES = ("F", "FCF", "FCFCF")


def examples(count):
    """Settings: fewer examples where ranks share cores."""
    count = count if COMM.size < 3 else count // 2
    phases = [Phase.generate, *([Phase.shrink] if COMM.size == 1 else [])]
    return settings(max_examples=count, phases=phases, suppress_health_check=list(HealthCheck))


class Draws:
    """What a test draws, remembered."""

    def __init__(self, data):
        self.data, self.seen = data, []

    def draw(self, strategy):
        value = self.data.draw(strategy)
        self.seen.append(repr(value))
        return value


def together(test):
    """Check that all ranks drew the same, and fail on all of them if any fails."""

    @functools.wraps(test)
    def run(data):
        draws, problem = Draws(data), None
        try:
            test(draws)
        except AssertionError as error:
            problem = str(error) or "an assertion"
        reports = COMM.allgather((problem, draws.seen))
        problems = [p for p, _ in reports if p is not None]
        assert not problems, problems
        assert all(seen == draws.seen for _, seen in reports)

    return run


# -- what is drawn -----------------------------------------------------------------------------------------------------
@st.composite
def bounds_of(draw, nsteps, size=None):
    """Step bounds of the slabs."""
    size = COMM.size if size is None else size
    return [0, *sorted(draw(st.lists(st.integers(0, nsteps), min_size=size - 1, max_size=size - 1))), nsteps]


@st.composite
def time_grids(draw, levels=(2, 4), most=40, irregular=True, spare=0):
    """Steps and the coarsening of each level but the coarsest: factors, or nested sets of C-points.

    ``spare``: that many coarsenings more, for a coarsest level that is only relaxed.
    """
    nsteps = n = draw(st.integers(2, most))
    coarsening = []
    for _ in range(draw(st.integers(*levels)) - 1 + spare):
        if n < 2:
            break
        if irregular and draw(st.booleans()):
            inner = draw(st.sets(st.integers(1, n), min_size=1, max_size=max(n // 2, 1)))
            coarsening.append((0, *sorted(inner)))
            n = len(inner)
        else:
            coarsening.append(draw(st.integers(2, max(n // 2, 2))))
            n //= coarsening[-1]
    return nsteps, coarsening


def seeds():
    """For numpy's generator: of data whose values do not matter."""
    return st.integers(0, 2**16)


@st.composite
def disk(draw, count, largest=1.0):
    """Complex numbers in a disk, its centre and edge included."""
    radius = draw(st.lists(st.floats(0, largest, allow_subnormal=False), min_size=count, max_size=count))
    angle = draw(st.lists(st.floats(0, 2 * math.pi, allow_subnormal=False), min_size=count, max_size=count))
    return np.array(radius) * np.exp(1j * np.array(angle))


# -- propagators -------------------------------------------------------------------------------------------------------
class Normal:
    """A real normal matrix: damped rotations of the planes of an orthogonal basis, by complex eigenvalues."""

    def __init__(self, lam, Q):
        self.lam, self.Q = np.asarray(lam, dtype=complex), Q

    def step(self, steps, u, out):
        for state, result in zip(u, out, strict=True):
            pairs = self.modes(state)
            z = self.lam * (pairs[:, 0] + 1j * pairs[:, 1])
            result[:] = self.Q @ np.stack([z.real, z.imag], axis=1).ravel()

    def modes(self, u):
        """Coefficients ``(..., planes, 2)``."""
        return (u @ self.Q).reshape(*u.shape[:-1], -1, 2)


def orthogonal(rng, n, diagonal):
    """A random orthogonal matrix; the identity for diagonal propagators."""
    return np.eye(n) if diagonal else np.linalg.qr(rng.standard_normal((n, n)))[0]


class Powers:
    """``u -> lam^length (1 + defect) u``: the fine steps between two points of the level, but for a defect."""

    def __init__(self, lam, points, defect=0.0):
        self.lam, self.points, self.defect = lam, np.asarray(points), defect

    def step(self, steps, u, out):
        for n, state, result in zip(steps, u, out, strict=True):
            z = self.lam ** (self.points[n + 1] - self.points[n]) * (1 + self.defect) * (state[:, 0] + 1j * state[:, 1])
            result[:, 0], result[:, 1] = z.real, z.imag


class Matrices:
    """Another matrix each step; states ``(d,)`` or ``(d, columns)``."""

    def __init__(self, matrices):
        self.matrices = matrices

    def step(self, steps, u, out):
        for n, state, result in zip(steps, u, out, strict=True):
            result[...] = self.matrices[n] @ state

    @classmethod
    def products(cls, fine, points, rng=None, defect=0.0):
        """Of the fine ones between the level's points, with a random error."""
        d = fine.shape[-1]
        made = []
        for a, b in itertools.pairwise(points):
            product = np.eye(d)
            for A in fine[a:b]:
                product = A @ product
            made.append(product + (defect * rng.standard_normal((d, d)) if rng is not None else 0))
        return cls(np.array(made))


class Euler:
    """Implicit Euler for ``u' = f(u, t)`` by 20 Newton steps from the old value, elementwise."""

    def __init__(self, t, f):
        self.t, self.f = np.asarray(t), f

    def step(self, steps, u, out):
        n = np.asarray(steps)
        dt, t, v = (self.t[n + 1] - self.t[n])[:, None], self.t[n + 1, None], u.copy()
        for _ in range(20):
            value, slope = self.f(v, t)
            v -= (v - dt * value - u) / (1 - dt * slope)
        out[...] = v


def cubic(u, t):
    """``-u^3 + sin t`` and its derivative: one root for any step, which Newton reaches from anywhere."""
    return -(u**3) + np.sin(t), -3 * u**2


def logistic(u, t):
    """``u (1 - u)`` and its derivative."""
    return u * (1 - u), 1 - 2 * u


# -- running -----------------------------------------------------------------------------------------------------------
def noise(rng, u0, nsteps):
    """A first guess: random behind the initial value."""
    U = rng.uniform(-1, 1, (nsteps + 1, *np.shape(u0)))
    U[0] = u0
    return U


class Slabs:
    """A solver on the ranks' slabs, handed and handing back the whole trajectory."""

    def __init__(self, propagators, nsteps, coarsening, bounds, comm=COMM, options=(), **rest):
        options = dict(levels=len(propagators), coarsening=coarsening, **dict(options))
        self.comm, self.lo, self.hi = comm, bounds[comm.rank], bounds[comm.rank + 1]
        self.solver = MGRIT(propagators, nsteps, options=options, comm=comm, bounds=bounds, **rest)

    def solve(self, start, G=None, **more):
        own = start[self.lo : self.hi + 1].copy()
        if self.lo:
            own[0] = np.nan  # a ghost row is never read before it is received
        result = self.solver.solve(own, None if G is None else G[self.lo : self.hi].copy(), **more)
        first = self.comm.bcast(own[0])
        return np.concatenate([first[None], *self.comm.allgather(own[1:])]), result


def c_point_steps(coarsening, nsteps):
    """Numbers, on the finest level, of its C-points."""
    return np.asarray(coarse_points(nsteps, coarsening[:1])[1])


# -- linear theory -----------------------------------------------------------------------------------------------------
@pytest.mark.parallel([1, 3])
@given(data=st.data())
@examples(40)
@together
def test_error_stays_under_the_two_level_bound(data):
    """At the C-points, per mode, in every cycle: diagonal and normal propagators, any stable eigenvalues and weight."""
    m, coarse_steps = data.draw(st.integers(2, 5)), data.draw(st.integers(1, 9))
    nsteps = m * coarse_steps + data.draw(st.integers(0, m - 1))
    relax, weight = data.draw(st.sampled_from(SCHEMES)), data.draw(st.sampled_from((1.0, 0.7, 1.3)))
    planes, rng = data.draw(st.integers(1, 4)), np.random.default_rng(data.draw(seeds()))
    lam = data.draw(disk(planes))
    mu = lam**m + data.draw(disk(planes, 0.4)) if data.draw(st.booleans()) else data.draw(disk(planes))
    mu /= np.maximum(abs(mu), 1)
    Q = orthogonal(rng, 2 * planes, data.draw(st.booleans()))
    fine, coarse = Normal(lam, Q), Normal(mu, Q)
    options = dict(relax=relax, c_weight=weight, check="cycle", max_it=1, **ENDLESS)
    slabs = Slabs([fine, coarse], nsteps, m, data.draw(bounds_of(nsteps)), options=options)
    factors = np.array(
        [two_level_bound([a], [b], m, coarse_steps, relax, weight) for a, b in zip(lam, mu, strict=True)]
    )
    u0 = rng.uniform(-1, 1, 2 * planes)
    exact, U = sequential(fine, u0, nsteps), noise(rng, u0, nsteps)

    def errors(U):
        return np.sqrt((fine.modes(U - exact)[m::m] ** 2).sum(axis=(0, 2)))

    before = errors(U)
    for _ in range(4):
        floor = 1e-13 * abs(U).max()
        U, result = slabs.solve(U)  # one cycle; with check="cycle" the next begins where this one ends
        assert result.cycles == 1 or result.converged
        after = errors(U)
        assert (after <= factors * before * (1 + 1e-10) + floor + 1e-13 * abs(U).max()).all()
        before = after


@pytest.mark.parallel([1, 3])
@given(data=st.data())
@examples(40)
@together
def test_exact_termination(data):
    """A cycle makes ``1 + nu`` more C-points exact, ``nu`` C-relaxations, whatever coarse propagators: all after
    ``Nc`` (F) or ``ceil(Nc/2)`` (FCF) cycles.

    With exact values up to a C-point, relaxation is right up to the next one. There the coarse equation gives
    ``V + r``, which is exact, as the coarse solution is exact before. By induction from the coarsest level that holds
    for V- and F-cycles on any number of levels, and where the coarsest one is relaxed only.
    """
    only_relax = data.draw(st.booleans())
    nsteps, coarsening = data.draw(time_grids((2, 5), 30, spare=int(only_relax)))
    if len(coarsening) == 1:
        only_relax = False
    count = len(coarsening) + 1 - int(only_relax)
    relax = data.draw(st.lists(st.sampled_from(SCHEMES), min_size=1, max_size=min(count, 3)))
    rng = np.random.default_rng(data.draw(seeds()))
    bounds, transposed = data.draw(bounds_of(nsteps)), data.draw(st.booleans())
    options = dict(relax=relax, cycle=data.draw(st.sampled_from("VF")), check="cycle", max_it=1, **ENDLESS)
    options["coarse_solver"] = "relax" if only_relax else data.draw(st.sampled_from(("sequential", "gathered")))
    propagators = [Normal(data.draw(disk(2)), np.eye(4)) for _ in range(count)]
    slabs = Slabs(propagators, nsteps, coarsening, bounds, options=options, transposed=transposed)
    u0 = rng.uniform(-1, 1, 4)
    exact, U = sequential(propagators[0], u0, nsteps), noise(rng, u0, nsteps)
    c, gain = c_point_steps(coarsening, nsteps), 1 + relax[0].count("C")
    largest = abs(U).max()
    for cycles in range(1, math.ceil((len(c) - 1) / gain) + 1):
        U, _ = slabs.solve(U)
        largest = max(largest, abs(U).max())
        done = gain * cycles + 1
        stop = nsteps + 1 if done >= len(c) else c[done]
        np.testing.assert_allclose(U[:stop], exact[:stop], rtol=0, atol=1e-12 * largest)
    assert stop == nsteps + 1


@pytest.mark.parallel([1, 3])
@given(data=st.data())
@examples(40)
@together
def test_more_levels_converge(data):
    """2 to 5 levels, V- and F-cycles, coarse propagators a little wrong: the residual reaches the tolerance, and the
    error is below the residual over ``1 - |lam|^m`` for the least distance ``m`` of C-points.
    """
    nsteps, coarsening = data.draw(time_grids((2, 5), 60))
    planes, rng = data.draw(st.integers(1, 3)), np.random.default_rng(data.draw(seeds()))
    lam = data.draw(disk(planes, 0.95))
    defects = [0.0, *data.draw(st.lists(st.floats(-0.05, 0.05, allow_subnormal=False), min_size=4, max_size=4))]
    propagators = [Powers(lam, p, d) for p, d in zip(coarse_points(nsteps, coarsening), defects, strict=False)]
    options = dict(
        relax=data.draw(st.sampled_from(SCHEMES)),
        **data.draw(st.sampled_from((dict(cycle="V"), *(dict(cycle="F", f_cycles=n) for n in (None, 0, 1))))),
        rtol=1e-12,
        max_it=14,
    )
    slabs = Slabs(propagators, nsteps, coarsening, data.draw(bounds_of(nsteps)), options=options)
    u0, G = rng.uniform(-1, 1, (planes, 2)), 0.1 * rng.uniform(-1, 1, (nsteps, planes, 2))
    exact = sequential(propagators[0], u0, nsteps, G)
    U, result = slabs.solve(noise(rng, u0, nsteps), G)
    assert result.converged, (result, nsteps, coarsening)
    c = c_point_steps(coarsening, nsteps)
    amplification = 1 / (1 - abs(lam).max() ** np.diff(c).min())
    error = np.sqrt(((U - exact)[c] ** 2).sum())
    assert error <= amplification * result.residuals[-1] + 1e-13
    assert abs(U - exact).max() <= amplification * result.residuals[-1] + 1e-13


# -- adjoints ----------------------------------------------------------------------------------------------------------
@st.composite
def matrix_problems(draw, irregular=True):
    """Non-normal matrices, one a step, and the time grid."""
    nsteps, coarsening = draw(time_grids((2, 4), 24, irregular))
    d, seed = draw(st.integers(1, 4)), draw(seeds())
    A = np.random.default_rng(seed).standard_normal((nsteps, d, d))
    A *= 0.9 / np.linalg.norm(A, 2, axis=(1, 2))[:, None, None]
    return nsteps, coarsening, A, seed


@pytest.mark.parallel([1, 3])
@given(data=st.data())
@examples(40)
@together
def test_adjoint_identity_of_the_whole_solve(data):
    """``<w, S g> = <S^T w, g>``: a forward solve from 0, and one on the reversed communicator with its own C-points."""
    nsteps, coarsening, A, seed = data.draw(matrix_problems())
    rng = np.random.default_rng(seed + 1)
    d, reverse = A.shape[-1], COMM.Split(0, -COMM.rank)
    bounds = data.draw(bounds_of(nsteps))
    options = dict(
        relax=data.draw(st.sampled_from(SCHEMES)),
        cycle=data.draw(st.sampled_from("VF")),
        c_weight=data.draw(st.sampled_from((1.0, 1.2))),
        rtol=1e-15,
        max_it=100,
        stagnation=None,
    )
    points = coarse_points(nsteps, coarsening)
    forward = [Matrices.products(A, p, rng, 0.02 * (i > 0)) for i, p in enumerate(points)]
    transposed = A[::-1].transpose(0, 2, 1)
    backward = [Matrices.products(transposed, p, rng, 0.02 * (i > 0)) for i, p in enumerate(points)]
    g, w = rng.standard_normal((nsteps, d)), rng.standard_normal((nsteps + 1, d))
    w[0] = 0  # u[0] = 0 has no part in it
    there = Slabs(forward, nsteps, coarsening, bounds, options=options)
    back = Slabs(backward, nsteps, coarsening, [nsteps - b for b in bounds[::-1]], reverse, options=options)
    u, first = there.solve(noise(rng, np.zeros(d), nsteps), g)
    mu, second = back.solve(noise(rng, w[-1], nsteps), w[:-1][::-1])
    reverse.Free()
    lam = mu[::-1]  # at point n
    left, right = (w * u).sum(), (lam[1:] * g).sum()
    assert first.converged
    assert second.converged
    assert abs(left - right) <= 1e-12 * np.linalg.norm(w) * np.linalg.norm(u)


@pytest.mark.usefixtures("array_kind")
@pytest.mark.parallel([1, 3])
@given(data=st.data())
@examples(60)
@together
def test_transposed_cycle_is_the_transpose(data):
    """Errors of the adjoint go through a transposed cycle by the transpose of what a cycle does to the residuals.

    With the equations ``A u = g``, the cycle is ``u <- u + B (g - A u)``, so residuals go through ``I - A B``; the
    adjoint's cycle with ``B^T`` takes errors through ``I - B^T A^T``. The columns of these matrices are the components
    of one block of states. Points N (where the adjoint starts from) and 0 (which nothing else sees) are left out.
    """
    factors = data.draw(st.lists(st.integers(2, 3), min_size=1, max_size=3))
    nsteps = math.prod(factors) * data.draw(st.integers(1, 2 if len(factors) > 2 else 3))
    rng, cycle = np.random.default_rng(data.draw(seeds())), data.draw(st.sampled_from("VF"))
    d = 2
    A = rng.standard_normal((nsteps, d, d)) / 2
    points = coarse_points(nsteps, factors)
    forward = [Matrices.products(A, p, rng, 0.3 * (i > 0)) for i, p in enumerate(points)]
    backward = [Matrices(level.matrices[::-1].transpose(0, 2, 1)) for level in forward]
    options = dict(
        relax=data.draw(st.lists(st.sampled_from(SCHEMES), min_size=1, max_size=2)),
        c_weight=data.draw(st.lists(st.sampled_from((1.0, 0.8, 1.3)), min_size=1, max_size=2)),
        cycle=cycle,
        residual="none",
        max_it=1,
    )
    transfers = None
    if data.draw(st.booleans()):
        R, P = rng.standard_normal((2, d, d))
        maps = [lambda block, M=M: np.einsum("ij,kj...->ki...", M, block) for M in (R, P, R.T, P.T)]
        transfers = [Transfer(*maps), *[None] * (len(factors) - 1)]
    bounds, reverse = data.draw(bounds_of(nsteps)), COMM.Split(0, -COMM.rank)
    there = Slabs(forward, nsteps, factors, bounds, options=options, transfers=transfers)
    turned = None if transfers is None else [t and t.transposed for t in transfers]
    mirrored = [nsteps - b for b in bounds[::-1]]
    back = Slabs(backward, nsteps, factors, mirrored, reverse, options, transfers=turned, transposed=True)
    units = np.zeros((nsteps + 1, d, nsteps * d))
    units[1:] = np.eye(nsteps * d).reshape(nsteps, d, nsteps * d)
    E = there.solve(units)[0][1:].reshape(nsteps * d, nsteps * d)
    E_adjoint = back.solve(units)[0][1:].reshape(nsteps, d, nsteps, d)
    reverse.Free()
    L = np.eye(nsteps * d)
    for n in range(1, nsteps):
        L[n * d : (n + 1) * d, (n - 1) * d : n * d] = -A[n]
    K = (L @ E @ np.linalg.inv(L)).reshape(nsteps, d, nsteps, d)[:-1, :, :-1]  # residuals at 1..N-1
    H = E_adjoint[-2::-1, :, -2::-1]  # point n is its point N - n
    np.testing.assert_allclose(H, K.transpose(2, 3, 0, 1), rtol=0, atol=1e-11 * max(abs(K).max(), 1))


# -- nonlinear ---------------------------------------------------------------------------------------------------------
@pytest.mark.parallel([1, 3])
@given(data=st.data())
@examples(30)
@together
def test_fas_reaches_the_serial_solution(data):
    """A nonlinear ODE on random times and random nested C-points, with weights: within ``Nc`` cycles, to 1e-12."""
    nsteps, coarsening = data.draw(time_grids((2, 4), 40))
    f, u0 = {"cubic": (cubic, [1.5, -0.5]), "logistic": (logistic, [0.3, 0.9])}[
        data.draw(st.sampled_from(("cubic", "logistic")))
    ]
    rng = np.random.default_rng(data.draw(seeds()))
    t = np.concatenate([[0.0], np.cumsum(rng.uniform(0.01, 0.1, nsteps))])
    propagators = [Euler(t[points], f) for points in coarse_points(nsteps, coarsening)]
    weight = data.draw(st.floats(0.7, 1.3, allow_subnormal=False))
    options = dict(
        relax="FCF",
        c_weight=weight,
        cycle=data.draw(st.sampled_from("VF")),
        start=data.draw(st.sampled_from(("guess", "skip", "nested"))),
        check=data.draw(st.sampled_from(("relaxed", "cycle"))),
        rtol=1e-14,
        max_it=25,
        stagnation=None,
    )
    slabs = Slabs(propagators, nsteps, coarsening, data.draw(bounds_of(nsteps)), options=options)
    start = noise(rng, u0, nsteps)
    start[1:] = np.asarray(u0) + 0.1 * start[1:]
    G = 0.01 * rng.uniform(-1, 1, (nsteps, 2)) if data.draw(st.booleans()) else None
    U, result = slabs.solve(start, G)
    assert result.cycles <= len(c_point_steps(coarsening, nsteps))
    np.testing.assert_allclose(U, sequential(propagators[0], u0, nsteps, G), rtol=0, atol=1e-12)


# -- bits --------------------------------------------------------------------------------------------------------------
class Stepwise:
    """Nonlinear, or affine, with coefficients from the level's points: elementwise, so the same bits in any block."""

    def __init__(self, points, nonlinear):
        self.points, self.nonlinear = np.asarray(points, dtype=float), nonlinear

    def __repr__(self):
        return f"{type(self).__name__}({self.points.tolist()}, {self.nonlinear})"

    def rates(self, steps, ndim):
        n = np.asarray(steps)
        shape = (-1, *[1] * (ndim - 1))
        length = (self.points[n + 1] - self.points[n]).reshape(shape)
        return length, 0.07 * length * (1 + 1 / (1 + self.points[n].reshape(shape)))

    def step(self, steps, u, out):
        length, decay = self.rates(steps, u.ndim)
        out[...] = u / (1 + decay + self.nonlinear * length * u * u)


class Lanes(Stepwise):
    """In blocks of 8; the place in the block changes the result a little, as BLAS kernels do to the last bits."""

    block = 8

    def step(self, steps, u, out):
        super().step(steps, u, out)
        lane = (steps.start // steps.step + np.arange(len(steps))) % self.block
        out *= 1 + 1e-9 * lane.reshape(-1, *[1] * (u.ndim - 1))


class Guessing(Stepwise):
    """Implicit, by one Newton step from the guess: far from solved, so the bits show what the guess was."""

    uses_guess = True

    def step(self, steps, u, out):
        length, decay = self.rates(steps, u.ndim)
        v = out.copy()
        out[...] = v - (v + decay * v + self.nonlinear * length * v**3 - u) / (
            1 + decay + 3 * self.nonlinear * length * v * v
        )


@st.composite
def configurations(draw, storage=False):
    """Whatever may be combined: steps, coarsening, options, propagator, transfers, right-hand sides, a seed."""
    solver = draw(st.sampled_from(("sequential", "gathered", "relax")))
    nsteps, coarsening = draw(time_grids((2, 4), 50, spare=int(solver == "relax")))
    if len(coarsening) == 1 and solver == "relax":
        solver = "gathered"
    levels = len(coarsening) + 1 - int(solver == "relax")
    start, cycle = draw(st.sampled_from(("guess", "skip", "nested"))), draw(st.sampled_from("VF"))
    options = dict(
        coarse_solver=solver,
        coarse_sweeps=draw(st.integers(1, 2)) if solver == "relax" else 1,
        relax=draw(st.lists(st.sampled_from(SCHEMES), min_size=1, max_size=min(levels, 3))),
        c_weight=draw(st.lists(st.sampled_from((1.0, 0.8, 1.25)), min_size=1, max_size=min(levels, 3))),
        cycle=cycle,
        f_cycles=draw(st.sampled_from((None, 1))) if cycle == "F" else None,
        start=start,
        nested_cycles=draw(st.integers(1, 2)) if start == "nested" else 1,
        check=draw(st.sampled_from(("relaxed", "cycle"))),
        residual=draw(st.sampled_from(("C", "none") if storage else ("C", "full", "none"))),
        time_norm=draw(st.sampled_from((1, 2, "inf"))),
        max_it=draw(st.integers(1, 3)),
        **ENDLESS,
    )
    kind = draw(st.sampled_from((Stepwise, Lanes) if storage else (Stepwise, Lanes, Guessing)))
    linear = draw(st.booleans())
    points = coarse_points(nsteps, coarsening)
    rest = dict(linear=linear, transposed=draw(st.booleans()))
    rng = np.random.default_rng(draw(seeds()))
    sizes = [4] * levels
    if draw(st.booleans()):  # spatial coarsening somewhere
        at, transfers = draw(st.integers(1, levels - 1)), [None] * (levels - 1)
        R = rng.uniform(0, 0.5, (2, 4))
        transfers[at - 1] = (R, 2 * np.ascontiguousarray(R.T))
        rest["transfers"], sizes[at:] = transfers, [2] * (levels - at)
    G = 0.1 * rng.standard_normal((nsteps, 4)) if draw(st.booleans()) else None
    made = [kind(p, 0.0 if linear else 0.1) for p in points[:levels]]
    start = noise(rng, rng.uniform(-1, 1, 4), nsteps)
    given_rhs = None
    if draw(st.booleans()) and G is not None:
        shapes = [(len(p) - 1, n) for p, n in zip(points[1:levels], sizes[1:], strict=True)]
        given_rhs = [0.1 * rng.standard_normal(shape) for shape in shapes]
    return nsteps, coarsening, options, made, rest, start, G, given_rhs


def own_rhs(solver, given_rhs):
    """Coarse right-hand sides of the own steps."""
    if given_rhs is None:
        return None
    return [g[level.lo : level.hi] for g, level in zip(given_rhs, solver.levels[1:], strict=True)]


def history(result):
    """What must agree."""
    return result.residuals, result.cycles, result.reason, result.converged, repr(result.scale)


@pytest.mark.usefixtures("array_kind")
@pytest.mark.parallel([1, 3, 5, 7])
@given(data=st.data())
@examples(60)
@together
def test_same_bits_on_any_slabs(data):
    """Solution and history against a solve of the whole on one rank; twice, so nothing is left over from a solve."""
    nsteps, coarsening, options, propagators, rest, start, G, rhs = data.draw(configurations())
    bounds = data.draw(bounds_of(nsteps))
    alone = Slabs(propagators, nsteps, coarsening, [0, nsteps], MPI.COMM_SELF, options, **rest)
    slabs = Slabs(propagators, nsteps, coarsening, bounds, COMM, options, **rest)
    expected, one = alone.solve(start, G, coarse_rhs=own_rhs(alone.solver, rhs))
    for _ in range(2):
        U, result = slabs.solve(start, G, coarse_rhs=own_rhs(slabs.solver, rhs))
        np.testing.assert_array_equal(U, expected)
        assert history(result) == history(one)


@pytest.mark.parallel([1, 3])
@given(data=st.data())
@examples(50)
@together
def test_same_bits_from_stored_c_points(data):
    """``storage="C"`` on any slabs that begin at C-points: C-points, history and the trajectory of ``states``."""
    nsteps, coarsening, options, propagators, rest, start, G, rhs = data.draw(configurations(storage=True))
    c = c_point_steps(coarsening, nsteps)
    places = data.draw(st.lists(st.integers(0, len(c)), min_size=COMM.size - 1, max_size=COMM.size - 1))
    bounds = [0, *(int([*c, nsteps][p]) for p in sorted(places)), nsteps]
    alone = Slabs(propagators, nsteps, coarsening, [0, nsteps], MPI.COMM_SELF, options, **rest)
    expected, one = alone.solve(start, G, coarse_rhs=own_rhs(alone.solver, rhs))
    stored = Slabs(propagators, nsteps, coarsening, bounds, COMM, dict(options, storage="C"), **rest)
    solver, lo, hi = stored.solver, stored.lo, stored.hi
    own_c = c[(c > lo) & (c <= hi)]
    U = start[[lo, *own_c]].copy()
    assert len(U) == solver.local_rows
    if lo:
        U[0] = np.nan
    own_G = None if G is None else G[lo:hi].copy()
    result = solver.solve(U, own_G, coarse_rhs=own_rhs(solver, rhs))
    assert history(result) == history(one)
    np.testing.assert_array_equal(U[1:], expected[own_c])
    trajectory = [(n, block.copy()) for n, block in solver.states(U, own_G)]
    assert [n for n, _ in trajectory] == [int(i) + 1 for i in c if lo <= i < hi]
    if hi > lo:
        states = np.concatenate([block for _, block in trajectory])
        tolerance = 0 if type(propagators[0]) is Stepwise else 1e-6  # one step after another, in other lanes
        np.testing.assert_allclose(states, expected[lo + 1 : hi + 1], rtol=0, atol=tolerance)

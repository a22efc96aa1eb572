"""ParaDiag on small matrices: rates, exactness, transposes, bits, options. No finite elements."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from mpi4py import MPI

from pint_fem.all_at_once.stopping import SolveResult
from pint_fem.mgrit import MGRIT, SolverFailure, split_steps
from pint_fem.paradiag import AlphaCirculant, ParaDiag, ParaDiagOptions, shifted_factors, shifts
from pint_fem.paradiag.distribution import TimeTransposes, own_frequencies
from pint_fem.theory import contraction, dirk_stability
from tests.logs import logged
from tests.stepping import sequential

G = 1 - 1 / np.sqrt(2)
TABLEAUX = {
    "backward Euler": ([[1.0]], [1.0]),
    "implicit midpoint": ([[0.5]], [1.0]),
    "SDIRK2": ([[G, 0], [1 - G, G]], [1 - G, G]),
    "Qin-Zhang": ([[0.25, 0], [0.5, 0.25]], [0.5, 0.5]),
    "different diagonals": ([[0.3, 0], [0.5, 0.2]], [0.4, 0.6]),
}
COMM = MPI.COMM_WORLD


class Linear:
    """``Phi`` is a matrix; each state is multiplied alone, so that its bits are its own."""

    def __init__(self, Phi):
        self.Phi = np.asarray(Phi, dtype=float)

    def step(self, steps, u, out):
        for row, target in zip(u, out, strict=True):
            target[...] = self.Phi @ row

    def solve(self, k, mu, r):
        return np.linalg.solve(np.eye(len(r)) - mu * self.Phi, r)


def rotation(angles):
    """An orthogonal matrix with eigenvalues ``exp(+-i angle)``: waves without losses."""
    out = np.zeros((2 * len(angles),) * 2)
    for i, a in enumerate(angles):
        out[2 * i : 2 * i + 2, 2 * i : 2 * i + 2] = [[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]]
    return out


def slabs(nsteps, comm, parts=None):
    """Own steps for ``bounds`` that are uneven on purpose, one rank without any where there are three."""
    bounds = split_steps(nsteps, comm.size) if parts is None else parts
    return bounds, bounds[comm.rank], bounds[comm.rank + 1]


def problem(nsteps, size, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal(size), rng.standard_normal((nsteps, size))


@pytest.mark.parametrize("name", TABLEAUX)
def test_a_step_is_a_product_of_shifted_systems(name):
    """``1/(1 - mu R(-z))`` for stiff, wave-like and slow modes, to round-off."""
    A, b = TABLEAUX[name]
    z = np.array([0, 1e-3, 0.1, 1, 10, 1e3, 1e8, 1j, 100j, 0.3 + 2j])
    for mu in shifts(64, 1e-4):
        scale, y = shifted_factors(A, b, mu)
        factors = [(1 + a * z) / (1 + a * z - shift) for a, shift in zip(np.diag(A), y, strict=True)]
        product = scale * np.prod(factors, axis=0)
        np.testing.assert_allclose(product * (1 - mu * dirk_stability(A, b, -z)), 1, rtol=1e-11)


@pytest.mark.parametrize("nsteps", [1, 2, 7, 16])
@pytest.mark.parametrize("alpha", [0.5, 1e-3])
def test_preconditioner_is_the_inverse_of_the_circulant(nsteps, alpha):
    """Against the dense matrix with ``-alpha Phi`` in its corner."""
    Phi = np.random.default_rng(1).standard_normal((3, 3)) / 3
    dense = np.eye(3 * nsteps)
    for i in range(nsteps):
        dense[3 * i : 3 * i + 3, 3 * (i - 1) % (3 * nsteps) :][:, :3] -= Phi if i else alpha * Phi
    P = AlphaCirculant(nsteps, alpha, Linear(Phi).solve, 3, comm=MPI.COMM_SELF, bounds=[0, nsteps])
    r = np.random.default_rng(2).standard_normal((nsteps, 3))
    np.testing.assert_allclose(P(r).ravel(), np.linalg.solve(dense, r.ravel()), rtol=0, atol=1e-12 / alpha)


@pytest.mark.parallel([1, 3])
def test_rate_of_waves_without_losses():
    """Each iteration multiplies the residual by ``alpha/(1 - alpha)`` at most, and nearly that at the worst
    frequency, whatever the number of steps."""
    for alpha in (0.1, 0.01):
        for nsteps in (8, 33, 128):
            Phi = rotation(2 * np.pi * np.array([1, 2, 5]) / nsteps)  # lam^N = 1: the worst case
            u0, _ = problem(nsteps, 6)
            bounds, lo, hi = slabs(nsteps, COMM)
            U = np.zeros((hi - lo + 1, 6))
            if COMM.rank == 0:
                U[0] = u0
            options = dict(alpha=alpha, rtol=1e-11 / alpha, max_it=40)
            result = ParaDiag(Linear(Phi), nsteps, Linear(Phi).solve, options=options, comm=COMM, bounds=bounds).solve(
                U, start="nested"
            )
            ratios = np.array(result.residuals[2:]) / result.residuals[1:-1]
            assert result.converged
            np.testing.assert_allclose(ratios, alpha / (1 - alpha), rtol=1e-3)
            np.testing.assert_allclose(U, sequential(Linear(Phi), u0, nsteps)[lo : hi + 1], atol=2e-9 / alpha)
            assert contraction(np.linalg.eigvals(Phi), alpha, nsteps) == pytest.approx(alpha / (1 - alpha))


@pytest.mark.parametrize("nsteps", [64, 256, 1024])
def test_four_iterations_for_any_frequency(nsteps):
    """To 1e-8 with alpha = 1e-4, from zero, with a right-hand side."""
    Phi = rotation(np.linspace(0.003, 3.1, 12))
    u0, g = problem(nsteps, 24)
    U = np.zeros((nsteps + 1, 24))
    U[0] = u0
    result = ParaDiag(Linear(Phi), nsteps, Linear(Phi).solve, options=dict(alpha=1e-4, rtol=1e-8)).solve(U, g)
    assert result.reason == "rtol"
    assert result.cycles <= 3
    exact = sequential(Linear(Phi), u0, nsteps, g)
    assert np.abs(U - exact).max() <= 1e-7 * np.abs(exact).max()


def test_heat_in_one_and_in_two_iterations():
    """alpha = 1e-7: an error below 1e-6 after one, 1e-12 after two."""
    nsteps, lam = 256, 1 / (1 + np.geomspace(1e-3, 1e3, 20))
    u0, g = problem(nsteps, 20)
    exact = sequential(Linear(np.diag(lam)), u0, nsteps, g)
    for cycles, error in ((1, 1e-6), (2, 1e-12)):
        U = np.zeros_like(exact)
        U[0] = u0
        solver = ParaDiag(Linear(np.diag(lam)), nsteps, Linear(np.diag(lam)).solve, options=dict(alpha=1e-7))
        result = solver.solve(U, g, cycles=cycles)
        assert result.reason == "its"
        assert np.linalg.norm(U - exact) <= error * np.linalg.norm(exact)


@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize("nsteps", [7, 40])
def test_same_bits_for_every_number_of_time_ranks(nsteps):
    """Iterates and residuals, with slabs that are uneven and empty, forwards and backwards."""
    size = 37
    Phi = np.random.default_rng(3).standard_normal((size, size)) / (2 * np.sqrt(size))
    u0, g = problem(nsteps, size)
    backwards = COMM.Split(0, -COMM.rank)
    uneven = sorted([0, nsteps, *(nsteps * np.array([2, 2, 3]) // 5)[: COMM.size - 1].tolist()])
    for bounds, comm in ((uneven, COMM), (split_steps(nsteps, COMM.size), backwards)):
        U, results = [], []
        for each, parts in ((comm, bounds), (MPI.COMM_SELF, [0, nsteps])):
            lo, hi = parts[each.rank], parts[each.rank + 1]
            V = np.zeros((hi - lo + 1, size))
            V[0] = u0 if lo == 0 else 0
            options = dict(alpha=1e-2, rtol=1e-12, max_it=40)
            solver = ParaDiag(Linear(Phi), nsteps, Linear(Phi).solve, options=options, comm=each, bounds=parts,
                              backwards=comm is backwards)  # fmt: skip
            results.append(solver.solve(V, g[lo:hi]))
            U.append(V)
        lo, hi = bounds[comm.rank], bounds[comm.rank + 1]
        assert results[0].residuals == results[1].residuals
        assert np.array_equal(U[0][1:], U[1][lo + 1 : hi + 1])
        assert lo == hi or np.array_equal(U[0][0], U[1][lo])
        if comm is backwards:
            mine = own_frequencies(nsteps // 2 + 1, COMM.size)[COMM.rank]
            assert TimeTransposes(comm, bounds, nsteps // 2 + 1, size, backwards=True).own == mine


@pytest.mark.parallel([1, 3])
def test_transposed_preconditioner_and_solution():
    """Backwards in time with ``Phi^T``: ``<P^-1 x, y> = <x, P^-T y>``, and the same of the solutions, to 1e-12."""
    nsteps, size = 20, 5
    rng = np.random.default_rng(4)
    Phi, x, y = rng.standard_normal((size, size)) / 4, rng.standard_normal((nsteps, size)), None
    y = rng.standard_normal(x.shape)
    bounds, lo, hi = slabs(nsteps, COMM)
    backwards, mirrored = COMM.Split(0, -COMM.rank), [nsteps - b for b in reversed(bounds)]
    forward = ParaDiag(Linear(Phi), nsteps, Linear(Phi).solve, options=dict(rtol=1e-15), comm=COMM, bounds=bounds)
    adjoint = ParaDiag(
        Linear(Phi.T), nsteps, Linear(Phi.T).solve, options=dict(rtol=1e-15), comm=backwards, bounds=mirrored,
        backwards=True,
    )  # fmt: skip
    dot = lambda a, b: COMM.allreduce(float(np.vdot(a, b)))
    left = dot(forward.circulant(size)(x[lo:hi]), y[lo:hi])
    right = dot(x[lo:hi], adjoint.circulant(size)(y[lo:hi][::-1])[::-1])
    assert left == pytest.approx(right, rel=1e-12)
    # row i of U is point lo + i; going back, point n is driven by row n-1 of the right-hand side
    U, L = np.zeros((hi - lo + 1, size)), np.zeros((hi - lo + 1, size))
    forward.solve(U, x[lo:hi], cycles=5)
    adjoint.solve(L, y[lo:hi][::-1], cycles=5)
    assert dot(U[1:], y[lo:hi]) == pytest.approx(dot(x[lo:hi], L[1:][::-1]), rel=1e-12)


def test_warm_start_and_tolerances_of_a_solve():
    nsteps, Phi = 32, rotation([0.1, 0.7])
    u0, g = problem(nsteps, 4)
    solver = ParaDiag(Linear(Phi), nsteps, Linear(Phi).solve, options=dict(alpha=1e-4, rtol=1e-10))
    U = np.zeros((nsteps + 1, 4))
    U[0] = u0
    first = solver.solve(U, g, start="nested")
    g[0] += Phi @ u0  # from zero the residual is the right-hand side
    assert first.residuals[0] == pytest.approx(np.linalg.norm(g))
    g[0] -= Phi @ u0
    again = solver.solve(U, g, start="guess")
    assert again.cycles == 0
    assert again.residuals[0] == pytest.approx(first.residuals[-1], rel=1e-2)
    loose = solver.solve(U * 1.1, g, rtol=1e-3)
    assert loose.residuals[-1] <= 1e-3 * loose.scale
    assert loose.cycles < first.cycles
    U[0] *= 1.001  # a guess nearby
    near = solver.solve(U, g)
    assert near.residuals[0] < 1e-2 * first.residuals[0]


@pytest.mark.parallel([1, 3])
def test_states_of_other_sizes():
    """One solver for states of several sizes in turn."""

    class Half:
        def step(self, steps, u, out):
            out[...] = u / 2

    nsteps = 20
    bounds, lo, hi = slabs(nsteps, COMM)
    solver = ParaDiag(
        Half(), nsteps, lambda k, mu, r: r / (1 - mu / 2), options=dict(rtol=1e-13), comm=COMM, bounds=bounds
    )
    for size in (3, 40, 17):
        u0, g = problem(nsteps, size)
        U = np.zeros((hi - lo + 1, size))
        U[0] = u0 if lo == 0 else 0
        assert solver.solve(U, g[lo:hi]).converged
        np.testing.assert_allclose(U, sequential(Half(), u0, nsteps, g)[lo : hi + 1], rtol=0, atol=1e-11)


def test_growing_modes():
    """The contraction follows ``alpha |lam|^N``; where it exceeds one the solve says so, or steps."""
    nsteps = 40
    Phi = np.diag([1.1, 0.5])
    assert contraction([1.1, 0.5], 1e-4, nsteps) == pytest.approx(1e-4 * 1.1**40 / (1 - 1e-4 * 1.1**40))
    U = np.ones((nsteps + 1, 2))
    solver = ParaDiag(Linear(Phi), nsteps, Linear(Phi).solve, options=dict(alpha=1e-4, rtol=1e-12))
    result = solver.solve(U)
    assert result.residuals[2] / result.residuals[1] == pytest.approx(contraction([1.1], 1e-4, nsteps), rel=1e-2)
    bad = Linear(np.diag([1.5, 0.5]))  # alpha lam^N = 1107: 1107/1106 of the error remains
    result = ParaDiag(bad, nsteps, bad.solve, options=dict(max_it=7)).solve(U)
    assert result.reason in ("max_it", "stagnated")
    options = dict(max_it=7, on_divergence="serial")
    with logged() as lines:
        result = ParaDiag(bad, nsteps, bad.solve, options=options).solve(U)
    assert result.reason == "serial"
    assert np.array_equal(U, sequential(bad, np.ones(2), nsteps))
    assert "stepping sequentially instead" in lines[0]


@pytest.mark.parallel([1, 3])
def test_failures_reach_every_rank():
    """A solve that raises on one rank, and one that gives NaN, name the frequency; the next solve is well."""
    nsteps, Phi = 12, rotation([0.3])
    bounds, lo, hi = slabs(nsteps, COMM)
    broken = [True]

    def solve(k, mu, r):
        if k == 5 and broken[0]:
            raise ZeroDivisionError("singular")
        return Linear(Phi).solve(k, mu, r)

    solver = ParaDiag(Linear(Phi), nsteps, solve, comm=COMM, bounds=bounds)
    U, g = np.zeros((hi - lo + 1, 2)), np.ones((hi - lo, 2))
    with pytest.raises(SolverFailure, match=r"paradiag: frequency 5: ZeroDivisionError: singular"):
        solver.solve(U, g)
    broken[0] = False
    U[...] = 0
    assert solver.solve(U, g).converged


def test_interface_is_that_of_mgrit(tmp_path):
    """Monitor, view, trace, errors for arrays that do not fit; the solution is MGRIT's."""
    nsteps, lam = 64, np.diag([0.9, 0.99, 0.2])
    u0, g = problem(nsteps, 3)
    U, V = np.zeros((nsteps + 1, 3)), np.zeros((nsteps + 1, 3))
    U[0] = V[0] = u0
    trace = tmp_path / "trace.json"
    options = dict(monitor=True, view=True, rtol=1e-12, trace=str(trace))
    solver = ParaDiag(Linear(lam), nsteps, Linear(lam).solve, options=options, name="state")
    with logged() as lines:
        result = solver.solve(U, g)
    assert isinstance(result, SolveResult)
    assert lines[0].startswith("ParaDiag 'state': 64 steps on 1 time rank, alpha 0.0001")
    assert sum("residual" in line for line in lines) == result.cycles + 1
    solver.write_trace()
    names = {e["name"] for e in json.loads(trace.read_text())["traceEvents"]}
    assert {"fft", "frequencies", "transpose", "norm", "cycle"} <= names
    coarse = Linear(np.linalg.matrix_power(lam, 8))
    MGRIT([Linear(lam), coarse], nsteps, options={"coarsening": 8, "rtol": 1e-13}).solve(V, g)
    np.testing.assert_allclose(U, V, rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match="own steps"):
        solver.solve(U[:-1], g)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(alpha=0), "paradiag alpha 0: give a number between 0 and 1"),
        (dict(alpha=1.5), "paradiag alpha 1.5"),
        (dict(alpha="small"), "paradiag alpha 'small'"),
        (dict(rtol=-1), "paradiag rtol -1: give"),
        (dict(memory=-1), "paradiag memory -1"),
        (dict(coarsening=4), "unknown paradiag option 'coarsening'"),
        (dict(alhpa=0.1), "did you mean 'alpha'"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        ParaDiagOptions.make(options)


def test_options_from_strings():
    given = ParaDiagOptions.parse({"alpha": "1e-6", "rtol": "1e-5", "max_it": "7", "monitor": "", "memory": "0.5"})
    options = ParaDiagOptions.make({"alpha": 0.1}, **given)
    assert (options.alpha, options.rtol, options.max_it, options.monitor, options.memory) == (1e-6, 1e-5, 7, True, 0.5)
    with pytest.raises(ValueError, match="paradiag alpha 'x': give a number"):
        ParaDiagOptions.parse({"alpha": "x"})
    with pytest.raises(ValueError, match="paradiag rtol 'x'"):
        ParaDiagOptions.parse({"rtol": "x"})


def test_block_of_the_page():
    """The example of the page on ParaDiag gives the sequential solution."""
    page = Path(__file__).resolve().parent.parent / "docs" / "theory" / "paradiag.md"
    (block,), names = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL), {}
    exec(compile(block, "page of ParaDiag", "exec"), names)
    np.testing.assert_allclose(names["U"][:, 0], names["phi"] ** np.arange(65.0), rtol=0, atol=1e-8)

"""The comparison with PyMGRIT and XBraid compares the same thing: their steps, residuals and numbers of cycles."""

import math

import numpy as np
import pytest

from tests.benchmarks import compare
from tests.benchmarks.compare import FactoredStep, HeatExample, TheirStep, Tridiagonal

M = 4


@pytest.fixture(params=["heat_1d", "heat_2d"])
def problems(request):
    """Three levels of PyMGRIT's problem, 65 points in time."""
    if compare.import_pymgrit() is None:
        pytest.skip("PyMGRIT is not installed")
    return getattr(compare, request.param)(9 if request.param == "heat_2d" else 33, 65, 3, M)


@pytest.mark.parametrize("steps", [range(0, 64), range(3, 64, 4), range(63, 64)])
def test_factored_blocks_are_their_steps(problems, steps):
    start = problems[0].vector_t_start.get_values()
    u = np.random.default_rng(0).standard_normal((len(steps), *start.shape))
    ours, theirs = np.empty_like(u), np.empty_like(u)
    FactoredStep(problems[0]).step(steps, u, ours)
    TheirStep(problems[0]).step(steps, u, theirs)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-13 * np.abs(theirs).max())


@pytest.mark.parametrize("propagator", [TheirStep, FactoredStep])
def test_same_cycles_as_pymgrit(problems, propagator):
    """The same residuals and solution; no more cycles and propagator calls."""
    theirs = compare.run_pymgrit(problems)
    ours = compare.run_like_pymgrit(problems, propagator, M)
    assert ours.cycles <= theirs.cycles
    assert ours.calls <= theirs.calls
    assert theirs.residuals[-1] < 1e-7 <= theirs.residuals[0]
    np.testing.assert_allclose(ours.residuals[1:], theirs.residuals[: ours.cycles], rtol=1e-6, atol=1e-13)
    np.testing.assert_allclose(ours.U, theirs.U, rtol=0, atol=1e-11)


def test_both_solve_the_sequential_problem(problems):
    ours = compare.run_like_pymgrit(problems, FactoredStep, M, tol=1e-12)
    exact, step = ours.U.copy(), TheirStep(problems[0])
    for n in range(len(exact) - 1):
        step.step(range(n, n + 1), exact[n : n + 1], exact[n + 1 : n + 2])
    np.testing.assert_allclose(ours.U, exact, rtol=0, atol=1e-11)


def test_tridiagonal_solves_its_equations():
    """(I - dt D2) u_new = u + dt f, in blocks, from strided rows and one state after another."""
    t, nspace = np.linspace(0, 2 * math.pi, 65), 17
    x, dt, p = np.linspace(0, math.pi, nspace)[1:-1], t[1] - t[0], Tridiagonal(t, nspace)
    matrix = np.eye(15) * (1 + 2 * dt / (x[1] - x[0]) ** 2)
    matrix -= dt / (x[1] - x[0]) ** 2 * (np.eye(15, k=1) + np.eye(15, k=-1))
    G, U = np.random.default_rng(1).standard_normal((2, 65, 15))
    p.sweep(0, U, G[1:])
    f = np.sin(x) * (np.cos(t) - np.sin(t))[1:, None]
    np.testing.assert_allclose((U[1:] - G[1:]) @ matrix, U[:-1] + dt * f, rtol=0, atol=1e-12)
    contiguous, strided = np.empty((16, 15)), np.empty((64, 15))
    p.step(range(2, 64, 4), U[2:-1:4], contiguous)
    p.step(range(2, 64, 4), U[2:-1:4], strided[1::4])
    np.testing.assert_allclose(contiguous, (U - G)[3::4], rtol=0, atol=1e-13)
    assert np.array_equal(contiguous, strided[1::4])


def test_xbraid_ex02_with_16384_steps():
    """``ex-02 -ml 15 -cf 16 -ntime 16384 -nspace 129`` of XBraid 3.1: its residuals, no more calls."""
    expected = [3.427942e1, 1.235559e0, 9.135448e-2, 8.003120e-3, 7.403443e-4, 7.082613e-5, 6.920029e-6]
    example = HeatExample()
    assert f"{example.atol:.6e}" == "3.259394e-05"
    run = example.solve()
    assert [f"{r:.6e}" for r in run.residuals] == [f"{r:.6e}" for r in expected]
    assert run.calls * example.ntime <= 259420
    # a residual r at the C-points is an error of at most |r|_1 there, as steps do not amplify
    bound = run.residuals[-1] * math.sqrt(example.ntime / example.m)
    assert np.abs(run.U - example.step()).max() <= bound


def test_rows_without_pymgrit(monkeypatch):
    """Rows of ex-02 and a word on what is missing."""
    pytest.importorskip("irksome")
    monkeypatch.setattr(compare, "import_pymgrit", lambda: None)
    said = []
    rows = compare.compare_rows(True, said.append)
    assert [row.section for row in rows] == ["xbraid", "xbraid"]
    assert "not installed" in said[0]
    assert all(row.ratio == pytest.approx(row.ours / row.theirs) for row in rows)


def test_rows_of_pymgrit(problems):
    pytest.importorskip("irksome")
    rows = compare.pymgrit_rows("heat", problems, M, 1, str)
    assert all(row.ratio == pytest.approx(row.theirs / row.ours) for row in rows)

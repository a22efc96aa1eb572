"""Our cycles beside PyMGRIT's and XBraid's, on one rank: ``python -m tests.benchmarks.compare [--quick]``.

*PyMGRIT* 1.0.6 solves its own ``Heat1D`` and ``Heat2D`` with its defaults: V-cycles, FCF-relaxation, nested iteration,
until the 2-norm of the residual at the C-points is below 1e-7 after a cycle. Ours takes the matrices, data, cycle and
stopping test from it, once with its own step (``spsolve``, state by state), so that the cycles alone differ, and once
with what our interface is made for: blocks of states and a sparse LU for each level. Both times are from the levels'
problems to the solution: PyMGRIT's constructor (it does the nested iteration) and ``solve``; our factors, ``MGRIT`` and
``solve``.

*XBraid's* ``ex-02 -ml 15 -cf 16 -ntime 16384 -nspace 129`` is heat conduction on [0, pi], u = sin x cos t, from a
random first guess. Ours is compared with our sequential stepping by the same tridiagonal factor, as XBraid's cycles are
with its ``-ml 1``. XBraid calls the same compiled step in both; of our single steps about half is the interpreter's, of
our blocks little. So our ratio can be below the number of propagator calls a step.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from mpi4py import MPI
from scipy.linalg.lapack import dpttrf, dpttrs
from scipy.sparse.linalg import splu

from pint_fem.mgrit import MGRIT, SolveResult, coarse_points
from tests.benchmarks.rows import Row, table, timed

__all__ = ["XBRAID_RATIO", "compare_rows"]

XBRAID_RATIO = 15
"""XBraid 3.1's own ratio on one rank: ``ex-02`` as above over its ``-ml 1``, 14 to 16 (15.8 step calls a step)."""
XBRAID_TOL = 1e-7


def import_pymgrit():
    """PyMGRIT, which calls a function that numpy 2.4 has no longer; ``None`` where it is not installed."""
    if not hasattr(np, "in1d"):
        np.in1d = np.isin  # noqa: NPY201
    try:
        import pymgrit
    except ImportError:
        return None
    return pymgrit


# -- PyMGRIT's problems ------------------------------------------------------------------------------------------------
def heat_1d(nx: int, nt: int, levels: int, m: int) -> list:
    """PyMGRIT's ``examples/example_heat_1d.py``: u = sin(pi x) cos t on [0, 1] x [0, 2], a problem for each level."""
    pymgrit = import_pymgrit()
    problem = pymgrit.Heat1D(
        x_start=0,
        x_end=1,
        nx=nx,
        a=1,
        init_cond=lambda x: np.sin(np.pi * x),
        rhs=lambda x, t: -np.sin(np.pi * x) * (np.sin(t) - np.pi**2 * np.cos(t)),
        t_start=0,
        t_stop=2,
        nt=nt,
    )
    return pymgrit.simple_setup_problem(problem, levels, m)


def heat_2d(nx: int, nt: int, levels: int, m: int) -> list:
    """A warm block on the unit square that cools, and a source.

    The solution of PyMGRIT's own ``example_heat_2d.py`` is linear in time: nested iteration finds it before any cycle.
    """
    pymgrit = import_pymgrit()
    problem = pymgrit.Heat2D(
        x_start=0,
        x_end=1,
        y_start=0,
        y_end=1,
        nx=nx,
        ny=nx,
        a=1,
        init_cond=lambda x, y: 1.0 * ((np.abs(x - 0.4) < 0.2) & (np.abs(y - 0.6) < 0.3)),
        rhs=lambda x, y, t: np.sin(np.pi * x) * np.sin(np.pi * y) * (2 * np.pi**2 * np.cos(t) - np.sin(t)),
        t_start=0,
        t_stop=2,
        nt=nt,
    )
    return pymgrit.simple_setup_problem(problem, levels, m)


class TheirStep:
    """PyMGRIT's step of a level, state by state."""

    def __init__(self, app):
        self.app, self.vector = app, app.vector_template.clone_zero()

    def step(self, steps, u, out):
        t = self.app.t
        for n, start, stop in zip(steps, u, out, strict=True):
            self.vector.set_values(start)
            stop[...] = self.app.step(self.vector, t[n], t[n + 1]).get_values()


class FactoredStep:
    """The same backward Euler steps on blocks of states, with one sparse LU for the level.

    Boundary values are zero. The matrix is diagonally dominant: a symmetric ordering and no pivoting do.
    """

    def __init__(self, app):
        self.app, self.dt = app, app.t[1] - app.t[0]
        matrix = (self.dt * app.space_disc + app.identity).tocsc()
        options = dict(permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options=dict(SymmetricMode=True))
        self.lu = splu(matrix, **options)

    def step(self, steps, u, out):
        app, t = self.app, self.app.t[steps.start + 1 : steps.stop + 1 : steps.step]
        if u.ndim == 2:
            b = u + self.dt * app.rhs(app.x, t[:, None])
        else:  # u[n, x, y], zero on the boundary
            b = np.zeros(u.shape)
            b[:, 1:-1, 1:-1] = u[:, 1:-1, 1:-1]
            b[:, 1:-1, 1:-1] += self.dt * app.rhs(x=app.x_2d[1:-1], y=app.y_2d[:, 1:-1], t=t[:, None, None])
        out[...] = self.lu.solve(b.reshape(len(b), -1).T).T.reshape(u.shape)


class Run(NamedTuple):
    """A solution ``(points, *state)``, the number of cycles, the propagator calls a fine step and the residuals."""

    U: np.ndarray
    cycles: int
    calls: float
    residuals: Sequence[float]


def run_pymgrit(problems: Sequence, tol: float = 1e-7) -> Run:
    """PyMGRIT with its defaults."""
    pymgrit = import_pymgrit()
    calls = 0

    def counted(step):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            return step(*args, **kwargs)

        return call

    for app in problems:
        app.step = counted(app.step)
    try:
        solver = pymgrit.Mgrit(problems, tol=tol, comm_time=MPI.COMM_SELF, logging_lvl=30)
        residuals = solver.solve()["conv"]
    finally:
        for app in problems:
            del app.step
    U = np.array([u.get_values() for u in solver.u[0]])
    return Run(U, solver.solve_iter, calls / (len(U) - 1), residuals)


def run_like_pymgrit(problems: Sequence, propagator: type, m: int, tol: float = 1e-7) -> Run:
    """Ours with the same cycle and stopping test; its residuals begin with that of the first guess."""
    start = problems[0].vector_t_start.get_values()
    U = np.zeros((len(problems[0].t), *start.shape))
    U[0] = start
    options = dict(coarsening=m, check="cycle", start="nested", rtol=0, atol=tol, max_it=100)
    solver = MGRIT([propagator(app) for app in problems], len(U) - 1, options=options)
    return _run(solver, U, solver.solve(U))


def _run(solver: MGRIT, U: np.ndarray, result: SolveResult) -> Run:
    calls = sum(level.phi_calls for level in solver.levels) / solver.nsteps
    return Run(U, result.cycles, calls, result.residuals)


def pymgrit_rows(name: str, problems: Sequence, m: int, repeats: int, say: Callable[[str], None]) -> list[Row]:
    """PyMGRIT's time over ours, with its step and with a factored one."""
    steps, runs = len(problems[0].t) - 1, {}
    actions = {
        "theirs": lambda: run_pymgrit(problems),
        "same": lambda: run_like_pymgrit(problems, TheirStep, m),
        "factored": lambda: run_like_pymgrit(problems, FactoredStep, m),
    }

    def keep(key):
        def action():
            runs[key] = actions[key]()

        return action

    seconds = dict(zip(actions, timed(*map(keep, actions), repeats=repeats), strict=True))
    theirs, rows = runs["theirs"], []
    size = math.prod(theirs.U.shape[1:])
    say(f"PyMGRIT {name}: {steps} steps, {size} unknowns, {len(problems)} levels, m = {m}, {seconds['theirs']:.2f} s")
    for key, what in (
        ("same", "its spsolve in each step in both, so the cycles alone differ"),
        ("factored", "its spsolve in each step, ours one LU a level and blocks of states"),
    ):
        ours = runs[key]
        difference = np.abs(ours.U - theirs.U).max() / np.abs(theirs.U).max()
        note = (
            f"cycles {ours.cycles} / {theirs.cycles}, Phi calls a step {ours.calls:.1f} / {theirs.calls:.1f}, "
            f"difference {difference:.0e}"
        )
        ms = [1e3 * seconds[k] / steps for k in (key, "theirs")]
        ratio = seconds["theirs"] / seconds[key]
        rows.append(Row("pymgrit", f"PyMGRIT / ours, {name}, {what}", *ms, ratio, 1.0, False, note))
    return rows


# -- XBraid's ex-02 ----------------------------------------------------------------------------------------------------
class Tridiagonal:
    """Backward Euler and central differences of ex-02 at the inner points, one factor of LAPACK for all steps."""

    def __init__(self, t: np.ndarray, nspace: int):
        x, dt = np.linspace(0, math.pi, nspace)[1:-1], t[1] - t[0]
        c = dt / (math.pi / (nspace - 1)) ** 2
        self.diagonal, self.off, info = dpttrf(np.full(len(x), 1 + 2 * c), np.full(len(x) - 1, -c))
        if info:
            raise ValueError(f"dpttrf: {info}")
        self.in_space, self.in_time = dt * np.sin(x), np.cos(t) - np.sin(t)

    def step(self, steps, u, out):
        t = self.in_time[steps.start + 1 : steps.stop + 1 : steps.step, None]
        b = out if out.flags.c_contiguous else np.empty(out.shape)
        np.multiply(t, self.in_space, out=b)
        b += u
        dpttrs(self.diagonal, self.off, b.T, overwrite_b=True)  # rows of b are LAPACK's columns: solves in place
        if b is not out:
            out[...] = b

    def sweep(self, first, U, G):
        np.multiply(self.in_time[first + 1 : first + len(U), None], self.in_space, out=U[1:])
        diagonal, off, before = self.diagonal, self.off, U[0]
        for i, row in enumerate(U[1:]):
            row += before
            dpttrs(diagonal, off, row, overwrite_b=True)
            if G is not None:
                row += G[i]
            before = row


class HeatExample:
    """ex-02 with ``-cf m``.

    Parameters
    ----------
    ntime, nspace, m
        Steps, points in space with the ends, coarsening; coarsest levels have at least three steps, as XBraid's.
    """

    def __init__(self, ntime: int = 16384, nspace: int = 129, m: int = 16):
        self.ntime, self.nspace, self.m = ntime, nspace, m
        factors, n = [], ntime
        while n // m >= 3:
            factors.append(m)
            n //= m
        self.t = np.linspace(0, 2 * math.pi, ntime + 1)
        self.points = coarse_points(ntime, factors)
        self.atol = XBRAID_TOL / (math.sqrt(2 * math.pi / (ntime - 1)) * math.sqrt(math.pi / (nspace - 1)))
        self.guess = np.zeros((ntime + 1, nspace - 2))
        self.guess[0] = np.sin(np.linspace(0, math.pi, nspace)[1:-1])
        self.guess[m::m] = random_states(ntime // m, nspace)[:, 1:-1]

    def solve(self, **options) -> Run:
        """MGRIT from the random guess, or as the options say."""
        propagators = [Tridiagonal(self.t[p], self.nspace) for p in self.points]
        options = dict(coarsening=self.m, rtol=0, atol=self.atol, max_it=30) | options
        U = self.guess.copy()
        solver = MGRIT(propagators, self.ntime, options=options)
        return _run(solver, U, solver.solve(U))

    def step(self) -> np.ndarray:
        """Sequential stepping."""
        U = np.empty_like(self.guess)
        U[0] = self.guess[0]
        Tridiagonal(self.t, self.nspace).sweep(0, U, None)
        return U


def random_states(count: int, size: int) -> np.ndarray:
    """The states that XBraid's ``braid_Rand() / braid_RAND_MAX`` gives, one after another, on one rank."""
    state, values = 1, []
    for _ in range(count * size):
        state = (state * 1103515245 + 12345) % 2**64
        values.append(state // 65536 % 32768)
    return np.array(values).reshape(count, size) / 32768


def xbraid_rows(example: HeatExample, repeats: int, say: Callable[[str], None]) -> list[Row]:
    """Time of MGRIT over that of sequential stepping."""
    cases = {
        "random first guess, V-cycles, FCF, as XBraid": {},
        "nested iteration, residual checked after a cycle": dict(start="nested", check="cycle"),
    }
    runs, rows, exact = {}, [], example.step()

    def keep(what, options):
        def action():
            runs[what] = example.solve(**options)

        return action

    sequential, *seconds = timed(example.step, *(keep(*case) for case in cases.items()), repeats=repeats)
    levels = " -> ".join(str(len(p) - 1) for p in example.points)
    say(f"XBraid's ex-02: {levels} steps, {example.nspace} points, {1e6 * sequential / example.ntime:.2f} us a step")
    for what, second in zip(cases, seconds, strict=True):
        run = runs[what]
        error = np.abs(run.U - exact).max() / np.abs(exact).max()
        note = (
            f"{run.cycles} cycles ({len(run.residuals)} residuals), Phi calls a step {run.calls:.1f}, "
            f"difference {error:.0e}"
        )
        ms = [1e3 * s / example.ntime for s in (second, sequential)]
        title = f"ex-02, {what}: MGRIT / sequential"
        rows.append(Row("xbraid", title, *ms, second / sequential, XBRAID_RATIO, True, note))
    return rows


# -- all of it ---------------------------------------------------------------------------------------------------------
def compare_rows(quick: bool, say: Callable[[str], None]) -> list[Row]:
    """Measure.

    Parameters
    ----------
    quick
        Fewer steps and repeats.
    say
        Takes a line on what was done.

    Returns
    -------
    list of Row
        Without those of PyMGRIT where it is not installed.
    """
    rows = []
    if import_pymgrit() is None:
        say("PyMGRIT is not installed (pip install --no-deps pymgrit==1.0.6): not compared")
    else:
        repeats = 1 if quick else 3
        rows += pymgrit_rows("Heat1D", heat_1d(257, 129 if quick else 257, 3, 4), 4, repeats, say)
        rows += pymgrit_rows("Heat2D", heat_2d(17 if quick else 33, 65, 3, 4), 4, repeats, say)
    rows += xbraid_rows(HeatExample(4096 if quick else 16384), 3 if quick else 5, say)
    return rows


def main(argv: list[str] | None = None) -> int:
    """Measure and print."""
    from rich.console import Console

    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.compare", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer steps and repeats")
    args = parser.parse_args(argv)
    console, start = Console(width=None if sys.stdout.isatty() else 150), time.perf_counter()
    rows = compare_rows(args.quick, lambda text: console.print(f"  {text}"))
    console.print(table(rows))
    console.print(f"{time.perf_counter() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What MGRIT offers besides its answer: storage, norms, counts of calls, honest failure, messages, traces, options."""

import collections
import itertools
import json
import math
import os
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from mpi4py import MPI

from pint_fem.all_at_once.levels import inject
from pint_fem.all_at_once.stopping import SolveResult, Stopping
from pint_fem.mgrit import MGRIT, MGRITOptions, SolverFailure, coarse_points, split_steps
from pint_fem.mgrit.c_point_relaxation import CPointRelaxation
from pint_fem.mgrit.relaxation import Relaxation
from tests.stepping import sequential

COMM = MPI.COMM_WORLD


class Decay:
    """Implicit Euler for ``u' = -u - u^3`` linearised about the old value, on any times: elementwise."""

    def __init__(self, t):
        self.t = np.asarray(t, dtype=float)

    def step(self, steps, u, out):
        n = np.asarray(steps)
        dt = (self.t[n + 1] - self.t[n]).reshape(-1, *[1] * (u.ndim - 1))
        out[...] = u / (1 + dt + dt * u * u)


class LinearDecay(Decay):
    """``u' = -u``."""

    def step(self, steps, u, out):
        n = np.asarray(steps)
        out[...] = u / (1 + (self.t[n + 1] - self.t[n]).reshape(-1, *[1] * (u.ndim - 1)))


class Modes:
    """``u -> lam u`` on pairs of components, complex eigenvalues."""

    def __init__(self, lam):
        self.lam = np.asarray(lam, dtype=complex)

    def step(self, steps, u, out):
        z = self.lam * (u[..., 0] + 1j * u[..., 1])
        out[..., 0], out[..., 1] = z.real, z.imag


class Bad(Decay):
    """Raises, or gives NaN."""

    def __init__(self, t, raises):
        super().__init__(t)
        self.raises = raises

    def step(self, steps, u, out):
        if self.raises:
            raise ArithmeticError("no root found")
        out[...] = np.nan


def decays(t, coarsening):
    """A propagator a level."""
    return [Decay(np.asarray(t)[points]) for points in coarse_points(len(t) - 1, coarsening)]


def guess(u0, nsteps):
    """Initial value and noise."""
    U = np.random.default_rng(3).uniform(-1, 1, (nsteps + 1, *np.shape(u0)))
    U[0] = u0
    return U


def c_rows(solver):
    """Rows of the own C-points in an array of all own points."""
    level = solver.levels[0]
    c = np.asarray(level.c_points)
    return c[(c > level.lo) & (c <= level.hi)] - level.lo


def total_calls(solver):
    """States stepped on each level, over all ranks."""
    return [solver.comm.allreduce(level.phi_calls) for level in solver.levels]


# -- time grids and few points ---------------------------------------------------------------------------------------
@pytest.mark.usefixtures("array_kind")
@pytest.mark.parallel([1, 3])
def test_non_uniform_times():
    """Steps that grow a hundredfold, C-points closer where steps are small."""
    t = np.geomspace(1, 100, 41) - 1
    coarsening = [(0, 2, 4, 7, 11, 16, 23, 31, 40), 3]
    exact = sequential(Decay(t), [1.0, -0.4], 40)
    for cycle in "VF":
        solver = MGRIT(
            decays(t, coarsening), 40, options=dict(coarsening=coarsening, cycle=cycle, rtol=1e-14), comm=COMM
        )
        lo, hi = solver.levels[0].lo, solver.levels[0].hi
        U = guess([1.0, -0.4], 40)[lo : hi + 1]
        assert solver.solve(U).converged
        np.testing.assert_allclose(U, exact[lo : hi + 1], rtol=0, atol=1e-13)
    assert [len(p) for p in coarse_points(40, coarsening)] == [41, 9, 3]


@pytest.mark.parallel([1, 3])
def test_trajectories_are_injected_into_all_levels():
    """The states at the points of each level, the initial value and the left neighbour's last point included."""
    N, coarsening = 29, (3, (0, 2, 5, 9))
    solver = MGRIT([Modes([1.0])] * 3, N, options=dict(coarsening=coarsening), comm=COMM)
    whole = np.random.default_rng(3).standard_normal((N + 1, 2))
    fine = solver.levels[0]
    for level, points, part in zip(
        solver.levels, coarse_points(N, coarsening), inject(solver.levels, whole[fine.lo : fine.hi + 1]), strict=True
    ):
        if level.active:
            np.testing.assert_array_equal(part, whole[np.asarray(points)[level.lo : level.hi + 1]])


@pytest.mark.usefixtures("array_kind")
@pytest.mark.parallel(3)
def test_ranks_without_points_pass_through():
    """Three steps on three ranks, one coarse step; and ranks without any: they do nothing and keep nobody waiting."""
    for bounds, m in (([0, 1, 2, *[3] * (COMM.size - 2)], 3), ([0, *[0] * (COMM.size - 2), 2, 3], 2)):
        options = dict(coarsening=m, relax="F", rtol=1e-15)
        solver = MGRIT(decays(range(4), [m]), 3, options=options, comm=COMM, bounds=bounds)
        coarse, has = solver.levels[1], bounds[COMM.rank + 1] // m > bounds[COMM.rank] // m
        assert coarse.active == (has or COMM.rank == 0)
        U = guess([0.8], 3)[bounds[COMM.rank] : bounds[COMM.rank + 1] + 1]
        result = solver.solve(U)
        assert result.converged
        assert (coarse.phi_calls > 0) == has
        exact = sequential(Decay(range(4)), [0.8], 3)
        np.testing.assert_allclose(U[1:], exact[bounds[COMM.rank] + 1 : bounds[COMM.rank + 1] + 1], rtol=0, atol=1e-15)


# -- storage of C-points only ------------------------------------------------------------------------------------------
@pytest.mark.parallel([1, 3])
def test_view_says_the_memory():
    """Rows times the size of a state: 1/8 MB each."""
    lines = {}
    for storage in ("all", "C"):
        options = dict(coarsening=8, storage=storage)
        solver = MGRIT(decays(range(73), [8]), 72, options=options, comm=COMM)
        lines[storage] = next(line for line in solver.view(2**17).splitlines() if "memory" in line)
        rows = 72 // COMM.size // (8 if storage == "C" else 1) + 1
        assert solver.local_rows == rows
        what = "C-points" if storage == "C" else "all points"
        assert f"{what} {rows / 8:.3g} MB" in lines[storage]


@pytest.mark.usefixtures("array_kind")
@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize("fixed", [False, True])
def test_states_gives_the_trajectory(fixed):
    """Every own point once and in order, with a tolerance or a fixed number of cycles."""
    N, G = 43, 0.1 * np.random.default_rng(1).standard_normal((43, 2))
    t = np.arange(N + 1) / 10
    stop = dict(residual="none", max_it=8) if fixed else dict(rtol=1e-14)
    solver = MGRIT(decays(t, [5]), N, options=dict(coarsening=5, storage="C", **stop), comm=COMM)
    lo, hi = solver.levels[0].lo, solver.levels[0].hi
    assert lo % 5 == 0
    U = guess([1.0, 2.0], N)[[lo, *(lo + c_rows(solver))]]
    assert solver.solve(U, G[lo:hi]).converged
    before = solver.levels[0].phi_calls
    parts = [(n, block.copy()) for n, block in solver.states(U, G[lo:hi])]
    numbers = [n + i for n, block in parts for i in range(len(block))]
    assert numbers == list(range(lo + 1, hi + 1))
    assert solver.levels[0].phi_calls - before == hi - lo - len(c_rows(solver))  # C-points are there
    exact = sequential(Decay(t), [1.0, 2.0], N, G)
    for n, block in parts:
        np.testing.assert_allclose(block, exact[n : n + len(block)], rtol=0, atol=1e-13)


@pytest.mark.usefixtures("array_kind")
@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize("options", [dict(), dict(start="nested"), dict(max_it=1, on_divergence="serial")])
def test_condensed_right_hand_side(options):
    """A row an interval does as a row a step does; where F-points want theirs, or there are steps behind the last
    C-point, it is refused.
    """
    N, m = 40, 5
    t, G = np.arange(N + 1) / 10, np.random.default_rng(1).standard_normal((N, 2))
    phi, condensed = LinearDecay(t), []
    exact = sequential(phi, [1.0, 2.0], N, G)
    for c in range(0, N, m):
        g = np.zeros((1, 2))
        for n in range(c, c + m):
            out = np.empty_like(g)
            phi.step(range(n, n + 1), g, out)
            g = out + G[n]
        condensed.append(g[0])
    given = dict(coarsening=m, storage="C", rtol=1e-14, **options)
    solver = MGRIT([phi, LinearDecay(t[::m])], N, options=given, comm=COMM, linear=True)
    own = solver.levels[1]
    U, rows = guess([1.0, 2.0], N)[m * own.lo : m * own.hi + 1 : m], np.array(condensed)[own.lo : own.hi]
    assert solver.solve(U, rows).converged
    np.testing.assert_allclose(U, exact[m * own.lo : m * own.hi + 1 : m], rtol=0, atol=1e-13)
    with pytest.raises(ValueError, match="give a row for each"):
        next(solver.states(U, rows))
    solver = MGRIT(decays(np.arange(N + 2) / 10, [m]), N + 1, options=given, comm=COMM)
    with pytest.raises(ValueError, match=r"for .* own steps"):
        solver.solve(np.zeros((solver.local_rows, 2)), np.zeros((solver.local_rows - 1, 2)))


@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize("start", ["guess", "nested"])
def test_storage_costs_no_calls(start):
    """With FCF-relaxation a cycle does 2 N calls either way; at the end C-relaxed points need no F-relaxation."""
    N, calls = 48, {}
    for storage, cycles in itertools.product(("all", "C"), (2, 3)):
        options = dict(coarsening=(4, 3), storage=storage, start=start, rtol=0, max_it=cycles, dtol=1e300)
        solver = MGRIT(decays(np.arange(N + 1) / 10, [4, 3]), N, options=options, comm=COMM)
        lo = solver.levels[0].lo
        U = guess([1.0], N)
        U = U[[lo, *(lo + c_rows(solver))]] if storage == "C" else U[lo : solver.levels[0].hi + 1]
        assert solver.solve(U).cycles == cycles
        calls[storage, cycles] = total_calls(solver)
    cost = {s: np.subtract(calls[s, 3], calls[s, 2]).tolist() for s in ("all", "C")}
    assert cost["all"] == cost["C"]
    assert cost["all"][0] == 2 * N


@pytest.mark.parallel([1, 3])
def test_bounds_off_the_c_points_are_refused():
    """On every rank; and one level has no C-points."""
    make = lambda bounds: MGRIT(
        decays(range(33), [4]), 32, options=dict(coarsening=4, storage="C"), comm=COMM, bounds=bounds
    )
    if COMM.size > 1:
        solver = make([0, *[6] * (COMM.size - 1), 32])
        with pytest.raises(ValueError, match=r"first steps .*6.* are not all C-points.*storage='all'"):
            solver.solve(np.zeros((solver.local_rows, 1)))
    make(None).solve(np.zeros((make(None).local_rows, 1)))
    with pytest.raises(ValueError, match="one level"):
        MGRIT(decays(range(33), []), 32, options=dict(storage="C"), comm=COMM)


# -- norms and stopping ------------------------------------------------------------------------------------------------
def solve_slab(coarsening, N=36, u0=(1.0, -2.0), t=None, **rest):
    """The whole trajectory and the result of a solve on the ranks' slabs."""
    t = np.arange(N + 1) / 10 if t is None else t
    options = rest.pop("options")
    solver = MGRIT(decays(t, coarsening), N, options=dict(coarsening=coarsening, **options), comm=COMM, **rest)
    U = guess(u0, N)[solver.levels[0].lo : solver.levels[0].hi + 1]
    result = solver.solve(U)
    return np.concatenate([np.asarray(u0)[None], *COMM.allgather(U[1:])]), result


def residual_of(U, t):
    """At points 1..N."""
    out = np.empty_like(U[1:])
    Decay(t).step(range(len(out)), U[:-1], out)
    return out - U[1:]


@pytest.mark.usefixtures("array_kind")
@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize("kind", [1, 2, "inf"])
@pytest.mark.parametrize("check", ["relaxed", "cycle"])
def test_norms_by_hand(kind, check):
    """Of the residual over C-points, which relaxation makes that over all points; with a mass matrix too."""
    t, M = np.arange(37) / 10, np.array([[2.0, 1.0], [1.0, 3.0]])
    histories = []
    for where, mass in itertools.product(("C", "full"), (False, True)):
        norms = dict(point_norms=lambda block: np.einsum("ki,ij,kj->k", block, M, block)) if mass else {}
        options = dict(time_norm=kind, residual=where, rtol=0, max_it=3, check=check)
        U, result = solve_slab([4], options=options, **norms)
        r, weight = residual_of(U, t), M if mass else np.eye(2)
        norm = lambda v, w=weight: np.linalg.norm(
            np.sqrt(np.einsum("ki,ij,kj->k", v, w, v)), np.inf if kind == "inf" else kind
        )
        assert result.residuals[-1] == pytest.approx(norm(r), rel=1e-9)
        assert result.residuals[-1] == pytest.approx(norm(r[3::4]), rel=1e-9)
        assert result.scale == pytest.approx(norm(U[4::4]), rel=1e-12)
        histories.append(result.residuals)
    for a, b in zip(histories[:2], histories[2:], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9)


@pytest.mark.usefixtures("array_kind")
@pytest.mark.parallel([1, 3])
def test_what_the_tolerance_is_of():
    """The cycle before was above it."""
    for rtol_of in ("first", "trajectory"):
        U, result = solve_slab([4], 160, options=dict(rtol=1e-7, rtol_of=rtol_of))
        reference = result.residuals[0] if rtol_of == "first" else np.linalg.norm(U[4::4])
        assert result.reason == "rtol"
        assert result.residuals[-1] <= 1e-7 * reference < result.residuals[-2]


@pytest.mark.usefixtures("array_kind")
@pytest.mark.parallel([1, 3])
def test_fixed_cycles_look_at_nothing():
    """The user's norm is asked once, whether the result is finite, however many cycles; and no residual is kept."""
    asked = []

    def norms(block):
        asked.append(len(block))
        return (block**2).sum(axis=1)

    for cycles in (1, 5):
        asked.clear()
        _, result = solve_slab([4], options=dict(residual="none", max_it=cycles), point_norms=norms)
        assert len(asked) == 1
        assert (result.converged, result.reason, result.cycles, result.residuals) == (True, "its", cycles, [])
        assert math.isnan(result.factor)


class Residual(Decay):
    """``u + dt f(u)``; remembers which steps it was told may be the last ones."""

    propagates_nonfinite = True

    def __init__(self, t, bad=None):
        super().__init__(t)
        self.bad, self.may_be_last, self.said = bad, True, collections.Counter()

    def step(self, steps, u, out):
        super().step(steps, u, out)
        out[[n == self.bad for n in steps], 0] = np.nan
        if self.may_be_last:
            self.said.update(steps)


@pytest.mark.usefixtures("array_kind")
@pytest.mark.parallel([1, 3])
def test_a_fixed_number_of_cycles_meets_once():
    """Norms gathered behind the last cycle are those of each; that one alone may be the last at a point, and is at all
    of them; what is not finite is found at the end and named.
    """
    t, options = np.linspace(0, 2, 25), {"levels": 2, "coarsening": 4, "relax": "F", "check": "cycle"}

    def solve(bad=None, start="skip", monitor=False, cycles=2):
        fine = Residual(t, bad)
        bounds = split_steps(24, COMM.size)
        solver = MGRIT([fine, Decay(t[::4])], 24, comm=COMM, bounds=bounds,
                       options={**options, "monitor": monitor})  # fmt: skip
        U = np.ones((solver.local_rows, 2))
        return U, fine, solver.solve(U, start=start, cycles=cycles)

    for start in ("skip", "guess"):
        U, fine, result = solve(start=start)
        V, _, seen = solve(start=start, monitor=True)
        assert np.array_equal(U, V)
        assert (result.cycles, result.reason, len(result.residuals)) == (2, "its", 3)
        assert result.residuals == pytest.approx(seen.residuals, rel=1e-14)
        assert result.scale == pytest.approx(seen.scale, rel=1e-14)
        lo, hi = split_steps(24, COMM.size)[COMM.rank : COMM.rank + 2]
        assert fine.said == dict.fromkeys(range(lo, hi), 1)
    with pytest.raises(SolverFailure, match="level 0, steps 13: value not finite"):
        solve(bad=13)


class Meetings(MPI.Intracomm):
    """Counts what all ranks take part in."""

    count = 0

    def Allreduce(self, *args, **kwargs):
        self.count += 1
        return super().Allreduce(*args, **kwargs)

    def Allgatherv(self, *args, **kwargs):
        self.count += 1
        return super().Allgatherv(*args, **kwargs)

    def allgather(self, *args):
        self.count += 1
        return super().allgather(*args)


@pytest.mark.usefixtures("array_kind")
@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize("storage", ["all", "C"])
@pytest.mark.parametrize("residual", ["none", "C"])
def test_fixed_cycles_name_the_first_failure_early(storage, residual):
    """The step and level on every rank, inside an interval, into a C-point or on the coarse level, whoever looks at the
    blocks; of 40 cycles hardly more than 8 are taken, and up to 7 need no meeting but those before and behind.
    """
    t = np.linspace(0, 2, 25)

    def solve(fine, coarse, cycles, comm=COMM):
        solver = MGRIT([fine, coarse], 24, comm=comm, options={"coarsening": 4, "relax": "F", "storage": storage,
                       "residual": residual, "check": "cycle", "rtol": 0, "max_it": 50})  # fmt: skip
        return solver, solver.solve, dict(U=np.ones((solver.local_rows, 2)), start="skip", cycles=cycles)

    for (level, bad), cycles in itertools.product(((0, 13), (0, 15), (1, 3)), (3, 40)):
        places = [bad if i == level else None for i in range(2)]
        solver, run, how = solve(Residual(t, places[0]), Residual(t[::4], places[1]), cycles)
        with pytest.raises(SolverFailure, match=f"level {level}, steps {bad}: value not finite$"):
            run(**how)
        assert solver.levels[0].phi_calls <= 10 * solver.levels[0].k
    counts = {}
    for cycles in (1, 7, 8, 9):
        comm = Meetings(COMM)
        _, run, how = solve(Residual(t), Residual(t[::4]), cycles, comm)
        assert run(**how).cycles == cycles
        counts[cycles] = comm.count
    assert counts[1] == counts[7] == counts[8]  # behind 8 cycles they meet anyway
    assert counts[9] == counts[8] + (COMM.size > 1)


@pytest.mark.usefixtures("array_kind")
@pytest.mark.parallel([1, 3])
def test_the_earliest_failure_is_named():
    """In a later cycle a step further left fails as well: on another rank, which would speak first."""
    t, began = np.linspace(0, 2, 25), [0]

    class Later(Residual):
        """Its first step fails too, from the third cycle on."""

        def step(self, steps, u, out):
            super().step(steps, u, out)
            began[0] += 1 in steps
            if began[0] > 2:
                out[[n == 1 for n in steps]] = np.nan

    options = {"coarsening": 4, "relax": "F", "storage": "C", "residual": "none", "max_it": 5, "rtol": 0}
    solver = MGRIT([Later(t, 18), Residual(t[::4])], 24, comm=COMM, options=options)
    with pytest.raises(SolverFailure, match="level 0, steps 18: value not finite"):
        solver.solve(np.ones((solver.local_rows, 2)))
    assert COMM.allreduce(began[0]) > 2


@pytest.mark.usefixtures("array_kind")
@pytest.mark.parallel([1, 3])
def test_failures_between_stored_points_are_named():
    """F-points that are computed again for :meth:`MGRIT.states` fail on one rank: NaN there, and named everywhere."""
    t = np.linspace(0, 2, 25)
    fine = Residual(t)
    solver = MGRIT([fine, Residual(t[::4])], 24, comm=COMM, options={"coarsening": 4, "storage": "C"})
    U = np.ones((solver.local_rows, 2))
    solver.solve(U)
    solver.raise_failures()
    fine.bad = 13
    finite = [np.isfinite(block).all() for _, block in solver.states(U)]
    assert COMM.allreduce(len(finite) - sum(finite)) == 1
    with pytest.raises(SolverFailure, match="level 0, steps 13: value not finite"):
        solver.raise_failures()


@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize("nu", [0, 1, 2])
def test_check_before_relaxation_uses_its_calls_again(nu):
    """To see ``r`` residuals: ``(1 + nu) N r`` calls, or ``nu N`` fewer as the last one needs no relaxation."""
    N, seen = 36, 4
    for check, expected in (("relaxed", (1 + nu) * N * seen), ("cycle", (1 + nu) * N * seen - nu * N)):
        options = dict(coarsening=4, relax=nu, check=check, rtol=0, max_it=seen - 1, dtol=1e300)
        solver = MGRIT(decays(np.arange(N + 1) / 10, [4]), N, options=options, comm=COMM)
        result = solver.solve(guess([1.0], N)[solver.levels[0].lo : solver.levels[0].hi + 1])
        assert len(result.residuals) == seen
        assert total_calls(solver)[0] == expected


# -- cycles that do not work out ---------------------------------------------------------------------------------------
THETA = np.linspace(0.05, 3, 12)


def waves(m):
    """Crank-Nicolson for undamped oscillations, backward Euler with ``m`` times the step below."""
    return [Modes((1 + 0.5j * THETA) / (1 - 0.5j * THETA)), Modes(1 / (1 - 1j * m * THETA))]


def solve_waves(N, **options):
    """From noise."""
    solver = MGRIT(waves(4), N, options=dict(coarsening=4, **options), comm=COMM)
    return solver.solve(guess(np.ones((12, 2)), N)[solver.levels[0].lo : solver.levels[0].hi + 1])


@pytest.mark.parallel([1, 3])
def test_stagnation_is_reported_with_its_factor():
    """Undamped waves do not contract. Where cycles end exactly (``Nc / 2 <= max_it``) it is worth to go on."""
    result = solve_waves(512)
    assert not result.converged
    assert result.reason == "stagnated"
    assert result.cycles < 20
    assert result.last_factor > 0.97
    assert f"factor {result.last_factor:.3f} a cycle" in result.message
    assert solve_waves(512, stagnation=None, dtol=1e300).cycles == 50
    near = solve_waves(64, max_it=8, dtol=1e300, rtol=1e-10)
    assert near.converged
    assert near.cycles == 8
    # weighted C-relaxation makes no point exact: that takes 64 cycles, not 32
    assert solve_waves(256, max_it=40, dtol=1e300, c_weight=0.9).reason == "stagnated"
    assert solve_waves(256, max_it=40, dtol=1e300).cycles > 20


@pytest.mark.parametrize(("max_it", "reason"), [(240, ""), (220, "stagnated")])
def test_slow_cycles_go_on_where_enough_are_left(max_it, reason):
    """A contraction of 0.98 a cycle reaches ``1e-2`` in 228 cycles."""
    options = MGRITOptions.make(rtol=1e-2, max_it=max_it, stagnation=0.97)
    result = SolveResult(residuals=[0.98**n for n in range(11)], cycles=10, scale=1.0)
    assert Stopping(options, math.inf)(result) == bool(reason)
    assert result.reason == reason


@pytest.mark.parallel([1, 3])
def test_divergence_is_reported_with_its_size():
    """A coarse propagator that grows by 3 a step."""
    solver = MGRIT([Modes([1.0]), Modes([3.0])], 512, options=dict(coarsening=4, relax="F"), comm=COMM)
    result = solver.solve(guess(np.ones((1, 2)), 512)[solver.levels[0].lo : solver.levels[0].hi + 1])
    assert (result.converged, result.reason) == (False, "diverged")
    assert result.residuals[-1] > 1e4 * result.residuals[0]
    assert f"grew by {result.residuals[-1] / result.residuals[0]:.2g} in {result.cycles} cycles" in result.message


@pytest.mark.usefixtures("array_kind")
@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize("storage", ["all", "C"])
@pytest.mark.parametrize("trouble", ["stagnates", "runs out", "grows", "raises", "nan", "nan in the guess"])
def test_falls_back_to_stepping(storage, trouble, log_lines):
    """The bits of sequential stepping, and a line that says so; without the option the trouble stays."""
    N, t, coarse = 64, np.arange(65) / 10, None
    fine, u0 = Decay(t), np.full((12, 2), 0.7)
    if trouble == "stagnates":
        (fine, coarse), N = waves(4), 512
    elif trouble == "grows":
        fine, coarse = Modes(np.ones(12)), Modes(np.full(12, 30.0))
    elif "nan" in trouble or trouble == "raises":
        coarse = Bad(t[::4], trouble == "raises")
    coarse = coarse or Decay(t[::4])
    G = 0.01 * np.random.default_rng(0).standard_normal((N, 12, 2))

    def solve(**more):
        options = dict(coarsening=4, storage=storage, rtol=1e-12, max_it=2 if trouble == "runs out" else 50, **more)
        solver = MGRIT([fine, coarse], N, options=options, comm=COMM, name="state")
        lo, hi = solver.levels[0].lo, solver.levels[0].hi
        rows = np.array([lo, *(lo + c_rows(solver))]) if storage == "C" else np.arange(lo, hi + 1)
        U = guess(u0, N)
        if trouble == "nan in the guess":
            U[4:] = np.nan
        U = U[rows]
        return U, solver.solve(U, G[lo:hi]), rows

    U, result, rows = solve(on_divergence="serial")
    assert (result.converged, result.reason) == (True, "serial")
    np.testing.assert_array_equal(U, sequential(fine, u0, N, G)[rows])
    said = [line for line in log_lines if "stepping sequentially instead" in line]
    assert len(said) == len(log_lines) == (1 if COMM.rank == 0 else 0)
    assert all(result.message in line and "state" in line for line in said)
    if "nan" in trouble or trouble == "raises":
        with pytest.raises(SolverFailure, match=r"state: level 1, steps .*(no root found|not finite)|not finite"):
            solve()
    else:
        assert not solve()[1].converged


# -- implicit steps that start from the iterate ------------------------------------------------------------------------
class Newton:
    """Implicit Euler for ``u' = -u^3 + sin t`` by some Newton steps: from the iterate, or from the old value."""

    def __init__(self, t, iterations, uses_guess):
        self.t, self.iterations, self.uses_guess = np.asarray(t), iterations, uses_guess

    def step(self, steps, u, out):
        n = np.asarray(steps)
        dt, t = (self.t[n + 1] - self.t[n])[:, None], self.t[n + 1, None]
        v = out.copy() if self.uses_guess else u.copy()
        for _ in range(self.iterations):
            v -= (v + dt * (v**3 - np.sin(t)) - u) / (1 + 3 * dt * v * v)
        out[...] = v


@pytest.mark.usefixtures("array_kind")
@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize(
    "options", [{}, dict(cycle="F"), dict(residual="full"), dict(check="cycle"), dict(c_weight=0.8)]
)
@pytest.mark.parametrize("coarse_solver", ["sequential", "gathered", "relax"])
def test_loose_implicit_steps_keep_the_solution(options, coarse_solver):
    """Two Newton steps from the iterate: the converged solution stays, with coarse steps as loose; from the old value
    two do not solve the step.
    """
    N, coarsening = 40, [4, 3, 2]
    t = np.arange(N + 1) / 2
    G = 0.1 * np.random.default_rng(2).standard_normal((N, 2))
    exact = sequential(Newton(t, 40, False), [1.5, -1.0], N, G)
    options = dict(coarsening=coarsening, coarse_solver=coarse_solver, rtol=0, max_it=3, dtol=1e300, **options)

    def solve(start, uses_guess, **more):
        points = coarse_points(N, coarsening)[:3]
        made = [Newton(t[p], 2, uses_guess) for p in points]
        solver = MGRIT(made, N, options=dict(options, **more), comm=COMM)
        lo, hi = solver.levels[0].lo, solver.levels[0].hi
        U = start[lo : hi + 1].copy()
        result = solver.solve(U, G[lo:hi].copy())
        return U, result, solver, exact[lo : hi + 1]

    assert solve(exact, True)[1].residuals[0] < 1e-14
    U, _, solver, expected = solve(exact, True, residual="none")  # cycles though there is nothing to do
    np.testing.assert_allclose(U, expected, rtol=0, atol=1e-14)
    for residual in solver._cycle.residuals:  # on the levels below as well
        assert np.abs(np.asarray(residual)).max(initial=0) < 1e-14
    assert solve(exact, False)[1].residuals[0] > 1e-6
    if coarse_solver != "relax":  # it gets there too
        U, result, _, expected = solve(guess([1.5, -1.0], N), True, max_it=40, rtol=1e-14)
        assert result.converged
        np.testing.assert_allclose(U, expected, rtol=0, atol=1e-12)


@pytest.mark.usefixtures("array_kind")
@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize("coarsening", [(4,), (3, 2)])
def test_a_first_guess_of_sums_is_exact(coarsening):
    """Steps that keep the state add up right-hand sides: coarse levels do so with their sums, whatever the weights."""
    N = 29
    G = np.random.default_rng(4).standard_normal((N, 2))
    propagators, options = [Modes([1.0])] * (1 + len(coarsening)), dict(coarsening=coarsening)
    solver = MGRIT(propagators, N, options=options, linear=True, comm=COMM)
    lo, hi = solver.levels[0].lo, solver.levels[0].hi
    U = np.zeros((hi - lo + 1, 1, 2))
    result = solver.solve(U, G[lo:hi, None].copy(), start="skip")
    assert (result.cycles, result.converged) == (0, True)
    assert result.residuals[0] < 1e-13
    np.testing.assert_allclose(U[1:, 0], np.cumsum(G, axis=0)[lo:hi], atol=1e-13)


@pytest.mark.usefixtures("array_kind")
@pytest.mark.parallel([1, 3])
def test_loose_steps_in_turn_begin_at_the_iterate():
    """Stepping begins a step at the iterate without its right-hand side: one Newton step keeps the solution."""
    N = 40
    t = np.arange(N + 1) / 2
    G = 0.1 * np.random.default_rng(2).standard_normal((N, 2))
    exact = sequential(Newton(t, 40, False), [1.5, -1.0], N, G)
    solver = MGRIT([Newton(t, 1, True)], N, comm=COMM)
    lo, hi = solver.levels[0].lo, solver.levels[0].hi
    U = exact[lo : hi + 1].copy()
    assert solver.solve(U, G[lo:hi].copy()).reason == "exact"
    np.testing.assert_allclose(U, exact[lo : hi + 1], rtol=0, atol=1e-14)


@pytest.mark.usefixtures("array_kind")
@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize("storage", ["all", "C"])
def test_fallback_with_guesses(storage):
    """Stepping begins each step from the value before it: what cycles left may be far away, or NaN."""
    N = 40
    t = np.arange(N + 1) / 5
    options = dict(coarsening=4, storage=storage, on_divergence="serial")
    propagators = [Newton(t, 30, True), Bad(t[::4], False)]
    solver = MGRIT(propagators, N, options=options, comm=COMM)
    lo, hi = solver.levels[0].lo, solver.levels[0].hi
    rows = np.array([lo, *(lo + c_rows(solver))]) if storage == "C" else np.arange(lo, hi + 1)
    U = guess([1.5, -1.0], N)[rows]
    assert solver.solve(U).reason == "serial"
    exact = sequential(Newton(t, 30, False), [1.5, -1.0], N)
    np.testing.assert_array_equal(U, exact[rows])
    if storage == "C":
        states = np.concatenate([np.zeros((0, 2)), *(block.copy() for _, block in solver.states(U))])
        np.testing.assert_array_equal(states, exact[lo + 1 : hi + 1])


# -- messages ----------------------------------------------------------------------------------------------------------
class Request:
    """A request that says when it is waited for."""

    def __init__(self, request, kind, events):
        self.request, self.kind, self.events = request, kind, events

    def Wait(self):
        self.events.append(("wait " + self.kind,))
        return self.request.Wait()


class Spy:
    """A communicator that remembers messages, in order with the propagators' calls."""

    def __init__(self, comm):
        self.comm, self.events = comm, []

    def __getattr__(self, name):
        return getattr(self.comm, name)

    def Irecv(self, buffer, source, tag):
        self.events.append(("receive", tag))
        return Request(self.comm.Irecv(buffer, source=source, tag=tag), "receive", self.events)

    def Isend(self, buffer, dest, tag):
        self.events.append(("send", tag))
        return Request(self.comm.Isend(buffer, dest=dest, tag=tag), "send", self.events)

    def count(self, kind):
        return sum(event[0] == kind for event in self.events)


class Heard(Decay):
    """Notes its calls with the messages."""

    events = None

    def step(self, steps, u, out):
        if self.events is not None:
            self.events.append(("phi", steps))
        super().step(steps, u, out)


@pytest.mark.slow_on_ranks
@pytest.mark.parallel([1, 3])
def test_nothing_is_left_after_hundreds_of_cycles():
    """As many requests waited for as posted, portable tags, no memory that grows."""
    spy, N = Spy(COMM), 24
    for options in (dict(), dict(storage="C"), dict(coarse_solver="relax", cycle="F"), dict(coarse_solver="gathered")):
        options = dict(coarsening=[4, 3, 2], residual="none", levels=3, **options)
        make = lambda cycles, options=options: MGRIT(
            decays(range(N + 1), [4, 3]), N, options=dict(options, max_it=cycles), comm=spy
        )
        few, many = make(20), make(250)
        U = np.zeros((few.local_rows, 2))
        few.solve(U)
        many.solve(U)  # work arrays are there
        tags = {event[1] for event in spy.events if len(event) > 1}
        assert all(0 <= tag <= 32767 for tag in tags)
        spy.events = collections.deque(maxlen=0)
        tracemalloc.start()
        few.solve(U)
        base = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        many.solve(U)
        after, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert after - base < 4000
        assert peak - base < 40000
        spy.events = []
        many.solve(U)
        assert spy.count("receive") == spy.count("wait receive")
        assert spy.count("send") == spy.count("wait send")
        assert COMM.allreduce(spy.count("receive")) == COMM.allreduce(spy.count("send"))
        assert COMM.size == 1 or COMM.allreduce(spy.count("send")) > 20


@pytest.mark.parallel(3)
@pytest.mark.parametrize(
    ("what", "offset"),  # slabs begin at C-points where only these are stored
    [*itertools.product(["F-relaxation", "coarse right-hand side"], [0, 1, 3]), ("stored C-points", 0)],
)
def test_messages_overlap_with_work(what, offset):
    """A receive is posted before anything else, and work comes before it is waited for; so does a C-point's send."""
    N = 48
    bounds = [0, *(b + offset for b in split_steps(N, COMM.size)[1:-1]), N]
    spy, propagator = Spy(COMM), Heard(np.arange(N + 1))
    options = dict(coarsening=4, storage="C" if what == "stored C-points" else "all")
    solver = MGRIT([propagator, Decay(np.arange(0, N + 1, 4))], N, options=options, comm=spy, bounds=bounds)
    level = solver.levels[0]
    level.U = guess([1.0], N)[: solver.local_rows]
    relaxation = (CPointRelaxation if what == "stored C-points" else Relaxation)(level)
    propagator.events = spy.events
    if what == "F-relaxation":
        relaxation.f_relax()
    elif what == "stored C-points":
        relaxation.c_relax()
    else:
        level.phi_of_all(level.U, np.empty_like(level.U[1:]))
    order = [event[0] for event in spy.events]
    assert "phi" in order
    if COMM.rank > 0:
        assert order[0] == "receive"
        assert order.count("receive") == 1
        assert "phi" in order[: order.index("wait receive")]
    if COMM.rank + 1 < COMM.size:
        sent = order.index("send")
        if offset == 0 or what == "coarse right-hand side":  # the last point is there from the start
            assert "phi" not in order[:sent]
            assert "phi" in order[sent:]
        assert order.index("wait send") > max(i for i, name in enumerate(order) if name == "phi")


# -- traces ------------------------------------------------------------------------------------------------------------
class Silent:
    """Stands for no trace: false, and nothing else may be asked of it."""

    def __bool__(self):
        return False

    def __getattr__(self, name):
        raise AssertionError(f"trace.{name} without a trace")


@pytest.mark.usefixtures("array_kind")
@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize("storage", ["all", "C"])
def test_trace(tmp_path, storage):
    """Chrome's format; its states are those counted; each send has its receive; written by the first rank alone."""
    N, path = 48, COMM.bcast(str(tmp_path / "deep" / f"{storage}.json"))
    calls = {}
    for trace in (path, ""):
        options = dict(coarsening=(4, 3), trace=trace, storage=storage, cycle="F", start="nested")
        solver = MGRIT(decays(np.arange(N + 1) / 10, [4, 3]), N, options=options, comm=COMM, name="state")
        if not trace:
            assert solver.trace is None
            with pytest.raises(ValueError, match=r"trace='file\.json'"):
                solver.write_trace()
            for level in solver.levels:
                level.trace = Silent()
        lo, hi = solver.levels[0].lo, solver.levels[0].hi
        U = guess([1.0], N)[[lo, *(lo + c_rows(solver))] if storage == "C" else slice(lo, hi + 1)]
        result = solver.solve(U)
        calls[trace] = COMM.allgather([level.phi_calls for level in solver.levels])
        if trace:
            cycles, opened = result.cycles, []
            before = os.listdir(tmp_path)
            solver.write_trace()
            opened = COMM.gather((before, os.listdir(tmp_path)))
    assert calls[path] == calls[""]
    if COMM.rank > 0:
        return
    assert all(b == a == [] for b, a in opened[1:] if b == [])  # ranks have directories of their own
    with open(path, encoding="utf-8") as file:
        events = json.load(file)["traceEvents"]
    assert {e["ph"] for e in events} <= {"X", "i", "M"}
    for e in events:
        assert {"name", "ph", "pid"} <= set(e)
        if e["ph"] != "M":
            assert e["ts"] >= 0
            assert e["tid"] in range(3)
            assert e["pid"] in range(COMM.size)
        if e["ph"] == "X":
            assert e["dur"] >= 0
        if e["ph"] == "i":
            assert e["s"] in "tpg"
    assert [e["args"]["name"] for e in events if e["name"] == "process_name"] == [
        f"time rank {r}" for r in range(COMM.size)
    ]
    states, sends, receives = collections.Counter(), collections.Counter(), collections.Counter()
    for e in events:
        if e["name"] in ("phi", "sweep"):
            states[e["pid"], e["tid"]] += e["args"]["states"]
        elif e["name"] == "send":
            sends[e["pid"], e["args"]["peer"], e["tid"], e["args"]["bytes"]] += 1
        elif e["name"] == "receive posted":
            receives[e["args"]["peer"], e["pid"], e["tid"], e["args"]["bytes"]] += 1
    assert all(states[r, i] == n for r, counts in enumerate(calls[path]) for i, n in enumerate(counts))
    assert sends == receives
    assert (len(sends) > 0) == (COMM.size > 1)
    assert sum(e["name"] == "cycle" for e in events) == cycles * COMM.size
    stamps = [e["ts"] for e in events if "ts" in e]
    assert stamps == sorted(stamps)


# -- options -----------------------------------------------------------------------------------------------------------
def test_options_may_be_nested():
    """A dictionary in a dictionary joins the names; of one level with its number."""
    nested = dict(
        coarse=dict(solver="relax", sweeps=2), level_1=dict(relax="F", c_weight=0.9), on=dict(divergence="serial")
    )
    flat = dict(coarse_solver="relax", coarse_sweeps=2, level_1_relax="F", level_1_c_weight=0.9, on_divergence="serial")
    made = MGRITOptions.make(nested)
    assert made == MGRITOptions.make(flat)
    assert (made.coarse_solver, made.coarse_sweeps, made.on_divergence) == ("relax", 2, "serial")
    assert [made.scheme(i) for i in range(4)] == ["FCF", "F", "FCF", "FCF"]  # what the last one stood for goes on
    assert [made.weight(i) for i in range(4)] == [1, 0.9, 1, 1]
    assert MGRITOptions.make({"level": {2: {"relax": 2}}}).scheme(2) == "FCFCF"


def test_options_of_one_level():
    """On top of those for all, without a change to the others, also when changing options that exist."""
    made = MGRITOptions.make(dict(relax=["F", "FCF"], level_0_relax="FCFCF", level_2_coarsening=5, coarsening=[4, 2]))
    assert [made.scheme(i) for i in range(3)] == ["FCFCF", "FCF", "FCF"]
    assert [made.coarsen(i) for i in range(5)] == [4, 2, 5, 2, 2]
    again = MGRITOptions.make(made, level_1_relax="F")
    assert [again.scheme(i) for i in range(3)] == ["FCFCF", "F", "FCF"]
    points = MGRITOptions.make(dict(coarsening=4, level_1_coarsening=[0, 2, 3]), levels=3)
    assert points.factors(16) == (4, (0, 2, 3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(stagnaton=0.9), "did you mean 'stagnation'"),
        (dict(on_divergance="serial"), "did you mean 'on_divergence'"),
        (dict(coarse=dict(solvr="relax")), "'coarse_solvr': did you mean 'coarse_solver'"),
        (dict(level_1_relx="F"), "'level_1_relx': did you mean 'level_1_relax'"),
        (dict(level_2=dict(c_wieght=0.8)), "did you mean 'level_2_c_weight'"),
        (dict(level_1_rtol=1e-3), "'level_1_rtol': .*one level are relax, c_weight, coarsening"),
        (dict(level_x_relax="F"), "unknown mgrit option 'level_x_relax'"),
        *[(dict(cycle=v), "mgrit cycle .*'V', 'F'") for v in ("W", "v", None, 1, ("V",))],
        *[(dict(start=v), "mgrit start .*'guess', 'skip', 'nested'") for v in ("zero", None, True)],
        *[(dict(coarse_solver=v), "mgrit coarse_solver .*'gathered'") for v in ("serial", None, 1)],
        *[(dict(storage=v), "mgrit storage .*'all', 'C'") for v in ("F", "c", None)],
        *[(dict(residual=v), "mgrit residual .*'full', 'none'") for v in (None, "all", 0)],
        *[(dict(check=v), "mgrit check .*'relaxed', 'cycle'") for v in (None, "first", False)],
        *[(dict(rtol_of=v), "mgrit rtol_of .*'trajectory', 'first'") for v in ("last", None, 0)],
        *[(dict(time_norm=v), "mgrit time_norm .*1, 2, 'inf'") for v in (3, "2", math.inf, None, 0)],
        *[(dict(on_divergence=v), "mgrit on_divergence .*'report', 'serial'") for v in ("raise", None, True)],
        *[(dict(view=v), "mgrit view .*False, True") for v in ("yes", None, 2)],
        *[(dict(f_cycles=v), "mgrit f_cycles .*at least 0") for v in (-1, 1.0, "2", True)],
        *[(dict(nested_cycles=v), "mgrit nested_cycles .*at least 1") for v in (0, None, 1.5, True)],
        *[(dict(coarse_sweeps=v), "mgrit coarse_sweeps .*at least 1") for v in (0, None, "1")],
        *[(dict(c_weight=v), "mgrit c_weight .*positive") for v in (0, -1.0, math.nan, math.inf, "1", None, (1, 0.0))],
        *[(dict(level_1_c_weight=v), "mgrit c_weight .*positive") for v in (0, "1", None)],
        *[(dict(level_1_relax=v), "mgrit relax .*'FCF'") for v in ("C", -1, None)],
        *[(dict(stagnation=v), "mgrit stagnation .*positive factor") for v in (0, -0.5, math.nan, math.inf, "1", True)],
        *[(dict(trace=v), "mgrit trace .*name of a file") for v in (None, True, 3)],
        *[(dict(coarsening=[v]), r"C-points \[0") for v in ((0,), (1, 2), (0, 2, 2), (0, 3, 2), (0, 1.5))],
    ],
)  # fmt: skip
def test_bad_options_are_refused(options, message):
    """Before anything is built: what was given, and what would do."""
    with pytest.raises(ValueError, match=message):
        MGRITOptions.make(options)
    with pytest.raises(ValueError, match=message):
        MGRIT(decays(range(33), [4]), 32, options=options)


@pytest.mark.parametrize("storage", ["all", "C"])
@pytest.mark.parametrize("points", [(0, 3, 9), (0, 4, 8, 12, 40)])
def test_c_points_that_are_none_are_refused(points, storage):
    """They do not lie on their level, named with it."""
    level = 1 if points[-1] < 32 else 0
    coarsening = [4, points] if level else [points, 2]
    with pytest.raises(ValueError, match=rf"C-points .* of level {level}: .* 0\.\.{8 if level else 32}"):
        MGRIT([Decay(range(33))] * 3, 32, options=dict(coarsening=coarsening, storage=storage))


def test_core_needs_numpy_and_mpi4py_only():
    """A solve, the theory and the check where nothing else can be imported."""
    program = """
import sys
for name in ("firedrake", "petsc4py", "petsctools", "scipy", "torch", "irksome", "rich", "matplotlib", "h5py"):
    sys.modules[name] = None
import numpy as np
from pint_fem.mgrit import MGRIT, check
from pint_fem.theory import two_level_estimate
class Euler:
    def __init__(self, dt):
        self.dt = dt
    def step(self, steps, u, out):
        out[...] = u / (1 + self.dt)
propagators, U = [Euler(1 / 64), Euler(4 / 64)], np.zeros((65, 1))
U[0] = 1
assert MGRIT(propagators, 64, options={"coarsening": 4, "rtol": 1e-12}).solve(U).converged
assert abs(U[-1, 0] - (1 + 1 / 64) ** -64) < 1e-12
assert two_level_estimate([64 / 65], [64 / 68], 4, 16, "FCF", tolerance=1e-8).converges
assert check(propagators, 64, np.ones(1), coarsening=4).passed
"""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("OMPI_", "PMIX", "ORTE", "PMI"))}
    environment |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment, timeout=60)

"""Several right-hand sides in one solve of all time steps: dense systems, single solves, stopping of each member.

Only numpy and mpi4py: expected values are sequential steps of a matrix.
"""

import numpy as np
import pytest
from mpi4py import MPI

from pint_fem.errors import InputError, SolverFailure
from pint_fem.mgrit import MGRIT
from pint_fem.mgrit.transposed_cycles import TransposedAdjoint
from pint_fem.paradiag import ParaDiag
from pint_fem.sweeps.batches import member_squares, of_each, stacked

N, SIZE, RTOL = 24, 5, 1e-9
SIZES = np.array([1.0, 0.0, 1e-12, 1e12])
COMM = MPI.COMM_WORLD


def matrix(stride=1):
    """A step of backward Euler for a system that couples all unknowns."""
    K = np.diag(np.arange(1.0, SIZE + 1)) + 0.2 * np.cos(np.arange(SIZE**2)).reshape(SIZE, SIZE)
    return np.linalg.inv(np.eye(SIZE) + stride / N * 3 * K)


class Steps:
    """``Phi u = A u``; each state by a product of its own, so that bits do not depend on the block."""

    propagates_nonfinite = False

    def __init__(self, stride=1, fails=None, transposed=False):
        self.A, self.fails, self.transposed = matrix(stride), fails, transposed
        self.block = 0

    def step(self, steps, u, out):
        if self.fails is not None and self.fails in steps:
            raise ZeroDivisionError("planted")
        A = self.A.T if self.transposed else self.A
        for index in np.ndindex(u.shape[:-1]):
            out[index] = A @ u[index]


def data(seed=0):
    """Initial values ``(members, n)`` and right-hand sides ``(N, members, n)`` of very different sizes."""
    rng = np.random.default_rng(seed)
    u0, G = rng.standard_normal((len(SIZES), SIZE)), rng.standard_normal((N, len(SIZES), SIZE))
    return SIZES[:, None] * u0, SIZES[:, None] * G


def trajectory(u0, G):
    """By steps one after another, ``(N + 1, members, n)``."""
    U = np.zeros((N + 1, *u0.shape))
    U[0] = u0
    for n in range(N):
        U[n + 1] = U[n] @ matrix().T + G[n]
    return U


def frequency_solve(k, mu, r):
    return np.linalg.solve(np.eye(SIZE) - mu * matrix(), r)


SOLVERS = {
    "mgrit": dict(),
    "three levels, nested": dict(coarsening=(2, 2), start="nested"),
    "F-cycles, all points": dict(coarsening=(2, 2), cycle="F", residual="full"),
    "gathered": dict(coarse_solver="gathered"),
    "relaxed": dict(coarse_solver="relax", coarse_sweeps=8),
    "C-points": dict(storage="C"),
    "weighted": dict(c_weight=0.9),
    "uneven": dict(coarsening=(5,)),
    "serial": None,
    "paradiag": None,
}


def solver(kind, comm=MPI.COMM_SELF, *, fails=None, **more):
    if kind == "paradiag":
        return ParaDiag(Steps(fails=fails), N, frequency_solve, comm=comm, options=dict(rtol=RTOL, alpha=1e-3) | more)
    if kind == "serial":
        return MGRIT([Steps(fails=fails)], N, comm=comm)
    options = dict(coarsening=(4,), rtol=RTOL, max_it=60) | SOLVERS[kind] | more
    strides = np.cumprod([1, *options["coarsening"]])
    given = dict(linear=True) if kind != "uneven" else {}
    return MGRIT([Steps(s, fails) for s in strides], N, comm=comm, options=options, **given)


def slab(made, u0, G):
    """The own arrays of a solve from zero."""
    fine = made.levels[0]
    U = np.zeros((made.local_rows, *u0.shape))
    if fine.left is None:
        U[0] = u0
    return U, np.ascontiguousarray(G[fine.lo : fine.hi])


def own_points(made, whole):
    """The rows of a trajectory that this rank stores."""
    fine = made.levels[0]
    if made.local_rows == fine.k + 1:
        return whole[fine.lo : fine.hi + 1]
    return whole[np.arange(fine.lo, fine.hi + 1, fine.m)]


@pytest.mark.usefixtures("array_kind")
@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize("kind", SOLVERS)
def test_members_are_solved_as_by_steps_and_with_the_same_bits_on_any_ranks(kind):
    """A small, a zero and a huge right-hand side, each to its own tolerance; three ranks and one have the same bits."""
    u0, G = data()
    exact = trajectory(u0, G)
    made, alone = solver(kind, COMM), solver(kind)
    (U, g), (U1, g1) = slab(made, u0, G), slab(alone, u0, G)
    result = made.solve(U, g, batch=True)
    assert result.converged
    assert np.array_equal(U, own_points(made, np.asarray(_filled(alone, U1, g1, exact))))
    error = np.sqrt(COMM.allreduce(member_squares(U[1:] - own_points(made, exact)[1:])))
    norm = np.sqrt((exact**2).sum(axis=(0, 2)))
    assert (error <= 20 * RTOL * norm).all()
    assert not U[:, 1].any()


def _filled(alone, U1, g1, exact):
    """The trajectory of one rank; points that it does not store are those of the exact one, which are not compared."""
    alone.solve(U1, g1, batch=True)
    whole = exact.copy()
    whole[:: 1 if len(U1) == N + 1 else 4] = U1
    return whole


@pytest.mark.parametrize("kind", [k for k in SOLVERS if k != "serial"])
def test_each_member_has_the_residuals_of_its_own_solve(kind):
    """Its history is that of a single solve as far as this goes; the batch reports the member that is worst."""
    u0, G = data(1)
    made = solver(kind)
    U, g = slab(made, u0, G)
    result = made.solve(U, g, batch=True)
    assert len(result.members) == len(SIZES)
    for member, found in enumerate(result.members):
        V, h = slab(made, u0[member], np.ascontiguousarray(G[:, member]))
        single = made.solve(V, h)
        count = len(single.residuals)
        np.testing.assert_allclose(found.residuals[:count], single.residuals, rtol=1e-12)
        assert found.converged
        assert found.relative_residual <= RTOL
        assert result.cycles >= single.cycles == count - 1
    worst = max(found.relative_residual for found in result.members)
    assert result.relative_residual == worst > 0
    assert any(result.residuals == found.residuals for found in result.members)
    assert result.cycles == len(result.residuals) - 1


def test_one_norm_for_all_would_leave_a_small_member_unsolved():
    """Without ``batch`` the axis is part of a state, as for networks: beside a solved one of size 1, a member of size
    1e-12 is within the tolerance of the whole whatever it is.
    """
    u0, G = data(2)
    u0, made = u0[[0, 2]], solver("mgrit")
    exact = trajectory(u0, 0 * G[:, :2])
    error = {}
    for batch in (False, True):
        U = np.zeros_like(exact)
        U[:, 0], U[0] = exact[:, 0], u0
        result = made.solve(U, start="guess", batch=batch)
        assert result.converged
        assert bool(result.members) == batch
        error[batch] = np.linalg.norm((U - exact)[:, 1]) / np.linalg.norm(exact[:, 1])
    assert error[False] > 1e-2
    assert error[True] < 20 * RTOL


def test_what_stops_a_batch():
    """A fixed number of cycles; cycles without norms; a member that cannot converge fails the batch and is named."""
    u0, G = data(3)
    made = solver("mgrit")
    U, g = slab(made, u0, G)
    result = made.solve(U, g, batch=True, cycles=2)
    assert (result.reason, result.cycles, [len(m.residuals) for m in result.members]) == ("its", 2, [3] * len(SIZES))
    silent = solver("mgrit", residual="none", max_it=3)
    result = silent.solve(*slab(silent, u0, G), batch=True)
    assert (result.reason, result.members) == ("its", [])
    short = solver("mgrit", max_it=1)
    result = short.solve(*slab(short, u0, G), batch=True)
    assert not result.converged
    assert result.reason == "max_it"
    assert "right-hand side" in result.message
    assert "of 4" in result.message
    assert result.members[1].converged
    serial = solver("mgrit", max_it=1, on_divergence="serial")
    U, g = slab(serial, u0, G)
    result = serial.solve(U, g, batch=True)
    assert result.converged
    assert {m.reason for m in result.members} == {"serial"}
    np.testing.assert_allclose(U[:, 0], trajectory(u0, G)[:, 0], rtol=1e-13)


@pytest.mark.parallel([1, 3])
def test_a_member_that_grows_fails_the_batch_on_every_rank(monkeypatch):
    """A coarse step far off: the residual of one member grows, that of a zero member does not."""
    made = solver("mgrit", COMM, dtol=10.0)
    made.levels[1].propagator.A *= -8.0
    u0, G = data(4)
    u0[0], G[:, 0] = 0, 0
    result = made.solve(*slab(made, u0, G), batch=True)
    assert (result.converged, result.reason) == (False, "diverged")
    assert result.message.startswith(("right-hand side 2 of 4", "right-hand side 3 of 4"))
    assert result.members[0].converged


@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize("kind", ["mgrit", "serial", "paradiag", "C-points"])
def test_a_step_that_fails_for_a_batch_raises_on_every_rank(kind):
    made = solver(kind, COMM, fails=N - 1)
    with pytest.raises(SolverFailure, match="planted"):
        made.solve(*slab(made, *data()), batch=True)
    made.levels[0].propagator.fails = None
    U, g = slab(made, *data())
    assert made.solve(U, g, batch=True).converged  # the solver is as good as before


@pytest.mark.parallel([1, 3])
def test_a_frequency_that_fails_for_one_member_raises_on_every_rank():
    def solve(k, mu, r):
        if k == 2 and np.abs(r).max() > 1e8:  # of the huge member only
            raise np.linalg.LinAlgError("planted")
        return frequency_solve(k, mu, r)

    made = ParaDiag(Steps(), N, solve, comm=COMM, options=dict(rtol=RTOL))
    with pytest.raises(SolverFailure, match="planted"):
        made.solve(*slab(made, *data()), batch=True)
    u0, G = data()
    assert made.solve(*slab(made, u0[:2], np.ascontiguousarray(G[:, :2])), batch=True).converged


@pytest.mark.parallel([1, 3])
def test_arrays_that_are_no_batch_are_refused():
    made = solver("mgrit", COMM)
    k = made.levels[0].k
    for shape in ((k + 1,), (k + 1, 0, SIZE)):
        with pytest.raises(InputError, match="for a batch"):
            made.solve(np.zeros(shape), batch=True)
    if COMM.size > 1:
        with pytest.raises(InputError, match="batch"):
            made.solve(np.zeros((k + 1, 2, SIZE)), batch=COMM.rank == 0)


@pytest.mark.usefixtures("array_kind")
def test_transfers_map_each_member():
    """Averages of neighbours between levels: the batch is that of single solves."""
    R = np.kron(np.eye(3), [0.5, 0.5])
    P = 2 * R.T
    size, steps = 6, 12

    class Decay:
        def __init__(self, stride):
            self.factor = 1 / (1 + stride / steps)

        def step(self, numbers, u, out):
            out[...] = self.factor * u

    options = dict(coarsening=(3,), rtol=1e-11)
    made = MGRIT([Decay(1), Decay(3)], steps, options=options, transfers=[(R, P)], linear=True)
    rng = np.random.default_rng(5)
    u0, G = rng.standard_normal((3, size)), rng.standard_normal((steps, 3, size))
    for start in ("guess", "nested"):
        U = np.zeros((steps + 1, 3, size))
        U[0] = u0
        assert made.solve(U, G, start=start, batch=True).converged
        exact = U.copy()
        for n in range(steps):
            exact[n + 1] = exact[n] / (1 + 1 / steps) + G[n]
        np.testing.assert_allclose(U, exact, rtol=1e-9)


def test_transposed_cycles_of_a_batch_are_those_of_its_members():
    """Few cycles, far from converged: ``(M_K^T g, f) = (g, M_K f)`` for all pairs of members."""
    options = dict(coarsening=(4,), rtol=0.0, max_it=2, check="cycle")
    forward = MGRIT([Steps(1), Steps(4)], N, options=options, linear=True)
    backward = MGRIT([Steps(1, transposed=True), Steps(4, transposed=True)], N, options=options, linear=True)
    sweep = TransposedAdjoint(backward, N, is_last=True, options=backward.options, bounds=[0, N], linear=True)
    rng = np.random.default_rng(6)
    f, g = rng.standard_normal((N, 3, SIZE)), rng.standard_normal((N + 1, 2, SIZE))
    U = np.zeros((N + 1, 3, SIZE))
    forward.solve(U, f, cycles=2, start="guess", batch=True)
    sweep.solver.solve(*sweep.arrays(g), cycles=2, start=sweep.start, batch=True)
    lam = sweep.collect()
    ours, theirs = np.einsum("kan,kbn->ab", g[1:], U[1:]), np.einsum("kan,kbn->ab", lam[1:], f)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12 * np.abs(ours).max())
    sweep.release()
    sweep.solver.solve(*sweep.arrays(g[:, 0]), cycles=2, start=sweep.start)
    np.testing.assert_allclose(sweep.collect(), lam[:, 0], rtol=0, atol=1e-13 * np.abs(lam).max())


def test_stacked_rows_stay_one_where_they_are_the_same():
    rows = np.arange(6.0).reshape(2, 3)
    blocks = [np.broadcast_to(row, (4, 3)) for row in rows]
    joined = stacked(blocks)
    assert joined.shape == (4, 2, 3)
    assert joined.strides[0] == 0
    assert (joined == rows).all()
    blocks[0] = blocks[0].copy()
    blocks[0][2] = 7
    joined = of_each(lambda i: blocks[i], [0, 1])
    assert joined[2, 0, 0] == 7
    assert joined[2, 1, 0] == 3
    assert stacked([np.empty((0, 3))] * 2).shape == (0, 2, 3)

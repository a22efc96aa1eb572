"""The checks of a user's code: right propagators pass, and each kind of mistake fails the check that it should."""

import numpy as np
import pytest
from mpi4py import MPI

from pint_fem.mgrit import Transfer
from pint_fem.mgrit.checks.check import check
from tests.logs import logged

N, SIZE, FACTORS = 24, 6, (3, 2)
STATE = np.sin(np.arange(SIZE) + 1.0)
STRIDES = (1, 3, 6)
A = np.diag(np.arange(SIZE) + 1.0) + np.diag(np.ones(SIZE - 1), 1)  # not symmetric


class Linear:
    """Backward Euler for ``u' = -A u + n``, row by row: the same bits in any block."""

    def __init__(self, stride=1, matrix=A):
        self.stride = stride
        self.M = np.linalg.inv(np.eye(len(matrix)) + 0.02 * stride * matrix)

    def step(self, steps, u, out):
        for n, x, y in zip(steps, u, out, strict=True):
            y[...] = self.M @ x + 0.01 * self.stride * (n * self.stride % 5)


class Cubic:
    """``u -> M (u - dt u^3)`` with derivatives and a sweep."""

    def __init__(self, stride=1, matrix=A):
        self.dt = 0.02 * stride
        self.M = np.linalg.inv(np.eye(len(matrix)) + self.dt * matrix)

    def step(self, steps, u, out):
        for x, y in zip(u, out, strict=True):
            y[...] = self.M @ (x - self.dt * x**3)

    def sweep(self, first, U, G):
        for i in range(len(U) - 1):
            U[i + 1] = self.M @ (U[i] - self.dt * U[i] ** 3)
            if G is not None:
                U[i + 1] += G[i]

    def tangent(self, steps, u, du, out):
        for x, d, y in zip(u, du, out, strict=True):
            y[...] = self.M @ (d - 3 * self.dt * x**2 * d)

    def adjoint(self, steps, u, lam, out):
        for x, d, y in zip(u, lam, out, strict=True):
            w = self.M.T @ d
            y[...] = w - 3 * self.dt * x**2 * w


class Guessing:
    """``v = u - dt sin v`` by two fixed-point iterations from the guess in ``out``."""

    uses_guess = True

    def __init__(self, stride=1):
        self.dt = 0.02 * stride

    def step(self, steps, u, out):
        for _ in range(2):
            out[...] = u - self.dt * np.sin(out)

    def tangent(self, steps, u, du, out):
        v = u.copy()
        for _ in range(30):
            v = u - self.dt * np.sin(v)
        out[...] = du / (1 + self.dt * np.cos(v))

    adjoint = tangent


def run(propagators, nsteps=N, state=STATE, **kwargs):
    kwargs = dict(coarsening=FACTORS) | kwargs
    with logged() as lines:
        report = check(propagators, nsteps, state, **kwargs)
    if kwargs.get("comm", MPI.COMM_SELF).rank == 0:
        assert lines == report.lines
    return report


def hierarchy(kind, *args, **kwargs):
    return [kind(s, *args, **kwargs) for s in STRIDES]


def failed(report):
    """The (where, name) of the failures."""
    return {(line[:10].strip(), line[11:55].strip()) for line in report.failures}


def line_of(report, where, name):
    return next(x for x in report.lines if (x[:10].strip(), x[11:55].strip()) == (where, name))


# -- right ones pass --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", [Linear, Cubic, Guessing])
@pytest.mark.parametrize("state", [STATE, np.zeros(SIZE)])
def test_right_propagators_pass(kind, state):
    report = run(hierarchy(kind), state=state)
    assert report.passed, report.failures
    assert "not run" not in report.lines[-1]
    assert "not bitwise identical" not in "\n".join(report.lines)


@pytest.mark.parametrize("nsteps", [1, 2, 7])
def test_one_propagator_and_few_steps(nsteps):
    assert run(Cubic(), nsteps).passed
    assert run([Cubic()], nsteps, coarsening=8).passed


@pytest.mark.parametrize("nsteps", [6, 7, 11])
def test_last_interval_may_be_cut_short(nsteps):
    assert run(hierarchy(Cubic), nsteps).passed


def test_any_c_points():
    assert run([Linear(), Linear(2), Linear(5)], 9, coarsening=[(0, 2, 3, 7, 9), (0, 1, 4)]).passed


def test_scalar_and_matrix_states():
    class Decay:
        def step(self, steps, u, out):
            np.divide(u, 1.1, out=out)

    assert run([Decay(), Decay()], 8, 1.5, coarsening=2).passed
    assert run([Decay(), Decay()], 8, np.ones((2, 3)), coarsening=2).passed


def test_taylor_orders_are_those_of_calculus():
    report = run(Cubic())
    line = line_of(report, "level 0", "tangent, Taylor remainder: order")
    orders = [float(x) for x in line.split("orders ")[1].split(",")[0].split()]
    np.testing.assert_allclose(orders[-3:], 2, atol=0.02)  # remainder c h^2 + O(h^3)

    class Affine(Linear):
        def tangent(self, steps, u, du, out):
            out[...] = du @ self.M.T

    assert "affine" in line_of(run(Affine(), rtol=1e-11), "level 0", "tangent, Taylor remainder: order")


def test_coarse_step_is_compared():
    class Exact:  # m steps of u -> u/2
        def __init__(self, factor):
            self.factor = factor

        def step(self, steps, u, out):
            out[...] = self.factor * u

    line = line_of(run([Exact(0.5), Exact(0.3)], 8, coarsening=2), "level 1", "coarse step against those of level 0")
    assert float(line.split("reported")[1].split()[0]) == pytest.approx(0.2)  # |0.3 - 0.25| / 0.25


def test_adjoint_without_tangent_goes_against_differences():
    class OnlyAdjoint(Cubic):
        tangent = None

    report = run(hierarchy(OnlyAdjoint))
    assert report.passed
    assert "passed" in line_of(report, "level 2", "adjoint against differences of steps")
    assert "not there" in line_of(report, "level 1", "tangent")


# -- wrong ones fail where they should ---------------------------------------------------------------------------------
class Incomplete(Cubic):
    def step(self, steps, u, out):
        new = np.empty(u.shape)
        super().step(steps, u, new)
        out[:, :-1] = new[:, :-1]


class Accumulates(Cubic):
    def step(self, steps, u, out):
        new = np.empty(u.shape)
        super().step(steps, u, new)
        out[:, 1:] = new[:, 1:]
        out[:, 0] += new[:, 0]


class LastRowLost(Cubic):
    def step(self, steps, u, out):
        super().step(steps, u[: len(u) - len(u) // 2], out[: len(u) - len(u) // 2])


class Spoils(Cubic):
    def step(self, steps, u, out):
        u -= self.dt * u**3
        out[...] = [self.M @ x for x in u]


class Remembers(Cubic):
    last = 0.0

    def step(self, steps, u, out):
        super().step(steps, u, out)
        out += 1e-9 * self.last
        self.last = float(u[0, 0])


class Counts(Cubic):
    calls = 0

    def step(self, steps, u, out):
        super().step(steps, u, out)
        self.calls += 1
        out[0, 0] += 1e-15 * self.calls


class Mixes(Cubic):
    def step(self, steps, u, out):
        super().step(steps, u, out)
        out += 1e-6 * u[0]


class FirstStepForAll(Linear):
    def step(self, steps, u, out):
        for x, y in zip(u, out, strict=True):
            super().step(range(steps.start, steps.start + 1), x[None], y[None])


class ForgetsStride(Linear):
    def step(self, steps, u, out):
        super().step(range(steps.start, steps.start + len(u)), u, out)


class Flattens(Cubic):
    """Writes to a copy where ``out`` is strided."""

    def step(self, steps, u, out):
        super().step(steps, u, np.ascontiguousarray(out))


class NextRowsToo(Cubic):
    """Takes what is behind the pointer for contiguous."""

    def step(self, steps, u, out):
        if len(u) > 1 and out.strides[0] > out[0].nbytes:
            base = out.base
            while base.base is not None and base.base.dtype == float:
                base = base.base
            base[...] = 0.0
        super().step(steps, u, out)


class SweepForgetsG(Cubic):
    def sweep(self, first, U, G):
        super().sweep(first, U, None)


class SweepIsOther(Cubic):
    def sweep(self, first, U, G):
        super().sweep(first, U, G)
        U[-1] *= 1 + 1e-9


class SweepSpoilsStart(Cubic):
    def sweep(self, first, U, G):
        super().sweep(first, U, G)
        U[0] = 0


class SweepRaises(Cubic):
    def sweep(self, first, U, G):
        raise KeyError("no such thing")


class TangentFactor(Cubic):
    def tangent(self, steps, u, du, out):
        super().tangent(steps, u, du, out)
        out *= 1.001


class TangentFrozen(Cubic):
    """Picard: the coefficient ``u^2`` is frozen, so remainders are of order 1."""

    def tangent(self, steps, u, du, out):
        for x, d, y in zip(u, du, out, strict=True):
            y[...] = self.M @ (d - self.dt * x**2 * d)


class TangentAffine(Cubic):
    def tangent(self, steps, u, du, out):
        self.step(steps, u, out)


class TangentSpoils(Cubic):
    def tangent(self, steps, u, du, out):
        super().tangent(steps, u, du, out)
        du *= 2


class TangentRemembers(Cubic):
    """Uses what the last linearisation has left behind."""

    last = 0.0

    def tangent(self, steps, u, du, out):
        super().tangent(steps, u, du, out)
        out *= 1 + 1e-9 * self.last
        self.last = float(u[0, 0])


class TangentLeavesSomething(Cubic):
    """Leaves the linearisation behind in what the step uses."""

    shift = 0.0

    def step(self, steps, u, out):
        super().step(steps, u, out)
        out += self.shift

    def tangent(self, steps, u, du, out):
        super().tangent(steps, u, du, out)
        self.shift = 1e-9 * float(u[0, 0])


class NoTranspose(Cubic):
    def adjoint(self, steps, u, lam, out):
        for x, d, y in zip(u, lam, out, strict=True):
            w = self.M @ d
            y[...] = w - 3 * self.dt * x**2 * w


class AdjointQuadratic(Cubic):
    def adjoint(self, steps, u, lam, out):
        super().adjoint(steps, u, lam, out)
        out += 1e-3 * lam**2


class Raises(Cubic):
    def step(self, steps, u, out):
        raise ArithmeticError("no root found")


class RaisesAtTheEnd(Linear):
    def step(self, steps, u, out):
        if N // self.stride - 1 in steps:
            raise IndexError("table too short")
        super().step(steps, u, out)


class WrongShape(Cubic):
    def step(self, steps, u, out):
        out[...] = u[:, :-1]


class NotFinite(Cubic):
    def step(self, steps, u, out):
        super().step(steps, u, out)
        out[-1, 2] = np.nan


class AdjointNotFinite(Cubic):
    def adjoint(self, steps, u, lam, out):
        super().adjoint(steps, u, lam, out)
        out[0, 0] = np.inf


class Unstable(Guessing):
    """Its fixed-point iteration leads away."""

    def step(self, steps, u, out):
        out[...] = u - 60 * (out - u) * self.dt - u**2 * self.dt


class KeepsAnEntry(Guessing):
    def step(self, steps, u, out):
        kept = out[:, 1].copy()
        super().step(steps, u, out)
        out[:, 1] = kept


class GuessesFromLastCall(Guessing):
    last = None

    def step(self, steps, u, out):
        if self.last is not None and self.last.shape == out.shape:
            out[...] = self.last
        super().step(steps, u, out)
        self.last = out.copy()


WRONG = [
    (Incomplete, {"step writes all of out"}, ""),
    (Accumulates, {"step writes all of out"}, ""),
    (LastRowLost, {"step writes all of out"}, ""),
    (Spoils, {"step leaves its input alone"}, ""),
    (Remembers, {"step twice, bitwise identical"}, ""),
    (Counts, {"step twice, bitwise identical"}, ""),
    (Mixes, {"step, block against single"}, ""),
    (FirstStepForAll, {"step, block against single"}, ""),
    (ForgetsStride, {"step, block against single"}, ""),
    (Flattens, {"step on strided rows"}, "does not write a strided out"),
    (NextRowsToo, {"step on strided rows"}, "writes between the rows"),
    (SweepForgetsG, {"sweep against step, with G"}, ""),
    (SweepIsOther, {"sweep against step", "sweep against step, with G"}, ""),
    (SweepSpoilsStart, {"sweep against step", "sweep against step, with G"}, "changes U[0]"),
    (SweepRaises, {"sweep against step", "sweep against step, with G"}, "raised KeyError: 'no such thing'"),
    (TangentFactor, {"tangent, Taylor remainder: order"}, "1.0"),
    (TangentFrozen, {"tangent, Taylor remainder: order"}, "1.0"),
    (TangentAffine, {"tangent is linear in du"}, ""),
    (TangentSpoils, {"tangent leaves its input alone"}, ""),
    (TangentRemembers, {"tangent twice, bitwise identical"}, ""),
    (TangentLeavesSomething, {"step and derivatives in turn, identical"}, ""),
    (NoTranspose, {"adjoint against tangent"}, ""),
    (AdjointQuadratic, {"adjoint is linear in lam"}, ""),
    (Raises, {"step runs"}, "step(range(0, 1)) raised ArithmeticError: no root found"),
    (RaisesAtTheEnd, {"step runs"}, "raised IndexError: table too short"),
    (WrongShape, {"step runs"}, "ValueError"),
    (NotFinite, {"step gives finite values"}, ""),
    (AdjointNotFinite, {"adjoint gives finite values"}, ""),
    (Unstable, {"guess: the exact result is a fixed point"}, ""),
    (KeepsAnEntry, {"step writes all of out"}, ""),
    (GuessesFromLastCall, {"step twice, bitwise identical"}, ""),
]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("level", [0, 2])
@pytest.mark.parametrize(("wrong", "names", "text"), WRONG, ids=[w[0].__name__ for w in WRONG])
def test_wrong_propagators_fail_where_they_should(wrong, names, text, level):
    right = next(kind for kind in (Linear, Cubic, Guessing) if issubclass(wrong, kind))
    propagators = hierarchy(right)
    propagators[level] = wrong(STRIDES[level])
    report = run(propagators)
    assert failed(report) == {(f"level {level}", name) for name in names}
    assert all(text in line for line in report.failures)
    assert not report.passed
    if any(name.startswith(("step", "sweep", "guess")) for name in names):
        assert "not run" in line_of(report, "all", "MGRIT keeps the sequential solution")


def test_round_off_between_block_and_single_is_a_note():
    class Rounds(Linear):
        def step(self, steps, u, out):
            super().step(steps, u, out)
            out *= 1 + 1e-14 * (len(u) > 1)

    report = run(hierarchy(Rounds))
    assert report.passed
    assert "number of ranks" in line_of(report, "level 0", "step, block against single")
    assert ("level 0", "step, block against single") in failed(run(hierarchy(Rounds), rtol=1e-15))


def test_no_step_at_all():
    report = run([object(), Linear(3), Linear(6)])
    assert failed(report) == {("level 0", "step runs")}


def test_adjoint_is_judged_without_a_wrong_tangent():
    class Both(NoTranspose, TangentFactor):
        pass

    names = {"tangent, Taylor remainder: order", "adjoint against differences of steps"}
    assert failed(run(Both())) == {("level 0", name) for name in names}
    assert "passed" in line_of(run(TangentFactor()), "level 0", "adjoint against differences of steps")


# -- transfers ---------------------------------------------------------------------------------------------------------
R = np.kron(np.eye(SIZE // 2), [[0.5, 0.5]])
P = 2 * R.T
COARSE = R @ A @ P


def both(transfer, factors=(3,)):
    return run([Cubic(), Cubic(3, COARSE)], coarsening=factors, transfers=[transfer])


def rows(matrix):
    return lambda block: np.array([matrix @ x for x in block]).reshape(len(block), len(matrix))


def test_right_transfers_pass():
    report = both((R, P))
    assert report.passed, report.failures
    line = line_of(report, "to level 1", "restrict(prolong(x)) against x")
    assert float(line.split("reported")[1].split()[0]) < 1e-15  # R P = 1
    pair = both((rows(R), rows(P)))
    assert pair.passed
    assert "not there" in line_of(pair, "to level 1", "restrict_transposed")
    levels = [Cubic(), Cubic(3, COARSE), Cubic(6, COARSE)]
    assert run(levels, transfers=[(R, P), None]).passed
    assert run([Cubic(), Cubic(3), Cubic(6, COARSE)], transfers=[None, (R, P)]).passed


def fails(_):
    raise OSError("no table")


def absolute(block):
    return np.abs(rows(R)(block))


def mixing(block):
    return rows(R)(block) + (rows(R)(block[:1]) * 1e-3 if len(block) else 0)


def spoiling(block):
    block *= 2
    return rows(R)(block) / 2


def infinite(block):
    return rows(R)(block) * np.inf


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(
    ("maps", "name", "text"),
    [
        ((rows(R), rows(P), rows(R.T), rows(R.T)), "prolong_transposed", "raised ValueError"),
        ((rows(R), rows(P), rows(P), rows(P.T)), "restrict_transposed", ""),
        ((rows(R), rows(P), rows(R.T), rows(R)), "prolong_transposed", ""),
        ((fails, rows(P)), "restrict runs, shapes", "raised OSError: no table"),
        ((rows(R), fails), "prolong runs, shapes", "raised OSError: no table"),
        ((rows(R), rows(P[:-1])), "prolong runs, shapes", "(3, 5): it should be (3, 6)"),
        ((lambda block: rows(R)(block[:1]), rows(P)), "restrict runs, shapes", "should be"),
        ((lambda block: np.array([R @ x for x in block]), rows(P)), "restrict runs, shapes", "(0,)"),
        ((absolute, rows(P)), "restrict is linear", ""),
        ((mixing, rows(P)), "restrict, block against single", ""),
        ((spoiling, rows(P)), "restrict runs, shapes", "changes its input"),
        ((infinite, rows(P)), "restrict runs, shapes", "not finite"),
    ],
)
def test_wrong_transfers_fail_where_they_should(maps, name, text):
    report = both(Transfer(*maps))
    assert failed(report) == {("to level 1", name)}
    assert text in report.failures[0]


# -- the whole solve ---------------------------------------------------------------------------------------------------
def test_the_whole_solve_sees_steps_that_no_other_check_takes():
    class WrongInside(Linear):
        def step(self, steps, u, out):
            super().step(steps, u, out)
            if steps.step == 3 and 7 in steps and self.stride == 1:
                out *= 1 + 1e-9

    ranges = []

    class Listening(Linear):
        def step(self, steps, u, out):
            ranges.append(steps)
            super().step(steps, u, out)

    assert run([Listening(), Linear(6)], coarsening=6).passed
    assert any(7 in r for r in ranges)
    report = run([WrongInside(), Linear(3), Linear(6)])
    assert failed(report) == {("all", "MGRIT keeps the sequential solution")}
    assert float(report.failures[0].split("failed")[1].split()[0]) > 1e-11


# -- bad arguments -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("args", "text"),
    [
        (dict(propagators=[]), "no propagators"),
        (dict(nsteps=0), "nsteps = 0"),
        (dict(nsteps=2.5), "nsteps = 2.5"),
        (dict(nsteps=5), "exceeds the 5 time steps"),
        (dict(coarsening=1), "coarsening 1"),
        (dict(rtol=0), "rtol 0"),
        (dict(seed=-1), "seed -1"),
        (dict(state=np.ones(SIZE) * 1j), "complex"),
        (dict(state=np.full(SIZE, np.nan)), "not finite"),
        (dict(state=["a"]), "convert"),
        (dict(transfers=[None]), "1 transfers for 2 coarse levels"),
        (dict(transfers=[None, (R, R)]), "do not fit each other"),
    ],
)
def test_bad_arguments_are_refused(args, text):
    with pytest.raises(ValueError, match=f"check: .*{text}"):
        run(**(dict(propagators=hierarchy(Linear)) | args))


# -- on several ranks --------------------------------------------------------------------------------------------------
@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize("kind", [Linear, Cubic, Guessing])
def test_right_propagators_pass_on_all_ranks(kind):
    comm = MPI.COMM_WORLD
    report = run(hierarchy(kind), comm=comm)
    assert report.passed, report.failures
    assert len(set(map(tuple, comm.allgather(report.lines)))) == 1


@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize(("wrong", "name"), [(Raises, "step runs"), (NotFinite, "step gives finite values")])
def test_a_failure_on_one_rank_fails_on_all(wrong, name):
    comm = MPI.COMM_WORLD
    propagators = hierarchy(Cubic)
    if comm.rank == comm.size - 1:
        propagators[1] = wrong(3)
    report = run(propagators, comm=comm)
    assert failed(report) == {("level 1", name)}
    assert len(set(map(tuple, comm.allgather(report.lines)))) == 1


@pytest.mark.parallel(3)
def test_ranks_that_differ_are_refused_on_all():
    comm = MPI.COMM_WORLD
    with pytest.raises(ValueError, match="arguments differ"):
        run(Cubic() if comm.rank else Linear(), comm=comm)
    with pytest.raises(ValueError, match="rtol"):
        run(Cubic(), comm=comm, rtol=1e-12 if comm.rank else -1)
    with pytest.raises(ValueError, match="arguments differ"):
        run(Cubic(), comm=comm, rtol=1e-12 if comm.rank else 1e-11)
    report = run(Guessing(), comm=comm, state=np.ones(3 + (comm.rank == 1)))
    assert failed(report) == {("all", "messages: a state to the next rank and back")}


class Shared:
    """Diffusion by the mean of all entries, which are spread over ranks: derivatives need all of them."""

    def __init__(self, comm, stride=1, wrong=None):
        self.comm, self.dt, self.wrong = comm, 0.1 * stride, wrong

    def mean(self, u):
        parts = self.comm.allgather((u.sum(axis=1), u.shape[1]))
        return (np.add.reduce([p for p, _ in parts]) / sum(n for _, n in parts))[:, None]

    def step(self, steps, u, out):
        out[...] = u + self.dt * (self.mean(u**2) - u)
        if self.wrong == "raises" and self.comm.rank == self.comm.size - 1:
            raise ArithmeticError("here only")

    def tangent(self, steps, u, du, out):
        out[...] = du + self.dt * (2 * self.mean(u * du) - du)

    def adjoint(self, steps, u, lam, out):
        out[...] = lam + self.dt * (2 * u * self.mean(lam) - lam)
        if self.wrong == "adjoint":
            out[...] = lam + self.dt * (2 * u * lam.mean(axis=1, keepdims=True) - lam)


@pytest.mark.parallel([1, 3])
def test_states_shared_by_several_ranks():
    comm = MPI.COMM_WORLD
    state = np.linspace(1, 2, 3 + comm.rank)
    check_ = lambda **kw: run([Shared(comm, **kw), Shared(comm, 3)], state=state, coarsening=3, space_comm=comm)

    def run(*args, **kwargs):
        return check(args[0], N, **kwargs)

    report = check_()
    assert report.passed, report.failures
    assert len(set(map(tuple, comm.allgather(report.lines)))) == 1
    if comm.size > 1:
        assert failed(check_(wrong="adjoint")) == {("level 0", "adjoint against tangent")}
    raising = check_(wrong="raises")
    assert failed(raising) == {("level 0", "step runs")}
    assert "here only" in raising.failures[0]

"""Ordinary use on several ranks where one of them fails, differs, stops or leaves: no hang, no lost cause.

Expected values are those of one rank, exact ones, or the exception that was planted.
"""

import sys
from pathlib import Path

import numpy as np
import pytest
from firedrake import Function
from firedrake.petsc import PETSc
from mpi4py import MPI

import pint_fem as pf
from pint_fem.errors import InputError, SolverFailure, causes
from pint_fem.mgrit import MGRIT
from pint_fem.mgrit.krylov import KrylovMGRIT
from pint_fem.optimize import (
    minimize_active_set,
    minimize_bounded,
    minimize_one_shot,
    minimize_trust_region,
    scipy_minimize,
)
from tests.limits import time_limit
from tests.ranks import cases
from tests.test_reduced_functional import functional

COMM = MPI.COMM_WORLD
LAST = COMM.rank == COMM.size - 1
N, M = 16, 4
MISTAKES = [KeyError("absent"), MemoryError("none left"), TypeError("wrong"), PETSc.Error(86), SystemExit(3)]
NUMERICAL = [ZeroDivisionError("division"), PETSc.Error(71), np.linalg.LinAlgError("singular")]
name = lambda error: f"{type(error).__name__}{getattr(error, 'ierr', '')}"


def expected(error, here=LAST):
    """The type of what a rank raises."""
    if any(error is one for one in NUMERICAL):
        return SolverFailure
    return type(error) if here or isinstance(error, SystemExit) else RuntimeError


def caught(error, work, *args, here=LAST, **kwargs):
    """What ``work`` raises because of an error on the ranks that are ``here``; the error is found behind it."""
    with pytest.raises(BaseException) as info:  # noqa: PT011
        work(*args, **kwargs)
    assert type(info.value) is expected(error, here)
    assert [e for e in causes(info.value) if type(e) is type(error)]
    return info.value


# -- the solver core ---------------------------------------------------------------------------------------------------
class Euler:
    """``u' = -u``; one step raises on the last rank."""

    def __init__(self, stride=1, error=None):
        self.h, self.error = stride / N, error

    def step(self, steps, u, out):
        if self.error is not None and LAST:
            raise self.error
        out[...] = u / (1 + self.h)


def solver(kind=MGRIT, error=None, where=0, levels=2, **options):
    steps = [Euler(M**i, error if i == where else None) for i in range(levels)]
    return kind(steps, N, options={"coarsening": M, "levels": levels, **options}, comm=COMM)


def slab(made):
    U = np.zeros((made.levels[0].k + 1, 2))
    if made.levels[0].lo == 0:
        U[0] = 1, 2
    return U


@pytest.mark.parallel([1, 3])
@time_limit(60)
@pytest.mark.parametrize("error", [*MISTAKES, *NUMERICAL], ids=name)
def test_a_step_fails_on_one_rank(error, log_lines):
    """Of any level, however the solver goes on after failures: a mistake is no reason to step sequentially."""
    for where, levels, on_divergence in ((0, 2, "report"), (1, 2, "report"), (0, 1, "report"), (0, 2, "serial")):
        made = solver(error=error, where=where, levels=levels, on_divergence=on_divergence)
        raised = caught(error, made.solve, slab(made))
        text = f"level {where}, steps "
        assert text in str(raised) or text in "".join(getattr(raised, "__notes__", [text]))
    log_lines.clear()
    made = solver(error=error, where=1, on_divergence="serial")
    if error in NUMERICAL:
        U = slab(made)
        assert made.solve(U).reason == "serial"
        lo = made.levels[0].lo
        np.testing.assert_allclose(U, (1 + 1 / N) ** -np.arange(lo, lo + len(U))[:, None] * [1, 2], rtol=1e-13)
    else:
        caught(error, made.solve, slab(made))
        assert not log_lines


@pytest.mark.parallel([1, 3])
@time_limit(60)
@pytest.mark.parametrize("error", [MISTAKES[0], NUMERICAL[0]], ids=name)
def test_a_step_fails_on_one_rank_in_a_krylov_method(error):
    for on_divergence in ("report", "serial"):
        made = solver(KrylovMGRIT, error, on_divergence=on_divergence)
        U = np.zeros((made.operator.level.k + 1, 2))
        U[0] = 1
        caught(error, made.solve, U)


@pytest.mark.parallel(3)
@time_limit(60)
@pytest.mark.parametrize(
    ("what", "text"),
    [
        (lambda r: solver().solve(slab(solver()), rtol=10.0 ** (-8 - r)), "rtol"),
        (lambda r: solver().solve(slab(solver()), cycles=1 + r), "cycles"),
        (lambda r: solver().solve(slab(solver()), start=("nested", "guess")[r]), "start"),
        (lambda r: solver(max_it=5 + r).solve(slab(solver())), "max_it"),
        (lambda r: solver(relax=("F", "FCF")[r]).solve(slab(solver())), "relax"),
        (lambda r: solver(levels=1 + r).solve(slab(solver())), "levels"),
        (lambda r: MGRIT([Euler()], N + r, comm=COMM).solve(np.zeros((N // 2 + 1 + r, 1))), "number of steps"),
    ],
)
def test_solves_that_differ_are_refused_by_name(what, text):
    """They used to hang or to end in MPI_ERR_TRUNCATE."""
    with pytest.raises(InputError, match=f"^{text} is not the same on all ranks"):
        what(min(COMM.rank, 1))


# -- minimisers --------------------------------------------------------------------------------------------------------
class Bowl:
    """``J = |x - 1|^2 / 2 + |x|^4 / 4`` on R^5, all on the first rank: the last one has no entries."""

    def __init__(self, comm=COMM):
        self.comm, self.size = comm, 5 if comm.rank == 0 else 0
        self.fault = None

    def inner(self, a, b):
        return self.comm.allreduce(float(a @ b))

    def value(self, x):
        value = self.inner(x - 1, x - 1) / 2 + self.inner(x, x) ** 2 / 4  # what communicates is through
        if self.fault is not None and LAST:
            raise self.fault
        return value

    def gradient(self, x):
        return x - 1 + self.inner(x, x) * x

    def hessian_action(self, x, v):
        return v + self.inner(x, x) * v + 2 * self.inner(x, v) * x


# x_i = s with s - 1 + 5 s^3 = 0
ROOT = next(r.real for r in np.roots([5, 0, 1, -1]) if abs(r.imag) < 1e-12)
MINIMISERS = {
    "trust region": minimize_trust_region,
    "bounded": minimize_bounded,
    "active set": minimize_active_set,
    "one-shot": minimize_one_shot,
    "scipy": lambda problem, x0, **options: scipy_minimize(problem, x0, "L-BFGS-B", comm=problem.comm, **options),
}


@pytest.mark.parallel([1, 3])
@time_limit(60)
@pytest.mark.parametrize("method", MINIMISERS)
def test_a_callback_stops_on_one_rank_only(method):
    problem, seen = Bowl(), []
    minimise, x0 = MINIMISERS[method], np.zeros(problem.size)
    callback = (lambda *args: seen.append(1) or len(seen) == 2) if LAST else None
    result = minimise(problem, x0, callback=callback)
    assert COMM.bcast(len(seen), root=COMM.size - 1) == 2
    whole = minimise(problem, x0)
    if COMM.rank == 0:
        assert np.linalg.norm(result.x - ROOT) > 2e-4
        np.testing.assert_allclose(whole.x, ROOT, rtol=1e-4)


@pytest.mark.parallel([1, 3])
@time_limit(60)
@pytest.mark.parametrize("method", MINIMISERS)
@pytest.mark.parametrize("error", [KeyError("absent"), OSError("no space left"), SystemExit(3)], ids=name)
def test_a_function_of_the_user_raises_on_one_rank(method, error):
    """A callback, a monitor, and J itself."""

    def fails(*_):
        raise error

    for given in ("callback", "monitor", "value") if method != "scipy" else ("callback", "value"):
        problem = Bowl()
        problem.fault = error if given == "value" else None
        options = {given: fails if LAST else None} if given != "value" else {}
        caught(error, MINIMISERS[method], problem, np.zeros(problem.size), **options)


@pytest.mark.parallel(3)
@time_limit(60)
@pytest.mark.parametrize("method", MINIMISERS)
def test_options_that_differ_are_refused_by_name(method):
    most = 3 + min(COMM.rank, 1)
    options = {"options": {"maxiter": most}} if method == "scipy" else {"max_it": most}
    problem = Bowl()
    message = r"max_?it(er)? is not the same on all ranks \(rank 0: 3; rank 1: 4; rank 2: 4\)"
    with pytest.raises(InputError, match=message):
        MINIMISERS[method](problem, np.zeros(problem.size), **options)
    with pytest.raises(ValueError, match="x0 of shape") if LAST else pytest.raises(InputError, match="x0 of shape"):
        MINIMISERS[method](problem, np.zeros((1, 2)) if LAST else np.zeros(problem.size))


@pytest.mark.parallel([1, 3])
@time_limit(60)
def test_a_rank_without_entries_has_a_vote():
    """Bounds of a wrong shape there: their indicator's norm is zero, and the others used to wait."""
    problem = Bowl()
    x0 = np.zeros(problem.size)
    with pytest.raises(ValueError, match="bounds of shapes"):
        minimize_bounded(problem, x0, np.zeros(3) if LAST else np.zeros(problem.size), 1.0)
    loaded = {"kind": "trust region 1"}, {"x": np.zeros(problem.size + LAST)}

    class Checkpoint:
        load, save = staticmethod(lambda: loaded), staticmethod(lambda *_: None)

    with pytest.raises(ValueError, match="the checkpoint holds vectors"):
        minimize_trust_region(problem, x0, checkpoint=Checkpoint())


@pytest.mark.parallel([1, 3])
@time_limit(60)
@pytest.mark.parametrize("method", ["trust region", "bounded", "one-shot"])
def test_the_monitor_says_why_a_trial_point_is_rejected(method):
    """J fails beyond |x| = 0.9, short of the minimiser of the model, on the last rank."""

    class Cliff(Bowl):
        def value(self, x):
            value, beyond = super().value(x), self.inner(x, x) > 0.81
            if beyond and LAST:
                raise FloatingPointError("overflow in the reaction")
            return value

    problem, lines = Cliff(), []
    MINIMISERS[method](problem, np.zeros(problem.size), monitor=lines.append)
    reasons = [line for line in lines if "no J at the trial point" in line]
    assert reasons
    assert all("overflow in the reaction" in line for line in reasons)
    assert len(reasons) < len(lines)


# -- functionals -------------------------------------------------------------------------------------------------------
def grids():
    return ["1x1"] if COMM.size == 1 else ["3x1", "1x3"]


@pytest.fixture(scope="module")
def posed():
    """A small heat problem on each grid."""
    return {grid: functional(pf.SpaceTime(grid), n=3, steps=8, rtol=1e-11) for grid in grids()}


def plant(monkeypatch, rf, error, where):
    """Make a part of a functional fail on the last rank, from the second call on."""
    thing, method = {
        "step": (rf.problem.sweeps.propagators[0], "apply"),
        "forcing": (rf.problem.sweeps.propagators[0], "forcing"),
        "misfit": (rf.problem.misfits[0], "values"),
    }[where]
    original = getattr(thing, method)

    def fails(*args, **kwargs):
        out = original(*args, **kwargs)  # what communicates in space is through
        if LAST:
            raise error
        return out

    monkeypatch.setattr(thing, method, fails)


@pytest.mark.parallel([1, 3])
@time_limit(100)
@pytest.mark.parametrize("where", ["forcing", "misfit"])
@pytest.mark.parametrize(
    "error",
    cases(
        [*MISTAKES[:2], PETSc.Error(86), MISTAKES[-1], *NUMERICAL[:2]],
        on_ranks=[MISTAKES[0], MISTAKES[-1], NUMERICAL[0]],
    ),
    ids=name,
)
def test_an_evaluation_fails_on_one_rank(posed, monkeypatch, where, error):
    """A mistake is never J = inf, and a numerical cause is named; then the functional is as good as before."""
    for rf in posed.values():
        q = rf.function(rf.array(rf.controls[0].control) + 0.5)
        rf.problem.invalidate()
        before = float(rf(q))
        rf.problem.invalidate()
        with monkeypatch.context() as patch:
            plant(patch, rf, error, where)
            caught(error, rf, q)
            lines = []
            if expected(error) is SolverFailure:
                with pytest.raises(FloatingPointError, match=f"at the first guess.*{type(error).__name__}"):
                    rf.minimize_trust_region(q, monitor=lines.append, max_it=2)
            else:
                caught(error, rf.minimize_trust_region, q, max_it=2)
        rf.problem.invalidate()
        assert float(rf(q)) == pytest.approx(before, rel=1e-13)


@pytest.mark.parallel(3)
@time_limit(100)
def test_a_static_control_that_differs_between_time_ranks_is_refused(posed):
    rf = posed["1x3"]
    q = rf.function(rf.array(rf.controls[0].control))
    other = rf.function(rf.array(rf.controls[0].control) + 1e-3 * COMM.rank)
    with pytest.raises(InputError, match="control differs between ranks in time"):
        rf(other)
    for minimise in (rf.minimize_trust_region, rf.minimize_one_shot, rf.minimize_scipy):
        with pytest.raises(InputError, match="start differs between ranks in time"):
            minimise(other)
        with pytest.raises(InputError, match="max_it is not the same on all ranks"):
            minimise(q, max_it=3 + COMM.rank)
    rf(q)
    with pytest.raises(InputError, match="direction differs between ranks in time"):
        rf.hessian(other)
    with pytest.raises(InputError, match="direction differs between ranks in time"):
        rf.tlm(other)


@pytest.mark.parallel(3)
@time_limit(100)
@pytest.mark.parametrize(
    ("given", "text"),
    [
        (lambda r: dict(steps=8 + 8 * r), "nsteps"),
        (lambda r: dict(steps=8, rtol=10.0 ** (-9 - r)), "mgrit rtol"),
        (lambda r: dict(steps=8, solver={"time_solver": ("mgrit", "serial")[r]}), "time_solver"),
        (lambda r: dict(steps=8, levels=2 + r), "mgrit levels"),
    ],
)
def test_functionals_that_differ_are_refused_by_name(given, text):
    for grid in grids():
        with pytest.raises(InputError, match=f"^{text} is not the same on all ranks"):
            functional(pf.SpaceTime(grid), n=3, **given(min(COMM.rank, 1)))


@pytest.mark.parallel(3)
@time_limit(30)
def test_grids_that_differ_are_refused():
    with pytest.raises(InputError, match="grid is not the same on all ranks"):
        pf.SpaceTime(("3x1", "1x3", "1x3")[COMM.rank])


@pytest.mark.parallel([1, 3])
@time_limit(100)
def test_sys_exit_in_a_callback_leaves_the_last_iterate_saved(posed, tmp_path):
    """All ranks exit with the status, and another run goes on to the iterate of a run that was not stopped."""
    folder = Path(COMM.bcast(str(tmp_path), root=0))
    for grid, rf in posed.items():
        options = dict(gtol_rel=1e-9, cg_max_it=2, max_it=4)
        start = Function(rf.controls[0].control.function_space())
        path, count = folder / f"{grid}.h5", []

        def leave(x, record, count=count):
            count.append(1)
            if len(count) == 2 and LAST:
                sys.exit(5)

        rf.problem.invalidate()
        with pytest.raises(SystemExit) as left:
            rf.minimize_trust_region(start, checkpoint=path, callback=leave, **options)
        assert left.value.code == 5
        assert COMM.bcast(path.exists(), root=0)
        goes_on = rf.minimize_trust_region(start, checkpoint=path, **options)
        rf.problem.invalidate()
        whole = rf.minimize_trust_region(start, **options)
        assert goes_on.iterations == whole.iterations == 4
        np.testing.assert_allclose(goes_on.x, whole.x, rtol=1e-8, atol=1e-12)

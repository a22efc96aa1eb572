"""A trust-region run that is killed anywhere and continued takes the steps of the run that was not, to the last bit."""

import json

import numpy as np
import pytest
from mpi4py import MPI

from pint_fem.optimize import InexactOptions, StopReason, minimize_trust_region
from tests.test_inexact_trust_region import Adversary, ones
from tests.test_trust_region import LeastSquares, bowl, random_quadratic, rosenbrock


class Memory:
    """A checkpoint in memory, by way of JSON."""

    def __init__(self):
        """Empty."""
        self.text, self.vectors, self.saves = None, None, 0

    def save(self, scalars, vectors):
        """Strict JSON has neither infinity nor nan."""
        self.text, self.saves = json.dumps(scalars, allow_nan=False), self.saves + 1
        self.vectors = {name: v.copy() for name, v in vectors.items()}

    def load(self):
        """None before the first save."""
        return None if self.text is None else (json.loads(self.text), {k: v.copy() for k, v in self.vectors.items()})


class Killed(Exception):
    """The end of a process."""


class Mortal:
    """A problem that kills the process at one of its calls."""

    def __init__(self, problem, lives=10**9):
        """Die at that call."""
        self.problem, self.lives, self.inner = problem, lives, problem.inner

    def __getattr__(self, name):
        """Any function of the problem, counted."""
        function = getattr(self.problem, name)
        if not callable(function):
            return function

        def call(*args):
            self.lives -= 1
            if self.lives < 0:
                raise Killed
            return function(*args)

        return call


CASES = {
    "exact": (lambda: bowl(tilt=0.01), np.full(6, 5.0), {"initial_radius": 1e3}),
    "first radius": (lambda: rosenbrock(3), np.array([-1.2, 1.0, 0.5]), {"max_it": 8}),
    "eisenstat-walker": (
        lambda: rosenbrock(3), np.array([-1.2, 1.0, 0.5]), {"cg_forcing": "eisenstat-walker-1", "max_it": 14},
    ),
    "learning": (
        lambda: rosenbrock(4), np.array([-1.2, 1.0, 0.5, 2.0]),
        {"preconditioner": "limited-memory", "preconditioner_memory": 3, "initial_radius": 4.0},
    ),
    "inexact": (
        lambda: Adversary(bowl(tilt=0.01), 1, ones, ones), np.full(6, 5.0),
        {"initial_radius": 1e3, "inexact": InexactOptions()},
    ),
    "inexact quadratic": (
        lambda: Adversary(random_quadratic()[0], -1, ones, ones), np.ones(12), {"inexact": InexactOptions()},
    ),
    "wrong estimates": (
        lambda: Adversary(bowl(), 1, ones, excess=10.0), np.full(6, 3.0), {"inexact": InexactOptions()},
    ),
    "inexact and learning": (
        lambda: Adversary(rosenbrock(4), 1, ones, ones), np.array([-1.2, 1.0, 0.5, 2.0]),
        {"inexact": InexactOptions(), "preconditioner": "limited-memory", "initial_radius": 4.0, "max_it": 13},
    ),
    "gauss-newton": (LeastSquares, np.array([0.5, 3.0]), {"hessian": "gauss-newton"}),
    "round-off": (lambda: bowl(offset=1e6), np.full(6, 3.0), {"gtol_rel": 0, "cg_rtol": 1e-10}),
}  # fmt: skip


def same(a, b):
    """Two results with the same bits; Hessian products after a rejected step may have been found again."""
    assert np.array_equal(a.x, b.x)
    assert repr(a.history) == repr(b.history)
    assert (a.value, a.gradient_norm, a.value_error, a.gradient_error) == (
        b.value,
        b.gradient_norm,
        b.value_error,
        b.gradient_error,
    )
    assert (a.reason, a.iterations, a.converged) == (b.reason, b.iterations, b.converged)
    assert (a.value_calls, a.gradient_calls) == (b.value_calls, b.gradient_calls)
    assert a.hessian_calls <= b.hessian_calls


@pytest.mark.parametrize("most", [20, pytest.param(None, marks=pytest.mark.grid)], ids=["some", "all"])
@pytest.mark.parametrize("name", CASES)
def test_killed_at_any_call_and_continued(name, most):
    """Of J, the gradient or a product: once, at some twenty calls or at each of all the calls of the run."""
    make, x0, options = CASES[name]
    whole = minimize_trust_region(make(), x0, **options)
    calls = whole.value_calls + whole.gradient_calls + whole.hessian_calls
    assert whole.iterations >= 4
    deaths, moments = 0, range(0, calls, 1 if most is None else 1 + calls // most)
    for lives in moments:
        checkpoint = Memory()
        with pytest.raises(Killed):
            minimize_trust_region(Mortal(make(), lives), x0, checkpoint=checkpoint, **options)
        deaths += checkpoint.text is not None
        same(whole, minimize_trust_region(make(), x0, checkpoint=checkpoint, **options))
    assert deaths > 0.7 * len(moments)


@pytest.mark.parametrize("name", CASES)
def test_killed_after_every_iteration(name):
    """From the callback, again and again: each life does one iteration, and is told of it once."""
    make, x0, options = CASES[name]
    whole, checkpoint, told = minimize_trust_region(make(), x0, **options), Memory(), []

    def die(x, entry):
        told.append(entry)
        raise Killed

    for _ in range(whole.iterations):
        with pytest.raises(Killed):
            minimize_trust_region(make(), x0, checkpoint=checkpoint, callback=die, **options)
    last = minimize_trust_region(make(), x0, checkpoint=checkpoint, callback=die, **options)
    same(whole, last)
    assert told == whole.history[1:]


def test_a_checkpoint_changes_nothing():
    """One save for the first guess and one an iteration."""
    make, x0, options = CASES["learning"]
    checkpoint = Memory()
    same(
        minimize_trust_region(make(), x0, **options),
        minimize_trust_region(make(), x0, checkpoint=checkpoint, **options),
    )
    assert checkpoint.saves == 1 + minimize_trust_region(make(), x0, **options).iterations


def test_a_run_that_has_ended_ends_at_once_or_goes_on_with_more_to_do():
    """Converged: no call at all. With a smaller tolerance, or more iterations, it goes on as the longer run does."""
    make, x0, options = CASES["exact"]
    checkpoint = Memory()
    first = minimize_trust_region(make(), x0, checkpoint=checkpoint, gtol_rel=1e-3, **options)
    same(first, minimize_trust_region(Mortal(make(), 0), x0, checkpoint=checkpoint, gtol_rel=1e-3, **options))
    long = minimize_trust_region(make(), x0, gtol_rel=1e-10, **options)
    same(long, minimize_trust_region(make(), x0, checkpoint=checkpoint, gtol_rel=1e-10, **options))
    checkpoint = Memory()
    short = minimize_trust_region(make(), x0, checkpoint=checkpoint, gtol_rel=1e-10, max_it=3, **options)
    assert short.reason is StopReason.MAX_IT
    same(long, minimize_trust_region(make(), x0, checkpoint=checkpoint, gtol_rel=1e-10, **options))


def test_the_monitor_goes_on_where_it_stopped():
    """A header, and the lines of the new iterations."""
    make, x0, options = CASES["exact"]
    checkpoint, lines, more = Memory(), [], []
    minimize_trust_region(make(), x0, **options, monitor=lines.append)
    minimize_trust_region(make(), x0, **options, checkpoint=checkpoint, max_it=3)
    minimize_trust_region(make(), x0, **options, checkpoint=checkpoint, monitor=more.append)
    assert more == lines[:1] + lines[5:]


def test_checkpoints_that_do_not_fit_are_refused():
    """Another shape, another kind of run, another control of the accuracy, no checkpoint at all."""
    make, x0, options = CASES["exact"]
    checkpoint = Memory()
    minimize_trust_region(make(), x0, checkpoint=checkpoint, max_it=2, **options)
    with pytest.raises(ValueError, match=r"holds vectors of shape \(6,\), x0 has shape \(2,\)"):
        minimize_trust_region(rosenbrock(2), np.ones(2), checkpoint=checkpoint)
    with pytest.raises(ValueError, match="holds a run without inexact"):
        minimize_trust_region(make(), x0, checkpoint=checkpoint, inexact=InexactOptions())
    checkpoint.text = json.dumps({"kind": "one-shot"})
    with pytest.raises(ValueError, match="holds a run of kind 'one-shot'"):
        minimize_trust_region(make(), x0, checkpoint=checkpoint)
    with pytest.raises(ValueError, match=r"checkpoint = 'run.h5' is refused: give an object with save and load"):
        minimize_trust_region(make(), x0, checkpoint="run.h5")


class Distributed:
    """A problem whose vectors are split over the processes; each evaluates the whole."""

    def __init__(self, problem, n, comm):
        """Slices in rank order."""
        self.problem, self.comm = problem, comm
        edges = [n * r // comm.size for r in range(comm.size + 1)]
        self.mine = slice(edges[comm.rank], edges[comm.rank + 1])

    def whole(self, x):
        """All of a vector."""
        return np.concatenate(self.comm.allgather(np.array(x)))

    def inner(self, a, b):
        """Of the whole."""
        return self.problem.inner(self.whole(a), self.whole(b))

    def value_within(self, x, tolerance):
        """Of the whole."""
        return self.problem.value_within(self.whole(x), tolerance)

    def gradient_within(self, x, tolerance):
        """The own part."""
        g, error = self.problem.gradient_within(self.whole(x), tolerance)
        return g[self.mine], error

    def hessian_action_within(self, x, v, rtol):
        """The own part."""
        return self.problem.hessian_action_within(self.whole(x), self.whole(v), rtol)[self.mine]


@pytest.mark.parallel([1, 3])
def test_processes_decide_alike():
    """Inexact, learning, killed and continued on several processes: the bits of the run on one."""
    make, x0, options = CASES["inexact and learning"]
    whole, comm, checkpoint = minimize_trust_region(make(), x0, **options), MPI.COMM_WORLD, Memory()
    for lives in (9, 60, 10**9):
        problem = Distributed(Mortal(make(), lives), 4, comm)
        try:
            result = minimize_trust_region(problem, x0[problem.mine], checkpoint=checkpoint, **options)
        except Killed:
            continue
    assert np.array_equal(problem.whole(result.x), whole.x)
    assert repr(result.history) == repr(whole.history)


@pytest.mark.parallel(3)
def test_a_misfit_on_one_process_is_refused_on_all():
    """Shapes of the checkpoint differ on the last process only."""
    make, x0, options = CASES["inexact and learning"]
    comm, checkpoint = MPI.COMM_WORLD, Memory()
    problem = Distributed(make(), 4, comm)
    minimize_trust_region(problem, x0[problem.mine], checkpoint=checkpoint, **(options | {"max_it": 2}))
    if comm.rank == 1:
        checkpoint.vectors["x"] = np.zeros(3)
    with pytest.raises(ValueError, match="the checkpoint holds vectors of"):
        minimize_trust_region(problem, x0[problem.mine], checkpoint=checkpoint, **options)

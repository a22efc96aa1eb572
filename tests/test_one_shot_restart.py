"""A one-shot run that is killed anywhere and continued takes the steps of the run that was not, to the last bit."""

import numpy as np
import pytest
from mpi4py import MPI

from pint_fem.optimize import StopReason, minimize_one_shot, minimize_trust_region
from tests.test_one_shot import FixedPoint
from tests.test_trust_region import bowl, rosenbrock
from tests.test_trust_region_restart import Killed, Memory, Mortal


class WithSolvers(Memory):
    """A checkpoint that keeps the iterates of a FixedPoint's solvers, as the HDF5 one those of the sweeps."""

    def __init__(self):
        """Empty."""
        super().__init__()
        self.problem, self.kept = None, None

    def of(self, problem):
        """The same checkpoint for another life of the problem."""
        self.problem = problem
        return self

    def save(self, scalars, vectors):
        """And the iterates."""
        super().save(scalars, vectors)
        if hasattr(self.problem, "u"):
            self.kept = self.problem.u.copy(), self.problem.l.copy()

    def load(self):
        """And the iterates."""
        if self.kept is not None:
            self.problem.u, self.problem.l = (a.copy() for a in self.kept)
        return super().load()


CASES = {
    "slow solvers": (lambda: FixedPoint(0.4), np.zeros(8), {"gtol_rel": 1e-5}),
    "not linear": (lambda: FixedPoint(0.3, c=0.2, condition=30.0), np.zeros(8), {"memory": 4, "max_it": 60}),
    "rejections": (lambda: FixedPoint(0.6, condition=1e3, alpha=1e-4), np.zeros(8), {"max_it": 80}),
    "accurate": (lambda: rosenbrock(3), np.array([-1.2, 1.0, 0.5]), {"max_it": 30}),
    "preconditioner": (bowl, np.full(6, 5.0), {"preconditioner": lambda r: np.linspace(1, 2, 6) * r}),
}


def same(a, b):
    """Two results with the same bits."""
    assert np.array_equal(a.x, b.x)
    assert repr(a.history) == repr(b.history)
    for name in ("value", "gradient_norm", "residual", "iterations", "reason", "converged", "advance_calls"):
        assert getattr(a, name) == getattr(b, name), name
    assert (a.value_calls, a.gradient_calls) == (b.value_calls, b.gradient_calls)


@pytest.mark.parametrize("name", CASES)
def test_killed_at_any_call_and_continued(name):
    """Once, at each of 25 calls spread over the run."""
    make, x0, options = CASES[name]
    whole = minimize_one_shot(make(), x0, **options)
    calls = whole.advance_calls + whole.value_calls + whole.gradient_calls
    assert whole.iterations >= 8
    for lives in sorted(set(np.linspace(0, calls - 1, 25).astype(int).tolist())):
        checkpoint, problem = WithSolvers(), make()
        with pytest.raises(Killed):
            minimize_one_shot(Mortal(problem, lives), x0, checkpoint=checkpoint.of(problem), **options)
        problem = make()
        same(whole, minimize_one_shot(problem, x0, checkpoint=checkpoint.of(problem), **options))


@pytest.mark.parametrize("name", CASES)
def test_killed_after_every_iteration(name):
    """From the callback: each life does one iteration, and is told of it once."""
    make, x0, options = CASES[name]
    whole, checkpoint, told = minimize_one_shot(make(), x0, **options), WithSolvers(), []

    def die(x, entry):
        told.append(entry)
        raise Killed

    for _ in range(whole.iterations + 1):
        problem = make()
        with pytest.raises(Killed):
            minimize_one_shot(problem, x0, checkpoint=checkpoint.of(problem), callback=die, **options)
    problem = make()
    same(whole, minimize_one_shot(problem, x0, checkpoint=checkpoint.of(problem), callback=die, **options))
    assert repr(told) == repr(whole.history)


def test_a_run_that_has_ended_ends_at_once_or_goes_on_with_more_to_do():
    """Converged: no call at all. With more iterations it is the longer run, with a smaller tolerance it goes on."""
    make, x0, options = CASES["slow solvers"]
    checkpoint, problem = WithSolvers(), make()
    first = minimize_one_shot(problem, x0, checkpoint=checkpoint.of(problem), **options)
    same(first, minimize_one_shot(Mortal(make(), 0), x0, checkpoint=checkpoint.of(make()), **options))
    problem = make()
    further = minimize_one_shot(problem, x0, checkpoint=checkpoint.of(problem), gtol_rel=1e-8)
    assert further.converged
    assert further.gradient_norm < 1e-2 * first.gradient_norm
    checkpoint, problem = WithSolvers(), make()
    short = minimize_one_shot(problem, x0, checkpoint=checkpoint.of(problem), max_it=9, **options)
    assert short.reason is StopReason.MAX_IT
    problem = make()
    same(first, minimize_one_shot(problem, x0, checkpoint=checkpoint.of(problem), **options))


def test_checkpoints_that_do_not_fit_are_refused():
    """Another shape, another kind of run, no checkpoint at all."""
    make, x0, options = CASES["accurate"]
    checkpoint = WithSolvers()
    minimize_one_shot(make(), x0, checkpoint=checkpoint, **options)
    with pytest.raises(ValueError, match=r"holds vectors of shape \(3,\), x0 has shape \(2,\)"):
        minimize_one_shot(rosenbrock(2), np.ones(2), checkpoint=checkpoint)
    with pytest.raises(ValueError, match="holds a run of kind 'one-shot"):
        minimize_trust_region(make(), x0, checkpoint=checkpoint)
    with pytest.raises(ValueError, match=r"checkpoint = 'run.h5' is refused: give an object with save and load"):
        minimize_one_shot(make(), x0, checkpoint="run.h5")


@pytest.mark.parallel([1, 3])
def test_processes_continue_alike():
    """Distributed designs, killed and continued: the records agree with those of the run that was not."""
    comm, serial = MPI.COMM_WORLD, FixedPoint(0.4)
    edges = [8 * r // comm.size for r in range(comm.size + 1)]
    mine = slice(edges[comm.rank], edges[comm.rank + 1])

    class Part:
        """The own part of the design; every process solves the whole."""

        def __init__(self, lives):
            self.problem, self.lives = FixedPoint(0.4), lives

        def whole(self, x):
            return np.concatenate(comm.allgather(np.array(x)))

        def inner(self, a, b):
            return float(self.whole(a) @ self.whole(b))

        def advance(self, x):
            self.lives -= 1
            if self.lives < 0:
                raise Killed
            value, g, residual = self.problem.advance(self.whole(x))
            return value, g[mine], residual

        def value(self, x):
            return self.problem.value(self.whole(x))

        def gradient(self, x):
            return self.problem.gradient(self.whole(x))[mine]

    whole, checkpoint = minimize_one_shot(serial, np.zeros(8)), WithSolvers()
    for lives in (7, 20, 10**9):
        part = Part(lives)
        try:
            result = minimize_one_shot(part, np.zeros(8)[mine], checkpoint=checkpoint.of(part.problem))
        except Killed:
            continue
    assert np.array_equal(part.whole(result.x), whole.x)
    assert repr(result.history) == repr(whole.history)

"""What ranks do together: one rule for failures, decisions and arguments, whatever fails where."""

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from firedrake.exceptions import ConvergenceError
from firedrake.petsc import PETSc
from mpi4py import MPI

from pint_fem.collective import all_ranks, any_rank, collectively, raise_collectively, require_same
from pint_fem.errors import InputError, SolverFailure, causes, is_numerical
from tests.limits import patience, time_limit
from tests.ranks import program_environment

COMM = MPI.COMM_WORLD
LAST = COMM.size - 1


class Unpicklable(Exception):
    """Takes other arguments than it passes on."""

    def __init__(self, text, more):
        super().__init__(text)
        self.more = more


def fails_on(rank, error):
    """What raises on one rank."""
    if COMM.rank == rank:
        raise error
    return COMM.rank


def outcome(error, rank=LAST):
    """What is raised here where a rank raises ``error``."""
    with pytest.raises(BaseException) as caught:  # noqa: PT011
        collectively(COMM, "work", fails_on, rank, error)
    return caught.value


# kind of what is raised on the rank that fails, and on the others
KINDS = [
    (ZeroDivisionError("division"), SolverFailure, SolverFailure),
    (SolverFailure("no root"), SolverFailure, SolverFailure),
    (ConvergenceError("diverged"), SolverFailure, SolverFailure),
    (InputError("give another"), InputError, InputError),
    (KeyError("absent"), KeyError, RuntimeError),
    (MemoryError("none left"), MemoryError, RuntimeError),
    (PETSc.Error(86), PETSc.Error, RuntimeError),
    (SystemExit(3), SystemExit, SystemExit),
    (KeyboardInterrupt(), KeyboardInterrupt, KeyboardInterrupt),
]


@pytest.mark.parallel([1, 3])
@time_limit(30)
@pytest.mark.parametrize(("error", "here", "elsewhere"), KINDS, ids=lambda x: getattr(x, "__name__", repr(x)))
def test_one_rank_fails_so_all_raise(error, here, elsewhere):
    raised = outcome(error)
    assert type(raised) is (here if COMM.rank == LAST else elsewhere)
    if raised is not error and not (COMM.rank == LAST and here is type(error)):
        assert any(type(cause) is type(error) for cause in causes(raised.__cause__))
    if elsewhere is RuntimeError and COMM.rank != LAST:
        assert f"work, rank {LAST}: {type(error).__name__}" in str(raised)
        assert "in fails_on" in "".join(raised.__cause__.__notes__)  # where it was raised
    if isinstance(error, SystemExit):
        assert raised.code == 3


@pytest.mark.parallel([1, 3])
@time_limit(30)
def test_the_worst_failure_is_raised_and_nothing_waits():
    """A mistake on the last rank comes before a numerical failure on the first one."""
    failure = {0: FloatingPointError("nan"), LAST: TypeError("wrong")}.get(COMM.rank)
    with pytest.raises(TypeError if COMM.rank == LAST else RuntimeError, match="wrong"):
        raise_collectively(COMM, failure, "sum")
    assert collectively(COMM, "work", lambda: COMM.rank) == COMM.rank
    raise_collectively(COMM, None)


@pytest.mark.parallel([1, 3])
@time_limit(30)
def test_what_all_ranks_raise_stays_as_it_is():
    class Diverged(SolverFailure):
        pass

    with pytest.raises(Diverged, match=r"^the same$"):
        collectively(COMM, "work", fails_on, COMM.rank, Diverged("the same"))
    raised = outcome(Unpicklable("odd", 1))
    if COMM.rank != LAST:
        assert type(raised) is RuntimeError
        assert "Unpicklable: odd" in str(raised)


@pytest.mark.parallel([1, 3])
@time_limit(30)
def test_votes():
    assert any_rank(COMM, COMM.rank == LAST)
    assert not any_rank(COMM, False)
    assert all_ranks(COMM, True)
    assert all_ranks(COMM, COMM.rank == LAST) == (COMM.size == 1)


@pytest.mark.parallel(3)
@time_limit(30)
@pytest.mark.parametrize(
    ("given", "name"),
    [
        (lambda r: dict(a=1, max_it=3 + r), "max_it"),
        (lambda r: dict(a=1, rtol=1e-6 * (1 + r * 1e-15)), "rtol"),
        (lambda r: dict(a=1, **({"steps": 4} if r else {})), "steps"),
        (lambda r: dict(a=1, given={"mgrit": {"levels": 2, "relax": "FF"[: r + 1]}}), "mgrit relax"),
        (lambda r: dict(x=np.arange(3.0) + r * np.array([0, 0, 1e-9])), "x"),
        (lambda r: dict(checkpoint=None if r else Path("file.h5")), "checkpoint"),
        (lambda r: dict(f=np.sin if r else np.cos), "f"),
    ],
)
def test_what_differs_is_named(given, name):
    with pytest.raises(InputError, match=rf"^{name} is not the same on all ranks \(rank 0: "):
        require_same(COMM, **given(min(COMM.rank, 1)))


@pytest.mark.parallel(3)
@time_limit(30)
def test_what_is_the_same_passes():
    values = dict(a=1, b=[1.5, "x", None, (True,)], c={"y": np.arange(4), "x": 2}, f=np.sin, o=object(), p=Path("f"))
    require_same(COMM, **values)
    if COMM.rank == 1:  # names in another order
        values = dict(reversed(values.items())) | {"c": {"x": 2, "y": np.arange(4)}}
    require_same(COMM, **values)


def test_numerical_failures_are_told_from_mistakes():
    """The codes are those of petscsystypes.h: 71, 81 zero pivots, 72 floating point, 82, 91 not converged, 76 a
    library's; 55 memory, 56 not supported, 60-63 arguments, 73 state, 86 unknown type, 92 no such factorisation.
    """
    numerical = [PETSc.Error(code) for code in (71, 72, 76, 81, 82, 91)]
    numerical += [np.linalg.LinAlgError(), OverflowError(), ConvergenceError(), SolverFailure()]
    mistakes = [PETSc.Error(code) for code in (55, 56, 60, 61, 62, 63, 73, 75, 77, 86, 92, 95)]
    mistakes += [KeyError(), TypeError(), AttributeError(), IndexError(), NameError(), MemoryError(), ValueError("a")]
    mistakes += [RuntimeError("b"), InputError(), KeyboardInterrupt(), None]
    with pytest.raises(ValueError, match="math domain error") as caught:
        __import__("math").log(-1.0)
    assert all(map(is_numerical, [*numerical, caught.value]))
    assert not any(map(is_numerical, mistakes))

    class Mumps(PETSc.Error):
        info = -10  # singular

        def __str__(self):
            return f"error code 76: MUMPS error in numerical factorization: INFOG(1)={self.info}, INFO(2)=7"

    singular, memory = Mumps(76), Mumps(76)
    memory.info = -13
    assert is_numerical(singular)
    assert not is_numerical(memory)


LONELY = """
import sys, time
from mpi4py import MPI
from pint_fem.collective import ending_all_ranks
comm = MPI.COMM_WORLD
with ending_all_ranks(comm):
    if comm.rank == 1:
        {leave}
    comm.Barrier()
"""


def _run(command, seconds):
    root = Path(__file__).resolve().parent.parent
    given = dict(cwd=root, env=program_environment(), capture_output=True, text=True)
    return subprocess.run(command, timeout=seconds, check=False, **given)


@pytest.mark.starts_mpi
@pytest.mark.parametrize("leave", ["sys.exit(3)", "raise KeyboardInterrupt"])
def test_who_leaves_alone_ends_the_run(leave):
    """Without a word to the others, as no exchange is there."""
    command = ["mpiexec", "-n", "2", sys.executable, "-c", LONELY.format(leave=leave)]
    done = _run(command, 60 * patience())
    assert done.returncode != 0
    assert "rank 1 leaves, which ends the run" in done.stderr


INTERRUPTED = """
import os, signal, sys, threading, time
import pint_fem as pf
from mpi4py import MPI
from tests.test_reduced_functional import functional
comm = MPI.COMM_WORLD
rf = functional(pf.SpaceTime(), n=3, steps=8, rtol=1e-11)
count = []
def interrupt():
    time.sleep(float(sys.argv[2]))
    os.kill(os.getpid(), signal.SIGINT)
def after(kind, result):
    count.append(1)
    if len(count) == 12 and comm.rank == 1:
        threading.Thread(target=interrupt, daemon=True).start()
rf.problem.sweeps.on_sweep = after
while True:
    rf.minimize_trust_region(checkpoint=sys.argv[1], gtol_rel=1e-9, cg_max_it=2)
    rf.problem.invalidate()
    os.path.exists(sys.argv[1]) and comm.rank == 0 and os.unlink(sys.argv[1])
    rf(rf.function(rf.array(rf.controls[0].control) * 0))
    comm.Barrier()
"""


@pytest.mark.starts_mpi
def test_an_interrupt_of_one_rank_ends_all(tmp_path):
    """At any moment of a run that would not end, in Python or in a message."""
    command = ["mpiexec", "-n", "2", sys.executable, "-c", INTERRUPTED, str(tmp_path / "run.h5"), "0.013"]
    done = _run(command, 120 * patience())
    assert done.returncode not in (0, -signal.SIGKILL)
    assert "KeyboardInterrupt" in done.stderr
    assert "rank 1 is interrupted, which ends the run of all ranks" in done.stderr

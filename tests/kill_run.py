"""An inversion that kills itself: ``python -m tests.kill_run FILE METHOD KILLS...`` runs it with a checkpoint, each
time until the given number of sweeps and writes (``kill -9``), then to the end, and prints what it found as JSON.

Runs are forked from one process that has posed the problem. With several processes, which cannot be forked, a call is
one life: ``mpiexec -n 2 python -m tests.kill_run FILE METHOD [KILL]``; the last process kills itself, and mpiexec the
others. A life without KILL is followed by a run without a checkpoint, printed as ``whole``.
"""

import json
import os
import signal
import sys

import h5py
from mpi4py import MPI

import pint_fem as pf
from tests.test_reduced_functional import functional

METHODS = {
    "trust-region": lambda rf, path: rf.minimize_trust_region(gtol_rel=1e-9, cg_max_it=4, checkpoint=path, max_it=60),
    "inexact": lambda rf, path: rf.minimize_trust_region(
        gtol_rel=1e-9, cg_max_it=4, inexact=True, preconditioner="limited-memory", checkpoint=path, max_it=60
    ),
    "one-shot": lambda rf, path: rf.minimize_one_shot(gtol_rel=1e-7, checkpoint=path, max_it=200),
}


def run(rf, path, method: str, kill: int | None) -> dict:
    """Minimise; die at event ``kill``, an event being a sweep, or a half-written or complete new checkpoint."""
    events, comm = 0, rf.spacetime.comm

    def event(*_):
        nonlocal events
        events += 1
        if events == kill and comm.rank == comm.size - 1:
            os.kill(os.getpid(), signal.SIGKILL)

    rf.problem.sweeps.on_sweep = event
    create, replace = h5py.Group.create_dataset, os.replace

    def create_and_count(group, name, *args, **kwargs):
        if name.endswith("/L"):
            event()
        return create(group, name, *args, **kwargs)

    def replace_and_count(*args):
        event()
        replace(*args)
        event()

    h5py.Group.create_dataset, os.replace = create_and_count, replace_and_count
    result = METHODS[method](rf, path)
    return {
        "J": result.value.hex(),
        "x": [v.hex() for v in result.x.tolist()],
        "history": [str(r) for r in result.history],
        "reason": result.reason.value,
        "events": events,
    }


def main(path: str, method: str, kills: list[int]) -> None:
    """Fork, kill, and run to the end; or live once."""
    comm = MPI.COMM_WORLD
    make = lambda: functional(pf.SpaceTime((1, comm.size)), n=3, steps=16, rtol=1e-11)
    rf = make()
    if comm.size > 1:
        found = run(rf, path, method, kills[0] if kills else None)
        found["whole"] = run(make(), None, method, None)
        if comm.rank == 0:
            print(json.dumps(found), flush=True)
        return
    for kill in [*kills, None]:
        child = os.fork()
        if child == 0:
            try:  # a fork of an MPI process must not finalise MPI
                print(json.dumps(run(rf, path, method, kill)), flush=True)
                os._exit(0)
            finally:
                os._exit(1)
        _, status = os.waitpid(child, 0)
        died = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        if (kill is not None) != died or (kill is None and status):
            sys.exit(f"kill {kill}: status {status}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], [int(n) for n in sys.argv[3:]])

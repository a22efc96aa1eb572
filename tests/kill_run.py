"""An inversion that kills itself: ``python -m tests.kill_run FILE KILLS...`` runs it with a checkpoint, each time until
the given number of sweeps and writes (``kill -9``), then to the end, and prints what it found as JSON.

Runs are forked from one process that has posed the problem.
"""

import json
import os
import signal
import sys

import h5py
from mpi4py import MPI

import pint_fem as pf
from tests.test_reduced_functional import functional


def run(rf, path, kill: int | None) -> dict:
    """Minimise; die at event ``kill``, an event being a sweep, or a half-written or complete new checkpoint."""
    events = 0

    def event(*_):
        nonlocal events
        events += 1
        if events == kill:
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
    result = rf.minimize_trust_region(gtol_rel=1e-9, cg_max_it=4, checkpoint=path, max_it=60)
    return {
        "J": result.value.hex(),
        "x": [v.hex() for v in result.x.tolist()],
        "history": [[r.value, r.gradient_norm, r.cg_iterations] for r in result.history],
        "reason": result.reason.value,
        "events": events,
    }


def main(path: str, kills: list[int]) -> None:
    """Fork, kill, and run to the end."""
    rf = functional(pf.SpaceTime("1x1", comm=MPI.COMM_SELF), n=3, steps=16, rtol=1e-11)
    for kill in [*kills, None]:
        child = os.fork()
        if child == 0:
            try:  # a fork of an MPI process must not finalise MPI
                print(json.dumps(run(rf, path, kill)), flush=True)
                os._exit(0)
            finally:
                os._exit(1)
        _, status = os.waitpid(child, 0)
        died = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        if (kill is not None) != died or (kill is None and status):
            sys.exit(f"kill {kill}: status {status}")


if __name__ == "__main__":
    main(sys.argv[1], [int(n) for n in sys.argv[2:]])

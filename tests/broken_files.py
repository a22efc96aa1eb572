"""Files that cannot be written or are in use, for tests."""

import os
import resource
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

from mpi4py import MPI

COMM = MPI.COMM_WORLD
ROOT = Path(__file__).resolve().parent.parent


def shared(tmp_path) -> Path:
    return Path(COMM.bcast(str(tmp_path)))


@contextmanager
def largest_file(nbytes: int, rank: int):
    """No file of a rank's process may be larger: writing beyond fails as on a full disk, on that rank only."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if COMM.rank == rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


HOLDER = """
import sys
from pathlib import Path
from pint_fem.files import FileLock
lock = FileLock(Path(sys.argv[1]), "checkpoint")
lock.acquire()
print("held", flush=True)
sys.stdin.read()
"""


def another_process(path):
    """A process, started by the first rank, that holds the lock of a checkpoint, and its number on every rank."""
    holder = None
    if COMM.rank == 0:
        env = {k: v for k, v in os.environ.items() if not k.startswith(("OMPI_", "PMIX", "ORTE"))}
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], cwd=ROOT, env=env, **pipes)
        assert holder.stdout.readline() == b"held\n"
    return holder, COMM.bcast(holder and holder.pid)

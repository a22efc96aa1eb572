"""A record of which work and which message happened when, on which rank and level, in Chrome's trace format.

Open the file in ``chrome://tracing`` or https://ui.perfetto.dev: a process is a time rank, a thread is a level. With
no trace the solver pays one comparison with ``None`` for a propagator call or message.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from mpi4py import MPI

from pint_fem import files
from pint_fem.collective import collectively, on_first_rank

__all__ = ["Trace", "check_trace_file", "timed"]


def check_trace_file(path: str | Path, comm: MPI.Comm) -> None:
    """Check before a run that its trace can be written (collective).

    Raises
    ------
    InputError
        On every rank, where it cannot.
    """
    on_first_rank(comm, "", partial(files.require_output, path, "trace", makes_folder=True))


@contextmanager
def timed(trace: Trace | None, name: str, level: int, **args: Any) -> Iterator[None]:
    """Record what is done within as work, where there is a trace."""
    begin = trace.now() if trace else 0.0
    yield
    if trace:
        trace.work(name, level, begin, **args)


class Trace:
    """The events of one rank, for a file with those of all ranks.

    Parameters
    ----------
    comm
        Time communicator; the ranks' clocks start at the same time. Solvers on communicators of the same ranks in
        another order (adjoint sweeps) may share the trace.
    clock
        Returns seconds.
    """

    def __init__(self, comm: MPI.Comm, clock: Callable[[], float] = time.perf_counter):
        self.comm, self.events, self._clock = comm, [], clock
        comm.Barrier()
        self._start = clock()

    def now(self) -> float:
        """Microseconds since the start."""
        return 1e6 * (self._clock() - self._start)

    def work(self, name: str, level: int, begin: float, **args: Any) -> None:
        """Record some work that took from ``begin`` until now."""
        event = {"name": name, "cat": "work", "ph": "X", "ts": begin, "dur": self.now() - begin}
        self.events.append(event | {"pid": self.comm.rank, "tid": level, "args": args})

    def message(self, name: str, level: int, comm: MPI.Comm, peer: int, nbytes: int) -> None:
        """Record a message to or from rank ``peer`` of ``comm``."""
        if comm is not self.comm:
            peer = comm.group.Translate_ranks([peer], self.comm.group)[0]
        event = {"name": name, "cat": "message", "ph": "i", "s": "t", "ts": self.now()}
        self.events.append(event | {"pid": self.comm.rank, "tid": level, "args": {"peer": peer, "bytes": nbytes}})

    def mark(self, name: str, **args: Any) -> None:
        """Record a point in the algorithm, such as the end of a cycle."""
        event = {"name": name, "cat": "cycle", "ph": "i", "s": "p", "ts": self.now()}
        self.events.append(event | {"pid": self.comm.rank, "tid": 0, "args": args})

    def write(self, path: str | Path) -> None:
        """Write the events of all ranks to one JSON file (collective).

        Raises
        ------
        InputError
            On every rank, where it cannot be written.
        """
        parts = self.comm.gather(self.events)
        collectively(self.comm, "", self._write, Path(path), parts)

    def _write(self, path: Path, parts: list | None) -> None:
        if parts is None:
            return
        names = [
            {"name": "process_name", "ph": "M", "pid": r, "args": {"name": f"time rank {r}"}}
            for r in range(self.comm.size)
        ]
        used = sorted({(e["pid"], e["tid"]) for part in parts for e in part})
        names += [
            {"name": "thread_name", "ph": "M", "pid": r, "tid": level, "args": {"name": f"level {level}"}}
            for r, level in used
        ]
        events = sorted((e for part in parts for e in part), key=lambda e: e["ts"])
        with files.as_input_error(f"trace {path} cannot be written"):
            path.parent.mkdir(parents=True, exist_ok=True)
            files.write_whole(path, json.dumps({"traceEvents": names + events, "displayTimeUnit": "ms"}).encode())

"""Measured seconds of a problem's steps and of messages on the ranks of a run, all ranks at work at once.

Every rank measures its own group of ranks in space at the same time, so that what ranks share (memory bandwidth, cores)
slows the kernels as it does in a run. A time is that of the slowest rank, and the least of a few repeats.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from mpi4py import MPI

from pint_fem.collective import raise_collectively
from pint_fem.errors import FAILURES
from pint_fem.kernels.arrays import get
from pint_fem.kernels.lanes.structures import WIDTHS
from pint_fem.propagators.base import FEPropagator, StepData
from pint_fem.scaling.costs import Kernel
from pint_fem.scaling.network import Network

__all__ = ["control_values", "measured_network", "step_kernels", "timed", "update_seconds"]

REPEATS = 3
SHORT = 0.02
"""Seconds of an action below which all repeats are made; one repeat of a longer one is enough."""
NUMBERS = 2e6
"""Numbers, about, in the arrays of a call."""
LARGE = 1 << 20
"""Bytes of the message that bandwidth is measured with."""


def timed(comm: MPI.Comm, action: Callable[[], object]) -> float:
    """Seconds of an action that all ranks do, of the slowest one (collective).

    Raises
    ------
    SolverFailure, InputError, BaseException
        On every rank, what the action raises on any, by the rules of
        :func:`~pint_fem.collective.raise_collectively`.
    """
    comm.Barrier()
    failure, start = None, time.perf_counter()
    try:
        action()
    except FAILURES as error:
        failure = error
    seconds = time.perf_counter() - start
    raise_collectively(comm, failure, "measured steps")
    return float(comm.allreduce(seconds, op=MPI.MAX))


def _least(comm: MPI.Comm, action: Callable[[], object]) -> float:
    """The least of some repeats, or the time of a long action, after one that compiles code and fills the caches."""
    timed(comm, action)
    found = timed(comm, action)
    return min([found] + [timed(comm, action) for _ in range(REPEATS - 1 if found < SHORT else 0)])


def control_values(propagator: FEPropagator) -> np.ndarray | None:
    """The present values of a step's controls, ``(nz,)``."""
    own = [get(control) for control in propagator.evolution.parameters]
    return np.concatenate(own) if own else None


def update_seconds(comm: MPI.Comm, propagator: FEPropagator) -> float:
    """Set the present control, and measure the assembly and factorisation of a new one where operators depend on it
    (collective).
    """
    z = control_values(propagator)
    timed(comm, lambda: propagator.update(z))
    if z is None or propagator.is_affine or not propagator.is_linear:
        return 0.0
    seconds = timed(comm, lambda: propagator.update(z * (1 + 1e-7) + 1e-9))
    timed(comm, lambda: propagator.update(z))
    return seconds


def _block_actions(propagator, size: int, seconds: float = SHORT) -> tuple[dict[str, Callable[[], object]], int]:
    """Steps and transposed steps of ``size`` states, and their number in a call, where one takes some ``seconds``."""
    n = propagator.evolution.V.dim() / propagator.evolution.V.mesh().comm.size  # the same on all ranks
    steps = int(np.clip(min(NUMBERS / max(1, n * size), SHORT / max(seconds, 1e-9)), 1, 8))
    n = propagator.evolution.state_size
    u = np.random.default_rng(0).standard_normal((size, n))
    out, added = np.empty((size, steps, n)), np.zeros((size, steps, n))
    made = lambda transposed: lambda: propagator.advance(u, out, added, transposed=transposed)
    return {"step": made(False), "adjoint": made(True)}, steps


def _single_actions(propagator: FEPropagator) -> dict[str, Callable[[], object]]:
    """A step of one state from the initial condition, and its transpose with a new linearisation."""
    ev, z = propagator.evolution, control_values(propagator)
    u = get(ev.initial)[None]
    out, lam, t = np.empty_like(u), np.ones_like(u), np.array([ev.t0])

    def adjoint() -> None:
        linearisations = propagator.step_linearisations(1, repeated=False)
        propagator.adjoint(StepData(t, z, u, linearisations=linearisations), lam, out)

    return {"step": lambda: propagator.step(StepData(t, z), u, out), "adjoint": adjoint}


def step_kernels(
    comm: MPI.Comm,
    propagator: FEPropagator,
    *,
    sizes: Sequence[int] = WIDTHS[np.dtype(np.float64)],
    most: float = 5.0,
) -> dict[str, list[Kernel]]:
    """Kernels of a step and of its transpose by the number of states (collective).

    Parameters
    ----------
    comm
        All ranks of the run, each of which has its part of the propagator of its group in space.
    propagator
        Of the finest level, with its control set.
    sizes
        Numbers of states per call; blocks for steps of evolutions that are linear in the state only.
    most
        Seconds after which no larger blocks are measured. Nor are they where a block takes as long per state as one
        state alone.

    Raises
    ------
    SolverFailure, InputError, BaseException
        As :func:`timed`.
    """
    if not (propagator.is_linear and hasattr(propagator, "advance")):
        seconds = {kind: _least(comm, do) for kind, do in _single_actions(propagator).items()}
        return {kind: [Kernel.constant(each)] for kind, each in seconds.items()}
    actions, _ = _block_actions(propagator, 1)
    start, last, found = time.perf_counter(), 1, {"step": {}, "adjoint": {}}
    single = [timed(comm, actions["step"]) for _ in range(2)][1]  # the first one compiles code
    for size in _sizes(sizes):
        spent = comm.bcast(time.perf_counter() - start)
        if size > 1 and spent + 4 * size / last * (found["step"][last] + found["adjoint"][last]) > most:
            break  # at most two calls of each kind, without a gain by the block
        actions, steps = _block_actions(propagator, size, size * single)
        for kind, action in actions.items():
            found[kind][size] = _least(comm, action) / steps
        single, last = found["step"][1], size
        if size > 1 and found["step"][size] > 0.9 * size * single:
            break
    return {kind: [Kernel(tuple(table), tuple(table.values()), lanes=True)] for kind, table in found.items()}


def _sizes(sizes: Iterable[int]) -> list[int]:
    return sorted({1, *sizes})


def measured_network(comm: MPI.Comm) -> Network:
    """Latency and bandwidth between the first and the last rank, which are on different nodes where there are several:
    half the least round trip of 8 bytes, and of a megabyte (collective).
    """
    ends, found = (0, comm.size - 1), {}
    for nbytes, repeats in ((8, 30), (LARGE, 6)):
        buffer, least = np.zeros(nbytes // 8), np.inf
        comm.Barrier()
        for _ in range(repeats if comm.rank in ends and comm.size > 1 else 0):
            start = time.perf_counter()
            for sender, receiver in (ends, ends[::-1]):
                if comm.rank == sender:
                    comm.Send(buffer, receiver, 1)
                else:
                    comm.Recv(buffer, sender, 1)
            least = min(least, (time.perf_counter() - start) / 2)
        found[nbytes] = comm.bcast(least)
    latency = found[8]
    if not np.isfinite(latency):
        return Network(1e-6, 1e10, "assumed")
    return Network(latency, LARGE / max(found[LARGE] - latency, 1e-9), "measured: round trips here")

"""A training step of a deep residual network, layers on two ranks, beside plain serial torch on the same two cores.

``mpiexec -n 2 python -m tests.benchmarks.layers --out FILE.json`` measures on the ranks it is given; ``make bench``
calls that. Width 8, batch 200, tanh, float64; a step is forward, backward and update (SGD). The opponent is the fastest
of plain loops over one stacked parameter on one and on two threads, measured on the first rank alone in turn with the
parallel steps. Its gradient is what the error of ours is relative to; sweeps start cold.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from mpi4py import MPI

from pint_fem.resnet import Grid, LayerParallelResNet, SerialResNet
from problems.layers import ACCURATE, SETTINGS, Training, parts
from tests.benchmarks.rows import row

__all__ = ["rows"]

DEPTH, TARGET = 1024, 1.5
ITERATIONS = (1, 1), (2, 1), (2, 2), (4, 4)
#: The row with the target.
ACCEPTED = (DEPTH, (2, 1), ACCURATE)
CASES = (*((depth, its, SETTINGS) for depth in (64, 256, DEPTH, 4096) for its in ITERATIONS), ACCEPTED)


def best(comm, *actions, repeats: int) -> list[float]:
    """Least seconds of actions that take turns; ``(action, threads, alone)``."""
    seconds = [[] for _ in actions]
    for repeat in range(repeats + 2):
        for (action, threads, alone), out in zip(actions, seconds, strict=True):
            comm.Barrier()
            torch.set_num_threads(threads)
            start = time.perf_counter()
            if comm.rank == 0 or not alone:
                action()
            comm.Barrier()
            if repeat > 1:
                out.append(time.perf_counter() - start)
    torch.set_num_threads(1)
    return [min(out) for out in seconds]


def gradient_error(comm, net, exact: list[np.ndarray]) -> float:
    """Of all layers' parameters, relative, in the Euclidean norm."""
    names = list(net.theta)
    wrong = sum(
        float(((net.theta[n].grad.numpy() - e[net.lo : net.hi]) ** 2).sum()) for n, e in zip(names, exact, strict=True)
    )
    return float(np.sqrt(comm.allreduce(wrong)) / np.sqrt(sum((e**2).sum() for e in exact)))


def rows(repeats: int, *, cases=CASES, comm=MPI.COMM_WORLD) -> list[dict]:
    """Ratios on the ranks of ``comm``, as dictionaries of :class:`Row` (of the first rank), for cases of layers,
    iterations and options.
    """
    torch.set_num_threads(1)
    out, grid = [], Grid(comm=comm)
    for depth, its, options in cases:
        opening, layer, closing, x, y = parts()
        serial = Training(SerialResNet(opening, layer, depth, closing, dtype=torch.float64), x, y)
        if comm.rank == 0:
            serial.gradients()  # of the first parameters, as ours: measurements update them
        exact = [comm.bcast(p.grad.numpy().copy() if comm.rank == 0 else None) for p in serial.net.theta.values()]
        given = dict(grid=grid, dtype=torch.float64, mgrit=options)
        net = LayerParallelResNet(
            opening, layer, depth, closing, forward_iterations=its[0], backward_iterations=its[1], **given
        )
        ours = Training(net, x, y)
        ours.gradients()
        error = gradient_error(comm, net, exact)
        few = max(2, repeats * 1024 // depth) if depth > 1024 else repeats
        actions = [(ours.step, 1, False), (serial.step, 1, True)]
        if os.cpu_count() > 1 and comm.size > 1:
            actions.append((serial.step, 2, True))
        parallel, *theirs = best(comm, *actions, repeats=few)
        threads = 1 + int(np.argmin(theirs))
        note = f"gradient error {error:.1e}; torch's best on {threads} thread{'s' * (threads > 1)}"
        what = f"{depth} layers, m = {options['coarsening']}, {its[0]} + {its[1]} iterations on {comm.size} ranks"
        target = TARGET if (depth, its, options) == ACCEPTED and comm.size == 2 else None
        what += ": serial torch / layer-parallel"
        out.append(vars(row("l", what, parallel, min(theirs), depth, target, False, note)))
    return out


def main(argv: list[str] | None = None) -> int:
    """Measure on the ranks given and write JSON."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.layers")
    parser.add_argument("--out", type=Path, help="JSON file (default: print)")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--quick", action="store_true", help="the row with the target only")
    args = parser.parse_args(argv)
    result = rows(args.repeats, cases=(ACCEPTED,) if args.quick else CASES)
    if MPI.COMM_WORLD.rank == 0:
        if args.out:
            args.out.write_text(json.dumps(result, indent=1))
        else:
            for r in result:
                times = f"{r['ours'] * 1e3:.1f} and {r['theirs'] * 1e3:.1f} us a layer"
                print(f"{r['what']}: {r['ratio']:.2f}; {times}; {r['note']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

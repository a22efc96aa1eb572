"""A training step of a deep residual network, layers on two ranks, beside plain serial torch on the same two cores.

``mpiexec -n 2 python -m tests.benchmarks.layers --out FILE.json`` measures on the ranks it is given; ``make bench``
calls that. Width 8, batch 200, tanh, float64 and float32; a step is forward, backward and update (SGD). The serial
baseline is the fastest of eager torch, a stacked loop and compiled chunks of layers
(:mod:`problems.serial_networks`), on one thread and on as many as there are ranks, measured on the first rank alone,
while the others sleep, in turn with the parallel steps. Its gradient is what the error of ours is relative to; sweeps
start cold.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from mpi4py import MPI

from pint_fem.cli import wait_quietly
from pint_fem.collective import raise_collectively
from pint_fem.resnet import Grid, LayerParallelResNet, SerialResNet
from problems.layers import ACCURATE, SETTINGS, Training, parts
from problems.serial_networks import Fastest, fastest, forms
from tests.benchmarks.rows import row

__all__ = ["rows"]

DEPTH, TARGET = 1024, 1.5
ITERATIONS = (1, 1), (2, 1), (2, 2)
DTYPES = {"float64": torch.float64, "float32": torch.float32}
#: The row with the target.
ACCEPTED = (DEPTH, "float64", (((1, 1), SETTINGS),))
EVERY = tuple((its, SETTINGS) for its in ITERATIONS)
CASES = tuple(
    (depth, dtype, (*EVERY, *((((1, 1), ACCURATE),) if depth == DEPTH else ())))
    for dtype in DTYPES
    for depth in (DEPTH, 4096, 256, 64)
)
"""Layers, type, and the iterations and options that are measured in turn with one baseline."""


def best(comm, actions: dict[object, tuple[Callable, int, bool]], repeats: int) -> dict[object, float]:
    """Least seconds of actions that take turns; ``(action, threads, alone)`` by any key.

    An action that is ``alone`` runs on the first rank, while the others sleep: a rank that waits in MPI would take a
    core from it.
    """
    seconds: dict = {key: [] for key in actions}
    for repeat in range(repeats + 2):
        for key, (action, threads, alone) in actions.items():
            comm.Barrier()
            torch.set_num_threads(threads)
            start = time.perf_counter()
            if comm.rank == 0 or not alone:
                action()
            if not alone:
                comm.Barrier()
            if repeat > 1:
                seconds[key].append(time.perf_counter() - start)
            if alone:
                wait_quietly(comm)
    torch.set_num_threads(1)
    return {key: min(taken) for key, taken in seconds.items()}


def gradient_error(comm, net, exact: list[np.ndarray]) -> float:
    """Of all layers' parameters, relative, in the Euclidean norm."""
    names = list(net.theta)
    wrong = sum(
        float(((net.theta[n].grad.double().numpy() - e[net.lo : net.hi]) ** 2).sum())
        for n, e in zip(names, exact, strict=True)
    )
    return float(np.sqrt(comm.allreduce(wrong)) / np.sqrt(sum((e**2).sum() for e in exact)))


def _baseline(comm, serial: SerialResNet, data, threads: tuple[int, ...]) -> Fastest:
    """The forms of a serial network, whose gradients agree, on the first rank alone; no times yet."""
    found, failure = Fastest(), None
    if comm.rank == 0:
        try:
            found = fastest(forms(serial), lambda net: Training(net, *data), threads=threads, repeats=0)
        except Exception as error:
            failure = error
    wait_quietly(comm)
    raise_collectively(comm, failure, "serial baseline")
    return found


def rows(repeats: int, *, cases=CASES, comm=MPI.COMM_WORLD, report: Callable[[dict], None] | None = None) -> list[dict]:
    """Ratios on the ranks of ``comm``, as dictionaries of :class:`Row` (of the first rank), for cases of layers, type,
    and iterations with options; each is also passed to ``report`` as soon as it is measured.
    """
    torch.set_num_threads(1)
    out, grid = [], Grid(comm=comm)
    threads = (1, comm.size) if comm.size > 1 and os.cpu_count() > 1 else (1,)
    for depth, type_name, settings in cases:
        dtype = DTYPES[type_name]
        opening, layer, closing, x, y = parts()
        data = x.to(dtype), y
        exactly = Training(SerialResNet(opening, layer, depth, closing, dtype=torch.float64), x, y)
        exactly.gradients()  # of the first parameters, as ours: measurements update them
        exact = [p.grad.numpy() for p in exactly.net.theta.values()]
        baseline = _baseline(comm, SerialResNet(opening, layer, depth, closing, dtype=dtype), data, threads)
        ours, errors = [], []
        for its, options in settings:
            given = dict(grid=grid, dtype=dtype, mgrit=options)
            net = LayerParallelResNet(
                opening, layer, depth, closing, forward_iterations=its[0], backward_iterations=its[1], **given
            )
            ours.append(Training(net, *data))
            ours[-1].gradients()
            errors.append(gradient_error(comm, net, exact))
        names = comm.bcast(list(baseline.trainings))
        actions = {i: (training.step, 1, False) for i, training in enumerate(ours)}
        for name in names:
            step = baseline.trainings[name].step if comm.rank == 0 else None
            actions |= {(name, count): (step, count, True) for count in threads}
        seconds = best(comm, actions, max(2, repeats * 1024 // depth) if depth > 1024 else repeats)
        theirs = {key: s for key, s in seconds.items() if isinstance(key, tuple)}
        fast = min(theirs, key=theirs.get)
        others = "; ".join(f"{name} on {count} {1e6 * s / depth:.1f}" for (name, count), s in theirs.items())
        for i, (its, options) in enumerate(settings):
            note = f"gradient error {errors[i]:.1e}; fastest serial: {fast[0]} on {fast[1]} (us a layer: {others}"
            note += "".join(f"; {name}: {reason}" for name, reason in baseline.failed.items()) + ")"
            what = f"{depth} layers, {type_name}, m = {options['coarsening']}, {its[0]} + {its[1]} iterations"
            what += f" on {comm.size} ranks: serial torch / layer-parallel"
            accepted = (depth, type_name, its, options) == (*ACCEPTED[:2], *ACCEPTED[2][0])
            target = TARGET if accepted and comm.size == 2 else None
            out.append(vars(row("l", what, seconds[i], theirs[fast], depth, target, False, note)))
            if report is not None:
                report(out[-1])
    return out


def main(argv: list[str] | None = None) -> int:
    """Measure on the ranks given and write JSON."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.layers")
    parser.add_argument("--out", type=Path, help="JSON file (default: print)")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--quick", action="store_true", help="the row with the target only")
    args = parser.parse_args(argv)
    root = MPI.COMM_WORLD.rank == 0
    prints = root and not args.out
    result = rows(args.repeats, cases=(ACCEPTED,) if args.quick else CASES, report=_print if prints else None)
    if root and args.out:
        args.out.write_text(json.dumps(result, indent=1))
    return 0


def _print(r: dict) -> None:
    times = f"{r['ours'] * 1e3:.1f} and {r['theirs'] * 1e3:.1f} us a layer"
    print(f"{r['what']}: {r['ratio']:.2f}; {times}; {r['note']}", flush=True)


if __name__ == "__main__":
    sys.exit(main())

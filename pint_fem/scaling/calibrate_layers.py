"""Measure what a training step of a residual network costs: its layers' kernels, what is around them, serial torch."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from mpi4py import MPI

from pint_fem.cli import wait_quietly
from pint_fem.resnet import Grid, LayerParallelResNet, SerialResNet
from pint_fem.scaling.calibrate import best, ping_pong
from pint_fem.scaling.costs import Calibration, Kernel
from pint_fem.scaling.layers import predict_training
from pint_fem.scaling.validation import Comparison, median_seconds

__all__ = ["calibrate_layers", "compare_layers", "count_errors"]

ITERATIONS = (2, 1)
STRIDE = 8


def _net(case, nlayers: int, options: Mapping, comm, iterations=ITERATIONS):
    opening, layer, closing, x, y = case.parts()
    net = LayerParallelResNet(
        opening, layer, nlayers, closing, grid=Grid(comm=comm), mgrit=options, dtype=x.dtype,
        forward_iterations=iterations[0], backward_iterations=iterations[1],
    )  # fmt: skip
    return case.training(net, x, y)


def _serial(case, nlayers: int):
    opening, layer, closing, x, y = case.parts()
    return case.training(SerialResNet(opening, layer, nlayers, closing, dtype=x.dtype), x, y)


def _block(level, U: np.ndarray, repeats: int, stride: int) -> Kernel:
    """Time of a level's step on every ``stride``-th of its layers."""
    sizes = [n for n in (1, 2, 4, 8, 16, 32, 64) if n * stride < len(U)]
    lo, seconds = level.lo, []
    for n in sizes:
        places = range(min(stride - 1, 6))
        steps = [range(lo + j, lo + j + (n - 1) * stride + 1, stride) for j in places] or [range(lo, lo + n)]

        def run(steps=steps):
            for s in steps:
                rows = slice(s.start - lo, s.stop - lo, stride)
                level.phi(s, U[rows], U[slice(rows.start + 1, rows.stop + 1, stride)])

        seconds.append(best(run, repeats) / len(steps))
    return Kernel(tuple(sizes), tuple(np.maximum.accumulate(seconds).tolist()))


def _kernels(case, nlayers: int, repeats: int) -> tuple[dict[str, list[Kernel]], tuple[int, ...]]:
    training = _net(case, nlayers, {"levels": 2, "coarsening": STRIDE, "relax": "F"}, MPI.COMM_SELF)
    training.gradients()  # binds parameters and slopes
    sweeps = training.net.sweeps
    room = sweeps._pool[0]
    shape, work = room.U.shape[1:], {}
    values = np.random.default_rng(0).standard_normal((nlayers + 1, *shape))
    for kind, name in (("step", "forward"), ("adjoint", "backward")):
        fine, coarse = sweeps.solvers[name].levels
        U, few = values[:: -1 if name == "backward" else 1], values[: coarse.k + 1].copy()
        work[kind] = [_block(fine, U, repeats, STRIDE), _block(coarse, few, repeats, 2)]
        seconds = best(lambda coarse=coarse, few=few: coarse.sweep_steps(range(coarse.k), few, None), repeats)
        work["sweep" if kind == "step" else "adjoint sweep"] = [Kernel.constant(seconds / coarse.k)]
    sizes, seconds, layer = [n for n in (1, 8, 32) if n <= nlayers], [], training.net.layer
    L = torch.from_numpy(values)
    for n in sizes:

        def pull(n=n):
            for g in layer.gradients(room.slopes[:n] * L[:n], torch.from_numpy(room.U[:n])):
                g *= 0.5

        seconds.append(best(pull, repeats))
    work["gradients"] = [Kernel(tuple(sizes), tuple(seconds))]
    return work, shape


def _serial_seconds(case, nlayers: int, repeats: int) -> tuple[float, int]:
    """A step of serial torch on the number of threads, one or two, that is faster."""
    training, found = _serial(case, nlayers), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(best(training.step, repeats))
    torch.set_num_threads(1)
    return min(found), 1 + int(np.argmin(found))


def calibrate_layers(
    name: str, case, *, comm=MPI.COMM_WORLD, repeats: int = 9, progress: Callable[[str], None] = lambda text: None
) -> Calibration | None:
    """Measure a network (collective); arguments as of :func:`~pint_fem.scaling.calibrate.calibrate`.

    What a real step on one process takes beside its kernels is fitted at two depths: a part a layer stepped and a part
    a training step.
    """
    torch.set_num_threads(1)
    made, N = None, case.nlayers
    if comm.rank == 0:
        progress("kernels on one process")
        work, shape = _kernels(case, 1024, repeats)
        parameters = sum(int(np.prod(s)) for s in case.parts()[1].shapes.values())
        made = Calibration(
            name, platform.processor() or platform.machine(), int(np.prod(shape)), N, {1: work},
            control_bytes=8.0 * parameters, kind="layers",
        )  # fmt: skip
        progress("whole training steps")
        options, rest = {"levels": 2, "coarsening": 32, "relax": "F"}, []
        for depth in (128, 1024):
            said = predict_training(made, options, 1, iterations=ITERATIONS, nlayers=depth)
            stepped = sum(n for (kind, _), n in said.counts.items() if kind in ("step", "adjoint"))
            seconds = best(_net(case, depth, options, MPI.COMM_SELF).step, repeats)
            rest.append((stepped, seconds - said.seconds))
        (few, short), (many, long) = rest
        each = max((long - short) / (many - few), 0.0)
        made = made.with_changes(
            bookkeeping={"state": each, "adjoint": each}, extras={"around": max(short - few * each, 0.0)}
        )
        progress("serial torch")
        step, threads = _serial_seconds(case, N, repeats)
        notes = [f"kernels: least of {repeats}, one process at work", f"serial torch: on {threads} threads"]
        made = made.with_changes(opponent={"step": step, "threads": threads}, notes=notes)
    wait_quietly(comm)
    if comm.size > 1:
        progress("all processes at once, network")
        together, _ = _kernels(case, 1024, repeats)
        slower = comm.gather(together["step"][0].seconds)
        network = ping_pong(comm)
        if comm.rank == 0:
            alone = made.work[1]["step"][0].seconds
            ratio = min(max(s[i] for s in slower) / alone[i] for i in range(len(alone)))
            made = made.with_changes(busy={1: 1.0, comm.size: max(ratio, 1.0)}, network=network)
    return made


def count_errors(case, menu: Sequence[Mapping], iterations: Sequence[tuple[int, int]] = (ITERATIONS,)) -> list[dict]:
    """Relative errors of the gradient of a cold training step, by real runs on one process: they do not depend on the
    number of ranks.
    """
    exact, out = _serial(case, case.nlayers), []
    exact.gradients()
    wanted = [p.grad.numpy() for p in exact.net.theta.values()]
    size = np.sqrt(sum((g**2).sum() for g in wanted))
    for options in menu:
        for its in iterations:
            ours = _net(case, case.nlayers, options, MPI.COMM_SELF, its)
            ours.gradients()
            wrong = sum(((p.grad.numpy() - g) ** 2).sum() for p, g in zip(ours.net.theta.values(), wanted, strict=True))
            out.append({"options": dict(options), "iterations": list(its), "gradient error": float(wrong**0.5 / size)})
    return out


def compare_layers(
    calibration: Calibration, case, *, comm=MPI.COMM_WORLD, repeats: int = 9, nlayers: int | None = None
) -> list[Comparison]:
    """A training step on all ranks, measured (median) and predicted (collective)."""
    torch.set_num_threads(1)
    nlayers = nlayers or case.nlayers
    seconds = median_seconds(_net(case, nlayers, case.solver, comm).step, comm, repeats)
    said = predict_training(calibration, case.solver, comm.size, iterations=ITERATIONS, nlayers=nlayers)
    return [Comparison("training step", comm.size, nlayers, ITERATIONS, seconds, said.seconds)]

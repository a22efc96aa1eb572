"""Measure what a training step of a residual network costs: its layers' kernels, what is around them, serial torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import cycle

import numpy as np
import torch
from mpi4py import MPI
from scipy.optimize import nnls

from pint_fem.cli import wait_quietly
from pint_fem.mgrit.options import MGRITOptions
from pint_fem.resnet.grid import Grid
from pint_fem.resnet.network import LayerParallelResNet
from pint_fem.resnet.serial import SerialResNet
from pint_fem.scaling.actions import Action
from pint_fem.scaling.calibrate import Stopwatch, kernel_tables, machine, measure_all_processes
from pint_fem.scaling.timing import rounds
from pint_fem.scaling.validation import Comparison
from problems.serial_networks import fastest, forms
from tests.benchmarks.scaling.layer_model import SWEEPS, predict_training
from tests.benchmarks.scaling.records import Record

__all__ = ["calibrate_layers", "compare_layers", "count_errors"]

ITERATIONS = (2, 1)
STRIDE = 8
SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
WHOLE = [(share, {"levels": 2, "coarsening": m, "relax": "F"}) for share, m in ((8, 32), (8, 8), (1, 8), (1, 64))]
"""Whole training steps on one process: a share of the layers, and options with few and many calls, with few and many
layers in each."""


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


def _block(level, U: np.ndarray, stride: int) -> dict[int, Action]:
    """A level's step on every ``stride``-th of its layers, by their number: each time at other places."""
    count = len(U) - 1

    def action(size: int) -> Callable[[], None]:
        span = (size - 1) * stride + 1
        starts = cycle(range(0, count - span - stride + 2, span + stride - 1))

        def run():
            first = next(starts)
            for row in range(first, first + stride - 1):
                source = slice(row, row + span, stride)
                steps = range(level.lo + row, level.lo + row + span, stride)
                level.phi(steps, U[source], U[slice(row + 1, row + 1 + span, stride)])

        return run

    return {n: (action(n), stride - 1) for n in SIZES if n * stride <= count}


def _kernel_actions(case, nlayers: int) -> tuple[dict[tuple, Action], tuple[int, ...]]:
    """Kernels by kind, level and size; and a state's shape. All layers are there: what is larger than the caches costs
    more.
    """
    training = _net(case, nlayers, {"levels": 2, "coarsening": STRIDE, "relax": "F"}, MPI.COMM_SELF)
    training.gradients()  # binds parameters and slopes
    sweeps, out = training.net.sweeps, {}
    opening, *_, x, _ = case.parts()
    with torch.no_grad():
        shape = tuple(opening.to(x.dtype)(x).shape)
    forward = sweeps.trajectory(shape, np.float64)  # that of the training step, in memory that is used again
    values = np.random.default_rng(0).standard_normal((nlayers + 1, *shape))
    for kind, name in (("step", "forward"), ("adjoint", "backward")):
        fine, coarse = sweeps.solvers[name].levels
        few = values[: coarse.k + 1].copy()
        for level, U, stride in ((fine, values[:: -1 if name == "backward" else 1], STRIDE), (coarse, few, 2)):
            out |= {(kind, level.index, n): do for n, do in _block(level, U, stride).items()}
        out[SWEEPS[kind], 0, 1] = partial(coarse.sweep_steps, range(coarse.k), few, None), coarse.k
    layer, L = training.net.layer, torch.from_numpy(values)

    def pull(n: int) -> Callable[[], None]:
        starts = cycle(range(0, nlayers - n + 1, n))

        def run():
            rows = slice(first := next(starts), first + n)
            for g in layer.gradients(forward.slopes[rows] * L[rows], torch.from_numpy(forward.U[rows])):
                g *= 0.5

        return run

    return out | {("gradients", 0, n): (pull(n), 1) for n in (1, 8, 32)}, shape


def serial_seconds(case, repeats: int = 9) -> dict[str, float | str]:
    """A step of serial torch in the form (:mod:`problems.serial_networks`) and on the number of threads, one or two,
    that are fastest.
    """
    opening, layer, closing, x, y = case.parts()
    made = forms(SerialResNet(opening, layer, case.nlayers, closing, dtype=x.dtype))
    trainings, found = fastest(made, lambda net: case.training(net, x, y), threads=(1, 2), repeats=0).trainings, {}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        steps = {form: training.step for form, training in trainings.items()}
        found |= {(form, threads): taken.seconds for form, taken in rounds(steps, repeats).items()}
    torch.set_num_threads(1)
    form, threads = min(found, key=found.get)
    return {"step": found[form, threads], "threads": threads, "form": form}


def calibrate_layers(
    name: str, case, *, comm=MPI.COMM_WORLD, repeats: int = 15, progress: Callable[[str], None] = lambda text: None
) -> Record | None:
    """Measure a network (collective); arguments as for :func:`~pint_fem.scaling.calibrate.calibrate`.

    What real steps on one process take beside their kernels is fitted (:data:`WHOLE`): a part for each call, each layer
    stepped and each training step.
    """
    torch.set_num_threads(1)
    made, watch = None, Stopwatch(repeats)
    if comm.rank == 0:
        progress("kernels and whole training steps on one process")
        actions, shape = _kernel_actions(case, case.nlayers)
        nets = {
            ("whole", place): (_net(case, case.nlayers // part, o, MPI.COMM_SELF).step, 1)
            for place, (part, o) in enumerate(WHOLE)
        }
        seconds = watch(actions | nets)
        parameters = sum(int(np.prod(s)) for s in case.parts()[1].shapes.values())
        made = Record(
            name, machine(), int(np.prod(shape)), case.nlayers,
            {1: kernel_tables(_increasing({key: seconds[key] for key in actions}), lanes=False)},
            control_bytes=8.0 * parameters, kind="layers",
        )  # fmt: skip
        made = _with_rest(made, [seconds[key] for key in nets])
        made = made.with_changes(notes=[f"{watch.about}, one process at work"])
    wait_quietly(comm)
    if comm.size > 1:
        progress("all processes at once, network")
        actions, _ = _kernel_actions(case, case.nlayers)
        made = measure_all_processes(made, {key: do for key, do in actions.items() if key[1] == 0}, watch, comm)
    return made


def _increasing(seconds: Mapping[tuple, float]) -> dict[tuple, float]:
    """Seconds by kind, level and size, of which those of more layers are never less."""
    most = lambda kind, level, n: max(s for (k, i, m), s in seconds.items() if (k, i) == (kind, level) and m <= n)
    return {key: most(*key) for key in seconds}


def _with_rest(made: Record, seconds: Sequence[float]) -> Record:
    """What the steps :data:`WHOLE` take beside kernels, by the least relative error of the whole."""
    rows, rest = [], []
    for (share, options), measured in zip(WHOLE, seconds, strict=True):
        said = predict_training(made, options, 1, iterations=ITERATIONS, nlayers=made.nsteps // share)
        layers = sum(n for (kind, _), n in said.counts.items() if kind in ("step", "adjoint"))
        calls = sum(n for (kind, _), n in said.counts.items() if kind == "calls")
        rows.append(np.array([calls, layers, 1.0]) / measured)
        rest.append(1 - said.seconds / measured)
    (call, each, around), _ = nnls(np.array(rows), np.array(rest))
    return made.with_changes(overhead={"state": each, "adjoint": each, "call": call}, extras={"around": around})


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
            out.append({"options": dict(options), "iterations": list(its), "error": float(wrong**0.5 / size)})
    return out


def compare_layers(
    calibration: Record, case, *, comm=MPI.COMM_WORLD, repeats: int = 9, nlayers: int | None = None
) -> list[Comparison]:
    """A training step on all ranks, measured (median) and predicted (collective)."""
    torch.set_num_threads(1)
    nlayers = nlayers or case.nlayers
    mine = max(nlayers // comm.size, 2 * STRIDE)
    some, _ = _kernel_actions(case, mine)
    # relaxation steps all intervals of a rank at once; gradients are pulled in groups
    intervals = max(mine // MGRITOptions.make(case.solver).factors(nlayers)[0], 1)
    size = {kind: max(key[2] for key in some if key[0] == kind and key[2] <= intervals) for kind in SWEEPS}
    size["gradients"] = max(key[2] for key in some if key[0] == "gradients")
    actions = {key: do for key, do in some.items() if key[1] == 0 and key[2] == size.get(key[0])}
    step = _net(case, nlayers, case.solver, comm).step
    found = rounds({"training step": step} | {key: do for key, (do, _) in actions.items()}, repeats, comm=comm)
    said = predict_training(calibration, case.solver, comm.size, iterations=ITERATIONS, nlayers=nlayers)
    stepped = {"gradients": nlayers} | {
        kind: sum(n for (what, _), n in said.counts.items() if what == kind) for kind in SWEEPS
    }
    known, slowdown = {}, calibration.slowdown_with(comm.size)
    for (kind, level, n), (_, times) in actions.items():
        seconds = calibration.kernels[1][kind][0](n)
        known[kind, level, n] = slowdown * seconds * times, stepped[kind] * seconds / n
    return [Comparison.of("training step", comm.size, nlayers, ITERATIONS, found, known, said.seconds)]

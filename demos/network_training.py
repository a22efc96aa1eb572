"""Training of the demos' networks: epochs with checkpoints, the serial copy beside it, networks that grow in depth."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from mpi4py import MPI

from demos.training_loop import Epoch, accuracy, train_epoch
from pint_fem.cli import say, wait_quietly, waiting
from pint_fem.errors import InputError
from pint_fem.resnet import Grid, Regularisation, load_checkpoint, refine, reserve_checkpoint, save_checkpoint
from problems.classification import shared_loader
from problems.serial_networks import fastest_for_training

__all__ = ["Task", "learning_rate", "on_root", "train", "train_in_levels"]


@dataclass
class Task:
    """What is trained, and on what.

    Attributes
    ----------
    parallel : Callable
        ``parallel(depth)`` is the layer-parallel network on the process grid (collective).
    serial : Callable
        ``serial(depth)`` is the same network in plain torch, with the same first parameters.
    data, test : Dataset
        For training and for the accuracy after each epoch.
    loader : Callable
        ``loader(batch, grid)`` has the batches of an epoch, and ``sampler.set_epoch(number)`` where they change;
        default: :func:`~problems.classification.shared_loader` of ``data``.
    optimizer : Callable
        ``optimizer(parameters, lr)``.
    clip : float
        Largest norm of the gradient of all layers; ``None``: it is not limited.
    stages : int
        Number of stages that share the layers.
    """

    parallel: Callable[[int], torch.nn.Module]
    serial: Callable[[int], torch.nn.Module]
    data: Any
    test: Any
    loader: Callable[[int, Grid], Any] | None = None
    optimizer: Callable = torch.optim.Adam
    clip: float | None = None
    stages: int = 1

    def batches(self, opts, batch: int, grid: Grid):
        """The loader of a training."""
        if self.loader is not None:
            return self.loader(batch, grid)
        return shared_loader(self.data, batch, grid, shuffle=not opts.warm, seed=opts.seed)


def on_root(grid: Grid) -> Callable[[str], None]:
    """A function that prints a line at once, on the first rank, unless the program is quiet."""
    return say if grid.is_root else lambda *_: None


def learning_rate(schedule: str, largest: float, done: float, epochs: int) -> float:
    """The step of the optimiser after ``done`` epochs, which may be a fraction, of ``epochs``.

    ``"cosine"``: half a cosine wave from the largest step to zero, constant in each epoch. ``"one-cycle"``: from 1/25
    of the largest step up to it in the first quarter of the training and down to zero in the rest, each by half a
    cosine wave (Smith, Topin, arXiv:1708.07120). A run that goes on from a checkpoint has the same steps.
    """
    if schedule == "cosine":
        return largest * 0.5 * (1 + math.cos(math.pi * math.floor(done) / epochs))
    part, up = done / epochs, 0.25
    if part < up:
        return largest * (1 - (1 - 1 / 25) * 0.5 * (1 + math.cos(math.pi * part / up)))
    return largest * 0.5 * (1 + math.cos(math.pi * (part - up) / (1 - up)))


def train(opts, grid: Grid, task: Task, *, net=None, label: str = "") -> dict:
    """Train, go on from a checkpoint, compare: the network, the records of its epochs, the losses of the batches and
    the same of the serial copy (collective).
    """
    net = net or task.parallel(opts.layers)
    say(
        f"{net.nlayers} residual layers on {grid.layer_size} ranks, {grid.data_size} groups, batches of {opts.batch}, "
        f"{opts.mode} iterations"
        + (f" {opts.forward_iterations} + {opts.backward_iterations}" if opts.mode in ("fixed", "adaptive") else "")
    )
    optimizer = task.optimizer(net.parameters(), lr=opts.lr)
    regularisation = Regularisation(net, opts.tikhonov, opts.smoothness, opts.classifier)
    checkpoint, curve, losses, settings = opts.out / f"checkpoint{label}", [], [], _settings(opts)
    reserve_checkpoint(checkpoint, grid)
    if not opts.fresh:
        progress = load_checkpoint(checkpoint, net, optimizer)
        if progress:
            curve, losses = _curve(checkpoint, progress, settings)
            say(f"going on after epoch {len(curve)} of {checkpoint}")
    loader = task.batches(opts, opts.batch, grid)
    with waiting("training") as status:
        how = dict(losses=losses, first=len(curve) + 1, grid=grid, show=status)
        how["regularisation"] = regularisation if regularisation else None
        for epoch in _epochs(opts, task, net, optimizer, loader, **how):
            curve.append(epoch)
            say(f"  {epoch}")
            try:
                progress = {"curve": [e.as_dict() for e in curve], "losses": losses, "settings": settings}
                save_checkpoint(checkpoint, net, optimizer, progress)
            except InputError as error:
                if opts.if_save_fails == "stop":
                    raise
                say(f"warning: {error}; the training goes on, and the last complete checkpoint stays")
    outcome = {"network": net, "curve": curve, "losses": losses, "serial": None, "serial_losses": None}
    if opts.compare_serial:
        outcome |= _compare(opts, grid, task)
    return outcome


def _epochs(
    opts, task: Task, net, optimizer, loader, *, losses: list, first=1, grid=None, show=None, regularisation=None
):
    """The epochs of a training from the number ``first`` on; the losses of the batches are appended to ``losses``."""

    def set_rate(done: float) -> None:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(opts.schedule, opts.lr, done, opts.epochs)

    for number in range(first, opts.epochs + 1):
        loader.sampler.set_epoch(number)
        set_rate(number - 1)

        def on_batch(batch: int, loss: float, number=number) -> None:
            losses.append(round(loss, 6))
            if show is not None:
                show(f"epoch {number}, batch {batch + 1} of {len(loader)}: loss {loss:.4f}")

        told = train_epoch(
            net,
            loader,
            optimizer,
            regularisation=regularisation,
            clip=task.clip,
            data_comm=None if grid is None else grid.data_comm,
            warm=grid is not None and opts.warm,
            on_batch=on_batch,
            after_batch=lambda batch, number=number: set_rate(number - 1 + min((batch + 1) / len(loader), 1 - 1e-9)),
        )
        yield Epoch(number, test_accuracy=accuracy(net, task.test, grid=grid), **told)


def _settings(opts) -> dict:
    """What determines the updates of a training besides the network: it has to be the same where one goes on."""
    weights = ("tikhonov", "smoothness", "classifier")
    names = ("data", "count", "samples", "classes", "text", "length", "every")
    names += ("batch", "lr", "schedule", "warm", "seed", *weights)
    return {name: getattr(opts, name) for name in names if hasattr(opts, name)}


def _curve(checkpoint, progress: dict, settings: dict) -> tuple[list, list]:
    """The epochs and losses of a checkpoint, unless it is of a training with other settings."""
    kept = progress.get("settings", {})
    names = [name for name in settings if name in kept and kept[name] != settings[name]]
    other = [f"--{name} {kept[name]}, not {settings[name]}" for name in names]
    if other:
        raise InputError(f"checkpoint {checkpoint} was trained with {'; '.join(other)}: give the same, or --fresh")
    try:
        return [Epoch(**e) for e in progress["curve"]], list(progress.get("losses", []))
    except (KeyError, TypeError) as error:
        raise InputError(f"checkpoint {checkpoint} has no curve of epochs ({error}): give --fresh") from error


def _compare(opts, grid: Grid, task: Task) -> dict:
    """The same training in plain serial torch, on the first rank, in the form and with the number of threads, at most
    that of the ranks, that are fastest.
    """
    curve, losses = [], []
    if grid.is_root:
        say("plain serial torch, same seed and epochs:")
        net = task.serial(opts.layers)
        loader = task.batches(opts, opts.batch * grid.data_size, Grid(comm=MPI.COMM_SELF))
        threads, batches = sorted({1, grid.comm.size}), opts.epochs * len(loader)
        net, count, told = fastest_for_training(net, next(iter(loader)), threads=threads, batches=batches)
        say(f"  ({told})")
        torch.set_num_threads(count)
        optimizer = task.optimizer(net.parameters(), lr=opts.lr)
        for epoch in _epochs(opts, task, net, optimizer, loader, losses=losses):
            curve.append(epoch)
            say(f"  {epoch}")
        torch.set_num_threads(1)
    wait_quietly(grid.comm)
    curve, losses = grid.comm.bcast((curve, losses), root=0)
    return {"serial": curve, "serial_losses": losses}


def train_in_levels(opts, grid: Grid, task: Task) -> dict:
    """:func:`train` the deepest of ``opts.multilevel`` networks, each twice as deep as the one before, whose parameters
    are interpolated in depth (multilevel initialisation; with one network there is nothing to interpolate).
    """
    if opts.multilevel == 1:
        return train(opts, grid, task)
    depths = [max(task.stages * grid.layer_size, opts.layers // 2**k) for k in reversed(range(opts.multilevel))]
    outcome, curves = None, []
    compare_serial, opts.compare_serial = opts.compare_serial, False
    for depth in depths:
        net = task.parallel(depth)
        if outcome is not None:
            refine(outcome["network"], net)
        opts.compare_serial = compare_serial and depth == depths[-1]
        outcome = train(opts, grid, task, net=net, label=f"_{depth}")
        curves.append([depth, [e.as_dict() for e in outcome["curve"]]])
    outcome["levels"] = curves
    return outcome

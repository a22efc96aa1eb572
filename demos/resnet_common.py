"""What the demos of residual networks share: options, the training with its checkpoints, curves, the report."""

import math
from importlib.metadata import version
from pathlib import Path

from mpi4py import MPI

from demos.outputs import Progress
from pint_fem.cli import positive, wait_quietly


def add_options(parser, *, layers, epochs, batch, lr, out, final_time, coarsening):
    """Options of both demos."""
    add = parser.add_argument
    add(
        "--grid",
        default="auto",
        metavar="DxL",
        help="groups with a batch each x ranks in the layers (all in the layers)",
    )
    add("--layers", type=positive(int), default=layers, help=f"residual layers ({layers})")
    add("--epochs", type=positive(int), default=epochs, help=f"passes over the data ({epochs})")
    add("--batch", type=positive(int), default=batch, help=f"batch of a group ({batch})")
    add("--lr", type=positive(float), default=lr, help=f"Adam's step ({lr:g}), decaying as a cosine")
    add(
        "--final-time",
        type=positive(float),
        default=final_time,
        help=f"T: a layer's step is T over layers ({final_time:g})",
    )
    add("--activation", help="of the residual layers")
    add("--mode", default="fixed", choices=("fixed", "adaptive", "exact", "serial"), help="cycles of a sweep (fixed)")
    add("--forward-iterations", type=positive(int), default=2, help="cycles forward (2)")
    add("--backward-iterations", type=positive(int), default=1, help="cycles backward (1)")
    add(
        "--coarsening", type=positive(int), default=coarsening, help=f"layers from a C-point to the next ({coarsening})"
    )
    add("--levels", type=positive(int), default=2, help="MGRIT levels (2)")
    add("--relax", default="F", help="relaxation: F, FCF ... (F)")
    add("--warm", action="store_true", help="batches start from their last visit; they are not shuffled then")
    add(
        "--multilevel",
        type=positive(int),
        default=1,
        metavar="K",
        help="train K networks, each twice as deep, one after another",
    )
    add("--tikhonov", type=positive(float, zero=True), default=0.0, help="weight of |theta|^2 (0)")
    add("--smoothness", type=positive(float, zero=True), default=0.0, help="weight of |d theta/dt|^2 (0)")
    add("--classifier", type=positive(float, zero=True), default=0.0, help="weight of the classifier's |W|^2 (0)")
    add("--seed", type=positive(int, zero=True), default=0, help="of weights and batches (0)")
    add("--out", type=Path, default=Path(out), help=f"folder of the results ({out})")
    add("--fresh", action="store_true", help="do not go on from the checkpoint in --out")
    add(
        "--if-save-fails",
        default="stop",
        choices=["stop", "continue"],
        help="what to do where the checkpoint cannot be written, as on a full disk (stop)",
    )
    add(
        "--compare-serial",
        action="store_true",
        help="train a plain serial torch copy too, with the same seed and epochs",
    )


def build_grid(opts):
    """The process grid; threads of torch as cores allow."""
    import torch

    from demos.outputs import output_folder
    from pint_fem.resnet import Grid

    grid = Grid(opts.grid)
    torch.set_num_threads(1)
    output_folder(opts.out)
    return grid


def make_network(opts, grid, opening, layer, closing, nlayers, dtype=None):
    """The layer-parallel network the options ask for."""
    import torch

    from pint_fem.resnet import Adaptive, LayerParallelResNet

    counted = opts.mode in ("fixed", "adaptive")
    net = LayerParallelResNet(
        opening,
        layer,
        nlayers,
        closing,
        final_time=opts.final_time,
        grid=grid,
        forward_iterations=opts.forward_iterations if counted else None,
        backward_iterations=opts.backward_iterations if counted else None,
        adaptive=Adaptive() if opts.mode == "adaptive" else None,
        mgrit={"levels": _levels(opts, nlayers), "coarsening": opts.coarsening, "relax": opts.relax},
        seed=opts.seed,
        dtype=dtype or torch.float32,
    )
    net.serial = opts.mode == "serial"
    return net


def _levels(opts, nlayers):
    """No more than the layers allow."""
    levels = opts.levels
    while levels > 1 and nlayers // opts.coarsening ** (levels - 1) < 2:
        levels -= 1
    return levels


def train(opts, grid, opening, layer, closing, data, test, *, dtype=None, net=None, label=""):
    """Train, go on from a checkpoint, compare; curves and networks."""
    import torch

    from demos.training_loop import Epoch, accuracy, train_epoch
    from pint_fem.errors import InputError
    from pint_fem.resnet import Regularisation, load_checkpoint, reserve_checkpoint, save_checkpoint
    from problems.classification import shared_loader

    say = print if grid.is_root else lambda *_: None
    net = net or make_network(opts, grid, opening, layer, closing, opts.layers, dtype)
    say(
        f"{net.nlayers} residual layers on {grid.layer_size} ranks, {grid.data_size} groups, batches of {opts.batch}, "
        f"{opts.mode} iterations"
        + (f" {opts.forward_iterations} + {opts.backward_iterations}" if opts.mode in ("fixed", "adaptive") else "")
    )
    optimizer = torch.optim.Adam(net.parameters(), lr=opts.lr)
    regularisation = Regularisation(net, opts.tikhonov, opts.smoothness, opts.classifier)
    checkpoint, curve, settings = opts.out / f"checkpoint{label}", [], _settings(opts)
    reserve_checkpoint(checkpoint, grid)
    if not opts.fresh:
        progress = load_checkpoint(checkpoint, net, optimizer)
        if progress:
            curve = _curve(checkpoint, progress, settings)
            say(f"going on after epoch {len(curve)} of {checkpoint}")
    loader = shared_loader(data, opts.batch, grid, shuffle=not opts.warm, seed=opts.seed)
    with Progress(grid.is_root) as status:
        for number in range(len(curve) + 1, opts.epochs + 1):
            loader.sampler.set_epoch(number)
            _set_rate(optimizer, opts, number)
            told = train_epoch(
                net,
                loader,
                optimizer,
                regularisation=regularisation if regularisation else None,
                data_comm=grid.data_comm,
                warm=opts.warm,
                on_batch=lambda i, loss, n=number: status(
                    f"epoch {n}, batch {i + 1} of {len(loader)}: loss {loss:.4f}"
                ),
            )
            curve.append(Epoch(number, test_accuracy=accuracy(net, test, grid=grid), **told))
            say(f"  {curve[-1]}")
            try:
                progress = {"curve": [e.as_dict() for e in curve], "settings": settings}
                save_checkpoint(checkpoint, net, optimizer, progress)
            except InputError as error:
                if opts.if_save_fails == "stop":
                    raise
                say(f"warning: {error}; the training goes on, and the last complete checkpoint stays")
    outcome = {"network": net, "curve": curve, "serial": None}
    if opts.compare_serial:
        outcome["serial"] = compare(opts, grid, opening, layer, closing, data, test, dtype)
    return outcome


def _settings(opts):
    """What determines the updates of a training besides the network: it has to be the same where one goes on."""
    weights = ("tikhonov", "smoothness", "classifier")
    names = ("data", "count", "samples", "classes", "batch", "lr", "warm", "seed", *weights)
    return {name: getattr(opts, name) for name in names if hasattr(opts, name)}


def _curve(checkpoint, progress, settings):
    """The epochs of a checkpoint, unless it is of a training with other settings."""
    from demos.training_loop import Epoch
    from pint_fem.errors import InputError

    kept = progress.get("settings", {})
    names = [name for name in settings if name in kept and kept[name] != settings[name]]
    other = [f"--{name} {kept[name]}, not {settings[name]}" for name in names]
    if other:
        raise InputError(f"checkpoint {checkpoint} was trained with {'; '.join(other)}: give the same, or --fresh")
    try:
        return [Epoch(**e) for e in progress["curve"]]
    except (KeyError, TypeError) as error:
        raise InputError(f"checkpoint {checkpoint} has no curve of epochs ({error}): give --fresh") from error


def _set_rate(optimizer, opts, number):
    """Adam's step in an epoch, the same for a run that goes on."""
    for group in optimizer.param_groups:
        group["lr"] = opts.lr * 0.5 * (1 + math.cos(math.pi * (number - 1) / opts.epochs))


COMPILE_FROM = 120.0
"""Seconds of a serial training by the fastest loop from which on compiled layers are tried too."""


def compare(opts, grid, opening, layer, closing, data, test, dtype=None):
    """The same training in plain serial torch, on the first rank with at most as many threads as there are ranks, in
    the form that is fastest for its batches.
    """
    import torch

    from demos.training_loop import Epoch, accuracy, train_epoch
    from pint_fem.resnet import Grid, SerialResNet
    from problems.classification import shared_loader

    curve = []
    if grid.is_root:
        print("plain serial torch, same seed and epochs:")
        net = SerialResNet(
            opening,
            layer,
            opts.layers,
            closing,
            final_time=opts.final_time,
            seed=opts.seed,
            dtype=dtype or torch.float32,
        )
        whole = opts.batch * grid.data_size
        loader = shared_loader(data, whole, Grid(comm=MPI.COMM_SELF), shuffle=not opts.warm, seed=opts.seed)
        net = _fastest_serial(net, next(iter(loader)), sorted({1, grid.comm.size}), opts.epochs * len(loader))
        optimizer = torch.optim.Adam(net.parameters(), lr=opts.lr)
        for number in range(1, opts.epochs + 1):
            loader.sampler.set_epoch(number)
            _set_rate(optimizer, opts, number)
            told = train_epoch(net, loader, optimizer)
            curve.append(Epoch(number, test_accuracy=accuracy(net, test), **told))
            print(f"  {curve[-1]}", flush=True)
        torch.set_num_threads(1)
    wait_quietly(grid.comm)
    return grid.comm.bcast(curve, root=0)


def _fastest_serial(net, batch, threads, batches):
    """The form of a serial network and the number of threads, set here, that are fastest for a training."""
    import torch

    from problems.layers import Training
    from problems.serial_networks import fastest, forms

    training = lambda form: Training(form, *batch)
    found = fastest(forms(net, ["eager", "stacked"]), training, threads=threads, repeats=3)
    told = [f"fastest loop: {found}"]
    if min(found.seconds.values()) * batches > COMPILE_FROM:
        compiled = fastest(forms(net, ["compiled"]), training, threads=threads, repeats=3)
        told.append(f"compiled: {compiled}")
        found.seconds |= compiled.seconds
    else:
        told.append(f"compiled layers are tried from {COMPILE_FROM:.0f} s of training on")
    form, count = found.best
    print(f"  ({'; '.join(told)}; taken: {form} on {count})")
    torch.set_num_threads(count)
    return forms(net, [form])[form]  # with the first parameters: measurements update them


def nested_training(opts, grid, opening, layer, closing, data, test, *, dtype=None):
    """Multilevel initialisation: train a shallow network, interpolate in depth, go on with twice the layers."""
    from pint_fem.resnet import refine

    depths = [max(grid.layer_size, opts.layers // 2**k) for k in reversed(range(opts.multilevel))]
    outcome, curves = None, []
    compare_serial, opts.compare_serial = opts.compare_serial, False
    for depth in depths:
        net = make_network(opts, grid, opening, layer, closing, depth, dtype)
        if outcome is not None:
            refine(outcome["network"], net)
        opts.compare_serial = compare_serial and depth == depths[-1]
        outcome = train(opts, grid, opening, layer, closing, data, test, dtype=dtype, net=net, label=f"_{depth}")
        curves.append([depth, [e.as_dict() for e in outcome["curve"]]])
    outcome["levels"] = curves
    return outcome


def plot_curves(path, outcome, title):
    """Loss and accuracy over epochs, ours and the serial copy's."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for name, curve, style in (("layer-parallel", outcome["curve"], "o-"), ("serial torch", outcome["serial"], "s--")):
        if not curve:
            continue
        epochs = [e.number for e in curve]
        left.semilogy(epochs, [e.loss for e in curve], style, label=name)
        right.plot(epochs, [100 * e.test_accuracy for e in curve], style, label=f"{name}, test")
        right.plot(epochs, [100 * e.train_accuracy for e in curve], style, alpha=0.4, label=f"{name}, training")
    left.set(xlabel="epoch", title="loss (training)")
    right.set(xlabel="epoch", title="accuracy (%)")
    for ax in (left, right):
        ax.legend(fontsize=8)
        ax.xaxis.get_major_locator().set_params(integer=True)
    fig.suptitle(title)
    fig.savefig(path, dpi=110)
    plt.close(fig)


def report(opts, grid, outcome, facts, outputs):
    """The last lines and ``summary.json``; and what could not be written."""
    outputs.on_root("summary.json", _summarise, opts, grid, outcome, facts)
    outputs.finish()


def _summarise(opts, grid, outcome, facts):
    """On the first rank."""
    from demos.outputs import write_json

    net, curve, serial = outcome["network"], outcome["curve"], outcome["serial"]
    settings = {k: v for k, v in vars(opts).items() if k not in ("help", "out")}
    summary = facts | {
        "settings": settings,
        "grid": {"data": grid.data_size, "layers": grid.layer_size},
        "curve": [e.as_dict() for e in curve],
        "result": {
            "test_accuracy": curve[-1].test_accuracy,
            "seconds_an_epoch": sum(e.seconds for e in curve) / len(curve),
        },
        "adaptive": {"forward": net.forward_sweeps.history, "backward": net.backward_sweeps.history},
        "versions": {name: version(name) for name in ("torch", "numpy", "mpi4py")},
    }
    if "levels" in outcome:
        summary["levels"] = outcome["levels"]
    print(f"test accuracy {100 * curve[-1].test_accuracy:.2f}%")
    if serial:
        gap = 100 * (curve[-1].test_accuracy - serial[-1].test_accuracy)
        ratio = sum(e.seconds for e in serial) / sum(e.seconds for e in curve)
        summary["serial"] = {
            "curve": [e.as_dict() for e in serial],
            "gap_in_points": gap,
            "serial_over_parallel_time": ratio,
        }
        print(f"serial torch {100 * serial[-1].test_accuracy:.2f}%: {gap:+.2f} points; its time over ours: {ratio:.2f}")
    write_json(opts.out / "summary.json", summary)
    print(f"results in {opts.out}: {', '.join(sorted(p.name for p in opts.out.iterdir() if p.is_file()))}")

"""What the demos of residual networks share: options, the networks they ask for, curves, the report."""

from importlib.metadata import version
from pathlib import Path

from pint_fem.cli import positive, say


def add_options(parser, *, layers, epochs, batch, lr, out, final_time, coarsening, schedule="cosine"):
    """Options of the demos of classification.

    A default may be a dictionary of one per kind of network: the option is ``None`` then unless it is given.
    """
    add = parser.add_argument
    add("--layers", type=positive(int), default=_value(layers), help=f"residual layers ({_shown(layers)})")
    add("--epochs", type=positive(int), default=epochs, help=f"passes over the data ({epochs})")
    add(
        "--final-time",
        type=positive(float),
        default=_value(final_time),
        help=f"T: a layer's step is T over layers, of the first stage where there are several ({_shown(final_time)})",
    )
    add("--activation", help="of the residual layers")
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
    add_common_options(parser, batch=batch, lr=lr, out=out, coarsening=coarsening, schedule=schedule)


def _value(default):
    """Default of an option."""
    return None if isinstance(default, dict) else default


def _shown(default):
    """Default of an option, for its help."""
    if isinstance(default, dict):
        return ", ".join(f"{kind}: {_shown(value)}" for kind, value in default.items())
    return default if isinstance(default, str) else f"{default:g}"


def add_common_options(parser, *, batch, lr, out, coarsening, schedule):
    """Options of all networks: the grid, the sweeps, the optimiser, the files."""
    add = parser.add_argument
    add(
        "--grid",
        default="auto",
        metavar="DxL",
        help="groups with a batch each x ranks in the layers (all in the layers)",
    )
    add("--batch", type=positive(int), default=batch, help=f"batch of a group ({batch})")
    add("--lr", type=positive(float), default=_value(lr), help=f"largest step of the optimiser ({_shown(lr)})")
    add(
        "--schedule",
        default=_value(schedule),
        choices=("cosine", "one-cycle"),
        help=f"of the optimiser's step: a cosine by epochs, or up and down by batches ({_shown(schedule)})",
    )
    add("--mode", default="fixed", choices=("fixed", "adaptive", "exact", "serial"), help="cycles of a sweep (fixed)")
    add("--forward-iterations", type=positive(int), default=2, help="cycles forward (2)")
    add("--backward-iterations", type=positive(int), default=1, help="cycles backward (1)")
    add(
        "--coarsening",
        type=positive(int),
        default=_value(coarsening),
        help=f"layers from a C-point to the next ({_shown(coarsening)})",
    )
    add("--levels", type=positive(int), default=2, help="MGRIT levels (2)")
    add("--relax", default="F", help="relaxation: F, FCF ... (F)")
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


def solver_options(opts, depth):
    """Numbers of cycles and MGRIT options of a network, or of its stages, with so many layers."""
    from pint_fem.resnet import Adaptive

    counted = opts.mode in ("fixed", "adaptive")
    return dict(
        forward_iterations=opts.forward_iterations if counted else None,
        backward_iterations=opts.backward_iterations if counted else None,
        adaptive=Adaptive() if opts.mode == "adaptive" else None,
        mgrit={"levels": _levels(opts, depth), "coarsening": opts.coarsening, "relax": opts.relax},
        seed=opts.seed,
    )


def _levels(opts, depth):
    """No more than the layers allow."""
    levels = opts.levels
    while levels > 1 and depth // opts.coarsening ** (levels - 1) < 2:
        levels -= 1
    return levels


def make_network(opts, grid, opening, layer, closing, depth, dtype=None):
    """The layer-parallel network with one stage that the options require."""
    import torch

    from pint_fem.resnet import LayerParallelResNet

    how = solver_options(opts, depth) | {"final_time": opts.final_time, "dtype": dtype or torch.float32}
    net = LayerParallelResNet(opening, layer, depth, closing, grid=grid, **how)
    net.serial = opts.mode == "serial"
    return net


def single_stage(opts, grid, opening, layer, closing, data, test):
    """The training of a network with one stage."""
    from demos.network_training import Task
    from pint_fem.resnet import SerialResNet

    how = {"final_time": opts.final_time, "seed": opts.seed}
    return Task(
        parallel=lambda depth: make_network(opts, grid, opening, layer, closing, depth),
        serial=lambda depth: SerialResNet(opening, layer, depth, closing, **how),
        data=data,
        test=test,
    )


def plot_curves(path, outcome, title, *, quantity="accuracy (%)", epoch="epoch"):
    """Losses of the batches, in means of as many for both, and accuracy over epochs: layer-parallel beside serial."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    from demos.style import use

    use()

    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    width = max(1, max(len(outcome[name] or ()) for name in ("losses", "serial_losses")) // 100)
    both = (("layer-parallel", "", "C0", "-", "o"), ("serial torch", "serial_", "C1", "--", "s"))
    for name, prefix, colour, style, marker in both:
        curve, losses = outcome["serial" if prefix else "curve"], outcome[f"{prefix}losses"]
        if not curve:
            continue
        epochs = [e.number for e in curve]
        if losses:
            means = [np.mean(losses[i : i + width]) for i in range(0, len(losses) - width + 1, width)]
            places = (np.arange(len(means)) + 0.5) * width
            label = f"{name}, means of {width} batches" if width > 1 else name
            left.semilogy(places, means, style, color=colour, label=label, lw=1.2)
        else:
            left.semilogy(epochs, [e.loss for e in curve], style, color=colour, marker=marker, label=name)
        test, training = ([100 * getattr(e, f"{part}_accuracy") for e in curve] for part in ("test", "train"))
        right.plot(epochs, test, style, color=colour, marker=marker, label=f"{name}, test")
        right.plot(epochs, training, style, color=colour, marker=marker, alpha=0.4, label=f"{name}, training")
    left.set(xlabel="batch" if outcome["losses"] else epoch, title="loss (training)")
    right.set(xlabel=epoch, title=quantity)
    for ax in (left, right):
        ax.legend(fontsize=8)
        ax.xaxis.get_major_locator().set_params(integer=True)
    fig.suptitle(title)
    fig.savefig(path, dpi=110)
    plt.close(fig)


def report(opts, grid, outcome, facts, outputs):
    """The last lines and ``summary.json``; and what could not be written."""
    outputs.on_root("summary.json", _summarise, opts, grid, outcome, facts)
    outputs.finish(opts.out, opts.next_step)


def _summarise(opts, grid, outcome, facts):
    """On the first rank."""
    from demos.outputs import write_json

    net, curve, serial = outcome["network"], outcome["curve"], outcome["serial"]
    settings = {k: v for k, v in vars(opts).items() if k not in ("help", "next_step", "out", "quiet", "verbose")}
    summary = facts | {
        "settings": settings,
        "grid": {"data": grid.data_size, "layers": grid.layer_size},
        "curve": [e.as_dict() for e in curve],
        "losses": outcome["losses"],
        "result": {
            "test_accuracy": curve[-1].test_accuracy,
            "seconds_an_epoch": sum(e.seconds for e in curve) / len(curve),
        },
        "adaptive": [
            {"forward": stage.forward_sweeps.history, "backward": stage.backward_sweeps.history} for stage in net.stages
        ],
        "versions": {name: version(name) for name in ("torch", "numpy", "mpi4py")},
    }
    if "levels" in outcome:
        summary["levels"] = outcome["levels"]
    say(f"test accuracy {100 * curve[-1].test_accuracy:.2f}%")
    if serial:
        gap = 100 * (curve[-1].test_accuracy - serial[-1].test_accuracy)
        ratio = sum(e.seconds for e in serial) / sum(e.seconds for e in curve)
        summary["serial"] = {
            "curve": [e.as_dict() for e in serial],
            "losses": outcome["serial_losses"],
            "gap_in_points": gap,
            "serial_over_parallel_time": ratio,
        }
        say(f"serial torch {100 * serial[-1].test_accuracy:.2f}%: {gap:+.2f} points; its time over ours: {ratio:.2f}")
    write_json(opts.out / "summary.json", summary)

"""Train a deep convolutional residual network on MNIST, its layers shared out over MPI ranks.

    make mnist                                                              (fetches the data, trains on all cores)
    mpiexec -n 2 python demos/resnet_mnist.py --data data/mnist --grid 1x2  (1 batch at a time x 2 ranks in the layers)
    mpiexec -n 2 python demos/resnet_mnist.py --compare-serial              (beside the same network in plain torch)
    python demos/resnet_mnist.py --data digits --epochs 20                  (scikit-learn's 8 x 8 digits: a minute)
    python demos/resnet_mnist.py --network single --layers 64               (one stage of one convolution per layer)

The network has three stages of residual blocks (two convolutions with normalisation each); between stages images are
halved and channels doubled. Each stage is a multigrid hierarchy of its own over the same ranks.

Writes to --out: curves.png, summary.json, checkpoint/ (a run that was interrupted goes on from there).
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from demos.outputs import Outputs
from demos.resnet_common import add_options, build_grid, plot_curves, report, single_stage, solver_options
from pint_fem.capacity import require_memory
from pint_fem.cli import ProgramParser, positive, run
from pint_fem.errors import InputError

NEXT_STEP = "open curves.png; then compare with plain torch: --compare-serial --fresh"
STAGES = 3
DEFAULTS = {
    "stages": {"layers": 12, "lr": 1e-2, "schedule": "one-cycle", "final_time": 2.0, "coarsening": 2},
    "single": {"layers": 64, "lr": 2e-3, "schedule": "cosine", "final_time": 4.0, "coarsening": 4},
}


def arguments():
    """Options of the program."""
    parser = ProgramParser(prog="resnet_mnist.py", description=__doc__, petsc=False, next_step=NEXT_STEP)
    add = parser.add_argument
    add(
        "--data",
        default="data/mnist",
        help="folder with MNIST's four IDX files, raw or gzipped; or 'digits' (data/mnist)",
    )
    add("--count", type=positive(int), help="so many training images only (all)")
    add(
        "--network",
        default="stages",
        choices=tuple(DEFAULTS),
        help="three stages of residual blocks with normalisation, or a single stage of convolutions (stages)",
    )
    add("--channels", type=positive(int), default=8, help="channels of the residual layers, in the first stage (8)")
    add("--norm", default="batch", choices=("batch", "group"), help="normalisation of the blocks in stages (batch)")
    by_network = {name: {kind: values[name] for kind, values in DEFAULTS.items()} for name in DEFAULTS["stages"]}
    add_options(parser, epochs=2, batch=100, out="results/mnist", **by_network)
    opts = parser.read()
    for name, value in DEFAULTS[opts.network].items():
        if getattr(opts, name) is None:
            setattr(opts, name, value)
    if opts.network == "stages":
        _check_stages(opts)
    return opts


def _check_stages(opts):
    """Refuse what a network with stages does not have."""
    if opts.layers < STAGES:
        raise InputError(f"--layers {opts.layers}: give at least {STAGES}, one for each stage")
    if opts.activation is not None:
        raise InputError("--activation is for a network with one stage: leave it out, or give --network single")
    whole = STAGES * 2 ** (opts.multilevel - 1)
    if opts.multilevel > 1 and opts.layers % whole:
        raise InputError(f"--layers {opts.layers} with --multilevel {opts.multilevel}: give a multiple of {whole}")


def single_network(opts, size):
    """Opening, layer and closing for square images of a size: the first convolution halves large ones."""
    from torch import nn

    from pint_fem.resnet import Convolution

    stride = 2 if size > 16 else 1
    width = (size + stride - 1) // stride
    opening = nn.Sequential(nn.Conv2d(1, opts.channels, 3, stride=stride, padding=1), nn.ReLU())
    closing = nn.Sequential(nn.Flatten(), nn.Linear(opts.channels * width**2, 10))
    return opening, Convolution(opts.channels, 3, opts.activation or "relu"), closing


def staged_network(opts, size, depth):
    """Arguments of ``LayerParallel``: three stages with ``depth`` blocks in all, the first ones deeper where needed."""
    from demos.network_blocks import ConvolutionBlock, downsampling, image_closing, image_opening

    channels = [opts.channels * 2**k for k in range(STAGES)]
    depths = [(depth + STAGES - 1 - k) // STAGES for k in range(STAGES)]
    return {
        "opening": image_opening(channels[0], stride=2 if size > 16 else 1),
        "blocks": [[ConvolutionBlock(c, opts.norm) for _ in range(n)] for c, n in zip(channels, depths, strict=True)],
        "transitions": [downsampling(c) for c in channels[:-1]],
        "closing": image_closing(channels[-1], opts.norm, 10),
        "h": opts.final_time / depths[0],
    }


def stages(opts, grid, data, test):
    """The training of the network with three stages."""
    import torch
    from mpi4py import MPI

    from demos.network_training import Task
    from pint_fem.resnet import Grid, LayerParallel

    def build(depth, on):
        torch.manual_seed(opts.seed)
        net = LayerParallel(
            **staged_network(opts, data[0][0].shape[-1], depth), grid=on, **solver_options(opts, depth // STAGES)
        )
        net.serial = opts.mode == "serial"
        return net

    alone = Grid(comm=MPI.COMM_SELF)
    return Task(
        parallel=lambda depth: build(depth, grid),
        serial=lambda depth: build(depth, alone).serial_copy(),
        data=data,
        test=test,
        stages=STAGES,
    )


def main():
    """Train."""
    opts = arguments()
    import torch

    from demos.network_training import on_root, train_in_levels
    from problems.classification import digits, mnist

    grid = build_grid(opts)
    require_memory(grid.comm, 36 * opts.channels**2, f"layers of {opts.channels} channels", "give fewer channels")
    start = time.perf_counter()
    if opts.data == "digits":
        data, test = digits("train"), digits("test")
    else:
        data, test = mnist(opts.data, "train", count=opts.count), mnist(opts.data, "test")
    say = on_root(grid)
    shape, seconds = tuple(data[0][0].shape[1:]), time.perf_counter() - start
    say(f"{len(data)} training images of {shape}, {len(test)} for testing, read in {seconds:.1f} s")
    torch.manual_seed(opts.seed)
    if opts.network == "stages":
        task = stages(opts, grid, data, test)
    else:
        task = single_stage(opts, grid, *single_network(opts, shape[-1]), data, test)
    outcome = train_in_levels(opts, grid, task)
    kind = f"{opts.layers} residual blocks in three stages" if opts.network == "stages" else f"{opts.layers} layers"
    title = f"{opts.data}: {kind}, {opts.channels} channels"
    outputs = Outputs(grid.comm)
    outputs.on_root(str(opts.out / "curves.png"), plot_curves, opts.out / "curves.png", outcome, title)
    facts = {"problem": "MNIST" if opts.data != "digits" else "digits", "channels": opts.channels}
    report(opts, grid, outcome, facts, outputs)


if __name__ == "__main__":
    run(main)

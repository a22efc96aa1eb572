"""Train a deep convolutional residual network on MNIST, its layers shared out over MPI ranks.

    make mnist                                                              (fetches the data, trains on all cores)
    mpiexec -n 2 python demos/resnet_mnist.py --data data/mnist --grid 1x2  (1 batch at a time x 2 ranks in the layers)
    python demos/resnet_mnist.py --data digits --layers 16 --epochs 20      (scikit-learn's 8 x 8 digits: a minute)

Writes to --out: curves.png, summary.json, checkpoint/ (a run that was interrupted goes on from there).
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from demos.outputs import Outputs
from demos.resnet_common import add_options, build_grid, plot_curves, report, single_stage
from pint_fem.capacity import require_memory
from pint_fem.cli import ProgramParser, positive, run


def arguments():
    """Options of the program."""
    parser = ProgramParser(prog="resnet_mnist.py", description=__doc__, petsc=False)
    add = parser.add_argument
    add(
        "--data",
        default="data/mnist",
        help="folder with MNIST's four IDX files, raw or gzipped; or 'digits' (data/mnist)",
    )
    add("--count", type=positive(int), help="so many training images only (all)")
    add("--channels", type=positive(int), default=8, help="channels of the residual layers (8)")
    add_options(parser, layers=64, epochs=2, batch=100, lr=2e-3, out="results/mnist", final_time=4.0, coarsening=4)
    return parser.read()


def networks(opts, size):
    """Opening, layer and closing for square images of a size: the first convolution halves large ones."""
    from torch import nn

    from pint_fem.resnet import Convolution

    stride = 2 if size > 16 else 1
    width = (size + stride - 1) // stride
    opening = nn.Sequential(nn.Conv2d(1, opts.channels, 3, stride=stride, padding=1), nn.ReLU())
    closing = nn.Sequential(nn.Flatten(), nn.Linear(opts.channels * width**2, 10))
    return opening, Convolution(opts.channels, 3, opts.activation or "relu"), closing


def main():
    """Train."""
    opts = arguments()
    import torch

    from demos.network_training import train_in_levels
    from problems.classification import digits, mnist

    grid = build_grid(opts)
    require_memory(grid.comm, 36 * opts.channels**2, f"layers of {opts.channels} channels", "give fewer channels")
    start = time.perf_counter()
    if opts.data == "digits":
        data, test = digits("train"), digits("test")
    else:
        data, test = mnist(opts.data, "train", count=opts.count), mnist(opts.data, "test")
    say = print if grid.is_root else lambda *_: None
    shape, seconds = tuple(data[0][0].shape[1:]), time.perf_counter() - start
    say(f"{len(data)} training images of {shape}, {len(test)} for testing, read in {seconds:.1f} s")
    torch.manual_seed(opts.seed)
    opening, layer, closing = networks(opts, data[0][0].shape[-1])
    outcome = train_in_levels(opts, grid, single_stage(opts, grid, opening, layer, closing, data, test))
    title = f"{opts.data}: {opts.layers} residual layers, {opts.channels} channels"
    outputs = Outputs(grid.comm)
    outputs.on_root(str(opts.out / "curves.png"), plot_curves, opts.out / "curves.png", outcome, title)
    facts = {"problem": "MNIST" if opts.data != "digits" else "digits", "channels": opts.channels}
    report(opts, grid, outcome, facts, outputs)


if __name__ == "__main__":
    run(main)

"""Classify points of the plane by the "peaks" function with a deep residual network, layers shared out over MPI ranks.

    mpiexec -n 2 python demos/resnet_peaks.py --grid 1x2 --layers 128
    mpiexec -n 2 python demos/resnet_peaks.py --optimizer trust-region --layers 32 --samples 500    (full batch)

Writes to --out: peaks.png (what the network says of each point), curves.png, summary.json, checkpoint/.
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from demos.outputs import Outputs
from demos.resnet_common import add_options, build_grid, make_network, plot_curves, report, single_stage
from pint_fem.capacity import require_memory
from pint_fem.cli import ProgramParser, positive, run, say

NEXT_STEP = "open peaks.png; then compare with plain torch: --compare-serial --fresh"
FULL_BATCH = ("trust-region", "one-shot", "lbfgs")


def arguments():
    """Options of the program."""
    parser = ProgramParser(prog="resnet_peaks.py", description=__doc__, petsc=False, next_step=NEXT_STEP)
    add = parser.add_argument
    add("--classes", type=positive(int), default=5, help="2 or 5 (5)")
    add("--samples", type=positive(int), default=5000, help="training points; a fifth as many for testing (5000)")
    add("--width", type=positive(int), default=8, help="width of the layers (8)")
    add(
        "--optimizer",
        default="adam",
        choices=("adam", *FULL_BATCH),
        help="batches with Adam, or the full batch with the package's own (adam)",
    )
    add("--max-iterations", type=positive(int), default=60, help="of the full-batch optimisers (60)")
    add_options(parser, layers=64, epochs=40, batch=200, lr=1e-2, out="results/peaks", final_time=5.0, coarsening=8)
    return parser.read()


def full_batch(opts, grid, opening, layer, closing, data, test):
    """Train with the package's trust region, its one-shot method or scipy's L-BFGS; the outcome as of ``train``."""
    import torch

    from demos.training_loop import Epoch, accuracy
    from pint_fem.optimize import minimize_one_shot, minimize_trust_region, scipy_minimize
    from pint_fem.resnet import Regularisation, TrainingProblem

    told = say if grid.is_root else None
    net = make_network(opts, grid, opening, layer, closing, opts.layers, torch.float64)
    x, y = data.tensors
    weights = (opts.tikhonov or 1e-4, opts.smoothness or 1e-4, opts.classifier or 1e-4)
    problem = TrainingProblem(net, x, y, regularisation=Regularisation(net, *weights), inner_product="L2")
    start, z0 = time.perf_counter(), problem.x0
    if opts.optimizer == "trust-region":
        z = minimize_trust_region(problem, z0, monitor=told, max_it=opts.max_iterations, gtol_rel=1e-5).x
    elif opts.optimizer == "one-shot":
        z = minimize_one_shot(problem, z0, monitor=told, max_it=10 * opts.max_iterations, gtol_rel=1e-4).x
    else:
        limit = {"maxiter": opts.max_iterations}
        z = scipy_minimize(problem, z0, "L-BFGS-B", comm=grid.layer_comm, options=limit).x
    value = problem.value(z)
    seconds = time.perf_counter() - start
    if told:
        factors = {name: result.factor for name, result in net.results.items()}
        say(
            f"J = {value:.6e} after {problem.counts}; residual factors "
            + ", ".join(f"{n} {f:.3f}" for n, f in factors.items())
        )
    curve = [Epoch(1, value, accuracy(net, data), accuracy(net, test), seconds)]
    return {"network": net, "curve": curve, "losses": [], "serial": None, "serial_losses": None}


def plot_classes(path, opts, net, test, pixels=160):
    """The classes of the network beside the true ones (every rank takes part, the first one draws)."""
    import numpy as np
    import torch

    from problems.classification import peaks_class

    side = (np.arange(pixels) + 0.5) / pixels * 6 - 3
    points = np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2)
    with torch.no_grad():
        said = torch.cat([net(p).argmax(1) for p in torch.from_numpy(points).to(net.dtype).split(6400)]).numpy()
    if not net.grid.is_root:
        return
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    from demos.style import use

    use()

    fig, axes = plt.subplots(1, 2, figsize=(9.5, 4.4), layout="constrained", sharey=True)
    x = test.tensors[0].numpy()
    for ax, name, label in zip(
        axes, ("true classes", "the network's"), (peaks_class(points, opts.classes), said), strict=True
    ):
        image = label.reshape(pixels, pixels)
        ax.imshow(
            image, origin="lower", extent=(-3, 3, -3, 3), cmap="viridis", vmin=0, vmax=opts.classes - 1, alpha=0.85
        )
        ax.set(title=name, xlabel="x")
    wrong = said_of(test, said, pixels) != test.tensors[1].numpy()
    axes[1].plot(*x[wrong].T, "r.", ms=3, label=f"{wrong.sum()} of {len(x)} test points in a wrong pixel")
    axes[1].legend(fontsize=8, loc="upper right")
    axes[0].set_ylabel("y")
    fig.suptitle(f"peaks, {opts.classes} classes: {opts.layers} residual layers of width {opts.width}")
    fig.savefig(path, dpi=110)
    plt.close(fig)


def said_of(test, said, pixels):
    """The picture's class at the test points."""
    import numpy as np

    place = np.clip(((test.tensors[0].numpy() + 3) / 6 * pixels).astype(int), 0, pixels - 1)
    return said.reshape(pixels, pixels)[place[:, 1], place[:, 0]]


def main():
    """Train."""
    opts = arguments()
    import torch
    from torch import nn

    from demos.network_training import train_in_levels
    from pint_fem.resnet import Dense
    from problems.classification import peaks

    grid = build_grid(opts)
    require_memory(grid.comm, 8 * opts.width**2, f"layers of width {opts.width}", "give narrower ones")
    full = opts.optimizer in FULL_BATCH
    dtype = torch.float64 if full else torch.float32
    data = peaks(opts.samples, opts.classes, seed=opts.seed, dtype=dtype)
    test = peaks(max(opts.classes, opts.samples // 5), opts.classes, seed=opts.seed + 1, dtype=dtype)
    torch.manual_seed(opts.seed)
    parts = (
        nn.Sequential(nn.Linear(2, opts.width), nn.Tanh()),
        Dense(opts.width, opts.activation or "tanh"),
        nn.Linear(opts.width, opts.classes),
    )
    if full:
        outcome = full_batch(opts, grid, *parts, data, test)
    else:
        outcome = train_in_levels(opts, grid, single_stage(opts, grid, *parts, data, test))
    outcome["network"].eval()
    outputs = Outputs(grid.comm)
    outputs(str(opts.out / "peaks.png"), plot_classes, opts.out / "peaks.png", opts, outcome["network"], test)
    if not full:
        title, path = f"peaks, {opts.classes} classes: {opts.layers} residual layers", opts.out / "curves.png"
        outputs.on_root(str(path), plot_curves, path, outcome, title)
    report(opts, grid, outcome, {"problem": f"peaks, {opts.classes} classes", "optimizer": opts.optimizer}, outputs)


if __name__ == "__main__":
    run(main)

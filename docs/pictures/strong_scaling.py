"""Seconds of three tasks over the number of ranks in time: predicted from the committed calibrations, and measured."""

from functools import cache

from matplotlib.ticker import LogLocator, NullFormatter
from style import Theme, plt, save

from pint_fem.scaling.network import Network
from pint_fem.scaling.planner import cycles_of, predict
from tests.benchmarks.scaling.layer_model import predict_training
from tests.benchmarks.scaling.records import load

NETWORK = Network.parse("2us,12GB/s")
RANKS = (1, 2, 4, 8, 16, 32, 64, 128)
MEASURED = {
    "heat source, 512 steps": (604 / 613, 295 / 277),
    "Maxwell cavity, 128 steps": (419 / 431, 254 / 268),
    "4,096 layers": (271 / 275, 153 / 159),
}
"""Measured over predicted seconds on one and on two ranks, of tests/benchmarks/scaling/README.md: predictions there are
at the speed that the machine had during the run.
"""


def _gradient(name, options, rtol, steps):
    c = load(name)
    cycles, given = cycles_of(c, options, rtol), dict(nsteps=steps, network=NETWORK)
    ours = [predict(c, options, (1, p), cycles, **given).seconds for p in RANKS if p <= steps // 2]
    return ours, predict(c, {"levels": 1}, (1, 1), (0, 0), **given).seconds


@cache
def curves():
    """Predicted seconds on :data:`RANKS`, and of the baseline on one rank."""
    heat = {"levels": 3, "coarsening": (8, 4), "relax": "FCF"}, {"time_solver": "paradiag", "alpha": 1e-4}
    network, found = load("resnet-4096"), {}
    found["heat source, 512 steps"] = *_gradient("heat-source", heat[0], 1e-6, 512), "gradient", "sequential steps"
    found["Maxwell cavity, 128 steps"] = (
        *_gradient("maxwell-cavity", heat[1], 1e-6, 128),
        "gradient",
        "sequential steps",
    )
    options = dict(iterations=(1, 1), network=NETWORK)
    m32 = {"levels": 2, "coarsening": (32,), "relax": "F"}
    layers = [predict_training(network, m32, p, **options).seconds for p in RANKS]
    found["4,096 layers"] = layers, network.baseline["step"], "training step", "serial torch, measured"
    return found


def draw(path, dark):
    """A panel for each task."""
    look = Theme(dark)
    with look.used():
        fig, axes = plt.subplots(1, 3, figsize=(9.6, 3.6), layout="constrained")
        solvers = ("MGRIT, m = 8 and 4", "ParaDiag", "MGRIT, m = 32")
        for ax, (name, (ours, alone, task, baseline)), solver in zip(axes, curves().items(), solvers, strict=True):
            dashed = baseline.endswith("measured")
            label = baseline if dashed else f"{baseline}, predicted"
            ax.axhline(alone, color=look.text, lw=1, ls="--", label=label)
            ranks = RANKS[: len(ours)]
            ax.loglog(ranks, ours, "o-", color=look.blue, mfc=look.page, ms=5, base=2, label=f"{solver}, predicted")
            near = [ratio * seconds for ratio, seconds in zip(MEASURED[name], ours, strict=False)]
            style = dict(color=look.orange, marker="*", ms=13, mec=look.page, mew=0.6, ls="none", zorder=3)
            ax.plot((1, 2), near, label=f"{solver}, measured", **style)
            ax.set_yscale("log", base=10)
            ax.set(title=f"{name[0].upper()}{name[1:]}: {task}", xlabel="ranks in time", xticks=RANKS)
            ax.title.set_fontsize(10)
            ax.xaxis.set_major_formatter("{x:g}")
            ax.grid(lw=0.5)
            ax.legend(fontsize=8)
            low, high = ax.get_ylim()
            ax.set_ylim(low, 3.2 * high)
            ax.yaxis.set(major_locator=LogLocator(subs=(1, 3)), major_formatter="{x:g}")
            ax.yaxis.set(minor_formatter=NullFormatter())
        axes[0].set_ylabel("time in s")
        save(fig, path)

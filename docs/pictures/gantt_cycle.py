"""What each rank does when in one MGRIT cycle of the plate, from the trace that the solver writes on virtual ranks."""

from functools import cache

from style import Theme, plt, save

from pint_fem.scaling import costs
from pint_fem.scaling.model import Model, Solve
from pint_fem.scaling.network import Network

OPTIONS = {"coarsening": (8, 4), "relax": "FCF"}
RANKS, STEPS, NETWORK = 4, 512, "2us,12GB/s"


@cache
def traces():
    """The events of each rank."""
    model = Model(costs.load("heat-source"), OPTIONS, (1, RANKS), nsteps=STEPS, network=Network.parse(NETWORK))
    return model.run(Solve("state", "guess", 1), trace=True).traces


def kind_of(event):
    """Name of the bar of an event: steps by their level, waiting, and all else."""
    if event["name"] in ("phi", "sweep"):
        return f"steps, level {event['tid']}"
    return "waiting for another rank" if event["name"] == "wait" else "norms over all ranks"


def draw(path, dark):
    """A row of bars for each rank."""
    look = Theme(dark)
    colours = {
        "steps, level 0": (look.blue, ""),
        "steps, level 1": (look.sky, ""),
        "steps, level 2": (look.green, ""),
        "norms over all ranks": (look.purple, ""),
        "waiting for another rank": ("none", "////"),
    }
    bars = {}
    for rank, events in enumerate(traces()):
        for event in events:
            if event["ph"] == "X" and event["dur"] > 0:
                bars.setdefault((kind_of(event), rank), []).append((event["ts"] / 1e3, event["dur"] / 1e3))
    with look.used():
        plt.rcParams["hatch.color"], plt.rcParams["hatch.linewidth"] = look.orange, 0.8
        fig, ax = plt.subplots(figsize=(9.6, 0.5 * RANKS + 1.5), layout="constrained")
        seen = {}
        for (kind, rank), spans in sorted(bars.items()):
            colour, hatch = colours[kind]
            edge = look.orange if hatch else "none"
            given = dict(facecolor=colour, hatch=hatch, edgecolor=edge, linewidth=0.5 if hatch else 0)
            seen.setdefault(kind, ax.broken_barh(spans, (rank - 0.38, 0.76), **given))
        ax.set(xlabel="time in ms (predicted)", ylabel="rank in time", yticks=range(RANKS))
        ax.set_title(f"One cycle over {STEPS} steps, m = 8 and 4, FCF-relaxation", pad=26)
        ax.invert_yaxis()
        ax.set_xlim(0, None)
        names = [kind for kind in colours if kind in seen]
        place = dict(loc="lower left", bbox_to_anchor=(-0.01, 0.98), ncols=5, fontsize=9, handlelength=1.4)
        ax.legend([seen[kind] for kind in names], names, columnspacing=1.2, **place)
        save(fig, path)

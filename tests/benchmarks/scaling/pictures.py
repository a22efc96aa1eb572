"""Plots of the model's reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

from tests.benchmarks.scaling.strong import Curve

__all__ = ["gantt", "loglog"]

_COLOURS = {"phi": "tab:blue", "sweep": "tab:orange", "wait": "tab:red", "norm": "tab:green"}
_COLOURS |= {"transpose": "tab:pink", "fft": "tab:olive", "frequencies": "tab:purple"}


def loglog(path: Path, curves: Mapping[str, Sequence[Curve]], title: str) -> None:
    """A panel a task: seconds over ranks."""
    fig, axes = plt.subplots(1, len(curves), figsize=(4.6 * len(curves), 4.2), layout="constrained", squeeze=False)
    for (task, lines), ax in zip(curves.items(), axes[0], strict=True):
        for line in lines:
            plain = any(word in line.name for word in ("pyadjoint", "torch"))
            style = "o-" if line.name.startswith(("MGRIT", "time-parallel")) else "k--" if plain else "s-"
            ax.loglog(line.ranks, line.seconds[task], style, ms=3, label=line.name, base=2)
        ax.set(title=task, xlabel="processes")
        ax.set_yscale("log", base=10)
        ax.grid(alpha=0.3)
    axes[0][0].set_ylabel("seconds (predicted)")
    axes[0][0].legend(fontsize=8)
    fig.suptitle(title)
    fig.savefig(path, dpi=140)
    plt.close(fig)


def gantt(path: Path, traces: Sequence[Sequence[dict]], title: str) -> None:
    """Work and waiting of each rank over time, from traces (virtual or real ones)."""
    fig, ax = plt.subplots(figsize=(11, 0.42 * len(traces) + 1.6), layout="constrained")
    seen = {}
    for rank, events in enumerate(traces):
        bars: dict[tuple[str, int], list] = {}
        for event in events:
            if event["ph"] == "X" and event["dur"] > 0:
                name = event["name"] if event["name"] in _COLOURS else "norm"
                level = 0 if name in ("wait", "norm") else event["tid"]
                bars.setdefault((name, level), []).append((event["ts"] / 1e3, event["dur"] / 1e3))
        for (name, level), spans in sorted(bars.items()):
            label = f"{name}, level {level}" if name in ("phi", "sweep") else name
            shade = {"facecolors": _COLOURS[name], "alpha": max(1 - 0.25 * level, 0.25)}
            seen.setdefault(label, ax.broken_barh(spans, (rank - 0.4, 0.8), **shade))
    ax.set(xlabel="milliseconds (predicted)", ylabel="time rank", title=title)
    ax.invert_yaxis()
    ax.legend(seen.values(), seen.keys(), ncols=4, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    fig.savefig(path, dpi=140)
    plt.close(fig)

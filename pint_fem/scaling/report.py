"""Tables and plots of what the model predicts: strong and weak scaling, the published experiment, one cycle."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from pint_fem.scaling import published
from pint_fem.scaling.costs import Calibration, bundled, load
from pint_fem.scaling.model import Model, Solve
from pint_fem.scaling.network import Network
from pint_fem.scaling.planner import cycles_of, describe, least_time
from pint_fem.scaling.space import assumption
from pint_fem.scaling.strong import Curve, crossover, opponents, strong, weak

__all__ = ["cheapest", "report"]

TASKS = ("state", "gradient", "hessian", "inversion")


def cheapest(calibration: Calibration, rtol: float, **model) -> Callable[[int], tuple[Mapping, tuple[int, int]]]:
    """The configuration for a number of time ranks: that of the least sum of its share of the work and its chain of
    coarse steps, among those whose cycles were counted.
    """
    menu = {json.dumps(e["options"]): e["options"] for e in calibration.cycles if e["rtol"] == rtol}

    def choose(ranks: int):
        def time_of(options):
            work, chain = least_time(calibration, options, 1, cycles_of(calibration, options, rtol), **model)
            return work / ranks + chain

        options = min(menu.values(), key=time_of)
        return options, cycles_of(calibration, options, rtol)

    return choose


class _Text:
    """Lines on the screen and in a file."""

    def __init__(self):
        self.lines: list[str] = []

    def __call__(self, line: str = "") -> None:
        print(line, flush=True)
        self.lines.append(line)


def _powers(largest: int) -> list[int]:
    out = [1]
    while 2 * out[-1] <= largest:
        out.append(2 * out[-1])
    return out


def report(
    out: Path, *, largest: int = 256, network: Network | None = None, rtol: float | None = None, names=None
) -> None:
    """Write all tables and plots to a folder.

    Parameters
    ----------
    out
        The folder.
    largest
        Ranks to go up to. 16,384 take some minutes.
    network
        Default: each calibration's.
    rtol
        Tolerance; default: the largest for which cycles were counted.
    names
        Calibrations; default: all bundled ones.
    """
    out.mkdir(parents=True, exist_ok=True)
    say, data, start = _Text(), {}, time.perf_counter()
    say("All seconds below are PREDICTED by the model unless a line says measured.")
    for name in names or bundled():
        data[name] = _problem(load(name), out, say, largest, network, rtol)
    data["published"] = _published(say, min(largest, 16384))
    say(f"\nreport made in {time.perf_counter() - start:.0f} s")
    (out / "report.txt").write_text("\n".join(say.lines) + "\n", encoding="utf-8")
    (out / "report.json").write_text(json.dumps(data, indent=1, default=float), encoding="utf-8")


def _problem(c: Calibration, out: Path, say, largest: int, network: Network | None, rtol: float | None) -> dict:
    from pint_fem.scaling.pictures import gantt, loglog

    rtol = rtol or max(e["rtol"] for e in c.cycles)
    ranks = [p for p in _powers(largest) if p <= c.nsteps]
    chosen = cheapest(c, rtol, network=network)
    say(f"\n{c.problem}: {c.unknowns} unknowns, {c.nsteps} steps, cold solves to {rtol:g}")
    say(f"  network {network or c.network}")
    if len(c.busy) > 1:
        say(f"  work with several processes at once takes {max(c.busy.values()):.2f} times as long as alone (measured)")
    if c.may_split(2):
        say(f"  assumed: {assumption(c)}")
    for note in c.notes:
        say(f"  calibration: {note}")
    ours = strong(c, chosen, (0, 0), ranks, network=network)
    others = opponents(c, ranks, network=network)
    tasks = [t for t in TASKS if t in ours.seconds]
    rows = []
    for i, p in enumerate(ours.ranks):
        options, cycles = chosen(p)
        what = f"{describe(options)}: {cycles[0]}+{cycles[1]}"
        rows.append([str(p), what, *(f"{ours.seconds[t][i]:.4g}" for t in tasks), f"{ours.efficiency[i]:.0%}"])
    _table(say, ["ranks", "solver: cycles", *tasks, "busy"], rows)
    for other in others:
        say(f"  {other.name}: " + ", ".join(f"{t} {other.seconds[t][-1]:.4g} s" for t in tasks))
        for t in tasks:
            best = min(range(len(ours.ranks)), key=lambda i, t=t: ours.seconds[t][i])
            gain, at = other.seconds[t][-1] / ours.seconds[t][best], ours.ranks[best]
            cross = crossover(ours, other, t)
            gains = {p: round(b / a, 2) for p, a, b in zip(ours.ranks, ours.seconds[t], other.seconds[t], strict=True)}
            say(
                f"    {t}: crossover {'none' if cross is None else f'at {cross:.0f} ranks'}, "
                f"best speed-up {gain:.3g} at {at} ranks"
                + "".join(f"; {gains[p]:.3g} at {p}" for p in (64, 256, 1024, 4096) if p in gains and p != at)
            )
    panels = {t: [ours, *others] for t in tasks}
    loglog(out / f"strong_{c.problem}.png", panels, f"{c.problem}: predicted strong scaling")
    a_rank, counts = 32, [p for p in ranks if 2 <= p <= 1024]
    flat = weak(c, cheapest(c, rtol, network=network, nsteps=a_rank * 64), a_rank, counts, network=network)
    say(f"  {flat.name} (cycles as on the whole grid):")
    _table(say, ["ranks", "gradient", "busy"], [
        [str(p), f"{s:.4g}", f"{e:.0%}"]
        for p, s, e in zip(flat.ranks, flat.seconds["gradient"], flat.efficiency, strict=True)
    ])  # fmt: skip
    p = min(8, c.nsteps)
    options, _ = chosen(p)
    said = Model(c, options, (1, p), nsteps=min(c.nsteps, 512), network=network).run(
        Solve("state", "guess", 1), trace=True
    )
    gantt(out / f"cycle_{c.problem}.png", said.traces, f"{c.problem}: one cycle on {p} time ranks")
    return {"ours": asdict(ours), "others": [asdict(o) for o in others], "weak": asdict(flat), "rtol": rtol}


def _published(say, largest: int) -> dict:
    ranks = [p for p in _powers(largest)]
    say("\nXBraid's published experiment, equal kernel costs on all levels, 16 processes in space")
    say("  published: crossover near 256 processes, best speed-up near 10; below: predicted")
    rows, data = [], {}
    for cycles in (10, 12, 15):
        ups = published.speedups(published.xbraid(cycles), ranks)
        data[f"published, {cycles} cycles"] = ups
        rows.append([f"as published, {cycles} cycles", *_summary(ups)])
    for setting in published.settings():
        ups = published.speedups(setting, ranks)
        data[setting.name] = ups
        rows.append([f"{setting.name} ({setting.cycles} cycles, counted)", *_summary(ups)])
    _table(say, ["configuration", "crossover", "best speed-up", "at", *map(str, _SHOWN)], rows)
    say("  cycles are counted by real solves in the basis of modes; with spatial coarsening they are taken as without")
    return data


_SHOWN = (64, 256, 1024, 4096)


def _summary(ups: Sequence[tuple[int, float, float]]) -> list[str]:
    ours = Curve("MGRIT", [p for p, *_ in ups], {"state": [s for _, s, _ in ups]})
    serial = Curve("serial", ours.ranks, {"state": [s * r for _, s, r in ups]})
    cross = crossover(ours, serial, "state")
    best = max(ups, key=lambda row: row[2])
    known = {p: r for p, _, r in ups}
    first = f"{cross:.0f}" if cross else "none"
    return [first, f"{best[2]:.3g}", str(best[0]), *(f"{known[p]:.2g}" if p in known else "" for p in _SHOWN)]


def _table(say, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    left = {i for i, cell in enumerate(rows[0]) if " " in cell} if rows else set()
    for row in [head, *rows]:
        say(
            "  "
            + "  ".join(
                x.ljust(w) if i in left else x.rjust(w) for i, (x, w) in enumerate(zip(row, widths, strict=True))
            )
        )

"""Tables and plots of what the model predicts: strong and weak scaling, the published experiment, one cycle."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cache
from math import prod
from pathlib import Path

from demos.outputs import checked_folder
from pint_fem.cli import say as on_screen
from pint_fem.files import as_input_error, write_whole
from pint_fem.scaling.model import Model, Solve
from pint_fem.scaling.network import Network
from pint_fem.scaling.planner import cycles_of, describe, least_time, options_key
from pint_fem.scaling.space import assumption
from tests.benchmarks.scaling.map_table import map_table
from tests.benchmarks.scaling.published_tables import published_tables
from tests.benchmarks.scaling.records import Record, load
from tests.benchmarks.scaling.records import names as record_names
from tests.benchmarks.scaling.strong import Curve, baselines, crossover, strong, weak
from tests.benchmarks.scaling.tables import Text, powers, table

__all__ = ["cheapest", "report"]

TASKS = ("state", "gradient", "hessian", "inversion")


def cheapest(calibration: Record, rtol: float, **model) -> Callable[[int], tuple[Mapping, tuple[int, int]]]:
    """The configuration for a number of time ranks: that of the least sum of its share of the work and its chain of
    coarse steps, among those whose cycles were counted; that of a gradient within an inversion.
    """
    menu = {options_key(e["options"]): e["options"] for e in calibration.cycles if e["rtol"] == rtol}
    counted = {key: cycles_of(calibration, options, rtol) for key, options in menu.items()}
    network = model.get("network") or calibration.network

    @cache
    def shares(key) -> tuple[float, float]:
        return least_time(calibration, menu[key], 1, counted[key], factored=True, **model)

    def choose(ranks: int):
        def time_of(key) -> float:
            work, chain = shares(key)
            all_to_all = 4 * sum(counted[key]) * network.alltoall(ranks, 0.0) if "time_solver" in menu[key] else 0.0
            return work / ranks + chain + all_to_all

        best = min((key for key in menu if fits(key)), key=time_of)
        return menu[best], counted[best]

    def fits(key) -> bool:
        return "time_solver" not in menu[key] or bool(calibration.paradiag)

    return choose


def report(
    out: Path,
    *,
    largest: int = 256,
    network: Network | None = None,
    rtol: float | None = None,
    names=None,
    choices: bool = True,
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
        Records; default: all.
    choices
        Whether to study what each choice contributes in the published setting (minutes).
    """
    checked_folder(out, "--out")
    say, data, start = Text(), {}, time.perf_counter()
    say("All seconds below are PREDICTED by the model unless a line says measured.")
    claims = []
    every = names or record_names()
    for number, name in enumerate(every, start=1):
        on_screen(f"{number} of {len(every)}: {name}")
        c = load(name)
        if c.kind == "layers":
            from tests.benchmarks.scaling.training_table import training

            data[name], claim = training(c, out, say, largest, network)
        else:
            data[name], claim = _problem(c, out, say, largest, network, rtol)
            if c.linear_inverse:
                claims.append(claim)
                data[name]["map"], claim = map_table(c, say, largest, network)
        claims.append(claim)
    data["published"] = published_tables(say, min(largest, 16384), choices=choices)
    say("\nIn short")
    for claim in claims:
        say(f"  {claim}")
    say(f"\nreport made in {time.perf_counter() - start:.0f} s")
    with as_input_error(f"tables in {out} cannot be written"):
        write_whole(out / "report.txt", ("\n".join(say.lines) + "\n").encode())
        write_whole(out / "report.json", json.dumps(data, indent=1, default=float).encode())


def _problem(c: Record, out: Path, say, largest: int, network: Network | None, rtol: float | None) -> tuple[dict, str]:
    from tests.benchmarks.scaling.pictures import gantt, loglog

    rtol = rtol or max(e["rtol"] for e in c.cycles)
    ranks = [p for p in powers(largest) if p <= c.nsteps]
    chosen = cheapest(c, rtol, network=network)
    say(f"\n{c.problem}: {c.unknowns} unknowns, {c.nsteps} steps, cold solves to {rtol:g}")
    say(f"  network {network or c.network}")
    if len(c.slowdown) > 1:
        say(
            f"  work with several processes at once takes {max(c.slowdown.values()):.2f} times as long as alone "
            "(measured)"
        )
    if c.has_space_ranks(2):
        say(f"  assumed: {assumption(c)}")
    for note in c.notes:
        say(f"  calibration: {note}")
    ours = strong(c, chosen, (0, 0), ranks, network=network, name="time-parallel")
    others = baselines(c, ranks, network=network)
    tasks = [t for t in TASKS if t in ours.seconds]
    rows = []
    for i, p in enumerate(ours.ranks):
        options, cycles = chosen(p)
        what = f"{describe(options)}: {cycles[0]}+{cycles[1]}"
        whole = [describe(ours.inversions[i])] if ours.inversions else []
        rows.append([str(p), what, *(f"{ours.seconds[t][i]:.4g}" for t in tasks), *whole, f"{ours.efficiency[i]:.0%}"])
    table(say, ["ranks", "solver: cycles", *tasks, *(["by"] if ours.inversions else []), "busy"], rows)
    for counted in c.inversions:
        n, what = counted["counts"], describe(counted["options"])
        say(
            f"  inversion, {what}{', inexact' if counted['inexact'] else ''}: {n['values']} values, {n['gradients']} "
            f"gradients, {n['hessians']} Hessian actions (counted with {counted['steps']} steps on "
            f"{counted['unknowns']} unknowns)"
        )
    for other in others:
        both = [t for t in tasks if t in other.seconds]
        say(f"  {other.name}: " + ", ".join(f"{t} {other.seconds[t][-1]:.4g} s" for t in both))
        for t in both:
            best = min(range(len(ours.ranks)), key=lambda i, t=t: ours.seconds[t][i])
            gain, at = other.seconds[t][-1] / ours.seconds[t][best], ours.ranks[best]
            cross = crossover(ours, other, t)
            gains = {p: round(b / a, 2) for p, a, b in zip(ours.ranks, ours.seconds[t], other.seconds[t], strict=True)}
            say(
                f"    {t}: crossover {'none' if cross is None else f'at {cross:.0f} ranks'}, "
                f"best speed-up {gain:.3g} at {at} ranks"
                + "".join(f"; {gains[p]:.3g} at {p}" for p in (64, 256, 1024, 4096) if p in gains and p != at)
            )
    panels = {t: [ours, *(other for other in others if t in other.seconds)] for t in tasks}
    loglog(out / f"strong_{c.problem}.png", panels, f"{c.problem}: predicted strong scaling")
    a_rank, counts = 32, [p for p in ranks if 2 <= p <= 1024]
    flat = weak(c, cheapest(c, rtol, network=network, nsteps=a_rank * 64), a_rank, counts, network=network)
    say(f"  {flat.name} (cycles as on the whole grid):")
    table(say, ["ranks", "gradient", "busy"], [
        [str(p), f"{s:.4g}", f"{e:.0%}"]
        for p, s, e in zip(flat.ranks, flat.seconds["gradient"], flat.efficiency, strict=True)
    ])  # fmt: skip
    p = min(8, c.nsteps)
    options, _ = chosen(p)
    steps = min(c.nsteps, max(512, 4 * prod(options.get("coarsening", ()))))
    said = Model(c, options, (1, p), nsteps=steps, network=network).run(Solve("state", "guess", 1), trace=True)
    gantt(out / f"cycle_{c.problem}.png", said.traces, f"{c.problem}: one cycle on {p} time ranks")
    data = {"ours": asdict(ours), "others": [asdict(o) for o in others], "weak": asdict(flat), "rtol": rtol}
    return data, _claim(c, ours, others, network)


def _claim(c: Record, ours: Curve, others: Sequence[Curve], network: Network | None) -> str:
    """The whole inversion (or a gradient) against each baseline, with what is measured and what predicted."""
    task = "inversion" if "inversion" in ours.seconds else "gradient"
    what = f"{c.problem}, {'whole inversion' if task == 'inversion' else 'one gradient'}, {c.nsteps} steps"
    parts = []
    for other in others:
        if task not in other.seconds:
            continue
        gains = [(p, b / a) for p, a, b in zip(ours.ranks, ours.seconds[task], other.seconds[task], strict=True)]
        best = max(gains, key=lambda x: x[1])
        ten = next((p for p, gain in gains if gain > 10), None)
        first = f"over 10 from {ten} ranks on, " if ten else "never over 10, "
        parts.append(f"{first}at best {best[1]:.3g} at {best[0]} ranks ({gains[0][1]:.3g} at 1) over {other.name}")
    taped = task == "gradient" and len(others) > 1
    return (
        f"{what}: " + "; ".join(parts) + f". Measured: kernels{', pyadjoint a step' if taped else ''} (calibration); "
        f"network: {network or c.network}. Predicted: all times of ours, our serial stepping's too."
    )

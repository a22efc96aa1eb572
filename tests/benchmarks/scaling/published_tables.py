"""Tables of XBraid's published experiment and of ours beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from tests.benchmarks.scaling import choices, published
from tests.benchmarks.scaling.strong import Curve, crossover
from tests.benchmarks.scaling.tables import powers, table

__all__ = ["published_tables"]

SHOWN = (64, 256, 1024, 4096)


def published_tables(say, largest: int, *, choices: bool = True) -> dict:
    """Print them up to a number of processes; data for the report's file.

    ``choices``: also what each of ours contributes.
    """
    ranks = powers(largest)
    say("\nXBraid's published experiment, equal kernel costs on all levels, 16 processes in space")
    say("  published: crossover near 256 processes, best speed-up near 10; below: predicted")
    rows, data = [], {}
    for cycles in (10, 12, 15):
        ups = published.speedups(published.xbraid(cycles), ranks)
        data[f"published, {cycles} cycles"] = ups
        rows.append([f"as published, {cycles} cycles", *_summary(ups)])
    table(say, _head(), rows)
    return data | (_choices(say, largest) if choices else {})


def _choices(say, largest: int) -> dict:
    steps, error = published.equal_accuracy()
    block = choices.block_ratio()
    rows = choices.study([p for p in SHOWN if p <= largest] or [max(largest, 8)], block=block)
    say("  The same setting with our choices, over sequential stepping with the same integrator (all predicted;")
    say("  cycles are counted by real solves in the basis of modes, with spatial coarsening as without it;")
    say(f"  a state in a full block costs {block:.2f} of one alone: measured, heat-square's calibration)")
    say("  each choice alone, on 16 processes in space:")
    _rows(say, rows["alone"])
    say("  all of them, and all but one, on the best split of the processes and the best of some coarsenings:")
    _rows(say, rows["ours"] + rows["without"])
    for row in rows["ours"]:
        split = ", ".join(f"{p}: {s} x {p // s} {name}" for p, (s, name) in row.where.items())
        say(f"    ours, space x time and coarsening: {split}")
    say(
        f"  Steps at equal accuracy: SDIRK2 needs {steps} where backward Euler takes {published.NSTEPS} (largest error "
        f"{error:.2g} of the published solution), {2 * steps} solves instead of {published.NSTEPS}. The tables above "
        "give both as many steps."
    )
    _rows(say, rows["equal"])
    for row in rows["ours"] + rows["equal"]:
        gains = "; ".join(f"{x:.3g} at {p}" for p, x in choices.over_published(row))
        say(f"    {row.name}, over sequential backward Euler with {published.NSTEPS} steps: {gains}")
    return {kind: [asdict(row) for row in found] for kind, found in rows.items()}


def _head() -> list[str]:
    return ["configuration", "crossover", "best speed-up", "at", *map(str, SHOWN)]


def _rows(say, rows: Sequence) -> None:
    head = _head()
    table(say, [*head[:1], "cycles", *head[1:]], [[row.name, row.cycles, *_summary(row.points)] for row in rows])


def _summary(ups: Sequence[tuple[int, float, float]]) -> list[str]:
    if not ups:
        return ["none", "", "", *("" for _ in SHOWN)]
    ours = Curve("ours", [p for p, *_ in ups], {"state": [s for _, s, _ in ups]})
    serial = Curve("serial", ours.ranks, {"state": [s * r for _, s, r in ups]})
    cross = crossover(ours, serial, "state")
    best = max(ups, key=lambda row: row[2])
    known = {p: r for p, _, r in ups}
    below = cross is not None and cross == ours.ranks[0]
    first = "none" if cross is None else f"below {cross:.0f}" if below else f"{cross:.0f}"
    return [first, f"{best[2]:.3g}", str(best[0]), *(f"{known[p]:.2g}" if p in known else "" for p in SHOWN)]

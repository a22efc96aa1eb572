"""What each of our choices contributes in XBraid's published setting: alone on top of it, and missing from all of ours.

Ours are on the best split of the processes and the best of some coarsenings; the published ones are on 16 processes in
space. Speed-ups are over sequential stepping with the same integrator on as many processes in space as are fastest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pint_fem.scaling.model import Model, Solve
from tests.benchmarks.scaling.published import (
    NSTEPS,
    SPACE,
    Setting,
    count_on_modes,
    equal_accuracy,
    sequential_seconds,
    speedups,
)
from tests.benchmarks.scaling.records import load

__all__ = ["CHOICES", "Row", "block_ratio", "family", "fastest", "over_published", "study"]

CHOICES = ("SDIRK2", "lanes", "spatial coarsening", "nested iteration", "inexact, 1e-6", "warm start")
DEEP = (16, *[2] * 9)
MENU = ((16, 4, 4), (8, 4, 4, 4))
SPACES = (4, 16, 64)
NEARBY = 1e-3
"""Difference of the data of the problem whose solution is the warm start."""


@dataclass
class Row:
    """One configuration on some numbers of processes.

    Attributes
    ----------
    name : str
    points : list of (int, float, float)
        Processes, predicted seconds, speed-up over sequential stepping with the same integrator.
    cycles : str
        Counted by real solves.
    where : dict
        By processes: ranks in space and coarsening.
    """

    name: str
    points: list[tuple[int, float, float]]
    cycles: str
    where: dict


def block_ratio(name: str = "heat-square") -> float:
    """Measured cost of a state among eight on lanes relative to one of sequential stepping."""
    kernel = load(name).kernels[1]["step"][0]
    return kernel(8) / 8 / kernel(1)


def family(
    choices: Sequence[str],
    block: float,
    *,
    menu: Sequence[tuple[int, ...]] = MENU,
    nsteps: int = NSTEPS,
) -> list[Setting]:
    """Settings with some choices made, one for each coarsening; cycles by real solves on the problem's modes.

    Spatial coarsening: a coarse level's step costs a quarter of the finer one's; cycles are taken as without.
    """
    has = set(choices)
    if has - set(CHOICES):
        raise ValueError(f"choices {has - set(CHOICES)}: known are {', '.join(CHOICES)}")
    tableau, stages = ("SDIRK2", 2) if "SDIRK2" in has else ("backward Euler", 1)
    start = "guess" if "warm start" in has else "nested" if "nested iteration" in has else "skip"
    rtol, nearby = 1e-6 if "inexact, 1e-6" in has else 1e-9, NEARBY if "warm start" in has else None
    out = []
    for factors in menu:
        options = {"levels": len(factors) + 1, "coarsening": factors, "relax": "FCF"}
        how = dict(start=start, rtol=rtol, nearby=nearby, nsteps=nsteps, longer=NSTEPS / nsteps)
        cycles = count_on_modes(options, tableau, **how)
        coarse = 0.25 if "spatial coarsening" in has else 1.0
        blocks = block if "lanes" in has else 1.0
        out.append(Setting("x".join(map(str, factors)), options, cycles, start, stages, blocks, coarse, nsteps))
    return out


def _bound(setting: Setting, space: int) -> tuple[float, float]:
    """Work on one time rank, and the chain of the coarsest level."""
    model = Model(setting.calibration(), setting.options, (space, 1))
    said = model.run(Solve("state", setting.start, setting.cycles))
    steps = setting.nsteps
    for m in model.options.factors(steps):
        steps //= m
    solves = setting.cycles + (setting.start != "guess")
    return sum(said.work), solves * steps * model.kernel("step", model.options.levels - 1)(1)


def fastest(settings: Sequence[Setting], counts: Sequence[int], spaces: Sequence[int] = SPACES) -> tuple[list, dict]:
    """Points of the best setting and split on each number of processes, and which these are."""
    bounds = {(i, space): _bound(s, space) for i, s in enumerate(settings) for space in spaces if space < max(counts)}
    points, where = [], {}
    for count in counts:
        tried = [
            (max(work / (count // space), chain), i, space)
            for (i, space), (work, chain) in bounds.items()
            if 2 * space <= count and count // space <= settings[i].nsteps
        ]
        best = None
        for least, i, space in sorted(tried):
            if best is not None and least >= best[1]:
                break
            point = speedups(settings[i], [count], space)[0]
            if best is None or point[1] < best[1]:
                best, where[count] = point, (space, settings[i].name)
        if best is not None:
            points.append(best)
    return points, where


def _row(name: str, settings: Sequence[Setting], counts: Sequence[int], spaces: Sequence[int] = SPACES) -> Row:
    points, where = fastest(settings, counts, spaces)
    used = {name for _, name in where.values()}
    cycles = sorted({s.cycles for s in settings if s.name in used})
    return Row(name, points, "-".join(map(str, cycles[:: max(len(cycles) - 1, 1)])), where)


def study(
    counts: Sequence[int],
    *,
    block: float | None = None,
    menu: Sequence[tuple[int, ...]] = MENU,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, list[Row]]:
    """Rows ``"alone"`` (the published configuration, and with one choice more), ``"ours"`` and ``"without"`` (ours
    with one choice less), ``"equal"`` (ours with as many steps of SDIRK2 as backward Euler's accuracy needs).
    """
    block = block_ratio() if block is None else block
    out: dict[str, list[Row]] = {"alone": [], "ours": [], "without": [], "equal": []}
    for choice in ((), *((c,) for c in CHOICES)):
        progress(f"published {choice}")
        name = f"published + {choice[0]}" if choice else "published options"
        out["alone"].append(_row(name, family(choice, block, menu=(DEEP,)), counts, (SPACE,)))
    progress("ours")
    between = sorted({*counts, *(p for p in (8, 16, 32, 128, 512) if min(counts) // 8 <= p <= max(counts))})
    out["ours"].append(_row("ours", family(CHOICES, block, menu=menu), between))
    for missing in CHOICES:
        if missing == "nested iteration":  # a warm start has none
            continue
        progress(f"without {missing}")
        rest = [c for c in CHOICES if c != missing]
        out["without"].append(_row(f"ours without {missing}", family(rest, block, menu=menu), counts))
    steps, _ = equal_accuracy()
    few = family(CHOICES, block, menu=((4,), (4, 2), (8,), (2, 2, 2)), nsteps=steps)
    out["equal"].append(_row(f"ours, {steps} steps", few, [p for p in counts if p <= 4 * steps]))
    return out


def over_published(row: Row) -> list[tuple[int, float]]:
    """Speed-ups over the published baseline, sequential backward Euler, on at most as many processes."""
    return [(p, sequential_seconds(1, NSTEPS, p) / s) for p, s, _ in row.points]

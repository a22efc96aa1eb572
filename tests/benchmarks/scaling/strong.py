"""Strong and weak scaling of a problem's tasks, and the times of its baselines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import exp, log, prod

from pint_fem.scaling.model import Model, Solve
from pint_fem.scaling.network import Network
from tests.benchmarks.scaling.inversions import best_inversion, candidates, inversion_seconds, serial_inversion
from tests.benchmarks.scaling.records import Record

__all__ = ["Curve", "baselines", "crossover", "strong", "weak"]


@dataclass
class Curve:
    """Seconds of each task for each number of ranks.

    Attributes
    ----------
    name : str
    ranks : list of int
    seconds : dict
        By task, as long as ``ranks``.
    efficiency : list of float
        Of one gradient: work over ranks times seconds.
    inversions : list of Mapping
        Options of the solver of each whole inversion, where one was counted.
    """

    name: str
    ranks: list[int]
    seconds: dict[str, list[float]]
    efficiency: list[float] = field(default_factory=list)
    inversions: list[Mapping] = field(default_factory=list)


def task_seconds(
    calibration: Record,
    options: Mapping,
    grid: tuple[int, int],
    cycles: tuple[int, int],
    *,
    nsteps: int | None = None,
    network: Network | None = None,
) -> tuple[dict[str, float], float]:
    """Seconds of a cold state, gradient and Hessian action on one grid, from one run of the virtual ranks, and a
    gradient's efficiency.
    """
    model = Model(calibration, options, grid, nsteps=nsteps, network=network)
    cold_state, cold_adjoint = (Solve(k, "nested", n) for k, n in zip(("state", "adjoint"), cycles, strict=True))
    diagonal = model.solver == "paradiag"
    tasks = [
        *[("solves", [cold_state])] * (2 if diagonal else 1),  # the first one makes ParaDiag's factors
        ("value", [cold_state]),
        ("derivative", [cold_adjoint]),
        ("hessian", [Solve("tangent", "nested", cycles[0]), cold_adjoint]),
    ]
    said = model.run_all(tasks)
    state, *others = said.task_seconds
    factors = state - others.pop(0) if diagonal else 0.0
    value, derivative, hessian = others
    out = {"state": state, "gradient": factors + value + derivative, "hessian": hessian}
    return out, sum(said.work) / (grid[1] * said.seconds)


def strong(
    calibration: Record,
    options: Mapping | Callable[[int], tuple[Mapping, tuple[int, int]]],
    cycles: tuple[int, int],
    ranks: Sequence[int],
    *,
    space: int = 1,
    name: str = "MGRIT",
    progress: Callable[[str], None] = lambda text: None,
    **model,
) -> Curve:
    """All tasks on ``ranks`` processes, ``space`` of them in space; ``options`` may depend on the number of time ranks:
    a function to options and cycles. Whole inversions are the fastest of those that were counted.
    """
    curve = Curve(name, [], {})
    among = candidates(calibration, **model) if space == 1 else []
    for count in ranks:
        time = count // space
        if time < 1 or count % space:
            continue
        chosen, n = options(time) if callable(options) else (options, cycles)
        seconds, efficiency = task_seconds(calibration, chosen, (space, time), n, **model)
        if among and (whole := best_inversion(calibration, time, among=among, **model)):
            seconds["inversion"] = whole.seconds
            curve.inversions.append(whole.options)
        curve.ranks.append(count)
        curve.efficiency.append(efficiency)
        for task, value in seconds.items():
            curve.seconds.setdefault(task, []).append(value)
        progress(f"{name}, {count} ranks: gradient {seconds['gradient']:.3g} s")
    return curve


def baselines(calibration: Record, ranks: Sequence[int], **model) -> list[Curve]:
    """Our serial stepping with the best number of space ranks up to each count, and serial pyadjoint (without whole
    inversions: other optimisers than ours are the best ones on a tape).
    """
    best: dict[str, float] = {}
    where = "parallel in space" if calibration.has_space_ranks(2) else "on one rank (space ranks were not measured)"
    ours, counts = Curve(f"our serial stepping, {where}", [], {}), sorted(ranks)
    for count in counts:
        space = count if calibration.has_space_ranks(count) else 1
        seconds, _ = task_seconds(calibration, {"levels": 1}, (space, 1), (0, 0), **model)
        if counted := serial_inversion(calibration):
            seconds["inversion"] = inversion_seconds(calibration, counted, (space, 1), **model)
        for task, value in seconds.items():
            best[task] = min(best.get(task, value), value)
            ours.seconds.setdefault(task, []).append(best[task])
        ours.ranks.append(count)
    out = [ours]
    if calibration.baseline:
        o, n = calibration.baseline, model.get("nsteps") or calibration.nsteps
        whole = {task: o[task] * n + o.get(f"{task} fixed", 0.0) for task in ("value", "gradient", "hessian")}
        each = {"state": whole["value"], "gradient": whole["value"] + whole["gradient"], "hessian": whole["hessian"]}
        out.append(Curve("serial pyadjoint", counts, {task: [value] * len(counts) for task, value in each.items()}))
    return out


def crossover(curve: Curve, other: Curve, task: str) -> float | None:
    """Number of ranks from which a curve is below another one, interpolated in the logarithms; ``None``: never."""
    pairs = [
        (p, a / b)
        for p, a in zip(curve.ranks, curve.seconds[task], strict=True)
        for q, b in zip(other.ranks, other.seconds[task], strict=True)
        if p == q
    ]
    for (p, r), (q, s) in pairwise(pairs):
        if r > 1 >= s:
            return exp(log(p) + log(r) / (log(r) - log(s)) * (log(q) - log(p)))
    return float(pairs[0][0]) if pairs and pairs[0][1] <= 1 else None


def weak(
    calibration: Record,
    options: Callable[[int], tuple[Mapping, tuple[int, int]]],
    steps_a_rank: int,
    ranks: Sequence[int],
    **model,
) -> Curve:
    """A gradient with a fixed number of steps a time rank."""
    curve = Curve(f"weak scaling, {steps_a_rank} steps a rank", [], {"gradient": []})
    for count in ranks:
        chosen, n = options(count)
        if prod(chosen.get("coarsening", ())) > steps_a_rank * count:  # too few steps for these levels
            continue
        made = Model(calibration, chosen, (1, count), nsteps=steps_a_rank * count, **model)
        said = made.run(Solve("state", "nested", n[0]), Solve("adjoint", "nested", n[1]), task="gradient")
        curve.ranks.append(count)
        curve.seconds["gradient"].append(said.seconds)
        curve.efficiency.append(sum(said.work) / (count * said.seconds))
    return curve

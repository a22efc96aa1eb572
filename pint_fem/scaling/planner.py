"""The fastest process grid, levels and solver for a number of ranks, by predicted times, before a job is queued.

Candidates are sequential stepping on each number of space ranks, and each split of the ranks with each configuration of
MGRIT and ParaDiag whose cycles the calibration has, counted in real runs. A candidate is run on virtual ranks unless a
lower bound of its time, its share of the work or its chain of coarse steps, exceeds the best time so far.

Several experiments divide over groups of ranks, each with a space x time grid of its own on which it computes the
gradients of its experiments one after another; the gradients of the groups are then added
(:meth:`pint_fem.spacetime.SpaceTime.sum_over_experiments`).

Of a linear inverse problem with finitely many readings :func:`plan_map` finds the fastest division of the ranks for the
whole inversion by the map from controls to readings.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from math import ceil, prod
from pathlib import Path
from typing import Any

from pint_fem.all_at_once.options import SHARED
from pint_fem.errors import InputError
from pint_fem.mgrit.options import MGRITOptions
from pint_fem.paradiag.options import ParaDiagOptions
from pint_fem.scaling.costs import Calibration, load
from pint_fem.scaling.linear_inverse import Division, LinearInverse, MapPrediction
from pint_fem.scaling.model import Model, Solve
from pint_fem.scaling.network import Network
from pint_fem.scaling.space import assumption

__all__ = [
    "Choice", "Plan", "cycles_of", "describe", "least_time", "options_key", "plan", "plan_map", "predict",
    "space_ranks",
]  # fmt: skip

ALTERNATIVES = 6
"""Most alternatives in a plan."""


@dataclass
class Choice:
    """One way to solve a problem, and its predicted time.

    Attributes
    ----------
    solver, options : str, dict
        ``"serial"``, ``"mgrit"`` or ``"paradiag"``, and its options.
    grid, cycles : tuple of int
        Numbers of space and time ranks and, for several experiments, of groups of experiments; cycles of the state and
        the adjoint.
    seconds, bytes_per_rank, efficiency : float
        Predicted time of a gradient from a cold start; largest memory of a rank's states and factors; work over ranks
        times seconds.
    """

    solver: str
    grid: tuple[int, ...]
    options: dict
    cycles: tuple[int, int]
    seconds: float
    bytes_per_rank: float
    efficiency: float


@dataclass
class Plan:
    """The fastest choice, and ``alternatives`` from fast to slow, for a problem on at most ``ranks`` processes with
    solves to the relative tolerance ``rtol``; ``assumptions`` are those of the model and notes of the calibration.
    """

    problem: str
    ranks: int
    rtol: float
    best: Choice
    alternatives: list[Choice] = field(default_factory=list)
    assumptions: list[str] = field(default_factory=list)


def describe(options: Mapping) -> str:
    """A short text for options of the model, such as ``"8x4 FCF"``."""
    if options.get("time_solver") == "paradiag":
        return f"ParaDiag, alpha {options['alpha']:g}"
    if "coarsening" not in options:
        return "serial"
    repeated = f", {options['coarse_steps']} steps" if options.get("coarse_steps", 1) > 1 else ""
    return f"{'x'.join(map(str, options['coarsening']))} {options['relax']}{repeated}"


def options_key(options: Mapping) -> tuple[str, MGRITOptions | ParaDiagOptions]:
    """A value that is equal for options of the model with the same cycles, however they are written and ordered;
    tolerances and output are left out.
    """
    kind = options.get("time_solver", "mgrit")
    shaping = {k: v for k, v in options.items() if k not in ("time_solver", "max_it", *SHARED)}
    return kind, (ParaDiagOptions if kind == "paradiag" else MGRITOptions).make(shaping)


def cycles_of(calibration: Calibration, options: Mapping, rtol: float) -> tuple[int, int] | None:
    """Cycles of a cold state and adjoint solve to ``rtol``, as counted in real runs; ``None`` if they were not."""
    key = options_key(options)
    for entry in calibration.cycles:
        if entry["rtol"] == rtol and options_key(entry["options"]) == key:
            return entry["state"], entry["adjoint"]
    return None


def predict(
    calibration: Calibration, options: Mapping, grid: tuple[int, int], cycles: tuple[int, int], **model: Any
) -> Choice:
    """Predict a gradient from a cold start with given cycles of the state and the adjoint; the other arguments are
    those of :class:`~pint_fem.scaling.model.Model`.
    """
    made = Model(calibration, options, grid, **model)
    solves = [Solve(kind, "nested", n) for kind, n in zip(("state", "adjoint"), cycles, strict=True)]
    found = made.run(*solves, task="gradient")
    efficiency = sum(found.work) / (max(found.seconds, 1e-300) * grid[1])
    plain = {} if isinstance(options, MGRITOptions) else dict(options)
    return Choice(made.solver, grid, plain, cycles, found.seconds, found.bytes_per_rank, efficiency)


def space_ranks(calibration: Calibration, ranks: int) -> list[int]:
    """Numbers of space ranks that divide ``ranks`` and that the model covers."""
    return [d for d in range(1, ranks + 1) if ranks % d == 0 and calibration.has_space_ranks(d)]


def plan(
    problem: str | Path | Calibration,
    ranks: int,
    *,
    nsteps: int | None = None,
    rtol: float | None = None,
    network: Network | None = None,
    experiments: int = 1,
) -> Plan:
    """Find the fastest way to compute a gradient from a cold start, for one experiment or a sum over several.

    Parameters
    ----------
    problem
        A calibration, the name of one that comes with the package, or its file.
    ranks
        Largest number of processes.
    nsteps, network
        Time steps, and network; default: the calibration's.
    rtol
        Relative tolerance; default: the smallest for which cycles were counted.
    experiments
        Number of experiments, each with the costs of the calibration.

    Raises
    ------
    InputError
        If there is no such calibration, it is a network's, it has no cycles for ``rtol``, or there is no experiment.
    """
    calibration = problem if isinstance(problem, Calibration) else load(problem)
    for count, what in ((ranks, "ranks"), (experiments, "experiments")):
        if count < 1:
            raise InputError(f"{count} {what}: give at least 1")
    if experiments > 1:
        return _plan_groups(calibration, ranks, experiments, nsteps=nsteps, rtol=rtol, network=network)
    if calibration.kind != "evolution":
        raise InputError(f"calibration {calibration.problem} is that of a network: give one of an evolution")
    steps = nsteps or calibration.nsteps
    tolerances = sorted({entry["rtol"] for entry in calibration.cycles})
    rtol = rtol or (tolerances[0] if tolerances else 0.0)
    if tolerances and rtol not in tolerances:
        raise InputError(f"rtol {rtol:g}: cycles were counted for {', '.join(f'{t:g}' for t in tolerances)}")
    common = dict(nsteps=steps, network=network)
    splits = space_ranks(calibration, ranks)
    done = [predict(calibration, {"levels": 1}, (space, 1), (0, 0), **common) for space in splits]
    best = min(choice.seconds for choice in done)
    menu = {options_key(e["options"]): e for e in calibration.cycles if e["rtol"] == rtol}
    candidates = []
    for entry in menu.values():
        options, cycles = entry["options"], (entry["state"], entry["adjoint"])
        for space in splits:
            time = ranks // space
            if not 1 < time <= steps:
                continue
            try:
                work, chain = least_time(calibration, options, space, cycles, **common)
            except InputError:  # more levels than so few steps have; no ParaDiag on several space ranks
                continue
            candidates.append((max(work / time, chain), space, len(candidates), options, cycles))
    for least, space, _, options, cycles in sorted(candidates, key=lambda c: c[:3]):
        if least >= best:
            break
        done.append(predict(calibration, options, (space, ranks // space), cycles, **common))
        best = min(best, done[-1].seconds)
    done.sort(key=lambda choice: (choice.seconds, choice.grid[0] * choice.grid[1]))
    assumed = "one space rank: the calibration has not measured two, so that more are left out"
    if calibration.has_space_ranks(2):
        assumed = assumption(calibration)
    return Plan(calibration.problem, ranks, rtol, done[0], done[1 : 1 + ALTERNATIVES], [assumed, *calibration.notes])


def _plan_groups(
    calibration: Calibration, ranks: int, experiments: int, *, network: Network | None, **given: Any
) -> Plan:
    """The fastest way for several experiments: of all numbers of groups that have fewer experiments each than the next
    smaller number, with the fastest grids of a group.
    """
    groups = sorted({ceil(experiments / own) for own in range(1, experiments + 1)})
    done, made = [], None
    for count in groups:
        if count > ranks:
            break
        busy = calibration.slowdown_with(count * (ranks // count))  # by the ranks of all groups at once
        made = plan(calibration.with_changes(slowdown={1: busy}), ranks // count, network=network, **given)
        for choice in (made.best, *made.alternatives):
            done.append(_of_groups(calibration, choice, experiments, count, network or calibration.network))
    assert made is not None
    done.sort(key=lambda choice: (choice.seconds, prod(choice.grid)))
    assumed = [f"{experiments} experiments with the same costs, those of a group one after another", *made.assumptions]
    return Plan(made.problem, ranks, made.rtol, done[0], done[1 : 1 + ALTERNATIVES], assumed)


def _of_groups(calibration: Calibration, choice: Choice, experiments: int, groups: int, network: Network) -> Choice:
    """A choice for one experiment on the grid of a group, for all experiments on several of them. A control is as large
    as a state.
    """
    own, nbytes = ceil(experiments / groups), calibration.state_bytes / choice.grid[0]
    added = 0.0 if groups == 1 else network.alltoall(groups, nbytes) + network.collective(groups, nbytes)
    seconds, work = own * choice.seconds + added, experiments * choice.efficiency * choice.seconds
    return replace(
        choice, grid=(*choice.grid, groups), seconds=seconds, bytes_per_rank=own * choice.bytes_per_rank,
        efficiency=work / max(groups * seconds, 1e-300),
    )  # fmt: skip


def least_time(
    calibration: Calibration,
    options: Mapping,
    space: int,
    cycles: tuple[int, int],
    *,
    nsteps: int | None = None,
    network: Network | None = None,
    factored: bool = False,
) -> tuple[float, float]:
    """Lower bounds of the time of a cold state and adjoint solve, from a run of the model on one time rank.

    Parameters
    ----------
    calibration, options, nsteps, network
        As for :class:`~pint_fem.scaling.model.Model`.
    space, cycles
        Number of space ranks; cycles of the state and the adjoint.
    factored
        Whether ParaDiag has its factors already, as in all solves of an inversion but the first.

    Returns
    -------
    work, chain : float
        Seconds of work, which time ranks share, and of the chain of the coarsest level's steps, which they do not.
    """
    model = Model(calibration, options, (space, 1), nsteps=nsteps, network=network)
    found = model.run(Solve("state", "nested", cycles[0]), Solve("adjoint", "nested", cycles[1]))
    work, steps, chain = sum(found.work), model.nsteps, 0.0
    if model.solver == "paradiag":
        factors = found.counts["factor", 0] * model.slowdown * calibration.paradiag["factor"]
        return work - (factors if factored else 0.0), 0.0
    for m in model.options.factors(steps):
        steps //= m
    for kind, n in (("step", cycles[0]), ("adjoint", cycles[1])):
        chain += (n + 1) * steps * model.kernel(kind, model.options.levels - 1)(1)
    return work, chain


def plan_map(
    calibration: Calibration,
    ranks: int,
    *,
    nsteps: int | None = None,
    network: Network | None = None,
    rtol: float | None = None,
    deviation: bool = False,
) -> MapPrediction:
    """Find the fastest division of at most ``ranks`` ranks for an inversion by the map.

    Parameters
    ----------
    calibration, nsteps, network
        As for :class:`LinearInverse`.
    ranks
        Largest number of processes.
    rtol
        Tolerance of adjoint sweeps of groups with several ranks in time; default: the smallest counted.
    deviation
        Whether the time includes that of the standard deviation.

    Raises
    ------
    InputError
        As for :class:`LinearInverse`.
    """
    if ranks < 1:
        raise InputError(f"{ranks} ranks: give at least 1")
    given: dict[str, Any] = dict(nsteps=nsteps, network=network)
    time_of = lambda found: found.with_deviation if deviation else found.seconds
    alone = LinearInverse(calibration, **given)
    best = alone.predict()
    for space in space_ranks(calibration, ranks):
        for time in _sizes(ranks // space, alone.sensors):
            division = Division(space, time, min(time, alone.sensors), 1)
            best = min(best, LinearInverse(calibration, division, **given).predict(), key=time_of)
    for least, made in sorted(_with_groups(calibration, ranks, rtol, given), key=lambda pair: pair[0]):
        if least >= time_of(best):
            break
        best = min(best, made.predict(), key=time_of)
    return best


def _sizes(most: int, sensors: int) -> list[int]:
    """Numbers of ranks in time that are tried: all divisions of the sensors into fewer, powers of two, and the most."""
    some = {ceil(sensors / own) for own in range(1, sensors + 1)} | {1 << i for i in range(most.bit_length())} | {most}
    return sorted(time for time in some if 1 <= time <= most)


def _with_groups(
    calibration: Calibration, ranks: int, rtol: float | None, given: Mapping
) -> Iterator[tuple[float, LinearInverse]]:
    """Inversions with one sensor per group of several ranks in time, and lower bounds of their times: the share of the
    work of a sweep, its chain of coarse steps, and all other parts.
    """
    alone = LinearInverse(calibration, **given)
    tolerance = rtol or min((entry["rtol"] for entry in calibration.cycles), default=0.0)
    menu = {
        options_key(e["options"]): {"options": e["options"], "cycles": e.get("impulse", e["adjoint"])}
        for e in calibration.cycles
        if e["rtol"] == tolerance and e.get("impulse", e["adjoint"]) is not None
    }
    least = cache(lambda key, space: _least_sweep(calibration, menu[key], space, alone.lags, alone.network))
    for space in space_ranks(calibration, ranks):
        most = ranks // space // alone.sensors
        for each in sorted({1 << max(most.bit_length() - 1, 0), most}):
            if not 1 < each <= alone.lags:
                continue
            division = Division(space, alone.sensors * each, alone.sensors, each)
            for key, entry in menu.items():
                with suppress(InputError):  # more levels than so few steps have; no ParaDiag on several space ranks
                    work, chain = least(key, space)
                    made = LinearInverse(calibration, division, **entry, **given)
                    yield max(work / each, chain) + made.predict(sweep=0.0).seconds, made


def _least_sweep(
    calibration: Calibration, entry: Mapping, space: int, lags: int, network: Network
) -> tuple[float, float]:
    """Seconds of work of an adjoint sweep on one rank in time, without ParaDiag's factors, and of its coarse steps."""
    model = Model(calibration, entry["options"], (space, 1), nsteps=lags, network=network)
    found, chain, steps = model.run(Solve("adjoint", "nested", entry["cycles"])), 0.0, lags
    if model.solver == "paradiag":
        factors = found.counts["factor", 0] * model.slowdown * calibration.paradiag["factor"]
        return sum(found.work) - factors, chain
    for m in model.options.factors(steps):
        steps //= m
    chain = (entry["cycles"] + 1) * steps * model.kernel("adjoint", model.options.levels - 1)(1)
    return sum(found.work), chain

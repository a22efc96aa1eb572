"""Before a job is queued: which process grid, levels and solver, by the model.

Candidates are serial stepping on each number of space ranks, and MGRIT on each split of the ranks with each
configuration, or ParaDiag, whose cycles the calibration has counted by real runs. A candidate is run on virtual ranks
unless a lower bound of its time, its share of the work or its chain of coarse steps, is above the best time already.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from pint_fem.all_at_once.options import SHARED
from pint_fem.errors import InputError
from pint_fem.mgrit.options import MGRITOptions
from pint_fem.paradiag.options import ParaDiagOptions
from pint_fem.scaling.costs import Calibration, load
from pint_fem.scaling.model import Model, Prediction, Solve
from pint_fem.scaling.network import Network
from pint_fem.scaling.space import assumption

__all__ = ["Choice", "Plan", "auto_grid", "cycles_of", "describe", "least_time", "options_key", "plan", "predict"]


@dataclass
class Choice:
    """One way to run a problem, and what the model predicts.

    Attributes
    ----------
    solver : str
        ``"serial"``, ``"mgrit"`` or ``"paradiag"``.
    grid : tuple of int
        Space and time ranks.
    options : dict
        Of the solver.
    cycles : tuple of int
        Of the state and the adjoint.
    seconds, bytes_a_rank : float
        Predicted, of one gradient from cold; of a rank's states.
    efficiency : float
        Work over ranks times seconds.
    """

    solver: str
    grid: tuple[int, int]
    options: dict
    cycles: tuple[int, int]
    seconds: float
    bytes_a_rank: float
    efficiency: float

    @property
    def arguments(self) -> str:
        """Command-line arguments of the demos."""
        if self.solver == "serial":
            return f"--grid {self.grid[0]}x1 --time-solver serial"
        words = [f"--grid {self.grid[0]}x{self.grid[1]} --time-solver {self.solver}"]
        own = {k: v for k, v in self.options.items() if k != "time_solver"}
        words += [f"-{self.solver}_{name} {_word(value)}" for name, value in own.items()]
        return " ".join(words)

    @property
    def words(self) -> str:
        """The options for people."""
        return describe(self.options)


@dataclass
class Plan:
    """The best choice, and others from fast to slow.

    Attributes
    ----------
    problem : str
    ranks : int
    rtol : float
        Tolerance of the solves.
    best : Choice
    alternatives : list of Choice
    assumptions : list of str
    """

    problem: str
    ranks: int
    rtol: float
    best: Choice
    alternatives: list[Choice] = field(default_factory=list)
    assumptions: list[str] = field(default_factory=list)


def describe(options: Mapping) -> str:
    """Options of the model for people: ``"8x4 FCF"``."""
    if options.get("time_solver") == "paradiag":
        return f"ParaDiag, alpha {options['alpha']:g}"
    return f"{'x'.join(map(str, options['coarsening']))} {options['relax']}" if "coarsening" in options else "serial"


def _word(value) -> str:
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def options_key(options: Mapping) -> tuple[str, MGRITOptions]:
    """What options of the model mean: equal where the same cycles are done, however they are written and ordered.

    Tolerances and what is printed are left out.
    """
    kind = options.get("time_solver", "mgrit")
    shaping = {k: v for k, v in options.items() if k not in ("time_solver", "max_it", *SHARED)}
    return kind, (ParaDiagOptions if kind == "paradiag" else MGRITOptions).make(shaping)


def cycles_of(calibration: Calibration, options: Mapping, rtol: float) -> tuple[int, int] | None:
    """Cycles of a cold state and adjoint solve to ``rtol``, counted by real runs; ``None`` if they were not."""
    found, wanted = {}, options_key(options)
    for entry in calibration.cycles:
        if entry.get("rtol") == rtol and options_key(entry["options"]) == wanted:
            found[entry["kind"]] = entry["cycles"]
    return (found["state"], found["adjoint"]) if len(found) == 2 else None


def predict(
    calibration: Calibration, options: Mapping, grid: tuple[int, int], cycles: tuple[int, int], **model
) -> tuple[Choice, Prediction]:
    """A gradient from cold, by the model."""
    made = Model(calibration, options, grid, **model)
    solves = [Solve(kind, "nested", n) for kind, n in zip(("state", "adjoint"), cycles, strict=True)]
    said = made.run(*solves, task="gradient")
    used = max(said.seconds, 1e-300) * grid[1]
    plain = {} if isinstance(options, MGRITOptions) else dict(options)
    return Choice(made.solver, grid, plain, cycles, said.seconds, said.bytes_a_rank, sum(said.busy) / used), said


def _spaces(calibration: Calibration, ranks: int) -> list[int]:
    """Numbers of space ranks to look at."""
    return [d for d in range(1, ranks + 1) if ranks % d == 0 and calibration.may_split(d)]


def plan(
    problem: str | Calibration,
    ranks: int,
    *,
    nsteps: int | None = None,
    rtol: float | None = None,
    network: Network | None = None,
    keep: int = 6,
    progress: Callable[[str], None] = lambda text: None,
) -> Plan:
    """Find the fastest way to a gradient.

    Parameters
    ----------
    problem
        A calibration, or the name of one.
    ranks
        Processes to use at most.
    nsteps
        Time steps; default: the problem's.
    rtol
        Tolerance; default: the smallest for which cycles were counted.
    network
        Default: the one measured.
    keep
        Alternatives to report.
    progress
        Gets a line a candidate.

    Returns
    -------
    Plan

    Raises
    ------
    InputError
        If there is no such calibration, or it has no cycles for ``rtol``.
    """
    calibration = problem if isinstance(problem, Calibration) else load(problem)
    if ranks < 1:
        raise InputError(f"{ranks} ranks: give at least 1")
    steps = nsteps or calibration.nsteps
    tolerances = sorted({entry["rtol"] for entry in calibration.cycles})
    rtol = rtol or (tolerances[0] if tolerances else 0.0)
    if tolerances and rtol not in tolerances:
        raise InputError(f"rtol {rtol:g}: cycles were counted for {', '.join(f'{t:g}' for t in tolerances)}")
    common = dict(nsteps=steps, network=network)
    done = [
        predict(calibration, {"levels": 1}, (space, 1), (0, 0), **common)[0] for space in _spaces(calibration, ranks)
    ]
    best = min(choice.seconds for choice in done)
    menu = {options_key(e["options"]): e["options"] for e in calibration.cycles if e["rtol"] == rtol}
    candidates = []
    for options in menu.values():
        cycles = cycles_of(calibration, options, rtol)
        for space in _spaces(calibration, ranks):
            time = ranks // space
            if cycles is None or time == 1 or time > steps:
                continue
            try:
                work, chain = least_time(calibration, options, space, cycles, **common)
            except InputError:  # more levels than so few steps have; no ParaDiag on several space ranks
                continue
            candidates.append((max(work / time, chain), space, len(candidates), options, cycles))
    for least, space, _, options, cycles in sorted(candidates, key=lambda c: c[:3]):
        if least >= best:
            break
        progress(f"{space}x{ranks // space} {options}")
        done.append(predict(calibration, options, (space, ranks // space), cycles, **common)[0])
        best = min(best, done[-1].seconds)
    done.sort(key=lambda choice: (choice.seconds, choice.grid[0] * choice.grid[1]))
    if calibration.may_split(2):
        said = [assumption(calibration)]
    else:
        said = ["one space rank: the calibration has not measured two; more are not looked at"]
    return Plan(calibration.problem, ranks, rtol, done[0], done[1:][:keep], [*said, *calibration.notes])


def least_time(
    calibration: Calibration,
    options: Mapping,
    space: int,
    cycles: tuple[int, int],
    *,
    nsteps: int | None = None,
    network: Network | None = None,
    kept: bool = False,
) -> tuple[float, float]:
    """What bounds the time of a cold state and adjoint from below: the work on one time rank, which others may share,
    and the chain of the coarsest level's steps, which they may not. ``kept``: ParaDiag has its factors already, as in
    all solves of an inversion but the first.

    Source: counted by a run of the model on one time rank.
    """
    model = Model(calibration, options, (space, 1), nsteps=nsteps, network=network)
    said = model.run(Solve("state", "nested", cycles[0]), Solve("adjoint", "nested", cycles[1]))
    steps, chain = model.nsteps, 0.0
    if model.solver == "paradiag":
        made = said.counts["factor", 0] * model.busy * calibration.paradiag["factor"]
        return sum(said.busy) - (made if kept else 0.0), 0.0
    for m in model.options.factors(steps):
        steps //= m
    for kind, sweep, n in (("step", "sweep", cycles[0]), ("adjoint", "adjoint sweep", cycles[1])):
        table = model.work.get(sweep) or model.work[kind]
        chain += (n + 1) * steps * table[min(model.options.levels, len(table)) - 1](1)
    return sum(said.busy), chain


def auto_grid(
    problem: str | Calibration, ranks: int, options: Mapping | MGRITOptions, nsteps: int, rtol: float = 0.0
) -> tuple[int, int]:
    """The fastest split of all ranks for given options, or all in time where nothing better is known.

    Parameters
    ----------
    problem
        A calibration, or the name of one.
    ranks
        All are used.
    options, nsteps
        As for :class:`~pint_fem.scaling.model.Model`.
    rtol
        Of the solves; cycles are those counted for it, or four.

    Returns
    -------
    tuple of int
        Space and time ranks.
    """
    try:
        c = problem if isinstance(problem, Calibration) else load(problem)
        counted = None if isinstance(options, MGRITOptions) else cycles_of(c, options, rtol)
        splits = [(space, ranks // space) for space in _spaces(c, ranks) if ranks // space <= nsteps]
        found = [(predict(c, options, grid, counted or (4, 4), nsteps=nsteps)[0].seconds, grid) for grid in splits]
        return min(found)[1]
    except (InputError, ValueError):  # no calibration, options that the solver itself will refuse, too many ranks
        return 1, ranks

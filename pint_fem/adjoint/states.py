r"""State and adjoint at a control as Firedrake functions, at all own points or at given times.

Each point of the time axis belongs to one rank in time: the points ``lo + 1 .. hi`` to the rank that steps to them, the
initial value to the first rank. Functions at *given* times are sent from their owners to all ranks in time, one state
for each time and never a trajectory. On a grid with groups of experiments the points belong to ranks of the group that
solves the evolution; states at given times are sent to the other groups, too. Where only C-points are stored, the
states between them are recomputed one interval after another.

The adjoint :math:`\lambda_n = dJ/du_n` is the derivative of :math:`J` by the state at :math:`t_n`, from which the
evolution continues; it is a vector of the dual space, and :math:`\lambda_0` the derivative by the initial condition. As
a function it is represented in an inner product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np
from firedrake import Cofunction, Function
from pyadjoint.tape import stop_annotating

from pint_fem.adjoint.interface import ControlProblem
from pint_fem.adjoint.problem import ReducedProblem
from pint_fem.adjoint.riesz import RieszKind, RieszMap
from pint_fem.collective import any_rank, collectively, require_same
from pint_fem.errors import InputError
from pint_fem.evolution.evolution import Evolution
from pint_fem.kernels.arrays import put
from pint_fem.misfits.sensor_readings import SensorReadings
from pint_fem.paraview import write_fields
from pint_fem.spacetime import SpaceTime

Times: TypeAlias = float | Sequence[float] | None
"""A time, several, or all points."""

if TYPE_CHECKING:
    from pint_fem.adjoint.minimisation.bounds_and_constraints import Controls

__all__ = ["FinalState", "StateAccess", "point_numbers"]

_ON_GRID = 1e-6
"""Largest distance of a given time from a point, in time steps."""


def _own_points(problem: ReducedProblem) -> range:
    """Numbers of the points that belong to this rank in time."""
    slab = problem.sweeps.slab
    return range(0 if slab.is_first else slab.lo + 1, slab.hi + 1)


def point_numbers(evolution: Evolution, times: Sequence[float]) -> list[int]:
    """Return the numbers of the points at given times; ``InputError`` for a time that is not one of the evolution's."""
    numbers = []
    try:
        times = [float(time) for time in times]
    except (TypeError, ValueError) as error:
        raise InputError(f"times = {times!r}: give a number or a list of numbers") from error
    for time in times:
        place = (time - evolution.t0) / evolution.dt
        n = round(place) if np.isfinite(place) else -1
        if not 0 <= n <= evolution.nsteps or abs(place - n) > _ON_GRID:
            end = float(evolution.time(evolution.nsteps))
            inside, near = evolution.t0 <= time <= end, ""
            if inside:
                near = f"; near it are {evolution.time(int(place)):.9g} and {evolution.time(int(place) + 1):.9g}"
            raise InputError(
                f"time {time!r} is no point of the evolution, whose times are t0 + n dt from {evolution.t0:.9g} to "
                f"{end:.9g} with dt = {evolution.dt:.9g}{near}"
            )
        numbers.append(n)
    return numbers


def _chosen(problem: ControlProblem, evolution: Evolution | None) -> Evolution:
    """The evolution that is meant: the one that is given, or the only one."""
    found = problem.evolutions
    if evolution is None and len(found) > 1:
        raise InputError(f"the functional has {len(found)} evolutions: give the one that is meant as evolution=")
    if evolution is not None and evolution not in found:
        raise InputError("evolution=: give one of those that the functional was made of")
    return found[0] if evolution is None else evolution


class _Solved(NamedTuple):
    """An evolution of a functional, the group of experiments that solves it, and its problems with their weights and
    controls, of which there are none in other groups.
    """

    evolution: Evolution
    spacetime: SpaceTime
    group: int
    terms: list[tuple[float, ReducedProblem, np.ndarray]]

    @property
    def leaf(self) -> ReducedProblem | None:
        """The problem in the group that solves it."""
        return self.terms[0][1] if self.terms else None


def _solved(problem: ControlProblem, z: np.ndarray, evolution: Evolution | None) -> _Solved:
    """The evolution that is meant, the same one on all ranks (collective)."""
    spacetime = problem.spacetime
    chosen = collectively(spacetime.comm, "", _chosen, problem, evolution)
    require_same(spacetime.comm, evolution=problem.evolutions.index(chosen))
    terms = collectively(spacetime.comm, "", problem.leaf_terms, np.ravel(z))
    group = problem.group_of(chosen)
    own = [t for t in terms if t[1].evolution is chosen and spacetime.experiments_comm.rank == group]
    return _Solved(chosen, spacetime, group, own)


def _checked_numbers(solved: _Solved, times: Times) -> list[int] | None:
    """Numbers of the points at one or several times, which have to be the same on all ranks (collective)."""
    comm, ev, given = solved.spacetime.comm, solved.evolution, [times] if isinstance(times, Real) else times
    numbers = collectively(comm, "", lambda: None if given is None else point_numbers(ev, given))
    require_same(comm, times=None if numbers is None else ev.time(np.array(numbers)).tolist())
    return numbers


def _checked_path(path: str | Path) -> Path:
    try:
        path = Path(path)
    except TypeError as error:
        raise InputError(f"write: {path!r} is no name of a file; give one such as 'state.pvd'") from error
    if path.suffix != ".pvd":
        raise InputError(f"write: {path} has no name for ParaView; give one that ends with .pvd, such as 'state.pvd'")
    return path


def _filled(f: Function | Cofunction, row: np.ndarray) -> Function | Cofunction:
    put(f, row)
    return f


def _functions(solved: _Solved, blocks: Callable[[], Iterable[tuple[int, np.ndarray]]], times: Times, make: Callable):
    """Functions that ``make`` returns for the rows of a rank's own points, or of given times on all ranks (collective).

    ``blocks()`` yields the states of the local points in the group that solves the evolution.
    """
    single, numbers, leaf = isinstance(times, Real), _checked_numbers(solved, times), solved.leaf
    rows: dict = {} if leaf is None else {n: None for n in _own_points(leaf) if numbers is None or n in numbers}

    def collect() -> None:
        for first, block in blocks() if leaf is not None else ():
            for n, row in enumerate(block, start=leaf.sweeps.slab.lo + first):
                if n in rows:
                    rows[n] = make(row) if numbers is None else row.copy()

    with stop_annotating():
        collectively(solved.spacetime.comm, "", collect)
        if numbers is None:
            return list(rows.values())
        made = [make(_sent(rows.get(n), n, solved)) for n in numbers]
    return made[0] if single else made


def _sent(row: np.ndarray | None, n: int, solved: _Solved) -> np.ndarray:
    """The row of a point on all ranks in time and in all groups of experiments, from its owner."""
    shape, leaf = (solved.evolution.state_size,), solved.leaf
    if leaf is not None:
        owner = max(int(np.searchsorted(leaf.sweeps.slab.bounds, n)) - 1, 0)
        row = np.empty(shape) if row is None else np.ascontiguousarray(row)
        leaf.spacetime.time_comm.Bcast(row, root=owner)
    return solved.spacetime.from_group(solved.group, row, shape)


class StateAccess:
    """Methods of a functional that return state and adjoint as Firedrake functions; it has ``problem`` and ``_at``."""

    problem: ControlProblem

    def own_times(self, evolution: Evolution | None = None) -> np.ndarray:
        """Return the times of the points that belong to this rank in time, in order.

        Those of all ranks are ``t0 + n dt`` for ``n = 0 .. nsteps``. There are none in groups of experiments that do
        not solve this evolution.

        Parameters
        ----------
        evolution
            Which one, where there are several.

        """
        chosen = _chosen(self.problem, evolution)
        own = self.problem.spacetime.experiments_comm.rank == self.problem.group_of(chosen)
        leaf = next((leaf for leaf in self.problem.leaves if own and leaf.evolution is chosen), None)
        return chosen.time(np.array([] if leaf is None else _own_points(leaf), dtype=int))

    def state(
        self, values: Controls | None = None, times: Times = None, *, evolution: Evolution | None = None
    ) -> Function | list[Function]:
        """Return the state at values of the controls as functions (collective).

        Parameters
        ----------
        values
            Of the controls; default: those of the last evaluation.
        times
            A time or several, each of which is a point of the evolution. ``None``: the points that belong to this rank
            in time (:meth:`own_times`), which are this rank's part of the trajectory: none in groups of experiments
            that do not solve this evolution.
        evolution
            Which one, where the functional is a sum.

        Returns
        -------
        Function or list of Function
            At given times the same on all ranks in time and in all groups of experiments, in their order; for a single
            time a single function.

        Raises
        ------
        InputError
            On every rank, if a time is not one of the evolution's or another argument does not fit.
        """
        solved = _solved(self.problem, self._at(values), evolution)
        make = lambda row: _filled(Function(solved.evolution.V), row)
        return _functions(solved, lambda: solved.leaf.states(solved.terms[0][2]), times, make)

    def adjoint(
        self,
        values: Controls | None = None,
        times: Times = None,
        *,
        riesz_map: RieszKind | None = "L2",
        evolution: Evolution | None = None,
    ) -> Function | Cofunction | list[Function] | list[Cofunction]:
        """Return the adjoint at values of the controls (collective): at a time ``t_n`` the derivative of ``J`` by the
        state at this time, from which the evolution continues.

        Parameters
        ----------
        values, times, evolution
            As for :meth:`state`.
        riesz_map
            The inner product in which functions represent the derivative: a kind of
            :class:`~pint_fem.adjoint.riesz.RieszMap` on the state's space; ``None`` for the derivative itself.

        Returns
        -------
        Function, Cofunction or list of these
            In the order of :meth:`state`; Cofunctions without ``riesz_map``.

        Raises
        ------
        InputError
            On every rank, if an argument does not fit, or the evolution is in several terms of a sum.
        """
        solved = _solved(self.problem, self._at(values), evolution)
        terms, comm, V = solved.terms, solved.spacetime.comm, solved.evolution.V
        if any_rank(comm, any(other is not solved.leaf for _, other, _ in terms)):
            raise InputError(
                "adjoint: the evolution is in several terms of the sum, each with an adjoint of its own: use the terms"
            )
        own = None if solved.leaf is None else np.array([sum(w for w, _, _ in terms)])
        weight = float(solved.spacetime.from_group(solved.group, own, (1,))[0])
        if riesz_map is None:
            make = lambda row: _filled(Cofunction(V.dual()), weight * row)
        else:
            riesz = collectively(comm, "", RieszMap, V, riesz_map)
            make = lambda row: _filled(Function(V), riesz.primal(weight * row))
        return _functions(solved, lambda: solved.leaf.adjoints(terms[0][2]), times, make)

    def readings(self, misfit: SensorReadings, values: Controls | None = None) -> np.ndarray:
        """Return the readings of a misfit of sensors at the state, ``(times, sensors)``, on all ranks (collective).

        Parameters
        ----------
        misfit
            ``PointSensors`` or ``LinearObservations`` that the functional was made with, of any of its experiments.
        values
            Of the controls; default: those of the last evaluation.

        Raises
        ------
        InputError
            On every rank, if the misfit is not one of the functional's.
        """
        with stop_annotating():
            return self.problem.readings(self._at(values), misfit)

    def write(
        self, values: Controls | None, path: str | Path, times: Times = None, *, evolution: Evolution | None = None
    ) -> Path:
        """Write the state at values of the controls for ParaView (collective): each rank in time its own points, and
        one file that lists them all; nothing is gathered.

        Parameters
        ----------
        values
            Of the controls; ``None``: those of the last evaluation.
        path
            The file that lists all, such as ``"results/state.pvd"``; the states are in folders beside it.
        times
            A time or several, each of which is a point of the evolution; default: all points.
        evolution
            Which one, where the functional is a sum.

        Returns
        -------
        pathlib.Path
            The file that lists all.

        Raises
        ------
        InputError
            On every rank, if a time is not one of the evolution's or a file cannot be written.
        """
        z, comm = self._at(values), self.problem.spacetime.comm
        path = collectively(comm, "", _checked_path, path)
        require_same(comm, path=str(path))
        solved = _solved(self.problem, z, evolution)
        leaf, ev, numbers = solved.leaf, solved.evolution, _checked_numbers(solved, times)
        points, all_times = range(ev.nsteps + 1) if numbers is None else numbers, ev.time(np.arange(ev.nsteps + 1))

        def write() -> None:
            if leaf is not None:  # by the group of experiments that solves the evolution
                given = leaf.states(solved.terms[0][2]), ev.V, leaf.sweeps.slab, leaf.spacetime, all_times
                write_fields(path.parent, path.stem, *given, points=points)

        with stop_annotating():
            collectively(comm, "", write)
        return path


class FinalState:
    """A user's function in the state's space that is set to the final state after each evaluation.

    Other functions, the initial condition and controls of the evolution are refused by ``InputError``.
    """

    def __init__(self, problem: ControlProblem, evolution: Evolution, function: Function):
        ev = evolution
        if not isinstance(function, Function) or function.function_space() != ev.V:
            raise InputError("final_state: give a Function in the state's space, such as the evolution's u")
        if function is ev.initial or function in ev.controls:
            raise InputError(
                "final_state: the function is the initial condition or a control, which evaluations leave as they are: "
                "give another one, and initial= a function of its own where u is to hold the final state"
            )
        group = problem.group_of(ev)
        own = problem.spacetime.experiments_comm.rank == group
        leaf = next((leaf for leaf in problem.leaves if own and leaf.evolution is ev), None)
        # of one evolution only the problem is read, none of the controls
        terms = [] if leaf is None else [(1.0, leaf, np.zeros(0))]
        self._solved, self.function = _Solved(ev, problem.spacetime, group, terms), function

    def update(self) -> None:
        """Set the function to the final state of the last control (collective)."""
        leaf = self._solved.leaf
        row = leaf.U[-1].copy() if leaf is not None and leaf.sweeps.slab.is_last else None
        put(self.function, _sent(row, self._solved.evolution.nsteps, self._solved))

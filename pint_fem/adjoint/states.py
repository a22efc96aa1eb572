r"""State and adjoint at a control as Firedrake functions, at all own points or at given times.

Each point of the time axis belongs to one rank in time: the points ``lo + 1 .. hi`` to the rank that steps to them, the
initial value to the first rank. Functions at *given* times are sent from their owners to all ranks in time, one state
for each time and never a trajectory. Where only C-points are stored, the states between them are recomputed one
interval after another.

The adjoint :math:`\lambda_n = dJ/du_n` is the derivative of :math:`J` by the state at :math:`t_n`, from which the
evolution continues; it is a vector of the dual space, and :math:`\lambda_0` the derivative by the initial condition. As
a function it is represented in an inner product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from firedrake import Cofunction, Function
from pyadjoint.tape import stop_annotating

from pint_fem.adjoint.interface import ControlProblem
from pint_fem.adjoint.problem import ReducedProblem
from pint_fem.adjoint.riesz import RieszKind, RieszMap
from pint_fem.collective import collectively, require_same
from pint_fem.errors import InputError
from pint_fem.evolution.evolution import Evolution
from pint_fem.kernels.arrays import put
from pint_fem.output.paraview import write_fields

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
    found = list(dict.fromkeys(leaf.evolution for leaf in problem.leaves))
    if evolution is None and len(found) > 1:
        raise InputError(f"the functional has {len(found)} evolutions: give the one that is meant as evolution=")
    if evolution is not None and evolution not in found:
        raise InputError("evolution=: give one of those that the functional was made of")
    return found[0] if evolution is None else evolution


def _terms(
    problem: ControlProblem, z: np.ndarray, evolution: Evolution | None
) -> list[tuple[float, ReducedProblem, np.ndarray]]:
    """The problems of an evolution, the same one on all ranks, with their weights and controls (collective)."""
    comm = problem.spacetime.comm
    chosen = collectively(comm, "", _chosen, problem, evolution)
    require_same(comm, evolution=[leaf.evolution for leaf in problem.leaves].index(chosen))
    terms = collectively(comm, "", problem.leaf_terms, np.ravel(z))
    return [term for term in terms if term[1].evolution is chosen]


def _checked_numbers(problem: ReducedProblem, times: Times) -> list[int] | None:
    """Numbers of the points at one or several times, which have to be the same on all ranks (collective)."""
    comm, given = problem.spacetime.comm, [times] if isinstance(times, Real) else times
    numbers = collectively(comm, "", lambda: None if given is None else point_numbers(problem.evolution, given))
    require_same(comm, times=None if numbers is None else problem.evolution.time(np.array(numbers)).tolist())
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


def _functions(leaf: ReducedProblem, blocks: Iterable[tuple[int, np.ndarray]], times, make: Callable):
    """Functions that ``make`` returns for the rows of a rank's own points, or of given times on all ranks in time."""
    slab, single, numbers = leaf.sweeps.slab, isinstance(times, Real), _checked_numbers(leaf, times)
    rows = {n: None for n in _own_points(leaf) if numbers is None or n in numbers}
    with stop_annotating():
        for first, block in blocks:
            for n, row in enumerate(block, start=slab.lo + first):
                if n in rows:
                    rows[n] = make(row) if numbers is None else row.copy()
        if numbers is None:
            return list(rows.values())
        made = [make(_sent(rows.get(n), n, leaf)) for n in numbers]
    return made[0] if single else made


def _sent(row: np.ndarray | None, n: int, leaf: ReducedProblem) -> np.ndarray:
    """The row of a point on all ranks in time, from its owner."""
    owner = max(int(np.searchsorted(leaf.sweeps.slab.bounds, n)) - 1, 0)
    row = np.empty(leaf.evolution.state_size) if row is None else np.ascontiguousarray(row)
    leaf.spacetime.time_comm.Bcast(row, root=owner)
    return row


class StateAccess:
    """Methods of a functional that return state and adjoint as Firedrake functions; it has ``problem`` and ``_at``."""

    problem: ControlProblem

    def own_times(self, evolution: Evolution | None = None) -> np.ndarray:
        """Return the times of the points that belong to this rank in time, in order.

        Those of all ranks are ``t0 + n dt`` for ``n = 0 .. nsteps``.

        Parameters
        ----------
        evolution
            Which one, where there are several.

        """
        chosen = _chosen(self.problem, evolution)
        leaf = next(leaf for leaf in self.problem.leaves if leaf.evolution is chosen)
        return chosen.time(np.array(_own_points(leaf)))

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
            in time (:meth:`own_times`), which are this rank's part of the trajectory.
        evolution
            Which one, where the functional is a sum.

        Returns
        -------
        Function or list of Function
            At given times the same on all ranks in time, in their order; for a single time a single function.

        Raises
        ------
        InputError
            On every rank, if a time is not one of the evolution's or another argument does not fit.
        """
        (_, leaf, own), *_ = _terms(self.problem, self._at(values), evolution)
        return _functions(leaf, leaf.states(own), times, lambda row: _filled(Function(leaf.evolution.V), row))

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
        terms = _terms(self.problem, self._at(values), evolution)
        weight, leaf, own = sum(w for w, _, _ in terms), terms[0][1], terms[0][2]
        if any(other is not leaf for _, other, _ in terms):
            raise InputError(
                "adjoint: the evolution is in several terms of the sum, each with an adjoint of its own: use the terms"
            )
        V = leaf.evolution.V
        if riesz_map is None:
            make = lambda row: _filled(Cofunction(V.dual()), weight * row)
        else:
            riesz = collectively(leaf.spacetime.comm, "", RieszMap, V, riesz_map)
            make = lambda row: _filled(Function(V), riesz.primal(weight * row))
        return _functions(leaf, leaf.adjoints(own), times, make)

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
        (_, leaf, own), *_ = _terms(self.problem, z, evolution)
        ev, points = leaf.evolution, _checked_numbers(leaf, times)
        points = range(ev.nsteps + 1) if points is None else points
        all_times, slab = ev.time(np.arange(ev.nsteps + 1)), leaf.sweeps.slab
        with stop_annotating():
            states = leaf.states(own)
            return write_fields(path.parent, path.stem, states, ev.V, slab, leaf.spacetime, all_times, points=points)


class FinalState:
    """A user's function in the state's space that is set to the final state after each evaluation.

    Other functions, the initial condition and controls of the evolution are refused by ``InputError``.
    """

    def __init__(self, problem: ReducedProblem, function: Function):
        ev = problem.evolution
        if not isinstance(function, Function) or function.function_space() != ev.V:
            raise InputError("final_state: give a Function in the state's space, such as the evolution's u")
        if function is ev.initial or function in ev.controls:
            raise InputError(
                "final_state: the function is the initial condition or a control, which evaluations leave as they are: "
                "give another one, and initial= a function of its own where u is to hold the final state"
            )
        self.problem, self.function = problem, function

    def update(self) -> None:
        """Set the function to the final state of the last control (collective over time)."""
        row = self.problem.U[-1].copy() if self.problem.sweeps.slab.is_last else None
        put(self.function, _sent(row, self.problem.evolution.nsteps, self.problem))

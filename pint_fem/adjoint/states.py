r"""The state and the adjoint at a control as Firedrake functions.

A point of the time axis belongs to one rank in time: the points ``lo + 1 .. hi`` to the one that steps to them, the
initial value to the first rank. Functions at *given* times are sent from their owners to all ranks in time, one state
for each time and never a trajectory. With C-points only the states between them are computed again, one interval after
the other.

The adjoint :math:`\lambda_n = dJ/du_n` is what J changes by where the state at :math:`t_n` changes and the evolution
goes on from there, a vector of the dual space; :math:`\lambda_0` is the derivative by the initial condition. As a
function it is the representative in an inner product.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from numbers import Real
from pathlib import Path

import numpy as np
from firedrake import Cofunction, Function
from pyadjoint.tape import stop_annotating

from pint_fem.adjoint.problem import ReducedProblem
from pint_fem.adjoint.riesz import RieszMap
from pint_fem.adjoint.sums import SumProblem, leaves, terms_of
from pint_fem.collective import collectively, require_same
from pint_fem.errors import InputError
from pint_fem.evolution.evolution import Evolution
from pint_fem.kernels.arrays import own_size, put
from pint_fem.output.paraview import write_fields
from pint_fem.spacetime import Slab, SpaceTime

__all__ = ["FinalState", "adjoint_functions", "own_points", "point_numbers", "state_functions", "write_states"]

_ON_GRID = 1e-6  # of a time step: how far a given time may be from a point


def own_points(slab: Slab) -> range:
    """Numbers of the points that belong to a rank in time."""
    return range(0 if slab.is_first else slab.lo + 1, slab.hi + 1)


def point_numbers(evolution: Evolution, times: Sequence[float]) -> list[int]:
    """Numbers of the points at given times.

    Raises
    ------
    InputError
        If a time is not one of the evolution's.
    """
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


def state_functions(problem: ReducedProblem | SumProblem, z: np.ndarray, times, evolution: Evolution | None):
    """The state as functions, see :meth:`~pint_fem.adjoint.functional.ControlFunctional.state`."""
    (_, leaf, own), *_ = _asked(problem, evolution, z)
    return _functions(leaf, leaf.states(own), times, lambda row: _filled(Function(leaf.evolution.V), row))


def adjoint_functions(problem: ReducedProblem | SumProblem, z: np.ndarray, times, riesz_map, evolution):
    """The adjoint as functions, see :meth:`~pint_fem.adjoint.functional.ControlFunctional.adjoint`."""
    terms = _asked(problem, evolution, z)
    weight, leaf, own = sum(w for w, _, _ in terms), terms[0][1], terms[0][2]
    if any(other is not leaf for _, other, _ in terms):
        raise InputError(
            "adjoint: the evolution is in several terms of the sum, each with an adjoint of its own: ask the terms"
        )
    V = leaf.evolution.V
    if riesz_map is None:
        make = lambda row: _filled(Cofunction(V.dual()), weight * row)
    else:
        riesz = collectively(leaf.spacetime.comm, "", RieszMap, V, riesz_map)
        make = lambda row: _filled(Function(V), riesz.primal(weight * row))
    return _functions(leaf, _adjoints(leaf, own), times, make)


def write_states(problem: ReducedProblem | SumProblem, z: np.ndarray, path: str | Path, times, evolution):
    """The state as files, see :meth:`~pint_fem.adjoint.functional.ControlFunctional.write`."""
    comm = problem.spacetime.comm
    path = collectively(comm, "", _checked_path, path)
    require_same(comm, path=str(path))
    (_, leaf, own), *_ = _asked(problem, evolution, z)
    ev, points = leaf.evolution, _point_numbers(leaf, times)
    points = range(ev.nsteps + 1) if points is None else points
    all_times, slab = ev.time(np.arange(ev.nsteps + 1)), leaf.sweeps.slab
    with stop_annotating():
        states = leaf.states(own)
        return write_fields(path.parent, path.stem, states, ev.V, slab, leaf.spacetime, all_times, points=points)


def _checked_path(path: str | Path) -> Path:
    """The name of a file for ParaView."""
    try:
        path = Path(path)
    except TypeError as error:
        raise InputError(f"write: {path!r} is no name of a file; give one such as 'state.pvd'") from error
    if path.suffix != ".pvd":
        raise InputError(f"write: {path} has no name for ParaView; give one that ends with .pvd, such as 'state.pvd'")
    return path


def _asked(problem: ReducedProblem | SumProblem, evolution: Evolution | None, z: np.ndarray) -> list:
    """The terms of an evolution, which has to be the same one on all ranks (collective)."""
    comm = problem.spacetime.comm
    terms = collectively(comm, "", terms_of, problem, evolution, z)
    require_same(comm, evolution=leaves(problem).index(terms[0][1]))
    return terms


def _point_numbers(leaf: ReducedProblem, times) -> list[int] | None:
    """Numbers of the points at given times, one or several, which have to be the same on all ranks (collective)."""
    comm, given = leaf.spacetime.comm, [times] if isinstance(times, Real) else times
    numbers = collectively(comm, "", lambda: None if given is None else point_numbers(leaf.evolution, given))
    require_same(comm, times=None if numbers is None else leaf.evolution.time(np.array(numbers)).tolist())
    return numbers


def _adjoints(leaf: ReducedProblem, z: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """The adjoint at all local points, in blocks as :meth:`ReducedProblem.states` has the state."""
    leaf.derivative(z)
    point = leaf.points[0]
    yield from leaf._trajectories.adjoints(point, leaf.layout.steps(point.z))


def _filled(f: Function | Cofunction, row: np.ndarray) -> Function | Cofunction:
    put(f, row)
    return f


def _functions(leaf: ReducedProblem, blocks, times, make):
    """Functions of a rank's own points, or at given times on all ranks in time."""
    slab, spacetime = leaf.sweeps.slab, leaf.spacetime
    single, wanted = isinstance(times, Real), _point_numbers(leaf, times)
    own = own_points(slab)
    kept = {n: None for n in own if wanted is None or n in wanted}
    with stop_annotating():
        for first, block in blocks:
            for n in range(slab.lo + first, slab.lo + first + len(block)):
                if n in kept:
                    row = block[n - slab.lo - first]
                    kept[n] = make(row) if wanted is None else row.copy()
        if wanted is None:
            return list(kept.values())
        made = [make(_sent(kept.get(n), n, leaf, spacetime)) for n in wanted]
    return made[0] if single else made


def _sent(row: np.ndarray | None, n: int, leaf: ReducedProblem, spacetime: SpaceTime) -> np.ndarray:
    """The row of a point on all ranks in time, from its owner."""
    owner = max(int(np.searchsorted(leaf.sweeps.slab.bounds, n)) - 1, 0)
    row = np.empty(leaf.evolution.state_size) if row is None else np.ascontiguousarray(row)
    spacetime.time_comm.Bcast(row, root=owner)
    return row


class FinalState:
    """Puts the final state of an evolution into a function after each evaluation.

    Parameters
    ----------
    problem
        Of the evolution.
    function
        In the state's space; the user's own.

    Raises
    ------
    InputError
        If it is in another space, or is what the evolution reads its initial condition from, a control or data.
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
        """Take the final state of the control asked for last (collective)."""
        time_comm = self.problem.spacetime.time_comm
        last = time_comm.rank == time_comm.size - 1
        row = self.problem.U[-1].copy() if last else np.empty(own_size(self.function.function_space()))
        time_comm.Bcast(row, root=time_comm.size - 1)
        put(self.function, row)

"""Tasks in ten other physics against a plain Firedrake loop on a serial pyadjoint tape: value, gradient, Hessian."""

import numpy as np
import pytest
from firedrake import Function
from firedrake.adjoint import Control, ReducedFunctional
from mpi4py import MPI

import pint_fem as pf
from pint_fem.propagators.tape import recording
from tests.limits import time_limit
from tests.ranks import cases
from tests.user_tasks import TASKS, channel, extruded_column, loop, pose, stirred_tank

ON_RANKS = [channel, extruded_column, stirred_tank]
"""Nullspace, extruded mesh and several controls: these on grids in space and in time."""
GRIDS = {1: ["1x1"], 3: ["3x1", "1x3"]}


def with_values(space, value):
    """A function with the values of an expression, or of another function."""
    f = Function(space)
    if isinstance(value, (Function, float)):
        return f.assign(value)
    return f.interpolate(value)


def rows(functions) -> np.ndarray:
    """Own values of functions, one after another."""
    return np.concatenate([np.ravel(f.dat.data_ro) for f in functions for f in f.subfunctions])


def by_hand(task, *, second=True):
    """``J``, gradient and (if asked for) Hessian action of each control by the tape, the latter two as arrays; of
    controls with a value in each step those of all steps.
    """
    values = [task.values[0], task.directions[0]] if task.stepwise else [task.values, task.directions]
    spaces = task.spaces * task.steps if task.stepwise else task.spaces
    z, dz = ([with_values(*pair) for pair in zip(spaces, given, strict=True)] for given in values)
    with recording() as tape:
        J = loop(task, [z] if task.stepwise else z)
    rf = ReducedFunctional(J, [Control(f) for f in z], tape=tape)
    gradient = [rows([g]) for g in rf.derivative()]
    return float(J), gradient, [rows([h]) for h in rf.hessian(dz)] if second else None


def in_time(task, spacetime):
    """The same by the time-parallel functional; of controls with a value in each step those of the own steps."""
    rf, own = pose(task, spacetime), spacetime.slab(task.steps)

    def controls(given):
        made = [rf.controls[0].control.copy()] if task.stepwise else [Function(space) for space in task.spaces]
        for f, value in zip(made, given, strict=True):
            steps = value[own.lo : own.lo + own.k] if task.stepwise else [value]
            for part, number in zip(f.subfunctions if task.stepwise else [f], steps, strict=True):
                part.assign(with_values(part.function_space(), number))
        return made

    given = lambda made: made if len(made) > 1 else made[0]
    listed = lambda found: found if isinstance(found, (list, tuple)) else [found]
    J = float(rf(given(controls(task.values))))
    gradient = listed(rf.derivative())
    action = listed(rf.hessian(given(controls(task.directions))))
    if task.stepwise:
        gradient, action = gradient[0].subfunctions, action[0].subfunctions
    return J, [rows([g]) for g in gradient], [rows([h]) for h in action]


def distance(ours, theirs, comm) -> float:
    """Relative distance of arrays that are distributed over space."""
    both = comm.allreduce(np.array([np.sum((ours - theirs) ** 2), np.sum(theirs**2)]))
    return float(np.sqrt(both[0] / both[1]))


@pytest.mark.slow_on_ranks
@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize("make", cases(TASKS, on_ranks=ON_RANKS), ids=lambda make: make.__name__)
@time_limit(120)
def test_against_a_loop_by_hand(make):
    for grid in GRIDS[MPI.COMM_WORLD.size]:
        spacetime = pf.SpaceTime(grid)
        task = make(spacetime.space_comm)
        # pyadjoint solves tangent equations without nullspaces: second derivatives are compared in test_nullspace then
        J, *derivatives = by_hand(task, second=task.nullspace is None)
        own = slice(None)
        if task.stepwise:
            slab = spacetime.slab(task.steps)
            own = slice(slab.lo, slab.lo + slab.k)
        J_ours, *ours = in_time(task, spacetime)
        assert abs(J_ours - J) <= 1e-10 * abs(J)
        for found, wanted, tolerance in zip(ours, derivatives, (1e-8, 1e-7), strict=True):
            for a, b in zip(found, wanted[own], strict=True) if wanted else ():
                assert distance(a, b, spacetime.space_comm) <= tolerance

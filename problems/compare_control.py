"""A control problem beside plain serial Firedrake + pyadjoint: same numbers? how much faster?

The tape is recorded on the first rank, whole and alone, while the others sleep. J, gradient and one Hessian action at
controls given by formulas are compared with ours; fields are compared by their nodes' coordinates. Their times are
extrapolated to the whole minimisation by the numbers of calls that optimisers which pyadjoint offers need: TAO's
limited-memory BFGS (``lmvm``, with bounds ``blmvm``) and its Newton method with conjugate gradients (``nls``, with
bounds ``bntl``). The calls are counted by runs of TAO with our functional in the place of the tape, which is the same
discrete functional, until the gradient is as small as ours in the end. The one of less time is pyadjoint's best.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from firedrake import COMM_SELF, Function

from pint_fem.cli import wait_quietly
from pint_fem.kernels.arrays import get, is_real, own_size, put
from pint_fem.spacetime import SpaceTime
from problems.compare_serial import agreement, nodes_of, together
from problems.control import ControlForms, ControlProblem
from problems.count_calls import Counts, count_calls
from problems.serial_control import record
from problems.serial_pyadjoint import SerialSource

__all__ = ["compare_control", "formula"]

NAMES = ("J", "gradient", "Hessian action")


# -- controls by formulas ----------------------------------------------------------------------------------------------
def formula(places: np.ndarray, steps: np.ndarray, number: int, *, direction: bool = False) -> np.ndarray:
    """Return values ``(steps, places)`` of a control, or of a direction, that depend on place and step only.

    Parameters
    ----------
    places
        Coordinates of nodes ``(n, 2)``; of a number the origin.
    steps
        Numbers of steps, counted from 0.
    number
        Of the control.
    direction
        Whether another formula is used.
    """
    x, y, n = places[:, 0], places[:, 1], np.asarray(steps)[:, None]
    if direction:
        return 0.1 * np.cos((2 + number) * x + 0.3 * n) * np.sin(3 * y + 0.5) + 0.05
    return 0.3 * np.sin((3 + number) * x + 0.2 * n + 0.4) * np.cos(2 * y) + 0.1


def _places(control: Function) -> np.ndarray:
    """Coordinates of the own nodes of a control's space; the origin for a number."""
    space = control.function_space()
    return np.zeros((own_size(space), 2)) if is_real(space) else nodes_of(space)


def _vector(problem: ControlProblem, *, direction: bool) -> np.ndarray:
    """The own values of the formula's controls or directions."""
    layout = problem.rf.layout
    steps = np.arange(layout.slab.lo, layout.slab.hi)
    controls = problem.evolution.controls
    return layout.join([formula(_places(q), steps, i, direction=direction) for i, q in enumerate(controls)])


def _functions(serial: SerialSource, controls: int, *, direction: bool) -> list[Function]:
    """The same for the tape, whose controls are those of the first step, then those of the second one, and so on."""
    out = []
    for i, q in enumerate(serial.q):
        f = Function(q.function_space())
        put(f, formula(_places(q), np.array([i // controls]), i % controls, direction=direction)[0])
        out.append(f)
    return out


def _whole(problem: ControlProblem, z: np.ndarray) -> list[np.ndarray] | None:
    """The values ``(nodes, N)`` of each control on the first rank, nodes in the order of :func:`together`
    (collective).
    """
    spacetime, out = problem.spacetime, []
    for q, rows in zip(problem.evolution.controls, problem.rf.layout.parts(z), strict=True):
        columns = rows.T if is_real(q.function_space()) else together(spacetime, q.function_space(), rows.T)
        if isinstance(columns, tuple):
            columns = columns[1]
        parts = spacetime.time_comm.gather(columns) if spacetime.space_comm.rank == 0 else None
        if parts is not None:
            out.append(np.hstack(parts))
    return out if spacetime.is_root else None


# -- the comparison ----------------------------------------------------------------------------------------------------
def compare_control(
    problem: ControlProblem,
    result: Any,
    settings: Any,
    *,
    forms: Callable[..., ControlForms],
    seconds: float,
    say: Callable[[str], object],
) -> dict:
    """Evaluate the problem serially and compare (collective).

    Parameters
    ----------
    problem, result
        The posed problem and its minimisation.
    settings
        Of the problem.
    forms
        ``forms(settings, spacetime)``.
    seconds
        Of our set-up and minimisation.
    say
        Prints a line on the first rank.

    Returns
    -------
    dict
        Values, relative differences, seconds of both and ratios; empty but on the first rank.
    """
    values, fields, ours = _evaluated(problem)
    joined = {name: _whole(problem, field) for name, field in fields.items()}
    say("counting the evaluations of TAO's optimisers, by our functional ...")
    names = ("lmvm", "nls") if problem.bounds is None else ("blmvm", "bntl")
    counted = {name: count_calls(problem, name, result.gradient_norm, say) for name in names}
    table: dict = {}
    if problem.spacetime.is_root:
        say("plain serial Firedrake + pyadjoint: recording the tape ...")
        serial = record(
            forms(settings, SpaceTime("1x1", comm=COMM_SELF)), steps=settings.steps, integrator=settings.integrator
        )
        say(f"  recorded in {serial.seconds:.1f} s")
        table = _serial(values, joined, ours, serial, len(problem.evolution.controls), say)
        table["end_to_end"] = _extrapolated(table, result, counted, seconds, say)
    wait_quietly(problem.spacetime.comm)
    return table


def _timed(call: Callable):
    start = time.perf_counter()
    return call(), time.perf_counter() - start


def _evaluated(problem: ControlProblem) -> tuple[float, dict[str, np.ndarray], dict[str, float]]:
    """``J``, the fields ``J'`` and ``J'' h`` at the formulas' controls, and the seconds of each over all ranks."""
    z, dz = _vector(problem, direction=False), _vector(problem, direction=True)
    of, barrier, found, seconds = problem.rf.problem, problem.spacetime.comm.barrier, {}, {}
    of.value(0.5 * z)  # what is done once is done: kernels are compiled, solvers chosen
    of.hessian_action(0.5 * z, dz)
    of.invalidate()
    calls = (lambda: of.value(z), lambda: of.derivative(z), lambda: of.hessian_action(z, dz))
    for name, call in zip(NAMES, calls, strict=True):
        barrier()
        found[name], seconds[name] = _timed(lambda call=call: (call(), barrier())[0])
    return found.pop("J"), found, seconds


def _serial(J: float, fields: dict, ours: dict, serial: SerialSource, controls: int, say: Callable) -> dict:
    """J, gradient and a Hessian action of the tape beside ours."""
    z, dz = (_functions(serial, controls, direction=direction) for direction in (False, True))
    calls = (lambda: float(serial.rf(z)), serial.rf.derivative, lambda: serial.rf.hessian(dz))
    for first in calls[:2]:
        first()  # compiles kernels, which are then cached; a Hessian action takes much longer than its compilation
    found, seconds = zip(*(_timed(call) for call in calls), strict=True)
    apart = [abs(J - found[0]) / abs(found[0])]
    apart += [_difference(fields[name], theirs, controls) for name, theirs in zip(NAMES[1:], found[1:], strict=True)]
    rows = dict(zip(NAMES, zip(apart, seconds, strict=True), strict=True))
    return agreement(rows, ours, say) | {"recording_seconds": serial.seconds}


def _difference(ours: Sequence[np.ndarray], theirs: Sequence, controls: int) -> float:
    """Relative difference of the derivatives by all controls of all steps."""
    squares = []
    for i, mine in enumerate(ours):
        own = list(theirs)[i::controls]
        space = own[0].function_space().dual()
        values = np.stack([get(f) for f in own], axis=1)
        if not is_real(space):
            nodes = nodes_of(space)
            values = values[np.lexsort(np.round(nodes, 10).T)]
        squares.append((np.sum((values - mine) ** 2), np.sum(values**2)))
    apart, size = np.sum(squares, axis=0)
    return float(np.sqrt(apart / size))


def _extrapolated(table: dict, result: Any, counted: dict[str, Counts], seconds: float, say: Callable) -> dict:
    """Serial seconds of the minimisation with the counts of each optimiser, and the ratios to ours."""
    out: dict = {}
    value, gradient, action = (table[name]["serial_seconds"] for name in NAMES)
    for name, counts in counted.items():
        total = table["recording_seconds"] + counts.evaluations * value + counts.gradients * gradient
        total += counts.hessians * action
        out[name] = {
            "evaluations": counts.evaluations,
            "gradients": counts.gradients,
            "hessian_actions": counts.hessians,
            "J": counts.value,
            "converged": counts.converged,
            "serial_seconds": total,
            "ratio": total / seconds,
        }
        stopped = "" if counts.converged else f", stopped after {counts.iterations} iterations"
        say(
            f"end to end, extrapolated, TAO's {name}: {counts.evaluations} evaluations, {counts.gradients} gradients, "
            f"{counts.hessians} Hessian actions, J {counts.value:.8g} (ours {result.value:.8g}){stopped}: serial "
            f"{total:.0f} s, ours {seconds:.1f} s, ratio {total / seconds:.1f}"
        )
    return out

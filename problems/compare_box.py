"""A source inversion in a box beside plain Firedrake + pyadjoint: same numbers? how much faster?

The baseline runs on as many ranks, all of them in space, and takes the first few steps only, as on large meshes a tape
of all steps takes long to record and to evaluate. J, gradient and one Hessian action of these steps are compared with
ours, field by field at the nodes, for which fields are brought together on the first rank (in this comparison, and
nowhere else). The times are extrapolated to all steps and to as many evaluations as the inversion took.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from firedrake import Function, SpatialCoordinate, as_vector, cos, exp, sin

from pint_fem.kernels.arrays import get
from pint_fem.spacetime import SpaceTime
from problems.box import BoxSource
from problems.compare_experiments import evaluated, extrapolated, timed
from problems.compare_serial import agreement, apart, together
from problems.serial_pyadjoint import SerialSource

__all__ = ["compare_box", "points"]


def points(V) -> tuple[Function, Function]:
    """Return a control and a direction in a space of scalars or vectors, given by formulas, the same on every mesh."""
    x, y, z = SpatialCoordinate(V.mesh())
    values = 3 * cos(3 * x) * sin(2 * y + z), exp(-x) * y, sin(4 * z) - x * y
    directions = sin(3 * x) * cos(2 * y) * z, cos(y) - x, y * exp(-z)
    if not V.value_shape:
        return Function(V).interpolate(values[0]), Function(V).interpolate(directions[0])
    return Function(V).interpolate(as_vector(values)), Function(V).interpolate(as_vector(directions))


def compare_box(
    problem: BoxSource,
    *,
    pose: Callable[..., BoxSource],
    record: Callable[..., SerialSource],
    first_steps: int,
    calls: Sequence[int] | None,
    result,
    seconds: float,
    say: Callable[[str], object],
) -> dict:
    """Evaluate the first steps by plain Firedrake and pyadjoint, too, and compare (collective).

    Parameters
    ----------
    problem, result
        The posed problem and its minimisation.
    pose
        ``pose(first_steps=...)`` poses the problem of some steps.
    record
        ``record(spacetime, first_steps=...)`` records the same on a tape, on a grid without ranks in time.
    first_steps
        Number of the steps.
    calls
        Evaluations, gradients and Hessian actions of the minimisation; ``None`` where it was by the map.
    seconds
        Of our set-up and inversion.
    say
        Prints a line on the first rank.

    Returns
    -------
    dict
        Relative differences, seconds of both and ratios; empty but on the first rank.
    """
    comm, steps = problem.spacetime.comm, problem.evolution.nsteps
    say(f"plain Firedrake + pyadjoint, {comm.size} ranks in space, {first_steps} of {steps} steps: recording ...")
    serial = record(SpaceTime((comm.size, 1), comm=comm), first_steps=first_steps)
    say(f"  recorded in {serial.seconds:.1f} s")
    few = pose(first_steps=first_steps)
    V = few.evolution.control.function_space()
    values, fields, ours = evaluated(few.rf, *([f] for f in points(V)))
    control, direction = points(serial.q.function_space())
    for first in (lambda: serial.rf(direction), serial.rf.derivative, lambda: serial.rf.hessian(direction)):
        first()  # compiles kernels, which are then cached
    J, t_value = timed(lambda: float(serial.rf(control)), comm)
    gradient, t_gradient = timed(serial.rf.derivative, comm)
    say("  one Hessian action ...")
    hessian, t_hessian = timed(lambda: serial.rf.hessian(direction), comm)
    away = {}
    grid = SpaceTime((comm.size, 1), comm=comm)
    for name, theirs in (("gradient", gradient), ("Hessian action", hessian)):
        pair = together(few.spacetime, V, fields[name]), together(grid, serial.q.function_space(), get(theirs))
        away[name] = apart(*pair) if few.spacetime.is_root else 0.0
    if not few.spacetime.is_root:
        return {}
    rows = {
        "J": (abs(values - J) / abs(J), t_value),
        "gradient": (away["gradient"], t_gradient),
        "Hessian action": (away["Hessian action"], t_hessian),
    }
    table = agreement(rows, ours, say) | {"steps": first_steps, "recording_seconds": serial.seconds}
    if calls is not None:
        more = steps / first_steps
        table |= extrapolated(table, result, calls, None, more, seconds, say, what=f"{steps} steps")
        table["steps_multiplied_by"] = more
    elif first_steps < steps:
        say(f"times are those of {first_steps} steps; those of all {steps} are {steps / first_steps:g} times as long")
    return table

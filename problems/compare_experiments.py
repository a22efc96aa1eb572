"""An inversion for coefficients beside plain serial Firedrake + pyadjoint: same numbers? how much faster?

A tape of all experiments would take long to record and to evaluate, so that a few of them are taped, on the first rank,
whole and alone, while the others sleep. J, gradient and one Hessian action of these experiments are compared with
ours. Their times, multiplied by the ratio of the numbers of experiments, are extrapolated to two inversions: with as
many evaluations, gradients and Hessian actions as ours took, and with as many evaluations and gradients as pyadjoint's
own optimiser needs, TAO's LMVM. These are counted by a run of TAO with our functional in the place of the tape, which
is the same discrete functional.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
from firedrake import COMM_SELF, Constant, Function, SpatialCoordinate, cos, sin
from firedrake.petsc import PETSc
from mpi4py import MPI
from pyadjoint.enlisting import Enlist

from pint_fem.cli import wait_quietly
from pint_fem.kernels.arrays import get
from problems.compare_serial import agreement, difference, together
from problems.experiments import CoefficientProblem
from problems.serial_minimise import SerialResult, minimise
from problems.serial_pyadjoint import SerialSource, control_with_prior

__all__ = ["compare_experiments", "evaluated", "extrapolated", "formulas", "timed"]

MOST_ITERATIONS = 200
"""Of TAO's LMVM."""


def formulas(controls: Sequence[Function]) -> tuple[list[Function], list[Function]]:
    """Return controls and directions given by formulas, the same on every mesh; they are of the size of a tenth."""
    values, directions = [], []
    for i, control in enumerate(controls):
        V = control.function_space()
        x, y = SpatialCoordinate(V.mesh())
        values.append(Function(V).interpolate(0.2 * sin((3 + i) * x) * cos(2 * y) - 0.1 * y))
        directions.append(Function(V).interpolate(0.1 * cos((2 + i) * x) * sin(3 * y) + 0.05))
    return values, directions


def compare_experiments(
    problem: CoefficientProblem,
    result,
    *,
    calls: Sequence[int],
    pose: Callable[[Sequence[int]], CoefficientProblem],
    record: Callable[..., SerialSource],
    experiments: Sequence[int],
    seconds: float,
    say: Callable[[str], object],
) -> dict:
    """Evaluate a few experiments serially and compare (collective).

    Parameters
    ----------
    problem, result
        The posed problem and its minimisation, the last one of several stages.
    calls
        Evaluations, gradients and Hessian actions of all stages.
    pose
        Poses the problem with given experiments alone, each with its weight in the sum of all.
    record
        ``record(experiments, comm=...)`` records a serial tape of the same.
    experiments
        Numbers of those that are taped.
    seconds
        Of our set-up and inversion.
    say
        Prints a line on the first rank.

    Returns
    -------
    dict
        Values, relative differences, seconds of both and ratios; empty but on the first rank.
    """
    spacetime, few = problem.spacetime, pose(experiments)
    say(f"plain serial Firedrake + pyadjoint, experiments {', '.join(map(str, experiments))} of {len(problem.misfits)}")
    spaces = [control.function_space() for control in few.rf.evolution.controls]
    values, fields, ours = evaluated(few.rf, *formulas(few.rf.evolution.controls))
    joined = {
        name: [together(spacetime, V, part) for V, part in zip(spaces, few.rf.layout.parts(field), strict=True)]
        for name, field in fields.items()
    }
    say("  counting the evaluations of TAO's LMVM in the prior's inner product, by our functional ...")
    counted = _counted(problem, result, say)
    table = {}
    if spacetime.is_root:
        table = _serial(values, joined, ours, lambda: record(experiments, comm=COMM_SELF), say)
        more = len(problem.misfits) / len(experiments)
        table |= extrapolated(table, result, calls, counted, more, seconds, say, what="all experiments")
        table["experiments_multiplied_by"] = more
    wait_quietly(spacetime.comm)
    return table


def timed(call: Callable, comm: MPI.Comm = MPI.COMM_SELF) -> tuple:
    """Return what a call returns, and its seconds over all ranks of a communicator (collective)."""
    comm.barrier()
    start, result = time.perf_counter(), call()
    comm.barrier()
    return result, time.perf_counter() - start


def evaluated(
    rf, controls: Sequence[Function], directions: Sequence[Function]
) -> tuple[float, dict[str, np.ndarray], dict[str, float]]:
    """Return ``J``, the fields ``J'`` and ``J'' h`` of a functional at controls and along directions, and the seconds
    of each over all ranks (collective).
    """
    join = rf.layout.join
    z, dz = join([get(f) for f in controls]), join([get(f) for f in directions])
    of, found, seconds = rf.problem, {}, {}
    of.value(0.5 * z)  # what is done once is done: kernels are compiled, solvers chosen
    of.hessian_action(0.5 * z, dz)
    of.invalidate()
    for name, call in (
        ("J", lambda: of.value(z)),
        ("gradient", lambda: of.derivative(z)),
        ("Hessian action", lambda: of.hessian_action(z, dz)),
    ):
        found[name], seconds[name] = timed(call, rf.spacetime.comm)
    return found.pop("J"), found, seconds


def _counted(problem: CoefficientProblem, result, say: Callable) -> SerialResult | None:
    """The minimisation by TAO's LMVM with our functional, until the gradient is as small as ours in the end; ``None``
    where it fails.

    Its first step is the negative gradient in the prior's inner product. Where that would change controls by more than
    a half, for which their exponentials may overflow, the inner product is multiplied by a number.
    """
    rf, controls = problem.rf, [c.control for c in problem.coefficients]
    start = [Function(c.function_space(), name=c.name()).assign(c) for c in controls]
    gradient = rf.inner.primal(rf.problem.derivative(rf.layout.join([get(q) for q in start])))
    largest = rf.spacetime.space_comm.allreduce(float(np.abs(gradient).max()), MPI.MAX)
    scale = max(1.0, 2 * largest)
    scaled = [control_with_prior(q, _multiplied(prior, scale)) for q, prior in zip(start, problem.priors, strict=True)]
    first = result.history[0].gradient_norm if result.history else 1.0
    target = max(1e-8, min(1e-2, result.gradient_norm / first))
    serial = SerialSource(rf, start if len(start) > 1 else start[0], 0, 0.0)
    try:
        return minimise(serial, controls=scaled, gttol=target, max_it=MOST_ITERATIONS, printer=None)
    except PETSc.Error:
        say("  TAO's line search takes a step at which the functional cannot be evaluated: not counted")
        return None


def _multiplied(prior: Callable, factor: float) -> Callable:
    """The bilinear form of an inner product times a number."""
    return lambda a, b: Constant(factor) * prior(a, b)


def _serial(J, fields, ours, record, say) -> dict:
    """J, gradient and a Hessian action of the tape beside ours."""
    serial = record()
    say(f"  recorded in {serial.seconds:.1f} s")
    controls, directions = formulas(Enlist(serial.q))
    one = Enlist(serial.q).delist
    action = lambda: serial.rf.hessian(one(directions))
    for first in (lambda: serial.rf(one(controls)), serial.rf.derivative, action):
        first()  # compiles kernels, which are then cached
    J_serial, t_value = timed(lambda: float(serial.rf(one(controls))))
    gradient, t_gradient = timed(serial.rf.derivative)
    say("  one Hessian action ...")
    hessian, t_hessian = timed(action)
    apart = lambda name, theirs: max(difference(*pair) for pair in zip(fields[name], Enlist(theirs), strict=True))
    rows = {
        "J": (abs(J - J_serial) / abs(J_serial), t_value),
        "gradient": (apart("gradient", gradient), t_gradient),
        "Hessian action": (apart("Hessian action", hessian), t_hessian),
    }
    return agreement(rows, ours, say) | {"recording_seconds": serial.seconds}


def extrapolated(
    table: dict, result, calls: Sequence[int], counted: SerialResult | None, more: float, seconds: float, say, *,
    what: str,
) -> dict:  # fmt: skip
    """Serial seconds of an inversion with our counts and with those of TAO's LMVM, and the ratios to ours.

    Parameters
    ----------
    table
        Of :func:`problems.compare_serial.agreement`, with ``recording_seconds``.
    result, calls
        Our minimisation, and its evaluations, gradients and Hessian actions.
    counted
        That of LMVM, or ``None``.
    more
        By which times are multiplied.
    seconds
        Of our inversion.
    say
        Prints a line.
    what
        What the multiplied times are of, in words.
    """
    value, gradient, hessian = (table[n]["serial_seconds"] for n in ("J", "gradient", "Hessian action"))
    counts = {
        "as many as ours": tuple(calls),
    }
    if counted is not None:
        counts["TAO's LMVM"] = (counted.evaluations, counted.gradients, counted.hessians)
    out = {}
    for name, (values, gradients, actions) in counts.items():
        total = more * (table["recording_seconds"] + values * value + gradients * gradient + actions * hessian)
        out[name] = {
            "evaluations": values,
            "gradients": gradients,
            "hessian_actions": actions,
            "serial_seconds": total,
            "ratio": total / seconds,
        }
        end = ""
        if name != "as many as ours":
            stopped = "" if counted.converged else f", stopped after {counted.iterations} iterations"
            end = f", J {counted.value:.8f} (ours {result.value:.8f}){stopped}"
        say(
            f"end to end, extrapolated from one evaluation, gradient and Hessian action, times {more:g} for {what} "
            f"({name}: {values} evaluations, {gradients} gradients, {actions} Hessian actions{end}): "
            f"serial {total:.0f} s, ours {seconds:.1f} s, ratio {total / seconds:.1f}"
        )
    return {"end_to_end": out}

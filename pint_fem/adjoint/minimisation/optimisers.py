"""Optimisers on the time-parallel functional: what of it they see, and in which inner product."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import contextmanager
from functools import wraps
from numbers import Real
from pathlib import Path

import numpy as np
import ufl
from firedrake import Function, TestFunction, assemble, derivative
from pyadjoint.tape import stop_annotating
from ufl.algorithms import expand_derivatives, extract_coefficients

from pint_fem.adjoint.consistency.control_values import ControlConsistency
from pint_fem.adjoint.minimisation.checkpoint import HDF5Checkpoint
from pint_fem.adjoint.minimisation.fingerprint import bound_numbers, constraint_numbers
from pint_fem.adjoint.minimisation.inexact_objective import InexactObjective
from pint_fem.adjoint.minimisation.objective import Objective
from pint_fem.adjoint.problem import ReducedProblem
from pint_fem.adjoint.riesz import ControlInner
from pint_fem.collective import ending_all_ranks, require_same
from pint_fem.errors import InputError, SolverFailure
from pint_fem.evolution.quadrature import with_fixed_degrees
from pint_fem.kernels.arrays import get
from pint_fem.optimize.constraints import AffineConstraints
from pint_fem.optimize.one_shot.method import minimize_one_shot
from pint_fem.optimize.scipy_methods.adapter import scipy_minimize
from pint_fem.optimize.trust_region.acceptance import UNLIMITED
from pint_fem.optimize.trust_region.bounded import minimize_bounded
from pint_fem.optimize.trust_region.inexact import InexactOptions
from pint_fem.optimize.trust_region.multipliers import minimize_bounded_constrained
from pint_fem.optimize.trust_region.newton_cg import minimize_trust_region

__all__ = ["named_array", "one_shot", "scipy_method", "trust_region"]

# Plate, 64 steps, cycles without and with learned pairs: 306 and 106 with 0.1, 272 and 101 with 0.02, 334 and 98 with
# 0.01, 476 and 145 with "superlinear".
_MODEL_FORCING = 0.02


def _on_all_ranks(method: Callable) -> Callable:
    """Make a method the same on all ranks: its arguments are compared, and copies of a static start."""

    @wraps(method)
    def run(rf, start: np.ndarray, *args, monitor=None, **options):
        comm = rf.spacetime.comm
        own = {name: value for name, value in options.items() if name != "callback"}
        with ending_all_ranks(comm):
            require_same(comm, minimiser=method.__name__, method=args, given=own)
            ControlConsistency(rf.problem.layout).require({"start": start})
            if monitor is not None:
                options["monitor"] = monitor
            return method(rf, start, *args, **options)

    return run


@_on_all_ranks
def trust_region(
    rf,
    start: np.ndarray,
    *,
    monitor=None,
    inexact,
    bounds,
    constraints,
    preconditioner,
    checkpoint,
    if_save_fails,
    **options,
):
    """See :meth:`~pint_fem.adjoint.TimeParallelReducedFunctional.minimize_trust_region`."""
    problem, inner = rf.problem, rf.inner
    options.setdefault("value_rtol", _value_rtol(problem))
    if problem.is_quadratic and bounds is None:
        # the model is J itself: a bound would only cut steps short
        options.setdefault("initial_radius", min(UNLIMITED, options.get("max_radius", np.inf)))
    if isinstance(inexact, Mapping):
        inexact = InexactOptions(**inexact)
    inexact = InexactOptions() if inexact is True else inexact or None
    if inexact is not None:
        if not isinstance(problem, ReducedProblem):
            raise InputError(
                "inexact= goes with the functional of one evolution: leave it out for a sum, a multiple and where the "
                "initial condition is an expression of controls"
            )
        _insist_on_residuals(rf, "inexact=")
    if inexact is not None and problem.is_quadratic and options.get("cg_rtol") is None:
        # what one cycle gives; nothing is nonlinear that looser first iterations could wait for
        options.setdefault("cg_forcing", _MODEL_FORCING)
    if bounds is not None:
        if inexact is not None:
            raise InputError("bounds go with exact solves: leave inexact= out")
        if inner.weights is None:
            inner = ControlInner(rf.layout, "lumped")
    options["preconditioner"] = _preconditioner(rf, inner, preconditioner)
    with stop_annotating():
        if bounds is not None:
            lower, upper = _box(rf, bounds)
            objective = Objective(problem, inner)
            _floor(objective, start, checkpoint, options)
            if constraints:
                if checkpoint is not None:
                    raise InputError("checkpoint= goes with bounds or with integral constraints, not with both")
                normals, values = _normals(rf, objective, constraints)
                return minimize_bounded_constrained(
                    objective, start, lower, upper, normals, values, monitor=monitor, **options
                )
            sides = {"lower": lower, "upper": upper}
            keep = _checkpoint(checkpoint, rf, objective, "trust region within bounds", if_save_fails, sides=sides)
            with keep as kept:
                return minimize_bounded(objective, start, lower, upper, monitor=monitor, checkpoint=kept, **options)
        if inexact is None:
            objective = Objective(problem, inner)
        else:
            objective = InexactObjective(problem, inner)
        limited, start = constrained(rf, objective, start, constraints)
        if inexact is None:
            _floor(objective, start, checkpoint, options)
        given = dict(limited=limited, constraints=constraints)
        try:
            with _checkpoint(checkpoint, rf, objective, "trust region", if_save_fails, **given) as kept:
                options |= dict(monitor=monitor, inexact=inexact, checkpoint=kept)
                return minimize_trust_region(limited, start, **options)
        finally:
            problem.keep_evaluations(1)


def _floor(objective: Objective, start: np.ndarray, checkpoint, options: dict) -> None:
    """Raise the tolerance of the gradient to the error that it has where the start fits the data to round-off: a
    tolerance relative to such a gradient is never reached. A run with a checkpoint may go on from elsewhere.
    """
    given = options.get("gtol_abs", 0.0)
    if checkpoint is not None or not isinstance(given, Real):
        return
    try:
        error = objective.problem.gradient_error(start)
    except SolverFailure:  # the minimisation reports what fails at the start
        return
    if error is not None:
        error = objective.representative(error)
        options["gtol_abs"] = max(float(given), float(np.sqrt(max(objective.inner(error, error), 0.0))))


@contextmanager
def _checkpoint(
    given, rf, objective: Objective, method: str, if_save_fails: str, *, sides=None, limited=None, constraints=None
):
    """A file as a checkpoint of an objective that goes on with this method, these bounds and these constraints only;
    no other run writes it meanwhile.
    """
    if not isinstance(given, (str, Path)):
        yield given
        return
    if not isinstance(objective.problem, ReducedProblem):
        raise InputError(
            "checkpoint: a file keeps the run of one evolution's functional: leave it out for a sum, a multiple and "
            "where the initial condition is an expression of controls"
        )
    layout = objective.problem.layout
    run = {"method": method, "bounds": None, "constraints": None}
    if sides is not None:
        run["bounds"] = {name: bound_numbers(layout, side) for name, side in sides.items()}
    if constraints:
        run["constraints"] = constraint_numbers(layout, limited, [float(value) for _, value in constraints])
    printer = rf.problem.sweeps.solvers.printer
    file = HDF5Checkpoint(given, objective, run, if_save_fails=if_save_fails, printer=printer)
    file.reserve()
    try:
        yield file
    finally:
        file.release()


def _insist_on_residuals(rf, what: str) -> None:
    """Refuse MGRIT that looks at no residual where accuracy is chosen by it."""
    if any(p.sweeps.options.residual == "none" and p.sweeps.options.levels > 1 for p in rf.problem.leaves):
        raise InputError(f"{what} chooses accuracy by residuals: give mgrit residual='C' or 'full', not 'none'")


@_on_all_ranks
def one_shot(rf, start: np.ndarray, *, monitor=None, constraints, preconditioner, checkpoint, if_save_fails, **options):
    """See :meth:`~pint_fem.adjoint.TimeParallelReducedFunctional.minimize_one_shot`."""
    options.setdefault("value_rtol", _value_rtol(rf.problem))
    options.setdefault("memory", 10 if rf.evolution.stepwise else 40)  # what is static is small beside a trajectory
    _insist_on_residuals(rf, "one-shot")
    if any(p.sweeps.solvers.accelerated for p in rf.problem.leaves):
        raise InputError("one-shot takes single MGRIT cycles: leave krylov out")
    if preconditioner == "limited-memory":
        raise InputError("one-shot learns its own pairs: leave preconditioner='limited-memory' out, see memory=")
    options["preconditioner"] = _preconditioner(rf, rf.inner, preconditioner)
    with stop_annotating():
        objective = Objective(rf.problem, rf.inner)
        limited, start = constrained(rf, objective, start, constraints)
        given = dict(limited=limited, constraints=constraints)
        with _checkpoint(checkpoint, rf, objective, "one-shot", if_save_fails, **given) as kept:
            return minimize_one_shot(limited, start, monitor=monitor, checkpoint=kept, **options)


@_on_all_ranks
def scipy_method(rf, start: np.ndarray, method: str, *, bounds, **options):
    """See :meth:`~pint_fem.adjoint.TimeParallelReducedFunctional.minimize_scipy`."""
    scaling = rf.inner.weights
    if scaling is None:
        scaling = ControlInner(rf.layout, "lumped").weights
    lower, upper = (None, None) if bounds is None else _box(rf, bounds)
    with stop_annotating():
        objective = Objective(rf.problem, rf.inner, scaling=scaling)
        return scipy_minimize(objective, start, method, comm=rf.spacetime.comm, lower=lower, upper=upper, **options)


def named_array(rf, values, what: str) -> np.ndarray:
    """Own values of controls; a refusal names the argument."""
    try:
        return rf.array(values)
    except InputError as error:
        raise InputError(f"{what}: {error}") from error


def _value_rtol(problem) -> float:
    """Relative accuracy of ``J``, by that of the sweeps."""
    return 10 * max(leaf.sweeps.options.rtol for leaf in problem.leaves)


def _box(rf, bounds) -> tuple[np.ndarray | float, np.ndarray | float]:
    """Lower and upper bounds as numbers or arrays of own values."""
    if not isinstance(bounds, (list, tuple)) or len(bounds) != 2:
        raise InputError(f"bounds {bounds!r}: give a pair (lower, upper), such as (0, None)")
    return tuple(_side(rf, side, none) for side, none in zip(bounds, (-np.inf, np.inf), strict=True))


def _side(rf, side, none: float):
    """A bound: a number, ``None`` for none, values of the controls, or a list with one of these for each control."""
    controls = rf.evolution.controls
    if side is None or isinstance(side, Real):
        return none if side is None else float(side)
    sides = side if isinstance(side, (list, tuple)) else [side]
    if len(sides) != len(controls):
        raise InputError(f"bounds: {len(sides)} values for {len(controls)} controls; give a number, or one for each")
    if not any(one is None or isinstance(one, Real) for one in sides):
        return named_array(rf, sides, "bounds")
    whole = np.empty(rf.layout.size)
    spread = [rf.function(np.zeros(rf.layout.size))] if len(controls) == 1 else rf.function(np.zeros(rf.layout.size))
    given = [zero if one is None or isinstance(one, Real) else one for one, zero in zip(sides, spread, strict=True)]
    for part, values, one in zip(
        rf.layout.parts(whole), rf.layout.parts(named_array(rf, given, "bounds")), sides, strict=True
    ):
        part[...] = none if one is None else float(one) if isinstance(one, Real) else values
    return whole


def constrained(rf, objective: Objective, start: np.ndarray, constraints):
    """The objective on the controls that meet the constraints, and the nearest such control to the start.

    Parameters
    ----------
    rf
        The functional.
    objective
        Of the controls.
    start
        First control.
    constraints
        Pairs ``(form, value)``: UFL functionals that are affine in the controls, and what they have to be; for controls
        with a value a step the functional is summed with weight ``dt``. ``None``: no constraints.

    Raises
    ------
    InputError
        If a form is not affine in the controls, or has none.
    """
    if not constraints:
        return objective, start
    normals, values = _normals(rf, objective, constraints)
    try:
        limited = AffineConstraints(objective, normals, values)
    except ValueError as error:
        raise InputError(f"constraints: {error}") from error
    return limited, limited.feasible(start)


def _normals(rf, objective: Objective, constraints) -> tuple[list[np.ndarray], list[float]]:
    """The representatives of the constraints' derivatives, and what these have to be at the controls: the values
    without what the functionals are at zero.
    """
    pairs = list(constraints) if isinstance(constraints, (list, tuple)) else [constraints]
    if not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs):
        raise InputError("constraints: give a list of pairs of a functional and its value, such as [(q*dx, 1.0)]")
    found = [_normal(rf, form) for form, _ in pairs]
    values = [float(value) - constant for (_, value), (_, constant) in zip(pairs, found, strict=True)]
    return [objective.representative(dual) for dual, _ in found], values


def _normal(rf, form) -> tuple[np.ndarray, float]:
    """A constraint's derivative, a dual vector, and its value at zero."""
    controls = [c for c in rf.evolution.controls if isinstance(form, ufl.Form) and c in extract_coefficients(form)]
    if not controls or form.arguments():
        raise InputError("constraints: give pairs of a functional of the controls, such as q*dx, and its value")
    moving = {f for leaf in rf.problem.leaves for f in (leaf.evolution.u, leaf.evolution.t)}
    if moving & set(extract_coefficients(form)):
        raise InputError("constraints: a functional contains the state u or the time t: give one of controls and data")
    form = with_fixed_degrees(form)
    dual = np.zeros(rf.layout.size)
    for control in controls:
        space = control.function_space()
        slope = expand_derivatives(derivative(form, control, TestFunction(space)))
        if set(controls) & set(extract_coefficients(slope)):
            raise InputError("constraints: a functional is not linear in the controls")
        stepwise = control in rf.evolution.stepwise
        rf.layout.part(dual, control)[...] = get(assemble(slope)) * (rf.evolution.dt if stepwise else 1.0)
    constant = float(assemble(ufl.replace(form, {c: Function(c.function_space()) for c in controls})))
    stepwise = [c in rf.evolution.stepwise for c in controls]
    if constant and any(stepwise) and not all(stepwise):
        raise InputError(
            "constraints: a functional of static controls and some with a value a step has a part without controls: "
            "give that part in the value"
        )
    return dual, constant * (rf.evolution.dt * rf.evolution.nsteps if any(stepwise) else 1.0)


def _preconditioner(rf, inner: ControlInner, given):
    """An approximate inverse Hessian on representatives."""
    if given is None or given == "limited-memory" or (callable(given) and not isinstance(given, ufl.Form)):
        return given
    if isinstance(given, str) and given == "regularisation":
        given = [_second_derivative(rf, control) for control in rf.evolution.controls]
    elif isinstance(given, str):
        raise InputError(
            f"preconditioner {given!r}: give 'regularisation', 'limited-memory', a bilinear form or a callable"
        )
    prior = ControlInner(rf.layout, given)
    return lambda r: prior.primal(inner.dual(r))


def _second_derivative(rf, control) -> ufl.Form:
    """The regularisation's second derivative by a control, as a bilinear form."""
    second = rf.problem.regularisation_hessian(control)
    if second is None:
        raise InputError(
            f"preconditioner 'regularisation': the regularisation is not quadratic in control {control.name()!r}"
        )
    return second

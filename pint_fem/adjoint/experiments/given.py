"""Experiments: one evolution with other data (loads, boundary values, initial conditions) and other observations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, TypeAlias

import ufl
from firedrake import Cofunction, Constant, DirichletBC, Function

from pint_fem.errors import InputError, InputTypeError
from pint_fem.evolution.boundary import boundary_value
from pint_fem.evolution.evolution import Evolution
from pint_fem.evolution.private_copies import data_of, name_of
from pint_fem.misfits.base import Misfit

__all__ = ["Experiments"]

Data: TypeAlias = Mapping[Function | Constant | Cofunction, Any]
"""Values of an experiment by what they replace."""


class Experiments:
    """Several experiments with one evolution: each has its own data and misfits, and all share the controls.

    Where the data are not in the operators, all experiments are solved at once with one factorisation; on a grid with
    groups of ranks for experiments, ``SpaceTime("1x2x4")``, they are divided among the groups.

    Parameters
    ----------
    evolution
        The problem.
    experiments
        A pair ``(data, misfits)`` for each experiment. ``data`` maps Functions, Constants or Cofunctions of the
        evolution, in the residual, in boundary values or in the initial condition, to what stands in their place in
        this experiment: a Function, a Constant, a UFL expression of the same shape or, for scalars, a number; for a
        Cofunction another one of the same space, and for the function that holds the initial condition (by default
        ``u``) a Function of the state's space. What is not in ``data`` is the same in all experiments. ``misfits`` is
        one misfit or a list, in the evolution's functions.

    Attributes
    ----------
    evolutions : list of Evolution
        One for each experiment, such as :meth:`~pint_fem.adjoint.TimeParallelReducedFunctional.state` takes.
    misfits : list
        Those of each experiment.

    Raises
    ------
    InputError
        If there is no experiment, or data do not fit: what was given, and what is accepted.

    Examples
    --------
    >>> shots = pf.Experiments(wave, [({source: Constant(p)}, pf.PointSensors(points, times, d)) for p, d in records])
    >>> J = pf.TimeParallelReducedFunctional(shots)
    """

    def __init__(self, evolution: Evolution, experiments: Sequence[tuple[Data, Misfit | Sequence[Misfit]]]):
        if not isinstance(evolution, Evolution):
            raise InputTypeError(f"Experiments: {evolution!r} is given as evolution; give an Evolution")
        pairs = list(experiments)
        if not pairs or not all(isinstance(p, tuple) and len(p) == 2 and isinstance(p[0], Mapping) for p in pairs):
            raise InputError(
                "Experiments: give a list with a pair (data, misfits) for each experiment, data being a dictionary "
                "such as {source: Constant(2.0)}"
            )
        self.evolutions = [_with_data(evolution, data, number) for number, (data, _) in enumerate(pairs)]
        self.misfits = [misfits for _, misfits in pairs]


def _with_data(evolution: Evolution, data: Data, number: int) -> Evolution:
    """The evolution of an experiment."""
    where, initial_function = f"Experiments: data of experiment {number}", evolution.initial
    functions = {key: value for key, value in data.items() if not isinstance(key, Cofunction)}
    starts = functions.pop(initial_function, None)
    variables = {evolution.u, *evolution.sought, *evolution.controls}
    if wrong := [key for key in functions if key in variables or key in (evolution.t, evolution.time_constant)]:
        raise InputError(f"{where}: {name_of(wrong[0])!r} is the state, the time or a control, not data")
    if starts is not None and initial_function in evolution.controls:
        raise InputError(f"{where}: the initial condition {name_of(initial_function)!r} is a control, not data")
    if starts is not None and not (isinstance(starts, Function) and starts.function_space() == evolution.V):
        raise InputError(f"{where}: give the initial condition as a Function in the state's space")
    replaced = {key: _value(key, value, where) for key, value in functions.items()}
    residual = ufl.replace(evolution.residual, replaced)
    bcs = [_condition(bc, replaced) for bc in evolution.bcs]
    expression = evolution.initial_expression or evolution.initial_data
    found = {*data_of(evolution.residual), *(f for bc in evolution.bcs for f in data_of(boundary_value(bc)))}
    initial: Any = starts
    if initial is None and expression is not None:
        found |= set(data_of(expression))
        initial = ufl.replace(expression, replaced)
    elif initial is None and initial_function is not evolution.u:
        initial = initial_function
    loads = {representative: data.get(load, load) for representative, load in evolution.loads.items()}
    known = {*found, *evolution.loads.values()}
    if unknown := [key for key in data if key not in known and key is not initial_function]:
        raise InputError(
            f"{where}: {_name(unknown[0])!r} is not in the residual, the boundary values or the initial condition"
        )
    pairs = zip(evolution.loads.values(), loads.values(), strict=True)
    if any(not isinstance(f, Cofunction) or f.function_space() != given.function_space() for given, f in pairs):
        raise InputError(f"{where}: give a Cofunction in the same space in the place of a Cofunction")
    made = Evolution(
        residual, evolution.u, tableau=evolution.tableau, dt=evolution.dt, nsteps=evolution.nsteps,
        control=list(evolution.sought), per_step=list(evolution.stepwise), t=evolution.t, t0=evolution.t0,
        initial=initial, bcs=bcs, solver_parameters=evolution.solver_parameters, eliminate=evolution.eliminate,
        reproducible=evolution.reproducible,
        **evolution.bases,
    )  # fmt: skip
    made.loads = loads
    return made


def _name(key: object) -> str:
    return key.name() if isinstance(key, Cofunction) else name_of(key)


def _value(key: Function | Constant, value: Any, where: str) -> ufl.core.expr.Expr:
    """What stands in the place of a Function or a Constant."""
    if not isinstance(key, Function | Constant):
        raise InputTypeError(f"{where}: {key!r} is no Function, Constant or Cofunction")
    if isinstance(value, Real) and not isinstance(value, bool):
        value = Constant(float(value))
    if not isinstance(value, ufl.core.expr.Expr) or value.ufl_shape != key.ufl_shape:
        raise InputError(
            f"{where}: {value!r} in the place of {name_of(key)!r}: give a Function, a Constant or a UFL expression of "
            f"the shape {key.ufl_shape}" + (", or a number" if not key.ufl_shape else "")
        )
    return value


def _condition(bc: DirichletBC, replaced: Mapping) -> DirichletBC:
    """A boundary condition with the data of an experiment."""
    value = boundary_value(bc)
    if not set(replaced) & set(data_of(value)):
        return bc
    return type(bc)(bc.function_space(), ufl.replace(value, replaced), bc.sub_domain)

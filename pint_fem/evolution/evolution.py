r"""The evolution that a user poses: a semi-discrete residual in UFL, an integrator, an initial condition, controls.

.. math::  F(\dot u, u, t, z; v) = 0 \quad (t_0 < t \le t_0 + N \Delta t), \qquad u(t_0) = u_0 ,

for all test functions ``v`` and controls ``z``, with ``N`` steps of a diagonally implicit Runge-Kutta method
(:class:`~pint_fem.evolution.tableaux.DIRK`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import ufl
from firedrake import Constant, DirichletBC, Function, MixedVectorSpaceBasis, VectorSpaceBasis, derivative
from irksome.tableaux.ButcherTableaux import ButcherTableau
from irksome.ufl.deriv import TimeDerivative, expand_time_derivatives
from ufl.algorithms import expand_derivatives, extract_coefficients

from pint_fem.errors import InputError
from pint_fem.evolution import arguments
from pint_fem.evolution.affine_parts import AffineParts, affine_parts, touches_field, without
from pint_fem.evolution.boundary import boundary_controls, boundary_value
from pint_fem.evolution.control_operators import SeparatedOperator, separated_operator
from pint_fem.evolution.fields import Fields
from pint_fem.evolution.initial import split_initial
from pint_fem.evolution.private_copies import Integrand, PrivateCopies, data_of
from pint_fem.evolution.residual import (
    check_time_derivatives,
    checked_time,
    fixed_degrees,
    private_functional,
    time_among,
    without_loads,
)
from pint_fem.evolution.tableaux import DIRK
from pint_fem.kernels.arrays import boundary_rows, get, own_size, put, split_values
from pint_fem.kernels.nullspace import read_nullspace
from pint_fem.petsc_options.checks import require_types

__all__ = ["Evolution"]


class Evolution:
    """An initial value problem ``F(Dt(u), u, t, z; v) = 0`` with an integrator and controls.

    Nothing that is given here is written to. Functions, constants and cofunctions in the residual, in boundary values
    and as initial condition other than ``u``, ``t`` and the controls are data: they are copied when a functional is
    made (or a propagator by itself), and later changes of their values have an effect after
    :meth:`~pint_fem.adjoint.TimeParallelReducedFunctional.update_data` only.

    Parameters
    ----------
    residual
        UFL 1-form with Irksome's ``Dt`` of ``u``, of first order. Cofunctions may be added, such as point sources
        assembled from ``interpolate(v, ...)``, also multiplied by real numbers, by controls that are real numbers and
        by expressions of ``t``.
    u
        The state's function; its value is the initial condition, unless ``initial`` is given.
    tableau
        Irksome Butcher tableau, diagonally implicit: ``BackwardEuler()``, ``ImplicitMidpoint()``, ``SDIRK2()``...
    dt, nsteps
        Step size (> 0) and number of steps.
    control
        The unknowns of the inverse problem: a function or several, or ``None``. Each is a field or a real number (space
        ``R``) in the residual, in operators too, or in a boundary value (which must be affine in it), or the function
        given as ``initial``.
    per_step
        Whether the controls have a value of their own in each step (``True`` is all but the initial condition), or
        those of them that do.
    t
        The time in the residual, boundary values, initial condition and misfits: a
        :func:`~pint_fem.evolution.residual.time_function`, or a ``Constant``, in whose place the private copies of the
        forms have a time function; default: the time function that the residual and the boundary values contain, if
        any.
    t0
        Initial time.
    initial
        Initial condition: a function in the state's space, or a UFL expression, in controls too, that is interpolated
        into it at the time ``t0``; default: the value of ``u``.
    bcs
        ``DirichletBC`` on ``u``'s space or parts of it (``V.sub(0)``). Their values may depend on ``t``.
    solver_parameters
        PETSc options for the stage systems, or with ``eliminate`` for their Schur complements; default: a direct solve.
    eliminate
        Number of a field of a mixed state whose rate depends on the other fields only: steps of a linear evolution
        with constant operators then solve for the others (:mod:`~pint_fem.evolution.fields`), such as one symmetric
        positive definite system for the electric field. It changes how a step is computed, not its result.
    nullspace, transpose_nullspace
        Nullspaces of the stages' matrices and of their transposes (default: the same), as Firedrake's solvers take them
        (``VectorSpaceBasis``, ``MixedVectorSpaceBasis``), such as the constant pressure of an enclosed flow; the same
        for all states, controls and times. Stage values have no part in the nullspace (in the Euclidean product of
        coefficients), whatever the state had (:mod:`~pint_fem.kernels.nullspace`).
    near_nullspace
        Basis for algebraic multigrid, such as rigid body modes.
    reproducible
        Whether results on several ranks in space are the same bits in each run; the fastest solvers are not all so.

    Attributes
    ----------
    t : Function or None
        The time function, which stands in the forms in the place of a ``Constant`` given as ``t``, ``time_constant``.
    initial : Function
        Its value is the initial condition.
    controls, parameters : tuple of Function
        All controls in the order given; those of a step, the static ones first, whose own values are a step's vector.
    stepwise : tuple of Function
        Controls with a value of their own in each step.
    sought : tuple of Function
        The controls as given; where the initial condition is an expression of some, ``controls`` has ``initial``
        instead of those that are nowhere else.
    initial_control, initial_expression, initial_data
        The control that is the initial condition, the expression of controls or of data that it is; else ``None``.
    boundary_controls : BoundaryControls or None
        The operator of controls in boundary values.
    loads : dict
        Cofunctions in the residual by their Riesz representatives, which stand there in their place.
    posed, copies : Evolution, PrivateCopies or None
        Of a private copy the evolution as the user gave it, and the copies of its functions; else itself and ``None``.
    options_prefix : str
        Of a private copy the prefix of its solvers' options in PETSc's database: ``-PREFIXpint_ksp_type``.
    injected : dict
        Functions of a finer mesh with those here that get their values by injection.

    Raises
    ------
    InputError
        On every rank, when an argument does not fit: what was given, and what is accepted.
    """

    def __init__(
        self,
        residual: ufl.Form,
        u: Function,
        *,
        tableau: ButcherTableau,
        dt: float,
        nsteps: int,
        control: Function | Sequence[Function] | None = None,
        per_step: bool | Sequence[Function] = False,
        t: Function | Constant | None = None,
        t0: float = 0.0,
        initial: Function | ufl.core.expr.Expr | None = None,
        bcs: DirichletBC | Sequence[DirichletBC] = (),
        solver_parameters: dict | None = None,
        eliminate: int | None = None,
        nullspace: VectorSpaceBasis | MixedVectorSpaceBasis | None = None,
        transpose_nullspace: VectorSpaceBasis | MixedVectorSpaceBasis | None = None,
        near_nullspace: VectorSpaceBasis | MixedVectorSpaceBasis | None = None,
        reproducible: bool = False,
    ):
        arguments.check_state_and_steps(u, dt, nsteps)
        residual, self.loads = without_loads(residual)
        V = u.function_space()
        arguments.check_residual(residual, V)
        self.given_bcs = arguments.checked_conditions(bcs, V)
        self.t, self.time_constant = checked_time(t, V.mesh())
        self.bcs = tuple(map(self._condition_in_time, self.given_bcs))
        residual = self.in_time(residual)
        boundary_data = [c for bc in self.bcs for c in data_of(boundary_value(bc))]
        t = time_among([*data_of(residual), *boundary_data], self.t, "the residual or a boundary value")
        if isinstance(initial, ufl.core.expr.Expr) and not isinstance(initial, Function):
            initial = self.in_time(initial)
            t = time_among(data_of(initial), t, "initial=")
        residual = expand_time_derivatives(residual, t=t, timedep_coeffs=(u,))
        coefficients = extract_coefficients(residual)
        check_time_derivatives(residual, u)
        self.sought = tuple(control) if isinstance(control, (list, tuple)) else () if control is None else (control,)
        found = {*coefficients, *boundary_data}
        expression, initial, control = split_initial(initial, u, control, found, t, float(t0))
        self.residual, self.u, self.V = fixed_degrees(residual, u), u, V
        self.tableau, self.dt, self.nsteps = tableau, float(dt), int(nsteps)
        self.dirk = DIRK(tableau)
        self.t, self.t0 = t, float(t0)
        self.initial = u if initial is None else initial
        self.controls = arguments.checked_controls(control, u, found, initial)
        self.stepwise = arguments.checked_per_step(per_step, self.controls, initial)
        self.initial_control = next((c for c in self.controls if c is initial), None)
        self.initial_expression, self.initial_data = expression, None
        if self.initial_control is None:
            self.initial_expression, self.initial_data = None, expression
        if self.in_initial & set(self.stepwise):
            raise InputError("initial: a control in the expression has a value in each step: leave it out of per_step")
        parameters = [c for c in self.controls if c is not initial]
        self.parameters = tuple(sorted(parameters, key=lambda c: c in self.stepwise))
        self.boundary_controls = boundary_controls(self.bcs, V, self.parameters, u, t)
        self.solver_parameters = dict(solver_parameters or {})
        require_types(self.solver_parameters, "pint_")
        self.options_prefix, self.reproducible = "", bool(reproducible)
        self.eliminate = arguments.checked_field(eliminate, V, self.bcs)
        self.nullspace = read_nullspace(V, nullspace, transpose_nullspace, near_nullspace)
        self.bases = dict(nullspace=nullspace, transpose_nullspace=transpose_nullspace, near_nullspace=near_nullspace)
        self.depends_on_time = t is not None and (t in coefficients or t in boundary_data)
        self.posed = self
        self.copies: PrivateCopies | None = None
        self.injected: dict[Function, Function] = {}

    def __repr__(self) -> str:
        kinds = {c: " in each step" for c in self.stepwise} | {self.initial_control: " as initial condition"}
        controls = ", ".join(c.name() + kinds.get(c, "") for c in self.controls) or "none"
        return (
            f"Evolution({self.nsteps} steps of dt = {self.dt:g} by {self.dirk.name}, state {self.u.name()} in "
            f"{self.V.ufl_element()} with {self.V.dim()} unknowns, controls: {controls})"
        )

    def in_time(self, expression: Integrand) -> Integrand:
        """A form or an expression with the time function in the place of a ``Constant`` that was given as ``t``."""
        return expression if self.time_constant is None else ufl.replace(expression, {self.time_constant: self.t})

    def _condition_in_time(self, bc: DirichletBC) -> DirichletBC:
        """A boundary condition with the time function in the place of a ``Constant`` that was given as ``t``."""
        value = boundary_value(bc)
        if self.time_constant not in data_of(value):
            return bc
        return type(bc)(bc.function_space(), self.in_time(value), bc.sub_domain)

    def private(self, copies: PrivateCopies | None = None) -> Evolution:
        """The same evolution in functions of its own, which sweeps write to; the evolution itself where it has such.

        Parameters
        ----------
        copies
            Copies of functions in other forms, to which those of this evolution are added; default: none.
        """
        if self.copies is not None:
            return self
        copies = PrivateCopies() if copies is None else copies
        own, times = copies.variable, [] if self.t is None else [self.t]
        for function in (self.u, *self.controls, *self.sought, *times):
            own(function)
        for representative, load in self.loads.items():
            copies.load(representative, load)
        if self.initial is self.u:
            initial = copies.separate(self.u, f"the initial condition, the value of the state {self.u.name()!r}")
        elif self.initial_data is not None:
            initial = copies.interpolated(self.initial_data, self.V)
        else:
            initial = own(self.initial) if self.initial_control is not None else copies.datum(self.initial)
        made = Evolution(
            copies.form(self.residual), own(self.u), tableau=self.tableau, dt=self.dt, nsteps=self.nsteps,
            control=[own(c) for c in self.controls], per_step=[own(c) for c in self.stepwise],
            t=None if self.t is None else own(self.t), t0=self.t0, initial=initial,
            bcs=[copies.condition(*pair) for pair in zip(self.bcs, self.given_bcs, strict=True)],
            solver_parameters=self.solver_parameters, eliminate=self.eliminate, reproducible=self.reproducible,
            **self.bases,
        )  # fmt: skip
        made.posed, made.copies = self, copies
        if self.initial_expression is not None:
            made.initial_expression = copies.form(self.initial_expression)
        return made

    @property
    def in_initial(self) -> set[Function]:
        """The functions in the initial condition where it is an expression of controls."""
        return set() if self.initial_expression is None else set(extract_coefficients(self.initial_expression))

    def functional(self, form: ufl.Form, what: str) -> tuple[ufl.Form, Function | None]:
        """A user's functional in the functions of this private copy, and the time function in it, if any.

        Parameters
        ----------
        form
            The functional, in the user's functions.
        what
            Description of the functional, for messages.

        Returns
        -------
        form, t
            The functional and the time function in private copies.

        Raises
        ------
        InputError
            If it contains a time derivative, or a time function that is not the evolution's.
        """
        return private_functional(self.posed, self.copies, form, what)

    @property
    def state_size(self) -> int:
        """Number of degrees of freedom of a state that this rank owns."""
        return own_size(self.V)

    @property
    def control(self) -> Function | None:
        """The control, or ``None`` where there is none; an ``InputError`` is raised where there are several."""
        if len(self.controls) > 1:
            raise InputError(f"the evolution has {len(self.controls)} controls: see Evolution.controls")
        return self.controls[0] if self.controls else None

    @property
    def per_step(self) -> bool:
        """Whether a control has a value of its own in each step."""
        return bool(self.stepwise)

    @property
    def control_size(self) -> int:
        """Length of a step's vector of controls on this rank: own degrees of freedom of the parameters."""
        return sum(own_size(c.function_space()) for c in self.parameters)

    def split_controls(self, vector: np.ndarray) -> list[np.ndarray]:
        """Views of each parameter's part of vectors ``(..., control_size)``."""
        return split_values(vector, self.parameters)

    def put_controls(self, vector: np.ndarray) -> None:
        """Set the parameters' functions to a step's vector."""
        for function, values in zip(self.parameters, self.split_controls(vector), strict=True):
            put(function, values)

    def get_controls(self) -> np.ndarray:
        """The parameters' own values as a step's vector, ``(control_size,)``."""
        return np.concatenate([np.zeros(0), *(get(c) for c in self.parameters)])

    def time(self, point: int | np.ndarray) -> np.ndarray:
        """Time of a point, or of each of an array of points."""
        return self.t0 + self.dt * np.asarray(point)

    def parts(self) -> tuple[ufl.Form, Function]:
        """The residual with a coefficient in the place of ``Dt(u)``, and that coefficient."""
        rate = Function(self.V, name="rate")
        return ufl.replace(self.residual, {TimeDerivative(self.u): rate}), rate

    def stage_form(self, U: Function, W: Function, h: float | Constant) -> ufl.Form:
        """The residual of a stage, with ``(U - W)/h`` in the place of ``Dt(u)`` and ``U`` in that of ``u``."""
        return ufl.replace(self.residual, {TimeDerivative(self.u): (U - W) / h, self.u: U})

    @cached_property
    def fields(self) -> Fields | None:
        """Blocks where a field is eliminated, at the first values of the controls; computed once (collective)."""
        parts = None if self.eliminate is None else self.affine_parts
        if parts is None or touches_field(parts, self.eliminate):
            return None
        return Fields(self.V, self.eliminate, (parts.M, parts.K), self.bcs, self.nullspace)

    def linear_operators(self) -> tuple[ufl.Form, ufl.Form] | None:
        """``(M, K)`` as bilinear forms where the residual is ``M Dt(u) + K u - f(t, z)`` with constant operators and a
        load that is affine in the controls, whose operators depend on time by some scalar factors only
        (:class:`~pint_fem.evolution.control_operators.SeparatedOperator`); else ``None``.
        """
        parts = self.affine_parts
        return None if parts is None or parts.in_operators else (parts.M, parts.K)

    @cached_property
    def affine_parts(self) -> AffineParts | None:
        """Operators and load where the same holds for given controls, some of which may be in the operators."""
        found = self._parts is not None and all(op is None or op.separable for op in self.control_operators)
        return self._parts if found else None

    @property
    def has_controlled_operators(self) -> bool:
        """Whether the evolution is linear with operators that depend on static controls, and not on time."""
        return self.affine_parts is not None and bool(self.affine_parts.in_operators)

    @cached_property
    def _parts(self) -> AffineParts | None:
        return affine_parts(self)

    @cached_property
    def control_operators(self) -> list[SeparatedOperator | None]:
        """Derivatives of the load by each of the parameters, in which it is affine; shared by all levels."""
        load = self._parts.load
        rows, interval = boundary_rows(self.bcs, self.V), (self.t0, self.t0 + self.nsteps * self.dt)
        return [separated_operator(load, control, rows, self.t, interval) for control in self.parameters]

    @property
    def controls_move(self) -> bool:
        """Whether the derivative of a step of a linear evolution by a control depends on time."""
        return any(operator is not None and not operator.constant for operator in self.control_operators)

    @cached_property
    def operator_data(self) -> set:
        """Data in the operators: in derivatives of the residual, and in boundary values with controls in them."""
        form, rate = self.parts()
        slopes = [expand_derivatives(derivative(form, x)) for x in (rate, self.u, *self.parameters)]
        values = [found for bc in self.bcs if (found := set(data_of(boundary_value(bc)))) & set(self.parameters)]
        return {data for slope in slopes if not slope.empty() for data in data_of(slope)}.union(*values)

    def update_data(self, *, operators: bool) -> None:
        """Discard what was assembled from data, which have changed.

        Parameters
        ----------
        operators
            Whether data in the operators are among them (:attr:`operator_data`).
        """
        if self.boundary_controls is not None:
            self.boundary_controls.update_data()
        if operators:
            for name in ("_parts", "affine_parts", "control_operators", "fields"):
                vars(self).pop(name, None)

    @cached_property
    def is_homogeneous(self) -> bool:
        """Whether the residual has no load other than the controls' and boundary values are zero."""
        form, rate = self.parts()
        # the state first: operators need not be defined for zero controls
        load = without(without(form, (self.u, rate)), self.parameters)
        return all(isinstance(boundary_value(bc), ufl.classes.Zero) for bc in self.bcs) and load.empty()

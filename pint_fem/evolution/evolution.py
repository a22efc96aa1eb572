"""The evolution a user poses: a semi-discrete residual in UFL, an integrator, controls."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from numbers import Real

import numpy as np
import ufl
from firedrake import DirichletBC, Function, derivative
from firedrake.utils import complex_mode
from irksome.ufl.deriv import TimeDerivative, expand_time_derivatives
from ufl.algorithms import expand_derivatives, extract_coefficients
from ufl.algorithms.analysis import has_type

from pint_fem.errors import InputError
from pint_fem.evolution.boundary import boundary_value, control_values
from pint_fem.evolution.controls import checked_controls, checked_per_step
from pint_fem.evolution.fields import Fields, checked_field
from pint_fem.evolution.initial import split_initial
from pint_fem.evolution.private_copies import PrivateCopies, data_of
from pint_fem.evolution.quadrature import with_fixed_degrees
from pint_fem.evolution.residual import check_time_derivatives, time_among, time_function, without_loads
from pint_fem.evolution.separated_operators import SeparatedOperator, separated_operator
from pint_fem.evolution.tableaux import DIRK
from pint_fem.kernels.arrays import boundary_rows, get, is_real, own_size, put, whole_space
from pint_fem.kernels.nullspace import read_nullspace
from pint_fem.petsc_options.types import require_types

__all__ = ["Evolution", "time_function"]


class Evolution:
    """``F(Dt(u), u, t, z; v) = 0`` on ``t0 < t <= t0 + nsteps dt`` with ``u(t0)`` given, stepped by a DIRK tableau.

    Nothing that is given here is written to. Functions, constants and cofunctions in the residual, in boundary values
    and as initial condition other than ``u``, ``t`` and the controls are data: they are copied when a functional is
    made (or a propagator by itself), and later changes of their values are seen after
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
        What is sought: a function or several, or ``None``. Each is a field or a real number (space ``R``) in the
        residual, in operators too, or in a boundary value (which must be affine in it), or the function given as
        ``initial``.
    per_step
        Whether the controls have a value of their own in each step (``True`` is all but the initial condition), or
        those of them that do.
    t
        :func:`time_function` in the residual, boundary values and misfits; default: the one that the residual and the
        boundary values contain, if any.
    t0
        Initial time.
    initial
        Initial condition: a function in the state's space, or a UFL expression, in controls too, that is interpolated
        into it at the time ``t0``; default: the value of ``u``.
    bcs
        ``DirichletBC`` on ``u``'s space or parts of it (``V.sub(0)``). Their values may depend on ``t``.
    solver_parameters
        PETSc options for the stage systems (with ``eliminate``: for what is left of them); default is a direct solve.
    eliminate
        Number of a field of a mixed state whose rate depends on the other fields only: steps of a linear evolution
        with constant operators then solve for the others (:mod:`~pint_fem.evolution.fields`), such as one symmetric
        positive definite system for the electric field. It changes how a step is computed, not its result.
    nullspace, transpose_nullspace
        Nullspaces of the stages' matrices and of their transposes (default: the same), as Firedrake's solvers take them
        (``VectorSpaceBasis``, ``MixedVectorSpaceBasis``), such as the constant pressure of an enclosed flow; the same
        for all states, controls and times. Stage values have no part in the nullspace (in the Euclidean product of
        coefficients), whatever the state had; see :mod:`~pint_fem.kernels.nullspace`.
    near_nullspace
        Basis for algebraic multigrid, such as rigid body modes.

    Raises
    ------
    InputError
        On every rank, when an argument does not fit: what was given, what would do.
    """

    def __init__(
        self,
        residual: ufl.Form,
        u: Function,
        *,
        tableau,
        dt: float,
        nsteps: int,
        control: Function | Sequence[Function] | None = None,
        per_step: bool | Sequence[Function] = False,
        t: Function | None = None,
        t0: float = 0.0,
        initial: Function | ufl.core.expr.Expr | None = None,
        bcs=(),
        solver_parameters: dict | None = None,
        eliminate: int | None = None,
        nullspace=None,
        transpose_nullspace=None,
        near_nullspace=None,
    ):
        if complex_mode:
            raise InputError(
                "PETSc is built for complex numbers: pint_fem needs a real build (--with-scalar-type=real)"
            )
        if not isinstance(u, Function):
            raise InputError(f"state u is a {type(u).__name__}: give a firedrake Function")
        if not isinstance(dt, Real) or not 0 < dt < np.inf:
            raise InputError(f"time step dt = {dt!r}: give a positive number")
        if not hasattr(nsteps, "__index__") or isinstance(nsteps, bool) or nsteps < 1:
            raise InputError(f"nsteps = {nsteps!r}: give a whole number of at least 1")
        #: Riesz representatives of the cofunctions in the residual, which stand there in their place.
        residual, self.loads = without_loads(residual)
        if not isinstance(residual, ufl.Form) or len(residual.arguments()) != 1:
            raise InputError(
                "residual is not a linear form: write F(Dt(u), u; v) with one TestFunction v, and no '== 0'"
            )
        V = u.function_space()
        if any(is_real(part) for part in V):
            raise InputError(
                "the state has a real number in it (space R), of which Firedrake assembles no matrix that can be "
                "factored: write the residual without it. For the mean of a pressure give nullspace=; a number with a "
                "value in each step can be a control (per_step=)"
            )
        if residual.arguments()[0].function_space() != V:
            raise InputError(
                "the residual's test function is not in the state's space: use TestFunction(u.function_space())"
            )
        self.bcs = tuple(bcs) if isinstance(bcs, (list, tuple)) else (bcs,)
        if any(not isinstance(bc, DirichletBC) for bc in self.bcs):
            raise InputError("bcs: give DirichletBC objects")
        if any(whole_space(bc.function_space()) != V for bc in self.bcs):
            raise InputError("a boundary condition is not on the state's space or a part of it such as V.sub(0)")
        if t is not None and (not isinstance(t, Function) or not is_real(t.function_space())):
            raise InputError(
                "t is not a function in the space R: make it by pint_fem.time_function(mesh), not Constant"
            )
        boundary_data = [c for bc in self.bcs for c in data_of(boundary_value(bc))]
        t = time_among([*data_of(residual), *boundary_data], t, "the residual or a boundary value")
        if isinstance(initial, ufl.core.expr.Expr):
            t = time_among(data_of(initial), t, "initial=")
        residual = expand_time_derivatives(residual, t=t, timedep_coeffs=(u,))
        coefficients = extract_coefficients(residual)
        check_time_derivatives(residual, u)
        #: The controls as given; where the initial condition is an expression of some, :attr:`controls` has the
        #: function ``initial`` instead of those that are nowhere else.
        self.sought = tuple(control) if isinstance(control, (list, tuple)) else () if control is None else (control,)
        found = {*coefficients, *boundary_data}
        expression, initial, control = split_initial(initial, u, control, found, t, float(t0))
        self.residual, self.u, self.V = _with_fixed_degrees(residual, u), u, V
        self.tableau, self.dt, self.nsteps = tableau, float(dt), int(nsteps)
        self.dirk = DIRK(tableau)
        self.t, self.t0 = t, float(t0)
        #: Its value is the initial condition.
        self.initial = u if initial is None else initial
        #: All controls, in the order given.
        self.controls = checked_controls(control, u, found, initial)
        #: Those with a value in each step.
        self.stepwise = checked_per_step(per_step, self.controls, initial)
        #: The control that is the initial condition, or ``None``.
        self.initial_control = next((c for c in self.controls if c is initial), None)
        #: The initial condition as an expression of controls, and as one of data only, or ``None``.
        self.initial_expression, self.initial_data = expression, None
        if self.initial_control is None:
            self.initial_expression, self.initial_data = None, expression
        if self.in_initial & set(self.stepwise):
            raise InputError("initial: a control in the expression has a value in each step: leave it out of per_step")
        parameters = [c for c in self.controls if c is not initial]
        #: Controls of a step, the static ones first; a step's vector of them has their own values in this order.
        self.parameters = tuple(sorted(parameters, key=lambda c: c in self.stepwise))
        #: Their boundary values, as operators.
        self.boundary_controls = control_values(self)
        self.solver_parameters = dict(solver_parameters or {})
        require_types(self.solver_parameters, "pint_")
        #: Prefix of this package's options in PETSc's database: ``-PREFIXpint_ksp_type``. Set on private copies.
        self.options_prefix = ""
        self.eliminate = checked_field(eliminate, V, self.bcs)
        #: Of the stages' matrices, or ``None``.
        self.nullspace = read_nullspace(V, nullspace, transpose_nullspace, near_nullspace)
        #: Firedrake's bases of them as they were given, by argument.
        self.bases = dict(nullspace=nullspace, transpose_nullspace=transpose_nullspace, near_nullspace=near_nullspace)
        self.test = residual.arguments()[0]
        self.depends_on_time = t is not None and (t in coefficients or t in boundary_data)
        #: The evolution as the user gave it; another one where this one is a private copy.
        self.posed = self
        #: What functions of the user the private functions of this evolution are copies of; ``None`` where it is the
        #: user's own.
        self.copies: PrivateCopies | None = None
        #: Copies on a finer mesh by what they were injected to, where the evolution was posed on a coarser one.
        self.injected: dict[Function, Function] = {}

    def private(self, copies: PrivateCopies | None = None) -> Evolution:
        """The same evolution in functions of its own, which sweeps write to; itself where it is one already.

        Parameters
        ----------
        copies
            Copies of what other forms contain, which are added to.
        """
        if self.copies is not None:
            return self
        copies = PrivateCopies() if copies is None else copies
        own = copies.variable
        for function in (self.u, *self.controls, *self.sought, *([] if self.t is None else [self.t])):
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
            bcs=[copies.condition(bc) for bc in self.bcs], solver_parameters=self.solver_parameters,
            eliminate=self.eliminate, **self.bases,
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
            In the user's functions.
        what
            What it is, for messages.

        Raises
        ------
        InputError
            If it contains a time derivative, or a time function that is not the evolution's.
        """
        if has_type(form, TimeDerivative):
            raise InputError(
                f"{what} contains Dt(u): a functional sees states at points in time, not their rates; make the rate a "
                "field of a mixed state, or compare differences of states by a misfit of your own"
            )
        found = data_of(form)
        t = time_among(found, self.posed.t, what)
        own = self.copies.variable(t) if t in found else None
        return self.copies.form(form), own

    @property
    def state_size(self) -> int:
        """Own degrees of freedom of a state on this rank."""
        return own_size(self.V)

    @property
    def control(self) -> Function | None:
        """The control, or ``None``, where there are not several."""
        if len(self.controls) > 1:
            raise InputError(f"the evolution has {len(self.controls)} controls: see Evolution.controls")
        return self.controls[0] if self.controls else None

    @property
    def per_step(self) -> bool:
        """Whether a control has a value of its own in each step."""
        return bool(self.stepwise)

    @property
    def control_sizes(self) -> list[int]:
        """Own degrees of freedom of each of the parameters (of one step) on this rank."""
        return [own_size(c.function_space()) for c in self.parameters]

    @property
    def control_size(self) -> int:
        """Their sum: the length of a step's vector of controls."""
        return sum(self.control_sizes)

    def split_controls(self, vector: np.ndarray) -> list[np.ndarray]:
        """Views of the parameters' parts of vectors ``(..., control_size)``."""
        return np.split(vector, np.cumsum(self.control_sizes)[:-1], axis=-1) if self.parameters else []

    def put_controls(self, vector: np.ndarray) -> None:
        """Set the parameters' functions to a step's vector."""
        for function, values in zip(self.parameters, self.split_controls(vector), strict=True):
            put(function, values)

    def get_controls(self) -> np.ndarray:
        """The step's vector of the parameters' functions."""
        return np.concatenate([np.zeros(0), *(get(c) for c in self.parameters)])

    def time(self, point):
        """Time of a point or an array of points."""
        return self.t0 + self.dt * np.asarray(point)

    def parts(self) -> tuple[ufl.Form, Function]:
        """The residual with a plain coefficient in the place of ``Dt(u)``, and that coefficient."""
        rate = Function(self.V, name="rate")
        return ufl.replace(self.residual, {TimeDerivative(self.u): rate}), rate

    def stage_form(self, U: Function, W: Function, h) -> ufl.Form:
        """Residual of a stage: ``Dt(u) -> (U - W)/h``, ``u -> U``."""
        return ufl.replace(self.residual, {TimeDerivative(self.u): (U - W) / h, self.u: U})

    @cached_property
    def fields(self) -> Fields | None:
        """Blocks of the operators where a field is eliminated, shared by all levels (collective when first asked
        for).
        """
        operators = None if self.eliminate is None else self.linear_operators()
        return None if operators is None else Fields(self.V, self.eliminate, operators, self.bcs, self.nullspace)

    def linear_operators(self):
        r"""``(M, K)`` as bilinear forms where the residual is ``M Dt(u) + K u - f(t, z)``, else ``None``.

        Required: affine in ``u`` and in the controls, with none of them, nor time, in ``M`` and ``K``, and none of them
        in the controls' operators, which depend on time by some scalar factors only
        (:mod:`~pint_fem.evolution.separated_operators`).
        """
        return self._linear

    @cached_property
    def _linear(self):
        form, rate = self.parts()
        M = expand_derivatives(derivative(form, rate))
        K = expand_derivatives(derivative(form, self.u))
        moving = {self.u, rate, *self.parameters}
        operators = [expand_derivatives(derivative(form, control)) for control in self.parameters]
        found = lambda f, what: not f.empty() and bool(what & set(extract_coefficients(f)))
        with_time = moving | ({self.t} if self.t is not None else set())
        if M.empty() or any(found(f, with_time) for f in (M, K)) or any(found(f, moving) for f in operators):
            return None
        if self.boundary_controls is not None and self.boundary_controls.depends_on_time:
            return None
        return (M, K) if all(op is None or op.separable for op in self.control_operators) else None

    @cached_property
    def control_operators(self) -> list[SeparatedOperator | None]:
        """Derivatives of the load by each of the parameters, which it is affine in; shared by all levels."""
        form, _ = self.parts()
        rows, interval = boundary_rows(self.bcs, self.V), (self.t0, self.t0 + self.nsteps * self.dt)
        return [separated_operator(-form, control, rows, self.t, interval) for control in self.parameters]

    @property
    def controls_move(self) -> bool:
        """Whether what a control adds to a step is not the same in all steps, for controls that are: time courses of a
        linear evolution.
        """
        return any(operator is not None and not operator.constant for operator in self.control_operators)

    @cached_property
    def operator_data(self) -> set:
        """Data in the operators: in derivatives of the residual, and in boundary values with controls in them."""
        form, rate = self.parts()
        slopes = [expand_derivatives(derivative(form, x)) for x in (rate, self.u, *self.parameters)]
        values = [found for bc in self.bcs if (found := set(data_of(boundary_value(bc)))) & set(self.parameters)]
        return {data for slope in slopes if not slope.empty() for data in data_of(slope)}.union(*values)

    def update_data(self, *, operators: bool) -> None:
        """Data have other values now: forget what was assembled from them, with ``operators`` those, too."""
        if self.boundary_controls is not None:
            self.boundary_controls.update_data()
        if operators:
            for name in ("_linear", "control_operators", "fields"):
                vars(self).pop(name, None)

    @cached_property
    def is_homogeneous(self) -> bool:
        """Whether the residual has no other load than the controls' and boundary values are zero."""
        form, rate = self.parts()
        nothing = {f: ufl.classes.Zero(f.ufl_shape) for f in (self.u, rate, *self.parameters)}
        zero = all(isinstance(boundary_value(bc), ufl.classes.Zero) for bc in self.bcs)
        return zero and expand_derivatives(ufl.replace(form, nothing)).empty()


def _with_fixed_degrees(residual: ufl.Form, u: Function) -> ufl.Form:
    """The residual with the quadrature degrees that it has as a whole, with ``Dt(u)`` like a coefficient."""
    rate = Function(u.function_space())
    plain = with_fixed_degrees(ufl.replace(residual, {TimeDerivative(u): rate}))
    return ufl.replace(plain, {rate: TimeDerivative(u)})

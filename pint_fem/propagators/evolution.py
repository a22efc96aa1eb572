"""The evolution a user poses: a semi-discrete residual in UFL, an integrator, a control."""

from __future__ import annotations

from numbers import Real

import numpy as np
import ufl
from firedrake import DirichletBC, Function, FunctionSpace, derivative
from firedrake.utils import complex_mode
from irksome.ufl.deriv import TimeDerivative, expand_time_derivatives
from ufl.algorithms import expand_derivatives, extract_coefficients
from ufl.algorithms.analysis import extract_type

from pint_fem.errors import InputError
from pint_fem.propagators.arrays import own_size
from pint_fem.propagators.tableaux import DIRK

__all__ = ["Evolution", "time_function"]


def time_function(mesh, value: float = 0.0) -> Function:
    """A time variable for use in forms: a function in the space of reals ``R`` (never a ``Constant``, see DESIGN)."""
    return Function(FunctionSpace(mesh, "R", 0), name="t").assign(value)


class Evolution:
    """``F(Dt(u), u, t, z; v) = 0`` on ``t0 < t <= t0 + nsteps dt`` with ``u(t0)`` given, stepped by a DIRK tableau.

    Coefficients of the residual and the conditions other than ``u``, ``t`` and the control are data: they are read
    when propagators are built, and later changes of their values are not seen.

    Parameters
    ----------
    residual
        UFL 1-form with Irksome's ``Dt`` of ``u``.
    u
        The state's function; its value is the initial condition, unless ``initial`` is given.
    tableau
        Irksome Butcher tableau, diagonally implicit: ``BackwardEuler()``, ``ImplicitMidpoint()``, ``SDIRK2()``...
    dt, nsteps
        Step size (> 0) and number of steps.
    control
        Function in the residual that is sought, or ``None``.
    per_step
        Whether the control has a value of its own in each step.
    t
        :func:`time_function` in the residual and boundary data, or ``None`` where neither depends on time.
    t0
        Initial time.
    bcs
        ``DirichletBC`` on ``u``'s space. Their values may depend on ``t``.
    solver_parameters
        PETSc options for the stage systems; default is a direct solve.

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
        control: Function | None = None,
        per_step: bool = False,
        t: Function | None = None,
        t0: float = 0.0,
        initial: Function | None = None,
        bcs=(),
        solver_parameters: dict | None = None,
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
        if not isinstance(residual, ufl.Form) or len(residual.arguments()) != 1:
            raise InputError(
                "residual is not a linear form: write F(Dt(u), u; v) with one TestFunction v, and no '== 0'"
            )
        V = u.function_space()
        if residual.arguments()[0].function_space() != V:
            raise InputError(
                "the residual's test function is not in the state's space: use TestFunction(u.function_space())"
            )
        self.bcs = tuple(bcs) if isinstance(bcs, (list, tuple)) else (bcs,)
        if any(not isinstance(bc, DirichletBC) for bc in self.bcs):
            raise InputError("bcs: give DirichletBC objects")
        if any(bc.function_space() != V for bc in self.bcs):
            raise InputError(
                "a boundary condition is not on the state's space (sub-space conditions are not supported)"
            )
        residual = expand_time_derivatives(residual, t=t, timedep_coeffs=(u,))
        coefficients = extract_coefficients(residual)
        if u not in coefficients or not extract_type(residual, TimeDerivative):
            raise InputError("the residual has no Dt(u): import Dt from irksome and write the semi-discrete form")
        if t is not None and (not isinstance(t, Function) or t.function_space().ufl_element().family() != "Real"):
            raise InputError(
                "t is not a function in the space R: make it by pint_fem.time_function(mesh), not Constant"
            )
        boundary_data = [c for bc in self.bcs for c in extract_coefficients(_boundary_value(bc))]
        if control is not None:
            if not isinstance(control, Function):
                raise InputError(f"control is a {type(control).__name__}: give a firedrake Function")
            if control.function_space().ufl_element().family() == "Real":
                raise InputError("a control in the space of reals is not supported: use a field, such as one in DG0")
            if control in boundary_data:
                raise InputError(
                    "the control is in a boundary condition's value: put it into the residual (weakly) instead"
                )
            if control not in coefficients:
                raise InputError("the control does not appear in the residual: use the same Function in both")
            if control.function_space().mesh().unique() is not V.mesh().unique():
                raise InputError("the control lives on another mesh than the state")
        if initial is not None and (not isinstance(initial, Function) or initial.function_space() != V):
            raise InputError("initial: give a Function in the state's space")
        self.residual, self.u, self.V = residual, u, V
        self.tableau, self.dt, self.nsteps = tableau, float(dt), int(nsteps)
        self.dirk = DIRK(tableau)
        self.control, self.per_step, self.t, self.t0 = control, bool(per_step), t, float(t0)
        self.initial = Function(V).assign(u if initial is None else initial)
        self.solver_parameters = dict(solver_parameters or {})
        self.test = residual.arguments()[0]
        self.depends_on_time = t is not None and (t in coefficients or t in boundary_data)

    @property
    def state_size(self) -> int:
        """Own degrees of freedom of a state on this rank."""
        return own_size(self.V)

    @property
    def control_size(self) -> int:
        """Own degrees of freedom of the control (of one step) on this rank; 0 without one."""
        return 0 if self.control is None else own_size(self.control.function_space())

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

    def linear_operators(self):
        r"""``(M, K)`` as bilinear forms where the residual is ``M Dt(u) + K u - f(t, z)``, else ``None``.

        Required: affine in ``u`` and in the control, with neither, nor time, in ``M``, ``K`` or the control's operator.
        """
        form, rate = self.parts()
        M = expand_derivatives(derivative(form, rate))
        K = expand_derivatives(derivative(form, self.u))
        moving = {self.u, rate} | ({self.t} if self.t is not None else set())
        if self.control is not None:
            moving.add(self.control)
            B = expand_derivatives(derivative(form, self.control))
            if not B.empty() and moving & set(extract_coefficients(B)):
                return None
        if M.empty() or any(not form.empty() and moving & set(extract_coefficients(form)) for form in (M, K)):
            return None
        return M, K


def _boundary_value(bc: DirichletBC) -> ufl.core.expr.Expr:
    """The value of a condition as UFL, as the user gave it."""
    value = bc._original_arg
    return ufl.as_tensor(value) if isinstance(value, (list, tuple)) else ufl.as_ufl(value)

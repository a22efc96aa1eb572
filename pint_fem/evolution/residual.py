"""What a user's residual may contain beside the state: the time, the state's rate, and loads that are no integrals."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import ufl
from firedrake import Cofunction, Constant, Function, FunctionSpace, TestFunction, dx, inner
from firedrake.mesh import MeshGeometry
from irksome.ufl.deriv import TimeDerivative
from ufl.algorithms.analysis import extract_type, has_type

from pint_fem.errors import InputError
from pint_fem.evolution.private_copies import PrivateCopies, data_of, mass_degree, name_of, riesz_representative
from pint_fem.evolution.quadrature import with_fixed_degrees
from pint_fem.kernels.arrays import is_real

if TYPE_CHECKING:
    from pint_fem.evolution.evolution import Evolution

__all__ = [
    "check_time_derivatives",
    "checked_time",
    "fixed_degrees",
    "private_functional",
    "time_among",
    "time_function",
    "without_loads",
]

_TIMES: WeakSet[Function] = WeakSet()
"""The functions that :func:`time_function` has made."""


def time_function(mesh: MeshGeometry, value: float = 0.0) -> Function:
    """A time variable for use in forms: a function in the space of real numbers ``R``.

    Parameters
    ----------
    mesh
        The mesh of the state.
    value
        Initial value.
    """
    t = Function(FunctionSpace(mesh, "R", 0), name="t").assign(value)
    _TIMES.add(t)
    return t


def checked_time(given: Function | Constant | None, mesh: MeshGeometry) -> tuple[Function | None, Constant | None]:
    """The time function of an evolution, from what a user gives as ``t=``, and the ``Constant`` that it replaces.

    Raises
    ------
    InputError
        If ``given`` is not a function in ``R``, a scalar ``Constant`` or ``None``.
    """
    if isinstance(given, Constant) and not given.ufl_shape:
        return time_function(mesh, float(given)), given
    if given is not None and (not isinstance(given, Function) or not is_real(given.function_space())):
        raise InputError(
            "t is not a function in the space R: make it by pint_fem.time_function(mesh), or give a scalar Constant"
        )
    return given, None


def _represents_time(given: Any) -> bool:
    """Whether a real number in a form is a time: made by :func:`time_function`, or named ``t`` or ``time``."""
    if given in _TIMES:
        return True
    scalar = isinstance(given, Constant) or (isinstance(given, Function) and is_real(given.function_space()))
    return scalar and not given.ufl_shape and name_of(given) in ("t", "time")


def time_among(found: Iterable, t: Function | None, what: str) -> Function | None:
    """The time function among the functions and constants of a form.

    Parameters
    ----------
    found
        Functions and constants.
    t
        The evolution's time function, or ``None`` where none is given.
    what
        Description of the form, for messages.

    Returns
    -------
    Function or None
        ``t``, or the one made by :func:`time_function` that was found.

    Raises
    ------
    InputError
        If there is another one, which would have one value in all steps.
    """
    others = [c for c in dict.fromkeys(found) if c is not t and _represents_time(c)]
    if t is None and len(others) == 1 and others[0] in _TIMES:
        return others[0]
    if not others:
        return t
    raise InputError(
        f"{what} contains the {type(others[0]).__name__} {name_of(others[0])!r} beside the evolution's t, which would "
        "keep its value in all steps: use one t = pint_fem.time_function(mesh) in all forms and give it as "
        "Evolution(..., t=t); rename it if it is no time"
    )


def check_time_derivatives(residual: ufl.Form, u: Function) -> None:
    """Require that a residual contains the rate of ``u``, and no derivative in time of higher order.

    Raises
    ------
    InputError
        If it does not, with how to write it.
    """
    rates = extract_type(residual, TimeDerivative)
    if not rates:
        raise InputError("the residual has no Dt(u): import Dt from irksome and write the semi-discrete form")
    if any(rate.ufl_operands[0] is not u for rate in rates):
        raise InputError(
            "the residual contains a time derivative of second or higher order, Dt(u, 2): write it as a system of "
            "first order in a mixed state, W = V * V, with the rate w of u as a field of its own: "
            "y = Function(W); u, w = split(y); v, r = TestFunctions(W); "
            "F = inner(Dt(u) - w, r)*dx + inner(Dt(w), v)*dx + ..., with w for Dt(u) and Dt(w) for Dt(u, 2)"
        )


def without_loads(residual: ufl.BaseForm) -> tuple[ufl.Form, dict[Function, Cofunction]]:
    """Replace the cofunctions in a residual by integrals of their Riesz representatives (collective over space).

    Parameters
    ----------
    residual
        A form, or a sum of forms and cofunctions with weights.

    Returns
    -------
    residual
        A form.
    loads
        The cofunctions by their Riesz representatives.

    Raises
    ------
    InputError
        If it contains another kind of 1-form that is no integral.
    """
    if not isinstance(residual, (ufl.form.FormSum, Cofunction)):
        return residual, {}
    parts = [(residual, 1)]
    if isinstance(residual, ufl.form.FormSum):
        parts = list(zip(residual.components(), residual.weights(), strict=True))
    total, loads = ufl.Form([]), {}
    for part, weight in parts:
        if isinstance(part, ufl.Form):
            total += weight * part
        elif isinstance(part, Cofunction):
            f = riesz_representative(part)
            v = TestFunction(f.function_space())
            total += weight * inner(f, v) * dx(f.function_space().mesh(), degree=mass_degree(f.function_space()))
            loads[f] = part
        else:
            raise InputError(
                f"the residual contains a {type(part).__name__}, which is neither an integral nor a Cofunction: "
                "assemble it if it depends on data only, F - assemble(...)"
            )
    return total, loads


def fixed_degrees(residual: ufl.Form, u: Function) -> ufl.Form:
    """The residual with the quadrature degrees that it has as a whole, with ``Dt(u)`` like a coefficient."""
    rate = Function(u.function_space())
    plain = with_fixed_degrees(ufl.replace(residual, {TimeDerivative(u): rate}))
    return ufl.replace(plain, {rate: TimeDerivative(u)})


def private_functional(
    posed: Evolution, copies: PrivateCopies, form: ufl.Form, what: str
) -> tuple[ufl.Form, Function | None]:
    """A user's functional in private copies, and the time function in it, if any, for an evolution as it was posed; an
    ``InputError`` where it contains a time derivative, or a time function that is not the evolution's.
    """
    if has_type(form, TimeDerivative):
        raise InputError(
            f"{what} contains Dt(u): a functional depends on states at points in time, not on their rates; make "
            "the rate a field of a mixed state, or compare differences of states by a misfit of your own"
        )
    form = posed.in_time(form)
    found = data_of(form)
    t = time_among(found, posed.t, what)
    own = copies.variable(t) if t in found else None
    return copies.form(form), own

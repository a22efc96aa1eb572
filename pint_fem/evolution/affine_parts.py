r"""The parts of a residual that is affine in the state with the same operators at all times.

.. math::  F(\dot u, u, t, z; v) = M(z)\, \dot u + K(z)\, u - f(t, z) ,

with ``M`` and ``K`` that may depend on static controls, and a load ``f`` that is affine in the controls. For given
controls in the operators the evolution is linear with constant operators.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import ufl
from firedrake import Function, derivative
from firedrake.formmanipulation import split_form
from ufl.algorithms import expand_derivatives, extract_coefficients

if TYPE_CHECKING:
    from pint_fem.evolution.evolution import Evolution

__all__ = ["AffineParts", "affine_parts", "obstacle", "touches_field", "without"]


class AffineParts(NamedTuple):
    """The operators and the load of an evolution.

    Attributes
    ----------
    M, K : ufl.Form
        Bilinear forms.
    load : ufl.Form
        ``f``; without controls in the operators with their part, which is not used. May be empty.
    in_operators : tuple of Function
        The controls that ``M`` or ``K`` depend on.
    """

    M: ufl.Form
    K: ufl.Form
    load: ufl.Form
    in_operators: tuple[Function, ...]


def _coefficients(form: ufl.Form) -> set:
    return set() if form.empty() else set(extract_coefficients(form))


def without(form: ufl.Form, functions: Iterable[Function]) -> ufl.Form:
    """The form with zero in the place of functions."""
    if form.empty():
        return form
    return expand_derivatives(ufl.replace(form, {f: ufl.classes.Zero(f.ufl_shape) for f in functions}))


def affine_parts(evolution: Evolution) -> AffineParts | None:
    """The parts of an evolution's residual, or ``None`` where it has not the form above.

    Also ``None`` where steps with these parts are not implemented: controls of the operators in integrals over interior
    facets, which couple cells, or on extruded meshes; boundary values that move with a control.
    """
    form, rate = evolution.parts()
    M, K = (expand_derivatives(derivative(form, x)) for x in (rate, evolution.u))
    moving = {evolution.u, rate, *evolution.stepwise} | ({evolution.t} if evolution.t is not None else set())
    found = _coefficients(M) | _coefficients(K)
    if M.empty() or found & moving:
        return None
    if evolution.boundary_controls is not None and evolution.boundary_controls.depends_on_time:
        return None
    in_operators = tuple(c for c in evolution.parameters if c in found)
    if not in_operators:
        load = -form
    else:
        slopes = [expand_derivatives(derivative(f, c)) for f in (M, K) if not f.empty() for c in in_operators]
        kinds = {integral.integral_type() for slope in slopes if not slope.empty() for integral in slope.integrals()}
        if not kinds <= {"cell", "exterior_facet"} or evolution.V.mesh().unique().extruded:
            return None
        load = without(form, (evolution.u, rate))
        load = load if load.empty() else -load  # a factor would hide that the form is zero
    fixed = {evolution.u, rate, *evolution.parameters}
    for control in evolution.parameters if not load.empty() else ():
        if _coefficients(expand_derivatives(derivative(load, control))) & fixed:
            return None
    return AffineParts(M, K, load, in_operators)


def obstacle(evolution: Evolution) -> str:
    """What keeps a residual that is affine in the state, with controls in its operators, from having
    :func:`affine_parts`, as the end of a sentence; empty for all other evolutions.
    """
    form, rate = evolution.parts()
    M, K = (expand_derivatives(derivative(form, x)) for x in (rate, evolution.u))
    found = _coefficients(M) | _coefficients(K)
    affine = not found & {evolution.u, rate}
    if not affine or not found & set(evolution.parameters) or evolution.affine_parts is not None:
        return ""
    if evolution.t in found:
        return "they depend on time as well"
    if found & set(evolution.stepwise):
        return "these have one value per step"
    if evolution.V.mesh().unique().extruded:
        return "the mesh is extruded"
    return "the integrals over interior facets, the loads or the boundary values with controls do not allow more"


def touches_field(parts: AffineParts, field: int) -> bool:
    """Whether controls of the operators are in the rows or columns of a field of a mixed space."""
    forms = [form for form in (parts.M, parts.K) if not form.empty()]
    slopes = (expand_derivatives(derivative(form, c, Function(c.function_space()))) for form in forms
              for c in parts.in_operators)  # fmt: skip
    blocks = (block for slope in slopes if not slope.empty() for block in split_form(slope))
    return any(
        field in block.indices for block in blocks if isinstance(block.form, ufl.Form) and not block.form.empty()
    )

r"""Reference values of quadratic functionals: what is compared with data is written as the difference from the data.

A quadratic functional is

.. math::  j(u) = j(\bar u) + j'(\bar u)(u - \bar u) + \tfrac12 (u - \bar u)^T Q\, (u - \bar u)

for any :math:`\bar u`. With :math:`\bar u = 0` the three terms of a small misfit between large values cancel: 300 K
with a misfit of 1 mK lose eleven digits. With the data for :math:`\bar u` there is nothing to cancel. The data are
found in the functional as it is written: where it contains a sum of ``u`` (or of components of it) and an expression
without ``u``, as ``inner(u - d, u - d)`` does, ``u`` is compared with ``d``. They are interpolated, which is
exact where they are in the space. The formula is exact whatever is found.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import ufl
from firedrake import Function
from pyadjoint.tape import stop_annotating
from ufl.algorithms import extract_arguments, extract_coefficients
from ufl.algorithms.analysis import extract_type
from ufl.classes import (
    ComponentTensor,
    Division,
    Expr,
    FixedIndex,
    GeometricFacetQuantity,
    Indexed,
    ListTensor,
    Product,
    Restricted,
    ScalarValue,
    Sum,
    Variable,
)
from ufl.corealg.traversal import unique_pre_traversal

from pint_fem.kernels.arrays import get

__all__ = ["Reference", "compared_with"]


def compared_with(form: ufl.Form, u: Function) -> Expr | None:
    """What a functional compares a function with, of the function's shape and zero in components where nothing is
    found; ``None`` where nothing is found at all.

    Parameters
    ----------
    form
        A functional.
    u
        A function in it.
    """
    found: dict[tuple[int, ...], Expr] = {}
    for integral in form.integrals():
        for node in unique_pre_traversal(integral.integrand()):
            if isinstance(node, Sum):
                for component, data in _of_sum(node, u):
                    found.setdefault(component, data)
    if not found:
        return None
    if u.ufl_shape == ():
        return found[()]
    return _tensor(found, u.ufl_shape)


def _tensor(components: dict, shape: tuple[int, ...], start: tuple[int, ...] = ()) -> Expr:
    """A tensor of its components, zero where there is none."""
    if len(start) == len(shape):
        return components.get(start, ufl.as_ufl(0.0))
    return ufl.as_tensor([_tensor(components, shape, (*start, i)) for i in range(shape[len(start)])])


def _of_sum(node: Sum, u: Function) -> list[tuple[tuple[int, ...], Expr]]:
    """Components of ``u`` and what they are compared with in a sum."""
    terms = _terms(node)
    with_u = [term for term in terms if u in extract_coefficients(term)]
    rest = [term for term in terms if u not in extract_coefficients(term)]
    if len(with_u) != 1 or not rest or not _can_be_interpolated(rest):
        return []
    factor, target = _scaled(with_u[0])
    components = _components(target, u)
    if components is None or factor == 0:
        return []
    data = sum(rest[1:], start=rest[0])
    data = -data if factor == 1 else data if factor == -1 else data / (-factor)
    if isinstance(target, Indexed) and data.ufl_free_indices:
        indices = tuple(target.ufl_operands[1])
        if {i.count() for i in indices} != set(data.ufl_free_indices):
            return []
        data = ufl.as_tensor(data, indices)
    elif data.ufl_free_indices:
        return []
    if data.ufl_shape == ():
        return [(component, data) for component in components]
    places = np.ndindex(*data.ufl_shape)
    return [(component, data[place]) for component, place in zip(components, places, strict=True)]


def _terms(node: Expr) -> list[Expr]:
    """Summands of nested sums."""
    if not isinstance(node, Sum):
        return [node]
    return [term for operand in node.ufl_operands for term in _terms(operand)]


def _scaled(term: Expr) -> tuple[float, Expr]:
    """A term as a number times the rest."""
    if isinstance(term, Variable):
        return _scaled(term.ufl_operands[0])
    if isinstance(term, Product):
        numbers = [float(x) for x in term.ufl_operands if isinstance(x, ScalarValue)]
        others = [x for x in term.ufl_operands if not isinstance(x, ScalarValue)]
        if len(numbers) == len(others) == 1:
            factor, rest = _scaled(others[0])
            return numbers[0] * factor, rest
    if isinstance(term, Division) and isinstance(term.ufl_operands[1], ScalarValue):
        factor, rest = _scaled(term.ufl_operands[0])
        return factor / float(term.ufl_operands[1]), rest
    if isinstance(term, ComponentTensor) and isinstance(term.ufl_operands[0], Product | Division):
        factor, rest = _scaled(term.ufl_operands[0])  # a multiple of a vector
        if isinstance(rest, Indexed) and rest.ufl_operands[1] == term.ufl_operands[1]:
            return factor, rest.ufl_operands[0]
    return 1.0, term


def _components(target: Expr, u: Function) -> list[tuple[int, ...]] | None:
    """The components of ``u`` that an expression is, in its order; ``None`` where it is something else."""
    if target == u:
        return list(np.ndindex(*u.ufl_shape))
    if isinstance(target, Indexed) and target.ufl_operands[0] == u:
        indices = tuple(target.ufl_operands[1])
        if all(isinstance(i, FixedIndex) for i in indices):
            return [tuple(int(i) for i in indices)]
        free = [i for i in indices if not isinstance(i, FixedIndex)]
        if len(free) == len(indices) == len({i.count() for i in free}):
            return list(np.ndindex(*u.ufl_shape))
    if isinstance(target, ListTensor):
        parts = [_components(operand, u) for operand in target.ufl_operands]
        if all(part is not None for part in parts):
            return [component for part in parts for component in part]
    return None


def _can_be_interpolated(terms: Sequence[Expr]) -> bool:
    return not any(
        extract_arguments(term) or extract_type(term, GeometricFacetQuantity) or _is_restricted(term) for term in terms
    )


def _is_restricted(term: Expr) -> bool:
    return any(isinstance(node, Restricted) for node in unique_pre_traversal(term))


class Reference:
    """What functions are compared with, interpolated to their spaces.

    Parameters
    ----------
    form
        A functional of them.
    functions
        Functions.

    Attributes
    ----------
    expressions : list of Expr or None
        For each of the functions; ``None`` where nothing was found.
    """

    def __init__(self, form: ufl.Form, functions: Sequence[Function]):
        self._spaces = [f.function_space() for f in functions]
        self.expressions = [compared_with(form, f) for f in functions]

    @property
    def found(self) -> bool:
        """Whether anything was."""
        return any(expression is not None for expression in self.expressions)

    @property
    def coefficients(self) -> set:
        """Functions that it depends on."""
        return {c for e in self.expressions if e is not None for c in extract_coefficients(e)}

    def row(self) -> np.ndarray | None:
        """Own values of all functions one after the other at the present values of the data; ``None`` where they cannot
        be interpolated (collective over space).
        """
        rows = []
        with stop_annotating():
            for space, expression in zip(self._spaces, self.expressions, strict=True):
                target = Function(space)
                if expression is not None and not _interpolate(target, expression):
                    return None
                rows.append(get(target))
        return np.concatenate(rows)


def _interpolate(target: Function, expression: Expr) -> bool:
    """Whether it can be."""
    try:
        if len(target.function_space()) == 1:
            target.interpolate(expression)
            return True
        start = 0
        for part in target.subfunctions:
            shape = part.ufl_shape
            size = int(np.prod(shape))
            values = [expression[start + i] for i in range(size)]
            part.interpolate(
                ufl.as_tensor(np.array(values, dtype=object).reshape(shape).tolist()) if shape else values[0]
            )
            start += size
    except (NotImplementedError, ValueError, TypeError, RuntimeError, KeyError):
        return False
    return True

r"""Reference values of quadratic functionals: the data that a functional compares its functions with.

A quadratic functional is

.. math::  j(u) = j(\bar u) + j'(\bar u)(u - \bar u) + \tfrac12 (u - \bar u)^T Q\, (u - \bar u)

for any reference value :math:`\bar u`. With :math:`\bar u = 0` the three terms of a small misfit between large values
cancel: 300 K with a misfit of 1 mK lose eleven digits. With the data for :math:`\bar u` nothing cancels.

The data are found in the expressions of the form: where it contains a sum of a multiple of ``u`` (or of components of
``u``) and terms without ``u``, as in ``inner(u - d, u - d)``, the sum vanishes for ``u = d``, and ``d`` is the
reference value. It is interpolated to the space of ``u``, which is exact for data in that space. Since the expansion
holds for every :math:`\bar u`, what is found has an effect on round-off only.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import ufl
from firedrake import Function
from pyadjoint.tape import stop_annotating
from ufl import classes
from ufl.algorithms import extract_arguments, extract_coefficients
from ufl.algorithms.analysis import extract_type
from ufl.classes import Expr, Indexed, Sum
from ufl.corealg.traversal import unique_pre_traversal

from pint_fem.kernels.arrays import get

__all__ = ["ReferenceValues", "data_expression"]

Component = tuple[int, ...]


class ReferenceValues:
    """The data that a functional compares some functions with, interpolated to the functions' spaces.

    Parameters
    ----------
    form
        A functional of the functions.
    functions
        The functions.

    Attributes
    ----------
    expressions : list of Expr or None
        Data of each function (:func:`data_expression`); ``None`` where the form shows none.
    """

    def __init__(self, form: ufl.Form, functions: Sequence[Function]):
        self._spaces = [f.function_space() for f in functions]
        self.expressions = [data_expression(form, f) for f in functions]

    @property
    def found(self) -> bool:
        """Whether there are data for any of the functions."""
        return any(expression is not None for expression in self.expressions)

    @property
    def coefficients(self) -> set:
        """Functions in the data."""
        return {c for e in self.expressions if e is not None for c in extract_coefficients(e)}

    def vector(self) -> np.ndarray | None:
        """Own values of all functions, one after the other, for the present values of the data (collective over space).

        ``None`` where the data cannot be interpolated.
        """
        parts = []
        with stop_annotating():
            for space, expression in zip(self._spaces, self.expressions, strict=True):
                target = Function(space)
                if expression is not None and not _interpolate(target, expression):
                    return None
                parts.append(get(target))
        return np.concatenate(parts)


def data_expression(form: ufl.Form, u: Function) -> Expr | None:
    """The expression that a functional compares a function with.

    Parameters
    ----------
    form
        A functional.
    u
        A function in it.

    Returns
    -------
    Expr or None
        Of the shape of ``u``, zero in components for which the form shows no data; ``None`` where it shows none at all.
    """
    found: dict[Component, Expr] = {}
    for integral in form.integrals():
        for node in unique_pre_traversal(integral.integrand()):
            if isinstance(node, Sum):
                for component, data in _data_in_sum(node, u):
                    found.setdefault(component, data)
    if not found:
        return None
    if u.ufl_shape == ():
        return found[()]
    return _tensor(u.ufl_shape, {component: ufl.as_ufl(0.0) for component in np.ndindex(*u.ufl_shape)} | found)


def _tensor(shape: tuple[int, ...], components: dict[Component, Expr]) -> Expr:
    """A tensor of its scalar components."""
    entries = np.empty(shape, dtype=object)
    for component, expression in components.items():
        entries[component] = expression
    return ufl.as_tensor(entries.tolist())


def _data_in_sum(node: Sum, u: Function) -> list[tuple[Component, Expr]]:
    """Components of ``u`` and their data in a sum ``s u + r`` with a number ``s``: the data are ``-r / s``."""
    summands = _summands(node)
    with_u = [term for term in summands if u in extract_coefficients(term)]
    rest = [term for term in summands if u not in extract_coefficients(term)]
    if len(with_u) != 1 or not rest or not all(map(_can_be_interpolated, rest)):
        return []
    factor, target = _numeric_factor(with_u[0])
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


def _summands(node: Expr) -> list[Expr]:
    """Terms of nested sums."""
    return [term for x in node.ufl_operands for term in _summands(x)] if isinstance(node, Sum) else [node]


def _numeric_factor(term: Expr) -> tuple[float, Expr]:
    """A number and an expression whose product a term is."""
    if isinstance(term, classes.Variable):
        return _numeric_factor(term.ufl_operands[0])
    if isinstance(term, classes.Product):
        numbers = [float(x) for x in term.ufl_operands if isinstance(x, classes.ScalarValue)]
        others = [x for x in term.ufl_operands if not isinstance(x, classes.ScalarValue)]
        if len(numbers) == len(others) == 1:
            factor, rest = _numeric_factor(others[0])
            return numbers[0] * factor, rest
    if isinstance(term, classes.Division) and isinstance(term.ufl_operands[1], classes.ScalarValue):
        factor, rest = _numeric_factor(term.ufl_operands[0])
        return factor / float(term.ufl_operands[1]), rest
    if isinstance(term, classes.ComponentTensor) and isinstance(
        term.ufl_operands[0], classes.Product | classes.Division
    ):
        factor, rest = _numeric_factor(term.ufl_operands[0])  # a multiple of a vector
        if isinstance(rest, Indexed) and rest.ufl_operands[1] == term.ufl_operands[1]:
            return factor, rest.ufl_operands[0]
    return 1.0, term


def _components(target: Expr, u: Function) -> list[Component] | None:
    """The components of ``u`` that an expression consists of, in its order; ``None`` for any other expression."""
    if target == u:
        return list(np.ndindex(*u.ufl_shape))
    if isinstance(target, Indexed) and target.ufl_operands[0] == u:
        indices = tuple(target.ufl_operands[1])
        if all(isinstance(i, classes.FixedIndex) for i in indices):
            return [tuple(int(i) for i in indices)]
        free = {i.count() for i in indices if not isinstance(i, classes.FixedIndex)}
        if len(free) == len(indices):
            return list(np.ndindex(*u.ufl_shape))
    if isinstance(target, classes.ListTensor):
        parts = [_components(operand, u) for operand in target.ufl_operands]
        if all(part is not None for part in parts):
            return [component for part in parts for component in part]
    return None


def _can_be_interpolated(term: Expr) -> bool:
    """Whether a term has values inside cells: no arguments, normals or restrictions to facets."""
    facets = any(isinstance(node, classes.Restricted) for node in unique_pre_traversal(term))
    return not (facets or extract_arguments(term) or extract_type(term, classes.GeometricFacetQuantity))


def _interpolate(target: Function, expression: Expr) -> bool:
    """Interpolate an expression, field by field; returns whether Firedrake can."""
    try:
        if len(target.function_space()) == 1:
            target.interpolate(expression)
            return True
        start = 0
        for part in target.subfunctions:
            shape, size = part.ufl_shape, int(np.prod(part.ufl_shape))
            values = {c: expression[start + i] for i, c in enumerate(np.ndindex(*shape))}
            part.interpolate(_tensor(shape, values) if shape else values[()])
            start += size
    except (NotImplementedError, ValueError, TypeError, RuntimeError, KeyError):
        return False
    return True

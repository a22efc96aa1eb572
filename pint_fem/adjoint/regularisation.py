r"""Value, gradient and Hessian action of UFL functionals :math:`R(z)` of the controls alone.

A functional of controls with one value per step is summed over the steps, :math:`\sum_n \Delta t\, R(z_n)`, or over
the rates of change between them (:mod:`pint_fem.adjoint.regularisation_in_time.rate_of_change`). Of a quadratic
functional the operator :math:`Q = R''` is assembled once, and

.. math::  R(z) = R(\bar z) + b^T (z - \bar z) + \tfrac12 (z - \bar z)^T Q\, (z - \bar z), \qquad b = R'(\bar z),

with reference values :math:`\bar z` that avoid cancellation (:mod:`pint_fem.misfits.reference`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import ufl
from firedrake import Function, TestFunction, TrialFunction, assemble, derivative
from firedrake.assemble import get_assembler
from ufl.algorithms import expand_derivatives, extract_coefficients

from pint_fem.adjoint.regularisation_in_time.differences import StepDifferences
from pint_fem.adjoint.regularisation_in_time.rate_of_change import RateOfChange
from pint_fem.adjoint.total_variation.functional import TotalVariation
from pint_fem.adjoint.total_variation.smoothed import SmoothedVariation
from pint_fem.all_at_once.norms import gather_in_order
from pint_fem.errors import InputError
from pint_fem.evolution.control_layout import ControlLayout
from pint_fem.evolution.control_operators import ControlOperator, control_operator
from pint_fem.evolution.evolution import Evolution
from pint_fem.evolution.private_copies import data_of
from pint_fem.evolution.quadrature import with_fixed_degrees
from pint_fem.kernels.arrays import get, is_real, own_size, put
from pint_fem.misfits.quadratic import NOISE
from pint_fem.misfits.reference import ReferenceValues

__all__ = ["Regularisation"]


class _Functional:
    """One UFL functional of some functions, on the vector ``(nz,)`` of their own values."""

    def __init__(self, form: ufl.Form, functions: Sequence[Function], space_sum):
        self.form, self.functions, self._space_sum = form, functions, space_sum
        self._sizes = [own_size(f.function_space()) for f in functions]
        self._directions = [Function(f.function_space()) for f in functions]
        tests = [TestFunction(f.function_space()) for f in functions]
        gradients = [expand_derivatives(derivative(form, f, v)) for f, v in zip(functions, tests, strict=True)]
        pairs = list(zip(functions, self._directions, strict=True))
        along = [[expand_derivatives(derivative(g, f, df)) for f, df in pairs] for g in gradients]
        seconds = [h for row in along for h in row if not h.empty()]
        self.quadratic = not any(set(functions) & set(extract_coefficients(h)) for h in seconds)
        if self.quadratic:
            self.operators = self._constant_operators(gradients)
            self._expand(form, gradients)
        else:
            self._value = get_assembler(form)
            self._gradients = [get_assembler(g) for g in gradients]
            sums = [sum((h for h in row if not h.empty()), start=ufl.Form([])) for row in along]
            self._hessians = [None if h.empty() else get_assembler(h) for h in sums]

    def _expand(self, form: ufl.Form, gradients: Sequence[ufl.Form]) -> None:
        """Assemble value and gradient at the reference values: the data with which the form compares the functions,
        where these give a smaller value than zero does.
        """
        values = {f: Function(f.function_space()) for f in self.functions}
        form = ufl.replace(form, values)
        reference = ReferenceValues(form, list(values.values()))
        self._reference, self._constant = np.zeros(sum(self._sizes)), float(assemble(form))
        row = reference.vector() if reference.found else None
        if row is not None:
            self._put(values.values(), row)
            constant = float(assemble(form))
            if abs(constant) <= abs(self._constant):
                self._reference, self._constant = row, constant
        self._put(values.values(), self._reference)
        self._linear = np.concatenate([get(assemble(ufl.replace(g, values))) for g in gradients])
        magnitudes = {pair: (operator.absolute(), turned) for pair, (operator, turned) in self.operators.items()}
        self._linear[np.abs(self._linear) <= NOISE * self._product(np.abs(self._reference), magnitudes)] = 0.0

    @property
    def coupled(self) -> bool:
        """Whether it is quadratic with mixed second derivatives by different functions."""
        return self.quadratic and any(i != j for i, j in self.operators)

    def split(self, vector: np.ndarray) -> list[np.ndarray]:
        """Return views of the functions' parts of a vector ``(nz,)``."""
        return np.split(vector, np.cumsum(self._sizes)[:-1])

    def _constant_operators(self, gradients) -> dict[tuple[int, int], tuple[ControlOperator, bool]]:
        """Second derivatives by each pair of functions, and whether the transposed operator is the one stored: rows of
        real numbers are assembled as columns.
        """
        made, none = {}, np.zeros(0, dtype=int)
        for i, f in enumerate(self.functions):
            for j, other in enumerate(self.functions):
                turned = is_real(f.function_space()) and not is_real(other.function_space())
                form, by = (gradients[j], f) if turned else (gradients[i], other)
                operator = control_operator(form, by, none)
                if operator is not None:
                    made[i, j] = operator, turned
        return made

    def _product(self, z: np.ndarray, operators: dict | None = None) -> np.ndarray:
        """Return ``Q z``, or the product with other operators."""
        out = np.zeros_like(z)
        targets, sources = self.split(out), self.split(z)
        for (i, j), (operator, turned) in (self.operators if operators is None else operators).items():
            targets[i] += (operator.transposed if turned else operator)(sources[j])
        return out

    def _put(self, functions, vector: np.ndarray) -> None:
        for f, part in zip(functions, self.split(vector), strict=True):
            put(f, part)

    def value(self, z: np.ndarray) -> float:
        """Return ``R(z)``."""
        if self.quadratic:
            w = z - self._reference
            return float(self._space_sum(np.array([w @ (0.5 * self._product(w) + self._linear)]))[0]) + self._constant
        self._put(self.functions, z)
        return float(self._value.assemble())

    def gradient(self, z: np.ndarray) -> np.ndarray:
        """Return ``R'(z)``, a dual vector ``(nz,)``."""
        if self.quadratic:
            return self._product(z - self._reference) + self._linear
        self._put(self.functions, z)
        return np.concatenate([get(g.assemble()) for g in self._gradients])

    def hessian(self, z: np.ndarray, dz: np.ndarray) -> np.ndarray:
        """Return ``R''(z) dz``, a dual vector ``(nz,)``."""
        if self.quadratic:
            return self._product(dz)
        self._put(self.functions, z)
        self._put(self._directions, dz)
        rows = zip(self._hessians, self.split(np.zeros_like(dz)), strict=True)
        return np.concatenate([zero if h is None else get(h.assemble()) for h, zero in rows])


class _Term(NamedTuple):
    """A functional, the user's controls in it, and whether it is one of their rates of change."""

    functional: _Functional | SmoothedVariation
    controls: tuple[Function, ...]
    of_rates: bool


class Regularisation:
    """The sum of several functionals of the controls, on flat vectors.

    Parameters
    ----------
    forms
        UFL functionals, each of static controls or of controls with one value per step, not of both.
    layout
        The controls.
    own
        A private copy of the evolution, whose functions are set to the controls' values; or what has its attributes
        ``posed``, ``copies`` and ``functional``.

    Raises
    ------
    InputError
        If a form is no such functional.
    """

    def __init__(self, forms: Sequence[ufl.Form], layout: ControlLayout, own: Evolution):
        self.layout, ev, spacetime = layout, layout.evolution, layout.spacetime
        self._differences = StepDifferences(spacetime, layout.slab, ev.dt)
        self._terms: list[_Term] = []
        for form in forms:
            found = set(extract_coefficients(form)) if isinstance(form, ufl.Form) and not form.arguments() else set()
            controls = tuple(c for c in ev.controls if c in found)
            if not controls:
                raise InputError(
                    "regularisation: give a functional of the control, such as alpha/2*inner(grad(q), grad(q))*dx"
                )
            if own.posed.u in found:
                raise InputError("regularisation: the functional contains the state u; use a misfit for it")
            if len({c in ev.stepwise for c in controls}) > 1:
                raise InputError(
                    "regularisation: a functional contains static controls and some with one value per step: give a "
                    "list with a functional of each kind"
                )
            variation = form if isinstance(form, TotalVariation) else None
            for f in () if variation is None else variation.fields:
                if f not in controls:
                    raise InputError(
                        f"regularisation: TotalVariation of {f.name()!r}, which is no control: leave it out"
                    )
            of_rates = isinstance(form, RateOfChange)
            if of_rates and controls[0] not in ev.stepwise:
                raise InputError(
                    f"regularisation: RateOfChange of the control {controls[0].name()!r}, which is static: give "
                    "Evolution(..., per_step=...) with it, or leave the functional out"
                )
            form, t = own.functional(form, "regularisation")
            if t is not None:
                raise InputError("regularisation: a functional contains the time function t; controls have no time")
            functions = [own.copies.variable(c) for c in controls]
            space_sum = spacetime.sum_over_space
            functional: _Functional | SmoothedVariation
            if variation is not None:
                functional = SmoothedVariation(variation, form, functions, space_sum)
            else:
                functional = _Functional(with_fixed_degrees(form), functions, space_sum)
            if of_rates and not functional.quadratic:
                raise InputError(
                    "regularisation: RateOfChange of a functional that is not quadratic in the control: give a "
                    "quadratic one, such as RateOfChange(gamma/2 * inner(q, q) * dx)"
                )
            self._terms.append(_Term(functional, controls, of_rates))

    def update_data(self, changed: set | None = None) -> None:
        """Assemble again what contains data with new values, given as the private copies of functions and constants;
        by default everything.
        """
        for i, term in enumerate(self._terms):
            functional = term.functional
            if isinstance(functional, SmoothedVariation):
                continue  # it has no data
            if changed is None or changed & set(data_of(functional.form)):
                made = _Functional(functional.form, functional.functions, self.layout.spacetime.sum_over_space)
                self._terms[i] = term._replace(functional=made)

    def second_derivative(self, control: Function, *, quadratic_part: bool = False) -> ufl.Form | None:
        """Return the second derivative by one of the user's controls as a bilinear form; ``None`` where it is zero or
        depends on the control. With ``quadratic_part`` it is that of the functionals for which it does not depend on
        the control, an empty form where there is none. Functionals of rates of change are left out: their part is
        :meth:`second_derivative_of_rates`.
        """
        found, space = [], control.function_space()
        for functional, controls, of_rates in self._terms:
            if control in controls and not of_rates:
                f = functional.functions[controls.index(control)]
                gradient = derivative(functional.form, f, TestFunction(space))
                second = expand_derivatives(derivative(gradient, f, TrialFunction(space)))
                if f not in extract_coefficients(second):
                    found.append(second)
                elif not quadratic_part:
                    return None
        if quadratic_part:
            return sum(found, start=ufl.Form([]))
        return sum(found[1:], start=found[0]) if found else None

    def second_derivative_of_rates(self, control: Function) -> ufl.Form | None:
        r"""Return :math:`R''` of all functionals :math:`R` of rates of change by one of the user's controls as a
        bilinear form, of which :math:`\Delta t\, D^T R'' D` is the second derivative by all steps; ``None`` where there
        is none. It does not depend on the control.
        """
        found, space = [], control.function_space()
        for functional, controls, of_rates in self._terms:
            if of_rates and control in controls:
                f = functional.functions[controls.index(control)]
                gradient = derivative(functional.form, f, TestFunction(space))
                found.append(expand_derivatives(derivative(gradient, f, TrialFunction(space))))
        return sum(found[1:], start=found[0]) if found else None

    @property
    def of_rates(self) -> list[str]:
        """Names of the controls with a functional of their rates of change, each once."""
        return list(dict.fromkeys(c.name() for term in self._terms if term.of_rates for c in term.controls))

    @property
    def coupled(self) -> list[tuple[str, ...]]:
        """Names of the controls of each quadratic functional that has mixed second derivatives by several of them."""
        return [tuple(c.name() for c in term.controls) for term in self._terms if term.functional.coupled]

    @property
    def quadratic(self) -> bool:
        """Whether it is a quadratic function of the controls."""
        return all(term.functional.quadratic for term in self._terms)

    @property
    def variations(self) -> list[tuple[SmoothedVariation, tuple[Function, ...]]]:
        """The total variations among the functionals, with their controls."""
        return [(f, controls) for f, controls, _ in self._terms if isinstance(f, SmoothedVariation)]

    def rows(self, z: np.ndarray, controls: Sequence[Function]) -> np.ndarray:
        """Return the vectors of some controls, one per step or a single one, ``(rows, nz)``."""
        parts = [self.layout.part(z, c) for c in controls]
        return np.atleast_2d(np.concatenate(parts, axis=-1))

    def _arguments(self, z: np.ndarray, term: _Term) -> np.ndarray:
        """Return the vectors at which a functional is summed, those of the controls or of their rates of change
        (collective over time for the latter).
        """
        rows = self.rows(z, term.controls)
        return self._differences(rows) if term.of_rates else rows

    def _is_stepwise(self, controls) -> bool:
        return controls[0] in self.layout.evolution.stepwise

    def value(self, z: np.ndarray) -> float:
        """Return ``R(z)``, the identical number on every rank (collective)."""
        total = 0.0
        for term in self._terms:
            rows = np.array([term.functional.value(row) for row in self._arguments(z, term)])
            if self._is_stepwise(term.controls):
                rows = self.layout.evolution.dt * gather_in_order(rows, self.layout.spacetime.time_comm)
            total += float(rows.sum())
        return total

    def add_rows(
        self,
        out: np.ndarray,
        controls: Sequence[Function],
        functional: _Functional | SmoothedVariation,
        rows: Sequence[np.ndarray],
    ) -> None:
        """Add the dual vectors of a functional of some controls, one per step or a single one, to a vector ``out``."""
        weight = self.layout.evolution.dt if self._is_stepwise(controls) else 1.0
        for i, row in enumerate(rows):
            for control, part in zip(controls, functional.split(weight * row), strict=True):
                target = self.layout.part(out, control)
                (target[i] if target.ndim == 2 else target)[...] += part

    def _collect(self, name: str, z: np.ndarray, *directions: np.ndarray) -> np.ndarray:
        """Sum the dual vectors that a method of the functionals returns for each of them and each step."""
        out = np.zeros_like(z)
        for term in self._terms:
            vectors = [self._arguments(v, term) for v in (z, *directions)]
            method, parts = getattr(term.functional, name), np.empty(vectors[0].shape)
            for part, *row in zip(parts, *vectors, strict=True):
                part[:] = method(*row)
            if term.of_rates:
                parts = self._differences.transposed(parts)
            self.add_rows(out, term.controls, term.functional, parts)
        return out

    def gradient(self, z: np.ndarray) -> np.ndarray:
        """Return ``R'(z)``, a dual vector ``(layout.size,)`` (collective)."""
        return self._collect("gradient", z)

    def hessian(self, z: np.ndarray, dz: np.ndarray) -> np.ndarray:
        """Return ``R''(z) dz``, a dual vector ``(layout.size,)`` (collective)."""
        return self._collect("hessian", z, dz)

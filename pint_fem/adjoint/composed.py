r"""Functionals composed of others: weighted sums that share controls, and initial conditions that are expressions.

.. math::
    J(z) &= \sum_i w_i\, J_i(S_i(z)) + R(z), \\
    J'(z) &= \sum_i w_i\, S_i'(z)^T J_i' + R'(z), \\
    J''(z)\,dz &= \sum_i w_i \big( S_i'^T J_i''\, S_i'\,dz + (S_i''\,dz)^T J_i' \big) + R''(z)\,dz .

In a sum, such as that of several experiments with one unknown, :math:`S_i` selects the controls of term :math:`i` and
there is no :math:`R`. Where the initial condition is an expression :math:`E` of controls, there is one term, in which
the initial condition is a control of its own, :math:`S(z) = (z, E(z))`; sweeps do not involve the expression. :math:`R`
has the regularisations of controls that are in the expression alone. Each evolution has trajectories and solvers of its
own; all are on one process grid and are solved one after another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import ufl

from pint_fem.adjoint.consistency.problem_data import require_same_forms, require_same_values
from pint_fem.adjoint.experiments.joint import JointProblems, joint_problems
from pint_fem.adjoint.interface import SweepAccuracy, SweptProblem, Term, as_vector, require_directions
from pint_fem.adjoint.problem import ReducedProblem
from pint_fem.adjoint.regularisation import Regularisation
from pint_fem.errors import InputError
from pint_fem.evolution.control_layout import ControlLayout, ControlSet
from pint_fem.evolution.initial import InitialExpression
from pint_fem.misfits.base import BlockMisfit, Misfit
from pint_fem.misfits.sensor_readings import SensorReadings

__all__ = [
    "ComposedProblem", "Selection", "problem_with_initial_expression",
]  # fmt: skip


class Selection:
    """The map :math:`S` that selects the controls of one problem, with layout ``inner``, among those of ``outer``."""

    #: Whether the second derivative vanishes.
    is_affine = True

    def __init__(self, outer: ControlLayout, inner: ControlLayout):
        self.outer, self.inner = outer, inner

    def value(self, z: np.ndarray) -> np.ndarray:
        """Return ``S(z)``."""
        return self.inner.join([self.outer.part(z, control) for control in self.inner.evolution.controls])

    def tangent(self, z: np.ndarray, dz: np.ndarray) -> np.ndarray:
        """Return ``S'(z) dz``."""
        return self.value(dz)

    def add_adjoint(self, out: np.ndarray, z: np.ndarray, dual: np.ndarray, weight: float) -> None:
        """Add ``weight * S'(z)^T dual`` to a dual vector."""
        for control, part in zip(self.inner.evolution.controls, self.inner.parts(dual), strict=True):
            self.outer.part(out, control)[...] += weight * part

    def add_second(self, out: np.ndarray, z: np.ndarray, dz: np.ndarray, dual: np.ndarray, weight: float) -> None:
        """Add ``weight * (S''(z) dz)^T dual`` to a dual vector."""

    def update_data(self) -> None:
        """Discard what was computed from data that have been read again."""


class InitialConditionMap(Selection):
    """The map :math:`z \\mapsto (z, E(z))` from the controls that the user gave to those of the evolution's problem, in
    which the initial condition is a control.
    """

    def __init__(self, outer: ControlLayout, problem: ReducedProblem):
        super().__init__(outer, problem.layout)
        posed, own = problem.evolution, problem.sweeps.evolution
        self._initial = posed.initial
        self._inside = [c for c in posed.sought if c in posed.in_initial]
        variables = [own.copies.variable(c) for c in self._inside]
        self._expression = InitialExpression(own.initial_expression, own.V, variables)
        self.is_affine = self._expression.affine

    def _arguments(self, z: np.ndarray) -> list[np.ndarray]:
        """Own values of the controls in the expression."""
        return [self.outer.part(z, c) for c in self._inside]

    def _joined(self, z: np.ndarray, initial: np.ndarray) -> np.ndarray:
        """The vector of the evolution's controls."""
        controls = self.inner.evolution.controls
        return self.inner.join([initial if c is self._initial else self.outer.part(z, c) for c in controls])

    def _add(self, out: np.ndarray, parts: Sequence[np.ndarray], weight: float) -> None:
        for control, part in zip(self._inside, parts, strict=True):
            self.outer.part(out, control)[...] += weight * part

    def value(self, z: np.ndarray) -> np.ndarray:
        """Return ``(z, E(z))``."""
        return self._joined(z, self._expression.value(self._arguments(z)))

    def tangent(self, z: np.ndarray, dz: np.ndarray) -> np.ndarray:
        """Return ``(dz, E'(z) dz)``."""
        return self._joined(dz, self._expression.tangent(self._arguments(z), self._arguments(dz)))

    def add_adjoint(self, out: np.ndarray, z: np.ndarray, dual: np.ndarray, weight: float) -> None:
        """Add the part of the given controls, and ``E'(z)^T`` of the part of the initial condition."""
        for control in self.inner.evolution.controls:
            if control is not self._initial:
                self.outer.part(out, control)[...] += weight * self.inner.part(dual, control)
        first_adjoint = np.array(self.inner.part(dual, self._initial))
        self._add(out, self._expression.adjoint(self._arguments(z), first_adjoint), weight)

    def add_second(self, out: np.ndarray, z: np.ndarray, dz: np.ndarray, dual: np.ndarray, weight: float) -> None:
        """Add ``(E''(z) dz)^T`` of the part of the initial condition."""
        first_adjoint = self.inner.part(dual, self._initial)
        self._add(out, self._expression.second(self._arguments(z), self._arguments(dz), first_adjoint), weight)

    def update_data(self) -> None:
        """Discard the cached derivative of the expression."""
        self._expression.invalidate()


class ComposedProblem(SweptProblem):
    """A weighted sum of problems, each of them a function of some of the controls, and a regularisation.

    Parameters
    ----------
    terms
        Weights, problems and maps to their controls.
    layout
        All controls.
    regularisation
        That besides those of the terms.
    """

    def __init__(self, terms: Sequence[Term], layout: ControlLayout, regularisation: Regularisation | None = None):
        self.terms, self.layout, self.evolution, self.spacetime = terms, layout, layout.evolution, layout.spacetime
        self.regularisation = regularisation
        self._own_part = 0.0  # the regularisation's last value
        self._find_joint()

    def _find_joint(self) -> None:
        """Find the terms whose sweeps can be solved at once."""
        problems = [term.problem for term in self.terms]
        self._joint = [(group, JointProblems([problems[i] for i in group])) for group in joint_problems(problems)]
        self._alone = [i for i in range(len(problems)) if not any(i in group for group, _ in self._joint)]

    def _inner(self, z: np.ndarray) -> list[np.ndarray]:
        """Return the controls of each term."""
        return [term.map.value(z) for term in self.terms]

    @property
    def is_quadratic(self) -> bool:
        """Whether ``J`` is a quadratic function of the controls."""
        return self.is_piecewise_quadratic and all(term.problem.is_quadratic for term in self.terms)

    @property
    def is_piecewise_quadratic(self) -> bool:
        """Whether ``J`` is one quadratic function or several with continuous first derivatives between them."""
        terms = all(term.problem.is_piecewise_quadratic and term.map.is_affine for term in self.terms)
        return terms and (self.regularisation is None or self.regularisation.quadratic)

    @property
    def parts(self) -> dict[str, float]:
        """Value of the ``"misfit"`` and of the ``"regularisation"`` at the last control."""
        out: dict[str, float] = {}
        for weight, problem, _ in self.terms:
            for name, value in problem.parts.items():
                out[name] = out.get(name, 0.0) + weight * value
        if out and self.regularisation is not None:
            out["regularisation"] += self._own_part
        return out

    def _collected(self, duals: Sequence[np.ndarray], z: np.ndarray) -> np.ndarray:
        """Return the sum of ``w_i S_i'(z)^T`` of a dual vector for each term."""
        out = np.zeros(self.layout.size)
        for term, dual in zip(self.terms, duals, strict=True):
            term.map.add_adjoint(out, z, dual, term.weight)
        return out

    def value(self, z: np.ndarray, **accuracy: float) -> float:
        """Return ``J(z)``, the identical number on every rank."""
        z = as_vector(z)
        total = sum(self.experiment_values(z, **accuracy).tolist())
        if self.regularisation is None:
            return total
        self._own_part = self.regularisation.value(z)
        return total + self._own_part

    def experiment_values(self, z: np.ndarray, **accuracy: float) -> np.ndarray:
        """Return the weighted terms, ``(experiments,)``."""
        inner = self._inner(as_vector(z))
        for group, joint in self._joint if "cycles" not in accuracy else ():
            joint.solve_states([inner[i] for i in group], **accuracy)
        return np.array([t.weight * t.problem.value(own, **accuracy) for t, own in zip(self.terms, inner, strict=True)])

    def derivative(self, z: np.ndarray, **accuracy: float) -> np.ndarray:
        """Return ``J'(z)`` as a dual vector."""
        z = as_vector(z)
        inner = self._inner(z)
        for group, joint in self._joint if "cycles" not in accuracy else ():
            joint.solve_adjoints([inner[i] for i in group], **accuracy)
        terms = zip(self.terms, inner, strict=True)
        g = self._collected([term.problem.derivative(own, **accuracy) for term, own in terms], z)
        return g if self.regularisation is None else g + self.regularisation.gradient(z)

    def current_derivative(self, z: np.ndarray, *, regularised: bool = True) -> np.ndarray:
        """Return ``J'(z)`` from the cached states and adjoints."""
        z = as_vector(z)
        terms = [t.problem.current_derivative(t.map.value(z), regularised=regularised) for t in self.terms]
        g = self._collected(terms, z)
        return g + self.regularisation.gradient(z) if regularised and self.regularisation is not None else g

    def accuracy_at(self, z: np.ndarray) -> SweepAccuracy:
        """Return how accurately the trajectories of all terms are solved."""
        z = as_vector(z)
        return SweepAccuracy.of_all([(t.weight, t.problem.accuracy_at(t.map.value(z))) for t in self.terms])

    def tangent_value(self, z: np.ndarray, dz: np.ndarray) -> float:
        """Return ``J'(z) dz``, computed by a tangent sweep for each term."""
        z, dz = as_vector(z), as_vector(dz)
        total = sum(w * problem.tangent_value(map.value(z), map.tangent(z, dz)) for w, problem, map in self.terms)
        if self.regularisation is not None:
            total += self.layout.pairing(self.regularisation.gradient(z), dz)
        return total

    def hessian_action(
        self, z: np.ndarray, dz: np.ndarray, *, gauss_newton: bool = False, **accuracy: float
    ) -> np.ndarray:
        """Return ``J''(z) dz`` as a dual vector; with ``gauss_newton`` without second derivatives of steps and maps."""
        z, dz = as_vector(z), as_vector(dz)
        inner, along = self._inner(z), [term.map.tangent(z, dz) for term in self.terms]
        actions = {
            i: self.terms[i].problem.hessian_action(inner[i], along[i], gauss_newton=gauss_newton, **accuracy)
            for i in self._alone
        }
        for group, joint in self._joint:
            given = [inner[i] for i in group], [along[i] for i in group]
            found = joint.hessian_actions(*given, gauss_newton=gauss_newton, **accuracy)
            actions |= dict(zip(group, found, strict=True))
        gradient = None if gauss_newton else lambda i: self.terms[i].problem.derivative(inner[i], **accuracy)
        return self._collected_actions(z, dz, actions, gradient)

    def symmetric_action(
        self, z: np.ndarray, dz: np.ndarray, cycles: int, *, gauss_newton: bool = False
    ) -> tuple[np.ndarray, float]:
        """Return the action of a symmetric operator near the Hessian, and the largest relative residual."""
        z, dz, residuals = as_vector(z), as_vector(dz), []
        inner, along, actions = self._inner(z), [term.map.tangent(z, dz) for term in self.terms], {}
        for i in self._alone:
            given = inner[i], along[i], cycles
            actions[i], residual = self.terms[i].problem.symmetric_action(*given, gauss_newton=gauss_newton)
            residuals.append(residual)
        for group, joint in self._joint:
            directions = [inner[i] for i in group], [along[i] for i in group]
            found, residual = joint.symmetric_actions(*directions, cycles, gauss_newton=gauss_newton)
            actions |= dict(zip(group, found, strict=True))
            residuals.append(residual)
        gradient = None if gauss_newton else lambda i: self.terms[i].problem.current_derivative(inner[i])
        return self._collected_actions(z, dz, actions, gradient), max(residuals)

    def _collected_actions(
        self,
        z: np.ndarray,
        dz: np.ndarray,
        actions: Mapping[int, np.ndarray],
        gradient: Callable[[int], np.ndarray] | None,
    ) -> np.ndarray:
        """Return the Hessian action of the sum from those of the terms by their numbers; ``gradient`` returns a term's
        derivative, for the second derivatives of the maps.
        """
        out = np.zeros(self.layout.size)
        for i, (weight, _, map) in enumerate(self.terms):
            map.add_adjoint(out, z, actions[i], weight)
            if gradient is not None and not map.is_affine:
                map.add_second(out, z, dz, gradient(i), weight)
        return out if self.regularisation is None else out + self.regularisation.hessian(z, dz)

    def hessian_actions(
        self,
        z: np.ndarray,
        directions: Sequence[np.ndarray],
        *,
        gauss_newton: bool = False,
        at_once: int | None = None,
    ) -> list[np.ndarray]:
        """Return ``J''(z) dz`` for each of several directions; a sweep of a term has as many directions as fit the
        memory, at most ``at_once``.
        """
        z, (vectors, _) = as_vector(z), require_directions(self.layout, directions, at_once)
        out = [np.zeros(self.layout.size) for _ in vectors]
        for weight, problem, map in self.terms:
            inner = map.value(z)
            along = [map.tangent(z, dz) for dz in vectors]
            actions = problem.hessian_actions(inner, along, gauss_newton=gauss_newton, at_once=at_once)
            g = None if gauss_newton or map.is_affine else problem.derivative(inner)
            for total, dz, h in zip(out, vectors, actions, strict=True):
                map.add_adjoint(total, z, h, weight)
                if g is not None:
                    map.add_second(total, z, dz, g, weight)
        if self.regularisation is not None:
            out = [total + self.regularisation.hessian(z, dz) for total, dz in zip(out, vectors, strict=True)]
        return out

    def advance(self, z: np.ndarray) -> tuple[float, np.ndarray, float]:
        """Return ``J`` and ``J'`` after one MGRIT cycle for each state and adjoint, and the largest residual."""
        z = as_vector(z)
        values, duals, residuals = zip(*(t.problem.advance(t.map.value(z)) for t in self.terms), strict=True)
        value = sum(term.weight * v for term, v in zip(self.terms, values, strict=True))
        g = self._collected(duals, z)
        if self.regularisation is not None:
            value, g = value + self.regularisation.value(z), g + self.regularisation.gradient(z)
        return value, g, max(residuals)

    def gradient_error(self, z: np.ndarray) -> np.ndarray | None:
        """Return the error of ``J'(z)`` where all terms fit their data up to about the error of their states."""
        z = as_vector(z)
        errors = [term.problem.gradient_error(term.map.value(z)) for term in self.terms]
        return None if any(error is None for error in errors) else self._collected(errors, z)

    def observations(self, z: np.ndarray, misfit: BlockMisfit) -> np.ndarray:
        """Return what a misfit of one of the terms observes at the local points, ``(k + 1, width)``."""
        term = self._term_of(misfit, "observations")
        return term.problem.observations(term.map.value(as_vector(z)), misfit)

    def readings(self, z: np.ndarray, misfit: SensorReadings) -> np.ndarray:
        """Return the readings of a misfit of one of the terms, ``(times, sensors)`` (collective)."""
        term = self._term_of(misfit, "readings")
        return term.problem.readings(term.map.value(as_vector(z)), misfit)

    def has_misfit(self, misfit: Misfit) -> bool:
        """Return whether a misfit is one of the terms'."""
        return any(term.problem.has_misfit(misfit) for term in self.terms)

    def _term_of(self, misfit: Misfit, what: str) -> Term:
        """The term that has a misfit."""
        for term in self.terms:
            if term.problem.has_misfit(misfit):
                return term
        raise InputError(f"{what} of {misfit!r}: give a misfit of one of the terms")

    def update_data(self) -> list[str]:
        """Read the user's data again, and return the names of those that have other values than before."""
        changed = super().update_data()
        if self.regularisation is not None:
            self.regularisation.update_data()
        self._find_joint()  # constants of operators may have other values
        return changed


def problem_with_initial_expression(problem: ReducedProblem, forms: Sequence[ufl.Form]) -> ComposedProblem:
    """Return the problem of an evolution whose initial condition is an expression of controls.

    Parameters
    ----------
    problem
        That of the evolution, with the initial condition as a control.
    forms
        Functionals of the regularisation that contain controls which are in the expression only. Where they or their
        data differ between ranks, all ranks raise ``InputError``.
    """
    own, spacetime = problem.sweeps.evolution, problem.spacetime
    layout = ControlLayout(ControlSet([problem.evolution]), spacetime, problem.layout.slab)
    term = Term(1.0, problem, InitialConditionMap(layout, problem))
    require_same_forms(spacetime, **{"the regularisation of the initial condition's controls": forms})
    regularisation = Regularisation(forms, layout, own) if forms else None
    require_same_values(spacetime, own.copies)
    return ComposedProblem([term], layout, regularisation)

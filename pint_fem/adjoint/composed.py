r"""The reduced problem of an evolution whose initial condition is an expression of controls.

With :math:`\tilde J(z, u_0)` the problem in which the initial condition is a control of its own,

.. math::
    J(z) = \tilde J(z, E(z)) + R(z), \qquad
    J' = \tilde J_z + E'^T \tilde J_{u_0} + R', \qquad
    J''\,dz = S^T \tilde J''\, S\,dz + (E''dz)^T \tilde J_{u_0} + R''dz, \quad S\,dz = (dz, E'dz),

so sweeps know nothing of the expression (:mod:`pint_fem.evolution.initial`).
"""

from __future__ import annotations

import numpy as np

from pint_fem.adjoint.consistency.same_problem import require_same_forms, require_same_values
from pint_fem.adjoint.control_layout import ControlLayout
from pint_fem.adjoint.memory import Memory
from pint_fem.adjoint.problem import ReducedProblem
from pint_fem.adjoint.regularisation import Regularisation
from pint_fem.evolution.evolution import Evolution
from pint_fem.evolution.initial import InitialExpression

__all__ = ["ComposedProblem", "SoughtControls"]


class SoughtControls:
    """An evolution with the controls as the user gave them, without the initial condition that they make.

    Parameters
    ----------
    evolution
        As the user gave it; everything else is its.

    Attributes
    ----------
    controls, parameters : tuple of Function
        All, and the static ones first.
    initial_control : None
        It is no control of its own.
    """

    initial_control = None

    def __init__(self, evolution: Evolution):
        self._evolution, self.controls = evolution, tuple(evolution.sought)
        self.parameters = tuple(sorted(self.controls, key=lambda c: c in evolution.stepwise))

    @property
    def posed(self) -> SoughtControls:
        """Itself."""
        return self

    def __getattr__(self, name: str):
        return getattr(self._evolution, name)


class ComposedProblem:
    """See the module; what optimisers see of a :class:`~pint_fem.adjoint.problem.ReducedProblem`.

    Parameters
    ----------
    problem
        Of the evolution, with the initial condition as one of its controls.
    forms
        Functionals of the regularisation with controls that are in the expression only.

    Attributes
    ----------
    layout : ControlLayout
        Of the controls that the user gave.
    """

    def __init__(self, problem: ReducedProblem, forms: list):
        self.problem, self.spacetime = problem, problem.spacetime
        posed, own = problem.evolution, problem.sweeps.evolution
        self.evolution = SoughtControls(posed)
        self.layout = ControlLayout(self.evolution, self.spacetime, problem.layout.slab)
        inside = [c for c in posed.sought if c in posed.in_initial]
        self._inside = inside
        self._expression = InitialExpression(own.initial_expression, own.V, [own.copies.variable(c) for c in inside])
        self._forms, self._own, self._parts = forms, own, {}
        require_same_forms(self.spacetime, **{"the regularisation of the initial condition's controls": forms})
        self.regularisation = Regularisation(forms, self.layout, own) if forms else None
        require_same_values(self.spacetime, own.copies)

    @property
    def is_quadratic(self) -> bool:
        """Whether ``J`` is a quadratic function of the controls."""
        quadratic = self.regularisation is None or self.regularisation.quadratic
        return self.problem.is_quadratic and self._expression.affine and quadratic

    # -- between the vectors -------------------------------------------------------------------------------------------
    def _arguments(self, z: np.ndarray) -> list[np.ndarray]:
        """Own values of the controls in the expression."""
        return [self.layout.part(z, c) for c in self._inside]

    def _joined(self, z: np.ndarray, initial: np.ndarray) -> np.ndarray:
        """A vector of the evolution's controls."""
        ev, outer = self.problem.evolution, self.layout
        return self.problem.layout.join([initial if c is ev.initial else outer.part(z, c) for c in ev.controls])

    def selected(self, z: np.ndarray) -> np.ndarray:
        """``(z, E(z))``."""
        return self._joined(z, self._expression.value(self._arguments(z)))

    def _along(self, z: np.ndarray, dz: np.ndarray) -> np.ndarray:
        """``S dz``."""
        return self._joined(dz, self._expression.tangent(self._arguments(z), self._arguments(dz)))

    def _pulled_back(self, z: np.ndarray, dual: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """``S^T`` of a dual vector, and its part by the initial condition."""
        ev, out, lam = self.problem.evolution, np.zeros(self.layout.size), None
        for control, part in zip(ev.controls, self.problem.layout.parts(dual), strict=True):
            if control is ev.initial:
                lam = np.array(part)
            else:
                self.layout.part(out, control)[...] += part
        self._add(out, self._expression.adjoint(self._arguments(z), lam))
        return out, lam

    def _add(self, out: np.ndarray, parts: list[np.ndarray]) -> None:
        for control, part in zip(self._inside, parts, strict=True):
            self.layout.part(out, control)[...] += part

    # -- values --------------------------------------------------------------------------------------------------------
    def value(self, z: np.ndarray) -> float:
        """``J(z)``; the same bits on every rank."""
        z = np.asarray(z, dtype=float).ravel()
        total = self.problem.value(self.selected(z))
        self._parts = self.problem.parts
        if self.regularisation is not None:
            more = self.regularisation.value(z)
            total, self._parts["regularisation"] = total + more, self._parts["regularisation"] + more
        return total

    @property
    def parts(self) -> dict[str, float]:
        """Misfit and regularisation of the controls asked for last."""
        return dict(self._parts)

    def derivative(self, z: np.ndarray) -> np.ndarray:
        """``J'(z)`` as a dual vector."""
        z = np.asarray(z, dtype=float).ravel()
        g, _ = self._pulled_back(z, self.problem.derivative(self.selected(z)))
        return g if self.regularisation is None else g + self.regularisation.gradient(z)

    def tangent_value(self, z: np.ndarray, dz: np.ndarray) -> float:
        """``J'(z) dz`` by a tangent sweep."""
        z, dz = (np.asarray(v, dtype=float).ravel() for v in (z, dz))
        total = self.problem.tangent_value(self.selected(z), self._along(z, dz))
        if self.regularisation is not None:
            total += self.layout.pairing(self.regularisation.gradient(z), dz)
        return total

    def hessian_action(self, z: np.ndarray, dz: np.ndarray, *, gauss_newton: bool = False) -> np.ndarray:
        """``J''(z) dz`` as a dual vector; the Gauss-Newton action leaves out ``E''``, too."""
        z, dz = (np.asarray(v, dtype=float).ravel() for v in (z, dz))
        inner = self.selected(z)
        h, _ = self._pulled_back(z, self.problem.hessian_action(inner, self._along(z, dz), gauss_newton=gauss_newton))
        if not gauss_newton and not self._expression.affine:
            lam = self.problem.layout.part(self.problem.derivative(inner), self.problem.evolution.initial)
            self._add(h, self._expression.second(self._arguments(z), self._arguments(dz), lam))
        return h if self.regularisation is None else h + self.regularisation.hessian(z, dz)

    def gradient_error(self, z: np.ndarray) -> np.ndarray | None:
        """See :meth:`ReducedProblem.gradient_error`."""
        z = np.asarray(z, dtype=float).ravel()
        error = self.problem.gradient_error(self.selected(z))
        return None if error is None else self._pulled_back(z, error)[0]

    def advance(self, z: np.ndarray) -> tuple[float, np.ndarray, float]:
        """``J`` and ``J'`` after one MGRIT cycle for state and adjoint, and the larger residual."""
        z = np.asarray(z, dtype=float).ravel()
        value, g, residual = self.problem.advance(self.selected(z))
        g, _ = self._pulled_back(z, g)
        if self.regularisation is not None:
            value, g = value + self.regularisation.value(z), g + self.regularisation.gradient(z)
        return value, g, residual

    # -- of the evolution's problem ------------------------------------------------------------------------------------
    def observations(self, z: np.ndarray, misfit) -> np.ndarray:
        """What a misfit observes, see :meth:`ReducedProblem.observations`."""
        return self.problem.observations(self.selected(np.ravel(z)), misfit)

    def update_data(self) -> list[str]:
        """Read the user's data again; what has other values than before."""
        changed = self.problem.update_data()
        self._expression.invalidate()
        if self._forms:
            self.regularisation = Regularisation(self._forms, self.layout, self._own)
        return changed

    def forget(self) -> None:
        """Forget what was solved: the next solves start cold."""
        self.problem.forget()

    def keep_points(self, count: int) -> None:
        """Remember the last ``count`` controls and their trajectories."""
        self.problem.keep_points(count)

    def memory(self) -> Memory:
        """Memory of this rank by part; the expression's matrices are not counted."""
        return self.problem.memory()

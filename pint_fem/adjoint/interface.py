r"""The interface of a differentiable functional :math:`J(z)` of controls on flat arrays.

Optimisers and the public functional use it. It has two implementations:
:class:`~pint_fem.adjoint.problem.ReducedProblem` for one evolution, and
:class:`~pint_fem.adjoint.composed.ComposedProblem` for weighted sums of such and for initial conditions that are
expressions of controls. Whatever concerns each evolution by itself is implemented here, once for both.

A control :math:`z` and a direction are float vectors ``(layout.size,)``, this rank's part of a distributed vector
(:mod:`~pint_fem.evolution.control_layout`); derivatives are dual vectors of the same shape. All methods are collective
over all ranks, which have to pass the same static controls. A failure on one rank is raised on all of them:
:class:`~pint_fem.errors.SolverFailure` if it is numerical, such as a NaN in a state or a diverging solve, otherwise
:class:`~pint_fem.errors.InputError` or the exception itself.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import ufl
from firedrake import Function
from numpy.typing import ArrayLike

from pint_fem.adjoint.memory_estimate import MemoryEstimate
from pint_fem.adjoint.regularisation import Regularisation
from pint_fem.all_at_once.grids import is_integer
from pint_fem.collective import require_same
from pint_fem.errors import InputError
from pint_fem.evolution.control_layout import ControlLayout, ControlSet
from pint_fem.evolution.evolution import Evolution
from pint_fem.misfits.base import BlockMisfit
from pint_fem.spacetime import SpaceTime

if TYPE_CHECKING:
    from pint_fem.adjoint.composed import Selection
    from pint_fem.adjoint.problem import ReducedProblem

__all__ = ["ControlProblem", "Term", "as_vector", "require_directions"]


def as_vector(z: ArrayLike) -> np.ndarray:
    """Return controls, given as an array or a list of any shape, as a flat float vector."""
    return np.asarray(z, dtype=float).ravel()


def require_directions(
    layout: ControlLayout, directions: Sequence[ArrayLike], at_once: int | None
) -> tuple[list[np.ndarray], dict[str, np.ndarray]]:
    """Return several directions as flat vectors, in a list and by name (collective).

    ``InputError`` is raised on every rank where there is none, their number differs between ranks, or ``at_once``, the
    largest number of them in one sweep, is neither ``None`` nor a whole number of at least 1.
    """
    vectors = [as_vector(dz) for dz in directions]
    require_same(layout.spacetime.comm, **{"number of directions": len(vectors), "at_once": at_once})
    if not vectors:
        raise InputError("hessian_actions: the list of directions is empty: give at least one")
    if at_once is not None and (not is_integer(at_once) or at_once < 1):
        raise InputError(
            f"at_once = {at_once!r}: give a whole number of at least 1, or None for as many as fit the memory"
        )
    return vectors, {f"direction {i}": dz for i, dz in enumerate(vectors)}


class Term(NamedTuple):
    """One term ``weight * problem(map(z))`` of a composed problem."""

    weight: float
    problem: ControlProblem
    map: Selection


class ControlProblem(ABC):
    """A functional of controls with its derivatives."""

    evolution: Evolution | ControlSet
    """The controls: ``controls``, ``stepwise``, ``dt``, ``nsteps``."""
    spacetime: SpaceTime
    layout: ControlLayout
    regularisation: Regularisation | None
    """The part that depends on the controls alone, without those of the terms."""
    terms: Sequence[Term] = ()
    """Empty for the problem of one evolution."""

    def __str__(self) -> str:
        """One line: evolutions and misfits, controls, process grid."""
        leaves = " + ".join(
            f"{w:g} * ({p.description})" if w != 1 else p.description for w, p in self.weighted_leaves()
        )
        names = [repr(c.name()) + " per step" * (c in self.evolution.stepwise) for c in self.evolution.controls]
        grid = f"grid {self.spacetime.space_size}x{self.spacetime.time_size}"
        return f"{leaves}; controls {', '.join(names)}; {grid}"

    # -- what the implementations differ in ----------------------------------------------------------------------------
    @property
    @abstractmethod
    def is_quadratic(self) -> bool:
        """Whether ``J`` is a quadratic function of the controls."""

    @property
    @abstractmethod
    def parts(self) -> dict[str, float]:
        """Value of the ``"misfit"`` and of the ``"regularisation"`` at the last control."""

    @abstractmethod
    def value(self, z: np.ndarray) -> float:
        """Return ``J(z)``, the identical number on every rank."""

    @abstractmethod
    def derivative(self, z: np.ndarray) -> np.ndarray:
        """Return ``J'(z)`` as a dual vector."""

    @abstractmethod
    def tangent_value(self, z: np.ndarray, dz: np.ndarray) -> float:
        """Return ``J'(z) dz``, computed by a tangent sweep, the identical number on every rank."""

    @abstractmethod
    def hessian_action(self, z: np.ndarray, dz: np.ndarray, *, gauss_newton: bool = False) -> np.ndarray:
        """Return ``J''(z) dz`` as a dual vector; with ``gauss_newton`` without second derivatives of the steps."""

    @abstractmethod
    def hessian_actions(
        self,
        z: np.ndarray,
        directions: Sequence[np.ndarray],
        *,
        gauss_newton: bool = False,
        at_once: int | None = None,
    ) -> list[np.ndarray]:
        """Return ``J''(z) dz`` for each of several directions, with one tangent and one adjoint sweep for as many of
        them as fit the memory, at most ``at_once``. An empty list is an ``InputError``.
        """

    @abstractmethod
    def advance(self, z: np.ndarray) -> tuple[float, np.ndarray, float]:
        """Return ``J`` and ``J'`` after one MGRIT cycle for the state and one for the adjoint, which start from the
        current trajectories, and the largest relative residual after them.

        Source: S. Guenther, N. R. Gauger, J. B. Schroder, arXiv:1801.06356.
        """

    @abstractmethod
    def gradient_error(self, z: np.ndarray) -> np.ndarray | None:
        """Return a dual vector of the size of the error of ``J'(z)`` where the state fits the data up to about its own
        error, else ``None``.
        """

    @abstractmethod
    def observations(self, z: np.ndarray, misfit: BlockMisfit) -> np.ndarray:
        """Return what a misfit observes of the state at the local points, ``(k + 1, width)``, for either storage:
        ``sensors.readings(problem.observations(z, sensors))``. A misfit that is not one of the problem's, or is defined
        on whole slabs only, is an ``InputError``.
        """

    # -- what concerns each evolution by itself ------------------------------------------------------------------------
    def leaf_terms(self, z: np.ndarray, weight: float = 1.0) -> list[tuple[float, ReducedProblem, np.ndarray]]:
        """Return the problem of each evolution with its weight in ``J`` and its own controls at ``z``."""
        return [
            found for term in self.terms for found in term.problem.leaf_terms(term.map.value(z), weight * term.weight)
        ]

    def weighted_leaves(self, weight: float = 1.0) -> list[tuple[float, ReducedProblem]]:
        """Return the problem of each evolution with its weight in ``J``; one in several terms comes several times."""
        return [found for term in self.terms for found in term.problem.weighted_leaves(weight * term.weight)]

    @property
    def leaves(self) -> list[ReducedProblem]:
        """The problem of each evolution; one that is in several terms comes several times."""
        return [leaf for _, leaf in self.weighted_leaves()]

    def regularisations(self, weight: float = 1.0) -> list[tuple[float, Regularisation]]:
        """Return all regularisations with their weights in ``J``."""
        own = [] if self.regularisation is None else [(weight, self.regularisation)]
        return own + [found for term in self.terms for found in term.problem.regularisations(weight * term.weight)]

    @property
    def has_variation(self) -> bool:
        """Whether a total variation is among the functionals of the regularisations."""
        return any(regularisation.variations for _, regularisation in self.regularisations())

    def regularisation_hessian(self, control: Function) -> ufl.Form | None:
        """Return the second derivative of all regularisations by a control as a bilinear form; ``None`` where it is
        zero or depends on the control.
        """
        found = self.regularisations()
        if not all(regularisation.quadratic for _, regularisation in found):
            return None
        forms = [w * form for w, r in found if (form := r.second_derivative(control)) is not None]
        return sum(forms[1:], start=forms[0]) if forms else None

    def regularisation_hessians(self) -> list[ufl.Form | None]:
        """Return the second derivative of all regularisations by each control, as :meth:`regularisation_hessian` does;
        ``InputError`` is raised if one couples controls, so that these are not the whole second derivative.
        """
        coupled = [names for _, regularisation in self.regularisations() for names in regularisation.coupled]
        if coupled:
            raise InputError(
                f"prior: the regularisation couples the controls {', '.join(map(repr, coupled[0]))}: give prior= with "
                "a bilinear form for each control, or regularise each by itself"
            )
        return [self.regularisation_hessian(control) for control in self.evolution.controls]

    def update_data(self) -> list[str]:
        """Read the user's data again, and return the names of those that have other values than before. Values that do
        not fit or differ between ranks are an ``InputError`` on every rank.
        """
        changed = [name for term in self.terms for name in term.problem.update_data()]
        for term in self.terms:
            term.map.update_data()
        return list(dict.fromkeys(changed))

    def invalidate(self) -> None:
        """Discard all solutions: the next solves start from the initial condition and from zero."""
        for leaf in self.leaves:
            leaf.invalidate()

    def keep_evaluations(self, count: int) -> None:
        """Store the trajectories of the last ``count`` controls, two slabs for each and each evolution."""
        for leaf in self.leaves:
            leaf.keep_evaluations(count)

    def memory(self) -> MemoryEstimate:
        """Return the memory of this rank by part, before or after a run: the sum over the evolutions, of which one at a
        time is at its peak.
        """
        return MemoryEstimate.combined([leaf.memory() for leaf in dict.fromkeys(self.leaves)])

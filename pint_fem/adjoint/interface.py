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
from collections.abc import Callable, Sequence
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
from pint_fem.misfits.base import BlockMisfit, Misfit
from pint_fem.misfits.sensor_readings import SensorReadings
from pint_fem.spacetime import SpaceTime

if TYPE_CHECKING:
    from pint_fem.adjoint.composed import Selection
    from pint_fem.adjoint.problem import ReducedProblem

__all__ = [
    "ControlProblem",
    "SweepAccuracy",
    "SweepLimits",
    "SweptProblem",
    "Term",
    "as_vector",
    "regularisation_value",
    "require_directions",
]


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
    problem: SweptProblem
    map: Selection


class SweepAccuracy(NamedTuple):
    """How accurately the trajectories of a control are solved; of several evolutions, all of them.

    Attributes
    ----------
    state, adjoint : float
        Largest relative residual of a state and of an adjoint; infinite where it was not computed, NaN where an adjoint
        is not solved.
    state_residual, adjoint_norm : float
        Norm of the residuals of all states, and of all adjoints times the weights of their terms.
    """

    state: float
    adjoint: float
    state_residual: float
    adjoint_norm: float

    @classmethod
    def of_all(cls, parts: Sequence[tuple[float, SweepAccuracy]]) -> SweepAccuracy:
        """Return the accuracy of a sum of problems, given their weights and accuracies."""
        weights, rows = np.array([w for w, _ in parts]), np.array([own for _, own in parts])
        norms = np.sqrt(np.add.reduce(rows[:, 2] ** 2)), np.sqrt(np.add.reduce((weights * rows[:, 3]) ** 2))
        return cls(float(rows[:, 0].max()), float(rows[:, 1].max()), float(norms[0]), float(norms[1]))


class SweepLimits(NamedTuple):
    """What the options of the sweeps allow; of several evolutions, of all of them.

    Attributes
    ----------
    rtol : float
        Smallest relative tolerance of a solve.
    max_it : int
        Largest number of cycles.
    has_residuals : bool
        Whether solves compute residuals.
    accelerated : bool
        Whether a Krylov method accelerates sweeps.
    """

    rtol: float
    max_it: int
    has_residuals: bool
    accelerated: bool

    @classmethod
    def of_all(cls, parts: Sequence[SweepLimits]) -> SweepLimits:
        """Return the limits of several evolutions."""
        rtol, most, residuals, accelerated = zip(*parts, strict=True)
        return cls(max(rtol), min(most), all(residuals), any(accelerated))


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
        return f"{leaves}; controls {', '.join(names)}; grid {'x'.join(map(str, self.spacetime.used_shape))}"

    # -- what the implementations differ in ----------------------------------------------------------------------------
    @property
    @abstractmethod
    def is_quadratic(self) -> bool:
        """Whether ``J`` is a quadratic function of the controls."""

    @property
    def is_piecewise_quadratic(self) -> bool:
        """Whether ``J`` is one quadratic function or several with continuous first derivatives between them."""
        return self.is_quadratic

    @property
    @abstractmethod
    def parts(self) -> dict[str, float]:
        """Value of the ``"misfit"`` and of the ``"regularisation"`` at the last control."""

    @abstractmethod
    def value(self, z: np.ndarray, **accuracy: float) -> float:
        """Return ``J(z)``, the identical number on every rank. Where the problem chooses accuracy, ``rtol`` is the
        tolerance of the states here, and of all sweeps in derivatives and Hessian actions; by default that of the
        options.
        """

    @abstractmethod
    def derivative(self, z: np.ndarray, **accuracy: float) -> np.ndarray:
        """Return ``J'(z)`` as a dual vector."""

    @abstractmethod
    def tangent_value(self, z: np.ndarray, dz: np.ndarray) -> float:
        """Return ``J'(z) dz``, computed by a tangent sweep, the identical number on every rank."""

    @abstractmethod
    def hessian_action(
        self, z: np.ndarray, dz: np.ndarray, *, gauss_newton: bool = False, **accuracy: float
    ) -> np.ndarray:
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

    def has_misfit(self, misfit: Misfit) -> bool:
        """Return whether a misfit is one of the problem's, those of other groups of experiments included."""
        return any(leaf.index_of(misfit) is not None for leaf in self.leaves)

    def readings(self, z: np.ndarray, misfit: SensorReadings) -> np.ndarray:
        """Return the readings of a misfit of sensors at a control's state, ``(times, sensors)``, on every rank, for the
        experiments of all groups (collective). A misfit that is not one of the problem's is an ``InputError``.
        """
        raise InputError(f"readings of {misfit!r}: this functional has no states")

    def has_symmetric_actions(self) -> bool:
        """Return whether there is :meth:`symmetric_action` (collective)."""
        return all(leaf.has_symmetric_actions() for leaf in self.leaves)

    @property
    def limits(self) -> SweepLimits:
        """What the options of all sweeps allow."""
        return SweepLimits.of_all([leaf.limits for leaf in self.leaves])

    # -- what concerns each evolution by itself ------------------------------------------------------------------------
    def experiment_values(self, z: np.ndarray, **accuracy: float) -> np.ndarray:
        """Return the terms of ``J(z)`` that are experiments, in their order, ``(experiments,)``; their sum is ``J(z)``
        where the problem has no regularisation of its own. The numbers are identical on every rank.
        """
        return np.array([self.value(z, **accuracy)])

    @property
    def evolutions(self) -> list[Evolution]:
        """All evolutions, each once, in the order of the terms, those of other groups of experiments included."""
        return list(dict.fromkeys(ev for term in self.terms for ev in term.problem.evolutions))

    def group_of(self, evolution: Evolution) -> int:
        """Return the number of the group of experiments that solves an evolution."""
        return next((t.problem.group_of(evolution) for t in self.terms if evolution in t.problem.evolutions), 0)

    def leaf_terms(self, z: np.ndarray, weight: float = 1.0) -> list[tuple[float, ReducedProblem, np.ndarray]]:
        """Return the problem of each evolution with its weight in ``J`` and its own controls at ``z``."""
        return [
            found for term in self.terms for found in term.problem.leaf_terms(term.map.value(z), weight * term.weight)
        ]

    def weighted_leaves(self, weight: float = 1.0) -> list[tuple[float, ReducedProblem]]:
        """Return the problem of each evolution with its weight in ``J``; one in several terms comes several times."""
        return [found for term in self.terms for found in term.problem.weighted_leaves(weight * term.weight)]

    def leaf_numbers(self) -> list[int]:
        """Return the number of each of the :attr:`leaves` among those of all groups of experiments."""
        out, first = [], 0
        for term in self.terms:
            out += [first + number for number in term.problem.leaf_numbers()]
            first += len(term.problem.leaf_weights())
        return out

    def leaf_weights(self) -> list[tuple[int, float]]:
        """Return the number and the weight of each leaf, those of all groups of experiments."""
        out: list[tuple[int, float]] = []
        for term in self.terms:
            first = len(out)
            out += [(first + number, term.weight * weight) for number, weight in term.problem.leaf_weights()]
        return out

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
        zero or depends on the control. Functionals of rates of change are left out (:meth:`rate_hessian`).
        """
        return self._sum_of_hessians(lambda regularisation: regularisation.second_derivative(control))

    def rate_hessian(self, control: Function) -> ufl.Form | None:
        """Return the second derivative of all functionals of a control's rates of change as a bilinear form, one of the
        rates; ``None`` where there are no such functionals, or a regularisation is not quadratic.
        """
        return self._sum_of_hessians(lambda regularisation: regularisation.second_derivative_of_rates(control))

    def _sum_of_hessians(self, part: Callable[[Regularisation], ufl.Form | None]) -> ufl.Form | None:
        """Return the weighted sum of a bilinear form of each regularisation; ``None`` where there are none, or a
        regularisation is not quadratic.
        """
        found = self.regularisations()
        if not all(regularisation.quadratic for _, regularisation in found):
            return None
        forms = [w * form for w, r in found if (form := part(r)) is not None]
        return sum(forms[1:], start=forms[0]) if forms else None

    def regularisation_hessians(self) -> list[ufl.Form | None]:
        """Return the second derivative of all regularisations by each control, as :meth:`regularisation_hessian` does;
        ``InputError`` is raised if one couples controls or steps, so that these are not the whole second derivative.
        """
        rates = [name for _, regularisation in self.regularisations() for name in regularisation.of_rates]
        if rates:
            raise InputError(
                f"prior: the regularisation has a functional of the rate of change of {', '.join(map(repr, rates))}, "
                "which couples steps: give prior= with a bilinear form for each control"
            )
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


def regularisation_value(problem: ControlProblem, z: np.ndarray) -> float:
    """Return the sum of all regularisations of a problem that are not those of single evolutions (collective)."""
    if not problem.terms:
        return 0.0
    own = 0.0 if problem.regularisation is None else problem.regularisation.value(z)
    return own + sum(term.weight * regularisation_value(term.problem, term.map.value(z)) for term in problem.terms)


class SweptProblem(ControlProblem):
    """A functional that sweeps compute: solves take a tolerance of their own (``rtol=``), and it is known how accurate
    they are.
    """

    @abstractmethod
    def accuracy_at(self, z: np.ndarray) -> SweepAccuracy:
        """Return how accurately the trajectories of a control are solved; its state has to be (collective)."""

    @abstractmethod
    def current_derivative(self, z: np.ndarray, *, regularised: bool = True) -> np.ndarray:
        """Return ``J'(z)`` from the states and adjoints that are cached, without further solves (collective); without
        ``regularised`` the part of the misfits.
        """

    @abstractmethod
    def symmetric_action(
        self, z: np.ndarray, dz: np.ndarray, cycles: int, *, gauss_newton: bool = False
    ) -> tuple[np.ndarray, float]:
        """Return the action of a symmetric operator near the Hessian by that many cycles of each sweep, a dual vector,
        and the largest relative residual of the sweeps (collective).
        """

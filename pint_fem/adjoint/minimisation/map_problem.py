r"""The functional of a linear inverse problem on its map from controls to readings, for all minimisers of functionals.

The misfit is that of :mod:`pint_fem.inverse.objective`, a few products with matrices, and the regularisation is the
functional's own, which need not be quadratic. Where it is, and positive definite, the posterior's covariance is the
exact inverse of the Hessian. As the preconditioner of conjugate gradients it gives the minimiser in one iteration, and
under linear constraints :math:`C z = b` its part on their null space does,
:math:`\mathrm{Cov} - V (C V)^{-1} V^T` with :math:`V = \mathrm{Cov}\, C^T`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pint_fem.adjoint.interface import ControlProblem, as_vector, require_directions
from pint_fem.adjoint.minimisation.bounds_and_constraints import constraint_normals
from pint_fem.adjoint.minimisation.minimisable import Minimisable
from pint_fem.adjoint.minimisation.objective import Objective
from pint_fem.adjoint.problem import ReducedProblem
from pint_fem.adjoint.riesz import ControlInner
from pint_fem.errors import InputError
from pint_fem.evolution.evolution import Evolution
from pint_fem.inverse.map import ParameterToObservable
from pint_fem.inverse.objective import MapMisfit
from pint_fem.misfits.base import BlockMisfit
from pint_fem.misfits.sensor_readings import SensorReadings
from pint_fem.optimize.records import TrustRegionResult

if TYPE_CHECKING:
    from pint_fem.adjoint.functional import ControlFunctional

__all__ = ["MapFunctional", "MapProblem", "trust_region_options"]

_VALUE_RTOL = 1e-13
"""Relative accuracy of a sum of squares of predicted less measured readings."""
_GTOL_REL = 1e-10
"""Default tolerance of the gradient: products cost little, and the first step has the error of the covariance."""
_ROUND_OFF = 1e-12
"""Error of a gradient relative to that at zero controls, of which the data are the right-hand side."""


class MapProblem(ControlProblem):
    """The functional of one evolution on its map.

    Parameters
    ----------
    given
        The functional by sweeps, whose controls and regularisation are taken.
    misfit
        The misfit on the map.
    """

    def __init__(self, given: ReducedProblem, misfit: MapMisfit):
        self.given, self.misfit = given, misfit
        self.evolution, self.spacetime, self.layout = given.evolution, given.spacetime, given.layout
        self.regularisation = given.regularisation
        self._parts: dict[str, float] = {}

    def weighted_leaves(self, weight: float = 1.0) -> list[tuple[float, ReducedProblem]]:
        """Return the weight and the functional by sweeps."""
        return self.given.weighted_leaves(weight)

    def leaf_terms(self, z: np.ndarray, weight: float = 1.0) -> list[tuple[float, ReducedProblem, np.ndarray]]:
        """Return the weight, the functional by sweeps and the controls."""
        return self.given.leaf_terms(z, weight)

    @property
    def evolutions(self) -> list[Evolution]:
        """Those of the functional by sweeps."""
        return self.given.evolutions

    @property
    def is_quadratic(self) -> bool:
        """Whether the regularisation is quadratic; the misfit is."""
        return self.regularisation is None or self.regularisation.quadratic

    @property
    def parts(self) -> dict[str, float]:
        """Value of the ``"misfit"`` and of the ``"regularisation"`` at the last control."""
        return dict(self._parts)

    def value(self, z: np.ndarray, **accuracy: float) -> float:
        """Return ``J(z)``, the identical number on every rank; without sweeps there is no accuracy to choose."""
        z = as_vector(z)
        regularisation = 0.0 if self.regularisation is None else self.regularisation.value(z)
        self._parts = {"misfit": self.misfit.value(z), "regularisation": regularisation}
        return sum(self._parts.values())

    def derivative(self, z: np.ndarray, **accuracy: float) -> np.ndarray:
        """Return ``J'(z)`` as a dual vector."""
        z = as_vector(z)
        g = self.misfit.gradient(z)
        return g if self.regularisation is None else g + self.regularisation.gradient(z)

    def tangent_value(self, z: np.ndarray, dz: np.ndarray) -> float:
        """Return ``J'(z) dz``."""
        return self.layout.pairing(self.derivative(z), as_vector(dz))

    def hessian_action(
        self, z: np.ndarray, dz: np.ndarray, *, gauss_newton: bool = False, **accuracy: float
    ) -> np.ndarray:
        """Return ``J''(z) dz`` as a dual vector."""
        return self.hessian_actions(z, [dz])[0]

    def hessian_actions(
        self,
        z: np.ndarray,
        directions: Sequence[np.ndarray],
        *,
        gauss_newton: bool = False,
        at_once: int | None = None,
    ) -> list[np.ndarray]:
        """Return ``J''(z) dz`` for each of several directions, all at once."""
        z, (vectors, _) = as_vector(z), require_directions(self.layout, directions, at_once)
        actions = list(self.misfit.hessian(np.array(vectors)))
        if self.regularisation is None:
            return actions
        return [h + self.regularisation.hessian(z, dz) for h, dz in zip(actions, vectors, strict=True)]

    def advance(self, z: np.ndarray) -> tuple[float, np.ndarray, float]:
        """Raise ``InputError``: a map has no cycles."""
        raise InputError("one-shot takes cycles of a time solver, which the map does without: use minimize_one_shot")

    def gradient_error(self, z: np.ndarray) -> np.ndarray:
        """Return a dual vector of the size of the round-off of ``J'(z)``, which is that of its parts."""
        return _ROUND_OFF * self.derivative(np.zeros(self.layout.size))

    def observations(self, z: np.ndarray, misfit: BlockMisfit) -> np.ndarray:
        """Return what a misfit observes, by a sweep."""
        return self.given.observations(z, misfit)

    def readings(self, z: np.ndarray, misfit: SensorReadings) -> np.ndarray:
        """Return the readings of a misfit, by a sweep."""
        return self.given.readings(z, misfit)


class MapFunctional(Minimisable):
    """A functional of one evolution on its map: all methods that minimise it, without a sweep.

    Parameters
    ----------
    functional
        The functional; its inner product is used, and its controls become those that are found.
    F
        The map with readings and offset.
    """

    def __init__(self, functional: ControlFunctional, F: ParameterToObservable):
        if not isinstance(functional.problem, ReducedProblem):
            raise InputError(
                "the functional is a sum, a multiple or has an initial condition that is an expression of controls, "
                "and its map has no minimize(): use minimize_trust_region of the functional, or posterior().mean"
            )
        self.problem = MapProblem(functional.problem, MapMisfit(F))
        self.F, self.inner, self.spacetime = F, functional.inner, functional.spacetime
        self.layout, self.evolution = functional.layout, functional.evolution
        self.array, self.function = functional.array, functional.function
        self._current, self._take = functional._current, functional._take
        self._constraints: Sequence | None = None

    def minimize(
        self,
        start: Any = None,
        *,
        bounds: Sequence | None = None,
        constraints: Sequence | None = None,
        inexact: object = None,
        preconditioner: Any = "default",
        checkpoint: object = None,
        **options: Any,
    ) -> TrustRegionResult:
        """Minimise by the trust region on the map (collective).

        Parameters
        ----------
        start, bounds, constraints, **options
            As for :meth:`minimize_trust_region`.
        inexact
            Ignored: products with the map are exact.
        preconditioner
            As for :meth:`minimize_trust_region`, or ``"posterior"``: the posterior's covariance, or
            ``"limited-memory"`` where there is none. Default: ``"posterior"`` without bounds; none with bounds, under
            which it saves no products, and with a total variation that of :meth:`minimize_trust_region`.
        checkpoint
            An object with ``load`` and ``save``.

        Raises
        ------
        InputError
            On every rank, if an option does not fit, or ``checkpoint`` is a file.
        """
        if isinstance(checkpoint, (str, Path)):
            raise InputError(
                "checkpoint: a file holds trajectories of sweeps, and a run on the map has none: leave it out, or give "
                "method='trust-region'"
            )
        if isinstance(preconditioner, str) and preconditioner == "default":
            varies = self.problem.has_variation
            preconditioner = "posterior" if bounds is None and not varies else None
        options = {"gtol_rel": _GTOL_REL} | options
        given = dict(bounds=bounds, constraints=constraints, preconditioner=preconditioner, checkpoint=checkpoint)
        return self.minimize_trust_region(start, **given, **options)

    def _trust_region(self, start: np.ndarray, options: dict, **given: Any) -> TrustRegionResult:
        options.setdefault("value_rtol", _VALUE_RTOL)
        self._constraints = given["constraints"]
        return super()._trust_region(start, options, **given)

    def _preconditioner(self, inner: ControlInner, given: Any) -> Any:
        """An approximate inverse Hessian on representatives; under constraints one on their null space."""
        if not isinstance(given, str) or given != "posterior":
            return super()._preconditioner(inner, given)
        covariance = self.covariance
        if covariance is None:
            return "limited-memory"
        if not self._constraints:
            return lambda r: covariance(inner.dual(r)[None])[0]
        # inverse on the null space of C: Cov - V S^-1 V^T, V = Cov C^T, S = C V
        normals, _ = constraint_normals(self, Objective(self.problem, inner), self._constraints)
        duals = [inner.dual(normal) for normal in normals]
        V = covariance(np.array(duals))
        products = lambda x: np.array([self.layout.pairing(dual, x) for dual in duals])
        S = np.array([products(v) for v in V])

        def constrained(r: np.ndarray) -> np.ndarray:
            x = covariance(inner.dual(r)[None])[0]
            return x - np.linalg.lstsq(S, products(x), rcond=None)[0] @ V

        return constrained

    @property
    def covariance(self) -> Any:
        """The posterior's covariance as a function of dual vectors ``(k, size)``; ``None`` where the regularisation is
        no prior: not quadratic, with terms that couple controls, or singular (collective when first used).
        """
        regularisation = self.problem.regularisation
        if regularisation is None or not regularisation.quadratic or regularisation.coupled:
            return None
        try:
            return self.F.default_posterior.covariance
        except InputError:  # on all ranks: a regularisation that is not positive definite
            return None


def trust_region_options(functional: ControlFunctional, given: Mapping) -> dict:
    """The options of an inversion by sweeps, with those of the user in front: inexact sweeps where these compute
    residuals, and a limited-memory preconditioner.
    """
    problem = functional.problem
    made: dict = {} if problem.has_variation else {"preconditioner": "limited-memory"}
    if given.get("preconditioner", made.get("preconditioner")) == "limited-memory":
        made["preconditioner_memory"] = 10 if functional.evolution.stepwise else 40
    if given.get("bounds") is None and problem.limits.has_residuals:
        made["inexact"] = True
    return made | dict(given)

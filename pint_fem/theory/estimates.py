"""A-priori convergence estimates of time-parallel solvers for a linear evolution, from its spectrum.

The spectrum of the operators (:mod:`~pint_fem.theory.spectrum`) and the stability functions of the integrators
(:mod:`~pint_fem.theory.stability`) give the eigenvalues of a step on each level, and these the bounds of two levels of
MGRIT (:mod:`~pint_fem.theory.two_level`, :mod:`~pint_fem.theory.block_modes`) and of ParaDiag
(:mod:`~pint_fem.theory.alpha_circulant`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from irksome.tableaux.ButcherTableaux import ButcherTableau

from pint_fem.evolution.evolution import Evolution
from pint_fem.evolution.tableaux import DIRK, SDIRK2, BackwardEuler, Repeated
from pint_fem.mgrit.options import MGRITOptions
from pint_fem.theory.alpha_circulant import block_contraction, contraction
from pint_fem.theory.block_modes import block_factors, damped_wave
from pint_fem.theory.spectrum import Spectrum, spectrum
from pint_fem.theory.stability import dirk_stability, runge_kutta_matrix
from pint_fem.theory.two_level import ConvergenceEstimate, two_level_estimate, two_level_factors

__all__ = ["mgrit_estimate", "paradiag_contraction"]


def mgrit_estimate(
    evolution: Evolution, options: MGRITOptions | Mapping | None = None, coarse_tableau: ButcherTableau | None = None
) -> list[ConvergenceEstimate] | None:
    """Two-level convergence estimate of each pair of consecutive levels of MGRIT (collective over space).

    Parameters
    ----------
    evolution
        The problem.
    options
        Levels, coarsening, relaxation, weights and tolerance.
    coarse_tableau
        Integrator of the coarse levels; default: the evolution's.

    Returns
    -------
    list of ConvergenceEstimate, or None
        Empty for one level. ``None`` where no theory applies: evolutions that are not linear with constant operators
        and a symmetric positive definite mass matrix, and unevenly spaced C-points.

    Raises
    ------
    ValueError
        If the options do not fit the steps.
    """
    options = MGRITOptions.make(options)
    factors = options.factors(evolution.nsteps)
    if not factors:
        return []
    if any(isinstance(m, tuple) for m in factors) or (found := spectrum(evolution)) is None:
        return None
    coarse_tableau = coarse_tableau or evolution.tableau
    if options.coarse_steps > 1:
        coarse_tableau = Repeated(coarse_tableau, options.coarse_steps)
    estimates, stride, steps = [], 1, evolution.nsteps
    for index, m in enumerate(factors):
        pair = LevelPair(
            found, evolution, stride, steps, options.scheme(index), options.weight(index), is_first=not index
        )
        given = dict(tolerance=options.rtol if 0 < options.rtol < 1 else 1e-8)
        estimate = pair.estimate(coarse_tableau, m, **given)
        if not estimate.converges:
            estimate = pair.estimate(coarse_tableau, m, alternatives=pair.alternatives(coarse_tableau, m), **given)
        estimates.append(replace(estimate, note=found.note) if found.note else estimate)
        stride, steps = stride * m, steps // m
    return estimates


def paradiag_contraction(evolution: Evolution, alpha: float) -> float | None:
    """Bound of the factor by which an iteration of ParaDiag multiplies the error (collective over space).

    Parameters
    ----------
    evolution
        The problem.
    alpha
        Parameter of the circulant, between 0 and 1.

    Returns
    -------
    float or None
        ``None`` where :func:`~pint_fem.theory.spectrum.spectrum` finds none.
    """
    found = spectrum(evolution)
    if found is None:
        return None
    A, b = evolution.dirk.A, evolution.dirk.b
    if found.kind == "damped wave":
        pairs = damped_wave(*found.pairs(evolution.dt))
        return block_contraction(runge_kutta_matrix(A, b, -pairs), alpha, evolution.nsteps)
    return contraction(dirk_stability(A, b, -found.sample(evolution.dt)), alpha, evolution.nsteps)


@dataclass(frozen=True)
class LevelPair:
    """A level of ``steps`` steps, each ``stride`` fine ones long, with the next coarser one.

    Attributes
    ----------
    spectrum, evolution
        The problem.
    stride, steps
        Length of the level's steps in fine steps, and their number.
    relax, weight
        Relaxation scheme and weight of C-relaxation.
    is_first
        Whether the level is the finest.
    """

    spectrum: Spectrum
    evolution: Evolution
    stride: int
    steps: int
    relax: str
    weight: float
    is_first: bool

    def _tableaux(self, coarse_tableau: ButcherTableau | None) -> tuple[DIRK, DIRK]:
        """Integrators of the two levels."""
        return DIRK(self.evolution.tableau if self.is_first else coarse_tableau), DIRK(coarse_tableau)

    def _eigenvalues(self, coarse_tableau: ButcherTableau | None, m: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Values of ``dt kappa``, and the eigenvalues of a fine and a coarse step that belong to them."""
        modes, strides = self.spectrum.sample(self.evolution.dt, max(128, 12 * m)), (self.stride, m * self.stride)
        tableaux = self._tableaux(coarse_tableau)
        lam, mu = (dirk_stability(d.A, d.b, -s * modes) for d, s in zip(tableaux, strides, strict=True))
        return modes, lam, mu

    def _factors(
        self, eigenvalues, coarse_tableau: ButcherTableau | None, m: int, relax: str, weight: float
    ) -> np.ndarray:
        """Bound of the error factor of each mode."""
        if self.spectrum.kind != "damped wave":
            return two_level_factors(*eigenvalues[1:], m, self.steps // m, relax, weight)
        pairs, strides = damped_wave(*self.spectrum.pairs(self.evolution.dt)), (self.stride, m * self.stride)
        tableaux = zip(self._tableaux(coarse_tableau), strides, strict=True)
        fine, coarse = (runge_kutta_matrix(d.A, d.b, -s * pairs) for d, s in tableaux)
        return block_factors(fine, coarse, m, self.steps // m, relax, weight)

    def estimate(self, coarse_tableau: ButcherTableau | None, m: int, **given: Any) -> ConvergenceEstimate:
        """Estimate for a coarse integrator and a coarsening factor; ``given`` as in :func:`two_level_estimate`."""
        modes, lam, mu = found = self._eigenvalues(coarse_tableau, m)
        factors = self._factors(found, coarse_tableau, m, self.relax, self.weight)
        given |= dict(weight=self.weight, modes=modes, factors=factors)
        return two_level_estimate(lam, mu, m, self.steps // m, self.relax, **given)

    def alternatives(self, coarse_tableau: ButcherTableau | None, m: int) -> dict[str, float]:
        """Bounds of other integrators, relaxations and coarsening factors, by the argument that chooses them."""

        def bound(tableau, m=m, relax=self.relax, weight=self.weight):
            return float(np.max(self._factors(self._eigenvalues(tableau, m), tableau, m, relax, weight)))

        out = {"relax='FCF'": bound(coarse_tableau, relax="FCF")} if self.relax == "F" else {}
        for tableau in (SDIRK2(), BackwardEuler()):
            out[what := f"coarse_tableau={type(tableau).__name__}()"] = bound(tableau)
            if self.relax == "F":
                out[f"{what} with relax='FCF'"] = bound(tableau, relax="FCF")
        if self.weight != 1:
            out["c_weight=1"] = bound(coarse_tableau, weight=1.0)
        if m > 2:
            out["coarsening 2"] = bound(coarse_tableau, m=2)
        return out

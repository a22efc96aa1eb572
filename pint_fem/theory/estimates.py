"""What theory says of time-parallel solvers for a linear evolution before they run, from its spectrum."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from pint_fem.evolution.evolution import Evolution
from pint_fem.evolution.tableaux import DIRK, SDIRK2, BackwardEuler
from pint_fem.mgrit.options import MGRITOptions
from pint_fem.theory.alpha_circulant import block_contraction, contraction
from pint_fem.theory.block_modes import block_factors, damped_wave, runge_kutta_matrix
from pint_fem.theory.spectrum import Spectrum, spectrum
from pint_fem.theory.stability import dirk_stability
from pint_fem.theory.two_level import Verdict, two_level_factors, verdict

__all__ = ["mgrit_verdict", "paradiag_contraction"]


def mgrit_verdict(
    evolution: Evolution, options: MGRITOptions | Mapping | None = None, coarse_tableau=None
) -> list[Verdict] | None:
    """Theory's verdict on each pair of consecutive levels; every rank of the evolution's ``space_comm`` calls it.

    Costs a spectrum (heat, 64x64 P1: 0.05 s) and nothing for one level.

    Parameters
    ----------
    evolution, options
        The problem; levels, coarsening, relaxation, weights, tolerance.
    coarse_tableau
        Integrator of the coarse levels; default: the evolution's.

    Returns
    -------
    list of Verdict, or None
        ``None`` where there is no theory: see :func:`~pint_fem.theory.spectrum.spectrum`, and unevenly spaced
        C-points.

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
    verdicts, stride, steps = [], 1, evolution.nsteps
    for index, m in enumerate(factors):
        pair = _Pair(found, evolution, stride, steps, options.scheme(index), options.weight(index), is_first=not index)
        given = dict(tolerance=options.rtol if 0 < options.rtol < 1 else 1e-8)
        judged = pair.verdict(coarse_tableau, m, **given)
        if not judged.converges:
            judged = pair.verdict(coarse_tableau, m, alternatives=pair.alternatives(coarse_tableau, m), **given)
        if found.note:
            judged = replace(judged, note=found.note)
        verdicts.append(judged)
        stride, steps = stride * m, steps // m
    return verdicts


def paradiag_contraction(evolution: Evolution, alpha: float) -> float | None:
    """Theory's factor for an iteration of ParaDiag; every rank of the evolution's ``space_comm`` calls it.

    Parameters
    ----------
    evolution, alpha
        The problem, and the circulant's parameter.

    Returns
    -------
    float or None
        ``None`` where there is no spectrum: see :func:`~pint_fem.theory.spectrum.spectrum`.
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
class _Pair:
    """A level of ``steps`` steps, each ``stride`` fine ones, and the next."""

    spectrum: Spectrum
    evolution: Evolution
    stride: int
    steps: int
    relax: str
    weight: float
    is_first: bool

    def _tableaux(self, coarse_tableau) -> tuple[DIRK, DIRK]:
        return DIRK(self.evolution.tableau if self.is_first else coarse_tableau), DIRK(coarse_tableau)

    def _eigenvalues(self, coarse_tableau, m: int):
        modes, strides = self.spectrum.sample(self.evolution.dt, max(128, 12 * m)), (self.stride, m * self.stride)
        tableaux = self._tableaux(coarse_tableau)
        lam, mu = (dirk_stability(d.A, d.b, -s * modes) for d, s in zip(tableaux, strides, strict=True))
        return modes, lam, mu

    def _factors(self, eigenvalues, coarse_tableau, m: int, relax: str, weight: float) -> np.ndarray:
        """Bound of each mode."""
        if self.spectrum.kind != "damped wave":
            return two_level_factors(*eigenvalues[1:], m, self.steps // m, relax, weight)
        pairs, strides = damped_wave(*self.spectrum.pairs(self.evolution.dt)), (self.stride, m * self.stride)
        tableaux = zip(self._tableaux(coarse_tableau), strides, strict=True)
        fine, coarse = (runge_kutta_matrix(d.A, d.b, -s * pairs) for d, s in tableaux)
        return block_factors(fine, coarse, m, self.steps // m, relax, weight)

    def verdict(self, coarse_tableau, m: int, **given) -> Verdict:
        modes, lam, mu = found = self._eigenvalues(coarse_tableau, m)
        factors = self._factors(found, coarse_tableau, m, self.relax, self.weight)
        given |= dict(weight=self.weight, modes=modes, factors=factors)
        return verdict(lam, mu, m, self.steps // m, self.relax, **given)

    def alternatives(self, coarse_tableau, m: int) -> dict[str, float]:
        """Bounds of other choices, by what to write for them."""

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

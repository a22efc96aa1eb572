r"""The spectrum of an inverse problem in the space of the readings, with modes that are applied by products.

With the noise covariance :math:`N = L L^T`, eigenpairs :math:`U \Lambda U^T` of :math:`L^{-1} F \Gamma F^T L^{-T}` give

.. math::  W = U^T L^{-1} F\, \Gamma, \qquad S = I, \qquad \beta(r) = U^T L^{-1} r .

The vectors of ``W`` are as long as the controls of all steps, and are not stored: their products are one product with
the map and one with the prior's covariance.

For any orthonormal ``U`` that diagonalises the matrix in its span, the result is the exact posterior for the
combinations :math:`U^T L^{-1} d` of the readings. Where some are left out, the standard deviations are therefore too
large, never too small.

Sources: as for :mod:`pint_fem.inverse.spectra`; for low rank H. P. Flath et al., SIAM J. Sci. Comput. 33(1), 2011.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from mpi4py import MPI
from scipy.linalg import eigh

from pint_fem.collective import on_first_rank
from pint_fem.inverse.laws.noise import Noise
from pint_fem.inverse.laws.priors import Prior
from pint_fem.inverse.memory import state_memory
from pint_fem.inverse.per_step.low_rank import low_rank_eigenpairs
from pint_fem.inverse.per_step.reading_covariance import ReadingCovariance
from pint_fem.inverse.spectra import Spectrum

if TYPE_CHECKING:
    from pint_fem.inverse.map import ParameterToObservable

__all__ = ["AppliedModes", "dense_modes", "low_rank_modes"]

_NUMBERS = 2e7
"""Numbers in the parameter vectors of some modes that are computed at once."""


class AppliedModes(Spectrum):
    """Modes ``W`` that are applied by products with the map and the prior's covariance.

    Parameters
    ----------
    F
        The map.
    prior, noise
        Prior of the controls and noise of the readings.
    lam, U
        Eigenvalues ``(modes,)`` and orthonormal vectors ``(m, modes)`` of the whitened covariance of the readings.
    remainder
        Estimate of the largest eigenvalue that is left out.
    covariance
        Covariance of the readings, where a dense matrix ``(m, m)`` is not large: variances then take no product with
        the map.

    Attributes
    ----------
    remainder : float
        Estimate of the largest eigenvalue that is left out, relative to the weight 1 of the prior; zero for none.
    """

    def __init__(
        self,
        F: ParameterToObservable,
        prior: Prior,
        noise: Noise,
        lam: np.ndarray,
        U: np.ndarray,
        remainder: float = 0.0,
        *,
        covariance: ReadingCovariance | None = None,
    ):
        self._F, self._prior, self._noise, self._U, self._covariance = F, prior, noise, U, covariance
        self.lam, self.scale, self.remainder = lam, np.ones(len(lam)), remainder

    def beta(self, r: np.ndarray) -> np.ndarray:
        """:math:`U^T L^{-1} r`, ``(k, modes)``."""
        return self._noise.whitened(r) @ self._U

    def expand(self, c: np.ndarray) -> np.ndarray:
        """:math:`\\Gamma F^T L^{-T} U c`, ``(k, layout.size)`` (collective)."""
        return _covered(self._F, self._prior, self._noise, c @ self._U.T)

    def contract(self, g: np.ndarray) -> np.ndarray:
        """:math:`U^T L^{-1} F \\Gamma g`, ``(k, modes)`` (collective)."""
        return self._noise.whitened(self._F.product(self._prior.covariance(g))) @ self._U

    def squares(self, weights: np.ndarray) -> np.ndarray:
        """:math:`\\sum_i w_i W_i^2`, ``(layout.size,)``, by a dense matrix of the readings, or by a product for each
        mode that matters (collective).
        """
        if self._covariance is not None:
            half = self._noise.inverse(self._noise.correlated(self._U.T))  # rows: L^{-T} U
            return self._covariance.squares((half.T * weights) @ half)
        # a mode's share of a variance is at most w lam times the prior's variance
        some = np.flatnonzero(np.abs(weights) * self.lam > np.finfo(float).eps / max(1, len(weights)))
        out, each = np.zeros(self._F.layout.size), _vectors_at_once(self._F)
        for first in range(0, len(some), each):
            chosen = some[first : first + each]
            units = np.zeros((len(chosen), len(weights)))
            units[np.arange(len(chosen)), chosen] = 1.0
            out += np.einsum("i,ij,ij->j", weights[chosen], W := self.expand(units), W)
        return out


def _covered(F: ParameterToObservable, prior: Prior, noise: Noise, y: np.ndarray) -> np.ndarray:
    """:math:`\\Gamma F^T L^{-T} y` for several vectors ``(k, m)``, ``(k, layout.size)`` (collective)."""
    return prior.covariance(F.transposed_product(noise.inverse(noise.correlated(y))))


def _vectors_at_once(F: ParameterToObservable) -> int:
    """Parameter vectors that are computed at once, the same number on all ranks (collective)."""
    return max(1, int(_NUMBERS / max(1, F.spacetime.comm.allreduce(F.layout.size, op=MPI.MAX))))


def dense_modes(F: ParameterToObservable, prior: Prior, noise: Noise) -> AppliedModes:
    """All modes, by the dense matrix of the readings' covariance, for controls with one value per step (collective).

    Raises
    ------
    InputError
        On every rank, if the matrix does not fit the memory of the machines.
    """
    m, comm = F.table.size, F.spacetime.comm
    parts = {"dense matrices": 8 * (5 if comm.rank == 0 else 3) * m**2}
    state_memory(F, parts, f"the posterior in the space of {m} readings", "give fewer readings")
    covariance = ReadingCovariance(F, prior)
    gram = covariance.dense()

    def diagonalised() -> tuple[np.ndarray, np.ndarray]:
        G = noise.whitened(noise.whitened(gram).T)
        lam, U = eigh(0.5 * (G + G.T), driver="evd", check_finite=False)
        return np.maximum(lam, 0.0), U

    lam, U = on_first_rank(comm, "posterior", diagonalised)
    return AppliedModes(F, prior, noise, lam, U, covariance=covariance)


def low_rank_modes(
    F: ParameterToObservable, prior: Prior, noise: Noise, *, tolerance: float, seed: int = 0
) -> AppliedModes:
    """The modes whose eigenvalues are not below a tolerance, by products with random vectors (collective).

    Parameters
    ----------
    F
        The map.
    prior, noise
        Prior of the controls and noise of the readings.
    tolerance
        Bound of the eigenvalues that are left out, relative to the weight 1 of the prior.
    seed
        Of the random vectors.
    """
    each = _vectors_at_once(F)
    covariance = None if F.steps is None else ReadingCovariance(F, prior)

    def product(rows: np.ndarray) -> np.ndarray:
        if covariance is not None:
            return noise.whitened(covariance.product(noise.inverse(noise.correlated(rows))))
        parts = [_covered(F, prior, noise, rows[first : first + each]) for first in range(0, len(rows), each)]
        return noise.whitened(np.concatenate([F.product(part) for part in parts]))

    found = low_rank_eigenpairs(product, F.table.size, tolerance=tolerance, comm=F.spacetime.comm, seed=seed)
    return AppliedModes(F, prior, noise, *found)

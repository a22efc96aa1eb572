r"""The misfit of a linear inverse problem on the map from controls to readings, with its derivatives.

With readings :math:`d`, predicted as :math:`y_0 + F z`, and the covariance :math:`N` of their noise,

.. math::
    M(z) = \tfrac12 |r(z)|^2_{N^{-1}}, \quad r(z) = y_0 + F z - d, \qquad
    M'(z) = F^T N^{-1} r(z), \quad M''\, v = F^T N^{-1} F v :

products with matrices, without a sweep. For static controls these are the reduced rows :math:`F = Q C` of
:mod:`pint_fem.inverse.reduction` where they are clearly fewer than the readings, as diffusion makes them. For few
controls :math:`F^T N^{-1} F` is a matrix after the first products, or that of the posterior where there is one. The
residual itself is computed, not the expanded square, so that a small misfit has no error of the size of :math:`|d|^2`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pint_fem.inverse.laws.noise import DiagonalNoise, Noise
from pint_fem.inverse.per_step.spectrum_choice import LARGEST_DENSE
from pint_fem.inverse.reduction import estimated_size
from pint_fem.inverse.spectra import MisfitMatrix

if TYPE_CHECKING:
    from pint_fem.inverse.map import ParameterToObservable

__all__ = ["MapMisfit"]

_PRODUCTS = 10
"""Products with the Hessian by the rows, after which its matrix is computed for few controls."""
_FEWER = 0.7
"""Part of the readings that reduced rows are at most where computing them saves time."""


class MapMisfit:
    """The misfit ``M(z)`` on arrays. All methods are collective; controls are this rank's part ``(layout.size,)`` of a
    distributed vector, derivatives dual vectors.

    Parameters
    ----------
    F : ParameterToObservable
        The map; its data and offset are those of the misfit.
    noise : Noise, optional
        Noise of the readings; default: that of the weights which the functional's misfits have.
    """

    def __init__(self, F: ParameterToObservable, noise: Noise | None = None):
        self.F = F
        known = vars(F).get("default_posterior")
        if noise is None and known is not None:
            noise = known.noise
        if noise is None:
            with np.errstate(divide="ignore", over="ignore"):
                noise = DiagonalNoise(1 / F.weights)  # infinite where the weight is zero: such a reading has no part
        self.noise = noise
        self._matrix: MisfitMatrix | None = None
        self._products = 0
        reduces, self._is_small = _kinds(F)
        self._reduced = F.reduced if reduces else None
        if self._reduced is not None:
            ends = np.cumsum([0, *self._reduced.counts])
            rank = F.spacetime.time_comm.rank
            self._own = slice(int(ends[rank]), int(ends[rank + 1]))

    def _observed(self, rows: np.ndarray) -> np.ndarray:
        """``F z`` for controls ``(k, size)``, ``(k, m)``."""
        if self._reduced is None:
            return self.F.product(rows)
        c = np.zeros((len(rows), self._reduced.size))
        c[:, self._own] = _product(rows, self._reduced.C.T)
        return self._reduced.expand(self.F.spacetime.sum_over_grid(c), self.F.table.size)

    def _pulled_back(self, y: np.ndarray) -> np.ndarray:
        """``F^T y`` for data vectors ``(k, m)``, dual vectors ``(k, size)``."""
        if self._reduced is None:
            return self.F.transposed_product(y)
        return self.F.spacetime.sum_over_time(_product(self._reduced.contract(y)[:, self._own], self._reduced.C))

    def residual(self, z: np.ndarray) -> np.ndarray:
        """Predicted less measured readings, ``(m,)``."""
        return self.F.offset + self._observed(z[None])[0] - self.F.data

    def value(self, z: np.ndarray) -> float:
        """``M(z)``, the identical number on every rank."""
        r = self.residual(z)
        return 0.5 * float(r @ self.noise.inverse(r[None])[0])

    def gradient(self, z: np.ndarray) -> np.ndarray:
        """``M'(z)``, a dual vector."""
        return self._pulled_back(self.noise.inverse(self.residual(z)[None]))[0]

    def hessian(self, directions: np.ndarray) -> np.ndarray:
        """``M'' v`` for several directions ``(k, size)``, dual vectors of the same shape."""
        matrix = self._misfit_matrix()
        if matrix is not None:
            return matrix.product(directions)
        self._products += len(directions)
        return self._pulled_back(self.noise.inverse(self._observed(directions)))

    def _misfit_matrix(self) -> MisfitMatrix | None:
        """The Hessian as a matrix for few controls: that of the posterior, or, after some products, one of its own."""
        if self._matrix is None and self._is_small:
            found = vars(self.F).get("default_posterior")
            if found is not None and found.noise is self.noise:
                self._matrix = getattr(found.spectrum, "misfit_matrix", None)
            elif self._products >= _PRODUCTS:
                self._matrix = MisfitMatrix(self.F, self.noise)
        return self._matrix


def _kinds(F: ParameterToObservable) -> tuple[bool, bool]:
    """Whether reduced rows are used, which are stored anyhow or clearly fewer than the rows, and whether the controls
    are static and no more than those (collective).
    """
    if F.layout.evolution.stepwise:
        return False, False
    estimated = estimated_size(F.rows, [own.rows for own in F.readings], F.spacetime)
    unknowns = F.spacetime.space_comm.allreduce(F.layout.static_size)
    if unknowns <= min(estimated, LARGEST_DENSE):
        return False, True
    return "reduced" in vars(F) or estimated <= min(_FEWER * F.table.size, LARGEST_DENSE), False


def _product(rows: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """``rows @ matrix``; of a single row by the routine for vectors, which reads the matrix once."""
    return (rows[0] @ matrix)[None] if len(rows) == 1 else rows @ matrix

r"""The weight of the prior, :math:`\alpha`, chosen by the readings.

With the whitened residual of the prior's mean, :math:`e = N^{-1/2} r`, its components :math:`c_i` along the left
singular vectors of :math:`N^{-1/2} F \Gamma^{1/2}`, the squared singular values :math:`\lambda_i` and :math:`f_i =
\alpha / (\alpha + \lambda_i)`, the posterior's mean :math:`z_\alpha` has

.. math::
    \rho(\alpha) &= |N^{-1/2} (d - y_0 - F z_\alpha)|^2 = |e|^2 - |c|^2 + \sum f_i^2 c_i^2 , \\
    \eta(\alpha) &= |z_\alpha - m_0|^2_{\Gamma^{-1}} = \sum \lambda_i c_i^2 / (\alpha + \lambda_i)^2 , \qquad
    p(\alpha) = \sum \lambda_i / (\alpha + \lambda_i) , \\
    -2 \log \pi(d \mid \alpha) &= |e|^2 - |c|^2 + \sum f_i c_i^2 - \sum \log f_i + \log\det N + m \log 2\pi .

All are sums over the spectrum: a thousand values of :math:`\alpha` take no longer than one product with the map.

* *Discrepancy principle*: :math:`\rho(\alpha) = m` (V. A. Morozov, Soviet Math. Dokl. 7, 1966).
* *L-curve*: the point of largest curvature of :math:`(\log \rho, \log \eta)` (P. C. Hansen, SIAM Review 34(4), 1992).
* *Generalised cross-validation*: the least :math:`m \rho / (m - p)^2`, which does not depend on the scale of the noise
  (G. H. Golub, M. Heath, G. Wahba, Technometrics 21(2), 1979).
* *Evidence*: the largest density of the readings (D. J. C. MacKay, Neural Computation 4(3), 1992).
* *Unbiased predictive risk*: the least :math:`\rho + 2 p - m` (C. L. Mallows, Technometrics 15(4), 1973).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq, minimize_scalar

from pint_fem.errors import InputError

__all__ = ["METHODS", "RegularisationCurve", "RegularisedFit", "choose_alpha"]

METHODS = ("discrepancy", "l-curve", "gcv", "evidence", "upre")
"""Names of the methods."""
_ROUND_OFF = 1e-13
"""Eigenvalues below this part of the largest one are round-off."""
_BEYOND = 1e4
"""How far weights go beyond the eigenvalues."""
_GRID = 400
"""Number of weights among which extreme values are bracketed."""


@dataclass(frozen=True)
class RegularisationCurve:
    """Numbers of the posterior's mean for several weights of the prior.

    Attributes
    ----------
    alpha : ndarray
        The weights.
    misfit : ndarray
        Squared norm of the residual.
    size : ndarray
        Squared norm of the difference from the prior's mean, in the prior's precision.
    degrees_of_freedom : ndarray
        Number of combinations of the controls that the readings determine.
    log_evidence : ndarray
        Logarithm of the density of the readings.
    gcv, upre : ndarray
        Generalised cross-validation, and the unbiased predictive risk.
    curvature : ndarray
        Curvature of the L-curve; NaN where misfit or size is zero.
    """

    alpha: np.ndarray
    misfit: np.ndarray
    size: np.ndarray
    degrees_of_freedom: np.ndarray
    log_evidence: np.ndarray
    gcv: np.ndarray
    upre: np.ndarray
    curvature: np.ndarray


class RegularisedFit:
    """Sums over the spectrum of an inverse problem, as functions of the weight of the prior.

    Parameters
    ----------
    lam, scale, beta : ndarray, shape (modes,)
        Eigenvalues, their scale and the coefficients of the readings (:mod:`pint_fem.inverse.spectra`).
    squares
        Squared norm of the residual of the prior's mean.
    count
        Number of readings ``m``.
    log_det
        Logarithm of the determinant of the noise's covariance.

    Attributes
    ----------
    lam, c2 : ndarray
        Eigenvalues above round-off, and the squares of the residual's components.
    outside : float
        The part of the squared residual that no control changes.
    """

    def __init__(
        self, lam: np.ndarray, scale: np.ndarray, beta: np.ndarray, squares: float, count: int, log_det: float
    ):
        self.squares, self.count, self.log_det = float(squares), count, log_det
        kept = lam > _ROUND_OFF * lam.max(initial=0.0)
        self.lam = lam[kept]
        self.c2 = beta[kept] ** 2 / scale[kept]
        self.outside = max(self.squares - float(self.c2.sum()), 0.0)

    def _share(self, alpha: float | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Weights ``(..., 1)`` and ``alpha / (alpha + lam)``, ``(..., modes)``."""
        column = np.asarray(alpha, dtype=float)[..., None]
        return column, column / (column + self.lam)

    def misfit(self, alpha: float | np.ndarray) -> np.ndarray:
        """Squared norms of the residual, in the shape of ``alpha``."""
        return self.outside + self._share(alpha)[1] ** 2 @ self.c2

    def size(self, alpha: float | np.ndarray) -> np.ndarray:
        """Squared norms of the mean less that of the prior, in the shape of ``alpha``."""
        column, _ = self._share(alpha)
        return (self.lam / (column + self.lam) ** 2) @ self.c2

    def degrees_of_freedom(self, alpha: float | np.ndarray) -> np.ndarray:
        """Numbers of combinations that the readings determine, in the shape of ``alpha``."""
        column, _ = self._share(alpha)
        return (self.lam / (column + self.lam)).sum(axis=-1)

    def log_evidence(self, alpha: float | np.ndarray) -> np.ndarray:
        """Logarithms of the density of the readings, in the shape of ``alpha``."""
        column, f = self._share(alpha)
        exponent = self.outside + f @ self.c2 + np.log1p(self.lam / column).sum(axis=-1)
        return -0.5 * (exponent + self.log_det + self.count * np.log(2 * np.pi))

    def gcv(self, alpha: float | np.ndarray) -> np.ndarray:
        """Generalised cross-validation, in the shape of ``alpha``; infinite where it is not defined."""
        left = self.count - self.degrees_of_freedom(alpha)
        with np.errstate(divide="ignore"):
            return np.where(left > 1e-9 * self.count, self.count * self.misfit(alpha) / left**2, np.inf)

    def upre(self, alpha: float | np.ndarray) -> np.ndarray:
        """Estimates of the predictive risk, in the shape of ``alpha``."""
        return self.misfit(alpha) + 2 * self.degrees_of_freedom(alpha) - self.count

    def curvature(self, alpha: float | np.ndarray) -> np.ndarray:
        """Curvatures of the L-curve, in the shape of ``alpha``, by derivatives with respect to ``log(alpha)``."""
        column, f = self._share(alpha)
        g, total = 1 - f, column + self.lam
        b = self.lam * self.c2
        rho, rho1, rho2 = self.misfit(alpha), (f**2 * g) @ (2 * self.c2), (f**2 * g * (2 - 3 * f)) @ (2 * self.c2)
        eta, eta1, eta2 = (x @ b for x in (total**-2, -2 * f / total**2, (6 * f - 2) * f / total**2))
        with np.errstate(divide="ignore", invalid="ignore"):
            x1, y1 = rho1 / (2 * rho), eta1 / (2 * eta)
            x2, y2 = rho2 / (2 * rho) - 2 * x1**2, eta2 / (2 * eta) - 2 * y1**2
            return (x1 * y2 - x2 * y1) / (x1**2 + y1**2) ** 1.5

    def curve(self, alpha: np.ndarray) -> RegularisationCurve:
        """All numbers for an array of weights."""
        return RegularisationCurve(
            alpha,
            self.misfit(alpha),
            self.size(alpha),
            self.degrees_of_freedom(alpha),
            self.log_evidence(alpha),
            self.gcv(alpha),
            self.upre(alpha),
            self.curvature(alpha),
        )

    def weights(self, count: int) -> np.ndarray:
        """Weights in geometric progression over the range of the eigenvalues and beyond."""
        if not len(self.lam):
            raise InputError("the readings do not depend on the controls: no weight of the prior differs from another")
        return np.geomspace(self.lam.min() / _BEYOND, self.lam.max() * _BEYOND, count)


def choose_alpha(fit: RegularisedFit, method: str, target: float | None = None) -> float:
    """The weight of the prior by one of :data:`METHODS`.

    Parameters
    ----------
    fit
        Sums over the spectrum.
    method
        One of :data:`METHODS`.
    target
        The squared residual of the discrepancy principle; default: the number of readings.

    Raises
    ------
    InputError
        If the method is none of these, ``target`` is given for another method or not positive, or no weight fulfils the
        method's condition; the message has the reason.
    """
    if method not in METHODS:
        raise InputError(f"choose({method!r}): give one of {', '.join(map(repr, METHODS))}")
    if target is not None and (method != "discrepancy" or not 0 < target < np.inf):
        raise InputError(
            f"choose({method!r}, target={target!r}): a target is the squared residual of the discrepancy principle, a "
            "positive number"
        )
    grid = fit.weights(_GRID)
    if not fit.c2.any():
        raise InputError(
            f"choose({method!r}): the prior's mean fits the readings exactly: every weight fits them as well"
        )
    if method == "discrepancy":
        return _discrepancy(fit, float(fit.count if target is None else target))
    criterion = {
        "l-curve": lambda a: -fit.curvature(a),
        "gcv": fit.gcv,
        "evidence": lambda a: -fit.log_evidence(a),
        "upre": fit.upre,
    }[method]
    return _minimiser(criterion, grid, method)


def _discrepancy(fit: RegularisedFit, target: float) -> float:
    """The weight whose squared residual is the target; the residual increases with the weight."""
    if fit.squares <= target:
        raise InputError(
            f"choose('discrepancy'): the prior's mean alone has the squared residual {fit.squares:.4g}, not more than "
            f"the {target:.4g} that noise explains: the readings are explained without the controls; give the noise's "
            "standard deviation if it is smaller than assumed"
        )
    if fit.outside >= target:
        raise InputError(
            f"choose('discrepancy'): every control has a squared residual above {fit.outside:.4g}, and noise explains "
            f"only {target:.4g}: give a larger noise, or a model that fits the readings better"
        )
    low, high = fit.lam.min(), fit.lam.max()
    while fit.misfit(low) > target and low > 0:
        low /= _BEYOND
    while fit.misfit(high) < target and high < np.finfo(float).max / _BEYOND:
        high *= _BEYOND

    def gap(t: float) -> float:
        return float(fit.misfit(np.exp(t))) - target

    if low == 0 or gap(np.log(low)) * gap(np.log(high)) > 0:  # the target is a bound, to round-off
        raise InputError(f"choose('discrepancy'): a squared residual of {target:.4g} is reached in the limit only")
    return float(np.exp(brentq(gap, np.log(low), np.log(high), xtol=1e-13, rtol=1e-14)))


def _minimiser(criterion, grid: np.ndarray, method: str) -> float:
    """The least of the criterion's local minima inside the grid."""
    values = np.nan_to_num(criterion(grid), nan=np.inf)
    inner = values[1:-1]
    minima = 1 + np.flatnonzero((inner <= values[:-2]) & (inner < values[2:]))
    best = int(minima[np.argmin(values[minima])]) if len(minima) else -1
    if method != "l-curve" and len(minima) and values[best] > min(values[0], values[-1]):
        best = -1
    if best < 0:
        if method == "l-curve":
            raise InputError(
                "choose('l-curve'): the L-curve has no corner, no point of largest curvature: use 'evidence', 'gcv' or "
                "'discrepancy'"
            )
        why = (
            "the smaller the weight, the better: the readings seem to have no noise"
            if values[0] < values[-1]
            else "the larger the weight, the better: the readings do not tell controls from noise"
        )
        raise InputError(f"choose({method!r}): {why}; give alpha=, or check the noise")
    bounds = np.log(grid[best - 1]), np.log(grid[best + 1])
    found = minimize_scalar(
        lambda t: float(criterion(np.exp(t))), bounds=bounds, method="bounded", options={"xatol": 1e-9}
    )
    return float(np.exp(found.x))

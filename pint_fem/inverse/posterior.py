r"""The Gaussian posterior of the controls of a linear inverse problem.

For readings :math:`d = F z + y_0 + \eta` with noise :math:`\eta \sim N(0, N)` and a prior :math:`z \sim N(m_0,
\alpha^{-1} \Gamma)` the posterior is Gaussian. Its mean is the control that minimises

.. math::  \tfrac12 |d - y_0 - F z|^2_{N^{-1}} + \tfrac\alpha2 |z - m_0|^2_{\Gamma^{-1}} .

All that depends on the readings, on :math:`\alpha` or on a vector follows from one spectral decomposition
(:mod:`pint_fem.inverse.spectra`) in milliseconds.
"""

from __future__ import annotations

from copy import copy
from numbers import Real
from typing import TYPE_CHECKING

import numpy as np
from mpi4py import MPI
from numpy.typing import ArrayLike

from pint_fem.collective import collectively, require_same
from pint_fem.errors import InputError
from pint_fem.inverse.inference.gaussian_law import GaussianLaw
from pint_fem.inverse.inference.innovations import InnovationFactor
from pint_fem.inverse.inference.regularisation_choice import RegularisationCurve, RegularisedFit, choose_alpha
from pint_fem.inverse.inference.streaming import ReadingStream, StreamedPosterior
from pint_fem.inverse.laws.noise import Noise
from pint_fem.inverse.laws.priors import Prior
from pint_fem.inverse.per_step.window import SlidingWindow
from pint_fem.inverse.readings import ReadingTable
from pint_fem.inverse.spectra import Spectrum

if TYPE_CHECKING:
    from pint_fem.inverse.map import ParameterToObservable

__all__ = ["GaussianPosterior"]


class GaussianPosterior(GaussianLaw):
    """The posterior of the controls for the readings of a map.

    Parameters
    ----------
    F
        The map from controls to readings.
    prior, noise
        Prior of the controls and noise of the readings.
    spectrum
        Their spectral decomposition.
    alpha
        Weight of the prior.
    data
        Readings ``(m,)``; default: those of the map.
    weights
        The weights of the readings in the functional, if the noise is that of these.

    Attributes
    ----------
    alpha : float
    data : ndarray, shape (m,)
    x : ndarray, shape (layout.size,)
        The mean, which is the maximum a posteriori, as a flat vector.
    """

    def __init__(
        self,
        F: ParameterToObservable,
        prior: Prior,
        noise: Noise,
        spectrum: Spectrum,
        *,
        alpha: float = 1.0,
        data: np.ndarray | None = None,
        weights: np.ndarray | None = None,
    ):
        self._weights = weights
        self.F, self.prior, self.noise, self.spectrum = F, prior, noise, spectrum
        self._predicted_by_prior = F.predict(prior.mean)
        self._factor: InnovationFactor | None = None
        self._set(_checked_weight(F.spacetime.comm, alpha), F.data if data is None else data)

    def __repr__(self) -> str:
        m, n = self.F.shape
        return f"<GaussianPosterior: {n} controls from {m} readings, alpha = {self.alpha:g}>"

    def _set(self, alpha: float, data: np.ndarray) -> None:
        """Compute the mean for a weight and readings (collective)."""
        self.alpha, self.data = float(alpha), data
        r = data - self._predicted_by_prior
        spectrum = self.spectrum
        beta = spectrum.beta(r[None])[0]
        squares = float(r @ self.noise.inverse(r[None])[0])
        self._fit = RegularisedFit(spectrum.lam, spectrum.scale, beta, squares, len(data), self.noise.log_det)
        self.x = self.prior.mean + spectrum.expand((beta / (self.alpha + spectrum.lam))[None])[0]

    def with_data(self, data: ArrayLike | None = None) -> GaussianPosterior:
        """The posterior for other readings of the same sensors at the same times (collective), ``(m,)`` or, of a single
        misfit without missing readings, ``(times, sensors)``; default: those that the functional has now, after
        ``J.update_data()``. Prior and noise stay: where ``J.update_data()`` has read another regularisation, make the
        posterior again, ``F.posterior()``.

        Raises
        ------
        InputError
            On every rank, if they have another shape, are masked, not finite or not the same on all ranks, or by
            default if ``J.update_data()`` has read other operators, or other weights from which the noise follows.
        """
        comm = self.F.spacetime.comm
        given = self.F.read_again() if data is None else data
        if data is None and self._weights is not None and not np.array_equal(self._weights, self.F.weights):
            raise InputError(
                "posterior: readings have other weights now, from which the noise follows: use F.posterior()"
            )
        data = collectively(comm, "", _checked_readings, given, self.F.table)
        require_same(comm, readings=data)
        made = copy(self)
        made._set(self.alpha, data)
        return made

    def with_alpha(self, alpha: float) -> GaussianPosterior:
        """The posterior with another weight of the prior (collective).

        Raises
        ------
        InputError
            On every rank, if it is not a positive number, the same on all ranks.
        """
        made = copy(self)
        made._set(_checked_weight(self.F.spacetime.comm, alpha), self.data)
        return made

    # -- numbers -------------------------------------------------------------------------------------------------------
    def misfit(self, alpha: float | np.ndarray | None = None) -> np.ndarray:
        """The squared norm of the residual at the mean, :math:`|d - y_0 - F z|^2_{N^{-1}}`, for one weight of the prior
        or for each of an array of them; default: that of the posterior.
        """
        return self._fit.misfit(self.alpha if alpha is None else alpha)

    def size(self, alpha: float | np.ndarray | None = None) -> np.ndarray:
        """The squared norm of the mean, :math:`|z - m_0|^2_{\\Gamma^{-1}}`, as :meth:`misfit`."""
        return self._fit.size(self.alpha if alpha is None else alpha)

    def degrees_of_freedom(self, alpha: float | np.ndarray | None = None) -> np.ndarray:
        """The number of combinations of the controls that the readings determine, :math:`\\sum \\lambda / (\\alpha +
        \\lambda)`, as :meth:`misfit`.
        """
        return self._fit.degrees_of_freedom(self.alpha if alpha is None else alpha)

    def log_evidence(self, alpha: float | np.ndarray | None = None) -> np.ndarray:
        """The logarithm of the probability density of the readings, the controls integrated out, as :meth:`misfit`."""
        return self._fit.log_evidence(self.alpha if alpha is None else alpha)

    # -- the weight of the prior ---------------------------------------------------------------------------------------
    def curve(self, alphas: np.ndarray | None = None) -> RegularisationCurve:
        """Misfit, size, degrees of freedom, evidence and other criteria for several weights of the prior.

        Parameters
        ----------
        alphas
            Positive numbers ``(k,)``; default: 200 in geometric progression over the range of the eigenvalues.

        Raises
        ------
        InputError
            If a weight is not positive and finite, or the readings do not depend on the controls.
        """
        weights = self._fit.weights(200) if alphas is None else np.array(alphas, dtype=float).ravel()
        if not ((weights > 0) & (weights < np.inf)).all():
            raise InputError("curve: give positive weights of the prior")
        return self._fit.curve(weights)

    def choose(self, method: str, *, target: float | None = None) -> GaussianPosterior:
        """The posterior with the weight of the prior that the readings determine (collective).

        Parameters
        ----------
        method
            ``"discrepancy"``: the squared residual is the number of readings; ``"l-curve"``: the point of largest
            curvature of size over misfit; ``"gcv"``: generalised cross-validation, which does not depend on the noise's
            scale; ``"evidence"``: the readings are most probable; ``"upre"``: the least estimate of the predictive
            risk. Sources: :mod:`pint_fem.inverse.inference.regularisation_choice`.
        target
            The squared residual of the discrepancy principle, such as the number of readings less
            :meth:`degrees_of_freedom`; default: the number of readings.

        Raises
        ------
        InputError
            On every rank, if there is no such method, or no weight fulfils its condition; the message has the reason.
        """
        comm = self.F.spacetime.comm
        require_same(comm, method=method, target=target)
        chosen = collectively(comm, "", lambda: choose_alpha(self._fit, method, target))
        return self.with_alpha(comm.bcast(chosen))

    # -- readings that come in -----------------------------------------------------------------------------------------
    def stream(self) -> ReadingStream:
        """The posteriors of the readings up to each time in turn (collective): ``stream.update(values)`` adds the
        readings of the next time.
        """
        if self._factor is None or self._factor.posterior.alpha != self.alpha:
            stream = ReadingStream(self)
            self._factor = stream.factor
            return stream
        return ReadingStream(self, self._factor)

    def until(self, time: float) -> StreamedPosterior:
        """The posterior of the readings up to a time, this included (collective)."""
        return self.stream().until(time)

    def window(self, steps: int) -> SlidingWindow:
        """A window of the last ``steps`` steps that moves with the readings, for controls with one value per step
        (collective); parameters and errors are those of :class:`~pint_fem.inverse.per_step.window.SlidingWindow`.
        """
        return SlidingWindow(self, steps)

    # -- the distribution ----------------------------------------------------------------------------------------------
    def _covariance(self, g: np.ndarray) -> np.ndarray:
        weights = self.spectrum.scale / (self.alpha + self.spectrum.lam)
        return (self.prior.covariance(g) - self.spectrum.expand(weights * self.spectrum.contract(g))) / self.alpha

    def variance(self) -> np.ndarray:
        """The variance of each entry of the controls, ``(layout.size,)`` (collective)."""
        weights = self.spectrum.scale / (self.alpha + self.spectrum.lam)
        return np.maximum(self.prior.variance() - self.spectrum.squares(weights), 0.0) / self.alpha

    def sample(self, count: int, seed: int = 0) -> np.ndarray:
        """Samples of the controls, ``(count, layout.size)`` (collective); the same for the same seed."""
        ratio = np.sqrt(self.alpha / (self.alpha + self.spectrum.lam))
        weights = self.spectrum.scale / ((self.alpha + self.spectrum.lam) * (1 + ratio))
        x = self.prior.sample(count, seed)
        x -= self.spectrum.expand(weights * self.spectrum.contract(self.prior.precision(x)))
        return self.x + x / np.sqrt(self.alpha)


def _checked_readings(given: ArrayLike, table: ReadingTable) -> np.ndarray:
    """Readings as a data vector, or an ``InputError``: an array of another shape would be read in another order."""
    fits = f"give {table.size} finite numbers, one misfit after the other, time by time"
    shapes: list[tuple[int, ...]] = [(table.size,)]
    if len(table.misfits) == 1 and table.misfits[0].present.all():
        shapes.append(table.misfits[0].present.shape)
        fits += f", or an array (times, sensors) = {shapes[1]}"
    try:
        masked = np.ma.array(given, dtype=float)
    except (TypeError, ValueError) as error:
        raise InputError(f"posterior: readings {given!r}: {fits}") from error
    if np.ma.getmaskarray(masked).any():
        raise InputError(
            "posterior: readings are masked in places: give those to stream(), which takes missing ones, or make the "
            "map again with them in the misfit's data"
        )
    if masked.shape not in shapes or not np.isfinite(masked.data).all():
        raise InputError(f"posterior: readings of shape {masked.shape}: {fits}")
    return masked.data.ravel()


def _checked_weight(comm: MPI.Comm, alpha: float) -> float:
    """The weight of a prior, the same positive number on all ranks (collective)."""
    require_same(comm, alpha=alpha)
    if isinstance(alpha, bool) or not isinstance(alpha, Real) or not 0 < alpha < np.inf:
        raise InputError(f"posterior: alpha = {alpha!r}: give a positive number, the weight of the prior")
    return float(alpha)

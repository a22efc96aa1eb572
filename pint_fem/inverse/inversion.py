"""What follows from the map of a linear inverse problem: posterior, minimiser, choice of sensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from numbers import Real
from typing import Any, NamedTuple

import numpy as np

from pint_fem.collective import collectively, require_same
from pint_fem.errors import InputError
from pint_fem.evolution.control_layout import ControlLayout
from pint_fem.inverse.inference.sensor_choice import SensorChoice, choose_sensors
from pint_fem.inverse.laws.noise import Noise, make_noise
from pint_fem.inverse.laws.priors import Prior, make_prior
from pint_fem.inverse.partition import Partition
from pint_fem.inverse.per_step.spectrum_choice import choose_spectrum
from pint_fem.inverse.per_step.toeplitz import ToeplitzMap
from pint_fem.inverse.posterior import GaussianPosterior
from pint_fem.inverse.readings import ReadingTable
from pint_fem.inverse.reduction import ReducedRows
from pint_fem.inverse.response_rows import SensorReadingRows
from pint_fem.spacetime import SpaceTime

__all__ = ["Inversion", "PriorForms"]


class PriorForms(NamedTuple):
    """What the default prior follows from.

    Attributes
    ----------
    forms : list of (ufl.Form or None), or None
        Second derivatives of the regularisation by each control, ``None`` where it is zero or not constant.
    gradient : ndarray, shape (layout.size,), or None
        Derivative of the regularisation at zero.
    """

    forms: list | None
    gradient: np.ndarray | None


class Inversion:
    """The part of a map from controls to readings that solves inverse problems with it; the map's attributes are those
    of :class:`~pint_fem.inverse.map.ParameterToObservable`.
    """

    layout: ControlLayout
    spacetime: SpaceTime
    table: ReadingTable
    readings: list[SensorReadingRows]
    numbers: np.ndarray
    steps: ToeplitzMap | None
    rows: np.ndarray
    weights: np.ndarray
    functions: Any
    inner: Any
    regularisation: Callable[[], PriorForms] | None
    read_again: Callable[[], np.ndarray]

    @cached_property
    def partition(self) -> Partition:
        """Division of parameter vectors among the ranks in time."""
        return Partition(self.layout)

    @cached_property
    def reduced(self) -> ReducedRows:
        """Reduced rows of static controls (collective when first used)."""
        return ReducedRows(self.rows, [own.rows for own in self.readings], self.numbers, self.spacetime)

    def posterior(
        self,
        prior: Any = None,
        noise: Any = None,
        *,
        alpha: float = 1.0,
        mean: Any = None,
        tolerance: float = 1e-6,
    ) -> GaussianPosterior:
        """The Gaussian posterior of the controls (collective).

        Parameters
        ----------
        prior
            The controls' prior, as :func:`~pint_fem.inverse.laws.priors.make_prior` takes it; default: that of the
            functional's regularisation, so that the posterior's mean minimises the functional.
        noise
            The readings' noise, as :func:`~pint_fem.inverse.laws.noise.make_noise` takes it; default: that of the
            misfits' weights.
        alpha
            Weight of the prior: a factor of its precision.
        mean
            The prior's mean, as controls or a flat vector; default: the minimiser of the regularisation, or zero.
        tolerance
            Where there are too many readings and controls for dense matrices: the bound of eigenvalues of the misfit's
            Hessian relative to the prior that may be left out. An estimate of the largest one of these is
            ``posterior.spectrum.remainder``.

        Raises
        ------
        InputError
            On every rank, if prior, noise, weight or tolerance do not fit, or ``J.update_data()`` has read other
            operators.
        """
        require_same(self.spacetime.comm, tolerance=tolerance)
        if not isinstance(tolerance, Real) or not 0 < tolerance < np.inf:
            raise InputError(f"posterior: tolerance = {tolerance!r}: give a positive number, such as 1e-6")
        self.read_again()
        weights = self.weights if noise is None else None
        law, noise = self._laws(prior, noise, mean)
        spectrum = choose_spectrum(self, law, noise, tolerance)
        return GaussianPosterior(self, law, noise, spectrum, alpha=alpha, weights=weights)

    def choose_sensors(
        self,
        count: int,
        criterion: str = "A",
        *,
        prior: Any = None,
        noise: Any = None,
        candidates: Sequence[int] | None = None,
        inner_product: Any = None,
    ) -> SensorChoice:
        """Choose the sensors whose readings determine the controls best, one after another (collective).

        All sensors of the map are candidates, and the readings do not matter.

        Parameters
        ----------
        count
            How many.
        criterion
            ``"A"``: the least trace of the posterior covariance; ``"D"``: the most information, which is the least
            determinant of the covariance.
        prior, noise
            As for :meth:`posterior`; the noise of different sensors is independent.
        candidates
            Numbers of the sensors to choose from, those of one misfit after the other; default: all.
        inner_product
            For ``"A"``: ``"L2"`` or a bilinear form, or a list with one for each control, in which variances are
            integrated; default: the sum of the variances of the coefficients.

        Raises
        ------
        InputError
            On every rank, if an argument does not fit, the noise couples sensors, or a control has one value per step.
        """
        self.read_again()
        law, noise = self._laws(prior, noise, None)
        return choose_sensors(self, law, noise, count, criterion, candidates=candidates, product=inner_product)

    def _laws(self, prior: Any, noise: Any, mean: Any) -> tuple[Prior, Noise]:
        """The prior and the noise that a user describes (collective)."""
        kinds = [_kind(one) for one in prior] if isinstance(prior, (list, tuple)) else _kind(prior)
        law_of_readings = _kind(noise) if isinstance(noise, Noise) else noise
        require_same(self.spacetime.comm, prior=kinds, mean=_kind(mean), noise=law_of_readings)
        forms = PriorForms(None, None)
        by_default = prior is None or (isinstance(prior, (list, tuple)) and any(one is None for one in prior))
        if by_default and self.regularisation is not None:
            forms = self.regularisation()
        law = make_prior(
            prior,
            self.layout,
            regularisation_forms=forms.forms,
            regularisation_gradient=forms.gradient,
            mean=None if mean is None else self._flat(mean),
            inner=self.inner,
        )
        return law, collectively(
            self.spacetime.comm, "", make_noise, noise, self.weights, self.table.sensor, self.table.sensors
        )

    @cached_property
    def default_posterior(self) -> GaussianPosterior:
        """The posterior with the prior of the functional's regularisation (collective when first used)."""
        return self.posterior()

    def minimize(self, start: Any = None, **options: Any) -> Any:
        """Minimise the functional that the map was made of, with the readings of the map: the misfit by products with
        the map, the regularisation by its own form, which need not be quadratic (collective).

        Parameters
        ----------
        start
            First controls; default: the last ones of the functional.
        **options
            Those of ``minimize_trust_region`` of the functional, such as ``bounds=(0, None)``, ``constraints=[(q*dx,
            1.0)]``, ``gtol_rel=`` and ``monitor=``. The preconditioner is the posterior's covariance where the
            regularisation is quadratic and positive definite: without bounds and constraints one iteration then gives
            the posterior's mean.

        Returns
        -------
        TrustRegionResult
            ``control`` holds the controls found, which are also the values of the functional's own ``controls``.

        Raises
        ------
        InputError
            On every rank, if an option does not fit, or the map is not that of a functional.
        """
        if self.functions is None:
            raise InputError("minimize: the map has no functional with a regularisation: use posterior(prior=...).x")
        self.read_again()
        return self.functions.on_map(self).minimize(start, **options)


def _kind(given: Any) -> str:
    """What a user gives for a prior or a mean, for comparison between ranks: other ones are computed otherwise."""
    return given if isinstance(given, str) else type(given).__name__

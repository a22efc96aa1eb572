r"""Gaussian priors :math:`z \sim N(m_0, A^{-1})` of all controls, on flat vectors.

The precision ``A`` is block-diagonal. A static control has a block ``Q``
(:mod:`pint_fem.inverse.laws.gaussian_fields`); of a control with one value per step the steps are independent, each
with the precision :math:`\Delta t\, Q`. This is the second derivative of the regularisation :math:`R(q) + \sum_n \Delta
t\, R(z_n)`, whose minimiser is the mean.

Noise is seeded by the seed, the control and the step, so that samples do not depend on the number of ranks in time. On
several ranks in space they have the same law for every number of them, and are reproducible for a given one.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from copy import copy
from numbers import Real
from typing import Any

import numpy as np
import ufl
from firedrake import Function
from firedrake.adjoint.covariance_operator import CovarianceOperatorBase

from pint_fem.all_at_once.grids import is_integer
from pint_fem.collective import all_ranks, collectively, require_same
from pint_fem.errors import InputError
from pint_fem.evolution.control_layout import ControlLayout
from pint_fem.inverse.laws.covariance_fields import BilaplacianPrior, gaussian_field
from pint_fem.inverse.laws.gaussian_fields import DiagonalField, FormField, GaussianField, MapField

__all__ = ["FieldPrior", "Prior", "ScaledPrior", "make_prior", "riesz_fields"]


class Prior(ABC):
    """A Gaussian law of all controls. Vectors are flat, ``(size,)``, or the rows of an array ``(k, size)``.

    Parameters
    ----------
    layout
        The controls.
    mean
        Mean, a primal vector ``(size,)``; default zero.

    Attributes
    ----------
    layout : ControlLayout
        The controls.
    mean : ndarray, shape (size,)
        The mean; its static part is that of the first rank in time.

    Raises
    ------
    InputError
        On every rank, if the mean has another shape or entries that are not finite.
    """

    def __init__(self, layout: ControlLayout, mean: np.ndarray | None = None):
        self.layout = layout
        self.mean = np.zeros(layout.size) if mean is None else _checked_mean(layout, mean)

    @abstractmethod
    def covariance(self, rows: np.ndarray, *, shared: bool = True) -> np.ndarray:
        """Return the products of the covariance with dual vectors, primal vectors of the same shape (collective; over
        space only where the vectors are not ``shared``: each rank in time then has static vectors of its own).
        """

    @abstractmethod
    def precision(self, rows: np.ndarray) -> np.ndarray:
        """Return the products of the precision with primal vectors, dual vectors of the same shape (collective)."""

    @abstractmethod
    def sample(self, count: int, seed: int) -> np.ndarray:
        """Return ``count`` independent samples without the mean, ``(count, size)`` (collective); the first ones do not
        depend on ``count``. Numbers that are no whole numbers of at least 0 are an ``InputError``.
        """

    @abstractmethod
    def variance(self, samples: int | None = None) -> np.ndarray:
        r"""Return the variance of each coefficient, the diagonal of the covariance, ``(size,)`` (collective).

        Parameters
        ----------
        samples
            Number ``N`` of samples of which it is estimated, with the standard error :math:`\sqrt{2/N}` relative to
            each variance. Default: exactly, where a field has at most 20,000 coefficients (2,000 with one of
            Firedrake's covariance operators), and otherwise of 2,000 samples (standard error 3.2 %).
        """

    def log_det_precision(self) -> float | None:
        """Return the logarithm of the determinant of the precision of all steps, ``None`` where it is not cheap."""
        return None

    def with_mean(self, mean: np.ndarray) -> Prior:
        """Return the prior with another mean ``(size,)`` (collective); errors as for the class."""
        made = copy(self)
        made.mean = _checked_mean(self.layout, mean)
        return made

    def scaled(self, alpha: float) -> Prior:
        """Return the prior with the same mean and ``alpha`` times the precision; a number that is not positive and
        finite is an ``InputError``.
        """
        return ScaledPrior(self, alpha)


def _checked_mean(layout: ControlLayout, mean: np.ndarray) -> np.ndarray:
    comm = layout.spacetime.comm

    def converted() -> np.ndarray:
        try:
            made = np.array(mean, dtype=float)
        except (TypeError, ValueError) as error:
            raise InputError(f"mean of the prior: {mean!r}: give a vector of numbers") from error
        if made.shape != (layout.size,):
            raise InputError(
                f"mean of the prior: an array of shape {made.shape}: give the flat vector of all controls, "
                f"({layout.size},)"
            )
        if not np.isfinite(made).all():
            raise InputError("mean of the prior: some entries are infinite or NaN: give finite numbers")
        return made

    made = collectively(comm, "", converted)
    layout.share(made)
    return made


class ScaledPrior(Prior):
    """A prior with a multiple of the precision.

    Parameters
    ----------
    prior
        The prior.
    alpha
        The factor, a positive number.
    """

    def __init__(self, prior: Prior, alpha: float):
        if isinstance(alpha, bool) or not isinstance(alpha, Real) or not 0 < alpha < np.inf:
            raise InputError(f"weight of the prior alpha = {alpha!r}: give a positive number")
        super().__init__(prior.layout, prior.mean)
        self._prior, self.alpha = prior, float(alpha)

    def covariance(self, rows: np.ndarray, *, shared: bool = True) -> np.ndarray:
        """Return the covariance's products divided by the factor."""
        return self._prior.covariance(rows, shared=shared) / self.alpha

    def precision(self, rows: np.ndarray) -> np.ndarray:
        """Return the precision's products times the factor."""
        return self._prior.precision(rows) * self.alpha

    def sample(self, count: int, seed: int) -> np.ndarray:
        """Return samples divided by the square root of the factor."""
        return self._prior.sample(count, seed) / np.sqrt(self.alpha)

    def variance(self, samples: int | None = None) -> np.ndarray:
        """Return the variances divided by the factor."""
        return self._prior.variance(samples) / self.alpha

    def log_det_precision(self) -> float | None:
        """Return the logarithm of the determinant of the precision."""
        found, layout = self._prior.log_det_precision(), self.layout
        unknowns = sum(c.function_space().dim() * _repeats(layout, c) for c in _all_controls(layout))
        return None if found is None else found + unknowns * float(np.log(self.alpha))


def _all_controls(layout: ControlLayout) -> Sequence[Function]:
    return layout.evolution.controls


def _repeats(layout: ControlLayout, control: Function) -> int:
    """The number of values of a control: one, or one per step."""
    return layout.evolution.nsteps if control in layout.evolution.stepwise else 1


class FieldPrior(Prior):
    """The prior of independent controls, each with a law of its own.

    Parameters
    ----------
    layout
        The controls.
    fields
        The law of each control, in the order of the evolution's ``controls``; of a control with one value per step that
        of a step, whose precision is multiplied by the time step.
    mean
        Mean ``(size,)``; default zero.
    """

    def __init__(self, layout: ControlLayout, fields: Sequence[GaussianField], mean: np.ndarray | None = None):
        super().__init__(layout, mean)
        self._fields = dict(zip(_all_controls(layout), fields, strict=True))

    def _weight(self, control: Function) -> float:
        return self.layout.evolution.dt if control in self.layout.evolution.stepwise else 1.0

    def _share(self, rows: np.ndarray) -> np.ndarray:
        """The same static part on all ranks in time: solvers of several ranks differ by round-off between groups."""
        if self.layout.spacetime.time_size > 1:
            static = np.ascontiguousarray(rows[..., : self.layout.static_size])
            self.layout.spacetime.time_comm.Bcast(static, root=0)
            rows[..., : self.layout.static_size] = static
        return rows

    def _products(self, rows: np.ndarray, name: str, power: int) -> np.ndarray:
        """Apply a method of each control's law to all rows and steps at once, times a power of the weight."""
        rows, part = np.asarray(rows, dtype=float), self.layout.part
        out = np.empty(rows.shape)
        for control, field in self._fields.items():
            source = part(rows, control)
            block = source.reshape(math.prod(source.shape[:-1]), field.size)
            part(out, control)[...] = getattr(field, name)(block).reshape(source.shape)
            if control in self.layout.evolution.stepwise:
                part(out, control)[...] *= self.layout.evolution.dt**power
        return out

    def covariance(self, rows: np.ndarray, *, shared: bool = True) -> np.ndarray:
        """Return the products with the covariance, all rows and steps of a control in one block of solves."""
        products = self._products(rows, "covariance", -1)
        return self._share(products) if shared else products

    def precision(self, rows: np.ndarray) -> np.ndarray:
        """Return the products with the precision."""
        return self._share(self._products(rows, "precision", 1))

    def sample(self, count: int, seed: int) -> np.ndarray:
        """Return samples of all controls."""
        require_same(self.layout.spacetime.comm, count=count, seed=seed)
        for name, number in (("count", count), ("seed", seed)):
            if not is_integer(number) or number < 0:
                raise InputError(f"samples: {name} = {number!r}: give a whole number of at least 0")
        out = np.empty((count, self.layout.size))
        for i, (control, field) in enumerate(self._fields.items()):
            target, slab = self.layout.part(out, control), self.layout.slab
            stepwise = control in self.layout.evolution.stepwise
            numbers = range(1 + slab.lo, 1 + slab.hi) if stepwise else [0]
            drawn = field.samples([(int(seed), i, n) for n in numbers], int(count)) / np.sqrt(self._weight(control))
            target[...] = drawn.reshape(target.shape)
        return self._share(out)

    def variance(self, samples: int | None = None) -> np.ndarray:
        """Return the variances, computed once for all steps of a control."""
        require_same(self.layout.spacetime.comm, samples=samples)
        if samples is not None and (not is_integer(samples) or samples < 1):
            raise InputError(f"variance: samples = {samples!r}: give a whole number of at least 1, or None")
        out = np.empty(self.layout.size)
        for control, field in self._fields.items():
            found = field.variance(samples, self.layout.spacetime.time_comm)
            self.layout.part(out, control)[...] = found / self._weight(control)
        return self._share(out)

    def log_det_precision(self) -> float | None:
        """Return the logarithm of the determinant of the precision of all steps."""
        total = 0.0
        for control, field in self._fields.items():
            if field.log_det_precision is None:
                return None
            one = field.log_det_precision + control.function_space().dim() * float(np.log(self._weight(control)))
            total += _repeats(self.layout, control) * one
        return total


def riesz_fields(layout: ControlLayout, inner: Any) -> list[GaussianField]:
    """Return the laws whose precisions are an inner product's Riesz maps (collective).

    Parameters
    ----------
    layout
        The controls.
    inner
        An object with ``maps``, for each control an object with ``primal``, ``dual``, ``diagonal`` and ``form``
        (:class:`pint_fem.adjoint.riesz.ControlInner`).
    """
    made: list[GaussianField] = []
    for control in _all_controls(layout):
        space, riesz = control.function_space(), inner.maps[control]
        if riesz.diagonal is not None:
            made.append(DiagonalField(space, riesz.diagonal, control.name()))
        elif riesz.form is not None:
            made.append(FormField(space, riesz.form, control.name()))
        else:
            made.append(MapField(space, riesz))
    return made


def make_prior(
    given: Any,
    layout: ControlLayout,
    *,
    regularisation_forms: Sequence[ufl.Form | None] | None = None,
    regularisation_gradient: np.ndarray | None = None,
    mean: np.ndarray | None = None,
    inner: Any = None,
) -> Prior:
    """Return the prior that a user describes (collective).

    Parameters
    ----------
    given
        ``None`` for that of the regularisation; a symmetric positive definite bilinear form, a
        :class:`~pint_fem.inverse.laws.covariance_fields.BilaplacianPrior` or one of Firedrake's covariance operators,
        for one control or for all; a list with one of these for each control, ``None`` for the regularisation's; the
        string ``"riesz_map"``; or a :class:`Prior`.
    layout
        The controls.
    regularisation_forms
        The second derivative of the regularisation by each control, in the order of the evolution's ``controls``,
        ``None`` where it is zero or not constant.
    regularisation_gradient
        The derivative of the regularisation at zero, ``(size,)``; where the prior is that of the regularisation, the
        mean is then its minimiser.
    mean
        The mean ``(size,)``; default: zero, that of a given prior, or the regularisation's minimiser.
    inner
        The inner product of ``"riesz_map"``, as for :func:`riesz_fields`.

    Raises
    ------
    InputError
        On every rank, if what is given is none of these or does not fit the controls.
    """
    controls = _all_controls(layout)
    if isinstance(given, Prior):
        same = given.layout is layout or (
            given.layout.evolution.controls == controls and given.layout.size == layout.size
        )
        if not all_ranks(layout.spacetime.comm, same):
            raise InputError("prior: the Prior is one of other controls: make it with this functional's controls")
        return given if mean is None else given.with_mean(mean)
    if isinstance(given, str):
        if given != "riesz_map" or inner is None:
            raise InputError(f"prior {given!r}: the only name is 'riesz_map', where there is a Riesz map: {_FITTING}")
        return FieldPrior(layout, riesz_fields(layout, inner), mean)
    if isinstance(given, (list, tuple)):
        each = list(given)
        if len(each) != len(controls):
            raise InputError(f"prior: a list of {len(each)} for {len(controls)} controls: give one for each control")
    elif given is None or isinstance(given, (BilaplacianPrior, ufl.Form, CovarianceOperatorBase, GaussianField)):
        each = [given] * len(controls)
    else:
        raise InputError(f"prior: {given!r}: {_FITTING}")
    forms = [None] * len(controls) if regularisation_forms is None else list(regularisation_forms)
    fields = []
    for control, one, form in zip(controls, each, forms, strict=True):
        if one is None and form is None:
            raise InputError(
                f"prior: the regularisation has no constant second derivative by the control {control.name()!r}: add a "
                "quadratic term such as 0.5e-2*inner(q, q)*dx to it, or give prior="
            )
        fields.append(gaussian_field(control.function_space(), form if one is None else one, control.name()))
    made = FieldPrior(layout, fields, mean)
    if given is None and mean is None and regularisation_gradient is not None:
        made.mean = -made.covariance(regularisation_gradient)
    return made


_FITTING = (
    "give a bilinear form, a BilaplacianPrior, one of Firedrake's covariance operators, a list with one of these for "
    "each control, a Prior, 'riesz_map', or None for the regularisation"
)

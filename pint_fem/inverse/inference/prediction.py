r"""Means and standard deviations of linear functionals of the state and of the controls under a Gaussian law.

For functionals :math:`P z + y_0`, the rows of a map, the law :math:`N(z, \mathrm{Cov})` of the controls gives
:math:`N(P z + y_0,\ P\, \mathrm{Cov}\, P^T)`. With reduced rows :math:`P = Q C` the covariance is applied to the rows
of :math:`C`. No sweep is needed: the rows of readings at points and times without sensors are computed with the map.
A functional of the controls alone has its derivative as the only row.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import ufl
from firedrake import Function, TestFunction, derivative
from firedrake.assemble import get_assembler
from scipy.special import erfinv
from ufl.algorithms import expand_derivatives, extract_coefficients

from pint_fem.errors import InputError
from pint_fem.evolution.control_layout import ControlLayout
from pint_fem.evolution.quadrature import with_fixed_degrees
from pint_fem.inverse.readings import ReadingTable
from pint_fem.kernels.arrays import get
from pint_fem.misfits.sensor_readings import SensorReadings

if TYPE_CHECKING:
    from pint_fem.inverse.inference.gaussian_law import GaussianLaw
    from pint_fem.inverse.map import ParameterToObservable

__all__ = ["FunctionalPrediction", "Prediction", "functional", "predict", "require_predictions", "value_and_derivative"]


def deviations(probability: float) -> float:
    """The number of standard deviations around the mean between which a Gaussian variable is with a probability; one
    that is not between 0 and 1 is an ``InputError``.
    """
    if not 0 < probability < 1:
        raise InputError(f"band: probability = {probability!r}: give a number between 0 and 1, such as 0.95")
    return float(np.sqrt(2) * erfinv(probability))


class FunctionalPrediction(NamedTuple):
    """A functional of the controls: its mean and its standard deviation."""

    mean: float
    standard_deviation: float

    def band(self, probability: float = 0.95) -> tuple[float, float]:
        """The limits between which the functional is with a probability."""
        width = deviations(probability) * self.standard_deviation
        return self.mean - width, self.mean + width


@dataclass(frozen=True)
class Prediction:
    """Predicted readings.

    Attributes
    ----------
    mean, standard_deviation : ndarray, shape (p,)
        Of each reading without noise, in the order of data vectors.
    """

    mean: np.ndarray
    standard_deviation: np.ndarray
    _table: ReadingTable = field(repr=False)

    def band(self, probability: float = 0.95, *, noise: float | np.ndarray = 0.0) -> tuple[np.ndarray, np.ndarray]:
        """The limits between which each reading is with a probability, ``(p,)`` each.

        Parameters
        ----------
        probability
            Between 0 and 1.
        noise
            Standard deviation of the readings' own noise, a number or ``(p,)``; default: what is predicted is the state
            itself.

        Raises
        ------
        InputError
            If the probability or the noise does not fit.
        """
        deviation = np.asarray(noise, dtype=float)
        if deviation.shape not in ((), self.mean.shape) or not (deviation >= 0).all():
            raise InputError(f"band: noise = {noise!r}: give a standard deviation, or {self.mean.shape} of them")
        width = deviations(probability) * np.hypot(self.standard_deviation, deviation)
        return self.mean - width, self.mean + width

    def split(self, values: np.ndarray) -> list[np.ma.MaskedArray]:
        """Values ``(p,)``, such as :attr:`mean`, as one array ``(times, sensors)`` for each of the given objects."""
        return self._table.split(values)


def require_predictions(given: object) -> list:
    """A list of what is to be predicted; what are no readings of sensors is an ``InputError``."""
    each = list(given) if isinstance(given, (list, tuple)) else [given]
    for one in each:
        if not isinstance(one, SensorReadings):
            raise InputError(
                f"predict: {one!r}: give PointSensors or LinearObservations, of which the values do not matter"
            )
    return each


def predict(law: GaussianLaw, P: ParameterToObservable) -> Prediction:
    """Readings of a map under a law of its controls (collective).

    Parameters
    ----------
    law
        The law.
    P
        A map of the same controls.
    """
    p, own = P.shape[0], P.partition.own
    Q = np.eye(p) if P.layout.evolution.stepwise else P.reduced.expand(np.eye(P.reduced.size), p).T
    g = P.transposed_product(np.ascontiguousarray(Q.T))
    covariance = P.spacetime.sum_over_grid(g[:, own] @ law.covariance(g)[:, own].T)
    variance = np.einsum("ij,jk,ik->i", Q, covariance, Q, optimize=True)
    return Prediction(P.predict(law.x), np.sqrt(np.maximum(variance, 0.0)), P.table)


def value_and_derivative(form: ufl.Form, layout: ControlLayout) -> tuple[float, np.ndarray]:
    """A functional that is affine in the controls: its value at zero, and its derivative, a dual vector (collective
    over space).

    Raises
    ------
    InputError
        If it is no functional, is not affine, has no control, or one with a value per step.
    """
    if not isinstance(form, ufl.Form) or form.arguments():
        raise InputError(f"functional: {form!r}: give a UFL functional of the controls, such as q*dx, or a cofunction")
    controls = layout.evolution.controls
    there = [c for c in controls if c in extract_coefficients(form)]
    if not there:
        raise InputError("functional: the form contains no control: give a functional of the controls, such as q*dx")
    if any(c in layout.evolution.stepwise for c in there):
        raise InputError(
            "functional: the form contains a control with one value per step: give the derivative as a cofunction of "
            "all steps"
        )
    zeros = {c: Function(c.function_space()) for c in there}
    at_zero = with_fixed_degrees(ufl.replace(form, zeros))
    g = np.zeros(layout.size)
    for control, zero in zeros.items():
        by = expand_derivatives(derivative(at_zero, zero, TestFunction(zero.function_space())))
        if set(zeros.values()) & set(extract_coefficients(by)):
            raise InputError(f"functional: the form is not affine in {control.name()!r}: give one that is")
        if not by.empty():
            layout.part(g, control)[...] = get(get_assembler(by).assemble())
    return float(get_assembler(at_zero).assemble()), g


def functional(law: GaussianLaw, value: float, g: np.ndarray) -> FunctionalPrediction:
    """The functional ``value + g z`` under a law (collective)."""
    layout = law.F.layout
    variance = layout.pairing(g, law.covariance(g))
    return FunctionalPrediction(value + layout.pairing(g, law.x), float(np.sqrt(max(variance, 0.0))))

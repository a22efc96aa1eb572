r"""Inverse problems for coefficients from several experiments: their readings, misfits, and what was recovered.

The experiments share the operators and differ in loads, boundary values or places of sensors. Their readings are in
one CSV file of the form of :mod:`problems.readings`, with the name of the experiment before the name of the sensor::

    experiment,sensor,x,y,time,temperature
    0,0,0.25,0.12,0.03125,0.0374

An experiment has its own sensors and reading times; each of its sensors has one reading at each of these. With ``n``
readings in all and noise of standard deviation :math:`\sigma`, the misfits

.. math::  \frac{1}{2 n \sigma^2} \sum_e \sum_r \sum_s (u_e(x_s, t_r) - d_{ers})^2

add up to 1/2 where coefficients explain the readings up to their noise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from firedrake import Function, SpatialCoordinate, assemble, conditional, dx, inner
from ufl.core.expr import Expr

from pint_fem.adjoint.functional import ControlFunctional
from pint_fem.errors import InputError
from pint_fem.evolution.evolution import Evolution
from pint_fem.misfits import PointSensors
from pint_fem.misfits.sensor_readings import SensorReadings
from pint_fem.spacetime import SpaceTime
from problems.readings import Readings, checked_rows, noise_deviation, reading_lines, readings_of_rows

__all__ = [
    "Coefficient",
    "CoefficientProblem",
    "ExperimentReadings",
    "Inclusion",
    "columns_of",
    "point_misfits",
    "read_experiments",
    "relative_error",
    "with_noise",
    "write_experiments",
]

_DEGREE = 8
"""Of the quadrature of functions that jump at the edges of inclusions."""


# -- readings ----------------------------------------------------------------------------------------------------------
def columns_of(*quantities: str) -> tuple[str, ...]:
    """Return the line of column names of a file with the readings of some quantities, such as ``"temperature"``."""
    return ("experiment", "sensor", "x", "y", "time", *quantities)


@dataclass(frozen=True)
class ExperimentReadings:
    """Readings of several experiments.

    Attributes
    ----------
    names : tuple of str
        Of the experiments, in the order in which the file first names them.
    readings : tuple of Readings
        One for each experiment.
    path : pathlib.Path
        The file they come from.
    """

    names: tuple[str, ...]
    readings: tuple[Readings, ...]
    path: Path

    @property
    def count(self) -> int:
        """The number of readings of all experiments; masked ones are missing."""
        return sum(int(np.ma.count(r.values)) for r in self.readings)

    def deviation(self, noise: float) -> float:
        """Return the standard deviation of noise that is given relative to the largest reading of all experiments.

        Raises
        ------
        InputError
            If all readings are zero, or the noise is out of range.
        """
        largest = max(float(np.abs(r.values).max()) for r in self.readings)
        return noise_deviation(self.path, largest, self.count, noise)

    def weight(self, noise: float) -> float:
        """Return one over the noise's variance and the number of all readings, the weight of each squared residual."""
        return 1 / (self.deviation(noise) ** 2 * self.count)


def read_experiments(
    path: str | Path | ExperimentReadings, final_time: float, columns: tuple[str, ...], *, count: int
) -> ExperimentReadings:
    """Read and check a file of the readings of several experiments.

    Parameters
    ----------
    path
        A CSV file as described in the module's docstring; what has been read is returned as it is.
    final_time
        End of the simulated interval (0, final_time]; later readings are refused.
    columns
        The line of column names, of :func:`columns_of`.
    count
        Number of experiments, whose names in the file are ``0``, ``1``, ... ``count - 1``.

    Returns
    -------
    ExperimentReadings
        In the order of the numbers.

    Raises
    ------
    InputError
        If the file cannot be read, a line of it cannot be used, or an experiment is missing or unknown; the message
        names the file and the line.
    """
    if isinstance(path, ExperimentReadings):
        return path
    path, known = Path(path), [str(e) for e in range(count)]
    rows: dict[str, list[tuple[int, list[str]]]] = {}
    for line, (name, *fields) in checked_rows(path, columns):
        if name not in known:
            raise InputError(
                f"{path}:{line}: unknown experiment (got '{name}'; the {count} experiments are called 0 to {count - 1})"
            )
        rows.setdefault(name, []).append((line, fields))
    if missing := [name for name in known if name not in rows]:
        raise InputError(
            f"{path}: no readings of experiment {', '.join(missing)} (give readings of all {count} experiments, 0 to "
            f"{count - 1})"
        )
    own = tuple(readings_of_rows(path, rows[name], final_time, columns[1:]) for name in known)
    return ExperimentReadings(tuple(known), own, path)


def with_noise(values: Sequence[np.ndarray], noise: float, seed: int) -> tuple[list[np.ndarray], float]:
    """Return readings with Gaussian noise, and the noise's standard deviation.

    Parameters
    ----------
    values
        An array for each experiment.
    noise
        Standard deviation over the largest absolute reading of all experiments.
    seed
        Of ``numpy.random.default_rng``.
    """
    sigma, random = noise * max(float(np.abs(v).max()) for v in values), np.random.default_rng(seed)
    return [v + sigma * random.standard_normal(v.shape) for v in values], sigma


def write_experiments(
    path: str | Path,
    points: Sequence[np.ndarray],
    times: np.ndarray,
    values: Sequence[np.ndarray],
    *,
    columns: tuple[str, ...],
    comments: Sequence[str] = (),
) -> None:
    """Write the readings of experiments ``0``, ``1``, ... as :func:`read_experiments` reads them.

    Parameters
    ----------
    path
        File to write.
    points
        ``(ns, 2)`` places of the sensors of each experiment.
    times
        ``(nt,)`` reading times of all experiments.
    values
        ``(nt, ns)``, or ``(nt, ns, nq)`` for several quantities, for each experiment.
    columns
        The line of column names, of :func:`columns_of`.
    comments
        Lines at the beginning of the file, without ``#``.
    """
    lines = [*(f"# {line}" for line in comments), ",".join(columns)]
    for e, (at, table) in enumerate(zip(points, values, strict=True)):
        lines += reading_lines(at, times, table, before=f"{e},")
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")


def point_misfits(
    data: ExperimentReadings,
    noise: float,
    quantities: Sequence[tuple[int | None, int | None]] = ((None, None),),
) -> list[list[PointSensors]]:
    """Return the misfits of each experiment, which add up to 1/2 at the noise.

    Parameters
    ----------
    data
        Readings of points.
    noise
        Standard deviation of the noise relative to the largest reading.
    quantities
        Field and component of the state that each quantity is.

    Raises
    ------
    InputError
        If all readings are zero, or the noise is out of range.
    """
    weight, misfits = data.weight(noise), []
    for own in data.readings:
        values = own.values if own.values.ndim == 3 else own.values[..., None]
        misfits.append(
            [
                PointSensors(own.points, own.times, values[..., i], weight=weight, field=field, component=component)
                for i, (field, component) in enumerate(quantities)
            ]
        )
    return misfits


# -- coefficients ------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Inclusion:
    """An ellipse in which a coefficient differs from its background by a factor.

    Attributes
    ----------
    name : str
    centre, radii : tuple of float
    contrast : float
        The factor.
    angle : float
        Of the first radius with the first axis.
    """

    name: str
    centre: tuple[float, float]
    radii: tuple[float, float]
    contrast: float
    angle: float = 0.0

    def inside(self, x, scale: float = 1.0) -> Expr:
        """Return 1 in the ellipse with radii multiplied by ``scale``, 0 elsewhere, in UFL.

        Parameters
        ----------
        x
            A ``SpatialCoordinate``.
        scale
            Smaller than 1 for the inner part, away from the edge.
        """
        c, s = np.cos(self.angle), np.sin(self.angle)
        dx0, dx1 = x[0] - self.centre[0], x[1] - self.centre[1]
        along, across = c * dx0 + s * dx1, c * dx1 - s * dx0
        a, b = (scale * radius for radius in self.radii)
        return conditional((along / a) ** 2 + (across / b) ** 2 <= 1.0, 1.0, 0.0)

    def recovered(self, factor: Expr, mesh, scale: float = 0.7) -> float:
        """Return the mean of a coefficient over its background in the inner part of the inclusion (collective).

        Parameters
        ----------
        factor
            The coefficient over its background, on ``mesh``.
        mesh
            Its mesh.
        scale
            Of the radii of the inner part.
        """
        inside = self.inside(SpatialCoordinate(mesh), scale)
        measure = dx(domain=mesh, degree=_DEGREE)
        return float(assemble(inside * factor * measure) / assemble(inside * measure))


@dataclass(frozen=True)
class Coefficient:
    """A coefficient that is sought.

    Attributes
    ----------
    control : Function
        What parametrises it.
    name, label : str
        For sentences and for the colour bars of pictures: the quantity of ``shown`` with its unit.
    factor : callable
        The coefficient over its background, from the control: ``exp``.
    shown : callable
        What pictures show, from the control: ``lambda q: q / ln(2)``.
    truth : ufl Expr
        The control behind the shipped readings.
    inclusions : tuple of Inclusion
        Of that.
    """

    control: Function
    name: str
    label: str
    factor: Callable[[Expr], Expr]
    shown: Callable[[Expr], Expr]
    truth: Expr
    inclusions: tuple[Inclusion, ...]


def relative_error(found: Function, truth: Expr) -> float:
    """Return the relative L2 difference of a function from an expression, which may jump (collective)."""
    measure = dx(domain=found.function_space().mesh(), degree=_DEGREE)
    square = lambda f: assemble(inner(f, f) * measure)
    return float(np.sqrt(square(found - truth) / square(truth)))


@dataclass
class CoefficientProblem:
    """A posed problem of several experiments.

    Attributes
    ----------
    spacetime : SpaceTime
    data : ExperimentReadings
    evolutions : list of Evolution
        One for each experiment, with the same operators and controls.
    misfits : list of list of SensorReadings
        Of each experiment, one for each quantity.
    rf : ControlFunctional
    coefficients : list of Coefficient
        In the order of the controls of ``rf``.
    priors : list of callable
        ``prior(a, b)`` makes the bilinear form of each control's inner product, that of the trust region.
    sources : ndarray, shape (experiments, 2)
        Where each experiment heats or transmits, for pictures.
    bounds : pair or None
        Of the controls, as :meth:`~pint_fem.TimeParallelReducedFunctional.minimize_trust_region` takes them.
    """

    spacetime: SpaceTime
    data: ExperimentReadings
    evolutions: list[Evolution]
    misfits: list[list[SensorReadings]]
    rf: ControlFunctional
    coefficients: list[Coefficient]
    priors: list[Callable]
    sources: np.ndarray
    bounds: tuple | None = None

    def predicted(self, z: np.ndarray) -> list[np.ndarray]:
        """Return the readings ``(nt, ns, quantities)`` of each experiment at a control's state (collective)."""
        readings = self.rf.problem.readings
        return [np.stack([readings(z, m) for m in own], axis=-1) for own in self.misfits]

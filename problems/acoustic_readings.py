"""Make `acoustic_readings.csv`, what the receivers would read of the eight shots, with noise; filter it to bands.

    python -m problems.acoustic_readings

Little of the discretisation is shared with the inverse problem: the mesh has twice as many cells per kilometre, the
integrator is Alexander's L-stable method of order 3, steps are less than half as long, and the speed jumps between
quadrature points instead of being a function of a finite element space. The speed is fixed, and the steps are those of
a linear evolution whose control is the shape of the source: one factorisation serves all shots. Takes about a minute
on one core, and runs on one process.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from firedrake import COMM_SELF, Function, FunctionSpace, SpatialCoordinate
from firedrake.mesh import MeshGeometry
from irksome import Alexander

from pint_fem.adjoint import TimeParallelReducedFunctional
from pint_fem.errors import InputError
from pint_fem.evolution import Evolution, time_function
from pint_fem.misfits import PointSensors
from pint_fem.spacetime import SpaceTime
from problems.acoustic import P, V, free_surface, residual, state_space
from problems.acoustic_setting import (
    CELLS,
    COLUMNS,
    FINAL_TIME,
    PEAK_FREQUENCY,
    RECEIVERS,
    RECORD_END,
    SAMPLING,
    SHOTS,
    SURFACE,
    WALLS,
    damping,
    filter_width,
    ground_mesh,
    low_pass,
    ricker,
    shot_shape,
    true_speed,
)
from problems.experiments import ExperimentReadings, with_noise, write_experiments
from problems.readings import Readings

__all__ = ["NOISE", "READINGS", "SEED", "STEPS_PER_SAMPLE", "BandReadings", "filtered", "simulate", "write"]

READINGS = Path(__file__).resolve().parent / "acoustic_readings.csv"
FINER = 2
STEPS_PER_SAMPLE = 5
NOISE = 0.02
SEED = 20263
_SHAPE_DEGREE = 4
"""Of the elements of the sources' shapes."""


def simulate(
    mesh: MeshGeometry, shots: Sequence[np.ndarray] = SHOTS, *, samples: int = round(RECORD_END / SAMPLING),
    steps_per_sample: int = STEPS_PER_SAMPLE, degree: int = 2, frequency: float = PEAK_FREQUENCY,
) -> list[np.ndarray]:  # fmt: skip
    """Return the pressure at the receivers after each shot with the true speed, without noise.

    Parameters
    ----------
    mesh
        A mesh of the section on one process.
    shots
        ``(2,)`` places.
    samples
        Number of reading times, k SAMPLING, k = 1, ..., samples.
    steps_per_sample, degree
        Time steps between samples, and degree of the elements.
    frequency
        Peak frequency of the pulse.

    Returns
    -------
    list of numpy.ndarray, shape (samples, receivers)
    """
    space, x, t = state_space(mesh, degree), SpatialCoordinate(mesh), time_function(mesh)
    u, shape = Function(space, name="field"), Function(FunctionSpace(mesh, "CG", _SHAPE_DEGREE), name="shape")
    evolution = Evolution(
        residual(u, true_speed(x), source=ricker(t, frequency) * shape, damping=damping(x), walls=WALLS), u,
        tableau=Alexander(), dt=SAMPLING / steps_per_sample, nsteps=samples * steps_per_sample, control=shape, t=t,
        bcs=free_surface(space, SURFACE), eliminate=V,
    )  # fmt: skip
    times = SAMPLING * np.arange(1, samples + 1)
    receivers = PointSensors(RECEIVERS, times, np.zeros((samples, len(RECEIVERS))), field=P)
    rf = TimeParallelReducedFunctional(
        evolution, receivers, spacetime=SpaceTime("1x1", comm=COMM_SELF), solver_parameters={"time_solver": "serial"}
    )
    values = []
    for place in shots:
        z = rf.array(Function(shape.function_space()).interpolate(shot_shape(x, place)))
        values.append(receivers.readings(rf.problem.observations(z, receivers)))
    return values


def write(path: str | Path, values: list[np.ndarray], *, noise: float = NOISE, seed: int = SEED) -> None:
    """Add noise to the readings of all shots and write them as :mod:`problems.experiments` reads them.

    Parameters
    ----------
    path
        File to write.
    values
        ``(nt, receivers)`` for each shot, at the times k SAMPLING, k = 1, ..., nt.
    noise
        Standard deviation of the Gaussian noise over the largest absolute reading of all shots.
    seed
        Of ``numpy.random.default_rng``.
    """
    noisy, sigma = with_noise(values, noise, seed)
    comments = [
        "Pressure at the receivers after each of eight shots, simulated: made by",
        "'python -m problems.acoustic_readings'.",
        f"mesh: {FINER * CELLS} cells per km, degree 2; integrator: Alexander, {STEPS_PER_SAMPLE} steps a sample; "
        f"speed: problems.acoustic_setting.true_speed; Ricker pulse of {PEAK_FREQUENCY:g} Hz",
        f"noise: Gaussian, standard deviation {noise:g} of the largest absolute reading ({sigma:.6g}); numpy "
        f"default_rng({seed})",
    ]
    times = (SAMPLING * np.arange(1, len(values[0]) + 1)).round(10)
    write_experiments(path, [RECEIVERS] * len(values), times, noisy, columns=COLUMNS, comments=comments)


@dataclass(frozen=True)
class BandReadings(ExperimentReadings):
    """Readings that a low-pass filter was applied to.

    Attributes
    ----------
    unfiltered : ExperimentReadings
    gain : float
        Standard deviation of filtered white noise over that of the noise.
    """

    unfiltered: ExperimentReadings
    gain: float

    def deviation(self, noise: float) -> float:
        """Return the standard deviation of the filtered noise, which is given relative to the largest reading before
        the filter.

        Raises
        ------
        InputError
            If all readings are zero, or the noise is out of range.
        """
        return self.gain * self.unfiltered.deviation(noise)


def filtered(data: ExperimentReadings, band: float, *, final_time: float = FINAL_TIME) -> BandReadings:
    """Return readings of the shots' pulse as those of the pulse filtered to a band, within the simulated interval.

    Parameters
    ----------
    data
        Readings of all shots, at evenly spaced times.
    band
        Peak frequency; readings whose filter lacks samples, those after ``RECORD_END`` less four widths of the filter,
        are left out.
    final_time
        End of the simulated interval.

    Raises
    ------
    InputError
        If times are not evenly spaced, readings are missing, or the band is above the pulse's or leaves no reading.
    """
    width, own = filter_width(band), []
    for of in data.readings:
        steps = np.diff(of.times)
        if len(steps) == 0 or np.ptp(steps) > 1e-6 * steps.mean() or np.ma.is_masked(of.values):
            raise InputError(f"{data.path}: filters require all readings of a receiver, at evenly spaced times")
        kept = of.times <= min(final_time, of.times[-1] - 4 * width) + 1e-9
        if not kept.any():
            raise InputError(f"{data.path}: the record ends too early for a filter to {band:g} Hz; give a higher band")
        matrix = low_pass(of.times, width)[kept]
        own.append(Readings(of.points, of.times[kept], np.asarray(matrix @ of.values), of.path, of.sensors))
        gain = float(np.sqrt((matrix**2).sum(axis=1).max()))
    return BandReadings(data.names, tuple(own), data.path, data, gain)


def main() -> None:
    """Simulate, write the file and print what is in it."""
    start = time.perf_counter()
    values = simulate(ground_mesh(FINER * CELLS, COMM_SELF))
    write(READINGS, values)
    print(
        f"{READINGS}: {len(values)} shots, {values[0].shape[1]} receivers, {len(values[0])} times, largest reading "
        f"{max(np.abs(v).max() for v in values):.4f} before noise, {time.perf_counter() - start:.0f} s"
    )


if __name__ == "__main__":
    main()

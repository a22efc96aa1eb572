"""Make `heat_box_readings.csv`: what the sensors in the box would read, with noise.

    python -m problems.heat_box_readings

Nothing of the discretisation is shared with the inverse problem: elements are quadratic on a mesh of 18 cells along a
side, which is in none of its hierarchies, the integrator is Alexander's L-stable method of order 3 with 128 steps, and
the source is not a function of a finite element space but for interpolation of degree 3. Takes some minutes on one
core, and runs on one process.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
from firedrake import COMM_SELF, Function, FunctionSpace, SpatialCoordinate, TestFunction, UnitCubeMesh
from irksome import Alexander

from pint_fem.adjoint import TimeParallelReducedFunctional
from pint_fem.evolution import Evolution
from pint_fem.misfits import PointSensors
from pint_fem.spacetime import SpaceTime
from problems.experiments import with_noise
from problems.heat_box_setting import (
    COLUMNS,
    FINAL_TIME,
    SENSORS,
    boundary_conditions,
    initial_temperature,
    residual,
    true_source,
)
from problems.readings import write_readings

__all__ = ["NOISE", "READINGS", "SEED", "STEPS", "TIMES", "simulate", "write"]

READINGS = Path(__file__).resolve().parent / "heat_box_readings.csv"
CELLS_OF_READINGS = 18
STEPS = 128
TIMES = 16
NOISE = 0.02
SEED = 20264


def simulate(cells: int = CELLS_OF_READINGS, *, steps: int = STEPS, times: int = TIMES, degree: int = 2) -> np.ndarray:
    """Return the temperature rise at the sensors that the true source causes, without noise, ``(times, sensors)``.

    Parameters
    ----------
    cells, degree
        Cells along a side, a multiple of 6, and degree of the elements.
    steps, times
        Numbers of time steps and of reading times, which are evenly spaced up to ``FINAL_TIME``.
    """
    mesh = UnitCubeMesh(cells, cells, cells, comm=COMM_SELF)
    V, x = FunctionSpace(mesh, "CG", degree), SpatialCoordinate(mesh)
    u = Function(V, name="temperature").interpolate(initial_temperature(x))
    q = Function(FunctionSpace(mesh, "CG", 3), name="source").interpolate(true_source(x))
    evolution = Evolution(
        residual(u, TestFunction(V), q), u, tableau=Alexander(), dt=FINAL_TIME / steps, nsteps=steps, control=q,
        bcs=boundary_conditions(V),
    )  # fmt: skip
    at = FINAL_TIME * np.arange(1, times + 1) / times
    sensors = PointSensors(SENSORS, at, np.zeros((times, len(SENSORS))))
    rf = TimeParallelReducedFunctional(
        evolution, sensors, spacetime=SpaceTime("1x1", comm=COMM_SELF), solver_parameters={"time_solver": "serial"}
    )
    return rf.problem.readings(rf.array(q), sensors)


def write(path: str | Path, values: np.ndarray, *, how: str = "", noise: float = NOISE, seed: int = SEED) -> None:
    """Add noise to readings and write them as :mod:`problems.readings` reads them.

    Parameters
    ----------
    path
        File to write.
    values
        ``(times, sensors)``, at evenly spaced times up to ``FINAL_TIME``.
    how
        A line on what made them.
    noise, seed
        Standard deviation of the Gaussian noise over the largest absolute reading; of ``numpy.random.default_rng``.
    """
    (noisy,), sigma = with_noise([values], noise, seed)
    comments = [
        "Temperature rise at sensors in and on a box, simulated: made by 'python -m problems.heat_box_readings'.",
        f"{how}; source: problems.heat_box_setting.true_source",
        f"noise: Gaussian, standard deviation {noise:g} of the largest absolute reading ({sigma:.6g}); numpy "
        f"default_rng({seed})",
    ]
    times = FINAL_TIME * np.arange(1, len(values) + 1) / len(values)
    write_readings(path, SENSORS, times, noisy, columns=COLUMNS, comments=comments)


def main() -> None:
    """Simulate, write the file and print what is in it."""
    start, n = time.perf_counter(), CELLS_OF_READINGS
    values = simulate()
    write(READINGS, values, how=f"mesh: {n} x {n} x {n} cells, degree 2; integrator: Alexander, {STEPS} steps")
    print(
        f"{READINGS}: {values.shape[1]} sensors, {values.shape[0]} times, largest reading {np.abs(values).max():.4f} "
        f"before noise, {time.perf_counter() - start:.0f} s"
    )


if __name__ == "__main__":
    main()

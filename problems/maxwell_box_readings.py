"""Make `maxwell_box_readings.csv`: what the antennas in the cavity would read, with noise.

    python -m problems.maxwell_box_readings

Little of the discretisation is shared with the inverse problem: elements are of degree 2 on a mesh of 12 cells along a
side, which is in none of its hierarchies, the integrator is Alexander's L-stable method of order 3 with 192 steps, and
the current is not a function of its finite element space. Takes some minutes on one core, and runs on one process.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
from firedrake import COMM_SELF, Function, SpatialCoordinate, UnitCubeMesh, VectorFunctionSpace, split
from irksome import Alexander

from pint_fem.adjoint import TimeParallelReducedFunctional
from pint_fem.evolution import Evolution, time_function
from pint_fem.misfits import LinearObservations
from pint_fem.spacetime import SpaceTime
from problems.experiments import with_noise
from problems.maxwell import B, E, Medium, perfect_conductor, residual, state_space
from problems.maxwell_box_setting import ANTENNAS, COLUMNS, SETTING, antenna_functionals, true_current
from problems.maxwell_setting import signal
from problems.readings import write_readings

__all__ = ["NOISE", "READINGS", "SEED", "STEPS", "TIMES", "simulate", "write"]

READINGS = Path(__file__).resolve().parent / "maxwell_box_readings.csv"
CELLS_OF_READINGS = 12
STEPS = 192
TIMES = 32
NOISE = 0.02
SEED = 20265


def simulate(cells: int = CELLS_OF_READINGS, *, steps: int = STEPS, times: int = TIMES, degree: int = 2) -> np.ndarray:
    """Return what the antennas read of the true current's field, without noise, ``(times, antennas, 3)``.

    Parameters
    ----------
    cells, degree
        Cells along a side, a multiple of 4, and degree of the elements.
    steps, times
        Numbers of time steps and of reading times, which are evenly spaced.
    """
    mesh = UnitCubeMesh(cells, cells, cells, comm=COMM_SELF)
    space, t, given = state_space(mesh, degree), time_function(mesh), SETTING
    u = Function(space, name="field")
    current = Function(VectorFunctionSpace(mesh, "CG", 2), name="current")
    current.interpolate(true_current(SpatialCoordinate(mesh)))
    form = residual(u, Medium(mesh, given.regions), current=signal(t, given) * current, walls=given.walls)
    evolution = Evolution(
        form, u, tableau=Alexander(), dt=given.final_time / steps, nsteps=steps, control=current, t=t,
        bcs=perfect_conductor(space, given.walls), eliminate=B,
    )  # fmt: skip
    at = given.final_time * np.arange(1, times + 1) / times
    antennas = LinearObservations(antenna_functionals(split(u)[E], mesh), at, np.zeros((times, 3 * len(ANTENNAS))))
    rf = TimeParallelReducedFunctional(
        evolution, antennas, spacetime=SpaceTime("1x1", comm=COMM_SELF), solver_parameters={"time_solver": "serial"}
    )
    return rf.problem.readings(rf.array(current), antennas).reshape(times, len(ANTENNAS), 3)


def write(path: str | Path, values: np.ndarray, *, how: str = "", noise: float = NOISE, seed: int = SEED) -> None:
    """Add noise to readings and write them as :mod:`problems.readings` reads them.

    Parameters
    ----------
    path
        File to write.
    values
        ``(times, antennas, 3)``, at evenly spaced times up to the final one.
    how
        A line on what made them.
    noise, seed
        Standard deviation of the Gaussian noise over the largest absolute reading; of ``numpy.random.default_rng``.
    """
    (noisy,), sigma = with_noise([values], noise, seed)
    comments = [
        "Electric field at antennas in a cavity, simulated: made by 'python -m problems.maxwell_box_readings'.",
        f"{how}; current: problems.maxwell_box_setting.true_current",
        f"noise: Gaussian, standard deviation {noise:g} of the largest absolute reading ({sigma:.6g}); numpy "
        f"default_rng({seed})",
    ]
    times = SETTING.final_time * np.arange(1, len(values) + 1) / len(values)
    write_readings(path, ANTENNAS, times, noisy, columns=COLUMNS, comments=comments)


def main() -> None:
    """Simulate, write the file and print what is in it."""
    start, n = time.perf_counter(), CELLS_OF_READINGS
    values = simulate()
    write(READINGS, values, how=f"mesh: {n} x {n} x {n} cells, degree 2; integrator: Alexander, {STEPS} steps")
    print(
        f"{READINGS}: {values.shape[1]} antennas, {values.shape[0]} times, largest reading {np.abs(values).max():.4g} "
        f"before noise, {time.perf_counter() - start:.0f} s"
    )


if __name__ == "__main__":
    main()

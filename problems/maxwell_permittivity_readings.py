"""Make `maxwell_permittivity_readings.csv`: what the receivers of the ground-penetrating radar would read, with noise.

    python -m problems.maxwell_permittivity_readings

Little of the discretisation is shared with the inverse problem: the mesh has twice as many cells along a side, the
integrator is Alexander's with three stages (order 3), there are twice as many steps, and the coefficients jump at the
edges of the objects, which are on no line of the mesh. They are fixed data, so that all antennas share the operators
and their factors: the unknown of this evolution is the antenna's amplitude. Takes half a minute on one core, and runs
on one process.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
from firedrake import COMM_SELF, Constant, Function, FunctionSpace, SpatialCoordinate
from irksome import Alexander

from pint_fem.adjoint import TimeParallelReducedFunctional
from pint_fem.misfits import PointSensors
from pint_fem.spacetime import SpaceTime
from problems.experiments import with_noise, write_experiments
from problems.maxwell import E
from problems.maxwell_permittivity import COLUMNS, DEGREE, NOISE, READINGS, Soil, evolution_of
from problems.maxwell_soil import ANTENNAS, CELLS, FINAL_TIME, RECEIVERS, STEPS, receivers_of, soil_mesh, true_controls

__all__ = ["SEED", "TIMES", "simulate"]

FINER = 2
TIMES = 64
SEED = 20265


def simulate(
    cells: int = FINER * CELLS,
    *,
    controls=true_controls,
    steps: int = FINER * STEPS,
    times: int = TIMES,
    tableau=None,
    degree: int = DEGREE,
    antennas: Sequence[int] = range(len(ANTENNAS)),
) -> np.ndarray:
    """The field ``(antennas, times, receivers)`` at all receivers, also those that are not read.

    Parameters
    ----------
    cells, degree
        Cells along the depth of the soil, and degree of the elements of E.
    controls
        Makes the logarithms of the factors of permittivity and conductivity from the coordinates.
    steps, times
        Time steps, and number of readings, which are evenly spaced.
    tableau
        Butcher tableau; default: Alexander's.
    antennas
        Numbers of those that send.
    """
    mesh = soil_mesh(cells, COMM_SELF)
    x, place = SpatialCoordinate(mesh), Constant(ANTENNAS[0])
    amplitude = Function(FunctionSpace(mesh, "R", 0), name="amplitude")
    evolution = evolution_of(
        mesh,
        Soil.of_controls(x, *controls(x)),
        place,
        control=amplitude,
        steps=steps,
        tableau=Alexander() if tableau is None else tableau,
        degree=degree,
        amplitude=amplitude,
    )
    at = FINAL_TIME * np.arange(1, times + 1) / times
    sensors = PointSensors(RECEIVERS, at, np.zeros((times, len(RECEIVERS))), field=E, component=0)
    J = TimeParallelReducedFunctional(
        evolution, sensors, spacetime=SpaceTime("1x1", comm=COMM_SELF), solver_parameters={"time_solver": "serial"}
    )
    values = np.empty((len(antennas), times, len(RECEIVERS)))
    for i, k in enumerate(antennas):
        place.assign(ANTENNAS[k])
        J.update_data()
        values[i] = sensors.readings(J.problem.observations(np.ones(1), sensors))
    return values


def main() -> None:
    """Simulate, write the file and print what is in it."""
    start = time.perf_counter()
    simulated = simulate()
    read = [np.isin(RECEIVERS[:, 0], receivers_of(k)[:, 0]) for k in range(len(ANTENNAS))]
    values = [own[:, chosen] for own, chosen in zip(simulated, read, strict=True)]
    noisy, sigma = with_noise(values, NOISE, SEED)
    write_experiments(
        READINGS,
        [RECEIVERS[chosen] for chosen in read],
        FINAL_TIME * np.arange(1, TIMES + 1) / TIMES,
        noisy,
        columns=COLUMNS,
        comments=[
            "Electric field at receivers of a ground-penetrating radar, made by 'python -m "
            "problems.maxwell_permittivity_readings'.",
            f"mesh: {FINER * CELLS} cells along the depth, degree {DEGREE}; Alexander's method, 3 stages, "
            f"{FINER * STEPS} steps; coefficients: problems.maxwell_soil.true_controls",
            f"noise: Gaussian, standard deviation {NOISE:g} of the largest absolute reading ({sigma:.6g}); "
            f"numpy default_rng({SEED})",
        ],
    )
    print(
        f"{READINGS.name}: {sum(v.size for v in values)} readings, the largest {sigma / NOISE:.4g} before noise, "
        f"{time.perf_counter() - start:.0f} s"
    )


if __name__ == "__main__":
    main()

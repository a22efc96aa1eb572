"""Make `heat_conductivity_readings.csv`: what the thermocouples would read in the eight experiments, with noise.

    python -m problems.heat_conductivity_readings

Nothing of the discretisation is shared with the inverse problem, so that its solver is not asked to invert itself: the
mesh is finer (plate_fine.msh), the elements are quadratic, the integrator is Radau IIA with two stages (order 3), there
are more steps, and the conductivity jumps between quadrature points instead of being a function of a finite element
space. Takes some minutes on one core, and runs on one process.
"""

import time
from pathlib import Path

import numpy as np
from firedrake import (
    COMM_WORLD,
    Constant,
    Function,
    FunctionSpace,
    SpatialCoordinate,
    TestFunction,
    exp,
)
from firedrake.mesh import MeshGeometry
from irksome import RadauIIA, TimeStepper

from problems.experiments import with_noise, write_experiments
from problems.heat_conductivity_setting import COLUMNS, HEATERS, THERMOCOUPLES, course, heater, true_log_factor
from problems.heat_readings import sampled
from problems.meshfile import read_mesh
from problems.plate import BOUNDARIES, FINAL_TIME, MESH_FINE, REGIONS, boundary_conditions, residual
from problems.readings import FACTORISE_ONCE

__all__ = ["NOISE", "READINGS", "SEED", "STEPS", "TIMES", "simulate", "write"]

READINGS = Path(__file__).resolve().parent / "heat_conductivity_readings.csv"
STEPS = 256
TIMES = 64
NOISE = 0.02
SEED = 20262


def simulate(mesh: MeshGeometry, number: int, *, steps: int = STEPS, times: int = TIMES, degree: int = 2) -> np.ndarray:
    """Return the temperature rise at the thermocouples in one experiment with the true conductivity, without noise.

    Parameters
    ----------
    mesh
        A mesh of the plate.
    number
        Of the experiment.
    steps, times
        Number of time steps, a multiple of the number of reading times, which are k FINAL_TIME / times, k = 1, ...,
        times.
    degree
        Of the elements.

    Returns
    -------
    numpy.ndarray, shape (times, thermocouples)
    """
    if steps % times:
        raise ValueError(f"steps must be a multiple of times (got {steps} and {times})")
    V, x, t = FunctionSpace(mesh, "CG", degree), SpatialCoordinate(mesh), Constant(0.0)
    # one value per cell and quadrature point would be finer still: the edges of the inclusions are in few cells
    factor = Function(FunctionSpace(mesh, "DG", 0)).project(exp(true_log_factor(x)))
    u, power = Function(V, name="temperature rise"), Function(V).interpolate(heater(x, number))
    stepper = TimeStepper(
        residual(u, TestFunction(V), power * course(t), factor),
        RadauIIA(2),
        t,
        Constant(FINAL_TIME / steps),
        u,
        bcs=boundary_conditions(V),
        solver_parameters=FACTORISE_ONCE,
    )

    def advance() -> None:
        stepper.advance()
        t.assign(float(t) + FINAL_TIME / steps)

    return sampled(u, THERMOCOUPLES, advance, steps=steps, times=times)


def write(path: str | Path, values: list[np.ndarray], *, noise: float = NOISE, seed: int = SEED) -> None:
    """Add noise to the readings of all experiments and write them as :mod:`problems.experiments` reads them.

    Parameters
    ----------
    path
        File to write.
    values
        ``(nt, thermocouples)`` for each experiment, at the times k FINAL_TIME / nt, k = 1, ..., nt.
    noise
        Standard deviation of the Gaussian noise over the largest absolute reading of all experiments.
    seed
        Of ``numpy.random.default_rng``.
    """
    noisy, sigma = with_noise(values, noise, seed)
    nt = len(values[0])
    comments = [
        "Temperature rise at the thermocouples of a plate in eight heating experiments, simulated: made by",
        "'python -m problems.heat_conductivity_readings'.",
        f"mesh: {MESH_FINE.name}, quadratic elements; integrator: Radau IIA, 2 stages, {STEPS} steps up to time "
        f"{FINAL_TIME:g}; conductivity: problems.heat_conductivity_setting.INCLUSIONS",
        f"noise: Gaussian, standard deviation {noise:g} of the largest absolute reading ({sigma:.6f}); numpy "
        f"default_rng({seed})",
    ]
    times, points = FINAL_TIME * np.arange(1, nt + 1) / nt, [THERMOCOUPLES] * len(values)
    write_experiments(path, points, times, noisy, columns=COLUMNS, comments=comments)


def main() -> None:
    """Simulate, write the file and print what is in it."""
    start, mesh = time.perf_counter(), read_mesh(MESH_FINE, COMM_WORLD, REGIONS, BOUNDARIES)
    values = [simulate(mesh, number) for number in range(len(HEATERS))]
    write(READINGS, values)
    print(
        f"{READINGS}: {len(values)} experiments, {values[0].shape[1]} thermocouples, {len(values[0])} times, largest "
        f"reading {max(np.abs(v).max() for v in values):.4f} before noise, {time.perf_counter() - start:.0f} s"
    )


if __name__ == "__main__":
    main()

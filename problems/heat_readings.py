"""Make `heat_readings.csv`: what the sensors in the plate would read, with noise.

    python -m problems.heat_readings

Nothing of the discretisation is shared with the inverse problem, so that its solver is not asked to invert itself: the
mesh is finer (plate_fine.msh), the elements are quadratic, the integrator is Radau IIA with two stages (order 3) and
there are 5,120 steps. Takes about three minutes on one core, and runs on one process.
"""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from firedrake import (
    COMM_WORLD,
    Constant,
    Function,
    FunctionSpace,
    SpatialCoordinate,
    TestFunction,
    assemble,
    interpolate,
)
from irksome import RadauIIA, TimeStepper

from problems.meshfile import locate, read_mesh
from problems.plate import (
    BOUNDARIES,
    FINAL_TIME,
    MESH_FINE,
    REGIONS,
    SENSORS,
    boundary_conditions,
    residual,
    true_source,
)
from problems.readings import COLUMNS, FACTORISE_ONCE

__all__ = ["NOISE", "READINGS", "SEED", "STEPS", "TIMES", "sampled", "simulate", "write"]

READINGS = Path(__file__).resolve().parent / "heat_readings.csv"
STEPS = 5120
TIMES = 64
NOISE = 0.02
SEED = 20261


def simulate(mesh, steps=STEPS, times=TIMES):
    """Temperature rise at the sensors, caused by `problems.plate.true_source`.

    Parameters
    ----------
    mesh : firedrake.mesh.MeshGeometry
        A mesh of the plate.
    steps : int, optional
        Number of time steps, a multiple of `times`.
    times : int, optional
        Number of reading times; they are k FINAL_TIME / times, k = 1, ..., times.

    Returns
    -------
    numpy.ndarray, shape (times, len(SENSORS))
    """
    if steps % times:
        raise ValueError(
            f"steps must be a multiple of times (got {steps} and {times}; {times * -(-steps // times)} steps would do)"
        )
    V = FunctionSpace(mesh, "CG", 2)
    u = Function(V, name="temperature rise")
    q = Function(V, name="source").interpolate(true_source(SpatialCoordinate(mesh)))
    stepper = TimeStepper(
        residual(u, TestFunction(V), q),
        RadauIIA(2),
        Constant(0.0),
        Constant(FINAL_TIME / steps),
        u,
        bcs=boundary_conditions(V),
        solver_parameters=FACTORISE_ONCE,
    )

    return sampled(u, SENSORS, stepper.advance, steps=steps, times=times)


def sampled(u: Function, points, advance: Callable[[], object], *, steps: int, times: int) -> np.ndarray:
    """Values of a function at points while it changes.

    Parameters
    ----------
    u : Function
    points : array_like, shape (points, 2)
    advance : callable
        Takes a time step.
    steps, times : int
        Numbers of steps, a multiple of ``times``, and of evenly spaced times.

    Returns
    -------
    numpy.ndarray, shape (times, points)
    """
    # input_ordering undoes the vertex-only mesh's own numbering of the points
    places = locate(points, u.function_space().mesh())
    ours, given = FunctionSpace(places, "DG", 0), FunctionSpace(places.input_ordering, "DG", 0)
    values = np.empty((times, len(points)))
    for k in range(times):
        for _ in range(steps // times):
            advance()
        values[k] = assemble(interpolate(assemble(interpolate(u, ours)), given)).dat.data_ro
    return values


def write(path, values, noise=NOISE, seed=SEED):
    """Add noise to readings and write them as `problems.readings` reads them.

    Parameters
    ----------
    path : str or pathlib.Path
        File to write.
    values : numpy.ndarray, shape (nt, len(SENSORS))
        Readings at the times k FINAL_TIME / nt, k = 1, ..., nt.
    noise : float, optional
        Standard deviation of the Gaussian noise over the largest absolute reading.
    seed : int, optional
        Seed of ``numpy.random.default_rng``.
    """
    times = FINAL_TIME * np.arange(1, len(values) + 1) / len(values)
    sigma = noise * np.abs(values).max()
    noisy = values + sigma * np.random.default_rng(seed).standard_normal(values.shape)
    lines = [
        "# Temperature rise at the sensors of a plate, simulated: made by 'python -m problems.heat_readings'.",
        f"# mesh: {MESH_FINE.name}, quadratic elements; source: problems.plate.true_source",
        f"# integrator: Radau IIA, 2 stages, {STEPS} steps up to time {FINAL_TIME:g}",
        f"# noise: Gaussian, standard deviation {noise:g} of the largest absolute reading ({sigma:.6f}); "
        f"numpy default_rng({seed})",
        ",".join(COLUMNS),
    ]
    for s, (x, y) in enumerate(SENSORS):
        lines += [f"{s},{x:g},{y:g},{t:.6f},{value:.6f}" for t, value in zip(times, noisy[:, s], strict=True)]
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")


def main():
    """Simulate, write the file and say what is in it."""
    start = time.perf_counter()
    mesh = read_mesh(MESH_FINE, COMM_WORLD, REGIONS, BOUNDARIES)
    values = simulate(mesh)
    write(READINGS, values)
    print(
        f"{READINGS}: {values.shape[1]} sensors, {values.shape[0]} times, largest reading "
        f"{np.abs(values).max():.4f} before noise, {time.perf_counter() - start:.0f} s"
    )


if __name__ == "__main__":
    main()

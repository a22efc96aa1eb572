"""Make `maxwell_readings_lossy.csv` and `maxwell_readings_cavity.csv`: what the probes would read, with noise.

    python -m problems.maxwell_readings

Little of the discretisation is shared with the inverse problem: the mesh has twice as many cells along a side, the
integrator is Radau IIA with two stages (order 3), there are twice as many steps, and the current is not a
function of a finite element space. Takes some minutes on one core, and runs on one process.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
from firedrake import (
    COMM_WORLD,
    Constant,
    Function,
    VectorFunctionSpace,
    assemble,
    interpolate,
)
from irksome import RadauIIA, TimeStepper

from problems.maxwell import E, Medium, perfect_conductor, residual, state_space
from problems.maxwell_setting import CELLS, PROBES, SETTINGS, Setting, box_mesh, signal, true_current
from problems.meshfile import locate
from problems.readings import FACTORISE_ONCE

__all__ = ["COLUMNS", "NOISE", "SEED", "STEPS", "TIMES", "readings_file", "simulate", "write"]

COLUMNS = ("sensor", "x", "y", "time", "ex", "ey")
FINER = 2
STEPS = 512
TIMES = 64
NOISE = 0.02
SEED = 20262


def readings_file(regime: str) -> Path:
    """Where the shipped readings of a regime are."""
    return Path(__file__).resolve().parent / f"maxwell_readings_{regime}.csv"


def simulate(mesh, given: Setting, *, steps=STEPS, times=TIMES, degree=2, points=PROBES) -> np.ndarray:
    """Electric field at the probes that :func:`problems.maxwell_setting.true_current` causes, ``(times, probes, 2)``.

    Parameters
    ----------
    mesh
        A mesh of the box.
    given
        What is in it.
    steps, times
        Time steps, a multiple of the number of readings, which are evenly spaced.
    degree
        Of the elements.
    points
        ``(probes, 2)``.
    """
    if steps % times:
        raise ValueError(f"steps must be a multiple of times (got {steps} and {times})")
    space, t = state_space(mesh, degree), Constant(0.0)
    u, dt = Function(space), given.final_time / steps
    form = residual(u, Medium(mesh, given.regions), current=signal(t, given) * true_current(mesh), walls=given.walls)
    stepper = TimeStepper(
        form,
        RadauIIA(2),
        t,
        Constant(dt),
        u,
        bcs=perfect_conductor(space, given.walls),
        solver_parameters=FACTORISE_ONCE,
    )
    at_probes = locate(points, mesh)
    ours, order = VectorFunctionSpace(at_probes, "DG", 0), VectorFunctionSpace(at_probes.input_ordering, "DG", 0)
    values = np.empty((times, len(points), 2))
    for k in range(times):
        for j in range(steps // times):
            stepper.advance()
            t.assign((k * (steps // times) + j + 1) * dt)
        values[k] = assemble(interpolate(assemble(interpolate(u.subfunctions[E], ours)), order)).dat.data_ro
    return values


def write(path, values, given: Setting, *, how: str, noise=NOISE, seed=SEED, points=PROBES) -> None:
    """Add noise to readings and write them as :mod:`problems.readings` reads them.

    Parameters
    ----------
    path
        File to write.
    values
        ``(times, probes, 2)``, at evenly spaced times up to the final one.
    given
        The setting.
    how
        A line on what made them.
    noise, seed
        Standard deviation of the Gaussian noise over the largest absolute reading; of ``numpy.random.default_rng``.
    points
        ``(probes, 2)``.
    """
    times = given.final_time * np.arange(1, len(values) + 1) / len(values)
    sigma = noise * np.abs(values).max()
    noisy = values + sigma * np.random.default_rng(seed).standard_normal(values.shape)
    lines = [
        f"# Electric field at probes in the {given.name} box, made by 'python -m problems.maxwell_readings'.",
        f"# {how}; current: problems.maxwell_setting.true_current",
        f"# noise: Gaussian, standard deviation {noise:g} of the largest absolute reading ({sigma:.6g}); "
        f"numpy default_rng({seed})",
        ",".join(COLUMNS),
    ]
    for s, (x, y) in enumerate(points):
        lines += [
            f"{s},{x:.6f},{y:.6f},{t:.10g},{ex:.6g},{ey:.6g}" for t, (ex, ey) in zip(times, noisy[:, s], strict=True)
        ]
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")


def main():
    """Simulate, write the files and say what is in them."""
    for given in SETTINGS.values():
        start = time.perf_counter()
        values = simulate(box_mesh(FINER * CELLS, COMM_WORLD), given)
        how = f"mesh: {FINER * CELLS} cells a side, degree 2; Radau IIA, 2 stages, {STEPS} steps"
        write(readings_file(given.name), values, given, how=how)
        print(
            f"{readings_file(given.name).name}: {values.shape[1]} probes, {values.shape[0]} times, largest reading "
            f"{np.abs(values).max():.4g} before noise, {time.perf_counter() - start:.0f} s"
        )


if __name__ == "__main__":
    main()

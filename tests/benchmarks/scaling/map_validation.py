"""Predicted times of inversions by the map beside measured ones on the available ranks, all of them in time.

As in :mod:`pint_fem.scaling.validation`, steps of the adjoint are timed in turn with the inversion on all ranks at
once, and predictions are multiplied by the ratio of their times to the calibrated ones.
"""

from __future__ import annotations

import numpy as np
from mpi4py import MPI

from pint_fem.scaling.calibrate import Case
from pint_fem.scaling.linear_inverse import Division, LinearInverse
from pint_fem.scaling.timing import rounds
from pint_fem.scaling.validation import Comparison
from pint_fem.spacetime import SpaceTime
from tests.benchmarks.scaling.records import Record

__all__ = ["compare_map"]

STEPS = 32
"""Steps of the adjoint that are timed."""


def compare_map(record: Record, case: Case, *, comm: MPI.Comm = MPI.COMM_WORLD, repeats: int = 5) -> list[Comparison]:
    """Time the map, the posterior with its standard deviation, and both, and predict them (collective).

    Parameters
    ----------
    record, case
        Costs, and the problem.
    comm, repeats
        Processes; repeats of each measurement.
    """
    st = SpaceTime((1, comm.size), comm=comm)
    rf = (case.with_sensors or case.pose)(st, record.nsteps, {"time_solver": "serial"})
    made = [rf.parameter_to_observable()]

    def build() -> None:
        made[0] = rf.parameter_to_observable()

    def invert() -> None:
        made[0].__dict__.pop("reduced", None)
        made[0].posterior().variance()

    def whole() -> None:
        build()
        invert()

    propagator, n = made[0].propagator, rf.evolution.state_size
    states = np.random.default_rng(0).standard_normal((len(made[0].sensors), n))
    out = np.zeros((len(states), STEPS, n))
    step = lambda: propagator.advance(states, out, transposed=True)
    found = rounds({"map": build, "posterior": invert, "whole": whole, "step": step}, repeats, comm=comm)
    predicted = LinearInverse(record, Division(1, comm.size, comm.size, 1)).predict().parts
    seconds = {"map": sum(predicted[part] for part in ("setup", "sweep", "rows"))}
    seconds["posterior"] = sum(predicted.values()) - seconds["map"]
    seconds["whole"] = sum(predicted.values())
    kernel = record.kernels[1]["adjoint"][0](len(states)) * record.slowdown_with(comm.size) * STEPS
    return [
        Comparison.of(task, comm.size, record.nsteps, (0, 0), found, {"step": (kernel, 1.0)}, value)
        for task, value in seconds.items()
    ]

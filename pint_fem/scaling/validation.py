"""The model beside measurements: the same solves timed and predicted on the ranks there are."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from mpi4py import MPI

from pint_fem.scaling.costs import Calibration
from pint_fem.scaling.counting import solver_parameters
from pint_fem.scaling.model import Model, Solve
from pint_fem.spacetime import SpaceTime

__all__ = ["Comparison", "compare", "median_seconds"]


@dataclass
class Comparison:
    """One task on some ranks.

    Attributes
    ----------
    task : str
    ranks, steps : int
    cycles : tuple of int
        Of the state and the adjoint, as the real run took them.
    measured, predicted : float
        Seconds; the median of the repeats, and the model's.
    """

    task: str
    ranks: int
    steps: int
    cycles: tuple[int, int]
    measured: float
    predicted: float

    @property
    def error(self) -> float:
        """Relative, of the prediction."""
        return self.predicted / self.measured - 1


def median_seconds(action: Callable, comm, repeats: int, before: Callable = lambda: None) -> float:
    """Median over repeats of something that all ranks do; one more warms up."""
    seconds = []
    for repeat in range(repeats + 1):
        before()
        comm.Barrier()
        start = time.perf_counter()
        action()
        comm.Barrier()
        if repeat:
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def compare(
    calibration: Calibration,
    pose: Callable,
    options: Mapping,
    steps: int,
    *,
    rtol: float = 1e-6,
    comm=MPI.COMM_WORLD,
    repeats: int = 5,
) -> Sequence[Comparison]:
    """Time a cold state solve, an adjoint solve and a whole gradient on all ranks in time, and predict them
    (collective).

    Parameters
    ----------
    calibration, pose
        Costs and the problem, see ``problems.scaling_cases.Case``.
    options, steps, rtol
        Of MGRIT or ParaDiag, as the model's.
    repeats
        Medians of so many are kept, after one more.
    """
    rf = pose(SpaceTime((1, comm.size), comm=comm), steps, solver_parameters(options, rtol=rtol))
    problem, sweeps = rf.problem, rf.problem.sweeps
    controls = rf.array([c.control for c in rf.controls])
    z = problem.layout.steps(controls + 1.0)
    count = {}

    def state():
        problem.U[:] = sweeps.initial
        count["state"] = sweeps.state(z, problem.U, cold=True).cycles

    def adjoint():
        problem.L[:] = 0
        count["adjoint"] = sweeps.adjoint(z, problem.U, g, problem.L, cold=True).cycles

    scale = [1.0]

    def gradient():
        scale[0] *= 1.001
        problem.derivative(scale[0] * (controls + 1.0))

    measured = {"state": median_seconds(state, comm, repeats)}
    g = sum(m.gradient(problem.U) for m in problem.misfits)
    measured["adjoint"] = median_seconds(adjoint, comm, repeats)
    measured["gradient"] = median_seconds(gradient, comm, repeats, problem.forget)
    model = Model(calibration, options, (1, comm.size), nsteps=steps)
    forward, backward = Solve("state", "nested", count["state"]), Solve("adjoint", "nested", count["adjoint"])
    # again each: the first solve makes factors
    again = lambda *task: model.run_all([task, task]).task_seconds[1]
    said = {
        "state": again("solves", [forward]),
        "adjoint": again("solves", [backward]),
        "gradient": again("gradient", [forward, backward]),
    }
    cycles = count["state"], count["adjoint"]
    return [Comparison(task, comm.size, steps, cycles, measured[task], said[task]) for task in said]

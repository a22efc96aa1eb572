"""The model beside measurements: the same solves timed and predicted on the ranks there are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from mpi4py import MPI

from pint_fem.scaling.costs import Calibration
from pint_fem.scaling.counting import solver_parameters
from pint_fem.scaling.metronome import rounds
from pint_fem.scaling.model import Model, Solve
from pint_fem.spacetime import SpaceTime

__all__ = ["Comparison", "compare"]


@dataclass
class Comparison:
    """One task on some ranks.

    Attributes
    ----------
    task : str
    ranks, steps : int
    cycles : tuple of int
        Of the state and the adjoint, as the real run took them.
    measured, clock, predicted : float
        Seconds: median of the repeats at the machine's full speed (:mod:`~pint_fem.scaling.metronome`) and by the
        clock; the model's.
    """

    task: str
    ranks: int
    steps: int
    cycles: tuple[int, int]
    measured: float
    clock: float
    predicted: float

    @property
    def error(self) -> float:
        """Relative, of the prediction, at full speed."""
        return self.predicted / self.measured - 1

    @property
    def speed(self) -> float:
        """Of the machine while it was measured."""
        return self.measured / self.clock


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
    count, scale = {}, [1.0]

    def state():
        problem.U[:] = sweeps.initial
        count["state"] = sweeps.state(z, problem.U, cold=True).cycles

    def adjoint():
        problem.L[:] = 0
        count["adjoint"] = sweeps.adjoint(z, problem.U, g, problem.L, cold=True).cycles

    def gradient():
        scale[0] *= 1.001
        problem.derivative(scale[0] * (controls + 1.0))

    state()
    g = sum(m.gradient(problem.U) for m in problem.misfits)
    tasks = {"state": state, "adjoint": adjoint, "gradient": gradient}
    measured = rounds(tasks, repeats, comm=comm, before={"gradient": problem.forget})
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
    return [
        Comparison(task, comm.size, steps, cycles, measured[task].seconds, measured[task].clock, said[task])
        for task in said
    ]

"""The model beside measurements: the same solves timed and predicted on the ranks there are.

The machine may be slower or faster than when it was calibrated: on a virtual one by a factor of two from one second to
the next. So a few of the calibrated kernels are timed in turn with the solves, on all ranks at once, and the model's
seconds are multiplied by how many times as long they take: what is validated is the model, by the clock, and not the
day.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from mpi4py import MPI

from pint_fem.scaling.calibrate import SMALL, Action, kernel_actions, paradiag_actions
from pint_fem.scaling.costs import Calibration
from pint_fem.scaling.counting import solver_parameters
from pint_fem.scaling.metronome import Measured, rounds
from pint_fem.scaling.model import Model, Solve
from pint_fem.spacetime import SpaceTime

__all__ = ["Comparison", "compare", "kernel_seconds"]

MANY = 64
"""States of a call that is timed."""


@dataclass
class Comparison:
    """One task on some ranks, and kernels that were timed in turn with it.

    Attributes
    ----------
    task : str
    ranks, steps : int
    cycles : tuple of int
        Of the state and the adjoint, as the real run took them.
    measured : float
        Seconds by the clock, median of the repeats.
    slower : float
        How many times as long as calibrated kernels took beside it, on all ranks at once: median.
    predicted : float
        Seconds, with kernels as slow as they were.
    """

    task: str
    ranks: int
    steps: int
    cycles: tuple[int, int]
    measured: float
    slower: float
    predicted: float

    @property
    def error(self) -> float:
        """Relative, of the prediction."""
        return self.predicted / self.measured - 1

    @classmethod
    def of(
        cls, task: str, ranks: int, steps: int, cycles, found: Mapping[object, Measured], known: Mapping, said: float
    ) -> Comparison:
        """From measurements in turn.

        Parameters
        ----------
        found
            Of the task, by its name, and of kernels.
        known
            Of the kernels, calibrated seconds with so many processes at work, and those that the task spends in it.
        said
            What the model says of the task.
        """
        ratios = [np.array(found[key].each) / seconds for key, (seconds, _) in known.items()]
        slower = np.average(ratios, axis=0, weights=[spent for _, spent in known.values()])
        clock = np.array(found[task].each)
        # a round's task against the same round's kernels: the machine's speed changes from one to the next
        error, measured = said / np.median(clock / slower), float(np.median(clock))
        return cls(task, ranks, steps, cycles, measured, float(np.median(slower)), float(error * measured))


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
    model = Model(calibration, options, (1, comm.size), nsteps=steps)
    kernels = _kernels(model, pose)
    tasks = {"state": state, "adjoint": adjoint, "gradient": gradient}
    timed = {key: action for key, (action, _) in kernels.items()}
    found = rounds(tasks | timed, repeats, comm=comm, before={"gradient": problem.forget})
    forward, backward = Solve("state", "nested", count["state"]), Solve("adjoint", "nested", count["adjoint"])
    # again each: the first solve makes factors
    again = lambda *task: model.run_all([task, task])
    said = {
        "state": again("solves", [forward]),
        "adjoint": again("solves", [backward]),
        "gradient": again("gradient", [forward, backward]),
    }
    cycles, made = (count["state"], count["adjoint"]), []
    for task, prediction in said.items():
        known = {key: _known(model, key, times, prediction.counts) for key, (_, times) in kernels.items()}
        known = {key: (seconds, spent) for key, (seconds, spent) in known.items() if spent}
        made.append(Comparison.of(task, comm.size, steps, cycles, found, known, prediction.task_seconds[1]))
    return made


def _kernels(model: Model, pose: Callable) -> dict[object, Action]:
    """Kernels that a solver's sweeps spend their time in: of the finest level, in calls of many states."""
    count = min(SMALL, model.nsteps)
    if model.solver == "paradiag":
        actions, _ = paradiag_actions(pose, model.calibration.nsteps, count)
        return {key: do for key, do in actions.items() if "solve" in key}
    alone = pose(SpaceTime("1x1", comm=MPI.COMM_SELF), count, {"mgrit": {"levels": 1}})
    return {key: do for key, do in kernel_actions(alone, (MANY,)).items() if key[1] == 0}


def _known(model: Model, key, times: float, counts: Mapping) -> tuple[float, float]:
    """Calibrated seconds of what is timed as ``times`` calls of a kernel, and those that a task spends in such ones."""
    c = model.calibration
    if model.solver == "paradiag":
        # half of all solves are an adjoint's, where there are any: its residuals are
        kinds = {kind for (kind, _), n in counts.items() if n and kind in ("step", "adjoint")}
        wanted = "adjoint" if "transposed" in key else "step"
        return model.busy * c.paradiag[key] * times, c.paradiag[key] if wanted in kinds else 0.0
    name = {"sweep": "step sweep"}.get(key[0], key[0])
    stepped = sum(n for (what, _), n in counts.items() if what == name)
    return kernel_seconds(c, key, times, stepped, model.busy)


def kernel_seconds(calibration: Calibration, key, times: float, stepped: int, busy: float) -> tuple[float, float]:
    """Calibrated seconds of so many calls of a kernel (kind, level, size) with ``busy`` processes, and those that a
    task spends in such ones which steps so many states.
    """
    kind, _, size = key
    seconds = calibration.work[1][kind][0](size)
    return busy * seconds * times, stepped * seconds / size

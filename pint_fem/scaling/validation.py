"""Predicted times of solves beside measured ones on the available ranks.

The machine may be slower or faster than when it was calibrated. So a few of the calibrated kernels are timed in turn
with the solves, on all ranks at once, and the predicted seconds are multiplied by the ratio of the kernels' times to
the calibrated ones: the comparison, by the clock, is that of the model and not of the machine's speed on that day.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from mpi4py import MPI

from pint_fem.errors import InputError
from pint_fem.scaling.actions import SMALL, Action, kernel_actions, paradiag_actions, solve_actions, solver_parameters
from pint_fem.scaling.costs import Calibration
from pint_fem.scaling.model import Model, Solve
from pint_fem.scaling.timing import rounds
from pint_fem.spacetime import SpaceTime

__all__ = ["Comparison", "compare"]

MANY = 64
"""States of a kernel's call that is timed."""


@dataclass
class Comparison:
    """A task's measured and predicted time.

    Attributes
    ----------
    task, ranks, steps, cycles : str, int, int, tuple of int
        Name; numbers of time ranks and of steps; cycles of the state and the adjoint in the real run.
    measured, predicted : float
        Seconds by the clock, median of the repeats; predicted seconds, multiplied by ``slower``.
    slower : float
        Median ratio of the kernels' times, on all ranks at once, to the calibrated ones.
    space : int
        Number of space ranks.
    """

    task: str
    ranks: int
    steps: int
    cycles: tuple[int, int]
    measured: float
    slower: float
    predicted: float
    space: int = 1

    @property
    def error(self) -> float:
        """Relative error of the prediction."""
        return self.predicted / self.measured - 1

    @classmethod
    def of(
        cls,
        task: str,
        ranks: int,
        steps: int,
        cycles: tuple[int, int],
        found: Mapping,
        kernels: Mapping,
        seconds: float,
    ) -> Comparison:
        """Compare a task with its prediction.

        ``found`` are the times of the task, by its name, and of kernels that were timed in turn with it; ``kernels``
        the calibrated seconds of each of these and those that the task spends in it; ``seconds`` the predicted ones.
        """
        ratios = [np.array(found[key].each) / calibrated for key, (calibrated, _) in kernels.items()]
        slower = np.average(ratios, axis=0, weights=[spent for _, spent in kernels.values()])
        clock = np.array(found[task].each)
        # the task of a round is compared with the kernels of the same round, as the machine's speed varies
        error, measured = seconds / np.median(clock / slower), float(np.median(clock))
        return cls(task, ranks, steps, cycles, measured, float(np.median(slower)), float(error * measured))


def compare(
    calibration: Calibration,
    pose: Callable,
    options: Mapping,
    steps: int,
    *,
    rtol: float = 1e-6,
    grid: tuple[int, int] | str | None = None,
    comm: MPI.Comm = MPI.COMM_WORLD,
    repeats: int = 5,
) -> list[Comparison]:
    """Time a cold state solve, an adjoint solve and a gradient on all ranks, and predict them (collective).

    Parameters
    ----------
    calibration, pose
        Costs, and the problem as for :class:`~pint_fem.scaling.calibrate.Case`.
    options, steps, rtol
        Options of MGRIT or ParaDiag as the model's, time steps, and relative tolerance of the solves.
    grid
        Numbers of ranks in space and in time; default: all in time.
    comm, repeats
        Processes; repeats of each measurement, of which the medians are used.

    Raises
    ------
    InputError
        If the grid does not fit the processes, or the calibration has not measured several ranks in space.
    """
    spacetime = SpaceTime(grid, comm=comm)
    space, time, _ = spacetime.shape
    if not calibration.has_space_ranks(space):
        raise InputError(f"{space} ranks in space: calibration {calibration.problem} has measured one only")
    rf = pose(spacetime, steps, solver_parameters(options, rtol=rtol))
    problem, sweeps = rf.problem, rf.problem.sweeps
    controls = rf.array([c.control for c in rf.controls]) + 1.0
    g, cycles, scale = np.zeros_like(problem.L), [], [1.0]
    solves = solve_actions(rf, controls, g)
    for solve, _ in solves.values():
        solve()
        cycles.append(sweeps.results[-1][1].cycles)
        g[:] = sum(m.gradient(problem.U) for m in problem.misfits)

    def gradient():
        scale[0] *= 1.001
        problem.derivative(scale[0] * controls)

    model = Model(calibration, options, (space, time), nsteps=steps)
    kernels = _kernels(model, pose, spacetime)
    actions = {key: action for key, (action, _) in (solves | {"gradient": (gradient, 1)} | kernels).items()}
    found = rounds(actions, repeats, comm=comm, before={"gradient": problem.invalidate})
    forward, backward = (Solve(kind, "nested", n) for kind, n in zip(solves, cycles, strict=True))
    out, tasks = [], (("solves", [forward]), ("solves", [backward]), ("gradient", [forward, backward]))
    for name, task in zip(("state", "adjoint", "gradient"), tasks, strict=True):
        prediction = model.run_all([task, task])  # the first one makes factors
        spent = {key: _kernel_seconds(model, key, n, prediction.counts) for key, (_, n) in kernels.items()}
        spent = {key: pair for key, pair in spent.items() if pair[1]}
        seconds = prediction.task_seconds[1]
        out.append(replace(Comparison.of(name, time, steps, tuple(cycles), found, spent, seconds), space=space))
    return out


def _kernels(model: Model, pose: Callable, spacetime: SpaceTime) -> dict[object, Action]:
    """Kernels in which a solver's sweeps spend their time: those of the finest level, with one state and with many."""
    count = min(SMALL, model.nsteps)
    if model.solver == "paradiag":
        actions, _ = paradiag_actions(pose, model.calibration.nsteps, count)
        return {key: do for key, do in actions.items() if key in ("solve", "solve transposed")}
    rf = pose(SpaceTime((spacetime.space_size, 1), spacetime.space_comm), count, {"mgrit": {"levels": 1}})
    return {key: do for key, do in kernel_actions(rf, (1, MANY)).items() if key[1] == 0}


def _kernel_seconds(model: Model, key, times: float, counts: Mapping) -> tuple[float, float]:
    """Calibrated seconds of an action of ``times`` calls of a kernel, and those that a task spends in such calls."""
    c = model.calibration
    if model.solver == "paradiag":
        # half of all solves are an adjoint's, where there are any: its residuals are
        kinds, seconds = {kind for (kind, _), n in counts.items() if n}, c.paradiag[key]
        spent = seconds if ("adjoint" if "transposed" in key else "step") in kinds else 0.0
        return model.slowdown * seconds * times, spent
    kind, _, size = key
    seconds = model.kernels[kind][0](size)
    stepped = sum(n for (what, _), n in counts.items() if what == (f"{kind} sweep" if size == 1 else kind))
    return model.slowdown * seconds * times, stepped * seconds / size

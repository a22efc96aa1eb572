"""Value, gradient and Hessian action, timed: of the time-parallel functional and of pyadjoint's.

Times are the processor's, of this one process: on a core of its own what a clock shows, on a busy machine still that.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from firedrake import Function

from pint_fem.adjoint import TimeParallelReducedFunctional
from pint_fem.kernels.arrays import get

__all__ = ["MORE", "Derivatives", "Measured", "difference", "in_turn", "on_tape"]

NAMES, MORE = ("value", "gradient", "hessian"), 8


@dataclass
class Measured:
    """Median seconds of each of :data:`NAMES`, and their values at the control given: a number and two dual vectors."""

    seconds: dict[str, float]
    values: dict[str, object]


def difference(a, b) -> float:
    """Relative, of numbers or vectors."""
    return float(np.linalg.norm(np.asarray(a) - b) / np.linalg.norm(b))


class Derivatives:
    """Of ours: each repeat at a new control, from cold but for the factors of the last one.

    Parameters
    ----------
    rf
        The functional.
    z, dz
        A control and a direction, own values.
    """

    def __init__(self, rf: TimeParallelReducedFunctional, z: np.ndarray, dz: np.ndarray):
        self.rf, self.z, self.dz, self.scale = rf, z, dz, 1.0

    def move(self, scale: float | None = None) -> None:
        """Go to a new control and forget trajectories and stages, from which sweeps and Newton would start."""
        self.scale = 1.01 * self.scale if scale is None else scale
        self.rf.problem.invalidate()

    def value(self) -> float:
        """``J``, with the state."""
        return self.rf.problem.value(self.scale * self.z)

    def gradient(self) -> np.ndarray:
        """``J'``, with the adjoint."""
        return self.rf.problem.derivative(self.scale * self.z)

    def hessian(self) -> np.ndarray:
        """``J'' dz``, with a tangent and an adjoint."""
        return self.rf.problem.hessian_action(self.scale * self.z, self.dz)

    def more_hessians(self) -> float:
        """Mean seconds of :data:`MORE` further actions at the control, in other directions."""
        z, places, start = self.scale * self.z, np.arange(self.dz.size), time.process_time()
        for k in range(1, MORE + 1):
            self.rf.problem.hessian_action(z, np.cos(k * places) * self.dz)
        return (time.process_time() - start) / MORE

    def batched_hessians(self) -> float:
        """Mean seconds of :data:`MORE` actions at the control, in one batch."""
        z, places = self.scale * self.z, np.arange(self.dz.size)
        directions = [np.cos(k * places) * self.dz for k in range(1, MORE + 1)]
        start = time.process_time()
        self.rf.problem.hessian_actions(z, directions)
        return (time.process_time() - start) / MORE

    def state(self) -> None:
        """A state sweep at a new control."""
        self.move()
        self.rf.problem.sweeps.state(self.scale * self.z, self.rf.problem.U)

    def measure(self, repeats: int, *, more: bool = False) -> Measured:
        """Times of ``repeats`` new controls; one more before them warms up, and gives the values. With ``more`` that of
        ``"more"`` Hessian actions, too, one after another and in a ``"batch"``.
        """
        values, parts = self.first(), []
        for _ in range(repeats):
            parts.append(self.once())
            if more:
                parts[-1] |= {"more": self.more_hessians(), "batch": self.batched_hessians()}
        return _medians(parts, values)

    def first(self) -> dict[str, object]:
        """The values of :data:`NAMES` at the control given, from cold."""
        self.move(1.0)
        return {name: getattr(self, name)() for name in NAMES}

    def once(self, clock: Callable[[], float] = time.process_time) -> dict[str, float]:
        """Seconds of each of :data:`NAMES` at a new control by a clock."""
        self.move()
        seconds = {}
        for name in NAMES:
            start = clock()
            getattr(self, name)()
            seconds[name] = clock() - start
        return seconds


def _medians(parts: list[dict[str, float]], values: dict[str, object]) -> Measured:
    """Medians of several measurements."""
    return Measured({name: statistics.median(part[name] for part in parts) for name in parts[0]}, values)


def in_turn(cases: Mapping[str, Derivatives], repeats: int, *, seldom: Sequence[str] = ()) -> dict[str, Measured]:
    """:meth:`Derivatives.measure` of several cases that take turns, so that a busy machine slows all of them; of slow
    ones, ``seldom``, two repeats.
    """
    values, parts = {name: case.first() for name, case in cases.items()}, {name: [] for name in cases}
    for repeat in range(repeats):
        for name, case in cases.items():
            if name not in seldom or repeat < 2:
                parts[name].append(case.once())
    return {name: _medians(parts[name], values[name]) for name in cases}


def on_tape(rf, z: np.ndarray, dz: np.ndarray, *, repeats: int, hessians: int, say=lambda text: None) -> Measured:
    """The same of a pyadjoint ``ReducedFunctional`` of one field; fewer of the Hessian's, which are slow.

    The first evaluation warms up, unless it is the only one.
    """
    V = rf.controls[0].control.function_space()
    control, direction = Function(V), Function(V)
    direction.dat.data_wo[:] = dz.reshape(direction.dat.data_ro.shape)
    times, values = {name: [] for name in NAMES}, {}
    for i in range(repeats + 1):
        control.dat.data_wo[:] = 1.01**i * z.reshape(control.dat.data_ro.shape)
        for name, action in (
            ("value", lambda: rf(control)),
            ("gradient", rf.derivative),
            ("hessian", lambda: rf.hessian(direction)),
        ):
            if name == "hessian" and i >= hessians:
                continue
            start = time.process_time()
            result = action()
            times[name].append(time.process_time() - start)
            values.setdefault(name, float(result) if name == "value" else get(result))
        say(", ".join(f"{name} {times[name][-1]:.2f}" for name in NAMES if len(times[name]) > i) + " s")
    return Measured({name: statistics.median(t[1:] or t) for name, t in times.items()}, values)

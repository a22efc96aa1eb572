"""The steps of state, tangent and adjoint sweeps on one level, as time solvers call them: by their numbers.

A propagator takes a block of steps with their data (times, controls, linearisation states). Here it is bound to the
data of the own steps of a level, which are numbered in the direction of the sweep.

States of linear sweeps may have a batch axis, ``(k, members, n)``. Steps with constant operators then take all
``k * members`` states in one call. Other steps are linearised once for all members, which follow one after another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from pint_fem.all_at_once.levels import Level
from pint_fem.kernels.arrays import as_rows
from pint_fem.mgrit.options import ROUGH, MGRITOptions
from pint_fem.propagators.base import FEPropagator, StepData
from pint_fem.sweeps.time_solver import TimeSolver

__all__ = ["AdjointStep", "LinearStep", "StateStep", "TangentStep", "error_at_f_points", "set_precision"]


class _BoundStep:
    """A propagator bound to the data of the own steps of one level.

    ``lo`` is the number of the first own step and ``data`` the data of all own steps, set before a solve;
    ``linearised`` computes the linearisation data of steps at states that are not stored; ``directions`` has the
    direction of the own steps' controls for each member of a batch.
    """

    transposed = False  # whether the steps run backwards in time

    def __init__(self, propagator: FEPropagator):
        self.propagator = propagator
        self.lo = 0
        self.data: StepData | None = None
        self.directions: Sequence[np.ndarray] | None = None
        self.linearised: Callable[[range], StepData] | None = None

    def part(self, steps: range) -> StepData:
        """Data of some steps, given by their numbers in the direction of the sweep."""
        data = self.data.part(slice(steps.start - self.lo, steps.stop - self.lo, steps.step))
        if self.linearised is not None:
            computed = self.linearised(steps)
            data = data._replace(u=computed.u, linearisations=computed.linearisations)
        return data

    def members(
        self, steps: range, u: np.ndarray, out: np.ndarray
    ) -> Iterator[tuple[StepData, np.ndarray, np.ndarray]]:
        """Data, states and results ``(k, n)`` of each member of a batch ``(k, members, n)``."""
        data, rows = self.part(steps), slice(steps.start - self.lo, steps.stop - self.lo, steps.step)
        for number in range(u.shape[1]):
            own = data._replace(member=number)
            if self.directions is not None:
                dz = self.directions[number]
                own = own._replace(dz=dz if dz.ndim == 1 else dz[rows])
            yield own, np.ascontiguousarray(u[:, number]), out[:, number]


class StateStep(_BoundStep):
    r"""The step :math:`\Phi_n(u, z)`, forcing included."""

    def __init__(self, propagator: FEPropagator):
        super().__init__(propagator)
        self.uses_guess = propagator.uses_guess

    def step(self, steps: range, u: np.ndarray, out: np.ndarray) -> None:
        """Write the results of steps from ``u`` to ``out``."""
        return self.propagator.step(self.part(steps), u, out)


class TangentStep(_BoundStep):
    r"""The derivative :math:`\Phi_{n,u} u` at the linearisation states, with :math:`\Phi_{n,z}\,\delta z` if there is a
    direction of the controls.
    """

    def step(self, steps: range, u: np.ndarray, out: np.ndarray) -> None:
        """Write the results of steps from ``u`` to ``out``."""
        if u.ndim == 2:
            data = self.part(steps)
            return self.propagator.tangent(data, u, data.dz, out)
        for data, own, result in self.members(steps, u, out):
            self.propagator.tangent(data, own, data.dz, result)
        return None


class AdjointStep(_BoundStep):
    r"""The transpose :math:`\Phi_{n,u}^T u` at the linearisation states."""

    transposed = True

    def step(self, steps: range, u: np.ndarray, out: np.ndarray) -> None:
        """Write the results of steps from ``u`` to ``out``."""
        if u.ndim == 2:
            return self.propagator.adjoint(self.part(steps), u, out)
        for data, own, result in self.members(steps, u, out):
            self.propagator.adjoint(data, own, result)
        return None


class LinearStep(_BoundStep):
    r"""The derivative :math:`\Phi_u` of a linear propagator or its transpose, the same for all steps.

    Attributes
    ----------
    single : bool
        Whether :meth:`advance` may use single precision; set before a solve.
    """

    def __init__(self, propagator: FEPropagator, *, transposed: bool):
        super().__init__(propagator)
        self.transposed, self.single = transposed, False
        self._apply = propagator.apply_transposed if transposed else propagator.apply

    def step(self, steps: range, u: np.ndarray, out: np.ndarray) -> None:
        """Write the results of steps from ``u`` to ``out``."""
        if u.ndim == 2:
            return self._apply(u, out)
        result = as_rows(out)  # a copy where the steps are strided
        self._apply(as_rows(u), result)
        if not np.shares_memory(result, out):
            out[...] = result.reshape(out.shape)
        return None

    def sweep(self, first: int, U: np.ndarray, G: np.ndarray | None) -> None:
        """Take consecutive steps with right-hand side ``G``, from ``U[0]``, in one call; of a batch ``U`` is
        ``(k + 1, members, n)``.
        """
        return self.propagator.sweep(U, G, transposed=self.transposed)

    def advance(self, first: int, stride: int, u: np.ndarray, out: np.ndarray, G: np.ndarray | None) -> None:
        """Take consecutive steps with right-hand side ``G`` from each of the states ``u``, in one call; of a batch
        ``(k, members, n)`` in one call for all states along the longer axis.
        """
        advance = partial(self.propagator.advance, transposed=self.transposed, single=self.single)
        if u.ndim == 2:
            return advance(u, out, G)
        for i in range(min(u.shape[:2])):
            if len(u) < u.shape[1]:
                advance(u[i], out[i].swapaxes(0, 1), None if G is None else G[i].swapaxes(0, 1))
            else:
                advance(u[:, i], out[:, :, i], None if G is None else G[:, :, i])
        return None


LOOSE = 1e-3
"""Tolerance from which on single precision is used where it is not asked for."""


def set_precision(solver: TimeSolver, accuracy: Mapping[str, Any], *, accelerated: bool) -> None:
    """Set the precision of F-relaxation for a solve by MGRIT (the option ``precision``).

    Parameters
    ----------
    solver
        The time solver.
    accuracy
        Arguments ``rtol`` and ``cycles`` of its solve, if they are given. A given number of cycles is done in double
        precision, as its transpose has to be the transpose.
    accelerated
        Whether cycles precondition a Krylov method.
    """
    options = solver.options
    if not isinstance(options, MGRITOptions):
        return
    rtol = accuracy.get("rtol")
    rtol = options.rtol if rtol is None else rtol
    measured = options.residual != "none" and accuracy.get("cycles") is None and not accelerated
    limit = {"double": np.inf, "single": ROUGH, "auto": LOOSE}[options.precision]
    for level in solver.levels:
        step = level.propagator
        if not isinstance(step, LinearStep):  # transposed cycles use the adjoint's steps by others
            step = getattr(step, "propagator", None)
        if isinstance(step, LinearStep):
            step.single = measured and rtol >= limit and _error_of_interval(level, step) <= rtol / 10


def _error_of_interval(level: Level, step: LinearStep) -> float:
    """The error of single precision in the steps of an interval, relative to their start (collective over space)."""
    return level.m * step.propagator.error_of_single_precision if level.m else np.inf


def error_at_f_points(options: object, propagator: FEPropagator) -> float:
    """The error of a step to an F-point that single precision may have left, relative to the state (collective over
    space); 0 where relaxation is in double precision.

    Parameters
    ----------
    options
        Options of the time solver.
    propagator
        The step of the finest level.
    """
    if not isinstance(options, MGRITOptions) or options.precision == "double" or options.levels == 1:
        return 0.0
    return getattr(propagator, "error_of_single_precision", 0.0)

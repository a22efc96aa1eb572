"""The steps of each sweep on a level: what MGRIT and ParaDiag call, bound to the own steps' data."""

from __future__ import annotations

from collections.abc import Callable

from pint_fem.kernels.blocks import WIDTH
from pint_fem.propagators.base import FEPropagator, StepData

__all__ = ["AdjointStep", "LinearStep", "StateStep", "TangentStep"]


class _Bound:
    """A propagator bound to the own steps of one level: what MGRIT calls."""

    block = WIDTH  # states in a block of the propagators
    transposed = False

    def __init__(self, propagator: FEPropagator):
        self.propagator = propagator
        self.lo = 0
        self.data: StepData | None = None
        self.linearised: Callable[[range], StepData] | None = None  # states at F-points that are not stored

    def part(self, steps: range) -> StepData:
        """Data of some steps, given by their numbers in the sweep's direction."""
        data = self.data.part(slice(steps.start - self.lo, steps.stop - self.lo, steps.step))
        if self.linearised is not None:
            known = self.linearised(steps)
            data = data._replace(u=known.u, linearisations=known.linearisations)
        return data

    def step(self, steps, u, out):
        """See :class:`pint_fem.all_at_once.levels.Propagator`."""
        return self.take(steps, u, out, steps.start // steps.step)  # nothing, which the level checks


class StateStep(_Bound):
    """``Phi`` with forcing."""

    def __init__(self, propagator: FEPropagator):
        super().__init__(propagator)
        self.uses_guess = propagator.uses_guess

    def take(self, steps, u, out, lane):
        """Take a block of steps whose first has a place among its like."""
        return self.propagator.step(self.part(steps), u, out, lane)


class TangentStep(_Bound):
    """``Phi_u`` at the linearisation states, with ``Phi_z dz`` where the data has a direction."""

    def take(self, steps, u, out, lane):
        """See :meth:`StateStep.take`."""
        data = self.part(steps)
        return self.propagator.tangent(data, u, data.dz, out, lane)


class AdjointStep(_Bound):
    """``Phi_u^T``, numbered backwards in time."""

    transposed = True

    def take(self, steps, u, out, lane):
        """See :meth:`StateStep.take`."""
        return self.propagator.adjoint(self.part(steps), u, out, lane)


class LinearStep(_Bound):
    """``Phi_u`` of a linear propagator, or its transpose: no data."""

    def __init__(self, propagator, *, transposed: bool):
        super().__init__(propagator)
        self.transposed = transposed
        self._apply = propagator.apply_transposed if transposed else propagator.apply

    def take(self, steps, u, out, lane):
        """See :meth:`StateStep.take`."""
        return self._apply(u, out, lane)

    def sweep(self, first, U, G):
        """See :class:`pint_fem.all_at_once.levels.Propagator`."""
        return self.propagator.sweep(U, G, transposed=self.transposed)

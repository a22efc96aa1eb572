r"""Adjoint sweeps by a fixed number of transposed MGRIT cycles.

The exact transpose of a forward cycle runs on the reversed grid: point ``i`` is :math:`\lambda_{N+1-i}`, from
:math:`\lambda_{N+1} = 0`, where the adjoint sweep begins with :math:`\lambda_N`. That makes a step in front, which
gives zero, and C-points ``0, 1, 1 + m, ...``; point ``N + 1`` is :math:`\lambda_0`, an F-point. What follows from the
symmetry is in :mod:`pint_fem.all_at_once.transposed`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from pint_fem.all_at_once.arrays import Array, is_tensor, reversed_rows
from pint_fem.all_at_once.propagator import Propagator
from pint_fem.all_at_once.transposed import TransposedSweep
from pint_fem.mgrit.options import MGRITOptions
from pint_fem.mgrit.solver import MGRIT

__all__ = ["TransposedAdjoint"]


class _Shifted:
    """Steps of an adjoint level behind a leading one: step ``i`` is step ``i - 1`` there, and step 0 gives zero.

    Parameters
    ----------
    propagator
        The level's propagator, with optional methods ``sweep`` and ``advance``.
    """

    def __init__(self, propagator: Propagator):
        self.propagator, self.block = propagator, getattr(propagator, "block", 0)
        if hasattr(propagator, "sweep"):
            self.sweep = self._sweep
        if hasattr(propagator, "advance"):
            self.advance = self._advance

    def step(self, steps: range, u: Array, out: Array) -> None:
        """Write the new states of some steps ``(len(steps), *state)`` to ``out``."""
        if steps.start == 0:
            out[:1] = 0
            steps, u, out = steps[1:], u[1:], out[1:]
        if not steps:
            return None
        own = range(steps.start - 1, steps.stop - 1, steps.step)
        return self.propagator.step(own, u, out)  # nothing, which the level checks

    def _sweep(self, first: int, U: Array, G: Array | None) -> None:
        if first == 0:
            U[1] = 0 if G is None else G[0]
            first, U, G = 1, U[1:], None if G is None else G[1:]
        return self.propagator.sweep(first - 1, U, G) if len(U) > 1 else None

    def _advance(self, first: int, stride: int, u: Array, out: Array, G: Array | None) -> None:
        # step 0 leads to a C-point, so that it is none of these
        return self.propagator.advance(first - 1, stride, u, out, G)


class TransposedAdjoint(TransposedSweep):
    """Transposed cycles of MGRIT.

    Parameters
    ----------
    adjoint
        The adjoint sweep, whose levels' steps (and their data) are used: by ``step(steps, u, out)``.
    steps
        Number of own steps ``k``.
    is_last
        Whether the last of all steps is among them.
    options, bounds, **given
        Those of the adjoint sweep.
    """

    start = "guess"

    def __init__(
        self, adjoint: MGRIT, steps: int, *, is_last: bool, options: MGRITOptions, bounds: Sequence[int], **given: Any
    ):
        (N, *coarse) = [level.nsteps for level in adjoint.levels]
        self._steps = steps
        points = [(0, *range(1, n + 1, n // below)) for n, below in pairwise((N, *coarse))]
        options = MGRITOptions.make(options, coarsening=tuple(points), rtol=0.0, atol=0.0, view=False)
        bounds = [0, *(b + 1 for b in bounds[1:])]
        shifted = [_Shifted(level.propagator) for level in adjoint.levels]
        solver = MGRIT(shifted, N + 1, options=options, bounds=bounds, transposed=True, **given)
        super().__init__(solver, steps + 1 + int(is_last))

    @staticmethod
    def exists(adjoint: object, *, linear: bool, per_step: bool) -> bool:
        """Whether an adjoint sweep has transposed cycles.

        It has to be a plain MGRIT sweep whose C-points are those of the forward sweep, with the steps of the forward
        sweep, controls included (a nonlinear evolution's differ where controls are ``per_step``). All points have to be
        stored; cycles begin at zero and do not differ; the last one is followed by no relaxation.
        """
        if not isinstance(adjoint, MGRIT) or len(adjoint.levels) == 1 or adjoint.options.storage == "C":
            return False
        options = adjoint.options
        if options.coarse_solver not in ("sequential", "gathered") or options.check != "cycle":
            return False
        fits = all(fine.m and fine.nsteps % fine.m == 0 for fine in adjoint.levels[:-1])
        same = linear or not per_step
        return fits and same and options.start in ("auto", "guess") and options.f_cycles is None

    @property
    def adjoints(self) -> Array:
        """Adjoints of the own points, ``(k + 1, n)``, after a solve."""
        rows = reversed_rows(self._rows) if is_tensor(self._rows) else self._rows
        return rows[: self._steps + 1]

    def arrays(self, gradient: Array) -> tuple[Array, Array]:
        """The arguments of a solve: unknowns, which are zero, and the right-hand side of the own steps.

        Parameters
        ----------
        gradient
            Misfit gradients of the own points, ``(k + 1, n)``, or of a batch ``(k + 1, members, n)``.
        """
        if is_tensor(
            gradient
        ):  # the rows are in the solver's order, as tensors have no view from the last to the first
            return self._zeros(gradient.shape[1:], gradient), reversed_rows(gradient[: self.rows - 1])
        return self._zeros(gradient.shape[1:])[::-1], gradient[: self.rows - 1][::-1]

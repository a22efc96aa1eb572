r"""Adjoint sweeps by a fixed number of transposed cycles: what makes an inexact Hessian symmetric.

``K`` cycles from zero are a linear map :math:`M_K \approx A^{-1}` of right-hand sides. A Hessian action with
:math:`M_K` for the tangent and :math:`M_K^T` for the adjoint,

.. math:: H_K = B^T M_K^T\, C\, M_K B + R'' ,

is symmetric however few cycles there are: conjugate gradients on it are those of one operator, positive definite where
``C`` is semidefinite and ``R''`` definite. (``B`` is the derivative of the steps by the control, ``C`` that of the
misfits, and of the steps where they are not affine.) With tolerances instead of cycles the products are not even those
of one linear operator.

The exact transpose has the reversed grid of :mod:`pint_fem.mgrit.space_time_operator`: point ``i`` is
:math:`\lambda_{N+1-i}`, from :math:`\lambda_{N+1} = 0`, where the adjoint sweep begins with :math:`\lambda_N`. That
makes a step in front, which gives zero, and C-points ``0, 1, 1 + m, ...``; point ``N + 1`` is :math:`\lambda_0`, an
F-point.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from pint_fem.mgrit.options import MGRITOptions
from pint_fem.mgrit.solver import MGRIT

__all__ = ["TransposedAdjoint"]


class _Shifted:
    """Steps of an adjoint level behind an empty one: step ``i`` is step ``i - 1`` there, and step 0 gives zero."""

    def __init__(self, adjoint):
        self.adjoint, self.block = adjoint, adjoint.block
        if hasattr(adjoint, "sweep"):
            self.sweep = self._sweep

    def step(self, steps, u, out):
        """See :class:`pint_fem.all_at_once.levels.Propagator`."""
        lane = (steps.start - 1) // steps.step + 1  # of the interval on this grid
        if steps.start == 0:
            out[:1] = 0
            steps, u, out, lane = steps[1:], u[1:], out[1:], lane + 1
        if not len(steps):
            return None
        return self.adjoint.take(range(steps.start - 1, steps.stop - 1, steps.step), u, out, lane)

    def _sweep(self, first, U, G):
        if first == 0:
            U[1] = 0 if G is None else G[0]
            first, U, G = 1, U[1:], None if G is None else G[1:]
        return self.adjoint.sweep(first - 1, U, G) if len(U) > 1 else None


class TransposedAdjoint:
    """The solver and its arrays.

    Parameters
    ----------
    adjoint
        The adjoint sweep, whose levels' steps (and their data) are used: by ``take(steps, u, out, lane)``, with the
        place of the first one among its like.
    steps
        Own steps.
    is_last
        Whether the last of all is among them.
    options, bounds, **given
        Those of the adjoint sweep.

    Attributes
    ----------
    solver : MGRIT
    start : str
        With which sweeps of the model begin, from zero.
    rows : int
        States that it keeps on the finest level.
    adjoints : ndarray, shape (k + 1, n)
        Of the own points, after a solve.
    """

    start = "guess"

    def __init__(self, adjoint: MGRIT, steps: int, *, is_last: bool, options: MGRITOptions, bounds, **given):
        (N, *coarse) = [level.nsteps for level in adjoint.levels]
        self._steps, self.rows = steps, steps + 1 + int(is_last)
        points = [(0, *range(1, n + 1, n // below)) for n, below in pairwise((N, *coarse))]
        options = MGRITOptions.make(options, coarsening=tuple(points), rtol=0.0, atol=0.0, view=False)
        bounds = [0, *(b + 1 for b in bounds[1:])]
        shifted = [_Shifted(level.propagator) for level in adjoint.levels]
        self.solver = MGRIT(shifted, N + 1, options=options, bounds=bounds, transposed=True, **given)
        self._rows: np.ndarray | None = None

    @staticmethod
    def exists(adjoint, *, linear: bool, per_step: bool) -> bool:
        """Whether an adjoint sweep has one: a plain MGRIT sweep whose C-points are those of the forward sweep, and
        steps that are the forward ones', controls included (a nonlinear evolution's differ where they are
        ``per_step``). All points have to be stored, cycles begin from zero, are all alike, and the last one is followed
        by no relaxation.
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
    def adjoints(self) -> np.ndarray:
        """See the class."""
        return self._rows[: self._steps + 1]

    def collect(self) -> np.ndarray:
        """The adjoints of a solve."""
        return self.adjoints

    def arrays(self, gradient: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Unknowns, zero, and right-hand side of the own steps, for misfit gradients ``(k + 1, n)``."""
        if self._rows is None:
            self._rows = np.empty((self.rows, gradient.shape[1]))
        self._rows[...] = 0
        return self._rows[::-1], gradient[: self.rows - 1][::-1]

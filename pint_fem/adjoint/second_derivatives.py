r"""Hessian actions of the functional of one evolution, in one direction or in several at once.

An action is a tangent sweep in the direction :math:`\delta z` and a sweep for the second-order adjoint :math:`\mu`,
which is driven by :math:`j_n''(u_n)\,\delta u_n` and the second derivatives of the steps:

.. math::
    J''(z)\,\delta z = \sum_n \Phi_{n,z}^T \mu_{n+1} + \text{second-order terms of the steps} + R''(z)\,\delta z .

Actions in several directions share state, adjoint and all that is linearised there, so they are one tangent sweep and
one adjoint sweep of a batch (:mod:`pint_fem.sweeps.batches`), with states ``(points, members, n)``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from pint_fem.adjoint.evaluation import Evaluation, EvaluationCache, relative_residual
from pint_fem.adjoint.interface import as_vector, require_directions
from pint_fem.adjoint.memory_estimate import bytes_per_direction, estimate_memory
from pint_fem.adjoint.regularisation import Regularisation
from pint_fem.adjoint.trajectories import CPointTrajectories, Source, StoredTrajectories
from pint_fem.all_at_once.stopping import SolveResult
from pint_fem.capacity import most_items
from pint_fem.evolution.control_layout import ControlLayout
from pint_fem.sweeps.sweeps import Sweeps

if TYPE_CHECKING:
    from pint_fem.adjoint.problem import ReducedProblem

__all__ = ["SecondDerivatives"]

Directions = np.ndarray | list[np.ndarray]
"""A direction ``(layout.size,)``, or a list of them for a batch."""


class SecondDerivatives:
    """Hessian actions of a :class:`~pint_fem.adjoint.problem.ReducedProblem`, whose attributes these are."""

    sweeps: Sweeps
    layout: ControlLayout
    regularisation: Regularisation | None
    _cache: EvaluationCache
    _trajectories: StoredTrajectories | CPointTrajectories

    # -- parts of an action; for a batch, arrays have an axis of members, and directions are lists ---------------------
    def _along(self, part: Callable[[np.ndarray], np.ndarray | None], dz: Directions) -> np.ndarray | list | None:
        """A part of a direction, or a list with that of each; ``None`` where there is none."""
        if not isinstance(dz, list):
            return part(dz)
        parts = [part(own) for own in dz]
        return None if parts[0] is None else parts

    def _new_slab(self, dz: Directions) -> np.ndarray:
        """Return zero states for a direction, or for each of a batch."""
        return self.sweeps.new_slab(*((len(dz),) if isinstance(dz, list) else ()))

    def _tangent(self, evaluation: Evaluation, dz: Directions, **accuracy: float) -> tuple[np.ndarray, SolveResult]:
        """Return the derivative of the state in a direction, solved from zero, and the result of the solve."""
        dU = self._new_slab(dz)
        steps, direction = self.layout.steps(evaluation.z), self._along(self.layout.steps, dz)
        initial = self._along(self.layout.initial, dz)
        return dU, self.sweeps.tangent(steps, evaluation.U, direction, dU, initial=initial, **accuracy)

    def second_source(
        self, evaluation: Evaluation, dz: Directions, dU: np.ndarray, *, second: bool, symmetric: bool = False
    ) -> Source:
        """Return the right-hand side of the second-order adjoint."""
        steps, direction = self.layout.steps(evaluation.z), self._along(self.layout.steps, dz)
        return self._trajectories.hessian(evaluation, steps, direction, dU, second=second, symmetric=symmetric)

    def _second_adjoint(
        self, evaluation: Evaluation, dz: Directions, *, second: bool, **accuracy: float
    ) -> tuple[np.ndarray, Source]:
        """Return the second-order adjoint, and its right-hand side.

        Only these sweeps have inexact solves. The derivatives by the controls follow from exact ones: their right-hand
        sides are sums over the own steps, which other numbers of ranks in time divide differently.
        """
        M = self._new_slab(dz)
        with self.sweeps.solves_within(accuracy.get("rtol")):
            source = self.second_source(evaluation, dz, self._tangent(evaluation, dz, **accuracy)[0], second=second)
            self.sweeps.adjoint(self.layout.steps(evaluation.z), evaluation.U, source.rows, M, cold=True, **accuracy)
        return M, source

    def _symmetric_adjoint(
        self, evaluation: Evaluation, dz: Directions, cycles: int, *, second: bool
    ) -> tuple[np.ndarray, Source, float]:
        """Return the second-order adjoint by the transposes of the tangent's cycles, its right-hand side, and the
        larger relative residual of the two sweeps.
        """
        start = self.sweeps.solvers.transposed_adjoint.start
        dU, tangent = self._tangent(evaluation, dz, start=start, cycles=cycles)
        source = self.second_source(evaluation, dz, dU, second=second, symmetric=True)
        steps = self.layout.steps(evaluation.z)
        M, result = self.sweeps.adjoint_by_transposed_cycles(steps, evaluation.U, source.rows, cycles=cycles)
        return M, source, max(map(relative_residual, (tangent, result)))

    def _pull_back(self, evaluation: Evaluation, L: np.ndarray, controls: np.ndarray | None) -> np.ndarray:
        """Return the derivatives by the controls that follow from an adjoint and its right-hand side's ``controls``."""
        rows = self._trajectories.control_gradient(evaluation, self.layout.steps(evaluation.z), L, controls)
        return self.layout.gradient(rows, L[0])

    def _pull_back_members(self, evaluation: Evaluation, M: np.ndarray, controls: list | None) -> list[np.ndarray]:
        """Return :meth:`_pull_back` of each adjoint of a batch."""
        rows = self._trajectories.control_gradient(evaluation, self.layout.steps(evaluation.z), M, controls)
        return [self.layout.gradient(own, M[0, b]) for b, own in enumerate(rows or [None] * M.shape[1])]

    def _regularised(self, evaluation: Evaluation, dz: np.ndarray, action: np.ndarray) -> np.ndarray:
        """Return an action of the misfits with that of the regularisation."""
        return action if self.regularisation is None else action + self.regularisation.hessian(evaluation.z, dz)

    def prepared(
        self, z: np.ndarray, directions: Mapping[str, np.ndarray], gauss_newton: bool, **accuracy: float
    ) -> tuple[Evaluation, bool]:
        """Return the evaluation of a control for a Hessian action, and whether the action has second-order terms of the
        steps. A state and an adjoint that are cached are used as they are where the action has an accuracy of its own.
        """
        evaluation = self._cache.find(z, directions, **accuracy)
        if not accuracy or evaluation is None or evaluation.state is None:
            evaluation = self._cache.state(z)
        second = not gauss_newton and not self.sweeps.is_affine
        if second and evaluation.adjoint is None:
            evaluation = self._cache.adjoint(z)
        return evaluation, second

    # -- one direction -------------------------------------------------------------------------------------------------
    def hessian_action(
        self, z: np.ndarray, dz: np.ndarray, *, gauss_newton: bool = False, **accuracy: float
    ) -> np.ndarray:
        """Return ``J''(z) dz`` as a dual vector; with ``gauss_newton`` without second derivatives of the steps.
        ``rtol`` is the tolerance of the two sweeps, by default that of the options; where it is given, iterative
        solvers of linear systems stop early, too, also those of sequential steps.
        """
        dz = as_vector(dz)
        evaluation, second = self.prepared(z, {"direction": dz}, gauss_newton, **accuracy)
        return self.action(evaluation, dz, *self._second_adjoint(evaluation, dz, second=second, **accuracy))

    def action(self, evaluation: Evaluation, dz: np.ndarray, M: np.ndarray, source: Source) -> np.ndarray:
        """Return a Hessian action from the second-order adjoint and its right-hand side."""
        return self._regularised(evaluation, dz, self._pull_back(evaluation, M, source.controls))

    def symmetric_action(
        self, z: np.ndarray, dz: np.ndarray, cycles: int, *, gauss_newton: bool = False
    ) -> tuple[np.ndarray, float]:
        """Return the action of a symmetric operator near the Hessian.

        Approximate tangent and second-order adjoint sweeps make the action unsymmetric. Here the adjoint sweep is the
        exact transpose of the tangent's ``cycles`` cycles from zero (:mod:`pint_fem.mgrit.transposed_cycles`,
        :mod:`pint_fem.paradiag.transposed_iterations`), for the state and adjoint that are cached.

        Parameters
        ----------
        z, dz
            The control and the direction.
        cycles
            Cycles of each sweep.
        gauss_newton
            Without second derivatives of the steps.

        Returns
        -------
        ndarray, float
            A dual vector, and the larger relative residual of the two sweeps.
        """
        dz = as_vector(dz)
        evaluation, second = self.prepared(z, {"direction": dz}, gauss_newton, cycles=cycles)
        M, source, residual = self._symmetric_adjoint(evaluation, dz, cycles, second=second)
        return self.action(evaluation, dz, M, source), residual

    # -- several directions --------------------------------------------------------------------------------------------
    def hessian_actions(
        self,
        z: np.ndarray,
        directions: Sequence[np.ndarray],
        *,
        gauss_newton: bool = False,
        at_once: int | None = None,
        **accuracy: float,
    ) -> list[np.ndarray]:
        """Return ``J''(z) dz`` for each of several directions: :meth:`hessian_action` to the tolerance of the sweeps,
        which are one tangent and one adjoint for as many directions as fit the memory, at most ``at_once``.
        """
        vectors, named = require_directions(self.layout, directions, at_once)
        evaluation, second = self.prepared(z, named, gauss_newton, **accuracy)

        sweeps = lambda dz: self._second_adjoint(evaluation, dz, second=second, **accuracy)
        return self._in_batches(evaluation, vectors, at_once, sweeps)

    def symmetric_actions(
        self,
        z: np.ndarray,
        directions: Sequence[np.ndarray],
        cycles: int,
        *,
        gauss_newton: bool = False,
        at_once: int | None = None,
    ) -> tuple[list[np.ndarray], float]:
        """Return :meth:`symmetric_action` for each of several directions, and the largest relative residual of all
        sweeps; ``at_once`` is the largest number of directions of a sweep.
        """
        vectors, named = require_directions(self.layout, directions, at_once)
        evaluation, second = self.prepared(z, named, gauss_newton, cycles=cycles)
        residuals: list[float] = []

        def sweeps(dz: list[np.ndarray]) -> tuple[np.ndarray, Source]:
            M, source, residual = self._symmetric_adjoint(evaluation, dz, cycles, second=second)
            residuals.append(residual)
            return M, source

        return self._in_batches(evaluation, vectors, at_once, sweeps), max(residuals)

    def _in_batches(
        self,
        evaluation: Evaluation,
        vectors: list[np.ndarray],
        at_once: int | None,
        sweeps: Callable[[list[np.ndarray]], tuple[np.ndarray, Source]],
    ) -> list[np.ndarray]:
        """Return the actions, from the second-order adjoints and their right-hand sides that ``sweeps`` returns for a
        batch of directions.
        """
        out: list[np.ndarray] = []
        size = min(at_once or len(vectors), len(vectors))
        size = 1 if size == 1 else min(size, self._most_members)
        try:
            for first in range(0, len(vectors), size):
                dz = vectors[first : first + size]
                M, source = sweeps(dz)
                actions = self._pull_back_members(evaluation, M, source.controls)
                out += [self._regularised(evaluation, d, a) for d, a in zip(dz, actions, strict=True)]
                del M, source
        finally:
            self.sweeps.solvers.release_batch()
        return out

    @cached_property
    def _most_members(self: ReducedProblem) -> int:  # type: ignore[misc]
        """Members of a batch that fit the memory beside all else (collective)."""
        estimate = estimate_memory(self)
        return most_items(self.spacetime.comm, estimate.peak(), bytes_per_direction(self, estimate))

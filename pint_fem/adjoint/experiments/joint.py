"""Trajectories and Hessian actions of several problems whose evolutions have the same operators, by one solve for all.

The problems keep their evaluations, data and misfits, and compute all right-hand sides and derivatives themselves. What
is done at once are the sweeps over all steps, which solve for ``(points, problems, n)`` with one factorisation.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pint_fem.adjoint.evaluation import Evaluation, EvaluationCache, relative_residual, solve_for
from pint_fem.adjoint.problem import ReducedProblem
from pint_fem.sweeps.shared.joint import JointSweeps
from pint_fem.sweeps.shared.operators import can_be_solved_as_one

__all__ = ["JointProblems", "joint_problems"]


def joint_problems(problems: Sequence[object]) -> list[list[int]]:
    """Numbers of the problems that can be solved at once, those of each group in order; without groups of one.

    Parameters
    ----------
    problems
        Problems of a sum. Those that are not of one evolution, or that are in the sum several times, are in no group.
    """
    groups: list[list[int]] = []
    for number, problem in enumerate(problems):
        if not isinstance(problem, ReducedProblem) or any(problem is other for other in problems[:number]):
            continue
        for group in groups:
            if can_be_solved_as_one(problems[group[0]].sweeps, problem.sweeps):
                group.append(number)
                break
        else:
            groups.append([number])
    return [group for group in groups if len(group) > 1]


class JointProblems:
    """Several problems whose sweeps are solved at once.

    Parameters
    ----------
    problems
        The problems, each of them once.
    """

    def __init__(self, problems: Sequence[ReducedProblem]):
        self.problems = list(problems)
        self._sweeps = JointSweeps([problem.sweeps for problem in problems])

    def _steps(self, evaluations: Sequence[Evaluation]) -> list:
        """The controls of the own steps of each problem."""
        return [p.layout.steps(e.z) for p, e in zip(self.problems, evaluations, strict=True)]

    def solve_states(self, z: Sequence[np.ndarray], **accuracy: float) -> list[Evaluation]:
        """Return the evaluations of the problems' controls with their states solved (collective); errors as for
        :meth:`~pint_fem.adjoint.problem.ReducedProblem.value`.
        """
        caches = [problem.cache for problem in self.problems]
        evaluations = [cache.at(own, **accuracy) for cache, own in zip(caches, z, strict=True)]
        steps = self._steps(evaluations)
        initial = [p.layout.initial(e.z) for p, e in zip(self.problems, evaluations, strict=True)]

        def solve(which: list[int], U: list[np.ndarray], *, cold: bool):
            given = ([steps[i] for i in which], U, [initial[i] for i in which])
            return self._sweeps.part(which).state(*given, cold=cold, **accuracy)

        solve_for("state", list(zip(caches, evaluations, strict=True)), accuracy, solve)
        return evaluations

    def solve_adjoints(self, z: Sequence[np.ndarray], **accuracy: float) -> list[Evaluation]:
        """Return the evaluations of the problems' controls with states and adjoints solved (collective)."""
        evaluations = self.solve_states(z, **accuracy)
        caches: list[EvaluationCache] = [problem.cache for problem in self.problems]
        pending = [i for i, e in enumerate(evaluations) if not caches[i].is_cached(e, "adjoint", accuracy)]
        if not pending:
            return evaluations
        steps = self._steps(evaluations)
        sources = {i: caches[i].adjoint_source(evaluations[i]) for i in pending}

        def solve(which: list[int], L: list[np.ndarray], *, cold: bool):
            numbers = [pending[i] for i in which]
            given = [steps[i] for i in numbers], [evaluations[i].U for i in numbers], [sources[i].rows for i in numbers]
            return self._sweeps.part(numbers).adjoint(*given, L, cold=cold, **accuracy)

        solve_for("adjoint", [(caches[i], evaluations[i]) for i in pending], accuracy, solve)
        for i in pending:
            evaluations[i].controls = sources[i].controls
        return evaluations

    def hessian_actions(
        self, z: Sequence[np.ndarray], dz: Sequence[np.ndarray], *, gauss_newton: bool = False, **accuracy: float
    ) -> list[np.ndarray]:
        """Return the Hessian action of each problem in its direction, as
        :meth:`~pint_fem.adjoint.second_derivatives.SecondDerivatives.hessian_action` does.
        """
        evaluations, second = self._prepared(z, dz, gauss_newton, **accuracy)
        steps = self._steps(evaluations)
        dU, _ = self._tangents(evaluations, dz, **accuracy)
        sources = [
            p.second_source(e, own, du, second=second)
            for p, e, own, du in zip(self.problems, evaluations, dz, dU, strict=True)
        ]
        M = [p.sweeps.new_slab() for p in self.problems]
        rows = [source.rows for source in sources]
        self._sweeps.adjoint(steps, [e.U for e in evaluations], rows, M, cold=True, **accuracy)
        return self._pulled_back(evaluations, dz, M, sources)

    def symmetric_actions(
        self, z: Sequence[np.ndarray], dz: Sequence[np.ndarray], cycles: int, *, gauss_newton: bool = False
    ) -> tuple[list[np.ndarray], float]:
        """Return the action of each problem's symmetric operator near the Hessian in its direction, and the largest
        relative residual, as :meth:`~pint_fem.adjoint.second_derivatives.SecondDerivatives.symmetric_action` does.
        """
        evaluations, second = self._prepared(z, dz, gauss_newton, cycles=cycles)
        start = self.problems[0].sweeps.solvers.transposed_adjoint.start
        dU, tangent = self._tangents(evaluations, dz, start=start, cycles=cycles)
        sources = [
            p.second_source(e, own, du, second=second, symmetric=True)
            for p, e, own, du in zip(self.problems, evaluations, dz, dU, strict=True)
        ]
        steps, rows = self._steps(evaluations), [source.rows for source in sources]
        states = [e.U for e in evaluations]
        M, result = self._sweeps.adjoint_by_transposed_cycles(steps, states, rows, cycles=cycles)
        return self._pulled_back(evaluations, dz, M, sources), max(map(relative_residual, (tangent, result)))

    # -- parts of an action --------------------------------------------------------------------------------------------
    def _prepared(
        self, z: Sequence[np.ndarray], dz: Sequence[np.ndarray], gauss_newton: bool, **accuracy: float
    ) -> tuple[list[Evaluation], bool]:
        """Return the evaluations for a Hessian action, and whether it has second-order terms of the steps."""
        second = not gauss_newton and not self.problems[0].sweeps.is_affine
        if not accuracy:
            (self.solve_adjoints if second else self.solve_states)(z)
        each = zip(self.problems, z, dz, strict=True)
        prepared = [p.prepared(own, {"direction": along}, gauss_newton, **accuracy) for p, own, along in each]
        return [evaluation for evaluation, _ in prepared], second

    def _tangents(self, evaluations: Sequence[Evaluation], dz: Sequence[np.ndarray], **accuracy: float):
        """Return the derivative of each problem's state in its direction, and the result of the solve."""
        pairs = list(zip(self.problems, dz, strict=True))
        dU = [p.sweeps.new_slab() for p in self.problems]
        directions, initial = [p.layout.steps(own) for p, own in pairs], [p.layout.initial(own) for p, own in pairs]
        states = [e.U for e in evaluations]
        return dU, self._sweeps.tangent(self._steps(evaluations), states, directions, dU, initial, **accuracy)

    def _pulled_back(self, evaluations, dz, M, sources) -> list[np.ndarray]:
        """Return the actions from second-order adjoints and their right-hand sides."""
        each = zip(self.problems, evaluations, dz, M, sources, strict=True)
        return [p.action(e, own, adjoint, source) for p, e, own, adjoint, source in each]

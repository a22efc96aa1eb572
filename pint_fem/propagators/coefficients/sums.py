"""Sums over steps of what the derivative by controls in operators and loads requires of states and adjoints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pint_fem.propagators.coefficients.derivatives import DirectionMatrices, OperatorDerivatives
from pint_fem.propagators.coefficients.loads import CoefficientLoads

__all__ = ["ControlSums", "Direction", "Stages"]


class Direction(NamedTuple):
    """The derivatives of the operators in a direction of the controls; ``None`` where they vanish."""

    M: DirectionMatrices | None
    K: DirectionMatrices | None


class Stages(NamedTuple):
    """Stages of some steps: values and differences from the base values, ``(k, n)`` for each stage."""

    U: list[np.ndarray]
    D: list[np.ndarray]


class ControlSums:
    """Sums of products in each cell for ``K`` and ``M``, weighted sums of adjoints for the loads, and a derivative.

    Parameters
    ----------
    of_M, of_K
        Derivatives of the operators; ``None`` for one without controls.
    loads
        The loads of the stages.
    steps
        The coefficients ``a_ii dt`` of the stages.
    vector
        Sums to be continued, which are changed; default: zero.

    Attributes
    ----------
    vector : ndarray
        All sums, the derivative by the controls last.
    """

    def __init__(
        self,
        of_M: OperatorDerivatives | None,
        of_K: OperatorDerivatives | None,
        loads: CoefficientLoads,
        steps: np.ndarray,
        vector: np.ndarray | None = None,
    ):
        self._of_M, self._of_K, self._loads, self._steps = of_M, of_K, loads, steps
        ev = loads.evolution
        terms = len(loads.terms(np.zeros(0)))
        shapes = [() if of is None else of.shape for of in (of_M, of_K)]
        shapes = [shape or (0,) for shape in shapes] + [(terms, len(steps), ev.state_size), (ev.control_size,)]
        ends = np.cumsum([int(np.prod(shape)) for shape in shapes])
        self.vector = np.zeros(ends[-1]) if vector is None else vector
        parts = np.split(self.vector, ends[:-1])
        self._M, self._K, self._adjoints, self.derivative = (
            part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)
        )

    def add(self, p: np.ndarray, stages: Stages, times: np.ndarray, *, loads: bool = True) -> None:
        """Add the sums of steps (collective over space).

        Parameters
        ----------
        p
            Adjoints of the stages' right-hand sides, ``(stages, k, n)``.
        stages
            The stages, or their tangents.
        times
            Start times, ``(k,)``.
        loads
            Whether the loads depend on the controls along these adjoints.
        """
        for i, h in enumerate(self._steps):
            if self._of_K is not None:
                self._of_K.add_products(p[i], stages.U[i], self._K, h)
            if self._of_M is not None:
                self._of_M.add_products(p[i], stages.D[i], self._M)
        if loads:
            for total, term in zip(self._adjoints, self._loads.terms(times), strict=True):
                total += np.einsum("k,skn->sn", term.weights, p)

    def _operators(self) -> Sequence[tuple[OperatorDerivatives, np.ndarray]]:
        return [(of, part) for of, part in ((self._of_M, self._M), (self._of_K, self._K)) if of is not None]

    def gradient(self) -> np.ndarray:
        """The derivative by the controls, ``(nz,)`` (collective over space)."""
        out = self.derivative.copy()
        for of, products in self._operators():
            out -= of.gradient(products)
        for adjoints, term in zip(self._adjoints, self._loads.terms(np.zeros(0)), strict=True):
            out += self._loads.pull_back(term, adjoints)
        return out

    def second(self, dz: np.ndarray) -> np.ndarray:
        """The derivative of the operators' part of :meth:`gradient` in a direction ``(nz,)`` (collective over
        space).
        """
        out = np.zeros_like(self.derivative)
        for of, products in self._operators():
            out -= of.second(products, dz)
        return out

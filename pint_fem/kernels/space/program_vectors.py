"""The vectors of a step program in memory, of one state or of a block of states, and what is done with them alone."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pint_fem.kernels.lanes.program import STATE, Operation, StepProgram

__all__ = ["ProgramVectors"]


class ProgramVectors:
    """The vectors of a program, arrays ``(..., size)``, and the operations that require neither matrices nor factors.

    Subclasses allocate the vectors, and define the operations ``multiply``, ``solve`` and ``project``.

    Parameters
    ----------
    program
        The program.

    Attributes
    ----------
    sizes : dict of str to int
        Number of own entries of each vector.
    vectors : dict of str to ndarray
        The vectors by name.
    """

    def __init__(self, program: StepProgram):
        self.program = program
        self._rows = np.concatenate([program.parts[part] for part in program.vectors[STATE]])
        self._place = np.argsort(self._rows)
        self._slices: dict[tuple[str, str | None], slice] = {}
        self.sizes: dict[str, int] = {}
        for name, parts in program.vectors.items():
            first = 0
            for part in parts:
                size = len(program.parts[part])
                self._slices[name, part] = slice(first, first + size)
                first += size
            self._slices[name, None], self.sizes[name] = slice(0, first), first
        calls = dict(multiply=self._multiply, solve=self._solve, copy=self._copy, add=self._add, zero=self._zero,
                     clear=self._clear, project=self._project,
                     blend=self._blend, exchange=self._exchange)  # fmt: skip
        self.calls: dict[str, Callable[[Operation], None]] = calls
        self.vectors: dict[str, np.ndarray] = {}

    def view(self, name: str, part: str | None) -> np.ndarray:
        """A part of a vector, or the whole of it."""
        return self.vectors[name][..., self._slices[name, part]]

    def combine(self, op: Operation, product: np.ndarray) -> None:
        """Write a product with a matrix, or add it to a multiple of what is there, as the operation says."""
        y = self.view(op.out, op.part)
        if op.flag:
            y *= op.scale
            y += op.factor * product
        else:
            np.multiply(product, op.factor, out=y)

    def _multiply(self, op: Operation) -> None:
        raise NotImplementedError

    def _solve(self, op: Operation) -> None:
        raise NotImplementedError

    def _project(self, op: Operation) -> None:
        raise NotImplementedError

    def _copy(self, op: Operation) -> None:
        np.multiply(self.view(op.x, op.x_part), op.factor, out=self.view(op.out, op.part))

    def _add(self, op: Operation) -> None:
        y = self.view(op.out, op.part)
        y += op.factor * self.view(op.x, op.x_part)

    def _blend(self, op: Operation) -> None:
        y = self.vectors[op.out]
        y *= op.factor
        y += (1.0 - op.factor) * self.vectors[op.x]

    def _exchange(self, op: Operation) -> None:
        vectors = self.vectors
        vectors[op.out], vectors[op.x] = vectors[op.x], vectors[op.out]

    def _zero(self, op: Operation) -> None:
        self.vectors[op.out][:] = 0

    def _clear(self, op: Operation) -> None:
        self.vectors[op.out][..., self._place[op.what]] = 0

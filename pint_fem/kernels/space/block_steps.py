"""Execution of step programs on blocks of states that are distributed over ranks in space.

Every product and every solve communicates once for all states of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from mpi4py import MPI

from pint_fem.kernels.lanes.program import STATE, Operation, StepProgram
from pint_fem.kernels.space.matrices import BlockMatrix, sum_over_ranks

__all__ = ["BlockSteps"]

MOST = 32
"""States that are stepped together."""


class BlockSteps:
    """A step program executed by products and solves on blocks of states.

    Parameters
    ----------
    program
        The program, whose matrices are PETSc's and whose factors are :class:`~pint_fem.kernels.factor.Factor`.
    comm
        Communicator of the matrices.
    """

    def __init__(self, program: StepProgram, comm: MPI.Comm):
        self.program, self._comm = program, comm
        self._rows = np.concatenate([program.parts[part] for part in program.vectors[STATE]])
        self._place = np.argsort(self._rows)
        self._plain = np.array_equal(self._rows, np.arange(program.size))
        self._slices: dict[tuple[str, str | None], slice] = {}
        self._sizes: dict[str, int] = {}
        for name, parts in program.vectors.items():
            first = 0
            for part in parts:
                size = len(program.parts[part])
                self._slices[name, part] = slice(first, first + size)
                first += size
            self._slices[name, None], self._sizes[name] = slice(0, first), first
        self._matrices: dict[int, BlockMatrix] = {}
        for op in program.operations:
            if op.kind == "multiply" and op.what.handle not in self._matrices:
                self._matrices[op.what.handle] = BlockMatrix.of_petsc(op.what)
        calls = dict(multiply=self._multiply, solve=self._solve, copy=self._copy, add=self._add, zero=self._zero,
                     clear=self._clear, project=self._project,
                     blend=self._blend, exchange=self._exchange)  # fmt: skip
        self._calls: dict[str, Callable[[Operation], None]] = calls
        self._vectors: dict[str, np.ndarray] = {}

    @property
    def in_single(self) -> BlockSteps:
        """These steps: products and solves have one precision."""
        return self

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes of the copies of matrices."""
        return {"kernels": sum(matrix.nbytes for matrix in self._matrices.values())}

    def work_nbytes(self, states: int) -> int:
        """Bytes of the vectors of a call with a number of states."""
        return 8 * min(states, MOST) * sum(self._sizes.values())

    def run(
        self,
        u: np.ndarray,
        out: np.ndarray,
        added: np.ndarray | None = None,
        states: Sequence[np.ndarray | None] = (),
    ) -> None:
        """Take steps as :meth:`~pint_fem.kernels.steps.Steps.run` (collective over space).

        Raises
        ------
        ArithmeticError, PETSc.Error
            If a solver fails.
        """
        for first in range(0, out.shape[0], MOST):
            rows = slice(first, min(first + MOST, out.shape[0]))
            count = rows.stop - rows.start
            self._vectors = {name: np.zeros((count, size)) for name, size in self._sizes.items()}
            self._vectors[STATE][:] = u[rows] if self._plain else u[rows][:, self._rows]
            for step in range(out.shape[1]):
                self._step(rows, step, states)
                state = self._vectors[STATE]
                if added is not None:
                    state += self._given(added[rows, step])
                out[rows, step] = state if self._plain else state[:, self._place]
        self._vectors = {}

    def _given(self, values: np.ndarray) -> np.ndarray:
        """States in the order of the vectors."""
        return values if self._plain else values[:, self._rows]

    def _step(self, rows: slice, step: int, states: Sequence[np.ndarray | None]) -> None:
        for op in self.program.operations:
            if op.kind not in ("load", "store"):
                self._calls[op.kind](op)
                continue
            given = states[op.what] if op.what < len(states) else None
            if given is not None and op.kind == "load":
                self._vectors[op.out] += self._given(given[rows, step])
            elif given is not None:
                vector = self._vectors[op.out]
                given[rows, step] = vector if self._plain else vector[:, self._place]

    def _view(self, name: str, part: str | None) -> np.ndarray:
        return self._vectors[name][:, self._slices[name, part]]

    def _multiply(self, op: Operation) -> None:
        y, matrix = self._view(op.out, op.part), self._matrices[op.what.handle]
        found = np.empty((len(y), matrix.rows))
        matrix.product_of_rows(self._view(op.x, op.x_part), found)
        if op.flag:
            y *= op.scale
            y += op.factor * found
        else:
            np.multiply(found, op.factor, out=y)

    def _solve(self, op: Operation) -> None:
        self._vectors[op.out][:] = op.what.solve_rows(self._vectors[op.out], transposed=op.flag)

    def _copy(self, op: Operation) -> None:
        np.multiply(self._view(op.x, op.x_part), op.factor, out=self._view(op.out, op.part))

    def _add(self, op: Operation) -> None:
        y = self._view(op.out, op.part)
        y += op.factor * self._view(op.x, op.x_part)

    def _blend(self, op: Operation) -> None:
        y = self._vectors[op.out]
        y *= op.factor
        y += (1.0 - op.factor) * self._vectors[op.x]

    def _exchange(self, op: Operation) -> None:
        vectors = self._vectors
        vectors[op.out], vectors[op.x] = vectors[op.x], vectors[op.out]

    def _zero(self, op: Operation) -> None:
        self._vectors[op.out][:] = 0

    def _clear(self, op: Operation) -> None:
        self._vectors[op.out][:, self._place[op.what]] = 0

    def _project(self, op: Operation) -> None:
        y, v = self._vectors[op.out], op.what
        parts = sum_over_ranks(self._comm, np.array([float(v @ row) for row in y]))
        y -= parts[:, None] * v

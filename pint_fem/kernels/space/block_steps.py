"""Execution of step programs on blocks of states that are distributed over ranks in space.

Every product and every solve communicates once for all states of a block.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from mpi4py import MPI

from pint_fem.all_at_once.norms import sum_in_rank_order
from pint_fem.kernels.lanes.program import STATE, Operation, StepProgram
from pint_fem.kernels.space.matrices import BlockMatrix
from pint_fem.kernels.space.program_vectors import ProgramVectors

__all__ = ["BlockSteps"]

MOST = 32
"""States that are stepped together."""


class BlockSteps(ProgramVectors):
    """A step program executed by products and solves on blocks of states.

    Parameters
    ----------
    program
        The program, whose matrices are PETSc's and whose factors are :class:`~pint_fem.kernels.factor.Factor`.
    comm
        Communicator of the matrices.
    """

    def __init__(self, program: StepProgram, comm: MPI.Comm):
        super().__init__(program)
        self._comm, self._plain = comm, np.array_equal(self._rows, np.arange(program.size))
        self._matrices: dict[int, BlockMatrix] = {}
        for op in program.operations:
            if op.kind == "multiply" and op.what.handle not in self._matrices:
                self._matrices[op.what.handle] = BlockMatrix.of_petsc(op.what)

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
        return 8 * min(states, MOST) * sum(self.sizes.values())

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
            self.vectors = {name: np.zeros((count, size)) for name, size in self.sizes.items()}
            self.vectors[STATE][:] = u[rows] if self._plain else u[rows][:, self._rows]
            for step in range(out.shape[1]):
                self._step(rows, step, states)
                state = self.vectors[STATE]
                if added is not None:
                    state += self._given(added[rows, step])
                out[rows, step] = state if self._plain else state[:, self._place]
        self.vectors = {}

    def _given(self, values: np.ndarray) -> np.ndarray:
        """States in the order of the vectors."""
        return values if self._plain else values[:, self._rows]

    def _step(self, rows: slice, step: int, states: Sequence[np.ndarray | None]) -> None:
        for op in self.program.operations:
            if op.kind not in ("load", "store"):
                self.calls[op.kind](op)
                continue
            given = states[op.what] if op.what < len(states) else None
            if given is not None and op.kind == "load":
                self.vectors[op.out] += self._given(given[rows, step])
            elif given is not None:
                vector = self.vectors[op.out]
                given[rows, step] = vector if self._plain else vector[:, self._place]

    def _multiply(self, op: Operation) -> None:
        x, matrix = self.view(op.x, op.x_part), self._matrices[op.what.handle]
        found = np.empty((len(x), matrix.rows))
        matrix.product_of_rows(x, found)
        self.combine(op, found)

    def _solve(self, op: Operation) -> None:
        self.vectors[op.out][:] = op.what.solve_rows(self.vectors[op.out], transposed=op.flag)

    def _project(self, op: Operation) -> None:
        y, v = self.vectors[op.out], op.what
        parts = sum_in_rank_order(np.array([float(v @ row) for row in y]), self._comm)
        y -= parts[:, None] * v

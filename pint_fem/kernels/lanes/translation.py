"""Translation of step programs to the structs of the compiled kernels, the same for all widths."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix

from pint_fem.kernels.lanes.compiled import address
from pint_fem.kernels.lanes.program import STATE, Operation, StepProgram
from pint_fem.kernels.lanes.structures import (
    MatrixStruct,
    OperationStruct,
    ProgramStruct,
    ProjectionStruct,
    pointers,
)
from pint_fem.kernels.lanes.triangular import TriangularFactors

__all__ = ["LOADS", "Translation"]

_KINDS = "multiply solve copy add blend exchange zero clear permute load store project"
_CODES = {kind: code for code, kind in enumerate(_KINDS.split())}
LOADS = 3
"""States before those of loads: the start, the results, what is added to these."""


class Translation:
    """The operations of a program with the data that they refer to.

    Parameters
    ----------
    program
        The program, whose matrices are scipy's and whose factors are
        :class:`~pint_fem.kernels.lanes.triangular.TriangularFactors`.
    dtype
        Type of the numbers in the kernels.

    Attributes
    ----------
    place : ndarray
        The row of each unknown of a state in vectors with all parts.
    rows : list of int
        Number of rows of each vector, with the scratch row; the first is the state.
    work : float
        Multiplications for one state, about.

    Raises
    ------
    ValueError
        If factors of one part have several orders of elimination: a vector has one.
    """

    def __init__(self, program: StepProgram, dtype: np.dtype):
        self._dtype, self._vectors = dtype, program.vectors
        self._orders = _orders(program)
        rows = [program.parts[part][self._orders[part]] for part in program.vectors[STATE]]
        self.place = np.empty(program.size, np.int32)
        self.place[np.concatenate(rows)] = np.arange(program.size)
        self._objects: list[Any] = []
        self._arrays: list[np.ndarray] = [self.place]
        self._matrices: dict[tuple, int] = {}
        self._sizes = {name: sum(len(self._orders[part]) for part in parts) for name, parts in program.vectors.items()}
        for op in program.operations:
            if op.kind == "solve" and op.what.enter is not None:
                self._sizes[f"{op.out}, permuted"] = self._sizes[op.out]
        self._numbers = {name: number for number, name in enumerate(self._sizes)}
        self.rows = [size + 1 for size in self._sizes.values()]
        self.work = float(sum(_work(op, program.size) for op in program.operations))
        made = [struct for op in program.operations for struct in self._translated(op)]
        self._operations = (OperationStruct * max(1, len(made)))(*made)
        self._count = len(made)
        kept = [o.struct(self._dtype) if isinstance(o, TriangularFactors) else o for o in self._objects]
        self._table = pointers(kept), kept

    def program(self, vectors: ctypes.Array) -> ProgramStruct:
        """The program's struct with the addresses of its vectors, which the caller keeps."""
        addresses = ctypes.addressof(vectors), ctypes.addressof(self._table[0])
        return ProgramStruct(self._count, len(self.rows), self._operations, *addresses)

    @property
    def nbytes(self) -> int:
        """Bytes of matrices and vectors, without factors."""
        return sum(a.nbytes for a in self._arrays)

    def _range(self, vector: str, part: str | None) -> tuple[int, int]:
        """First row and number of rows of a part of a vector."""
        first = 0
        for name in self._vectors[vector]:
            if name == part:
                return first, len(self._orders[name])
            first += len(self._orders[name])
        return 0, first

    def _order(self, vector: str, part: str | None) -> np.ndarray:
        """The order of a part, or of a vector of one part."""
        return self._orders[self._vectors[vector][0] if part is None else part]

    def _translated(self, op: Operation) -> list[OperationStruct]:
        """The operations of the kernels for one of the program."""
        (out_row, rows), (x_row, _) = self._range(op.out, op.part), self._range(op.x, op.x_part)
        out, x, number, flag = self._numbers[op.out], self._numbers[op.x], -1, int(op.flag)
        if op.kind == "solve":
            return self._solve(op)
        if op.kind == "multiply":
            number = self._matrix(op)
        elif op.kind == "project":
            vector = self._kept(op.what[self._order(op.out, None)], self._dtype)
            number = self._add(ProjectionStruct(address(vector), address(vector)))
        elif op.kind == "clear":
            number, rows = self._add(self._kept(self.place[op.what], np.int32)), len(op.what)
        elif op.kind in ("load", "store"):
            flag = LOADS + op.what
        return [OperationStruct(_CODES[op.kind], out, x, number, out_row, x_row, rows, flag, op.factor, op.scale)]

    def _matrix(self, op: Operation) -> int:
        """The number of a matrix with rows and columns in the orders of its vectors."""
        rows, columns = self._order(op.out, op.part), self._order(op.x, op.x_part)
        key = id(op.what), id(rows), id(columns)  # of objects that the program keeps meanwhile
        if key not in self._matrices:
            A = csr_matrix(op.what)[rows][:, columns]
            types = (A.indptr, np.int32), (A.indices, np.int32), (A.data, self._dtype)
            made = MatrixStruct(A.shape[0], *(address(self._kept(a, dtype)) for a, dtype in types))
            self._matrices[key] = self._add(made)
        return self._matrices[key]

    def _solve(self, op: Operation) -> list[OperationStruct]:
        factors: TriangularFactors = op.what
        number = self._add(factors)
        out, rows, flag = self._numbers[op.out], self._sizes[op.out], int(op.flag)
        struct = lambda name, out, x, number: OperationStruct(_CODES[name], out, x, number, 0, 0, rows, flag, 1.0, 1.0)
        if factors.enter is None:
            return [struct("solve", out, out, number)]
        enter, leave, work = factors.enter, factors.leave, self._numbers[f"{op.out}, permuted"]
        if op.flag:
            enter, leave = np.argsort(leave), np.argsort(enter)
        enter, leave = (self._add(self._kept(p, np.int32)) for p in (enter, leave))
        solve = struct("solve", work, work, number)
        return [struct("permute", work, out, enter), solve, struct("permute", out, work, leave)]

    def _kept(self, values: np.ndarray, dtype: np.dtype | type) -> np.ndarray:
        """A contiguous array of some type that stays in memory."""
        self._arrays.append(np.ascontiguousarray(values, dtype=dtype))
        return self._arrays[-1]

    def _add(self, made: Any) -> int:
        """Add an object that operations refer to; its number."""
        self._objects.append(made)
        return len(self._objects) - 1


def _orders(program: StepProgram) -> dict[str, np.ndarray]:
    """The order of the rows of each part in vectors: that of elimination where there are factors."""
    found: dict[str, np.ndarray] = {}
    for op in program.operations:
        if op.kind == "solve":
            order = found.setdefault(program.vectors[op.out][0], op.what.order)
            if not np.array_equal(order, op.what.order):
                raise ValueError("factors of one part of a state have several orders of elimination")
    return {name: found.get(name, np.arange(len(rows))) for name, rows in program.parts.items()}


def _work(operation: Operation, size: int) -> float:
    """Multiplications of an operation for one state, about."""
    if operation.kind == "multiply":
        return operation.what.nnz
    if operation.kind == "solve":
        return operation.what.left.entries + operation.what.right.entries
    return size

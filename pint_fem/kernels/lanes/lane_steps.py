"""Execution of step programs on lanes, by the compiled kernels."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix

from pint_fem.kernels.lanes.compiled import address
from pint_fem.kernels.lanes.program import STATE, Operation, StepProgram
from pint_fem.kernels.lanes.structures import (
    WIDTHS,
    MatrixStruct,
    OperationStruct,
    ProgramStruct,
    ProjectionStruct,
    StatesStruct,
    aligned,
    kernels,
    pointers,
    scratch,
)
from pint_fem.kernels.lanes.triangular import TriangularFactors

__all__ = ["LaneSteps"]

_NAMES = "multiply solve copy add blend exchange zero clear permute load store project"
_CODES = {name: number for number, name in enumerate(_NAMES.split())}
_FIXED = 3
"""States before those of loads: the start, the results, what is added to these."""
_CALL = 2e9
"""Multiplications in a call of C, about, after which Python handles signals."""


class LaneSteps:
    """A step program on lanes.

    Parameters
    ----------
    program
        The program, whose matrices are scipy's and whose factors are
        :class:`~pint_fem.kernels.lanes.triangular.TriangularFactors`; those of one part have the same order.
    dtype
        Type of the numbers in the kernels, float64 or float32; states are float64.
    """

    def __init__(self, program: StepProgram, dtype: np.dtype | type = np.float64):
        self.dtype, self.size = np.dtype(dtype), program.size
        self._programs: dict[int, _Compiled] = {}
        self._seconds: dict[int, float] = {}
        self._orders = {name: np.arange(len(rows)) for name, rows in program.parts.items()}
        for op in program.operations:
            if op.kind == "solve":
                self._orders[program.vectors[op.out][0]] = op.what.order
        self.program = self._ordered(program)
        self.work = sum(self._work(op) for op in program.operations)

    def _ordered(self, program: StepProgram) -> StepProgram:
        """The program with copies of its matrices in the orders of the parts."""
        made = StepProgram(program.parts, program.size)
        made.vectors, copies = program.vectors, {}
        for op in program.operations:
            if op.kind == "multiply":
                rows, columns = program.part(op.out, op.part), program.part(op.x, op.x_part)
                key = id(op.what), rows, columns
                if key not in copies:
                    A = csr_matrix(op.what)[self._orders[rows]][:, self._orders[columns]].astype(self.dtype)
                    A.indptr, A.indices = (part.astype(np.int32, copy=False) for part in (A.indptr, A.indices))
                    copies[key] = A
                op = replace(op, what=copies[key])
            made.operations.append(op)
        return made

    def _work(self, operation: Operation) -> float:
        """Multiplications of an operation for one state, about."""
        if operation.kind == "multiply":
            return operation.what.nnz
        if operation.kind == "solve":
            return operation.what.left.entries + operation.what.right.entries
        return self.size

    def run(
        self,
        u: np.ndarray,
        out: np.ndarray | None,
        added: np.ndarray | None = None,
        states: Sequence[np.ndarray | None] = (),
    ) -> None:
        """Take steps one after another from each of ``k`` states.

        Parameters
        ----------
        u
            Start states ``(k, n)``.
        out
            Results of the steps ``(k, steps, n)``, or ``None``.
        added
            What is added to the result of each step, ``(k, steps, n)``, or ``None``.
        states
            What the operations ``load`` read and ``store`` write, by their numbers, ``(k, steps, n)`` or ``None``.

        All arrays are float64, with contiguous states.
        """
        sizes = [a.shape[:2] for a in (out, added, *states) if a is not None]
        lanes, steps = sizes[0]
        if not lanes or not steps:
            return
        arrays = [u[:, None], out, added, *states, *[None] * (self.program.stored - len(states))]
        arrays = [None if a is None else _contiguous_states(a) for a in arrays]
        first = 0
        for width, count in self._cut(lanes):
            part = slice(first, first + count)
            first += count
            compiled = self._compiled(width)
            own = [None if a is None else a[part] for a in arrays]
            most = max(1, int(_CALL / max(1, self.work * min(count, width))))
            for begin in range(0, steps, most):
                window = [own[0] if begin == 0 else own[1][:, begin - 1 : begin]]
                window += [None if a is None else a[:, begin : begin + most] for a in own[1:]]
                compiled(window, count, min(most, steps - begin))
        for given, used in zip([u[:, None], out, added, *states], arrays, strict=False):
            if given is not None and used is not given and not np.shares_memory(given, used):
                given[...] = used

    # -- widths --------------------------------------------------------------------------------------------------------
    def _cut(self, lanes: int) -> list[tuple[int, int]]:
        """Widths and numbers of lanes in each call, of the least estimated time."""
        widths = WIDTHS[self.dtype]
        if lanes == 1:
            return [(widths[0], 1)]
        seconds = self.seconds
        widest = min(widths, key=lambda w: seconds[w] / w)
        calls = [(widest, lanes // widest * widest)] if lanes >= widest else []
        left = lanes % widest
        best = {0: (0.0, [])}
        for count in range(1, left + 1):
            options = [(best[count - min(w, count)][0] + seconds[w], w) for w in widths]
            time_, w = min(options)
            best[count] = time_, [*best[count - min(w, count)][1], (w, min(w, count))]
        return calls + best[left][1]

    @property
    def seconds(self) -> dict[int, float]:
        """Measured times of a step of all lanes, by the width; they choose widths, on which results do not depend."""
        if not self._seconds:
            for width in WIDTHS[self.dtype]:
                u = np.zeros((width, self.size))
                out = np.empty((width, 1, self.size))
                compiled, given = self._compiled(width), [u[:, None], out, None, *[None] * self.program.stored]
                found = []
                for _ in range(3):
                    begin = time.perf_counter()
                    compiled(given, width, 1)
                    found.append(time.perf_counter() - begin)
                self._seconds[width] = min(found)
        return self._seconds

    def _compiled(self, width: int) -> _Compiled:
        if width not in self._programs:
            self._programs[width] = _Compiled(self.program, self._orders, self.dtype, width)
        return self._programs[width]

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes of the copies of matrices; work vectors are in the memory that all kernels share."""
        matrices = {id(op.what): op.what for op in self.program.operations if op.kind == "multiply"}
        return {"kernels": sum(part.nbytes for A in matrices.values() for part in (A.indptr, A.indices, A.data))}

    @property
    def work_nbytes(self) -> int:
        """Bytes of the shared memory that steps of many states take."""
        return self._compiled(max(WIDTHS[self.dtype])).work_nbytes


def _contiguous_states(array: np.ndarray) -> np.ndarray:
    """The array, or a copy, with contiguous states of float64."""
    if array.dtype == float and (array.strides[-1] == array.itemsize or array.shape[-1] == 1):
        return array
    return np.ascontiguousarray(array, dtype=float)


class _Compiled:
    """A program for one width."""

    def __init__(self, program: StepProgram, orders: Mapping[str, np.ndarray], dtype: np.dtype, width: int):
        self._run, self._dtype, self._single = kernels().run[dtype, width], dtype, width == 1
        self._orders, self._parts = orders, program.vectors
        self._objects: list[Any] = []
        self._kept: list[Any] = []
        self._place = np.empty(program.size, np.int32)
        rows = [program.parts[part][orders[part]] for part in program.vectors[STATE]]
        self._place[np.concatenate(rows)] = np.arange(program.size)
        sizes = {name: sum(len(orders[part]) for part in parts) for name, parts in program.vectors.items()}
        for op in program.operations:
            if op.kind == "solve" and op.what.enter is not None:
                sizes[f"{op.out}, permuted"] = sizes[op.out]
        self._sizes, self._numbers = sizes, {name: number for number, name in enumerate(sizes)}
        self._vector_nbytes = [-(-(size + 1) * width * dtype.itemsize // 64) * 64 for size in sizes.values()]
        self.work_nbytes = sum(self._vector_nbytes)
        self._operations = [made for op in program.operations for made in self._translated(op)]
        self._operations_array = (OperationStruct * max(1, len(self._operations)))(*self._operations)
        self._objects_array = pointers(self._objects)
        self._scratch: np.ndarray | None = None

    def __call__(self, arrays: Sequence[np.ndarray | None], lanes: int, steps: int) -> None:
        """Take steps from ``lanes`` states; arrays ``(lanes, steps, n)``."""
        memory = scratch(self.work_nbytes)
        if memory is not self._scratch:
            self._place_vectors(memory)
        given = (StatesStruct * len(arrays))(*[self._states(a) for a in arrays])
        self._run(ctypes.byref(self._program), lanes, steps, given)

    def _place_vectors(self, memory: np.ndarray) -> None:
        """Place the work vectors in the shared memory."""
        ends = np.cumsum([0, *self._vector_nbytes])
        self._scratch, self._vectors = memory, pointers([memory[a:] for a in ends[:-1]])
        addresses = [ctypes.addressof(array) for array in (self._vectors, self._objects_array)]
        self._program = ProgramStruct(len(self._operations), len(self._vectors), self._operations_array, *addresses)

    def _states(self, array: np.ndarray | None) -> StatesStruct:
        if array is None:
            return StatesStruct(None, 0, 0, None, 0)
        lane, step = (s // array.itemsize for s in array.strides[:2])
        return StatesStruct(array.ctypes.data, lane, step, self._place.ctypes.data, array.shape[-1])

    def _range(self, vector: str, part: str | None) -> tuple[int, int]:
        """First row and number of rows of a part of a vector."""
        first = 0
        for name in self._parts[vector]:
            if name == part:
                return first, len(self._orders[name])
            first += len(self._orders[name])
        return 0, first

    def _translated(self, op: Operation) -> list[OperationStruct]:
        """The operations of the kernels for one of the program."""
        (out_row, rows), (x_row, _) = self._range(op.out, op.part), self._range(op.x, op.x_part)
        out, x, number, flag = self._numbers[op.out], self._numbers[op.x], -1, int(op.flag)
        if op.kind == "solve":
            return self._solve(op)
        if op.kind == "multiply":
            A = op.what
            number = self._add(MatrixStruct(A.shape[0], *(address(a) for a in (A.indptr, A.indices, A.data))), A)
        elif op.kind == "project":
            vector = aligned(rows, self._dtype)
            vector[:] = op.what[self._orders[self._parts[op.out][0]]]
            number = self._add(ProjectionStruct(address(vector), address(vector)), vector)
        elif op.kind == "clear":
            number, rows = self._add(self._place[op.what].astype(np.int32)), len(op.what)
        elif op.kind in ("load", "store"):
            flag = _FIXED + op.what
        return [OperationStruct(_CODES[op.kind], out, x, number, out_row, x_row, rows, flag, op.factor, op.scale)]

    def _solve(self, op: Operation) -> list[OperationStruct]:
        factors: TriangularFactors = op.what
        number = self._add(factors.struct(self._dtype, single=self._single), factors)
        out, rows, flag = self._numbers[op.out], self._sizes[op.out], int(op.flag)
        struct = lambda name, out, x, number: OperationStruct(_CODES[name], out, x, number, 0, 0, rows, flag, 1.0, 1.0)
        if factors.enter is None:
            return [struct("solve", out, out, number)]
        enter, leave, work = factors.enter, factors.leave, self._numbers[f"{op.out}, permuted"]
        if op.flag:
            enter, leave = np.argsort(leave), np.argsort(enter)
        enter, leave = (self._add(np.ascontiguousarray(p, dtype=np.int32)) for p in (enter, leave))
        solve = struct("solve", work, work, number)
        return [struct("permute", work, out, enter), solve, struct("permute", out, work, leave)]

    def _add(self, made: Any, *kept: Any) -> int:
        """Keep an object that operations refer to; its number."""
        self._objects.append(made)
        self._kept.append(kept)
        return len(self._objects) - 1

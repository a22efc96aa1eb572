"""Execution of step programs on lanes, by the compiled kernels."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np

from pint_fem.kernels.lanes.program import StepProgram
from pint_fem.kernels.lanes.structures import WIDTHS, ProgramStruct, StatesStruct, kernels, scratch
from pint_fem.kernels.lanes.translation import LOADS, Translation
from pint_fem.kernels.lanes.widths import cut

__all__ = ["LaneSteps", "windows"]

_CALL = 2e9
"""Multiplications in a call of C, about, after which Python handles signals."""


def windows(lanes: int, steps: int, most: float, group: int = 1) -> Iterator[tuple[slice, slice]]:
    """Slices of lanes and of steps that cover all, with about ``most`` states each; all steps of some lanes come before
    those of the next ones.

    Parameters
    ----------
    lanes, steps
        Numbers of lanes and steps.
    most
        Number of states, lanes times steps; exceeded by groups that are larger.
    group
        Number of lanes that are not separated.
    """
    steps_each = int(min(steps, max(1, most // group)))
    lanes_each = group * max(1, int(most // (group * steps_each)))
    for first in range(0, lanes, lanes_each):
        for begin in range(0, steps, steps_each):
            yield slice(first, min(first + lanes_each, lanes)), slice(begin, min(begin + steps_each, steps))


class LaneSteps:
    """A step program on lanes.

    Parameters
    ----------
    program
        The program, whose matrices are scipy's and whose factors are
        :class:`~pint_fem.kernels.lanes.triangular.TriangularFactors`; those of one part have the same order.
    dtype
        Type of the numbers in the kernels, float64 or float32; states are float64.
    times
        Measured times of a program with the same structure, such as that of other values of coefficients; those of this
        one are added. Default: its own.

    Raises
    ------
    ValueError
        If factors of one part have several orders of elimination.
    """

    def __init__(
        self, program: StepProgram, dtype: np.dtype | type = np.float64, times: dict[np.dtype, tuple] | None = None
    ):
        self.dtype, self.size = np.dtype(dtype), program.size
        self._source, self._translation = program, Translation(program, self.dtype)
        self._run = kernels().run
        self.arrays = LOADS + program.stored
        self._written = [1, *sorted({LOADS + op.what for op in program.operations if op.kind == "store"})]
        self._memory: np.ndarray | None = None
        self._programs: dict[int, tuple[ProgramStruct, ctypes.Array]] = {}
        self._times = {} if times is None else times
        self._seconds: dict[int, float]
        self._cuts: dict[int, list[tuple[int, int]]]
        self._seconds, self._cuts = self._times.setdefault(self.dtype, ({}, {}))

    def run(
        self,
        u: np.ndarray,
        out: np.ndarray,
        added: np.ndarray | None = None,
        states: Sequence[np.ndarray | None] = (),
    ) -> None:
        """Take steps one after another from each of ``k`` states.

        Parameters
        ----------
        u
            Start states ``(k, n)``.
        out
            Results of the steps ``(k, steps, n)``, not overlapping with the other arrays.
        added
            What is added to the result of each step, ``(k, steps, n)``, or ``None``.
        states
            What the operations ``load`` read and ``store`` write, by their numbers, ``(k, steps, n)`` or ``None``.
            Arrays of float64 with contiguous states are read and written in place, others by copies.

        Raises
        ------
        ValueError
            If arrays do not fit each other and the program, or cannot be written.
        """
        lanes, steps = out.shape[:2]
        given = [u[:, None], out, added, *states][: self.arrays]
        given += [None] * (self.arrays - len(given))
        for number, a in enumerate(given):
            if a is not None and a.shape != (lanes, steps if number else 1, self.size):
                raise ValueError(f"states have the shape {a.shape}: {(lanes, steps, self.size)} is required")
        written = [number for number in self._written if given[number] is not None]
        if not all(given[number].flags.writeable for number in written):
            raise ValueError("results are to be written to an array that is read-only")
        if not lanes or not steps:
            return
        used, first = [_in_place(a) for a in given], 0
        for width, count in self._cut(lanes):
            for rows, window in windows(count, steps, _CALL / max(1.0, self._translation.work), width):
                here = slice(first + rows.start, first + rows.stop)
                arrays = [None if a is None else a[here, window] for a in used]
                arrays[0] = used[1][here, window.start - 1 : window.start] if window.start else used[0][here]
                self._call(width, arrays, window.stop - window.start)
            first += count
        for number in written:
            if used[number] is not given[number]:
                given[number][...] = used[number]

    def _call(self, width: int, arrays: Sequence[np.ndarray | None], steps: int) -> None:
        """Take steps from some states with one width; arrays ``(lanes, steps, n)``."""
        given = (StatesStruct * len(arrays))(*[self._states(a) for a in arrays])
        self._run[self.dtype, width](ctypes.byref(self._program(width)), len(arrays[0]), steps, given)

    def _states(self, array: np.ndarray | None) -> StatesStruct:
        if array is None:
            return StatesStruct(None, 0, 0, None, 0)
        lane, step = (stride // array.itemsize for stride in array.strides[:2])
        return StatesStruct(array.ctypes.data, lane, step, self._translation.place.ctypes.data, self.size)

    def _program(self, width: int) -> ProgramStruct:
        """The program of a width, with work vectors in the memory that all kernels share, which moves when it grows."""
        rows, memory = self._translation.rows, scratch(self._vectors_nbytes(width))
        if memory is not self._memory:
            self._programs.clear()
            self._memory = memory
        if width not in self._programs:
            ends, start = np.cumsum([0, *rows[:-1]]) * width * self.dtype.itemsize, memory.ctypes.data
            vectors = (ctypes.c_void_p * len(rows))(*(start + ends).tolist())
            self._programs[width] = self._translation.program(vectors), vectors
        return self._programs[width][0]

    @cached_property
    def in_single(self) -> LaneSteps:
        """The same program in single precision; states remain float64."""
        return LaneSteps(self._source, np.float32, self._times)

    # -- widths --------------------------------------------------------------------------------------------------------
    def _cut(self, lanes: int) -> list[tuple[int, int]]:
        """Widths and numbers of lanes in each call, of the least estimated time; results do not depend on them."""
        if lanes not in self._cuts:
            every = WIDTHS[self.dtype]
            widths = [
                w for w, narrower in zip(every, (0, *every), strict=False) if narrower < lanes
            ]  # others gain nothing
            seconds = {w: self._time(w) if len(widths) > 1 else 1.0 for w in widths}
            self._cuts[lanes] = cut(lanes, seconds)
        return self._cuts[lanes]

    @property
    def seconds(self) -> dict[int, float]:
        """Measured seconds of a step of all lanes, for each width."""
        return {width: self._time(width) for width in WIDTHS[self.dtype]}

    def _time(self, width: int) -> float:
        """Measured seconds of a step of ``width`` lanes."""
        if width not in self._seconds:
            out = np.zeros((width, 1, self.size))
            arrays = [out, out, *[None] * (self.arrays - 2)]
            found = []
            for _ in range(3):
                begin = time.perf_counter()
                self._call(width, arrays, 1)
                found.append(time.perf_counter() - begin)
            self._seconds[width] = min(found)
        return self._seconds[width]

    def _vectors_nbytes(self, width: int) -> int:
        """Bytes of the work vectors of a width."""
        return sum(self._translation.rows) * width * self.dtype.itemsize

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes of the matrices and of their copies, in both precisions once both are in use."""
        matrices = {id(op.what): op.what for op in self._source.operations if op.kind == "multiply"}
        source = sum(part.nbytes for A in matrices.values() for part in (A.indptr, A.indices, A.data))
        single = vars(self).get("in_single")
        return {"kernels": source + self._translation.nbytes + (single._translation.nbytes if single else 0)}

    def work_nbytes(self, states: int) -> int:
        """Bytes of the work vectors for a number of states, in the memory that all kernels share."""
        widths = WIDTHS[self.dtype]
        return self._vectors_nbytes(next((w for w in widths if w >= states), widths[-1]))


def _in_place(array: np.ndarray | None) -> np.ndarray | None:
    """The array if kernels can use it in place, else a copy."""
    if array is None:
        return None
    states = array.strides[-1] == array.itemsize or array.shape[-1] == 1
    if array.dtype == float and array.flags.aligned and states and not any(s % array.itemsize for s in array.strides):
        return array
    return np.require(array, float, "CA")

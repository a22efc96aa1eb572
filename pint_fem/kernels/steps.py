"""Execution of step programs: on lanes where all matrices are small enough and factored for them, else by PETSc.

Several ranks in space that share small systems have copies of all matrices: they exchange the states before a call and
take all steps of it on copies. PETSc takes one state after another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
from firedrake.petsc import PETSc
from mpi4py import MPI

from pint_fem.kernels.lanes.lane_steps import LaneSteps
from pint_fem.kernels.lanes.program import STATE, Operation, StepProgram
from pint_fem.kernels.replication import Replication, whole_matrix

__all__ = ["PetscSteps", "Steps", "execution"]


class Steps(Protocol):
    """A step program that can be executed."""

    def run(
        self,
        u: np.ndarray,
        out: np.ndarray,
        added: np.ndarray | None = None,
        states: Sequence[np.ndarray | None] = (),
    ) -> None:
        """Take steps one after another from each of ``k`` states (collective over space).

        Parameters
        ----------
        u
            Start states ``(k, n)``.
        out
            Results of the steps, ``(k, steps, n)``; not overlapping with the other arrays.
        added
            What is added to the result of each step, ``(k, steps, n)``, or ``None``.
        states
            What the operations ``load`` read and ``store`` write, by their numbers, ``(k, steps, n)`` or ``None``.
        """

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes of arrays for the kernels, or of vectors for PETSc, without matrices and factors."""

    @property
    def work_nbytes(self) -> int:
        """Bytes of the work memory of a call, which programs that run one after another share."""


def execution(program: StepProgram, comm: MPI.Comm) -> Steps:
    """The fastest execution of a program, whose matrices are PETSc's and whose factors are
    :class:`~pint_fem.kernels.factor.Factor` (collective).

    Parameters
    ----------
    program
        The program.
    comm
        Communicator of the matrices.
    """
    factors = [op.what for op in program.operations if op.kind == "solve"]
    if any(factor.triangular is None for factor in factors) or not factors:
        return PetscSteps(program, comm)
    state = Replication(program.size, comm)
    parts = {name: Replication(len(rows), comm) for name, rows in program.parts.items()}
    whole = StepProgram({name: state.rows(rows) for name, rows in program.parts.items()}, state.total)
    whole.vectors = dict(program.vectors)
    matrices: dict[int, object] = {}

    def converted(op: Operation) -> Operation:
        what = op.what
        if op.kind == "multiply":
            if what.handle not in matrices:
                matrices[what.handle] = whole_matrix(what)
            what = matrices[what.handle]
        elif op.kind == "solve":
            what = what.triangular
        elif op.kind == "clear":
            what = state.rows(what)
        elif op.kind == "project":
            what = parts[program.vectors[op.out][0]].gathered(what)
        return replace(op, what=what)

    whole.operations = [converted(op) for op in program.operations]
    lanes = LaneSteps(whole)
    return lanes if comm.size == 1 else _ReplicatedSteps(lanes, state, program)


EXCHANGED = 64
"""Number of states of which every rank in space has a copy at the same time."""


class _ReplicatedSteps:
    """Steps on copies of the states of all ranks in space, some states at a time."""

    def __init__(self, lanes: LaneSteps, replication: Replication, program: StepProgram):
        self._lanes, self._replication = lanes, replication
        self._writes = {op.what for op in program.operations if op.kind == "store"}

    def run(
        self,
        u: np.ndarray,
        out: np.ndarray,
        added: np.ndarray | None = None,
        states: Sequence[np.ndarray | None] = (),
    ) -> None:
        """Take steps as :meth:`Steps.run` (collective over space)."""
        lanes, steps = out.shape[:2]
        for first in range(0, lanes, EXCHANGED):
            group = slice(first, min(first + EXCHANGED, lanes))
            start, few = self._replication.gathered(u[group]), EXCHANGED // (group.stop - group.start)
            for begin in range(0, steps, few):
                part = group, slice(begin, begin + few)
                own = [None if a is None else a[part] for a in (out, added, *states)]
                start = self._some(start, own[0], own[1], own[2:])

    def _some(
        self, start: np.ndarray, out: np.ndarray, added: np.ndarray | None, states: Sequence[np.ndarray | None]
    ) -> np.ndarray:
        """Take a few steps from copies of some states; copies of the last results."""
        gathered, total, own = self._replication.gathered, self._replication.total, self._replication.own
        new = lambda a: np.empty((*a.shape[:-1], total))
        results, copies = new(out), []
        for number, a in enumerate(states):
            copies.append(None if a is None else new(a) if number in self._writes else gathered(a))
        self._lanes.run(start, results, None if added is None else gathered(added), copies)
        out[...] = results[..., own]
        for number in self._writes:
            if number < len(states) and states[number] is not None:
                states[number][...] = copies[number][..., own]
        return results[:, -1]

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes of the copies of matrices."""
        return self._lanes.nbytes

    @property
    def work_nbytes(self) -> int:
        """Bytes of copies of states, two of each at least, and of the memory that kernels share."""
        arrays = 3 + self._lanes.program.stored
        return self._lanes.work_nbytes + 8 * arrays * EXCHANGED * self._replication.total


class PetscSteps:
    """A step program executed by PETSc's products and solvers, for one state after another.

    Parameters
    ----------
    program
        The program, whose matrices are PETSc's and whose factors are :class:`~pint_fem.kernels.factor.Factor`.
    comm
        Communicator of the matrices.
    """

    def __init__(self, program: StepProgram, comm: MPI.Comm):
        self.program = program
        self._rows = np.concatenate([program.parts[part] for part in program.vectors[STATE]])
        self._place = np.argsort(self._rows)
        self._slices: dict[tuple[str, str | None], slice] = {}
        self._vectors: dict[str, np.ndarray] = {}
        for name, parts in program.vectors.items():
            first = 0
            for part in parts:
                size = len(program.parts[part])
                self._slices[name, part] = slice(first, first + size)
                first += size
            self._slices[name, None] = slice(0, first)
            self._vectors[name] = np.zeros(first)
        sizes = {size for a, b in self._slices.items() if a for size in [b.stop - b.start]}
        vec = lambda n: PETSc.Vec().createMPI((n, None), comm=comm)
        self._in, self._out = ({n: vec(n) for n in sorted(sizes)} for _ in range(2))
        calls = dict(multiply=self._multiply, solve=self._solve, copy=self._copy, add=self._add, zero=self._zero,
                     clear=self._clear, project=self._project,
                     blend=self._blend, exchange=self._exchange)  # fmt: skip
        self._calls: dict[str, Callable[[Operation], None]] = calls

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes of the work vectors."""
        return {"vectors": sum(v.nbytes for v in self._vectors.values()) + 16 * sum(self._in)}

    @property
    def work_nbytes(self) -> int:
        """Zero, as programs share no memory."""
        return 0

    def run(
        self,
        u: np.ndarray,
        out: np.ndarray,
        added: np.ndarray | None = None,
        states: Sequence[np.ndarray | None] = (),
    ) -> None:
        """Take steps as :meth:`Steps.run` (collective over space).

        Raises
        ------
        ArithmeticError, PETSc.Error
            If a solver fails.
        """
        state = self._vectors[STATE]
        for lane in range(out.shape[0]):
            state[:] = u[lane][self._rows]
            for step in range(out.shape[1]):
                for op in self.program.operations:
                    if op.kind in ("load", "store"):
                        given = states[op.what] if op.what < len(states) else None
                        if given is not None and op.kind == "load":
                            self._vectors[op.out] += given[lane, step][self._rows]
                        elif given is not None:
                            given[lane, step] = self._vectors[op.out][self._place]
                    else:
                        self._calls[op.kind](op)
                if added is not None:
                    state += added[lane, step][self._rows]
                out[lane, step] = state[self._place]

    def _view(self, name: str, part: str | None) -> np.ndarray:
        return self._vectors[name][self._slices[name, part]]

    def _multiply(self, op: Operation) -> None:
        x, y = self._view(op.x, op.x_part), self._view(op.out, op.part)
        a, b = self._in[len(x)], self._out[len(y)]
        a.array[:] = x
        op.what.mult(a, b)
        if op.flag:
            y *= op.scale
            y += op.factor * b.array_r
        else:
            np.multiply(b.array_r, op.factor, out=y)

    def _solve(self, op: Operation) -> None:
        y = self._vectors[op.out]
        a, b = self._in[len(y)], self._out[len(y)]
        a.array[:] = y
        op.what.solve_regular(a, b, transposed=op.flag)
        y[:] = b.array_r

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
        y = self._vectors[op.out]
        y[:], self._vectors[op.x][:] = self._vectors[op.x].copy(), y.copy()

    def _zero(self, op: Operation) -> None:
        self._vectors[op.out][:] = 0

    def _clear(self, op: Operation) -> None:
        self._vectors[op.out][self._place[op.what]] = 0

    def _project(self, op: Operation) -> None:
        y, v = self._vectors[op.out], op.what
        part = float(v @ y)
        if self._in[len(y)].comm.size > 1:
            part = self._in[len(y)].comm.tompi4py().allreduce(part)
        y -= part * v

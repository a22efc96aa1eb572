"""Execution of step programs: on lanes where all matrices are small enough and factored for them, else by PETSc.

Several ranks in space that share small systems have copies of all matrices: they exchange the states before and after a
call, and each takes all steps of some of its lanes; larger ones are solved on blocks of states
(:mod:`~pint_fem.kernels.space.block_steps`). PETSc takes one state after another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Protocol

import numpy as np
from firedrake.petsc import PETSc
from mpi4py import MPI

from pint_fem.collective import all_ranks
from pint_fem.kernels.lanes.lane_steps import LaneSteps, windows
from pint_fem.kernels.lanes.program import STATE, Operation, StepProgram
from pint_fem.kernels.lanes.structures import WIDTHS
from pint_fem.kernels.replication import Replication, whole_matrix
from pint_fem.kernels.space.block_steps import BlockSteps
from pint_fem.kernels.space.compiled import block_kernels
from pint_fem.kernels.space.program_vectors import ProgramVectors

__all__ = ["PetscSteps", "Steps", "execution"]

_COPIED = 4e6
"""Numbers, about, of the states that are copied to all ranks at a time."""


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
    def in_single(self) -> Steps:
        """The steps with kernels in single precision, where there are any."""

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes of arrays for the kernels, or of vectors for PETSc, without matrices and factors."""

    def work_nbytes(self, states: int) -> int:
        """Bytes of the work memory of a call with a number of states, which programs share."""


def execution(program: StepProgram, comm: MPI.Comm, times: dict | None = None) -> Steps:
    """The fastest execution of a program, whose matrices are PETSc's and whose factors are
    :class:`~pint_fem.kernels.factor.Factor` (collective).

    Parameters
    ----------
    program
        The program.
    comm
        Communicator of the matrices.
    times
        Measured times of a program with the same structure (:class:`~pint_fem.kernels.lanes.lane_steps.LaneSteps`).
    """
    factors = [op.what for op in program.operations if op.kind == "solve"]
    if any(factor.triangular is None for factor in factors) or not factors:
        on_blocks = factors or comm.size > 1  # without solves on one rank lanes are for sequences of steps
        if on_blocks and all(f.on_blocks for f in factors) and all_ranks(comm, block_kernels(1) is not None):
            return BlockSteps(program, comm)
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
    lanes = LaneSteps(whole, times=times)
    return lanes if comm.size == 1 else _ReplicatedSteps(lanes, state, program)


class _ReplicatedSteps:
    """Steps on whole states, some at a time: where there are as many lanes as ranks in space, each rank steps some of
    them, otherwise all ranks step copies of all. A state's result is the same, as it does not depend on other lanes.
    """

    def __init__(self, lanes: LaneSteps, replication: Replication, program: StepProgram):
        self._lanes, self._replication = lanes, replication
        self._program = program
        self._writes = {op.what for op in program.operations if op.kind == "store"}

    @cached_property
    def in_single(self) -> _ReplicatedSteps:
        """The same steps with kernels in single precision."""
        return _ReplicatedSteps(self._lanes.in_single, self._replication, self._program)

    def run(
        self,
        u: np.ndarray,
        out: np.ndarray,
        added: np.ndarray | None = None,
        states: Sequence[np.ndarray | None] = (),
    ) -> None:
        """Take steps as :meth:`Steps.run` (collective over space)."""
        ranks, widest = self._replication.comm.size, max(WIDTHS[self._lanes.dtype])
        # each lane on one rank where every rank has one; fewer lanes are stepped on every rank
        divided = len(u) >= ranks
        most = _COPIED / self._replication.total
        whole = self._replication.divided if divided else self._replication.gathered
        for rows, window in windows(
            *out.shape[:2], most * ranks if divided else most, widest * ranks if divided else widest
        ):
            part = lambda a: None if a is None else a[rows, window]  # noqa: B023
            copied = lambda a: None if a is None else whole(a)
            start = copied(out[rows, window.start - 1] if window.start else u[rows])
            results = np.empty((len(start), window.stop - window.start, self._replication.total))
            copies: list[np.ndarray | None] = []
            for number, a in enumerate(states):
                new = a is not None and number in self._writes
                copies.append(np.empty_like(results) if new else copied(part(a)))
            self._lanes.run(start, results, copied(part(added)), copies)
            self._keep(results, out[rows, window], divided)
            for number in self._writes:
                if number < len(states) and states[number] is not None:
                    self._keep(copies[number], states[number][rows, window], divided)

    def _keep(self, results: np.ndarray, out: np.ndarray, divided: bool) -> None:
        """Write the own unknowns of whole states."""
        if divided:
            self._replication.returned(results, out)
        else:
            out[...] = results[..., self._replication.own]

    @property
    def seconds(self) -> dict[int, float]:
        """Measured seconds of a step of all lanes, by their number, without the exchange of states."""
        ranks, measured = self._replication.comm.size, self._lanes.seconds
        return {1: measured[min(measured)]} | {ranks * width: seconds for width, seconds in measured.items()}

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes of the copies of matrices."""
        return self._lanes.nbytes

    def work_nbytes(self, states: int) -> int:
        """Bytes of copies of states, and of the memory that kernels share."""
        ranks = self._replication.comm.size
        share = states if states < ranks else -(-states // ranks)
        copied = min(share, max(int(_COPIED / self._replication.total), max(WIDTHS[self._lanes.dtype])))
        return self._lanes.work_nbytes(share) + 8 * self._lanes.arrays * copied * self._replication.total


class PetscSteps(ProgramVectors):
    """A step program executed by PETSc's products and solvers, for one state after another.

    Parameters
    ----------
    program
        The program, whose matrices are PETSc's and whose factors are :class:`~pint_fem.kernels.factor.Factor`.
    comm
        Communicator of the matrices.
    """

    def __init__(self, program: StepProgram, comm: MPI.Comm):
        super().__init__(program)
        self.vectors.update((name, np.zeros(size)) for name, size in self.sizes.items())
        # by part, not by size: parts with equal sizes on one rank have other ones on the next
        vec = lambda size: PETSc.Vec().createMPI((size, None), comm=comm)
        self._comm, self._in, self._out = comm, {}, {}
        for op in program.operations:
            if op.kind in ("multiply", "solve"):
                for vectors, name, part in ((self._in, op.x, op.x_part), (self._out, op.out, op.part)):
                    if self._key(name, part) not in vectors:
                        vectors[self._key(name, part)] = vec(len(self.view(name, part)))

    @property
    def in_single(self) -> PetscSteps:
        """These steps: PETSc's numbers have one precision."""
        return self

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes of the work vectors."""
        vecs = [*self._in.values(), *self._out.values()]
        return {"vectors": sum(v.nbytes for v in self.vectors.values()) + 8 * sum(v.local_size for v in vecs)}

    def work_nbytes(self, states: int) -> int:
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
        for lane in range(out.shape[0]):
            self.vectors[STATE][:] = u[lane][self._rows]
            for step in range(out.shape[1]):
                for op in self.program.operations:
                    if op.kind in ("load", "store"):
                        given = states[op.what] if op.what < len(states) else None
                        if given is not None and op.kind == "load":
                            self.vectors[op.out] += given[lane, step][self._rows]
                        elif given is not None:
                            given[lane, step] = self.vectors[op.out][self._place]
                    else:
                        self.calls[op.kind](op)
                state = self.vectors[STATE]
                if added is not None:
                    state += added[lane, step][self._rows]
                out[lane, step] = state[self._place]

    def _key(self, name: str, part: str | None) -> str | tuple[str, ...]:
        """The part of a vector, or all of its parts."""
        parts = self.program.vectors[name]
        return parts if part is None and len(parts) > 1 else part or parts[0]

    def _multiply(self, op: Operation) -> None:
        a, b = self._in[self._key(op.x, op.x_part)], self._out[self._key(op.out, op.part)]
        a.array[:] = self.view(op.x, op.x_part)
        op.what.mult(a, b)
        self.combine(op, b.array_r)

    def _solve(self, op: Operation) -> None:
        y, key = self.vectors[op.out], self._key(op.out, None)
        a, b = self._in[key], self._out[key]
        a.array[:] = y
        op.what.solve_regular(a, b, transposed=op.flag)
        y[:] = b.array_r

    def _project(self, op: Operation) -> None:
        y, v = self.vectors[op.out], op.what
        part = float(v @ y)
        if self._comm.size > 1:
            part = self._comm.allreduce(part)
        y -= part * v

r"""All steps of a linear evolution as one operator, with one MGRIT cycle as its approximate inverse, for PETSc.

With :math:`u_0` moved to the right-hand side, :math:`N` steps are one system for :math:`u_1 \dots u_N`:

.. math::  (A u)_{n+1} = u_{n+1} - \Phi_n u_n ,\quad u_0 = 0 .

**Memory.** A PETSc ``Vec``'s local array is the slab without its ghost row, ``U[1:]``: wrapping it copies nothing, and
products with :math:`A` work on the vectors' own arrays, with one more state for the ghost. Only a cycle needs a ghost
row in front of the states, which PETSc's work vectors do not have: it runs in an array of its own, and its result is
copied, once a cycle.

**Reproducibility.** :math:`A x` and :math:`B x` are bitwise identical for every number of time ranks.

This module needs petsc4py; :mod:`pint_fem.mgrit` does not import it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from mpi4py import MPI
from petsc4py import PETSc

from pint_fem.all_at_once.arrays import Array, ArrayKind, NumpyArrays, finite_rows, is_tensor, subtract, tensor_of
from pint_fem.all_at_once.propagator import Propagator
from pint_fem.mgrit.cycle import Cycle
from pint_fem.mgrit.options import MGRITOptions
from pint_fem.mgrit.solver import MGRIT

__all__ = ["AllAtOnceMatrix", "MGRITPreconditioner", "SpaceTimeOperator"]


class SpaceTimeOperator:
    """The all-at-once operator and its preconditioner on a hierarchy of levels, on arrays ``(k, *state)``.

    Parameters
    ----------
    propagators, nsteps, options, comm, name, **given
        Those of :class:`~pint_fem.mgrit.solver.MGRIT`, ``bounds``, ``transfers`` and ``trace`` included; the
        propagators are linear. Of the options those of the hierarchy and the cycle count.
    petsc_comm
        Communicator of vectors and operators: all ranks that share the space-time unknowns (space x time). Default:
        ``comm``.

    Raises
    ------
    ValueError
        On every rank, on options that do not fit each other, the steps or a preconditioner.
    """

    def __init__(
        self, propagators: Sequence[Propagator], nsteps: int, *, options: MGRITOptions | Mapping | None = None,
        comm: MPI.Comm = MPI.COMM_SELF, petsc_comm: MPI.Comm | None = None, name: str = "mgrit", **given: Any,
    ):  # fmt: skip
        if np.dtype(PETSc.ScalarType) != float:
            raise ValueError(f"{name}: PETSc was built for {np.dtype(PETSc.ScalarType)}, the slabs are float64")
        options = MGRITOptions.make(options)
        for option, usual in (("storage", "all"), ("f_cycles", None), ("time_norm", 2), ("rtol_of", "trajectory")):
            if getattr(options, option) != usual:
                raise ValueError(
                    f"{name}: mgrit {option} {getattr(options, option)!r} is for plain iterations: a preconditioner "
                    "works on all points and does the same cycle each time, and the norm is PETSc's; leave it out"
                )
        one_cycle = MGRITOptions.make(options, residual="none", max_it=1, rtol=0.0, atol=0.0, view=False, trace="")
        self.solver = MGRIT(propagators, nsteps, options=one_cycle, comm=comm, name=name, linear=True, **given)
        self.level = self.solver.levels[0]
        self.comm, self.petsc_comm = comm, comm if petsc_comm is None else petsc_comm
        self.cycles = 0
        self.state_shape: tuple[int, ...] | None = None
        self.kind: ArrayKind = NumpyArrays(np.dtype(float))

    def set_state(self, shape: tuple[int, ...], kind: ArrayKind | None = None) -> None:
        """Allocate work arrays for local states of a shape: numpy arrays, or what ``kind`` makes."""
        self.state_shape, solver = tuple(shape), self.solver
        self.kind = kind = self.kind if kind is None else kind
        self.U = kind.zeros(self.level.k + 1, *shape)
        self.level.U = self.U  # the coarsest level's solver needs it where there is one level only
        self.cycle = Cycle(solver.levels, solver.options, self.state_shape, solver.transfers, linear=True, kind=kind)
        self._ghost = kind.zeros(1, *shape)

    def rows(self, vec: PETSc.Vec, *, readonly: bool = False) -> Array:
        """A vector's local array as ``(k, *state)``, or a tensor with its memory; no copy."""
        rows = vec.getArray(readonly=readonly).reshape(self.level.k, *self.state_shape)
        return rows if isinstance(self.kind, NumpyArrays) else tensor_of(rows)

    def vec(self, rows: Array) -> PETSc.Vec:
        """A vector whose local array is ``rows`` ``(k, *state)``, such as ``U[1:]``: C-contiguous, no copy."""
        flat = rows.reshape(-1)
        return PETSc.Vec().createWithArray(flat.numpy() if is_tensor(flat) else flat, comm=self.petsc_comm)

    def matrix(self) -> PETSc.Mat:
        """The all-at-once operator for states of the shape set (collective)."""
        local = self.level.k * int(np.prod(self.state_shape, dtype=int))
        matrix = PETSc.Mat().createPython(((local, None), (local, None)), AllAtOnceMatrix(self), comm=self.petsc_comm)
        matrix.setUp()
        return matrix

    def clear(self) -> None:
        """Remove recorded failures and set the count of cycles to zero."""
        self.cycles = 0
        self.level.first_failure.clear()

    def multiply(self, x: Array, y: Array) -> None:
        """``y = A x`` for the own rows; the step from the left neighbour's last point waits for it, the others do not.

        A failed step leaves NaN in ``y``, which the next norm of the Krylov method carries to every rank.
        """
        level, ghost = self.level, self._ghost
        if not level.active:
            return
        receive = level.post_receive(ghost)
        send = level.post_send(x if level.k else ghost)  # a first rank without steps passes on the initial zero
        if level.uses_guess:
            y[...] = x
        level.phi(range(level.lo + 1, level.hi), x[:-1], y[1:])
        level.wait(receive)
        if level.left is None:
            y[:1] = 0
        else:
            level.phi(range(level.lo, level.lo + min(level.k, 1)), ghost, y[:1])
        level.wait(send)
        subtract(x, y, y)
        self._mark_failure(y)

    def precondition(self, x: Array, y: Array) -> None:
        """``y = B x``: one cycle from zero."""
        self._load(x)
        if len(self.solver.levels) > 1:
            self.cycle.relax_and_restrict(0)
            self.cycle.correct(0, self.solver.options.cycle)
        else:
            self.cycle.solve(0)
        self.cycles += 1
        self._store(y)

    def step(self, x: Array, y: Array) -> None:
        """``y = A^-1 x`` by stepping sequentially."""
        self._load(x)
        self.level.solve_sequentially()
        self._store(y)

    def guess(self, x: Array, y: Array, *, initial: Array, nested: bool) -> None:
        """A first guess ``y`` by the coarsest level's own problem, or by nested iteration, from an initial value."""
        self._load(x)
        self.U[0] = initial
        self.cycle.first_guess(nested=nested)
        self._store(y)

    def is_affine(self) -> bool:
        """Whether the last own step of any level takes zero to another state; a step that fails shows in the solve."""
        found = False
        for level in self.solver.levels:
            if level.k:
                zero, out = (self.kind.zeros(1, *level.U.shape[1:]) for _ in range(2))
                level.phi(range(level.hi - 1, level.hi), zero, out)
                found |= bool(finite_rows(out).all() and out.any())
        return found

    def _load(self, x: Array) -> None:
        self.U[...] = 0
        self.level.U, self.level.G = self.U, x

    def _store(self, y: Array) -> None:
        y[...] = self.U[1:]
        self.level.G = None  # the array is PETSc's
        self._mark_failure(y)

    def _mark_failure(self, y: Array) -> None:
        """Set ``y`` to NaN after a failed step, whose own NaN relaxation may have replaced."""
        if self.level.failure is not None:
            y[...] = np.nan


class AllAtOnceMatrix:
    """Context of a Python ``Mat``: products with the all-at-once operator, whose states' shape has been set."""

    def __init__(self, operator: SpaceTimeOperator):
        self.operator = operator

    def mult(self, mat: PETSc.Mat, x: PETSc.Vec, y: PETSc.Vec) -> None:
        """``y = A x``."""
        rows = self.operator.rows
        self.operator.multiply(rows(x, readonly=True), rows(y))


class MGRITPreconditioner:
    """Context of a Python ``PC``: one cycle from zero."""

    def __init__(self, operator: SpaceTimeOperator):
        self.operator = operator

    def apply(self, pc: PETSc.PC, x: PETSc.Vec, y: PETSc.Vec) -> None:
        """``y = B x``."""
        rows = self.operator.rows
        self.operator.precondition(rows(x, readonly=True), rows(y))

    def view(self, pc: PETSc.PC, viewer: PETSc.Viewer) -> None:
        """Print the hierarchy (``-ksp_view``)."""
        if viewer.getType() == PETSc.Viewer.Type.ASCII:
            for line in self.operator.solver.view().splitlines():
                viewer.printfASCII(f"    {line}\n")

r"""All steps of a linear evolution as one operator, with one MGRIT cycle as its approximate inverse, for PETSc.

With :math:`u_0` moved to the right-hand side, :math:`N` steps are one system for :math:`u_1 \dots u_N`, their transpose
one for :math:`w_N \dots w_1`:

.. math::  (A u)_{n+1} = u_{n+1} - \Phi_n u_n ,\quad u_0 = 0, \qquad
           (A^T w)_n = w_n - \Phi_n^T w_{n+1} ,\quad w_{N+1} = 0 .

**The transpose** is such an operator on the reversed grid: point ``i`` there is :math:`w_{N+1-i}`, step ``i`` applies
:math:`\Phi_{N-i}^T` (step 0 starts from :math:`w_{N+1} = 0`), the C-point ``j m`` is point ``N + 1 - j m``: the first
interval has a length of its own. With transposed transfers and the transposed order of
:class:`~pint_fem.mgrit.cycle.Cycle` one cycle is exactly :math:`B^T`.

**Memory.** A PETSc ``Vec``'s local array is the slab without its ghost row, ``U[1:]``: wrapping it copies nothing, and
products with :math:`A` and :math:`A^T` work on the vectors' own arrays, with one more state for the ghost. Only a cycle
needs a ghost row in front of the states, which PETSc's work vectors do not have: it runs in an array of its own, and
its result is copied, once a cycle.

**Reproducibility.** :math:`A x`, :math:`A^T x`, :math:`B x` and :math:`B^T x` are bitwise identical for every number of
time ranks.

This module needs petsc4py and petsctools; :mod:`pint_fem.mgrit` does not import it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from mpi4py import MPI
from petsc4py import PETSc

from pint_fem.all_at_once.levels import Propagator
from pint_fem.all_at_once.trace import Trace
from pint_fem.communicators import SharedGroups
from pint_fem.mgrit.cycle import Cycle
from pint_fem.mgrit.options import MGRITOptions
from pint_fem.mgrit.solver import MGRIT
from pint_fem.mgrit.transposed_cycles import LeadingZeroStep

__all__ = ["AllAtOnceMatrix", "Direction", "Hierarchies", "MGRITPreconditioner", "Reversed"]


class Reversed(LeadingZeroStep):
    r"""A level's propagator on the reversed grid: step ``i`` is :math:`\Phi_{N-i}^T`, and step 0 gives zero.

    Parameters
    ----------
    propagator
        ``step(steps, w, out)`` writes :math:`\Phi_n^T w` for each ``n`` in ``steps``, as the forward one numbers them.
        An optional ``sweep(first, W, G)`` takes the steps ``first, first - 1, ...`` one after another in place, from
        ``W[0]``.
    nsteps
        Steps of the level.
    """

    def __init__(self, propagator: Propagator, nsteps: int):
        super().__init__(propagator)
        self.nsteps, self.uses_guess = nsteps, getattr(propagator, "uses_guess", False)
        self.keeps_input = getattr(propagator, "keeps_input", False)

    def _take(self, steps: range, u: np.ndarray, out: np.ndarray, place: int):
        forward = range(self.nsteps - steps[-1], self.nsteps - steps[0] + 1, steps.step)
        return self.propagator.step(forward, u[::-1], out[::-1])

    def _run(self, first: int, U: np.ndarray, G: np.ndarray | None):
        return self.propagator.sweep(self.nsteps - first, U, G)


class Direction:
    """The operator and its preconditioner on a hierarchy, forward or reversed, on arrays ``(k, *state)``.

    Parameters
    ----------
    solver
        Whose levels, options and transfers are used.
    state_shape
        Shape of one local state.
    """

    def __init__(self, solver: MGRIT, state_shape: tuple[int, ...]):
        self.solver, self.level = solver, solver.levels[0]
        self.U = np.zeros((self.level.k + 1, *state_shape))
        self.level.U = self.U  # the coarsest level's solver needs it where there is one level only
        flags = dict(linear=True, transposed=solver.transposed)
        self.cycle = Cycle(solver.levels, solver.options, state_shape, solver.transfers, **flags)
        self.cycles = 0
        self._ghost = np.zeros((1, *state_shape))

    def _ordered(self, array: np.ndarray) -> np.ndarray:
        """Rows in the order of this direction's points."""
        return array[::-1] if self.solver.transposed else array

    def clear(self) -> None:
        """Remove recorded failures and set the count of cycles to zero."""
        self.cycles = 0
        self.level.first_failure.clear()

    def multiply(self, x: np.ndarray, y: np.ndarray) -> None:
        """``y = A x`` for the own rows; the step from the left neighbour's last point waits for it, the others do not.

        A failed step leaves NaN in ``y``, which the next norm of the Krylov method carries to every rank.
        """
        level, x, y, ghost = self.level, self._ordered(x), self._ordered(y), self._ghost
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
        np.subtract(x, y, out=y)
        self._mark_failure(y)

    def precondition(self, x: np.ndarray, y: np.ndarray) -> None:
        """``y = B x``: one cycle from zero."""
        self._load(x)
        if len(self.solver.levels) > 1:
            self.cycle.relax_and_restrict(0)
            self.cycle.correct(0, self.solver.options.cycle)
        else:
            self.cycle.solve(0)
        self.cycles += 1
        self._store(y)

    def step(self, x: np.ndarray, y: np.ndarray) -> None:
        """``y = A^-1 x`` by stepping sequentially."""
        self._load(x)
        self.level.solve_sequentially()
        self._store(y)

    def guess(self, x: np.ndarray, y: np.ndarray, *, initial: np.ndarray, nested: bool) -> None:
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
                zero = np.zeros((1, *level.U.shape[1:]))
                out = zero.copy()
                level.phi(range(level.hi - 1, level.hi), zero, out)
                found |= bool(np.isfinite(out).all() and out.any())
        return found

    def _load(self, x: np.ndarray) -> None:
        self.U[...] = 0
        self.level.U, self.level.G = self.U, self._ordered(x)

    def _store(self, y: np.ndarray) -> None:
        y[...] = self._ordered(self.U[1:])
        self.level.G = None  # the array is PETSc's
        self._mark_failure(y)

    def _mark_failure(self, y: np.ndarray) -> None:
        """Set ``y`` to NaN after a failed step, whose own NaN relaxation may have replaced."""
        if self.level.failure is not None:
            y[...] = np.nan


class Hierarchies:
    """The forward hierarchy, the reversed one where there are transposed propagators, and PETSc's objects for both.

    Parameters
    ----------
    propagators, nsteps, options, comm, bounds, transfers, name
        Those of :class:`~pint_fem.mgrit.solver.MGRIT`; the propagators are linear. Of the options those of the
        hierarchy and the cycle count.
    transposed
        The transposed propagators for :class:`Reversed`, one per level; ``None``: no transposed products.
    petsc_comm
        Communicator of vectors and operators: all ranks that share the space-time unknowns (space x time). Default:
        ``comm``.
    trace
        Records work and messages; default: none.
    reversed_comm
        ``comm`` with its ranks in reverse order; default: one that all hierarchies on ``comm`` share
        (:mod:`pint_fem.communicators`), released by :meth:`destroy`.

    Raises
    ------
    ValueError
        On every rank, on options that do not fit each other, the steps or a preconditioner.
    """

    def __init__(
        self,
        propagators: Sequence[Propagator],
        nsteps: int,
        *,
        transposed: Sequence[Propagator] | None = None,
        options: MGRITOptions | Mapping | None = None,
        comm: MPI.Comm = MPI.COMM_SELF,
        bounds: Sequence[int] | None = None,
        transfers: Sequence | None = None,
        petsc_comm: MPI.Comm | None = None,
        reversed_comm: MPI.Comm | None = None,
        trace: Trace | None = None,
        name: str = "mgrit",
    ):
        if np.dtype(PETSc.ScalarType) != float:
            raise ValueError(f"{name}: PETSc was built for {np.dtype(PETSc.ScalarType)}, the slabs are float64")
        options = MGRITOptions.make(options)
        for option, usual in (("storage", "all"), ("f_cycles", None), ("time_norm", 2), ("rtol_of", "trajectory")):
            if getattr(options, option) != usual:
                raise ValueError(
                    f"{name}: mgrit {option} {getattr(options, option)!r} is for plain iterations: a preconditioner "
                    "works on all points and does the same cycle each time, and the norm is PETSc's; leave it out"
                )
        if transposed is not None and len(transposed) != len(propagators):
            raise ValueError(f"{name}: {len(transposed)} transposed propagators for {len(propagators)} levels")
        one_cycle = MGRITOptions.make(options, residual="none", max_it=1, rtol=0.0, atol=0.0, view=False, trace="")
        common = dict(name=name, linear=True, trace=trace)
        fit = dict(options=one_cycle, comm=comm, bounds=bounds, transfers=transfers)
        self.solver = MGRIT(propagators, nsteps, **fit, **common)
        self.comm, self.petsc_comm, self.name = comm, comm if petsc_comm is None else petsc_comm, name
        self.solver_T: MGRIT | None = None
        self._shared_groups = (
            SharedGroups(comm, comm.size) if transposed is not None and reversed_comm is None else None
        )
        reverse = reversed_comm if self._shared_groups is None else self._shared_groups.groups.reversed_inner
        if transposed is not None:
            levels = self.solver.levels
            swapped = [None if t is None else t.transposed for t in self.solver.transfers]
            self.solver_T = MGRIT(
                [Reversed(p, level.nsteps) for p, level in zip(transposed, levels, strict=True)],
                nsteps,
                options=_reversed_options(self.solver),
                comm=reverse,
                bounds=[nsteps - b for b in reversed(levels[0].bounds)],
                transfers=swapped,
                transposed=True,
                **common,
            )
        self.state_shape: tuple[int, ...] | None = None
        self._directions: list[Direction | None] = [None, None]

    def set_state(self, shape: tuple[int, ...]) -> None:
        """Allocate work arrays for local states of a shape (again where it changes)."""
        if self.state_shape != tuple(shape):
            self.state_shape, self._directions = tuple(shape), [None, None]

    def direction(self, *, transposed: bool) -> Direction:
        """The forward or the reversed operator; its work arrays are allocated by the first call.

        Raises
        ------
        ValueError
            If there are no transposed propagators.
        """
        solver = self.solver_T if transposed else self.solver
        if solver is None:
            raise ValueError(f"{self.name}: no transposed propagators: give transposed=[...], one per level")
        if self._directions[transposed] is None:
            self._directions[transposed] = Direction(solver, self.state_shape)
        return self._directions[transposed]

    def rows(self, vec: PETSc.Vec, *, readonly: bool = False) -> np.ndarray:
        """A vector's local array as ``(k, *state)``, no copy."""
        return vec.getArray(readonly=readonly).reshape(self.solver.levels[0].k, *self.state_shape)

    def vec(self, rows: np.ndarray) -> PETSc.Vec:
        """A vector whose local array is ``rows`` ``(k, *state)``, such as ``U[1:]``: C-contiguous, no copy."""
        return PETSc.Vec().createWithArray(rows.reshape(-1), comm=self.petsc_comm)

    def matrix(self) -> PETSc.Mat:
        """The all-at-once operator for states of the shape set (collective)."""
        local = self.solver.levels[0].k * int(np.prod(self.state_shape, dtype=int))
        matrix = PETSc.Mat().createPython(((local, None), (local, None)), AllAtOnceMatrix(self), comm=self.petsc_comm)
        matrix.setUp()
        return matrix

    def destroy(self) -> None:
        """Release the reversed communicator if it was made here (collective)."""
        if self._shared_groups is not None:
            self._shared_groups.free()


def _reversed_options(solver: MGRIT) -> MGRITOptions:
    """The same cycle on the reversed grids: point ``c`` of a level with ``N`` steps is ``N + 1 - c`` there."""
    points = []
    for level in solver.levels:
        if level.c_points is not None:
            c = tuple(level.nsteps + 1 - int(c) for c in reversed(level.c_points[1:]))
            points.append((0, *c) if c else level.nsteps + 1)  # relaxation of a coarsest level with one interval
    return MGRITOptions.make(solver.options, coarsening=tuple(points)) if points else solver.options


class _Context:
    """Context of an object of PETSc's that applies an operator on the hierarchies to vectors."""

    def __init__(self, hierarchies: Hierarchies | None = None):
        self.hierarchies = hierarchies

    def _apply(self, x: PETSc.Vec, y: PETSc.Vec, operation: Callable, *, transposed: bool) -> None:
        rows = self.hierarchies.rows
        operation(self.hierarchies.direction(transposed=transposed), rows(x, readonly=True), rows(y))


class AllAtOnceMatrix(_Context):
    """Context of a Python ``Mat``: products with the all-at-once operator on hierarchies with the state's shape set."""

    def mult(self, mat: PETSc.Mat, x: PETSc.Vec, y: PETSc.Vec) -> None:
        """``y = A x``."""
        self._apply(x, y, Direction.multiply, transposed=False)

    def multTranspose(self, mat: PETSc.Mat, x: PETSc.Vec, y: PETSc.Vec) -> None:
        """``y = A^T x``."""
        self._apply(x, y, Direction.multiply, transposed=True)


class MGRITPreconditioner(_Context):
    """Context of a Python ``PC``: one cycle from zero, and its exact transpose.

    It can also be PETSc's ``pc_python_type`` (``pc_type: python``) on a matrix of :meth:`Hierarchies.matrix`, and then
    takes the hierarchies from there.
    """

    def setUp(self, pc: PETSc.PC) -> None:
        """Take the hierarchies from the matrix where none were given."""
        if self.hierarchies is None:
            self.hierarchies = pc.getOperators()[1].getPythonContext().hierarchies

    def apply(self, pc: PETSc.PC, x: PETSc.Vec, y: PETSc.Vec) -> None:
        """``y = B x``."""
        self._apply(x, y, Direction.precondition, transposed=False)

    def applyTranspose(self, pc: PETSc.PC, x: PETSc.Vec, y: PETSc.Vec) -> None:
        """``y = B^T x``."""
        self._apply(x, y, Direction.precondition, transposed=True)

    def view(self, pc: PETSc.PC, viewer: PETSc.Viewer) -> None:
        """Print the hierarchy (``-ksp_view``)."""
        if viewer.getType() == PETSc.Viewer.Type.ASCII and self.hierarchies is not None:
            for line in self.hierarchies.solver.view().splitlines():
                viewer.printfASCII(f"    {line}\n")

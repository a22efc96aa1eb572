r"""Iterative solution of all steps of an evolution at once: what MGRIT and ParaDiag share.

The unknowns :math:`U_1, \dots, U_N` of

.. math::  U_{n+1} - \Phi_n(U_n) = G_n , \qquad n = 0, \dots, N-1, \qquad U_0 \text{ given},

are distributed over the ranks of a time communicator and improved by an iteration until the norm of the residual
:math:`\Phi_n(U_n) + G_n - U_{n+1}` over time satisfies the stopping criterion. Failures on one rank are raised on all
ranks; where the iteration does not converge, sequential stepping may take its place.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
from mpi4py import MPI
from numpy.typing import DTypeLike

from pint_fem.all_at_once.arguments import check_arrays
from pint_fem.all_at_once.arrays import Array, ArrayKind, NumpyArrays, kind_of, quiet
from pint_fem.all_at_once.failures import Failures
from pint_fem.all_at_once.grids import Bounds
from pint_fem.all_at_once.levels import Level
from pint_fem.all_at_once.norms import PointNorms, euclidean, gather_in_order, norm_over_time
from pint_fem.all_at_once.options import STARTS, SolverOptions
from pint_fem.all_at_once.stopping import SolveResult, SolverFailure, Stopping
from pint_fem.all_at_once.trace import Trace, check_trace_file
from pint_fem.collective import ending_all_ranks
from pint_fem.digests import digest
from pint_fem.errors import FAILURES
from pint_fem.logs import logger

__all__ = ["AllAtOnceSolver"]


class AllAtOnceSolver(ABC):
    """Base of solvers of ``U[n+1] = Phi_n(U[n]) + G[n]``, ``n = 0..N-1``, by an iteration on all steps at once.

    A subclass defines the iteration (:meth:`_iterate`), a description (:meth:`view`) and :meth:`memory_estimate`.

    Parameters
    ----------
    levels
        Time grids, the finest (on which the equations are posed) first.
    options
        Stopping criterion and what is printed.
    comm
        Time communicator.
    everyone
        Where states are shared in space: the communicator of all ranks in space and time, over which failures are
        exchanged; default: ``comm``.
    point_norms
        Squared norm of each state of a block (global over space). Where it is expensive it may have a cheaper method
        ``finite(block)``, which decides whether all points are finite.
    name
        Named in monitor lines and errors.
    trace
        Shared by several solvers; default: one of its own with the option ``trace``.
    is_root
        Whether this rank prints; default: the first of ``comm``.
    key
        What else than the steps, their bounds and the options has to be the same on all ranks.
    iterates
        Whether there is an iteration; otherwise a solve is sequential stepping.
    exact_after
        Iterations after which the solution is exact in any case.
    keeps_all
        Whether the arrays have all own points of the finest level rather than its C-points only.

    Attributes
    ----------
    levels : sequence of Level
    local_rows : int
        Rows of the local arrays: own steps plus one (own C-points plus one where only these are stored).
    key : int
        A digest of what has to be the same on all ranks.
    takes_tensors : bool
        Whether the iteration works on torch tensors.
    """

    takes_tensors = False

    def __init__(
        self,
        levels: Sequence[Level],
        options: SolverOptions,
        *,
        comm: MPI.Comm,
        everyone: MPI.Comm | None = None,
        point_norms: PointNorms = euclidean,
        name: str,
        trace: Trace | None = None,
        is_root: bool | None = None,
        key: tuple = (),
        iterates: bool = True,
        exact_after: float = math.inf,
        keeps_all: bool = True,
    ):
        self.levels, self.options = levels, options
        self.comm, self.everyone = comm, comm if everyone is None else everyone
        self.nsteps = levels[0].nsteps
        self.key = digest((self.nsteps, levels[0].bounds.digest, vars(options), *key))
        self._is_root = comm.rank == 0 if is_root is None else is_root
        if options.trace and trace is None:
            check_trace_file(options.trace, comm)
            trace = Trace(comm)
        self.trace = trace
        for level in levels:
            level.trace = trace
        self._failures = Failures(levels, comm, point_norms, name, everyone=self.everyone, keeps_all=keeps_all)
        self._stop = Stopping(options, exact_after)
        self._viewed, self._iterates = not options.view, iterates
        self._state: tuple[tuple[int, ...], ArrayKind, bool] | None = None
        self._residual: Array | None = None
        self.local_rows = levels[0].k + 1

    @property
    def name(self) -> str:
        """Name of the sweep in monitor lines and errors."""
        return self._failures.name

    @name.setter
    def name(self, name: str) -> None:
        self._failures.name = name

    @property
    def rhs_rows(self) -> tuple[int, ...]:
        """Numbers of rows that the local part of a right-hand side may have."""
        return (self.levels[0].k,)

    def solve(
        self,
        U: Array,
        G: Array | None = None,
        *,
        start: str | None = None,
        coarse_rhs: Sequence[Array | None] | None = None,
        rtol: float | None = None,
        cycles: int | None = None,
        batch: bool = False,
    ) -> SolveResult:
        """Solve in place (collective).

        Parameters
        ----------
        U
            ``(local_rows, *state)``: first guess in, solution out. Row 0 is the initial value on the first rank and a
            ghost of the left neighbour's last row on the others. A numpy array of float64 or float32, or a torch tensor
            of one of these or bfloat16 on any device, where the solver takes tensors: steps and transfers then get
            tensors on that device. A tensor on the ``meta`` device has no values; solves without a residual take it.
        G
            Right-hand side of the own steps, ``(own steps, *state)``, or ``None`` for zero. A solver that stores
            C-points only also takes one condensed to the own C-points, of which the last point has to be one.
        start
            First guess: ``"guess"`` takes ``U``; ``"skip"`` and ``"nested"`` make one from coarse levels, or begin at
            zero where there are none; default: the option.
        coarse_rhs
            Right-hand sides of the own steps of each level below the finest, for a first guess by ``"skip"`` or
            ``"nested"``; ``None``: restricted from ``G``.
        rtol
            Tolerance of this solve instead of the options' (an ``atol`` of theirs still counts).
        cycles
            Take this many iterations, whatever the residual.
        batch
            Whether the first axis of a state numbers independent right-hand sides of the same linear evolution, ``U``
            being ``(local_rows, members, ...)``: residuals are then those of each member, and each has to satisfy the
            stopping criterion by itself, so that a small one is solved as accurately as a large one beside it.

        Returns
        -------
        SolveResult
            The same on every rank.

        Raises
        ------
        InputError
            On every rank, if what ranks are given differs or does not fit.
        SolverFailure
            On every rank, if a step failed for a numerical reason or a value is not finite on any.
        Exception
            Anything else that a step or another function of the user has raised: as it is on the rank where that
            happened, as ``RuntimeError`` on the others.
        """
        fine = self.levels[0]
        check_arrays(self, U, G, coarse_rhs, start=start, rtol=rtol, cycles=cycles, batch=bool(batch))
        start = self.options.start if start is None else start
        if start not in STARTS:
            kinds = ", ".join(map(repr, STARTS))
            raise ValueError(f"{self.options.solver} start {start!r}: give one of {kinds}")
        self._stop.set(rtol=rtol, cycles=cycles)
        self._failures.clear()
        self._failures.batch = bool(batch)
        if not self._viewed:
            self._viewed = True
            self.prepare(U.shape[1:], batch=batch, like=U)
            self._print(self.view(U[:1].nbytes))
        fine.U, fine.G = U, G
        fine.set_may_be_last(True)
        # values that overflow are reported once, as a failure; an interrupt reaches one rank alone
        with ending_all_ranks(self.everyone), quiet(U):
            if self._iterates:
                return self._iterate_or_step(U, start, coarse_rhs)
            self._step_through()
            self._failures.raise_at_points(U)
            return SolveResult(True, "exact", [0.0], 0)

    def _iterate_or_step(self, U: Array, start: str, coarse_rhs: Sequence[Array | None] | None) -> SolveResult:
        """Iterate; where that does not converge and the options permit it, step sequentially."""
        result, serial = SolveResult(), self.options.on_divergence == "serial"
        self.prepare(U.shape[1:], batch=self._failures.batch, like=U)
        try:
            self._iterate(U, start, coarse_rhs, result)
            self._failures.raise_at_points(U)  # failures at points that no norm includes
        except SolverFailure as failure:
            if not serial:
                raise
            result.converged, result.message = False, str(failure)
        if result.converged or not serial:
            return result
        self._failures.clear()
        self._print(f"  {self.name}: {result.message}; stepping sequentially instead")
        self.levels[0].set_may_be_last(True)
        self._step_through()
        self._failures.raise_at_points(U)
        for each in (result, *result.members):
            each.converged, each.reason = True, "serial"
        return result

    @abstractmethod
    def _iterate(self, U: Array, start: str, coarse_rhs: Sequence[Array | None] | None, result: SolveResult) -> None:
        """Iterate on ``U`` and fill the result until the stopping criterion is met."""

    def _step_through(self) -> None:
        """Step sequentially, whatever the present iterate."""
        self.levels[0].solve_sequentially(fresh=self._iterates)

    def prepare(
        self, shape: tuple[int, ...], dtype: DTypeLike = float, *, batch: bool = False, like: Array | None = None
    ) -> None:
        """Allocate the work arrays for states of a shape and type, where they are missing (collective).

        Parameters
        ----------
        shape, dtype
            Those of a state.
        batch
            Whether the first number of the shape is that of a batch's members.
        like
            An array of the type and on the device that the work arrays are to have, instead of ``dtype``.
        """
        self._failures.batch = bool(batch)
        if self._iterates:
            kind = NumpyArrays(np.dtype(dtype)) if like is None else kind_of(like)
            self._state = tuple(shape), kind, bool(batch)

    def raise_failures(self) -> None:
        """Raise on every rank if a step has failed on any since the last solve (collective).

        Raises
        ------
        SolverFailure
            Naming the step.
        """
        if self._state is not None:
            shape, kind, _ = self._state
            self._failures.raise_noted(kind.zeros(1, *shape))

    # -- residuals -----------------------------------------------------------------------------------------------------
    def _norms(self, squares: Sequence[np.ndarray], bounds: Bounds | None) -> np.ndarray:
        """Norms over time, ``(arrays,)``, from the squared norms of own states (collective, one message for all of
        them); of each member of a batch, ``(arrays, members)``.

        All arrays have as many rows, given for each rank by the bounds; ``None``: they are counted. Raises
        ``SolverFailure`` on every rank if a norm is not finite.
        """
        local = squares[0] if len(squares) == 1 else np.stack(squares, axis=1)
        norms = norm_over_time(gather_in_order(local, self.comm, bounds), self.options.time_norm)
        if not np.isfinite(norms).all():
            self._failures.raise_unless(False)
        return norms if len(squares) > 1 else np.asarray(norms)[None]

    def _decide(self, result: SolveResult, norms: np.ndarray, scale: np.ndarray) -> bool:
        """Add residual norms, ``(cycles,)`` or ``(cycles, members)``, to the result, and set the norm of the trajectory
        or of each member's; returns whether to stop.
        """
        if self._failures.batch:
            result.members = result.members or [SolveResult() for _ in scale]
        for member, each, size in zip(
            result.members or [result], np.reshape(norms, (len(norms), -1)).T, np.atleast_1d(scale), strict=True
        ):
            member.residuals += each.tolist()
            member.scale = float(size)
        return self._stop(result)

    def _residual_at_all_points(self, U: Array) -> Array:
        """``Phi(U) + G - U`` at all own points, in a work array (messages to the neighbours)."""
        fine = self.levels[0]
        kind = kind_of(U)
        if self._residual is None or (self._residual.shape[1:], kind_of(self._residual)) != (U.shape[1:], kind):
            self._residual = kind.empty(fine.k, *U.shape[1:])
        fine.phi_of_all(U, self._residual)
        if fine.G is not None:
            self._residual += fine.G
        self._residual -= U[1:]
        return self._residual

    def _end_iteration(self, result: SolveResult) -> None:
        """Count an iteration."""
        result.cycles += 1
        self._failures.set_cycle(result.cycles)
        if self.trace:
            self.trace.mark("cycle", sweep=self.name, number=result.cycles)

    # -- output --------------------------------------------------------------------------------------------------------
    def _print(self, text: str) -> None:
        if self._is_root:
            try:
                logger.info(text)
            except FAILURES as error:  # on this rank only
                self._failures.note("logging", error)

    def _monitor(self, result: SolveResult) -> None:
        if self.options.monitor:
            self._print(f"  {self.name} {result.monitor_line()}")

    def write_trace(self, path: str | None = None) -> None:
        """Write the trace of all solves so far (collective), to the option's file unless another is given.

        Raises
        ------
        ValueError
            Without the option ``trace``.
        """
        if self.trace is None:
            raise ValueError("no trace was taken: give the option trace='file.json'")
        self.trace.write(path or self.options.trace)

    @abstractmethod
    def view(self, state_nbytes: int | None = None) -> str:
        """Describe the solver in a few lines, with the memory of this rank where the bytes of a state are given."""

    @abstractmethod
    def memory_estimate(self, state_nbytes: int) -> tuple[int, int]:
        """Bytes of this rank's arrays for the finest level (work arrays included) and for the coarse ones."""

    @property
    def extra_states(self) -> list[int]:
        """Numbers of states in the work arrays of each level's relaxation."""
        return [0] * len(self.levels)

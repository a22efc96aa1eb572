"""MGRIT: solve all steps of an evolution at once, distributed over time.

Needs numpy and mpi4py only. A scalar ODE::

    class Euler:
        def __init__(self, dt): self.dt = dt
        def step(self, steps, u, out): out[...] = u / (1 + self.dt)

    U = np.zeros((65, 1)); U[0] = 1
    MGRIT([Euler(1 / 64), Euler(4 / 64)], 64, options=dict(coarsening=4)).solve(U)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from mpi4py import MPI

from pint_fem.all_at_once.arguments import check_arrays
from pint_fem.all_at_once.failures import MEETINGS, Failures
from pint_fem.all_at_once.grids import Bounds
from pint_fem.all_at_once.levels import Propagator, build_levels
from pint_fem.all_at_once.norms import PointNorms, euclidean
from pint_fem.all_at_once.residuals import Residuals
from pint_fem.all_at_once.stopping import SolveResult, SolverFailure, Stopping
from pint_fem.all_at_once.trace import Trace, check_trace_file
from pint_fem.collective import collectively, ending_all_ranks
from pint_fem.digests import digest
from pint_fem.errors import FAILURES, InputError
from pint_fem.mgrit.cycle import Cycle
from pint_fem.mgrit.options import MGRITOptions
from pint_fem.mgrit.termination import exact_termination
from pint_fem.mgrit.transfer import Transfer
from pint_fem.mgrit.view import describe

__all__ = ["MGRIT"]


class MGRIT:
    """Multigrid reduction in time for ``U[n+1] = Phi_n(U[n]) + G[n]``, ``n = 0..N-1``.

    Parameters
    ----------
    propagators
        One a level, finest first (the number of levels). A coarse one steps from one of its level's points to the
        next (:func:`~pint_fem.all_at_once.levels.coarse_points`): as far as ``m`` steps of the finer.
    nsteps
        Steps on the finest level.
    options
        :class:`MGRITOptions` or a dictionary of them. ``levels`` must fit ``propagators`` if given.
    comm
        Time communicator; default: this process alone.
    everyone
        Where states are shared in space: the communicator of all ranks in space and time, over which failures are
        exchanged; default: ``comm``.
    bounds
        ``comm.size + 1`` step bounds of the ranks; default: nearly equal.
    point_norms
        Squared norm of each state of a block (global over space); default: Euclidean. Where it is expensive it may have
        a cheaper method ``finite(block)``, which is asked whether all points are finite.
    transfers
        Spatial coarsening from each level to the next: :class:`Transfer`, a pair of maps on blocks or of matrices
        ``(R, P)``, or ``None``.
    linear
        Whether ``Phi`` is linear; nested iteration then restricts right-hand sides more accurately.
    transposed
        Cycles that are the transposes of those of the forward problem (see :mod:`~pint_fem.mgrit.cycle`).
    name
        Named in monitor lines and errors.
    speaks
        Whether this rank prints; default: the first of ``comm``.
    trace
        Shared by several solvers; default: one of its own where the option asks for it.

    Raises
    ------
    ValueError
        On options that do not fit each other or the number of steps.
    """

    def __init__(
        self,
        propagators: Sequence[Propagator],
        nsteps: int,
        *,
        options: MGRITOptions | Mapping | None = None,
        comm=MPI.COMM_SELF,
        everyone=None,
        bounds: Sequence[int] | None = None,
        point_norms: PointNorms = euclidean,
        transfers: Sequence | None = None,
        linear: bool = False,
        transposed: bool = False,
        name: str = "mgrit",
        printer: Callable[[str], None] = print,
        trace: Trace | None = None,
        speaks: bool | None = None,
    ):
        options = MGRITOptions.make(options)
        if options.levels not in (None, len(propagators)):
            raise ValueError(f"{len(propagators)} propagators for {options.levels} mgrit levels: give one a level")
        self.options = options = MGRITOptions.make(options, levels=len(propagators))
        factors = options.factors(nsteps)
        if not factors and options.storage == "C":
            raise ValueError("mgrit storage 'C' with one level: there are no C-points; give levels or storage='all'")
        if options.residual == "full" and options.storage == "C":
            raise ValueError("mgrit residual 'full' with storage 'C': F-points are exact there; give residual='C'")
        self.transfers = [Transfer.make(t) for t in (transfers or [None] * len(factors))]
        if len(self.transfers) != len(factors):
            raise ValueError(f"{len(self.transfers)} transfers for {len(factors)} coarse levels: give one to each")
        whole = factors[0] if options.storage == "C" else None
        bounds = Bounds.make(Bounds.shared_out(nsteps, comm.size, whole) if bounds is None else bounds)
        if not bounds.increase or len(bounds) != comm.size + 1 or bounds[-1] != nsteps:
            raise ValueError(f"bounds {list(bounds)} do not split {nsteps} steps over {comm.size} ranks")
        if options.coarse_solver == "relax":
            factors = (*factors, options.coarsen(len(factors)))
        self.levels = build_levels(propagators, factors, bounds, comm)
        self.comm, self.everyone = comm, comm if everyone is None else everyone
        self.nsteps, self.printer = nsteps, printer
        #: Of what the ranks have to be given alike.
        self.key = digest((nsteps, bounds.digest, vars(options), len(propagators), bool(linear), bool(transposed)))
        self.linear, self.transposed = linear, transposed
        self._speaks = comm.rank == 0 if speaks is None else speaks
        if options.trace and trace is None:
            check_trace_file(options.trace, comm)
            trace = Trace(comm)
        for who in (self, *self.levels):
            who.trace = trace
        keeps_all = options.storage == "all"
        self._failures = Failures(self.levels, comm, point_norms, name, everyone=self.everyone, keeps_all=keeps_all)
        self._residuals = Residuals(self._failures, options.time_norm)
        ends = len(self.levels) > 1 and options.coarse_solver != "relax" and not any(self.transfers)
        exact = exact_termination(self.levels[1].nsteps, options.sweeps(0), options.weight(0)) if ends else math.inf
        self._stop = Stopping(options, exact)
        self._cycle: Cycle | None = None
        self._viewed, self._iterates = not options.view, len(self.levels) > 1
        fine = self.levels[0]
        fine.looks |= options.storage == "C"  # F-points are not kept: nobody can tell later
        #: Rows of the local arrays: own steps (own C-points with ``storage="C"``) plus one.
        self.local_rows = fine.k + 1
        if options.storage == "C":
            coarse = fine.coarse_bounds()
            self.local_rows = coarse[comm.rank + 1] - coarse[comm.rank] + 1

    name = property(
        lambda self: self._failures.name,
        lambda self, name: setattr(self._failures, "name", name),
        doc="Named in monitor lines and errors.",
    )

    def solve(
        self,
        U: np.ndarray,
        G: np.ndarray | None = None,
        *,
        start: str | None = None,
        coarse_rhs: Sequence[np.ndarray | None] | None = None,
        rtol: float | None = None,
        cycles: int | None = None,
    ) -> SolveResult:
        """Solve in place.

        Parameters
        ----------
        U
            ``(local_rows, *state)``: first guess in, solution out. Row 0 is the initial value on the first rank and a
            ghost of the left neighbour's last row on the others.
        G
            Right-hand side of the own steps, ``(own steps, *state)``, or ``None`` for zero. With ``storage="C"`` it may
            be condensed to the own C-points (see :mod:`~pint_fem.mgrit.c_point_relaxation`; the last point has to be one).
        start
            ``"guess"``, ``"skip"`` or ``"nested"``; default: the option.
        coarse_rhs
            Right-hand sides of the own steps of each level below the finest, for a first guess by ``"skip"`` or
            ``"nested"``; ``None``: restricted from ``G``.
        rtol
            Tolerance of this solve instead of the options' (an ``atol`` of theirs goes on to count).
        cycles
            Take this many cycles, whatever the residual, and report it.

        Returns
        -------
        SolveResult

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
        check_arrays(self, U, G, coarse_rhs, start=start, rtol=rtol, cycles=cycles)
        start = (self.options if start is None else MGRITOptions.make(self.options, start=start)).start
        self._stop.set(rtol=rtol, cycles=cycles)
        self._failures.forget()
        if not self._viewed:
            self._viewed = True
            self.prepare(U.shape[1:], U.dtype)
            self._say(self.view(U[:1].nbytes))
        fine.U, fine.G = U, G
        fine.may_be_last(True)
        # a solve that blows up says so itself, once; an interrupt comes to one rank alone
        with ending_all_ranks(self.everyone), np.errstate(over="ignore", invalid="ignore"):
            if self._iterates:
                return self._cycle_or_step(U, start, coarse_rhs)
            fine.solve_sequentially()
            self._failures.raise_at_points(U)
            return SolveResult(True, "exact", [0.0], 0)

    def _cycle_or_step(self, U: np.ndarray, start: str, coarse_rhs) -> SolveResult:
        """Cycle; step sequentially where that does not work out and the options want it."""
        result, serial = SolveResult(), self.options.on_divergence == "serial"
        try:
            self._iterate(U, start, coarse_rhs, result)
            self._failures.raise_at_points(U)  # failures that no C-point or no norm has seen
        except SolverFailure as failure:
            if not serial:
                raise
            result.converged, result.message = False, str(failure)
        if result.converged or not serial:
            return result
        self._failures.forget()
        self._say(f"  {self.name}: {result.message}; stepping sequentially instead")
        self.levels[0].may_be_last(True)
        self._step_through()
        self._failures.raise_at_points(U)
        result.converged, result.reason = True, "serial"
        return result

    def _step_through(self) -> None:
        """Step sequentially, whatever iterate is there."""
        self._cycle.relaxations[0].solve_sequentially()

    def prepare(self, shape: tuple[int, ...], dtype=float) -> None:
        """Make the work arrays for states of a shape and type now rather than in the first solve; collective."""
        wanted = tuple(shape), np.dtype(dtype)
        if len(self.levels) > 1 and (self._cycle is None or (self._cycle.state_shape, self._cycle.dtype) != wanted):
            self._cycle = self._make_cycle(*wanted)

    def _make_cycle(self, shape: tuple[int, ...], dtype: np.dtype) -> Cycle:
        """Work arrays for such states; a transfer or storage that does not fit is an error on every rank."""

        def make() -> Cycle:
            flags = dict(linear=self.linear, transposed=self.transposed, dtype=dtype)
            try:
                return Cycle(self.levels, self.options, shape, self.transfers, **flags)
            except ValueError as error:
                raise InputError(f"{self.name}: {error}") from error

        return collectively(self.everyone, f"{self.name}: work arrays", make)

    def _iterate(self, U: np.ndarray, start: str, coarse_rhs, result: SolveResult) -> None:
        self.prepare(U.shape[1:], U.dtype)
        options, cycle, fine, fixed = self.options, self._cycle, self.levels[0], self._stop.cycles
        # nobody wants to know norms before the last of so many cycles: one message has them all, and no rank waits
        looks = [] if fixed is not None and options.residual == "C" and not options.monitor else None
        fine.may_be_last(not fixed)
        f_is_done = start in ("skip", "nested")
        if f_is_done:
            cycle.first_guess(nested=start == "nested", coarse_rhs_given=coarse_rhs)
        early = options.check == "cycle"
        unseen = options.max_it if fixed is None else fixed
        while True:
            if options.residual == "none" and result.cycles == unseen:
                if options.storage == "C":
                    fine.exchange(U)  # relaxation fetches row 0 only before it steps
                result.converged, result.reason = True, "its"
                return
            if early and options.residual != "none":
                if not f_is_done:
                    cycle.relaxations[0].f_relax()
                cycle.residual(0)
            else:
                cycle.relax_and_restrict(0, f_is_done=f_is_done)
            if self._look(U, result, looks):
                return
            if early and options.residual != "none":
                cycle.relax_and_restrict(0, f_is_done=True, residual_is_known=True)
            fine.may_be_last(fixed is None or result.cycles + 1 >= fixed)
            is_f = options.cycle == "F" and (options.f_cycles is None or result.cycles < options.f_cycles)
            cycle.correct(0, "F" if is_f else "V")
            f_is_done = True
            result.cycles += 1
            self._failures.in_cycle(result.cycles)
            if self.trace:
                self.trace.mark("cycle", sweep=self.name, number=result.cycles)

    def _look(self, U: np.ndarray, result: SolveResult, looks: list[np.ndarray] | None) -> bool:
        """Note failures and take the residual's norm, or keep its local part in ``looks`` until the last cycle.

        Returns whether to stop.
        """
        kind, residuals, r = self.options.residual, self._residuals, self._cycle.residuals[0]
        if kind == "none":
            self._watch(r, result.cycles, r)
            return False
        with residuals.timed():
            seen = residuals.squares(r) if kind == "C" else r
            if looks is not None:
                looks.append(seen)
                if result.cycles < self._stop.cycles:
                    self._watch(r, result.cycles, seen)
                    return False
            self._watch(r, 0, seen)
            V, places = residuals.squares(self._cycle.relaxations[0].c_values(U)), self.levels[1].bounds
            if looks is not None:
                *result.residuals, result.scale = residuals.norms([*looks, V], places)
                return self._stop(result)
            if kind == "full":
                every = residuals.squares(residuals.at_all_points(U))
                [norm], [result.scale] = residuals.norms([every], self.levels[0].bounds), residuals.norms([V], places)
            else:
                norm, result.scale = residuals.norms([seen, V], places)
        result.residuals.append(norm)
        self._monitor(result)
        return self._stop(result)

    def _watch(self, r: np.ndarray, cycles: int, seen: np.ndarray) -> None:
        """Note what has failed unseen, and behind some numbers of cycles hear of all ranks' failures.

        ``seen``: the residual ``r`` at the C-points or its squared norms.
        """
        fine = self.levels[0]
        if not (fine.looks or fine.failure or np.isfinite(seen).all()):
            self._cycle.relaxations[0].blame(r)
        if cycles in MEETINGS:
            squares = self._residuals.squares(r) if seen is r else seen
            self._failures.raise_noted(fine.U[:1], finite=bool(np.isfinite(squares).all()))

    def states(self, U: np.ndarray, G: np.ndarray | None = None) -> Iterator[tuple[int, np.ndarray]]:
        """The own part of a solved trajectory in order: the number of a point and the states from there on.

        With ``storage="C"`` interval by interval, F-points being computed again (one propagator call each) in an
        array that the next interval uses.

        A step that fails here gives NaN, as it must not stop a rank alone; :meth:`raise_failures` then names it.

        Raises
        ------
        ValueError
            If ``G`` is condensed: what F-points need of it is lost.
        """
        fine = self.levels[0]
        if G is not None and len(G) != fine.k:
            raise ValueError(f"G {G.shape} for {fine.k} own steps: give a row for each")
        if self.options.storage == "all":
            yield fine.lo + 1, U[1:]
        else:
            self.prepare(U.shape[1:], U.dtype)
            yield from self._cycle.relaxations[0].states(U, G)

    def raise_failures(self) -> None:
        """Raise on every rank if a step has failed on any since the last solve, as F-points were computed again by
        :meth:`states` (collective).

        Raises
        ------
        SolverFailure
            Naming the step.
        """
        if self._cycle is not None:
            self._failures.raise_noted(np.zeros((1, *self._cycle.state_shape), self._cycle.dtype))

    def _say(self, text: str) -> None:
        if self._speaks:
            try:
                self.printer(text)
            except FAILURES as error:  # on this rank only
                self._failures.note("printer", error)

    def _monitor(self, result: SolveResult) -> None:
        if self.options.monitor:
            self._say(f"  {self.name} {result}")

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

    def view(self, state_nbytes: int | None = None) -> str:
        """Describe the hierarchy in a few lines, with the memory of this rank where a state's size is known."""
        return describe(self, state_nbytes)

    @property
    def extra_states(self) -> list[int]:
        """States of relaxation's work arrays, for each level; zeros before the first solve."""
        return [0] * len(self.levels) if self._cycle is None else [*self._cycle.extra_states, 0]

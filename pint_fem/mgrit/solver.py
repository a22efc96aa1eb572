"""MGRIT: solve all steps of an evolution at once by multigrid reduction in time, distributed over time.

Cycles in full approximation form (:mod:`~pint_fem.mgrit.cycle`) on a hierarchy of time grids reduce the residual of all
steps (Falgout, Friedhoff, Kolev, MacLachlan, Schroder, SISC 36(6), 2014). Needs numpy and mpi4py only. A scalar ODE::

    class Euler:
        def __init__(self, dt): self.dt = dt
        def step(self, steps, u, out): out[...] = u / (1 + self.dt)

    U = np.zeros((65, 1)); U[0] = 1
    MGRIT([Euler(1 / 64), Euler(4 / 64)], 64, options=dict(coarsening=4)).solve(U)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from mpi4py import MPI
from numpy.typing import DTypeLike

from pint_fem.all_at_once.arrays import Array, is_tensor
from pint_fem.all_at_once.failures import EXCHANGE_AFTER
from pint_fem.all_at_once.grids import Bounds
from pint_fem.all_at_once.levels import build_levels
from pint_fem.all_at_once.propagator import Propagator
from pint_fem.all_at_once.solver import AllAtOnceSolver
from pint_fem.all_at_once.stopping import SolveResult
from pint_fem.all_at_once.trace import timed
from pint_fem.collective import collectively
from pint_fem.errors import InputError
from pint_fem.mgrit.c_point_relaxation import CPointRelaxation
from pint_fem.mgrit.cycle import Cycle, exact_termination
from pint_fem.mgrit.options import MGRITOptions
from pint_fem.mgrit.relaxation import Relaxation
from pint_fem.mgrit.transfer import Transfer

__all__ = ["MGRIT"]


class MGRIT(AllAtOnceSolver):
    """Multigrid reduction in time for ``U[n+1] = Phi_n(U[n]) + G[n]``, ``n = 0..N-1``.

    Parameters
    ----------
    propagators
        One per level, finest first (the number of levels). A coarse one steps from one of its level's points to the
        next (:func:`~pint_fem.all_at_once.grids.coarse_points`): as far as ``m`` steps of the finer.
    nsteps
        Steps on the finest level.
    options
        :class:`MGRITOptions` or a dictionary of them. ``levels`` must fit ``propagators`` if given.
    comm
        Time communicator; default: this process alone.
    bounds
        ``comm.size + 1`` step bounds of the ranks; default: nearly equal.
    transfers
        Spatial coarsening from each level to the next: :class:`Transfer`, a pair of maps on blocks or of matrices
        ``(R, P)``, or ``None``.
    linear
        Whether ``Phi`` is linear; nested iteration then restricts right-hand sides more accurately.
    transposed
        Cycles that are the transposes of those of the forward problem (:mod:`~pint_fem.mgrit.cycle`).
    name
        Named in monitor lines and errors.
    **given
        ``everyone``, ``point_norms``, ``trace`` and ``is_root`` of
        :class:`~pint_fem.all_at_once.solver.AllAtOnceSolver`.

    Raises
    ------
    ValueError
        On options that do not fit each other or the number of steps.
    """

    options: MGRITOptions
    takes_tensors = True

    def __init__(
        self,
        propagators: Sequence[Propagator],
        nsteps: int,
        *,
        options: MGRITOptions | Mapping | None = None,
        comm: MPI.Comm = MPI.COMM_SELF,
        bounds: Sequence[int] | None = None,
        transfers: Sequence | None = None,
        linear: bool = False,
        transposed: bool = False,
        name: str = "mgrit",
        **given: Any,
    ):
        options, count = MGRITOptions.make(options), len(propagators)
        if options.levels not in (None, count):
            raise ValueError(f"{count} propagators for {options.levels} mgrit levels: give one per level")
        if options.coarse_steps != 1:
            raise ValueError(
                f"mgrit coarse_steps {options.coarse_steps}: the propagators are given here; make coarse ones that "
                "take shorter steps, and leave it out"
            )
        options = MGRITOptions.make(options, levels=count)
        factors, compact = options.factors(nsteps), options.storage == "C"
        if not factors and compact:
            raise ValueError("mgrit storage 'C' with one level: there are no C-points; give levels or storage='all'")
        if options.residual == "full" and compact:
            raise ValueError("mgrit residual 'full' with storage 'C': F-points are exact there; give residual='C'")
        self.transfers = [Transfer.make(t) for t in (transfers or [None] * len(factors))]
        if len(self.transfers) != len(factors):
            raise ValueError(f"{len(self.transfers)} transfers for {len(factors)} coarse levels: give one to each")
        bounds = Bounds.of_ranks(nsteps, comm.size, bounds, factors[0] if compact else None)
        relaxed = options.coarse_solver == "relax"
        if relaxed:
            factors = (*factors, options.coarsen(len(factors)))
        levels = build_levels(propagators, factors, bounds, comm)
        terminates = count > 1 and not relaxed and not any(self.transfers)
        super().__init__(
            levels, options, comm=comm, name=name, key=(count, bool(linear), bool(transposed)),
            iterates=count > 1 and options.cycle != "none",
            exact_after=exact_termination(levels[1].nsteps, options.sweeps(0), options.weight(0))
            if terminates else math.inf, keeps_all=not compact, **given,
        )  # fmt: skip
        self.linear, self.transposed = linear, transposed
        self._cycle: Cycle | None = None
        self._intervals: CPointRelaxation | None = None
        fine = self.levels[0]
        fine.checks_blocks |= compact  # F-points are not stored, so that nothing else would show it
        if compact:
            own = fine.coarse_bounds()
            self.local_rows = own[comm.rank + 1] - own[comm.rank] + 1

    @property
    def rhs_rows(self) -> tuple[int, ...]:
        """Numbers of rows that the local part of a right-hand side may have: own steps, or C-points (condensed)."""
        fine = self.levels[0]
        condensable = self.options.storage == "C" and int(fine.c_points[-1]) == fine.nsteps
        return (fine.k, self.local_rows - 1) if condensable else (fine.k,)

    @property
    def _relaxation(self) -> Relaxation:
        """That of the finest level, which steps through the intervals where C-points only are stored."""
        if self._cycle is not None:
            return self._cycle.relaxations[0]
        if self._intervals is None:
            self._intervals = CPointRelaxation(self.levels[0])
        return self._intervals

    def _step_through(self) -> None:
        if self.options.storage == "C" or self._iterates:
            self._relaxation.solve_sequentially()
        else:
            super()._step_through()

    def prepare(
        self, shape: tuple[int, ...], dtype: DTypeLike = float, *, batch: bool = False, like: Array | None = None
    ) -> None:
        """Allocate the work arrays for states of a shape and type, where they are missing (collective).

        Parameters
        ----------
        shape, dtype, batch, like
            Those of :meth:`AllAtOnceSolver.prepare <pint_fem.all_at_once.solver.AllAtOnceSolver.prepare>`.

        Raises
        ------
        InputError
            On every rank, on a transfer or a storage that does not fit.
        """
        super().prepare(shape, dtype, batch=batch, like=like)
        if self._iterates and (self._cycle is None or self._cycle.state != self._state):
            self._cycle = collectively(self.everyone, f"{self.name}: work arrays", self._make_cycle)

    def _make_cycle(self) -> Cycle:
        shape, kind, batch = self._state
        try:
            return Cycle(
                self.levels, self.options, shape, self.transfers, linear=self.linear, transposed=self.transposed,
                kind=kind, batch=batch,
            )  # fmt: skip
        except ValueError as error:
            raise InputError(f"{self.name}: {error}") from error

    def _iterate(self, U: Array, start: str, coarse_rhs: Sequence[Array | None] | None, result: SolveResult) -> None:
        options, cycle, fine, fixed = self.options, self._cycle, self.levels[0], self._stop.cycles
        # norms before the last of a fixed number of cycles decide nothing: one message has them all, and no rank waits
        deferred: list[Array] | None = (
            [] if fixed is not None and options.residual == "C" and not options.monitor else None
        )
        fine.set_may_be_last(not fixed)
        f_is_done = start in ("skip", "nested")
        if f_is_done:
            cycle.first_guess(nested=start == "nested", coarse_rhs_given=coarse_rhs)
        early = options.check == "cycle" and options.residual != "none"
        without_norms = options.max_it if fixed is None else fixed
        while True:
            if options.residual == "none" and result.cycles == without_norms:
                if options.storage == "C":
                    fine.exchange(U)  # relaxation fetches row 0 only before it steps
                result.converged, result.reason = True, "its"
                return
            if early:
                if not f_is_done:
                    cycle.relaxations[0].f_relax()
                cycle.residual(0)
            else:
                cycle.relax_and_restrict(0, f_is_done=f_is_done)
            if self._evaluate_residual(U, result, deferred):
                return
            if early:
                cycle.relax_and_restrict(0, f_is_done=True, has_residual=True)
            fine.set_may_be_last(fixed is None or result.cycles + 1 >= fixed)
            is_f = options.cycle == "F" and (options.f_cycles is None or result.cycles < options.f_cycles)
            cycle.correct(0, "F" if is_f else "V")
            f_is_done = True
            self._end_iteration(result)

    def _evaluate_residual(self, U: Array, result: SolveResult, deferred: list[Array] | None) -> bool:
        """Note failures and take the residual's norm, or keep its local part in ``deferred`` until the last cycle.

        Returns whether to stop.
        """
        kind, r, failures = self.options.residual, self._cycle.residuals[0], self._failures
        if kind == "none":
            self._exchange_failures(r, result.cycles, r)
            return False
        with timed(self.trace, "norm", 0, sweep=self.name):
            squares = failures.unread_squares(r if kind == "C" else self._residual_at_all_points(U))
            if deferred is not None:
                deferred.append(squares)
                if result.cycles < self._stop.cycles:
                    self._exchange_failures(r, result.cycles, squares)
                    return False
            V, coarse = failures.unread_squares(self._cycle.relaxations[0].c_values(U)), self.levels[1].bounds
            *squares, V = failures.read(*(deferred or [squares]), V)
            self._exchange_failures(r, 0, squares[-1])
            if deferred is not None:
                norms = self._norms([*squares, V], coarse)
                return self._decide(result, norms[:-1], norms[-1])
            if kind == "full":
                [norm], [scale] = self._norms(squares, self.levels[0].bounds), self._norms([V], coarse)
            else:
                norm, scale = self._norms([*squares, V], coarse)
        stops = self._decide(result, np.array([norm]), scale)
        self._monitor(result)
        return stops

    def _exchange_failures(self, r: Array, cycles: int, values: Array) -> None:
        """Record the step behind a residual that is not finite; after some numbers of cycles exchange failures.

        ``values``: the residual ``r`` at the C-points or squared norms. Those of tensors are read where ranks exchange
        failures.
        """
        fine, exchanges = self.levels[0], cycles in EXCHANGE_AFTER
        if is_tensor(values) and not exchanges:
            return
        if exchanges:
            values = self._failures.squares(r) if values is r else self._failures.read(values)[0]
        if not (fine.checks_blocks or fine.failure or np.isfinite(values).all()):
            self._cycle.relaxations[0].note_first_failure(r)
        if exchanges:
            self._failures.raise_noted(fine.U[:1], finite=bool(np.isfinite(values).all()))

    def states(self, U: Array, G: Array | None = None) -> Iterator[tuple[int, Array]]:
        """The own part of a solved trajectory in order: the number of a point and the states from there on.

        With ``storage="C"`` the states come interval by interval, F-points being computed again (one propagator call
        each) in an array that the next interval overwrites.

        A step that fails here gives NaN, so that no rank stops alone; :meth:`raise_failures` then names it.

        Raises
        ------
        ValueError
            If ``G`` is condensed, as F-points cannot be computed from it.
        """
        fine = self.levels[0]
        if G is not None and len(G) != fine.k:
            raise ValueError(f"G {G.shape} for {fine.k} own steps: give a row for each")
        if self.options.storage == "all":
            yield fine.lo + 1, U[1:]
        else:
            self.prepare(U.shape[1:], like=U)
            yield from self._relaxation.states(U, G)  # type: ignore[attr-defined]

    def view(self, state_nbytes: int | None = None, *, kind: str = "MGRIT", tolerance: str = "") -> str:
        """Describe the hierarchy in a few lines, with the memory of this rank where the bytes of a state are given.

        ``kind`` and ``tolerance`` name the method and its stopping criterion, by default those of plain MGRIT.
        """
        o = self.options
        if not tolerance:
            tolerance = f"rtol {o.rtol:g}" + (f", atol {o.atol:g}" if o.atol else "")
            if o.is_fixed:
                tolerance = f"{o.max_it} cycles"
        first = {"auto": "", "guess": "", "skip": ", first down-cycle skipped", "nested": ", nested iteration"}[o.start]
        ranks = f"{self.comm.size} time rank" + "s" * (self.comm.size > 1)
        how = f"{o.cycle}-cycles{first}, {tolerance}" if self._iterates else "no cycles"
        lines = [f"{kind} '{self.name}': {self.nsteps} steps on {ranks}, {how}"]
        if o.cycle == "none" and len(self.levels) > 1:
            lines.append(f"  level 0: {self.nsteps} steps, sequential, m = {self.levels[0].m}")
        for level in self.levels if self._iterates or len(self.levels) == 1 else ():
            kind = {"sequential": "sequential", "gathered": "gathered on one rank"}.get(o.coarse_solver, "")
            if level.index < len(self.levels) - 1:
                m = f"m = {level.m}" if level.m else f"{len(level.c_points)} C-points"
                weight = o.weight(level.index)
                kind = f"{m}, {o.scheme(level.index)}-relaxation" + (f", C-weight {weight:g}" if weight != 1 else "")
            elif o.coarse_solver == "relax":
                kind = f"{o.coarse_sweeps} FC-sweeps"
            elif o.coarse_solver == "paradiag":
                kind = f"{o.coarse_sweeps} alpha-circulant iteration" + "s" * (o.coarse_sweeps > 1)
            lines.append(f"  level {level.index}: {level.nsteps} steps, {kind}")
        if state_nbytes is not None:
            finest, coarse = self.memory_estimate(state_nbytes)
            what = "all points" if o.storage == "all" else "C-points"
            lines.append(f"  memory of a rank: {what} {finest / 2**20:.3g} MB, coarse levels {coarse / 2**20:.3g} MB")
        return "\n".join(lines)

    def memory_estimate(self, state_nbytes: int) -> tuple[int, int]:
        """Bytes of this rank's arrays for the finest level (work arrays included) and for the coarse ones; before the
        first solve as if states were the same size on all levels.
        """
        o, extra = self.options, self.extra_states
        sizes = [state_nbytes] + [state_nbytes if c.U is None else c.U[:1].nbytes for c in self.levels[1:]]
        finest = self.local_rows + extra[0] + (self.levels[0].k if o.residual == "full" else 0)
        coarse = sum(
            (4 * level.k + 2 + more) * size
            for level, more, size in zip(self.levels[1:], extra[1:], sizes[1:], strict=True)
            if self._iterates
        )
        if o.coarse_solver == "gathered" and self.comm.rank == 0 and len(self.levels) > 1:
            coarse += (2 * self.levels[-1].nsteps + 1) * sizes[-1]
        return finest * state_nbytes, coarse

    @property
    def extra_states(self) -> list[int]:
        """Numbers of states in the work arrays of each level's relaxation; zeros before the first solve."""
        return super().extra_states if self._cycle is None else [*self._cycle.extra_states, 0]

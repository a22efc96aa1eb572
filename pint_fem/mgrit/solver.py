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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from mpi4py import MPI

from pint_fem.mgrit.cycle import Cycle
from pint_fem.mgrit.levels import Propagator, build_levels, split_steps
from pint_fem.mgrit.norms import PointNorms, euclidean, gather_in_order
from pint_fem.mgrit.options import MGRITOptions
from pint_fem.mgrit.relaxation import solve_sequentially

__all__ = ["MGRIT", "DivergedError", "SolveResult", "SolverFailure"]


class SolverFailure(RuntimeError):
    """A step failed or gave NaN; the message names the sweep, level and steps."""


class DivergedError(SolverFailure):
    """The residual grew, or the tolerance was not reached in ``max_it`` cycles."""


@dataclass
class SolveResult:
    """What a solve did.

    Attributes
    ----------
    converged : bool
    reason : str
        ``"rtol"``, ``"atol"``, ``"exact"`` (sequential), ``"max_it"`` or ``"diverged"``.
    residuals : list of float
        C-point residual norm before each correction (after relaxation), the last one included.
    cycles : int
        Coarse-grid corrections done.
    """

    converged: bool = False
    reason: str = ""
    residuals: list[float] = field(default_factory=list)
    cycles: int = 0

    @property
    def factor(self) -> float:
        """Geometric mean of the residual reduction a cycle; NaN without two positive residuals."""
        r = [x for x in self.residuals if x > 0]
        return (r[-1] / r[0]) ** (1 / (len(r) - 1)) if len(r) > 1 else math.nan


class MGRIT:
    """Multigrid reduction in time for ``U[n+1] = Phi_n(U[n]) + G[n]``, ``n = 0..N-1``.

    Parameters
    ----------
    propagators
        One a level, finest first (the number of levels). A coarse one steps as far as ``m`` steps of the finer.
    nsteps
        Steps on the finest level.
    options
        :class:`MGRITOptions` or a dictionary of them. ``levels`` must fit ``propagators`` if given.
    comm
        Time communicator; default: this process alone.
    bounds
        ``comm.size + 1`` step bounds of the ranks; default: nearly equal.
    point_norms
        Squared norm of each state of a block (global over space); default: Euclidean.
    name
        Named in monitor lines and errors.

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
        bounds: Sequence[int] | None = None,
        point_norms: PointNorms = euclidean,
        name: str = "mgrit",
        printer: Callable[[str], None] = print,
    ):
        options = MGRITOptions.make(options)
        if options.levels not in (None, len(propagators)):
            raise ValueError(f"{len(propagators)} propagators for {options.levels} mgrit levels: give one a level")
        self.options = MGRITOptions.make(options, levels=len(propagators))
        factors = self.options.factors(nsteps)
        bounds = split_steps(nsteps, comm.size) if bounds is None else list(bounds)
        whole = all(hasattr(b, "__index__") for b in bounds)
        if not whole or len(bounds) != comm.size + 1 or sorted(bounds) != bounds or bounds[0] or bounds[-1] != nsteps:
            raise ValueError(f"bounds {bounds} do not split {nsteps} steps over {comm.size} ranks")
        self.levels = build_levels(propagators, factors, bounds, comm)
        self.comm, self.nsteps, self.point_norms, self.name, self.printer = comm, nsteps, point_norms, name, printer
        self._cycle: Cycle | None = None

    @property
    def local_rows(self) -> int:
        """Rows of the local arrays: own steps plus one."""
        return self.levels[0].k + 1

    def solve(self, U: np.ndarray, G: np.ndarray | None = None) -> SolveResult:
        """Solve in place.

        Parameters
        ----------
        U
            ``(local_rows, *state)``: first guess in, solution out. Row 0 is the initial value on the first rank and a
            ghost of the left neighbour's last row on the others.
        G
            Right-hand side of the own steps, ``(local_rows - 1, *state)``, or ``None`` for zero.

        Returns
        -------
        SolveResult

        Raises
        ------
        SolverFailure
            On every rank, if a step failed or a value is not finite on any.
        """
        fine = self.levels[0]
        self._check_arrays(U, G)
        for level in self.levels:
            level.failure = None
        fine.U, fine.G = U, G
        with np.errstate(over="ignore", invalid="ignore"):  # a solve that blows up says so itself, once
            result = self._solve_sequentially(fine) if len(self.levels) == 1 else self._iterate(U)
            self._check_finite(not fine.active or bool(np.isfinite(self._squares(U)).all()))
        return result

    def _check_arrays(self, U: np.ndarray, G: np.ndarray | None) -> None:
        """Raise on every rank when the arrays of any do not fit."""
        k, problem = self.levels[0].k, None
        if not U.ndim or len(U) != k + 1 or (G is not None and G.shape != (k, *U.shape[1:])):
            problem = f"U {U.shape} and G {None if G is None else G.shape} for {k} own steps"
        elif U.dtype != float:
            problem = f"U of type {U.dtype}: give {np.dtype(float)}"
        elif not U[:1].flags.c_contiguous:
            problem = "the states in U are not contiguous: only the time axis may be strided"
        reports = self.comm.allgather((problem, U.shape[1:]))
        problems = [p for p, _ in reports if p]
        if len({shape for _, shape in reports}) > 1:
            problems.append(f"states of different shapes on the ranks: {[shape for _, shape in reports]}")
        if problems:
            raise ValueError(f"{self.name}: {problems[0]}")

    def _iterate(self, U: np.ndarray) -> SolveResult:
        if self._cycle is None or self._cycle.levels[1].U.shape[1:] != U.shape[1:]:
            schemes = [self.options.scheme(i) for i in range(len(self.levels) - 1)]
            self._cycle = Cycle(self.levels, schemes, U.shape[1:])
        cycle, options, result = self._cycle, self.options, SolveResult()
        while True:
            r, V = cycle.relax_and_restrict(0, f_is_done=result.cycles > 0)
            norm, scale = self._norms(r, V)
            result.residuals.append(norm)
            self._monitor(result, scale)
            if norm <= options.atol or norm <= options.rtol * scale:
                result.converged, result.reason = True, "atol" if norm <= options.atol else "rtol"
                return result
            if norm > options.dtol * result.residuals[0]:
                result.reason = "diverged"
                return result
            if result.cycles == options.max_it:
                result.reason = "max_it"
                return result
            cycle.correct(0)
            result.cycles += 1

    def _solve_sequentially(self, fine) -> SolveResult:
        solve_sequentially(fine)
        return SolveResult(True, "exact", [0.0], 0)

    def _norms(self, r: np.ndarray, V: np.ndarray) -> tuple[float, float]:
        local = np.stack([self._squares(r), self._squares(V)], axis=1)
        sums = np.sqrt(gather_in_order(local, self.comm).sum(axis=0))
        if not np.isfinite(sums).all():
            self._check_finite(False)
        return float(sums[0]), float(sums[1])

    def _squares(self, block: np.ndarray) -> np.ndarray:
        """Squared norms of some states; NaN where the user's function fails (no hang), and once a step has failed.

        A failed step's NaN may be gone by now, as relaxation replaces points. Handing NaN to the norm rather than
        returning it tells the ranks that share the states in space as well.
        """
        if not len(block):
            return np.zeros(0)
        if any(level.failure for level in self.levels):
            block = np.full_like(block, np.nan)
        try:
            return np.asarray(self.point_norms(block), dtype=float).reshape(len(block))
        except Exception as error:
            self.levels[0].failure = self.levels[0].failure or f"point_norms: {type(error).__name__}: {error}"
            return np.full(len(block), np.nan)

    def _check_finite(self, finite: bool) -> None:
        """Raise on every rank if ``finite`` is false on any.

        ``finite`` comes from ``point_norms``, so it is the same on all ranks that share a state in space.
        """
        failure = None
        if not finite:
            failure = next((level.failure for level in self.levels if level.failure), None)
            bad = np.flatnonzero([not np.isfinite(row).all() for row in self.levels[0].U])
            if failure is None and len(bad):
                failure = f"level 0, steps {max(self.levels[0].lo + int(bad[0]) - 1, 0)}: value not finite"
        reports = self.comm.allgather((finite, failure))
        if not all(finite for finite, _ in reports):
            # values travel from left to right only: the first rank that has something to say has the cause
            cause = next((text for _, text in reports if text), "values too large: their norm is not finite")
            raise SolverFailure(f"{self.name}: {cause}")

    def _monitor(self, result: SolveResult, scale: float) -> None:
        if self.options.monitor and self.comm.rank == 0:
            r = result.residuals
            ratio = f"  factor {r[-1] / r[-2]:.3f}" if len(r) > 1 and r[-2] > 0 else ""
            relative = f" relative {r[-1] / scale:.3e}" if scale > 0 else ""
            self.printer(f"  {self.name} {result.cycles:3d} residual {r[-1]:.6e}{relative}{ratio}")

    def view(self) -> str:
        """Describe the hierarchy in a few lines."""
        lines = [f"MGRIT '{self.name}': {self.nsteps} steps on {self.comm.size} time ranks, rtol {self.options.rtol:g}"]
        for level in self.levels:
            kind = f"m = {level.m}, {self.options.scheme(level.index)}-relaxation" if level.m else "sequential"
            lines.append(f"  level {level.index}: {level.nsteps} steps, {kind}")
        return "\n".join(lines)

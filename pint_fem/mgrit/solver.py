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
        if len(bounds) != comm.size + 1 or bounds[0] != 0 or bounds[-1] != nsteps or sorted(bounds) != bounds:
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
            ``(local_rows, *state)``: first guess in, solution out. Row 0 is the initial value on the first rank and a ghost of the
            left neighbour's last row on the others.
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
        if U.shape[0] != fine.k + 1 or (G is not None and G.shape != (fine.k, *U.shape[1:])):
            raise ValueError(f"{self.name}: U {U.shape} and G {None if G is None else G.shape} for {fine.k} own steps")
        for level in self.levels:
            level.failure = None
        fine.U, fine.G = U, G
        if len(self.levels) == 1:
            return self._solve_sequentially(fine)
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
        self._check_finite(bool(np.isfinite(fine.U).all()), 0)
        return SolveResult(True, "exact", [0.0], 0)

    def _norms(self, r: np.ndarray, V: np.ndarray) -> tuple[float, float]:
        local = np.stack([self.point_norms(r), self.point_norms(V)], axis=1) if len(r) else np.zeros((0, 2))
        with np.errstate(invalid="ignore", over="ignore"):
            sums = np.sqrt(gather_in_order(local, self.comm).sum(axis=0))
        if not np.isfinite(sums).all():
            self._check_finite(False, None)
        return float(sums[0]), float(sums[1])

    def _check_finite(self, finite: bool, level) -> None:
        """Raise on every rank when any has a failure or (``finite`` false) a value that is not finite."""
        failure = next((lev.failure for lev in self.levels if lev.failure), None)
        if failure is None and not finite:
            U = self.levels[0].U.reshape(self.levels[0].k + 1, -1)
            bad = np.flatnonzero(~np.isfinite(U).all(axis=1))
            if len(bad):
                failure = f"level 0, step {max(self.levels[0].lo + int(bad[0]) - 1, 0)}: value not finite"
        failures = [f for f in self.comm.allgather((failure, finite)) if f[0] or not f[1]]
        if failures:
            texts = [f[0] for f in failures if f[0]] or ["value not finite"]
            causes = [t for t in texts if not t.endswith("not finite")] or texts
            raise SolverFailure(f"{self.name}: {causes[0]}")

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

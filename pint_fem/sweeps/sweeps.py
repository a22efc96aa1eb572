r"""The four sweeps over all time steps of an evolution: state, tangent, adjoint and second-order adjoint.

.. math::
    u_{n+1} &= \Phi_n(u_n, z), \\
    \delta u_{n+1} &= \Phi_{n,u}\, \delta u_n + \Phi_{n,z}\, \delta z, \\
    \lambda_n &= \Phi_{n,u}^T \lambda_{n+1} + g_n \quad\text{(backwards in time)},

the second-order adjoint being the adjoint with another right-hand side. The adjoint is solved on the reversed
communicator with reversed views of the arrays: point ``n`` is point ``N - n`` there, so that the time solver solves one
more forward evolution. Where ``Phi`` is affine, the state sweep is the homogeneous one with the forcing as right-hand
side.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np

from pint_fem.all_at_once.stopping import DivergedError, SolveResult
from pint_fem.collective import collectively, raise_collectively
from pint_fem.errors import FAILURES
from pint_fem.evolution.evolution import Evolution
from pint_fem.kernels.arrays import get
from pint_fem.kernels.garbage import clean
from pint_fem.mgrit.options import MGRITOptions
from pint_fem.paradiag.options import ParaDiagOptions
from pint_fem.propagators.base import FEPropagator, StepData
from pint_fem.spacetime import SpaceTime
from pint_fem.sweeps.batches import member_squares, of_each, stacked_levels
from pint_fem.sweeps.c_points import Intervals
from pint_fem.sweeps.given_trajectories import GivenTrajectories
from pint_fem.sweeps.steps import set_precision
from pint_fem.sweeps.time_solver import TimeSolver
from pint_fem.sweeps.time_solvers import TimeSolvers

__all__ = ["Controls", "Source", "Sweeps"]

Controls = np.ndarray | None
"""Controls of the own steps, or a direction of them: ``(nz,)`` or ``(k, nz)``; ``None`` without controls."""
SHARE = 0.1
"""Error by inexact solves of linear systems relative to the tolerance of a sweep."""
Source = tuple[np.ndarray | None, Callable[[], Iterable[np.ndarray]] | None]
"""The right-hand side of the own steps, and what computes those of coarse levels; ``None`` where they are zero."""


class Sweeps(GivenTrajectories):
    """Time-parallel sweeps of one evolution on one process grid.

    In all methods ``z`` are the controls of the own steps, ``(nz,)`` or ``(k, nz)``, or ``None`` without controls.
    Trajectories are arrays of :meth:`new_slab`'s shape and are solved for in place, from the first guess in them;
    keyword arguments ``rtol`` or ``cycles`` are the tolerance or the number of cycles of this solve alone. A guess is
    ``cold`` if it is no solution of a nearby problem. All methods are collective, and solves raise ``SolverFailure`` or
    ``DivergedError`` on every rank, where a step fails or the iteration does not converge.

    Tangents and adjoints may be *batches*, arrays ``(points, members, n)`` with a list of directions: one solve for all
    members, each of which has to satisfy the stopping criterion by itself (:mod:`~pint_fem.sweeps.batches`).

    Parameters
    ----------
    evolution, spacetime
        The problem and the process grid.
    **given
        Options and propagators: the keyword arguments of :class:`~pint_fem.sweeps.time_solvers.TimeSolvers`, which also
        raises.

    Attributes
    ----------
    solvers : TimeSolvers
        What solves the sweeps.
    given : dict
        The options and propagators as given.
    evolution : Evolution
        The private copy of the evolution that is solved.
    slab : Slab
        Own steps.
    initial : ndarray
        Initial condition ``(n,)``.
    counts : dict
        Number of solves by kind, and of cycles.
    results : deque of (str, SolveResult)
        Kinds and results of the last solves, for reports of a run.
    on_sweep : callable or None
        Called after each solve with its kind and result.
    """

    def __init__(self, evolution: Evolution, spacetime: SpaceTime, **given: Any):
        self.solvers, self.given = TimeSolvers(evolution, spacetime, **given), given
        self.evolution, self.spacetime, self.slab = self.solvers.evolution, spacetime, self.solvers.slab
        self.initial = get(self.evolution.initial)
        self.counts = {"state": 0, "adjoint": 0, "tangent": 0, "cycles": 0}
        self.results: deque[tuple[str, SolveResult]] = deque(maxlen=500)
        self.on_sweep: Callable[[str, SolveResult], None] | None = None
        self._cause: BaseException | None = None  # why a right-hand side could not be computed

    @property
    def options(self) -> MGRITOptions | ParaDiagOptions:
        """Options of the time solver of all sweeps."""
        return self.solvers.options

    @property
    def propagators(self) -> list[FEPropagator]:
        """The propagator of each level, the finest first."""
        return self.solvers.propagators

    @property
    def is_linear(self) -> bool:
        """Whether the steps of all levels are affine in the state, with the same operators in all steps."""
        return self.solvers.is_linear

    @property
    def is_affine(self) -> bool:
        """Whether the steps of all levels are affine in state and control at once."""
        return self.solvers.is_affine

    @property
    def intervals(self) -> Intervals | None:
        """Intervals between the stored C-points; ``None`` where all points are stored."""
        return self.solvers.intervals

    def update_data(self, changed: set) -> None:
        """Read the new values of ``changed`` functions and constants of the evolution's private copies, and invalidate
        what has been computed from the old ones.
        """
        self.solvers.update_data(changed)
        self.initial = get(self.evolution.initial)
        self.solvers.invalidate()

    # -- arrays and data of the own steps ------------------------------------------------------------------------------
    @property
    def stored(self) -> tuple[slice, int]:
        """Local points that are stored among all stored points of the time axis, and the number of the latter."""
        m = 1 if self.intervals is None else self.intervals.m
        return slice(self.slab.lo // m, self.slab.hi // m + 1), self.evolution.nsteps // m + 1

    def new_slab(self, *members: int) -> np.ndarray:
        """Zero states at the stored local points: ``(k + 1, n)``, or one row per C-point with ``storage="C"``; of a
        batch ``(k + 1, members, n)``.
        """
        own, _ = self.stored
        return np.zeros((own.stop - own.start, *members, self.evolution.state_size))

    def _rhs_shape(self, *members: int) -> tuple[int, ...]:
        """Shape of right-hand sides of the own steps, or of those condensed to the C-points."""
        own, _ = self.stored
        return own.stop - own.start - 1, *members, self.evolution.state_size

    def data(self, z: Controls, U: np.ndarray | None = None) -> StepData:
        """Data of the own fine steps; with ``U``, states of the local points, linearised there."""
        t = self.evolution.time(np.arange(self.slab.lo, self.slab.hi))
        if U is None:
            return StepData(t, z)
        self.solvers.linearisations.linearise(z, U)
        return StepData(t, z, U[:-1], linearisations=self.solvers.linearisations.fine, ends=U[1:])

    def _or_nan(self, compute: Callable[[], np.ndarray], shape: tuple[int, int]) -> np.ndarray:
        """A right-hand side; NaN where it fails on this rank, so that the solver raises on every rank."""
        try:
            return compute()
        except FAILURES as error:
            self._cause = error
            return np.full(shape, np.nan)

    # -- solves --------------------------------------------------------------------------------------------------------
    def solve(
        self, solver: TimeSolver, kind: str, U: np.ndarray, G: np.ndarray | None, *, cold: bool = False,
        start: str = "", coarse_rhs: Callable[[], Iterable[np.ndarray]] | None = None, **accuracy: float,
    ) -> SolveResult:  # fmt: skip
        """Solve in place and count; ``cold``: ``U`` is no solution of a nearby problem."""
        clean(self.evolution.V.mesh().comm)
        self.solvers.report_estimates()
        linear = self.is_linear or solver is not self.solvers.state
        if linear and not cold and "cycles" not in accuracy:
            far = self._is_far(solver, U, G, accuracy.get("rtol"))
            guess = U[1 if solver.levels[0].left is None else 0 :]
            if far.any():
                guess[:, far if U.ndim == 3 else slice(None)] = 0
            cold = bool(far.all())
        solver.name = kind  # one solver solves for both the state and the tangent of a linear evolution
        start = start or ("nested" if cold and self.options.start == "auto" else self.options.start)
        set_precision(solver, accuracy, accelerated=self.solvers.accelerated)
        given = None
        if coarse_rhs is not None and start in ("skip", "nested") and not self.solvers.accelerated:
            given = list(coarse_rhs())
        try:
            result = solver.solve(U, G, start=start, coarse_rhs=given, batch=U.ndim == 3, **accuracy)
        except FAILURES:  # on all ranks
            cause, self._cause = self._cause, None
            raise_collectively(self.spacetime.comm, cause, f"{kind} sweep: right-hand side")
            raise
        finally:  # the arrays belong to the caller
            solver.levels[0].U = solver.levels[0].G = None
        self.counts[kind] += 1
        self.counts["cycles"] += result.cycles
        self.results.append((kind, result))
        collectively(self.spacetime.comm, "on_sweep", self.on_sweep or (lambda *_: None), kind, result)
        if not result.converged:
            raise DivergedError(_divergence(kind, result, solver.options))
        return result

    @contextmanager
    def solves_within(self, rtol: float | None) -> Iterator[None]:
        r"""Within the context, iterative solvers of the steps' linear systems stop as early as sweeps to a relative
        tolerance of ``rtol`` permit; ``None``: as if there were no context.

        With residuals of the solves of at most :math:`\epsilon` in each of ``N`` steps, a trajectory of steps that do
        not amplify is accurate to about :math:`N\epsilon`, so that :math:`\epsilon` = :data:`SHARE` ``rtol / N``.
        Only for steps that are affine in state and control: linearisations, which outlive a sweep, are exact.
        """
        if rtol is None or not self.is_affine:
            yield
            return
        try:
            for propagator in self.propagators:
                propagator.solve_within(SHARE * min(rtol, 1.0) / self.evolution.nsteps)
            yield
        finally:
            for propagator in self.propagators:
                propagator.solve_within(None)

    def _is_far(self, solver: TimeSolver, U: np.ndarray, G: np.ndarray | None, rtol: float | None) -> np.ndarray:
        """Whether the round-off of a first guess is larger than the tolerance of the solution of a linear sweep,
        ``(1,)``, or ``(members,)`` for each member of a batch.

        Where data are fitted or a direction is zero, the right-hand side vanishes, and the guess has another magnitude
        than the solution.
        """
        rtol = solver.options.rtol if rtol is None else rtol
        first = U[:1] if solver.levels[0].left is None else U[:0]
        squares = [member_squares(U[1:]), member_squares(first) + (0.0 if G is None else member_squares(G))]
        guess, rhs = np.sqrt(self.spacetime.sum_over_grid(np.array(squares)))
        return (np.finfo(float).eps * guess > rtol * self.evolution.nsteps * rhs) & (rtol > 0)

    def _update(self, z: Controls, kind: str) -> None:
        """Assemble and factor the operators of all levels where they depend on the control and that is a new one; a
        ``SolverFailure`` is raised on every rank where that fails for a numerical reason.
        """
        if not self.is_affine:
            collectively(self.spacetime.comm, f"{kind} sweep: operators", self.solvers.update, z)

    def _coarse(
        self,
        compute: Callable[[FEPropagator, StepData], np.ndarray],
        z: Controls,
        dz: Controls = None,
        U: np.ndarray | None = None,
    ) -> Iterable[np.ndarray]:
        """Right-hand sides of the own steps of the coarse levels, for nested iteration of a linear evolution."""
        for propagator, k, data in self.solvers.coarse_steps(z, dz, U):
            yield self._or_nan(partial(compute, propagator, data), (k, propagator.evolution.state_size))

    def state(
        self, z: Controls, U: np.ndarray, *, initial: np.ndarray | None = None, cold: bool = False, **accuracy: float
    ) -> SolveResult:
        """Solve for the state ``U`` with an initial condition ``(n,)``; default: the evolution's."""
        G, coarse = self.state_source(z, U, initial)
        return self.solve(self.solvers.state, "state", U, G, cold=cold, coarse_rhs=coarse, **accuracy)

    def state_source(self, z: Controls, U: np.ndarray, initial: np.ndarray | None = None) -> Source:
        """Prepare the solve for a state: its initial condition is written to ``U``; the right-hand side is returned."""
        if self.slab.is_first:
            U[0] = self.initial if initial is None else initial
        if not self.is_linear:
            self.solvers.bind(self.solvers.state, z, None, backwards=False)
            return None, None
        self._update(z, "state")
        forcing = lambda: self.propagators[0].forcing(self.data(z))
        if self.intervals is not None:
            forcing = lambda: self.intervals.forcing(z)
        G = self._or_nan(forcing, self._rhs_shape())
        return G, lambda: self._coarse(lambda propagator, data: propagator.forcing(data), z)

    def tangent(
        self,
        z: Controls,
        U: np.ndarray,
        dz: Controls | list,
        dU: np.ndarray,
        *,
        initial: np.ndarray | None = None,
        cold: bool = True,
        **accuracy: float,
    ) -> SolveResult:
        """Solve for the derivative ``dU`` of the state ``U`` in the direction ``dz`` of the controls and ``initial`` of
        the initial condition; ``None`` for zero. Of a batch ``dU`` is ``(k + 1, members, n)``, ``dz`` a list and
        ``initial`` ``(members, n)``.
        """
        G, coarse = self.tangent_source(z, U, dz, dU, initial)
        return self.solve(self.solvers.tangent, "tangent", dU, G, cold=cold, coarse_rhs=coarse, **accuracy)

    def tangent_source(
        self, z: Controls, U: np.ndarray, dz: Controls | list, dU: np.ndarray, initial: np.ndarray | None = None
    ) -> Source:
        """Prepare the solve for a tangent: its start is written to ``dU``; the right-hand side is returned."""
        solver, coarse, G, shape = self.solvers.tangent, None, None, self._rhs_shape(*dU.shape[1:-1])
        if self.slab.is_first:
            dU[0] = 0 if initial is None else initial
        if self.is_linear:
            self._update(z, "tangent")
            if dz is not None:
                at = None if self.is_affine else U
                forcing = lambda dz: self.propagators[0].control_forcing(self.data(z, at), dz)
                if self.intervals is not None:
                    forcing = lambda dz: self.intervals.control_forcing(dz, z, at)
                G = self._or_nan(lambda: of_each(forcing, dz), shape)
                control_forcing = lambda propagator, data: propagator.control_forcing(data, data.dz)
                own = lambda dz: self._coarse(control_forcing, z, dz, at)
                coarse = lambda: stacked_levels([own(d) for d in dz]) if isinstance(dz, list) else own(dz)
        elif not self.solvers.accelerated:  # the steps contain the direction: no solves for a right-hand side
            self.solvers.bind(solver, z, U, backwards=False, dz=dz)
        else:
            self.solvers.bind(solver, z, U, backwards=False)
            if dz is not None:
                data = self.data(z, U)
                G = self._or_nan(lambda: of_each(partial(self._control_tangent, data), dz), shape)
        return G, coarse

    def tangent_of_source(
        self, z: Controls, U: np.ndarray, source: np.ndarray, dU: np.ndarray, **accuracy: float
    ) -> SolveResult:
        """Solve ``dU_{n+1} = Phi_u dU_n + source_{n+1}`` from ``dU_0 = source_0``, at the state ``U``, with a
        right-hand side ``(k + 1, n)`` at the local points.
        """
        initial = source[0] if self.slab.is_first else None
        self.tangent_source(z, U, None, dU, initial)
        rhs = np.ascontiguousarray(source[1:])
        return self.solve(self.solvers.tangent, "tangent", dU, rhs, cold=True, **accuracy)

    def _control_tangent(self, data: StepData, dz: Controls) -> np.ndarray:
        """``Phi_z dz`` of the own steps of a nonlinear evolution."""
        G = np.empty(self._rhs_shape())
        self.propagators[0].tangent(data, np.zeros_like(G), dz, G)
        return G

    def adjoint(
        self, z: Controls, U: np.ndarray, gradient: np.ndarray, L: np.ndarray, *, cold: bool = False, **accuracy: float
    ) -> SolveResult:
        """Solve for the adjoint ``L`` at the state ``U`` with the right-hand side ``gradient``, shaped as ``L``: rows
        ``0..k-1`` and on the last rank also ``k``; with ``storage="C"`` condensed to the C-points. Both are
        ``(k + 1, members, n)`` for a batch.
        """
        if self.slab.is_last:
            L[-1] = gradient[-1]
        self.bind_adjoint(z, U)
        return self.solve(self.solvers.adjoint, "adjoint", L[::-1], gradient[:-1][::-1], cold=cold, **accuracy)

    def bind_adjoint(self, z: Controls, U: np.ndarray) -> None:
        """Prepare the steps of the adjoint sweep for a control and a state."""
        if self.is_linear:
            self._update(z, "adjoint")
        else:
            self.solvers.bind(self.solvers.adjoint, z, U, backwards=True)

    def adjoint_by_transposed_cycles(
        self, z: Controls, U: np.ndarray, gradient: np.ndarray, *, cycles: int
    ) -> tuple[np.ndarray, SolveResult]:
        """Adjoints, shaped as ``gradient``, by the transposes of ``cycles`` cycles from zero, in an array that the next
        call overwrites, and the result of the solve; requires :attr:`TimeSolvers.transposed_adjoint`.
        """
        self.bind_adjoint(z, U)
        sweep = self.solvers.transposed_adjoint
        result = self.solve(sweep.solver, "adjoint", *sweep.arrays(gradient), start=sweep.start, cycles=cycles)
        return sweep.collect(), result


def _divergence(kind: str, result: SolveResult, options: Any) -> str:
    """The message of a sweep that has not converged."""
    advice, name = "modes that grow? a larger alpha against round-off, on_divergence='serial'", "ParaDiag"
    if not isinstance(options, ParaDiagOptions):
        advice, name = "a bound above one? see coarse_tableau, relax='FCF', smaller coarsening, ", "MGRIT"
        advice += "on_divergence='serial'"
    residuals = result.residuals or [np.nan]
    history = f"residual {residuals[-1]:.3e}, first {residuals[0]:.3e}"
    return (
        f"{kind} sweep: {name} {result.reason}: {result.message} ({history}, rtol {options.rtol:g}); "
        f"{advice}, or levels=1 (sequential)"
    )

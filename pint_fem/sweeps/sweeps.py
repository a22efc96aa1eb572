r"""The four sweeps over all steps, each solved by MGRIT: state, adjoint, tangent and second-order adjoint.

.. math::
    u_{n+1} &= \Phi_n(u_n, z), \\
    \lambda_n &= \Phi_{n,u}^T \lambda_{n+1} + g_n \quad\text{(backwards in time)}, \\
    \delta u_{n+1} &= \Phi_{n,u}\, \delta u_n + g_n,

the second-order adjoint being the adjoint with another right-hand side. The adjoint runs on the reversed communicator
with reversed views of the slab's arrays: point ``n`` is point ``N - n`` there, and to MGRIT it is one more forward
evolution. Where ``Phi`` is affine, the state sweep is the homogeneous one with the forcing as right-hand side, and
all levels use the fast block propagators.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import cached_property, partial

import numpy as np

from pint_fem.all_at_once.levels import inject
from pint_fem.all_at_once.stopping import DivergedError, SolveResult
from pint_fem.collective import collectively, raise_collectively
from pint_fem.errors import FAILURES
from pint_fem.evolution.evolution import Evolution
from pint_fem.kernels.arrays import get
from pint_fem.kernels.garbage import clean
from pint_fem.mgrit.solver import MGRIT
from pint_fem.mgrit.transposed_cycles import TransposedAdjoint
from pint_fem.paradiag.options import ParaDiagOptions
from pint_fem.paradiag.solver import ParaDiag
from pint_fem.paradiag.transposed_iterations import TransposedParaDiag
from pint_fem.propagators.base import StepData
from pint_fem.spacetime import SpaceTime
from pint_fem.sweeps.solvers import TimeSolvers

__all__ = ["Sweeps"]


def _nothing(*_) -> None:
    """What is called after a solve where there is nothing to call."""


class Sweeps(TimeSolvers):
    """Time-parallel sweeps of one evolution on one process grid.

    Parameters
    ----------
    evolution, spacetime
        The problem and the grid.
    **given
        See :class:`~pint_fem.sweeps.solvers.TimeSolvers`, which also raises.
    """

    def __init__(self, evolution: Evolution, spacetime: SpaceTime, **given):
        super().__init__(evolution, spacetime, **given)
        self._cause: BaseException | None = None  # why a right-hand side could not be computed
        self.initial = get(evolution.initial)
        self.counts = {"state": 0, "adjoint": 0, "tangent": 0, "cycles": 0}
        #: The last solves, for reports.
        self.results: deque[tuple[str, SolveResult]] = deque(maxlen=500)
        #: Called after each solve with its kind and result (progress).
        self.on_sweep: Callable[[str, SolveResult], None] | None = None

    def update_data(self, changed):
        """See :class:`~pint_fem.sweeps.solvers.TimeSolvers`; also forgets what nonlinear steps start from."""
        super().update_data(changed)
        self.initial = get(self.evolution.initial)
        self.forget()

    @property
    def times(self) -> np.ndarray:
        """Start times of the own steps."""
        return self.evolution.time(np.arange(self.slab.lo, self.slab.hi))

    @property
    def stored(self) -> tuple[slice, int]:
        """Numbers of the local points that are stored among all that are, and how many these are."""
        m = 1 if self.intervals is None else self.intervals.m
        return slice(self.slab.lo // m, self.slab.hi // m + 1), self.evolution.nsteps // m + 1

    def new_slab(self) -> np.ndarray:
        """Zero states for the local points, ``(k + 1, n)``; for the C-points with ``storage="C"``."""
        own, _ = self.stored
        return np.zeros((own.stop - own.start, self.evolution.state_size))

    def data(self, z, U: np.ndarray | None = None) -> StepData:
        """Data of the own fine steps; ``U`` are states of the local points (then collective)."""
        if U is None:
            return StepData(self.times, z)
        self._memories.linearise(z, U)
        return StepData(self.times, z, U[:-1], kept=self._memories.fine)

    def _bind(self, solver: MGRIT, z, U: np.ndarray | None, *, backwards: bool, dz=None) -> None:
        """Give each level of a nonlinear solver its steps' times, controls and linearisation states."""
        if isinstance(solver, ParaDiag):
            solver.before_iteration = self._averaged.renewer(z, U)
        states, sweep = [None] * len(solver.levels), object()
        memories = self._memories.backward if backwards else self._memories.forward
        if U is not None:
            self._memories.linearise(z, U)
            along = U[::-1] if backwards else U
            if self.intervals is None:
                states = inject(solver.levels, along)
            else:  # what is stored is level 1
                self.intervals.bind(z, U)
                states = [None, *inject(solver.levels[1:], along)]
        for level, u in zip(solver.levels, states, strict=True):
            # fine step that lends its control to the level's step: the last one forwards, the first one in time
            # backwards
            steps = np.arange(level.lo, level.hi)
            if backwards:
                start = self.evolution.nsteps - (steps + 1) * level.stride
                lender = start - self.slab.lo
                u = None if u is None else u[1:]
            else:
                start = steps * level.stride
                lender = start + level.stride - 1 - self.slab.lo
                u = None if u is None else u[:-1]
            own, along = (
                self.space.controls(level.index, x if x is None or x.ndim == 1 else x[lender]) for x in (z, dz)
            )
            u = self.space.states(level.index, u)
            guess = level.propagator.propagator.uses_guess
            kept = memories[level.index]
            level.propagator.data = StepData(self.evolution.time(start), own, u, along, kept, guess, sweep)

    def _run(
        self, solver: MGRIT, kind: str, U: np.ndarray, G, *, cold: bool = False, start: str = "", coarse_rhs=None,
        **accuracy,
    ):  # fmt: skip
        clean(self.evolution.V.mesh().comm)
        if not self._judged:
            collectively(self.spacetime.comm, "theory", self._judge)
        linear = self.is_linear or solver is not self._state
        if linear and not cold and "cycles" not in accuracy and self._is_lost(solver, U, G, accuracy.get("rtol")):
            U[1 if solver.levels[0].left is None else 0 :] = 0
            cold = True
        solver.name = kind  # one solver serves both the state and the tangent of a linear evolution
        start = start or ("nested" if cold and self.options.start == "auto" else self.options.start)
        given = None
        if coarse_rhs is not None and start in ("skip", "nested") and isinstance(solver, MGRIT):
            given = coarse_rhs()
        try:
            result = solver.solve(U, G, start=start, coarse_rhs=given, **accuracy)
        except FAILURES:  # on all ranks
            cause, self._cause = self._cause, None
            raise_collectively(self.spacetime.comm, cause, f"{kind} sweep: right-hand side")
            raise
        finally:  # the slabs are the caller's: nobody else holds on to them
            solver.levels[0].U = solver.levels[0].G = None
        self.counts[kind] += 1
        self.counts["cycles"] += result.cycles
        self.results.append((kind, result))
        collectively(self.spacetime.comm, "on_sweep", self.on_sweep or _nothing, kind, result)
        if not result.converged:
            advice, name = "modes that grow? a larger alpha against round-off, on_divergence='serial'", "ParaDiag"
            if not isinstance(solver.options, ParaDiagOptions):
                advice, name = "a bound above one? see coarse_tableau, relax='FCF', smaller coarsening, ", "MGRIT"
                advice += "on_divergence='serial'"
            first, last = (result.residuals or [np.nan])[0], (result.residuals or [np.nan])[-1]
            history = f"residual {last:.3e}, first {first:.3e}"
            raise DivergedError(
                f"{kind} sweep: {name} {result.reason}: {result.message} ({history}, rtol {solver.options.rtol:g}); "
                f"{advice}, or levels=1 (sequential)"
            )
        return result

    def _is_lost(self, solver: MGRIT, U: np.ndarray, G: np.ndarray | None, rtol: float | None) -> bool:
        """Whether the round-off of a first guess is more than the solution of a linear sweep may be off by: where data
        are fitted or a direction is zero, the right-hand side vanishes and the guess is one of other magnitude
        (collective, the same on all ranks).
        """
        rtol = solver.options.rtol if rtol is None else rtol
        if rtol == 0:
            return False
        first = U[:1] if solver.levels[0].left is None else U[:0]
        squares = [np.vdot(U[1:], U[1:]), np.vdot(first, first) + (0.0 if G is None else float((G**2).sum()))]
        guess, rhs = np.sqrt(self.spacetime.sum_over_grid(np.array(squares)))
        return bool(np.finfo(float).eps * guess > rtol * self.evolution.nsteps * rhs)

    def _coarse_forcing(self, method: str, z) -> list[np.ndarray]:
        """Forcing of the own steps of the coarse levels, for nested iteration of a linear evolution."""
        out = []
        for level, propagator in zip(self._tangent.levels[1:], self.propagators[1:], strict=True):
            start = np.arange(level.lo, level.hi) * level.stride
            own = z if z is None or z.ndim == 1 else z[start + level.stride - 1 - self.slab.lo]
            own = self.space.controls(level.index, own)
            data = StepData(self.evolution.time(start), own)
            args = (data, level.lo) if method == "forcing" else (data, own, level.lo)
            out.append(
                self._safe(partial(getattr(propagator, method), *args), (level.k, propagator.evolution.state_size))
            )
        return out

    def _safe(self, make: Callable[[], np.ndarray], shape: tuple[int, int]) -> np.ndarray:
        """A right-hand side; NaN where it fails on this rank, which the solver carries to every rank (no hang)."""
        try:
            return make()
        except FAILURES as error:
            self._cause = error
            return np.full(shape, np.nan)

    def state(self, z, U: np.ndarray, *, initial=None, cold: bool = False, **accuracy) -> SolveResult:
        """Solve for the state in place, from the first guess ``U`` ``(k + 1, n)``; ``z`` is ``(nz,)``, ``(k, nz)`` or
        ``None``, ``initial`` the initial condition ``(n,)`` (default: the evolution's). ``cold``: the guess is no
        solution of a nearby problem. ``accuracy``: ``rtol`` or ``cycles`` of this solve.
        """
        if self.slab.is_first:
            U[0] = self.initial if initial is None else initial
        if self.is_linear:
            make = lambda: self.propagators[0].forcing(self.data(z), self.slab.lo)
            if self.intervals is not None:
                make = lambda: self.intervals.forcing(z)
            G = self._safe(make, self._shape)
            rhs = lambda: self._coarse_forcing("forcing", z)
            return self._run(self._state, "state", U, G, cold=cold, coarse_rhs=rhs, **accuracy)
        self._bind(self._state, z, None, backwards=False)
        return self._run(self._state, "state", U, None, cold=cold, **accuracy)

    def tangent(
        self, z, U: np.ndarray, dz, dU: np.ndarray, *, initial=None, cold: bool = True, **accuracy
    ) -> SolveResult:
        """Solve for the derivative of the state in the direction ``dz`` of the controls and ``initial`` of the initial
        condition (``None``: zero), in place.
        """
        fine, rhs, G = self.propagators[0], None, None
        if self.slab.is_first:
            dU[0] = 0 if initial is None else initial
        if self.is_linear:
            if dz is not None:
                make = lambda: fine.control_forcing(self.data(z), dz, self.slab.lo)
                if self.intervals is not None:
                    make = lambda: self.intervals.control_forcing(dz)
                G = self._safe(make, self._shape)
                rhs = lambda: self._coarse_forcing("control_forcing", dz)
        elif isinstance(self._tangent, MGRIT):  # the steps are affine: no solves for a right-hand side
            self._bind(self._tangent, z, U, backwards=False, dz=dz)
        else:
            self._bind(self._tangent, z, U, backwards=False)
            if dz is not None:
                data = self.data(z, U)
                G = self._safe(lambda: self._control_tangent(data, dz), self._shape)
        return self._run(self._tangent, "tangent", dU, G, cold=cold, coarse_rhs=rhs, **accuracy)

    def state_residual(self, z, U: np.ndarray, *, initial=None) -> tuple[float, float]:
        """Norms over the stored points of ``Phi(U) - U`` for the state's steps, and of ``U`` (collective).

        One pass over the steps; ``U`` with current ghost rows is left as it is.
        """
        r = collectively(self.spacetime.comm, "residual of a state", self._steps_beyond, z, U)
        first = self.slab.is_first
        if first:
            r = np.concatenate([U[:1] - (self.initial if initial is None else initial), r])
        squares = [self.spacetime.point_norms(block).sum() for block in (r, U if first else U[1:])]
        return tuple(np.sqrt(self.spacetime.sum_over_time(np.array(squares))).tolist())

    def _steps_beyond(self, z, U: np.ndarray) -> np.ndarray:
        """``Phi(U) - U`` at the own stored points but the first."""
        fine, out = self.propagators[0], U[1:].copy()
        if self.intervals is None:
            fine.step(self.data(z)._replace(guess=fine.uses_guess), U[:-1], out, self.slab.lo)
            return out - U[1:]
        self.intervals.bind(z, U)
        for window in self.intervals.windows:
            last = self.intervals.states(window)[-1]
            data = self.intervals.data(window, window.m - 1, linearised=False)
            fine.step(data, last, out[window.starts], window.first)
        return out - U[1:]

    @property
    def _shape(self) -> tuple[int, int]:
        """Of right-hand sides of the own steps, or condensed to the stored C-points."""
        own, _ = self.stored
        return own.stop - own.start - 1, self.evolution.state_size

    def _control_tangent(self, data: StepData, dz) -> np.ndarray:
        """``Phi_z dz`` of the own steps of a nonlinear evolution."""
        G = np.empty(self._shape)
        self.propagators[0].tangent(data, np.zeros_like(G), dz, G, self.slab.lo)
        return G

    def adjoint(
        self, z, U: np.ndarray, gradient: np.ndarray, L: np.ndarray, *, cold: bool = False, **accuracy
    ) -> SolveResult:
        """Solve for adjoints ``L`` ``(k + 1, n)`` in place; ``gradient`` rows ``0..k-1`` (``k`` on the last rank) are
        the right-hand side. With ``storage="C"`` both are for the C-points, the right-hand side condensed.
        """
        if self.slab.is_last:
            L[-1] = gradient[-1]
        if not self.is_linear:
            self._bind(self._adjoint, z, U, backwards=True)
        return self._run(self._adjoint, "adjoint", L[::-1], gradient[:-1][::-1], cold=cold, **accuracy)

    @cached_property
    def transposed_adjoint(self) -> TransposedAdjoint | TransposedParaDiag | None:
        """Adjoint sweeps that are exactly the transposes of tangent ones of as many cycles from zero; ``None`` where
        there are none.
        """
        if isinstance(self._adjoint, ParaDiag) and self.is_linear:
            return TransposedParaDiag(self._adjoint, self.slab.k)
        if not TransposedAdjoint.exists(self._adjoint, linear=self.is_linear, per_step=self.evolution.per_step):
            return None
        return TransposedAdjoint(self._adjoint, self.slab.k, is_last=self.slab.is_last, **self._backward)

    @property
    def has_model(self) -> bool:
        """Whether :attr:`transposed_adjoint` has been made."""
        return vars(self).get("transposed_adjoint") is not None

    def forget(self, *, factors: bool = False) -> None:
        """Forget what solves of nonlinear steps have left and what a linearisation has made; with ``factors`` those of
        steps and of averaged operators, too.
        """
        self._memories.forget(factors=factors)
        if factors and self._averaged is not None:
            self._averaged.forget()

    def adjoint_by_transposed_cycles(self, z, U: np.ndarray, gradient: np.ndarray, *, cycles: int):
        """Adjoints ``(k + 1, n)`` by ``cycles`` transposed cycles from zero, in an array that the next call uses
        again, and how they were solved; for :attr:`transposed_adjoint`.
        """
        if not self.is_linear:
            self._bind(self._adjoint, z, U, backwards=True)
        sweep = self.transposed_adjoint
        result = self._run(sweep.solver, "adjoint", *sweep.arrays(gradient), start=sweep.start, cycles=cycles)
        return sweep.collect(), result

    def control_gradient(self, z, U: np.ndarray, L: np.ndarray) -> np.ndarray | None:
        """``Phi_z^T lam_{n+1}`` of the own steps: their sum ``(nz,)``, or ``(k, nz)`` a step; ``None`` without
        parameters.
        """
        if not self.evolution.parameters:
            return None
        data = self.data(z, U)
        work = partial(self.propagators[0].control_adjoint, data, L[1:], self.slab.lo)
        return collectively(self.spacetime.comm, "derivative by the controls", work)

    def _give_to_right(self, rows: np.ndarray) -> None:
        """Add the last row of each slab to the first row of the next one, which is the same point."""
        comm, send = self.spacetime.time_comm, None
        if not self.slab.is_last:
            send = comm.Isend(rows[-1].copy(), dest=comm.rank + 1, tag=2)
        if not self.slab.is_first:
            from_left = np.empty_like(rows[0])
            comm.Recv(from_left, source=comm.rank - 1, tag=2)
            rows[0] += from_left
        if send is not None:
            send.Wait()

    def second_order(self, z, U, dz, dU, L, *, symmetric: bool = False) -> tuple[np.ndarray, np.ndarray] | None:
        """Second derivatives of the steps as right-hand side of an adjoint sweep, ``(k + 1, n)``, and the controls'
        part as in :meth:`control_gradient`; ``None`` where they vanish. ``symmetric``: as a symmetric form of
        ``(dU, dz)`` also where ``dU`` is no exact tangent, for one more adjoint a step.
        """
        if self.is_linear:
            return None
        end, su, data = None if symmetric else np.zeros(self._shape), self.new_slab(), self.data(z, U)
        try:
            su[:-1], sz = self.propagators[0].second_order(data, dU[:-1], dz, L[1:], end)
        except FAILURES as error:  # the sweep that takes it fails on every rank (no hang)
            self._cause, su[...] = error, np.nan
            sz = np.zeros((self.slab.k, self.evolution.control_size)[0 if self.evolution.per_step else 1 :])
        if end is not None:
            su[1:] += end
            self._give_to_right(su)
        return su, sz

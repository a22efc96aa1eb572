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
from collections.abc import Callable, Mapping
from functools import cached_property, partial

import numpy as np

from pint_fem.adjoint.acceleration import AcceleratedSweep
from pint_fem.adjoint.averaged import AveragedSystems
from pint_fem.adjoint.diagonalised import CoarsestParaDiag, ParaDiagSweeps, frequency_systems, judgement
from pint_fem.adjoint.intervals import Intervals
from pint_fem.adjoint.together import together
from pint_fem.adjoint.transposed import TransposedAdjoint
from pint_fem.mgrit import MGRIT, MGRITOptions, SolveResult
from pint_fem.mgrit.levels import inject
from pint_fem.mgrit.stopping import DivergedError, SolverFailure
from pint_fem.mgrit.theory import Verdict
from pint_fem.mgrit.trace import Trace
from pint_fem.paradiag import ParaDiag, ParaDiagOptions
from pint_fem.propagators import Evolution, StepData, make_propagator
from pint_fem.propagators.arrays import get
from pint_fem.propagators.base import FEPropagator
from pint_fem.propagators.blocks import WIDTH
from pint_fem.propagators.linear import LinearPropagator
from pint_fem.propagators.linearisation import Memories
from pint_fem.propagators.norms import MassNorm
from pint_fem.propagators.spatial import SpatialLevels
from pint_fem.propagators.spectrum import mgrit_verdict
from pint_fem.spacetime import SpaceTime

__all__ = ["Sweeps"]


class _Bound:
    """A propagator bound to the own steps of one level: what MGRIT calls."""

    block = WIDTH  # states in a block of the propagators
    transposed = False

    def __init__(self, propagator: FEPropagator):
        self.propagator = propagator
        self.lo = 0
        self.data: StepData | None = None
        self.linearised: Callable[[range], StepData] | None = None  # states at F-points that are not stored

    def part(self, steps: range) -> StepData:
        """Data of some steps, given by their numbers in the sweep's direction."""
        data = self.data.part(slice(steps.start - self.lo, steps.stop - self.lo, steps.step))
        if self.linearised is not None:
            known = self.linearised(steps)
            data = data._replace(u=known.u, kept=known.kept)
        return data

    def step(self, steps, u, out):
        """See :class:`pint_fem.mgrit.levels.Propagator`."""
        self.take(steps, u, out, steps.start // steps.step)


class _StateStep(_Bound):
    """``Phi`` with forcing."""

    def __init__(self, propagator: FEPropagator):
        super().__init__(propagator)
        self.uses_guess = propagator.uses_guess

    def take(self, steps, u, out, lane):
        """Take a block of steps whose first has a place among its like."""
        self.propagator.step(self.part(steps), u, out, lane)


class _TangentStep(_Bound):
    """``Phi_u`` at the linearisation states, with ``Phi_z dz`` where the data has a direction."""

    def take(self, steps, u, out, lane):
        """See :meth:`_StateStep.take`."""
        data = self.part(steps)
        self.propagator.tangent(data, u, data.dz, out, lane)


class _AdjointStep(_Bound):
    """``Phi_u^T``, numbered backwards in time."""

    transposed = True

    def take(self, steps, u, out, lane):
        """See :meth:`_StateStep.take`."""
        self.propagator.adjoint(self.part(steps), u, out, lane)


class _LinearStep(_Bound):
    """``Phi_u`` of a linear propagator, or its transpose: no data."""

    def __init__(self, propagator, *, transposed: bool):
        super().__init__(propagator)
        self.transposed = transposed
        self._apply = propagator.apply_transposed if transposed else propagator.apply

    def take(self, steps, u, out, lane):
        """See :meth:`_StateStep.take`."""
        self._apply(u, out, lane)

    def sweep(self, first, U, G):
        """See :class:`pint_fem.mgrit.levels.Propagator`."""
        self.propagator.sweep(U, G, transposed=self.transposed)


class Sweeps:
    """Time-parallel sweeps of one evolution on one process grid.

    Parameters
    ----------
    evolution, spacetime
        The problem and the grid.
    options
        MGRIT options; ``levels=1`` steps sequentially. ``check="auto"`` is ``"cycle"``; with ``start="auto"`` solves
        without an earlier solution (``cold``) begin with nested iteration.
    coarse_tableau
        Integrator of the coarse levels; default: the evolution's.
    propagator
        ``propagator(evolution, stride=, tableau=)``; default: the fastest exact one.
    spatial_coarsening, coarse_evolutions
        Coarser meshes on the coarse levels, see :class:`~pint_fem.propagators.spatial.SpatialLevels`.
    krylov
        PETSc options of a Krylov method that accelerates the linear sweeps, such as ``{"ksp_type": "fgmres"}``; see
        :mod:`pint_fem.mgrit.krylov`. Tolerances are then relative to the right-hand side.
    norm
        Of residuals and trajectories: ``"l2"`` of coefficients, or ``"L2"`` of functions (its dual for adjoints).
    printer
        For monitor lines.
    time_solver
        ``"paradiag"`` for :class:`~pint_fem.paradiag.ParaDiag` on the finest level alone; the others are MGRIT.
    paradiag
        Its options and PETSc's for its systems; also those of MGRIT's ``coarse_solver="paradiag"``.

    Raises
    ------
    InputError, ValueError
        If the grid has more time ranks than steps, or the options do not fit the steps.
    """

    def __init__(
        self,
        evolution: Evolution,
        spacetime: SpaceTime,
        *,
        options: MGRITOptions | Mapping | None = None,
        coarse_tableau=None,
        propagator: Callable[..., FEPropagator] = make_propagator,
        spatial_coarsening=None,
        coarse_evolutions=None,
        krylov: Mapping | None = None,
        norm: str = "l2",
        printer: Callable[[str], None] = print,
        time_solver: str = "mgrit",
        paradiag: tuple[ParaDiagOptions, Mapping] | None = None,
    ):
        self.evolution, self.spacetime, self.printer = evolution, spacetime, printer
        self._coarse_tableau, self._judged = coarse_tableau, False
        self._cause: Exception | None = None  # why a right-hand side could not be computed
        N = evolution.nsteps
        spacetime.slab(N)  # more ranks than steps: said before anything about levels
        options = MGRITOptions.make(options, **({"levels": 1} if time_solver == "paradiag" else {}))
        if options.check == "auto":
            options = MGRITOptions.make(options, check="cycle")
        factors = options.factors(N)
        _refuse_unsupported(options, factors, N)
        compact = options.storage == "C" and bool(factors)
        self.slab = slab = spacetime.slab(N, factors[0] if compact else 1)
        options = MGRITOptions.make(options, levels=len(factors) + 1)
        strides = [1]
        for m in factors:
            strides.append(strides[-1] * m)
        schemes = [options.scheme(level) for level in range(len(factors))]
        self.space = space = SpatialLevels(evolution, schemes, spatial_coarsening, coarse_evolutions)
        tableaux = [evolution.tableau] + [coarse_tableau or ev.tableau for ev in space.evolutions[1:]]
        self.propagators = [
            propagator(ev, stride=s, tableau=tab)
            for ev, s, tab in zip(space.evolutions, strides, tableaux, strict=True)
        ]
        self.is_linear = all(p.is_linear for p in self.propagators)
        if options.coarse_solver == "gathered" and factors and not self.is_linear:
            raise ValueError(
                "mgrit coarse_solver 'gathered': the first rank has the data of its own steps only; "
                "give 'sequential' for an evolution that is not linear"
            )
        kinds = (
            (lambda p: _LinearStep(p, transposed=False), lambda p: _LinearStep(p, transposed=True))
            if self.is_linear
            else (_TangentStep, _AdjointStep)
        )
        forward = dict(comm=spacetime.time_comm, bounds=slab.bounds, transfers=space.transfers)
        backward = dict(comm=spacetime.reversed_time_comm, bounds=[N - b for b in reversed(slab.bounds)])
        backward["transfers"] = space.transposed_transfers
        #: Shared by the sweeps; written by :meth:`write_trace`.
        self.trace = Trace(spacetime.time_comm) if options.trace else None
        if norm not in ("l2", "L2"):
            raise ValueError(f"norm {norm!r}: give 'l2' (of coefficients) or 'L2' (of functions)")
        if norm == "L2" and krylov is not None:
            raise ValueError("norm 'L2' with krylov: PETSc's norms are those of coefficients; leave one of them out")
        if norm == "L2":
            forward["point_norms"] = MassNorm(evolution.V, spacetime)
            backward["point_norms"] = MassNorm(evolution.V, spacetime, dual=True)
        else:
            forward["point_norms"] = backward["point_norms"] = spacetime.point_norms
        if krylov is not None and options.residual == "full":
            raise ValueError("mgrit residual 'full' with krylov: PETSc's residual is that of all points; leave it out")
        common = dict(options=options, printer=printer, trace=self.trace, speaks=spacetime.is_root)
        self._backward = backward | common | dict(linear=True)
        linear = MGRIT
        given = (ParaDiagOptions(), {}) if paradiag is None else paradiag
        if time_solver == "paradiag":
            if self.is_linear:
                systems = frequency_systems(self.propagators[0], *given)
            else:
                systems = self._averaged = AveragedSystems(evolution, spacetime, slab, *given)
            linear = ParaDiagSweeps(given[0], systems)
            common["trace"] = self.trace = Trace(spacetime.time_comm) if given[0].trace else None
        elif krylov is not None and factors:
            linear = partial(AcceleratedSweep, solver_parameters=krylov, petsc_comm=spacetime.comm)
        linear_sweep = common | dict(linear=True)
        self._tangent = linear([kinds[0](p) for p in self.propagators], N, name="tangent", **forward, **linear_sweep)
        self._adjoint = linear([kinds[1](p) for p in self.propagators], N, name="adjoint", **backward, **linear_sweep)
        self._state = self._tangent
        if not self.is_linear:
            nonlinear = linear if time_solver == "paradiag" else MGRIT
            self._state = nonlinear([_StateStep(p) for p in self.propagators], N, name="state", **forward, **common)
        for solver in {id(s): s for s in (self._state, self._tangent, self._adjoint)}.values():
            for level in solver.levels:
                level.propagator.lo = level.lo
        #: What is computed again where only C-points are stored, else ``None``.
        self.intervals = self._store_c_points(factors[0]) if compact else None
        if options.coarse_solver == "paradiag" and factors:
            systems = frequency_systems(self.propagators[-1], *given)
            for solver in (self._tangent, self._adjoint):
                step = solver.levels[-1].propagator
                step.all_at_once = CoarsestParaDiag(systems, given[0].alpha, transposed=step.transposed)
        own = [[level.k for level in solver.levels] for solver in (self._state, self._adjoint)]
        self._memories = Memories(self.propagators, *own, spacetime.comm, finest=not compact)
        self.initial = get(evolution.initial)
        self.counts = {"state": 0, "adjoint": 0, "tangent": 0, "cycles": 0}
        #: The last solves, for reports.
        self.results: deque[tuple[str, SolveResult]] = deque(maxlen=500)
        #: Called after each solve with its kind and result (progress).
        self.on_sweep: Callable[[str, SolveResult], None] | None = None

    def _store_c_points(self, m: int) -> Intervals:
        """Set the finest level up for storage of its C-points."""
        fine = self.propagators[0]
        fine.keeps_loads = False
        intervals = Intervals(fine, self.slab, m, is_linear=self.is_linear)
        if not self.is_linear:
            for solver in (self._state, self._tangent, self._adjoint):
                solver.levels[0].block = 1  # an interval after the other: a step is linearised where it is taken
            for solver in (self._tangent, self._adjoint):
                solver.levels[0].propagator.linearised = partial(
                    intervals.linearised, backwards=solver is self._adjoint
                )
        return intervals

    @property
    def accelerated(self) -> bool:
        """Whether linear sweeps are a Krylov method's."""
        return isinstance(self._adjoint, AcceleratedSweep)

    @property
    def levels(self):
        """The MGRIT levels of the adjoint sweep."""
        return self._adjoint.levels

    @property
    def solvers(self) -> list:
        """The MGRIT solvers; one for both the state and the tangent of a linear evolution."""
        found = {id(s): s for s in (self._state, self._tangent, self._adjoint)}.values()
        return [s.mgrit if isinstance(s, AcceleratedSweep) else s for s in found]

    @property
    def steps_kept(self) -> list[tuple[FEPropagator, int, int]]:
        """Of each level: propagator, own steps, and those that memories of linearisations are of."""
        fine = self.slab.k if self.intervals is None else self.intervals.m
        out = [(self.propagators[0], self.slab.k, fine)]
        levels = zip(self.propagators[1:], self._state.levels[1:], self._adjoint.levels[1:], strict=False)
        return out + [(p, forward.k, forward.k + backward.k) for p, forward, backward in levels]

    @property
    def options(self) -> MGRITOptions:
        """The MGRIT options of all sweeps."""
        return self._adjoint.options

    def view(self) -> str:
        """Describe the hierarchy in a few lines."""
        return self._state.view(8 * self.evolution.state_size)

    @cached_property
    def verdicts(self) -> list[Verdict] | None:
        """Theory's verdict on each pair of levels, computed when first asked for, by all ranks; empty for one level.

        ``None`` where there is no theory: evolutions that are not linear, propagators of the user's own, coarser meshes
        on coarse levels (see :func:`~pint_fem.propagators.spectrum.mgrit_verdict`).
        """
        if len(self.propagators) == 1:
            return []
        known = all(type(p) is LinearPropagator and p.evolution is self.evolution for p in self.propagators)
        return mgrit_verdict(self.evolution, self.options, self._coarse_tableau) if known else None

    def _judge(self) -> None:
        """Before the first solve: print the verdicts where asked to, and warnings always."""
        if self._judged:
            return
        self._judged = True
        if isinstance(self.options, ParaDiagOptions):
            text, warns = judgement(self.evolution, self.options)
            if self.spacetime.is_root and (warns or self.options.monitor or self.options.view):
                self.printer(text)
        for level, verdict in enumerate(self.verdicts or []):
            where = f"levels {level} and {level + 1}"
            if not self.spacetime.is_root:
                continue
            if self.options.monitor or self.options.view:
                self.printer(f"theory, {where}: {verdict}")
            elif not verdict.converges:
                self.printer(f"warning, {where}: {verdict.warning}")

    def write_trace(self) -> None:
        """Write the work and messages of all sweeps so far to the option ``trace``'s file (collective); nothing
        without it.
        """
        if self.trace is not None and self.spacetime.space_comm.rank == 0:
            self.trace.write(self.options.trace)

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
            solver.renew = self._averaged.renewer(z, U)
        states = [None] * len(solver.levels)
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
            level.propagator.data = StepData(self.evolution.time(start), own, u, along, kept, guess)

    def _run(self, solver: MGRIT, kind: str, U: np.ndarray, G, *, cold: bool, coarse_rhs=None, **accuracy):
        self._judge()
        solver.name = kind  # one solver serves both the state and the tangent of a linear evolution
        start = "nested" if cold and self.options.start == "auto" else self.options.start
        given = None
        if coarse_rhs is not None and start in ("skip", "nested") and isinstance(solver, MGRIT):
            given = coarse_rhs()
        try:
            result = solver.solve(U, G, start=start, coarse_rhs=given, **accuracy)
        except SolverFailure as failure:
            cause, self._cause = self._cause, None
            raise failure from cause
        finally:  # the slabs are the caller's: nobody else holds on to them
            solver.levels[0].U = solver.levels[0].G = None
        self.counts[kind] += 1
        self.counts["cycles"] += result.cycles
        self.results.append((kind, result))
        if self.on_sweep is not None:
            self.on_sweep(kind, result)
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
        except Exception as error:
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
    def transposed_adjoint(self) -> TransposedAdjoint | None:
        """Adjoint sweeps that are exactly the transposes of tangent ones of as many cycles from zero; ``None`` where
        there are none.
        """
        if not TransposedAdjoint.exists(self._adjoint, self.evolution, linear=self.is_linear):
            return None
        return TransposedAdjoint(self._adjoint, self.slab, **self._backward)

    @property
    def has_model(self) -> bool:
        """Whether :attr:`transposed_adjoint` has been made."""
        return vars(self).get("transposed_adjoint") is not None

    def forget(self) -> None:
        """Forget first guesses of nonlinear steps and what a linearisation has made, but for factors."""
        self._memories.forget()

    def adjoint_by_transposed_cycles(self, z, U: np.ndarray, gradient: np.ndarray, *, cycles: int):
        """Adjoints ``(k + 1, n)`` by ``cycles`` transposed cycles from zero, in an array that the next call uses
        again, and how they were solved; for :attr:`transposed_adjoint`.
        """
        if not self.is_linear:
            self._bind(self._adjoint, z, U, backwards=True)
        sweep = self.transposed_adjoint
        result = self._run(sweep.solver, "adjoint", *sweep.arrays(gradient), cold=False, cycles=cycles)
        return sweep.adjoints, result

    def control_gradient(self, z, U: np.ndarray, L: np.ndarray) -> np.ndarray | None:
        """``Phi_z^T lam_{n+1}`` of the own steps: their sum ``(nz,)``, or ``(k, nz)`` a step; ``None`` without
        parameters.
        """
        if not self.evolution.parameters:
            return None
        data = self.data(z, U)
        work = partial(self.propagators[0].control_adjoint, data, L[1:], self.slab.lo)
        return together(self.spacetime.comm, "derivative by the controls", work)

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
        except Exception as error:  # the sweep that takes it fails on every rank (no hang)
            self._cause, su[...] = error, np.nan
            sz = np.zeros((self.slab.k, self.evolution.control_size)[0 if self.evolution.per_step else 1 :])
        if end is not None:
            su[1:] += end
            self._give_to_right(su)
        return su, sz


def _refuse_unsupported(options: MGRITOptions, factors: tuple, nsteps: int) -> None:
    """Raise on options of the solver that sweeps of an evolution with equal steps have no use for."""
    uneven = [m for m in factors if not isinstance(m, int)]
    if uneven:
        raise ValueError(
            f"mgrit coarsening {uneven[0]}: an evolution has equal steps on each level; give factors such as (8, 4)"
        )
    if options.storage == "C" and factors and nsteps % factors[0]:
        m = factors[0]
        raise ValueError(
            f"mgrit storage 'C' with {nsteps} steps and coarsening {m}: state and adjoint have the same C-points only "
            f"where the steps are a multiple of it; give {nsteps - nsteps % m} or {nsteps - nsteps % m + m} steps, "
            "another coarsening or storage='all'"
        )

"""The time solvers of the state, tangent and adjoint sweeps of an evolution, on one hierarchy of propagators.

MGRIT's levels step with ``dt``, ``m_0 dt``, ``m_0 m_1 dt`` and so on; ParaDiag has the finest level alone. The solver
of adjoint sweeps runs on the time communicator in reverse order, where point ``n`` is point ``N - n``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial

import numpy as np
from irksome.tableaux.ButcherTableaux import ButcherTableau

from pint_fem.all_at_once.levels import inject
from pint_fem.all_at_once.trace import Trace, check_trace_file
from pint_fem.capacity import require_memory
from pint_fem.collective import collectively
from pint_fem.evolution.evolution import Evolution
from pint_fem.evolution.tableaux import Repeated
from pint_fem.kernels.lanes.structures import kernels_on_all_or_none
from pint_fem.mgrit.options import MGRITOptions
from pint_fem.mgrit.solver import MGRIT
from pint_fem.mgrit.transposed_cycles import TransposedAdjoint
from pint_fem.paradiag.options import ParaDiagOptions
from pint_fem.paradiag.solver import ParaDiag
from pint_fem.paradiag.transposed_iterations import TransposedParaDiag
from pint_fem.propagators import make_propagator
from pint_fem.propagators.base import FEPropagator, StepData
from pint_fem.propagators.linearisation import LinearisationCache
from pint_fem.propagators.spatial import SpatialLevels
from pint_fem.spacetime import SpaceTime
from pint_fem.sweeps.c_points import Intervals
from pint_fem.sweeps.frequencies.solver import CoarsestParaDiag, paradiag_solver
from pint_fem.sweeps.frequencies.systems import AveragedSystems, frequency_systems
from pint_fem.sweeps.krylov import AcceleratedSweep
from pint_fem.sweeps.mass_norm import MassNorm
from pint_fem.sweeps.memory import least_bytes
from pint_fem.sweeps.selection import require_supported
from pint_fem.sweeps.solver_reports import SolverReports
from pint_fem.sweeps.steps import AdjointStep, LinearStep, StateStep, TangentStep
from pint_fem.sweeps.time_solver import TimeSolver

__all__ = ["TimeSolvers"]


class TimeSolvers(SolverReports):
    """The time solvers of one evolution on one process grid, and what they share.

    Iterating over it yields the solvers, one for both the state and the tangent of a linear evolution.

    Parameters
    ----------
    evolution, spacetime
        The problem and the process grid.
    options
        MGRIT options; ``levels=1`` steps sequentially. ``check="auto"`` is ``"cycle"``.
    coarse_tableau
        Butcher tableau of the coarse levels; default: the evolution's.
    propagator
        ``propagator(evolution, stride=, tableau=)``; default: the fastest exact one.
    spatial_coarsening, coarse_evolutions
        Coarser meshes on the coarse levels, see :class:`~pint_fem.propagators.spatial.SpatialLevels`.
    krylov
        PETSc options of a Krylov method that accelerates the linear sweeps, such as ``{"ksp_type": "fgmres"}``
        (:mod:`pint_fem.mgrit.krylov`). Tolerances are then relative to the right-hand side.
    norm
        Norm of residuals and trajectories: ``"l2"`` of coefficients, or ``"L2"`` of functions (its dual for adjoints).
    time_solver
        ``"paradiag"`` for :class:`~pint_fem.paradiag.ParaDiag`; anything else is MGRIT.
    paradiag
        Options of ParaDiag and PETSc's options of its systems; also those of MGRIT's ``coarse_solver="paradiag"``.

    Attributes
    ----------
    evolution : Evolution
        A private copy of the evolution.
    slab : Slab
        Own steps.
    space : SpatialLevels
        Evolutions of the levels and transfers between their meshes.
    propagators : list of FEPropagator
        The step of each level.
    is_linear, is_affine, reported : bool
        Whether the steps of all levels are affine in the state with the same operators in all steps; affine in state
        and control at once; and whether the a-priori estimates have been logged.
    state, tangent, adjoint : TimeSolver
        The solvers; of a linear evolution ``state`` and ``tangent`` are the same.
    intervals, linearisations, averaged, trace
        Intervals between C-points, where only these are stored; cached linearisations of the steps; ParaDiag's systems
        with operators averaged in time; work and messages of all sweeps. ``None`` where they are not used.

    Raises
    ------
    InputError, ValueError
        If the grid has more time ranks than steps, or the options do not fit the steps.
    """

    def __init__(
        self, evolution: Evolution, spacetime: SpaceTime, *, options: MGRITOptions | Mapping | None = None,
        coarse_tableau: ButcherTableau | None = None, propagator: Callable[..., FEPropagator] = make_propagator,
        spatial_coarsening: bool | int | Sequence[int] | None = None,
        coarse_evolutions: Sequence[Evolution] | None = None,
        krylov: Mapping | None = None, norm: str = "l2", time_solver: str = "mgrit",
        paradiag: tuple[ParaDiagOptions, Mapping] | None = None,
    ):  # fmt: skip
        self.evolution = evolution = evolution.private()
        self.spacetime, self.norm = spacetime, norm
        self._coarse_tableau, self._propagator, self._krylov = coarse_tableau, propagator, krylov
        self._is_paradiag = time_solver == "paradiag"
        self._paradiag = (ParaDiagOptions(), {}) if paradiag is None else paradiag
        N = evolution.nsteps
        spacetime.slab(N)  # raises for more ranks than steps before anything about levels is checked
        options = MGRITOptions.make(options)
        if self._is_paradiag:
            options = MGRITOptions.make(options, levels=1, of_levels=())
        if options.check == "auto":
            options = MGRITOptions.make(options, check="cycle")
        self._factors = factors = options.factors(N)
        require_supported(options, factors, N)
        self._compact = options.storage == "C" and bool(factors)
        m = factors[0] if self._compact else 1
        self.slab = spacetime.slab(N, m)
        require_memory(
            spacetime.comm,
            least_bytes(evolution, self.slab, m),
            f"{N} time steps of {evolution.V.dim()} unknowns",
            "give fewer steps, more machines or mgrit storage='C'",
        )
        self._coarse_steps = options.coarse_steps
        self._mgrit = options = MGRITOptions.make(options, levels=len(factors) + 1, coarse_steps=1)
        schemes = [options.scheme(level) for level in range(len(factors))]
        coarsening = None if options.cycle == "none" else spatial_coarsening
        self.space = SpatialLevels(evolution, schemes, coarsening, coarse_evolutions)
        traced = self._paradiag[0].trace if self._is_paradiag else options.trace
        traced = traced if spacetime.prints else None  # one file, of the first group of experiments
        if traced:
            check_trace_file(traced, spacetime.comm)
        self.trace = Trace(spacetime.time_comm) if traced else None
        self._build()

    def _build(self) -> None:
        """Make the propagators and the solvers."""
        spacetime, options, factors, N = self.spacetime, self._mgrit, self._factors, self.evolution.nsteps
        self.averaged: AveragedSystems | None = None
        self.reported = False
        kernels_on_all_or_none(spacetime.comm)
        self.propagators = collectively(spacetime.comm, "propagator", self._make_propagators)
        self.is_linear = all(p.is_linear for p in self.propagators)
        self.is_affine = all(p.is_affine for p in self.propagators)
        if options.coarse_solver == "gathered" and factors and not self.is_linear:
            raise ValueError(
                "mgrit coarse_solver 'gathered': the first rank has the data of its own steps only; "
                "give 'sequential' for an evolution that is not linear"
            )
        if self._krylov is not None and options.residual == "full":
            raise ValueError("mgrit residual 'full' with krylov: PETSc's residual is that of all points; leave it out")
        common = dict(options=options, trace=self.trace, is_root=spacetime.is_root, everyone=spacetime.comm)
        forward = common | dict(
            comm=spacetime.time_comm, bounds=self.slab.bounds, transfers=self.space.transfers,
            point_norms=self._point_norms(dual=False),
        )  # fmt: skip
        self._backward = common | dict(
            comm=spacetime.reversed_time_comm, bounds=[N - b for b in reversed(self.slab.bounds)], linear=True,
            transfers=self.space.transposed_transfers, point_norms=self._point_norms(dual=True),
        )  # fmt: skip
        self._make_solvers(forward, self._backward)
        self.intervals = self._store_c_points(factors[0]) if self._compact else None
        if options.coarse_solver == "paradiag" and factors:
            systems = frequency_systems(self.propagators[-1], *self._paradiag)
            for solver in (self.tangent, self.adjoint):
                step = solver.levels[-1].propagator
                step.all_at_once = CoarsestParaDiag(systems, self._paradiag[0], transposed=step.transposed)
        own = [[level.k for level in solver.levels] for solver in (self.state, self.adjoint)]
        self.linearisations = LinearisationCache(self.propagators, *own, spacetime.comm, finest=not self._compact)

    def _make_propagators(self) -> list[FEPropagator]:
        """The propagator of each level."""
        evolutions, strides = self.space.evolutions, np.cumprod([1, *self._factors]).tolist()
        coarse = [self._coarse_tableau or ev.tableau for ev in evolutions[1:]]
        if self._coarse_steps > 1:
            coarse = [Repeated(tableau, self._coarse_steps) for tableau in coarse]
        tableaux = [self.evolution.tableau, *coarse]
        if self._mgrit.cycle == "none":  # coarse levels are not stepped
            fine = self._propagator(evolutions[0], stride=1, tableau=tableaux[0])
            return [fine] * len(tableaux)
        levels = zip(evolutions, strides, tableaux, strict=True)
        return [self._propagator(ev, stride=stride, tableau=tableau) for ev, stride, tableau in levels]

    def _point_norms(self, *, dual: bool) -> Callable[[np.ndarray], np.ndarray]:
        """Squared norms of states, or of dual vectors."""
        if self.norm not in ("l2", "L2"):
            raise ValueError(f"norm {self.norm!r}: give 'l2' (of coefficients) or 'L2' (of functions)")
        if self.norm == "l2":
            return self.spacetime.point_norms
        if self._krylov is not None:
            raise ValueError("norm 'L2' with krylov: PETSc's norms are those of coefficients; leave one of them out")
        return MassNorm(self.evolution.V, self.spacetime, dual=dual)

    def constructors(self) -> tuple[Callable[..., TimeSolver], Callable[..., TimeSolver]]:
        """Constructors of the solvers of linear sweeps, and of the state's sweep of a nonlinear evolution: where a new
        kind of time solver is added.
        """
        if self._is_paradiag:
            options, parameters = self._paradiag
            if self.is_linear:
                systems = frequency_systems(self.propagators[0], options, parameters)
            else:
                given = self.evolution, self.spacetime, self.slab, options, parameters
                systems = self.averaged = AveragedSystems(*given)
            return (partial(paradiag_solver, paradiag=options, systems=systems),) * 2
        if self._krylov is not None and self._factors:
            own = dict(petsc_comm=self.spacetime.comm, options_prefix=f"{self.evolution.options_prefix}mgrit_")
            return partial(AcceleratedSweep, solver_parameters=self._krylov, **own), MGRIT
        return MGRIT, MGRIT

    def _make_solvers(self, forward: dict, backward: dict) -> None:
        """The solvers of tangent and adjoint, and that of the state where the evolution is not linear."""
        N, (linear, nonlinear) = self.evolution.nsteps, self.constructors()
        tangent, adjoint = TangentStep, AdjointStep
        if self.is_linear:
            tangent, adjoint = (partial(LinearStep, transposed=transposed) for transposed in (False, True))
        self.tangent = linear([tangent(p) for p in self.propagators], N, name="tangent", linear=True, **forward)
        self.adjoint = linear([adjoint(p) for p in self.propagators], N, name="adjoint", **backward)
        self.state = self.tangent
        if not self.is_linear:
            self.state = nonlinear([StateStep(p) for p in self.propagators], N, name="state", **forward)
        for solver in self:
            for level in solver.levels:
                level.propagator.lo = level.lo

    def _store_c_points(self, m: int) -> Intervals:
        """Set the finest level up for storage of its C-points."""
        fine = self.propagators[0]
        fine.stores_loads = False
        intervals = Intervals(fine, self.slab, m, is_linear=self.is_linear)
        if not self.is_linear:
            for solver in (self.state, self.tangent, self.adjoint):
                solver.levels[0].block = 1  # one interval after the other: a step is linearised where it is taken
            for solver in (self.tangent, self.adjoint):
                step = solver.levels[0].propagator
                step.linearised = partial(intervals.linearised, backwards=solver is self.adjoint)
        return intervals

    # -- data ----------------------------------------------------------------------------------------------------------
    def update_data(self, changed: set) -> None:
        """Read the new values of ``changed`` functions and constants of the evolution's private copies (collective);
        propagators whose operators contain them are made again.
        """
        changed = self.space.update_data(changed)
        updated = [propagator.update_data(changed) for propagator in self.propagators]
        for evolution in dict.fromkeys(self.space.evolutions):
            evolution.update_data(operators=not all(updated))
        if not all(updated):
            for name in ("estimates", "transposed_adjoint"):
                vars(self).pop(name, None)
            self._build()
        if self.averaged is not None:
            self.averaged.invalidate()
        if self.intervals is not None:
            self.intervals.update_data()

    def invalidate(self, *, factors: bool = False) -> None:
        """Invalidate linearisations and first guesses of nonlinear steps; ``factors``: and all factors."""
        self.linearisations.reset(factors=factors)
        if factors and self.averaged is not None:
            self.averaged.invalidate()

    def release_batch(self) -> None:
        """Free what only batches use: cached results of steps, and the array of transposed cycles."""
        self.linearisations.discard_members()
        if self.has_transposed_adjoint:
            self.transposed_adjoint.release()

    def update(self, z: np.ndarray | None) -> None:
        """Assemble and factor the operators of all levels for a static control, where they depend on it and it is not
        that of the last call (collective over space).
        """
        for index, propagator in enumerate(self.propagators):
            propagator.update(self._controls(index, z, np.zeros(0)))

    def bind(
        self, solver: TimeSolver, z: np.ndarray | None, U: np.ndarray | None, *, backwards: bool,
        dz: np.ndarray | list[np.ndarray] | None = None,
    ) -> None:  # fmt: skip
        """Set the data of the steps of a solver for a nonlinear evolution: the controls ``z`` of the own steps, their
        direction ``dz`` (a list of directions for a batch) and the states ``U`` of the local points at which the steps
        are linearised, ``None`` for the state's sweep; adjoint sweeps are ``backwards``.
        """
        if isinstance(solver, ParaDiag):
            solver.before_iteration = self.averaged.updater(z, U)
        states, sweep, batch = [None] * len(solver.levels), object(), isinstance(dz, list)
        linearisations = self.linearisations.backward if backwards else self.linearisations.forward
        if U is not None:
            self.linearisations.linearise(z, U)
            along = U[::-1] if backwards else U
            if self.intervals is None:
                states = inject(solver.levels, along)
            else:  # the stored points are those of level 1
                self.intervals.bind(z, U)
                states = [None, *inject(solver.levels[1:], along)]
        for level, u in zip(solver.levels, states, strict=True):
            # a step has the control of the last fine step in it forwards, and of the first one in time backwards
            steps = np.arange(level.lo, level.hi)
            if backwards:
                start = self.evolution.nsteps - (steps + 1) * level.stride
                fine, u = start, None if u is None else u[1:]
            else:
                start = steps * level.stride
                fine, u = start + level.stride - 1, None if u is None else u[:-1]
            own, *along = (self._controls(level.index, x, fine) for x in (z, *(dz if batch else [dz])))
            level.propagator.directions = along if batch else None
            u, guess = self.space.states(level.index, u), level.propagator.propagator.uses_guess
            t, cached = self.evolution.time(start), linearisations[level.index]
            level.propagator.data = StepData(t, own, u, None if batch else along[0], cached, guess, sweep)

    def _controls(self, index: int, z: np.ndarray | None, fine: np.ndarray) -> np.ndarray | None:
        """Controls on level ``index``: those of some fine steps, or a static one."""
        return self.space.controls(index, z if z is None or z.ndim == 1 else z[fine - self.slab.lo])

    def coarse_steps(
        self, z: np.ndarray | None, dz: np.ndarray | None = None, U: np.ndarray | None = None
    ) -> Iterator[tuple[FEPropagator, int, StepData]]:
        """Of each coarse level of a linear evolution: propagator, number of own steps, their data with a direction of
        the controls and the states at which they are linearised, where these are given.
        """
        levels = self.tangent.levels
        states: list[np.ndarray | None] = [None] * len(levels)
        if U is not None:
            states = inject(levels, U) if self.intervals is None else [None, *inject(levels[1:], U)]
        for level, propagator, u in zip(levels[1:], self.propagators[1:], states[1:], strict=True):
            start = np.arange(level.lo, level.hi) * level.stride
            own, along = (self._controls(level.index, x, start + level.stride - 1) for x in (z, dz))
            u = None if u is None else self.space.states(level.index, u)
            ends = {} if u is None else {"u": u[:-1], "ends": u[1:]}
            yield propagator, level.k, StepData(self.evolution.time(start), own, dz=along, **ends)

    @cached_property
    def transposed_adjoint(self) -> TransposedAdjoint | TransposedParaDiag | None:
        """Adjoint sweeps that are the exact transposes of tangent sweeps with as many cycles from zero; ``None`` where
        there are none.
        """
        if isinstance(self.adjoint, ParaDiag) and self.is_linear:
            return TransposedParaDiag(self.adjoint, self.slab.k)
        if not TransposedAdjoint.exists(self.adjoint, linear=self.is_linear, per_step=self.evolution.per_step):
            return None
        return TransposedAdjoint(self.adjoint, self.slab.k, is_last=self.slab.is_last, **self._backward)

    @property
    def has_transposed_adjoint(self) -> bool:
        """Whether :attr:`transposed_adjoint` has been made."""
        return vars(self).get("transposed_adjoint") is not None

    # -- properties and reports ----------------------------------------------------------------------------------------
    def __iter__(self) -> Iterator[TimeSolver]:
        for solver in dict.fromkeys((self.state, self.tangent, self.adjoint)):
            yield solver.operator.solver if isinstance(solver, AcceleratedSweep) else solver

    @property
    def options(self) -> MGRITOptions | ParaDiagOptions:
        """Options of all sweeps."""
        return self.adjoint.options

    @property
    def is_sequential(self) -> bool:
        """Whether sweeps take one step after another, so that they do not depend on a first guess."""
        return (len(self.propagators) == 1 or self._mgrit.cycle == "none") and not self._is_paradiag

    @property
    def kind(self) -> str:
        """``"paradiag"``, ``"serial"`` or ``"mgrit"``."""
        return "paradiag" if self._is_paradiag else "serial" if self.is_sequential else "mgrit"

    @property
    def accelerated(self) -> bool:
        """Whether linear sweeps are accelerated by a Krylov method."""
        return isinstance(self.adjoint, AcceleratedSweep)

    @property
    def cached_steps(self) -> list[tuple[FEPropagator, int, int]]:
        """For each level the propagator and the numbers of own steps and of those with a cached linearisation."""
        fine = self.slab.k if self.intervals is None else self.intervals.m
        out = [(self.propagators[0], self.slab.k, fine)]
        levels = zip(self.propagators[1:], self.state.levels[1:], self.adjoint.levels[1:], strict=False)
        return out + [(p, forward.k, forward.k + backward.k) for p, forward, backward in levels]

    def view(self) -> str:
        """Describe the hierarchy in a few lines."""
        own = f"\n  coarse levels: {self._coarse_steps} steps of the integrator for each interval"
        own *= self._coarse_steps > 1 and bool(self._factors)
        sizes = ", ".join(str(ev.V.dim()) for ev in self.space.evolutions)
        meshes = f"\n  coarser meshes: states of {sizes} unknowns on the levels" * any(self.space.transfers)
        return self.state.view(8 * self.evolution.state_size) + own + meshes

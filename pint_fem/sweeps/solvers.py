"""The solvers of the sweeps: MGRIT or ParaDiag, forwards and on the reversed ranks, on one hierarchy of propagators."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial

import numpy as np

from pint_fem.all_at_once.trace import Trace, check_trace_file
from pint_fem.capacity import require_memory
from pint_fem.collective import collectively
from pint_fem.evolution.evolution import Evolution
from pint_fem.kernels.arrays import own_size
from pint_fem.kernels.garbage import Dropped
from pint_fem.mgrit.options import MGRITOptions
from pint_fem.mgrit.solver import MGRIT
from pint_fem.paradiag.options import ParaDiagOptions
from pint_fem.propagators import make_propagator
from pint_fem.propagators.base import FEPropagator
from pint_fem.propagators.linear import LinearPropagator
from pint_fem.propagators.linearisation import Memories
from pint_fem.propagators.spatial import SpatialLevels
from pint_fem.spacetime import SpaceTime
from pint_fem.sweeps.averaged_systems import AveragedSystems
from pint_fem.sweeps.c_points import Intervals
from pint_fem.sweeps.krylov import AcceleratedSweep
from pint_fem.sweeps.mass_norm import MassNorm
from pint_fem.sweeps.paradiag import CoarsestParaDiag, ParaDiagSweeps, frequency_systems, judgement
from pint_fem.sweeps.steps import AdjointStep, LinearStep, StateStep, TangentStep
from pint_fem.theory.estimates import mgrit_verdict
from pint_fem.theory.two_level import Verdict

__all__ = ["TimeSolvers"]

_dropped = Dropped()


class TimeSolvers:
    """The solvers of the sweeps of one evolution on one process grid, and what they share.

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
        #: In functions of its own.
        self.evolution = evolution = evolution.private()
        self.spacetime, self.printer, self.norm = spacetime, printer, norm
        self._coarse_tableau, self._judged = coarse_tableau, False
        self._averaged: AveragedSystems | None = None
        N = evolution.nsteps
        spacetime.slab(N)  # more ranks than steps: said before anything about levels
        options = MGRITOptions.make(options)
        if time_solver == "paradiag":
            options = MGRITOptions.make(options, levels=1, of_levels=())
        if options.check == "auto":
            options = MGRITOptions.make(options, check="cycle")
        factors = options.factors(N)
        _refuse_unsupported(options, factors, N)
        compact = options.storage == "C" and bool(factors)
        self.slab = spacetime.slab(N, factors[0] if compact else 1)
        require_memory(
            spacetime.comm,
            least_bytes(evolution, self.slab, factors[0] if compact else 1),
            f"{N} time steps of {evolution.V.dim()} unknowns",
            "give fewer steps, more machines or mgrit storage='C'",
        )
        options = MGRITOptions.make(options, levels=len(factors) + 1)
        schemes = [options.scheme(level) for level in range(len(factors))]
        self.space = SpatialLevels(evolution, schemes, spatial_coarsening, coarse_evolutions)
        given = (ParaDiagOptions(), {}) if paradiag is None else paradiag
        traced = given[0].trace if time_solver == "paradiag" else options.trace
        if traced:
            check_trace_file(traced, spacetime.comm)
        #: Shared by the sweeps; written by :meth:`write_trace`.
        self.trace = Trace(spacetime.time_comm) if traced else None
        self._again = partial(self._build, options, factors, propagator, krylov, norm, time_solver, given)
        self._again()

    def update_data(self, changed: set) -> None:
        """Take new values of data (collective).

        Parameters
        ----------
        changed
            Functions and constants of the evolution's private copies that have other values now. Propagators that have
            assembled them into operators are made anew, and all that was made of them.
        """
        changed = self.space.update_data(changed)
        updated = [propagator.update_data(changed) for propagator in self.propagators]
        for evolution in dict.fromkeys(self.space.evolutions):
            evolution.update_data(operators=not all(updated))
        if not all(updated):
            for name in ("verdicts", "transposed_adjoint"):
                vars(self).pop(name, None)
            self._judged = False
            self._again()
        if self._averaged is not None:
            self._averaged.forget()
        if self.intervals is not None:
            self.intervals.update_data()

    def _build(
        self, options: MGRITOptions, factors: tuple, propagator: Callable, krylov, norm: str, time_solver: str, given
    ) -> None:
        """Make the propagators and the solvers."""
        spacetime, N = self.spacetime, self.evolution.nsteps
        compact = options.storage == "C" and bool(factors)
        self._averaged: AveragedSystems | None = None
        self.propagators = collectively(spacetime.comm, "propagator", self._make_propagators, propagator, factors)
        self.is_linear = all(p.is_linear for p in self.propagators)
        if options.coarse_solver == "gathered" and factors and not self.is_linear:
            raise ValueError(
                "mgrit coarse_solver 'gathered': the first rank has the data of its own steps only; "
                "give 'sequential' for an evolution that is not linear"
            )
        if krylov is not None and options.residual == "full":
            raise ValueError("mgrit residual 'full' with krylov: PETSc's residual is that of all points; leave it out")
        forward, backward = self._norms(norm, krylov is not None)
        forward |= dict(comm=spacetime.time_comm, bounds=self.slab.bounds, transfers=self.space.transfers)
        backward |= dict(comm=spacetime.reversed_time_comm, bounds=[N - b for b in reversed(self.slab.bounds)])
        backward["transfers"] = self.space.transposed_transfers
        common = dict(options=options, printer=self.printer, trace=self.trace, is_root=spacetime.is_root)
        common["everyone"] = spacetime.comm
        self._backward = backward | common | dict(linear=True)
        linear = MGRIT
        if time_solver == "paradiag":
            linear = ParaDiagSweeps(given[0], self._all_at_once(given))
        elif krylov is not None and factors:
            linear = partial(AcceleratedSweep, solver_parameters=krylov, petsc_comm=spacetime.comm)
        self._make_solvers(linear, linear if time_solver == "paradiag" else MGRIT, forward | common)
        #: What is computed again where only C-points are stored, else ``None``.
        self.intervals = self._store_c_points(factors[0]) if compact else None
        if options.coarse_solver == "paradiag" and factors:
            systems = frequency_systems(self.propagators[-1], *given)
            for solver in (self._tangent, self._adjoint):
                step = solver.levels[-1].propagator
                step.all_at_once = CoarsestParaDiag(systems, given[0].alpha, transposed=step.transposed)
        own = [[level.k for level in solver.levels] for solver in (self._state, self._adjoint)]
        self._memories = Memories(self.propagators, *own, spacetime.comm, finest=not compact)

    def _make_propagators(self, make: Callable[..., FEPropagator], factors: Sequence[int]) -> list[FEPropagator]:
        """A step of each level."""
        evolutions, strides = self.space.evolutions, np.cumprod([1, *factors]).tolist()
        tableaux = [self.evolution.tableau] + [self._coarse_tableau or ev.tableau for ev in evolutions[1:]]
        levels = zip(evolutions, strides, tableaux, strict=True)
        return [make(ev, stride=stride, tableau=tableau) for ev, stride, tableau in levels]

    def _norms(self, norm: str, accelerated: bool) -> tuple[dict, dict]:
        """Of the points of forward and of backward sweeps."""
        if norm not in ("l2", "L2"):
            raise ValueError(f"norm {norm!r}: give 'l2' (of coefficients) or 'L2' (of functions)")
        if norm == "l2":
            return {"point_norms": self.spacetime.point_norms}, {"point_norms": self.spacetime.point_norms}
        if accelerated:
            raise ValueError("norm 'L2' with krylov: PETSc's norms are those of coefficients; leave one of them out")
        V = self.evolution.V
        return (
            {"point_norms": MassNorm(V, self.spacetime)},
            {"point_norms": MassNorm(V, self.spacetime, dual=True)},
        )

    def _all_at_once(self, given: tuple[ParaDiagOptions, Mapping]):
        """The systems of ParaDiag's frequencies; of averages where operators are not constant."""
        if self.is_linear:
            return frequency_systems(self.propagators[0], *given)
        self._averaged = AveragedSystems(self.evolution, self.spacetime, self.slab, *given)
        return self._averaged

    def _make_solvers(self, linear: Callable, nonlinear: Callable, forward: dict) -> None:
        """The tangent's and the adjoint's, and the state's where it is another."""
        N, steps = self.evolution.nsteps, (TangentStep, AdjointStep)
        if self.is_linear:
            steps = (partial(LinearStep, transposed=False), partial(LinearStep, transposed=True))
        ahead, back = ([step(p) for p in self.propagators] for step in steps)
        self._tangent = linear(ahead, N, name="tangent", linear=True, **forward)
        self._adjoint = linear(back, N, name="adjoint", **self._backward)
        self._state = self._tangent
        if not self.is_linear:
            self._state = nonlinear([StateStep(p) for p in self.propagators], N, name="state", **forward)
        for solver in self.solvers:
            for level in solver.levels:
                level.propagator.lo = level.lo

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
    def is_sequential(self) -> bool:
        """Whether sweeps take one step after another, and depend on no first guess."""
        return len(self.propagators) == 1 and not isinstance(self.options, ParaDiagOptions)

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
        on coarse levels (see :func:`~pint_fem.theory.estimates.mgrit_verdict`).
        """
        if len(self.propagators) == 1:
            return []
        known = all(type(p) is LinearPropagator and p.evolution is self.evolution for p in self.propagators)
        return mgrit_verdict(self.evolution, self.options, self._coarse_tableau) if known else None

    def _judge(self) -> None:
        """Before the first solve: print the verdicts where asked to, and warnings always."""
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

        Raises
        ------
        InputError
            On every rank, where it cannot be written.
        """
        if self.trace is None:
            return
        work = self.trace.write if self.spacetime.space_comm.rank == 0 else lambda path: None
        collectively(self.spacetime.comm, "", work, self.options.trace)


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


def least_bytes(evolution, slab, m: int = 1) -> int:
    """Bytes of a rank below which no optimisation can be, known before anything is allocated.

    State, adjoint, a sweep and its right-hand side at the stored points, and three vectors of the controls that have a
    value in each step.

    Parameters
    ----------
    evolution
        The problem.
    slab
        Own steps.
    m
        Distance of the points that are stored.
    """
    rows = slab.k // m + 1
    stepwise = sum(own_size(control.function_space()) for control in evolution.stepwise)
    return 8 * (4 * rows * evolution.state_size + 3 * slab.k * stepwise)

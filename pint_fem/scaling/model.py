"""The model: the solver's own code on virtual ranks.

A :class:`Model` is a problem (its calibration) with a solver's options on a process grid. Its tasks, a state solve, a
gradient and so on, are what :class:`~pint_fem.adjoint.problem.ReducedProblem` does for a linear evolution: solves by
:class:`~pint_fem.mgrit.solver.MGRIT` or :class:`~pint_fem.paradiag.ParaDiag` itself, with the misfit's and the
control's work and messages in between.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from mpi4py import MPI

from pint_fem.all_at_once.grids import Bounds, split_steps
from pint_fem.all_at_once.norms import gather_in_order
from pint_fem.errors import InputError
from pint_fem.mgrit.options import MGRITOptions
from pint_fem.mgrit.solver import MGRIT
from pint_fem.mgrit.transposed_cycles import TransposedAdjoint
from pint_fem.paradiag.options import ParaDiagOptions
from pint_fem.paradiag.transposed_iterations import TransposedParaDiag
from pint_fem.scaling.communicator import VirtualComm, communicators
from pint_fem.scaling.costs import Calibration
from pint_fem.scaling.network import Network
from pint_fem.scaling.paradiag import VirtualParaDiag, transforms, virtual_systems
from pint_fem.scaling.space import kernels
from pint_fem.scaling.virtual import VirtualNorms, VirtualTrace, hierarchy
from pint_fem.scaling.world import World

__all__ = ["Model", "Prediction", "Solve"]


@dataclass(frozen=True)
class Solve:
    """One solve: ``kind`` ``"state"``, ``"tangent"`` or ``"adjoint"``, ``start`` ``"guess"``, ``"skip"`` or
    ``"nested"``, and how many cycles. An adjoint's with start ``"transposed"`` are those of inexact Hessian actions
    (:mod:`~pint_fem.mgrit.transposed_cycles`, :mod:`~pint_fem.paradiag.transposed_iterations`).
    """

    kind: str
    start: str = "nested"
    cycles: int = 1


@dataclass
class Prediction:
    """What the model says.

    Attributes
    ----------
    seconds : float
        From the first rank's start to the last one's end.
    task_seconds : list of float
        Of each task.
    busy : list of float
        Seconds of work on each time rank.
    clocks : list of float
        When each has ended.
    counts : Counter
        See :class:`~pint_fem.scaling.world.World`.
    bytes_a_rank : float
        Largest memory of a rank's states.
    traces : list
        Events of each rank, where asked for.
    """

    seconds: float
    task_seconds: list[float]
    busy: list[float]
    clocks: list[float]
    counts: Counter
    bytes_a_rank: float = 0.0
    traces: list = field(default_factory=list)


class Model:
    """See the module.

    Parameters
    ----------
    calibration
        Costs.
    options
        Of MGRIT, a dictionary; ``{"levels": 1}`` is serial stepping. ``check`` is ``"cycle"`` unless given, as for
        finite element sweeps. With ``"time_solver": "paradiag"`` the others are ParaDiag's.
    grid
        Space and time ranks.
    nsteps
        Fine steps; default: the calibration's.
    network
        Default: the calibration's.
    busy
        Factor of all work; default: the calibration's for as many processes, or for the largest measured number.

    Raises
    ------
    InputError
        On more time ranks than steps, or options that do not fit.
    """

    def __init__(
        self,
        calibration: Calibration,
        options: Mapping | MGRITOptions | None = None,
        grid: tuple[int, int] = (1, 1),
        *,
        nsteps: int | None = None,
        network: Network | None = None,
        busy: float | None = None,
    ):
        self.calibration, self.grid = calibration, (int(grid[0]), int(grid[1]))
        self.nsteps, self.network = nsteps or calibration.nsteps, network or calibration.network
        if min(self.grid) < 1 or self.grid[1] > self.nsteps:
            raise InputError(f"grid {grid[0]}x{grid[1]} for {self.nsteps} steps: use at most one time rank a step")
        self.busy = calibration.busy_with(self.grid[0] * self.grid[1]) if busy is None else busy
        options = dict(options or {}) if not isinstance(options, MGRITOptions) else options
        kind = options.pop("time_solver", "mgrit") if isinstance(options, dict) else "mgrit"
        try:
            if kind == "paradiag":
                self.options = ParaDiagOptions.make(options, trace="", view=False, monitor=False)
            else:
                self.options = self._mgrit(options)
        except ValueError as error:
            raise InputError(str(error)) from None
        #: ``"serial"``, ``"mgrit"`` or ``"paradiag"``.
        self.solver = kind if kind == "paradiag" else "serial" if self.options.levels == 1 else "mgrit"
        if self.solver == "paradiag" and (not calibration.paradiag or self.grid[0] > 1):
            raise InputError(
                f"ParaDiag on {self.grid[0]} space ranks: calibration {calibration.problem} has its costs on "
                f"{'one' if calibration.paradiag else 'none'}"
            )
        #: Kernels on the grid's space ranks, by kind and level.
        self.work = kernels(calibration, self.grid[0], self.network)

    def _mgrit(self, options) -> MGRITOptions:
        options = MGRITOptions.make(options)
        if options.check == "auto":
            options = MGRITOptions.make(options, check="cycle")
        factors = options.factors(self.nsteps)
        return MGRITOptions.make(options, levels=len(factors) + 1, trace="", view=False, monitor=False)

    @property
    def is_serial(self) -> bool:
        """Whether it steps sequentially."""
        return self.solver == "serial"

    # -- what is run -------------------------------------------------------------------------------------------------
    def run(self, *solves: Solve, task: str = "solves", trace: bool = False) -> Prediction:
        """Run solves one after another, as a task: see :meth:`run_all`."""
        return self.run_all([(task, solves)], trace=trace)

    def run_all(self, tasks: Sequence[tuple[str, Sequence[Solve]]], *, trace: bool = False) -> Prediction:
        """Run tasks one after another; each begins when all ranks have ended the one before.

        Parameters
        ----------
        tasks
            Each ``"solves"``: solves alone, ranks wait for each other between them but as the solves do;
            ``"value"`` (state), ``"derivative"`` (adjoint, given the state), ``"gradient"`` (both), ``"hessian"``
            (tangent and adjoint), with what is between and behind them; and its solves.
        trace
            Keep all events.
        """
        world = World(self.grid[1], self.network)
        comms = communicators(world, [self.calibration.state_bytes / self.grid[0]])
        shared = _Shared(self, world)
        ranks: list[_Rank] = []
        ends: list[float] = []

        def program(rank: int):
            mine = _Rank(shared, comms[rank], trace)
            ranks.append(mine)
            for task, solves in tasks:
                mine.perform(solves, task)
                comms[rank].meet()
                if rank == 0:
                    ends.append(world.clocks[0])

        world.run(program)
        return Prediction(
            max(world.clocks),
            [end - start for start, end in zip([0.0, *ends[:-1]], ends, strict=True)],
            world.busy,
            world.clocks,
            world.counts,
            max(rank.bytes for rank in ranks),
            [rank.trace.events for rank in sorted(ranks, key=lambda r: r.comm.rank)] if trace else [],
        )


class _Shared:
    """What all ranks have in common."""

    def __init__(self, model: Model, world: World):
        c, o = model.calibration, model.options
        self.model, self.world = model, world
        N, (space, ranks) = model.nsteps, model.grid
        self.bounds = Bounds(split_steps(N, ranks))
        self.reversed_bounds = Bounds(N - b for b in reversed(self.bounds))
        busy, work = model.busy, model.work
        self.busy = busy
        table = lambda kind: [k.scaled(busy) for k in work[kind]] if kind in work else None
        known = c.paradiag if model.solver == "paradiag" else c.bookkeeping
        make = lambda kind: hierarchy(
            world, kind, table(kind), table("sweep" if kind == "step" else f"{kind} sweep"), o.levels,
            busy * known.get("adjoint" if kind == "adjoint" else "state", 0.0) / space,
        )  # fmt: skip
        self.propagators = {"step": make("step"), "adjoint": make("adjoint")}
        if model.solver == "paradiag":
            #: ParaDiag's costs as these ranks have them.
            self.paradiag = {k: v if k == "factor bytes" else busy * v for k, v in c.paradiag.items()}
            self.paradiag |= transforms(c.paradiag, N, busy)
        more = model.network.collective(space, 8 * 2)
        self.norms = VirtualNorms(world, busy * c.norm / space, more)

    def extra(self, name: str, steps: int = 1) -> None:
        """Charge something that surrounds the sweeps."""
        seconds = self.model.calibration.extras.get(name, 0.0)
        self.world.charge(self.busy * steps * seconds / self.model.grid[0])


class _Rank:
    """One time rank's solvers and arrays."""

    def __init__(self, shared: _Shared, comm: VirtualComm, trace: bool):
        self.shared, self.comm = shared, comm
        model = self.model = shared.model
        self.trace = VirtualTrace(comm) if trace else None
        common = dict(options=model.options, point_norms=shared.norms, trace=self.trace, is_root=False)
        N, steps = model.nsteps, shared.propagators
        reverse = comm.Split(0, -comm.rank)
        forward = dict(comm=comm, bounds=shared.bounds, name="state", **common)
        backward = dict(comm=reverse, bounds=shared.reversed_bounds, name="adjoint", **common)
        self.systems = None
        if model.solver == "paradiag":
            c = model.calibration
            self.systems = virtual_systems(shared.world, shared.paradiag, c.stages, 1e9 * model.options.memory)
            costs = dict(world=shared.world, size=c.unknowns, costs=shared.paradiag)
            self.forward = VirtualParaDiag(steps["step"][0], N, self.systems.solve, **forward, **costs)
            transposed = self.systems.solve_transposed
            self.backward = VirtualParaDiag(steps["adjoint"][0], N, transposed, backwards=True, **backward, **costs)
        else:
            self.forward = MGRIT(steps["step"], N, linear=True, **forward)
            self.backward = MGRIT(steps["adjoint"], N, linear=True, **backward)
        self._backward = backward | dict(linear=True)
        k = self.forward.levels[0].k
        self.k, self._zero = k, np.zeros((1, 1))
        self.U, self.L = np.zeros((k + 1, 1)), np.zeros((k + 1, 1))
        self.G = np.zeros((k, 1))
        self.bytes = 0.0

    @cached_property
    def _transposed(self) -> TransposedAdjoint | TransposedParaDiag:
        if self.systems is not None:
            return TransposedParaDiag(self.backward, self.k)
        is_last = self.comm.rank == self.comm.size - 1
        return TransposedAdjoint(self.backward, self.k, is_last=is_last, **self._backward)

    def solve(self, solve: Solve) -> None:
        """One sweep."""
        if solve.start == "transposed":
            sweep = self._transposed
            sweep.solver.solve(*sweep.arrays(self.L), start=sweep.start, cycles=solve.cycles)
            sweep.collect()
            return
        backwards = solve.kind == "adjoint"
        solver, U = (self.backward, self.L) if backwards else (self.forward, self.U)
        G, given, accuracy = self.G, None, {}
        if not backwards:
            self.shared.extra("forcing")
            G = np.broadcast_to(self._zero, (self.k, 1))
        if not self.model.is_serial:
            accuracy = {"cycles": solve.cycles}
            if not backwards and solve.start in ("skip", "nested"):
                given = [np.broadcast_to(self._zero, (level.k, 1)) for level in solver.levels[1:]]
                for _ in given:
                    self.shared.extra("forcing")
        solver.name = solve.kind
        solver.solve(U, G, start=solve.start, coarse_rhs=given, **accuracy)

    def perform(self, solves: Sequence[Solve], task: str) -> None:
        """A task of the reduced problem, see :class:`~pint_fem.adjoint.problem.ReducedProblem`."""
        getattr(self, f"_{task}")(*solves)
        self.bytes = self._memory()

    def _solves(self, *solves: Solve) -> None:
        for solve in solves:
            self.solve(solve)

    def _value(self, state: Solve) -> None:
        self._find()
        self.solve(state)
        self.shared.extra("misfit value", self.k)
        gather_in_order(np.zeros((self.k, 1)), self.comm)

    def _derivative(self, adjoint: Solve) -> None:
        self._find()
        self._misfit_gradient()
        self.solve(adjoint)
        self._pull_back()

    def _gradient(self, state: Solve, adjoint: Solve) -> None:
        self._value(state)
        self._derivative(adjoint)

    def _hessian(self, tangent: Solve, adjoint: Solve) -> None:
        self._find()
        self.solve(tangent)
        self._misfit_gradient()
        self.solve(adjoint)
        self._pull_back()

    def _find(self) -> None:
        """Agree on whether the control is a new one."""
        self.comm.allgather(None)

    def _misfit_gradient(self) -> None:
        self.shared.extra("misfit gradient", self.k)
        nbytes = self.model.calibration.sensor_bytes
        if nbytes:
            comm, here = self.comm.scaled([nbytes]), np.zeros(1)
            send = comm.Isend(here, comm.rank + 1, 1) if comm.rank + 1 < comm.size else None
            if comm.rank:
                comm.Recv(here, comm.rank - 1, 1)
            if send is not None:
                send.Wait()

    def _pull_back(self) -> None:
        """Derivative by a static control: adjoints summed over the own steps, one step's transpose, sum over time."""
        self.shared.extra("adjoint sum", self.k)
        self.shared.extra("control gradient")
        if self.comm.size > 1:
            comm, total = self.comm.scaled([self.model.calibration.control_bytes / self.model.grid[0]]), np.zeros(1)
            comm.Reduce(np.zeros(1), total, op=MPI.SUM)
            comm.Bcast(total)
        self.shared.extra("regularisation")

    def _memory(self) -> float:
        """Bytes of the states on a process: slabs of the state and the adjoint, and the work arrays of both solvers."""
        nbytes = self.model.calibration.state_bytes / self.model.grid[0]
        states = 2 * (self.k + 1) + self.k
        for solver in (self.forward, self.backward):
            if len(solver.levels) > 1:
                extra = solver.extra_states
                states += extra[0] + sum(
                    4 * level.k + 2 + e for level, e in zip(solver.levels[1:], extra[1:], strict=True)
                )
        if self.systems is not None:  # transforms, the residual, factors
            return (states + 5 * self.k) * nbytes + self.systems.bytes
        return states * nbytes

"""Predicted times of solves, gradients and Hessian actions on a process grid: the solver's own code on virtual ranks.

Each virtual time rank runs :class:`~pint_fem.mgrit.solver.MGRIT` or :class:`~pint_fem.paradiag.ParaDiag` itself on
propagators that advance its clock. The work and messages between the solves of a task are those of
:class:`~pint_fem.adjoint.problem.ReducedProblem` for a linear evolution with a static control.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import numpy as np
from mpi4py import MPI

from pint_fem.all_at_once.grids import Bounds, split_steps
from pint_fem.all_at_once.norms import gather_in_order
from pint_fem.errors import InputError
from pint_fem.mgrit.options import MGRITOptions
from pint_fem.mgrit.solver import MGRIT
from pint_fem.mgrit.transposed_cycles import TransposedAdjoint
from pint_fem.paradiag.options import ParaDiagOptions
from pint_fem.paradiag.solver import ParaDiag
from pint_fem.paradiag.transposed_iterations import TransposedParaDiag
from pint_fem.scaling.communicator import VirtualComm, communicators
from pint_fem.scaling.costs import Calibration, Kernel
from pint_fem.scaling.network import Network
from pint_fem.scaling.paradiag import VirtualBlocks, virtual_circulant, virtual_systems
from pint_fem.scaling.space import space_kernels
from pint_fem.scaling.virtual import VirtualNorms, VirtualPropagator, VirtualTrace
from pint_fem.scaling.world import World

__all__ = ["Model", "Prediction", "Solve"]


@dataclass(frozen=True)
class Solve:
    """One sweep over all steps.

    Parameters
    ----------
    kind : str
        ``"state"``, ``"tangent"`` or ``"adjoint"``.
    start, cycles : str, int
        ``"guess"``, ``"skip"`` or ``"nested"`` as for MGRIT, or ``"transposed"`` for the adjoint of an inexact Hessian
        action (:mod:`~pint_fem.mgrit.transposed_cycles`); number of cycles or iterations.
    """

    kind: str
    start: str = "nested"
    cycles: int = 1


@dataclass
class Prediction:
    """Predicted times of a run.

    Attributes
    ----------
    seconds, task_seconds : float, list of float
        From the first rank's start to the last one's end; of each task.
    work : list of float
        Seconds of work on each time rank.
    counts : Counter
        Work and messages of all ranks, see :class:`~pint_fem.scaling.world.World`.
    bytes_per_rank : float
        Largest memory of a rank's states and factors.
    traces : list
        Events of each rank, where they were recorded.
    """

    seconds: float
    task_seconds: list[float]
    work: list[float]
    counts: Counter
    bytes_per_rank: float = 0.0
    traces: list = field(default_factory=list)


class Model:
    """A problem with a solver's options on a process grid.

    Parameters
    ----------
    calibration, grid
        Costs of the problem; numbers of space and time ranks.
    options
        MGRIT's, as a dictionary or object; ``{"levels": 1}`` is sequential stepping. ``check`` is ``"cycle"`` unless
        given, as for finite element sweeps. A step of a coarse level costs ``coarse_steps`` of its kernels. With
        ``"time_solver": "paradiag"`` the others are ParaDiag's.
    nsteps, network
        Fine steps and network; default: the calibration's.

    Attributes
    ----------
    solver, slowdown : str, float
        ``"serial"``, ``"mgrit"`` or ``"paradiag"``; factor of all work on that many processes.
    kernels : dict
        Kernels on the grid's space ranks, by kind and level.

    Raises
    ------
    InputError
        On more time ranks than steps, options that do not fit, or ParaDiag where its costs were not measured.
    """

    def __init__(
        self,
        calibration: Calibration,
        options: Mapping | MGRITOptions | None = None,
        grid: tuple[int, int] = (1, 1),
        *,
        nsteps: int | None = None,
        network: Network | None = None,
    ):
        self.calibration, self.grid = calibration, (int(grid[0]), int(grid[1]))
        self.nsteps, self.network = nsteps or calibration.nsteps, network or calibration.network
        if min(self.grid) < 1 or self.grid[1] > self.nsteps:
            raise InputError(f"grid {grid[0]}x{grid[1]} for {self.nsteps} steps: use at most one time rank a step")
        self.slowdown = calibration.slowdown_with(self.grid[0] * self.grid[1])
        given, self._coarse_steps = options if isinstance(options, MGRITOptions) else dict(options or {}), 1
        self.solver = "mgrit" if isinstance(given, MGRITOptions) else given.pop("time_solver", "mgrit")
        try:
            if self.solver == "paradiag":
                self.options = ParaDiagOptions.make(given, trace="", view=False, monitor=False)
            else:
                options = MGRITOptions.make(given)
                check = "cycle" if options.check == "auto" else options.check
                levels = len(options.factors(self.nsteps)) + 1
                self._coarse_steps = options.coarse_steps
                self.options = MGRITOptions.make(
                    options, check=check, levels=levels, coarse_steps=1, trace="", view=False, monitor=False
                )
        except ValueError as error:
            raise InputError(str(error)) from None
        if self.options.levels == 1 and self.solver != "paradiag":
            self.solver = "serial"
        if self.solver == "paradiag" and (not calibration.paradiag or self.grid[0] > 1):
            raise InputError(
                f"ParaDiag on {self.grid[0]} space ranks: calibration {calibration.problem} has its costs on "
                f"{'one' if calibration.paradiag else 'none'}"
            )
        self.kernels = space_kernels(calibration, self.grid[0], self.network)

    def kernel(self, kind: str, level: int) -> Kernel:
        """The kernel of a level on the grid's space ranks: of all steps of the integrator for a step of the level."""
        kernel = self.kernels[kind][min(level, len(self.kernels[kind]) - 1)]
        return kernel.scaled(self._coarse_steps) if level else kernel

    def run(self, *solves: Solve, task: str = "solves", trace: bool = False) -> Prediction:
        """Run solves one after another as one task, see :meth:`run_all`."""
        return self.run_all([(task, solves)], trace=trace)

    def run_all(self, tasks: Sequence[tuple[str, Sequence[Solve]]], *, trace: bool = False) -> Prediction:
        """Run tasks one after another; each begins when all ranks have ended the one before.

        Parameters
        ----------
        tasks
            Names and solves: ``"solves"`` (the solves alone), ``"value"`` (a state), ``"derivative"`` (an adjoint, for
            a given state), ``"gradient"`` (a state and an adjoint), ``"hessian"`` (a tangent and an adjoint). All but
            the first include the work and messages around the solves.
        trace
            Whether to record all events.
        """
        world = World(self.grid[1], self.network)
        comms = communicators(world, [self.calibration.state_bytes / self.grid[0]])
        shared, ends = _Shared(self, world), []

        def program(rank: int) -> _Rank:
            own = _Rank(shared, comms[rank], trace)
            for task, solves in tasks:
                own.perform(task, solves)
                comms[rank].synchronise()
                if rank == 0:
                    ends.append(world.clocks[0])
            return own

        ranks = world.run(program)
        task_seconds = [end - start for start, end in zip([0.0, *ends[:-1]], ends, strict=True)]
        nbytes, traces = max(rank.nbytes for rank in ranks), [rank.trace.events for rank in ranks] if trace else []
        return Prediction(max(world.clocks), task_seconds, world.work, world.counts, nbytes, traces)


class _Shared:
    """What the virtual ranks of a run have in common: step bounds, propagators, norms and scaled costs."""

    def __init__(self, model: Model, world: World):
        c, N, (space, ranks) = model.calibration, model.nsteps, model.grid
        self.model, self.world, self.slowdown = model, world, model.slowdown
        self.bounds = Bounds(split_steps(N, ranks))
        self.reversed_bounds = Bounds(N - b for b in reversed(self.bounds))
        overhead = c.paradiag if model.solver == "paradiag" else c.overhead

        def propagators(kind: str, name: str) -> list[VirtualPropagator]:
            seconds = self.slowdown * overhead.get(name, 0.0) / space
            kernels = [model.kernel(kind, level).scaled(self.slowdown) for level in range(model.options.levels)]
            return [VirtualPropagator(world, i, kind, kernel, seconds) for i, kernel in enumerate(kernels)]

        self.forward = propagators("step", "state")
        self.backward = propagators("adjoint", "adjoint")
        self.norms = VirtualNorms(world, self.slowdown * c.norm / space, model.network.collective(space, 8 * 2))

    def charge(self, name: str, steps: int = 1) -> None:
        """Take the time of work around the sweeps, ``extras`` of the calibration."""
        seconds = self.model.calibration.extras.get(name, 0.0)
        self.world.charge(self.slowdown * steps * seconds / self.model.grid[0])


class _Rank:
    """The solvers and arrays of one virtual time rank."""

    def __init__(self, shared: _Shared, comm: VirtualComm, trace: bool):
        self.shared, self.comm, self.model, self.nbytes = shared, comm, shared.model, 0.0
        model, c, self.systems = shared.model, shared.model.calibration, None
        self.trace = VirtualTrace(comm) if trace else None
        common = dict(options=model.options, point_norms=shared.norms, trace=self.trace, is_root=False)
        forward = dict(comm=comm, bounds=shared.bounds, name="state", **common)
        backward = dict(comm=comm.Split(0, -comm.rank), bounds=shared.reversed_bounds, name="adjoint", **common)
        if model.solver == "paradiag":
            sizes = "factor bytes", "single"
            costs = {k: v if k in sizes else shared.slowdown * v for k, v in c.paradiag.items()}
            self.systems = virtual_systems(shared.world, costs, c.stages, 1e9 * model.options.memory)
            made_by = virtual_circulant(shared.world, c.paradiag, c.unknowns, model.nsteps, shared.slowdown)
            make, blocks = partial(ParaDiag, nsteps=model.nsteps, circulant=made_by), lambda transposed: None
            if "single" in costs:
                blocks = partial(VirtualBlocks, self.systems, single=costs["single"])
            given = dict(solve=self.systems.solve, blocks=blocks(transposed=False))
            self.forward = make(shared.forward[0], **given, **forward)
            given = dict(solve=self.systems.solve_transposed, blocks=blocks(transposed=True), backwards=True)
            self.backward = make(shared.backward[0], **given, **backward)
        else:
            self.forward = MGRIT(shared.forward, model.nsteps, linear=True, **forward)
            self.backward = MGRIT(shared.backward, model.nsteps, linear=True, **backward)
        self._backward, self._used = backward, set()
        self.k = k = self.forward.levels[0].k
        self.U, self.L, self.G = np.zeros((k + 1, 1)), np.zeros((k + 1, 1)), np.zeros((k, 1))

    @cached_property
    def _transposed(self) -> TransposedAdjoint | TransposedParaDiag:
        if self.systems is not None:
            return TransposedParaDiag(self.backward, self.k)
        is_last = self.comm.rank == self.comm.size - 1
        return TransposedAdjoint(self.backward, self.k, is_last=is_last, linear=True, **self._backward)

    def solve(self, solve: Solve) -> None:
        """Run one sweep."""
        if solve.start == "transposed":
            sweep = self._transposed
            sweep.solver.solve(*sweep.arrays(self.L), start=sweep.start, cycles=solve.cycles)
            sweep.collect()
            return
        coarse_rhs, accuracy = None, {} if self.model.solver == "serial" else {"cycles": solve.cycles}
        if solve.kind == "adjoint":
            solver, U, G = self.backward, self.L, self.G
        else:
            solver, U, G = self.forward, self.U, _zeros(self.k)
            self.shared.charge("forcing")
            if accuracy and solve.start in ("skip", "nested"):
                coarse_rhs = [_zeros(level.k) for level in solver.levels[1:]]
                for _ in coarse_rhs:
                    self.shared.charge("forcing")
        solver.name = solve.kind
        self._used.add(solver)
        solver.solve(U, G, start=solve.start, coarse_rhs=coarse_rhs, **accuracy)

    def perform(self, task: str, solves: Sequence[Solve]) -> None:
        """Run a task of :meth:`Model.run_all`."""
        if self.systems is not None:  # numbers of cycles stand for tolerances, but in an inexact Hessian action
            options = self.model.options
            if not any(solve.start == "transposed" for solve in solves):
                options = replace(options, precision=options.precision_for_tolerances)
            self.forward.options = self.backward.options = options
        for number, solve in enumerate(solves):
            if task == "solves":
                self.solve(solve)
                continue
            if number == 0 or task == "gradient":  # agree on whether the control is a new one
                self.comm.allgather(None)
            if solve.kind == "adjoint":
                self._misfit_gradient()
            self.solve(solve)
            if solve.kind == "adjoint":
                self._control_gradient()
            elif solve.kind == "state":
                self.shared.charge("misfit value", self.k)
                gather_in_order(np.zeros((self.k, 1)), self.comm)
        self.nbytes = self._memory()

    def _misfit_gradient(self) -> None:
        """Derivative of the misfits, with the observations that are passed to the next rank."""
        self.shared.charge("misfit gradient", self.k)
        nbytes = self.model.calibration.sensor_bytes
        if nbytes:
            comm, here = self.comm.scaled([nbytes]), np.zeros(1)
            if comm.rank + 1 < comm.size:
                comm.Send(here, comm.rank + 1, 1)
            if comm.rank:
                comm.Recv(here, comm.rank - 1, 1)

    def _control_gradient(self) -> None:
        """Derivative by a static control: adjoints summed over the own steps, one step's transpose, sum over time."""
        self.shared.charge("adjoint sum", self.k)
        self.shared.charge("control gradient")
        if self.comm.size > 1:
            comm, total = self.comm.scaled([self.model.calibration.control_bytes / self.model.grid[0]]), np.zeros(1)
            comm.Reduce(np.zeros(1), total, op=MPI.SUM)
            comm.Bcast(total)
        self.shared.charge("regularisation")

    def _memory(self) -> float:
        """Bytes of the states on a process: slabs of the state and the adjoint, and the work arrays of both solvers."""
        nbytes = self.model.calibration.state_bytes / self.model.grid[0]
        states = 3 * self.k + 2
        for solver in self._used:
            fine, *coarse = solver.extra_states
            states += fine + sum(4 * level.k + 2 + n for level, n in zip(solver.levels[1:], coarse, strict=True))
        if self.systems is not None:  # transforms, the residual, factors
            return (states + 5 * self.k) * nbytes + self.systems.bytes
        return states * nbytes


def _zeros(k: int) -> np.ndarray:
    """Zero states of ``k`` steps, in no memory."""
    return np.broadcast_to(np.zeros((1, 1)), (k, 1))

"""A residual network as a ``torch.nn.Module`` whose layers are distributed over MPI ranks.

Every rank runs the same ordinary training loop: it calls the network with its group's batch, gets the logits, computes
the loss, calls ``backward`` and steps an optimiser over ``network.parameters()``, which are those of its own layers
(with the opening layer on the first rank, the classification layer on the last). Forward and backward propagation are
MGRIT sweeps inside one ``autograd.Function``.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from mpi4py import MPI
from torch import nn

from pint_fem.all_at_once.stopping import SolveResult
from pint_fem.capacity import require_memory
from pint_fem.collective import collectively, raise_collectively, require_same
from pint_fem.errors import FAILURES, InputError, SolverFailure
from pint_fem.mgrit.options import MGRITOptions
from pint_fem.resnet.consistency import CollectiveBackward, batch_digest
from pint_fem.resnet.grid import Grid
from pint_fem.resnet.iterations import Adaptive, Iterations
from pint_fem.resnet.layers import Layer
from pint_fem.resnet.sweeps import LayerSweeps, Trajectory
from pint_fem.resnet.training.optimisers import mark_distributed

__all__ = ["LayerParallelResNet"]


class _BatchReport(NamedTuple):
    """What a rank sends to the others about a batch before it is propagated."""

    failed: bool
    shape: tuple[int, ...] | None
    size: int
    digest: int
    requires_grad: bool


class LayerParallelResNet(nn.Module):
    r"""Opening layer, ``N`` residual layers :math:`u_{n+1} = u_n + h \sigma(L_n u_n + b_n)`, classification layer.

    Parameters
    ----------
    opening, closing
        Modules from a batch to the first state and from the last state to the output, given on all ranks; the first
        rank stores one, the last the other. A state is ``(batch, width)`` for :class:`Dense` layers, ``(batch,
        channels, height, width)`` for :class:`Convolution`.
    layer
        Kind of the residual layers.
    nlayers
        Their number, at least one per layer rank.
    final_time
        :math:`T`; :math:`h = T / N`.
    grid
        :class:`Grid` data x layers; default: all ranks in the layers.
    forward_iterations, backward_iterations
        Number of cycles of a training sweep; ``None``: up to ``rtol``.
    adaptive
        :class:`Adaptive` rule for the number of cycles, which begins with the given ones.
    evaluation
        Sweeps without gradients: ``"exact"`` takes sequential steps, ``"same"`` the cycles of the training.
    mgrit
        Options of the solver (:mod:`pint_fem.mgrit`): ``levels``, ``coarsening``, ``relax``, ``rtol`` ... Unless
        given, ``rtol`` is 1e-12 (float64) or 1e-6 (float32), and sweeps up to the tolerance that do not converge are
        repeated by sequential steps.
    seed
        Of the residual layers' initial parameters.
    dtype
        ``torch.float64`` or ``torch.float32``.

    Attributes
    ----------
    theta : ParameterDict
        Parameters of the own layers, stacked: ``weight (k, ...)`` and ``bias (k, ...)``.
    lo, hi : int
        The own layers are ``lo .. hi - 1``.
    results : dict
        The last ``"forward"`` and ``"backward"`` :class:`~pint_fem.mgrit.SolveResult`.
    collective : CollectiveBackward
        ``net.collective.backward(loss)`` is ``loss.backward()`` where a loss that fails on one rank fails on all.
    warm_starts : dict
        C-points of the last sweeps by kind of sweep and name of the batch.

    Raises
    ------
    InputError
        On every rank, on arguments that are refused or differ between ranks.
    """

    def __init__(
        self,
        opening: nn.Module,
        layer: Layer,
        nlayers: int,
        closing: nn.Module,
        *,
        final_time: float = 1.0,
        grid: Grid | None = None,
        forward_iterations: int | None = None,
        backward_iterations: int | None = None,
        adaptive: Adaptive | None = None,
        evaluation: str = "exact",
        mgrit: MGRITOptions | Mapping | None = None,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        self.grid = grid = grid or Grid()
        require_same(
            grid.comm,
            nlayers=nlayers,
            final_time=final_time,
            layer=(type(layer).__name__, {name: tuple(shape) for name, shape in getattr(layer, "shapes", {}).items()}),
            activation=[p.tolist() for p in layer.activation.initial.values()],
            forward_iterations=forward_iterations,
            backward_iterations=backward_iterations,
            adaptive=adaptive,
            evaluation=evaluation,
            mgrit=mgrit,
            seed=seed,
            dtype=str(dtype),
        )
        if not isinstance(nlayers, int) or nlayers < 1:
            raise InputError(f"nlayers = {nlayers!r}: give a positive whole number")
        if not final_time > 0:
            raise InputError(f"final_time = {final_time!r}: give a positive number")
        if evaluation not in ("exact", "same"):
            raise InputError(f"evaluation {evaluation!r}: give 'exact' or 'same'")
        if dtype not in (torch.float64, torch.float32):
            raise InputError(f"dtype {dtype}: give torch.float64 or torch.float32")
        self.layer, self.nlayers, self.h = layer, nlayers, final_time / nlayers
        self.final_time, self.evaluation, self.dtype, self.seed = final_time, evaluation, dtype, seed
        own = -(-nlayers // grid.layer_size) * sum(math.prod(shape) for shape in layer.shapes.values())
        require_memory(
            grid.comm,
            2 * own * dtype.itemsize,
            f"parameters and gradients of {nlayers} layers",
            "give fewer or narrower layers, or more machines",
        )
        if not isinstance(mgrit, MGRITOptions):
            tolerance = 1e-12 if dtype == torch.float64 else 1e-6
            mgrit = {"rtol": tolerance, "on_divergence": "serial", **(mgrit or {})}
        self.sweeps = LayerSweeps(layer, nlayers, self.h, grid, options=mgrit)
        self.forward_sweeps = Iterations(forward_iterations, adaptive)
        self.backward_sweeps = Iterations(backward_iterations, adaptive)
        self.lo, self.hi = self.sweeps.lo, self.sweeps.hi
        initial = layer.initial(range(self.lo, self.hi), seed, dtype)
        frozen = layer.activation.frozen
        self.theta = nn.ParameterDict({name: nn.Parameter(p, name not in frozen) for name, p in initial.items()})
        self.opening = copy.deepcopy(opening).to(dtype) if grid.is_first else None
        self.closing = copy.deepcopy(closing).to(dtype) if grid.is_last else None
        if grid.layer_size > 1:
            mark_distributed(self.parameters(), stacked=False)
            mark_distributed(self.stack, stacked=True)
        if grid.data_size > 1:
            for p in self.parameters():
                p.register_hook(self._mean)
        self.results: dict = {}
        self.collective = CollectiveBackward(grid.comm)
        self.warm_starts: dict[tuple[str, Hashable], np.ndarray] = {}

    def _mean(self, gradient: torch.Tensor) -> torch.Tensor:
        """Mean of a gradient over the data groups."""
        gradient = gradient.contiguous().clone()
        self.grid.mean_over_data(gradient.numpy())
        return gradient

    @property
    def stack(self) -> list[nn.Parameter]:
        """Stacked parameters of the own layers, in the order of ``layer.shapes``."""
        return [self.theta[name] for name in self.layer.shapes]

    @property
    def serial(self) -> bool:
        """Whether sweeps take sequential steps instead of MGRIT cycles; can be set."""
        return self.forward_sweeps.serial and self.backward_sweeps.serial

    @serial.setter
    def serial(self, value: bool) -> None:
        self.forward_sweeps.serial = self.backward_sweeps.serial = bool(value)

    def invalidate(self) -> None:
        """Discard the warm starts of all batches."""
        self.warm_starts.clear()

    def forward(self, x: torch.Tensor, batch: Hashable = None) -> torch.Tensor:
        """Output of the network for a batch, on every rank (collective).

        Parameters
        ----------
        x
            The batch, the same on all ranks that share the layers.
        batch
            Name of the batch: in training, sweeps then start from the C-points of the last ones with this name.

        Returns
        -------
        Tensor
            The output, the same on all ranks that share the layers.

        Raises
        ------
        InputError
            On every rank, where the batch does not fit the opening layer or differs between ranks.
        SolverFailure
            On every rank, where values are not finite.
        Exception
            What the opening or the classification layer raises: as it is on its rank, ``RuntimeError`` on the others.
        """
        grid, shares = self.grid, self.training and torch.is_grad_enabled() and self.grid.data_size > 1
        comm = grid.comm if shares else grid.layer_comm
        u0 = failure = None
        count = hash_number = 0
        try:
            count = len(x)
            hash_number = batch_digest(x) if grid.layer_size > 1 else 0
            if grid.is_first:
                x0 = self.opening(x.to(self.dtype) if x.is_floating_point() else x)
                self.layer.check_input(x0)
                u0 = self.layer.pack(x0)
        except FAILURES as error:
            failure = error
        requires_grad = torch.is_grad_enabled() and (
            any(p.requires_grad for p in self.parameters()) or (u0 is not None and u0.requires_grad)
        )
        shape = None if u0 is None else tuple(u0.shape)
        report = _BatchReport(failure is not None, shape, count, hash_number, requires_grad)
        reports = [report] if comm.size == 1 else comm.allgather(report)
        if any(r.failed for r in reports):
            raise_collectively(comm, failure, "opening layer")
        group = (reports[grid.data_comm.rank * grid.layer_size :] if shares else reports)[: grid.layer_size]
        sizes = [r.size for r in group]
        problem = None
        if len(set(sizes)) > 1:
            problem = InputError(f"batches of {sizes} on the ranks that share the layers: give all the same")
        elif other := [rank for rank, r in enumerate(group) if r.digest != group[0].digest]:
            problem = InputError(
                f"batches of other values or types on layer rank {other[0]} than on layer rank 0, which share the "
                "layers: give both the same, for instance by shared_loader, or by a generator of its own for shuffling"
            )
        if shares or problem:
            raise_collectively(comm, problem)
        # frozen parameters of one rank do not keep the others from training: all take part in both sweeps
        training = any(r.requires_grad for r in reports)
        anchor = torch.zeros(0, requires_grad=training)
        if u0 is None:
            u0 = torch.empty(0, dtype=self.dtype)
        last = _LayerPropagation.apply(u0, self, group[0].shape, batch, training, anchor, *self.stack)
        out = failure = None
        if grid.is_last:
            try:
                out = self.closing(self.layer.unpack(last, count))
            except FAILURES as error:
                failure = error
        raise_collectively(comm, failure, "classification layer")
        return _BroadcastFromLast.apply(last if out is None else out, self)

    def extra_repr(self) -> str:
        """Depth and own layers, for torch's ``repr`` of modules."""
        return f"{type(self.layer).__name__} layers {self.lo} to {self.hi - 1} of {self.nlayers}, T={self.final_time}"

    # -- the two sweeps, called by autograd ----------------------------------------------------------------------------
    def _cycles(self, kind: str, training: bool) -> tuple[Iterations, int | None, bool]:
        """Iterations of a kind of sweep, number of cycles of the next one, and whether it is sequential."""
        its = self.forward_sweeps if kind == "forward" else self.backward_sweeps
        if not training and self.evaluation == "exact":
            return its, None, True
        return its, its.begin() if training else its.cycles, its.serial

    def _largest(self, value: float) -> float:
        """Maximum over the data groups."""
        if self.grid.data_size == 1:
            return value
        return self.grid.data_comm.allreduce(value, op=MPI.MAX)

    def _sweep(self, kind: str, batch: Hashable, training: bool, solve: Callable) -> None:
        """Solve with the number of cycles and the start that apply, and store the result and the C-points."""
        its, cycles, serial = self._cycles(kind, training)
        warm = self.warm_starts.get((kind, batch)) if batch is not None and training else None
        groups = training and (self.training or kind == "backward")

        def attempt(**how: Any) -> tuple[SolveResult, np.ndarray]:
            if not groups or self.grid.data_size == 1:
                return solve(**how)
            return collectively(self.grid.comm, f"{kind} sweep", partial(solve, **how))

        try:
            result, array = attempt(cycles=cycles, serial=serial, warm=warm)
        except SolverFailure:  # of any group: all take the same branch
            if serial or not training or not its.fail():
                raise
            result, array = attempt(cycles=None, serial=True, warm=None)
        self.results[kind] = result
        if training:
            if not its.serial:
                its.end(result, self._largest)
            if batch is not None:
                self.warm_starts[kind, batch] = self.sweeps.c_points(kind, array)

    def _propagate(
        self, u0: torch.Tensor, shape: Sequence[int], batch: Hashable, theta: Sequence[torch.Tensor], training: bool
    ) -> Trajectory:
        """The forward sweep."""
        first = u0.detach().numpy() if self.grid.is_first else None
        if first is not None and not first.flags.c_contiguous:
            first = np.ascontiguousarray(first)
        trajectory = self.sweeps.trajectory(shape, np.float64 if self.dtype == torch.float64 else np.float32)

        def solve(**how: Any) -> tuple[SolveResult, np.ndarray]:
            return self.sweeps.forward(theta, first, trajectory, slopes=training, **how), trajectory.U

        self._sweep("forward", batch, training, solve)
        return trajectory

    def _propagate_back(
        self, trajectory: Trajectory, last: np.ndarray | None, batch: Hashable
    ) -> tuple[np.ndarray, list[torch.Tensor]]:
        """The backward sweep: derivatives with respect to the first state and the parameters of the own layers."""
        first = gradients = None

        def solve(**how: Any) -> tuple[SolveResult, np.ndarray]:
            nonlocal first, gradients
            result, L, gradients = self.sweeps.backward(trajectory, last, **how)
            first = L[-1]
            return result, L

        self._sweep("backward", batch, True, solve)
        return first, gradients


class _LayerPropagation(torch.autograd.Function):
    """Propagation from the first state to the last one through the layers of all ranks."""

    @staticmethod
    def forward(
        ctx: Any, u0: torch.Tensor, network: LayerParallelResNet, shape: Sequence[int], batch: Hashable, training: bool,
        anchor: torch.Tensor, *theta: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """The last state, on the last rank; ``anchor`` has a derivative on all ranks where one of them trains."""
        trajectory = network._propagate(u0, shape, batch, theta, training)
        ctx.network, ctx.batch, ctx.trajectory = network, batch, trajectory
        last = torch.from_numpy(trajectory.U[-1].copy()) if network.grid.is_last else u0.new_zeros(())
        if not training:
            network.sweeps.recycle(trajectory)
            ctx.trajectory = None
        else:
            ctx.owner = _TrajectoryOwner(network.sweeps, trajectory)
        return last

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Derivatives with respect to the first state, on the first rank, and the own parameters."""
        network = ctx.network
        network.collective.check()
        last = gradient.contiguous().numpy() if network.grid.is_last else None
        first, gradients = network._propagate_back(ctx.trajectory, last, ctx.batch)
        d_first = None
        if network.grid.is_first and ctx.needs_input_grad[0]:
            d_first = torch.from_numpy(first.copy())
        return d_first, None, None, None, None, None, *gradients


class _TrajectoryOwner:
    """Returns the arrays of a trajectory to the pool when autograd has deleted its graph."""

    def __init__(self, sweeps: LayerSweeps, trajectory: Trajectory):
        self.sweeps, self.trajectory = sweeps, trajectory

    def __del__(self) -> None:
        self.sweeps.recycle(self.trajectory)


class _BroadcastFromLast(torch.autograd.Function):
    """Broadcast of the last rank's output; each rank computes the same derivative, so the last one uses its own."""

    @staticmethod
    def forward(ctx: Any, out: torch.Tensor, network: LayerParallelResNet) -> torch.Tensor:
        """The last rank's output, on all ranks."""
        ctx.network, ctx.shape = network, out.shape
        grid = network.grid
        values = out.detach().numpy()
        if grid.layer_size > 1:
            values = grid.layer_comm.bcast(values if grid.is_last else None, root=grid.layer_size - 1)
        return torch.from_numpy(np.array(values))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        """The derivative on the last rank, zero on the others."""
        ctx.network.collective.check()
        return gradient if ctx.network.grid.is_last else gradient.new_zeros(ctx.shape), None

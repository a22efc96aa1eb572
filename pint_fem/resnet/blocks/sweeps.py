r"""Forward and backward propagation through layers of any kind, each one MGRIT solve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from mpi4py import MPI
from torch import nn

from pint_fem.all_at_once.stopping import SolveResult
from pint_fem.collective import collectively
from pint_fem.mgrit.options import MGRITOptions
from pint_fem.resnet.blocks.batched_layers import BatchedLayers, BatchingChoice
from pint_fem.resnet.blocks.graphs import LayerGraphs
from pint_fem.resnet.blocks.mean_layers import MeanKey, MeanLayers
from pint_fem.resnet.blocks.own_layers import LayerCopies
from pint_fem.resnet.blocks.propagators import BlockAdjoint, BlockForward
from pint_fem.resnet.grid import Grid
from pint_fem.resnet.parallel.random_numbers import own_random_numbers, watched_generators
from pint_fem.resnet.parallel.solvers import SweepSolvers

__all__ = ["BlockSweeps", "BlockTrajectory"]

Tensor = torch.Tensor


@dataclass(eq=False)
class BlockTrajectory:
    """Result of a forward sweep.

    Attributes
    ----------
    U : Tensor, (k + 1, *state)
        Points of the own layers; row 0 is the point before them.
    graphs : LayerGraphs
        Their evaluations at these states.
    """

    U: Tensor
    graphs: LayerGraphs


class BlockSweeps(SweepSolvers):
    """Sweeps through the layers of one stage.

    Parameters
    ----------
    layers
        All layers of the stage, of which copies of a few are made where coarse levels need them.
    grid, options
        As for :class:`~pint_fem.resnet.parallel.solvers.SweepSolvers`.
    residual
        Whether a layer is ``u + h f(u)``.
    batching
        Whether several layers are one call.
    has_means
        Whether layers of coarse levels are means of those of their intervals, which then have one structure.
    """

    needs_residuals = False

    def __init__(
        self,
        layers: Sequence[nn.Module],
        grid: Grid,
        *,
        options: MGRITOptions | Mapping | None,
        residual: bool,
        batching: BatchingChoice,
        has_means: bool,
    ):
        count = len(layers)
        if not isinstance(options, MGRITOptions):
            options = {"on_divergence": "serial", **(options or {})}
        steps = {
            "forward": partial(BlockForward, propagates_nonfinite=residual),
            "backward": partial(BlockAdjoint, nlayers=count, propagates_nonfinite=False),
        }
        super().__init__(count, grid, options=options, steps=steps)
        self.batching, self.has_means = batching, has_means
        self._means: MeanLayers | None = None
        for solver in self.solvers.values():
            for level in solver.levels:
                level.propagator.has_means = has_means
        self.copies = LayerCopies(self.exchanges_of_layers(needed=not has_means), layers)

    def forward(
        self, modules: Mapping[int, nn.Module], first: Tensor | None, trajectory: BlockTrajectory, *, trains: bool,
        cycles: int | None, serial: bool, warm: Any,
    ) -> SolveResult:  # fmt: skip
        """Propagate a batch through all layers (collective over ``layer_comm``).

        Parameters
        ----------
        modules
            The own layers by number.
        first
            The first state, on the first rank.
        trajectory
            The result, overwritten.
        trains
            Whether a backward sweep is to follow.
        cycles, serial, warm
            Number of cycles (``None``: up to the tolerance), sequential steps instead, C-points to start from.
        """
        graphs, U, comm = trajectory.graphs, trajectory.U, self.grid.layer_comm
        iterates = not serial and len(self.strides) > 1
        if iterates and len(self.copies):
            collectively(comm, "parameters of layers of other ranks", self.copies.update, list(modules.values()), comm)
            graphs.adopt(self.copies.modules)
        means = self._mean_layers("forward", modules) if iterates and self.has_means else {}
        graphs.adopt(means)
        key = (tuple(U.shape[1:]), U.dtype, trains, graphs.now.network.training)
        batched = None
        if iterates and self.batching(key):
            batched = collectively(comm, "batched layers", self.batching.layers, key, modules)
        fine = self._bind("forward", graphs, batched)
        # up to a tolerance any relaxation may be the last: layers are then recorded once, at the end
        fine.records = trains and (cycles is not None or not iterates)
        if first is not None:
            U[0] = first
        try:
            with watched_generators() if iterates else nullcontext():
                result = self._solve(
                    "forward", _array(U), cycles=cycles, serial=serial, warm=warm, rtol=self._tolerance(trajectory)
                )
            collectively(comm, "layers at the final states", partial(graphs.finish, U, trains=trains))
            if trains and iterates and self.batching.is_open(key):
                self.batching.measure(key, graphs, modules, U, max(self.strides[1], 1), comm)
        finally:
            graphs.settle()
            graphs.discard(means)
            fine.records = False
            self._release("forward")
        return result

    def _mean_layers(self, sweep: str, modules: Mapping[int, nn.Module]) -> dict[MeanKey, nn.Module]:
        """Layers of the coarse levels of a sweep (collective)."""
        if self._means is None:
            self._means = MeanLayers(self, modules)
        return self._means.update(sweep, modules)

    def _tolerance(self, trajectory: BlockTrajectory) -> float | None:
        """Tolerance for states of a type and the type that layers compute with, unless one was given."""
        if self._has_tolerance:
            return None
        autocast, dtype = trajectory.graphs.now.autocast, trajectory.U.dtype
        if autocast is not None and dtype != torch.float64:
            dtype = autocast[1]
        return {torch.float64: 1e-12, torch.float32: 1e-6}.get(dtype, 1.3 * torch.finfo(dtype).eps)

    def _bind(self, name: str, graphs: LayerGraphs, batched: BatchedLayers | None) -> Any:
        """Set what all levels of a sweep evaluate, and return the finest level's propagator."""
        for level in self.solvers[name].levels:
            level.propagator.graphs, level.propagator.batched = graphs, batched
        return self.solvers[name].levels[0].propagator

    def _release(self, name: str) -> None:
        """Refer to no graphs of layers any more, which are as large as the batch's other memory together."""
        for level in self.solvers[name].levels:
            level.propagator.graphs = level.propagator.batched = None

    def backward(
        self, trajectory: BlockTrajectory, last: Tensor | None, *, cycles: int | None, serial: bool, warm: Any
    ) -> tuple[SolveResult, Tensor, Tensor, list[Tensor | None]]:
        """Derivatives of a loss with respect to the first state and, in the trajectory's graphs, the own parameters
        (collective over ``layer_comm``).

        Returns
        -------
        result : SolveResult
        L : Tensor, (k + 1, *state)
            Derivatives with respect to the points, from the last to the first.
        first : Tensor
            The last of them.
        extra : list of Tensor
            Derivatives with respect to the extra inputs that have any, the same on all ranks.
        """
        graphs, comm = trajectory.graphs, self.grid.layer_comm
        iterates = not serial and len(self.strides) > 1
        fine = self._bind("backward", graphs, None)
        together = cycles is not None or not iterates
        fine.differentiates = together
        L = torch.zeros_like(trajectory.U)
        if last is not None:
            L[0] = last
        graphs.parameter_gradients.clear()
        graphs.extra_gradients.clear()
        rtol = self._tolerance(trajectory)
        own = {n: graphs.modules[n] for n in graphs.own}
        means = self._mean_layers("backward", own) if iterates and self.has_means else {}
        graphs.adopt(means)
        for key in means:
            graphs.states[key] = trajectory.U[self.nlayers - (key[2] + 1) * key[1] - self.lo].data
        try:
            with own_random_numbers(graphs.now.devices):  # of layers that are evaluated again
                result = self._solve("backward", _array(L), cycles=cycles, serial=serial, warm=warm, rtol=rtol)
                missing = [n for n in graphs.own if n not in graphs.parameter_gradients]
                collectively(comm, "gradients of layers", self._differentiate, graphs, L, missing)
        finally:
            graphs.discard(means)
            self._release("backward")
        return result, _array(L), L[-1], self._sum_over_layers(graphs)

    def _differentiate(self, graphs: LayerGraphs, L: Tensor, layers: Sequence[int]) -> None:
        """Derivatives with respect to the parameters of some own layers, from the adjoint states behind them."""
        done: set[int] = set()
        for n in layers:
            if n in done:
                continue
            graph = graphs.graphs.get(n)
            some = [k for k in graph.layers if k in layers] if graph is not None else [n]
            rows = [self.hi - 1 - k for k in some]
            graphs.adjoint(some, L[rows], 1, gradients=True)
            done.update(some)

    def _sum_over_layers(self, graphs: LayerGraphs) -> list[Tensor | None]:
        """Sums over all layers of the derivatives with respect to the extra inputs (collective)."""
        comm, out = self.grid.layer_comm, []
        for i, like in enumerate(graphs.extra_tensors):
            total = torch.zeros_like(like)
            for n in graphs.own:
                g = graphs.extra_gradients[n][i]
                if g is not None:
                    total += g
            if comm.size > 1:
                host = total.cpu().contiguous()
                wide = host if host.dtype in (torch.float32, torch.float64) else host.float()
                comm.Allreduce(MPI.IN_PLACE, wide.numpy())
                total = wide.to(like.device, like.dtype)
            out.append(total)
        return out


def _array(t: Tensor) -> Any:
    """What the solver takes: numpy's view of a tensor of the processor."""
    return t.numpy() if t.device.type == "cpu" and t.dtype in (torch.float32, torch.float64) else t

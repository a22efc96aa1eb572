"""One stage of layers of any kind: what the network's pipeline needs of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from pint_fem.all_at_once.stopping import SolveResult
from pint_fem.mgrit.options import MGRITOptions
from pint_fem.resnet.blocks.batched_layers import BatchingChoice
from pint_fem.resnet.blocks.graphs import LayerGraphs
from pint_fem.resnet.blocks.sweeps import BlockSweeps, BlockTrajectory
from pint_fem.resnet.grid import Grid
from pint_fem.resnet.parallel.passes import Pass
from pint_fem.resnet.parallel.stage import Stage
from pint_fem.resnet.parallel.states import StateLayout

__all__ = ["BlockStage"]

Tensor = torch.Tensor


class BlockStage(Stage):
    """Layers of any kind that one MGRIT hierarchy propagates through.

    Parameters
    ----------
    layers
        All layers of the stage, or what makes them.
    grid
        Process grid.
    offset
        Number of layers in the stages before.
    options
        Of MGRIT.
    residual, h, batched, checkpoint
        As for the network.
    **iterations
        As for :class:`~pint_fem.resnet.parallel.stage.Stage`.

    Attributes
    ----------
    has_means : bool
        Whether layers of coarse levels are means of those of their intervals, set by the network.
    own : dict
        The own layers by their number in the stage, set by the network.
    bytes : dict
        Of the last pass on this rank: ``"states"``, and ``"graphs"`` that autograd keeps.
    """

    def __init__(
        self, layers: Sequence[nn.Module], grid: Grid, *, offset: int, options: MGRITOptions | Mapping | None,
        residual: bool, h: float, batched: str | bool, checkpoint: bool, **iterations: Any,
    ):  # fmt: skip
        super().__init__(grid, **iterations)
        self._layers: Sequence[nn.Module] = layers
        self.count, self.offset, self.options = len(layers), offset, options
        self.residual, self.h, self.checkpoint = residual, h, checkpoint
        self.batching = BatchingChoice(batched)
        self.has_means = False
        self.own: dict[int, nn.Module] = {}
        self.layout: StateLayout | None = None
        self.bytes: dict[str, int] = {}

    def __getstate__(self) -> dict:
        """Without what belongs to a batch."""
        return {**super().__getstate__(), "own": {}, "bytes": {}}

    def forget_others(self) -> None:
        """Make the solvers, and keep of all layers only those that they copy."""
        self._layers = _Some(self.count, self.sweeps.copies.modules)

    def make_sweeps(self) -> BlockSweeps:
        """The solvers of the sweeps of these layers, without communication."""
        return BlockSweeps(
            self._layers, self.grid, options=self.options, residual=self.residual, batching=self.batching,
            has_means=self.has_means,
        )  # fmt: skip

    def parameters(self) -> list[Tensor]:
        """Parameters of the own layers."""
        return [p for m in self.own.values() for p in m.parameters()]

    def new_trajectory(self, now: Pass, shape: Sequence[int], dtype: torch.dtype) -> BlockTrajectory:
        """States and graphs of a forward sweep."""
        assert self.layout is not None
        own = range(self.sweeps.lo, self.sweeps.hi)
        device = next((p.device for p in self.parameters()), torch.device("cpu"))
        graphs = LayerGraphs(
            self.own, own, now, self.layout, residual=self.residual, h=self.h, offset=self.offset,
            keeps=not self.checkpoint,
        )  # fmt: skip
        return BlockTrajectory(torch.zeros((len(own) + 1, *shape), dtype=dtype, device=device), graphs)

    def run_forward(
        self, trajectory: BlockTrajectory, first: Tensor | None, theta: Sequence[Tensor], trains: bool, **how: Any
    ) -> SolveResult:
        """The forward sweep (collective)."""
        result = self.sweeps.forward(self.own, first, trajectory, trains=trains, **how)
        size = trajectory.U.numel() * trajectory.U.element_size()
        graphs = trajectory.graphs.graph_bytes * (len(trajectory.graphs.own) if not self.checkpoint else 1)
        self.bytes = {"states": size, "graphs": graphs if trains else 0}
        return result

    def run_backward(self, trajectory: BlockTrajectory, last: Tensor | None, **how: Any) -> tuple:
        """The backward sweep (collective)."""
        graphs = trajectory.graphs
        result, L, first, extra = self.sweeps.backward(trajectory, last, **how)
        gradients = []
        for n in graphs.own:
            found = graphs.parameter_gradients.get(n, {})
            gradients += [found.get(name) if p.requires_grad else None for name, p in graphs.parameters[n].items()]
        graphs.parameter_gradients.clear()
        sums = dict(zip(map(id, graphs.extra_tensors), extra, strict=True))
        return result, L, first, gradients, [sums.get(id(t)) for t in graphs.all_extra_tensors]

    def last_state(self, trajectory: BlockTrajectory) -> Tensor:
        """A copy of the last own state."""
        return trajectory.U[-1].clone()


class _Some:
    """A sequence of which only some entries are known."""

    def __init__(self, count: int, known: Mapping[int, nn.Module]):
        self._count, self._known = count, dict(known)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, n: int) -> nn.Module:
        return self._known[n]

"""A residual network of layers of one fast kind whose layers are distributed over MPI ranks.

Every rank runs the same ordinary training loop: it calls the network with its group's batch, gets the logits, computes
the loss, calls ``backward`` and steps an optimiser over ``network.parameters()``, which are those of its own layers
(with the opening layer on the first rank, the classification layer on the last). Forward and backward propagation are
MGRIT sweeps inside one ``autograd.Function`` (:mod:`pint_fem.resnet.parallel`).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from pint_fem.all_at_once.stopping import SolveResult
from pint_fem.capacity import require_memory
from pint_fem.collective import collectively, require_same
from pint_fem.errors import InputError
from pint_fem.mgrit.options import MGRITOptions
from pint_fem.resnet.grid import Grid
from pint_fem.resnet.iterations import Adaptive, Iterations
from pint_fem.resnet.layers import Layer
from pint_fem.resnet.parallel.module import LayerParallelModule
from pint_fem.resnet.parallel.parameters import require_unshared
from pint_fem.resnet.parallel.passes import Pass
from pint_fem.resnet.parallel.stage import Stage
from pint_fem.resnet.sweeps import LayerSweeps, Trajectory

__all__ = ["LayerParallelResNet"]


class StackedLayers(Stage):
    """Layers of one kind with stacked parameters.

    Parameters
    ----------
    theta
        Stacked parameters of the own layers.
    layer, nlayers, h, options
        As for :class:`~pint_fem.resnet.sweeps.LayerSweeps`.
    grid, **iterations
        As for :class:`~pint_fem.resnet.parallel.stage.Stage`.
    """

    def __init__(
        self, layer: Layer, nlayers: int, h: float, grid: Grid, options: Any, coarse_layers: str, **iterations: Any
    ):
        super().__init__(grid, **iterations)
        self.layer, self.nlayers, self.h, self.options, self.coarse_layers = layer, nlayers, h, options, coarse_layers
        self.theta: Any = {}

    def make_sweeps(self) -> LayerSweeps:
        """The solvers of the sweeps of these layers, without communication."""
        return LayerSweeps(
            self.layer, self.nlayers, self.h, self.grid, options=self.options, coarse_layers=self.coarse_layers
        )

    def parameters(self) -> list[torch.Tensor]:
        """Stacked parameters of the own layers, in the order of ``layer.shapes``."""
        return [self.theta[name] for name in self.layer.shapes]

    def new_trajectory(self, now: Pass, shape: Sequence[int], dtype: torch.dtype) -> Trajectory:
        """Arrays of a forward sweep, from the pool."""
        return self.sweeps.trajectory(shape, np.float64 if dtype == torch.float64 else np.float32)

    def run_forward(
        self,
        trajectory: Trajectory,
        first: torch.Tensor | None,
        theta: Sequence[torch.Tensor],
        trains: bool,
        **how: Any,
    ) -> SolveResult:
        """The forward sweep (collective)."""
        u0 = None if first is None else np.ascontiguousarray(first.numpy())
        return self.sweeps.forward(theta, u0, trajectory, slopes=trains, **how)

    def run_backward(self, trajectory: Trajectory, last: torch.Tensor | None, **how: Any) -> tuple:
        """The backward sweep (collective)."""
        result, L, gradients = self.sweeps.backward(trajectory, None if last is None else last.numpy(), **how)
        first = torch.from_numpy(L[-1].copy()) if self.grid.is_first else None
        return result, L, first, gradients, []

    def last_state(self, trajectory: Trajectory) -> torch.Tensor:
        """A copy of the last own state."""
        return torch.from_numpy(trajectory.U[-1].copy())

    def release(self, trajectory: Trajectory) -> None:
        """Return the arrays of a trajectory to the pool."""
        self.sweeps.recycle(trajectory)


class LayerParallelResNet(LayerParallelModule):
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
    nonfinite
        ``"raise"``: derivatives that are not finite raise ``SolverFailure`` on all ranks. ``"gradient"``: all gradients
        are NaN on all ranks where any is not finite on one, as gradient scalers of torch expect.
    coarse_layers
        ``"mean"``: a layer of a coarse level has the mean parameters of the layers of its interval. ``"first"``: it is
        the first of them, as in arXiv:1812.04352. Default: the mean where the activation is an odd function but for a
        constant, as tanh and sigmoid, whose mean over random parameters it then has; otherwise (relu) the first.

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
        nonfinite: str = "raise",
        coarse_layers: str | None = None,
    ):
        super().__init__(grid, seed=seed, nonfinite=nonfinite)
        grid = self.grid
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
            nonfinite=nonfinite,
            coarse_layers=coarse_layers,
        )
        if coarse_layers not in (None, "mean", "first"):
            raise InputError(f"coarse_layers {coarse_layers!r}: give 'mean' or 'first'")
        if coarse_layers is None:
            coarse_layers = "mean" if _is_odd(layer.activation.function) else "first"
        if not isinstance(nlayers, int) or nlayers < 1:
            raise InputError(f"nlayers = {nlayers!r}: give a positive whole number")
        if not final_time > 0:
            raise InputError(f"final_time = {final_time!r}: give a positive number")
        if dtype not in (torch.float64, torch.float32):
            raise InputError(f"dtype {dtype}: give torch.float64 or torch.float32")
        self.layer, self.nlayers, self.h = layer, nlayers, final_time / nlayers
        self.final_time, self.evaluation = final_time, evaluation
        own = -(-nlayers // grid.layer_size) * sum(math.prod(shape) for shape in layer.shapes.values())
        require_memory(
            grid.comm,
            2 * own * dtype.itemsize,
            f"parameters and gradients of {nlayers} layers",
            "give fewer or narrower layers, or more machines",
        )
        if not isinstance(mgrit, MGRITOptions):
            mgrit = {"on_divergence": "serial", **(mgrit or {})}
        self._stage = StackedLayers(
            layer, nlayers, self.h, grid, mgrit, coarse_layers, forward_iterations=forward_iterations,
            backward_iterations=backward_iterations, adaptive=adaptive, evaluation=evaluation,
        )  # fmt: skip
        self.lo, self.hi = self.sweeps.lo, self.sweeps.hi
        initial = layer.initial(range(self.lo, self.hi), seed, dtype)
        frozen = layer.activation.frozen
        self.theta = nn.ParameterDict({name: nn.Parameter(p, name not in frozen) for name, p in initial.items()})
        collectively(grid.comm, "network", require_unshared, [("opening", opening), ("closing", closing)])
        self._set_ends(opening, closing)
        self.opening.to(dtype)
        self.closing.to(dtype)
        self._start_equal()

    @property
    def stages(self) -> Sequence[Stage]:
        """The one stage of all layers."""
        self._stage.theta = self.theta
        return (self._stage,)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the values, that of the layers' parameters: ``net.to(torch.float64)`` changes it."""
        return next(iter(self.theta.values())).dtype

    @property
    def stack(self) -> list[nn.Parameter]:
        """Stacked parameters of the own layers, in the order of ``layer.shapes``."""
        return [self.theta[name] for name in self.layer.shapes]

    @property
    def sweeps(self) -> LayerSweeps:
        """The solvers of the sweeps."""
        return self._stage.sweeps

    @property
    def forward_sweeps(self) -> Iterations:
        """Numbers of cycles of forward sweeps."""
        return self._stage.forward_sweeps

    @property
    def backward_sweeps(self) -> Iterations:
        """Numbers of cycles of backward sweeps."""
        return self._stage.backward_sweeps

    @property
    def results(self) -> dict[str, SolveResult]:
        """The last ``"forward"`` and ``"backward"`` result."""
        return self._stage.results

    @property
    def warm_starts(self) -> dict[tuple[str, Hashable], np.ndarray]:
        """C-points of the last sweeps by kind of sweep and name of the batch."""
        return self._stage.warm_starts

    def extra_repr(self) -> str:
        """Depth and own layers, for torch's ``repr`` of modules."""
        return f"{type(self.layer).__name__} layers {self.lo} to {self.hi - 1} of {self.nlayers}, T={self.final_time}"

    def _open(self, now: Pass, x: torch.Tensor) -> torch.Tensor:
        return self._call(now, self.opening, x.to(self.dtype) if x.is_floating_point() else x)

    def _to_state(self, number: int, x: torch.Tensor) -> tuple[torch.Tensor, int]:
        if not torch.is_tensor(x):
            raise InputError(f"the opening layer gives a {type(x).__name__}: layers of this kind take a tensor")
        if x.device.type != "cpu":
            raise InputError(
                f"the opening layer gives values on {x.device}: layers of this kind are computed on the processor; "
                "move the network and the batch there, or give LayerParallel blocks, which run on any device"
            )
        if self.dtype not in (torch.float64, torch.float32):
            raise InputError(f"a network of type {self.dtype}: layers of this kind take torch.float64 or torch.float32")
        self.layer.check_input(x)
        return self.layer.pack(x.to(self.dtype)), len(x)

    def _from_state(self, number: int, u: torch.Tensor, layout: int) -> torch.Tensor:
        return self.layer.unpack(u, layout)

    def _merged(self, on_ranks: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """The state of the whole network: parameters of the layers stacked."""
        merged = super()._merged(on_ranks)
        stacked = {name: torch.cat([own[name] for own in on_ranks]) for name in merged if name.startswith("theta.")}
        return {**merged, **stacked}

    def _own_part(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The part of a state of the whole network that belongs to this rank."""
        whole = lambda name, t: name.startswith("theta.") and torch.is_tensor(t) and len(t) == self.nlayers
        return {name: t[self.lo : self.hi] if whole(name, t) else t for name, t in super()._own_part(state).items()}


def _is_odd(function: Any) -> bool:
    """Whether a function is odd but for a constant."""
    z = torch.linspace(-2, 2, 9, dtype=torch.float64)
    try:
        with torch.no_grad():
            y = function(z)
    except (RuntimeError, TypeError):  # has parameters
        return False
    return torch.allclose(y - y[4], (y[4] - y).flip(0))

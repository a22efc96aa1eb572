r"""Networks of any residual blocks whose layers are distributed over MPI ranks.

Every layer is a module with parameters of its own: what a user does with the parameters of a torch network, learning
rates by layer, freezing, another first guess, works as there. The layers of a stage are the steps of one MGRIT
hierarchy; stages with other states are connected by transitions.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from pint_fem.collective import collectively, require_same
from pint_fem.digests import digest
from pint_fem.errors import FAILURES, InputError
from pint_fem.mgrit.options import MGRITOptions
from pint_fem.resnet.blocks.mean_layers import tensor_shapes
from pint_fem.resnet.blocks.own_layers import Repeat, layer_makers
from pint_fem.resnet.blocks.serial import SerialLayers
from pint_fem.resnet.blocks.stage import BlockStage
from pint_fem.resnet.grid import Grid
from pint_fem.resnet.iterations import Adaptive
from pint_fem.resnet.parallel.module import LayerParallelModule
from pint_fem.resnet.parallel.parameters import Elsewhere, require_unshared
from pint_fem.resnet.parallel.solvers import own_numbers
from pint_fem.resnet.parallel.stage import Stage
from pint_fem.resnet.parallel.states import StateLayout

__all__ = ["LayerParallel"]

Tensor = torch.Tensor


class LayerParallel(LayerParallelModule):
    r"""Opening layer, stages of residual layers :math:`u_{n+1} = u_n + h f_n(u_n)`, classification layer.

    Parameters
    ----------
    blocks
        The layers :math:`f_n`: modules whose output has their input's shape, as a list, or :class:`Repeat`, which makes
        those of a rank only; or a list of such lists, the stages. A layer is called with the state, a tensor or a tuple
        of tensors, and the extra inputs of the network.
    opening, closing
        Modules from a batch to the first state and from the last state to the output; default: neither. The first rank
        stores one, the last the other.
    transitions
        Modules between stages, one fewer than there are stages, stored on the last rank.
    residual
        ``True``: a layer is ``u + h f(u)``. ``False``: it is the module's own output, as of a transformer block with
        its own skip connections; coarse levels then step by ``u + m (f(u) - u)``.
    h
        Step size, with ``residual``.
    grid
        :class:`Grid` data x layers; default: all ranks in the layers.
    forward_iterations, backward_iterations
        Number of cycles of a training sweep; ``None``: up to ``rtol``.
    adaptive
        :class:`Adaptive` rule for the number of cycles, which begins with the given ones.
    evaluation
        Sweeps without gradients: ``"exact"`` takes sequential steps, ``"same"`` the cycles of the training.
    mgrit
        Options of the solver (:mod:`pint_fem.mgrit`): ``levels``, ``coarsening``, ``relax``, ``rtol`` ..., for all
        stages, or a list with those of each. Unless given, ``rtol`` is 1e-12 (float64), 1e-6 (float32) or 1.3 times the
        unit round-off of a shorter type, that of autocast included; sweeps up to the tolerance that do not converge are
        repeated by sequential steps.
    seed
        Of random numbers in the network (dropout).
    batched
        Whether the layers that a relaxation evaluates together are one batched call (``torch.vmap``). ``"auto"``: where
        the first pass measures that this is faster. A measurement may turn out otherwise in the next run, whose values
        then differ by round-off: give ``False``, or set torch's deterministic algorithms, for runs that are to be
        repeated bit by bit; values are then bitwise the same for every number of layer ranks as well.
    checkpoint
        Whether graphs of layers are made again in the backward sweep instead of being kept: memory of one layer's
        graph instead of all own ones', for one more evaluation each time.
    nonfinite
        ``"raise"``: derivatives that are not finite raise ``SolverFailure`` on all ranks. ``"gradient"``: all gradients
        are NaN on all ranks where any is not finite on one, as gradient scalers of torch expect.
    coarse_layers
        ``"mean"``: a layer of a coarse level has the mean parameters of the layers of its interval, where all layers of
        the stage have parameters of the same names and shapes. ``"first"``: it is the first of them, as in
        arXiv:1812.04352; much less accurate where parameters differ from layer to layer.

    Attributes
    ----------
    layers : ModuleList
        All layers in their order; an empty module stands for those of other ranks.
    results : list of dict
        For each stage the last ``"forward"`` and ``"backward"`` :class:`~pint_fem.mgrit.SolveResult`.

    Raises
    ------
    InputError
        On every rank, on arguments that are refused or differ between ranks.

    Examples
    --------
    ::

        block = lambda: nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU())
        net = LayerParallel([block() for _ in range(64)], opening=nn.Conv2d(1, 8, 3, padding=1),
                            closing=nn.Sequential(nn.Flatten(), nn.Linear(8 * 28 * 28, 10)), h=0.1)
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module] | Repeat | Sequence[Sequence[nn.Module] | Repeat],
        *,
        opening: nn.Module | None = None,
        closing: nn.Module | None = None,
        transitions: Sequence[nn.Module] = (),
        residual: bool = True,
        h: float = 1.0,
        grid: Grid | None = None,
        forward_iterations: int | None = None,
        backward_iterations: int | None = None,
        adaptive: Adaptive | None = None,
        evaluation: str = "exact",
        mgrit: MGRITOptions | Mapping | Sequence[MGRITOptions | Mapping] | None = None,
        seed: int = 0,
        batched: str | bool = "auto",
        checkpoint: bool = False,
        nonfinite: str = "raise",
        coarse_layers: str = "mean",
    ):
        super().__init__(grid, seed=seed, nonfinite=nonfinite)
        grid = self.grid
        stages = collectively(grid.comm, "blocks", _stages, blocks)
        require_same(
            grid.comm, layers=[len(s) for s in stages], transitions=len(transitions), residual=residual, h=h,
            forward_iterations=forward_iterations, backward_iterations=backward_iterations, adaptive=adaptive,
            evaluation=evaluation, mgrit=mgrit, seed=seed, batched=batched, checkpoint=checkpoint, nonfinite=nonfinite,
            coarse_layers=coarse_layers,
        )  # fmt: skip
        if coarse_layers not in ("mean", "first"):
            raise InputError(f"coarse_layers {coarse_layers!r}: give 'mean' or 'first'")
        if len(transitions) != len(stages) - 1:
            raise InputError(
                f"{len(transitions)} transitions for {len(stages)} stages: give one module between each two stages"
            )
        if not isinstance(h, (int, float)) or not h > 0:
            raise InputError(f"h = {h!r}: give a positive number")
        if h != 1.0 and not residual:
            raise InputError(f"h = {h!r} with residual=False: a layer is the module's own output; leave h out")
        options = list(mgrit) if isinstance(mgrit, (list, tuple)) else [mgrit] * len(stages)
        if len(options) != len(stages):
            raise InputError(f"{len(options)} sets of mgrit options for {len(stages)} stages: give one for each")
        self.residual, self.h, self.checkpoint = residual, float(h), checkpoint
        self._stages: list[BlockStage] = []
        ends = [("opening", opening), ("closing", closing)]
        parts = [(name, m) for name, m in ends if m is not None]
        parts += [(f"transition {i}", t) for i, t in enumerate(transitions, 1)]
        own, offset = [], 0
        for number, (layers, given) in enumerate(zip(stages, options, strict=True)):
            stage = BlockStage(
                layers, grid, offset=offset, options=given, residual=residual, h=float(h), batched=batched,
                checkpoint=checkpoint, forward_iterations=forward_iterations, backward_iterations=backward_iterations,
                adaptive=adaptive, evaluation=evaluation, name=f"stage {number}" if len(stages) > 1 else "the layers",
            )  # fmt: skip
            made = collectively(grid.comm, "layers", _own_layers, layers, own_numbers(len(layers), grid), offset)
            shapes = {digest(tensor_shapes(m)) for m in made.values()}
            stage.has_means = coarse_layers == "mean" and len(set().union(*grid.layer_comm.allgather(shapes))) == 1
            collectively(grid.comm, "layers", stage.forget_others)
            own += [made.get(n, Elsewhere()) for n in range(len(layers))]
            self._stages.append(stage)
            seen = made.items() if isinstance(layers, Repeat) else enumerate(layers)
            parts += [(f"layer {offset + n}", m) for n, m in seen]
            offset += len(layers)
        collectively(grid.comm, "blocks", require_unshared, parts)
        self.layers = nn.ModuleList(own)
        self._set_ends(opening or nn.Identity(), closing or nn.Identity(), transitions)
        self._start_equal()

    # -- stages --------------------------------------------------------------------------------------------------------
    @property
    def stages(self) -> Sequence[Stage]:
        """The stages, from the first to the last."""
        for stage in self._stages:
            own = range(stage.sweeps.lo, stage.sweeps.hi)
            stage.own = {n: self.layers[stage.offset + n] for n in own}
        return self._stages

    @property
    def results(self) -> list[dict]:
        """For each stage the last ``"forward"`` and ``"backward"`` result."""
        return [stage.results for stage in self._stages]

    @property
    def nlayers(self) -> int:
        """Number of layers of all stages."""
        return len(self.layers)

    @property
    def batching(self) -> list[str]:
        """For each stage whether layers are evaluated in batched calls, and why."""
        return [stage.batching.reason for stage in self._stages]

    def extra_repr(self) -> str:
        """Depth and own layers, for torch's ``repr`` of modules."""
        parts = [f"{s.offset + s.sweeps.lo} to {s.offset + s.sweeps.hi - 1}" for s in self._stages]
        return f"layers {', '.join(parts)} of {self.nlayers}, {'u + h f(u)' if self.residual else 'f(u)'}"

    def activation_memory(self) -> dict[str, int]:
        """Bytes that the last pass keeps on this rank until its backward sweep: ``"states"`` at the points of the own
        layers, and ``"graphs"`` of autograd, estimated from one layer's (of a single layer with ``checkpoint``).
        """
        return {kind: sum(s.bytes.get(kind, 0) for s in self._stages) for kind in ("states", "graphs")}

    # -- states --------------------------------------------------------------------------------------------------------
    def _to_state(self, number: int, x: Any) -> tuple[Tensor, StateLayout]:
        layout = StateLayout.of(x)
        if layout.dtype in (torch.float16, torch.bfloat16) and torch.is_autocast_enabled(_kind(x)):
            layout = layout._replace(dtype=torch.float32)  # as sums with float32 become in plain torch
        return layout.pack(x), layout

    def _from_state(self, number: int, u: Tensor, layout: StateLayout) -> Any:
        return layout.unpack(u)

    def _set_layout(self, stage: Stage, layout: Any) -> None:
        stage.layout = layout  # type: ignore[attr-defined]

    # -- copies --------------------------------------------------------------------------------------------------------
    def _places(self) -> Sequence[tuple[int, nn.Module]]:
        layers = [(1 + n, m) for n, m in enumerate(self.layers) if not isinstance(m, Elsewhere)]
        return [*super()._places(), *layers]

    def serial_copy(self) -> SerialLayers:
        """The same network in plain torch, with the present parameters and the same random numbers, on every rank
        (collective).

        Raises
        ------
        InputError
            On every rank, if a module cannot be pickled, as the ranks send theirs to each other.
        """
        parts = {name: m for name, m in self.named_children() if name in ("opening", "closing")}
        mine = {
            "ends": {name: m for name, m in parts.items() if not isinstance(m, Elsewhere)},
            "transitions": None if any(isinstance(t, Elsewhere) for t in self.transitions) else self.transitions,
            "layers": {n: m for n, m in enumerate(self.layers) if not isinstance(m, Elsewhere)},
        }
        failure, comm = None, self.grid.layer_comm
        try:
            data = pickle.dumps(mine) if comm.size > 1 else b""
        except FAILURES as error:  # each module has its own reason
            failure = InputError(
                f"a layer cannot be sent to other ranks: {error}; define its class in a module, or load "
                "full_state_dict into a network of your own"
            )
        self._agree("copy of the network", failure)
        every = [mine] if comm.size == 1 else [pickle.loads(each) for each in comm.allgather(data)]
        layers = {n: m for each in every for n, m in each["layers"].items()}
        ends = {name: m for each in every for name, m in each["ends"].items()}
        counts = [stage.count for stage in self._stages]
        return SerialLayers(
            [layers[n] for n in range(self.nlayers)], counts, ends["opening"], ends["closing"],
            every[-1]["transitions"], residual=self.residual, h=self.h, seed=self.seed, passes=self.passes,
        ).train(self.training)  # fmt: skip


def _kind(x: Any) -> str:
    """Type of the device of a state."""
    return (x[0] if isinstance(x, (tuple, list)) else x).device.type


def _stages(blocks: Any) -> list[Sequence[nn.Module]]:
    """The stages, each a sequence of layers."""
    if isinstance(blocks, (Repeat, nn.ModuleList, nn.Sequential)):
        several = [blocks]
    else:
        given = list(blocks) if isinstance(blocks, (list, tuple)) else [blocks]
        nested = [isinstance(b, (list, tuple, Repeat, nn.ModuleList)) for b in given]
        if any(nested) and not all(nested):
            raise InputError("blocks: give modules, or stages that are lists of modules, not both")
        several = given if any(nested) else [blocks]
    return [layer_makers(s, f"stage {i}" if len(several) > 1 else "blocks") for i, s in enumerate(several)]


def _own_layers(layers: Sequence[nn.Module], own: range, offset: int) -> dict[int, nn.Module]:
    """The own layers of a stage, copied unless they are made."""
    made = {n: layers[n] if isinstance(layers, Repeat) else copy.deepcopy(layers[n]) for n in own}
    for n, module in made.items():
        if any(is_lazy(t) for t in (*module.parameters(), *module.buffers())):
            raise InputError(
                f"layer {offset + n} ({type(module).__name__}) has parameters without a shape: give sizes, such "
                "as Linear(8, 8), or call lazy modules with a state before"
            )
    return made

"""Base of the networks whose layers are distributed: from a batch to the output and back, on all ranks alike.

Every rank runs the same ordinary training loop. The first rank has the opening layer, the last one the classification
layer and what is between stages; each rank has, and updates, the residual layers of its own. Forward and backward
propagation are MGRIT sweeps inside functions of autograd.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from pint_fem.collective import all_ranks, raise_collectively
from pint_fem.errors import FAILURES, InputError
from pint_fem.resnet.grid import Grid
from pint_fem.resnet.parallel.agreement import Agreement, CollectiveBackward, batch_digest
from pint_fem.resnet.parallel.random_numbers import devices_of, mixed_seed, own_random_numbers, seed_generators
from pint_fem.resnet.parallel.stage import Propagation, Stage, stack_means
from pint_fem.resnet.parallel.transport import InputDerivative, MeanOfGroups, OutputOfLast, ToFirst

__all__ = ["Elsewhere", "LayerParallelModule", "Pass"]

Tensor = torch.Tensor


class Elsewhere(nn.Module):
    """Stands for a module that another rank has: without parameters, so that loops over modules work on all ranks."""

    def forward(self, *_: Any) -> Any:
        """Refuse the call.

        Raises
        ------
        InputError
            Always.
        """
        raise InputError("this module is on another rank: call the whole network, on all ranks")


@dataclass(eq=False)
class Pass:
    """One pass of a batch through a network, with what all ranks have agreed upon.

    Attributes
    ----------
    network : LayerParallelModule
    number : int
        Of the pass.
    trains : bool
        Whether a backward sweep may follow.
    shares : bool
        Whether the data groups take part together.
    batch : Hashable
        Name of the batch, or ``None``.
    extra : tuple
        Extra inputs of the layers.
    autocast : tuple or None
        Type of device and of values of torch's autocast, where it is on.
    """

    network: LayerParallelModule
    number: int
    trains: bool = False
    shares: bool = False
    batch: Hashable = None
    extra: tuple = ()
    autocast: tuple[str, torch.dtype] | None = None
    devices: list[torch.device] = field(default_factory=list)

    @property
    def grid(self) -> Grid:
        """Process grid of the network."""
        return self.network.grid

    @property
    def nonfinite(self) -> str:
        """What derivatives that are not finite become, ``"raise"`` or ``"gradient"``."""
        return self.network.nonfinite

    def seed(self, place: int) -> None:
        """Seed torch's generators for a part of the network: 0 is the opening layer, ``1 + n`` layer ``n``."""
        seed_generators(mixed_seed(self.network.seed, self.number, place), self.devices)

    @contextmanager
    def as_in_forward(self) -> Iterator[None]:
        """Autocast as it was in the forward pass, for what the backward pass evaluates again."""
        if self.autocast is None:
            yield
            return
        kind, dtype = self.autocast
        with torch.autocast(kind, dtype):
            yield

    def check_backward(self) -> None:
        """Agree on the derivative that comes next (collective); refuses derivatives of derivatives.

        Raises
        ------
        InputError
            On every rank.
        """
        self.network.collective.check(
            shares=self.shares, **{"number of the pass": self.number, "create_graph": torch.is_grad_enabled()}
        )
        if torch.is_grad_enabled():
            raise InputError(
                "create_graph=True: a layer-parallel network has first derivatives only; for Hessian actions give a "
                "network of Dense or Convolution layers to TrainingProblem"
            )

    def all_agree(self, condition: bool) -> bool:
        """Whether a condition holds on all ranks that share the layers, and on all groups if they take part."""
        return all_ranks(self.grid.comm if self.shares else self.grid.layer_comm, condition)

    def mean_over_data(self, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Means over the data groups, if they take part."""
        return stack_means(self.grid, gradients) if self.shares else list(gradients)


class LayerParallelModule(nn.Module):
    """Base of the layer-parallel networks.

    Parameters
    ----------
    grid
        :class:`Grid` data x layers; default: all ranks in the layers.
    seed
        Of random numbers in the network.
    nonfinite
        ``"raise"``: derivatives that are not finite raise ``SolverFailure`` on all ranks. ``"gradient"``: all gradients
        are NaN on all ranks where any is not finite on one, as gradient scalers of torch expect.

    Attributes
    ----------
    opening, closing : Module
        On the first and the last rank; :class:`Elsewhere` on the others.
    transitions : ModuleList
        Between stages, on the last rank.
    collective : CollectiveBackward
        ``net.collective.backward(loss)`` is ``loss.backward()`` where a loss that fails on one rank fails on all.
    passes : int
        Number of passes with random numbers so far.
    """

    opening: nn.Module
    closing: nn.Module
    transitions: nn.ModuleList

    def __init__(self, grid: Grid | None, *, seed: int, nonfinite: str = "raise"):
        super().__init__()
        self.grid = grid or Grid()
        if nonfinite not in ("raise", "gradient"):
            raise InputError(f"nonfinite {nonfinite!r}: give 'raise' or 'gradient'")
        self.seed, self.nonfinite, self.passes = seed, nonfinite, 0
        self._agree = Agreement(self.grid.layer_comm, self.grid.comm)
        self.collective = CollectiveBackward(self._agree)

    def _set_ends(self, opening: nn.Module, closing: nn.Module, transitions: Sequence[nn.Module] = ()) -> None:
        """Keep the modules that this rank has."""
        grid = self.grid
        self.opening = copy.deepcopy(opening) if grid.is_first else Elsewhere()
        self.closing = copy.deepcopy(closing) if grid.is_last else Elsewhere()
        self.transitions = nn.ModuleList(copy.deepcopy(t) if grid.is_last else Elsewhere() for t in transitions)

    # -- what a subclass has -------------------------------------------------------------------------------------------
    @property
    def stages(self) -> Sequence[Stage]:
        """The stages, from the first to the last."""
        raise NotImplementedError

    def _to_state(self, number: int, x: Any) -> tuple[Tensor, Any]:
        """The array of the first state of a stage, and what is needed to come back from the last."""
        raise NotImplementedError

    def _from_state(self, number: int, u: Tensor, layout: Any) -> Any:
        """What follows a stage is given, from the array of its last state."""
        raise NotImplementedError

    def _open(self, now: Pass, x: Any) -> Any:
        """Output of the opening layer."""
        return self._call(now, self.opening, x)

    # -- a pass --------------------------------------------------------------------------------------------------------
    @torch.compiler.disable
    def forward(self, x: Any, *extra: Any, batch: Hashable = None) -> Any:
        """Output of the network for a batch, on every rank (collective).

        Parameters
        ----------
        x
            The batch, the same on all ranks that share the layers: what the opening layer takes, a tensor or a nested
            structure of tensors.
        *extra
            Further inputs of the residual layers, the same on all ranks that share the layers.
        batch
            Name of the batch: in training, sweeps then start from the C-points of the last ones with this name.

        Returns
        -------
        Tensor or nested structure of tensors
            The output, the same on all ranks that share the layers.

        Raises
        ------
        InputError
            On every rank, where the batch does not fit the opening layer or differs between ranks, or where ranks are
            in different calls.
        SolverFailure
            On every rank, where values are not finite.
        Exception
            What the opening or the classification layer raises: as it is on its rank, ``RuntimeError`` on the others.
        """
        devices = devices_of(self.parameters())
        with own_random_numbers(devices):
            return self._forward(x, extra, batch, devices)

    def _forward(self, x: Any, extra: tuple, batch: Hashable, devices: list[torch.device]) -> Any:
        grid, grads = self.grid, torch.is_grad_enabled()
        shares = self.training and grads and grid.data_size > 1
        now = Pass(self, self.passes, shares=shares, batch=batch, devices=devices)
        state = layout = failure = None
        digest, inputs, structure, wanted = 0, [], None, ()
        try:
            now.autocast = _autocast(devices)
            leaves, structure = tree_flatten((x, extra))
            wanted = tuple(i for i, t in enumerate(leaves) if grads and torch.is_tensor(t) and t.requires_grad)
            digest = batch_digest((x, extra)) if grid.layer_size > 1 else 0
            inputs = [leaves[i] for i in wanted]
            if inputs:
                anchor = torch.zeros(0, requires_grad=True)
                inputs = list(InputDerivative.apply(now, anchor, *inputs))
                for i, t in zip(wanted, inputs, strict=True):
                    leaves[i] = t
                x, extra = tree_unflatten(leaves, structure)
            now.extra = extra
            if grid.is_first:
                now.seed(0)
                state, layout = self._to_state(0, self._open(now, x))
        except FAILURES as error:
            failure = error
        facts = self._agree(
            "forward pass", failure, where="opening layer", shares=shares,
            same={"training": self.training, "gradients enabled": grads, "autocast": now.autocast, "batch": batch,
                  "inputs with derivatives": wanted, "number of the pass": self.passes},
            digest=digest, size=_size(x),
            requires_grad=grads and (any(p.requires_grad for p in self.parameters())
                                     or (state is not None and state.requires_grad) or bool(wanted)),
            counts=any(m.training for m in self.modules()),
            shape=None if state is None else (tuple(state.shape), state.dtype), layout=layout,
        )  # fmt: skip
        self._require_same_batch(facts, shares)
        now.trains = any(f["requires_grad"] for f in facts)  # frozen parameters of one rank do not keep the others back
        if any(f["counts"] for f in facts):
            self.passes += 1
        anchor = torch.zeros(0, requires_grad=now.trains)
        device = next((p.device for p in self.parameters()), torch.device("cpu"))
        if state is None:
            state = torch.zeros(0, dtype=facts[0]["shape"][1], device=device)
        end = state
        for number, stage in enumerate(self.stages):
            if number:
                state, facts = self._between(now, number, end, layout, device)
            shape, dtype = facts[0]["shape"]
            layout = facts[0]["layout"]
            leaves = [t for t in tree_flatten(now.extra)[0] if torch.is_tensor(t)]
            end = Propagation.apply(
                stage, now, shape, dtype, anchor, state, (len(inputs), len(leaves)), *inputs, *leaves,
                *stage.parameters(),
            )  # fmt: skip
        return self._close(now, end, layout)

    def _require_same_batch(self, facts: Sequence[Mapping[str, Any]], shares: bool) -> None:
        """Refuse batches that differ between the ranks that share the layers (collective)."""
        problem = None
        sizes = [f["size"] for f in facts]
        if len(set(sizes)) > 1:
            problem = InputError(f"batches of {sizes} on the ranks that share the layers: give all the same")
        elif other := [rank for rank, f in enumerate(facts) if f["digest"] != facts[0]["digest"]]:
            problem = InputError(
                f"batches of other values or types on layer rank {other[0]} than on layer rank 0, which share the "
                "layers: give both the same, for instance by shared_loader, or by a generator of its own for shuffling"
            )
        if problem is not None or shares:
            raise_collectively(self.grid.comm if shares else self.grid.layer_comm, problem)

    def _between(self, now: Pass, number: int, end: Tensor, layout: Any, device: torch.device) -> tuple[Tensor, Any]:
        """The first state of a stage, from the last one of the stage before it."""
        grid, state, after, failure = self.grid, None, None, None
        if grid.is_last:
            try:
                now.seed(-number)
                out = self._call(now, self.transitions[number - 1], self._from_state(number - 1, end, layout))
                state, after = self._to_state(number, out)
            except FAILURES as error:
                failure = error
        shape = None if state is None else (tuple(state.shape), state.dtype)
        facts = self._agree(f"transition {number}", failure, shares=now.shares, shape=shape, layout=after)[-1:]
        shape, dtype = facts[0]["shape"]
        return ToFirst.apply(end if state is None else state, now, shape, dtype, device), facts

    def _close(self, now: Pass, end: Tensor, layout: Any) -> Any:
        """The output of the network on all ranks, from the last state."""
        grid, leaves, structure, failure = self.grid, [], None, None
        if grid.is_last:
            try:
                now.seed(1 << 62)
                out = self._call(now, self.closing, self._from_state(len(self.stages) - 1, end, layout))
                leaves, spec = tree_flatten(out)
                structure = tree_unflatten(list(range(len(leaves))), spec)  # a plain object, to be sent
            except FAILURES as error:
                failure = error
        specs = [(tuple(t.shape), t.dtype) if torch.is_tensor(t) else t for t in leaves]
        facts = self._agree(
            "classification layer", failure, shares=now.shares, specs=specs, structure=structure
        )[-1]  # fmt: skip
        specs, structure = facts["specs"], facts["structure"]
        tensors = [
            i for i, s in enumerate(specs) if isinstance(s, tuple) and len(s) == 2 and isinstance(s[1], torch.dtype)
        ]
        given = [leaves[i] for i in tensors] if grid.is_last else []
        every = list(specs)
        for i, t in zip(tensors, OutputOfLast.apply(now, end, [specs[i] for i in tensors], *given), strict=True):
            every[i] = t
        if now.shares:
            self._average_buffers()
        return tree_unflatten(every, tree_flatten(structure)[1])

    # -- data groups ---------------------------------------------------------------------------------------------------
    def _call(self, now: Pass, module: nn.Module, x: Any) -> Any:
        """Output of a module at an end of the network, whose gradients are means over the data groups that take part
        in the pass, in one message.
        """
        theta = {name: p for name, p in module.named_parameters() if p.requires_grad} if now.shares else {}
        if not theta:
            return module(x)
        means = dict(zip(theta, MeanOfGroups.apply(now, *theta.values()), strict=True))
        return torch.func.functional_call(module, means, (x,))

    def _average_buffers(self) -> None:
        """Replace buffers of floating-point values by their means over the data groups (collective)."""
        buffers = [b for b in self.buffers() if b.is_floating_point()]
        with torch.no_grad():
            for b, mean in zip(buffers, stack_means(self.grid, buffers), strict=True):
                b.copy_(mean)

    def _start_equal(self) -> None:
        """Give all data groups the parameters and buffers of the first (collective)."""
        if self.grid.data_size > 1:
            with torch.no_grad():
                for t in (*self.parameters(), *self.buffers()):
                    values = t.detach().cpu().contiguous()
                    self.grid.data_comm.Bcast(values.reshape(-1).view(torch.uint8).numpy(), root=0)
                    t.copy_(values)

    # -- what depends on the parameters of all ranks -------------------------------------------------------------------
    def parameter_count(self, *, trainable: bool = False) -> int:
        """Number of parameters of the whole network (collective); ``trainable``: of those with gradients alone."""
        own = sum(p.numel() for p in self.parameters() if p.requires_grad or not trainable)
        return self.grid.layer_comm.allreduce(own)

    def gradient_norm(self, norm_type: float = 2.0) -> Tensor:
        """Norm of the gradients of all parameters of the network, the same on all ranks (collective)."""
        own = [p.grad for p in self.parameters() if p.grad is not None]
        norms = torch.stack([torch.linalg.vector_norm(g.double(), norm_type) for g in own]) if own else torch.zeros(0)
        on_ranks = self.grid.layer_comm.allgather(
            torch.linalg.vector_norm(norms.double(), norm_type).item() if own else 0.0
        )
        return torch.linalg.vector_norm(torch.tensor(on_ranks, dtype=torch.float64), norm_type)

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0, *, error_if_nonfinite: bool = False) -> Tensor:
        """``torch.nn.utils.clip_grad_norm_`` with the norm over the parameters of all ranks (collective).

        Parameters
        ----------
        max_norm, norm_type, error_if_nonfinite
            As in torch.

        Returns
        -------
        Tensor
            The norm before, the same on all ranks.

        Raises
        ------
        RuntimeError
            On every rank, if the norm is not finite and ``error_if_nonfinite`` is set.
        """
        self._agree("clipping of gradients", same={"max_norm": float(max_norm), "norm_type": float(norm_type)})
        total = self.gradient_norm(norm_type)
        if error_if_nonfinite and not torch.isfinite(total):
            raise RuntimeError(f"the norm of order {norm_type} of the gradients is {total.item()}: nothing was clipped")
        factor = min(1.0, float(max_norm) / (total.item() + 1e-6)) if not torch.isnan(total) else float("nan")
        if factor != 1.0:
            with torch.no_grad():
                for p in self.parameters():
                    if p.grad is not None:
                        p.grad.mul_(factor)
        return total

    def full_state_dict(self) -> dict[str, Tensor]:
        """Parameters and buffers of all layers, on every rank (collective): what the serial copy loads."""
        own = {name: t.detach().cpu() for name, t in self.state_dict().items()}
        self._agree("gathering of parameters")
        return self._merged(self.grid.layer_comm.allgather(own))

    def _merged(self, on_ranks: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The state of the whole network from those of the ranks that share the layers."""
        return {name: t for own in on_ranks for name, t in own.items()}

    def _own_part(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The part of a state of the whole network that belongs to this rank."""
        own = self.state_dict().keys()
        layers = ("opening.", "closing.", "layers.", "transitions.")
        return {name: t for name, t in state.items() if name in own or not name.startswith(layers)}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load the state of this rank or, as :meth:`full_state_dict` and the serial copy have it, of all ranks."""
        return super().load_state_dict(self._own_part(state_dict), strict=strict, assign=assign)

    # -- copies --------------------------------------------------------------------------------------------------------
    def __getstate__(self) -> dict:
        """Without what communicates."""
        return {**self.__dict__, "_agree": None, "collective": None}

    def __setstate__(self, state: dict) -> None:
        """Communicate on the grid."""
        super().__setstate__(state)
        self._agree = Agreement(self.grid.layer_comm, self.grid.comm)
        self.collective = CollectiveBackward(self._agree)

    def __deepcopy__(self, memo: dict) -> LayerParallelModule:
        """A network with copied parameters on the same ranks."""
        out = self.__class__.__new__(self.__class__)
        memo[id(self)] = out
        out.__setstate__({name: copy.deepcopy(value, memo) for name, value in self.__getstate__().items()})
        return out

    # -- invalidation --------------------------------------------------------------------------------------------------
    def invalidate(self) -> None:
        """Discard the warm starts of all batches."""
        for stage in self.stages:
            stage.warm_starts.clear()

    @property
    def serial(self) -> bool:
        """Whether sweeps take sequential steps instead of MGRIT cycles; can be set."""
        return all(s.forward_sweeps.serial and s.backward_sweeps.serial for s in self.stages)

    @serial.setter
    def serial(self, value: bool) -> None:
        for s in self.stages:
            s.forward_sweeps.serial = s.backward_sweeps.serial = bool(value)


def _size(x: Any) -> int:
    """Number of samples of a batch; 0 where it has no length."""
    first = next((t for t in tree_flatten(x)[0] if torch.is_tensor(t)), None)
    return len(first) if first is not None and first.ndim else 0


def _autocast(devices: Sequence[torch.device]) -> tuple[str, torch.dtype] | None:
    """Torch's autocast, where it is on for the devices of the network."""
    kind = devices[0].type if devices else "cpu"
    return (kind, torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else None

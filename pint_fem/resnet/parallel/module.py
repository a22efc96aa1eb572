"""Base of the networks whose layers are distributed: from a batch to the output and back, on all ranks alike.

Every rank runs the same ordinary training loop. The first rank has the opening layer, the last one the classification
layer and what is between stages; each rank has, and updates, the residual layers of its own. Forward and backward
propagation are MGRIT sweeps inside functions of autograd.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from pint_fem.collective import raise_collectively
from pint_fem.errors import FAILURES, InputError
from pint_fem.resnet.grid import Grid
from pint_fem.resnet.parallel.agreement import batch_digest
from pint_fem.resnet.parallel.parameters import DistributedParameters
from pint_fem.resnet.parallel.passes import Pass
from pint_fem.resnet.parallel.random_numbers import count_pass, devices_of, own_random_numbers, pass_number
from pint_fem.resnet.parallel.stage import Propagation, Stage, means_over_groups
from pint_fem.resnet.parallel.transport import InputDerivative, MeanOfGroups, OutputOfLast, ToFirst

__all__ = ["LayerParallelModule"]

Tensor = torch.Tensor


class LayerParallelModule(DistributedParameters):
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
    collective : CollectiveBackward
        ``net.collective.backward(loss)`` is ``loss.backward()`` where a loss that fails on one rank fails on all.
    passes : int
        Number of passes in training mode so far, on which random numbers depend.
    evaluations : int
        Number of passes in evaluation mode since the last of those.
    """

    def __init__(self, grid: Grid | None, *, seed: int, nonfinite: str = "raise"):
        super().__init__(grid)
        if nonfinite not in ("raise", "gradient"):
            raise InputError(f"nonfinite {nonfinite!r}: give 'raise' or 'gradient'")
        self.seed, self.nonfinite, self.passes, self.evaluations = seed, nonfinite, 0, 0

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

    def _set_layout(self, stage: Stage, layout: Any) -> None:
        """Give a stage the layout of its states; nothing to do where layers of a kind have one layout."""
        return

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
        with own_random_numbers(devices), _normal_tensors():
            return self._forward(x, extra, batch, devices)

    def _forward(self, x: Any, extra: tuple, batch: Hashable, devices: list[torch.device]) -> Any:
        grid, grads = self.grid, torch.is_grad_enabled()
        shares = self.training and grads and grid.data_size > 1
        now = Pass(self, pass_number(self), shares=shares, batch=batch, devices=devices)
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
            now.extra = tree_map(_leaf, extra)
            if grid.is_first:
                now.seed(0)
                state, layout = self._to_state(0, self._open(now, x))
                self._require_device(state)
        except FAILURES as error:
            failure = error
        facts = self._agree(
            "forward pass", failure, where="opening layer", shares=shares,
            same={"training": self.training, "gradients enabled": grads, "autocast": now.autocast, "batch": batch,
                  "inputs with derivatives": wanted, "number of the pass": now.number},
            digest=digest, size=_size(x),
            requires_grad=grads and (any(p.requires_grad for p in self.parameters())
                                     or (state is not None and state.requires_grad) or bool(wanted)),
            shape=None if state is None else (tuple(state.shape), state.dtype), layout=layout,
        )  # fmt: skip
        self._require_same_batch(facts, shares)
        now.trains = any(f["requires_grad"] for f in facts)  # frozen parameters of one rank do not keep the others back
        count_pass(self)
        anchor = torch.zeros(0, requires_grad=now.trains)
        device = next((p.device for p in self.parameters()), torch.device("cpu"))
        if state is None:
            state = torch.zeros(0, dtype=facts[0]["shape"][1], device=device)
        leaves = [t for t in tree_flatten(extra)[0] if torch.is_tensor(t)]
        end = state
        for number, stage in enumerate(self.stages):
            if number:
                state, facts = self._between(now, number, end, layout, device)
            shape, dtype = facts[0]["shape"]
            layout = facts[0]["layout"]
            self._set_layout(stage, layout)
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

    def _require_device(self, state: Tensor) -> None:
        """Refuse a first state that is on another device than the layers."""
        device = next((p.device for stage in self.stages for p in stage.parameters()), state.device)
        if state.device != device:
            raise InputError(
                f"the opening layer gives values on {state.device}, and the layers are on {device}: move the batch and "
                "the network to one device, such as x.to(device) and net.to(device)"
            )

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
        buffers = [b for b in self.buffers() if b.is_floating_point() or b.is_complex()]
        with torch.no_grad():
            for b, mean in zip(buffers, means_over_groups(self.grid, buffers), strict=True):
                b.data.copy_(mean)  # of normalisation the backward pass has saved them, and uses others in training

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


@contextmanager
def _normal_tensors() -> Iterator[None]:
    """Inference mode as ``no_grad``: tensors made in it have no version, by which writing to an input is noticed."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


def _leaf(t: Any) -> Any:
    """A tensor that the layers' graphs begin with: were it connected to the inputs, a pass would refer to itself."""
    return t.detach().requires_grad_() if torch.is_tensor(t) and t.requires_grad else t


def _size(x: Any) -> int:
    """Number of samples of a batch; 0 where it has no length."""
    first = next((t for t in tree_flatten(x)[0] if torch.is_tensor(t)), None)
    return len(first) if first is not None and first.ndim else 0


def _autocast(devices: Sequence[torch.device]) -> tuple[str, torch.dtype] | None:
    """Torch's autocast, where it is on for the devices of the network."""
    kind = devices[0].type if devices else "cpu"
    return (kind, torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else None

"""Distributed parameters of a network: norms, counts, states of the whole network, and copies."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from pint_fem.collective import end_run_if_uncaught, mark_shared
from pint_fem.errors import FAILURES, InputError
from pint_fem.resnet.grid import Grid
from pint_fem.resnet.parallel.agreement import Agreement, CollectiveBackward
from pint_fem.resnet.parallel.random_numbers import devices_of, mixed_seed, own_random_numbers, seed_generators
from pint_fem.resnet.parallel.transport import broadcast
from pint_fem.resnet.training.optimisers import mark_distributed

__all__ = ["DistributedParameters", "Elsewhere", "require_unshared"]

Tensor = torch.Tensor


def require_unshared(parts: Iterable[tuple[str, nn.Module]]) -> None:
    """Refuse parts of a network that share parameters: they are copied, to ranks of their own, and so would differ.

    Raises
    ------
    InputError
        Naming two of them.
    """
    seen: dict[int, str] = {}
    for name, module in parts:
        for parameter, p in module.named_parameters():
            other = seen.setdefault(id(p), name)
            if other != name:
                raise InputError(
                    f"{other} and {name} share the parameter {parameter}: each part of the network is trained by "
                    "itself; give modules of their own, such as copy.deepcopy of one"
                )


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


def _wide(t: Tensor) -> Tensor:
    """The values in double precision."""
    return t.to(torch.complex128 if t.is_complex() else torch.float64)


class DistributedParameters(nn.Module):
    """Base of modules whose parameters are distributed over layer ranks; each has those of its own layers.

    Parameters
    ----------
    grid
        :class:`Grid` data x layers; default: all ranks in the layers.

    Attributes
    ----------
    opening, closing : Module
        On the first and the last rank; :class:`Elsewhere` on the others.
    transitions : ModuleList
        Between stages, on the last rank.
    """

    opening: nn.Module
    closing: nn.Module
    transitions: nn.ModuleList

    def __init__(self, grid: Grid | None):
        super().__init__()
        self.grid = grid or Grid()
        self._connect()

    def _connect(self) -> None:
        """Make what communicates on the grid."""
        self._agree = Agreement(self.grid.layer_comm, self.grid.comm)
        self.collective = CollectiveBackward(self._agree)
        end_run_if_uncaught(self.grid.comm)

    def _set_ends(self, opening: nn.Module, closing: nn.Module, transitions: Sequence[nn.Module] = ()) -> None:
        """Keep the modules that this rank has."""
        grid = self.grid
        self.opening = copy.deepcopy(opening) if grid.is_first else Elsewhere()
        self.closing = copy.deepcopy(closing) if grid.is_last else Elsewhere()
        self.transitions = nn.ModuleList(copy.deepcopy(t) if grid.is_last else Elsewhere() for t in transitions)

    def _start_equal(self) -> None:
        """Give all data groups the parameters and buffers of the first (collective)."""
        self._mark_distributed()
        if self.grid.data_size > 1:
            with torch.no_grad():
                for t in (*self.parameters(), *self.buffers()):
                    t.copy_(broadcast(self.grid.data_comm, t.detach().contiguous(), 0))

    def _mark_distributed(self) -> None:
        """Mark the parameters, so that optimisers that would sum over those of this rank alone are refused."""
        if self.grid.layer_size > 1:
            for name, p in self.named_parameters():
                mark_distributed([p], stacked=name.startswith("theta."))

    # -- what depends on the parameters of all ranks -------------------------------------------------------------------
    def parameter_count(self, *, trainable: bool = False) -> int:
        """Number of parameters of the whole network (collective); ``trainable``: of those with gradients alone."""
        own = sum(p.numel() for p in self.parameters() if p.requires_grad or not trainable)
        return sum(facts["own"] for facts in self._agree("count of parameters", own=own))

    def gradient_norm(self, norm_type: float = 2.0) -> Tensor:
        """Norm of the gradients of all parameters of the network, the same on all ranks (collective)."""
        return self._norm("norm of the gradients", norm_type)

    def _norm(self, part: str, norm_type: float, **same: Any) -> Tensor:
        """Norm of the gradients, in the first message of a collective part."""
        failure, own = None, 0.0
        try:
            norms = [
                torch.linalg.vector_norm(_wide(p.grad), norm_type) for p in self.parameters() if p.grad is not None
            ]
            own = torch.linalg.vector_norm(torch.stack(norms), norm_type).item() if norms else 0.0
        except FAILURES as error:
            failure = error
        reports = self._agree(part, failure, same={"norm_type": norm_type, **same}, own=own)
        on_ranks = torch.tensor([facts["own"] for facts in reports], dtype=torch.float64)
        return torch.linalg.vector_norm(on_ranks, norm_type)

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
        total = self._norm("clipping of gradients", float(norm_type), max_norm=float(max_norm))
        if error_if_nonfinite and not torch.isfinite(total):
            raise mark_shared(
                self.grid.layer_comm,
                RuntimeError(f"the norm of order {norm_type} of the gradients is {total.item()}: nothing was clipped"),
            )
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
        others = tuple(f"{name}." for name, m in self.named_modules() if isinstance(m, Elsewhere))
        return {name: t for name, t in state.items() if not name.startswith(others)}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load the state of this rank or, as :meth:`full_state_dict` and the serial copy have it, of all ranks
        (collective).

        Raises
        ------
        RuntimeError
            On every rank, where names or shapes do not fit on one.
        """
        failure = found = None
        try:
            own = OrderedDict(self._own_part(state_dict))
            own._metadata = getattr(state_dict, "_metadata", {})  # type: ignore[attr-defined]  # versions of modules
            found = super().load_state_dict(own, strict=strict, assign=assign)
        except FAILURES as error:
            failure = error
        self._agree("loading of parameters", failure)
        return found

    # -- copies --------------------------------------------------------------------------------------------------------
    def __getstate__(self) -> dict:
        """Without what communicates."""
        return {**self.__dict__, "_agree": None, "collective": None}

    def __setstate__(self, state: dict) -> None:
        """Communicate on the grid."""
        super().__setstate__(state)
        self._connect()
        self._mark_distributed()

    def __deepcopy__(self, memo: dict) -> DistributedParameters:
        """A network with copied parameters on the same ranks."""
        out = self.__class__.__new__(self.__class__)
        memo[id(self)] = out
        out.__setstate__({name: copy.deepcopy(value, memo) for name, value in self.__getstate__().items()})
        return out

    def apply(self, fn: Callable[[nn.Module], None]) -> DistributedParameters:
        """``fn`` of every module, as in torch (collective).

        Random numbers of ``fn`` are those of a generator that is seeded for the opening layer and for each layer from
        torch's own, which advances by one number: the same for every number of ranks.
        """
        base = int(torch.randint(1 << 62, ()))
        self._agree("application of a function to modules", same={"torch's generator": base})
        devices = devices_of(self.parameters())
        with own_random_numbers(devices):
            for place, module in self._places():
                seed_generators(mixed_seed(base, place), devices)
                module.apply(fn)
        fn(self)
        return self

    def _places(self) -> Sequence[tuple[int, nn.Module]]:
        """The own parts of the network with numbers that do not depend on the ranks: 0 the opening layer, ``1 + n``
        layer ``n``, and negative ones.
        """
        ends = [(0, self.opening), *((-1 - i, t) for i, t in enumerate(self.transitions)), (1 << 62, self.closing)]
        return [(place, module) for place, module in ends if not isinstance(module, Elsewhere)]

"""The layers of one stage on a rank: those that it owns, and copies of the few that its coarse levels take from others.

A point of a coarse level can belong to one rank and the layer that is evaluated there to another, the rank before it;
such a layer's parameters and buffers are sent at the beginning of each forward sweep, at most one layer for each level
and rank.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from mpi4py import MPI
from torch import nn

from pint_fem.errors import InputError
from pint_fem.resnet.parallel.random_numbers import mixed_seed, own_random_numbers, seed_generators
from pint_fem.resnet.parallel.transport import host_bytes
from pint_fem.resnet.row_exchange import RowExchange

__all__ = ["LayerCopies", "Repeat", "layer_makers"]


@dataclass(frozen=True)
class Repeat:
    """Layers that are made where they are needed.

    A rank makes its own layers only. Random numbers of ``make`` come from a generator seeded by the number of the
    layer, so that parameters do not depend on the number of ranks.

    Attributes
    ----------
    make : callable
        ``make(n)`` returns the layer with the number ``n`` in its stage.
    count : int
        Number of layers.
    seed : int
        Of their first parameters.
    """

    make: Callable[[int], nn.Module]
    count: int
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.count, int) or isinstance(self.count, bool) or self.count < 1:
            raise InputError(f"Repeat count {self.count!r}: give a positive whole number")
        if not callable(self.make):
            raise InputError(
                f"Repeat make {self.make!r}: give a function of the layer's number, such as lambda n: Block(16)"
            )

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, n: int) -> nn.Module:
        """The layer ``n``, made anew."""
        if not 0 <= n < self.count:
            raise IndexError(n)
        with own_random_numbers():
            seed_generators(mixed_seed(self.seed, n))
            made = self.make(n)
        if not isinstance(made, nn.Module):
            raise InputError(f"Repeat: make({n}) returned a {type(made).__name__} instead of a torch module")
        return made


def layer_makers(blocks: Sequence[nn.Module] | Repeat, what: str) -> Sequence[nn.Module]:
    """The layers of a stage as a sequence, checked.

    Raises
    ------
    InputError
        Where they are no modules, or none.
    """
    if isinstance(blocks, Repeat):
        return blocks
    if isinstance(blocks, (str, bytes, nn.Module)) and not isinstance(blocks, (nn.ModuleList, nn.Sequential)):
        raise InputError(f"{what}: give a list of modules, or Repeat(make, count), not one {type(blocks).__name__}")
    layers = list(blocks)
    if not layers:
        raise InputError(f"{what} has no layers: give at least one")
    for n, module in enumerate(layers):
        if not isinstance(module, nn.Module):
            raise InputError(f"{what}: layer {n} is a {type(module).__name__} instead of a torch module")
    return layers


def _tensors(module: nn.Module) -> list[torch.Tensor]:
    """Parameters and buffers of a module."""
    return [*module.parameters(), *module.buffers()]


def _packed(module: nn.Module) -> tuple[list[bool], list[tuple[tuple[int, ...], torch.dtype, np.ndarray]]]:
    """Modes, parameters and buffers of a module as they are sent."""
    return [m.training for m in module.modules()], [(tuple(t.shape), t.dtype, host_bytes(t)) for t in _tensors(module)]


def _unpack(module: nn.Module, packed: tuple, device: torch.device) -> None:
    """Set modes, parameters and buffers of a module, of the types that they were sent with."""
    modes, tensors = packed
    for part, mode in zip(module.modules(), modes, strict=True):
        part.training = mode
    for t, (shape, dtype, data) in zip(_tensors(module), tensors, strict=True):
        t.data = torch.from_numpy(data.copy()).view(dtype).reshape(shape).to(device)


class LayerCopies:
    """Copies of other ranks' layers at the points of the own coarse levels.

    Parameters
    ----------
    exchanges
        For each level the plan of the exchange, or ``None`` where no rank needs a layer.
    layers
        All layers of the stage.
    """

    def __init__(self, exchanges: Sequence[RowExchange | None], layers: Sequence[nn.Module]):
        self._plans = [(e, e.numbers) for e in exchanges if e is not None]
        self.modules = {n: copy.deepcopy(layers[n]) for _, needed in self._plans for n in needed}

    def __len__(self) -> int:
        return len(self._plans)

    def update(self, own: Sequence[nn.Module], comm: MPI.Comm) -> None:
        """Get the present parameters, buffers and modes (collective over the ranks that share the layers).

        Parameters
        ----------
        own
            The own layers in their order.
        comm
            Their communicator.
        """
        device = next((t.device for m in own for t in _tensors(m)), torch.device("cpu"))
        for exchange, numbers in self._plans:
            sends = [
                comm.isend(_packed(own[row]), dest=rank, tag=41)
                for rank, rows in sorted(exchange.send.items())
                for row in rows
            ]
            for rank, places in sorted(exchange.receive.items()):
                for place in places:
                    _unpack(self.modules[numbers[place]], comm.recv(source=rank, tag=41), device)
            for request in sends:
                request.Wait()

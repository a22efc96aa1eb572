"""One pass of a batch through a network: what all ranks have agreed upon for its sweeps."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from pint_fem.collective import all_ranks, mark_shared
from pint_fem.errors import InputError
from pint_fem.resnet.grid import Grid
from pint_fem.resnet.parallel.random_numbers import mixed_seed, seed_generators
from pint_fem.resnet.parallel.stage import are_finite, means_over_groups

if TYPE_CHECKING:
    from pint_fem.resnet.parallel.module import LayerParallelModule

__all__ = ["Pass"]

Tensor = torch.Tensor


@dataclass(eq=False)
class Pass:
    """One pass of a batch through a network, with what all ranks have agreed upon.

    Attributes
    ----------
    network : LayerParallelModule
    number : tuple of int
        Of the pass (:func:`~pint_fem.resnet.parallel.random_numbers.pass_number`).
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
    number: tuple[int, int]
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
        seed_generators(mixed_seed(self.network.seed, *self.number, place), self.devices)

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
            message = (
                "create_graph=True: a layer-parallel network has first derivatives only; for Hessian actions give a "
                "network of Dense or Convolution layers to TrainingProblem"
            )
            raise mark_shared(self.grid.layer_comm, InputError(message))

    def agree_on_gradients(self) -> None:
        """Let the backward pass end with an agreement on whether all gradients of the network are finite; they are NaN
        on all ranks where one of the opening or the classification layer, which one rank alone has, is not.
        """

        def agree() -> None:
            gradients = [p.grad for p in self.network.parameters() if p.grad is not None]
            facts = self.network._agree("end of the gradients", finite=are_finite(gradients))
            if not all(f["finite"] for f in facts):
                with torch.no_grad():
                    for g in gradients:
                        g.fill_(torch.nan)

        torch.autograd.Variable._execution_engine.queue_callback(agree)  # after all gradients have been added up

    def all_agree(self, condition: bool) -> bool:
        """Whether a condition holds on all ranks that share the layers, and on all groups if they take part."""
        return all_ranks(self.grid.comm if self.shares else self.grid.layer_comm, condition)

    def mean_over_data(self, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Means over the data groups, if they take part."""
        return means_over_groups(self.grid, gradients) if self.shares else list(gradients)

"""An ordinary torch training loop, for the demos: epochs, evaluation, what is recorded."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import numpy as np
import torch
from mpi4py import MPI
from torch import nn
from torch.utils.data import Dataset

from pint_fem.collective import all_ranks, any_rank, collectively, consistent_across_ranks, ending_all_ranks
from pint_fem.errors import InputError
from pint_fem.resnet.batches import batch_digest
from pint_fem.resnet.grid import Grid
from pint_fem.resnet.network import LayerParallelResNet

__all__ = ["Epoch", "accuracy", "train_epoch"]


@dataclass
class Epoch:
    """What an epoch did: mean loss, accuracies, seconds of training, mean cycles of the sweeps."""

    number: int
    loss: float
    train_accuracy: float
    test_accuracy: float
    seconds: float
    forward_cycles: float = 0.0
    backward_cycles: float = 0.0

    def __str__(self) -> str:
        text = f"epoch {self.number:3d}  loss {self.loss:.4f}  accuracy {self.train_accuracy:.4f} (training) "
        text += f"{self.test_accuracy:.4f} (test)  {self.seconds:.1f} s"
        if self.forward_cycles or self.backward_cycles:
            text += f"  cycles {self.forward_cycles:.1f} + {self.backward_cycles:.1f}"
        return text

    def as_dict(self) -> dict:
        """For JSON."""
        return asdict(self)


def train_epoch(
    net: nn.Module,
    loader,
    optimizer: torch.optim.Optimizer,
    *,
    loss_function: Callable = nn.functional.cross_entropy,
    regularisation: Callable[[], torch.Tensor] | None = None,
    data_comm=None,
    on_batch: Callable[[int, float], None] | None = None,
    warm: bool = False,
    after_batch: Callable[[int], None] | None = None,
) -> dict:
    """One pass over the data; the mean loss, accuracy and cycles of a batch.

    Parameters
    ----------
    net, loader, optimizer
        As in any torch loop.
    regularisation
        What is added to the loss.
    data_comm
        Over which losses are averaged.
    on_batch
        Called with the batch's number and loss (progress).
    warm
        The loader does not shuffle: a batch starts from its last visit.
    after_batch
        Called after each update (checkpoints).

    Raises
    ------
    InputError
        On every rank, where the loaders of the ranks have not as many batches each, or ranks that share the layers are
        given other ones.
    Exception
        What the loader, the loss, the optimiser or a function that is called raises on one rank: as it is there, as
        ``RuntimeError`` on the others.
    """
    net.train()
    comm = _ranks(net, data_comm)
    sums, seen, cycles, start = np.zeros(3), 0, [[], []], time.perf_counter()
    nothing = lambda *_: None
    with ending_all_ranks(comm):
        for number, (x, y) in enumerate(_same_batches(loader, net, comm)):
            optimizer.zero_grad()
            out = net(x, batch=number) if warm else net(x)
            loss = collectively(comm, "loss", loss_function, out, y)
            total = loss if regularisation is None else loss + collectively(comm, "regularisation", regularisation)
            if isinstance(net, LayerParallelResNet):
                net.meetings.backward(total)
            else:
                collectively(comm, "backward", total.backward)
            collectively(comm, "optimizer", optimizer.step)
            sums += [loss.item() * len(y), float((out.argmax(1) == y).sum()), len(y)]
            seen += 1
            for kind, into in zip(("forward", "backward"), cycles, strict=True):
                result = getattr(net, "results", {}).get(kind)
                if result is not None:
                    into.append(result.cycles)
            collectively(comm, "on_batch", on_batch or nothing, number, loss.item())
            collectively(comm, "after_batch", after_batch or nothing, number)
    if data_comm is not None and data_comm.size > 1:
        sums = data_comm.allreduce(sums)
    mean = lambda values: float(np.mean(values)) if values else 0.0
    return {
        "loss": sums[0] / sums[2],
        "train_accuracy": sums[1] / sums[2],
        "seconds": time.perf_counter() - start,
        "forward_cycles": mean(cycles[0]),
        "backward_cycles": mean(cycles[1]),
    }


def accuracy(net: nn.Module, data: Dataset, *, batch_size: int = 500, grid: Grid | None = None) -> float:
    """Share of a set that is classified rightly; groups take turns by batches."""
    net.eval()
    comm = None if grid is None else grid.data_comm
    size, rank = (1, 0) if comm is None else (comm.size, comm.rank)

    def count() -> int:
        right = 0
        with torch.no_grad():
            for i in range(rank * batch_size, len(data), size * batch_size):
                x, y = data[i : i + batch_size]
                right += int((net(x).argmax(1) == y).sum())
        return right

    right = collectively(MPI.COMM_SELF if grid is None else grid.comm, "accuracy", count)
    return (right if size == 1 else comm.allreduce(right)) / len(data)


def _ranks(net: nn.Module, data_comm):
    """The communicator of all ranks that train together."""
    grid = getattr(net, "grid", None)
    if isinstance(grid, Grid):
        return grid.comm
    return MPI.COMM_SELF if data_comm is None else data_comm


def _same_batches(loader, net: nn.Module, comm) -> Iterator:
    """The batches of a loader, as many on each rank, with the same labels on those that share the layers."""
    batches = iter(loader)
    grid = getattr(net, "grid", None)
    groups, group = (grid.data_size, grid.data_comm.rank) if isinstance(grid, Grid) and grid.layer_size > 1 else (0, 0)

    def one() -> tuple | None:
        batch = next(batches, None)
        if batch is None:
            return None
        x, y = batch
        return x, y, [(batch_digest(y),) if g == group else None for g in range(groups)]

    while True:
        batch = collectively(comm, "loader", one)
        if consistent_across_ranks(comm, batch is not None, *([None] * groups if batch is None else batch[2])):
            yield batch[:2]
        elif all_ranks(comm, batch is not None):
            raise InputError(
                "ranks that share the layers are given other labels: give them the same batches, for instance by "
                "shared_loader(...)"
            )
        elif any_rank(comm, batch is not None):
            raise InputError("the ranks' loaders have not as many batches each: shared_loader(...) makes such")
        else:
            return

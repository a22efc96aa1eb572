"""An ordinary torch training loop, and the accuracy on a set of data, for serial and layer-parallel networks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass

import numpy as np
import torch
from mpi4py import MPI
from torch import nn
from torch.utils.data import Dataset

from pint_fem.collective import all_ranks, any_rank, collectively, consistent_across_ranks, ending_all_ranks
from pint_fem.errors import InputError
from pint_fem.resnet.grid import Grid
from pint_fem.resnet.parallel.agreement import batch_digest
from pint_fem.resnet.parallel.module import LayerParallelModule

__all__ = ["Epoch", "accuracy", "train_epoch"]


@dataclass
class Epoch:
    """Record of an epoch.

    ``loss`` is a mean over samples, the numbers of cycles are means over batches and stages, accuracies are shares in
    [0, 1] of labels that are predicted correctly, ``seconds`` is the time of the training.
    """

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
        """The attributes by name, for JSON."""
        return asdict(self)


def train_epoch(
    net: nn.Module,
    loader: Iterable,
    optimizer: torch.optim.Optimizer,
    *,
    loss_function: Callable = nn.functional.cross_entropy,
    regularisation: Callable[[], torch.Tensor] | None = None,
    clip: float | None = None,
    data_comm: MPI.Comm | None = None,
    on_batch: Callable[[int, float], None] | None = None,
    warm: bool = False,
    after_batch: Callable[[int], None] | None = None,
) -> dict:
    """Train for one pass over the data (collective).

    Parameters
    ----------
    net, loader, optimizer
        As in any torch loop; the loader yields pairs of a batch and its labels.
    loss_function
        ``loss_function(outputs, labels)``, a scalar.
    regularisation
        ``regularisation()`` is added to the loss.
    clip
        Largest norm of the gradient with respect to all parameters of the network; ``None``: it is not limited.
    data_comm
        Communicator over which losses are averaged.
    on_batch
        Called with the number and the loss of each batch, for a display of the progress.
    warm
        The loader does not shuffle, so that sweeps can start from the C-points of the same batch in the last epoch.
    after_batch
        Called with the number of each batch after the update, for checkpoints.

    Returns
    -------
    dict
        ``loss``, ``train_accuracy``, ``seconds``, ``forward_cycles`` and ``backward_cycles`` of an :class:`Epoch`.

    Raises
    ------
    InputError
        On every rank, where the loaders of the ranks differ in the number of batches, or ranks that share the layers
        are given different ones.
    Exception
        What the loader, the loss, the optimiser or a callback raises on one rank: as it is there, as ``RuntimeError``
        on the others.
    """
    net.train()
    comm = _ranks(net, data_comm)
    sums, cycles, start = np.zeros(3), [[], []], time.perf_counter()
    nothing = lambda *_: None
    with ending_all_ranks(comm):
        for number, (x, y) in enumerate(_same_batches(loader, net, comm)):
            optimizer.zero_grad()
            out = net(x, batch=number) if warm else net(x)
            loss = collectively(comm, "loss", loss_function, out, y)
            total = loss if regularisation is None else loss + collectively(comm, "regularisation", regularisation)
            if isinstance(net, LayerParallelModule):
                net.collective.backward(total)
            else:
                collectively(comm, "backward", total.backward)
            if clip is not None:
                _clip(net, clip)
            collectively(comm, "optimizer", optimizer.step)
            sums += [loss.item() * y.numel(), float((out.argmax(1) == y).sum()), y.numel()]
            for kind, into in zip(("forward", "backward"), cycles, strict=True):
                into += [stage.results[kind].cycles for stage in getattr(net, "stages", ()) if kind in stage.results]
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


def _clip(net: nn.Module, largest: float) -> None:
    """Scale the gradient down where its norm over the parameters on all ranks is larger (collective)."""
    if hasattr(net, "clip_grad_norm_"):
        net.clip_grad_norm_(largest)
    else:
        nn.utils.clip_grad_norm_(net.parameters(), largest)


def accuracy(net: nn.Module, data: Dataset, *, batch_size: int = 500, grid: Grid | None = None) -> float:
    """Share of labels, in [0, 1], that a network predicts (collective).

    A sample has one label, or several as the characters of a passage; the classes are on the second axis of the output.

    Parameters
    ----------
    net, data
        The network, and samples with labels on every rank.
    batch_size
        Of the evaluation.
    grid
        Process grid, whose data groups evaluate the batches in turn; ``None`` on one process.
    """
    net.eval()
    comm = None if grid is None else grid.data_comm
    size, rank = (1, 0) if comm is None else (comm.size, comm.rank)

    def count() -> np.ndarray:
        right = np.zeros(2, dtype=np.int64)
        with torch.no_grad():
            for i in range(rank * batch_size, len(data), size * batch_size):
                x, y = data[i : i + batch_size]
                right += [int((net(x).argmax(1) == y).sum()), y.numel()]
        return right

    right = collectively(MPI.COMM_SELF if grid is None else grid.comm, "accuracy", count)
    correct, total = right if size == 1 else comm.allreduce(right)
    return float(correct / total)


def _ranks(net: nn.Module, data_comm: MPI.Comm):
    """Communicator of all ranks that train the network."""
    grid = getattr(net, "grid", None)
    if isinstance(grid, Grid):
        return grid.comm
    return MPI.COMM_SELF if data_comm is None else data_comm


def _same_batches(loader, net: nn.Module, comm: MPI.Comm) -> Iterator:
    """Batches of a loader; requires as many on each rank, with the same labels on ranks that share the layers."""
    batches = iter(loader)
    grid = getattr(net, "grid", None)
    groups, group = (grid.data_size, grid.data_comm.rank) if isinstance(grid, Grid) and grid.layer_size > 1 else (0, 0)

    def next_batch() -> tuple | None:
        batch = next(batches, None)
        if batch is None:
            return None
        x, y = batch
        return x, y, [(batch_digest(y),) if g == group else None for g in range(groups)]

    while True:
        batch = collectively(comm, "loader", next_batch)
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

"""Messages of tensors between the ranks of a network, as functions that autograd differentiates.

The backward pass of each is the opposite message. All ranks execute all of them in the same order: on ranks without
the values they connect empty tensors, which have derivatives so that no rank leaves out a message.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from mpi4py import MPI

if TYPE_CHECKING:
    from pint_fem.resnet.parallel.passes import Pass

__all__ = ["InputDerivative", "MeanOfGroups", "OutputOfLast", "ToFirst", "broadcast", "host_bytes"]

Tensor = torch.Tensor
_TAG = 37


def host_bytes(t: Tensor) -> np.ndarray:
    """The values of a contiguous tensor as bytes: a view of a processor's tensor, a copy of an accelerator's."""
    return t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def broadcast(comm: MPI.Comm, t: Tensor, root: int) -> Tensor:
    """A contiguous tensor of the rank ``root`` on all ranks (collective); the others give one of its shape and type,
    which is overwritten.
    """
    if comm.size == 1 or not t.numel():
        return t
    data = host_bytes(t)
    comm.Bcast(data, root=root)
    return _put(t, data) if comm.rank != root else t


def _put(t: Tensor, data: np.ndarray) -> Tensor:
    """Write bytes to a tensor, unless they are its own."""
    if t.device.type != "cpu" or data.ctypes.data != t.data_ptr():
        t.copy_(torch.from_numpy(data).view(t.dtype).reshape(t.shape))
    return t


class InputDerivative(torch.autograd.Function):
    """The inputs of a network; their derivatives, which the first rank has, arrive on all ranks."""

    @staticmethod
    def forward(ctx: Any, now: Pass, anchor: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The inputs as they are."""
        ctx.now = now
        ctx.like = [(t.shape, t.dtype, t.device) for t in inputs]
        return tuple(t.view_as(t) for t in inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """The derivatives of the first rank."""
        now = ctx.now
        now.check_backward()
        comm, out = now.grid.layer_comm, []
        for g, needed, (shape, dtype, device) in zip(gradients, ctx.needs_input_grad[2:], ctx.like, strict=True):
            if not needed:
                out.append(None)
                continue
            if g is None or not now.grid.is_first:
                g = torch.zeros(shape, dtype=dtype, device=device)
            out.append(broadcast(comm, g.contiguous(), 0))
        return None, None, *out


class ToFirst(torch.autograd.Function):
    """A tensor of the last rank on the first; empty on the others."""

    @staticmethod
    def forward(
        ctx: Any, u: Tensor, now: Pass, shape: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """Send from the last rank to the first."""
        ctx.now, ctx.like = now, (u.shape, u.dtype, u.device)
        return _move(now, u, now.grid.layer_size - 1, 0, shape, dtype, device)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Send the derivative from the first rank to the last."""
        now, (shape, dtype, device) = ctx.now, ctx.like
        now.check_backward()
        g = _move(now, gradient, 0, now.grid.layer_size - 1, shape, dtype, device)
        return g if g.shape == shape else torch.zeros(shape, dtype=dtype, device=device), None, None, None, None


def _move(
    now: Pass, t: Tensor, source: int, to: int, shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """A tensor of one rank on another, and an empty one elsewhere."""
    comm = now.grid.layer_comm
    if comm.size == 1:
        return t.view_as(t)
    if comm.rank == source:
        comm.Send(host_bytes(t), dest=to, tag=_TAG)
    if comm.rank != to:
        return torch.zeros(0, dtype=dtype, device=device)
    out = torch.empty(shape, dtype=dtype)
    if out.numel():
        comm.Recv(host_bytes(out), source=source, tag=_TAG)
    else:
        comm.Recv(np.empty(0, np.uint8), source=source, tag=_TAG)
    return out.to(device)


class OutputOfLast(torch.autograd.Function):
    """Tensors of the last rank on all ranks; each rank computes the same derivatives, so the last one uses its own."""

    @staticmethod
    def forward(ctx: Any, now: Pass, end: Tensor, specs: Sequence[tuple], *tensors: Tensor) -> tuple[Tensor, ...]:
        """Broadcast; ``end`` connects the ranks without the tensors to their layers."""
        ctx.now, ctx.like = now, (end.shape, end.dtype, end.device)
        ctx.count, grid, out = len(tensors), now.grid, []
        ctx.set_materialize_grads(False)  # parameters behind unused outputs have no gradients, as in plain torch
        for i, (shape, dtype) in enumerate(specs):
            t = tensors[i].detach().clone(memory_format=torch.contiguous_format) if grid.is_last else None
            if t is None:
                t = torch.empty(shape, dtype=dtype, device=end.device)
            out.append(broadcast(grid.layer_comm, t, grid.layer_size - 1))
        ctx.mark_non_differentiable(*(t for t in out if not (t.is_floating_point() or t.is_complex())))
        return tuple(out)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """The derivatives on the last rank, zero on the others; none of outputs that are not used."""
        ctx.now.check_backward()
        shape, dtype, device = ctx.like
        return None, torch.zeros(shape, dtype=dtype, device=device), None, *gradients[: ctx.count]


class MeanOfGroups(torch.autograd.Function):
    """Parameters of a module at an end of the network; their derivatives are means over the data groups."""

    @staticmethod
    def forward(ctx: Any, now: Pass, *theta: Tensor) -> tuple[Tensor, ...]:
        """The parameters as they are."""
        ctx.now = now
        return tuple(p.view_as(p) for p in theta)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Means over the ranks with the same layers in all groups (collective over them)."""
        return None, *ctx.now.mean_over_data(gradients)

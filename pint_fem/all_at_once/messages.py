"""Messages of rows between ranks: numpy arrays and CPU tensors by their memory, tensors on a device by its memory where
the MPI library reads it, else through a copy on the host.

The two ends of a message need not agree: what travels are the bytes of a contiguous row. The library reports whether it
takes device memory (``MPIX_Query_cuda_support``, ``MPIX_Query_rocm_support``); the environment variable
``PINT_FEM_DEVICE_MPI``, 0 or 1, comes before that.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
from mpi4py import MPI

from pint_fem.all_at_once.arrays import Array, is_tensor, no_values, torch_module
from pint_fem.errors import InputError

__all__ = ["Request", "gather_rows", "post_receive", "post_send", "reads_device_memory", "scatter_rows"]


class Request(Protocol):
    """What a message is waited for by."""

    def Wait(self) -> object:
        """Return when the message has arrived, or has left."""


class _Staged:
    """A receive into a copy on the host, or a send from one, which lives until the message is complete."""

    def __init__(self, request: MPI.Request, host: Array, row: Array | None = None):
        self._request, self._host, self._row = request, host, row

    def Wait(self) -> None:
        """Wait for the message; what was received goes to the device."""
        self._request.Wait()
        if self._row is not None:
            self._row.copy_(self._host, non_blocking=True)  # pinned memory is free when the copy is done
        self._host = self._row = None


@cache
def reads_device_memory() -> bool:
    """Whether the MPI library takes buffers in the memory of devices that torch calls ``cuda``."""
    given = os.environ.get("PINT_FEM_DEVICE_MPI", "")
    if given:
        return given != "0"
    maker = "rocm" if torch_module().version.hip else "cuda"
    query = getattr(ctypes.CDLL(MPI.__file__), f"MPIX_Query_{maker}_support", None)
    return query is not None and bool(query())


def post_receive(comm: MPI.Comm, row: Array, source: int, tag: int) -> Request:
    """Start receiving a contiguous array; it is there after the request's ``Wait``."""
    if not is_tensor(row):
        return comm.Irecv(row, source=source, tag=tag)
    host = _buffer(row)
    if host is not None:
        return comm.Irecv(host, source=source, tag=tag)
    copy = row.new_empty(row.shape, device="cpu", pin_memory=row.device.type == "cuda")
    return _Staged(comm.Irecv(_bytes(copy), source=source, tag=tag), copy, row)


def post_send(comm: MPI.Comm, row: Array, dest: int, tag: int) -> Request:
    """Start sending a contiguous array, which has to stay as it is until the request's ``Wait``."""
    if not is_tensor(row):
        return comm.Isend(row, dest=dest, tag=tag)
    host = _buffer(row)
    if host is not None:
        return comm.Isend(host, dest=dest, tag=tag)
    copy = row.cpu()
    return _Staged(comm.Isend(_bytes(copy), dest=dest, tag=tag), copy)


def gather_rows(comm: MPI.Comm, rows: Array, whole: Array | None, bounds: Sequence[int]) -> None:
    """Gather the ranks' rows in ``whole`` on the first rank, ``None`` elsewhere; ``bounds``: of the ranks' rows."""
    target = None if whole is None else _host(whole)
    comm.Gatherv(_bytes(_host(rows)), None if target is None else [_bytes(target), *_layout(rows, bounds)])
    if whole is not None and target is not whole:
        whole.copy_(target)


def scatter_rows(comm: MPI.Comm, whole: Array | None, rows: Array, bounds: Sequence[int]) -> None:
    """Write to each rank's rows what ``whole`` has of them on the first rank, ``None`` elsewhere."""
    source, target = None if whole is None else _host(whole), _host(rows)
    comm.Scatterv(None if source is None else [_bytes(source), *_layout(rows, bounds)], _bytes(target))
    if target is not rows:
        rows.copy_(target)


def _layout(rows: Array, bounds: Sequence[int]) -> list:
    """Counts and displacements of the ranks' parts, in numbers of numpy's arrays and in bytes of tensors, and the type
    of these.
    """
    width = int(np.prod(rows.shape[1:], dtype=int)) * (rows.dtype.itemsize if is_tensor(rows) else 1)
    places = [width * int(b) for b in bounds]
    kind = MPI.BYTE if is_tensor(rows) else MPI.DOUBLE if rows.dtype.itemsize == 8 else MPI.FLOAT
    return [[b - a for a, b in pairwise(places)], places[:-1], kind]


def _host(array: Array) -> Array:
    """The array itself where it is contiguous on the host, else a copy there."""
    return array.cpu().contiguous() if is_tensor(array) else np.ascontiguousarray(array)


def _bytes(array: Array) -> np.ndarray:
    """The memory of a contiguous array on the host."""
    return array.detach().reshape(-1).view(torch_module().uint8).numpy() if is_tensor(array) else array


def _buffer(row: Array) -> Any:
    """Memory of a tensor that MPI reads and writes, or ``None`` where that takes a copy on the host."""
    if no_values(row):
        raise InputError("a tensor on the meta device has no values to send: solve on one rank")
    if row.device.type == "cpu":
        return _bytes(row)
    if row.device.type == "cuda" and reads_device_memory():
        torch = torch_module()
        torch.cuda.current_stream(row.device).synchronize()  # MPI does not wait for what is queued there
        return row.detach().reshape(-1).view(torch.uint8)
    return None

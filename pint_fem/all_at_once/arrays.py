"""Operations that numpy and torch write differently, chosen by the type of the array.

The solvers of all time steps slice the leading axis, add and scale; numpy and torch have the same notation for that.
What differs is here: how arrays are made, copied and compared with a set of finite numbers, and how values reach the
host. torch is never imported: a tensor can only be met where its module has been imported already.

A tensor's values are read in :func:`to_host` alone, several arrays in one copy from the device. Tensors on the ``meta``
device have no values: nothing is read, and all of them count as finite.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = [
    "Array",
    "ArrayKind",
    "NumpyArrays",
    "TorchArrays",
    "contiguous",
    "copied",
    "finite_rows",
    "is_contiguous",
    "is_tensor",
    "kind_of",
    "no_values",
    "norms_of_rows",
    "quiet",
    "reversed_rows",
    "strided_rows",
    "subtract",
    "sums_of_rows",
    "tensor_of",
    "to_host",
    "torch_module",
    "type_code",
]

Array = Any
"""A numpy array or a torch tensor."""


def is_tensor(array: object) -> bool:
    """Whether an object is a torch tensor."""
    if isinstance(array, np.ndarray):
        return False
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(array, getattr(torch, "Tensor", ()))


def torch_module() -> Any:
    """The module torch, which is imported where a tensor has been met."""
    return sys.modules["torch"]


# -- new arrays --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class NumpyArrays:
    """Makes numpy arrays of one type."""

    dtype: np.dtype

    def zeros(self, *shape: int) -> np.ndarray:
        """An array of zeros."""
        return np.zeros(shape, self.dtype)

    def empty(self, *shape: int) -> np.ndarray:
        """An array whose values are not set."""
        return np.empty(shape, self.dtype)

    def full(self, value: float, *shape: int) -> np.ndarray:
        """An array with one value in all entries."""
        return np.full(shape, value, self.dtype)

    def row_index(self, rows: slice | np.ndarray) -> slice | np.ndarray:
        """Rows in the form that indexes such arrays."""
        return rows


@dataclass(frozen=True)
class TorchArrays:
    """Makes torch tensors of one type on one device."""

    dtype: Any
    device: Any

    def zeros(self, *shape: int) -> Array:
        """A tensor of zeros."""
        return torch_module().zeros(shape, dtype=self.dtype, device=self.device)

    def empty(self, *shape: int) -> Array:
        """A tensor whose values are not set."""
        return torch_module().empty(shape, dtype=self.dtype, device=self.device)

    def full(self, value: float, *shape: int) -> Array:
        """A tensor with one value in all entries."""
        return torch_module().full(shape, value, dtype=self.dtype, device=self.device)

    def row_index(self, rows: slice | np.ndarray) -> Any:
        """Rows in the form that indexes such tensors: numbers on their device, so that no use copies them there."""
        return rows if isinstance(rows, slice) else torch_module().as_tensor(rows, device=self.device)


ArrayKind = NumpyArrays | TorchArrays
_NUMPY = {np.dtype(name): NumpyArrays(np.dtype(name)) for name in ("float64", "float32")}


def kind_of(array: Array) -> ArrayKind:
    """What makes arrays of the same type, on the same device."""
    if is_tensor(array):
        return TorchArrays(array.dtype, array.device)
    return _NUMPY.get(array.dtype) or NumpyArrays(array.dtype)


def type_code(array: Array) -> int:
    """A number for the type of an array's entries, negative for tensors; the same in every process."""
    if not is_tensor(array):
        return array.dtype.num
    return -1 - sum(byte << 8 * place for place, byte in enumerate(str(array.dtype).encode()[6:12]))


# -- operations --------------------------------------------------------------------------------------------------------
def subtract(a: Array, b: Array, out: Array) -> None:
    """Write ``a - b`` to ``out``, which may be one of them."""
    (torch_module() if is_tensor(out) else np).subtract(a, b, out=out)


def contiguous(array: Array) -> Array:
    """The array, copied where it is not contiguous."""
    return array.contiguous() if is_tensor(array) else np.ascontiguousarray(array)


def is_contiguous(array: Array) -> bool:
    """Whether an array is C-contiguous."""
    return array.is_contiguous() if is_tensor(array) else array.flags.c_contiguous


def copied(array: Array) -> Array:
    """A copy."""
    return array.clone() if is_tensor(array) else array.copy()


def reversed_rows(array: Array) -> Array:
    """The rows from the last to the first: a view of a numpy array, a copy of a tensor, which has no such views."""
    return array.flip(0) if is_tensor(array) else array[::-1]


def strided_rows(array: Array, first: int, stride: int, shape: tuple[int, int]) -> Array:
    """View ``(count, steps, *state)`` of the rows ``first + i stride + j``; they overlap where the stride is small."""
    count, steps = shape
    if is_tensor(array):
        row, *rest = array.stride()
        size, offset = (count, steps, *array.shape[1:]), array.storage_offset() + first * row
        return array.as_strided(size, (stride * row, row, *rest), offset)
    begin, (row, *rest) = array[first:], array.strides
    size = (count, steps, *array.shape[1:])
    return np.lib.stride_tricks.as_strided(begin, size, (stride * row, row, *rest), writeable=True)


def quiet(array: Array) -> AbstractContextManager:
    """No warnings about overflow, and no record of the operations on tensors for derivatives."""
    return _without_derivatives() if is_tensor(array) else np.errstate(over="ignore", invalid="ignore")


@contextmanager
def _without_derivatives() -> Iterator[None]:
    with np.errstate(over="ignore", invalid="ignore"), torch_module().no_grad():
        yield


class _Memory:
    """The memory of a numpy array, for arrays that may be written to."""

    def __init__(self, array: np.ndarray):
        self._array = array
        self.__array_interface__ = array.__array_interface__ | {"data": (array.ctypes.data, False)}


def tensor_of(array: np.ndarray) -> Array:
    """A CPU tensor with the memory of a numpy array, of a read-only one too, as no tensor is read-only."""
    return torch_module().from_numpy(array if array.flags.writeable else np.asarray(_Memory(array)))


# -- values on the host ------------------------------------------------------------------------------------------------
def no_values(array: Array) -> bool:
    """Whether an array has no values that could be read."""
    return is_tensor(array) and array.device.type == "meta"


def to_host(*arrays: Array) -> list[np.ndarray]:
    """Values of small arrays ``(k,)`` or ``(k, c)`` in float64, those of tensors in one copy from their device.

    Truth values become 0 and 1. Without values (on the ``meta`` device) all are zero.
    """
    tensors = [a for a in arrays if is_tensor(a)]
    if not tensors:
        return [np.asarray(a, dtype=float) for a in arrays]
    if any(no_values(a) for a in tensors):
        return [np.zeros(tuple(a.shape)) for a in arrays]
    torch = torch_module()
    flat = [a.reshape(-1) for a in tensors]
    joined = torch.cat(flat) if len(flat) > 1 else flat[0]
    values, place, out = joined.cpu().double().numpy(), 0, []
    for a in arrays:
        if is_tensor(a):
            out.append(values[place : place + a.numel()].reshape(tuple(a.shape)))
            place += a.numel()
        else:
            out.append(np.asarray(a, dtype=float))
    return out


def sums_of_rows(array: Array, axes: int = 1) -> Array:
    """Sums over all but the first ``axes`` axes of a tensor: not finite where an entry is not, or where they overflow.

    No other reduction is as fast: largest values take up to thirty times as long on a CPU.
    """
    return array.sum(dim=tuple(range(axes, array.ndim))) if array.ndim > axes else array.clone()


def norms_of_rows(array: Array) -> Array:
    """Euclidean norm of each row of a tensor, accumulated in float64 (in float32 on ``mps``, which has no float64).

    Each row is summed by itself: on a CPU a result does not depend on the number of rows.
    """
    torch = torch_module()
    wide = torch.float32 if array.device.type == "mps" else torch.float64
    if array.ndim == 1:
        return array.to(wide).abs()
    return torch.linalg.vector_norm(array, 2, dim=tuple(range(1, array.ndim)), dtype=wide)


def finite_rows(array: Array) -> np.ndarray:
    """Whether all entries of each row are finite, ``(k,)`` on the host."""
    if is_tensor(array):
        return np.isfinite(to_host(sums_of_rows(array))[0])
    return np.isfinite(array).reshape(len(array), -1).all(axis=1)

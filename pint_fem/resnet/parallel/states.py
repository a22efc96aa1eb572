"""How a layer's state, a tensor or a tuple of tensors, becomes one array of the solver, and comes back."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from pint_fem.errors import InputError

__all__ = ["StateLayout"]

Tensor = torch.Tensor


class StateLayout(NamedTuple):
    """Shapes and type of a state.

    A single tensor is its own array; the tensors of a tuple follow each other in a flat one.

    Attributes
    ----------
    shapes
        Of the tensors, with the axis of the batch.
    is_tuple
        Whether the state is a tuple, even if of one tensor.
    dtype
        Of all of them, such as ``torch.float32``.
    """

    shapes: tuple[tuple[int, ...], ...]
    is_tuple: bool
    dtype: torch.dtype

    @classmethod
    def of(cls, state: Any, dtype: torch.dtype | None = None) -> StateLayout:
        """The layout of a state.

        Parameters
        ----------
        state
            A tensor, or a tuple or list of tensors.
        dtype
            Type of the arrays; default: that to which torch promotes those of the tensors.

        Raises
        ------
        InputError
            Where the state is anything else, has no floating-point values or lies on several devices.
        """
        is_tuple = isinstance(state, (tuple, list))
        parts = tuple(state) if is_tuple else (state,)
        if not parts or not all(torch.is_tensor(p) for p in parts):
            kind = (
                f"{type(state).__name__} of {type(parts[0]).__name__}" if parts and is_tuple else type(state).__name__
            )
            raise InputError(f"a layer's state is a {kind}: give a tensor or a tuple of tensors")
        for p in parts:
            if not p.is_floating_point():
                raise InputError(
                    f"a layer's state has type {p.dtype}: give floating-point tensors, and pass others as extra inputs "
                    "of the network, which all layers get"
                )
        if len({p.device for p in parts}) > 1:
            raise InputError(f"a layer's state lies on {', '.join(str(p.device) for p in parts)}: give one device")
        if dtype is None:
            dtype = parts[0].dtype
            for p in parts[1:]:
                dtype = torch.promote_types(dtype, p.dtype)
        return cls(tuple(tuple(p.shape) for p in parts), is_tuple, dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return (sum(math.prod(s) for s in self.shapes),) if self.is_tuple else self.shapes[0]

    def pack(self, state: Any) -> Tensor:
        """The array of a state; differentiable."""
        if self.is_tuple:
            return torch.cat([p.to(self.dtype).reshape(-1) for p in state])
        return state.to(self.dtype)

    def unpack(self, u: Tensor) -> Any:
        """The state of an array, as views where that is possible; differentiable."""
        if not self.is_tuple:
            return u
        parts = u.split([math.prod(s) for s in self.shapes])
        return tuple(p.reshape(s) for p, s in zip(parts, self.shapes, strict=True))

    def require(self, state: Any, what: str) -> None:
        """Refuse a state with other shapes, or that is none.

        Raises
        ------
        InputError
            Naming ``what`` gave it.
        """
        if not self.is_tuple and torch.is_tensor(state) and state.shape == self.shapes[0] and state.is_floating_point():
            return
        try:
            found = StateLayout.of(state, self.dtype)
        except InputError as error:
            raise InputError(f"{what}: {error}") from None
        if found != self:
            kind = lambda layout: layout.shapes if layout.is_tuple else layout.shapes[0]
            raise InputError(
                f"{what} maps a state of shape {kind(self)} to one of shape {kind(found)}: a layer's output has its "
                "input's shape; put layers that change it between stages, as transitions"
            )

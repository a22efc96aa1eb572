"""Propagators and transfers of torch tensors, called by the checks, which work on numpy arrays with the same memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from pint_fem.all_at_once.arrays import Array, is_tensor, quiet, tensor_of
from pint_fem.errors import InputError
from pint_fem.mgrit.transfer import Transfer

__all__ = ["array_of_state", "propagator_of_arrays", "transfer_of_arrays"]

_METHODS = frozenset({"step", "sweep", "advance", "tangent", "adjoint", "all_at_once"})


def array_of_state(state: Array) -> np.ndarray:
    """A copy of a typical state.

    Raises
    ------
    InputError
        If it is no CPU tensor of float64.
    """
    kind = str(state.dtype)
    if kind != "torch.float64" or state.device.type != "cpu":
        raise InputError(
            f"check: state is a tensor of {kind} on {state.device}: give a CPU tensor of torch.float64, "
            "such as state.double().cpu()"
        )
    return state.detach().numpy().copy()


class _Propagator:
    """A propagator that gets tensors with the memory of the arrays it is called with."""

    def __init__(self, propagator: Any):
        self.__dict__["_propagator"] = propagator

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._propagator, name)
        return _of_arrays(value) if name in _METHODS and value is not None else value

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._propagator, name, value)


def _of_arrays(method: Callable) -> Callable:
    """A method of tensors, for arrays; those whose rows run backwards are copied, as no tensor has such memory."""

    def call(*args: Any) -> Any:
        turned = {i: tensor_of(a.copy()) for i, a in enumerate(args) if isinstance(a, np.ndarray) and _is_turned(a)}
        given = [tensor_of(a) if isinstance(a, np.ndarray) and not _is_turned(a) else a for a in args]
        for i, tensor in turned.items():
            given[i] = tensor
        with quiet(next(filter(is_tensor, given), None)):
            result = method(*given)
        for i, tensor in turned.items():
            if args[i].flags.writeable:
                args[i][...] = tensor.numpy()
        return result.detach().numpy() if is_tensor(result) else result

    return call


def _is_turned(array: np.ndarray) -> bool:
    return min(array.strides, default=0) < 0


def propagator_of_arrays(propagator: Any) -> Any:
    """A propagator of tensors, for arrays."""
    return _Propagator(propagator)


def transfer_of_arrays(given: Any) -> Transfer | None:
    """A transfer of tensors, for arrays."""
    made = Transfer.make(given)
    if made is None:
        return None
    maps = made.restrict, made.prolong, made.restrict_transposed, made.prolong_transposed
    return Transfer(*(None if f is None else _of_arrays(f) for f in maps))  # type: ignore[arg-type]

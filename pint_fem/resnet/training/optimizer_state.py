"""State and options of an optimiser for the layers of a network, which need not be the same for all layers.

There is no state of layers that have been frozen from the beginning, and fewer steps are counted of those that were
frozen later; groups of parameters have learning rates of their own. So a checkpoint lists *runs* of layers:
``[first layer, last one + 1, names of the arrays, scalars, options]``. Rows of an array that a run does not name are
zero and are not read. Options are those of ``param_groups``, numbered in the head, by name of the parameter.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mpi4py import MPI

from pint_fem.errors import InputError
from pint_fem.resnet.training.network_rows import LayerRows, as_array

__all__ = [
    "gather_runs",
    "layer_runs",
    "optimizer_arrays",
    "option_texts",
    "options_of_parameters",
    "own_runs",
    "replace_state",
    "restored_options",
    "restored_scalars",
]

Optimizer = torch.optim.Optimizer
Run = list  # [first layer, last one + 1, names of arrays, scalars by parameter, options by parameter]


# -- states ------------------------------------------------------------------------------------------------------------
def _is_scalar(value: Any, p: torch.Tensor) -> bool:
    """Whether an entry of a parameter's state is a number, or a tensor of one that is not the parameter's shape."""
    if torch.is_tensor(value):
        return value.ndim == 0 or (value.numel() == 1 and value.shape != p.shape)
    return value is None or isinstance(value, bool | int | float)


def _entries(optimizer: Optimizer, rows: LayerRows, name: str, p: torch.Tensor) -> tuple[dict, dict]:
    """Arrays and scalars of the state of one tensor.

    Raises
    ------
    InputError
        On an entry that is neither, or that does not belong to single layers.
    """
    arrays, scalars = {}, {}
    for what, value in optimizer.state.get(p, {}).items():
        if _is_scalar(value, p):
            tensor = torch.is_tensor(value)
            scalars[what] = [str(value.dtype), value.tolist()] if tensor else value
        elif torch.is_tensor(value) and not (rows.stacked and value.shape[0] != len(p)):
            arrays[what] = value.detach()
        else:
            shown = tuple(value.shape) if torch.is_tensor(value) else type(value).__name__
            raise InputError(
                f"the state of {type(optimizer).__name__} has {what} {shown} of {rows.prefix}{name}, which does not "
                "belong to single layers: save without the optimiser"
            )
    return arrays, scalars


def optimizer_arrays(optimizer: Optimizer | None, rows: LayerRows) -> dict[str, torch.Tensor]:
    """The optimiser's arrays of the own layers by file name, ``(hi - lo, ...)``; zero for layers without."""
    out: dict[str, torch.Tensor] = {}
    for name in rows.tensors if optimizer else ():
        for lo, hi, p in rows.layers_of(name):
            for what, value in _entries(optimizer, rows, name, p)[0].items():
                key = f"optimizer.{rows.short}{name}.{what}"
                value = value if rows.stacked else value[None]
                if key not in out:
                    out[key] = value.new_zeros((rows.hi - rows.lo, *value.shape[1:]), device="cpu")
                if out[key].shape[1:] != value.shape[1:] or out[key].dtype != value.dtype:
                    raise InputError(f"{key} has not the same shape and type in all layers: save without the optimiser")
                out[key][lo - rows.lo : hi - rows.lo] = value
    return out


def layer_runs(optimizer: Optimizer | None, rows: LayerRows, options: Mapping[int, str]) -> list[Run]:
    """Runs of the own layers, with the options as text."""
    layers: list[tuple[list, dict, dict]] = [([], {}, {}) for _ in range(1 if rows.stacked else rows.hi - rows.lo)]
    for name in rows.tensors if optimizer else ():
        for (_, _, p), (found, values, texts) in zip(rows.layers_of(name), layers, strict=True):
            arrays, scalars = _entries(optimizer, rows, name, p)
            found += [f"optimizer.{rows.short}{name}.{what}" for what in sorted(arrays)]
            if scalars:
                values[name] = scalars
            if id(p) in options:
                texts[name] = options[id(p)]
    if rows.stacked:
        return [[rows.lo, rows.hi, *layers[0]]]
    return _joined([[rows.lo + i, rows.lo + i + 1, *layer] for i, layer in enumerate(layers)])


def _joined(runs: Sequence[Run]) -> list[Run]:
    """Consecutive runs with the same contents as one."""
    out = []
    for _, same in groupby(runs, key=lambda run: json.dumps(run[2:], sort_keys=True)):
        same = list(same)
        out.append([same[0][0], same[-1][1], *same[0][2:]])
    return out


def gather_runs(comm: MPI.Comm, runs: list[list[Run]], arrays: Mapping[str, torch.Tensor], texts: list[str]) -> tuple:
    """Describe the arrays, states and options of all ranks (collective).

    Parameters
    ----------
    comm
        All ranks of the network.
    runs, arrays
        Of each stage, and of the own layers.
    texts
        Options of this rank's groups of parameters, by their order.

    Returns
    -------
    kinds : dict
        Shape of a row and type of every array that any rank has.
    runs : list of list
        Of all layers of each stage, with numbers of options.
    options : list of str
        Different options of all groups.
    order : list of int or None
        Numbers of the options of the groups, where they are the same on all ranks.

    Raises
    ------
    InputError
        On every rank, where data groups or types differ.
    """
    kinds: dict[str, tuple] = {}
    parts: list[dict[int, list[Run]]] = [{} for _ in runs]
    numbers: dict[str, int] = {}
    orders = []
    mine = {key: (tuple(a.shape[1:]), as_array(a[:0]).dtype) for key, a in arrays.items()}
    for found, theirs, own in comm.allgather((mine, runs, texts)):
        for stage, (part, there) in enumerate(zip(parts, theirs, strict=True)):
            if there and part.setdefault(there[0][0], there) != there:
                where = f"layers {there[0][0]} to {there[-1][1] - 1}" + (f" of stage {stage}" if stage else "")
                raise InputError(f"the optimiser's state of {where} is not the same in all data groups")
        for key, kind in found.items():
            if kinds.setdefault(key, kind) != kind:
                raise InputError(f"{key} is {kind} on one rank, {kinds[key]} on another: use the same types on all")
        orders.append([numbers.setdefault(text, len(numbers)) for text in own])
    out = []
    for part in parts:
        every = [run for lo in sorted(part) for run in part[lo]]
        out.append([[*run[:4], {name: numbers[text] for name, text in run[4].items()}] for run in every])
    return kinds, out, list(numbers), orders[0] if all(o == orders[0] for o in orders) else None


def own_runs(folder: Path, runs: Sequence[Run], rows: LayerRows) -> list[Run]:
    """Runs that a checkpoint has of the own layers.

    Raises
    ------
    InputError
        Where layers that are stacked here belong to runs that differ.
    """
    mine = [run for run in runs if run[0] < rows.hi and run[1] > rows.lo]
    for other in mine[1:] if rows.stacked else ():
        if other[2:4] != mine[0][2:4]:
            raise InputError(
                f"checkpoint {folder}: layer {other[0]} was trained for other steps than layer {mine[0][0]} (frozen "
                "for a while), and one rank of this run has both: take as many ranks as it was written with, or load "
                "it without an optimiser and go on with a new one"
            )
    return mine


def restored_scalars(values: Mapping[str, Any], version: int) -> dict[str, Any]:
    """Scalars of the state of a parameter, from those of a head."""
    if version < 3:
        return {what: torch.tensor(value) if what == "step" else value for what, value in values.items()}
    tensor = lambda value: torch.tensor(value[1], dtype=getattr(torch, value[0].removeprefix("torch.")))
    return {what: tensor(value) if isinstance(value, list) else value for what, value in values.items()}


def replace_state(optimizer: Optimizer, parameter: torch.Tensor, state: dict) -> None:
    """Set an optimiser's state of a parameter; an empty one removes it."""
    optimizer.state.pop(parameter, None)
    if state:
        optimizer.state[parameter].update(state)


# -- options of groups of parameters -----------------------------------------------------------------------------------
def _plain(value: Any) -> Any:
    """An option as JSON takes it; raises ``TypeError`` where there is no such form."""
    if torch.is_tensor(value):
        return {"tensor": value.tolist(), "dtype": str(value.dtype)}
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, tuple):
        return {"tuple": [_plain(v) for v in value]}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError


def _option(value: Any) -> Any:
    """The inverse of :func:`_plain`."""
    if isinstance(value, dict) and "tensor" in value:
        return torch.tensor(value["tensor"], dtype=getattr(torch, value["dtype"].removeprefix("torch.")))
    if isinstance(value, dict):
        return tuple(_option(v) for v in value["tuple"])
    return [_option(v) for v in value] if isinstance(value, list) else value


def option_texts(optimizer: Optimizer | None) -> list[str]:
    """Options of each group of parameters as text, without those that JSON has no form for (functions)."""
    out = []
    for group in optimizer.param_groups if optimizer else ():
        found = {}
        for key, value in group.items():
            if key not in ("params", "param_names"):
                try:
                    found[key] = _plain(value)
                except TypeError:
                    continue
        out.append(json.dumps(found, sort_keys=True))
    return out


def options_of_parameters(optimizer: Optimizer | None) -> dict[int, str]:
    """Options as text by ``id`` of the parameter."""
    groups = optimizer.param_groups if optimizer else ()
    return {id(p): t for group, t in zip(groups, option_texts(optimizer), strict=True) for p in group["params"]}


def restored_options(
    optimizer: Optimizer, saved: Callable[[torch.Tensor], set[str]], order: Sequence[str] | None
) -> list[tuple[dict, dict]]:
    """The groups of an optimiser, each with the options that were written of its parameters.

    Parameters
    ----------
    optimizer
        The optimiser of the run that goes on.
    saved
        Options, as text, that were written of a parameter.
    order
        Options of the groups by their order, for a group without parameters on this rank.

    Raises
    ------
    InputError
        Where parameters of one group were in groups with other options.
    """
    out = []
    for i, group in enumerate(optimizer.param_groups):
        texts = sorted({text for p in group["params"] for text in saved(p)})
        if not texts and order is not None and i < len(order):
            texts = [order[i]]
        if len(texts) > 1:
            one, two = (json.loads(text) for text in texts[:2])
            key = next(k for k in {**one, **two} if one.get(k) != two.get(k))
            raise InputError(
                f"group {i} of the optimiser has parameters that were written in groups with {key} = {one.get(key)} "
                f"and {two.get(key)}: make the optimiser with the same groups, or load without it"
            )
        if texts:
            out.append((group, {k: _option(v) for k, v in json.loads(texts[0]).items()}))
    return out

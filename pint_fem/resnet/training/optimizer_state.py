"""State of an optimiser for the stacked parameters of the own layers, which need not be the same on all ranks.

There is no state of layers that have been frozen from the beginning, and fewer steps are counted of those that were
frozen later. So a checkpoint lists a part for the layers of each rank that wrote it: ``[first layer, last one + 1,
names of the arrays, scalars]``. Rows of an array that a part does not name are zero and are not read.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from pint_fem.errors import InputError
from pint_fem.resnet.network import LayerParallelResNet

__all__ = ["gather_parts", "layer_arrays", "layer_scalars", "part_of_own_layers", "replace_state"]

Optimizer = torch.optim.Optimizer


def layer_arrays(net: LayerParallelResNet, optimizer: Optimizer | None) -> dict[str, torch.Tensor]:
    """Parameters of the own layers and the optimiser's arrays of the same shapes, by file name."""
    out = {f"theta.{name}": net.theta[name].detach() for name in net.layer.shapes}
    for name in net.layer.shapes if optimizer else ():
        for key, value in optimizer.state.get(net.theta[name], {}).items():
            if torch.is_tensor(value) and value.shape == net.theta[name].shape:
                out[f"optimizer.{name}.{key}"] = value
    return out


def layer_scalars(net: LayerParallelResNet, optimizer: Optimizer | None) -> dict[str, dict[str, float]]:
    """The optimiser's scalars for the parameters of the own layers, by their names."""
    out = {}
    for name in net.layer.shapes if optimizer else ():
        state = optimizer.state.get(net.theta[name], {})
        out[name] = {
            k: float(v)
            for k, v in state.items()
            if v is not None and (not torch.is_tensor(v) or v.numel() == 1 != net.theta[name].numel())
        }
    return out


def gather_parts(
    net: LayerParallelResNet, arrays: dict[str, torch.Tensor], scalars: dict
) -> tuple[dict[str, tuple[tuple[int, ...], np.dtype]], list]:
    """Describe the arrays and scalars of all ranks (collective).

    Returns
    -------
    kinds : dict
        Shape of a row and type of every array that any rank has.
    parts : list
        First layer, last one + 1, names of the arrays and scalars of each rank's layers.

    Raises
    ------
    InputError
        On every rank, where data groups or types differ.
    """
    kinds, parts = {}, {}
    mine = {key: (tuple(a.shape[1:]), a.numpy().dtype) for key, a in arrays.items()}
    for lo, hi, found, values in net.grid.comm.allgather((net.lo, net.hi, mine, scalars)):
        part = [lo, hi, sorted(found), values]
        if parts.setdefault(lo, part) != part:
            raise InputError(f"the optimiser's state of layers {lo} to {hi - 1} is not the same in all data groups")
        for key, kind in found.items():
            if kinds.setdefault(key, kind) != kind:
                raise InputError(f"{key} is {kind} on one rank, {kinds[key]} on another: use the same types on all")
    return kinds, [parts[lo] for lo in sorted(parts)]


def part_of_own_layers(folder: Path, head: dict, net: LayerParallelResNet) -> tuple[list[str], dict]:
    """Names of the arrays, and the scalars, that a checkpoint has of the own layers.

    Raises
    ------
    InputError
        Where the own layers belong to parts that differ.
    """
    parts = head.get("parts", [[0, net.nlayers, head["arrays"], head["scalars"]]])  # the first version has one for all
    mine = [part for part in parts if part[0] < net.hi and part[1] > net.lo]
    for other in mine[1:]:
        if other[2:] != mine[0][2:]:
            raise InputError(
                f"checkpoint {folder}: layer {other[0]} was trained for other steps than layer {mine[0][0]} (frozen "
                "for a while), and one rank of this run has both: take as many ranks as it was written with, or load "
                "it without an optimiser and go on with a new one"
            )
    return mine[0][2], mine[0][3]


def replace_state(optimizer: Optimizer, parameter: torch.nn.Parameter, state: dict) -> None:
    """Set an optimiser's state of a parameter; an empty one removes it."""
    optimizer.state.pop(parameter, None)
    if state:
        optimizer.state[parameter].update(state)

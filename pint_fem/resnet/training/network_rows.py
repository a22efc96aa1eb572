"""The layers of a network as rows of arrays: for each name of a parameter or buffer a row per layer.

A :class:`~pint_fem.resnet.LayerParallelResNet` has its rows in stacked tensors; in other networks every layer is a
module with tensors of its own, and the layers of a stage have the same names, shapes and types. What is at the ends of
a network, and between its stages, is on the first or the last rank.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from pint_fem.errors import InputError
from pint_fem.resnet.blocks.network import LayerParallel
from pint_fem.resnet.network import LayerParallelResNet
from pint_fem.resnet.parallel.module import LayerParallelModule
from pint_fem.resnet.parallel.parameters import Elsewhere

__all__ = ["LayerRows", "as_array", "as_tensor", "ends_of", "fingerprint", "iterations", "rows_of"]

Tensor = torch.Tensor
_PROBES = torch.linspace(-2, 2, 9, dtype=torch.float64)


@dataclass
class LayerRows:
    """The own layers ``lo .. hi - 1`` of ``count`` layers of one structure.

    Attributes
    ----------
    bounds : sequence of int
        Numbers of the ranks' first layers, and ``count``.
    prefix, short : str
        What the names of the files of parameters, and of the optimiser's arrays, begin with.
    stacked : bool
        Whether ``tensors`` has one tensor ``(hi - lo, ...)`` for each name, else one for each own layer.
    tensors : dict
        Lists of parameters and buffers by name.
    """

    prefix: str
    short: str
    bounds: Sequence[int]
    lo: int
    hi: int
    stacked: bool
    tensors: dict[str, Sequence[Tensor]] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """Number of layers on all ranks."""
        return self.bounds[-1]

    @property
    def structure(self) -> list[list]:
        """Name, shape and type of each parameter and buffer of a layer."""
        shape = lambda t: list(t.shape[1:] if self.stacked else t.shape)
        return [[name, shape(own[0]), str(own[0].dtype)] for name, own in self.tensors.items() if len(own)]

    def stack(self, name: str) -> Tensor:
        """The own rows of a parameter or buffer, ``(hi - lo, ...)``."""
        own = [t.detach().cpu() for t in self.tensors[name]]
        return own[0] if self.stacked else torch.stack(own)

    def set(self, name: str, rows: Tensor) -> None:
        """Set the own rows of a parameter or buffer."""
        for t, values in zip(self.tensors[name], [rows] if self.stacked else rows, strict=True):
            t.copy_(values)

    def layers_of(self, name: str) -> Iterator[tuple[int, int, Tensor]]:
        """First layer, last one + 1 and tensor of each tensor of a name."""
        if self.stacked:
            yield self.lo, self.hi, self.tensors[name][0]
        else:
            yield from ((self.lo + i, self.lo + i + 1, t) for i, t in enumerate(self.tensors[name]))


def as_array(t: Tensor) -> np.ndarray:
    """The values of a tensor; those of types that numpy does not have as integers of the same size."""
    t = t.detach().cpu().contiguous()
    return (t.view(torch.int16) if t.dtype == torch.bfloat16 else t).numpy()


def as_tensor(a: np.ndarray, dtype: torch.dtype) -> Tensor:
    """The inverse of :func:`as_array`."""
    t = torch.from_numpy(a)
    return t.view(dtype) if dtype == torch.bfloat16 else t


def rows_of(net: LayerParallelModule, *, buffers: bool = True) -> list[LayerRows]:
    """The own layers of each stage, with or without their ``buffers``.

    Raises
    ------
    InputError
        Where the own layers of a stage do not have the same parameters and buffers.
    """
    if isinstance(net, LayerParallelResNet):
        tensors: dict[str, Sequence[Tensor]] = {name: [net.theta[name]] for name in net.layer.shapes}
        return [LayerRows("theta.", "", net.sweeps.bounds, net.lo, net.hi, True, tensors)]
    assert isinstance(net, LayerParallel)
    return [_rows_of_stage(number, stage, buffers) for number, stage in enumerate(net.stages)]


def _rows_of_stage(number: int, stage: Any, buffers: bool) -> LayerRows:
    """The own layers of a stage of modules."""
    lo, hi = stage.sweeps.lo, stage.sweeps.hi
    out = LayerRows(f"stage{number}.", f"stage{number}.", stage.sweeps.bounds, lo, hi, False)
    states = [stage.own[n].state_dict(keep_vars=True) for n in range(lo, hi)]
    described = [{name: _kind(t) for name, t in state.items()} for state in states]
    for n, kinds in enumerate(described):
        if kinds != described[0]:
            name = next(k for k in {**kinds, **described[0]} if kinds.get(k) != described[0].get(k))
            raise InputError(
                f"layer {lo + n} of stage {number} has {name} {kinds.get(name, 'missing')}, layer {lo} has "
                f"{described[0].get(name, 'none')}: give stages of layers of one structure"
            )
        if other := [name for name, kind in kinds.items() if kind is None]:
            raise InputError(f"layer {lo + n} of stage {number} has a state {other[0]} that is no tensor")
    first = states[0] if states else {}
    names = [name for name, t in first.items() if buffers or isinstance(t, nn.Parameter)]
    out.tensors = {name: [state[name] for state in states] for name in names}
    return out


def _kind(t: Any) -> tuple | None:
    """Shape and type of a tensor."""
    return (tuple(t.shape), str(t.dtype)) if torch.is_tensor(t) else None


def ends_of(net: LayerParallelModule) -> dict[str, nn.Module]:
    """The modules at the ends of a network and between its stages, as far as this rank has them, by name."""
    named = {"opening": net.opening, "closing": net.closing}
    found = {name: m for name, m in named.items() if not isinstance(m, Elsewhere)}
    if net.grid.is_last and len(getattr(net, "transitions", ())):
        found["transitions"] = net.transitions
    return found


def _text(module: nn.Module) -> str:
    """What a module is, without addresses in memory."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(module))


def fingerprint(net: LayerParallelModule) -> dict[str, Any]:
    """Properties that have to be equal in a network that goes on (collective)."""
    found: dict[str, str | None] = {"opening": None, "closing": None}
    for ends in net.grid.comm.allgather({name: _text(m) for name, m in ends_of(net).items()}):
        found |= ends
    if isinstance(net, LayerParallelResNet):
        return _of_stacked_layers(net) | found
    return _of_blocks(net) | found


def _of_stacked_layers(net: LayerParallelResNet) -> dict[str, Any]:
    """Kind and number of layers of one kind."""
    act = net.layer.activation
    return {
        "layers": net.nlayers,
        "parameters": {name: list(shape) for name, shape in net.layer.shapes.items()},
        "dtype": str(net.dtype),
        "final_time": net.final_time,
        "kind": type(net.layer).__name__,
        "activation": act.name,
        "values of the activation": [round(v, 9) for v in act.values(_PROBES)],
    }


def _of_blocks(net: LayerParallelModule) -> dict[str, Any]:
    """Structure and number of layers that are modules (collective)."""
    assert isinstance(net, LayerParallel)
    own = []
    for rows, stage in zip(rows_of(net), net.stages, strict=True):
        own.append((rows.structure, _text(stage.own[rows.lo]) if rows.hi > rows.lo else ""))
    every = net.grid.layer_comm.allgather(own)
    for number in range(len(net.stages)):
        for rank, theirs in enumerate(every):
            if theirs[number][1] and theirs[number][0] != every[0][number][0]:
                raise InputError(
                    f"layers of stage {number} have other parameters or buffers on layer rank {rank} than on 0: give "
                    "stages of layers of one structure"
                )
    return {
        "layers": [stage.count for stage in net.stages],
        "parameters and buffers": [structure for structure, _ in every[0]],
        "first layers": [text for _, text in every[0]],
        "residual": net.residual,
        "h": net.h,
    }


def iterations(net: LayerParallelModule) -> list[dict[str, list]]:
    """Numbers of cycles of both kinds of sweeps of each stage, and the rule by which they change."""
    out = []
    for stage in net.stages:
        out.append({})
        for kind, its in (("forward", stage.forward_sweeps), ("backward", stage.backward_sweeps)):
            rule = None if its.adaptive is None else [its.adaptive.every, its.adaptive.enough, its.adaptive.most]
            out[-1][kind] = [its.cycles, its.serial, its.batches, rule]
    return out

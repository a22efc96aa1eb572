"""Several layers in one batched call: stacked parameters and states, mapped by ``torch.vmap``.

Layers of one structure differ in their parameters and buffers only. Whether a batched call is faster depends on the
layers and on the device: for small ones, and on accelerators, the calls of single layers cost more than the arithmetic.
So both are timed at the states of a pass, compared with each other, and the faster one is taken from then on.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from torch import nn

from pint_fem.errors import InputError
from pint_fem.resnet.blocks.graphs import Graph, LayerGraphs, naming_writes, require_unwritten

__all__ = ["BatchedLayers", "BatchingChoice"]

Tensor = torch.Tensor


def _structure(module: nn.Module) -> tuple:
    """What has to be the same in layers of one batched call: description, names, shapes, types and modes."""
    described = re.sub(r" at 0x[0-9a-f]+", "", repr(module))
    tensors = [(name, tuple(t.shape), t.dtype, t.device) for name, t in module.state_dict(keep_vars=True).items()]
    return described, tuple(map(str, tensors)), tuple(m.training for m in module.modules())


class BatchedLayers:
    """Batched calls of the own layers of a stage.

    Parameters
    ----------
    modules
        The own layers by number.

    Attributes
    ----------
    structure : tuple
        Of each of the layers: description, names and types of parameters, modes.

    Raises
    ------
    InputError
        Where the layers have different structures.
    """

    def __init__(self, modules: Mapping[int, nn.Module]):
        self._modules = dict(modules)
        self._rows = {n: i for i, n in enumerate(self._modules)}
        first = next(iter(self._modules))
        self.structure = _structure(self._modules[first])
        for n, module in self._modules.items():
            if _structure(module) != self.structure:
                raise InputError(
                    f"layers {first} and {n} have different structures or modes, and batched=True takes layers of one: "
                    "give batched=False, or stages with layers of one structure each"
                )
        self._template = self._modules[first]
        self._theta: dict[str, Tensor] = {}
        self._buffers: dict[str, Tensor] = {}

    def has(self, layers: Sequence[int]) -> bool:
        """Whether all of some layers are among these."""
        return all(n in self._rows for n in layers)

    def update(self) -> None:
        """Take the present parameters and buffers."""
        with torch.no_grad():
            each = [dict(m.named_parameters()) for m in self._modules.values()]
            self._theta = {name: torch.stack([p[name] for p in each]) for name in each[0]}
            each = [dict(m.named_buffers()) for m in self._modules.values()]
            self._buffers = {name: torch.stack([b[name] for b in each]) for name in each[0]}

    def _select(self, stacked: Mapping[str, Tensor], layers: Sequence[int]) -> dict[str, Tensor]:
        """Rows of stacked tensors: views where the layers are evenly spaced."""
        rows = [self._rows[n] for n in layers]
        stride = rows[1] - rows[0] if len(rows) > 1 else 1
        if stride > 0 and rows == list(range(rows[0], rows[-1] + 1, stride)):
            where: Any = slice(rows[0], rows[-1] + 1, stride)
        else:
            where = rows
        return {name: t[where] for name, t in stacked.items()}

    def _values(self, graphs: LayerGraphs, u: Tensor, theta: dict, buffers: dict) -> Tensor:
        """``f`` or ``b`` of some layers as one array."""
        layout, extra, template = graphs.layout, graphs.now.extra, self._template

        def one(parameters: dict, constants: dict, state: Tensor) -> Tensor:
            y = torch.func.functional_call(template, (parameters, constants), (layout.unpack(state), *extra))
            layout.require(y, "a layer")
            return layout.pack(y)

        # a random number in a layer raises here: its seed is that of the layer, which a batched call does not have
        return torch.vmap(one, randomness="error")(theta, buffers, u)

    def step(self, graphs: LayerGraphs, layers: Sequence[int], u: Tensor, stride: int, *, record: bool) -> Tensor:
        """The next states ``(len(layers), *state)`` of a level from those in ``u``."""
        if record and graphs.keeps:
            y = self.record(graphs, layers, u).y.detach()
        else:
            if record:
                for i, n in enumerate(layers):
                    graphs.states[n] = u[i].data
            with torch.no_grad():
                buffers = {name: b.clone() for name, b in self._select(self._buffers, layers).items()}
                alias = u.data
                y = self._values(graphs, alias, self._select(self._theta, layers), buffers)
                require_unwritten(alias, "a layer")
            if record:
                graphs.note_buffers(layers, buffers)
        return graphs.advance(u, y, stride)

    def record(self, graphs: LayerGraphs, layers: Sequence[int], u: Tensor) -> Graph:
        """The values of some layers with their graph, which is kept."""
        trained = {name for n in layers for name, p in self._modules[n].named_parameters() if p.requires_grad}
        theta = {
            name: t.detach().requires_grad_(name in trained) for name, t in self._select(self._theta, layers).items()
        }
        buffers = {name: b.clone() for name, b in self._select(self._buffers, layers).items()}
        leaf = u.data.requires_grad_()
        with torch.enable_grad(), naming_writes("a layer"):
            y = self._values(graphs, leaf, theta, buffers)
        graph = Graph(layers, leaf, y, {name: theta[name] for name in theta if name in trained}, stacked=True)
        graphs.keep(graph, buffers)
        return graph


class BatchingChoice:
    """Whether batched calls are taken, by measurement.

    Parameters
    ----------
    given
        ``"auto"``, or the choice itself.
    """

    def __init__(self, given: str | bool):
        if given not in ("auto", True, False):
            raise InputError(f"batched {given!r}: give 'auto', True or False")
        self.given = given
        self._chosen: dict[tuple, bool] = {}
        self._measured: dict[tuple, tuple] = {}
        self.reason = "given" if given != "auto" else "not measured yet: layer by layer"

    def __call__(self, key: tuple) -> bool:
        """Whether to take batched calls in a pass of some shape, type and mode; not before it was measured."""
        if self.given != "auto":
            return bool(self.given)
        return self._chosen.get(key, False) and not torch.are_deterministic_algorithms_enabled()

    def layers(self, key: tuple, modules: Mapping[int, nn.Module]) -> BatchedLayers | None:
        """Batched calls of layers with their present parameters.

        With ``"auto"`` none, where layers have come to differ, in what is frozen to its statistics for instance, or
        have another structure or mode than when they were measured: then this rank goes layer by layer.

        Raises
        ------
        InputError
            Where batched calls were asked for and layers have different structures or modes.
        """
        try:
            out = BatchedLayers(modules)
        except InputError:
            if self.given != "auto":
                raise
            return None
        if out.structure != self._measured.get(key, out.structure):
            return None
        out.update()
        return out

    def is_open(self, key: tuple) -> bool:
        """Whether a pass is to be measured."""
        return self.given == "auto" and key not in self._chosen

    def measure(
        self, key: tuple, graphs: LayerGraphs, modules: Mapping[int, nn.Module], U: Tensor, stride: int, comm: MPI.Comm
    ) -> None:
        """Choose by one evaluation and product of the layers at every ``stride``-th own point (collective).

        Parameters
        ----------
        key
            Of passes that are decided alike.
        graphs, modules
            Of the pass, and the own layers.
        U
            States before the own layers, in their order.
        stride
            Distance of the layers that a relaxation evaluates together.
        comm
            Ranks that share the layers, which decide alike.
        """
        layers = list(modules)[::stride]
        times, fits = np.zeros(2), len(layers) > 1
        if fits:
            rows = U[: len(modules) : stride]
            try:
                self._measured[key] = _structure(modules[layers[0]])
                times, fits = _time_both(graphs, modules, layers, rows)
            except (RuntimeError, NotImplementedError, InputError) as error:
                fits, self.reason = False, f"layer by layer: {type(error).__name__}: {error}".splitlines()[0]
        mine = np.array([*times, float(not fits and len(layers) > 1), float(fits)])
        total = np.empty_like(mine)
        comm.Allreduce(mine, total)
        single, batched, refused, measured = total
        self._chosen[key] = bool(measured and not refused and batched < single)
        if measured and not refused:
            ratio = single / max(batched, 1e-12)
            self.reason = f"{'batched' if self._chosen[key] else 'layer by layer'}: measured ratio {ratio:.2f}"


def _time_both(
    graphs: LayerGraphs, modules: Mapping[int, nn.Module], layers: Sequence[int], u: Tensor
) -> tuple[np.ndarray, bool]:
    """Seconds of an evaluation and a product layer by layer and batched, and whether both give the same."""
    together = BatchedLayers(modules)
    together.update()

    def single() -> list[Tensor]:
        scratch = graphs.scratch()
        y = torch.stack([scratch.record(n, u[i]).y.detach() for i, n in enumerate(layers)])
        return [y, scratch.adjoint(layers, torch.ones_like(u), 1, gradients=True)]

    def batched() -> list[Tensor]:
        scratch = graphs.scratch()
        y = together.record(scratch, layers, u).y.detach()
        return [y, scratch.adjoint(layers, torch.ones_like(u), 1, gradients=True)]

    seconds, results = np.zeros(2), []
    for i, work in enumerate((single, batched)):
        results.append(work())
        best = np.inf
        for _ in range(2):
            start = time.perf_counter()
            out = work()
            out[0].reshape(-1)[:1].cpu()  # waits for an accelerator
            best = min(best, time.perf_counter() - start)
        seconds[i] = best
    tolerance = 1e-3 if u.dtype != torch.float64 else 1e-8
    same = all(torch.allclose(a, b, rtol=tolerance, atol=tolerance) for a, b in zip(*results, strict=True))
    if not same:
        raise InputError("batched calls give other values than single ones")
    return seconds, same

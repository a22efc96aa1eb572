"""Several layers in one batched call: stacked parameters and states, mapped by ``torch.vmap``.

Layers of one structure differ in their parameters and buffers only. Whether a batched call is faster depends on the
layers and on the device: for small ones, and on accelerators, the calls of single layers cost more than the arithmetic.
So both are timed at the states of a pass, compared with each other, and the faster one is taken from then on.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from enum import Enum
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from torch import nn

from pint_fem.errors import InputError
from pint_fem.resnet.blocks.graphs import Graph, LayerGraphs, naming_writes, require_unwritten
from pint_fem.resnet.parallel.agreement import batch_digest

__all__ = ["BatchedLayers", "BatchingChoice"]

Tensor = torch.Tensor


_MODULE = frozenset(vars(nn.Module())) - {"training"}
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_PLAIN = (int, float, complex, str, bytes, type(None), Enum, type, torch.dtype, torch.device, BuiltinFunctionType)


def _structure(module: nn.Module) -> tuple:
    """What has to be the same in layers of one batched call: types of the modules, their modes and other attributes,
    such as a rate or a shift, and names, shapes and types of tensors.
    """
    parts = tuple((name, type(m).__qualname__, _attributes(m)) for name, m in module.named_modules())
    tensors = [(name, t.shape, t.dtype, t.device) for name, t in module.state_dict(keep_vars=True).items()]
    return parts, tuple(tensors)


def _attributes(module: nn.Module) -> tuple:
    """Attributes of a module that are no parameters, buffers or modules, and its mode."""
    return tuple((name, _comparable(value)) for name, value in vars(module).items() if name not in _MODULE)


def _comparable(value: Any, depth: int = 0) -> Any:
    """An attribute of a module as what is equal for copies of it: a function by its code and what it encloses, tensors
    and arrays by their values, other objects by their type and attributes.
    """
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, nn.Parameter) or isinstance(value, nn.Module) or depth > 6:
        return type(value)  # those of the module itself, such as the flat weights of recurrent ones
    if torch.is_tensor(value) or isinstance(value, np.ndarray):
        return batch_digest(value.detach() if torch.is_tensor(value) else value)
    if isinstance(value, Mapping):
        return "mapping", tuple((str(k), _comparable(v, depth + 1)) for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return "sequence", tuple(_comparable(v, depth + 1) for v in value)
    if isinstance(value, FunctionType):
        cells = [c.cell_contents for c in value.__closure__ or ()]
        return value.__code__, _comparable([value.__defaults__, value.__kwdefaults__, cells], depth + 1)
    if isinstance(value, (MethodType, partial)):
        parts = (value.func, value.args, value.keywords) if isinstance(value, partial) else (value.__func__,)
        return _comparable(parts, depth + 1)
    return type(value), _comparable(getattr(value, "__dict__", None), depth + 1)


def _hooked(module: nn.Module) -> bool:
    """Whether a module has hooks other than torch's own, as of normalised weights: those take one layer's values."""
    hooks = (h for m in module.modules() for name in _HOOKS for h in getattr(m, name).values())
    return any(not type(h).__module__.startswith("torch.nn.utils.") for h in hooks)


class BatchedLayers:
    """Batched calls of the own layers of a stage.

    Parameters
    ----------
    modules
        The own layers by number.

    Attributes
    ----------
    structure : tuple
        Of each of the layers: types, modes and attributes of modules, names and types of tensors.

    Raises
    ------
    InputError
        Where the layers have different structures, or hooks.
    """

    def __init__(self, modules: Mapping[int, nn.Module]):
        self._modules = dict(modules)
        self._rows = {n: i for i, n in enumerate(self._modules)}
        first = next(iter(self._modules))
        self.structure = _structure(self._modules[first])
        what = None
        for n, module in self._modules.items():
            if _structure(module) != self.structure:
                what = f"layers {first} and {n} have different structures, modes or attributes"
            elif _hooked(module):
                what = f"layer {n} has hooks"
            if what is not None:
                raise InputError(
                    f"{what}, and a batched call takes layers that differ in parameters and buffers only: give "
                    "batched=False, or stages with layers of one structure each"
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
        """``f`` or ``b`` of some layers as one array; ``buffers`` takes those that the evaluation has changed."""
        layout, extra, template = graphs.layout, graphs.now.extra, self._template

        def one(parameters: dict, constants: dict, state: Tensor) -> tuple[Tensor, dict]:
            tensors = {**parameters, **constants}
            y = torch.func.functional_call(template, tensors, (layout.unpack(state), *extra))
            layout.require(y, "a layer")
            return layout.pack(y), {name: tensors[name].detach() for name in constants}

        # a random number in a layer raises here: its seed is that of the layer, which a batched call does not have
        y, changed = torch.vmap(one, randomness="error")(theta, buffers, u)
        buffers.update(changed)  # also those that the layers have replaced
        return y

    def step(self, graphs: LayerGraphs, layers: Sequence[int], u: Tensor, stride: int, *, record: bool) -> Tensor:
        """The next states ``(len(layers), *state)`` of a level from those in ``u``."""
        if record and graphs.keeps:
            y = self.record(graphs, layers, u).y.detach()
        else:
            if record:
                for i, n in enumerate(layers):
                    graphs.note_state(n, u[i])
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

r"""Values of layers and their derivatives: one graph of autograd for each layer at the final states.

A layer is :math:`u + h f(u)` (``residual``), or the output :math:`b(u)` of the module; on a level whose points are
:math:`m` layers apart it is :math:`u + m h f(u)`, or :math:`u + m (b(u) - u)`. The graph of :math:`f` or :math:`b` is
recorded at the states of the finest level and serves all levels of the backward sweep,

.. math:: \lambda + m h\, f'(u)^T \lambda , \qquad \lambda + m\, (b'(u)^T \lambda - \lambda) .

Every evaluation begins with a seed of its layer and pass. Buffers, such as the statistics of normalisation, change once
in a pass, by the recorded evaluation; all others leave them as they were.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import nn
from torch.utils._pytree import tree_flatten

from pint_fem.errors import InputError
from pint_fem.resnet.blocks.mean_layers import MeanKey
from pint_fem.resnet.parallel.passes import Pass
from pint_fem.resnet.parallel.states import StateLayout

__all__ = ["Graph", "LayerGraphs", "naming_writes", "require_unwritten"]

Tensor = torch.Tensor
Number = int | MeanKey
"""Of a layer, or of the mean of some."""


_WRITES = "writes to its input: give a module that does not, such as ReLU(inplace=False) where it comes first"


def require_unwritten(u: Tensor, what: str) -> None:
    """Refuse layers that have written to a new tensor of the solver's memory.

    Raises
    ------
    InputError
        Naming ``what`` did.
    """
    if u._version:
        raise InputError(f"{what} {_WRITES}")


@contextmanager
def naming_writes(what: str) -> Iterator[None]:
    """What torch raises where a layer ``what`` writes to the leaf of its graph, as an :class:`InputError`."""
    try:
        yield
    except RuntimeError as error:
        if "a leaf Variable that requires grad" in str(error):
            raise InputError(f"{what} {_WRITES} ({error})") from error
        raise


@contextmanager
def _without_hooks(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Leave out hooks of parameters, which torch calls where the gradients of the network are added up."""
    hooks = [(p._backward_hooks, dict(p._backward_hooks)) for p in parameters if p._backward_hooks]
    for registered, _ in hooks:
        registered.clear()
    try:
        yield
    finally:
        for registered, before in hooks:
            registered.update(before)


class Graph:
    """Values of some layers with their graph.

    Parameters
    ----------
    layers
        Numbers of the layers: one, or those of a batched call.
    u, y
        States that they were evaluated at, and values of ``f`` or ``b``: arrays of one layer, or stacked.
    theta
        Their parameters that have derivatives, by name: of the layer itself, or stacked.
    stacked
        Whether the arrays are stacked.
    """

    def __init__(self, layers: Sequence[Number], u: Tensor, y: Tensor, theta: Mapping[str, Tensor], stacked: bool):
        self.layers, self.u, self.y, self.theta, self.stacked = list(layers), u, y, dict(theta), stacked
        self.place = {n: i for i, n in enumerate(self.layers)}

    def derivatives(self, v: Tensor, extra: Sequence[Tensor], gradients: bool) -> tuple[Tensor, list, list]:
        """The vector-Jacobian products with ``v`` for the states, and for the parameters and extra inputs if
        ``gradients`` are wanted.
        """
        names = [name for name, p in self.theta.items() if p.requires_grad]  # others were frozen after the recording
        theta = [self.theta[name] for name in names]
        if not self.y.requires_grad:
            return torch.zeros_like(self.u), [None] * len(self.theta), [None] * len(extra)
        wanted = [self.u, *(theta if gradients else ()), *(extra if gradients else ())]
        with _without_hooks(theta if gradients else ()):
            found = torch.autograd.grad(self.y, wanted, v, retain_graph=True, allow_unused=True)
        first = torch.zeros_like(self.u) if found[0] is None else found[0]
        of_theta = dict(zip(names, found[1:], strict=False)) if gradients else {}
        return first, [of_theta.get(name) for name in self.theta], list(found[1 + len(names) :])


class LayerGraphs:
    """Evaluations of the layers of a stage in one pass.

    Parameters
    ----------
    modules
        Layers of this rank by number: its own, and copies of others'.
    own
        Numbers of the own ones.
    now, layout
        The pass, and the layout of states.
    residual, h
        As in the network.
    offset
        Number of layers in the stages before.
    keeps
        Whether graphs are kept until the backward sweep, or made again in it.

    Attributes
    ----------
    graphs : dict
        Recorded graphs by the number of the layer.
    parameters : dict
        Parameters of the own layers by number, as they are in the pass.
    parameter_gradients, extra_gradients : dict
        Last derivatives by the number of the layer.
    graph_bytes : int
        What autograd has saved for the first recorded layer.
    """

    def __init__(
        self, modules: Mapping[Number, nn.Module], own: range, now: Pass, layout: StateLayout, *, residual: bool,
        h: float, offset: int, keeps: bool,
    ):  # fmt: skip
        self.modules, self.own, self.now, self.layout = dict(modules), own, now, layout
        self.residual, self.h, self.offset, self.keeps = residual, h, offset, keeps
        self.graphs: dict[Number, Graph] = {}
        self.states: dict[Number, Tensor] = {}
        self.parameter_gradients: dict[Number, dict[str, Tensor | None]] = {}
        self.extra_gradients: dict[Number, list[Tensor | None]] = {}
        self.graph_bytes = 0
        self.parameters: dict[Number, dict[str, Tensor]] = {n: dict(modules[n].named_parameters()) for n in own}
        self._before: dict[Number, dict[str, Tensor]] = {}
        self._after: dict[Number, dict[str, Tensor]] = {}
        self._replaced: dict[Number, dict[str, Tensor]] = {}
        self._changing: set[Number] = set()
        self._note_changing(modules)

    def _note_changing(self, modules: Mapping[Number, nn.Module]) -> None:
        """Find the layers with buffers that evaluations may change."""
        for n, module in modules.items():
            if next(module.buffers(), None) is not None and any(m.training for m in module.modules()):
                self._changing.add(n)

    def adopt(self, modules: Mapping[Number, nn.Module]) -> None:
        """Add copies of other ranks' layers, or mean layers."""
        self.modules = {**self.modules, **modules}
        self._note_changing(modules)

    def discard(self, keys: Iterable[MeanKey]) -> None:
        """Forget mean layers, their states and graphs."""
        for key in keys:
            for each in (self.modules, self.states, self.graphs):
                each.pop(key, None)  # type: ignore[attr-defined]
            self._changing.discard(key)

    # -- extra inputs --------------------------------------------------------------------------------------------------
    @property
    def all_extra_tensors(self) -> list[Tensor]:
        """Tensors among the extra inputs."""
        return [t for t in tree_flatten(self.now.extra)[0] if torch.is_tensor(t)]

    @property
    def extra_tensors(self) -> list[Tensor]:
        """Tensors among the extra inputs that have derivatives."""
        return [t for t in self.all_extra_tensors if t.requires_grad]

    # -- values --------------------------------------------------------------------------------------------------------
    def _evaluate(self, n: Number, u: Tensor, buffers: dict[str, Tensor] | None = None) -> Tensor:
        """``f`` or ``b`` of one layer as an array; ``buffers`` takes those that the evaluation has changed."""
        self.now.seed(1 + self.offset + (n if isinstance(n, int) else n[1] * n[2]))
        module, state, extra = self.modules[n], self.layout.unpack(u), self.now.extra
        if n in self._changing or n in self._replaced:
            start = self._before.get(n) or dict(module.named_buffers())
            changed = {name: b.detach().clone() for name, b in start.items()} if n in self._changing else {}
            tensors = {**self._replaced.get(n, {}), **changed}
            y = torch.func.functional_call(module, tensors, (state, *extra))
            changed = {name: tensors[name] for name in changed}
            if buffers is not None:
                buffers.update(changed)
        else:
            y = module(state, *extra)
        self.layout.require(y, self._name(n))
        return self.layout.pack(y)

    def _name(self, n: Number) -> str:
        """A layer, for messages."""
        kind = type(self.modules[n]).__name__
        if isinstance(n, int):
            return f"layer {self.offset + n} ({kind})"
        sweep, stride, i = n
        first = self.offset + i * stride
        return f"the mean of {f'layers {first} to {first + stride - 1}' if sweep == 'forward' else 'layers'} ({kind})"

    def step(self, n: Number, u: Tensor, stride: int, *, record: bool) -> Tensor:
        """The next state of a level whose points are ``stride`` layers apart, from ``u`` with layer ``n``."""
        if record:
            y = self.record(n, u).y.detach()
        else:
            alias = u.data
            with torch.no_grad():
                y = self._evaluate(n, alias)
            require_unwritten(alias, self._name(n))
        return self.advance(u, y, stride)

    def advance(self, u: Tensor, y: Tensor, stride: int) -> Tensor:
        """The next state from one and the value of ``f`` or ``b`` there."""
        if self.residual:
            return torch.add(u, y, alpha=self.h * stride)
        return y if stride == 1 else torch.lerp(u, y, float(stride))

    def record(self, n: Number, u: Tensor) -> Graph:
        """The value of a layer with its graph, kept if the pass keeps graphs."""
        if not self.keeps:
            self.note_state(n, u)
        graph = self._graph(n, u.data, self._after.setdefault(n, {}))
        if self.keeps:
            self.graphs[n] = graph
        return graph

    def note_state(self, n: Number, u: Tensor) -> None:
        """Note the state and the buffers from which a layer's graph is made again in the backward sweep."""
        self.states[n] = u.data
        if n in self._changing:
            self._before[n] = {name: b.detach().clone() for name, b in self.modules[n].named_buffers()}

    def _graph(self, n: Number, u: Tensor, buffers: dict[str, Tensor] | None = None) -> Graph:
        """The value of a layer with its graph."""
        leaf = u.requires_grad_()  # ``.data`` of a row: what is written to other rows does not concern it
        counts = _SavedBytes() if not self.graph_bytes else nullcontext()
        with torch.enable_grad(), counts, naming_writes(self._name(n)):
            y = self._evaluate(n, leaf, buffers)
        if isinstance(counts, _SavedBytes):
            self.graph_bytes = counts.total
        theta = {name: p for name, p in self.parameters.get(n, {}).items() if p.requires_grad}
        return Graph([n], leaf, y, theta, stacked=False)

    def keep(self, graph: Graph, buffers: Mapping[str, Tensor]) -> None:
        """Keep the graph of a batched call, with the stacked buffers after it."""
        for n in graph.layers:
            self.graphs[n] = graph
        self.note_buffers(graph.layers, buffers)

    def note_buffers(self, layers: Sequence[Number], stacked: Mapping[str, Tensor]) -> None:
        """Take the buffers of some layers after their recorded evaluation, stacked by name."""
        for i, n in enumerate(layers):
            if n in self._changing:
                self._after[n] = {name: b[i] for name, b in stacked.items()}

    def scratch(self) -> LayerGraphs:
        """Evaluations of the same layers that are kept apart, and leave buffers as they are if they are settled."""
        return LayerGraphs(
            self.modules, self.own, self.now, self.layout, residual=self.residual, h=self.h, offset=self.offset,
            keeps=True,
        )  # fmt: skip

    def finish(self, U: Tensor, *, trains: bool) -> None:
        """Record the own layers that have not been, at the states ``U`` (one row more), and set their buffers; without
        a backward sweep evaluate those whose buffers change.
        """
        for i, n in enumerate(self.own):
            if trains and n not in self.graphs and n not in self.states:
                self.record(n, U[i])
            elif not trains and n in self._changing:
                with torch.no_grad():
                    self._evaluate(n, U[i].data, self._after.setdefault(n, {}))
        self.settle()

    def settle(self) -> None:
        """Set buffers to what the recorded evaluations have made of them."""
        with torch.no_grad():
            for n, after in self._after.items():
                for name, b in self.modules[n].named_buffers() if after else ():
                    b.copy_(after[name])
        self._after = {}

    # -- derivatives ---------------------------------------------------------------------------------------------------
    def _graph_of(self, n: Number) -> Graph:
        """The graph of an own layer, made again if it was not kept."""
        found = self.graphs.get(n)
        if found is not None:
            return found
        now = dict(self.modules[n].named_parameters())
        if any(now[name] is not p for name, p in self.parameters.get(n, {}).items()):  # given by functional_call
            self._replaced[n] = self.parameters[n]
        with self.now.as_in_forward():
            graph = self._graph(n, self.states[n].detach())
        if self.keeps:
            self.graphs[n] = graph  # of a mean layer, which all cycles of the sweep use
        return graph

    def adjoint(self, layers: Sequence[Number], lam: Tensor, stride: int, *, gradients: bool) -> Tensor:
        """Adjoint states of a level from ``lam``, ``(len(layers), *state)``, through layers that are ``stride`` apart
        on it; ``gradients``: also those of the parameters and extra inputs, which replace earlier ones.
        """
        out, done = torch.empty_like(lam), set()
        for i, n in enumerate(layers):
            if n in done:
                continue
            graph = self._graph_of(n)
            rows = {n: i} if not graph.stacked else {k: j for j, k in enumerate(layers) if k in graph.place}
            done |= rows.keys()
            self._adjoint_of(graph, rows, lam, out, stride, gradients)
        return out

    def _adjoint_of(
        self, graph: Graph, rows: Mapping[Number, int], lam: Tensor, out: Tensor, stride: int, gradients: bool
    ) -> None:
        """Adjoints through the layers of one graph, ``rows`` by number; products with zero for its other layers."""
        places = [graph.place[n] for n in rows]
        here = list(rows.values())
        scale = self.h * stride if self.residual else float(stride)
        if graph.stacked:
            v = torch.zeros_like(graph.y)
            v[places] = lam[here] * scale
        else:
            v = lam[here[0]] * scale
        first, theta, extra = graph.derivatives(v, self.extra_tensors, gradients)
        keep = 1.0 if self.residual else 1.0 - stride
        for n, place in zip(rows, places, strict=True):
            product = first[place] if graph.stacked else first
            i = rows[n]
            if keep:
                torch.add(product, lam[i], alpha=keep, out=out[i])
            else:
                out[i].copy_(product)
            if gradients:
                pick = lambda g, at=place: g if g is None or not graph.stacked else g[at]
                self.parameter_gradients[n] = {name: pick(g) for name, g in zip(graph.theta, theta, strict=True)}
                self.extra_gradients[n] = extra if n == next(iter(rows)) else [None] * len(extra)


@contextmanager
def _without_hooks(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Leave out the hooks of parameters: autograd calls them with the gradients that the network returns."""
    hooked = [(p, p._backward_hooks) for p in parameters if p.is_leaf and p._backward_hooks]
    for p, _ in hooked:
        p._backward_hooks = None
    try:
        yield
    finally:
        for p, hooks in hooked:
            p._backward_hooks = hooks


class _SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Counts the bytes of the tensors that autograd saves, each storage once."""

    def __init__(self) -> None:
        self.total, self._seen = 0, set()
        super().__init__(self._count, lambda t: t)

    def _count(self, t: Tensor) -> Tensor:
        if not isinstance(t, nn.Parameter):
            key = t.untyped_storage().data_ptr()
            if key not in self._seen:
                self._seen.add(key)
                self.total += t.numel() * t.element_size()
        return t.detach()  # a result that an operation saves would refer to the operation, and neither be deleted

r"""Training steps of deep networks on one process: the forms in which plain torch evaluates them, and the fastest one.

A network is an opening module, ``N`` layers of one structure :math:`u_{n+1} = u_n + h f(u_n; \theta_n)` (or
:math:`u_{n+1} = f(u_n; \theta_n)`), and a closing module. What a layer-parallel training step is compared with is the
fastest of

* ``"eager"``: a loop over modules, each with its own parameters, as one writes it;
* ``"stacked"``: a loop over the rows of one stacked parameter of all layers, which the optimiser updates in one call;
* ``"compiled"``: ``torch.compile`` of :data:`CHUNK` consecutive layers of the stacked loop, forward and backward. All
  chunks of a size share one compilation; the step size is a tensor, so that the compiled code that torch stores on disk
  serves networks of other depths too.

:func:`forms` makes them from one network, with equal parameters, and :func:`fastest` times them in turn on one or more
threads and checks that their gradients agree.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from pint_fem.errors import InputError
from pint_fem.resnet import SerialResNet
from problems.layers import Training

__all__ = [
    "CHUNK",
    "FORMS",
    "Fastest",
    "agreement",
    "fastest",
    "fastest_for_training",
    "forms",
    "gradients",
    "residual_network",
]

FORMS = ("eager", "stacked", "compiled")
CHUNK = 32
"""Layers of one compiled call."""
COMPILE_FROM = 120.0
"""Seconds of a whole training by the fastest loop from which on compiled layers are tried: they take up to a minute."""


class _ResNetLayer(nn.Module):
    """``f`` of a layer of :class:`~pint_fem.resnet.SerialResNet` with its own parameters."""

    def __init__(self, layer, theta: Mapping[str, Tensor]):
        super().__init__()
        self.layer = layer
        for name, value in theta.items():
            self.register_parameter(name, nn.Parameter(value))

    def forward(self, u: Tensor) -> Tensor:
        """``sigma(L u + b)``."""
        return self.layer.activation.function(self.layer.serial([getattr(self, name) for name in self.layer.shapes], u))


class EagerLoop(nn.Module):
    """A loop over modules with their own parameters.

    Parameters
    ----------
    opening, layers, closing
        Modules; ``layers`` have one structure.
    h
        Step size.
    residual
        Whether a layer is ``u + h f(u)``, or the module itself.
    """

    def __init__(self, opening: nn.Module, layers: Iterable[nn.Module], closing: nn.Module, h: float, residual: bool):
        super().__init__()
        self.opening, self.layers, self.closing = opening, nn.ModuleList(layers), closing
        self.h, self.residual = h, residual

    def forward(self, x: Tensor) -> Tensor:
        """Output for a batch."""
        u = self.opening(x)
        for layer in self.layers:
            u = torch.add(u, layer(u), alpha=self.h) if self.residual else layer(u)
        return self.closing(u)

    def stacked_gradients(self) -> dict[str, Tensor]:
        """Gradients of the layers' parameters by name, ``(N, *shape)``."""
        names = [name for name, _ in self.layers[0].named_parameters()]
        return {name: torch.stack([layer.get_parameter(name).grad for layer in self.layers]) for name in names}


class StackedLoop(nn.Module):
    """A loop over the rows of one stacked parameter per name.

    Parameters
    ----------
    opening, closing
        Modules.
    evaluate
        ``evaluate(theta, u)`` is ``f`` of one layer with parameters by name.
    theta
        Stacked parameters ``(N, *shape)`` by name.
    h, residual
        As for :class:`EagerLoop`.
    """

    def __init__(
        self,
        opening: nn.Module,
        evaluate: Callable[[Mapping[str, Tensor], Tensor], Tensor],
        theta: Mapping[str, Tensor],
        closing: nn.Module,
        h: float,
        residual: bool,
    ):
        super().__init__()
        self.opening, self.closing, self.evaluate, self.h, self.residual = opening, closing, evaluate, h, residual
        self.names = list(theta)
        self.theta = nn.ParameterList(nn.Parameter(value) for value in theta.values())

    def propagate(self, u: Tensor) -> Tensor:
        """The last state, from the first one."""
        for row in zip(*(p.unbind(0) for p in self.theta), strict=True):
            f = self.evaluate(dict(zip(self.names, row, strict=True)), u)
            u = torch.add(u, f, alpha=self.h) if self.residual else f
        return u

    def forward(self, x: Tensor) -> Tensor:
        """Output for a batch."""
        return self.closing(self.propagate(self.opening(x)))

    def stacked_gradients(self) -> dict[str, Tensor]:
        """Gradients of the layers' parameters by name, ``(N, *shape)``."""
        return {name: p.grad for name, p in zip(self.names, self.theta, strict=True)}


class CompiledLoop(StackedLoop):
    """:class:`StackedLoop` in compiled calls of ``chunk`` layers, for states of the shape that is given first.

    Without gradients, and for other shapes (the last batch of an epoch), it is the plain loop: a further compilation
    takes longer than many batches.

    Parameters
    ----------
    chunk
        Layers of a call.
    compiler
        ``torch.compile``, or a function with its first argument and its options.
    """

    def __init__(self, *args: Any, chunk: int = CHUNK, compiler: Callable | None = None):
        super().__init__(*args)
        names, evaluate, residual = self.names, self.evaluate, self.residual

        def call(u: Tensor, h: Tensor, *theta: Tensor) -> Tensor:
            for row in zip(*(p.unbind(0) for p in theta), strict=True):
                f = evaluate(dict(zip(names, row, strict=True)), u)
                u = u + h * f if residual else f
            return u

        self.shape: torch.Size | None = None
        self.chunk, self.call = chunk, (compiler or torch.compile)(call, dynamic=False)
        self.register_buffer("step", torch.tensor(self.h, dtype=self.theta[0].dtype, device=self.theta[0].device))

    def propagate(self, u: Tensor) -> Tensor:
        """The last state, from the first one."""
        if not torch.is_grad_enabled() or u.shape != (self.shape or u.shape):
            return super().propagate(u)
        self.shape = u.shape
        for parts in zip(*(p.split(self.chunk) for p in self.theta), strict=True):
            u = self.call(u, self.step, *parts)
        return u


def residual_network(
    opening: nn.Module, blocks: Sequence[nn.Module], closing: nn.Module, *, h: float = 1.0, residual: bool = True
) -> EagerLoop:
    """The plain network of blocks of one structure: ``u + h f(u)``, or the blocks' own outputs."""
    return EagerLoop(opening, blocks, closing, h, residual)


def forms(
    network: SerialResNet | EagerLoop, wanted: Sequence[str] = FORMS, *, chunk: int = CHUNK, compiler=None
) -> dict[str, nn.Module]:
    """Networks with the parameters of a serial one, one for each form, by name.

    Parameters
    ----------
    network
        The network, of which all forms have copies of the parameters; modules are on its device, of its type.
    wanted
        Names of :data:`FORMS`.
    chunk, compiler
        Of :class:`CompiledLoop`. Earlier compilations are discarded, so that no limit of torch on their number applies.

    Raises
    ------
    InputError
        On other names, and on layers with buffers: only the modules themselves could update those.
    """
    if unknown := [name for name in wanted if name not in FORMS]:
        raise InputError(f"forms {unknown}: give some of {FORMS}")
    if isinstance(network, SerialResNet):
        layer, stacked = network.layer, {name: network.theta[name].detach() for name in network.layer.shapes}
        h, residual = network.h, True

        def evaluate(theta: Mapping[str, Tensor], u: Tensor) -> Tensor:
            return layer.activation.function(layer.serial(list(theta.values()), u))

        modules = lambda: [
            _ResNetLayer(layer, {name: p[i].clone() for name, p in stacked.items()}) for i in range(network.nlayers)
        ]
    else:
        first = network.layers[0]
        if any(True for _ in first.buffers()):
            raise InputError("layers with buffers: give ones without, such as GroupNorm in the place of BatchNorm")
        names = [name for name, _ in first.named_parameters()]
        stacked = {name: torch.stack([p.get_parameter(name).detach() for p in network.layers]) for name in names}
        template, h, residual = copy.deepcopy(first).requires_grad_(False), network.h, network.residual

        def evaluate(theta: Mapping[str, Tensor], u: Tensor) -> Tensor:
            return functional_call(template, theta, (u,))

        modules = lambda: copy.deepcopy(network.layers)
    ends = lambda: (copy.deepcopy(network.opening), copy.deepcopy(network.closing))
    out: dict[str, nn.Module] = {}
    for name in wanted:
        opening, closing = ends()
        if name == "eager":
            out[name] = EagerLoop(opening, modules(), closing, h, residual)
            continue
        theta = {key: p.clone() for key, p in stacked.items()}
        if name == "stacked":
            out[name] = StackedLoop(opening, evaluate, theta, closing, h, residual)
            continue
        torch.compiler.reset()
        out[name] = CompiledLoop(opening, evaluate, theta, closing, h, residual, chunk=chunk, compiler=compiler)
    return out


def gradients(network: nn.Module) -> list[Tensor]:
    """Gradients of a form of :func:`forms`: of the layers by name, stacked, then of opening and closing module. Of
    another network, those of all parameters.
    """
    if not hasattr(network, "stacked_gradients"):
        return [p.grad for p in network.parameters() if p.grad is not None]
    ends = [p.grad for part in (network.opening, network.closing) for p in part.parameters()]
    return [*network.stacked_gradients().values(), *ends]


def agreement(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Relative difference of two lists of tensors in the Euclidean norm of all their values, in double precision."""
    norm = lambda values: float(sum((v.double() ** 2).sum() for v in values)) ** 0.5
    return norm([a.double() - b.double() for a, b in zip(found, exact, strict=True)]) / (norm(exact) or 1.0)


@dataclass
class Fastest:
    """Times of the forms of a training step.

    Attributes
    ----------
    seconds : dict
        Least seconds of a training step by form and number of threads.
    differences : dict
        Relative difference of each form's gradient to that of the first one.
    failed : dict
        Reason for each form that could not be evaluated, such as a missing compiler.
    preparation : dict
        Seconds of each form's first step, its compilation included.
    trainings : dict
        The trainings by form.
    """

    seconds: dict[tuple[str, int], float] = field(default_factory=dict)
    differences: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    preparation: dict[str, float] = field(default_factory=dict)
    trainings: dict[str, Any] = field(default_factory=dict)

    @property
    def best(self) -> tuple[str, int]:
        """The form and the number of threads that are fastest."""
        return min(self.seconds, key=self.seconds.get)

    def __str__(self) -> str:
        texts = [f"{form} on {count} {1e3 * s:.4g} ms" for (form, count), s in self.seconds.items()]
        return "; ".join(texts + [f"{form}: {reason}" for form, reason in self.failed.items()])


def fastest(
    networks: Mapping[str, nn.Module],
    training: Callable[[nn.Module], Any],
    *,
    threads: Sequence[int] = (1,),
    repeats: int = 5,
    rtol: float | None = None,
    synchronise: Callable[[], None] = lambda: None,
    deadline: float = float("inf"),
) -> Fastest:
    """Time training steps of the forms of a network in turn and check that their gradients agree.

    Parameters
    ----------
    networks
        Of :func:`forms`.
    training
        From a network to an object with ``gradients()``, forward and backward, and ``step()``, which updates too.
    threads
        Numbers of threads of torch, each of which is tried; the number before is restored.
    repeats
        Rounds, of which the least times are taken; 0: gradients and first steps only.
    rtol
        Largest relative difference of gradients; default: 1e-10 in float64, 1e-3 otherwise.
    synchronise
        Waits until the device has done its work.
    deadline
        Value of ``time.perf_counter()`` after which no further form is prepared and no further round begun.

    Raises
    ------
    InputError
        On no form that can be evaluated.
    ArithmeticError
        On gradients that differ.
    """
    out, exact, before = Fastest(), None, torch.get_num_threads()
    try:
        for name, network in networks.items():
            if out.trainings and time.perf_counter() > deadline:
                out.failed[name] = "no time left"
                continue
            found, start = training(network), time.perf_counter()
            torch.set_num_threads(threads[0])
            try:
                found.gradients()
            except Exception as error:
                if name != "compiled":  # a mistake, where torch.compile may lack a compiler or not support a block
                    raise
                out.failed[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
                continue
            synchronise()
            out.preparation[name] = time.perf_counter() - start
            mine = gradients(network)
            exact = exact or [g.clone() for g in mine]
            out.differences[name] = difference = agreement(mine, exact)
            limit = rtol or (1e-10 if mine[0].dtype == torch.float64 else 1e-3)
            if not difference <= limit:
                raise ArithmeticError(f"gradients of form {name!r} differ by {difference:.1e} (at most {limit:.0e})")
            out.trainings[name] = found
        if not out.trainings:
            raise InputError(f"no form of the serial network can be evaluated: {out.failed}")
        for number in range(repeats + 1):  # the first round warms up: other threads may compile again
            for count, (name, found) in product(threads, out.trainings.items()):
                if number > 1 and time.perf_counter() > deadline:
                    return out
                torch.set_num_threads(count)
                synchronise()
                start = time.perf_counter()
                found.step()
                synchronise()
                elapsed = time.perf_counter() - start
                if number:
                    out.seconds[name, count] = min(elapsed, out.seconds.get((name, count), elapsed))
    finally:
        torch.set_num_threads(before)
    return out


def fastest_for_training(
    network: nn.Module, batch: Sequence[Any], *, threads: Sequence[int], batches: int
) -> tuple[nn.Module, int, str]:
    """The form of a serial network and the number of threads that are fastest for a training with cross-entropy.

    A :class:`~pint_fem.resnet.SerialResNet` is tried in all forms, compiled only where the training by the fastest loop
    would take more than :data:`COMPILE_FROM` seconds. Other networks, which may draw random numbers or update
    statistics, stay the loop that they are, and only the number of threads is chosen.

    Parameters
    ----------
    network
        The network, which stays as it is.
    batch
        Inputs and labels.
    threads
        Numbers of threads that are tried.
    batches
        Updates of the whole training.

    Returns
    -------
    network : Module
        To be trained, with the first parameters.
    threads : int
    text : str
        What was measured and taken.
    """
    training = lambda net: Training(net, *batch[:2])
    if not isinstance(network, SerialResNet):
        found = fastest({"eager": copy.deepcopy(network)}, training, threads=threads, repeats=3)
        return network, found.best[1], f"the loop itself on {found.best[1]} threads, fastest of: {found}"
    found = fastest(forms(network, ["eager", "stacked"]), training, threads=threads, repeats=3)
    told = str(found)
    if min(found.seconds.values()) * batches > COMPILE_FROM:
        compiled = forms(network, ["compiled"])
        try:
            more = fastest(compiled, training, threads=threads, repeats=3)
            found.seconds |= more.seconds
            told += f"; {more}"
        except InputError as error:
            told += f"; {error}"
    else:
        told += f"; compiled layers are tried from {COMPILE_FROM:.0f} s of training on"
    form, count = found.best
    return forms(network, [form])[form], count, f"{form} on {count} threads, fastest of: {told}"

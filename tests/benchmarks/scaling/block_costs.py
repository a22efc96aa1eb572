r"""Measure what one layer of a deep network costs, forward, backward and gradients, and what a serial step costs.

Layers of convolutions and transformer blocks take milliseconds, so that a network's step is the sum of its layers, its
ends and its messages; the costs of single calls are measured with few layers, by the processor's time of this one
process on one thread, of which the least is taken. That holds on a machine that other processes use, too. The costs of
messages are those of an earlier measurement (:data:`NETWORK_OF`).

The convolutions are those of :class:`pint_fem.resnet.Convolution`. A transformer block is any torch module; here a
call of several layers is one after another or batched (``vmap``), whichever is faster, its adjoint the
vector-Jacobian product with respect to the state of a recorded graph, and its gradients those with respect to the
parameters and the recording.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from mpi4py import MPI
from torch import nn
from torch.func import functional_call, vmap

from pint_fem.errors import InputError
from pint_fem.resnet import Convolution, Grid, LayerParallel, LayerParallelResNet, SerialResNet
from pint_fem.scaling.calibrate import machine
from pint_fem.scaling.costs import Kernel
from problems.block_networks import block_problem
from problems.layers import Training
from problems.serial_networks import FORMS, agreement, forms
from tests.benchmarks.scaling.layer_model import predict_training
from tests.benchmarks.scaling.records import Record, load

__all__ = ["BLOCKS", "BlocksCase", "calibrate_blocks", "conv_network", "count_block_errors", "least", "serial_forms"]

NETWORK_OF = "resnet-1024"
"""Record whose measured network and slowdown by a second process are taken."""
SIZES = (1, 2, 4)
FINAL_TIME = 4.0
"""``T`` of the network of convolutions, that of ``demos/resnet_mnist.py``."""
MEASURED = {"conv": 64, "transformer": 16}
"""Layers of the serial training step that is timed; deeper ones take proportionally longer."""


@dataclass(frozen=True)
class BlocksCase:
    """A network whose layers are measured one by one.

    Attributes
    ----------
    kind : str
        ``"conv"``: the network of ``demos/resnet_mnist.py``; ``"transformer"``: :mod:`problems.block_networks`.
    nlayers, width, batch, size : int
        Layers; channels or width; samples; height and width of a state, or the root of the number of places.
    menu : tuple of dict
        Options of MGRIT whose gradient errors are counted.
    few : dict
        Sizes with which they are counted.
    """

    kind: str
    nlayers: int
    width: int
    batch: int
    size: int
    menu: tuple[dict, ...]
    few: Mapping[str, int]


def least(action: Callable[[], object], repeats: int) -> float:
    """Least seconds of the processor's time of this process."""
    action()
    out = float("inf")
    for _ in range(repeats):
        start = time.process_time()
        action()
        out = min(out, time.process_time() - start)
    return out


def conv_network(nlayers: int, width: int, batch: int, size: int, dtype=torch.float32):
    """Opening, layer, closing and a batch like those of ``demos/resnet_mnist.py``."""
    torch.manual_seed(0)
    opening = nn.Sequential(nn.Conv2d(1, width, 3, stride=2, padding=1), nn.ReLU())
    closing = nn.Sequential(nn.Flatten(), nn.Linear(width * size**2, 10))
    x, y = torch.randn(batch, 1, 2 * size, 2 * size, dtype=dtype), torch.randint(10, (batch,))
    return opening, Convolution(width, 3, "relu"), closing, x, y


def serial_forms(case: BlocksCase, nlayers: int, names: Sequence[str]) -> tuple[dict[str, nn.Module], tuple]:
    """Serial networks by form, and batch and labels."""
    if case.kind == "conv":
        opening, layer, closing, x, y = conv_network(nlayers, case.width, case.batch, case.size)
        return forms(SerialResNet(opening, layer, nlayers, closing, final_time=FINAL_TIME), names), (x, y)
    p = block_problem(case.kind, nlayers, case.width, batch=case.batch, size=case.size)
    return forms(p.serial(), names), (p.x, p.y)


def _conv_kernels(case: BlocksCase, sizes: Sequence[int], repeats: int) -> dict[str, list[float]]:
    """Seconds of calls of :class:`Convolution` for each number of layers, each call at other places of as many states
    as a network has: what is larger than the caches costs more.
    """
    _, layer, *_ = conv_network(1, case.width, case.batch, case.size)
    count = MEASURED[case.kind]
    theta = list(layer.initial(range(count), 0, torch.float32).values())
    u = torch.randn(count, case.batch, case.width, case.size, case.size)
    out, slopes, work, act = (
        torch.empty_like(u),
        torch.rand_like(u),
        torch.empty_like(u[: max(sizes)]),
        layer.activation,
    )

    def step(rows: slice, n: int) -> None:
        z = layer.linear([p[rows] for p in theta], u[rows], work[:n], act.in_scale)
        y = act.output(z)
        act.write_slope(z, slopes[rows])
        torch.add(u[rows], y, alpha=0.1, out=out[rows])

    def adjoint(rows: slice, n: int) -> None:
        t = torch.mul(slopes[rows], u[rows], out=work[:n])
        layer.adjoint([p[rows] for p in theta], t, u[rows], 0.1, out[rows])

    def pull(rows: slice, n: int) -> None:
        layer.gradients(slopes[rows] * u[rows], u[rows])

    def seconds(call: Callable[[slice, int], None], n: int) -> float:
        starts = range(0, count - n + 1, n)

        def all_places() -> None:
            for i in starts:
                call(slice(i, i + n), n)

        return least(all_places, repeats) / len(starts)

    with torch.no_grad():
        kinds = {"step": step, "adjoint": adjoint, "gradients": pull}
        return {kind: [seconds(call, n) for n in sizes] for kind, call in kinds.items()}


def _block_kernels(case: BlocksCase, sizes: Sequence[int], repeats: int) -> dict[str, list[float]]:
    """Seconds of calls of blocks for each number of layers, batched or one after another."""
    p = block_problem(case.kind, max(sizes), case.width, batch=case.batch, size=case.size)
    with torch.no_grad():
        first = p.opening(p.x)
    names = [name for name, _ in p.blocks[0].named_parameters()]
    stacked = {name: torch.stack([b.get_parameter(name).detach() for b in p.blocks]) for name in names}
    found: dict[str, list[float]] = {"step": [], "adjoint": [], "gradients": []}
    for n in sizes:
        theta = {name: value[:n].clone().requires_grad_() for name, value in stacked.items()}
        for kind, seconds in _times_of_block(p, theta, torch.randn(n, *first.shape), repeats).items():
            found[kind].append(seconds)
    return found


def _times_of_block(p, theta: dict, u: torch.Tensor, repeats: int) -> dict[str, float]:
    """Seconds of one call of as many layers as ``u`` has states, batched or one after another."""

    def single(theta: dict, u: torch.Tensor) -> torch.Tensor:
        return torch.add(u, functional_call(p.blocks[0], theta, (u,)), alpha=p.h)

    def one_by_one(theta: dict, u: torch.Tensor) -> torch.Tensor:
        return torch.stack([single({name: v[i] for name, v in theta.items()}, u[i]) for i in range(len(u))])

    out: dict[str, float] = {}
    for way in [one_by_one] if len(u) == 1 else [vmap(single), one_by_one]:
        with torch.no_grad():
            step = least(partial(way, theta, u), repeats)
        state, lam = u.clone().requires_grad_(), torch.randn_like(u)
        record, recorded = least(partial(way, theta, state), repeats), way(theta, state)
        pull = partial(torch.autograd.grad, recorded, grad_outputs=lam, retain_graph=True)
        adjoint = least(partial(pull, state), repeats)
        gradients = least(partial(pull, list(theta.values())), repeats) + max(0.0, record - step)
        for kind, seconds in (("step", step), ("adjoint", adjoint), ("gradients", gradients)):
            out[kind] = min(seconds, out.get(kind, seconds))
    return out


def calibrate_blocks(
    cases: Mapping[str, BlocksCase], *, repeats: int = 7, progress: Callable[[str], None] = lambda text: None
) -> list[Record]:
    """Measure networks that differ in depth only; gradient errors are counted by :func:`count_block_errors`.

    Parameters
    ----------
    cases
        By the names of the records.
    repeats
        Of each measurement.
    progress
        Called with what is being measured.

    Returns
    -------
    list of Record
        Kernels by the numbers of layers, seconds of the ends of the network, and the fastest serial training step.
    """
    case = next(iter(cases.values()))
    if case.kind not in MEASURED:
        raise InputError(f"kind {case.kind!r}: give one of {', '.join(MEASURED)}")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        progress("calls of layers")
        kernels = (_conv_kernels if case.kind == "conv" else _block_kernels)(case, SIZES, repeats)
        progress(f"serial training steps with {MEASURED[case.kind]} layers")
        around, layer = _serial(case, max(2, repeats // 2))
        made = _record(case, kernels, around, layer, repeats)
        progress("a layer-parallel training step on one process")
        made = _with_rest(made, case, max(2, repeats // 2))
    finally:
        torch.set_num_threads(before)
    step = min(layer.values())
    return [
        made.with_changes(
            problem=name,
            nsteps=c.nlayers,
            baseline={"step": around + c.nlayers * step, "threads": 1, "form": min(layer, key=layer.get)},
        )
        for name, c in cases.items()
    ]


def _consistent(seconds: Sequence[float]) -> tuple[float, ...]:
    """Least seconds of calls of :data:`SIZES` layers: a call takes no longer than two of half as many layers, which can
    be made instead, and no longer than one of more layers.
    """
    out = [float(s) for s in seconds]
    for i in range(1, len(out)):
        out[i] = min(out[i], 2 * out[i - 1])
    for i in reversed(range(len(out) - 1)):
        out[i] = min(out[i], out[i + 1])
    return tuple(out)


def _record(case: BlocksCase, kernels: Mapping, around: float, layer: Mapping[str, float], repeats: int) -> Record:
    """What was measured, without names and serial steps of the networks."""
    networks, (x, _) = serial_forms(case, 1, ["stacked"])
    with torch.no_grad():
        values = networks["stacked"].opening(x).numel()
    parameters = sum(p[0].numel() for p in networks["stacked"].theta)
    other = load(NETWORK_OF)
    kernel = lambda taken: [Kernel(SIZES, _consistent(taken))]
    return Record(
        "", machine(), values // 2, case.nlayers,  # of 4 bytes, where the model counts in numbers of 8
        {1: {kind: kernel(taken) for kind, taken in kernels.items()}},
        control_bytes=4.0 * parameters, kind="layers", extras={"around": around},
        network=other.network, slowdown=other.slowdown,
        notes=[
            f"{time.strftime('%Y-%m-%d')}, float32, one thread: least processor time of {repeats} calls of 1 to "
            f"{max(SIZES)} layers",
            f"serial step measured with {MEASURED[case.kind]} layers and taken in proportion to the layers, the "
            f"fastest of (ms a layer) " + ", ".join(f"{form} {1e3 * s:.4g}" for form, s in layer.items()),
            f"network and slowdown by a second process: as measured for {NETWORK_OF}",
        ],
    )  # fmt: skip


def count_block_errors(case: BlocksCase, iterations: tuple[int, int] = (2, 1)) -> list[dict]:
    """Relative errors of the layers' gradients in a cold training step, by real runs on one process in float64.

    They do not depend on the number of ranks; the network has the case's depth and the sizes ``case.few``.
    """
    few = replace(case, **case.few)
    exact, make = _networks(few, torch.float64)
    exact.gradients()
    wanted, out = _layer_gradients(exact.net), []
    for options in case.menu:
        ours = make(options, iterations)
        ours.gradients()
        error = agreement(_layer_gradients(ours.net), wanted)
        out.append({"options": dict(options), "iterations": list(iterations), "error": error})
    return out


def _layer_gradients(net: nn.Module) -> list[torch.Tensor]:
    """Gradients of the layers' parameters."""
    return [p.grad for part in (net.theta if hasattr(net, "theta") else net.layers,) for p in part.parameters()]


def _networks(case: BlocksCase, dtype: torch.dtype) -> tuple[Training, Callable[[Mapping, tuple], Training]]:
    """The serial training, and one on this process by options of MGRIT and iterations."""
    given = lambda options, its: dict(
        grid=Grid(comm=MPI.COMM_SELF), mgrit=options, forward_iterations=its[0], backward_iterations=its[1]
    )
    if case.kind == "conv":
        opening, layer, closing, x, y = conv_network(case.nlayers, case.width, case.batch, case.size, dtype)
        parts, how = (opening, layer, case.nlayers, closing), dict(final_time=FINAL_TIME, dtype=dtype)
        make = lambda options, its: Training(LayerParallelResNet(*parts, **how, **given(options, its)), x, y)
        return Training(SerialResNet(*parts, **how), x, y), make
    p = block_problem(case.kind, case.nlayers, case.width, batch=case.batch, size=case.size, dtype=dtype)
    ends = dict(opening=p.opening, closing=p.closing, h=p.h)
    make = lambda options, its: Training(LayerParallel(p.blocks, **ends, **given(options, its)), p.x, p.y)
    return Training(p.serial(), p.x, p.y), make


def _with_rest(made: Record, case: BlocksCase, repeats: int) -> Record:
    """What a real training step on one process takes beside its kernels and ends, per layer stepped."""
    n, options, its = MEASURED[case.kind], {"levels": 2, "coarsening": [4], "relax": "F"}, (2, 1)
    _, make = _networks(replace(case, nlayers=n), torch.float32)
    real, said = least(make(options, its).step, repeats), predict_training(made, options, 1, iterations=its, nlayers=n)
    stepped = sum(number for (kind, _), number in said.counts.items() if kind in ("step", "adjoint"))
    each = max(0.0, (real - said.seconds) / stepped)
    note = (
        f"beside kernels: {1e3 * each:.3g} ms per layer stepped, from a real step of {n} layers on one process, m = 4, "
        f"2 + 1 iterations: {real:.4g} s, {said.seconds:.4g} s by kernels alone"
    )
    return made.with_changes(overhead={"state": each, "adjoint": each}, notes=[*made.notes, note])


def _serial(case: BlocksCase, repeats: int) -> tuple[float, dict[str, float]]:
    """Seconds of what is around the layers of a serial training step, and of one layer by form."""

    def step(network: nn.Module) -> float:
        return least(Training(network, *data).step, repeats)

    (ends, data), (two, _) = (serial_forms(case, n, ["stacked"]) for n in (1, 2))
    around, n = max(0.0, 2 * step(ends["stacked"]) - step(two["stacked"])), MEASURED[case.kind]
    networks, _ = serial_forms(case, n, FORMS)
    return around, {form: (step(network) - around) / n for form, network in networks.items()}


def _menu(*coarsenings: tuple[int, ...]) -> tuple[dict, ...]:
    return tuple({"levels": len(c) + 1, "coarsening": list(c), "relax": "F"} for c in coarsenings)


_SHALLOW = _menu((2,), (4,), (8,), (4, 2))
_MIDDLE = _menu((4,), (8,), (16,), (4, 4))
_DEEP = _menu((8,), (16,), (32,), (64,), (8, 8))
_IMAGES = dict(kind="conv", width=8, batch=100, size=14, few={"batch": 4})
_TEXT = dict(kind="transformer", width=128, batch=32, size=128, few={"batch": 2, "width": 32, "size": 16})
BLOCKS = {
    "mnist-conv-64": BlocksCase(nlayers=64, menu=_SHALLOW, **_IMAGES),
    "mnist-conv-1024": BlocksCase(nlayers=1024, menu=_DEEP, **_IMAGES),
    "transformer-64": BlocksCase(nlayers=64, menu=_SHALLOW, **_TEXT),
    "transformer-256": BlocksCase(nlayers=256, menu=_MIDDLE, **_TEXT),
}  # fmt: skip
"""Networks: images of MNIST, halved, 8 channels, batches of 100; 128 places of width 128, batches of 32."""

"""Predicted times of training steps of deep residual networks: the sweeps of :mod:`pint_fem.resnet` on virtual ranks.

torch's autograd does not run on virtual ranks: the work around the sweeps (opening and classification layer, loss,
update) is one measured time, and its two collective operations are described here.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from pint_fem.resnet.layers import Layer
from pint_fem.resnet.propagators import ForwardStep
from pint_fem.resnet.sweeps import LayerSweeps
from pint_fem.scaling.communicator import VirtualComm, communicators
from pint_fem.scaling.costs import Calibration
from pint_fem.scaling.model import Prediction
from pint_fem.scaling.network import Network
from pint_fem.scaling.virtual import VirtualTrace
from pint_fem.scaling.world import World

__all__ = ["SWEEPS", "predict_training"]

SWEEPS = {"step": "sweep", "adjoint": "adjoint sweep"}
"""Kinds of kernels of blocks, and those of layers one after another."""
_PARAMETER_TAG = 31
"""Tag of messages with parameters, whose numbers stand for themselves."""


class _Step:
    """The steps of a level's layers, which take time only."""

    block = ForwardStep.block

    def __init__(self, layer: _VirtualLayer, h: float, kind: str, sweep: str):
        self.world, self.kind, self.lo, self.level = layer.world, kind, 0, int(h != layer.h)
        pick = lambda kernels: kernels[min(self.level, len(kernels) - 1)]
        self._kernel = pick(layer.kernels[kind])
        self._single = pick(layer.kernels.get(SWEEPS[kind]) or layer.kernels[kind])
        self._per_state, self._per_call = layer.overhead.get(sweep, 0.0), layer.overhead.get("call", 0.0)

    def _charge(self, seconds: float, n: int) -> None:
        self.world.counts[self.kind, self.level] += n
        self.world.charge(seconds + n * self._per_state)

    def step(self, steps: range, u: np.ndarray, out: np.ndarray) -> None:
        seconds = self._kernel(len(steps))
        if steps.step > 1:  # a call of relaxation, which selects its rows
            self.world.counts["calls", self.level] += 1
            seconds += self._per_call
        self._charge(seconds, len(steps))
        out[...] = u

    def sweep(self, first: int, U: np.ndarray, G: np.ndarray | None) -> None:
        n = len(U) - 1
        self._charge(n * self._single(1), n)
        U[1:] = U[0]


class _VirtualLayer(Layer):
    """A kind of layers whose states are one number and whose work takes time only."""

    shapes: Mapping = {}

    def __init__(self, world: World, calibration: Calibration, slowdown: float, h: float):
        super().__init__("tanh")
        self.world, self.h = world, h
        self.kernels = {kind: [k.scaled(slowdown) for k in ks] for kind, ks in calibration.kernels[1].items()}
        self.overhead = {name: slowdown * s for name, s in calibration.overhead.items()}

    def gradients(self, t: Tensor, u: Tensor) -> list[Tensor]:
        self.world.charge(self.kernels["gradients"][0](len(u)))
        return [torch.zeros(1)]


class _Sweeps(LayerSweeps):
    """Sweeps whose steps take time only."""

    steps = {  # noqa: RUF012
        "forward": lambda layer, h: _Step(layer, h, "step", "state"),
        "backward": lambda layer, h: _Step(layer, h, "adjoint", "adjoint"),
        "tangent": lambda layer, h: _Step(layer, h, "step", "state"),
    }


def _grid(comm: VirtualComm) -> SimpleNamespace:
    """A grid as :class:`~pint_fem.resnet.Grid` with all virtual ranks in the layers."""
    return SimpleNamespace(
        comm=comm, layer_comm=comm, reversed_layer_comm=comm.Split(0, -comm.rank), layer_size=comm.size,
        data_size=1, is_root=comm.rank == 0, is_first=comm.rank == 0, is_last=comm.rank == comm.size - 1,
    )  # fmt: skip


def predict_training(
    calibration: Calibration,
    options: Mapping,
    ranks: int,
    *,
    iterations: tuple[int, int] = (2, 1),
    nlayers: int | None = None,
    network: Network | None = None,
    trace: bool = False,
) -> Prediction:
    """Predict the time of a training step: forward sweep, loss, backward sweep, update.

    Parameters
    ----------
    calibration, options
        Costs of a network (``kind`` ``"layers"``); options of MGRIT, ``{"levels": 1}`` steps from layer to layer.
    ranks, iterations
        Ranks that share the layers; cycles of the forward and the backward sweep.
    nlayers, network
        Default: the calibration's.
    trace
        Whether to record all events.

    Raises
    ------
    InputError
        On more ranks than layers, or options that do not fit.
    """
    c, N = calibration, nlayers or calibration.nsteps
    world, h, slowdown = World(ranks, network or c.network), 1.0 / N, c.slowdown_with(ranks)
    comms = communicators(world, [*[c.state_bytes] * _PARAMETER_TAG, 8.0])
    layer = _VirtualLayer(world, c, slowdown, h)

    def program(rank: int) -> tuple[float, float, int, list]:
        comm = comms[rank]
        sweeps = _Sweeps(layer, N, h, _grid(comm), options=options)
        recorded = VirtualTrace(comm) if trace else None
        sweeps.set_trace(recorded)
        theta = [torch.zeros(sweeps.k, int(c.control_bytes) // 8)]
        trajectory = sweeps.trajectory((1,), np.float64)
        comm.synchronise()
        begin, serial = world.clocks[rank], len(sweeps.strides) == 1
        world.charge(slowdown * c.extras.get("around", 0.0))
        if comm.size > 1:
            comm.allgather(None)  # failures and shapes
        sweeps.forward(theta, np.zeros(1), trajectory, cycles=iterations[0], serial=serial)
        if comm.size > 1:
            comm.bcast(None, root=comm.size - 1)  # the network's output
        sweeps.backward(trajectory, np.zeros(1), cycles=iterations[1], serial=serial)
        comm.synchronise()
        return begin, world.clocks[rank], 2 * (sweeps.k + 1) + sweeps.k, recorded.events if trace else []

    with torch.no_grad():  # ranks take turns inside such blocks of the sweeps, which would leave it switched off
        begins, ends, states, events = zip(*world.run(program), strict=True)
    seconds = max(ends) - max(begins)
    nbytes = max(states) * c.state_bytes
    return Prediction(seconds, [seconds], world.work, world.counts, nbytes, list(events) if trace else [])

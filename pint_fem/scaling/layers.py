"""Training steps of deep residual networks on virtual ranks: the sweeps of :mod:`pint_fem.resnet` itself.

What is around them (opening and classification layer, loss, update) and its two collectives are described here: torch's
autograd does not live on virtual ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace

import numpy as np
import torch

from pint_fem.all_at_once.trace import Trace
from pint_fem.resnet.layers import Layer
from pint_fem.resnet.propagators import ForwardStep
from pint_fem.resnet.sweeps import LayerSweeps
from pint_fem.scaling.communicator import VirtualComm, communicators
from pint_fem.scaling.costs import Calibration
from pint_fem.scaling.model import Prediction
from pint_fem.scaling.network import Network
from pint_fem.scaling.virtual import VirtualTrace
from pint_fem.scaling.world import World

__all__ = ["SWEEPS", "predict_training", "set_trace"]

SWEEPS = {"step": "sweep", "adjoint": "adjoint sweep"}
_ROWS_TAG = 31  # of messages with parameters, whose numbers are real ones


class _Step:
    """A level's layers."""

    block = ForwardStep.block

    def __init__(self, layer: _VirtualLayer, h: float, kind: str, place: str):
        self.world, self.lo = layer.world, 0
        self.level = 0 if h == layer.h else 1
        self._kernel, self.kind = self._pick(layer.work[kind]), kind
        self._sweep = self._pick(layer.work.get(SWEEPS[kind]) or layer.work[kind])
        self._more, self._call = layer.bookkeeping.get(place, 0.0), layer.bookkeeping.get("call", 0.0)

    def _pick(self, kernels):
        return kernels[min(self.level, len(kernels) - 1)]

    def _charge(self, seconds: float, n: int) -> None:
        self.world.counts[self.kind, self.level] += n
        self.world.charge(seconds + n * self._more)

    def step(self, steps, u, out):
        """See :class:`pint_fem.all_at_once.levels.Propagator`."""
        beside = 0.0
        if steps.step > 1:  # of relaxation, which looks its rows up
            self.world.counts["calls", self.level] += 1
            beside = self._call
        self._charge(self._kernel(len(steps)) + beside, len(steps))
        out[...] = u

    def sweep(self, first, U, G):
        """See :class:`pint_fem.all_at_once.levels.Propagator`."""
        n = len(U) - 1
        self._charge(n * self._sweep(1), n)
        U[1:] = U[0]


class _VirtualLayer(Layer):
    """Stands for a kind of layers with states of one number."""

    shapes: Mapping = {}

    def __init__(self, world: World, calibration: Calibration, busy: float, h: float):
        super().__init__("tanh")
        self.world, self.h = world, h
        self.work = {kind: [k.scaled(busy) for k in levels] for kind, levels in calibration.work[1].items()}
        self.bookkeeping = {name: busy * s for name, s in calibration.bookkeeping.items()}

    def gradients(self, t, u):
        """See :class:`~pint_fem.resnet.layers.Layer`."""
        self.world.charge(self.work["gradients"][0](len(u)))
        return [torch.zeros(1)]


class _Sweeps(LayerSweeps):
    """Whose steps let the clock run."""

    steps = {  # noqa: RUF012
        "forward": lambda layer, h: _Step(layer, h, "step", "state"),
        "backward": lambda layer, h: _Step(layer, h, "adjoint", "adjoint"),
        "tangent": lambda layer, h: _Step(layer, h, "step", "state"),
    }


def set_trace(sweeps: LayerSweeps, trace: Trace) -> None:
    """Let a network's sweeps write to a trace."""
    for solver in (*sweeps.solvers.values(), *sweeps.serial_solvers.values()):
        solver.trace = trace
        for level in solver.levels:
            level.trace = trace


def _grid(comm: VirtualComm) -> SimpleNamespace:
    """As :class:`~pint_fem.resnet.Grid` with all ranks in the layers."""
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
    """A training step: forward, loss, backward, update.

    Parameters
    ----------
    calibration
        Of a network (``kind`` ``"layers"``).
    options
        Of MGRIT; ``{"levels": 1}`` goes from layer to layer.
    ranks
        That share the layers.
    iterations
        Cycles forward and backward.
    nlayers
        Default: the calibration's.
    network
        Default: the calibration's.
    trace
        Keep all events.

    Returns
    -------
    Prediction

    Raises
    ------
    InputError
        On more ranks than layers, or options that do not fit.
    """
    c, N = calibration, nlayers or calibration.nsteps
    world = World(ranks, network or c.network)
    comms = communicators(world, [*[c.state_bytes] * _ROWS_TAG, 8.0])
    busy = c.busy_with(ranks)
    layer, h = _VirtualLayer(world, c, busy, 1.0 / N), 1.0 / N
    traces, made = {}, {}

    def program(rank: int):
        comm = comms[rank]
        sweeps = _Sweeps(layer, N, h, _grid(comm), options=options)
        if trace:
            traces[rank] = VirtualTrace(comm)
            set_trace(sweeps, traces[rank])
        theta = [torch.zeros(sweeps.k, int(c.control_bytes) // 8)]
        room = sweeps.trajectory((1,), np.float64)
        comm.meet()
        begin = world.clocks[rank]
        world.charge(busy * c.extras.get("around", 0.0))
        if comm.size > 1:
            comm.allgather(None)  # problems, shapes
        sweeps.forward(theta, np.zeros(1), room, cycles=iterations[0], serial=len(sweeps.strides) == 1)
        if comm.size > 1:
            comm.bcast(None, root=comm.size - 1)  # what the network gives
        sweeps.backward(room, np.zeros(1), cycles=iterations[1], serial=len(sweeps.strides) == 1)
        comm.meet()
        made[rank] = begin, world.clocks[rank], 2 * (sweeps.k + 1) + sweeps.k

    with torch.no_grad():  # ranks take turns inside such blocks of the sweeps, which would leave it switched off
        world.run(program)
    begin, end = max(m[0] for m in made.values()), max(m[1] for m in made.values())
    states = max(m[2] for m in made.values())
    return Prediction(
        end - begin, [end - begin], world.busy, world.clocks, world.counts, states * c.state_bytes,
        [traces[r].events for r in range(ranks)] if trace else [],
    )  # fmt: skip

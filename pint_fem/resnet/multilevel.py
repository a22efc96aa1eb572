r"""Multilevel initialisation: the weights of a shallow network, interpolated in depth, as first guess of a deeper one.

Weights are functions of time :math:`t_n = n h`. The deeper network's layer at :math:`t` takes the linear interpolant
between the shallow one's layers around :math:`t` (constant after the last layer of a stage), of buffers as well, where
those of whole numbers are copied from the layer before; modules at the ends and between stages are copied (Cyr,
Günther, Schroder, arXiv:1912.08974). Rows travel only between ranks that hold neighbouring layers.
"""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

import numpy as np
import torch
from mpi4py import MPI

from pint_fem.collective import collectively
from pint_fem.errors import InputError
from pint_fem.resnet.parallel.module import LayerParallelModule
from pint_fem.resnet.row_exchange import RowExchange
from pint_fem.resnet.training.network_rows import LayerRows, ends_of, rows_of

__all__ = ["refine"]


def refine(coarse: LayerParallelModule, fine: LayerParallelModule) -> None:
    """Set a network's parameters and buffers from those of a shallower one on the same ranks (collective).

    Parameters
    ----------
    coarse, fine
        The shallower network, and the deeper one whose parameters are overwritten: with the same kinds of layers, the
        same final time ``h`` times the number of layers in each stage, and on the same grid. Layers that are a module's
        own output (``residual=False``) have no final time.

    Raises
    ------
    InputError
        On every rank, where the networks do not fit each other.
    """
    for net in (coarse, fine):
        net._agree("refinement")
    pairs = collectively(coarse.grid.layer_comm, "", _pairs, coarse, fine)
    for old, new in pairs:
        _refine_rows(old, new, coarse.grid.layer_comm)
    for name, module in ends_of(fine).items():
        module.load_state_dict(getattr(coarse, name).state_dict())
    fine.invalidate()


def _pairs(coarse: LayerParallelModule, fine: LayerParallelModule) -> list[tuple[LayerRows, LayerRows]]:
    """The layers of each stage of both networks, which have to fit each other."""
    if coarse.grid.layer_size != fine.grid.layer_size:
        raise InputError(
            f"grids of {coarse.grid.layer_size} and {fine.grid.layer_size} layer ranks: refine on the same grid"
        )
    one, two = rows_of(coarse), rows_of(fine)
    kinds = [[rows.structure for rows in stages] for stages in (one, two)]
    times = [[_final_time(net, rows.count) for rows in rows_of(net)] for net in (coarse, fine)]
    if kinds[0] != kinds[1] or not np.allclose(*times, rtol=1e-12):
        raise InputError(
            f"networks of layers {kinds[0]} to T = {times[0]} and {kinds[1]} to T = {times[1]}: refine from the same "
            "kind of layers and the same final time, h times the number of layers"
        )
    return list(zip(one, two, strict=True))


def _final_time(net: LayerParallelModule, count: int) -> float:
    """Step size times number of layers; 0 for layers that have no step size."""
    return net.h * count if getattr(net, "residual", True) else 0.0


def _refine_rows(old: LayerRows, new: LayerRows, comm: MPI.Comm) -> None:
    """Interpolate one stage."""
    around = [_around(i, old.count, new.count) for i in range(new.count)]
    needed = [sorted({n for a, b, _ in around[lo:hi] for n in (a, b)}) for lo, hi in pairwise(new.bounds)]
    # in double precision, which has all values of whole numbers and types of less precision
    rows = RowExchange(comm, old.bounds, needed)([old.stack(name).double() for name in old.tensors])
    place = {n: i for i, n in enumerate(needed[comm.rank])}
    before, after, weights = zip(*around[new.lo : new.hi], strict=True)
    first, second = ([place[n] for n in numbers] for numbers in (before, after))
    with torch.no_grad():
        for (name, tensors), values in zip(new.tensors.items(), rows, strict=True):
            if not tensors[0].is_floating_point():
                new.set(name, values[first])
                continue
            weight = torch.tensor(weights, dtype=values.dtype).reshape(-1, *[1] * (values.ndim - 1))
            new.set(name, torch.lerp(values[first], values[second], weight))


def _around(i: int, coarse: int, fine: int) -> tuple[int, int, float]:
    """The shallow network's layers around the deep one's layer ``i``, and the weight of the second."""
    t = Fraction(i * coarse, fine)
    n = int(t)
    return n, min(n + 1, coarse - 1), float(t - n)

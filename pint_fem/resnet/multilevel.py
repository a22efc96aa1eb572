r"""Multilevel initialisation: the weights of a shallow network, interpolated in depth, as first guess of a deeper one.

Weights are functions of time :math:`t_n = n h`. The deeper network's layer at :math:`t` takes the linear interpolant
between the shallow one's layers around :math:`t` (constant after its last layer); the first and the last layer of the
network are copied (Cyr, Günther, Schroder, arXiv:1912.08974). Rows travel only between ranks that hold neighbouring
layers.
"""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

import torch

from pint_fem.errors import InputError
from pint_fem.resnet.network import LayerParallelResNet
from pint_fem.resnet.row_exchange import RowExchange

__all__ = ["refine"]


def refine(coarse: LayerParallelResNet, fine: LayerParallelResNet) -> None:
    """Set a network's parameters from those of a shallower one on the same ranks (collective).

    Parameters
    ----------
    coarse, fine
        The shallower network, and the deeper one whose parameters are overwritten: with the same kind of layers and
        final time, on the same grid.

    Raises
    ------
    InputError
        Where the networks do not fit each other.
    """
    if coarse.layer.shapes != fine.layer.shapes or coarse.final_time != fine.final_time:
        raise InputError(
            f"networks of layers {coarse.layer.shapes} to T = {coarse.final_time} and {fine.layer.shapes} to T = "
            f"{fine.final_time}: refine from the same kind of layers and the same final time"
        )
    if coarse.grid.layer_size != fine.grid.layer_size:
        raise InputError(
            f"grids of {coarse.grid.layer_size} and {fine.grid.layer_size} layer ranks: refine on the same grid"
        )
    around = [_around(i, coarse.nlayers, fine.nlayers) for i in range(fine.nlayers)]
    needed = [sorted({n for a, b, _ in around[lo:hi] for n in (a, b)}) for lo, hi in pairwise(fine.sweeps.bounds)]
    rows = RowExchange(coarse.grid.layer_comm, coarse.sweeps.bounds, needed)(coarse.stack)
    place = {n: i for i, n in enumerate(needed[coarse.grid.layer_comm.rank])}
    before, after, weights = zip(*around[fine.lo : fine.hi], strict=True)
    before, after = ([place[n] for n in numbers] for numbers in (before, after))
    with torch.no_grad():
        for p, values in zip(fine.stack, rows, strict=True):
            weight = torch.tensor(weights, dtype=p.dtype).reshape(-1, *[1] * (p.ndim - 1))
            p.copy_(torch.lerp(values[before], values[after], weight))
        for name in ("opening", "closing"):
            getattr(fine, name).load_state_dict(getattr(coarse, name).state_dict())


def _around(i: int, coarse: int, fine: int) -> tuple[int, int, float]:
    """The shallow network's layers around the deep one's layer ``i``, and the weight of the second."""
    t = Fraction(i * coarse, fine)
    n = int(t)
    return n, min(n + 1, coarse - 1), float(t - n)

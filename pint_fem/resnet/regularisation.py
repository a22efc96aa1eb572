r"""Regularisation of the layers' parameters as functions of depth, and of the classification layer,

.. math:: R = \frac{\alpha}{2} \sum_{n=0}^{N-1} h\, |\theta_n|^2
            + \frac{\beta}{2} \sum_{n=0}^{N-2} h\, \Big|\frac{\theta_{n+1} - \theta_n}{h}\Big|^2
            + \frac{\gamma}{2}\, |\theta_{class}|^2

(Günther, Ruthotto, Schroder, Cyr, Gauger, arXiv:1812.04352, eq. (2) and Sec. 5). The sums are over the layers of each
stage, and over all parameters of a layer, those of its activation included. Each rank adds up its own layers, with
one layer of each neighbour; ranks are summed in the order of the layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from pint_fem.all_at_once.norms import gather_in_order
from pint_fem.errors import InputError
from pint_fem.resnet.parallel.module import LayerParallelModule
from pint_fem.resnet.row_exchange import RowExchange
from pint_fem.resnet.training.network_rows import LayerRows, rows_of

__all__ = ["Regularisation"]


class Regularisation:
    r"""Regularisation :math:`R = \frac{\alpha}{2} |\theta|^2 + \frac{\beta}{2} |\dot\theta|^2
    + \frac{\gamma}{2} |\theta_{class}|^2` of a network, as a scalar for autograd: ``loss + regularisation()``.

    Parameters
    ----------
    net
        The network.
    tikhonov, smoothness, classifier
        The weights :math:`\alpha`, :math:`\beta` and :math:`\gamma`.

    Raises
    ------
    InputError
        On a negative weight.
    """

    def __init__(
        self, net: LayerParallelModule, tikhonov: float = 0.0, smoothness: float = 0.0, classifier: float = 0.0
    ):
        for name, value in (("tikhonov", tikhonov), ("smoothness", smoothness), ("classifier", classifier)):
            if not 0 <= value < float("inf"):
                raise InputError(f"{name} = {value!r}: give a finite number that is not negative")
        self.net, self.tikhonov, self.smoothness, self.classifier = net, tikhonov, smoothness, classifier
        self._neighbours = [_neighbours(net, stage.sweeps.bounds) for stage in net.stages]

    def __bool__(self) -> bool:
        return bool(self.tikhonov or self.smoothness or self.classifier)

    @property
    def _class_parameters(self) -> list[torch.Tensor]:
        return list(self.net.closing.parameters())

    def __call__(self) -> torch.Tensor:
        """``R``, the same on every rank that shares the layers (collective over ``layer_comm``)."""
        self.net._agree("regularisation")
        stages = rows_of(self.net, buffers=False)
        own = [t for rows in stages for tensors in rows.tensors.values() for t in tensors]
        return _Value.apply(self, stages, *own, *self._class_parameters)

    def evaluate(self, theta: Sequence[torch.Tensor], ends: Sequence[torch.Tensor]) -> tuple[float, list, list]:
        """``R`` and its derivatives (collective over ``layer_comm``).

        The derivatives are those with respect to the stacked parameters ``theta`` of the own layers, of all stages one
        after another, and, on the last rank, ``ends`` of the classification layer. As ``R`` is quadratic, at a
        direction they are the Hessian's action.
        """
        comm, value, gradients, rest = self.net.grid.layer_comm, 0.0, [], list(theta)
        for rows, neighbours in zip(rows_of(self.net, buffers=False), self._neighbours, strict=True):
            own, rest = rest[: len(rows.tensors)], rest[len(rows.tensors) :]
            squares, found = self._of_stage(rows, own, neighbours)
            value += 0.5 * float(gather_in_order(squares, comm).sum())
            gradients += found
        of_ends = 0.5 * self.classifier * sum(float((p.double() ** 2).sum()) for p in ends)
        if self.classifier and comm.size > 1:
            of_ends = comm.bcast(of_ends, root=comm.size - 1)
        return value + of_ends, gradients, [self.classifier * p for p in ends]

    def _of_stage(
        self, rows: LayerRows, theta: Sequence[torch.Tensor], neighbours: RowExchange
    ) -> tuple[np.ndarray, list[torch.Tensor]]:
        """Twice the part of each own layer of a stage, and the derivatives."""
        h, squares, gradients, before = self.net.h, np.zeros(rows.hi - rows.lo), [], int(rows.lo > 0)
        foreign = neighbours(theta) if self.smoothness else [p[:0] for p in theta]
        for p, f in zip(theta, foreign, strict=True):
            g = self.tikhonov * h * p
            squares += self.tikhonov * h * _squares(p)
            if self.smoothness:
                left, right = f[:before], f[before:]
                d = torch.diff(torch.cat([left, p, right]), dim=0)
                own = d[before:]
                squares[: len(own)] += self.smoothness / h * _squares(own)
                g[: len(own)] -= self.smoothness / h * own
                onto = d[: len(p)] if before else d[: len(p) - 1]
                g[1 - before :] += self.smoothness / h * onto
            gradients.append(g)
        return squares, gradients


def _neighbours(net: LayerParallelModule, bounds: Sequence[int]) -> RowExchange:
    """Fetches the layers before and after the own ones of a stage."""
    around = [[n for n in (a - 1, b) if 0 <= n < bounds[-1]] for a, b in pairwise(bounds)]
    return RowExchange(net.grid.layer_comm, bounds, around)


def _squares(p: torch.Tensor) -> np.ndarray:
    """Sum of squares of each row."""
    return (p.double().reshape(len(p), math.prod(p.shape[1:])) ** 2).sum(1).numpy()  # of no rows, too


class _Value(torch.autograd.Function):
    """Value of a regularisation, with its derivatives evaluated at the same time."""

    @staticmethod
    def forward(ctx: Any, regularisation, stages, *parameters):
        own = sum(len(tensors) for rows in stages for tensors in rows.tensors.values())
        theta = _wide([rows.stack(name) for rows in stages for name in rows.tensors])
        value, of_layers, of_ends = regularisation.evaluate(theta, [p.detach() for p in parameters[own:]])
        stacked = [rows.stacked for rows in stages for _ in rows.tensors]
        found = [g for all_of_name, whole in zip(of_layers, stacked, strict=True)
                 for g in ([all_of_name] if whole else all_of_name)]  # fmt: skip
        ctx.gradients = [g.to(p) for g, p in zip([*found, *of_ends], parameters, strict=True)]
        return parameters[0].new_tensor(value) if parameters else torch.tensor(value)

    @staticmethod
    def backward(ctx: Any, gradient):
        return None, None, *(gradient * g for g in ctx.gradients)


def _wide(arrays: list[torch.Tensor]) -> list[torch.Tensor]:
    """The values in one type, which messages take."""
    types = {a.dtype for a in arrays}
    return arrays if types in ({torch.float32}, {torch.float64}) else [a.double() for a in arrays]

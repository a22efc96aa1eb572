r"""Regularisation of the layers' parameters as functions of depth, and of the classification layer,

.. math:: R = \frac{\alpha}{2} \sum_{n=0}^{N-1} h\, |\theta_n|^2
            + \frac{\beta}{2} \sum_{n=0}^{N-2} h\, \Big|\frac{\theta_{n+1} - \theta_n}{h}\Big|^2
            + \frac{\gamma}{2}\, |\theta_{class}|^2

(Günther, Ruthotto, Schroder, Cyr, Gauger, arXiv:1812.04352, eq. (2) and Sec. 5). Each rank adds up its own layers, with
one layer of each neighbour; ranks are summed in the order of the layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from pint_fem.all_at_once.norms import gather_in_order
from pint_fem.errors import InputError
from pint_fem.resnet.network import LayerParallelResNet
from pint_fem.resnet.row_exchange import RowExchange

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
        self, net: LayerParallelResNet, tikhonov: float = 0.0, smoothness: float = 0.0, classifier: float = 0.0
    ):
        for name, value in (("tikhonov", tikhonov), ("smoothness", smoothness), ("classifier", classifier)):
            if not 0 <= value < float("inf"):
                raise InputError(f"{name} = {value!r}: give a finite number that is not negative")
        self.net, self.tikhonov, self.smoothness, self.classifier = net, tikhonov, smoothness, classifier
        bounds, N = net.sweeps.bounds, net.nlayers
        around = [[n for n in (a - 1, b) if 0 <= n < N] for a, b in pairwise(bounds)]
        self._neighbours = RowExchange(net.grid.layer_comm, bounds, around)

    def __bool__(self) -> bool:
        return bool(self.tikhonov or self.smoothness or self.classifier)

    @property
    def _class_parameters(self) -> list[torch.Tensor]:
        return list(self.net.closing.parameters())

    def __call__(self) -> torch.Tensor:
        """``R``, the same on every rank that shares the layers (collective over ``layer_comm``)."""
        return _Value.apply(self, *self.net.stack, *self._class_parameters)

    def evaluate(self, theta: Sequence[torch.Tensor], ends: Sequence[torch.Tensor]) -> tuple[float, list, list]:
        """``R`` and its derivatives (collective over ``layer_comm``).

        The derivatives are those with respect to the stacked parameters ``theta`` of the own layers and, on the last
        rank, ``ends`` of the classification layer. As ``R`` is quadratic, at a direction they are the Hessian's action.
        """
        net, h = self.net, self.net.h
        foreign = self._neighbours(theta) if self.smoothness else [p[:0] for p in theta]
        squares, gradients = np.zeros(net.hi - net.lo), []
        before = int(net.lo > 0)
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
        value = 0.5 * float(gather_in_order(squares, net.grid.layer_comm).sum())
        of_ends = 0.5 * self.classifier * sum(float((p**2).sum()) for p in ends)
        if self.classifier and net.grid.layer_size > 1:
            of_ends = net.grid.layer_comm.bcast(of_ends, root=net.grid.layer_size - 1)
        return value + of_ends, gradients, [self.classifier * p for p in ends]


def _squares(p: torch.Tensor) -> np.ndarray:
    """Sum of squares of each row."""
    return (p.double().reshape(len(p), -1) ** 2).sum(1).numpy()


class _Value(torch.autograd.Function):
    """Value of a regularisation, with its derivatives evaluated at the same time."""

    @staticmethod
    def forward(ctx: Any, regularisation, *parameters):
        n = len(regularisation.net.layer.shapes)
        theta, ends = [p.detach() for p in parameters[:n]], [p.detach() for p in parameters[n:]]
        value, of_layers, of_ends = regularisation.evaluate(theta, ends)
        ctx.gradients = [*of_layers, *of_ends]
        return parameters[0].new_tensor(value)

    @staticmethod
    def backward(ctx: Any, gradient):
        return None, *(gradient * g for g in ctx.gradients)

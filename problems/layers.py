"""The network of the benchmarks and of the performance model: two-class peaks in the plane, width 8, batches of 200."""

from __future__ import annotations

import torch
from torch import nn

from pint_fem.resnet import Dense

__all__ = ["ACCURATE", "BATCH", "SETTINGS", "WIDTH", "Training", "parts"]

WIDTH, BATCH = 8, 200
SETTINGS = {"levels": 2, "coarsening": 32, "relax": "F"}
#: With which 1,024 layers are as accurate on peaks as the serial copy.
ACCURATE = {"levels": 2, "coarsening": 8, "relax": "F"}


def parts():
    """Opening, layer, closing, batch and labels."""
    torch.manual_seed(0)
    x = torch.rand(BATCH, 2, dtype=torch.float64) * 6 - 3
    y = (x[:, 0] * x[:, 1] > 0).long()
    return nn.Sequential(nn.Linear(2, WIDTH), nn.Tanh()), Dense(WIDTH, "tanh"), nn.Linear(WIDTH, 2), x, y


class Training:
    """One training step of a network."""

    def __init__(self, net, x, y):
        self.net, self.x, self.y = net, x, y
        self.optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)

    def gradients(self):
        """Forward and backward."""
        self.optimizer.zero_grad()
        nn.functional.cross_entropy(self.net(self.x), self.y).backward()

    def step(self):
        """Forward, backward and update."""
        self.gradients()
        self.optimizer.step()

"""Random numbers of a network: the same on all ranks, fixed within a solve, and none taken from the user's generators.

Every evaluation of a part of a network (the opening layer, a residual layer, a transition, the classification layer)
begins with a seed made of the network's seed, the number of the pass and the number of the part. So a mask of dropout
is the same however often a relaxation evaluates the layer, on whatever rank, and the user's generators, which shuffle
data for instance, advance alike on all ranks: not at all.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

__all__ = ["count_pass", "devices_of", "mixed_seed", "own_random_numbers", "seed_generators", "watched_generators"]

_MIX = 0x9E3779B97F4A7C15  # of splitmix64
_WORD = (1 << 64) - 1


def mixed_seed(*numbers: int) -> int:
    """A 63-bit seed from some whole numbers; neighbouring ones give seeds that have nothing to do with each other
    (splitmix64's finaliser).
    """
    state = 0
    for number in numbers:
        state = (state + (number & _WORD) + _MIX) & _WORD
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _WORD
        state ^= state >> 31
    return state >> 1


def devices_of(tensors: Iterable[torch.Tensor]) -> list[torch.device]:
    """The accelerators that some tensors are on."""
    return sorted({t.device for t in tensors if t.device.type == "cuda"}, key=str)


@contextmanager
def own_random_numbers(devices: Iterable[torch.device] = ()) -> Iterator[None]:
    """Leave torch's generators, of the processor and of some accelerators, as they were before."""
    with torch.random.fork_rng(devices=list(devices)):
        yield


@contextmanager
def watched_generators() -> Iterator[None]:
    """Warn where the generators of Python or numpy advance, which are not seeded for each evaluation."""

    def states() -> tuple:
        _, words, position, *_ = np.random.get_state()  # noqa: NPY002 (the generator that layers may draw from)
        return random.getstate(), bytes(words), position

    before = states()
    yield
    if states() != before:
        warnings.warn(
            "layers draw from the generator of Python or numpy, whose numbers differ between the evaluations of a "
            "layer in one pass, so that gradients are wrong: draw by torch, such as torch.rand(()).item()",
            stacklevel=2,
        )


def seed_generators(seed: int, devices: Iterable[torch.device] = ()) -> None:
    """Seed torch's generators of the processor and of some accelerators."""
    torch.default_generator.manual_seed(seed)
    for device in devices:
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


def pass_number(network: Any) -> tuple[int, int]:
    """Number of the pass of a network that comes next, from which seeds are made.

    The first is that of the passes in training mode; the second is 0 in training mode, else that of the evaluation
    since the last of those. So the masks of a training do not depend on how often the network is evaluated meanwhile.
    """
    return network.passes, 0 if network.training else 1 + network.evaluations


def count_pass(network: Any) -> None:
    """Count a pass in the network's ``passes`` or ``evaluations``."""
    if network.training:
        network.passes, network.evaluations = network.passes + 1, 0
    else:
        network.evaluations += 1

"""Hessian actions at one iterate, kept within a bound of memory for minimisers that ask for them again."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import numpy as np

__all__ = ["ACTIONS_MEMORY", "HessianActions"]

ACTIONS_MEMORY = 1 << 26
"""Bytes of Hessian actions that are kept at an iterate."""


class HessianActions:
    """Hessian actions at the last iterate, up to :data:`ACTIONS_MEMORY` bytes of them.

    A trust region that shrinks begins with the same directions again, in the same order: so the first ones are kept,
    and those beyond are computed again.
    """

    def __init__(self):
        self._y = np.full(0, math.nan)
        self._kept: dict[bytes, np.ndarray] = {}

    def at(self, y: np.ndarray, p: np.ndarray, compute: Callable[[], np.ndarray]) -> np.ndarray:
        """The action at ``y`` in a direction ``p``, computed where it is not kept."""
        if not np.array_equal(y, self._y):
            self._y, self._kept = np.array(y), {}
        key = hashlib.blake2b(np.ascontiguousarray(p, dtype=float), digest_size=16).digest()
        if key in self._kept:
            return self._kept[key].copy()
        action = compute()
        if (len(self._kept) + 1) * action.nbytes <= ACTIONS_MEMORY:
            self._kept[key] = action.copy()
        return action

"""Batches of directions and right-hand sides: arrays ``(points, members, n)`` of linear sweeps that are solved at once.

The members of a batch are the tangents in several directions of the controls, or the adjoints of several right-hand
sides, at one state and one control. Directions are given as a list with the controls of the own steps for each member.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

__all__ = ["member_squares", "of_each", "stacked", "stacked_levels"]


def stacked(blocks: Sequence[np.ndarray]) -> np.ndarray:
    """Arrays ``(k, n)`` of the members of a batch as one ``(k, members, n)``; rows that are all the same stay one."""
    k, n = blocks[0].shape
    if k and all(block.strides[0] == 0 for block in blocks):
        return np.broadcast_to(np.stack([block[0] for block in blocks]), (k, len(blocks), n))
    return np.stack(blocks, axis=1)


def of_each(compute: Callable[[np.ndarray], np.ndarray], dz: np.ndarray | list[np.ndarray]) -> np.ndarray:
    """The array ``(k, n)`` that is computed from a direction, or ``(k, members, n)`` from a list of them."""
    return stacked([compute(own) for own in dz]) if isinstance(dz, list) else compute(dz)


def stacked_levels(levels: Sequence[Iterable[np.ndarray]]) -> Iterator[np.ndarray]:
    """From iterables, one for each member, of an array ``(k, n)`` per level: one ``(k, members, n)`` per level."""
    return (stacked(blocks) for blocks in zip(*levels, strict=True))


def member_squares(rows: np.ndarray) -> np.ndarray:
    """Sums of squares of an array's members, ``(members,)`` for ``(k, members, n)`` and ``(1,)`` for ``(k, n)``."""
    return np.einsum("kbn,kbn->b", rows, rows) if rows.ndim == 3 else np.array([np.vdot(rows, rows)])

"""Time grids of a hierarchy of levels: their points, and the bounds of the ranks' steps on them.

The C-points of a level are the points of the next one: every ``m``-th point, or any subset that starts with point 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, TypeGuard

import numpy as np

from pint_fem.digests import digest

__all__ = ["Bounds", "Coarsening", "check_coarsening", "coarse_points", "is_integer", "split_steps"]

Coarsening = int | Sequence[int]
"""A factor ``m``, or the C-points by their numbers on the level."""


def split_steps(nsteps: int, parts: int) -> list[int]:
    """Bounds of ``parts`` contiguous, nearly equal ranges of ``nsteps`` steps.

    Parameters
    ----------
    nsteps, parts
        Numbers of steps and of ranges.

    Returns
    -------
    list of int
        ``parts + 1`` bounds, from 0 to ``nsteps``.
    """
    return [(nsteps * r) // parts for r in range(parts + 1)]


def coarse_points(nsteps: int, coarsening: Sequence[Coarsening]) -> list[range | np.ndarray]:
    """Points of every level, by their numbers on the finest: what propagators on a non-uniform time grid are made of.

    Parameters
    ----------
    nsteps
        Steps of the finest level.
    coarsening
        Factor or C-points of each level but the coarsest.

    Returns
    -------
    list of range or ndarray
        ``t[points[l]]`` are the times of level ``l`` for an array ``t`` of the finest level's times.

    Raises
    ------
    ValueError
        If C-points do not start at 0, do not increase or are no points of their level.
    """
    points: list[range | np.ndarray] = [range(nsteps + 1)]
    for index, m in enumerate(check_coarsening(coarsening) if len(coarsening) else ()):
        last = len(points[-1]) - 1
        if isinstance(m, int):
            points.append(points[-1][::m])
            continue
        c = np.asarray(m, dtype=int)
        if c[0] != 0 or (np.diff(c) < 1).any() or c[-1] > last or len(c) < 2:
            raise ValueError(
                f"C-points {_short(c)} of level {index}: give increasing numbers of its points 0..{last}, from 0 on, "
                "at least two"
            )
        points.append(np.asarray(points[-1])[c])
    return points


def _short(values: Sequence) -> str:
    text = ", ".join(map(str, values[:4]))
    return f"[{text}, ...]" if len(values) > 4 else f"[{text}]"


class Bounds(tuple):
    """Step bounds of the ranks on a level, ``size + 1`` numbers, with the quantities derived from them cached."""

    @classmethod
    def of_ranks(
        cls, nsteps: int, size: int, given: Sequence[int] | None = None, c_points: Coarsening | None = None
    ) -> Bounds:
        """Bounds of the ranks of a communicator.

        Parameters
        ----------
        nsteps, size
            Numbers of steps and of ranks.
        given
            Bounds; default: nearly equal numbers of steps.
        c_points
            The C-points, by their distance or their numbers, for nearly equal numbers of whole intervals between them.

        Raises
        ------
        ValueError
            If the given bounds do not split the steps over the ranks.
        """
        if given is not None:
            bounds = cls.make(given)
        elif c_points is None:
            bounds = cls(split_steps(nsteps, size))
        else:
            c = range(0, nsteps + 1, c_points) if isinstance(c_points, int) else c_points
            bounds = cls([*(int(c[j]) for j in split_steps(len(c) - 1, size)[:-1]), nsteps])
        if not bounds.increase or len(bounds) != size + 1 or bounds[-1] != nsteps:
            raise ValueError(f"bounds {list(bounds)} do not split {nsteps} steps over {size} ranks")
        return bounds

    @classmethod
    def make(cls, bounds: Sequence[int]) -> Bounds:
        """Bounds from numbers; a ``Bounds`` object is returned as it is."""
        return bounds if isinstance(bounds, cls) else cls(bounds)

    @cached_property
    def increase(self) -> bool:
        """Whether the bounds are whole numbers from 0 on that do not decrease."""
        whole = all(hasattr(b, "__index__") for b in self)
        return whole and len(self) > 1 and self[0] == 0 and sorted(self) == list(self)

    @cached_property
    def digest(self) -> int:
        """A number that is the same in all processes that have the same bounds."""
        return digest(tuple(self))

    @cached_property
    def _cache(self) -> dict:
        return {}

    def layout(self, width: int) -> tuple[np.ndarray, np.ndarray]:
        """Counts and displacements, for MPI, of the ranks' parts of an array with ``width`` numbers per step."""
        if ("layout", width) not in self._cache:
            places = width * np.array(self, dtype=int)
            self._cache["layout", width] = np.diff(places), places[:-1].copy()
        return self._cache["layout", width]

    def coarsened(self, m: int) -> Bounds:
        """The bounds on the level of every ``m``-th point."""
        if m not in self._cache:
            self._cache[m] = Bounds([b // m for b in self])
        return self._cache[m]


def check_coarsening(given: Any) -> tuple:
    """A coarsening as a tuple of factors and tuples of C-points, one entry per level.

    Raises
    ------
    ValueError
        On an entry that is neither a factor of at least 2 nor increasing C-points from 0 on.
    """
    bad = ValueError(
        f"mgrit coarsening {given!r}: give whole numbers of at least 2, such as (8, 4), or a level's C-points [0, ...]"
    )
    items = tuple(given) if isinstance(given, Iterable) and not isinstance(given, str) else (given,)
    out = []
    for m in items:
        if isinstance(m, Iterable) and not isinstance(m, str):
            m = tuple(m)
            if len(m) < 2 or any(not is_integer(c) for c in m) or m[0] != 0 or sorted(set(m)) != list(m):
                raise bad
            out.append(tuple(int(c) for c in m))
        elif not is_integer(m) or m < 2:
            raise bad
        else:
            out.append(int(m))
    if not out:
        raise bad
    return tuple(out)


def is_integer(value: object) -> TypeGuard[int]:
    """Whether a value can be used as an index; booleans cannot."""
    return hasattr(value, "__index__") and not isinstance(value, bool)

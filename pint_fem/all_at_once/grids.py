"""Time grids of the MGRIT hierarchy: the points of its levels, and the bounds of the ranks' steps on them.

The C-points of a level are the points of the next one: every ``m``-th point, or any subset that starts with point 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property

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
        Number of steps and of ranges.

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


def _short(values) -> str:
    text = ", ".join(map(str, values[:4]))
    return f"[{text}, ...]" if len(values) > 4 else f"[{text}]"


class Bounds(tuple):
    """Step bounds of the ranks on a level, ``size + 1`` numbers, and what follows from them: computed once, whoever
    shares the object.
    """

    @classmethod
    def shared_out(cls, nsteps: int, size: int, c_points: Coarsening | None = None) -> Bounds:
        """Nearly equal shares of the steps for ``size`` ranks; of whole intervals between C-points where these are
        given, by their distance or their numbers.
        """
        if c_points is None:
            return cls(split_steps(nsteps, size))
        c = range(0, nsteps + 1, c_points) if isinstance(c_points, int) else c_points
        return cls([*(int(c[j]) for j in split_steps(len(c) - 1, size)[:-1]), nsteps])

    @classmethod
    def make(cls, bounds: Sequence[int]) -> Bounds:
        """From numbers; what is one already stays the same object."""
        return bounds if isinstance(bounds, cls) else cls(bounds)

    @cached_property
    def increase(self) -> bool:
        """Whether they are whole numbers from 0 on that do not decrease."""
        whole = all(hasattr(b, "__index__") for b in self)
        return whole and len(self) > 1 and self[0] == 0 and sorted(self) == list(self)

    @cached_property
    def digest(self) -> int:
        """A number that is the same in all processes that have the same bounds."""
        return digest(tuple(self))

    @cached_property
    def _known(self) -> dict:
        return {}

    def layout(self, width: int) -> tuple[np.ndarray, np.ndarray]:
        """Counts and places of the ranks' parts of an array with ``width`` numbers a step, as MPI wants them."""
        if ("layout", width) not in self._known:
            places = width * np.array(self, dtype=int)
            self._known["layout", width] = np.diff(places), places[:-1].copy()
        return self._known["layout", width]

    def coarsened(self, m: int) -> Bounds:
        """Those of the level of every ``m``-th point."""
        if m not in self._known:
            self._known[m] = Bounds([b // m for b in self])
        return self._known[m]


def check_coarsening(given) -> tuple:
    """Factors and tuples of C-points.

    Raises
    ------
    ValueError
        On what is neither.
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


def is_integer(value) -> bool:
    """Whether a value can be used as an index; booleans cannot."""
    return hasattr(value, "__index__") and not isinstance(value, bool)

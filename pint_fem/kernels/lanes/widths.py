"""Numbers of lanes in the calls of the kernels for some number of states."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["cut"]


def cut(states: int, seconds: Mapping[int, float]) -> list[tuple[int, int]]:
    """Divide states among calls of kernels, of the least time in all.

    Parameters
    ----------
    states
        Number of states.
    seconds
        Times of a call by its width, whatever the number of its lanes in use.

    Returns
    -------
    list of tuple
        The width of each call and the number of its states, at most the width; calls of the width that is fastest per
        state, which many states begin with, are one entry.
    """
    widest = min(seconds, key=lambda w: seconds[w] / w)
    calls = [(widest, states // widest * widest)] if states >= widest else []
    best: list[tuple[float, list[tuple[int, int]]]] = [(0.0, [])]
    for count in range(1, states % widest + 1):
        time, w = min((best[count - min(w, count)][0] + s, w) for w, s in seconds.items())
        best.append((time, [*best[count - min(w, count)][1], (w, min(w, count))]))
    return calls + best[-1][1]

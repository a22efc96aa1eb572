"""Relaxation on blocks: the intervals of a slab advance in lock-step.

F-relaxation takes each interval's C-point through the F-points behind it; intervals are independent, so step ``j`` of
all of them is one call of the propagator on a block of states. C-relaxation updates the C-points from the F-points
before them.

Slabs may begin anywhere. Where one begins at a C-point the ghost row is a C-point, and all intervals go together.
Where it begins inside an interval, the part in front waits for the left neighbour; it is relaxed last.
"""

from __future__ import annotations

import numpy as np

from pint_fem.mgrit.levels import Level, wait

__all__ = ["c_relax", "c_residual", "f_relax", "relax", "solve_sequentially"]


def f_relax(level: Level) -> None:
    """Update the F-points: ``U[n+1] = Phi_n(U[n]) + G[n]`` from each C-point on."""
    if not level.active:
        return
    m, k, lo, U = level.m, level.k, level.lo, level.U
    inside = lo % m  # 0: the ghost row is a C-point
    receive, send = level.post_receive(U), None
    if level.hi % m == 0:  # the last row is a C-point: the neighbour needs it as it is
        send = level.post_send(U)
    if inside == 0:
        wait(receive)
    first = (m - inside) % m
    for row in range(first, first + m - 1):
        _advance(level, row, m)
    has_c_point = first <= k
    if level.hi % m and has_c_point:
        send = level.post_send(U)
    if inside:
        wait(receive)
        for row in range(min(m - inside - 1, k)):
            _advance(level, row, m, count=1)
    if level.hi % m and not has_c_point:
        send = level.post_send(U)
    wait(send)


def _advance(level: Level, row: int, m: int, count: int | None = None) -> None:
    """Step the rows ``row, row + m, ...`` (the first ``count`` of them) into the rows behind them."""
    stop = level.k if count is None else row + count
    if row >= stop:
        return
    target = level.U[row + 1 : stop + 1 : m]
    level.phi(range(level.lo + row, level.lo + stop, m), level.U[row:stop:m], target)
    if level.G is not None:
        target += level.G[row:stop:m]


def c_relax(level: Level) -> None:
    """Update the C-points from the F-points before them."""
    if level.active:
        _advance(level, level.first_c_row - 1, level.m)


def c_residual(level: Level, out: np.ndarray) -> None:
    """Write ``G + Phi(U) - U`` at the own C-points to ``out``; after F-relaxation that is the whole residual."""
    if not level.active or not len(out):
        return
    row, m, k = level.first_c_row - 1, level.m, level.k
    level.phi(range(level.lo + row, level.lo + k, m), level.U[row:k:m], out)
    if level.G is not None:
        out += level.G[row:k:m]
    out -= level.U[row + 1 : k + 1 : m]


def relax(level: Level, scheme: str, *, f_is_done: bool = False) -> None:
    """Relax by ``scheme``, ``"F"`` or ``"FCF"``; ``f_is_done``: the first F-relaxation would change nothing."""
    if not f_is_done:
        f_relax(level)
    for _ in range(scheme.count("C")):
        c_relax(level)
        f_relax(level)


def solve_sequentially(level: Level) -> None:
    """Take all steps of a level in turn, rank after rank; row 0 of the first rank is the initial value."""
    if not level.active:
        return
    wait(level.post_receive(level.U))
    level.sweep()
    wait(level.post_send(level.U))

r"""Right-hand sides of coarse levels for a first guess by nested iteration.

A right-hand side that enters ``c - i`` fine steps before the C-point ``c`` reaches it as :math:`\Phi^{c-i} g_i`.
Where propagators are linear and take the steps of many intervals in one call, the sum over an interval is the residual
after an F-relaxation from zero. Else, between no step and a whole coarse step that is interpolated linearly,

.. math::  g^c = \sum_i (1 - \theta_i) g_i + \Phi^c \sum_i \theta_i g_i , \qquad \theta_i = (c - i)/m ,

where the propagators are linear; else :math:`g^c = \sum_i g_i`. It only shapes the guess: cycles do not use it.
"""

from __future__ import annotations

from pint_fem.all_at_once.arrays import Array, contiguous, copied, kind_of
from pint_fem.all_at_once.levels import Level
from pint_fem.mgrit.relaxation import Relaxation, runs
from pint_fem.mgrit.transfer import Transfer

__all__ = ["coarse_rhs"]


def coarse_rhs(fine: Level, coarse: Level, relaxation: Relaxation, transfer: Transfer | None, *, linear: bool) -> None:
    """Set the right-hand side ``coarse.G`` from ``fine.G`` (collective over the ranks with steps on ``fine``)."""
    if not fine.active:
        return
    if linear and fine.advances:
        _propagate(fine, coarse, relaxation, transfer)
        return
    early, late = _sums(fine, relaxation)
    if transfer is not None:
        early, late = transfer.restrict(early), transfer.restrict(late)
    if linear:
        if coarse.uses_guess:
            coarse.G[...] = early
        coarse.phi(range(coarse.lo, coarse.hi), early, coarse.G)
        coarse.G += late
    else:
        coarse.G[...] = early + late


def _propagate(fine: Level, coarse: Level, relaxation: Relaxation, transfer: Transfer | None) -> None:
    """Propagate the right-hand side to the C-points, from zero there; overwrites the points but the first of all."""
    initial = copied(fine.U[:1])
    fine.U[:1] = 0
    relaxation.set_c_values(fine.U, 0)
    relaxation.f_relax()
    sums = kind_of(fine.U).empty(coarse.k, *fine.U.shape[1:])
    relaxation.c_residual(sums)
    coarse.G[...] = sums if transfer is None else transfer.restrict(sums)
    fine.U[:1] = initial


def _sums(fine: Level, relaxation: Relaxation) -> tuple[Array, Array]:
    """Sums with weights ``theta`` and ``1 - theta`` over each interval that ends on this rank.

    Parts of an interval on several ranks are added from left to right.
    """
    G, lo, shape, kind = fine.G, fine.lo, fine.G.shape[1:], kind_of(fine.G)
    sums = kind.zeros(2, len(relaxation.intervals), *shape)  # of all, and with weights 1 - theta
    begun = kind.zeros(1, 2, *shape)  # of an interval that the left neighbour has begun
    inside = bool(relaxation.intervals) and relaxation.intervals[0].start < lo
    unfinished = fine.k > 0 and not relaxation.last_is_c
    if inside:
        fine.wait(fine.post_receive(begun))
        sums[:, 0] = begun[0]
    for j in range(max((i.length for i in relaxation.intervals), default=0)):
        for run in runs(relaxation.intervals, j, lo, fine.hi, relaxation.first_number):
            sums[0, run.places] += G[run.rows]
            sums[1, run.places] += ((1 + j) / run.steps.step) * G[run.rows]
    if unfinished and fine.right is not None:
        fine.wait(fine.post_send(contiguous(sums[:, -1])[None]))
    late = sums[1, : relaxation.count]
    return sums[0, : relaxation.count] - late, late

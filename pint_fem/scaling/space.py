r"""Kernels on several space ranks: measured ones, and a surface-to-volume model beyond them.

On a subdomain with :math:`n/p` unknowns in two dimensions the solver works on the own unknowns and ``o`` layers of the
neighbours', :math:`V(p) = (\sqrt{n/p} + 2 o)^2`; a kernel then takes

.. math::  T(p) = T(q) \frac{V(p)}{V(q)}
           + s\, i \left( 2 \lceil\log_2 p\rceil\, \ell + 2 (\ell + 8 \sqrt{n/p} / \beta) \right)

for each state, with ``q`` the largest measured number of space ranks, ``s`` stages, ``i`` Krylov iterations (as many as
on ``q``), each with two reductions and an exchange with the neighbours.

Small systems, of which every rank has the whole factor (:mod:`pint_fem.kernels.direct`), have ``i = 0``: more ranks do
not shorten a step, and its state takes longer to reach them, with a message from each of them per call.
"""

from __future__ import annotations

from math import ceil, log2, sqrt

from pint_fem.scaling.costs import Calibration, Kernel
from pint_fem.scaling.network import Network

__all__ = ["assumption", "space_kernels", "volume"]


def volume(unknowns: float, ranks: int, overlap: int) -> float:
    """Unknowns of the subdomain of one of ``ranks`` space ranks, with ``overlap`` layers of its neighbours'."""
    return (sqrt(unknowns / ranks) + 2 * overlap) ** 2


def space_kernels(calibration: Calibration, ranks: int, network: Network) -> dict[str, list[Kernel]]:
    """Kernels, by kind and level, on ``ranks`` space ranks."""
    c = calibration
    if ranks in c.kernels:
        return {kind: list(levels) for kind, levels in c.kernels[ranks].items()}
    measured, iterations = max(c.kernels), c.space_iterations
    ratio = volume(c.unknowns, ranks, c.overlap) / volume(c.unknowns, measured, c.overlap) if iterations else 1.0
    out = {}
    for kind, levels in c.kernels[measured].items():
        per_call = per_state = 0.0
        if iterations:
            halo = 8 * sqrt(c.unknowns / ranks)
            per_state = c.stages * iterations * (2 * ceil(log2(ranks)) * network.latency + 2 * network.message(halo))
        else:
            per_call = (ranks - measured) * network.latency
            per_state = 8 * c.unknowns * (1 / measured - 1 / ranks) / network.bandwidth
        out[kind] = [k.scaled(ratio, per_state, per_call) for k in levels]
    return out


def assumption(calibration: Calibration) -> str:
    """The assumption of :func:`space_kernels` for a calibration, as a sentence."""
    c, measured = calibration, max(calibration.kernels)
    if not c.space_iterations:
        return f"space ranks beyond those measured: every rank solves whole systems as on {measured}, none is faster"
    return (
        f"space ranks beyond those measured: subdomains of n/p unknowns and {c.overlap} layers of overlap, work as "
        f"their volume, {c.space_iterations:g} Krylov iterations per stage as on {measured} ranks, each with two "
        "reductions and one exchange"
    )

r"""Kernels on several space ranks: measured ones, and a model of each kind of solver in space beyond them.

A state has :math:`n` unknowns on a mesh in :math:`D` dimensions, which is cut into :math:`p` parts of equal volume. Let
:math:`\ell, \beta` be latency and bandwidth of the network, :math:`W` the states of a call, :math:`s` the stages of a
step, and :math:`q` the largest number of space ranks on which kernels were measured. A kernel with :math:`C(p)` of some
measure of work on a rank and exchanges of :math:`a(p)` seconds per call and :math:`b(p)` per state takes

.. math::  T_W(p) = \max\{0,\; T_W(q) - a(q) - W b(q)\}\, \frac{C(p)}{C(q)} + a(p) + W b(p),

with ``a(1) = b(1) = 0``, so that measured kernels are what was measured. What a calibration records of its solver in
space, ``space_solver``, decides on ``C``, ``a`` and ``b``:

``"replicated"`` (small systems)
    Every rank has the whole factor and solves whole systems, for its share of the states of a call: :math:`W` states on
    ``q`` ranks take as long as :math:`W p / q` on ``p``, without exchanges. Fewer states than ranks are stepped on all
    of them, which is no faster. All unknowns of a share are exchanged before a call, the own ones of all states after:

    .. math::  a(p) = 2 (p - 1)\, \ell, \qquad b(p) = 2\, \frac{8 n}{\beta}\, \frac1p \Bigl(1 - \frac1p\Bigr).

``"substructuring"`` (parallel direct solver)
    A rank eliminates the interior unknowns of its part; those on the interfaces of all parts,

    .. math::  n_\Gamma(p) = D\, n^{(D-1)/D} (p^{1/D} - 1) ,

    are the :math:`p^{1/D} - 1` planes in each direction that cut a cube into :math:`p` cubes (scaled to the measured
    number where the calibration has it). A rank has :math:`n_\Gamma / p` rows of the inverse of their dense Schur
    complement. By nested dissection (A. George, SIAM J. Numer. Anal. 10, 1973) a factor of :math:`n` unknowns has
    :math:`c\, n^{4/3}` entries in three dimensions, :math:`c\, n \log n` in two and :math:`c\, n` in one, so that with
    :math:`f(1)` entries on one rank a rank has the share

    .. math::  f(p) = f(1)\, p^{-4/3}, \qquad f(p) = \frac{f(1)}{p}\, \frac{\log (n/p)}{\log n}, \qquad
               f(p) = \frac{f(1)}{p} \quad (D = 3, 2, 1).

    A solve reads the factor twice, forwards and backwards, and the inverse once, for all states of a block at once: 8
    bytes for each entry, and 2 operations for each entry and state, so that

    .. math::  C(p) = 2 f(p) + \frac{n_\Gamma(p)^2}{p} .

    In between, each rank gathers the right-hand sides of the interfaces (the own ones, and what the two adjacent parts
    add: 3 numbers for each unknown) and then the solution there, in two all-gathers for all states of the call:

    .. math::  a(p) = 2 s\, \lceil\log_2 p\rceil\, \ell, \qquad b(p) = s\, \frac{8 \cdot 4\, n_\Gamma(p)}{\beta} .

    With more and more ranks these messages grow, :math:`n_\Gamma \sim p^{1/D}`: there is a fastest number.

``"multigrid"`` (conjugate gradients with multigrid on blocks of states)
    Level ``l`` of ``L`` has :math:`n_l = n\, 2^{-D l}` unknowns, and a part of it the surface
    :math:`h_l(p) = 2 D\, (n_l/p)^{(D-1)/D}`. A cycle in single precision exchanges it with the neighbours 6 times (two
    smoothing steps before, of which the first begins from zero, and two after, the residual, both transfers), the
    product with the matrix once in double precision. Each of :math:`i` iterations has 2 reductions and an all-gather of
    the coarsest level, all of them for all states of a block at once:

    .. math::
       a(p) = s\, i\, \bigl( (6 L + 1)\, \ell + 3 \lceil\log_2 p\rceil\, \ell \bigr), \qquad
       b(p) = \frac{s\, i}{\beta}\, \Bigl( 4 \cdot 6 \sum_{l<L} h_l(p) + 8 (h_0(p) + 2) \Bigr), \qquad
       C(p) = \sum_{l<L} \bigl( \max\{1, n_l / p\} + h_l(p)\, [p > 1] \bigr) .

    The number of iterations does not depend on ``p``. As a rank has at least one unknown, coarse levels do not get
    faster, and a call takes no less than its latencies.

``"subdomains"`` (a Krylov method with overlapping subdomains that are factored)
    A subdomain has the own unknowns and ``o`` layers of the neighbours', in two dimensions :math:`V(p) = (\sqrt{n/p} +
    2 o)^2` unknowns; a kernel takes, with ``i`` iterations for each state, two reductions and an exchange in each,

    .. math::  T_W(p) = T_W(q) \frac{V(p)}{V(q)}
               + W s\, i \left( 2 \lceil\log_2 p\rceil\, \ell + 2 (\ell + 8 \sqrt{n/p} / \beta) \right) .

The exchanges of the measurement are those of the calibration's network, the predicted ones those of the given network.
"""

from __future__ import annotations

from math import ceil, log, log2, sqrt

from pint_fem.errors import InputError
from pint_fem.scaling.costs import Calibration, Kernel
from pint_fem.scaling.network import Network

__all__ = [
    "EXCHANGES", "SOLVERS", "assumption", "exchange_seconds", "factor_share", "interface_unknowns", "solver_of",
    "space_kernels", "volume", "work_of_rank",
]  # fmt: skip

SOLVERS = ("replicated", "substructuring", "multigrid", "subdomains")
"""Kinds of solvers in space."""
EXCHANGES, REDUCTIONS = 6, 2
"""Exchanges with the neighbours on each level, and reductions, in an iteration with multigrid."""
GATHERED = 4
"""Numbers that a rank receives for each unknown of an interface in a solve by substructuring."""


def volume(unknowns: float, ranks: int, overlap: int) -> float:
    """Unknowns of the subdomain of one of ``ranks`` space ranks, with ``overlap`` layers of its neighbours'."""
    return (sqrt(unknowns / ranks) + 2 * overlap) ** 2


def solver_of(calibration: Calibration) -> str:
    """The kind of solver in space that a calibration was measured with, one of :data:`SOLVERS`.

    Raises
    ------
    InputError
        If the calibration names another one.
    """
    kind = calibration.space_solver or ("subdomains" if calibration.space_iterations else "replicated")
    if kind not in SOLVERS:
        raise InputError(f"calibration {calibration.problem}: space_solver {kind!r}: give one of {', '.join(SOLVERS)}")
    return kind


# -- substructuring ----------------------------------------------------------------------------------------------------
def interface_unknowns(unknowns: float, dimension: int, ranks: int) -> float:
    """Unknowns on the planes that cut a cube of ``unknowns`` in ``dimension`` dimensions into ``ranks`` cubes."""
    return dimension * unknowns ** ((dimension - 1) / dimension) * (ranks ** (1 / dimension) - 1)


def factor_share(unknowns: float, dimension: int, ranks: int) -> float:
    """Entries of the factor of one part's interior over those of the whole factor on one rank."""
    if dimension == 3:
        return ranks ** (-4 / 3)
    own = unknowns / ranks
    return (log(max(own, 2.0)) / log(max(unknowns, 2.0)) if dimension == 2 else 1.0) / ranks


def _interface(c: Calibration, ranks: int) -> float:
    """Unknowns on the interfaces: of the model, scaled to the measured number where there is one."""
    model = interface_unknowns(c.unknowns, c.dimension, ranks)
    measured, most = c.space.get("interface", 0.0), max(c.kernels)
    if not measured or most == 1:
        return model
    return model * measured / interface_unknowns(c.unknowns, c.dimension, most)


# -- multigrid ---------------------------------------------------------------------------------------------------------
def _levels(c: Calibration, ranks: int) -> list[tuple[float, float]]:
    """Own unknowns and the surface of a part, on each level."""
    count = int(c.space.get("levels", 0)) or max(1, round(log2(max(c.unknowns, 2)) / c.dimension) - 1)
    own = [c.unknowns * 2.0 ** (-c.dimension * level) / ranks for level in range(count)]
    power = (c.dimension - 1) / c.dimension
    return [(max(1.0, n), 2 * c.dimension * max(1.0, n) ** power) for n in own]


# -- all solvers -------------------------------------------------------------------------------------------------------
def work_of_rank(calibration: Calibration, ranks: int) -> float:
    """The measure ``C`` of a rank's work in a solve, up to a factor: of the entries that are read by a direct solver,
    of the unknowns with multigrid or in a subdomain.
    """
    c, kind = calibration, solver_of(calibration)
    if kind == "substructuring":
        entries = c.space.get("factor entries", 0.0) or _entries(c.unknowns, c.dimension)
        dense = _interface(c, ranks) if ranks > 1 else 0.0
        return 2 * entries * factor_share(c.unknowns, c.dimension, ranks) + dense**2 / ranks
    if kind == "multigrid":
        return sum(own + (surface if ranks > 1 else 0.0) for own, surface in _levels(c, ranks))
    return volume(c.unknowns, ranks, c.overlap) if kind == "subdomains" else 1.0


def _entries(unknowns: float, dimension: int) -> float:
    """Entries of a factor by nested dissection, with constants of about those of P1 elements."""
    if dimension == 3:
        return 6.0 * unknowns ** (4 / 3)
    return (8.0 * log2(max(unknowns, 2.0)) if dimension == 2 else 2.0) * unknowns


def exchange_seconds(calibration: Calibration, ranks: int, network: Network) -> tuple[float, float]:
    """Seconds of the exchanges in a step, per call ``a`` and per state ``b``; zero on one rank."""
    c, kind = calibration, solver_of(calibration)
    if ranks == 1:
        return 0.0, 0.0
    doublings = ceil(log2(ranks))
    if kind == "replicated":
        return 2 * (ranks - 1) * network.latency, 2 * c.state_bytes * (1 - 1 / ranks) / ranks / network.bandwidth
    if kind == "substructuring":
        nbytes = 8 * GATHERED * _interface(c, ranks)
        return 2 * c.stages * doublings * network.latency, c.stages * nbytes / network.bandwidth
    count = c.stages * c.space_iterations
    if kind == "multigrid":
        levels = _levels(c, ranks)
        latencies = EXCHANGES * len(levels) + 1 + (REDUCTIONS + 1) * doublings
        nbytes = 4 * EXCHANGES * sum(surface for _, surface in levels) + 8 * (levels[0][1] + REDUCTIONS)
        return count * latencies * network.latency, count * nbytes / network.bandwidth
    halo = 8 * sqrt(c.unknowns / ranks)
    return 0.0, count * (2 * doublings * network.latency + 2 * network.message(halo))


def space_kernels(calibration: Calibration, ranks: int, network: Network) -> dict[str, list[Kernel]]:
    """Kernels, by kind and level, on ``ranks`` space ranks."""
    c = calibration
    if ranks in c.kernels:
        return {kind: list(levels) for kind, levels in c.kernels[ranks].items()}
    measured = max(c.kernels)
    ratio = work_of_rank(c, ranks) / work_of_rank(c, measured)
    per_call, per_state = exchange_seconds(c, ranks, network)
    # with subdomains the measured exchange is part of the work, which is an upper bound
    measured_exchange = (0.0, 0.0) if solver_of(c) == "subdomains" else exchange_seconds(c, measured, c.network)

    def predicted(k: Kernel) -> Kernel:
        a, b = measured_exchange
        work = [max(0.0, t - a - b * n) for n, t in zip(k.sizes, k.seconds, strict=True)]
        seconds = [ratio * t + per_call + per_state * n for n, t in zip(k.sizes, work, strict=True)]
        if solver_of(c) != "replicated":
            return Kernel(k.sizes, tuple(seconds), k.lanes)
        # one state on each rank takes as long as one on all of them
        shared = {1: 1, ranks: 1} | {ceil(n * ranks / measured): n for n in k.sizes if n > measured}
        by_size = dict(zip(k.sizes, work, strict=True))
        alone = by_size.get(1, work[0] / k.sizes[0])
        times = {size: by_size.get(n, alone) + per_call + per_state * size for size, n in shared.items()}
        return Kernel(tuple(times), tuple(times.values()), k.lanes)

    return {kind: [predicted(k) for k in levels] for kind, levels in c.kernels[measured].items()}


def assumption(calibration: Calibration) -> str:
    """The assumption of :func:`space_kernels` for a calibration, as a sentence."""
    c, measured, kind = calibration, max(calibration.kernels), solver_of(calibration)
    beyond = "space ranks beyond those measured:"
    if kind == "replicated":
        return f"{beyond} every rank solves whole systems as on {measured}, for its share of the states of a call"
    if kind == "substructuring":
        return (
            f"{beyond} a rank has its part's share of the one-rank factor and of the dense inverse on all interfaces, "
            f"about {_interface(c, 2 * measured):.3g} unknowns on {2 * measured} ranks; two all-gathers of these per "
            "stage for all states of a call"
        )
    if kind == "multigrid":
        return (
            f"{beyond} {c.space_iterations:g} iterations with multigrid per stage as on {measured} ranks, each with "
            f"{EXCHANGES} exchanges on each of {len(_levels(c, 1))} levels and {REDUCTIONS} reductions for all states "
            "of a call; work as the own unknowns and their surface"
        )
    return (
        f"{beyond} subdomains of n/p unknowns and {c.overlap} layers of overlap, work as "
        f"their volume, {c.space_iterations:g} Krylov iterations per stage as on {measured} ranks, each with two "
        "reductions and one exchange"
    )

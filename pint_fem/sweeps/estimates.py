"""A-priori convergence estimates of the time solvers, as lines that are printed before the first solve."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pint_fem.evolution.evolution import Evolution
from pint_fem.mgrit.options import MGRITOptions
from pint_fem.paradiag.options import ParaDiagOptions
from pint_fem.theory.estimates import paradiag_contraction
from pint_fem.theory.two_level import ConvergenceEstimate

__all__ = ["estimate_lines"]


def estimate_lines(
    evolution: Evolution, options: MGRITOptions | ParaDiagOptions, estimates: Sequence[ConvergenceEstimate]
) -> Iterator[str]:
    """Lines on the convergence of a time solver: warnings, and with the options ``monitor`` or ``view`` all estimates.

    Collective over space.

    Parameters
    ----------
    evolution
        The problem.
    options
        Options of the time solver.
    estimates
        Estimate of each pair of MGRIT levels.
    """
    everything = options.monitor or options.view
    if isinstance(options, ParaDiagOptions):
        text, warns = _paradiag_estimate(evolution, options.alpha)
        if everything or warns:
            yield text
    for level, estimate in enumerate(estimates):
        where = f"levels {level} and {level + 1}"
        if everything:
            yield f"theory, {where}: {estimate}"
        elif not estimate.converges:
            yield f"warning, {where}: {estimate.warning}"


def _paradiag_estimate(evolution: Evolution, alpha: float) -> tuple[str, bool]:
    """A line on the contraction of ParaDiag, and whether it is a warning."""
    rate = paradiag_contraction(evolution, alpha)
    if rate is None:
        return "theory: none for this evolution; ParaDiag uses operators averaged in time and reports its factor", False
    text = f"an iteration of ParaDiag contracts by {rate:.3g} (alpha {alpha:g})"
    if rate < 0.5:
        return f"theory: {text}", False
    return f"warning: {text}, as modes grow over the {evolution.nsteps} steps; use 'mgrit' or 'serial'", True

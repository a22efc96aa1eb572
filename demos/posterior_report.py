"""Numbers and pictures of the posterior of an inversion by the map."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from demos.curves import plot_regularisation
from demos.inversion import mean_over_coefficients
from pint_fem.errors import InputError
from pint_fem.inverse.inference.regularisation_choice import METHODS

if TYPE_CHECKING:
    from demos.inversion import MapResult
    from pint_fem.inverse.posterior import GaussianPosterior

__all__ = ["posterior_summary", "regularisation_picture"]

BEYOND = 300.0
"""How far pictures go beyond the chosen weights of the prior."""


def posterior_summary(posterior: GaussianPosterior, result: MapResult, say, *, truth: np.ndarray | None = None) -> dict:
    """Sizes, deviations and evidence of a posterior in plain values, and the weights of the prior by all methods
    relative to the given one, ``None`` where a method does not apply (collective).

    Parameters
    ----------
    posterior, result
        The posterior of :func:`demos.inversion.posterior_of`, and its mean and standard deviation.
    say
        Prints a line on the first rank.
    truth
        Coefficients of what made the readings.
    """
    space, F = posterior.F.spacetime.space_comm, posterior.F
    alphas: dict[str, float | None] = {}
    for method in METHODS:
        try:
            alphas[method] = posterior.choose(method).alpha / posterior.alpha
        except InputError as error:
            alphas[method] = None
            say(f"weight of the prior by {method}: {error}")
    summary = {
        "controls": int(space.allreduce(F.shape[1])),
        "readings": F.shape[0],
        "modes": len(posterior.spectrum.lam),
        "space": type(posterior.spectrum).__name__,
        "degrees_of_freedom": float(posterior.degrees_of_freedom()),
        "squared_residual": float(posterior.misfit()),
        "mean_standard_deviation": mean_over_coefficients(result.standard_deviation, space),
        "log_evidence": float(posterior.log_evidence()),
        "alpha": alphas,
    }
    say(
        f"standard deviation {summary['mean_standard_deviation']:.3g} on average; the readings determine "
        f"{summary['degrees_of_freedom']:.0f} combinations of the controls; log evidence {summary['log_evidence']:.1f}"
    )
    if truth is not None:
        inside = (np.abs(truth - result.x) <= 2 * result.standard_deviation).astype(float)
        share = summary["true_within_two_deviations"] = mean_over_coefficients(inside, space)
        say(f"the truth is within two standard deviations at {100 * share:.0f}% of the nodes")
    found = ", ".join(f"{name} {alpha:.3g}" for name, alpha in alphas.items() if alpha is not None)
    say(f"weight of the prior relative to the given one: {found or 'no method applies'}")
    return summary


def regularisation_picture(path, posterior: GaussianPosterior, summary: dict) -> None:
    """Of the L-curve and the criteria, with the given weight of the prior and those of all methods."""
    choices = {"given": 1.0} | {name: alpha for name, alpha in summary["alpha"].items() if alpha is not None}
    weights = np.geomspace(min(choices.values()) / BEYOND, max(choices.values()) * BEYOND, 400)
    curve = replace(posterior.curve(weights * posterior.alpha), alpha=weights)
    plot_regularisation(path, curve, choices, readings=len(posterior.data))

"""Pictures of curves: readings over time, convergence over iterations, criteria over the weight of the prior."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from demos.pictures import plt, save

if TYPE_CHECKING:
    from pint_fem.inverse.inference.regularisation_choice import RegularisationCurve
    from pint_fem.optimize.records import IterationRecord

__all__ = ["plot_convergence", "plot_regularisation", "plot_sensors"]


def plot_sensors(
    path: Path,
    times: np.ndarray,
    measured: np.ndarray,
    predicted: np.ndarray,
    *,
    names: Sequence[str],
    show: int = 6,
    chosen: Sequence[int] | None = None,
    title: str = "",
    quantity: str = "temperature rise",
    deviation: np.ndarray | None = None,
    noise: float = 0.0,
) -> None:
    """Draw readings and predictions ``(times, sensors)`` of ``show`` sensors, or of those with the numbers ``chosen``,
    and a histogram of all differences.

    With standard deviations ``deviation`` of the predictions their bands are drawn, and the differences of the sensor
    with the widest band: two standard deviations of the predictions alone, and with the noise of the readings.
    """
    if chosen is None:
        chosen = np.unique(np.linspace(0, measured.shape[1] - 1, min(show, measured.shape[1])).astype(int))
    count = 2 if deviation is None else 3
    fig, (left, *between, right) = plt.subplots(1, count, figsize=(5.5 * count, 4), layout="constrained")
    for colour, s in enumerate(chosen):
        left.plot(times, measured[:, s], ".", ms=4, color=f"C{colour}")
        left.plot(times, predicted[:, s], "-", lw=1, color=f"C{colour}", label=f"sensor {names[s]}")
        if deviation is not None:
            low, high = (predicted[:, s] + sign * 2 * deviation[:, s] for sign in (-1, 1))
            left.fill_between(times, low, high, color=f"C{colour}", alpha=0.35, lw=0)
    bands = "" if deviation is None else ", ± 2 standard deviations"
    left.set(xlabel="t", ylabel=quantity, title=f"readings (dots) and fit (lines{bands})")
    left.legend(fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.16))  # covers no reading
    for ax in between:
        s = int(np.argmax(deviation.mean(axis=0)))
        ax.plot(times, measured[:, s] - predicted[:, s], ".", ms=4, color="k")
        for width, shade, what in (
            (np.hypot(deviation[:, s], noise), 0.15, "fit and noise"),
            (deviation[:, s], 0.45, "fit"),
        ):
            ax.fill_between(
                times, -2 * width, 2 * width, color="C0", alpha=shade, lw=0, label=f"± 2 standard deviations, {what}"
            )
        ax.axhline(0, color="C0", lw=1)
        ax.set(xlabel="t", ylabel=quantity, title=f"reading - fit of sensor {names[s]}, which has the widest band")
        ax.margins(y=0.25)
        ax.legend(fontsize=8, loc="upper right")
    right.hist((predicted - measured).ravel(), bins=40, color="0.6")
    right.set(xlabel="fit - reading", ylabel="readings", title="residuals of all sensors")
    right.xaxis.set(major_locator=MaxNLocator(6))
    fig.suptitle(title)
    save(fig, path, 110)


def plot_convergence(
    path: Path, history: Sequence[IterationRecord], residuals: dict[str, Sequence[float]], *, bound: float | None = None
) -> None:
    """Draw J and its gradient over the iterations of a history of records, and the residuals of one sweep of each kind
    over its cycles, beside the two-level bound on their contraction; nothing of sweeps where no cycles were taken.
    """
    count = 3 if residuals else 2
    fig, (left, middle, *last) = plt.subplots(1, count, figsize=(4.7 * count, 4), layout="constrained")
    iterations = [r.iteration for r in history]
    left.semilogy(iterations, [r.value for r in history], "o-")
    left.set(xlabel="trust-region iteration", title="objective J")
    middle.semilogy(iterations, [max(r.gradient_norm, 1e-300) for r in history], "s-", color="C1")
    middle.set(xlabel="trust-region iteration", title="norm of the gradient")
    for right in last:
        for name, values in residuals.items():
            relative = [v / values[0] for v in values if v > 0]
            right.semilogy(range(len(relative)), relative, ".-", label=f"first {name} sweep")
        if bound:
            cycles = np.arange(max(map(len, residuals.values())))
            right.semilogy(cycles, bound**cycles, "k--", lw=1, label=f"two-level bound {bound:.3g} a cycle")
        right.legend(fontsize=8)
        right.set(xlabel="MGRIT cycle", title="C-point residual, relative to the first")
    for ax in (left, middle, *last):
        ax.xaxis.get_major_locator().set_params(integer=True)
    save(fig, path, 110)


def _label(axis) -> None:
    """Give the ticks of a drawn logarithmic axis as many labels as fit, and at least two."""
    decades = np.ptp(np.log10(axis.get_view_interval()))
    if decades < 0.7:  # there may be none of the others
        locator = MaxNLocator(5)
    elif decades < 3:
        locator = LogLocator(subs=(1, 2, 5) if decades < 1.7 else (1, 3))
    else:
        return
    axis.set(major_locator=locator, minor_formatter=NullFormatter(), major_formatter="{x:g}")


def plot_regularisation(path: Path, curve: RegularisationCurve, choices: dict[str, float], *, readings: int) -> None:
    """Draw the L-curve of a posterior, and its misfit, generalised cross-validation and evidence over the weight of the
    prior, with the weights that were chosen, by the names of the methods.
    """
    fig, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    left.loglog(curve.misfit, curve.size, "C0-", lw=1)
    left.set(xlabel="squared residual", ylabel="squared size in the prior's norm", title="L-curve")
    _label(left.xaxis)
    right.loglog(curve.alpha, curve.misfit / readings, "C0-", label="squared residual / readings")
    right.loglog(curve.alpha, curve.gcv, "C1--", label="generalised cross-validation")
    right.axhline(1, color="C0", lw=0.5)
    density = right.twinx()
    density.semilogx(curve.alpha, curve.log_evidence, "C2-")
    density.set_ylabel("log evidence", color="C2")
    right.set(xlabel="weight of the prior", title="criteria and chosen weights (dashed)")
    for n, (name, alpha) in enumerate(choices.items()):
        place = [np.exp(np.interp(np.log(alpha), np.log(curve.alpha), np.log(y))) for y in (curve.misfit, curve.size)]
        left.plot(*place, "os^DvP"[n % 6], color=f"C{n + 3}", ms=8, mec="w", mew=0.5, label=f"{name}: {alpha:.3g}")
        right.axvline(alpha, color=f"C{n + 3}", lw=1, ls="--")
    left.legend(fontsize=8, title="weights")
    right.legend(fontsize=8, loc="center left", frameon=True, framealpha=1, edgecolor="none")
    save(fig, path, 110)

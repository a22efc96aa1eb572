"""The L-curve of the plate, and what five criteria choose on it."""

import numpy as np
import plate_posterior
from matplotlib.ticker import LogLocator, NullFormatter
from style import Theme, plt, save

NAMES = {
    "discrepancy": "discrepancy principle",
    "l-curve": "corner of the L-curve",
    "gcv": "cross-validation",
    "evidence": "evidence",
    "upre": "predictive risk",
}


def draw(path, dark):
    """Size against misfit, and the criteria over the weight of the prior."""
    look = Theme(dark)
    problem, posterior = plate_posterior.solved()
    n, chosen = problem.readings.values.size, {method: posterior.choose(method).alpha for method in NAMES}
    given = posterior.alpha
    curve = posterior.curve(np.geomspace(min(chosen.values()) / 3e3, max(chosen.values()) * 30, 200))
    with look.used():
        fig, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.7), layout="constrained")
        left.loglog(curve.misfit / n, curve.size, color=look.text, lw=1.2)
        left.set(xlabel="mean squared residual / variance of the noise", ylabel="squared size in the prior's norm")
        left.set_title("L-curve")
        right.loglog(
            curve.alpha, curve.misfit / n, color=look.text, label="mean squared residual / variance of the noise"
        )
        right.loglog(curve.alpha / given, curve.gcv, "--", color=look.text, label="generalised cross-validation")
        right.set(
            xlabel="weight of the prior, relative to the given one", title="Criteria, and the weights that they choose"
        )
        colours = (look.blue, look.orange, look.green, look.purple, look.yellow)
        for (method, alpha), marker, colour in zip(chosen.items(), "os^Dv", colours, strict=True):
            at = lambda values, alpha=alpha: np.exp(np.interp(np.log(alpha), np.log(curve.alpha), np.log(values)))
            style = dict(color=colour, marker=marker, ms=8, mec=look.page, mew=0.6, ls="none")
            left.plot(at(curve.misfit) / n, at(curve.size), label=f"{NAMES[method]}: {alpha / given:.2g}", **style)
            right.plot(alpha / given, at(curve.misfit) / n, **style)
        left.legend(title="relative weight by", fontsize=9)
        right.legend(fontsize=9, loc="upper left")
        for ax in (left, right):
            ax.grid(which="major", lw=0.5)
        for axis in (left.xaxis, right.yaxis):
            axis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}", minor_formatter=NullFormatter())
        save(fig, path)

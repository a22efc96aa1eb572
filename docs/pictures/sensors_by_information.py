"""The sensors of the plate in the order of the information that they add."""

import numpy as np
import plate_posterior
from matplotlib.colors import ListedColormap
from style import POSITIVE, Theme, plt, save


def draw(path, dark):
    """The sensors with their ranks in the greedy choice, and the information and trace over their number."""
    look = Theme(dark)
    problem, posterior = plate_posterior.solved()
    F, n, points = posterior.F, posterior.F.weights.size, 10 * problem.readings.points
    noise = 1 / np.sqrt(n * F.weights)
    by_information = F.choose_sensors(len(points), "D", noise=noise)
    information = by_information.values / 2 / np.log(2)
    deviation = plate_posterior.image(np.sqrt(posterior.variance()))
    with look.used():
        fig, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.5), layout="constrained", width_ratios=(1.35, 1))
        raster = plate_posterior.raster()
        extent = 10 * np.array(raster.extent)
        outline = np.where(np.isfinite(deviation), 1.0, np.nan)
        left.imshow(
            outline, origin="lower", extent=extent, cmap=ListedColormap([look.grid]), alpha=0.55, rasterized=True
        )
        gains = np.diff(information)
        shown = left.scatter(
            *points[by_information.order].T,
            s=40 + 16 * gains,
            c=gains,
            cmap=POSITIVE,
            edgecolors=look.text,
            linewidths=0.6,
        )
        fig.colorbar(shown, ax=left, label="information that it adds, bit", shrink=0.9)
        for place, (s, gain) in enumerate(zip(by_information.order, gains, strict=True)):
            off = 2.5 + 0.4 * np.sqrt(40 + 16 * gain)
            left.annotate(str(place + 1), points[s], (off, off - 2), textcoords="offset points", fontsize=8)
        left.set(title="Order of choice", xlabel="x in cm", ylabel="y in cm")
        right.plot(range(len(points) + 1), information, "o-", ms=4)
        right.set(
            xlabel="sensors", ylabel="expected gain of information, bit", title="All of the first sensors together"
        )
        right.set(xlim=(0, len(points)), ylim=(0, None))
        right.grid(lw=0.5)
        save(fig, path)

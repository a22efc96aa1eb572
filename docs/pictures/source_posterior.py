"""The source that the readings of the plate determine, and its standard deviation."""

import numpy as np
import plate_posterior
from style import POSITIVE, SIGNED, Theme, plt, save

from demos.heat_source_report import UNIT


def draw(path, dark):
    """The mean with contours of the true source, and the standard deviation with the sensors."""
    look = Theme(dark)
    problem, posterior = plate_posterior.solved()
    raster = plate_posterior.raster()
    mean, deviation = (plate_posterior.image(values) for values in (posterior.x, np.sqrt(posterior.variance())))
    truth, extent = raster(problem.true_source), 10 * np.array(raster.extent)
    with look.used():
        fig, axes = plt.subplots(1, 2, figsize=(9.6, 3.1), layout="constrained", sharey=True)
        given = dict(origin="lower", extent=extent, rasterized=True)
        limit = np.nanmax(np.abs(mean))
        shown = axes[0].imshow(mean, cmap=SIGNED, vmin=-limit, vmax=limit, **given)
        fig.colorbar(shown, ax=axes[0], label=UNIT)
        axes[0].contour(truth, [-7, 8], extent=extent, colors="black", linewidths=0.9)
        axes[0].set(title="Posterior mean (contours: true source)", ylabel="y in cm")
        low, high = np.nanmin(deviation), np.nanquantile(deviation, 0.99)
        shown = axes[1].imshow(deviation, cmap=POSITIVE, vmin=low, vmax=high, **given)
        fig.colorbar(shown, ax=axes[1], label=UNIT, extend="max")
        axes[1].set_title("Standard deviation")
        for ax, colour in zip(axes, ("black", "white"), strict=True):
            ax.plot(*10 * problem.readings.points.T, "o", color=colour, ms=3)
            ax.set_xlabel("x in cm")
        fig.suptitle("dots: sensors", fontsize=9, x=0.99, ha="right")
        save(fig, path)

"""Draw the moving picture of the README: a source is recovered, and its band sharpens, as readings come in.

    python docs/pictures/moving_source.py [--out FILE]        (default: docs/images/recovering.gif)

The readings are those of ``demos/heat_source_live.py``. The picture has a light background of its own, so that it can
be read on dark pages, too.
"""

import argparse
import io
from pathlib import Path

import numpy as np
import plate_posterior
from firedrake import FunctionSpace, VertexOnlyMesh, assemble, interpolate
from matplotlib.ticker import FixedLocator, NullLocator
from PIL import Image
from style import SIGNED, Theme, plt

from demos.heat_source_report import UNIT

OUT = Path(__file__).resolve().parents[1] / "images" / "recovering.gif"
ENDS = np.array([[0.06, 0.224], [1.94, 0.593]])
"""Of the line through the middle of the heater and of the ridge."""
SHOWN = (4, 9, 13, 16, 22)
"""Numbers of the sensors whose readings are drawn."""
COUNTS = [*range(0, 13), 14, 16, 20, 24, 28, 32, 40, 48, 56, 64]
"""Numbers of times whose readings a frame has."""
WIDTH, COLOURS = 300, 180
CM, SECONDS = 10, 240
"""Units of the plate: lengths of 10 cm, times of 4 min."""


class Section:
    """Values of controls along the line."""

    def __init__(self, V, count=240):
        self.points = ENDS[0] + np.linspace(0, 1, count)[:, None] * (ENDS[1] - ENDS[0])
        mesh = VertexOnlyMesh(V.mesh(), self.points, missing_points_behaviour="ignore", reorder=False)
        self._space = FunctionSpace(mesh, "DG", 0)
        here = mesh.coordinates.dat.data_ro
        self._index = np.rint((here[:, 0] - ENDS[0, 0]) / np.ptp(self.points[:, 0]) * (count - 1)).astype(int)

    def __call__(self, f):
        """At all points, NaN outside the plate."""
        values = np.full(len(self.points), np.nan)
        values[self._index] = assemble(interpolate(f, self._space)).dat.data_ro
        return values


def frames():
    """What each frame shows: time, image of the mean, mean and standard deviation along the line."""
    problem, posterior = plate_posterior.solved()
    section, raster, function = Section(problem.evolution.V), plate_posterior.raster(WIDTH), problem.rf.function
    stream, found = posterior.stream(), []
    for n in range(len(stream.times) + 1):
        law = stream.update() if n else stream.posterior
        if n in COUNTS:
            deviation = section(function(np.sqrt(law.variance())))
            found.append((law.time or 0.0, raster(function(law.x)), section(function(law.x)), deviation))
    return problem, section, raster, found


def figure(problem, section, raster):
    """The axes with all that does not move: truth, sensors, the line."""
    look, truth, read = Theme(), raster(problem.true_source), problem.readings
    extent = CM * np.array(raster.extent)
    plt.rcParams["axes.titlesize"] = 10
    fig = plt.figure(figsize=(8.8, 4.3), facecolor="white")
    grid = fig.add_gridspec(2, 2, height_ratios=(2.3, 1), width_ratios=(1.12, 1), left=0.075, right=0.975, top=0.925)
    grid.update(bottom=0.115, hspace=0.5, wspace=0.17)
    plate, along, data = fig.add_subplot(grid[0, 0]), fig.add_subplot(grid[0, 1]), fig.add_subplot(grid[1, :])
    plate.contour(truth, [-7, 8], extent=extent, colors=look.text, linewidths=0.9)
    plate.plot(*CM * ENDS.T, color=look.green, lw=1.4, ls=(0, (4, 2)))
    plate.plot(*CM * read.points.T, ".", color=look.text, ms=3.5)
    plate.set(title="Recovered source (contours: the true one)", xlabel="x in cm", ylabel="y in cm")
    plate.set_facecolor("0.88")
    distance = CM * np.linspace(0, np.hypot(*(ENDS[1] - ENDS[0])), len(section.points))
    along.plot(distance, section(problem.true_source), "--", color=look.text, lw=1.2, label="true")
    along.set(title="Along the dashed line, ± 2 standard deviations", xlabel="distance in cm", ylabel=UNIT)
    along.set(xlim=(0, distance[-1]), ylim=(-24, 38))
    data.set(xlim=(0.8 * SECONDS * read.times[0], 1.05 * SECONDS * read.times[-1]), xlabel="time in s", xscale="log")
    data.xaxis.set(major_locator=FixedLocator([4, 8, 15, 30, 60, 120, 240]), major_formatter="{x:g}")
    data.xaxis.set_minor_locator(NullLocator())
    low, high = read.values[:, SHOWN].min(), read.values[:, SHOWN].max()
    data.set(ylim=(low - 0.1 * (high - low), high + 0.1 * (high - low)), ylabel="rise in K")
    return fig, plate, along, data, distance, look


def draw_frames():
    """The frames as images, and how long each stays in milliseconds."""
    with Theme().used():
        problem, section, raster, every = frames()
        fig, plate, along, data, distance, look = figure(problem, section, raster)
        limit = 1.1 * np.nanmax(np.abs(every[-1][1]))
        given = dict(
            origin="lower", extent=CM * np.array(raster.extent), cmap=SIGNED, vmin=-limit, vmax=limit, zorder=0
        )
        shown = plate.imshow(every[0][1], **given)
        images, read = [], problem.readings
        for time, image, mean, deviation in every:
            shown.set_data(image)
            band = along.fill_between(distance, mean - 2 * deviation, mean + 2 * deviation, color=look.blue, alpha=0.25)
            band.set(lw=0)
            moving = [band, *along.plot(distance, mean, color=look.blue, lw=1.6, label="recovered")]
            legend = along.legend(loc="upper center", ncols=2, fontsize=9)
            past = read.times <= time * (1 + 1e-12)
            for s, colour in zip(SHOWN, (look.blue, look.orange, look.green, look.purple, look.yellow), strict=True):
                moving += data.plot(SECONDS * read.times[past], read.values[past, s], ".", ms=4.5, color=colour)
            moving.append(data.axvline(SECONDS * max(time, 1e-9), color=look.text, lw=0.8))
            data.set_title(f"Readings of 5 of the {len(read.points)} sensors up to {SECONDS * time:.0f} s")
            with io.BytesIO() as buffer:
                fig.savefig(buffer, dpi=100, format="png", facecolor="white")
                images.append(Image.open(buffer).convert("RGB"))
            for artist in [*moving, legend]:
                artist.remove()
        plt.close(fig)
    return images, [900, *[320] * (len(images) - 2), 3000]


def write(path):
    """Write the animated GIF, with one palette for all frames."""
    images, durations = draw_frames()
    wide, high = images[0].size
    every = Image.new("RGB", (wide, 3 * high))
    for n, image in enumerate((images[0], images[4], images[-1])):
        every.paste(image, (0, n * high))
    palette = every.quantize(COLOURS, method=Image.Quantize.MEDIANCUT)
    small = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]
    path.parent.mkdir(parents=True, exist_ok=True)
    small[0].save(path, save_all=True, append_images=small[1:], duration=durations, loop=0, optimize=False)


def main():
    """Read the arguments and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT, metavar="FILE.gif", help="picture")
    out = parser.parse_args().out
    write(out)
    print(f"{out}: {out.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()

"""Draw a V-cycle and an F-cycle of MGRIT in space-time: levels, C-points and steps are those that the solver takes.

    python demos/draw_cycle.py [--out FILE] [--dark]   (default: docs/theory/cycle.svg)

The same bytes each time with the same matplotlib. Any format of matplotlib's will do, by FILE's ending.
"""

import sys
from itertools import groupby
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.path import Path as Curve

from demos.style import Theme
from pint_fem.cli import ProgramParser, last_lines, run, waiting
from pint_fem.files import as_input_error
from pint_fem.mgrit import MGRIT, split_steps
from pint_fem.mgrit.cycle import Cycle

OUT = Path(__file__).resolve().parent.parent / "docs" / "theory" / "cycle.svg"
NSTEPS, COARSENING, RANKS = 16, (2, 2), 2
WIDTH, LEFT, STEP, ROW = 900, 274, 38, 62  # pixels: of the picture, of point 0, between points, between rows
LEVEL_X, LEVEL_STEP = 208, 19
RADIUS, TEXT, BELOW = 5, 12, 14
SHADES = {False: ("#eef3f9", "#fbf4e9"), True: ("#1b2633", "#2b2419")}
"""Of the slabs, on a light and on a dark page."""
STYLE = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "pint_fem",
    "font.family": "sans-serif",
    "font.sans-serif": "DejaVu Sans",
    "font.size": TEXT,
}
POINT = dict(linestyle="none", markersize=2 * RADIUS, markeredgewidth=1.4, clip_on=False)


def colours_of(look):
    """Colours of the arrows by what they stand for, on a light or a dark page."""
    return {"F": look.blue, "C": look.orange, "restrict": look.green, "take": look.purple, "coarsest": look.text}


# -- what the solver does ----------------------------------------------------------------------------------------------
class Recorded:
    """A step that halves the state and keeps the numbers of the steps it was asked for."""

    def __init__(self):
        self.steps = []

    def step(self, steps, u, out):
        """See :class:`pint_fem.all_at_once.propagator.Propagator`."""
        self.steps += steps
        out[...] = 0.5 * u


class Stages(Cycle):
    """A cycle that keeps what it does: a list of ``(what, level, steps taken)``."""

    def __init__(self, *args):
        super().__init__(*args)
        self.stages = []

    def _did(self, what, index):
        self.stages.append((what, index, self.levels[index].propagator.steps))
        self.levels[index].propagator.steps = []

    def relax_and_restrict(self, index, **known):
        """Record the relaxation and the residual."""
        super().relax_and_restrict(index, **known)
        self._did("relax", index)

    def correct(self, index, kind="V"):
        """Record that the C-points take the coarse solution."""
        super().correct(index, kind)
        self._did("take", index)

    def solve(self, index, kind="V"):
        """Record sequential steps of the coarsest level, without those of its right-hand side."""
        self.levels[index].propagator.steps = []
        super().solve(index, kind)
        if index == len(self.levels) - 1:
            self._did("coarsest", index)


def one_cycle(kind):
    """Levels and stages of a cycle from an arbitrary first guess."""
    propagators = [Recorded() for _ in range(len(COARSENING) + 1)]
    solver = MGRIT(propagators, NSTEPS, options={"coarsening": COARSENING, "relax": "FCF", "cycle": kind})
    cycle = Stages(solver.levels, solver.options, (1,), solver.transfers)
    solver.levels[0].U = np.ones((NSTEPS + 1, 1))
    cycle.relax_and_restrict(0)
    cycle.correct(0, kind)
    return solver.levels, cycle.stages


def leads_to(level, n):
    """Whether step ``n`` leads to a C- or to an F-point."""
    return "C" if n + 1 in level.c_points else "F"


def in_turn(level, steps):
    """What steps are of, in turn: ``["F", "C", "F"]``."""
    return [kind for kind, _ in groupby(leads_to(level, n) for n in steps)]


# -- shapes, in pixels from the upper left -----------------------------------------------------------------------------
class Arrows:
    """All arrows of one colour in one path, which keeps the file small."""

    def __init__(self):
        self.lines, self.heads = [], []

    def add(self, start, bend, end):
        """From a point to a point, by way of ``bend``."""
        start, bend, end = map(np.array, (start, bend, end))
        along = (end - bend) / np.hypot(*(end - bend))
        across, back = np.array([-along[1], along[0]]), end - 6.5 * along
        self.lines.append(Curve([start, bend, back], [Curve.MOVETO, Curve.CURVE3, Curve.CURVE3]))
        self.heads.append(Curve([end, back + 2.6 * across, back - 2.6 * across, end], closed=True))

    def draw(self, ax, colour):
        """Draw them."""
        lines, heads = (Curve.make_compound_path(*paths) for paths in (self.lines, self.heads))
        ax.add_patch(PathPatch(lines, facecolor="none", edgecolor=colour, linewidth=1.5, zorder=2, clip_on=False))
        ax.add_patch(PathPatch(heads, facecolor=colour, linewidth=0, zorder=3, clip_on=False))


def arc(arrows, x, y, height):
    """An arrow from a point to another on the line ``y``; upwards where ``height`` is negative."""
    side = np.sign(height) * RADIUS * 0.75
    arrows.add((x[0] + 4, y + side), ((x[0] + x[1]) / 2, y + 2 * height - side), (x[1] - 4, y + side))


def place(level, n):
    """Where point ``n`` of a level is."""
    return LEFT + STEP * level.points[n]


def rows_of(stages):
    """Stages in a row of the picture: those that follow each other on one level."""
    return [list(row) for _, row in groupby(stages, key=lambda stage: stage[1])]


def describe(level, row):
    """A row's stages in words."""
    words = []
    for what, index, steps in row:
        if what == "coarsest":
            words.append("step after step")
        elif what == "take":
            words.append(f"C-points from level {index + 1}, {' '.join(in_turn(level, steps))}")
        else:
            words.append(f"relax {' '.join(in_turn(level, steps)[:-1])}, residual")
    return words


# -- the picture -------------------------------------------------------------------------------------------------------
def draw_points(ax, level, y, look):
    """The line of a level with its points: C-points filled, F-points open, those of the coarsest level square."""
    ax.plot(
        [place(level, 0), place(level, level.nsteps)], [y, y], color="#8c959f", linewidth=1, zorder=1, clip_on=False
    )
    x = np.array([place(level, n) for n in range(level.nsteps + 1)])
    if level.c_points is None:
        ax.plot(x, np.full(len(x), y), marker="s", markerfacecolor="#8c8c8c", zorder=4, mec=look.text, **POINT)
        return
    is_c = np.isin(np.arange(len(x)), level.c_points)
    for which, colour in ((is_c, look.text), (~is_c, look.page)):
        ax.plot(x[which], np.full(which.sum(), y), marker="o", markerfacecolor=colour, zorder=4, mec=look.text, **POINT)


def draw_row(level, row, y, arrows):
    """Steps of one row, each once: F-relaxation above the line, C-relaxation and the residual below."""
    for n in sorted({n for _, _, steps in row for n in steps}):
        kind = "coarsest" if level.c_points is None else leads_to(level, n)
        arc(arrows.setdefault(kind, Arrows()), (place(level, n), place(level, n + 1)), y, 9 if kind == "C" else -9)


def draw_cycle(ax, kind, top, look):
    """One cycle from the line ``top`` on; returns the line below it."""
    levels, stages = one_cycle(kind)
    rows = rows_of(stages)
    ax.text(14, top, f"One {kind}-cycle", va="center", fontsize=15, fontweight="bold")
    ax.text(LEVEL_X - 13, top, "level", va="center", ha="right")
    for i in range(len(levels)):
        ax.text(LEVEL_X + LEVEL_STEP * i, top, str(i), va="center", ha="center")
    bounds = split_steps(NSTEPS, RANKS)
    bottom = top + ROW * len(rows) + BELOW
    for rank in range(RANKS):
        own = range(bounds[rank] + (rank > 0), bounds[rank + 1] + 1)
        left, right = LEFT + STEP * (own[0] - 0.5), LEFT + STEP * (own[-1] + 0.5)
        slab = Rectangle(
            (left, top - 12), right - left, bottom - top + 12, color=SHADES[look.dark][rank], lw=0, zorder=0
        )
        ax.add_patch(slab)
        what = f"rank {rank}: " + ("initial value, " if rank == 0 else "") + f"points {max(own[0], 1)} to {own[-1]}"
        ax.text((left + right) / 2, top, what, va="center", ha="center")
    lines = [top + ROW * (0.72 + i) for i in range(len(rows))]
    xs = [LEVEL_X + LEVEL_STEP * row[0][1] for row in rows]
    ax.plot(xs, lines, color="#8c959f", linewidth=1, marker="o", markersize=5, clip_on=False)
    for n in range(0, NSTEPS + 1, 2):
        ax.text(place(levels[0], n), lines[-1] + 20, str(n), va="center", ha="center", fontsize=10)
    arrows = {}
    for here, (row, y) in enumerate(zip(rows, lines, strict=True)):
        level = levels[row[0][1]]
        draw_points(ax, level, y, look)
        draw_row(level, row, y, arrows)
        words = describe(level, row)
        for i, word in enumerate(words):
            ax.text(14, y + 16 * (i - (len(words) - 1) / 2), word, va="center")
        if here + 1 < len(rows):
            after = levels[rows[here + 1][0][1]]
            what, coarse = ("restrict", after) if after.index > level.index else ("take", level)
            down = arrows.setdefault(what, Arrows())
            for j in range(what == "take", coarse.nsteps + 1):  # the initial value stays as it is
                x = place(coarse, j)
                down.add((x, y + 8), (x, y + 20), (x, lines[here + 1] - 8))
    for name, colour in colours_of(look).items():
        arrows[name].draw(ax, colour)
    return bottom


def draw_legend(ax, top, look):
    """What is what, in three columns."""
    points = [
        ("o", look.text, "C-point: a point of the next level too"),
        ("o", look.page, "F-point"),
        ("s", "#8c8c8c", "point of the coarsest level"),
    ]
    for i, (marker, colour, what) in enumerate(points):
        ax.plot([24], [top + 20 * i], marker=marker, markerfacecolor=colour, mec=look.text, **POINT)
        ax.text(38, top + 20 * i, what, va="center")
    lines = {
        "F": "F-relaxation: C-point to F-points",
        "C": "C-relaxation; residual at C-points",
        "coarsest": "sequential steps",
        "restrict": "restriction: values and residual",
        "take": "interpolation: C-points' values",
    }
    for i, (name, what) in enumerate(lines.items()):
        x, y = (330, 620)[i // 3], top + 20 * (i % 3)
        arrow = Arrows()
        arrow.add((x, y), (x + 13, y), (x + 28, y))
        arrow.draw(ax, colours_of(look)[name])
        ax.text(x + 38, y, what, va="center")


def draw(look):
    """The figure in the colours of a page."""
    rows = [len(rows_of(one_cycle(kind)[1])) for kind in "VF"]
    height = 24 + sum(ROW * n + BELOW for n in rows) + 36 + 84
    figure = Figure(figsize=(WIDTH / 72, height / 72), dpi=72, facecolor=look.page)
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set_xlim(0, WIDTH)
    ax.set_ylim(height, 0)
    ax.axis("off")
    below = draw_cycle(ax, "V", 24, look)
    below = draw_cycle(ax, "F", below + 36, look)
    draw_legend(ax, below + 24, look)
    return figure


def write(path, *, dark=False):
    """Draw and save, for a light or a dark page."""
    look = Theme(dark)
    with mpl.rc_context(STYLE | {"text.color": look.text}):
        metadata = {"Date": None, "Creator": None} if path.suffix.lower() == ".svg" else None
        draw(look).savefig(path, dpi=72, metadata=metadata)


def main():
    """Read the arguments and write the file."""
    parser = ProgramParser(prog="draw_cycle.py", description=__doc__, petsc=False)
    parser.add_argument("--out", type=Path, default=OUT, metavar="FILE", help="picture")
    parser.add_argument("--dark", action="store_true", help="for a dark page")
    opts = parser.read()
    with waiting("drawing"), as_input_error(f"--out {opts.out}", errors=(OSError, ValueError)):
        write(opts.out, dark=opts.dark)
    last_lines(opts.out, next_step="see the picture on the site's page on MGRIT, docs/theory/mgrit.md")


if __name__ == "__main__":
    run(main)

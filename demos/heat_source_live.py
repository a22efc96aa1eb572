"""Recover a heat source while its readings come in: the posterior after each reading time, as an animation.

    python demos/heat_source_live.py                       (writes the animation)
    python demos/heat_source_live.py --live                (and draws in a window where there is a display)

The readings are those of a file, played in the order of their times. All that does not depend on their values is
computed before the first one, and an update is a product with a few rows of a matrix.

Writes to --out: live.gif (source, standard deviation and the readings so far, with the prediction of those to come),
sharpening.png (some of its frames, and the error over time) and summary.json (milliseconds of each update).
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


from demos.inversion import add_plate
from demos.planned_grid import GRID_HELP, measured_grid
from pint_fem.cli import ProgramParser, run, say, waiting

NEXT_STEP = "open live.gif; with --live readings are also drawn in a window"
SHOWN = 4
"""Number of sensors whose readings are drawn."""


def arguments():
    """Options of the program."""
    parser = ProgramParser(prog="heat_source_live.py", description=__doc__, next_step=NEXT_STEP)
    add = parser.add_argument
    add("--grid", metavar="SxT", help=f"ranks in space x ranks in time; {GRID_HELP} all in time")
    add_plate(add)
    add("--live", action="store_true", help="draw in a window, too, where there are a display and a terminal")
    add("--out", type=Path, default=Path("results/heat_source_live"), help="folder (results/heat_source_live)")
    return parser.read()


def main():
    """Play the readings."""
    opts = arguments()
    from demos.outputs import Outputs, load_firedrake, output_folder
    from pint_fem.spacetime import SpaceTime

    output_folder(opts.out)
    load_firedrake()
    import numpy as np
    from mpi4py import MPI

    from demos.inversion import posterior_of, summary_of
    from demos.live_report import play, report
    from pint_fem.misfits import PointSensors
    from problems import heat_source as posed
    from problems.heat_readings import READINGS
    from problems.plate import MESH

    settings = {"mesh": str(opts.mesh or MESH), "readings": str(opts.sensors or READINGS), "steps": opts.steps}
    serial = {"time_solver": "serial"}
    measure = lambda st: posed.heat_source(st, **settings, solver_parameters=serial)
    grid, about = measured_grid(opts.grid, measure, solver=serial, by_map=True)
    spacetime = SpaceTime(grid)

    if about:
        say(about)
    say(f"heat source, readings as they come in, on {spacetime.space_size} x {spacetime.time_size} ranks")
    start, times = time.perf_counter(), {}

    def clock(name):
        nonlocal start
        now = time.perf_counter()
        times[name], start = now - start, now

    with waiting("set-up: forms, kernels, factors"):
        problem = posed.heat_source(spacetime, **settings, solver_parameters=serial)
    clock("set-up")
    read = problem.readings
    shown = np.unique(np.linspace(0, len(read.points) - 1, min(SHOWN, len(read.points))).astype(int))
    F = problem.rf.parameter_to_observable(predict=PointSensors(read.points[shown], read.times, read.values[:, shown]))
    clock("map")
    with waiting("posterior, and the factors of all readings in the order of time"):
        posterior = posterior_of(F)
        posterior.stream()  # the factors do not depend on the readings' values
    clock("posterior and stream")
    say(", ".join(f"{name} {seconds:.2f} s" for name, seconds in times.items()))
    with waiting("playing the readings"):
        frames, setting, x = play(problem, posterior, shown, say, window=opts.live)
    clock("play")
    gap = [spacetime.comm.allreduce(np.abs(part).max(initial=0.0), MPI.MAX) for part in (x - posterior.x, posterior.x)]
    summary = summary_of("heat source, live", settings, spacetime, problem.evolution.V.dim(), times)
    report(frames, setting, float(gap[0] / gap[1]), opts.out, summary, say, Outputs(), opts.next_step)


if __name__ == "__main__":
    run(main)

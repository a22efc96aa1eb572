"""Recover an unknown current in a box from 64 probes of the electric field, with its standard deviation, parallel in
time.

    mpiexec -n 4 python demos/maxwell_source_inversion.py --grid 2x2           (2 ranks in space x 2 in time)
    python demos/maxwell_source_inversion.py --regime cavity                   (no losses: fields ring)
    python demos/maxwell_source_inversion.py --method trust-region             (sweeps in each iteration)

Writes to --out: current.png, snapshots.png, field.gif, sensors.png, l_curve.png (of the trust region: convergence.png),
fields/*.pvd for ParaView and summary.json. MGRIT options of PETSc's kind follow with one dash: -mgrit_levels 3
-mgrit_coarsening 4,4 -mgrit_monitor
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


from demos.inversion import add_method, add_trust_region, settle_method
from demos.planned_grid import GRID_HELP, measured_grid, planned_grid
from pint_fem.cli import ProgramParser, file_name, positive, run, say, waiting

NEXT_STEP = "open current.png and field.gif; then a box without losses: --regime cavity"


def arguments():
    """Options of the program."""
    parser = ProgramParser(prog="maxwell_source_inversion.py", description=__doc__, next_step=NEXT_STEP)
    add = parser.add_argument
    add_method(add)
    add("--regime", default="lossy", choices=["lossy", "cavity"], help="lossy or cavity (lossy)")
    add("--grid", metavar="SxT", help=f"ranks in space x ranks in time; {GRID_HELP} all in time, or as calibrated")
    add("--cells", type=positive(int), default=16, help="cells along a side, a multiple of 8 (16)")
    add("--degree", type=positive(int), default=2, help="degree of the elements (2)")
    add(
        "--sensors",
        type=file_name,
        metavar="FILE.csv",
        help="readings: sensor,x,y,time,ex,ey (default: the shipped ones)",
    )
    add("--steps", type=positive(int), help="time steps (256)")
    add("--integrator", help="SDIRK2, BackwardEuler, ImplicitMidpoint or Leapfrog (lossy: SDIRK2, cavity: the third)")
    add("--alpha", type=positive(float, zero=True), help="weight of the current's gradient in the regularisation")
    add("--beta", type=positive(float), help="weight of the current's size in the regularisation")
    add("--noise", type=positive(float), help="noise of the readings relative to the largest")
    add(
        "--time-solver",
        choices=["auto", "mgrit", "paradiag", "serial"],
        help="auto (the fastest by measured times of a step), mgrit (lossy), paradiag, serial (sequential stepping); "
        "default: serial with --method map, else auto",
    )
    add("--out", type=Path, help="folder of the results (results/maxwell_REGIME)")
    add("--no-fields", action="store_true", help="write no ParaView files")
    add("--compare-serial", action="store_true", help="solve with plain serial Firedrake + pyadjoint too (long)")
    add_trust_region(parser, gtol="1e-5; --compare-serial: 1e-8", checkpoints=False)
    opts = parser.read()
    settle_method(opts, gtol=1e-8 if opts.compare_serial else 1e-5)
    return opts


def solver_parameters(opts, kind):
    """How sweeps are solved, by a kind of time solver."""
    if kind == "auto" and opts.integrator == "Leapfrog":
        kind = "serial"  # explicit steps: no systems to diagonalise, and multigrid does not contract
    given = {"time_solver": kind, "mgrit": {"rtol": opts.rtol}, "paradiag": {"rtol": opts.rtol}}
    if kind == "mgrit":
        given["mgrit"] |= {"levels": 2, "coarsening": 4}  # coarser steps damp what fields still carry
    if not opts.exact and opts.method != "map":
        given["typical_rtol"] = 1e-2  # of products with the Hessian, which are most of the solves
    return given


def main():
    """Run the inversion."""
    opts = arguments()
    from demos.outputs import Outputs, load_firedrake, output_folder
    from pint_fem.spacetime import SpaceTime
    from problems.maxwell_setting import setting

    given, solver = setting(opts.regime), solver_parameters(opts, opts.time_solver)
    planned = {"lossy": "mgrit", "cavity": "paradiag"}[opts.regime]  # by the model, which measures no step
    grid, about = planned_grid(
        opts.grid,
        f"maxwell-{opts.regime}",
        solver=solver_parameters(opts, planned) if opts.time_solver == "auto" else solver,
        steps=opts.steps or given.steps,
        calibrated=(opts.method, opts.cells, opts.degree, opts.integrator) == ("trust-region", 16, 2, None),
    )
    load_firedrake()
    from problems import maxwell_source as posed
    from problems.maxwell_readings import NOISE, readings_file

    settings = {
        "regime": opts.regime,
        "cells": opts.cells,
        "degree": opts.degree,
        "readings": str(opts.sensors or readings_file(opts.regime)),
        "steps": opts.steps or given.steps,
        "integrator": opts.integrator or given.integrator,
        "alpha": posed.ALPHA[opts.regime] if opts.alpha is None else opts.alpha,
        "beta": opts.beta or posed.BETA[opts.regime],
        "noise": opts.noise or NOISE,
    }
    grid, measured = measured_grid(
        grid,
        lambda st: posed.maxwell_source(st, **settings, solver_parameters={"time_solver": "serial"}),
        solver=solver,
        by_map=opts.method == "map",
    )
    spacetime, about = SpaceTime(grid), measured or about
    opts.out = opts.out or Path("results") / f"maxwell_{opts.regime}"
    output_folder(opts.out)

    if about:
        say(about)
    say(f"Maxwell source inversion, {opts.regime}, on {spacetime.space_size} x {spacetime.time_size} ranks")
    start = time.perf_counter()
    with waiting("set-up: forms, kernels, factors"):
        problem = posed.maxwell_source(spacetime, **settings, solver_parameters=solver)
    sweeps, rf = problem.rf.problem.sweeps, problem.rf
    times = {"set-up": time.perf_counter() - start}
    V = problem.evolution.V
    say(
        f"{V.sub(0).dim()} + {V.sub(1).dim()} unknowns of E and B, {settings['steps']} steps of "
        f"{settings['integrator']}, {problem.readings.values.size} readings"
    )
    say(sweeps.solvers.view())
    from demos.inversion import invert, summary_of
    from demos.maxwell_source_report import report

    outputs = Outputs()
    result, posterior = invert(rf, opts, say, outputs, times)
    summary = summary_of("Maxwell source inversion", settings, spacetime, V.dim(), times)
    summary["time_solver"] = sweeps.solvers.kind
    report(problem, result, posterior, opts, summary, say, outputs)


if __name__ == "__main__":
    run(main)

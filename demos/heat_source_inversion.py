"""Recover an unknown heat source in a plate from 24 sensors, with its standard deviation, parallel in time.

    mpiexec -n 4 python demos/heat_source_inversion.py --grid 2x2            (2 ranks in space x 2 in time; or auto)
    python demos/heat_source_inversion.py --method trust-region              (sweeps in each iteration)

Writes to --out: source.png, sensors.png, l_curve.png (of the trust region: convergence.png), fields/*.pvd for ParaView
and summary.json. MGRIT options of PETSc's kind follow with one dash: -mgrit_levels 3 -mgrit_coarsening 8,4
-mgrit_relax FCF -mgrit_monitor
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


from demos.inversion import add_method, add_plate, add_trust_region, settle_method
from demos.planned_grid import GRID_HELP, measured_grid, planned_grid
from pint_fem.cli import ProgramParser, positive, run, say, waiting

NEXT_STEP = "open source.png; then readings as they come in: python demos/heat_source_live.py"


def arguments():
    """Options of the program."""
    parser = ProgramParser(prog="heat_source_inversion.py", description=__doc__, next_step=NEXT_STEP)
    add = parser.add_argument
    add_method(add)
    add("--grid", metavar="SxT", help=f"ranks in space x ranks in time; {GRID_HELP} all in time, or as calibrated")
    add_plate(add)
    add("--integrator", default="SDIRK2", help="BackwardEuler, SDIRK2 or ImplicitMidpoint (SDIRK2)")
    add("--alpha", type=positive(float, zero=True), help="weight of the source's gradient in the regularisation")
    add("--beta", type=positive(float), help="weight of the source's size in the regularisation")
    add("--noise", type=positive(float), help="noise of the readings relative to the largest")
    add(
        "--time-solver",
        choices=["auto", "mgrit", "paradiag", "serial"],
        help="auto (the fastest by measured times of a step), mgrit, paradiag, serial (sequential stepping); "
        "default: serial with --method map, else auto",
    )
    add("--out", type=Path, default=Path("results/heat_source"), help="folder of the results (results/heat_source)")
    add("--no-fields", action="store_true", help="write no ParaView files")
    add(
        "--compare-serial",
        action="store_true",
        help="solve with plain serial Firedrake + pyadjoint too (tens of minutes)",
    )
    add_trust_region(parser, gtol="1e-8", checkpoints=True)
    opts = parser.read()
    settle_method(opts)
    return opts


def main():
    """Run the inversion."""
    opts = arguments()
    from demos.outputs import Outputs, load_firedrake, output_folder
    from pint_fem.spacetime import SpaceTime

    solver = {"time_solver": opts.time_solver, "mgrit": {"rtol": opts.rtol}}
    if not opts.exact and opts.method != "map":
        solver["typical_rtol"] = 1e-2  # of products with the Hessian, which are most of the solves
    grid, about = planned_grid(
        opts.grid,
        "heat-source",
        solver=solver,
        steps=opts.steps,
        calibrated=opts.mesh is None and opts.integrator == "SDIRK2" and opts.method == "trust-region",
    )
    load_firedrake()
    from problems import heat_source as posed
    from problems.heat_readings import NOISE, READINGS
    from problems.plate import MESH

    settings = {
        "mesh": str(opts.mesh or MESH),
        "readings": str(opts.sensors or READINGS),
        "steps": opts.steps,
        "integrator": opts.integrator,
        "alpha": posed.ALPHA if opts.alpha is None else opts.alpha,
        "beta": opts.beta or posed.BETA,
        "noise": opts.noise or NOISE,
    }
    grid, measured = measured_grid(
        grid,
        lambda st: posed.heat_source(st, **settings, solver_parameters={"time_solver": "serial"}),
        solver=solver,
        by_map=opts.method == "map",
    )
    spacetime, about = SpaceTime(grid), measured or about
    output_folder(opts.out)

    if about:
        say(about)
    say(f"heat source inversion on {spacetime.space_size} x {spacetime.time_size} ranks (space x time)")
    start = time.perf_counter()
    with waiting("set-up: forms, kernels, factors"):
        problem = posed.heat_source(spacetime, **settings, solver_parameters=solver)
    sweeps, rf = problem.rf.problem.sweeps, problem.rf
    times = {"set-up": time.perf_counter() - start}
    dofs = problem.evolution.V.dim()
    say(f"{dofs} unknowns in space, {opts.steps} steps of {opts.integrator}, {problem.readings.values.size} readings")
    say(sweeps.solvers.view())
    from demos.heat_source_report import report
    from demos.inversion import invert, summary_of

    outputs = Outputs()
    result, posterior = invert(rf, opts, say, outputs, times)
    summary = summary_of("heat source inversion", settings, spacetime, dofs, times)
    report(problem, result, posterior, opts, summary, say, outputs)


if __name__ == "__main__":
    run(main)

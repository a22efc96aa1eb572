"""Recover the conductivity of a plate from eight heating experiments, parallel in time.

    mpiexec -n 2 python demos/heat_conductivity_inversion.py --grid 1x2      (1 rank in space x 2 in time)
    python demos/heat_conductivity_inversion.py --bounds 0.2,5               (of the conductivity over the metal's)
    python demos/heat_conductivity_inversion.py --compare-serial             (beside plain Firedrake + pyadjoint)

Writes to --out: conductivity.png, sensors.png, convergence.png, fields/*.pvd for ParaView and summary.json. MGRIT
options of PETSc's kind follow with one dash: -mgrit_levels 3 -mgrit_coarsening 8,4 -mgrit_relax FCF -mgrit_monitor
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


from demos.coefficient_inversion import add_coefficients, invert_coefficients, settle_coefficients
from demos.inversion import add_plate
from demos.outputs import load_firedrake
from pint_fem.cli import ProgramParser, run

NEXT_STEP = "open conductivity.png; then bounds: --bounds 0.2,5, or a smooth prior: --regularisation h1"


def arguments():
    """Options of the program."""
    parser = ProgramParser(prog="heat_conductivity_inversion.py", description=__doc__, next_step=NEXT_STEP)
    add_plate(parser.add_argument, columns="experiment,sensor,x,y,time,temperature", steps=128)
    parser.add_argument("--integrator", default="SDIRK2", help="BackwardEuler, SDIRK2 or ImplicitMidpoint (SDIRK2)")
    parser.add_argument(
        "--regularisation",
        default="tv",
        choices=["h1", "tv"],
        help="tv (total variation) or h1 (squared gradient) (tv)",
    )
    add_coefficients(parser, out="results/heat_conductivity", gtol="1e-3")
    opts = parser.read()
    settle_coefficients(opts, gtol=1e-3)
    return opts


def main():
    """Run the inversion."""
    opts = arguments()
    load_firedrake()
    from problems import heat_conductivity as posed
    from problems.heat_conductivity_readings import NOISE, READINGS
    from problems.heat_conductivity_setting import HEATERS
    from problems.plate import MESH
    from problems.serial_heat_conductivity import serial_heat_conductivity

    settings = {
        "mesh": str(opts.mesh or MESH),
        "readings": str(opts.sensors or READINGS),
        "steps": opts.steps,
        "integrator": opts.integrator,
        "regularisation": opts.regularisation,
        "alpha": posed.weight_of(opts.regularisation, opts.alpha),
        "beta": opts.beta or posed.BETA,
        "noise": opts.noise or NOISE,
        "bounds": opts.bounds,
    }
    invert_coefficients(
        "heat conductivity inversion",
        opts,
        pose=posed.heat_conductivity,
        record=serial_heat_conductivity,
        settings=settings,
        shipped=settings["readings"] == str(READINGS),
        count=len(HEATERS),
        quantity="temperature rise in K",
        sources="heaters",
    )


if __name__ == "__main__":
    run(main)

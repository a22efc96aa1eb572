"""Recover permittivity and conductivity of soil from a ground-penetrating radar with eight antenna positions, parallel
in time.

    mpiexec -n 2 python demos/maxwell_permittivity_inversion.py
    mpiexec -n 4 python demos/maxwell_permittivity_inversion.py --grid 2x2      (2 ranks in space x 2 in time)
    python demos/maxwell_permittivity_inversion.py --compare-serial             (beside plain Firedrake + pyadjoint)

Writes to --out: soil.png, permittivity.png, conductivity.png, gathers.png, sensors.png, convergence.png,
fields/coefficients.pvd for ParaView and summary.json. MGRIT options of PETSc's kind follow with one dash:
-mgrit_levels 3 -mgrit_coarsening 4,4 -mgrit_monitor
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from demos.coefficient_inversion import add_coefficients, invert_coefficients, settle_coefficients
from demos.outputs import load_firedrake
from pint_fem.cli import ProgramParser, file_name, positive, run

NEXT_STEP = "open soil.png and gathers.png; then groups of experiments: mpiexec -n 2, --grid 1x1x2"


def arguments():
    """Options of the program."""
    parser = ProgramParser(prog="maxwell_permittivity_inversion.py", description=__doc__, next_step=NEXT_STEP)
    add = parser.add_argument
    add("--cells", type=positive(int), default=12, help="cells along the depth of the soil, a multiple of 4 (12)")
    add("--degree", type=positive(int), default=2, help="degree of the elements (2)")
    add("--sensors", type=file_name, metavar="FILE.csv", help="experiment,sensor,x,y,time,ex (default: the shipped)")
    add("--steps", type=positive(int), default=192, help="time steps (192)")
    add("--integrator", default="ImplicitMidpoint", help="ImplicitMidpoint, SDIRK2 or BackwardEuler (the first)")
    add("--alpha-conductivity", type=positive(float, zero=True), help="--alpha of the conductivity")
    add_coefficients(parser, out="results/maxwell_permittivity", gtol="1e-2")
    opts = parser.read()
    settle_coefficients(opts, gtol=1e-2, max_iterations=25)
    return opts


def main():
    """Run the inversion."""
    opts = arguments()
    load_firedrake()
    from demos.maxwell_permittivity_report import further_report
    from problems import maxwell_permittivity as posed
    from problems.maxwell_soil import ANTENNAS
    from problems.serial_maxwell_permittivity import serial_maxwell_permittivity

    given = lambda value, default: default if value is None else value
    settings = {
        "cells": opts.cells,
        "degree": opts.degree,
        "readings": str(opts.sensors or posed.READINGS),
        "steps": opts.steps,
        "integrator": opts.integrator,
        "alpha": given(opts.alpha, posed.ALPHA),
        "alpha_conductivity": given(opts.alpha_conductivity, posed.ALPHA_CONDUCTIVITY),
        "beta": opts.beta or posed.BETA,
        "noise": opts.noise or posed.NOISE,
        "bounds": opts.bounds,
    }
    invert_coefficients(
        "Maxwell permittivity inversion",
        opts,
        pose=posed.maxwell_permittivity,
        record=serial_maxwell_permittivity,
        settings=settings,
        shipped=settings["readings"] == str(posed.READINGS),
        count=len(ANTENNAS),
        quantity="electric field",
        sources="antennas",
        minimisation={"hessian": "gauss-newton", "initial_radius": 0.1, "cg_forcing": 0.1, "cg_max_it": 20},
        further=further_report,
    )


if __name__ == "__main__":
    run(main)

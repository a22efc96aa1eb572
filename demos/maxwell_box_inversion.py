"""Recover a current in a cavity in space, with a conductor and a dielectric in it, from 64 antennas.

    python demos/maxwell_box_inversion.py                                     (31,024 unknowns of E)
    mpiexec -n 2 python demos/maxwell_box_inversion.py --refine 1 --grid 1x2

Writes to --out: current.png (sections by three planes), sensors.png, convergence.png (of the map: l_curve.png),
fields/*.pvd for ParaView and summary.json, with the memory that was stated before the run and the measured one. Options
of PETSc's kind follow with one dash: -mgrit_coarsening 8,4 -mgrit_monitor -pint_ksp_view
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


from demos.box_inversion import Shown, add_box, invert_box, settle_box
from demos.outputs import load_firedrake
from pint_fem.cli import ProgramParser, positive, run

NEXT_STEP = "open the sections (*.png), or fields/*.pvd in ParaView; then a finer mesh: --refine 3"
MOST = 3
COLUMNS = ("sensor", "x", "y", "z", "time", "ex", "ey", "ez")


def arguments():
    """Options of the program."""
    parser = ProgramParser(prog="maxwell_box_inversion.py", description=__doc__, next_step=NEXT_STEP)
    parser.add_argument("--degree", type=positive(int), default=1, help="degree of the elements (1)")
    add_box(parser, out="results/maxwell_box", most=MOST, columns=COLUMNS, steps=64, integrator="ImplicitMidpoint")
    opts = parser.read()
    settle_box(opts, most=MOST)
    return opts


def main():
    """Run the inversion."""
    opts = arguments()
    load_firedrake()
    from firedrake import inner, sqrt

    from problems import maxwell_box as posed
    from problems.maxwell_box_readings import NOISE, READINGS
    from problems.serial_boxes import serial_maxwell_box

    settings = {
        "refine": opts.refine,
        "degree": opts.degree,
        "readings": str(opts.sensors or READINGS),
        "steps": opts.steps,
        "integrator": opts.integrator,
        "alpha": posed.ALPHA if opts.alpha is None else opts.alpha,
        "beta": opts.beta or posed.BETA,
        "noise": opts.noise or NOISE,
    }
    planes = ((2, 0.52), (1, 0.36), (0, 0.68))
    names = ("E_x", "E_y", "E_z")
    size = lambda f: sqrt(inner(f, f))
    shown = Shown("current", "size of the current density", "electric field", names, planes, size, vectors=True)
    invert_box(
        "current inversion in a cavity", opts, pose=posed.maxwell_box, record=serial_maxwell_box, settings=settings,
        shipped=opts.sensors is None, shown=shown,
    )  # fmt: skip


if __name__ == "__main__":
    run(main)

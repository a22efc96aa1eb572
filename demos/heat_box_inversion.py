"""Recover two warm blobs in a box of two metals from 72 temperature sensors, in space and time, on meshes up to a
million unknowns.

    python demos/heat_box_inversion.py                                        (15,625 unknowns)
    mpiexec -n 2 python demos/heat_box_inversion.py --grid 2x1 --refine 3     (2 ranks in space, 117,649 unknowns)
    mpiexec -n 2 python demos/heat_box_inversion.py --grid 2x1 --refine 4     (912,673 unknowns)

Writes to --out: source.png (sections by three planes), sensors.png, convergence.png (of the map: l_curve.png),
fields/*.pvd for ParaView and summary.json, with the memory that was stated before the run and the measured one. Options
of PETSc's kind follow with one dash: -mgrit_coarsening 8,4 -mgrit_monitor -pint_ksp_view
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


from demos.box_inversion import Shown, add_box, invert_box, settle_box
from demos.outputs import load_firedrake
from pint_fem.cli import ProgramParser, run

NEXT_STEP = "open source.png, or fields/*.pvd in ParaView; then a finer mesh: --refine 3"
MOST = 4
COLUMNS = ("sensor", "x", "y", "z", "time", "temperature")


def arguments():
    """Options of the program."""
    parser = ProgramParser(prog="heat_box_inversion.py", description=__doc__, next_step=NEXT_STEP)
    parser.add_argument("--elements", default="P1", choices=["P1", "P2"], help="of the temperature (P1)")
    add_box(parser, out="results/heat_box", most=MOST, columns=COLUMNS, steps=64, integrator="SDIRK2")
    opts = parser.read()
    settle_box(opts, most=MOST)
    return opts


def main():
    """Run the inversion."""
    opts = arguments()
    load_firedrake()
    from demos.heat_source_report import UNIT
    from problems import heat_box as posed
    from problems.heat_box_readings import NOISE, READINGS
    from problems.serial_boxes import serial_heat_box

    settings = {
        "refine": opts.refine,
        "elements": opts.elements,
        "readings": str(opts.sensors or READINGS),
        "steps": opts.steps,
        "integrator": opts.integrator,
        "alpha": posed.ALPHA if opts.alpha is None else opts.alpha,
        "beta": opts.beta or posed.BETA,
        "noise": opts.noise or NOISE,
    }
    planes = ((2, 0.47), (1, 0.35), (0, 0.68))
    shown = Shown("source", UNIT, "temperature rise in K", ("",), planes)
    invert_box(
        "heat source inversion in a box", opts, pose=posed.heat_box, record=serial_heat_box, settings=settings,
        shipped=opts.sensors is None, shown=shown,
    )  # fmt: skip


if __name__ == "__main__":
    run(main)

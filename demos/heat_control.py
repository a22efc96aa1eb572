"""Steer the temperature of a plate by four heaters at its edges, with bounds on their power, all time steps at once.

    mpiexec -n 2 python demos/heat_control.py                                (the time ranks share the steps)
    python demos/heat_control.py --bounds none --regularisation 1e-6         (heaters that also cool)
    python demos/heat_control.py --compare-serial                            (beside plain Firedrake + pyadjoint)

Writes to --out: control.png (powers over time, with active sets), states.png, movie.gif, convergence.png, fields/*.pvd
for ParaView and summary.json. Options of PETSc's kind follow with one dash: -mgrit_rtol 1e-10
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


from demos.control_run import add_control_options, control, read_control_options, settings_of
from pint_fem.cli import ProgramParser, run

NEXT_STEP = "open control.png and movie.gif; then heaters that also cool: --bounds none"


def main():
    """Run the demo."""
    from problems.heat_control import HeatControl

    parser = ProgramParser(prog="heat_control.py", description=__doc__, next_step=NEXT_STEP)
    add_control_options(parser, HeatControl(), out="results/heat_control")
    opts = read_control_options(parser)

    import numpy as np

    from demos.control_report import Labels
    from problems.heat_control import heat_control, heat_control_forms

    near, far = 0.03, 0.97  # of the sides, on which the pictures end
    ends = [[(near, 0.25), (near, 0.75)], [(0.25, near), (0.75, near)], [(far, 0.25), (far, 0.75)]]
    ends.append([(0.25, far), (0.75, far)])
    edges = tuple(map(np.array, ends))  # in the order of HEATERS
    labels = Labels("temperature rise", "power", "1/2 ∫ (u - target)² dx", edges)
    given = dict(pose=heat_control, forms=heat_control_forms, labels=labels)
    control("heat control", opts, settings_of(HeatControl, opts), **given)


if __name__ == "__main__":
    run(main)

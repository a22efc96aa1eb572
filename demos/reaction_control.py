"""Carry a drop of one phase through another: optimal control of a nonlinear evolution, all time steps at once.

    mpiexec -n 2 python demos/reaction_control.py                            (the time ranks share the steps)
    python demos/reaction_control.py --bounds=-1,1                           (a control that is limited)
    python demos/reaction_control.py --compare-serial                        (beside plain Firedrake + pyadjoint)

Writes to --out: control.png (control and distance from the target over time), states.png, movie.gif, convergence.png,
fields/*.pvd for ParaView and summary.json. Options of PETSc's kind follow with one dash: -mgrit_rtol 1e-10
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


from demos.control_run import add_control_options, control, read_control_options, settings_of
from pint_fem.cli import ProgramParser, run

NEXT_STEP = "open movie.gif; then another weight of the control: --regularisation 1e-3"


def main():
    """Run the demo."""
    from problems.reaction_control import ReactionControl

    parser = ProgramParser(prog="reaction_control.py", description=__doc__, next_step=NEXT_STEP)
    add_control_options(parser, ReactionControl(), out="results/reaction_control")
    opts = read_control_options(parser)

    from demos.control_report import Labels
    from problems.reaction_control import reaction_control, reaction_control_forms

    labels = Labels("phase", "control", "1/2 ∫ (u - target)² dx")
    given = dict(pose=reaction_control, forms=reaction_control_forms, labels=labels)
    control("reaction control", opts, settings_of(ReactionControl, opts), **given)


if __name__ == "__main__":
    run(main)

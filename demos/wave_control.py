"""Bring a membrane to rest by a force, all time steps at once.

    mpiexec -n 2 python demos/wave_control.py                                (the time ranks share the steps)
    python demos/wave_control.py --region strip --regularisation 1e-3        (the force acts on a strip at the left)
    python demos/wave_control.py --bounds=-1,1                               (a force that is limited)
    python demos/wave_control.py --compare-serial                            (beside plain Firedrake + pyadjoint)

Writes to --out: control.png (force and energy over time), states.png, movie.gif, convergence.png, fields/*.pvd for
ParaView and summary.json. Options of PETSc's kind follow with one dash: -paradiag_alpha 1e-4
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


from demos.control_run import add_control_options, control, read_control_options, settings_of
from pint_fem.cli import ProgramParser, positive, run

NEXT_STEP = "open movie.gif; then a force that is limited: --bounds=-1,1"


def main():
    """Run the demo."""
    from problems.wave_control import REGIONS, TRACKING, WaveControl

    parser, defaults = ProgramParser(prog="wave_control.py", description=__doc__, next_step=NEXT_STEP), WaveControl()
    parser.add_argument("--region", choices=REGIONS, help=f"where the force acts ({defaults.region})")
    parser.add_argument("--tracking", choices=TRACKING, help=f"what is to be small ({defaults.tracking})")
    weight = positive(float, zero=True)
    parser.add_argument("--terminal", type=weight, help=f"weight of the energy at the end ({defaults.terminal:g})")
    add_control_options(parser, defaults, out="results/wave_control")
    opts = read_control_options(parser)
    settings = settings_of(WaveControl, opts)

    from demos.control_report import Labels
    from problems.wave_control import wave_control, wave_control_forms

    tracked = "energy" if settings.tracking == "energy" else "1/2 ∫ u² + w² dx"
    labels = Labels("displacement", "force", tracked)
    control("wave control", opts, settings, pose=wave_control, forms=wave_control_forms, labels=labels)


if __name__ == "__main__":
    run(main)

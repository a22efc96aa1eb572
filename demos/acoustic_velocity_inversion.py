"""Recover the wave speed below a surface from eight shots: full-waveform inversion, parallel in time.

    mpiexec -n 2 python demos/acoustic_velocity_inversion.py --grid 1x2      (1 rank in space x 2 in time)
    python demos/acoustic_velocity_inversion.py --bands 4.5                  (without frequency continuation)
    python demos/acoustic_velocity_inversion.py --compare-serial             (beside plain Firedrake + pyadjoint)

Pulse and readings are filtered to each of the --bands, which are minimised one after another, with numbers of steps
that are proportional to their frequencies. Writes to --out: speed.png, shots.png, wave_speed.png, sensors.png,
convergence.png, fields/*.pvd for ParaView and summary.json. ParaDiag's options of PETSc's kind follow with one dash:
-paradiag_alpha 1e-4
"""

import math
import sys
from argparse import ArgumentTypeError
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


from demos.coefficient_inversion import add_coefficients, invert_coefficients, settle_coefficients
from demos.outputs import load_firedrake
from pint_fem.cli import ProgramParser, file_name, positive, run

NEXT_STEP = "open speed.png and shots.png; then groups of experiments: mpiexec -n 2, --grid 1x1x2"
MINIMISATION = {"hessian": "gauss-newton", "initial_radius": 0.1, "cg_forcing": 0.2, "cg_max_it": 8}
"""Options of the trust region; steps of Gauss and Newton, as far from the result the Hessian is indefinite."""


def bands(text: str) -> tuple[float, ...]:
    """Return the peak frequencies of bands, given as ``2,3,4.5``."""
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        found = (-1.0,)
    if not all(0 < band < float("inf") for band in found):
        raise ArgumentTypeError(f"{text!r}: give positive frequencies in Hz, such as 2,3,4.5")
    return found


def arguments():
    """Options of the program."""
    parser = ProgramParser(prog="acoustic_velocity_inversion.py", description=__doc__, next_step=NEXT_STEP)
    add = parser.add_argument
    add("--bands", type=bands, metavar="F1,F2,...", help="peak frequencies of the bands in Hz (2,3,4.5)")
    add("--cells", type=positive(int), default=12, help="cells per kilometre, a multiple of 4 (12)")
    add("--degree", type=positive(int), default=2, help="degree of the pressure (2)")
    add(
        "--sensors",
        type=file_name,
        metavar="FILE.csv",
        help="readings: experiment,sensor,x,y,time,pressure (default: the shipped ones)",
    )
    add("--steps", type=positive(int), default=200, help="time steps of the highest band, lower ones have fewer (200)")
    add("--integrator", default="ImplicitMidpoint", help="ImplicitMidpoint, SDIRK2 or BackwardEuler (the first)")
    add_coefficients(parser, out="results/acoustic_velocity", gtol="1e-3")
    opts = parser.read()
    settle_coefficients(opts, gtol=1e-3, max_iterations=8)
    return opts


def main():
    """Run the inversion."""
    opts = arguments()
    load_firedrake()
    from demos.acoustic_velocity_report import further_report
    from problems import acoustic_velocity as posed
    from problems.acoustic_readings import NOISE, READINGS
    from problems.acoustic_setting import BANDS, PEAK_FREQUENCY, SHOTS
    from problems.serial_acoustic import serial_acoustic_velocity

    settings = {
        "readings": str(opts.sensors or READINGS),
        "cells": opts.cells,
        "degree": opts.degree,
        "steps": opts.steps,
        "integrator": opts.integrator,
        "alpha": posed.ALPHA if opts.alpha is None else opts.alpha,
        "beta": opts.beta or posed.BETA,
        "noise": opts.noise or NOISE,
        "bounds": opts.bounds,
    }
    invert_coefficients(
        "wave speed inversion",
        opts,
        pose=posed.acoustic_velocity,
        record=serial_acoustic_velocity,
        settings=settings,
        shipped=settings["readings"] == str(READINGS),
        count=len(SHOTS),
        quantity="pressure",
        sources="shots",
        stages=[
            (f"band of {band:g} Hz", {"band": band, "steps": math.ceil(opts.steps * band / PEAK_FREQUENCY)})
            for band in opts.bands or BANDS
        ],
        minimisation=MINIMISATION,
        further=further_report,
    )


if __name__ == "__main__":
    run(main)

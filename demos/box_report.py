"""Pictures, files and summary of the source inversions in a box."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
from firedrake import assemble, dx, inner

from demos.box_inversion import Shown
from demos.curves import plot_sensors
from demos.heat_source_report import convergence_picture, mgrit_summary, result_summary
from demos.outputs import write_json
from demos.posterior_report import posterior_summary, regularisation_picture
from demos.slices import Sections, plot_sections
from pint_fem.kernels.arrays import get
from pint_fem.paraview import write_fields, write_functions
from problems.box import BoxSource

__all__ = ["report"]

ALL_STATES = 50_000
"""Unknowns of a state up to which 17 states are written for ParaView; of larger ones three."""


def report(
    problem: BoxSource, result, posterior, opts, summary: dict, say: Callable, outputs, *, shipped: bool, shown: Shown,
    compare: Callable[[], dict] | None,
) -> None:  # fmt: skip
    """Write everything (collective); ``summary`` is completed and written last.

    Parameters
    ----------
    problem, result, posterior
        What was minimised, the minimisation, and the posterior or ``None``.
    opts, summary, say, outputs
        Options of the command line, the beginning of the summary, what prints a line, and the files.
    shipped, shown
        Whether the source behind the readings is known, and what is drawn.
    compare
        Compares with plain Firedrake and pyadjoint and returns the entry of the summary.

    Raises
    ------
    InputError
        On every rank, where something could not be written.
    """
    rf, spacetime, out = problem.rf, problem.spacetime, opts.out
    found, truth = rf.function(result.x), problem.true_source
    predicted, readings = problem.predicted(result.x), problem.readings
    predicted = predicted.reshape(readings.values.shape)
    own = summary["result"] = result_summary(rf, result, predicted, readings.values)
    if shipped:
        square = lambda f: assemble(inner(f, f) * dx)
        own["relative_source_error"] = float(np.sqrt(square(found - truth) / square(truth)))
        say(
            f"relative L2 error of the recovered {shown.quantity} {own['relative_source_error']:.3f}; misfit "
            f"{own['misfit']:.4f} (0.5 is the noise)"
        )
    deviation = None
    if posterior is not None:
        summary["posterior"] = posterior_summary(posterior, result, say, truth=get(truth).ravel() if shipped else None)
        deviation = rf.function(result.standard_deviation)
    mgrit_summary(problem, summary, say)
    outputs.on_root("summary.json", write_json, out / "summary.json", summary)  # before anything else can fail
    named = ([("true", truth)] if shipped else []) + [("recovered", found)]
    draw = _sections(problem, named, deviation, shown, out) if spacetime.time_comm.rank == 0 else lambda: None

    def pictures() -> None:
        draw()
        flat = lambda values: values.reshape(len(values), -1)
        names = [f"{s} {part}".strip() for s in readings.sensors for part in shown.names]
        given = readings.times, flat(readings.values), flat(predicted)
        plot_sensors(out / "sensors.png", *given, names=names, quantity=shown.reading)
        if posterior is None:
            convergence_picture(out / "convergence.png", rf.problem.sweeps, result, summary)
        else:
            regularisation_picture(out / "l_curve.png", posterior, summary["posterior"])

    outputs.on_root(f"pictures in {out}", pictures)
    if not opts.no_fields:
        _paraview(problem, result.x, named, deviation, shown, out, outputs)
    if compare is not None:
        start = time.perf_counter()
        summary["compare_serial"] = compare()
        summary["seconds"]["comparison"] = time.perf_counter() - start
    outputs.on_root("summary.json", write_json, out / "summary.json", summary)
    outputs.finish(out, opts.next_step)


def _sections(problem: BoxSource, named: list, deviation, shown: Shown, out) -> Callable[[], None]:
    """What draws the sections of the fields on the first rank (collective over space)."""
    sections = Sections(problem.evolution.V.mesh().unique(), shown.planes)
    rows = [(f"{name} {shown.quantity}", sections(shown.scalar(f))) for name, f in named]
    arrows = [sections.arrows(f) for _, f in named] if shown.vectors else []
    deviations = None if deviation is None else sections(shown.scalar(deviation))
    return lambda: plot_sections(
        out / f"{shown.quantity}.png",
        sections,
        rows,
        label=shown.label,
        deviations=deviations,
        arrows=arrows,
        points=problem.readings.points,
        title=f"contours: 1/4, 1/2 and 3/4 of the largest value of the {named[0][0]} {shown.quantity}; dots: sensors "
        "near the plane",
        signed=not shown.vectors,
    )


def _paraview(problem: BoxSource, z: np.ndarray, named: list, deviation, shown: Shown, out, outputs) -> None:
    """Fields for ParaView: the trajectory at some times, and the sources by their names."""
    ev, spacetime = problem.evolution, problem.spacetime
    slab, states = problem.rf.problem.sweeps.slab, problem.rf.problem.states(z)
    points = None if ev.V.dim() <= ALL_STATES else [0, ev.nsteps // 2, ev.nsteps]
    times = ev.time(np.arange(ev.nsteps + 1))
    write = lambda: write_fields(out / "fields", "state", states, ev.V, slab, spacetime, times, points=points)
    outputs("fields", write)
    functions = []
    for name, f in [*named, *([] if deviation is None else [("standard_deviation_of", deviation)])]:
        f.rename(f"{name}_{shown.quantity}")
        functions.append(f)
    work = write_functions if spacetime.time_comm.rank == 0 else lambda *_: None
    outputs("fields", work, out / "fields" / f"{shown.quantity}.pvd", functions, spacetime.space_comm)

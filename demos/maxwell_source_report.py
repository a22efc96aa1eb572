"""Pictures, files and summary of the Maxwell source inversion."""

from __future__ import annotations

import time

import numpy as np
from firedrake import Function, as_vector, assemble, cos, dx, exp, inner, sin

from demos.curves import plot_sensors
from demos.heat_source_report import convergence_picture, mgrit_summary, result_summary
from demos.outputs import write_json
from demos.pictures import Raster, animate, gather_images, plot_fields, plot_snapshots
from demos.posterior_report import posterior_summary, regularisation_picture
from pint_fem.kernels.arrays import get, put
from pint_fem.paraview import write_fields, write_functions
from problems.maxwell import B
from problems.maxwell_readings import readings_file
from problems.maxwell_setting import true_current

__all__ = ["points", "report"]

FRAMES = 48
SNAPSHOTS = 8


def report(problem, result, posterior, opts, summary: dict, say, outputs) -> None:
    """Write everything; ``summary`` is completed and written last. What cannot be written is reported at the end."""
    rf, spacetime, sweeps = problem.rf, problem.spacetime, problem.rf.problem.sweeps
    out, truth = opts.out, problem.true_current
    current, predicted = rf.function(result.x), problem.predicted(result.x)
    readings = problem.readings
    shipped = summary["settings"]["readings"] == str(readings_file(summary["settings"]["regime"]))
    summary["result"] = result_summary(rf, result, predicted, readings.values)
    misfit = summary["result"]["misfit"]
    if shipped:  # the true current is known
        difference = Function(truth.function_space()).assign(current - truth)
        square = lambda f: assemble(inner(f, f) * dx)
        error = float(np.sqrt(square(difference) / square(truth)))
        summary["result"]["relative_current_error"] = error
        say(f"relative L2 error of the recovered current {error:.3f}; misfit {misfit:.4f} (0.5 is the noise)")
    band, noise = None, 0.0
    if posterior is not None:
        summary["posterior"] = posterior_summary(posterior, result, say, truth=get(truth).ravel() if shipped else None)
        split = posterior.predict(posterior.F)
        band = np.ma.dstack(split.split(split.standard_deviation)).filled(np.nan)
        noise = float(np.sqrt(posterior.noise.variance()[0]))
    mgrit_summary(problem, summary, say)
    outputs.on_root("summary.json", write_json, out / "summary.json", summary)  # before anything else can fail

    raster = Raster(problem.evolution.V.mesh().unique(), width=160)
    images, deviations = [], []
    if spacetime.time_comm.rank == 0:
        parts = [("true", truth)] if shipped else []
        parts.append(("recovered", current))
        images = [(f"{name} J_{c}", raster(f[i])) for name, f in parts for i, c in enumerate("xy")]
        if posterior is not None:
            deviation = rf.function(result.standard_deviation)
            deviations = [(f"standard deviation of J_{c}", raster(deviation[i])) for i, c in enumerate("xy")]
    moving = _moving_pictures(problem, result.x, raster, out)

    def pictures():
        shown = dict(points=readings.points, deviations=deviations, rows=2, label="current density")
        plot_fields(out / "current.png", images, raster.extent, **shown)
        moving()
        flat = lambda values: values.reshape(len(values), -1)
        names = [f"{name} E_{c}" for name in readings.sensors for c in "xy"]
        given = readings.times, flat(readings.values), flat(predicted)
        shown = dict(names=names, quantity="electric field", deviation=None if band is None else flat(band))
        plot_sensors(out / "sensors.png", *given, noise=noise, **shown)
        if posterior is None:
            convergence_picture(out / "convergence.png", sweeps, result, summary)
        else:
            regularisation_picture(out / "l_curve.png", posterior, summary["posterior"])

    outputs.on_root(f"pictures in {out}", pictures)
    if not opts.no_fields:
        named = {"recovered_current": current}
        if shipped:
            named["true_current"] = truth
        if posterior is not None:
            named["standard_deviation"] = rf.function(result.standard_deviation)
        _paraview(problem, named, result.x, out, outputs)
    if opts.compare_serial:
        from problems.compare_serial import compare
        from problems.serial_maxwell import serial_maxwell_source

        start = time.perf_counter()
        summary["compare_serial"] = compare(
            problem,
            result,
            summary["settings"],
            summary["seconds"],
            say,
            record=serial_maxwell_source,
            points=points,
        )
        summary["seconds"]["comparison"] = time.perf_counter() - start
    outputs.on_root("summary.json", write_json, out / "summary.json", summary)
    outputs.finish(out, opts.next_step)


def points(V) -> tuple[Function, Function]:
    """A current and a direction given by formulas, the same on every mesh."""
    from firedrake import SpatialCoordinate

    x, y = SpatialCoordinate(V.mesh())
    return (
        Function(V).interpolate(0.5 * true_current(V.mesh()) + as_vector((0.3 * cos(3 * x), y * x))),
        Function(V).interpolate(as_vector((sin(3 * x) * cos(2 * y), exp(-x) * y))),
    )


def _moving_pictures(problem, z: np.ndarray, raster: Raster, out):
    """The magnetic field at some times; each time rank makes pictures of its own states. What is returned writes
    them, on the first rank.
    """
    spacetime, slab, ev = problem.spacetime, problem.rf.problem.sweeps.slab, problem.evolution
    wanted = np.unique(np.linspace(1, ev.nsteps, min(FRAMES, ev.nsteps)).round().astype(int))
    state, own = Function(ev.V), {}
    mine = wanted[(wanted > slab.lo) & (wanted <= slab.hi)]
    for first, block in problem.rf.problem.states(z):
        for n in mine[(mine - slab.lo >= first) & (mine - slab.lo < first + len(block))]:
            put(state, block[n - slab.lo - first])
            own[int(n)] = raster(state.subfunctions[B])
    images = gather_images(own, spacetime)

    def write() -> None:
        numbers, frames = list(images), list(images.values())
        titles = [f"B at t = {float(ev.time(n)):.3f}" for n in numbers]
        animate(out / "field.gif", frames, titles, raster.extent, label="B")
        chosen = np.unique(np.linspace(0, len(frames) - 1, min(SNAPSHOTS, len(frames))).round().astype(int))
        plot_snapshots(
            out / "snapshots.png", [frames[i] for i in chosen], [titles[i] for i in chosen], raster.extent, label="B"
        )

    return write


def _paraview(problem, named, z, out, outputs) -> None:
    """Fields for ParaView, written by their owners: the trajectory and the controls by their names."""
    ev, spacetime = problem.evolution, problem.spacetime
    times = ev.time(np.arange(ev.nsteps + 1))
    slab, states = problem.rf.problem.sweeps.slab, problem.rf.problem.states(z)
    outputs("fields", write_fields, out / "fields", "field", states, ev.V, slab, spacetime, times)
    for name, function in named.items():
        function.rename(name)
    work = write_functions if spacetime.time_comm.rank == 0 else lambda *_: None
    outputs("fields", work, out / "fields" / "current.pvd", list(named.values()), spacetime.space_comm)

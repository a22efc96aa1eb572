"""Pictures, files and summary of the heat source inversion."""

from __future__ import annotations

import time

import numpy as np
from firedrake import Function, assemble, dx, inner

from demos.curves import plot_convergence, plot_sensors
from demos.inversion import sum_of_counts
from demos.outputs import write_json
from demos.pictures import Raster, plot_fields
from demos.posterior_report import posterior_summary, regularisation_picture
from pint_fem.kernels.arrays import get
from pint_fem.paraview import write_fields, write_functions
from problems.heat_readings import READINGS

__all__ = ["UNIT", "convergence_picture", "mgrit_summary", "report", "result_summary"]

UNIT = "source in 10 kW/m³"
"""The unit of the source follows from those of the plate (:mod:`problems.plate`), the temperature being in K."""


def report(problem, result, posterior, opts, summary: dict, say, outputs) -> None:
    """Write everything; ``summary`` is completed and written last. What cannot be written is reported at the end."""
    rf, spacetime, slab = problem.rf, problem.spacetime, problem.rf.problem.sweeps.slab
    sweeps = rf.problem.sweeps
    q, truth, out = rf.function(result.x), problem.true_source, opts.out
    shipped = summary["settings"]["readings"] == str(READINGS)
    predicted = problem.sensors.readings(rf.problem.observations(result.x, problem.sensors))
    misfit = rf.problem.parts
    summary["result"] = result_summary(rf, result, predicted, problem.readings.values)
    if shipped:  # the true source is known
        error = np.sqrt(assemble(inner(q - truth, q - truth) * dx) / assemble(inner(truth, truth) * dx))
        summary["result"]["relative_source_error"] = float(error)
        say(f"relative L2 error of the recovered source {error:.3f}; misfit {misfit['misfit']:.4f} (0.5 is the noise)")
    band, noise = None, 0.0
    if posterior is not None:
        summary["posterior"] = posterior_summary(posterior, result, say, truth=get(truth) if shipped else None)
        band = posterior.predict(posterior.F).standard_deviation.reshape(predicted.shape)
        noise = float(np.sqrt(posterior.noise.variance()[0]))
    mgrit_summary(problem, summary, say)

    outputs.on_root("summary.json", write_json, out / "summary.json", summary)  # before anything else can fail
    raster = Raster(problem.evolution.V.mesh())
    images, deviations = [], []
    if spacetime.time_comm.rank == 0:
        if posterior is not None:
            deviations = [("standard deviation", raster(rf.function(result.standard_deviation)))]
        images = [("true source", raster(truth))] if shipped else []
        images += [("recovered source", raster(q))]
        if shipped:
            images.append(("recovered - true", raster(Function(truth.function_space()).assign(q - truth))))

    def pictures():
        given = dict(points=problem.readings.points, deviations=deviations, label=UNIT)
        plot_fields(out / "source.png", images, raster.extent, **given, rows=2 if deviations and shipped else 1)
        names = [str(name) for name in problem.readings.sensors]
        readings = problem.readings.times, problem.readings.values, predicted
        shown = dict(names=names, quantity="temperature rise in K", deviation=band, noise=noise)
        plot_sensors(out / "sensors.png", *readings, **shown)
        if posterior is None:
            convergence_picture(out / "convergence.png", sweeps, result, summary)
        else:
            regularisation_picture(out / "l_curve.png", posterior, summary["posterior"])

    outputs.on_root(f"pictures in {out}", pictures)
    if not opts.no_fields:
        states, times = rf.problem.states(result.x), problem.evolution.time(np.arange(opts.steps + 1))
        given = (out / "fields", "temperature", states, problem.evolution.V, slab, spacetime, times)
        outputs("fields", write_fields, *given)
        q.rename("recovered_source")
        truth.rename("true_source")
        shown = [q, truth] if shipped else [q]
        if posterior is not None:
            deviation = rf.function(result.standard_deviation)
            deviation.rename("standard_deviation")
            shown.append(deviation)
        work = write_functions if spacetime.time_comm.rank == 0 else lambda *_: None
        outputs("fields", work, out / "fields" / "source.pvd", shown, spacetime.space_comm)
    if opts.compare_serial:
        from problems.compare_serial import compare

        start = time.perf_counter()
        summary["compare_serial"] = compare(problem, result, summary["settings"], summary["seconds"], say)
        summary["seconds"]["comparison"] = time.perf_counter() - start
    outputs.on_root("summary.json", write_json, out / "summary.json", summary)
    outputs.finish(out, opts.next_step)


def result_summary(rf, result, predicted, measured) -> dict:
    """The minimisation in plain values; predicted and measured readings are arrays of one shape."""
    return {
        "J": result.value,
        **rf.problem.parts,
        "gradient_norm": result.gradient_norm,
        "iterations": result.iterations,
        "converged": result.converged,
        "reason": str.__str__(result.reason),
        "rms_residual": float(np.sqrt(np.mean((predicted - measured) ** 2))),
        "history": [
            {"iteration": r.iteration, "J": r.value, "gradient_norm": r.gradient_norm, "cg": r.cg_iterations}
            for r in result.history
        ],
    }


def convergence_picture(path, sweeps, result, summary: dict) -> None:
    """Of the minimisation and the first sweep of each kind."""
    wanted = {}
    for kind, r in sweeps.results:
        if r.cycles and kind not in wanted:
            wanted[kind] = r.residuals
    bound = summary.get("mgrit", {}).get("two_level_bound")
    plot_convergence(path, result.history, wanted, bound=bound if bound and bound < 1 else None)


def mgrit_summary(problem, summary: dict, say) -> None:
    """Cycles and observed factors, beside the theory's bound over the problem's spectrum."""
    every = [leaf.sweeps for leaf in problem.rf.problem.leaves]
    sweeps, counts = every[0], sum_of_counts(every)
    summary["sweeps"] = counts
    levels, options = sweeps.solvers.adjoint.levels, sweeps.options
    if len(levels) == 1:
        return
    verdict = (sweeps.solvers.estimates or [None])[0]
    results = [r for own in every for _, r in own.results]
    factors = [r.factor for r in results if r.cycles > 1 and np.isfinite(r.factor)]
    solves = sum(n for kind, n in counts.items() if kind != "cycles")
    cycles = counts["cycles"] / solves if solves else None  # none where a finished run is read again
    summary["mgrit"] = {
        "levels": len(levels),
        "coarsening": [level.m for level in levels[:-1]],
        "relax": options.scheme(0),
        "rtol": options.rtol,
        "cycles_per_solve": cycles,
        "largest_observed_factor": max(factors, default=None),
        "two_level_bound": None if verdict is None else verdict.factor,
    }
    say(
        f"MGRIT: {solves} solves"
        + (f", {cycles:.1f} cycles each" if solves else "")
        + (f"; observed factor at most {max(factors):.4f}" if factors else "")
        + (f", two-level bound over the spectrum {verdict.factor:.4g}" if verdict else "")
    )

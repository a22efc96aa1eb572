"""Pictures, files and summary of the inversions for coefficients from several experiments."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from demos.curves import plot_sensors
from demos.heat_source_report import convergence_picture, mgrit_summary, result_summary
from demos.outputs import write_json
from demos.pictures import Raster, plot_fields
from pint_fem.paraview import write_functions
from problems.experiments import CoefficientProblem, relative_error

__all__ = ["coefficient_summary", "report"]

WIDTH = 200
"""Pixels of a field along its longer side."""


def report(
    problem: CoefficientProblem,
    result,
    opts,
    summary: dict,
    say: Callable,
    outputs,
    *,
    shipped: bool,
    quantity: str,
    sources: str,
    compare: Callable[[], dict] | None,
    further: Callable | None = None,
) -> None:
    """Write everything (collective); ``summary`` is completed and written last.

    Parameters
    ----------
    problem, result
        What was minimised, and the minimisation.
    opts, summary, say, outputs
        Options of the command line, the beginning of the summary, what prints a line, and the files.
    shipped
        Whether the coefficients behind the readings are known.
    quantity, sources
        What is read, with its unit, and what the experiments' sources are called.
    compare
        Compares with serial pyadjoint and returns the entry of the summary.
    further
        ``further(problem, result, out, summary, say, shipped=...)`` adds to the summary and returns what draws further
        pictures on the first rank (collective).

    Raises
    ------
    InputError
        On every rank, where something could not be written.
    """
    rf, out = problem.rf, opts.out
    predicted, measured = _flat(problem, problem.predicted(result.x))
    summary["result"] = result_summary(rf, result, predicted, measured)
    summary["result"]["noise"] = problem.data.deviation(summary["settings"]["noise"])
    found = rf.function(result.x)
    found = found if isinstance(found, list) else [found]
    summary["result"]["coefficients"] = coefficient_summary(problem, found, shipped, say)
    say(
        f"misfit {summary['result']['misfit']:.4f} (0.5 is the noise); residual {summary['result']['rms_residual']:.3g}"
        f" of standard deviation, noise {summary['result']['noise']:.3g}"
    )
    mgrit_summary(problem, summary, say)
    outputs.on_root("summary.json", write_json, out / "summary.json", summary)  # before anything else can fail
    images = _images(problem, found, shipped)
    data = problem.data.readings[0]
    more = None if further is None else further(problem, result, out, summary, say, shipped=shipped)

    def draw() -> None:
        points = np.unique(np.concatenate([r.points for r in problem.data.readings]), axis=0)
        for c, (extent, own) in zip(problem.coefficients, images, strict=True):
            shown = dict(points=points, sources=(sources, problem.sources), label=c.label)
            plot_fields(out / f"{c.name.replace(' ', '_')}.png", own, extent, **shown)
        names = [f"{s}, experiment {e}" for e, r in enumerate(problem.data.readings) for s in r.sensors]
        per = predicted.shape[1] // len(names)
        names = [name for name in names for _ in range(per)]
        shown = dict(names=names, quantity=quantity, chosen=_series(predicted, len(problem.data.readings)))
        plot_sensors(out / "sensors.png", data.times, measured, predicted, **shown)
        convergence_picture(out / "convergence.png", rf.problem.leaves[0].sweeps, result, summary)

    outputs.on_root(f"pictures in {out}", draw)
    if more is not None:
        outputs.on_root(f"further pictures in {out}", more)
    if not opts.no_fields:
        shown = []
        for c, f in zip(problem.coefficients, found, strict=True):
            f.rename(f"recovered {c.name}".replace(" ", "_"))
            shown.append(f)
        work = write_functions if problem.spacetime.owns_static else lambda *_: None
        outputs("fields", work, out / "fields" / "coefficients.pvd", shown, problem.spacetime.space_comm)
    if compare is not None:
        start = time.perf_counter()
        summary["compare_serial"] = compare()
        summary["seconds"]["comparison"] = time.perf_counter() - start
    outputs.on_root("summary.json", write_json, out / "summary.json", summary)
    outputs.finish(out, opts.next_step)


def coefficient_summary(problem: CoefficientProblem, found: list, shipped: bool, say: Callable) -> dict:
    """Errors of the coefficients and the contrasts of their inclusions in plain values (collective)."""
    out: dict[str, dict] = {}
    for c, f in zip(problem.coefficients, found, strict=True):
        out[c.name] = own = {}
        if not shipped:
            continue
        own["relative_error"] = relative_error(f, c.truth)
        say(f"{c.name}: relative L2 error {own['relative_error']:.3f} of the control")
        own["inclusions"] = {}
        for inclusion in c.inclusions:
            contrast = inclusion.recovered(c.factor(f), f.function_space().mesh())
            own["inclusions"][inclusion.name] = {"contrast": contrast, "true_contrast": inclusion.contrast}
            apart = 100 * (contrast / inclusion.contrast - 1)
            say(f"  {inclusion.name}: contrast {contrast:.3f}, true {inclusion.contrast:.3f} ({apart:+.1f}%)")
    return out


def _flat(problem: CoefficientProblem, predicted: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Predicted and measured readings ``(times, series)``, where all experiments have the same number of times."""
    flat = lambda tables: np.ma.concatenate([np.ma.asarray(t).reshape(len(t), -1) for t in tables], axis=1)
    return np.asarray(flat(predicted)), flat([r.values for r in problem.data.readings])


def _series(predicted: np.ndarray, experiments: int, show: int = 6) -> list[int]:
    """Numbers of the series that are drawn: in some experiments one that is larger than nine tenths of the others."""
    series, sizes = np.array_split(np.arange(predicted.shape[1]), experiments), np.ptp(predicted, axis=0)
    some = np.unique(np.linspace(0, experiments - 1, min(show, experiments)).astype(int))
    return [int(series[e][np.argsort(sizes[series[e]])[int(0.9 * len(series[e]))]]) for e in some]


def _images(problem: CoefficientProblem, found: list, shipped: bool) -> list:
    """Extent and named images of each coefficient; ranks other than the first in time and of other groups of
    experiments make none.
    """
    if not problem.spacetime.owns_static:
        return [None] * len(found)
    out = []
    for c, f in zip(problem.coefficients, found, strict=True):
        raster = Raster(f.function_space().mesh(), width=WIDTH)
        images = [(f"true {c.name}", raster(c.shown(c.truth)))] if shipped else []
        images.append((f"recovered {c.name}", raster(c.shown(f))))
        if shipped:
            images.append(("recovered - true", raster(c.shown(f) - c.shown(c.truth))))
        out.append((raster.extent, images))
    return out

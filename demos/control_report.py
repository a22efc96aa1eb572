"""Pictures, files and summary of the demos of optimal control."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from firedrake import Constant, Function
from mpi4py import MPI

from demos.control_pictures import Course, Row, plot_controls, plot_rows
from demos.curves import plot_convergence
from demos.inversion import sum_of_counts
from demos.outputs import write_json
from demos.pictures import Raster, animate, gather_images
from pint_fem.kernels.arrays import is_real, put
from pint_fem.paraview import write_fields
from problems.control import ControlProblem

__all__ = ["Labels", "courses", "report", "tracking"]

WIDTH, COLUMNS, FRAMES = 120, 6, 32
AT_BOUND = 1e-6
"""Distance from a bound, relative to the distance of the bounds or the largest value, up to which a value is at it."""


@dataclass(frozen=True)
class Labels:
    """Names in the pictures of a problem.

    Attributes
    ----------
    state, control, tracked : str
        The shown part of the state, the control and the running functional, with their units.
    edges : tuple of ndarray
        Ends ``(2, 2)`` of the parts of the boundary on which each control acts, where that is what they do.
    """

    state: str
    control: str
    tracked: str
    edges: tuple[np.ndarray, ...] = ()


def report(
    problem: ControlProblem,
    result: Any,
    opts,
    summary: dict,
    say: Callable,
    outputs,
    *,
    labels: Labels,
    compare: Callable[[], dict] | None = None,
) -> None:
    """Write everything (collective); ``summary`` is completed and written last.

    Parameters
    ----------
    problem, result
        What was minimised, and the minimisation.
    opts, summary, say, outputs
        Options of the command line, the beginning of the summary, what prints a line, and the files.
    labels
        Names in pictures.
    compare
        Compares with serial pyadjoint and returns the entry of the summary.

    Raises
    ------
    InputError
        On every rank, where something could not be written.
    """
    rf, ev, out = problem.rf, problem.evolution, opts.out
    zero, raster = np.zeros_like(result.x), Raster(ev.V.mesh().unique(), width=WIDTH)
    wanted = np.unique(np.linspace(0, ev.nsteps, FRAMES + 1).round().astype(int))
    without = tracking(problem, zero)
    free = _state_images(problem, zero, raster, wanted)
    tracked = {"with control": tracking(problem, result.x), "without control": without}
    images = _state_images(problem, result.x, raster, wanted)
    found = courses(problem, result.x)
    fields = [q for q in ev.controls if not is_real(q.function_space())]
    acts = _control_images(problem, result.x, fields[0], raster, wanted) if fields else {}
    target = _target_images(problem, raster, wanted)
    rf.problem.value(result.x)
    summary["result"] = _result(problem, result, found, tracked)
    summary["sweeps"] = sum_of_counts([rf.problem.sweeps])
    for line in _sentences(problem, found, tracked):
        say(line)
    outputs.on_root("summary.json", write_json, out / "summary.json", summary)  # before anything else can fail

    def pictures() -> None:
        times = ev.time(np.arange(ev.nsteps + 1))
        shown = dict(bounds=problem.bounds, quantity=labels.control, tracked_quantity=labels.tracked)
        plot_controls(out / "control.png", times, found, tracked, **shown)
        first = 0 if _is_drawn(images[0]) else 1
        some = wanted[np.unique(np.linspace(first, len(wanted) - 1, COLUMNS).round().astype(int))]
        rows = _rows(problem, labels, some, target, free, images, acts)
        # a heater's power at a time is that of the step that ends there, at the beginning that of the first one
        edges = [(e, course.high[np.maximum(some, 1) - 1]) for e, course in zip(labels.edges, found, strict=False)]
        plot_rows(out / "states.png", times[some], rows, raster.extent, edges=edges, edge_quantity=labels.control)
        _movie(out / "movie.gif", ev, labels, raster, images, beside=target or free, name="target" if target else "")
        plot_convergence(out / "convergence.png", result.history, {})

    outputs.on_root(f"pictures in {out}", pictures)
    if not opts.no_fields:
        _paraview(problem, result.x, out, outputs)
    if compare is not None:
        start = time.perf_counter()
        summary["compare_serial"] = compare()
        summary["seconds"]["comparison"] = time.perf_counter() - start
    outputs.on_root("summary.json", write_json, out / "summary.json", summary)
    outputs.finish(out, opts.next_step)


# -- numbers -----------------------------------------------------------------------------------------------------------
def _over_time(problem: ControlProblem, own: np.ndarray) -> np.ndarray:
    """Values of all steps ``(N, ...)`` on all ranks, from those of the own steps, the same on all ranks in space."""
    return np.concatenate(problem.spacetime.time_comm.allgather(own))


def tracking(problem: ControlProblem, z: np.ndarray) -> np.ndarray:
    """Return the running functional at each step, ``(N,)``, on all ranks (collective)."""
    of = problem.rf.problem
    misfit = of.misfits[0]
    return _over_time(problem, misfit.point_values(of.observations(z, misfit))) / problem.evolution.dt


def courses(problem: ControlProblem, z: np.ndarray) -> list[Course]:
    """Return what each control is over time, on all ranks (collective)."""
    rf, space = problem.rf, problem.spacetime.space_comm
    low, high = problem.bounds or (None, None)
    out = []
    for q in problem.evolution.controls:
        rows, riesz = rf.layout.part(z, q), rf.inner.maps[q]
        least, largest = np.empty(len(rows)), np.empty(len(rows))
        space.Allreduce(rows.min(axis=1, initial=np.inf), least, op=MPI.MIN)
        space.Allreduce(rows.max(axis=1, initial=-np.inf), largest, op=MPI.MAX)
        near = AT_BOUND * (high - low if None not in (low, high) else float(np.abs(_over_time(problem, largest)).max()))
        at_lower = np.zeros(len(rows)) if low is None else (rows <= low + near).sum(axis=1)
        at_upper = np.zeros(len(rows)) if high is None else (rows >= high - near).sum(axis=1)
        squares = np.array([riesz.dual(row) @ row for row in rows])
        sums = space.allreduce(np.stack([squares, at_lower, at_upper, np.full(len(rows), rows.shape[1])]))
        size, at_lower, at_upper = np.sqrt(sums[0]), sums[1] / sums[3], sums[2] / sums[3]
        over_time = [_over_time(problem, v) for v in (least, largest, size, at_lower, at_upper)]
        out.append(Course(q.name(), *over_time))
    return out


def _result(problem: ControlProblem, result: Any, found: list[Course], tracked: dict[str, np.ndarray]) -> dict:
    """The minimisation in plain values."""
    dt = problem.evolution.dt
    of_controls = {}
    for course in found:
        of_controls[course.name] = {
            "least": course.low.min(),
            "largest": course.high.max(),
            "norm": np.sqrt(dt * np.sum(course.size**2)),
            "at_lower_bound": course.at_lower.mean(),
            "at_upper_bound": course.at_upper.mean(),
        }
    return {
        "J": result.value,
        **problem.rf.problem.parts,
        "gradient_norm": result.gradient_norm,
        "iterations": result.iterations,
        "converged": result.converged,
        "reason": str.__str__(result.reason),
        "choice": result.choice,
        "calls": {
            "evaluations": result.value_calls,
            "gradients": result.gradient_calls,
            "hessian_actions": result.hessian_calls,
        },
        "controls": of_controls,
        "tracked": {name: {"mean": values.mean(), "last": values[-1]} for name, values in tracked.items()},
        "history": [
            {"iteration": r.iteration, "J": r.value, "gradient_norm": r.gradient_norm, "cg": r.cg_iterations}
            for r in result.history
        ],
    }


def _sentences(problem: ControlProblem, found: list[Course], tracked: dict[str, np.ndarray]) -> Iterator[str]:
    """What was reached, for the terminal."""
    own, without = tracked["with control"], tracked["without control"]
    yield f"mean of the running functional {own.mean():.4g}, without a control {without.mean():.4g}"
    yield f"at the end {own[-1]:.4g}, without a control {without[-1]:.4g}"
    for course in found:
        active = ""
        if problem.bounds is not None:
            active = f"; at the lower bound {100 * course.at_lower.mean():.0f}%, at the upper one "
            active += f"{100 * course.at_upper.mean():.0f}%"
        yield f"{course.name}: from {course.low.min():.4g} to {course.high.max():.4g}{active}"


# -- images ------------------------------------------------------------------------------------------------------------
def _images(
    problem: ControlProblem, blocks: Iterable[tuple[int, np.ndarray]], make: Callable, wanted: np.ndarray
) -> dict[int, np.ndarray]:
    """Images of rows of local points by ``make(row)``, on the first rank (collective); each rank makes those of its own
    points.
    """
    slab, own = problem.rf.problem.sweeps.slab, {}
    mine = wanted[((wanted > slab.lo) & (wanted <= slab.hi)) | ((wanted == 0) & slab.is_first)]
    for first, block in blocks:
        for n in mine[(mine - slab.lo >= first) & (mine - slab.lo < first + len(block))]:
            own[int(n)] = make(block[n - slab.lo - first])
    return gather_images(own, problem.spacetime)


def _state_images(problem: ControlProblem, z: np.ndarray, raster: Raster, wanted: np.ndarray) -> dict[int, np.ndarray]:
    """Images of the shown part of the state."""
    state = Function(problem.evolution.V)
    shown = problem.forms.shown(state)

    def make(row: np.ndarray) -> np.ndarray | None:
        put(state, row)
        return raster(shown)

    return _images(problem, problem.rf.problem.states(z), make, wanted)


def _control_rows(problem: ControlProblem, z: np.ndarray, control: Function) -> list[tuple[int, np.ndarray]]:
    """The control of the step that ends at a point, in the form of a block of states; at the first point that of the
    first step.
    """
    rows = problem.rf.layout.part(z, control)
    return [(0, np.concatenate([rows[:1], rows]))]


def _control_images(
    problem: ControlProblem, z: np.ndarray, control: Function, raster: Raster, wanted: np.ndarray
) -> dict[int, np.ndarray]:
    """Images of a field."""
    f = Function(control.function_space())

    def make(row: np.ndarray) -> np.ndarray | None:
        put(f, row)
        return raster(f)

    return _images(problem, _control_rows(problem, z, control), make, wanted)


def _target_images(problem: ControlProblem, raster: Raster, wanted: np.ndarray) -> dict[int, np.ndarray]:
    """Images of the target, on the first rank; none where it is zero."""
    if problem.forms.target is None:
        return {}
    if problem.spacetime.time_comm.rank:
        return {}
    t = Constant(0.0)
    shown, out = problem.forms.target(t), {}
    for n in wanted:
        t.assign(float(problem.evolution.time(n)))
        out[int(n)] = raster(shown)
    return out


def _is_drawn(image: np.ndarray) -> bool:
    """Whether an image is not zero everywhere."""
    return bool(np.nanmax(np.abs(image)) > 0)


def _rows(problem: ControlProblem, labels: Labels, some, target, free, images, acts) -> list[Row]:
    """The rows of the picture of states at some points."""
    at = lambda found: [found[int(n)] for n in some]
    rows = [Row("target", at(target), labels.state)] if target else []
    rows += [Row("without control", at(free), labels.state)] if any(map(_is_drawn, at(free))) else []
    rows.append(Row("state", at(images), labels.state))
    if target:
        apart = [a - b for a, b in zip(at(images), at(target), strict=True)]
        rows.append(Row("state - target", apart, "difference"))
    if acts:
        rows.append(Row("control", at(acts), labels.control))
    if acts and problem.bounds is not None:
        low, high = (sign * np.inf if b is None else b for sign, b in zip((-1, 1), problem.bounds, strict=True))
        near = 1e-3 * (
            high - low if np.isfinite(high - low) else max(float(np.nanmax(np.abs(i))) for i in acts.values())
        )
        active = [(image >= high - near).astype(float) - (image <= low + near) for image in at(acts)]
        rows.append(Row("active set", active, ""))
    return rows


def _movie(path, ev, labels: Labels, raster: Raster, images, *, beside: dict[int, np.ndarray], name: str) -> None:
    """The state, with the target or the state without a control to the left of it."""
    left, right, bottom, top = raster.extent
    gap = np.full((raster.shape[0], raster.shape[1] // 16), np.nan)
    frames = [np.hstack([beside[n], gap, images[n]]) for n in images]
    wide = (left, left + (right - left) * frames[0].shape[1] / raster.shape[1], bottom, top)
    titles = [f"{name or 'without control'} | state, t = {float(ev.time(n)):.2f}" for n in images]
    animate(path, frames, titles, wide, label=labels.state, size=(8.2, 4.0))


# -- files -------------------------------------------------------------------------------------------------------------
def _paraview(problem: ControlProblem, z: np.ndarray, out, outputs) -> None:
    """Trajectories of the state and of controls that are fields; the control of a step is at the point at its end."""
    ev, spacetime, slab = problem.evolution, problem.spacetime, problem.rf.problem.sweeps.slab
    times = ev.time(np.arange(ev.nsteps + 1))
    states = problem.rf.problem.states(z)
    outputs("fields", write_fields, out / "fields", "state", states, ev.V, slab, spacetime, times)
    for q in ev.controls:
        if not is_real(q.function_space()):
            given = _control_rows(problem, z, q), q.function_space(), slab, spacetime, times
            outputs("fields", write_fields, out / "fields", q.name().replace(" ", "_"), *given)

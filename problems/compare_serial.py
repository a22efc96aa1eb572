"""A source inversion beside plain serial Firedrake + pyadjoint: same numbers? how much faster?

The serial opponent runs on the first rank, whole and alone, while the others sleep. Fields are compared there by
their nodes' coordinates, so in this comparison (and nowhere else) fields are brought together: the opponent holds
them whole anyway.
"""

from __future__ import annotations

import time

import numpy as np
from firedrake import COMM_SELF, Cofunction, Function, SpatialCoordinate, VectorFunctionSpace, cos, sin

from pint_fem.cli import wait_quietly
from pint_fem.kernels.arrays import get
from problems.plate import true_source

__all__ = ["LIMITS", "agreement", "apart", "compare", "difference", "nodes_of", "together"]

#: Relative differences that tight tolerances allow.
LIMITS = {"J": 1e-8, "gradient": 1e-8, "Hessian action": 1e-7, "recovered source": 1e-4}


def compare(problem, result, settings: dict, seconds: dict, say, *, record=None, points=None) -> dict:
    """Solve serially and compare.

    Parameters
    ----------
    problem, result
        The posed problem (:class:`~problems.heat_source.HeatSource` or one with the same parts; its control is in P1, a
        number or a vector) and its minimisation.
    settings
        Arguments of what posed it.
    seconds
        Of our parts: ``"inversion"``.
    say
        Prints a line on the first rank.
    record
        Records the serial problem from the settings and ``comm``; default: that of the heat source.
    points
        A control and a direction in a space, the same on every mesh.

    Returns
    -------
    dict
        Values, relative differences, seconds of both and ratios; empty but on the first rank.
    """
    rf, spacetime = problem.rf, problem.spacetime
    V = problem.evolution.control.function_space()
    record, points = record or _heat_source, points or _points
    ours = _ours(rf, V, points)
    fields = {name: together(spacetime, V, field) for name, field in {**ours.pop("fields"), "source": result.x}.items()}
    table = {}
    if spacetime.is_root:
        table = _serial(fields, ours, result, lambda: record(**settings, comm=COMM_SELF), points, seconds, say)
    wait_quietly(spacetime.comm)
    return table


def agreement(rows: dict[str, tuple[float, float]], ours: dict[str, float], say) -> dict:
    """Print and return the differences between our quantities and the serial tape's, and the times of both.

    Parameters
    ----------
    rows
        By name, the relative difference and the serial seconds.
    ours
        By name, our seconds.
    say
        Prints a line.
    """
    say(f"{'':18} {'difference':>11} {'allowed':>8} {'ours s':>9} {'serial s':>9} {'ratio':>7}")
    table: dict = {}
    for name, (apart, theirs) in rows.items():
        mine = ours[name]
        say(f"{name:18} {apart:11.2e} {LIMITS[name]:8.0e} {mine:9.3f} {theirs:9.3f} {theirs / mine:7.1f}")
        table[name] = {
            "relative_difference": apart,
            "allowed": LIMITS[name],
            "seconds": mine,
            "serial_seconds": theirs,
            "ratio": theirs / mine,
        }
    missed = [name for name, row in table.items() if not row["relative_difference"] <= row["allowed"]]
    say(f"more different than allowed: {', '.join(missed)}" if missed else "all agree")
    return table


def _points(V) -> tuple[Function, Function]:
    """A control and a direction given by formulas, the same on every mesh."""
    x = SpatialCoordinate(V.mesh())
    return Function(V).interpolate(0.5 * true_source(x) + cos(3 * x[0])), Function(V).interpolate(
        5 * sin(3 * x[0]) * cos(2 * x[1])
    )


def _timed(call):
    start = time.perf_counter()
    return call(), time.perf_counter() - start


def _heat_source(**settings):
    from problems.serial_pyadjoint import serial_heat_source

    return serial_heat_source(**settings)


def _ours(rf, V, points) -> dict:
    """``J``, ``J'``, ``J'' h`` at a formula's control, each timed (from a cold start) over all ranks."""
    m, h = points(V)
    z, dz, barrier = get(m), get(h), rf.spacetime.comm.barrier
    rf.problem.invalidate()
    out, fields, timings = {}, {}, {}
    for name, call in (
        ("J", lambda: rf.problem.value(z)),
        ("gradient", lambda: rf.problem.derivative(z)),
        ("Hessian action", lambda: rf.problem.hessian_action(z, dz)),
    ):
        barrier()
        value, timings[name] = _timed(lambda call=call: (call(), barrier())[0])
        (out if name == "J" else fields)[name] = value
    return out | {"fields": fields, "seconds": timings}


def together(spacetime, V, own: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Coordinates and values of a field with values at nodes, sorted, on the first rank."""
    nodes = nodes_of(V)
    parts = spacetime.space_comm.gather((nodes, own.reshape(len(nodes), -1)))
    if parts is None:
        return None
    return _sorted(np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts]))


def nodes_of(V) -> np.ndarray:
    """Return the coordinates of the own nodes of a space, scalar or vector-valued."""
    mesh, scalar = V.mesh(), V.sub(0) if V.value_size > 1 else V
    nodes = Function(VectorFunctionSpace(mesh, scalar.ufl_element())).interpolate(SpatialCoordinate(mesh))
    return get(nodes).reshape(-1, mesh.geometric_dimension)


def _sorted(coordinates: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    order = np.lexsort(np.round(coordinates, 10).T)
    return coordinates[order], values[order]


def difference(ours: tuple[np.ndarray, np.ndarray], theirs: Function | Cofunction) -> float:
    """Relative difference of nodal values."""
    V = theirs.function_space() if isinstance(theirs, Function) else theirs.function_space().dual()
    nodes = nodes_of(V)
    return apart(ours, _sorted(nodes, get(theirs).reshape(len(nodes), -1)))


def apart(ours: tuple[np.ndarray, np.ndarray], theirs: tuple[np.ndarray, np.ndarray]) -> float:
    """Relative difference of sorted nodal values, of :func:`together`."""
    if np.abs(theirs[0] - ours[0]).max() > 1e-8:
        raise RuntimeError("the meshes of the two solvers differ")
    return float(np.linalg.norm(theirs[1] - ours[1]) / np.linalg.norm(theirs[1]))


def _serial(fields, ours, result, record, points, seconds, say) -> dict:
    from problems.serial_minimise import minimise

    say("plain serial Firedrake + pyadjoint: recording the tape ...")
    serial = record()
    say(f"  recorded in {serial.seconds:.1f} s")
    m, h = points(serial.q.function_space())
    J, t_value = _timed(lambda: float(serial.rf(m)))
    gradient, t_gradient = _timed(serial.rf.derivative)
    say("  one Hessian action ...")
    hessian, t_hessian = _timed(lambda: serial.rf.hessian(h))
    say("  recovering the source by TAO's LMVM in the prior's inner product ...")
    optimum = minimise(serial, gttol=1e-9, printer=lambda line: say("  " + line))
    rows = {
        "J": (ours["J"], J, abs(ours["J"] - J) / abs(J), ours["seconds"]["J"], t_value),
        "gradient": (None, None, difference(fields["gradient"], gradient), ours["seconds"]["gradient"], t_gradient),
        "Hessian action": (
            None,
            None,
            difference(fields["Hessian action"], hessian),
            ours["seconds"]["Hessian action"],
            t_hessian,
        ),
        "recovered source": (
            result.value,
            optimum.value,
            difference(fields["source"], optimum.control),
            seconds["inversion"],
            optimum.seconds + serial.seconds,
        ),
    }
    say("")
    say(
        f"{'':18} {'ours':>16} {'serial':>16} {'difference':>11} {'allowed':>8} "
        f"{'ours s':>9} {'serial s':>9} {'ratio':>7}"
    )
    table = {}
    for name, (a, b, apart, mine, theirs) in rows.items():
        numbers = [f"{x:16.9e}" if x is not None else f"{'':16}" for x in (a, b)]
        say(
            f"{name:18} {numbers[0]} {numbers[1]} {apart:11.2e} {LIMITS[name]:8.0e} "
            f"{mine:9.3f} {theirs:9.3f} {theirs / mine:7.1f}"
        )
        table[name] = {
            "ours": a,
            "serial": b,
            "relative_difference": apart,
            "allowed": LIMITS[name],
            "seconds": mine,
            "serial_seconds": theirs,
            "ratio": theirs / mine,
        }
    say(
        f"serial: {optimum.iterations} iterations, {optimum.evaluations} evaluations; "
        f"ours: {result.iterations} iterations, {result.hessian_calls} Hessian actions"
    )
    missed = [name for name, limit in LIMITS.items() if not table[name]["relative_difference"] <= limit]
    say(f"more different than allowed: {', '.join(missed)}" if missed else "all agree")
    table["serial_iterations"] = optimum.iterations
    table["serial_evaluations"] = optimum.evaluations
    return table

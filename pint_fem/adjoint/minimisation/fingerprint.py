"""A few numbers that identify a minimisation problem, the same on any number of time ranks.

Inner products, bounds and constraints are identified by their action on a fixed vector, forms by UFL's signature, and
the data in them (coefficients, constants, coordinates) by weighted sums of squares. Numbers are equal if
their difference is within the round-off of sums in another order.
"""

from __future__ import annotations

import re
import zlib

import numpy as np
from firedrake import dx, inner
from mpi4py import MPI
from tsfc.ufl_utils import extract_firedrake_constants
from ufl.algorithms import extract_coefficients

from pint_fem.adjoint.interface import ControlProblem
from pint_fem.adjoint.minimisation.objective import Objective
from pint_fem.evolution.boundary import boundary_value
from pint_fem.evolution.control_layout import ControlLayout
from pint_fem.evolution.evolution import Evolution
from pint_fem.kernels.arrays import condition_rows, get
from pint_fem.optimize.constraints import AffineConstraints

__all__ = [
    "bound_numbers",
    "constraint_numbers",
    "control_label",
    "evolution_numbers",
    "inner_number",
    "map_numbers",
    "probe",
]

_SENSORS = 32
"""Sensors whose functionals are in memory at the same time."""
_DEFAULT_NAME = re.compile(r"(function|w)_\d+")  # Firedrake's and UFL's: numbers of a counter of the process


def control_label(name: str, shape: tuple[int, ...]) -> str:
    """The shape of a control, after its name if the user gave one."""
    return f"{'' if _DEFAULT_NAME.fullmatch(name) else name}{list(shape)}"


def probe(layout: ControlLayout) -> np.ndarray:
    """A vector with entries between 1/2 and 3/2 that depends on the numbering of the space ranks only."""
    out = np.empty(layout.size)
    for control in layout.evolution.controls:
        part = layout.part(out, control)
        first, _ = control.function_space().dof_dset.layout_vec.getOwnershipRange()
        rows = np.arange(layout.slab.lo, layout.slab.hi)[:, None] if part.ndim == 2 else 0
        part[...] = 1 + 0.5 * np.cos(first + np.arange(part.shape[-1]) + 0.7 * rows)
    return out


def inner_number(layout: ControlLayout, objective: Objective) -> float:
    """The squared norm of the functional whose coefficients are the probe."""
    dual = probe(layout)
    return layout.pairing(dual, objective.representative(dual))


def bound_numbers(layout: ControlLayout, side: np.ndarray | float) -> dict[str, float]:
    """Weighted means of a bound: of its finiteness, and of its positive and negative parts where it is finite."""
    weights, ones = probe(layout), np.ones(layout.size)
    side = np.broadcast_to(side, layout.size)
    finite = np.isfinite(side)
    side, total = np.where(finite, side, 0.0), layout.pairing(weights, ones)
    means = {"finite": finite * ones, "positive": np.maximum(side, 0), "negative": np.minimum(side, 0)}
    return {name: layout.pairing(weights, part) / total for name, part in means.items()}


def constraint_numbers(
    layout: ControlLayout, constrained: AffineConstraints, values: list[float]
) -> dict[str, float | list[float]]:
    """Values of affine constraints, and squared norms of the projections of the probe on their set and null space."""
    p = probe(layout)
    ends = {
        "nearest": p + constrained.feasible(p),
        "null space": p + constrained.project(p),
    }  # with p: not only round-off
    return {"values": values} | {name: constrained.inner(v, v) for name, v in ends.items()}


def evolution_numbers(evolution: Evolution, comm: MPI.Comm) -> dict:
    """The problem of an evolution: signatures of residual and boundary values, their data, the tableau and the mesh.

    Parameters
    ----------
    evolution : Evolution
        The evolution; its controls, the state and the time are left out, as their values change in a run.
    comm : mpi4py communicator
        Communicator in space (collective).

    Returns
    -------
    dict
        Numbers and texts by name, for JSON.
    """
    mesh, (form, rate) = evolution.V.mesh().unique(), evolution.parts()
    values = [boundary_value(bc) for bc in evolution.bcs]
    forms = {"residual": form}
    forms |= {f"boundary value {i}": inner(value, value) * dx(domain=mesh) for i, value in enumerate(values)}
    moving = {evolution.u, rate, evolution.t, *evolution.controls}
    signatures, data = {}, {}
    for name, given in forms.items():
        signatures[name] = given.signature()[:16]
        fixed = [f for f in extract_coefficients(given) if f not in moving]
        data |= {f"coefficient {i} of {name}": _sums(f, comm) for i, f in enumerate(fixed)}
        constants = [float(v) for c in extract_firedrake_constants(given) for v in np.ravel(c.values())]
        if constants:
            data[f"constants of {name}"] = constants
    rows = [len(condition_rows(bc)) for bc in evolution.bcs]
    dirk = evolution.dirk
    out = {
        "forms": signatures,
        "data of the evolution": data,
        "tableau": [np.asarray(part, float).tolist() for part in (dirk.A, dirk.b, dirk.c)],
        "mesh": _sums(mesh.coordinates, comm),
        "boundary unknowns": comm.allreduce(np.array(rows, dtype=int)).tolist() if rows else [],
    }
    if evolution.initial_control is None:
        out["initial condition"] = _sums(evolution.initial, comm)
    return out


def map_numbers(problem: ControlProblem) -> dict:
    """The problem of a map from controls to readings: evolutions, controls, sensors and times of readings (collective).

    What was measured, weights and the regularisation are left out.

    Parameters
    ----------
    problem : ControlProblem
        The problem of one evolution or a composed one, whose misfits are readings of sensors.

    Returns
    -------
    dict
        Numbers and texts by name, for JSON.
    """
    layout, comm, controls = problem.layout, problem.spacetime.space_comm, problem.layout.evolution
    sizes = [c.function_space().dof_dset.layout_vec.getSize() for c in controls.controls]
    steps = ["one value per step, " * (c in controls.stepwise) for c in controls.controls]
    named = zip(controls.controls, sizes, steps, strict=True)
    out: dict = {
        "space ranks": comm.size,
        "controls": [step + control_label(c.name(), (size,)) for c, size, step in named],
    }
    ends = [problem.leaf_terms(z) for z in (np.zeros(layout.size), probe(layout))]
    for number, ((_, leaf, start), (_, _, end)) in enumerate(zip(*ends, strict=True)):
        where, ev = f" of evolution {number}" if len(ends[0]) > 1 else "", leaf.evolution
        found = {"dt": ev.dt, "t0": ev.t0, "number of steps": ev.nsteps}
        weights = probe(leaf.layout)
        found["dependence on the controls"] = [leaf.layout.pairing(weights, z**2) for z in (start, end)]
        for name, value in evolution_numbers(leaf.sweeps.evolution, comm).items():
            found |= value if isinstance(value, dict) else {name: value}
        for m, misfit in enumerate(leaf.misfits):
            found[f"number of sensors of misfit {m}"] = misfit.sensors
            found[f"times of misfit {m}"] = misfit.reading_times.tolist()
            found[f"missing readings of misfit {m}"] = zlib.crc32(np.packbits(misfit.present).tobytes())
            for first in range(0, misfit.sensors, _SENSORS):
                some = range(first, min(first + _SENSORS, misfit.sensors))
                sums = _sums_of_rows(misfit.impulses(np.array(some)), comm)
                found |= {f"sensor {i} of misfit {m}": own for i, own in zip(some, sums, strict=True)}
        out |= {name + where: value for name, value in found.items()}
    return out


def _sums(f, comm: MPI.Comm) -> list[float]:
    """Weighted sums of squares of a function's positive and negative values, over all ranks in space."""
    return _sums_of_rows(get(f)[None], comm)[0]


def _sums_of_rows(rows: np.ndarray, comm: MPI.Comm) -> list[list[float]]:
    """Weighted sums of squares of positive and negative values of each row of ``(k, n)``, over all ranks in space."""
    first = comm.exscan(rows.shape[1]) or 0
    weights = 1 + 0.5 * np.cos(first + np.arange(rows.shape[1]))
    with np.errstate(over="ignore"):
        own = np.array([[np.maximum(row, 0) ** 2 @ weights, np.minimum(row, 0) ** 2 @ weights] for row in rows])
    total = np.empty_like(own)
    comm.Allreduce(own, total, op=MPI.SUM)
    return total.tolist()

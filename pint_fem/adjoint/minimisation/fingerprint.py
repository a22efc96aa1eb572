"""A few numbers that identify a minimisation problem, the same on any number of time ranks.

Inner products, bounds and constraints are identified by their action on a fixed vector, forms by UFL's signature, and
the data in them (coefficients, constants, coordinates) by weighted sums of squares. Numbers are equal if
their difference is within the round-off of sums in another order.
"""

from __future__ import annotations

import re

import numpy as np
from firedrake import dx, inner
from mpi4py import MPI
from tsfc.ufl_utils import extract_firedrake_constants
from ufl.algorithms import extract_coefficients

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
    "probe",
]

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


def _sums(f, comm: MPI.Comm) -> list[float]:
    """Weighted sums of squares of a function's positive and negative values, over all ranks in space."""
    values = get(f)
    first = comm.exscan(len(values)) or 0
    weights = 1 + 0.5 * np.cos(first + np.arange(len(values)))
    with np.errstate(over="ignore"):
        own = np.array([weights @ np.maximum(values, 0) ** 2, weights @ np.minimum(values, 0) ** 2])
    total = np.empty_like(own)
    comm.Allreduce(own, total, op=MPI.SUM)
    return total.tolist()

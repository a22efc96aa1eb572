"""What tells one optimisation from another, in a few numbers that are the same on any number of time ranks.

Inner products, bounds and constraints are compared by what they do to a fixed vector, forms by UFL's signature, and
the data in them (coefficients, constants, coordinates) by weighted sums of squares. Numbers are the same if they
differ by no more than round-off of sums in another order may.
"""

from __future__ import annotations

import math
import re

import numpy as np
from firedrake import dx, inner
from mpi4py import MPI
from tsfc.ufl_utils import extract_firedrake_constants
from ufl.algorithms import extract_coefficients

from pint_fem.adjoint.control_layout import ControlLayout
from pint_fem.evolution.boundary import boundary_value
from pint_fem.evolution.evolution import Evolution
from pint_fem.kernels.arrays import condition_rows, get

__all__ = [
    "bound_numbers",
    "constraint_numbers",
    "control_label",
    "differences",
    "evolution_numbers",
    "inner_number",
    "probe",
]

_RTOL = 1e-9  # far above round-off, far below anything meant
_DEFAULT_NAME = re.compile(r"(function|w)_\d+")  # Firedrake's and UFL's: numbers of a counter of the process


def control_label(name: str, shape: tuple[int, ...]) -> str:
    """A control by its shape, and its name if the user gave one."""
    return f"{'' if _DEFAULT_NAME.fullmatch(name) else name}{list(shape)}"


def probe(layout: ControlLayout) -> np.ndarray:
    """A vector between 1/2 and 3/2 that depends on the numbering of the space ranks only."""
    out = np.empty(layout.size)
    for control in layout.evolution.controls:
        part = layout.part(out, control)
        first, _ = control.function_space().dof_dset.layout_vec.getOwnershipRange()
        rows = np.arange(layout.slab.lo, layout.slab.hi)[:, None] if part.ndim == 2 else 0
        part[...] = 1 + 0.5 * np.cos(first + np.arange(part.shape[-1]) + 0.7 * rows)
    return out


def inner_number(layout: ControlLayout, objective) -> float:
    """Squared norm of the functional whose coefficients are the probe."""
    dual = probe(layout)
    return layout.pairing(dual, objective.representative(dual))


def bound_numbers(layout: ControlLayout, side: np.ndarray | float) -> dict[str, float]:
    """Weighted means of a bound: of where it is finite, and of its positive and negative parts there."""
    weights, ones = probe(layout), np.ones(layout.size)
    side = np.broadcast_to(side, layout.size)
    finite = np.isfinite(side)
    side, total = np.where(finite, side, 0.0), layout.pairing(weights, ones)
    means = {"finite": finite * ones, "positive": np.maximum(side, 0), "negative": np.minimum(side, 0)}
    return {name: layout.pairing(weights, part) / total for name, part in means.items()}


def constraint_numbers(layout: ControlLayout, limited, values: list[float]) -> dict[str, float | list[float]]:
    """Values of affine constraints, and squared norms of what projections on their set and null space make of the
    probe.
    """
    p = probe(layout)
    ends = {"nearest": p + limited.feasible(p), "null space": p + limited.project(p)}  # with p: never mere round-off
    return {"values": values} | {name: limited.inner(v, v) for name, v in ends.items()}


def evolution_numbers(evolution: Evolution, comm) -> dict:
    """What an evolution computes: residual and boundary values as signatures, their data, the tableau and the mesh.

    Parameters
    ----------
    evolution
        Its controls, the state and the time are left out: they have other values as a run goes on.
    comm
        Communicator in space (collective).
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


def _sums(f, comm) -> list[float]:
    """Weighted sums of squares of a function's positive and of its negative values."""
    values = get(f)
    first = comm.exscan(len(values)) or 0
    weights = 1 + 0.5 * np.cos(first + np.arange(len(values)))
    with np.errstate(over="ignore"):
        own = np.array([weights @ np.maximum(values, 0) ** 2, weights @ np.minimum(values, 0) ** 2])
    total = np.empty_like(own)
    comm.Allreduce(own, total, op=MPI.SUM)
    return total.tolist()


def differences(kept: dict, given: dict) -> str:
    """What two descriptions have that is not the same; empty if there is none."""
    names = [name for name in {**given, **kept} if not _same(kept.get(name), given.get(name))]
    return "; ".join(f"{name}: the file has {kept.get(name)}, this run {given.get(name)}" for name in names)


def _same(a, b) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=_RTOL)
    return a == b

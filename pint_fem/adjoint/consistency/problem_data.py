r"""Check that all ranks were given the same evolution, misfits, regularisation and data.

Each rank takes its own steps with its own copy of the user's data. Data that differ between ranks (readings with other
noise, a coefficient that one rank has changed) would give value and derivative of no functional, without any error.
Meshes are compared by their parts and numbering (:mod:`pint_fem.meshes`), forms by UFL's signature, numbers and
readings bitwise on all ranks. Fields are compared by the ranks of one place in space by their norm and a weighted sum,
to a relative tolerance far above round-off (:mod:`~pint_fem.adjoint.consistency.control_values`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import ufl
from firedrake import Constant, dx, inner

from pint_fem.adjoint.consistency.control_values import compare_copies, norms_by_rank, sketch, sketch_weights
from pint_fem.collective import collectively, require_same
from pint_fem.errors import InputError
from pint_fem.evolution.boundary import boundary_value
from pint_fem.evolution.evolution import Evolution
from pint_fem.evolution.private_copies import PrivateCopies
from pint_fem.kernels.arrays import is_real
from pint_fem.meshes import require_same_meshes
from pint_fem.misfits.base import Misfit
from pint_fem.spacetime import SpaceTime

__all__ = ["require_same_forms", "require_same_given", "require_same_problem", "require_same_values"]

_DEFAULT_NAME = re.compile(r" '(function|constant|cofunction|w|c)_\d+'")
"""Names that count the objects of a process, and may differ between ranks."""


def require_same_problem(
    spacetime: SpaceTime, evolution: Evolution, misfits: Sequence[Misfit], regularisation: Sequence[ufl.Form]
) -> None:
    """Require the same mesh, evolution (as the user posed it), misfits and regularisation on all ranks, before anything
    is assembled (collective); otherwise all ranks raise ``InputError`` that names what differs.
    """
    if spacetime.comm.size == 1:
        return
    mesh = evolution.V.mesh().unique()
    require_same_meshes(spacetime.members, mesh)
    require_same(spacetime.comm, misfits=misfits, regularisation=len(regularisation))
    require_same_given(spacetime, misfits)
    values = [boundary_value(bc) for bc in evolution.bcs]
    if evolution.initial_expression is not None:
        values.append(evolution.initial_expression)
    forms = {"the residual": [evolution.parts()[0]]}
    forms["boundary values and the initial condition"] = [inner(v, v) * dx(domain=mesh) for v in values]
    require_same_forms(spacetime, **forms, **{"the regularisation": regularisation})


def require_same_forms(spacetime: SpaceTime, **forms: Sequence[ufl.Form]) -> None:
    """Require lists of forms, named by descriptions, to have the same signatures on all ranks (collective); otherwise
    all ranks raise ``InputError``.
    """
    if spacetime.comm.size > 1:
        require_same(spacetime.comm, **{f"the form of {name}": _signatures(of) for name, of in forms.items()})


def _signatures(forms: Sequence) -> list[str]:
    return [type(form).__name__ + (f" {form.signature()[:16]}" if isinstance(form, ufl.Form) else "") for form in forms]


def require_same_given(spacetime: SpaceTime, misfits: Sequence[Misfit]) -> None:
    """Require the same readings and other data of misfits outside forms on all ranks (collective); otherwise all ranks
    raise ``InputError``.
    """
    if spacetime.comm.size > 1:
        require_same(spacetime.comm, **collectively(spacetime.comm, "", _given, misfits))


def _given(misfits: Sequence[Misfit]) -> dict:
    """Data of misfits outside forms, by name."""
    out = {}
    for number, misfit in enumerate(misfits, start=1):
        which = f" (misfit {number} of {len(misfits)})" if len(misfits) > 1 else ""
        out |= {f"{name} of {type(misfit).__name__}{which}": value for name, value in misfit.given().items()}
    return out


def require_same_values(spacetime: SpaceTime, copies: PrivateCopies) -> None:
    """Require the user's functions, constants and cofunctions, of which a functional has private copies, to have the
    same current values on all ranks (collective, two small reductions); otherwise all ranks raise ``InputError``.
    """
    if spacetime.comm.size == 1:
        return
    exact, fields = {}, {}
    for number, (label, given, values) in enumerate(copies.given()):
        label = _DEFAULT_NAME.sub(" without a name", label)
        name = f"{label}, number {number}" if label in exact else label
        if isinstance(given, Constant) or is_real(given.function_space()):
            exact[name] = np.ravel(given.dat.data_ro).tolist()
        else:
            exact[name], fields[name] = None, np.ravel(values)
    require_same(spacetime.comm, **exact)
    if spacetime.time_size > 1 and fields:
        _require_near(spacetime, fields)


def _require_near(spacetime: SpaceTime, fields: dict[str, np.ndarray]) -> None:
    """Require the same own values on the ranks of one place in space, up to round-off (collective)."""
    sketches = np.array([sketch(values, sketch_weights(len(values))) for values in fields.values()])
    sizes = np.array([len(values) for values in fields.values()])
    numbers = np.column_stack([sketches, sizes * np.maximum(sketches[:, 0], 1.0)])
    _, differ = compare_copies(spacetime, numbers)
    if differ.any():
        first = int(np.argmax(differ))
        norms = norms_by_rank(spacetime.comm, numbers[first, 0])
        raise InputError(
            f"{list(fields)[first]} differs between ranks in time, which each hold a copy of it (norms of their own "
            f"values: {norms}): give all of them the same values"
        )

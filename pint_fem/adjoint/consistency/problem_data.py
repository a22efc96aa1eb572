r"""Whether all ranks were given the same problem: each takes its own steps with its own copy of the user's data.

Data that differ between ranks (readings with other noise, a coefficient that one rank has changed) would give the value
and the derivative of no functional, silently. Forms are compared by UFL's signature, numbers and readings bit by bit on
all ranks. Fields are compared as controls are (:mod:`~pint_fem.adjoint.consistency.control_values`)
by the ranks of one place in space: by
:math:`\|f\|` and :math:`(w, f)`, :math:`w_i = \cos i^2`, to a relative tolerance far above round-off.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import ufl
from firedrake import Constant, dx, inner
from mpi4py import MPI

from pint_fem.adjoint.consistency.control_values import RTOL, sketch, sketch_weights
from pint_fem.collective import collectively, require_same
from pint_fem.errors import InputError
from pint_fem.evolution.boundary import boundary_value
from pint_fem.evolution.evolution import Evolution
from pint_fem.evolution.private_copies import PrivateCopies
from pint_fem.kernels.arrays import is_real
from pint_fem.misfits.base import Misfit
from pint_fem.spacetime import SpaceTime

__all__ = ["require_same_forms", "require_same_given", "require_same_problem", "require_same_values"]

_DEFAULT_NAME = re.compile(r" '(function|constant|cofunction|w|c)_\d+'")  # numbers of a counter of the process


def require_same_problem(spacetime: SpaceTime, evolution: Evolution, misfits: Sequence[Misfit], regularisation) -> None:
    """Require the same steps, misfits and forms on all ranks, before anything is made of them (collective).

    Parameters
    ----------
    spacetime
        Process grid.
    evolution
        As the user posed it.
    misfits
        Of the functional.
    regularisation
        A functional, several, or ``None``.

    Raises
    ------
    InputError
        On every rank, naming what differs.
    """
    if spacetime.comm.size == 1:
        return
    require_same(spacetime.comm, misfits=misfits, regularisation=regularisation is not None)
    require_same_given(spacetime, misfits)
    mesh, values = evolution.V.mesh().unique(), [boundary_value(bc) for bc in evolution.bcs]
    if evolution.initial_expression is not None:
        values.append(evolution.initial_expression)
    forms = {"the residual": [evolution.parts()[0]]}
    forms["boundary values and the initial condition"] = [inner(v, v) * dx(domain=mesh) for v in values]
    several = isinstance(regularisation, (list, tuple))
    forms["the regularisation"] = list(regularisation) if several else [regularisation]
    require_same_forms(spacetime, **forms)


def require_same_forms(spacetime: SpaceTime, **forms: Sequence) -> None:
    """Require forms, by what they are, to have the same signatures on all ranks (collective).

    Raises
    ------
    InputError
        On every rank, naming what differs.
    """
    if spacetime.comm.size > 1:
        require_same(spacetime.comm, **{f"the form of {name}": _signatures(of) for name, of in forms.items()})


def require_same_given(spacetime: SpaceTime, misfits: Sequence[Misfit]) -> None:
    """Require the same readings, and what else misfits are given, on all ranks (collective).

    Raises
    ------
    InputError
        On every rank, naming what differs.
    """
    if spacetime.comm.size > 1:
        require_same(spacetime.comm, **collectively(spacetime.comm, "", _given, misfits))


def _given(misfits: Sequence[Misfit]) -> dict:
    """What misfits are given by themselves, by name."""
    out = {}
    for number, misfit in enumerate(misfits, start=1):
        which = f" (misfit {number} of {len(misfits)})" if len(misfits) > 1 else ""
        out |= {f"{name} of {type(misfit).__name__}{which}": value for name, value in misfit.given().items()}
    return out


def _signatures(forms: Sequence) -> list[str]:
    return [form.signature()[:16] if isinstance(form, ufl.Form) else type(form).__name__ for form in forms]


def require_same_values(spacetime: SpaceTime, copies: PrivateCopies) -> None:
    """Require the user's functions, constants and cofunctions to have the same values on all ranks (collective, two
    small reductions).

    Parameters
    ----------
    spacetime
        Process grid.
    copies
        Of the functional; what the user has now is compared.

    Raises
    ------
    InputError
        On every rank, naming the first that differs.
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
    """Require the same own values on the ranks of one place in space, to round-off (collective)."""
    numbers = np.array([_numbers(values) for values in fields.values()])
    ends = np.stack([numbers, -numbers])
    spacetime.time_comm.Allreduce(MPI.IN_PLACE, ends, op=MPI.MIN)
    low, high = ends[0], -ends[1]
    apart = (high - low > RTOL * np.maximum(high[:, :1], 1e-300)).any(axis=1)
    spacetime.comm.Allreduce(MPI.IN_PLACE, apart, op=MPI.LOR)
    if apart.any():
        first = int(np.argmax(apart))
        norms = spacetime.comm.allgather(float(numbers[first, 0]))
        shown = ", ".join(f"{norm:.9g} on rank {rank}" for rank, norm in enumerate(norms[:4]))
        raise InputError(
            f"{list(fields)[first]} differs between ranks in time, which each hold a copy of it (norms of their own "
            f"values: {shown}): give all of them the same values"
        )


def _numbers(values: np.ndarray) -> np.ndarray:
    """Norm, weighted sum and number of own values."""
    found = sketch(values, sketch_weights(len(values)))
    return np.append(found, len(values) * max(found[0], 1.0))

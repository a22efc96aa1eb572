"""Sums of functionals that share controls."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from mpi4py import MPI

from pint_fem.adjoint.composed import ComposedProblem, Selection
from pint_fem.adjoint.interface import SweptProblem, Term
from pint_fem.collective import require_same
from pint_fem.errors import InputError
from pint_fem.evolution.control_layout import ControlLayout, ControlSet

__all__ = ["require_no_control_as_data", "sum_of_problems"]


def require_no_control_as_data(controls: ControlSet, problems: Sequence[SweptProblem]) -> None:
    """Raise ``InputError`` where a control of a sum is a datum of the evolution of one of the problems."""
    for leaf in (leaf for problem in problems for leaf in problem.leaves):
        data = leaf.sweeps.evolution.copies.data
        if fixed := [repr(c.name()) for c in controls.controls if c in data]:
            raise InputError(
                f"a sum of functionals: {', '.join(fixed)} is a control of one evolution and data of another one, "
                "which would keep its value: give it in the control= of both (the same Function), or give the "
                "other one a copy, q.copy(deepcopy=True), if it is to keep its value"
            )


def _flat(weight: float, problem: SweptProblem) -> list[tuple[float, SweptProblem]]:
    """The terms of a problem in a sum: of a sum its own terms, whose sweeps can be solved at once with others."""
    plain = type(problem) is ComposedProblem and problem.regularisation is None
    if not plain or not all(type(term.map) is Selection for term in problem.terms):
        return [(weight, problem)]
    return [found for term in problem.terms for found in _flat(weight * term.weight, term.problem)]


def sum_of_problems(terms: Sequence[tuple[float, SweptProblem]]) -> ComposedProblem:
    """Return the weighted sum of problems, in which equal controls are shared.

    ``InputError`` is raised on every rank if a weight is not finite, or the problems are on different process grids or
    have controls that cannot be shared.
    """
    terms = [found for weight, problem in terms for found in _flat(float(weight), problem)]
    weights, problems = [weight for weight, _ in terms], [problem for _, problem in terms]
    spacetime = problems[0].spacetime
    require_same(spacetime.comm, **{"weights of the terms of a sum": weights})
    if not np.isfinite(weights).all():
        raise InputError(f"a sum of functionals with weights {weights}: give finite numbers")
    for other in problems[1:]:
        grids = [p.spacetime.used_shape for p in (problems[0], other)]
        same = MPI.Comm.Compare(spacetime.comm, other.spacetime.comm) in (MPI.IDENT, MPI.CONGRUENT)
        if grids[0] != grids[1] or not same:
            raise InputError(
                f"a sum of functionals on process grids {grids[0]} and {grids[1]} (space, time and, if given, "
                "experiments): build all of them with the same spacetime="
            )
    controls = ControlSet([problem.evolution for problem in problems])
    require_no_control_as_data(controls, problems)
    slabs = [problem.layout.slab for problem in problems if problem.evolution.stepwise]
    if len({slab.bounds for slab in slabs}) > 1:
        raise InputError(
            "a sum of functionals whose time ranks own different steps of a control with a value in each step: "
            "give all of them the same mgrit storage and coarsening"
        )
    layout = ControlLayout(controls, spacetime, (slabs or [problems[0].layout.slab])[0])
    maps = [Selection(layout, problem.layout) for problem in problems]
    return ComposedProblem([Term(*term) for term in zip(weights, problems, maps, strict=True)], layout)

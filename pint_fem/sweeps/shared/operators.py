"""Whether evolutions have the same operators, and propagators that share them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import ufl
from firedrake import Constant
from irksome.tableaux.ButcherTableaux import ButcherTableau

from pint_fem.evolution.evolution import Evolution
from pint_fem.evolution.private_copies import data_of
from pint_fem.kernels.arrays import boundary_rows
from pint_fem.propagators.base import FEPropagator
from pint_fem.propagators.choice import make_propagator
from pint_fem.propagators.coefficients.propagator import CoefficientPropagator
from pint_fem.propagators.linear import LinearPropagator
from pint_fem.sweeps.sweeps import Sweeps

__all__ = ["can_be_solved_as_one", "have_same_operators", "sharing"]


def _with_values(form: ufl.Form) -> ufl.Form:
    """A form with the values of its Constants in their place."""
    constants = [c for c in data_of(form) if isinstance(c, Constant)]
    values = [np.reshape(c.dat.data_ro, c.ufl_shape).tolist() for c in constants]
    literals = (ufl.as_tensor(v) if isinstance(v, list) else ufl.as_ufl(v) for v in values)
    return ufl.replace(form, dict(zip(constants, literals, strict=True)))


def _are_same(a: ufl.Form, b: ufl.Form, evolutions: Sequence[Evolution]) -> bool:
    """Whether two forms have the same Functions, as the user gave them, and equal Constants in the same places."""
    a, b = _with_values(a), _with_values(b)
    if a.empty() or b.empty() or a.signature() != b.signature():
        return a.empty() and b.empty()
    originals = [evolution.copies.originals() for evolution in evolutions]
    given = lambda f, of: of.get(f, f)
    functions = zip(a.coefficients(), b.coefficients(), strict=True)
    return all(given(f, originals[0]) is given(g, originals[1]) for f, g in functions)


def _numbers(tableau: ButcherTableau) -> tuple:
    """The coefficients of an integrator."""
    return tuple(np.asarray(x, dtype=float).tolist() for x in (tableau.A, tableau.b, tableau.c))


def have_same_operators(a: Evolution, b: Evolution) -> bool:
    """Whether the steps of two private evolutions differ in their loads, boundary values and initial conditions only.

    Coefficients of the operators have to be the same Functions, or Constants with equal values; controls in operators
    have to be the same ones in both, with all other controls.
    """
    if a.affine_parts is None or b.affine_parts is None or a.V != b.V:
        return False
    numbers = [(ev.dt, ev.nsteps, ev.t0, _numbers(ev.tableau), ev.eliminate, ev.options_prefix) for ev in (a, b)]
    same = numbers[0] == numbers[1] and a.solver_parameters == b.solver_parameters
    same = same and all(a.bases[name] is b.bases[name] for name in a.bases)
    same = same and (a.boundary_controls is None) == (b.boundary_controls is None)
    if not same or not np.array_equal(boundary_rows(a.bcs, a.V), boundary_rows(b.bcs, b.V)):
        return False
    controlled = [ev.has_controlled_operators for ev in (a, b)]
    if any(controlled) and list(a.posed.parameters) != list(b.posed.parameters):
        return False
    return all(_are_same(f, g, (a, b)) for f, g in zip(a.affine_parts[:2], b.affine_parts[:2], strict=True))


def can_be_solved_as_one(a: Sweeps, b: Sweeps) -> bool:
    """Whether linear sweeps of two evolutions can be one solve for a batch: the same operators, solver and options."""
    plain = all(s.is_linear and s.given.get("krylov") is None and s.solvers.norm == "l2" for s in (a, b))
    plain = plain and all(p.evolution is s.evolution for s in (a, b) for p in s.propagators)
    kinds = [([type(p) for p in s.propagators], [p.stride for p in s.propagators], s.solvers.kind) for s in (a, b)]
    plain = plain and kinds[0] == kinds[1] and a.slab == b.slab and a.options == b.options
    tableaux = [[_numbers(p.tableau) for p in s.propagators] for s in (a, b)]
    return plain and tableaux[0] == tableaux[1] and have_same_operators(a.evolution, b.evolution)


def sharing(sweeps: Sweeps) -> Callable[..., FEPropagator]:
    """A ``propagator(evolution, stride=, tableau=)`` for evolutions with the same operators as that of ``sweeps``, of
    whose propagators it uses the matrices and factors; where data have made the operators different since, it makes
    propagators of the evolution by itself.
    """
    return partial(_shared, sweeps)


def _shared(sweeps: Sweeps, evolution: Evolution, *, stride: int = 1, tableau: ButcherTableau | None = None) -> Any:
    if not have_same_operators(sweeps.evolution, evolution):
        return make_propagator(evolution, stride=stride, tableau=tableau)
    found = next(
        p
        for p in sweeps.propagators
        if p.stride == stride and (tableau is None or _numbers(tableau) == _numbers(p.tableau))
    )
    assert isinstance(found, LinearPropagator | CoefficientPropagator), "only operators that do not depend on time"
    return found.for_evolution(evolution)

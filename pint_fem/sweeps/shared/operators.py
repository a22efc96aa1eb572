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
from pint_fem.kernels.arrays import boundary_rows
from pint_fem.propagators.base import FEPropagator
from pint_fem.propagators.coefficients.propagator import CoefficientPropagator
from pint_fem.propagators.linear import LinearPropagator
from pint_fem.sweeps.sweeps import Sweeps

__all__ = ["can_be_solved_as_one", "have_same_operators", "sharing"]


def _same_coefficients(a: ufl.Form, b: ufl.Form, evolutions: Sequence[Evolution]) -> bool:
    """Whether two forms with the same signature have the same Functions, as the user gave them, and equal Constants."""
    originals = [evolution.copies.originals() for evolution in evolutions]
    given = lambda f, of: of.get(f, f)
    functions = zip(a.coefficients(), b.coefficients(), strict=True)
    same = all(given(f, originals[0]) is given(g, originals[1]) for f, g in functions)
    constants = zip(a.constants(), b.constants(), strict=True)
    return same and all(isinstance(c, Constant) and np.array_equal(c.dat.data_ro, d.dat.data_ro) for c, d in constants)


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
    pairs = list(zip(a.affine_parts[:2], b.affine_parts[:2], strict=True))
    if any(f.empty() != g.empty() for f, g in pairs):
        return False
    pairs = [(f, g) for f, g in pairs if not f.empty()]
    return all(f.signature() == g.signature() and _same_coefficients(f, g, (a, b)) for f, g in pairs)


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
    whose propagators it uses the matrices and factors.
    """
    return partial(_shared, sweeps)


def _shared(sweeps: Sweeps, evolution: Evolution, *, stride: int = 1, tableau: ButcherTableau | None = None) -> Any:
    found = next(
        p
        for p in sweeps.propagators
        if p.stride == stride and (tableau is None or _numbers(tableau) == _numbers(p.tableau))
    )
    assert isinstance(found, LinearPropagator | CoefficientPropagator), "only operators that do not depend on time"
    return found.for_evolution(evolution)

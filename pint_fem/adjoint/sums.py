r"""Sums of reduced problems that share controls.

.. math::  J(z) = \sum_i w_i\, J_i(S_i z), \qquad
           J'(z) = \sum_i w_i\, S_i^T J_i'(S_i z), \qquad
           J''(z)\,dz = \sum_i w_i\, S_i^T J_i''(S_i z)\, S_i\, dz

with :math:`S_i` the selection of the controls of term :math:`i`, several experiments of one unknown, say. Each term
has trajectories and solvers of its own; all terms are on one process grid and are solved one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import ufl
from firedrake import Function
from mpi4py import MPI

from pint_fem.adjoint.composed import ComposedProblem
from pint_fem.adjoint.control_layout import ControlLayout
from pint_fem.adjoint.memory_estimate import MemoryEstimate
from pint_fem.adjoint.problem import ReducedProblem
from pint_fem.adjoint.regularisation import Regularisation
from pint_fem.collective import require_same
from pint_fem.errors import InputError
from pint_fem.evolution.evolution import Evolution
from pint_fem.misfits.base import BlockMisfit

__all__ = ["SharedControls", "SumProblem", "leaves", "second_derivative", "terms_of"]


class SharedControls:
    """The controls of several evolutions, each once: what a layout and optimisers take from an evolution.

    Parameters
    ----------
    evolutions
        Of the terms; a control is shared where it is the same Function.

    Attributes
    ----------
    controls, stepwise, parameters : tuple of Function
        All, in the order in which they come; those with a value in each step; the same as ``controls``.
    dt, nsteps : float, int
        Of the controls with a value in each step, which have to agree in them.
    initial_control : None
        Initial conditions are sought as static controls.

    Raises
    ------
    InputError
        On every rank, if a control is static in one evolution and has a value in each step in another, or time steps of
        such controls differ.
    """

    initial_control = None

    def __init__(self, evolutions: Sequence[Evolution | SharedControls]):
        self.controls = tuple(dict.fromkeys(c for ev in evolutions for c in ev.controls))
        self.stepwise = tuple(dict.fromkeys(c for ev in evolutions for c in ev.stepwise))
        for control in self.stepwise:
            if any(control in ev.controls and control not in ev.stepwise for ev in evolutions):
                raise InputError(
                    f"control {control.name()!r} is static in one evolution and has a value in each step in another: "
                    "give both the same per_step="
                )
        self.parameters = tuple(sorted(self.controls, key=lambda c: c in self.stepwise))
        moving = [ev for ev in evolutions if ev.stepwise]
        steps = {(ev.dt, ev.nsteps) for ev in moving}
        if len(steps) > 1:
            raise InputError(
                "controls with a value in each step in evolutions with different steps (dt, nsteps), "
                f"{sorted(steps)}: give these evolutions the same ones"
            )
        self.dt, self.nsteps = ((moving or evolutions)[0].dt, (moving or evolutions)[0].nsteps)

    @property
    def posed(self) -> SharedControls:
        """Itself: its controls are the user's functions."""
        return self

    @property
    def per_step(self) -> bool:
        """Whether a control has a value of its own in each step."""
        return bool(self.stepwise)


class SumProblem:
    """See the module; what optimisers see of a :class:`~pint_fem.adjoint.problem.ReducedProblem`, of a sum.

    Parameters
    ----------
    terms
        Weights and problems (sums among them), all on one process grid.

    Attributes
    ----------
    layout : ControlLayout
        Of all controls.

    Raises
    ------
    InputError
        On every rank, if the terms do not go together.
    """

    def __init__(self, terms: Sequence[tuple[float, ReducedProblem | SumProblem]]):
        self.terms = [(float(weight), problem) for weight, problem in terms]
        problems = [problem for _, problem in self.terms]
        require_same(problems[0].spacetime.comm, **{"weights of the terms of a sum": [w for w, _ in self.terms]})
        if not all(np.isfinite(weight) for weight, _ in self.terms):
            raise InputError(f"a sum of functionals with weights {[w for w, _ in self.terms]}: give finite numbers")
        self.spacetime = problems[0].spacetime
        for other in problems[1:]:
            grids = [(p.spacetime.space_size, p.spacetime.time_size) for p in (problems[0], other)]
            same = MPI.Comm.Compare(self.spacetime.comm, other.spacetime.comm) in (MPI.IDENT, MPI.CONGRUENT)
            if grids[0] != grids[1] or not same:
                raise InputError(
                    f"a sum of functionals on process grids {grids[0]} and {grids[1]} (space, time): build all of them "
                    "with the same spacetime="
                )
        self.evolution = SharedControls([p.evolution for p in problems])
        for leaf in leaves(self):
            data = leaf.sweeps.evolution.copies.data
            if fixed := [repr(c.name()) for c in self.evolution.controls if c in data]:
                raise InputError(
                    f"a sum of functionals: {', '.join(fixed)} is a control of one evolution and data of another one, "
                    "which would keep its value: give it in the control= of both (the same Function), or give the "
                    "other one a copy, q.copy(deepcopy=True), if it is to keep its value"
                )
        slabs = [p.layout.slab for p in problems if p.evolution.stepwise]
        if len({slab.bounds for slab in slabs}) > 1:
            raise InputError(
                "a sum of functionals whose time ranks own different steps of a control with a value in each step: "
                "give all of them the same mgrit storage and coarsening"
            )
        self.layout = ControlLayout(self.evolution, self.spacetime, (slabs or [problems[0].layout.slab])[0])

    @property
    def is_quadratic(self) -> bool:
        """Whether ``J`` is a quadratic function of the controls."""
        return all(problem.is_quadratic for _, problem in self.terms)

    # -- between the sum's vector and those of the terms ---------------------------------------------------------------
    def selected(self, problem, z: np.ndarray) -> np.ndarray:
        """``S_i z``."""
        return problem.layout.join([self.layout.part(z, control) for control in problem.evolution.controls])

    def _collect(self, apply, z: np.ndarray, *directions: np.ndarray) -> np.ndarray:
        """``sum w_i S_i^T apply(J_i, S_i z, ...)``, a dual vector; ``z`` may be a list or flat."""
        out, vectors = np.zeros(self.layout.size), [np.asarray(v, dtype=float).ravel() for v in (z, *directions)]
        for weight, problem in self.terms:
            dual = apply(problem, *(self.selected(problem, v) for v in vectors))
            for control, part in zip(problem.evolution.controls, problem.layout.parts(dual), strict=True):
                self.layout.part(out, control)[...] += weight * part
        return out

    # -- values --------------------------------------------------------------------------------------------------------
    def value(self, z: np.ndarray) -> float:
        """``J(z)``; the same bits on every rank."""
        z = np.asarray(z, dtype=float).ravel()
        return sum(weight * problem.value(self.selected(problem, z)) for weight, problem in self.terms)

    @property
    def parts(self) -> dict[str, float]:
        """Misfit and regularisation of the controls asked for last."""
        out: dict[str, float] = {}
        for weight, problem in self.terms:
            for name, value in problem.parts.items():
                out[name] = out.get(name, 0.0) + weight * value
        return out

    def derivative(self, z: np.ndarray) -> np.ndarray:
        """``J'(z)`` as a dual vector."""
        return self._collect(lambda problem, own: problem.derivative(own), z)

    def tangent_value(self, z: np.ndarray, dz: np.ndarray) -> float:
        """``J'(z) dz`` by a tangent sweep of each term."""
        z, dz = (np.asarray(v, dtype=float).ravel() for v in (z, dz))
        return sum(w * p.tangent_value(self.selected(p, z), self.selected(p, dz)) for w, p in self.terms)

    def hessian_action(self, z: np.ndarray, dz: np.ndarray, *, gauss_newton: bool = False) -> np.ndarray:
        """``J''(z) dz`` as a dual vector."""
        return self._collect(lambda problem, *own: problem.hessian_action(*own, gauss_newton=gauss_newton), z, dz)

    def advance(self, z: np.ndarray) -> tuple[float, np.ndarray, float]:
        """``J`` and ``J'`` after one MGRIT cycle for state and adjoint of each term, and the largest residual."""
        values, residuals = [], []

        def cycle(problem, own):
            value, g, residual = problem.advance(own)
            values.append(value)
            residuals.append(residual)
            return g

        g = self._collect(cycle, z)
        value = sum(weight * v for (weight, _), v in zip(self.terms, values, strict=True))
        return value, g, max(residuals)

    # -- of the terms --------------------------------------------------------------------------------------------------
    def observations(self, z: np.ndarray, misfit: BlockMisfit) -> np.ndarray:
        """What a misfit of one of the terms observes, see :meth:`ReducedProblem.observations`."""
        for _, problem in self.terms:
            if any(misfit is m for leaf in leaves(problem) for m in leaf.misfits):
                return problem.observations(self.selected(problem, np.ravel(z)), misfit)
        raise InputError(f"observations of {misfit!r}: give a misfit of one of the terms")

    def gradient_error(self, z: np.ndarray) -> np.ndarray | None:
        """See :meth:`ReducedProblem.gradient_error`; ``None`` unless all terms fit their data to round-off."""
        z = np.asarray(z, dtype=float).ravel()
        errors = [problem.gradient_error(self.selected(problem, z)) for _, problem in self.terms]
        if any(error is None for error in errors):
            return None
        made = iter(errors)
        return self._collect(lambda problem, own: next(made), z)

    def update_data(self) -> list[str]:
        """Read the user's data again in all terms; what has other values than before."""
        return list(dict.fromkeys(name for leaf in dict.fromkeys(leaves(self)) for name in leaf.update_data()))

    def invalidate(self) -> None:
        """Forget what was solved: the next solves start cold."""
        for _, problem in self.terms:
            problem.invalidate()

    def keep_evaluations(self, count: int) -> None:
        """Remember the last ``count`` controls and their trajectories in each term."""
        for _, problem in self.terms:
            problem.keep_evaluations(count)

    def memory(self) -> MemoryEstimate:
        """Memory of this rank by part: that of all terms, of which one at a time is at its peak."""
        each = [leaf.memory() for leaf in dict.fromkeys(leaves(self))]
        add = lambda dicts: {name: sum(d.get(name, 0) for d in dicts) for name in {k: 0 for d in dicts for k in d}}
        passing = {
            name: max((m.passing[name] for m in each), key=lambda d: sum(d.values())) for name in each[0].passing
        }
        return MemoryEstimate(add([m.kept for m in each]), passing, add([m.petsc for m in each]))


def leaves(problem: ReducedProblem | SumProblem) -> list[ReducedProblem]:
    """The problems of evolutions in a problem: all of a sum's, or the one."""
    if isinstance(problem, (ReducedProblem, ComposedProblem)):
        return [problem if isinstance(problem, ReducedProblem) else problem.problem]
    return [leaf for _, term in problem.terms for leaf in leaves(term)]


def second_derivative(problem: ReducedProblem | SumProblem, control: Function) -> ufl.Form | None:
    """Of the regularisation by a control, as a bilinear form; ``None`` where it is zero or depends on the control."""
    found = [
        w * form
        for w, regularisation in _regularisations(problem, 1.0)
        if (form := regularisation.second_derivative(control)) is not None
    ]
    if not all(regularisation.quadratic for _, regularisation in _regularisations(problem, 1.0)):
        return None
    return sum(found[1:], start=found[0]) if found else None


def _regularisations(problem, weight: float) -> list[tuple[float, Regularisation]]:
    """All of a problem's terms with their weights."""
    if isinstance(problem, SumProblem):
        return [found for w, term in problem.terms for found in _regularisations(term, weight * w)]
    own = [] if problem.regularisation is None else [(weight, problem.regularisation)]
    return own + (_regularisations(problem.problem, weight) if isinstance(problem, ComposedProblem) else [])


def terms_of(
    problem: ReducedProblem | SumProblem, evolution: Evolution | None, z: np.ndarray
) -> list[tuple[float, ReducedProblem, np.ndarray]]:
    """The problems of an evolution among the terms, each with its weight and its own controls.

    Parameters
    ----------
    problem
        Of an evolution, or a sum.
    evolution
        Which one; ``None`` where there is one only.
    z
        Controls of ``problem``, flat.

    Raises
    ------
    InputError
        If the evolution is none of the terms', or has to be given.
    """
    found = list(dict.fromkeys(leaf.evolution for leaf in leaves(problem)))
    if evolution is None and len(found) > 1:
        raise InputError(f"the functional has {len(found)} evolutions: give the one that is meant as evolution=")
    if evolution is not None and evolution not in found:
        raise InputError("evolution=: give one of those that the functional was made of")
    return _terms(problem, found[0] if evolution is None else evolution, 1.0, np.ravel(z))


def _terms(problem, evolution: Evolution, weight: float, z: np.ndarray) -> list:
    if isinstance(problem, ReducedProblem):
        return [(weight, problem, z)] if problem.evolution is evolution else []
    if isinstance(problem, ComposedProblem):
        return _terms(problem.problem, evolution, weight, problem.selected(z))
    return [t for w, term in problem.terms for t in _terms(term, evolution, weight * w, problem.selected(term, z))]

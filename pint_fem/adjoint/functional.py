"""Functionals of controls with pyadjoint's interface: value, derivative, Hessian action, tangent, minimisation.

A :class:`ControlFunctional` converts Firedrake's functions to flat arrays and back; what is computed is that of a
:class:`~pint_fem.adjoint.interface.SweptProblem`.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any, TypeAlias

import numpy as np
import ufl
from firedrake import Cofunction, EnsembleCofunction, EnsembleFunction, EnsembleFunctionSpace, Function
from firedrake.ensemble.ensemble_functionspace import EnsembleFunctionSpaceBase
from firedrake.functionspaceimpl import WithGeometry
from mpi4py import MPI
from pyadjoint import AdjFloat, ReducedFunctional
from pyadjoint.enlisting import Enlist
from pyadjoint.reduced_functional import AbstractReducedFunctional
from pyadjoint.tape import stop_annotating

from pint_fem.adjoint.interface import SweptProblem
from pint_fem.adjoint.linear_inverse import LinearInverse
from pint_fem.adjoint.memory_estimate import MemoryEstimate
from pint_fem.adjoint.minimisation.minimisable import Minimisable
from pint_fem.adjoint.minimisation.value_scaling import ScaledControl, ValueScaling
from pint_fem.adjoint.riesz import ControlInner
from pint_fem.adjoint.states import FinalState, StateAccess
from pint_fem.adjoint.sums import sum_of_problems
from pint_fem.collective import collectively
from pint_fem.errors import InputError
from pint_fem.kernels.arrays import get, put

__all__ = ["ControlFunctional"]

Value: TypeAlias = Function | Cofunction | EnsembleFunction | EnsembleCofunction
"""A control, a direction or a derivative as pyadjoint has it; of controls with one value per step an ensemble's."""


class ControlFunctional(Minimisable, LinearInverse, StateAccess, AbstractReducedFunctional):
    """A functional ``J(z)`` of controls that pyadjoint's and this package's optimisers can minimise.

    Functionals are added, subtracted and multiplied by numbers, ``J1 + 2 * J2``: the sum's controls are those of its
    terms, each once, in the order in which they come; a control is shared where the evolutions were given the same
    Function. A shared control keeps the inner product that the first term has for it. The terms have to be on the same
    process grid, and agree on ``dt`` and ``nsteps`` where they share a control with a value in each step.

    Parameters
    ----------
    problem
        ``J`` and its derivatives on arrays.
    inner
        Inner product of the controls.
    regularisation
        The UFL functionals of the regularisation.
    final
        Functions that are set to the final state after each evaluation.

    Attributes
    ----------
    evolution : Evolution or ControlSet
        The controls, ``evolution.controls``, as the user gave them.
    """

    problem: SweptProblem
    __array_ufunc__ = None  # numpy's numbers leave the product with a functional to __rmul__

    def __init__(
        self,
        problem: SweptProblem,
        inner: ControlInner,
        regularisation: Sequence[ufl.Form],
        final: Sequence[FinalState] = (),
    ):
        self.problem, self.inner, self._final = problem, inner, list(final)
        self.evolution, self.spacetime, self.layout = problem.evolution, problem.spacetime, problem.layout
        self.regularisation = list(regularisation)
        with stop_annotating():
            self._spaces = [self._space(control) for control in self.evolution.controls]
            values = [self._new(space) for space in self._spaces]
            for value, control in zip(values, self.evolution.controls, strict=True):
                for part in _parts(value):
                    part.assign(control)
                if isinstance(value, Function):
                    value.rename(control.name())
        self._scaling = ValueScaling()
        controls = [ScaledControl(value, self._scaling) for value in values]
        self._controls = Enlist(controls[0] if len(controls) == 1 else controls)
        self._z: np.ndarray | None = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.problem})"

    # -- sums ----------------------------------------------------------------------------------------------------------
    def __add__(self, other: ControlFunctional | Real) -> ControlFunctional:
        """``J1 + J2``; a sum may begin with 0, as Python's ``sum`` does."""
        if isinstance(other, Real) and other == 0:
            return self
        return self._combined(1.0, 1.0, other) if isinstance(other, ControlFunctional) else NotImplemented

    __radd__ = __add__

    def __sub__(self, other: ControlFunctional) -> ControlFunctional:
        """``J1 - J2``."""
        return self._combined(1.0, -1.0, other) if isinstance(other, ControlFunctional) else NotImplemented

    def __mul__(self, factor: Real) -> ControlFunctional:
        """``c * J``."""
        return self._combined(float(factor)) if isinstance(factor, Real) else NotImplemented

    __rmul__ = __mul__

    def __truediv__(self, divisor: Real) -> ControlFunctional:
        """``J / c``."""
        return self._combined(1.0 / float(divisor)) if isinstance(divisor, Real) else NotImplemented

    def __neg__(self) -> ControlFunctional:
        """``-J``."""
        return self._combined(-1.0)

    def _combined(
        self, weight: float, other_weight: float = 0.0, other: ControlFunctional | None = None
    ) -> ControlFunctional:
        """``weight * self + other_weight * other``."""
        terms = [(weight, self)] + ([] if other is None else [(other_weight, other)])
        problem = sum_of_problems([(w, term.problem) for w, term in terms])
        maps = {c: riesz for _, term in reversed(terms) for c, riesz in term.inner.maps.items()}
        inner = ControlInner(problem.layout, [maps[c] for c in problem.evolution.controls])
        forms = [form if w == 1 else w * form for w, term in terms for form in term.regularisation]
        return ControlFunctional(problem, inner, forms, [state for _, term in terms for state in term._final])

    def _space(self, control: Function) -> WithGeometry:
        """The space of pyadjoint's values of a control."""
        space = control.function_space()
        if control not in self.evolution.stepwise:
            return space
        try:
            return EnsembleFunctionSpace([space] * self.layout.slab.k, self.spacetime.ensemble)
        except ValueError as error:
            raise InputError(
                f"control {control.name()!r} has a value in each step ({error}): give spacetime=pf.SpaceTime(...) and "
                "build the mesh with comm=spacetime.space_comm"
            ) from error

    def _new(self, space: WithGeometry, *, dual: bool = False) -> Value:
        if isinstance(space, EnsembleFunctionSpaceBase):
            return EnsembleCofunction(space.dual()) if dual else EnsembleFunction(space)
        return Cofunction(space.dual()) if dual else Function(space)

    # -- between pyadjoint's values and arrays ------------------------------------------------------------------------
    def array(self, values: Value | Sequence[Value]) -> np.ndarray:
        """Return the own values of the controls or of a direction as a flat vector ``(layout.size,)``.

        Parameters
        ----------
        values
            A function for the control, or a list with one for each; an ``EnsembleFunction`` for one value per step.

        Raises
        ------
        InputError
            On this rank, if they are not in the controls' spaces.
        """
        values = Enlist(values)
        if len(values) != len(self._spaces):
            raise InputError(f"{len(values)} controls given, the functional has {len(self._spaces)}")
        arrays = []
        for f, space in zip(values, self._spaces, strict=True):
            stepwise = isinstance(space, EnsembleFunctionSpaceBase)
            kind = EnsembleFunction if stepwise else Function
            if not isinstance(f, kind) or f.function_space() != space:
                if stepwise:
                    what = "an EnsembleFunction with one function per step (see rf.controls[i].control)"
                    raise InputError(f"control: given is a {type(f).__name__}; give {what}")
                what = f"a function of {f.function_space()}" if isinstance(f, Function) else f"a {type(f).__name__}"
                raise InputError(f"control: given is {what}, the control lives in {space}")
            arrays.append(np.array([get(part) for part in f.subfunctions]) if stepwise else get(f))
        return self.layout.join(arrays)

    def _array(self, values: Value | Sequence[Value]) -> np.ndarray:
        """:meth:`array`, which raises on all ranks if it does on one (collective)."""
        return collectively(self.spacetime.comm, "", self.array, values)

    def function(self, array: np.ndarray, *, dual: bool = False) -> Value | list[Value]:
        """Return the functions with given own values ``(layout.size,)``: one, or a list with one for each control.

        Parameters
        ----------
        array
            Own values of the controls or, with ``dual``, of a derivative, for which cofunctions are made.
        """
        with stop_annotating():
            made = [self._new(space, dual=dual) for space in self._spaces]
            self._fill(made, array)
        return self._controls.delist(made)

    def _fill(self, functions: Any, array: np.ndarray) -> None:
        """Put own values into controls or derivatives."""
        for f, values in zip(functions, self.layout.parts(np.ravel(array)), strict=True):
            for part, row in zip(_parts(f), np.atleast_2d(values), strict=True):
                put(part, row)

    # -- pyadjoint's interface ----------------------------------------------------------------------------------------
    @property
    def controls(self) -> list[ScaledControl]:
        """The controls as pyadjoint wraps them."""
        return self._controls

    def _current(self) -> np.ndarray:
        """Own values of the last controls."""
        return self.array([c.control for c in self.controls]) if self._z is None else self._z

    @property
    def scale(self) -> float:
        """The factor of ``J`` in pyadjoint's ``minimize`` and ``maximize``; a user's own ``J(z)`` is never scaled."""
        return self._scaling.scale

    @scale.setter
    def scale(self, scale: float) -> None:
        self._scaling.scale = scale

    def _largest_slope(self) -> float:
        """Largest entry of the gradient's representative, which pyadjoint passes to scipy."""
        g = self.inner.primal(self.problem.derivative(self._z))
        return float(self.spacetime.comm.allreduce(np.abs(g).max(initial=0.0), op=MPI.MAX))

    def __call__(self, values: Value | Sequence[Value]) -> AdjFloat:
        """Return ``J`` at values of the controls (collective).

        Raises
        ------
        SolverFailure
            On every rank, if a solve fails for a numerical reason.
        InputError
            On every rank, if values are not in the controls' spaces or differ between ranks.
        """
        self._z, scaled = self._array(values), ValueScaling.from_array(Enlist(values))
        with stop_annotating():
            for control, value in zip(self.controls, Enlist(values), strict=True):
                control.update(value)
            value = self.problem.value(self._z)
            for state in self._final:
                state.update()
            return AdjFloat(self._scaling.evaluated(scaled, value, self._largest_slope))

    def derivative(self, adj_input: float = 1.0, apply_riesz: bool = False) -> Value | list[Value]:
        """Return ``adj_input * J'`` at the last controls, cofunctions; with ``apply_riesz`` its representative in the
        controls' inner product (collective).
        """
        with stop_annotating():
            g = float(adj_input) * self._scaling.factor * self.problem.derivative(self._current())
            return self.function(self.inner.primal(g)) if apply_riesz else self.function(g, dual=True)

    def hessian(
        self,
        m_dot: Value | Sequence[Value],
        hessian_input: object = None,
        evaluate_tlm: bool = True,
        apply_riesz: bool = False,
    ) -> Value | list[Value]:
        """Return ``J'' m_dot`` at the last controls, as :meth:`derivative` returns ``J'`` (collective).

        Raises
        ------
        InputError
            If ``hessian_input`` is given: ``J`` is not the input of another functional.
        """
        if hessian_input not in (None, 0, 0.0):
            raise InputError("hessian_input is not supported: the functional is the end of the computation")
        with stop_annotating():
            h = self._scaling.factor * self.problem.hessian_action(self._current(), self._array(m_dot))
            return self.function(self.inner.primal(h)) if apply_riesz else self.function(h, dual=True)

    def hessian_actions(
        self,
        directions: Sequence[Value | Sequence[Value]],
        *,
        apply_riesz: bool = False,
        at_once: int | None = None,
    ) -> list:
        """Return ``J'' m_dot`` at the last controls for each of several directions (collective).

        The result is that of :meth:`hessian` for one direction after another, to the tolerance of the sweeps, which all
        directions satisfy by themselves, however much their sizes differ. The sweeps are those of one action: a tangent
        and a second-order adjoint, with the states of all directions in arrays ``(points, directions, n)``.

        A direction takes about two trajectories and the coarse levels of the two sweeps. Where those of all directions
        would take, with all that :meth:`memory` counts, more than half of a machine's memory (or of the limit of a
        process), they are solved in several batches. The number of a batch's directions follows from the sizes of the
        problem and the machine, so that a program that is repeated has the same batches.

        Parameters
        ----------
        directions
            At least one; each as for :meth:`hessian`: a function, or a list with one for each control.
        apply_riesz
            Whether the results are representatives in the controls' inner product, functions, rather than cofunctions.
        at_once
            Largest number of directions in one batch; default: as many as fit the memory.

        Returns
        -------
        list
            In the order of the directions; an entry is what :meth:`hessian` returns for it.

        Raises
        ------
        InputError
            On every rank, if ``directions`` is no list or an empty one, if a direction is not in the controls' spaces,
            or if directions, their number or ``at_once`` differ between ranks.
        SolverFailure
            On every rank, if a sweep fails for a numerical reason.
        """
        with stop_annotating():
            vectors = collectively(self.spacetime.comm, "", self._arrays, directions)
            actions = self.problem.hessian_actions(self._current(), vectors, at_once=at_once)
            scaled = (self._scaling.factor * h for h in actions)
            if apply_riesz:
                return [self.function(self.inner.primal(h)) for h in scaled]
            return [self.function(h, dual=True) for h in scaled]

    def _arrays(self, directions: Sequence[Value | Sequence[Value]]) -> list[np.ndarray]:
        """The own values of several directions."""
        if not isinstance(directions, (list, tuple)):
            raise InputError(f"hessian_actions: {type(directions).__name__} given: give a list of directions")
        return [self.array(values) for values in directions]

    def tlm(self, m_dot: Value | Sequence[Value]) -> AdjFloat:
        """Return ``J' m_dot`` at the last controls, computed by a tangent sweep (collective)."""
        with stop_annotating():
            return AdjFloat(self._scaling.factor * self.problem.tangent_value(self._current(), self._array(m_dot)))

    def update_data(self) -> list[str]:
        """Read the user's data again: coefficients, boundary values and the initial condition of the evolution, data of
        misfits (readings of sensors, too) and of the regularisation (collective).

        All of these are copied when the functional is made, so that a later change of their values has no effect but a
        warning until this call. Forms, operators and factors stay as far as nothing in them has changed: new readings,
        loads, boundary values or initial conditions cost no factorisation. The next solves start from the trajectories
        of the old data.

        Returns
        -------
        list of str
            The names of data that have other values than before.

        Raises
        ------
        InputError
            On every rank, if new values do not fit or are not the same on all ranks.
        """
        return self.problem.update_data()

    def memory(self) -> MemoryEstimate:
        """Return the memory of this rank in bytes, by part and at the peak of an evaluation, before or after a run
        (collective).

        :mod:`pint_fem.adjoint.memory_estimate` has the formula. ``print(rf.memory())`` shows it, as ``-mgrit_view``
        does before the first solve.
        """
        with stop_annotating():
            return self.problem.memory()

    def _at(self, values: Value | Sequence[Value] | None) -> np.ndarray:
        """Own values of controls, for ``None`` of the last evaluation (collective)."""
        work = self._current if values is None else lambda: self.array(values)
        return collectively(self.spacetime.comm, "", work)

    # -- for optimisers ------------------------------------------------------------------------------------------------
    def _take(self, z: np.ndarray) -> None:
        """Set the controls to own values ``(layout.size,)``."""
        self._z = z
        with stop_annotating():
            for control, value in zip(self.controls, Enlist(self.function(z)), strict=True):
                control.update(value)
            self._fill([control.control for control in self.controls], z)


def _parts(f: Any) -> list:
    """The functions of the own steps, or the function itself."""
    return list(f.subfunctions) if isinstance(f, (EnsembleFunction, EnsembleCofunction)) else [f]


# pyadjoint's ``minimize`` passes numpy arrays to its own functionals and to registered classes only
ReducedFunctional.register(ControlFunctional)

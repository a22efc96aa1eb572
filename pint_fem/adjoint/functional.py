"""A functional of controls as pyadjoint has it, and its minimisation: what the one of an evolution and sums share."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from pathlib import Path

import numpy as np
import ufl
from firedrake import Cofunction, EnsembleCofunction, EnsembleFunction, EnsembleFunctionSpace, Function
from firedrake.ensemble.ensemble_functionspace import EnsembleFunctionSpaceBase
from mpi4py import MPI
from pyadjoint import AdjFloat, ReducedFunctional
from pyadjoint.enlisting import Enlist
from pyadjoint.reduced_functional import AbstractReducedFunctional
from pyadjoint.tape import stop_annotating

from pint_fem.adjoint.memory_estimate import MemoryEstimate
from pint_fem.adjoint.minimisation.minimisable import Minimisable
from pint_fem.adjoint.minimisation.value_scaling import ScaledControl, ValueScaling
from pint_fem.adjoint.problem import ReducedProblem
from pint_fem.adjoint.riesz import ControlInner
from pint_fem.adjoint.states import FinalState, adjoint_functions, own_points, state_functions, write_states
from pint_fem.adjoint.sums import SumProblem, terms_of
from pint_fem.collective import collectively
from pint_fem.errors import InputError
from pint_fem.evolution.evolution import Evolution
from pint_fem.kernels.arrays import get, put

__all__ = ["ControlFunctional"]


class ControlFunctional(Minimisable, AbstractReducedFunctional):
    """``J(z)`` of some controls, on arrays and on pyadjoint's values.

    Functionals are added, subtracted and multiplied by numbers, ``J1 + 2 * J2``: the sum's controls are those of its
    terms, each once, in the order in which they come; a control is shared where the evolutions were given the same
    Function. A shared control keeps the inner product that the first term has for it. The terms have to be on the same
    process grid, and agree on ``dt`` and ``nsteps`` where they share a control with a value in each step.

    Parameters
    ----------
    problem
        ``J`` and its derivatives on arrays: of an evolution, or a sum of such.
    inner
        Inner product of the controls.
    regularisation
        The functionals of the regularisation.
    final
        Functions that take the final state after each evaluation.
    """

    __array_ufunc__ = None  # numpy's numbers leave the product with a functional to __rmul__

    def __init__(
        self,
        problem: ReducedProblem | SumProblem,
        inner: ControlInner,
        regularisation: Sequence[ufl.Form],
        final: Sequence[FinalState] = (),
    ):
        self.problem, self.inner, self._final = problem, inner, list(final)
        self.evolution, self.spacetime, self.layout = problem.evolution, problem.spacetime, problem.layout
        #: The functionals of the regularisation.
        self.regularisation = list(regularisation)
        with stop_annotating():
            self._spaces = [self._space(control) for control in self.evolution.controls]
            values = [self._new(space) for space in self._spaces]
            for value, control in zip(values, self.evolution.controls, strict=True):
                for part in _parts(value):
                    part.assign(control)
                if isinstance(value, Function):
                    value.rename(control.name())
        self._unit = ValueScaling()
        self._controls = Enlist([ScaledControl(value, self._unit) for value in values])
        if len(values) == 1:
            self._controls = Enlist(self._controls[0])
        self._z: np.ndarray | None = None

    # -- sums ----------------------------------------------------------------------------------------------------------
    def __add__(self, other):
        """``J1 + J2``; a sum may begin with 0, as Python's ``sum`` does."""
        if isinstance(other, Real) and other == 0:
            return self
        return self._combined(1.0, 1.0, other) if isinstance(other, ControlFunctional) else NotImplemented

    __radd__ = __add__

    def __sub__(self, other):
        """``J1 - J2``."""
        return self._combined(1.0, -1.0, other) if isinstance(other, ControlFunctional) else NotImplemented

    def __mul__(self, factor):
        """``c * J``."""
        return self._combined(float(factor)) if isinstance(factor, Real) else NotImplemented

    __rmul__ = __mul__

    def __truediv__(self, divisor):
        """``J / c``."""
        return self._combined(1.0 / float(divisor)) if isinstance(divisor, Real) else NotImplemented

    def __neg__(self):
        """``-J``."""
        return self._combined(-1.0)

    def _combined(self, weight: float, other_weight: float = 0.0, other: ControlFunctional | None = None):
        terms = [(weight, self)] + ([] if other is None else [(other_weight, other)])
        problem = SumProblem([(w, term.problem) for w, term in terms])
        maps = {c: riesz for _, term in reversed(terms) for c, riesz in term.inner.maps.items()}
        inner = ControlInner(problem.layout, [maps[c] for c in problem.evolution.controls])
        forms = [form if w == 1 else w * form for w, term in terms for form in term.regularisation]
        return ControlFunctional(problem, inner, forms, [state for _, term in terms for state in term._final])

    def _space(self, control: Function):
        """Where pyadjoint's values of a control live."""
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

    def _new(self, space, *, dual: bool = False):
        if isinstance(space, EnsembleFunctionSpaceBase):
            return EnsembleCofunction(space.dual()) if dual else EnsembleFunction(space)
        return Cofunction(space.dual()) if dual else Function(space)

    # -- between pyadjoint's values and arrays ------------------------------------------------------------------------
    def array(self, values) -> np.ndarray:
        """Flat own values of the controls, or of a direction, ``(layout.size,)``.

        Raises
        ------
        InputError
            If they are not in the controls' spaces.
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
                    what = "an EnsembleFunction with one function a step (see rf.controls[i].control)"
                    raise InputError(f"control: given is a {type(f).__name__}; give {what}")
                what = f"a function of {f.function_space()}" if isinstance(f, Function) else f"a {type(f).__name__}"
                raise InputError(f"control: given is {what}, the control lives in {space}")
            arrays.append(np.array([get(part) for part in f.subfunctions]) if stepwise else get(f))
        return self.layout.join(arrays)

    def _array(self, values) -> np.ndarray:
        """:meth:`array`, refused on all ranks where it is on one (collective)."""
        return collectively(self.spacetime.comm, "", self.array, values)

    def function(self, array: np.ndarray, *, dual: bool = False):
        """Controls (or with ``dual`` derivatives) from flat own values: a function, or a list of several."""
        with stop_annotating():
            made = [self._new(space, dual=dual) for space in self._spaces]
            self._fill(made, array)
        return self._controls.delist(made)

    def _fill(self, functions, array: np.ndarray) -> None:
        """Put own values into controls or derivatives."""
        for f, values in zip(functions, self.layout.parts(np.ravel(array)), strict=True):
            for part, row in zip(_parts(f), np.atleast_2d(values), strict=True):
                put(part, row)

    # -- pyadjoint's interface ----------------------------------------------------------------------------------------
    @property
    def controls(self):
        """The control, as pyadjoint wraps it."""
        return self._controls

    def _current(self) -> np.ndarray:
        return self.array([c.control for c in self.controls]) if self._z is None else self._z

    @property
    def scale(self) -> float:
        """What pyadjoint's ``minimize`` and ``maximize`` multiply ``J`` by; ``J(z)`` of the user's is never scaled."""
        return self._unit.scale

    @scale.setter
    def scale(self, scale: float) -> None:
        self._unit.scale = scale

    def _largest_slope(self) -> float:
        """Largest entry of the gradient that pyadjoint hands scipy."""
        g = self.inner.primal(self.problem.derivative(self._z))
        return float(self.spacetime.comm.allreduce(np.abs(g).max(initial=0.0), op=MPI.MAX))

    def __call__(self, values) -> AdjFloat:
        """``J`` at values of the controls."""
        self._z, scaled = self._array(values), ValueScaling.from_array(Enlist(values))
        with stop_annotating():
            for control, value in zip(self.controls, Enlist(values), strict=True):
                control.update(value)
            value = self.problem.value(self._z)
            for state in self._final:
                state.update()
            return AdjFloat(self._unit.evaluated(scaled, value, self._largest_slope))

    def derivative(self, adj_input=1.0, apply_riesz=False):
        """``J'`` at the last control value, a dual function; with ``apply_riesz`` its representative."""
        with stop_annotating():
            g = float(adj_input) * self._unit.factor * self.problem.derivative(self._current())
            return self.function(self.inner.primal(g)) if apply_riesz else self.function(g, dual=True)

    def hessian(self, m_dot, hessian_input=None, evaluate_tlm=True, apply_riesz=False):
        """``J''`` at the last control value in a direction; no ``hessian_input``, as ``J`` is a number."""
        if hessian_input not in (None, 0, 0.0):
            raise InputError("hessian_input is not supported: the functional is the end of the computation")
        with stop_annotating():
            h = self._unit.factor * self.problem.hessian_action(self._current(), self._array(m_dot))
            return self.function(self.inner.primal(h)) if apply_riesz else self.function(h, dual=True)

    def tlm(self, m_dot):
        """``J' m_dot`` by a tangent sweep."""
        with stop_annotating():
            return AdjFloat(self._unit.factor * self.problem.tangent_value(self._current(), self._array(m_dot)))

    def update_data(self) -> list[str]:
        """Read the user's data again: coefficients, boundary values and the initial condition of the evolution, data of
        misfits (readings of sensors, too) and of the regularisation (collective).

        All of these are copied when the functional is made, so that a later change of their values is not seen (it is
        warned of) until this call. Forms, operators and factors stay as far as nothing in them has changed: new
        readings, loads, boundary values or initial conditions cost no factorisation. The next solves start from the
        trajectories of the old data.

        Returns
        -------
        list of str
            What has other values than before.

        Raises
        ------
        InputError
            On every rank, if new values do not fit or are not the same on all ranks.
        """
        return self.problem.update_data()

    def memory(self) -> MemoryEstimate:
        """Memory of this rank by part and at the peak of an evaluation, in bytes; known before a run.

        Collective; see :mod:`pint_fem.adjoint.memory_estimate` for the formula. ``print(rf.memory())`` shows it, as
        ``-mgrit_view`` does before the first solve.
        """
        with stop_annotating():
            return self.problem.memory()

    # -- the state and the adjoint -------------------------------------------------------------------------------------
    def own_times(self, evolution: Evolution | None = None) -> np.ndarray:
        """Times of the points that belong to this rank in time, in order; those of all ranks are ``t0 + n dt`` for
        ``n = 0 .. nsteps``. ``evolution``: which one, where there are several.
        """
        _, leaf, _ = terms_of(self.problem, evolution, self._current())[0]
        return leaf.evolution.time(np.array(own_points(leaf.sweeps.slab)))

    def state(self, values=None, times=None, *, evolution: Evolution | None = None):
        """The state at values of the controls as Functions (collective).

        Parameters
        ----------
        values
            Of the controls; default: those of the last evaluation.
        times
            A time or several, each of which is a point of the evolution. ``None``: the points that belong to this rank
            in time (:meth:`own_times`), which is what one rank in time has of the trajectory.
        evolution
            Which one, where the functional is a sum.

        Returns
        -------
        Function or list of Function
            At given times the same on all ranks in time, in their order, one for a single time.

        Raises
        ------
        InputError
            If a time is not one of the evolution's.
        """
        return state_functions(self.problem, self._at(values), times, evolution)

    def adjoint(self, values=None, times=None, *, riesz_map="L2", evolution: Evolution | None = None):
        """The adjoint at values of the controls: at a time ``t_n`` the derivative of ``J`` by the state there, with the
        evolution going on from it (collective).

        Parameters
        ----------
        riesz_map
            The inner product whose representative is returned: a kind of :class:`~pint_fem.adjoint.riesz.RieszMap` on
            the state's space, or ``None`` for the derivative itself, a Cofunction.
        values, times, evolution
            As for :meth:`state`.

        Returns
        -------
        Function, Cofunction or list of these
            As for :meth:`state`.
        """
        return adjoint_functions(self.problem, self._at(values), times, riesz_map, evolution)

    def write(self, values, path: str | Path, times=None, *, evolution: Evolution | None = None) -> Path:
        """Write the state at values of the controls for ParaView (collective): each rank in time its own points, and
        one file that lists them all; nothing is gathered.

        Parameters
        ----------
        values
            Of the controls; ``None``: those of the last evaluation.
        path
            The file that lists all, such as ``"results/state.pvd"``; the states are in folders beside it.
        times
            A time or several, each of which is a point of the evolution; default: all points.
        evolution
            Which one, where the functional is a sum.

        Returns
        -------
        pathlib.Path

        Raises
        ------
        InputError
            On every rank: a time that is not one of the evolution's, a file that cannot be written.
        """
        return write_states(self.problem, self._at(values), path, times, evolution)

    def _at(self, values) -> np.ndarray:
        work = self._current if values is None else lambda: self.array(values)
        return collectively(self.spacetime.comm, "", work)

    # -- for optimisers ------------------------------------------------------------------------------------------------
    def _take(self, z: np.ndarray) -> None:
        """Make an array the controls' value."""
        self._z = z
        with stop_annotating():
            for control, value in zip(self.controls, Enlist(self.function(z)), strict=True):
                control.update(value)
            self._fill([control.control for control in self.controls], z)


def _parts(f) -> list:
    """Functions of the own steps, or the one."""
    return list(f.subfunctions) if isinstance(f, (EnsembleFunction, EnsembleCofunction)) else [f]


# pyadjoint's ``minimize`` puts its own functionals, and what counts as one, behind numpy arrays
ReducedFunctional.register(ControlFunctional)

"""Private copies of the functions and constants in a user's forms, so that nothing that a user owns is written to.

There is one rule for data, which are all functions, constants and cofunctions in forms, in boundary values and as
initial condition that are neither the state nor the time nor a control: they are copied when a functional (or a
propagator by itself) is made, and read again by an explicit call. Changes in between are found by comparison.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import numpy as np
import ufl
from firedrake import Cofunction, Constant, DirichletBC, Function, TestFunction, TrialFunction, assemble, dx, inner
from firedrake.functionspaceimpl import WithGeometry
from pyadjoint.tape import stop_annotating
from ufl.algorithms import estimate_total_polynomial_degree, extract_coefficients
from ufl.algorithms.analysis import extract_type

from pint_fem.errors import InputError
from pint_fem.evolution.boundary import boundary_value
from pint_fem.kernels.arrays import get, put
from pint_fem.kernels.factor import Factor

__all__ = ["PrivateCopies", "data_of", "mass_degree", "name_of", "riesz_representative"]

Integrand = TypeVar("Integrand")
"""A form or an expression."""


def data_of(expression: ufl.BaseForm | ufl.core.expr.Expr) -> list:
    """Functions and Firedrake constants in a form or an expression, in an order that is the same on all ranks."""
    constants = sorted(extract_type(expression, Constant), key=lambda c: c.count())
    return [*extract_coefficients(expression), *constants]


def name_of(given: Function | Constant | Cofunction) -> str:
    """The name of a user's object."""
    return given.name if isinstance(given, Constant) else given.name()


def mass_degree(space: WithGeometry) -> int:
    """Degree of the quadrature of a space's mass matrix."""
    return estimate_total_polynomial_degree(inner(TrialFunction(space), TestFunction(space)))


def riesz_representative(load: Cofunction, into: Function | None = None) -> Function:
    """The function ``f`` with ``inner(f, v)*dx`` equal to the cofunction for all ``v`` of its space (collective)."""
    space = load.function_space().dual()
    f = Function(space, name=load.name()) if into is None else into
    with stop_annotating():
        form = inner(TrialFunction(space), TestFunction(space)) * dx(degree=mass_degree(space))
        mass = assemble(form, mat_type="aij").petscmat
        x, b = mass.createVecs()
        b.array[:] = get(load)
        Factor(mass, {}, symmetric=True, prefix="pint_riesz_", few=True).solve(b, x)
        put(f, x.array_r)
    return f


_CONDITION = "the value of a boundary condition"


class _Datum(NamedTuple):
    """A user's object, its copy, and a description for messages."""

    given: Function | Constant | Cofunction
    copy: Function | Constant
    label: str

    def values(self) -> np.ndarray:
        """A copy of the own values of the user's object."""
        dat = self.given.dat  # components of a vector have views without PETSc's vectors, and constants none
        return get(self.given) if hasattr(dat, "vec_ro") else np.array(dat.data_ro)

    def read(self) -> None:
        """Assign the values of the user's object to the copy (collective for cofunctions)."""
        if isinstance(self.given, Cofunction):
            riesz_representative(self.given, self.copy)
        elif isinstance(self.given, Constant):
            self.copy.assign(self.given.dat.data_ro)
        else:
            self.copy.assign(self.given)


class PrivateCopies:
    """Private copies of a user's functions and constants, made when a form that contains them is first rewritten.

    Copies of *variables* (the state, the time, controls) have the values that sweeps assign to them; those of data have
    the values that were read last.
    """

    def __init__(self) -> None:
        self._of: dict = {}
        self._data: list[_Datum] = []
        self._read: list[np.ndarray] = []  # values of each datum
        self._conditions: list[tuple[DirichletBC, object]] = []  # and what their values were given as
        self._interpolated: list[tuple[Function, ufl.core.expr.Expr]] = []  # and the expression in copies

    # -- copies --------------------------------------------------------------------------------------------------------
    def variable(self, given: Function) -> Function:
        """The copy of a function that is a variable."""
        if given not in self._of:
            with stop_annotating():
                self._of[given] = given.copy(deepcopy=True)
        return self._of[given]

    def datum(self, given: Function | Constant) -> Function | Constant:
        """The copy of a function or a constant that is a datum."""
        if given not in self._of:
            label = f"the value of the {type(given).__name__.lower()} {name_of(given)!r}"
            self._of[given] = self.separate(given, label)
        return self._of[given]

    def load(self, representative: Function, load: Cofunction) -> None:
        """Copy the Riesz representative of a cofunction; values are read from the cofunction."""
        copy = Function(representative.function_space(), name=load.name())
        self._of[representative] = self._add(_Datum(load, copy, f"the value of the cofunction {load.name()!r}"))

    def separate(self, given: Function | Constant, label: str) -> Function | Constant:
        """A copy that does not replace the datum in forms; ``label`` describes it in messages."""
        if isinstance(given, Constant):
            copy = Constant(given.dat.data_ro.reshape(given.ufl_shape), name=given.name)
        elif (space := given.function_space()).component is None:
            copy = Function(space, name=given.name())
        else:  # one component of a vector, with its values among the others'
            copy = Function(space.parent).sub(space.component)
        return self._add(_Datum(given, copy, label))

    def _add(self, datum: _Datum) -> Function | Constant:
        with stop_annotating():
            datum.read()
        self._data.append(datum)
        self._read.append(datum.values())
        return datum.copy

    def form(self, expression: Integrand) -> Integrand:
        """A form or an expression with the copies in the place of the functions and constants in it."""
        found = {given: self.datum(given) for given in data_of(expression)}
        return ufl.replace(expression, found) if found else expression

    def interpolated(self, expression: ufl.core.expr.Expr, space: WithGeometry) -> Function:
        """A function with the interpolated values of an expression of data, which :meth:`update` updates."""
        made, own = Function(space), self.form(expression)
        with stop_annotating():
            made.interpolate(own)
        self._interpolated.append((made, own))
        return made

    def condition(self, bc: DirichletBC, given: DirichletBC) -> DirichletBC:
        """A boundary condition with the copies in its value; ``given`` is the user's object that it came from."""
        value = boundary_value(bc)
        copied = self.form(value) if data_of(value) else bc._original_arg
        self._conditions.append((given, given._original_arg))
        return type(bc)(bc.function_space(), copied, bc.sub_domain)

    def originals(self) -> dict:
        """The user's functions and constants by their copies."""
        return {copy: given for given, copy in self._of.items()}

    @property
    def data(self) -> set[Function | Constant | Cofunction]:
        """The user's objects that are data."""
        return {datum.given for datum in self._data}

    # -- changes -------------------------------------------------------------------------------------------------------
    def changed(self) -> np.ndarray:
        """A mask of the data whose values on this rank differ from those that were read."""
        pairs = zip(self._data, self._read, strict=True)
        data = [not np.array_equal(datum.values(), read, equal_nan=True) for datum, read in pairs]
        return np.array(data + [bc._original_arg is not given for bc, given in self._conditions], dtype=bool)

    def given(self) -> list[tuple[str, Function | Constant | Cofunction, np.ndarray]]:
        """For each datum its description, the user's object, and its present own values."""
        return [(datum.label, datum.given, datum.values()) for datum in self._data]

    @property
    def labels(self) -> list[str]:
        """Descriptions of the data, for messages."""
        return [datum.label for datum in self._data] + [_CONDITION] * len(self._conditions)

    def update(self, which: np.ndarray) -> set[Function | Constant]:
        """Read some of the data again (collective).

        Parameters
        ----------
        which
            Mask of the data, the same on all ranks.

        Returns
        -------
        set
            Their copies.

        Raises
        ------
        InputError
            If a boundary condition has been given another value by ``set_value``.
        """
        if which[len(self._data) :].any():
            raise InputError(
                f"{_CONDITION} was given by set_value, which may be another expression: make a new functional, or give "
                "the condition a Function or a Constant and change its value"
            )
        some = [self._data[index] for index in np.flatnonzero(which)]
        for index, datum in zip(np.flatnonzero(which), some, strict=True):
            with stop_annotating():
                datum.read()
            self._read[index] = datum.values()
        changed = {datum.copy for datum in some}
        for made, expression in self._interpolated:
            if changed & set(data_of(expression)):
                with stop_annotating():
                    made.interpolate(expression)
                changed.add(made)
        return changed

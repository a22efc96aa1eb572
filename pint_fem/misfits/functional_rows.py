r"""Coefficients of linear functionals of the state: the values of their derivatives, one functional at a time.

Functionals of many sensors are often the same form with other data, such as averages with weights around places that
are ``Constant``. Differentiating and compiling a form takes longer than assembling it, so that functionals that differ
only in the functions and constants in them share one form, into whose data the values of each are copied.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import ufl
from firedrake import Constant, Function, TestFunction, derivative
from firedrake.assemble import get_assembler
from mpi4py import MPI
from pyadjoint.tape import stop_annotating
from ufl.algorithms import expand_derivatives, extract_coefficients

from pint_fem.errors import InputError
from pint_fem.evolution.evolution import Evolution
from pint_fem.evolution.quadrature import with_fixed_degrees
from pint_fem.evolution.residual import time_among
from pint_fem.kernels.arrays import get

__all__ = ["FunctionalRows"]

_ROUND_OFF = 1e-14
"""A functional's value for the zero state relative to the sum of its coefficients' magnitudes, if it is linear."""


class FunctionalRows:
    """The coefficients of functionals that are linear in an evolution's state.

    Parameters
    ----------
    evolution
        A private copy (:meth:`~pint_fem.evolution.Evolution.private`).

    Attributes
    ----------
    data : set
        Private copies of the functions and constants in the functionals so far.
    forms : int
        Number of different forms among them.
    """

    def __init__(self, evolution: Evolution):
        self.data: set[Function | Constant] = set()
        self._evolution, posed = evolution, evolution.posed
        self._variables = {posed.u, posed.t, posed.time_constant, *posed.controls, *posed.sought}
        self._shared: dict[tuple, _LinearForm] = {}

    @property
    def forms(self) -> int:
        """Number of different forms among the functionals so far."""
        return len(self._shared)

    def row(self, given: ufl.Form, name: str) -> np.ndarray:
        """Own values of the derivative of a functional, ``(n,)`` (collective over space).

        Parameters
        ----------
        given
            A functional in the user's functions.
        name
            Description of the functional, for messages.

        Raises
        ------
        InputError
            If the functional is not linear in the state, or contains what it must not.
        """
        found = _functions_and_constants(given)
        time_among(found, self._evolution.posed.t, name)
        key = self._key(given, found)
        if key not in self._shared:
            own, form = self._private(given, name)
            data = [own(datum) for datum in found if datum not in self._variables]
            self._shared[key] = _LinearForm(self._evolution, form, data, name)
        data = [self._evolution.copies.datum(datum) for datum in found if datum not in self._variables]
        self.data |= set(data)
        return self._shared[key].row(data, name)

    def _key(self, given: ufl.Form, found: Sequence[Function | Constant]) -> tuple:
        """What functionals of one form have in common; that of a form that must not be shared has its data in it."""
        places = [self._place(datum) for datum in found]
        if given.base_form_operators():
            places = list(found)
        subdomains = tuple(id(integral.subdomain_data()) for integral in given.integrals())
        return given.signature(), given.ufl_domains(), subdomains, tuple(places)

    def _place(self, datum: Function | Constant) -> object:
        """What data have to have in common to be in the same place of a form."""
        if datum in self._variables:
            return datum
        if isinstance(datum, Constant):
            return datum.ufl_shape
        space = datum.function_space()
        return space if space.component is None else datum

    def _private(self, given: ufl.Form, name: str):
        """The function that finds private copies, and the functional in them, with what it must not contain refused."""
        evolution = self._evolution
        form, t = evolution.functional(given, name)
        coefficients, own = set(extract_coefficients(form)), evolution.copies.datum
        if t is not None:
            raise InputError(f"{name} contains the time t, but sensors are the same at all times: give it without")
        if {*evolution.controls, *map(evolution.copies.variable, evolution.posed.sought)} & coefficients:
            raise InputError(f"{name} contains a control, but observations are functions of the state: give it without")
        if evolution.u not in coefficients:
            raise InputError(f"{name} does not contain the evolution's state u")
        return own, form


def _functions_and_constants(form: ufl.Form) -> list[Function | Constant]:
    """Those of a form in the order in which its signature numbers them, so that those of forms with the same signature
    correspond.
    """
    numbers = form.terminal_numbering()
    found = [c for c in numbers if isinstance(c, (Function, Constant))]
    return sorted(found, key=lambda c: (isinstance(c, Constant), numbers[c]))


class _LinearForm:
    """A functional that is linear in the state, differentiated and compiled, with data of its own.

    Parameters
    ----------
    evolution
        The evolution, a private copy.
    form
        The functional, in private copies.
    data
        Those of them that are data.
    name
        Description of the functional, for messages.

    Raises
    ------
    InputError
        If the functional is not linear in the state.
    """

    def __init__(self, evolution: Evolution, form: ufl.Form, data: Sequence[Function | Constant], name: str):
        self._size, self._comm = evolution.state_size, evolution.V.mesh().comm
        self._own = [
            Constant(np.zeros(d.ufl_shape)) if isinstance(d, Constant) else Function(d.function_space()) for d in data
        ]
        if data:
            form = ufl.replace(form, dict(zip(data, self._own, strict=True)))
        form = with_fixed_degrees(form)
        gradient = expand_derivatives(derivative(form, evolution.u, TestFunction(evolution.V)))
        if evolution.u in extract_coefficients(gradient):
            raise InputError(
                f"{name} is not linear in the state u: RunningMisfit and TerminalMisfit take any functional"
            )
        self._gradient = None if gradient.empty() else get_assembler(gradient)
        without = expand_derivatives(ufl.replace(form, {evolution.u: ufl.classes.Zero(evolution.u.ufl_shape)}))
        at_zero = ufl.replace(form, {evolution.u: Function(evolution.V)})
        self._at_zero = None if without.empty() else get_assembler(at_zero)

    def row(self, data: Sequence[Function | Constant], name: str) -> np.ndarray:
        """Own values of the derivative with the given data, ``(n,)`` (collective over space).

        Raises
        ------
        InputError
            If the functional is zero or not finite, or has a part without the state.
        """
        with stop_annotating():
            for own, given in zip(self._own, data, strict=True):
                own.assign(given.dat.data_ro.reshape(given.ufl_shape) if isinstance(given, Constant) else given)
            row = np.zeros(self._size) if self._gradient is None else get(self._gradient.assemble())
            value = 0.0 if self._at_zero is None else float(self._at_zero.assemble())
        size = self._comm.allreduce(float(np.abs(row).sum()), op=MPI.SUM)
        if not np.isfinite(size) or size == 0:
            raise InputError(
                f"{name} is {'zero' if size == 0 else 'not finite'} for all states: correct its data, or the number of "
                "its region or boundary"
            )
        if not abs(value) <= _ROUND_OFF * size:
            raise InputError(
                f"{name} has the value {value:g} for the state zero and is not linear: leave out terms without u, and "
                "subtract their values from the readings"
            )
        return row

"""The regularisation of all experiments, in copies of the controls and of the user's data of its own.

It is the same on all groups of experiments, and does not belong to one of them: it has private copies of all functions
and constants in its forms (:mod:`pint_fem.evolution.private_copies`), with the rule for data that all copies have.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import ufl
from firedrake import Function
from mpi4py import MPI

from pint_fem.adjoint.consistency.problem_data import require_same_values
from pint_fem.adjoint.regularisation import Regularisation
from pint_fem.collective import collectively
from pint_fem.evolution.control_layout import ControlLayout
from pint_fem.evolution.evolution import Evolution
from pint_fem.evolution.private_copies import PrivateCopies
from pint_fem.evolution.residual import private_functional

__all__ = ["RegularisationOfAll"]


class _Variables:
    """Private copies of all controls, in the attributes that a private copy of an evolution has for its own."""

    def __init__(self, posed: Evolution, controls: Sequence[Function]):
        self.posed, self.copies = posed, PrivateCopies()
        for control in controls:
            self.copies.variable(control)

    def functional(self, form: ufl.Form, what: str) -> tuple[ufl.Form, Function | None]:
        """A user's functional in the private copies, and the time function in it, if any."""
        return private_functional(self.posed, self.copies, form, what)


class RegularisationOfAll:
    """The regularisation and the data in it.

    Parameters
    ----------
    forms
        UFL functionals of the controls.
    layout
        The controls, on the grid of all ranks.
    posed
        An evolution, which has the time function that forms must not contain.

    Attributes
    ----------
    functional : Regularisation
        Value and derivatives.

    Raises
    ------
    InputError
        On every rank, if a form does not fit or its data differ between ranks.
    """

    def __init__(self, forms: Sequence[ufl.Form], layout: ControlLayout, posed: Evolution):
        self._spacetime, own = layout.spacetime, _Variables(posed, layout.evolution.controls)
        self.functional: Regularisation = collectively(self._spacetime.comm, "", Regularisation, forms, layout, own)
        self._copies = own.copies
        require_same_values(self._spacetime, self._copies)
        self._warned = np.zeros(len(self._copies.labels), dtype=bool)

    def changed(self) -> np.ndarray:
        """Return the mask of data that have other values on this rank than when they were read."""
        return self._copies.changed()

    def warn(self, changed: np.ndarray) -> None:
        """Warn of each change once, on the first rank, given the mask of data that have changed on any rank."""
        new, self._warned = changed & ~self._warned, changed | self._warned
        if new.any() and self._spacetime.is_root:
            names = [name for name, chosen in zip(self._copies.labels, new, strict=True) if chosen]
            warnings.warn(
                f"changed after the functional was made: {', '.join(names)}. The values read then are used; "
                "update_data() of the functional reads them again",
                stacklevel=6,
            )

    def update(self) -> list[str]:
        """Read all data again, and return the names of those with new values (collective)."""
        which = self._copies.changed()
        self._spacetime.comm.Allreduce(MPI.IN_PLACE, which, op=MPI.LOR)
        require_same_values(self._spacetime, self._copies)
        changed = collectively(self._spacetime.comm, "reading data again", self._copies.update, which)
        self.functional.update_data(changed)
        self._warned[:] = False
        return [name for name, chosen in zip(self._copies.labels, which, strict=True) if chosen]

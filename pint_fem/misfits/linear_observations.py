r"""Linear observations: the squared difference between readings and linear functionals of the state, at any times.

.. math::  J = \frac12 \sum_r \sum_s w_{rs} (\ell_s(u(t_r)) - d_{rs})^2 , \qquad
           \ell_s(u) = \sum_i c_{si} u_i , \quad c_{si} = \ell_s(\varphi_i) ,

for functionals :math:`\ell_s` in UFL, such as averages over regions, fluxes through boundaries, or terms on interior
facets. The rows :math:`c_s` are assembled once, as the derivatives of the functionals, and stored as a sparse matrix
with the own columns of a rank in space. Products with states are summed over space, and all ranks in space hold the
observations of all functionals. All else is that of readings in general (:mod:`~pint_fem.misfits.sensor_readings`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import ufl
from firedrake import Function, TestFunction, derivative
from firedrake.assemble import get_assembler
from firedrake.petsc import PETSc
from mpi4py import MPI
from numpy.typing import ArrayLike
from ufl.algorithms import expand_derivatives, extract_coefficients

from pint_fem.errors import InputError
from pint_fem.evolution.private_copies import data_of
from pint_fem.evolution.quadrature import with_fixed_degrees
from pint_fem.kernels.arrays import as_rows, get
from pint_fem.kernels.block_operator import BlockOperator
from pint_fem.kernels.direct import added
from pint_fem.misfits.sensor_readings import SensorReadings

__all__ = ["LinearObservations"]

_ROUND_OFF = 1e-14
"""A functional's value for the zero state relative to the sum of its coefficients' magnitudes, if it is linear."""


class LinearObservations(SensorReadings):
    r"""Linear functionals: :math:`\frac12 \sum_r \sum_s w_{rs} (\ell_s(u(t_r)) - d_{rs})^2`, ``u`` linear in time
    between steps.

    Functions and constants in the functionals are data, and so are the arrays: they are copied when a functional is
    made, and read again by its ``update_data()``, also what was put in the place of the arrays as attributes ``times``,
    ``data`` (the values) and ``weight``. Entries of the state that boundary conditions fix are read as all others.

    Parameters
    ----------
    functionals
        UFL functionals that are linear in the evolution's ``u``, such as ``u/area*dx(1)`` or
        ``-kappa*dot(grad(u), n)*ds(2)``, of any fields and components.
    times
        ``(times,)``, increasing, within the evolution's interval.
    values
        ``(times, functionals)``. Masked entries of a ``numpy.ma.MaskedArray`` are missing readings, which have no part
        in the misfit: functionals that are read at different times have the union of these as ``times``.
    weight
        ``w``, for instance one over (variance times number of values): a number for all readings, one per functional
        ``(functionals,)``, or one per reading ``(times, functionals)``; none negative.

    Attributes
    ----------
    functionals : tuple of ufl.Form
        As given.

    Raises
    ------
    InputError
        On forms that are no functionals, on arrays as :class:`~pint_fem.misfits.PointSensors`; when a reduced
        functional is made, if a functional is not linear in ``u``, has a part without ``u`` that is not zero, or
        contains a control or the time.
    """

    called = "functionals"
    replicated = True

    def __init__(
        self,
        functionals: Sequence[ufl.Form],
        times: ArrayLike,
        values: ArrayLike,
        *,
        weight: ArrayLike = 1.0,
    ):
        if not isinstance(functionals, (list, tuple)) or not functionals:
            raise InputError("LinearObservations: give functionals as a list, also a single one: [u*dx]")
        self._functionals = tuple(functionals)
        for number, form in enumerate(self._functionals):
            if not isinstance(form, ufl.Form) or form.arguments():
                raise InputError(
                    f"{self._name(number)} is not a UFL functional: give one such as u*dx(1), without test functions"
                )
        super().__init__(times, values, weight)

    @property
    def functionals(self) -> tuple[ufl.Form, ...]:
        """The functionals as given."""
        return self._functionals

    @staticmethod
    def _name(number: int) -> str:
        return f"LinearObservations: functional {number}"

    def _count(self, given: dict[str, np.ndarray]) -> int:
        return len(self._functionals)

    def given(self) -> dict:
        """Signatures of the functionals and the user's arrays."""
        return {"the functionals": [form.signature()[:16] for form in self._functionals]} | super().given()

    def update_data(self, changed: set, *, own: bool) -> None:
        """Assemble the functionals again if data in them have changed, and copy the user's arrays if these have."""
        if changed & self._data:
            self.bind(self.evolution, self.spacetime, self.slab)
        else:
            super().update_data(changed, own=own)

    # -- the rows ------------------------------------------------------------------------------------------------------
    def _find_sensors(self) -> None:
        """Assemble the functionals' rows."""
        self.local, self._data = np.arange(len(self._functionals)), set()
        rows = np.array([self._row(number, form) for number, form in enumerate(self._functionals)])
        self._H, self._H_T = BlockOperator(_sparse(rows)), BlockOperator(_sparse(rows.T))

    def _row(self, number: int, given: ufl.Form) -> np.ndarray:
        """Own values of the derivative of a functional, ``(n,)`` (collective over space).

        Raises
        ------
        InputError
            If the functional is not linear in the state, or contains what it must not.
        """
        evolution, name = self.evolution, self._name(number)
        form, t = evolution.functional(given, name)
        coefficients = set(extract_coefficients(form))
        if t is not None:
            raise InputError(f"{name} contains the time t, but sensors are the same at all times: give it without")
        if {*evolution.controls, *map(evolution.copies.variable, evolution.posed.sought)} & coefficients:
            raise InputError(f"{name} contains a control, but observations are functions of the state: give it without")
        if evolution.u not in coefficients:
            raise InputError(f"{name} does not contain the evolution's state u")
        self._data |= set(data_of(form))
        form = with_fixed_degrees(form)
        gradient = expand_derivatives(derivative(form, evolution.u, TestFunction(evolution.V)))
        if evolution.u in extract_coefficients(gradient):
            raise InputError(
                f"{name} is not linear in the state u: RunningMisfit and TerminalMisfit take any functional"
            )
        row = np.zeros(evolution.state_size) if gradient.empty() else get(get_assembler(gradient).assemble())
        size = evolution.V.mesh().comm.allreduce(float(np.abs(row).sum()), op=MPI.SUM)
        if not np.isfinite(size) or size == 0:
            raise InputError(
                f"{name} is {'zero' if size == 0 else 'not finite'} for all states: correct its data, or the number of "
                "its region or boundary"
            )
        without = expand_derivatives(ufl.replace(form, {evolution.u: ufl.classes.Zero(evolution.u.ufl_shape)}))
        if without.empty():
            return row
        value = float(get_assembler(ufl.replace(form, {evolution.u: Function(evolution.V)})).assemble())
        if not abs(value) <= _ROUND_OFF * size:
            raise InputError(
                f"{name} has the value {value:g} for the state zero and is not linear: leave out terms without u, and "
                "subtract their values from the readings"
            )
        return row

    def _at_sensors(self, U: np.ndarray) -> np.ndarray:
        """Values of the functionals of states ``(..., n)``, ``(..., functionals)`` (collective over space)."""
        return self.spacetime.sum_over_space(self._H(as_rows(U))).reshape(*U.shape[:-1], len(self.local))

    def _at_sensors_transposed(self, S: np.ndarray) -> np.ndarray:
        """Sums of the rows with coefficients ``(..., functionals)``, ``(..., n)``."""
        return self._H_T(as_rows(S)).reshape(*S.shape[:-1], self.evolution.state_size)

    def operator_nbytes(self) -> dict[str, int]:
        """Bytes of the matrix of the rows and its transpose on this rank, by part."""
        return added(self._H.nbytes, self._H_T.nbytes)


def _sparse(rows: np.ndarray) -> PETSc.Mat:
    """The entries of an array that are not zero as a matrix of this process."""
    row, column = np.nonzero(rows)
    starts = np.searchsorted(row, np.arange(len(rows) + 1)).astype(PETSc.IntType)
    csr = (starts, column.astype(PETSc.IntType), np.ascontiguousarray(rows[row, column]))
    matrix = PETSc.Mat().createAIJ(rows.shape, csr=csr, comm=PETSc.COMM_SELF)
    matrix.assemble()
    return matrix

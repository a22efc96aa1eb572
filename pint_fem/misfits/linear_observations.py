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
from firedrake.petsc import PETSc
from numpy.typing import ArrayLike

from pint_fem.errors import InputError
from pint_fem.kernels.arrays import as_rows
from pint_fem.kernels.block_operator import BlockOperator
from pint_fem.kernels.direct import added
from pint_fem.misfits.functional_rows import FunctionalRows
from pint_fem.misfits.sensor_readings import SensorReadings

__all__ = ["LinearObservations"]


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
        ``-kappa*dot(grad(u), n)*ds(2)``, of any fields and components. In tetrahedra give integrands that are no
        polynomials, such as ``exp(-x[0]**2)*u``, a rule of degree 5, ``dx(degree=5)``, or a high one: the points of
        FIAT's rules of degrees other than 1, 2 and 5 depend on the order of a cell's vertices, so that values differ
        between numbers of ranks in space by as much as the rule is inexact. Functionals that differ only in functions
        and constants share one compiled form.
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
        rows = FunctionalRows(self.evolution)
        found = [_entries(rows.row(form, self._name(number))) for number, form in enumerate(self._functionals)]
        self.local, self._data = np.arange(len(self._functionals)), rows.data
        matrix = _sparse(found, self.evolution.state_size)
        self._H, self._H_T = BlockOperator(matrix), BlockOperator(matrix.transpose(PETSc.Mat()))

    def _at_sensors(self, U: np.ndarray) -> np.ndarray:
        """Values of the functionals of states ``(..., n)``, ``(..., functionals)`` (collective over space)."""
        return self.spacetime.sum_over_space(self._H(as_rows(U))).reshape(*U.shape[:-1], len(self.local))

    def _at_sensors_transposed(self, S: np.ndarray) -> np.ndarray:
        """Sums of the rows with coefficients ``(..., functionals)``, ``(..., n)``."""
        return self._H_T(as_rows(S)).reshape(*S.shape[:-1], self.evolution.state_size)

    def operator_nbytes(self) -> dict[str, int]:
        """Bytes of the matrix of the rows and its transpose on this rank, by part."""
        return added(self._H.nbytes, self._H_T.nbytes)


def _entries(row: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places and values of the entries of a row that are not zero."""
    column = np.flatnonzero(row)
    return column.astype(PETSc.IntType), row[column]


def _sparse(rows: Sequence[tuple[np.ndarray, np.ndarray]], columns: int) -> PETSc.Mat:
    """The matrix of this process with the given entries in its rows."""
    starts = np.concatenate([[0], np.cumsum([len(column) for column, _ in rows])]).astype(PETSc.IntType)
    csr = (starts, *(np.concatenate(parts) for parts in zip(*rows, strict=True)))
    matrix = PETSc.Mat().createAIJ((len(rows), columns), csr=csr, comm=PETSc.COMM_SELF)
    matrix.assemble()
    return matrix

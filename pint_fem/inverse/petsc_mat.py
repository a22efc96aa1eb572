r"""The map from controls to readings as a matrix of PETSc, for its Krylov methods.

Rows are the readings, divided among all ranks in contiguous parts. Columns are the entries of the controls, each on one
rank: static controls are divided among the ranks in time, controls with one value per step are on the rank of the step.
Products are those of coefficients, so that the transpose gives dual vectors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from firedrake.petsc import PETSc

from pint_fem.all_at_once.grids import split_steps

if TYPE_CHECKING:
    from pint_fem.inverse.map import ParameterToObservable

__all__ = ["make_petsc_mat"]


class _Products:
    """The products of a Python matrix of PETSc with a map from controls to readings (collective)."""

    def __init__(self, F: ParameterToObservable, bounds: list[int]):
        self._F, self._comm, self._counts = F, F.spacetime.comm, np.diff(bounds)
        self._own = slice(bounds[self._comm.rank], bounds[self._comm.rank + 1])

    def mult(self, mat: PETSc.Mat, x: PETSc.Vec, y: PETSc.Vec) -> None:
        """Write ``F x`` to ``y``."""
        z = self._F.partition.spread(x.array_r[None])
        y.array_w[:] = self._F.product(z)[0, self._own]

    def multTranspose(self, mat: PETSc.Mat, x: PETSc.Vec, y: PETSc.Vec) -> None:
        """Write ``F^T x`` to ``y``."""
        readings = np.empty(self._F.shape[0])
        self._comm.Allgatherv(np.ascontiguousarray(x.array_r), [readings, self._counts])
        y.array_w[:] = self._F.transposed_product(readings[None])[0, self._F.partition.own]


def make_petsc_mat(F: ParameterToObservable) -> PETSc.Mat:
    """Return a Python matrix of PETSc on all ranks with the products of a map (collective).

    Parameters
    ----------
    F
        The map.
    """
    comm = F.spacetime.comm
    bounds = split_steps(F.shape[0], comm.size)
    rows, columns = bounds[comm.rank + 1] - bounds[comm.rank], len(F.partition.own)
    mat = PETSc.Mat().createPython(((rows, None), (columns, None)), _Products(F, bounds), comm=comm)
    mat.setUp()
    return mat

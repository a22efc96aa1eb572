r"""The shifted systems of distributed matrices: PETSc solves the real equivalent of twice the size.

PETSc is built for real numbers. :math:`(A + \mathrm{i} B)(x + \mathrm{i} y) = f + \mathrm{i} g` is

.. math::
   \begin{pmatrix} A & -B \\ B & A \end{pmatrix} \begin{pmatrix} x \\ y \end{pmatrix} =
   \begin{pmatrix} f \\ g \end{pmatrix} ,

with real and imaginary parts side by side for each unknown: its vectors are complex arrays as they lie in memory. The
plain transpose is that of the conjugate of the real equivalent's transpose.

This module needs petsc4py and petsctools; :mod:`pint_fem.paradiag` does not import it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from mpi4py import MPI
from petsc4py import PETSc
from petsctools import OptionsManager
from scipy.sparse import csr_matrix

from pint_fem.kernels.direct import completed, direct_solver, factor_bytes, matrix_bytes
from pint_fem.paradiag.lane_kernels import LaneKernels, RealMatrix
from pint_fem.paradiag.panels import on_pattern, ones, real_product
from pint_fem.paradiag.sparse_system import SparseSystem, Weights, plain_weights
from pint_fem.paradiag.systems import ShiftedSystem

__all__ = ["PETScSystem", "Product", "distributed_system"]

LARGE = {"ksp_type": "preonly", "pc_type": "lu", "pc_factor_mat_solver_type": "mumps"}


class Product:
    """A real matrix times complex vectors, also transposed.

    Parameters
    ----------
    X
        An assembled matrix.
    """

    def __init__(self, X: PETSc.Mat):
        self._X = X
        self._columns, self._rows = X.createVecs()
        self._alone = (_csr(X), csr_matrix(_csr(X).T)) if X.comm.size == 1 else None
        self._lanes: dict[tuple, RealMatrix] = {}

    def __call__(self, r: np.ndarray, *, transposed: bool = False) -> np.ndarray:
        """The product with a complex vector of own unknowns, ``(n,)`` (collective)."""
        if self._alone is not None:
            return real_product(self._alone[transposed], r)
        source, target = (self._rows, self._columns) if transposed else (self._columns, self._rows)
        out = np.empty(target.getLocalSize(), complex)
        for part, where in ((r.real, out.real), (r.imag, out.imag)):
            source.array[:] = part
            (self._X.multTranspose if transposed else self._X.mult)(source, target)
            where[:] = target.array_r
        return out

    def on_lanes(self, kernels: LaneKernels, r: np.ndarray, *, transposed: bool = False) -> np.ndarray:
        """The product with lanes ``(batch, n, 2, W)``, on one rank in space."""
        key = transposed, kernels.dtype.char
        if key not in self._lanes:
            self._lanes[key] = RealMatrix.of(self._alone[transposed], kernels.dtype)
        return kernels.product(self._lanes[key], r)


class PETScSystem(ShiftedSystem):
    """A system of distributed matrices, solved by PETSc as its real equivalent.

    Parameters
    ----------
    parts, weights
        Assembled AIJ matrices with the same rows on each rank, ``S``, ``M`` and others; their weights by shift.
    parameters
        PETSc options of the solver of the real equivalent; default: a factorisation, MUMPS's where it is large and
        distributed.
    prefix
        Prefix of the options in PETSc's database.
    """

    def __init__(self, parts: Sequence[PETSc.Mat], weights: Weights, parameters: Mapping, prefix: str = "paradiag_"):
        self._weights, self._prefix, self._comm = weights, prefix, parts[0].comm
        size = 2 * parts[0].getSize()[0]
        direct = direct_solver(self._comm, size) or LARGE
        self._parameters = completed(parameters, self._comm, size) if parameters else direct
        self._bytes: int | None = None
        self._mass = Product(parts[1])
        (local, size), _ = parts[0].getSizes()
        own = [csr_matrix(X.getValuesCSR()[::-1], shape=(local, size)) for X in parts]
        every = sum(map(ones, own[1:]), ones(own[0]))
        every.sort_indices()
        self._parts = [on_pattern(X, every) for X in own]
        starts, lengths = every.indptr[:-1], np.diff(every.indptr)
        # each row makes two, each entry four
        inside = np.arange(every.nnz) - np.repeat(starts, lengths)
        self._top = np.repeat(4 * starts, lengths) + 2 * inside
        self._bottom = self._top + np.repeat(2 * lengths, lengths)
        indptr = np.concatenate([[0], np.cumsum(np.repeat(2 * lengths, 2))])
        indices = np.empty(4 * every.nnz, np.int64)
        for start in (self._top, self._bottom):
            indices[start], indices[start + 1] = 2 * every.indices, 2 * every.indices + 1
        self._csr = indptr.astype(PETSc.IntType), indices.astype(PETSc.IntType)
        self._sizes = (2 * local, 2 * size)
        self._b, self._z = (PETSc.Vec().createMPI(self._sizes, comm=self._comm) for _ in range(2))

    def factor(self, y: complex) -> tuple[Any, int]:
        """A PETSc solver with the factor for ``y``, and its size in bytes on the rank with the largest (collective)."""
        total = sum(w * part for w, part in zip(self._weights(y), self._parts, strict=True))
        data = np.empty(4 * len(total))
        data[self._top], data[self._top + 1] = total.real, -total.imag
        data[self._bottom], data[self._bottom + 1] = total.imag, total.real
        matrix = PETSc.Mat().createAIJ((self._sizes, self._sizes), csr=(*self._csr, data), comm=self._comm)
        ksp = PETSc.KSP().create(self._comm)
        ksp.setOperators(matrix)
        matrix.destroy()  # the solver's reference stays
        options = OptionsManager(self._parameters, self._prefix)
        options.set_from_options(ksp)
        ksp.setErrorIfNotConverged(True)
        with options.inserted_options():
            ksp.setUp()
        if self._bytes is None:  # all have the same pattern; ranks agree on what fits
            own = matrix_bytes(ksp.getOperators()[0]) + factor_bytes(ksp, self._parameters)
            self._bytes = self._comm.tompi4py().allreduce(own, op=MPI.MAX)
        return ksp, self._bytes

    def solve(self, factor: Any, y: complex, r: np.ndarray, *, transposed: bool) -> np.ndarray:
        """Solve for a complex vector with the matrix of ``y`` or its (not conjugate) transpose (collective)."""
        self._b.array[:] = (r.conj() if transposed else np.ascontiguousarray(r)).view(float)
        (factor.solveTranspose if transposed else factor.solve)(self._b, self._z)
        out = self._z.array_r.copy().view(complex)
        return out.conj() if transposed else out

    def release(self, factor: Any) -> None:
        """Free the memory of a factor (collective)."""
        factor.destroy()

    def mass(self, r: np.ndarray, *, transposed: bool) -> np.ndarray:
        """``M r`` or ``M^T r`` (collective)."""
        return self._mass(r, transposed=transposed)


def distributed_system(
    parts: Sequence[PETSc.Mat], parameters: Mapping, weights: Weights = plain_weights, prefix: str = "paradiag_"
) -> PETScSystem | SparseSystem:
    """A system of PETSc's matrices.

    Parameters
    ----------
    parts
        Assembled AIJ matrices ``S``, ``M`` and others, whose weighted sum the system is.
    weights
        Weights of the parts as a function of the shift.
    parameters
        PETSc options; without any, one rank in space has a :class:`~pint_fem.paradiag.sparse_system.SparseSystem`.
    prefix
        Prefix of options in PETSc's database.

    Returns
    -------
    PETScSystem or SparseSystem
    """
    if parts[0].comm.size > 1 or parameters:
        return PETScSystem(parts, weights, parameters, prefix)
    return SparseSystem([_csr(X) for X in parts], weights)


def _csr(X: PETSc.Mat) -> csr_matrix:
    return csr_matrix(X.getValuesCSR()[::-1], shape=X.getSize())

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

from collections.abc import Mapping

import numpy as np
from mpi4py import MPI
from petsc4py import PETSc
from petsctools import OptionsManager
from scipy.sparse import csr_matrix

from pint_fem.direct import direct_solver, factor_bytes, matrix_bytes
from pint_fem.paradiag.systems import ShiftedSteps, SparseSystem

__all__ = ["PETScSystem", "shifted_steps"]

LARGE = {"ksp_type": "preonly", "pc_type": "lu", "pc_factor_mat_solver_type": "mumps"}


class PETScSystem:
    """``S - y M`` by PETSc, see :class:`~pint_fem.paradiag.systems.ShiftedSystem`.

    Parameters
    ----------
    S, M
        Assembled AIJ matrices with the same rows on each rank.
    parameters
        PETSc options of the solver of the real equivalent; default: a factorisation, MUMPS's where it is large and
        distributed.
    prefix
        In PETSc's database.
    """

    def __init__(self, S: PETSc.Mat, M: PETSc.Mat, parameters: Mapping, prefix: str = "paradiag_"):
        direct = parameters or direct_solver(S.comm, 2 * S.getSize()[0]) or LARGE
        self._S, self._parameters, self._prefix = S, dict(direct), prefix
        self._x, self._y = S.createVecs()
        self._bytes: int | None = None
        (local, size), _ = S.getSizes()
        s, m = (csr_matrix(X.getValuesCSR()[::-1], shape=(local, size)) for X in (S, M))
        both = _ones(s) + _ones(m)
        both.sort_indices()
        self._s, self._m = _on_pattern(s, both), _on_pattern(m, both)
        starts, lengths = both.indptr[:-1], np.diff(both.indptr)
        # each row makes two, each entry four
        inside = np.arange(both.nnz) - np.repeat(starts, lengths)
        self._top = np.repeat(4 * starts, lengths) + 2 * inside
        self._bottom = self._top + np.repeat(2 * lengths, lengths)
        indptr = np.concatenate([[0], np.cumsum(np.repeat(2 * lengths, 2))])
        indices = np.empty(4 * both.nnz, np.int64)
        for start in (self._top, self._bottom):
            indices[start], indices[start + 1] = 2 * both.indices, 2 * both.indices + 1
        self._csr = indptr.astype(PETSc.IntType), indices.astype(PETSc.IntType)
        self._sizes = (2 * local, 2 * size)
        self._b, self._z = (PETSc.Vec().createMPI(self._sizes, comm=S.comm) for _ in range(2))

    def factor(self, y):
        """See :class:`~pint_fem.paradiag.systems.ShiftedSystem`."""
        real, imaginary = self._s - y.real * self._m, -y.imag * self._m
        data = np.empty(4 * len(real))
        data[self._top], data[self._top + 1] = real, -imaginary
        data[self._bottom], data[self._bottom + 1] = imaginary, real
        matrix = PETSc.Mat().createAIJ((self._sizes, self._sizes), csr=(*self._csr, data), comm=self._S.comm)
        ksp = PETSc.KSP().create(self._S.comm)
        ksp.setOperators(matrix)
        options = OptionsManager(self._parameters, self._prefix)
        options.set_from_options(ksp)
        ksp.setErrorIfNotConverged(True)
        with options.inserted_options():
            ksp.setUp()
        if self._bytes is None:  # all have the same pattern; ranks agree on what fits
            own = matrix_bytes(matrix) + factor_bytes(ksp)
            self._bytes = self._S.comm.tompi4py().allreduce(own, op=MPI.MAX)
        return ksp, self._bytes

    def solve(self, factor, r, *, transposed):
        """See :class:`~pint_fem.paradiag.systems.ShiftedSystem`."""
        self._b.array[:] = (r.conj() if transposed else np.ascontiguousarray(r)).view(float)
        (factor.solveTranspose if transposed else factor.solve)(self._b, self._z)
        out = self._z.array_r.copy().view(complex)
        return out.conj() if transposed else out

    def product(self, r, *, transposed):
        """See :class:`~pint_fem.paradiag.systems.ShiftedSystem`."""
        out = np.empty(len(r), complex)
        for part, target in ((r.real, out.real), (r.imag, out.imag)):
            self._x.array[:] = part
            (self._S.multTranspose if transposed else self._S.mult)(self._x, self._y)
            target[:] = self._y.array_r
        return out


def shifted_steps(A, b, stages: Mapping[float, PETSc.Mat], M: PETSc.Mat, memory: float, parameters: Mapping):
    """The solves of the frequencies for PETSc's matrices.

    Parameters
    ----------
    A, b
        Butcher tableau.
    stages
        ``S`` by the diagonal entry of ``A``.
    M
        As the propagator has it.
    memory
        Bytes of factors kept on a rank.
    parameters
        PETSc options; without any, one rank in space uses SuperLU for complex matrices.

    Returns
    -------
    ShiftedSteps
    """
    if M.comm.size > 1 or parameters:
        systems = {a: PETScSystem(S, M, parameters) for a, S in stages.items()}
    else:
        systems = {a: SparseSystem(_csr(S), _csr(M)) for a, S in stages.items()}
    return ShiftedSteps(A, b, systems, memory)


def _csr(X: PETSc.Mat) -> csr_matrix:
    return csr_matrix(X.getValuesCSR()[::-1], shape=X.getSize())


def _ones(X: csr_matrix) -> csr_matrix:
    X = X.copy()
    X.data[:] = 1.0
    return X


def _on_pattern(X: csr_matrix, pattern: csr_matrix) -> np.ndarray:
    """Entries of a matrix on a larger pattern."""
    rows, columns = X.shape
    number = lambda Y: np.repeat(np.arange(rows, dtype=np.int64), np.diff(Y.indptr)) * columns + Y.indices
    out = np.zeros(pattern.nnz)
    out[np.searchsorted(number(pattern), number(X))] = X.data
    return out

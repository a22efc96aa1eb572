r"""Whether misfit and control are functions of the pencil of a linear evolution.

The matrices of the state's fields are compared with a mass matrix :math:`M_0` and a stiffness matrix :math:`K_0` of one
of them: ``M`` and ``K`` block by block, and :math:`Q` and :math:`F R^{-1} F^T` by their products with a random vector
(the former may have a part with :math:`K_0`, as where gradients are observed).
All of it concerns the free unknowns only.
"""

from __future__ import annotations

import numpy as np
from firedrake.petsc import PETSc
from mpi4py import MPI

from pint_fem.kernels.factor import is_symmetric
from pint_fem.kkt.model import ControlModel
from pint_fem.kkt.partial_fractions import FieldCoefficients

__all__ = ["Pencil", "find_pencil"]

_EQUAL = 1e-8
"""Largest difference of products that are equal, relative to their size."""


class Pencil:
    """The matrices and coefficients of a problem that is a function of one pencil.

    Attributes
    ----------
    K, M : PETSc.Mat
        :math:`K_0`, with unit rows and columns of unknowns with a condition, and :math:`M_0`, with zero ones.
    fields : list of slice
        Places of each field in a state of this rank.
    free : ndarray of bool
        Unknowns of a field without a condition.
    coefficients : FieldCoefficients
        What multiplies the matrices.
    largest : float
        About the largest eigenvalue.
    """

    def __init__(self, K: PETSc.Mat, M: PETSc.Mat, fields: list[slice], free: np.ndarray, found: FieldCoefficients):
        self.fields, self.free, self.coefficients = fields, free, found
        rows = (np.flatnonzero(~free) + M.getOwnershipRange()[0]).astype(PETSc.IntType)
        self.K, self.M = K.copy(), M.copy()
        self.K.zeroRowsColumns(rows, diag=1.0)
        self.M.zeroRowsColumns(rows, diag=0.0)
        sums = np.abs(self.K.getValuesCSR()[2])
        sums = np.add.reduceat(np.append(sums, 0.0), self.K.getValuesCSR()[0][:-1]) if len(free) else np.zeros(0)
        diagonal = self.M.getDiagonal().array_r
        ratio = (sums[free] / diagonal[free]).max(initial=0.0)
        self.largest = 4 * float(M.comm.tompi4py().allreduce(float(ratio), op=MPI.MAX)) or 1.0


def find_pencil(model: ControlModel) -> Pencil | str:
    """The pencil, or why there is none, as the end of a sentence (collective)."""
    propagator = model.propagator
    evolution = propagator.evolution
    if model.weights.has_rates:
        return "rates of change are regularised"
    if propagator.fields is not None or evolution.nullspace is not None:
        return "a field is eliminated, or there is a nullspace"
    if evolution.boundary_controls is not None:
        return "a control is in boundary values"
    M, K = model.matrices
    if K is None:
        return "the evolution has no operator K"
    free = model.free
    if is_symmetric(M) and is_symmetric(K):
        found = _coefficients(model, [slice(0, model.size)], free, M, K, np.ones((1, 1)), np.zeros((1, 1)))
        if not isinstance(found, str):
            return Pencil(K, M, [slice(0, model.size)], free, found)
        reason = found
    else:
        reason = "the operators are not symmetric"
    return _of_fields(model, M, K, free) or reason


def _of_fields(model: ControlModel, M: PETSc.Mat, K: PETSc.Mat, free: np.ndarray) -> Pencil | None:
    """The pencil of a mixed state whose fields have the same space and conditions."""
    V, comm = model.sweeps.evolution.V, M.comm.tompi4py()
    if len(V) < 2:
        return None
    fields = model.fields
    same = len({f.stop - f.start for f in fields}) == 1 and all((free[f] == free[fields[0]]).all() for f in fields)
    same = same and len({(sub.ufl_element(), sub.value_shape) for sub in V.subspaces}) == 1
    if not comm.allreduce(same, op=MPI.LAND):
        return None
    rows = [_index_set(M, f) for f in fields]
    blocks = [[[X.createSubMatrix(i, j) for j in rows] for i in rows] for X in (M, K)]
    p, free = len(fields), free[fields[0]]
    base = next((B for row in blocks[0] for B in row if B.norm() > 0), None)
    stiffness = next((B for row in blocks[1] for B in row if _multiple(B, base) is None), None)
    if base is None or stiffness is None or not (is_symmetric(base) and is_symmetric(stiffness)):
        return None
    m, k0, k1 = np.zeros((3, p, p))
    for i in range(p):
        for j in range(p):
            found = _combination(blocks[0][i][j], base, stiffness), _combination(blocks[1][i][j], base, stiffness)
            if None in found or abs(found[0][1]) > 0:
                return None
            m[i, j], (k0[i, j], k1[i, j]) = found[0][0], found[1]
    found = _coefficients(model, fields, free, base, stiffness, m, k0, k1)
    return None if isinstance(found, str) else Pencil(stiffness, base, fields, free, found)


def _coefficients(
    model: ControlModel, fields: list[slice], free: np.ndarray, M: PETSc.Mat, K: PETSc.Mat, m: np.ndarray,
    k0: np.ndarray, k1: np.ndarray | None = None,
) -> FieldCoefficients | str:  # fmt: skip
    """Coefficients of misfit and control by products with random vectors, or which of them is no multiple."""
    comm, p = M.comm.tompi4py(), len(fields)
    x, Mx = M.createVecs()
    rng = np.random.default_rng(comm.rank)
    x.array[:] = np.where(free, rng.standard_normal(len(free)), 0.0)
    given, basis = x.array_r.copy(), []
    for matrix in (M, K):
        matrix.mult(x, Mx)
        basis.append(np.where(free, Mx.array_r, 0.0))
    dot = lambda a, b: comm.allreduce(np.asarray(a @ b), op=MPI.SUM)
    gram, out = dot(np.array(basis), np.array(basis).T), {}
    sizes = np.sqrt(np.diag(gram))
    for name, product, terms in (("misfit", model.misfit, 2), ("control", model.control_gram, 1)):
        found = np.zeros((2, p, p))
        for j, column in enumerate(fields):
            states = np.zeros((1, model.size))
            states[0, column] = given
            result = product(states)[0]
            size = np.sqrt(dot(result, result))
            for i, row in enumerate(fields):
                values = np.where(free, result[row], 0.0)
                scaled = gram[:terms, :terms] / np.outer(sizes[:terms], sizes[:terms])
                c = np.linalg.solve(scaled, dot(np.array(basis[:terms]), values) / sizes[:terms])
                c = np.where(np.abs(c) > _EQUAL * size, c, 0.0) / sizes[:terms]
                rest = values - c @ np.array(basis[:terms])
                if not np.sqrt(dot(rest, rest)) <= _EQUAL * size:
                    return f"the {name} is no multiple of the mass matrix of the state"
                found[:terms, i, j] = c
        if not all(np.allclose(part, part.T) for part in found):
            return f"the {name} is not symmetric"
        out[name] = found
    k1 = np.ones((1, 1)) if k1 is None else k1
    return FieldCoefficients(m, k0, k1, out["misfit"][0], out["control"][0], out["misfit"][1])


def _index_set(M: PETSc.Mat, rows: slice) -> PETSc.IS:
    first = M.getOwnershipRange()[0]
    return PETSc.IS().createStride(rows.stop - rows.start, first + rows.start, 1, comm=M.comm)


def _combination(X: PETSc.Mat, M: PETSc.Mat, K: PETSc.Mat) -> tuple[float, float] | None:
    """Coefficients with which a matrix is a combination of two others with a pattern of their own."""
    if X.norm() == 0:
        return 0.0, 0.0
    comm, rng = X.comm.tompi4py(), np.random.default_rng(X.comm.rank)
    x, y = X.createVecs()
    x.array[:] = rng.standard_normal(x.getLocalSize())
    products = []
    for matrix in (X, M, K):
        matrix.mult(x, y)
        products.append(y.array_r.copy())
    gram = comm.allreduce(np.array(products) @ np.array(products).T, op=MPI.SUM)
    c = np.linalg.lstsq(gram[1:, 1:], gram[1:, 0], rcond=None)[0]
    rest = products[0] - c @ np.array(products[1:])
    if comm.allreduce(float(rest @ rest), op=MPI.SUM) > (_EQUAL**2) * gram[0, 0]:
        return None
    sizes = np.abs(c) * np.sqrt(np.diag(gram)[1:])
    return tuple(float(v) if s > _EQUAL * sizes.max() else 0.0 for v, s in zip(c, sizes, strict=True))


def _multiple(X: PETSc.Mat, M: PETSc.Mat) -> float | None:
    """The factor by which a matrix is a multiple of another one, or ``None``."""
    if X.norm() == 0:
        return 0.0
    comm, rng = X.comm.tompi4py(), np.random.default_rng(X.comm.rank)
    x, y = X.createVecs()
    x.array[:] = rng.standard_normal(x.getLocalSize())
    X.mult(x, y)
    left = y.array_r.copy()
    M.mult(x, y)
    right = y.array_r.copy()
    gram = comm.allreduce(np.array([left @ left, left @ right, right @ right]), op=MPI.SUM)
    factor = gram[1] / gram[2]
    rest = left - factor * right
    return float(factor) if comm.allreduce(float(rest @ rest), op=MPI.SUM) <= _EQUAL**2 * gram[0] else None

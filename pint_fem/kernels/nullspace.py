r"""Projections and pins for stage systems with nullspaces, such as the constant pressure of an enclosed flow.

Let the columns of ``N`` span the nullspace of a stage's matrix ``S`` and those of ``L`` that of its transpose, both
orthonormal. A stage's equation determines its solution up to ``N``, and has one only for right-hand sides without a
part in ``L``. As in Firedrake's solvers, both parts are removed:

.. math::
    x = P_N\, S_\sigma^{-1} P_L\, b , \qquad P_N = I - N N^T , \quad P_L = I - L L^T , \qquad
    S_\sigma = S + \sum_{j \in J} \sigma_j e_j e_j^T .

The *pins* ``J`` are as many unknowns as there are vectors, such that the rows ``J`` of ``N`` and of ``L`` are regular:
then :math:`S_\sigma` is regular, and as :math:`L^T S_\sigma x = \sum_j \sigma_j x_j L^T e_j` vanishes with
:math:`L^T P_L b`, the pinned unknowns of :math:`S_\sigma^{-1} P_L b` are zero and ``S`` is solved exactly. So direct
solvers have no small pivots; symmetry and definiteness stay, and the transpose is exactly
:math:`P_L S_\sigma^{-T} P_N`. Iterative solvers work with ``S`` and PETSc's own nullspaces, and build preconditioners
of :math:`S_\sigma`. The solution has no part in ``N`` whatever the first guess was.

The nullspaces of ``S = M + h K`` for all ``h`` are common ones of ``M`` and ``K``, and those of :math:`S - y M` for all
complex shifts of ParaDiag, too.
"""

from __future__ import annotations

import numpy as np
from firedrake import Function, MixedVectorSpaceBasis, VectorSpaceBasis
from firedrake.functionspaceimpl import WithGeometry
from firedrake.petsc import PETSc
from mpi4py import MPI

from pint_fem.errors import InputError
from pint_fem.kernels.arrays import get, own_size, put

__all__ = ["Nullspace", "basis_vectors", "read_nullspace"]

EXACT = 1e-8
"""Largest product of the matrix with a unit vector of its nullspace, relative to the matrix's norm."""
DEPENDENT = 1e-8
"""Relative norm of a vector's part orthogonal to the others below which it depends on them."""
_MAX = PETSc.NormType.NORM_INFINITY


def basis_vectors(basis: VectorSpaceBasis | MixedVectorSpaceBasis, V: WithGeometry, name: str) -> np.ndarray:
    """Own values ``(k, own_size(V))`` of Firedrake's basis of a nullspace (collective).

    Parameters
    ----------
    basis
        ``VectorSpaceBasis`` or ``MixedVectorSpaceBasis``, on ``V``.
    V
        The state's space.
    name
        Name of the argument, for messages.

    Raises
    ------
    InputError
        If it is no basis, or not on the space.
    """
    if isinstance(basis, VectorSpaceBasis):
        vectors = [get(_on(V, vector, name)) for vector in basis._vecs]
        constant = [np.ones(own_size(V))] if basis._constant else []
        return np.array([*constant, *vectors]).reshape(-1, own_size(V))
    if not isinstance(basis, MixedVectorSpaceBasis):
        raise InputError(
            f"{name} is a {type(basis).__name__}: give Firedrake's VectorSpaceBasis, or MixedVectorSpaceBasis for a "
            "mixed state"
        )
    if basis._function_space != V:
        raise InputError(f"{name}: the MixedVectorSpaceBasis is on another space than the state")
    found = [np.zeros((0, own_size(V)))]
    for index, part in enumerate(basis):
        if isinstance(part, VectorSpaceBasis):
            rows = basis_vectors(part, V.sub(index), name)
            whole = np.zeros((len(rows), own_size(V)))
            start = sum(own_size(V.sub(i)) for i in range(index))
            whole[:, start : start + rows.shape[1]] = rows
            found.append(whole)
    return np.concatenate(found)


def _on(V: WithGeometry, vector: Function, name: str) -> Function:
    """A vector of a basis; raises unless it is in the state's space, or in that of the field at the basis's place."""
    if vector.function_space().dof_dset.layout_vec.getSizes() != V.dof_dset.layout_vec.getSizes():
        raise InputError(f"{name}: a vector is not in the state's space or the field's at its place")
    return vector


def _orthonormal(rows: np.ndarray, comm: MPI.Comm, name: str) -> np.ndarray:
    """Orthonormal rows with the same span, by Gram-Schmidt over space (twice); raises if they are dependent."""
    rows = rows.copy()
    for i, row in enumerate(rows):
        before = np.sqrt(comm.allreduce(row @ row))
        for _ in range(2):
            row -= comm.allreduce(rows[:i] @ row) @ rows[:i]
        after = np.sqrt(comm.allreduce(row @ row))
        if not after > DEPENDENT * before:
            raise InputError(f"{name}: a vector is zero or depends on the others; leave it out")
        row /= after
    return rows


def read_nullspace(
    V: WithGeometry,
    right: VectorSpaceBasis | MixedVectorSpaceBasis | None,
    left: VectorSpaceBasis | MixedVectorSpaceBasis | None,
    near: VectorSpaceBasis | MixedVectorSpaceBasis | None,
) -> Nullspace | None:
    """The nullspaces of the stages' matrices from Firedrake's bases (collective).

    Parameters
    ----------
    V
        The state's space.
    right, left, near
        Bases of the nullspaces of the matrices and of their transposes, and for multigrid; or ``None``.

    Returns
    -------
    Nullspace or None
        ``None`` where no basis is given.

    Raises
    ------
    InputError
        On every rank, if they do not fit each other or the space.
    """
    if right is None and left is not None:
        raise InputError("transpose_nullspace without nullspace: a singular square matrix has both; give nullspace=")
    if right is None and near is None:
        return None
    comm, nothing = V.mesh().comm, np.zeros((0, own_size(V)))
    found = {
        name: nothing if basis is None else _orthonormal(basis_vectors(basis, V, name), comm, name)
        for name, basis in (("nullspace", right), ("transpose_nullspace", left), ("near_nullspace", near))
    }
    N, L, close = found.values()
    L = N if left is None else L
    if len(N) != len(L):
        raise InputError(
            f"nullspace has {len(N)} vectors and transpose_nullspace {len(L)}: those of a square matrix have as many"
        )
    return Nullspace(N, L, comm, near=close)


class Nullspace:
    """The nullspace of a matrix and that of its transpose.

    Parameters
    ----------
    right, left
        Own values of orthonormal vectors that span them, ``(k, n)`` each; none where the matrix is regular.
    comm
        Communicator of the space.
    pins
        Own rows among the pins ``J``; default: they are chosen (collective).
    near
        Own values of orthonormal vectors for algebraic multigrid, ``(k, n)``, or ``None``.

    Raises
    ------
    InputError
        If there are no pins.
    """

    def __init__(
        self,
        right: np.ndarray,
        left: np.ndarray,
        comm: MPI.Comm,
        pins: list[int] | None = None,
        near: np.ndarray | None = None,
    ):
        self.right, self.left, self.comm, self.near = right, left, comm, near
        self.pins = self._find_pins() if pins is None else pins

    def _find_pins(self) -> list[int]:
        """Own pins, by pivoting on the products of the norms of the columns that remain of both."""
        comm, pins, parts = self.comm, [], [self.right.copy(), self.left.copy()]
        for _ in self.right:
            norms = np.prod([np.linalg.norm(part, axis=0) for part in parts], axis=0)
            own = int(np.argmax(norms)) if norms.size else -1
            best = float(norms[own]) if norms.size else -1.0
            every = comm.allgather(best)
            # the first rank of those that are equal up to round-off, so that groups of ranks make the same choice
            owner = next(rank for rank, value in enumerate(every) if value >= (1 - 1e-6) * max(every))
            if not every[owner] > DEPENDENT / comm.allreduce(norms.size):
                raise InputError("nullspace and transpose_nullspace have no unknowns in common, which is not supported")
            if comm.rank == owner:
                own = int(np.flatnonzero(norms >= (1 - 1e-6) * best)[0])
                pins.append(own)
            for part in parts:
                column = comm.bcast(part[:, own].copy() if comm.rank == owner else None, root=owner)
                part -= np.outer(column, column @ part) / (column @ column)
        return sorted(pins)

    @property
    def transposed(self) -> Nullspace:
        """The nullspace of the transposed matrix."""
        return Nullspace(self.left, self.right, self.comm, pins=self.pins, near=self.near)

    def _remove(self, vectors: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Remove the part of values ``(..., n)``, real or complex, in the span of vectors, in place."""
        for vector in vectors:  # few; a product of matrices may round a state with its place in the block
            parts = (values * vector).sum(axis=-1)
            if self.comm.size > 1:
                parts = self.comm.allreduce(parts)
            values -= np.multiply.outer(parts, vector)
        return values

    def project_solution(self, values: np.ndarray, *, transposed: bool = False) -> np.ndarray:
        """``P_N`` of values ``(..., n)`` (with ``transposed`` ``P_L``), in place."""
        return self._remove(self.left if transposed else self.right, values)

    def project_source(self, values: np.ndarray, *, transposed: bool = False) -> np.ndarray:
        """``P_L`` of values ``(..., n)`` (with ``transposed`` ``P_N``), in place."""
        return self._remove(self.right if transposed else self.left, values)

    def check(self, matrix: PETSc.Mat) -> None:
        """Require that the vectors are in the nullspaces of a matrix and its transpose (collective).

        Raises
        ------
        InputError
            If they are not.
        """
        scale, (x, b) = matrix.norm(_MAX), matrix.createVecs()
        for name, vectors, multiply in (
            ("nullspace", self.right, matrix.mult),
            ("transpose_nullspace (nullspace, where it is not given)", self.left, matrix.multTranspose),
        ):
            for vector in vectors:
                x.array[:] = vector
                multiply(x, b)
                size = b.norm(_MAX) / (scale * x.norm(_MAX))
                if not size <= EXACT:
                    what = "the stage matrix" + (" transposed" if multiply == matrix.multTranspose else "")
                    raise InputError(f"{name}: {what} times a vector of it is not zero (relative size {size:.1e})")
        x.destroy()
        b.destroy()

    def pin(self, matrix: PETSc.Mat) -> None:
        """Add the pins to an assembled matrix, in place (collective)."""
        first = matrix.getOwnershipRange()[0]
        rows = [(first + row, matrix.getRow(first + row)[1]) for row in self.pins]
        matrix.setOption(PETSc.Mat.Option.NEW_NONZERO_ALLOCATION_ERR, False)
        for row, values in rows:
            matrix.setValue(row, row, float(np.abs(values).max(initial=0.0)) or 1.0, addv=PETSc.InsertMode.ADD_VALUES)
        matrix.assemble()

    def pinned(self, matrix: PETSc.Mat) -> PETSc.Mat:
        """A copy of a matrix with the pins, and with the vectors for multigrid (collective)."""
        copy = matrix.copy()
        self.pin(copy)
        if self.near is not None and len(self.near):
            copy.setNearNullSpace(_petsc_nullspace(self.near, copy))
        return copy

    def attach(self, matrix: PETSc.Mat) -> None:
        """Set the nullspaces of a matrix, which PETSc's iterative solvers remove."""
        if len(self.right):
            matrix.setNullSpace(_petsc_nullspace(self.right, matrix))
            matrix.setTransposeNullSpace(_petsc_nullspace(self.left, matrix))

    def bases(self, V: WithGeometry) -> dict[str, VectorSpaceBasis]:
        """The arguments ``nullspace`` and ``transpose_nullspace`` of Firedrake's solvers on a space."""
        made = {}
        for name, vectors in (("nullspace", self.right), ("transpose_nullspace", self.left)):
            functions = [Function(V) for _ in vectors]
            for function, vector in zip(functions, vectors, strict=True):
                put(function, vector)
            if functions:
                made[name] = VectorSpaceBasis(functions, comm=self.comm)
        return made

    def restricted(self, rows: np.ndarray | slice) -> Nullspace:
        """The nullspace of the Schur complement of own rows, outside of which all vectors are zero."""
        right, left = (_orthonormal(part[:, rows], self.comm, "nullspace") for part in (self.right, self.left))
        near = None if self.near is None else _orthonormal(self.near[:, rows], self.comm, "near_nullspace")
        return Nullspace(right, left, self.comm, near=near)


def _petsc_nullspace(vectors: np.ndarray, matrix: PETSc.Mat) -> PETSc.NullSpace:
    """PETSc's nullspace with the layout of a matrix."""
    made = []
    for vector in vectors:
        made.append(matrix.createVecLeft())
        made[-1].array[:] = vector
    return PETSc.NullSpace().create(constant=False, vectors=made, comm=matrix.comm)

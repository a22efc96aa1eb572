r"""The blocks of the operators of two coupled fields, of which a step eliminates one.

Of a mixed state let ``b`` be a field whose rate depends on the others, ``a``, only:

.. math::
    M_a \dot a + K_a a + G b = f_a , \qquad  M_b \dot b + D a = f_b ,

such as the magnetic field beside the electric one. A step needs :math:`X = M_b^{-1} D`, which is sparse where
:math:`M_b` is block-diagonal (discontinuous elements) and where ``D`` tests a strong derivative that the space of ``b``
holds (the curl of N1curl in RT): then its entries are where those of ``D`` are, and each of its columns follows from a
small dense system. How a step uses it is in :mod:`~pint_fem.propagators.elimination`.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from functools import cached_property

import numpy as np
import ufl
from firedrake import DirichletBC, assemble
from firedrake.functionspaceimpl import WithGeometry
from firedrake.petsc import PETSc

from pint_fem.errors import InputError
from pint_fem.kernels.arrays import boundary_rows, own_size, rows_in_whole
from pint_fem.kernels.factor import Factor, is_symmetric
from pint_fem.kernels.multigrid import Geometry
from pint_fem.kernels.nullspace import Nullspace

__all__ = ["Fields", "sparse_solution"]


def sparse_solution(B: PETSc.Mat, D: PETSc.Mat) -> PETSc.Mat | None:
    """The product ``B^{-1} D`` where it has the sparsity pattern of ``D`` (collective).

    Column ``j`` solves the rows and columns of ``B`` in which column ``j`` of ``D`` has entries.

    Parameters
    ----------
    B
        Square sparse matrix.
    D
        Sparse matrix with as many rows.

    Returns
    -------
    PETSc.Mat or None
        ``None`` where the product has entries elsewhere.
    """
    DT = D.transpose(PETSc.Mat())
    pointers, columns, values = DT.getValuesCSR()
    needed = np.unique(columns)
    rows = PETSc.IS().createGeneral(needed.astype(PETSc.IntType), comm=PETSc.COMM_SELF)
    own_pointers, own_columns, own_values = B.createSubMatrices([rows], [rows])[0].getValuesCSR()
    n = max(len(needed), 1)
    keys = np.repeat(np.arange(len(needed)), np.diff(own_pointers)) * n + own_columns
    solution, counts = np.zeros_like(values), np.diff(pointers)
    for width in np.unique(counts[counts > 0]):
        which = np.flatnonzero(counts == width)
        for part in np.array_split(which, 1 + len(which) * width**2 // 4_000_000):
            at = pointers[part][:, None] + np.arange(width)
            local = np.searchsorted(needed, columns[at])
            pairs = local[:, :, None] * n + local[:, None, :]
            place = np.minimum(np.searchsorted(keys, pairs), len(keys) - 1)
            block = np.where(keys[place] == pairs, own_values[place], 0.0)
            try:
                solution[at] = np.linalg.solve(block, values[at][..., None])[..., 0]
            except np.linalg.LinAlgError:
                solution[at] = np.nan  # the residual is then NaN, on every rank
    # drop the round-off of entries that vanish
    largest = np.maximum.reduceat(np.abs(solution), pointers[:-1][counts > 0]) if len(solution) else np.zeros(0)
    kept = ~(np.abs(solution) <= 1e-13 * np.repeat(largest, counts[counts > 0]))
    sums = np.concatenate([[0], np.cumsum(kept)])
    csr = (sums[pointers].astype(PETSc.IntType), columns[kept].astype(PETSc.IntType), solution[kept])
    X = PETSc.Mat().createAIJ(DT.getSizes(), csr=csr, comm=D.comm).transpose(PETSc.Mat())
    residual = B.matMult(X)
    residual.axpy(-1.0, D, structure=PETSc.Mat.Structure.DIFFERENT_NONZERO_PATTERN)
    return X if residual.norm() <= 1e-12 * D.norm() else None


class Fields:
    """The blocks of a linear evolution's operators for the field that it eliminates.

    Parameters
    ----------
    V, eliminate
        Mixed space, and the number of the field ``b``.
    operators
        ``M`` and ``K`` as bilinear forms.
    bcs
        Conditions on other fields.
    nullspace
        Nullspace of the stages' matrices.

    Attributes
    ----------
    a, b : slice or ndarray
        Own rows of the two parts.
    state_size : int
        Number of own rows of a state.
    fixed : ndarray
        Own rows of ``a`` with a condition.
    matrices : dict
        ``"M"`` (:math:`M_a`, rows with a condition zero), ``"G"`` (likewise), ``"X"`` (columns with one zero), and the
        transposes ``"MT"``, ``"GT"``, ``"XT"``.
    M_b, P : PETSc.Mat
        The mass matrix of ``b``, and :math:`-G X` without conditions.
    symmetric, is_wave : bool
        Whether :math:`M_a, K_a` and :math:`G X` are symmetric; and whether :math:`M_b` is, too, with skew-symmetric
        coupling :math:`G = -D^T`: damped waves.
    nullspace : Nullspace or None
        Nullspace of the Schur complement: fields with one are among ``a``, as :math:`M_b` is regular.
    geometry : Geometry or None
        The space of ``a`` where that is one field.

    Raises
    ------
    InputError
        On every rank, if the system is not of this form or ``X`` is not sparse.
    """

    def __init__(
        self,
        V: WithGeometry,
        eliminate: int,
        operators: tuple[ufl.Form, ufl.Form],
        bcs: Sequence[DirichletBC] = (),
        nullspace: Nullspace | None = None,
    ):
        self.comm, self.state_size = V.mesh().comm, own_size(V)
        offsets = rows_in_whole(V.sub(eliminate))
        size = self.state_size
        b = np.arange(offsets[0], offsets[-1] + 1) if len(offsets) else np.zeros(0, dtype=int)
        a = np.setdiff1d(np.arange(size), b)
        self.a, self.b = _slice(a), _slice(b)
        self.fixed = np.searchsorted(a, boundary_rows(bcs, V))
        self.nullspace = None if nullspace is None else nullspace.restricted(self.a)
        self.geometry = self._geometry(V, eliminate, bcs)
        M, K = (assemble(form, mat_type="aij").petscmat for form in operators)
        start = M.getOwnershipRange()[0]
        is_a, is_b = (PETSc.IS().createGeneral((r + start).astype(PETSc.IntType), comm=M.comm) for r in (a, b))
        self._is_a = is_a
        block = lambda A, row, column: A.createSubMatrix(row, column)
        size_of = lambda A: A.norm(PETSc.NormType.INFINITY)
        for name, A, pairs in (("M", M, ((is_a, is_b), (is_b, is_a))), ("K", K, ((is_b, is_b),))):
            if any(size_of(block(A, *pair)) > 1e-14 * size_of(A) for pair in pairs):
                what = "couples it with other fields" if name == "M" else "is not zero on it"
                raise InputError(
                    f"eliminate = {eliminate}: the rate of the field must depend on the other fields only, but the "
                    f"{'mass' if name == 'M' else 'stiffness'} matrix {what}; leave eliminate out"
                )
        self.M_b = block(M, is_b, is_b)
        self._M_a, self._K_a = block(M, is_a, is_a), block(K, is_a, is_a)
        D, G = block(K, is_b, is_a), block(K, is_a, is_b)
        X = sparse_solution(self.M_b, D)
        if X is None:
            raise InputError(
                f"eliminate = {eliminate}: its mass matrix's inverse times its equation is not sparse; that requires a "
                "discontinuous element, or a derivative that lies in the field's own space, such as curl(E) of "
                "N1curl in RT; leave eliminate out"
            )
        self.P = G.matMult(X)
        self.P.scale(-1.0)
        both = D.transpose(PETSc.Mat())
        scale = both.norm(PETSc.NormType.INFINITY)
        both.axpy(1.0, G, structure=PETSc.Mat.Structure.DIFFERENT_NONZERO_PATTERN)
        self._couples_as_wave = is_symmetric(self.M_b) and both.norm(PETSc.NormType.INFINITY) <= 1e-13 * scale
        self._coupling_is_symmetric = is_symmetric(self.P)
        self._rows = (self.fixed + self._M_a.getOwnershipRange()[0]).astype(PETSc.IntType)
        self._without_conditions(G)
        XT = X.transpose(PETSc.Mat())
        XT.setOption(PETSc.Mat.Option.KEEP_NONZERO_PATTERN, True)
        XT.zeroRows(self._rows, diag=0.0)
        X = XT.transpose(PETSc.Mat())
        self.matrices = {"G": G, "GT": G.transpose(PETSc.Mat()), "X": X, "XT": XT}
        self._add_masses()

    def _without_conditions(self, A: PETSc.Mat) -> PETSc.Mat:
        """The matrix with rows of conditions zero, in place."""
        A.setOption(PETSc.Mat.Option.KEEP_NONZERO_PATTERN, True)
        A.zeroRows(self._rows, diag=0.0)
        return A

    def _add_masses(self) -> None:
        """Set what depends on :math:`M_a` and :math:`K_a`."""
        self.symmetric = self._coupling_is_symmetric and all(is_symmetric(A) for A in (self._M_a, self._K_a))
        self.is_wave = self.symmetric and self._couples_as_wave
        self.matrices["M"] = self._without_conditions(self._M_a.copy())
        self.matrices["MT"] = self.matrices["M"].transpose(PETSc.Mat())

    def with_operators(self, M: PETSc.Mat, K: PETSc.Mat) -> Fields:
        """The blocks for other operators, which differ in :math:`M_a` and :math:`K_a` only (collective)."""
        made = copy(self)
        made._M_a, made._K_a = (A.createSubMatrix(self._is_a, self._is_a) for A in (M, K))
        made.matrices = dict(self.matrices)
        made._add_masses()
        return made

    @staticmethod
    def _geometry(V: WithGeometry, eliminate: int, bcs: Sequence[DirichletBC]) -> Geometry | None:
        if len(V) != 2:
            return None
        space, made = V.sub(1 - eliminate).collapse(), []
        for bc in bcs:
            part = space
            for index in bc._indices[1:]:
                part = part.sub(index)
            made.append(DirichletBC(part, 0, bc.sub_domain))
        return Geometry(space, made)

    @property
    def held(self) -> list[PETSc.Mat]:
        """All assembled matrices."""
        return [*self.matrices.values(), self.M_b, self._M_a, self._K_a, self.P]

    def damping(self) -> PETSc.Mat:
        """The matrix :math:`K_a`, with rows and columns of conditions zero."""
        return self._free(self._K_a)

    def stiffness(self) -> PETSc.Mat:
        """The matrix :math:`-G X`, with rows and columns of conditions zero."""
        return self._free(self.P)

    def part(self, h: float) -> PETSc.Mat:
        """The matrix :math:`M_a + h K_a`, with rows and columns of conditions those of the identity."""
        return self._fix(self._sum(h, 0.0))

    def regular_part(self, h: float) -> PETSc.Mat:
        """The matrix of :meth:`part` with pins where it is singular (:mod:`~pint_fem.kernels.nullspace`)."""
        return self.part(h) if self.nullspace is None else self.nullspace.pinned(self.part(h))

    def complement(self, h: float) -> PETSc.Mat:
        """The matrix :math:`M_a + h K_a - h^2 G X`, with rows and columns of conditions those of the identity."""
        return self._fix(self._sum(h, h * h))

    def _free(self, A: PETSc.Mat) -> PETSc.Mat:
        A = A.copy()
        A.zeroRowsColumns(self._rows, diag=0.0)
        return A

    def _sum(self, h: float, square: float) -> PETSc.Mat:
        other = PETSc.Mat.Structure.DIFFERENT_NONZERO_PATTERN
        A = self._M_a.copy()
        A.axpy(h, self._K_a, structure=other)
        if square:
            A.axpy(square, self.P, structure=other)
        return A

    def _fix(self, A: PETSc.Mat) -> PETSc.Mat:
        A.zeroRowsColumns(self._rows, diag=1.0)
        return A

    @cached_property
    def _mass_b(self) -> tuple[Factor, PETSc.Vec, PETSc.Vec]:
        return Factor(self.M_b, {}, symmetric=is_symmetric(self.M_b)), *self.M_b.createVecs()

    def scale(self, load: np.ndarray, *, transposed: bool = False) -> np.ndarray:
        """Multiply the rows of ``b`` of a load ``(n,)`` by :math:`M_b^{-1}` or its transpose, in place (collective)."""
        factor, x, y = self._mass_b
        x.array[:] = load[self.b]
        if x.norm() > 0:
            factor.solve(x, y, transposed=transposed)
            load[self.b] = y.array_r
        return load


def _slice(rows: np.ndarray) -> slice | np.ndarray:
    """Rows as a slice where they are contiguous."""
    contiguous = len(rows) and rows[-1] - rows[0] == len(rows) - 1
    return slice(int(rows[0]), int(rows[-1]) + 1) if contiguous else rows

r"""The transfer of states between the same space on two meshes of a hierarchy: restriction and prolongation.

With :math:`P_0` the interpolation from the coarser mesh (:mod:`~pint_fem.kernels.prolongation`), ``I`` the degrees of
freedom without and ``B`` those with a Dirichlet condition,

.. math::
    P = \begin{pmatrix} P_{0,II} & 0 \\ 0 & 0 \end{pmatrix}, \qquad
    R = \begin{pmatrix} R_{0,II} & 0 \\ 0 & J \end{pmatrix}.

Corrections vanish on ``B``; a residual that is zero there stays zero, and ``J`` restricts boundary values. The adjoint
takes :math:`P^T` and :math:`R^T`, which suit dual vectors.

States and their residuals are functions, of which the coarser mesh shall get the smooth part: what it cannot represent
must not appear there as something else, as a coarse solve amplifies a smooth residual by the number of its steps.
Degrees of freedom that are nodal values (CG, DG, vectors of them) are averaged, :math:`R_{0,II} = D^{-1} P_{0,II}^T`
with rows that sum to one (full weighting), and ``J`` is injection. Other degrees of freedom are moments on edges,
facets and cells, whose sums mean nothing.

*Nedelec elements.* :math:`R_0` projects to polynomials of one degree less in each coarse cell and averages where cells
meet (:func:`~pint_fem.kernels.prolongation.cell_averages`). The canonical interpolation, by the coarse moments of a
fine function, commutes with derivatives, but hands oscillations on unweakened: with damped waves cycles diverge where
those with averages converge.

*Raviart-Thomas and BDM elements.* :math:`R_{0,II} = (P^T M P)^{-1} P^T M` with the mass matrix ``M``, the :math:`L^2`
projection. A magnetic field in RT that is no curl does not change in time, and averages introduce such fields: errors
that no cycle removes. The projection, whose transposed pair is again projection and interpolation of functions, keeps
state and adjoint convergent.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from itertools import pairwise

import numpy as np
from firedrake import DirichletBC, TestFunction, TrialFunction, assemble, dx, inner
from firedrake.functionspaceimpl import WithGeometry
from firedrake.mg.utils import get_level
from firedrake.petsc import PETSc
from mpi4py import MPI
from pyadjoint.tape import stop_annotating

from pint_fem.errors import InputError
from pint_fem.kernels.arrays import boundary_rows, is_real, like_subspace, own_size
from pint_fem.kernels.block_operator import BlockOperator, ManySolves
from pint_fem.kernels.factor import Factor
from pint_fem.kernels.prolongation import cell_averages, prolongation
from pint_fem.mgrit.transfer import Transfer

__all__ = ["mesh_transfer"]


def mesh_transfer(
    V_fine: WithGeometry,
    V_coarse: WithGeometry,
    bcs: Sequence[DirichletBC] = (),
    coarse_bcs: Sequence[DirichletBC] | None = None,
) -> Transfer:
    """Restriction and prolongation between the same space on two meshes of a hierarchy.

    Parameters
    ----------
    V_fine, V_coarse
        Spaces of the same element: CG, DG, vectors of them, Nedelec, Raviart-Thomas, BDM; mixtures of them.
    bcs
        Dirichlet conditions on ``V_fine``.
    coarse_bcs
        Those on ``V_coarse``; default: on the same parts of the boundary.

    Returns
    -------
    Transfer
        Maps of blocks ``(k, own_size(V_fine))`` and ``(k, own_size(V_coarse))``. The result for a state is bitwise
        independent of the others in its block and of its place there.

    Raises
    ------
    InputError
        On every rank, if the spaces do not fit each other, or their element cannot be transferred.
    """
    bcs = list(bcs)
    if coarse_bcs is None:
        coarse_bcs = [DirichletBC(like_subspace(V_coarse, bc), 0, bc.sub_domain) for bc in bcs]
    what = f"spatial coarsening from {V_fine.ufl_element()} to {V_coarse.ufl_element()}"
    if V_fine.ufl_element() != V_coarse.ufl_element():
        raise InputError(f"{what}: give the same element on both meshes")
    with stop_annotating():
        fields = zip(_fields(V_fine, bcs), _fields(V_coarse, coarse_bcs), strict=True)
        made = [_of_field(fine, coarse, what) for fine, coarse in fields]
    R, P = (_diagonal([field[i] for field in made]) for i in (0, 1))
    down, up, back = (BlockOperator(A) for A in (R, R.transpose(PETSc.Mat()), P.transpose(PETSc.Mat())))
    if all(mass is None for _, _, mass in made):
        return Transfer(down, BlockOperator(P), up, back)
    mass = _diagonal([_identity(_vector(R.createVecLeft(), 1.0)) if mass is None else mass for R, _, mass in made])
    solve = ManySolves(Factor(mass, {}, symmetric=True, prefix="transfer_"))
    return Transfer(lambda u: solve(down(u)), BlockOperator(P), lambda v: up(solve(v)), back)


def _fields(V: WithGeometry, bcs: Sequence[DirichletBC]) -> list[tuple[WithGeometry, np.ndarray]]:
    """The fields of a space, and for each the local rows with a condition among its own ones."""
    rows = boundary_rows(bcs, V)
    if len(V) == 1:
        return [(V, rows)]
    fields = [part.collapse() for part in V.subspaces]
    ends = np.cumsum([0, *(own_size(part) for part in fields)])
    return [(f, rows[(a <= rows) & (rows < b)] - a) for f, (a, b) in zip(fields, pairwise(ends), strict=True)]


def _diagonal(blocks: Sequence[PETSc.Mat]) -> PETSc.Mat:
    """The block diagonal matrix."""
    if len(blocks) == 1:
        return blocks[0]
    rows = [[A if i == j else None for j in range(len(blocks))] for i, A in enumerate(blocks)]
    return PETSc.Mat().createNest(rows, comm=blocks[0].comm).convert("aij")


def _of_field(
    fine: tuple[WithGeometry, np.ndarray], coarse: tuple[WithGeometry, np.ndarray], what: str
) -> tuple[PETSc.Mat, PETSc.Mat, PETSc.Mat | None]:
    """Restriction and prolongation of one field, given with its rows that have a condition; and the matrix by whose
    inverse the restriction is multiplied, if there is one.
    """
    (V, fixed), (W, coarse_fixed) = fine, coarse
    pairs = list(pairwise(_spaces(V, W, what)))
    P0, mass = _product([prolongation(*pair) for pair in reversed(pairs)]), None
    below, above = P0.createVecs()
    free, free_coarse = _free(above, fixed), _free(below, coarse_fixed)
    P = P0.copy()
    P.diagonalScale(free, free_coarse)
    worst = float(np.abs(_row_sums(P0) - 1).max(initial=0))
    is_nodal = V.comm.allreduce(worst, op=MPI.MAX) < 1e-8
    if is_nodal:
        R = P.transpose(PETSc.Mat())
        sums = _row_sums(R)
        R.diagonalScale(_vector(below, 1 / np.where(sums == 0, 1, sums)))
    elif V.finat_element.mapping == "contravariant piola":
        M = assemble(inner(TrialFunction(V), TestFunction(V)) * dx, mat_type="aij").petscmat
        R = P.transposeMatMult(M)
        R.diagonalScale(None, free)
        mass = M.ptap(P)
    else:
        R = _product([cell_averages(*pair) for pair in pairs])
        R.diagonalScale(free_coarse, free)
    for vec in (free, free_coarse):
        vec.array[:] = 1 - vec.array_r
    if mass is not None:
        mass.axpy(1.0, _identity(free_coarse), structure=PETSc.Mat.Structure.DIFFERENT_NONZERO_PATTERN)
    P0.diagonalScale(free, free_coarse)
    J = _injection(P0.transpose(PETSc.Mat()), is_nodal=is_nodal)
    R.axpy(1.0, J, structure=PETSc.Mat.Structure.DIFFERENT_NONZERO_PATTERN)
    return R, P, mass


def _identity(diagonal: PETSc.Vec) -> PETSc.Mat:
    """The diagonal matrix of a vector."""
    first, last = diagonal.getOwnershipRange()
    rows = np.arange(last - first + 1, dtype=PETSc.IntType)
    csr = rows, rows[:-1] + PETSc.IntType(first), diagonal.array_r.copy()
    size = diagonal.getSizes()
    return PETSc.Mat().createAIJ((size, size), csr=csr, comm=diagonal.comm)


def _spaces(V: WithGeometry, W: WithGeometry, what: str) -> list[WithGeometry]:
    """The space on all meshes from the coarse to the fine one."""
    (hierarchy, fine), (other, coarse) = (get_level(space.mesh().unique()) for space in (V, W))
    if hierarchy is None or hierarchy is not other or not coarse < fine:
        raise InputError(f"{what}: give spaces on a mesh of a MeshHierarchy and on a coarser one of it")
    if is_real(V):
        raise InputError(f"{what}: not for states in the space of reals")
    count = hierarchy.refinements_per_level
    between = [V.reconstruct(mesh=hierarchy._meshes[i]) for i in range(int(coarse * count) + 1, int(fine * count))]
    return [W, *between, V]


def _product(matrices: Sequence[PETSc.Mat]) -> PETSc.Mat:
    """The product of matrices, the last one applied first."""
    return reduce(lambda A, B: A.matMult(B), matrices)


def _vector(like: PETSc.Vec, values: np.ndarray | float) -> PETSc.Vec:
    """A vector with the layout of another one and the given own values."""
    vec = like.duplicate()
    vec.array[:] = values
    return vec


def _free(like: PETSc.Vec, fixed: np.ndarray) -> PETSc.Vec:
    """A vector of ones, with zeros in the rows with a condition."""
    vec = _vector(like, 1.0)
    vec.array[fixed] = 0
    return vec


def _row_sums(matrix: PETSc.Mat) -> np.ndarray:
    """Sums of the entries of each own row."""
    ones, sums = matrix.createVecs()
    ones.set(1.0)
    matrix.mult(ones, sums)
    return sums.array_r.copy()


def _injection(BT: PETSc.Mat, *, is_nodal: bool) -> PETSc.Mat:
    """The restriction of boundary values, from the transposed interpolation between them.

    The value of the fine node at the place of each coarse one; where the fine mesh has no node there (unevenly spaced
    nodes), the average over those to which the coarse one contributes. Of moments, those on parts of the coarse one's
    edge or facet, whose entries are the largest ones, scaled to undo their interpolation: in lowest degree their sum.
    """
    pointers, columns, values = BT.getValuesCSR()
    size = len(pointers) - 1
    row = np.repeat(np.arange(size), np.diff(pointers))
    if is_nodal:
        first, here = np.full(size, -1), np.flatnonzero(np.abs(values - 1) < 1e-9)[::-1]
        first[row[here]] = here
        kept = (values != 0) & (first[row] < 0)
        kept[first[first >= 0]] = True
        scale = np.bincount(row[kept], values[kept], size)
    else:
        largest = np.zeros(size)
        np.maximum.at(largest, row, np.abs(values))
        kept = (values != 0) & (np.abs(values) > (1 - 1e-9) * largest[row])
        scale = np.bincount(row[kept], values[kept] ** 2, size)
    row, columns, values = row[kept], columns[kept], values[kept]
    pointers = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=size))]).astype(PETSc.IntType)
    csr = (pointers, columns, values / scale[row])
    return PETSc.Mat().createAIJ(BT.getSizes(), csr=csr, comm=BT.comm)

r"""Sums of the inverses of the patches around vertices, as one sparse matrix.

For edge and face elements the inverse diagonal does not smooth: gradients and curls, on which the operator is small,
are not local in the basis. With the degrees of freedom of all entities that contain a vertex as the unknowns of a
patch,

.. math::  B = \sum_v R_v^T (R_v A R_v^T)^{-1} R_v

makes multigrid converge whatever the mesh and the coefficients' ratio are (D. Arnold, R. Falk, R. Winther, Numer. Math.
85, 2000). Patches are small, so that ``B`` is assembled once for a matrix: its products are those of a sparse matrix
with some tens of entries in a row, for many states at once.
"""

from __future__ import annotations

import numpy as np
from firedrake import FunctionSpace
from firedrake.functionspaceimpl import WithGeometry
from firedrake.petsc import PETSc
from scipy.sparse import csr_matrix

from pint_fem.kernels.space.matrices import BlockMatrix

__all__ = ["requires_patches", "star_patches"]

_BATCH = 4_000_000
"""Entries of patches that are inverted at a time, about."""


def requires_patches(space: WithGeometry) -> bool:
    """Whether multigrid in a space requires patches: it is one of edge or face elements."""
    mapping = getattr(space.finat_element, "mapping", None) if len(space) == 1 else None
    return mapping in ("covariant piola", "contravariant piola")


def star_patches(matrix: PETSc.Mat, space: WithGeometry) -> BlockMatrix:
    """The matrix ``B`` of the patches around all vertices (collective).

    Parameters
    ----------
    matrix
        The matrix ``A`` in the space, positive definite; rows of conditions are those of the identity.
    space
        A space that is not mixed.

    Raises
    ------
    ArithmeticError
        On every rank, if a patch is singular.
    """
    comm = matrix.comm.tompi4py()
    patches = _patches(space)  # own vertices' unknowns
    needed = np.unique(patches.indices)
    rows = PETSc.IS().createGeneral(needed.astype(PETSc.IntType), comm=PETSc.COMM_SELF)
    (local,) = matrix.createSubMatrices([rows], [rows])
    ptr, columns, values = local.getValuesCSR()
    A = csr_matrix((values, columns, ptr), local.getSize())
    for item in (local, rows):
        item.destroy()
    sizes, found, failed = np.diff(patches.indptr), [], False
    for size in np.unique(sizes[sizes > 0]):
        these = np.flatnonzero(sizes == size)
        step = max(1, _BATCH // int(size) ** 2)
        for first in range(0, len(these), step):
            some = these[first : first + step]
            members = patches.indices[patches.indptr[some][:, None] + np.arange(size)]
            at = np.searchsorted(needed, members)
            left, right = np.broadcast_arrays(at[:, :, None], at[:, None, :])
            blocks = np.asarray(A[left.ravel(), right.ravel()]).reshape(len(some), size, size)
            try:
                inverses = np.linalg.inv(blocks)
            except np.linalg.LinAlgError:
                failed = True
                continue
            i, j = np.broadcast_arrays(members[:, :, None], members[:, None, :])
            found.append((i.ravel(), j.ravel(), inverses.ravel()))
    if comm.allreduce(int(failed)):
        raise ArithmeticError("the matrix of a patch is singular")
    i, j, v = (np.concatenate([part[k] for part in found]) if found else np.empty(0) for k in range(3))
    made = PETSc.Mat().create(comm=matrix.comm)
    made.setSizes(matrix.getSizes())
    made.setType("aij")
    made.setPreallocationCOO(i.astype(PETSc.IntType), j.astype(PETSc.IntType))
    made.setValuesCOO(np.ascontiguousarray(v, PETSc.ScalarType))
    result = BlockMatrix.of_petsc(made)
    made.destroy()
    return result


def _patches(space: WithGeometry) -> csr_matrix:
    """The unknowns of the patches around own vertices, as the columns of a matrix's rows (collective)."""
    mesh = space.mesh()
    vertices = FunctionSpace(mesh, "CG", 1)
    element = space.finat_element
    entities, topology = element.entity_dofs(), element.cell.get_topology()
    cells = mesh.cell_set.size
    dofs, points = space.cell_node_list[:cells], vertices.cell_node_list[:cells]
    vertex_of = {}
    for vertex, nodes in vertices.finat_element.entity_dofs()[0].items():
        vertex_of[vertex] = nodes[0]
    number = {id(V): V.dof_dset.lgmap.indices for V in (space, vertices)}
    dof_number, vertex_number = (number[id(V)][: V.dof_dset.total_size * V.block_size] for V in (space, vertices))
    block, pairs = space.block_size, []
    for dimension, of_entity in entities.items():
        for entity, local in of_entity.items():
            around = [vertex_of[v] for v in topology[dimension][entity]]
            for node in local:
                for vertex in around:
                    pairs.append(np.stack([vertex_number[points[:, vertex]], dofs[:, node]]))
    joined = np.unique(np.concatenate(pairs, axis=1), axis=1) if pairs else np.empty((2, 0), np.int64)
    row = np.repeat(joined[0], block)
    column = dof_number[(joined[1][:, None] * block + np.arange(block)).ravel()]
    made = PETSc.Mat().create(comm=mesh.comm)
    sizes = [V.dof_dset.layout_vec.getSizes() for V in (vertices, space)]
    made.setSizes(sizes)
    made.setType("aij")
    made.setPreallocationCOO(row.astype(PETSc.IntType), column.astype(PETSc.IntType))
    made.setValuesCOO(np.ones(len(row)))
    ptr, columns, _ = made.getValuesCSR()
    rows, total = made.getLocalSize()[0], made.getSize()[1]
    made.destroy()
    return csr_matrix((np.ones(len(columns)), columns, ptr), (rows, total))

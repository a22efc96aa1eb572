r"""The interpolation of a finite-element space on a finer mesh of a ``MeshHierarchy``, as one sparse matrix.

A fine cell :math:`K_f = F_f(\hat K)` lies in its parent :math:`K_c = F_c(\hat K)`. With the degrees of freedom
:math:`\hat\ell_i` and the basis functions :math:`\hat\phi_j` of the reference element, the entries of the matrix are

.. math::
    P_{ij} = \hat\ell_i \big( G^* \hat\phi_j \big), \qquad G = F_c^{-1} \circ F_f : x \mapsto A x + b.

The pullback :math:`G^* \phi` is :math:`\phi \circ G` (Lagrange elements), :math:`A^T\, \phi \circ G` (covariant Piola
map: Nedelec elements) or :math:`\det A\; A^{-1}\, \phi \circ G` (contravariant: Raviart-Thomas, BDM). So a function of
the coarse space is reproduced exactly, and interpolation commutes with gradient, curl and divergence (D. N. Arnold,
*Finite Element Exterior Calculus*, SIAM, 2018, chapter 7). Orientations need no table: Firedrake orders the vertices of
each simplex by their global numbers, so that all cells that share an edge or a facet agree on its direction.

:math:`G` maps the vertices of a fine cell to vertices and midpoints of its parent. So there are few different ones in a
hierarchy, and entries are tabulated once for each. Every degree of freedom takes its row from a cell of its own rank,
whose parent belongs to that rank, too: nothing is sent.
"""

from __future__ import annotations

from itertools import product

import numpy as np
from FIAT.polynomial_set import ONPolynomialSet
from FIAT.quadrature_schemes import create_quadrature
from firedrake import FiniteElement, Function, FunctionSpace, SpatialCoordinate, VectorElement
from firedrake.functionspaceimpl import WithGeometry
from firedrake.mesh import MeshGeometry
from firedrake.mg.interface import assemble_prolongation_aij
from firedrake.mg.utils import get_level
from firedrake.petsc import PETSc
from mpi4py import MPI
from pyadjoint.tape import stop_annotating

from pint_fem.errors import InputError

__all__ = ["cell_averages", "prolongation"]

_CHUNK = 1 << 16
"""Cells whose vertices are compared at a time."""
_SMALL = 1e-12
"""Entries, relative to the largest one, that are round-off."""


def prolongation(coarse: WithGeometry, fine: WithGeometry) -> PETSc.Mat:
    """The matrix that interpolates functions on a mesh of a hierarchy in the same space on the next finer mesh
    (collective over the mesh's communicator).

    Parameters
    ----------
    coarse, fine
        Spaces of the same element, not mixed, on successive meshes of a ``MeshHierarchy``.

    Returns
    -------
    PETSc.Mat
        ``(fine.dim(), coarse.dim())``, AIJ, distributed as the vectors of both spaces.

    Raises
    ------
    InputError
        On every rank, if the meshes do not follow each other in a hierarchy, the elements differ, or the interpolation
        of this element is neither known here nor to Firedrake.
    """
    what = _checked(coarse, fine)
    with stop_annotating():
        reference = _Reference.of(fine)
        found = None if reference is None else _children(coarse, fine)
        if fine.comm.allreduce(found is not None, op=MPI.LAND):
            return _assembled(coarse, fine, *found, reference)
        # on extruded meshes Firedrake's loop may abort, and for Piola maps run the code of another element
        if fine.mesh().extruded or getattr(fine.finat_element, "mapping", None) != "affine":
            raise InputError(f"{what} is assembled on meshes of simplices only: give such a mesh, or another element")
        try:
            return assemble_prolongation_aij(coarse, fine).petscmat.copy()
        except (NotImplementedError, ValueError, KeyError, AttributeError) as error:
            raise InputError(f"{what} cannot be assembled: {error}") from error


def cell_averages(coarse: WithGeometry, fine: WithGeometry) -> PETSc.Mat:
    r"""The matrix that averages functions on the cells of the coarser mesh (collective over the mesh's communicator).

    On each coarse cell a function is projected, in :math:`L^2` of the reference element, to polynomials of one degree
    less than the element's (constants at least); a degree of freedom that several coarse cells share is the mean of
    theirs. Such polynomials are reproduced, other functions of the coarse space are smoothed.

    Parameters
    ----------
    coarse, fine
        As for :func:`prolongation`.

    Returns
    -------
    PETSc.Mat
        ``(coarse.dim(), fine.dim())``, AIJ, distributed as the vectors of both spaces.

    Raises
    ------
    InputError
        On every rank, as of :func:`prolongation`, and for elements whose reference element is not known here.
    """
    what = _checked(coarse, fine)
    with stop_annotating():
        reference = _Reference.of(fine)
        found = None if reference is None else _children(coarse, fine)
        if not fine.comm.allreduce(found is not None, op=MPI.LAND):
            raise InputError(f"{what}: there is no projection to the coarser mesh for this element or refinement")
        return _averaged(coarse, fine, *found, reference)


def _checked(coarse: WithGeometry, fine: WithGeometry) -> str:
    """The name of the interpolation in messages; an ``InputError`` where the spaces do not fit each other."""
    what = f"interpolation of {coarse.ufl_element()} on a finer mesh"
    (hierarchy, upper), (other, lower) = (get_level(V.mesh().unique()) for V in (fine, coarse))
    if hierarchy is None or hierarchy is not other or (upper - lower) * hierarchy.refinements_per_level != 1:
        raise InputError(f"{what}: give spaces on successive meshes of a MeshHierarchy, the coarser one first")
    if len(coarse) > 1 or coarse.ufl_element() != fine.ufl_element():
        raise InputError(f"{what}: give the same element on both meshes, field by field for a mixed one")
    return what


class _Reference:
    """Degrees of freedom and basis functions of a reference element, and the pullback under which it is mapped."""

    def __init__(self, element: object, mapping: str):
        self.element, self.mapping = element, mapping
        functionals = [functional.get_point_dict() for functional in element.dual_basis()]
        places = dict.fromkeys(point for functional in functionals for point in functional)
        self.points = np.array([*places], dtype=float).reshape(len(places), -1)
        number = {point: index for index, point in enumerate(places)}
        components = max(1, int(np.prod(element.value_shape(), dtype=int)))
        self.weights = np.zeros((len(functionals), components, len(places)))
        for weights, functional in zip(self.weights, functionals, strict=True):
            for point, terms in functional.items():
                for weight, component in terms:
                    weights[component[0] if component else 0, number[point]] += weight

    @classmethod
    def of(cls, V: WithGeometry) -> _Reference | None:
        """The reference element of a space on flat cells; ``None`` where it is not known here how it is mapped, or its
        degrees of freedom are no sums of values at points.
        """
        mesh, finat_element = V.mesh(), V.finat_element
        if V.boundary_set or mesh.extruded or finat_element.complex.is_macrocell():
            return None
        mapping = finat_element.mapping
        flat = mesh.geometric_dimension == mesh.topological_dimension
        if mapping not in _PULLBACKS or not (flat or mapping == "affine"):
            return None
        try:
            element = finat_element.fiat_equivalent
            if len(element.value_shape()) > 1 or any(l.deriv_dict for l in element.dual_basis()):
                return None
            made = cls(element, mapping)
            own = made.entries(np.eye(mesh.topological_dimension)[None], np.zeros((1, mesh.topological_dimension)))[0]
        except (NotImplementedError, AttributeError, TypeError):
            return None
        return made if np.abs(own - np.eye(len(own))).max() < 1e-8 else None

    def entries(self, A: np.ndarray, b: np.ndarray) -> np.ndarray:
        """The degrees of freedom of the pulled back basis functions under affine maps.

        Parameters
        ----------
        A, b
            ``(maps, d, d)`` and ``(maps, d)``.

        Returns
        -------
        ndarray
            ``(maps, n, n)``.
        """
        points = np.einsum("mab,qb->mqa", A, self.points) + b[:, None]
        (values,) = self.element.tabulate(0, points.reshape(-1, points.shape[-1])).values()
        values = values.reshape(len(values), self.weights.shape[1], *points.shape[:2])
        return np.einsum("icq,mcd,jdmq->mij", self.weights, _PULLBACKS[self.mapping](A), values, optimize=True)

    def averages(self, A: np.ndarray, b: np.ndarray) -> np.ndarray:
        """The degrees of freedom of the projection to polynomials of one degree less, as far as fine cells, images of
        the reference element under affine maps, contribute; arguments and result as for :meth:`entries`.
        """
        cell, degree = self.element.get_reference_element(), self.element.degree()
        rule, d = create_quadrature(cell, 2 * degree), A.shape[-1]
        polynomials = ONPolynomialSet(cell, max(degree - 1, 0))  # orthogonal
        at = lambda points: polynomials.tabulate(points.reshape(-1, d))[(0,) * d].reshape(-1, *points.shape[:-1])
        points, weights = np.asarray(rule.get_points()), np.asarray(rule.get_weights())
        (values,) = self.element.tabulate(0, points).values()
        values = values.reshape(len(values), -1, len(points))
        norms = at(points) ** 2 @ weights
        push = np.linalg.inv(_PULLBACKS[self.mapping](A))
        images = at(np.einsum("mab,qb->mqa", A, points) + b[:, None])
        size = np.abs(np.linalg.det(A))
        moments = np.einsum("pmq,q,m,mcd,jdq->mpcj", images, weights, size, push, values, optimize=True)
        return np.einsum("icq,pq,p,mpcj->mij", self.weights, at(self.points), 1 / norms, moments, optimize=True)


_PULLBACKS = {
    "affine": lambda A: np.ones((len(A), 1, 1)),
    "covariant piola": lambda A: A.transpose(0, 2, 1),
    "contravariant piola": lambda A: np.linalg.det(A)[:, None, None] * np.linalg.inv(A),
    "L2 piola": lambda A: np.linalg.det(A)[:, None, None],
}
"""Matrix by which the values of a pulled back function are multiplied."""


def _children(coarse: WithGeometry, fine: WithGeometry) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray] | None:
    """The parent of each own fine cell, the number of its map to the parent's reference cell, and these maps' ``A`` and
    ``b``; ``None`` where a cell's vertices are not vertices and midpoints of its parent, as regular refinement
    makes them.
    """
    (hierarchy, level), mesh = get_level(fine.mesh()), fine.mesh()
    parents = hierarchy.fine_to_coarse_cells[level]
    parents = None if parents is None else np.asarray(parents)[: mesh.cell_set.size]
    if parents is None or (parents.size and (parents.shape[1] != 1 or parents.min() < 0)):
        return None
    parents = parents.reshape(-1)
    (element, fine_vertices), (_, coarse_vertices) = _vertices(mesh), _vertices(coarse.mesh())
    fine_vertices = fine_vertices[: len(parents)]
    corners = np.array([next(iter(node.get_point_dict())) for node in element.dual_basis()])
    candidates = np.array([point for point in product((0, 0.5, 1), repeat=corners.shape[1])])
    (shapes,) = element.tabulate(0, candidates).values()
    inside = shapes.min(axis=0) > -0.1
    candidates, shapes = candidates[inside], shapes[:, inside]
    nearest = np.empty((len(parents), len(corners)), dtype=int)
    for first in range(0, len(parents), _CHUNK):
        rows = slice(first, first + _CHUNK)
        places = np.einsum("cvx,vs->csx", coarse_vertices[parents[rows]], shapes)
        apart = fine_vertices[rows, :, None] - places[:, None]
        nearest[rows] = np.einsum("cvsx,cvsx->cvs", apart, apart).argmin(axis=-1)
    keys = nearest @ len(candidates) ** np.arange(len(corners))
    _, some, which = np.unique(keys, return_index=True, return_inverse=True)
    affine = np.linalg.pinv(np.column_stack([corners, np.ones(len(corners))]))
    images = candidates[nearest[some]]
    maps = np.einsum("av,mvx->mxa", affine, images)
    A, b = maps[:, :, :-1], maps[:, :, -1]
    flat = np.abs(np.einsum("mxa,va->mvx", A, corners) + b[:, None] - images).max(initial=0) < 1e-12
    halves = np.abs(np.abs(np.linalg.det(A)) - 0.5 ** A.shape[-1]).max(initial=0) < 1e-12
    return (parents, which.reshape(-1), A, b) if flat and halves else None


def _vertices(mesh: MeshGeometry) -> tuple[object, np.ndarray]:
    """FIAT's element of the values at the vertices of a cell, and the coordinates of all local cells' vertices,
    ``(cells, vertices, gdim)``.
    """
    places = mesh.coordinates
    V = places.function_space()
    element = V.finat_element.fiat_equivalent
    nodes = [tuple(functional.get_point_dict()) for functional in element.dual_basis()]
    if sorted(nodes) != sorted((tuple(vertex),) for vertex in element.get_reference_element().get_vertices()):
        family = "DG" if mesh.ufl_cell().is_simplex else "DQ"
        p1 = FiniteElement(family, mesh.ufl_cell(), 1, variant="equispaced")
        V = FunctionSpace(mesh, VectorElement(p1, dim=mesh.geometric_dimension))
        places, element = Function(V).interpolate(SpatialCoordinate(mesh)), V.finat_element.fiat_equivalent
    return element, places.dat.data_ro_with_halos.reshape(-1, mesh.geometric_dimension)[
        V.cell_node_map().values_with_halo
    ]


def _assembled(
    coarse: WithGeometry, fine: WithGeometry, parents: np.ndarray, which: np.ndarray, A: np.ndarray, b: np.ndarray,
    reference: _Reference,
) -> PETSc.Mat:  # fmt: skip
    """The matrix, from the parent of each own fine cell and the number of its map."""
    entries = reference.entries(A, b)
    size, n = fine.dof_dset.size, entries.shape[1]
    nodes = fine.cell_node_map().values_with_halo[: len(parents)].ravel()
    own = np.flatnonzero(nodes < size)[::-1]
    place = np.full(size, -1)
    place[nodes[own]] = own  # the first of the cells that share a degree of freedom
    cell, local = np.divmod(place, n)
    values = entries[which[cell], local]
    columns = coarse.dof_dset.lgmap.block_indices[coarse.cell_node_map().values_with_halo[parents[cell]]]
    order = np.argsort(columns, axis=1)
    values, columns = (np.take_along_axis(x, order, axis=1) for x in (values, columns))
    block = fine.block_size
    within = np.arange(block, dtype=columns.dtype)
    columns = (columns[:, None, :] * block + within[:, None]).reshape(size * block, n)
    values = np.repeat(values, block, axis=0)
    kept = np.abs(values) > _SMALL * np.abs(entries).max(initial=0)
    pointers = np.concatenate([[0], np.cumsum(kept.sum(axis=1))])
    sizes = [(V.dof_dset.layout_vec.local_size, V.dim()) for V in (fine, coarse)]
    csr = (pointers.astype(PETSc.IntType), columns[kept].astype(PETSc.IntType), values[kept].astype(PETSc.ScalarType))
    P = PETSc.Mat().createAIJ(sizes, csr=csr, comm=fine.comm)
    P.setBlockSizes(block, block)
    return P


def _averaged(
    coarse: WithGeometry, fine: WithGeometry, parents: np.ndarray, which: np.ndarray, A: np.ndarray, b: np.ndarray,
    reference: _Reference,
) -> PETSc.Mat:  # fmt: skip
    """The matrix of :func:`cell_averages`, arguments as of :func:`_assembled`."""
    parts = reference.averages(A, b)
    rows, columns = (V.dof_dset.lgmap.block_indices[V.cell_node_map().values_with_halo] for V in (coarse, fine))
    counts = PETSc.Vec().createMPI((coarse.dof_dset.size, None), comm=coarse.comm)
    own = rows[: coarse.mesh().cell_set.size].ravel()
    counts.setValues(own, np.ones(len(own)), addv=True)
    counts.assemble()
    kept = (np.abs(parts) > _SMALL * np.abs(parts).max(initial=0))[which]
    block = coarse.block_size
    within = np.arange(block, dtype=rows.dtype)
    i, j = (
        (np.broadcast_to(x, kept.shape)[kept][:, None] * block + within).ravel()
        for x in (rows[parents][:, :, None], columns[: len(parents)][:, None, :])
    )
    R = PETSc.Mat().create(comm=coarse.comm)
    R.setSizes([(V.dof_dset.layout_vec.local_size, V.dim()) for V in (coarse, fine)])
    R.setType("aij")
    R.setPreallocationCOO(i.astype(PETSc.IntType), j.astype(PETSc.IntType))
    R.setValuesCOO(np.repeat(parts[which][kept], block).astype(PETSc.ScalarType))
    scale = coarse.dof_dset.layout_vec.duplicate()
    scale.array[:] = np.repeat(1 / counts.array_r, block)
    R.diagonalScale(scale)
    return R

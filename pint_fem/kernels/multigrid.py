r"""Geometric multigrid and patch preconditioners for the systems of a step, chosen by PETSc's options.

``{"ksp_type": "cg", "ksp_rtol": 1e-12, "pc_type": "mg", "mg_levels_pc_type": "python", "mg_levels_pc_python_type":
"firedrake.ASMStarPC"}`` is multigrid on the meshes below the evolution's in its ``MeshHierarchy``. For Maxwell's
electric field (N1curl) patches around vertices make it converge independently of mesh and step (D. Arnold, R. Falk, R.
Winther, Numer. Math. 85, 2000). Coarse matrices are Galerkin's, :math:`A_c = P^T A P`, with unit rows where conditions
are: any assembled matrix can be solved with, such as the Schur complement of an eliminated field.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from firedrake import DirichletBC
from firedrake.functionspaceimpl import WithGeometry
from firedrake.mg.utils import get_level
from firedrake.petsc import PETSc

from pint_fem.errors import InputError
from pint_fem.kernels.arrays import boundary_rows, like_subspace
from pint_fem.kernels.prolongation import prolongation

__all__ = ["Geometry", "galerkin_levels"]


class Geometry:
    """The space of a system's unknowns and its conditions, which some preconditioners require besides the matrix.

    Parameters
    ----------
    space
        Space of the unknowns; for multigrid not a mixed one.
    bcs
        Conditions on it.
    """

    def __init__(self, space: WithGeometry, bcs: Sequence[DirichletBC] = ()):
        self.space, self.bcs = space, tuple(bcs)

    def prepare(self, ksp: PETSc.KSP, parameters: Mapping) -> None:
        """Set the space of a solver, and its levels for multigrid, before it reads its options (collective).

        Raises
        ------
        InputError
            If multigrid is chosen on a mesh without hierarchy or in a mixed space.
        """
        ksp.setDM(self.space.dm)
        ksp.setDMActive(PETSc.KSP.DMActive.ALL, False)
        if parameters.get("pc_type") == "mg":
            self._multigrid(ksp)

    def _multigrid(self, ksp: PETSc.KSP) -> None:
        """Set the interpolations and matrices of all levels."""
        hierarchy, level = get_level(self.space.mesh().unique())
        if hierarchy is None or len(self.space) > 1 or level < 1:
            raise InputError(
                "pc_type 'mg' requires an evolution on a finer mesh of a MeshHierarchy and a state (or, with "
                "eliminate=, the rest of it) that is not mixed; give 'gamg' or a direct solver"
            )
        if hierarchy.refinements_per_level != 1:
            raise InputError("pc_type 'mg': give a MeshHierarchy with refinements_per_level=1")
        pc, levels = ksp.getPC(), int(level) + 1
        pc.setType("mg")
        pc.setMGLevels(levels)
        found = galerkin_levels(ksp.getOperators()[0], self.space, self.bcs)
        for number, (P, matrix, coarse) in zip(range(levels - 1, 0, -1), found, strict=True):
            pc.setMGInterpolation(number, P)
            smoother = pc.getMGCoarseSolve() if number == 1 else pc.getMGSmoother(number - 1)
            smoother.setDM(coarse.dm)
            smoother.setDMActive(PETSc.KSP.DMActive.ALL, False)
            smoother.setOperators(matrix)


def galerkin_levels(
    matrix: PETSc.Mat, space: WithGeometry, bcs: Sequence[DirichletBC]
) -> list[tuple[PETSc.Mat, PETSc.Mat, WithGeometry]]:
    """Interpolations, matrices and spaces of the levels below a matrix, from fine to coarse (collective).

    Parameters
    ----------
    matrix
        The finest matrix, with rows and columns of conditions those of the identity.
    space, bcs
        Its space, on a mesh of a ``MeshHierarchy``, and conditions on it.

    Returns
    -------
    list of tuple
        ``P`` from the coarser space, ``A_c = P^T A P`` with unit rows where conditions are, and the coarser space.
    """
    hierarchy, level = get_level(space.mesh().unique())
    found = []
    for number in range(int(level), 0, -1):
        coarse = space.reconstruct(mesh=hierarchy[number - 1])
        coarse_bcs = [DirichletBC(like_subspace(coarse, bc), 0, bc.sub_domain) for bc in bcs]
        P = prolongation(coarse, space).copy()
        columns, rows = P.createVecs()
        fixed = boundary_rows(coarse_bcs, coarse)
        for vector, without in ((rows, boundary_rows(bcs, space)), (columns, fixed)):
            vector.set(1.0)
            vector.array[without] = 0
        P.diagonalScale(rows, columns)
        matrix = matrix.ptap(P)
        first = matrix.getOwnershipRange()[0]
        matrix.zeroRowsColumns((np.asarray(fixed) + first).astype(PETSc.IntType), diag=1.0)
        found.append((P, matrix, coarse))
        space, bcs = coarse, coarse_bcs
    return found

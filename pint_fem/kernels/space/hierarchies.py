"""The levels of multigrid: geometric ones on the meshes of a hierarchy, or algebraic ones by PETSc's aggregation."""

from __future__ import annotations

from firedrake.functionspaceimpl import WithGeometry
from firedrake.mg.utils import get_level
from firedrake.petsc import PETSc
from petsctools import OptionsManager

from pint_fem.collective import all_ranks
from pint_fem.kernels.lanes.triangular import TriangularFactors
from pint_fem.kernels.multigrid import Geometry, galerkin_levels
from pint_fem.kernels.replication import Replication, whole_matrix
from pint_fem.kernels.space.matrices import BlockMatrix
from pint_fem.kernels.space.multigrid import CoarsestLevel, Level, MultigridCycle, Smoother
from pint_fem.kernels.space.patches import requires_patches, star_patches

__all__ = ["COARSEST", "algebraic_cycle", "geometric_cycle", "has_hierarchy"]

COARSEST = 40_000
"""Unknowns of a coarsest matrix above which it is no coarse level: every rank factors it."""
DEGREES = {"geometric": 2, "algebraic": 3}
"""Degrees of the smoothing polynomials."""
_GAMG = {
    "pc_type": "gamg",
    "pc_gamg_agg_nsmooths": 1,
    "pc_gamg_threshold": 0.01,
    "pc_gamg_coarse_eq_limit": 2000,
    "pc_gamg_repartition": False,
    "mg_levels_ksp_type": "preonly",
    "mg_levels_pc_type": "none",
    "mg_coarse_ksp_type": "preonly",
    "mg_coarse_pc_type": "none",
}


def has_hierarchy(geometry: Geometry | None) -> bool:
    """Whether the mesh of a space is a finer one of a ``MeshHierarchy`` that multigrid can use."""
    if geometry is None or len(geometry.space) > 1:
        return False
    hierarchy, level = get_level(geometry.space.mesh().unique())
    return hierarchy is not None and hierarchy.refinements_per_level == 1 and level >= 1


def geometric_cycle(matrix: PETSc.Mat, geometry: Geometry) -> MultigridCycle:
    """V-cycles on the meshes below that of a space (collective).

    Raises
    ------
    ArithmeticError
        On every rank, if the matrix is found not to be positive definite, or the coarsest one is too large.
    """
    found = galerkin_levels(matrix, geometry.space, geometry.bcs)
    matrices = [matrix, *(A for _, A, _ in found)]
    spaces: list[WithGeometry] = [geometry.space, *(space for *_, space in found)]
    patches = [star_patches(A, V) if requires_patches(V) else None for A, V in zip(matrices[:-1], spaces, strict=False)]
    return _cycle(matrices, [P for P, *_ in found], patches, DEGREES["geometric"])


def algebraic_cycle(matrix: PETSc.Mat, prefix: str) -> MultigridCycle:
    """V-cycles by smoothed aggregation, whose matrices PETSc's GAMG computes (collective); ``prefix``: of its options.

    Raises
    ------
    ArithmeticError
        On every rank, if the matrix is found not to be positive definite, or the coarsest one is too large.
    """
    pc = PETSc.PC().create(matrix.comm)
    pc.setOperators(matrix)
    options = OptionsManager(_GAMG, f"{prefix}gamg_")
    options.set_from_options(pc)
    with options.inserted_options():
        pc.setUp()
    count = pc.getMGLevels()
    interpolations = [pc.getMGInterpolation(level) for level in range(count - 1, 0, -1)]
    matrices = [matrix]
    for P in interpolations:
        matrices.append(matrices[-1].ptap(P))
    made = _cycle(matrices, interpolations, [None] * len(interpolations), DEGREES["algebraic"])
    pc.destroy()
    return made


def _cycle(
    matrices: list[PETSc.Mat], interpolations: list[PETSc.Mat], patches: list[BlockMatrix | None], degree: int
) -> MultigridCycle:
    levels, comm = [], matrices[0].comm.tompi4py()
    for A, P, B in zip(matrices, interpolations, patches, strict=False):
        block = BlockMatrix.of_petsc(A)
        R = P.transpose(PETSc.Mat())
        smoother = Smoother(block, comm, patches=B, degree=degree)
        levels.append(Level(BlockMatrix.of_petsc(P), BlockMatrix.of_petsc(R), smoother))
        R.destroy()
    last = matrices[-1]
    if last.getSize()[0] > COARSEST:
        raise ArithmeticError(f"the coarsest level of multigrid has {last.getSize()[0]} unknowns")
    whole, factors = whole_matrix(last), None
    try:
        factors = TriangularFactors(whole, symmetric=True)
    except (ArithmeticError, MemoryError):
        pass
    if not all_ranks(comm, factors is not None):
        raise ArithmeticError("the coarsest matrix of multigrid cannot be factored")
    return MultigridCycle(levels, CoarsestLevel(factors, Replication(last.getLocalSize()[0], comm)))

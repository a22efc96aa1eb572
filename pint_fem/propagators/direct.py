"""PETSc's solvers of a step's systems that are used unless told otherwise, and what matrices and factors take."""

from __future__ import annotations

import numpy as np
from firedrake.petsc import PETSc

__all__ = ["default_solver", "factor_bytes", "matrix_bytes"]

_BYTES = 12  # an entry of a factor with its index


def default_solver(comm, *, spd: bool = False) -> dict:
    """PETSc options of a solve to round-off whose bits are reproducible.

    On one rank a sparse factorisation. On several, Krylov iteration with overlapping subdomains that are factored:
    MUMPS adds up contributions in the order in which messages arrive, so its last bits change from run to run (and it
    is slower: heat, 64x64 P1, 2 ranks, one state 4.5 ms against 0.74, a block of 8 states 1.1 against 0.76 ms a state).
    """
    if comm.size == 1:
        kind, package = ("cholesky", "cholmod") if spd else ("lu", "umfpack")
        return {"ksp_type": "preonly", "pc_type": kind, "pc_factor_mat_solver_type": package}
    krylov = {"ksp_type": "cg"} if spd else {"ksp_type": "gmres", "ksp_gmres_restart": 60}
    return krylov | {
        "ksp_rtol": 1e-14,
        "ksp_max_it": 2000,
        "pc_type": "asm",
        "pc_asm_type": "basic",
        "pc_asm_overlap": 3,
        "sub_pc_type": "cholesky" if spd else "lu",
    }


def matrix_bytes(matrix: PETSc.Mat) -> int:
    """Memory of a matrix on this rank: its entries, and the column of each and the start of each row if it is sparse.

    PETSc's own count, ``MatInfo.memory``, is 0 for sparse matrices.
    """
    entries, index = int(matrix.getInfo(PETSc.Mat.InfoType.LOCAL)["nz_allocated"]), np.dtype(PETSc.IntType).itemsize
    if "dense" in matrix.getType():
        return np.dtype(PETSc.ScalarType).itemsize * entries
    return (np.dtype(PETSc.ScalarType).itemsize + index) * entries + index * (matrix.getLocalSize()[0] + 1)


def factor_bytes(ksp: PETSc.KSP) -> int:
    """Memory of a factorisation on this rank, from the number of its nonzeros."""
    pc = ksp.getPC()
    kind = pc.getType()
    if kind in ("asm", "bjacobi"):
        parts = pc.getASMSubKSP() if kind == "asm" else pc.getBJacobiSubKSP()
        return sum(_nonzeros(part.getPC()) for part in parts) * _BYTES
    return _nonzeros(pc) * _BYTES


def _nonzeros(pc: PETSc.PC) -> int:
    """Nonzeros of a factor; those of the matrix for preconditioners that have none."""
    matrix = pc.getOperators()[1]
    here = PETSc.Mat.InfoType.LOCAL
    if pc.getType() not in ("lu", "cholesky", "ilu", "icc"):
        return int(matrix.getInfo(here)["nz_used"])
    known = int(pc.getFactorMatrix().getInfo(here)["nz_used"])
    if known or matrix.comm.size > 1:
        return known or int(matrix.getInfo(here)["nz_used"])
    # UMFPACK, KLU and CHOLMOD do not tell PETSc: PETSc's own factor of the same matrix has about as many
    other = PETSc.PC().create(matrix.comm)
    other.setOperators(matrix)
    other.setType("lu")
    other.setFactorSolverType("petsc")
    other.setFactorOrdering("nd")
    other.setFactorShift(PETSc.Mat.FactorShiftType.NONZERO)
    other.setUp()
    known = int(other.getFactorMatrix().getInfo(here)["nz_used"])
    other.destroy()
    return known // 2 if pc.getType() == "cholesky" else known

"""Default PETSc solvers of a step's systems, and the memory of matrices and factors.

This module requires petsc4py and petsctools, not Firedrake.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from mpi4py import MPI
from petsc4py import PETSc
from petsctools import flatten_parameters

from pint_fem.errors import SolverFailure

__all__ = [
    "DISTRIBUTED",
    "REDUNDANT",
    "added",
    "completed",
    "default_solver",
    "direct_solver",
    "factor_bytes",
    "is_finite",
    "is_large",
    "matrix_bytes",
    "require_finite",
    "solves_accurately",
    "trial_residual",
    "with_finite_entries",
]

REDUNDANT = 20_000
"""Unknowns of a system up to which each rank in space factors the whole of it."""
DISTRIBUTED = 500_000
"""Unknowns of a system up to which the ranks in space factor it together where options choose no solver."""
_ITERATE = {"ksp_type": "gmres", "ksp_gmres_restart": 60, "ksp_rtol": 1e-14, "ksp_max_it": 2000}
_SUBDOMAINS = {"pc_type": "asm", "pc_asm_type": "basic", "pc_asm_overlap": 3}
_BYTES = 12  # of an entry of a factor with its index


def direct_solver(comm: MPI.Comm, unknowns: int, *, spd: bool = False) -> dict | None:
    """PETSc options of a factorisation whose solves are bitwise reproducible.

    On one rank a sparse factorisation. On several, every rank factors the whole of small systems, and a solve is one
    exchange of the right-hand side for each state, which is faster than iterations with overlapping subdomains. MUMPS
    adds contributions in the order in which messages arrive, so that its results differ from run to run.

    Parameters
    ----------
    comm
        Communicator of the matrix.
    unknowns
        Number of rows on all ranks.
    spd
        Whether the matrix is symmetric and positive definite.

    Returns
    -------
    dict or None
        ``None`` for large systems on several ranks.
    """
    kind, package = ("cholesky", "cholmod") if spd else ("lu", "umfpack")
    factor = {"pc_type": kind, "pc_factor_mat_solver_type": package}
    if comm.size == 1:
        return {"ksp_type": "preonly", **factor}
    if is_large(unknowns):
        return None
    return {"ksp_type": "preonly", "pc_type": "redundant", **{f"redundant_{k}": v for k, v in factor.items()}}


def is_large(unknowns: int) -> bool:
    """Whether a system is too large to be factored by each rank in space."""
    return unknowns > REDUNDANT


def default_solver(comm: MPI.Comm, unknowns: int, *, spd: bool = False, reproducible: bool = False) -> dict:
    """PETSc options of a solve to round-off: those of :func:`direct_solver`, with its parameters; for larger systems on
    several ranks MUMPS, whose results are not the same bits in each run. Where they have to be, and for systems with
    more than :data:`DISTRIBUTED` unknowns, a Krylov iteration with overlapping subdomains that are factored.
    """
    direct = direct_solver(comm, unknowns, spd=spd)
    if direct is not None:
        return direct
    if not reproducible and unknowns <= DISTRIBUTED:
        return {
            "ksp_type": "preonly", "pc_type": "cholesky" if spd else "lu", "pc_factor_mat_solver_type": "mumps",
        }  # fmt: skip
    return {**_ITERATE, "ksp_type": "cg" if spd else "gmres", **_SUBDOMAINS, "sub_pc_type": "cholesky" if spd else "lu"}


def completed(parameters: Mapping, comm: MPI.Comm, unknowns: int, *, reproducible: bool = False) -> dict:
    """A user's PETSc options, flat, with defaults for options that are not given.

    Options without ``ksp_`` or ``pc_`` are added to :func:`default_solver`; a factorisation alone is applied once; any
    other method iterates to round-off, by GMRES and with overlapping subdomains where these are not chosen.

    Parameters
    ----------
    parameters
        Nested or flat options.
    comm
        Communicator of the matrix.
    unknowns
        Number of rows on all ranks.
    reproducible
        As of :func:`default_solver`.
    """
    given = flatten_parameters(parameters)
    method, pc = given.get("ksp_type"), given.get("pc_type")
    if not any(name.startswith(("ksp_", "pc_")) for name in given):
        return {**default_solver(comm, unknowns, reproducible=reproducible), **given}
    if method == "preonly" or (method is None and pc in ("lu", "cholesky")):
        return {"ksp_type": "preonly", "pc_type": "lu", **given}
    if pc is not None:
        return {**_ITERATE, **given}
    subdomains = {"pc_type": "lu"} if comm.size == 1 else {**_SUBDOMAINS, "sub_pc_type": "lu"}
    return {**_ITERATE, **subdomains, **given}


def is_finite(matrix: PETSc.Mat) -> bool:
    """Whether no entry of an assembled matrix is infinite or NaN (collective)."""
    # a sum is NaN on all ranks if an entry is; PETSc's maximum norm is not
    return bool(np.isfinite(matrix.norm(PETSc.NormType.FROBENIUS)))


def require_finite(matrix: PETSc.Mat, what: str) -> None:
    """Require that a matrix is finite before it is factored: some packages never return from that (collective).

    Raises
    ------
    SolverFailure
        On every rank of the matrix, which the message calls ``what``.
    """
    if not is_finite(matrix):
        raise SolverFailure(f"{what} has entries that are infinite or NaN, or too large for their squares to be summed")


def with_finite_entries(matrix: PETSc.Mat) -> PETSc.Mat:
    """The matrix, or where it is not finite one with the same nonzero pattern, whose factor has the same size
    (collective).
    """
    if is_finite(matrix):
        return matrix
    like = matrix.copy()
    like.zeroEntries()
    like.shift(1.0)
    return like


def solves_accurately(matrix: PETSc.Mat, solve: Callable[[PETSc.Vec, PETSc.Vec], None], limit: float) -> bool:
    """Whether the residual of a trial solve, ``solve(b, x)``, is at most ``limit`` times the norms of the terms that it
    is the difference of (collective).
    """
    x, b = matrix.createVecs()
    start, stop = b.getOwnershipRange()
    b.array[:] = np.cos(np.arange(start, stop) ** 2)
    residual, norm = trial_residual(matrix, solve, b, x), PETSc.NormType.NORM_INFINITY
    accurate = residual <= limit * (matrix.norm(norm) * x.norm(norm) + b.norm(norm))
    x.destroy()
    b.destroy()
    return bool(accurate)


def trial_residual(
    matrix: PETSc.Mat, solve: Callable[[PETSc.Vec, PETSc.Vec], None], b: PETSc.Vec, x: PETSc.Vec
) -> float:
    """Solve for ``x`` by ``solve(b, x)``; the largest entry of ``A x - b`` (collective)."""
    solve(b, x)
    r = b.duplicate()
    matrix.mult(x, r)
    r.axpy(-1.0, b)
    residual = r.norm(PETSc.NormType.NORM_INFINITY)
    r.destroy()
    return residual


def matrix_bytes(matrix: PETSc.Mat) -> int:
    """Bytes of a matrix on this rank: its entries, and if it is sparse the column of each and the start of each row.

    PETSc's own count, ``MatInfo.memory``, is 0 for sparse matrices.
    """
    entries, index = int(matrix.getInfo(PETSc.Mat.InfoType.LOCAL)["nz_allocated"]), np.dtype(PETSc.IntType).itemsize
    if "dense" in matrix.getType():
        return np.dtype(PETSc.ScalarType).itemsize * entries
    return (np.dtype(PETSc.ScalarType).itemsize + index) * entries + index * (matrix.getLocalSize()[0] + 1)


def added(*parts: Mapping[str, int]) -> dict[str, int]:
    """The sum of numbers by name."""
    return {name: sum(part.get(name, 0) for part in parts) for name in dict.fromkeys(n for part in parts for n in part)}


def factor_bytes(ksp: PETSc.KSP, parameters: Mapping) -> int:
    """Bytes of a factorisation on this rank, with the copies of matrices that it works on.

    CHOLMOD reports its memory to PETSc, PETSc and MUMPS report nonzeros; for other packages PETSc's own factor is
    counted. For ``redundant`` on several ranks, which petsc4py does not expose, each rank factors the matrix again
    (collective).

    Parameters
    ----------
    ksp
        A solver that is set up.
    parameters
        The flat PETSc options that it was set up with.
    """
    pc = ksp.getPC()
    kind = pc.getType()
    if kind == "bjacobi":
        return sum(_bytes(part.getPC()) for part in pc.getBJacobiSubKSP())
    if kind == "asm":
        parts = [part.getPC() for part in pc.getASMSubKSP()]
        return sum(_bytes(part) + matrix_bytes(part.getOperators()[1]) for part in parts)
    if kind != "redundant":
        return _bytes(pc)
    matrix = pc.getOperators()[1]
    whole = PETSc.IS().createStride(matrix.getSize()[0], comm=PETSc.COMM_SELF)
    (alone,) = matrix.createSubMatrices([whole], [whole])
    factor = parameters.get("redundant_pc_type", "lu"), parameters.get("redundant_pc_factor_mat_solver_type", "petsc")
    size = matrix_bytes(alone) + _bytes_of_new(alone, *factor)
    alone.destroy()
    return size


def _bytes(pc: PETSc.PC) -> int:
    """Bytes of a factor; those of the matrix, about, for preconditioners without one."""
    matrix = pc.getOperators()[1]
    here = PETSc.Mat.InfoType.LOCAL
    if pc.getType() not in ("lu", "cholesky", "ilu", "icc"):
        return int(matrix.getInfo(here)["nz_used"]) * _BYTES
    found = pc.getFactorMatrix().getInfo(here)
    if found["memory"]:
        return int(found["memory"])
    entries, ranks = int(found["nz_used"]), matrix.comm.size
    if ranks > 1:  # MUMPS reports the number on all ranks
        return (entries // ranks or int(matrix.getInfo(here)["nz_used"])) * _BYTES
    if entries:
        return entries * _BYTES
    count = _bytes_of_new(matrix, "lu", "petsc")  # of L and U
    return count // 2 if pc.getType() == "cholesky" else count


def _bytes_of_new(matrix: PETSc.Mat, kind: str, package: str) -> int:
    """Bytes of a factor of a matrix on one rank that is computed for this purpose."""
    pc = PETSc.PC().create(matrix.comm)
    pc.setOperators(matrix)
    pc.setType(kind)
    pc.setFactorSolverType(package)
    if package == "petsc":
        pc.setFactorOrdering("nd")
        pc.setFactorShift(PETSc.Mat.FactorShiftType.NONZERO)
    pc.setUp()
    found = _bytes(pc)
    pc.destroy()
    return found

"""Checks of PETSc options before a solver reads them: misspelt names, and types that this PETSc does not have.

PETSc ignores options with unknown names, and rejects unknown types when a solver is set up, in the middle of a step and
on each rank separately. As its options are many and grow, a name is refused only if it is one slip away from a common
one and PETSc's library does not contain it. This module requires petsc4py and petsctools, not Firedrake.
"""

from __future__ import annotations

import difflib
import mmap
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import petsc4py
from petsc4py import PETSc
from petsctools import flatten_parameters

from pint_fem.errors import InputError
from pint_fem.petsc_options.spelling import nearest

__all__ = ["require_names", "require_types"]

COMMON = frozenset(
    """
    ksp_type ksp_rtol ksp_atol ksp_divtol ksp_max_it ksp_norm_type ksp_pc_side ksp_monitor ksp_view
    ksp_converged_reason ksp_gmres_restart ksp_initial_guess_nonzero ksp_error_if_not_converged ksp_richardson_scale
    pc_type pc_side pc_factor_mat_solver_type pc_factor_mat_ordering_type pc_factor_levels pc_factor_shift_type
    pc_asm_overlap pc_asm_type pc_mg_type pc_mg_levels pc_gamg_type pc_gamg_threshold pc_hypre_type
    pc_fieldsplit_type pc_fieldsplit_schur_fact_type pc_python_type pc_jacobi_type pc_sor_omega
    snes_type snes_rtol snes_atol snes_stol snes_max_it snes_linesearch_type snes_monitor snes_view
    snes_converged_reason mat_type pmat_type
    """.split()
)
"""Common options, without prefixes."""


def require_types(parameters: Mapping, prefix: str, where: str = "solver_parameters") -> None:
    """Require that the types of solvers in PETSc options exist in this PETSc, and that no common name is misspelt.

    Checked are ``ksp_type``, ``pc_type``, ``snes_type``, ``pc_factor_mat_solver_type`` and
    ``pc_factor_mat_ordering_type``, also behind prefixes such as ``sub_`` or ``fieldsplit_0_``.

    Parameters
    ----------
    parameters
        Nested or flat options.
    prefix
        Options with this prefix in PETSc's database (the command line) are checked, too.
    where
        The name of the parameters in messages.

    Raises
    ------
    InputError
        The option, the name that was given, and the nearest ones that are accepted.
    """
    require_names(parameters, prefix, where)
    given = _given_options(parameters, prefix, where)
    values = dict(given.values())
    for shown, (name, value) in given.items():
        ending = next((ending for ending in _KINDS if name == ending or name.endswith(f"_{ending}")), None)
        if ending is None or not isinstance(value, str):
            continue
        before = name.removesuffix(ending).removesuffix("pc_factor_")
        kind, pc_type = _KINDS[ending], values.get(f"{before}pc_type")
        if not kind.exists(value, pc_type):
            near = [name for name in kind.near(value) if kind.exists(name, pc_type)][:3]
            text = ", ".join(repr(name) for name in near or kind.common)
            raise InputError(f"{shown} {value!r} is unknown to PETSc as it is built here: give one such as {text}")


def require_names(parameters: Mapping, prefix: str, where: str = "solver_parameters") -> None:
    """Require that no name in PETSc options is a misspelt common one; with the parameters of :func:`require_types`."""
    for shown, (name, _) in _given_options(parameters, prefix, where).items():
        parts = str(name).split("_")
        for i in range(len(parts)):  # behind prefixes such as sub_ or fieldsplit_0_
            ending = "_".join(parts[i:])
            if ending in COMMON or len(ending) < 6:
                break
            near = nearest(ending, COMMON)
            if near is not None and not _is_in_petsc(ending):
                raise InputError(f"{shown}: PETSc has no such option and would ignore it; did you mean {near!r}?")


def _given_options(parameters: Mapping, prefix: str, where: str) -> dict[str, tuple[str, object]]:
    """Names and values of nested or flat options, and of those with a prefix in PETSc's database, by their names in
    messages.
    """
    given = {f"{where}: {name}": (name, value) for name, value in flatten_parameters(parameters).items()}
    return given | {f"-{prefix}{name}": (name, value) for name, value in PETSc.Options(prefix).getAll().items()}


@lru_cache
def _is_in_petsc(name: str) -> bool:
    """Whether PETSc's library contains the name of an option; true where the library cannot be read."""
    config = petsc4py.get_config()
    folder = Path(config["PETSC_DIR"], config.get("PETSC_ARCH") or "", "lib")
    found = [path for path in folder.glob("libpetsc*") if path.is_file()]
    if not found:
        return True
    library = max(found, key=lambda path: path.stat().st_size)  # others are links to it
    with open(library, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        return text.find(b"-" + name.encode() + b"\0") >= 0


class _Kind(NamedTuple):
    """A kind of type.

    Attributes
    ----------
    exists
        Whether PETSc has a type, beside a given ``pc_type`` or ``None``.
    names
        The class with petsc4py's names.
    common
        Some of them.
    """

    exists: Callable[[str, str | None], bool]
    names: type
    common: tuple[str, ...]

    def near(self, value: str) -> list[str]:
        """Names with a similar spelling."""
        names = [v for k, v in vars(self.names).items() if isinstance(v, str) and not k.startswith("_")]
        return difflib.get_close_matches(value, names, n=8, cutoff=0.5)


_FRAGILE = frozenset({"aspin", "mpi", "pipelcg"})
"""Types that PETSc cannot destroy before they are set up, which are assumed to exist."""


def _accepted_by(cls: Callable) -> Callable[[str, str | None], bool]:
    """A function that returns whether PETSc's objects of a class accept a type."""

    def exists(name: str, pc_type: str | None) -> bool:
        if name in _FRAGILE:
            return True
        trial = cls().create(PETSc.COMM_SELF)
        try:
            trial.setType(name)
        except PETSc.Error:
            return False
        finally:
            trial.destroy()
        return True

    return exists


def _one_by_one() -> PETSc.Mat:
    """The identity matrix of size one."""
    matrix = PETSc.Mat().createAIJ((1, 1), csr=([0, 1], [0], [1.0]), comm=PETSc.COMM_SELF)
    matrix.setOption(PETSc.Mat.Option.SPD, True)
    return matrix


def _package_exists(package: str, pc_type: str | None) -> bool:
    """Whether a package has factorisations of a kind, such as ``"lu"``; for other types of any kind."""
    for kind in ("lu", "cholesky") if pc_type not in ("lu", "cholesky", "ilu", "icc", "qr") else (pc_type,):
        matrix, pc = _one_by_one(), PETSc.PC().create(PETSc.COMM_SELF)
        try:
            pc.setOperators(matrix)
            pc.setType(kind)
            pc.setFactorSolverType(package)
            pc.setFactorSetUpSolverType()
            return True
        except PETSc.Error:
            continue
        finally:
            pc.destroy()
            matrix.destroy()
    return False


def _ordering_exists(ordering: str, pc_type: str | None) -> bool:
    """Whether PETSc has an ordering for factorisations."""
    matrix = _one_by_one()
    try:
        for permutation in matrix.getOrdering(ordering):
            permutation.destroy()
    except PETSc.Error:
        return False
    finally:
        matrix.destroy()
    return True


_KINDS = {
    "ksp_type": _Kind(_accepted_by(PETSc.KSP), PETSc.KSP.Type, ("preonly", "cg", "gmres", "fgmres")),
    "pc_type": _Kind(_accepted_by(PETSc.PC), PETSc.PC.Type, ("lu", "cholesky", "ilu", "gamg", "asm")),
    "snes_type": _Kind(_accepted_by(PETSc.SNES), PETSc.SNES.Type, ("newtonls", "newtontr", "ksponly")),
    "mat_solver_type": _Kind(_package_exists, PETSc.Mat.SolverType, ("petsc", "mumps", "umfpack")),
    "mat_ordering_type": _Kind(_ordering_exists, PETSc.Mat.OrderingType, ("nd", "rcm", "natural")),
}
"""Kinds of types by the ending of an option."""

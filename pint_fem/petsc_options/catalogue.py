"""Misspelt names of PETSc options: PETSc ignores them without a word, so they are refused with the name that was meant.

PETSc's options are many and grow, so a name is refused only if it is one slip away from a common one and PETSc's
library does not contain it. This module needs petsc4py and petsctools, not Firedrake.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import petsc4py
from petsc4py import PETSc
from petsctools import flatten_parameters

from pint_fem.errors import InputError
from pint_fem.petsc_options.spelling import nearest

__all__ = ["given_options", "require_names"]

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
"""Options that runs of this package are given, without prefixes."""


def require_names(parameters: Mapping, prefix: str, where: str = "solver_parameters") -> None:
    """Require that no name of PETSc's options is a misspelt common one.

    Parameters
    ----------
    parameters
        Nested or flat options.
    prefix
        Options with this prefix in PETSc's database (the command line) are checked, too.
    where
        What the parameters are called in the message.

    Raises
    ------
    InputError
        Naming the option and what was meant.
    """
    for shown, (name, _) in given_options(parameters, prefix, where).items():
        _check(name, shown)


def given_options(parameters: Mapping, prefix: str, where: str) -> dict[str, tuple[str, object]]:
    """Names and values of nested or flat options, and of those with a prefix in PETSc's database, by what they are
    called in messages.
    """
    given = {f"{where}: {name}": (name, value) for name, value in flatten_parameters(parameters).items()}
    return given | {f"-{prefix}{name}": (name, value) for name, value in PETSc.Options(prefix).getAll().items()}


def _check(name: str, shown: str) -> None:
    parts = str(name).split("_")
    for i in range(len(parts)):  # behind prefixes such as sub_ or fieldsplit_0_
        ending = "_".join(parts[i:])
        if ending in COMMON or len(ending) < 6:
            return
        near = nearest(ending, COMMON)
        if near is not None and not _is_in_petsc(ending):
            raise InputError(f"{shown}: PETSc has no such option and would ignore it; did you mean {near!r}?")


@lru_cache
def _is_in_petsc(name: str) -> bool:
    """Whether PETSc's library contains the name of an option; true where there is no library to be read."""
    config = petsc4py.get_config()
    folder = Path(config["PETSC_DIR"], config.get("PETSC_ARCH") or "", "lib")
    found = [path for path in folder.glob("libpetsc*") if path.is_file()]
    if not found:
        return True
    library = max(found, key=lambda path: path.stat().st_size)  # others are links to it
    with open(library, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        return text.find(b"-" + name.encode() + b"\0") >= 0

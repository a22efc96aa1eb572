"""Types of solvers in PETSc options: a name that PETSc does not have is refused before anything is solved.

PETSc itself finds out where a solver is set up, in the middle of a step, on each rank for itself. This module needs
petsc4py and petsctools, not Firedrake.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import NamedTuple

from petsc4py import PETSc

from pint_fem.errors import InputError
from pint_fem.petsc_options.catalogue import given_options, require_names

__all__ = ["require_types"]


def require_types(parameters: Mapping, prefix: str, where: str = "solver_parameters") -> None:
    """Require that the types of solvers in PETSc options are ones that this PETSc has, and no name misspelt.

    Checked are ``ksp_type``, ``pc_type``, ``snes_type``, ``pc_factor_mat_solver_type`` and
    ``pc_factor_mat_ordering_type``, also behind prefixes such as ``sub_`` or ``fieldsplit_0_``.

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
        The option, the name that was given, and the nearest ones that would do.
    """
    require_names(parameters, prefix, where)
    given = given_options(parameters, prefix, where)
    plain = {name: value for name, value in given.values()}
    for shown, (name, value) in given.items():
        ending = next((ending for ending in _KINDS if name == ending or name.endswith(f"_{ending}")), None)
        if ending is None or not isinstance(value, str):
            continue
        before = name.removesuffix(ending).removesuffix("pc_factor_")
        kind, sibling = _KINDS[ending], plain.get(f"{before}pc_type")
        if not kind.exists(value, sibling):
            near = [name for name in kind.near(value) if kind.exists(name, sibling)][:3]
            text = ", ".join(repr(name) for name in near or kind.common)
            raise InputError(f"{shown} {value!r} is unknown to PETSc as it is built here: give one such as {text}")


class _Kind(NamedTuple):
    """A kind of type: whether PETSc has one, with the ``pc_type`` beside it; names in petsc4py; some of them."""

    exists: Callable[[str, str | None], bool]
    names: type
    common: tuple[str, ...]

    def near(self, value: str) -> list[str]:
        """Names that are written alike."""
        names = [v for k, v in vars(self.names).items() if isinstance(v, str) and not k.startswith("_")]
        return difflib.get_close_matches(value, names, n=8, cutoff=0.5)


_FRAGILE = frozenset({"aspin", "mpi", "pipelcg"})
"""Types that PETSc cannot destroy before they are set up: taken for granted."""


def _takes(make: Callable) -> Callable[[str, str | None], bool]:
    """Whether PETSc's objects of a class take a type."""

    def exists(name: str, sibling: str | None) -> bool:
        if name in _FRAGILE:
            return True
        thing = make().create(PETSc.COMM_SELF)
        try:
            thing.setType(name)
        except PETSc.Error:
            return False
        finally:
            thing.destroy()
        return True

    return exists


def _one_by_one() -> PETSc.Mat:
    matrix = PETSc.Mat().createAIJ((1, 1), csr=([0, 1], [0], [1.0]), comm=PETSc.COMM_SELF)
    matrix.setOption(PETSc.Mat.Option.SPD, True)
    return matrix


def _factors(package: str, kind: str | None) -> bool:
    """Whether a package has factorisations of a kind, such as ``"lu"``; default: of any."""
    for pc_type in ("lu", "cholesky") if kind not in ("lu", "cholesky", "ilu", "icc", "qr") else (kind,):
        matrix, pc = _one_by_one(), PETSc.PC().create(PETSc.COMM_SELF)
        try:
            pc.setOperators(matrix)
            pc.setType(pc_type)
            pc.setFactorSolverType(package)
            pc.setFactorSetUpSolverType()
            return True
        except PETSc.Error:
            continue
        finally:
            pc.destroy()
            matrix.destroy()
    return False


def _orders(ordering: str, sibling: str | None) -> bool:
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
    "ksp_type": _Kind(_takes(PETSc.KSP), PETSc.KSP.Type, ("preonly", "cg", "gmres", "fgmres")),
    "pc_type": _Kind(_takes(PETSc.PC), PETSc.PC.Type, ("lu", "cholesky", "ilu", "gamg", "asm")),
    "snes_type": _Kind(_takes(PETSc.SNES), PETSc.SNES.Type, ("newtonls", "newtontr", "ksponly")),
    "mat_solver_type": _Kind(_factors, PETSc.Mat.SolverType, ("petsc", "mumps", "umfpack")),
    "mat_ordering_type": _Kind(_orders, PETSc.Mat.OrderingType, ("nd", "rcm", "natural")),
}
"""By the ending of an option."""

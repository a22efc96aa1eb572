"""``pint-fem info``: versions of the libraries, and what PETSc is built with."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib import metadata
from typing import Any

from mpi4py import MPI

from pint_fem.cli import say
from pint_fem.commands.common import parser_of

__all__ = ["info_command"]

LIBRARIES = ("pint_fem", "firedrake", "petsc4py", "irksome", "mpi4py", "numpy", "scipy", "torch", "greenlet")
PACKAGES = {"MUMPS": "mumps", "CHOLMOD": "cholmod", "UMFPACK": "umfpack", "hypre": "hypre", "PT-Scotch": "ptscotch"}
"""What PETSc may be built with, by name and PETSc's own name."""


def info_command(arguments: Sequence[str]) -> None:
    """Print versions of the libraries, and what PETSc is built with."""
    parser_of("info", info_command.__doc__, petsc=False).read(arguments)
    lines = [("Python", platform.python_version()), ("MPI", MPI.Get_library_version().split("\n")[0].split(",")[0])]
    lines += [(name, _version(name)) for name in LIBRARIES]
    try:
        from petsc4py import PETSc
    except ImportError:
        lines.append(("PETSc", "not installed"))
    else:
        lines.append(("PETSc", ".".join(map(str, PETSc.Sys.getVersion()))))
        lines += [(f"PETSc: {what}", _built_in(PETSc, name)) for what, name in PACKAGES.items()]
    for name, value in lines:
        say(f"{name:36}{value}", result=True)


def _built_in(PETSc: Any, package: str) -> str:
    return "yes" if PETSc.Sys.hasExternalPackage(package) else "no"


def _version(name: str) -> str:
    """Version of an installed distribution."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"

"""Flags with which the suite compiles Firedrake's kernels: ``python -m tests.compiler_flags FOLDER`` prints them.

Most of the time that gcc takes for a small kernel is for PETSc's headers, and of the rest most for optimisations that
do not pay for meshes of a few cells. A header of all that kernels include is compiled once, into ``FOLDER``; gcc reads
it where a kernel is compiled with the same flags, and elsewhere the headers themselves.
"""

import shlex
import subprocess
import sys
from pathlib import Path

import petsctools
from mpi4py import MPI
from pyop2.compilation import LinuxGnuCompiler, sniff_compiler

OPTIMISATION = "-O1"
HEADERS = ("complex.h", "math.h", "petsc.h", "stdint.h", "stdbool.h")


def compiler_flags(folder: Path) -> str:
    """The value of ``PYOP2_CFLAGS``; nothing where the compiler is another one, or fails."""
    command = petsctools.get_petscvariables()["CC"]
    kind = sniff_compiler(command, MPI.COMM_SELF)
    if kind is not LinuxGnuCompiler:
        return ""
    folder.mkdir(parents=True, exist_ok=True)
    header = folder.resolve() / "kernels.h"
    header.write_text("".join(f"#include <{name}>\n" for name in HEADERS))
    includes = petsctools.get_petsc_dirs(prefix="-I", subdir="include")
    flags = [*kind().cflags, OPTIMISATION, *includes, "-x", "c-header", "-c"]
    try:
        subprocess.run([*shlex.split(command), *flags, "-o", f"{header}.gch", str(header)], check=True, stderr=2)
    except (OSError, subprocess.CalledProcessError):
        return OPTIMISATION
    return shlex.join([OPTIMISATION, "-include", str(header)])


if __name__ == "__main__":
    print(compiler_flags(Path(sys.argv[1])))

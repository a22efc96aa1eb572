"""Flags with which the suite compiles Firedrake's kernels: ``python -m tests.compiler_flags FOLDER`` prints them.

Most of the time that gcc takes for a small kernel is for PETSc's headers, and of the rest most for optimisations that
do not pay for meshes of a few cells. All headers of these kernels are compiled once, under the name of the first one,
into a folder that gcc searches before the system's. Sources that begin with another header, and those that are compiled
with other flags, as the kernels of this package, do not see it.
"""

import shlex
import subprocess
import sys
from pathlib import Path

import petsctools
from mpi4py import MPI
from pyop2.compilation import LinuxGnuCompiler, sniff_compiler

__all__ = ["compiler_flags"]

OPTIMISATION = "-O1"
HEADERS = ("complex.h", "math.h", "petsc.h", "stdint.h", "stdbool.h")
"""As they come in the kernels that PyOP2 generates."""


def compiler_flags(folder: Path) -> str:
    """The value of ``PYOP2_CFLAGS``; nothing where the compiler is not gcc on Linux."""
    command = petsctools.get_petscvariables()["CC"]
    compiler = sniff_compiler(command, MPI.COMM_SELF)()
    if not isinstance(compiler, LinuxGnuCompiler):
        return ""
    folder.mkdir(parents=True, exist_ok=True)
    source, target = folder.resolve() / "all_headers.h", folder.resolve() / f"{HEADERS[0]}.gch"
    target.unlink(missing_ok=True)
    source.write_text("".join(f"#include <{name}>\n" for name in HEADERS))
    includes = petsctools.get_petsc_dirs(prefix="-I", subdir="include")
    flags = [*compiler.cflags, OPTIMISATION, *includes, "-x", "c-header", "-c", "-o", str(target)]
    done = subprocess.run([*shlex.split(command), *flags, str(source)], stdout=sys.stderr, check=False)
    return OPTIMISATION if done.returncode else shlex.join([OPTIMISATION, f"-I{folder.resolve()}"])


if __name__ == "__main__":
    print(compiler_flags(Path(sys.argv[1])))

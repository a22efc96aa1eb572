"""Iterations of conjugate gradients with geometric multigrid on hierarchies of meshes.

``python -m tests.benchmarks.space_iterations [--larger]``

Systems ``M + h K`` of heat (``K`` of gradients, ``h = dt``) and of Maxwell's equations (of curls, ``h`` as
``dt^2 / 4``), with steps of 1, 10 and 100 times the explicit limit, at which ``h`` is about ``dx^2 / 8`` and
``(dx / 4)^2``: the limit of each mesh (``own``), or for all meshes that of the finest (``finest``). To 1e-12, with a
random right-hand side.
"""

from __future__ import annotations

import argparse

import numpy as np
from firedrake import (
    Constant,
    DirichletBC,
    DistributedMeshOverlapType,
    FunctionSpace,
    TestFunction,
    TrialFunction,
    UnitCubeMesh,
    UnitSquareMesh,
    assemble,
    curl,
    dx,
    grad,
    inner,
)
from mpi4py import MPI

import pint_fem as pf
from pint_fem.kernels.multigrid import Geometry
from pint_fem.kernels.space.conjugate_gradients import ConjugateGradients
from pint_fem.kernels.space.hierarchies import geometric_cycle
from pint_fem.kernels.space.matrices import BlockMatrix

CASES = [
    (2, "CG", 1, 8),
    (2, "CG", 2, 4),
    (2, "N1curl", 1, 4),
    (2, "N1curl", 2, 2),
    (3, "CG", 1, 2),
    (3, "CG", 2, 2),
    (3, "N1curl", 1, 2),
]
LARGER = [(3, "CG", 1, 4), (3, "N1curl", 1, 4)]
"""Dimension, family, degree, and cells along a side of the coarsest mesh, which is not one of those compared."""


def width_of(cells, degree):
    """Distance of neighbouring degrees of freedom."""
    return 1 / (cells * degree)


def counts(dim, family, degree, coarse, steps, refinements):
    """Iterations on each refined mesh with each mesh's own step and with that of the finest, and the unknowns."""
    make, patches = {2: UnitSquareMesh, 3: UnitCubeMesh}[dim], {"overlap_type": (DistributedMeshOverlapType.VERTEX, 1)}
    st = pf.SpaceTime(comm=MPI.COMM_SELF)
    meshes = list(st.mesh_hierarchy(refinements, make, *[coarse] * dim, distribution_parameters=patches))[1:]
    widths = [width_of(coarse * 2 ** (level + 1), degree) for level in range(refinements)]
    found = {"unknowns": [], "own": [], "finest": []}
    for mesh, own in zip(meshes, widths, strict=True):
        for kind, width in (("own", own), ("finest", widths[-1])):
            h = steps * width**2 / 8 if family == "CG" else (steps * width / 4) ** 2
            A, geometry = system(mesh, family, degree, h)
            method = ConjugateGradients(BlockMatrix.of_petsc(A), MPI.COMM_SELF, geometric_cycle(A, geometry))
            method.solve(np.random.default_rng(0).standard_normal((1, A.getLocalSize()[0])))
            found[kind].append(method.iterations)
        found["unknowns"].append(A.getSize()[0])
    return found


def system(mesh, family, degree, h):
    """``M + h K`` with zero on a wall (heat) or on all (Maxwell), and what multigrid reads of its space."""
    V = FunctionSpace(mesh, family, degree)
    u, v, D = TrialFunction(V), TestFunction(V), grad if family == "CG" else curl
    bcs = [DirichletBC(V, 0, 1 if family == "CG" else "on_boundary")]
    form = inner(u, v) * dx + Constant(h) * inner(D(u), D(v)) * dx
    return assemble(form, bcs=bcs, mat_type="aij").petscmat, Geometry(V, bcs)


def main():
    """Print a row for each case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--larger", action="store_true", help="finer meshes in three dimensions (minutes)")
    args = parser.parse_args()
    for dim, family, degree, coarse in LARGER if args.larger else CASES:
        refinements = 4 if dim == 2 else 3
        for steps in (1, 10, 100):
            found = counts(dim, family, degree, coarse, steps, refinements)
            shown = "; ".join(f"{kind} {', '.join(map(str, found[kind]))}" for kind in ("own", "finest", "unknowns"))
            print(f"{dim}-D {family} {degree}, {steps} times the explicit limit: {shown}", flush=True)


if __name__ == "__main__":
    main()

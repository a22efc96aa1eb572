"""Meshes of the unit square, shared by tests."""

from functools import cache

from firedrake import COMM_SELF, COMM_WORLD, UnitSquareMesh

from pint_fem.spacetime import SpaceTime

SIMPLE = {"partitioner_type": "simple"}
"""A partitioner that gives all members of an ensemble the same parts without communication between them."""
GRIDS = [SpaceTime((1, COMM_WORLD.size)), SpaceTime("1x1", comm=COMM_SELF)]
"""As long as one process grid of a shape is there, all grids of the shape share its communicators."""
ALONE = {comm.py2f(): comm for comm in [COMM_SELF, *(grid.space_comm for grid in GRIDS)]}
"""Communicators of one process whose meshes are shared."""


def square(n: int, comm):
    """``n`` by ``n`` squares, each cut into two triangles, on the ranks of ``comm``.

    On one rank in space all tests share the mesh of a size, and with it what Firedrake derives and compiles for a mesh.
    Nothing of it is ever changed.
    """
    if comm.py2f() in ALONE:
        return _shared(n, comm.py2f())
    return UnitSquareMesh(n, n, comm=comm, distribution_parameters=SIMPLE)


@cache
def _shared(n: int, number: int):
    return UnitSquareMesh(n, n, comm=ALONE[number])

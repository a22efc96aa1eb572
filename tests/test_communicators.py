"""Communicators of process grids: shared by all grids of a shape, and given back without any rank waiting.

They are counted by MPI's own numbering: a new communicator gets the first number that is free.
"""

import gc
import sys

import numpy as np
import pytest
from mpi4py import MPI

from pint_fem.spacetime import SpaceTime
from tests.limits import time_limit


def first_free(comm) -> int:
    probe = comm.Dup()
    number = probe.py2f()
    probe.Free()
    return number


@pytest.fixture
def comm():
    """A communicator of the test's own, freed behind it."""
    gc.collect()
    own = MPI.COMM_WORLD.Dup()
    yield own
    if own != MPI.COMM_NULL:
        own.Free()


def resnet_grid(grid, comm):
    return pytest.importorskip("pint_fem.resnet").Grid(grid, comm)


MAKERS = {"with Firedrake": SpaceTime, "without": SpaceTime, "layers": resnet_grid}


@pytest.fixture(params=MAKERS)
def make(request, monkeypatch):
    if request.param == "without":
        monkeypatch.setitem(sys.modules, "firedrake", None)
    return MAKERS[request.param]


@pytest.mark.parallel([1, 3])
@time_limit(120)
def test_grids_that_are_made_and_dropped_share_communicators(comm, make):
    shapes = [(1, comm.size), (comm.size, 1)]
    kept = [make(shape, comm) for shape in shapes]
    free = first_free(comm)
    for i in range(100):
        grid = make(shapes[i % 2], comm)
        if comm.rank == 0 or i % 3 == 0:  # ranks drop objects at other times
            del grid
    assert first_free(comm) == free
    assert len(kept) == 2


@pytest.mark.parallel([1, 3])
@time_limit(120)
def test_what_is_given_back_is_freed_where_nobody_uses_it(comm, make):
    free = first_free(comm)
    with make((comm.size, 1), comm):
        second = make((comm.size, 1), comm)
        used = first_free(comm)
        assert used != free
    assert first_free(comm) == used  # the second one goes on with them
    assert getattr(second, "space_comm", second.comm).allreduce(1) == comm.size
    second.free()
    second.free()
    assert first_free(comm) == free
    third = make((comm.size, 1), comm)
    assert getattr(third, "space_comm", third.comm).allreduce(1) == comm.size


@pytest.mark.parallel(3)
@time_limit(60)
def test_a_grid_that_one_rank_has_dropped_already_is_freed_on_all(comm, make):
    first, second = make((1, 3), comm), make((1, 3), comm)
    if comm.rank == 0:
        del second
    used = first_free(comm)
    first.free()
    assert first_free(comm) == used  # a rank has it
    if comm.rank > 0:
        del second
    fresh = make((1, 3), comm)
    assert fresh.comm.allreduce(1) == 3
    fresh.free()
    assert first_free(comm) != used


@pytest.mark.parallel([1, 3])
@time_limit(60)
def test_communicators_end_with_the_one_they_were_split_from(make):
    world = MPI.COMM_WORLD
    gc.collect()
    free = first_free(world)
    for _ in range(3):
        own = world.Dup()
        grid = make((own.size, 1), own)
        del grid
        own.Free()
    assert first_free(world) == free


@pytest.mark.parallel([1, 3])
@time_limit(60)
def test_grids_of_other_shapes_have_communicators_of_their_own(comm):
    rows, columns = SpaceTime((1, comm.size), comm), SpaceTime((comm.size, 1), comm)
    assert (rows.space_comm.size, rows.time_comm.size) == (1, comm.size)
    assert (columns.space_comm.size, columns.time_comm.size) == (comm.size, 1)
    order = np.array(rows.reversed_time_comm.allgather(comm.rank))
    np.testing.assert_array_equal(order, np.arange(comm.size)[::-1])

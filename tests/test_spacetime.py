"""The process grid: who shares what with whom."""

import sys

import numpy as np
import pytest
from mpi4py import MPI

from pint_fem.all_at_once.norms import gather_in_order
from pint_fem.communicators import parse_grid
from pint_fem.errors import InputError
from pint_fem.mgrit import split_steps
from pint_fem.spacetime import SpaceTime


@pytest.fixture
def world(monkeypatch):
    """Communicator, where Firedrake cannot be imported (it takes seconds, and there need be none)."""
    monkeypatch.setitem(sys.modules, "firedrake", None)
    return MPI.COMM_WORLD


def grids(size):
    """All space x time factorisations."""
    return [(s, size // s) for s in range(1, size + 1) if size % s == 0]


# -- grids -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "size", "grid"),
    [("auto", 6, (1, 6)), ("2x3", 6, (2, 3)), (" 6x1 ", 6, (6, 1)), ("1x1", 1, (1, 1)), ("12x10", 120, (12, 10))],
)
def test_good_grids(text, size, grid):
    """Space first, time second."""
    assert parse_grid(text, size) == grid


@pytest.mark.parametrize("text", ["", "2", "x", "2x", "x2", "2x2x1", "0x4", "-2x-2", "2.0x2", "2*2", "2 x 2", "two"])
def test_grids_of_another_form_are_refused(text):
    """The message shows a grid that would do."""
    with pytest.raises(InputError, match="not of the form SPACExTIME, such as 1x4"):
        parse_grid(text, 4)


@pytest.mark.parametrize("text", ["1x1", "3x1", "2x3", "4x4"])
def test_grids_of_another_size_are_refused(text):
    """The message has both numbers of ranks."""
    wanted = eval(text.replace("x", "*"))
    with pytest.raises(InputError, match=f"requires {wanted} ranks, started were 4: mpiexec -n {wanted}"):
        parse_grid(text, 4)


@pytest.mark.parallel([1, 3])
def test_bad_grid_is_refused_on_every_rank(world):
    """As a string and as a pair; a collective call after it still matches."""
    for grid in ("7x1", (7, 1), (world.size,), "time"):
        with pytest.raises(InputError, match="grid"):
            SpaceTime(grid, world)
    assert world.allreduce(1) == world.size


@pytest.mark.parallel([1, 4])
def test_grids_by_keywords(world):
    """Both numbers, or one of them, from which the other follows."""
    for space, time in grids(world.size):
        for given in (dict(space=space, time=time), dict(space=space), dict(time=np.int64(time))):
            st = SpaceTime(comm=world, **given)
            assert (st.space_size, st.time_size) == (st.space_comm.size, st.time_comm.size) == (space, time)
            assert repr(st) == f"SpaceTime(space={space}, time={time}, rank {world.rank} of {world.size})"


@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize(
    ("given", "text"),
    [
        (lambda comm: dict(grid="auto", space=1), "grid 'auto' and space: give the grid or"),
        (lambda comm: dict(grid=(1, comm.size), space=1, time=comm.size), "grid '1x.' and space and time: give"),
        (lambda comm: dict(space=comm.size + 1), "space = . does not divide the . ranks that were started"),
        (lambda comm: dict(space=comm.size, time=2 * comm.size), r"time = . does not divide"),
        (lambda comm: dict(time=0), "time = 0: give a positive whole number"),
        (lambda comm: dict(space=True), "space = True: give a positive whole number"),
        (lambda comm: dict(space=1.0), "space = 1.0: give a positive whole number"),
    ],
)
def test_bad_keywords_are_refused_on_every_rank(world, given, text):
    """A collective call after it still matches."""
    with pytest.raises(InputError, match=text):
        SpaceTime(comm=world, **given(world))
    assert world.allreduce(1) == world.size


@pytest.mark.parallel(3)
def test_keywords_that_differ_between_ranks_are_refused_on_every_rank(world):
    for given in ({"space": 1 + world.rank}, {"time": 1} if world.rank else {}):
        with pytest.raises(InputError, match="is not the same on all ranks"):
            SpaceTime(comm=world, **given)


@pytest.mark.parallel(4)
def test_two_numbers_whose_product_is_another_are_refused(world):
    with pytest.raises(InputError, match="grid 2x4 requires 8 ranks, started were 4: mpiexec -n 8"):
        SpaceTime(comm=world, space=2, time=4)


# -- groups of experiments ---------------------------------------------------------------------------------------------
@pytest.mark.parallel(4)
@pytest.mark.parametrize("shape", [(1, 1, 4), (1, 2, 2), (2, 1, 2), (2, 2, 1)])
def test_groups_of_experiments_have_grids_of_their_own(world, shape):
    """Neighbouring ranks form a group; the ranks of one place in all groups share what belongs to a place."""
    space, time, groups = shape
    with SpaceTime("x".join(map(str, shape)), world) as st:
        assert (st.space_comm.size, st.time_comm.size, st.experiments_comm.size) == shape
        assert (st.comm.size, st.group.comm.size) == (4, space * time)
        assert st.experiments_comm.rank == world.rank // (space * time)
        assert st.group.comm.allgather(world.rank)[0] == st.experiments_comm.rank * space * time
        assert (st.group.space_size, st.group.time_size, st.group.experiments_size) == (space, time, 1)
        assert world.allreduce(int(st.is_root)) == world.allreduce(int(st.group.is_root)) == 1
        assert world.allreduce(int(st.owns_static)) == space
        assert (f"experiments={groups}" in repr(st)) == (groups > 1)
        place = world.rank % (space * time)
        own = np.arange(7.0) * (1 + world.rank)
        ranks = place + space * time * np.arange(groups)
        np.testing.assert_array_equal(st.sum_over_experiments(own), np.arange(7.0) * (1 + ranks).sum())
        last = groups - 1
        sent = st.from_group(last, own if st.experiments_comm.rank == last else None, (7,))
        np.testing.assert_array_equal(sent, np.arange(7.0) * (1 + ranks[last]))
        found = st.experiments_comm.allgather(list(st.own_experiments(6)))
        assert [e for numbers in found for e in numbers] == list(range(6))
        assert [st.group_of_experiment(e, 6) for e in found[last]] == [last] * len(found[last])
        if groups > 1:
            with pytest.raises(InputError, match=f"has {groups} groups of ranks for 1 experiment: .* such as {space}x"):
                st.own_experiments(1)
    assert st.space_comm == st.experiments_comm == MPI.COMM_NULL or groups == 1


@pytest.mark.parallel(4)
def test_grids_of_three_numbers_by_keywords(world):
    """Space or time follows from the others; what does not fit is refused on every rank."""
    for given, shape in (
        (dict(experiments=4), (1, 1, 4)),
        (dict(experiments=2), (1, 2, 2)),
        (dict(space=2, experiments=2), (2, 1, 2)),
        (dict(time=1, experiments=2), (2, 1, 2)),
        (dict(space=1, time=2, experiments=2), (1, 2, 2)),
        (dict(space=2), (2, 2, 1)),
    ):
        assert SpaceTime(comm=world, **given).shape == shape
    for given, text in (
        (dict(experiments=3), "experiments = 3 does not divide the 4 ranks"),
        (dict(space=4, experiments=2), "space = 4, experiments = 2: the product does not divide the 4 ranks"),
        (dict(grid="1x2x4"), "grid 1x2x4 requires 8 ranks, started were 4: mpiexec -n 8"),
        (dict(grid="1x2x2x1"), "not of the form SPACExTIME or SPACExTIMExEXPERIMENTS, such as 1x4"),
    ):
        with pytest.raises(InputError, match=text):
            SpaceTime(comm=world, **given)
    assert world.allreduce(1) == 4


# -- slabs -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("nsteps", [0, 1, 2, 7, 24, 101])
@pytest.mark.parametrize("parts", [1, 2, 3, 7, 16])
def test_split_covers_all_steps_once_and_evenly(nsteps, parts):
    """Sizes differ by one at most."""
    bounds = split_steps(nsteps, parts)
    sizes = np.diff(bounds)
    assert (bounds[0], bounds[-1], len(bounds)) == (0, nsteps, parts + 1)
    assert sizes.min() >= 0
    assert sizes.max() - sizes.min() <= 1


@pytest.mark.parallel([1, 3])
def test_slabs_cover_all_steps_once(world):
    """On every grid; the ranks of one group have the same slab; ends know that they are ends."""
    for grid in grids(world.size):
        st = SpaceTime(grid, world)
        for nsteps in {st.time_size, st.time_size + 1, 23, 24}:
            slab = st.slab(nsteps)
            parts = st.time_comm.allgather(range(slab.lo, slab.hi))
            assert [n for part in parts for n in part] == list(range(nsteps))
            assert slab.k == slab.hi - slab.lo >= 1
            assert slab.bounds[st.time_comm.rank] == slab.lo
            assert slab.bounds[st.time_comm.rank + 1] == slab.hi
            assert slab.is_first == (st.time_comm.rank == 0)
            assert slab.is_last == (st.time_comm.rank == st.time_comm.size - 1)
            assert len(set(st.space_comm.allgather((slab.lo, slab.hi)))) == 1


@pytest.mark.parallel([1, 3])
def test_slabs_of_whole_groups_of_steps(world):
    """They cover all steps, and begin at multiples of the group's size."""
    st = SpaceTime(comm=world)
    for groups in (st.time_size, 7):
        slab = st.slab(4 * groups, group=4)
        assert [n for part in world.allgather(range(slab.lo, slab.hi)) for n in part] == list(range(4 * groups))
        assert slab.bounds == tuple(4 * b for b in split_steps(groups, st.time_size))
    with pytest.raises(InputError, match="30 time steps do not go in groups of 4"):
        st.slab(30, group=4)


@pytest.mark.parallel([1, 3])
def test_shared_points_are_added_to_the_next_rank(world):
    """The first row gets the last one of the rank before; all others stay."""
    st = SpaceTime(comm=world)
    rank = st.time_comm.rank
    rows = np.full((3, 2), 10.0**rank)
    st.add_shared_points(rows)
    np.testing.assert_array_equal(rows[1:], 10.0**rank)
    np.testing.assert_array_equal(rows[0], 10.0**rank + (10.0 ** (rank - 1) if rank else 0))


@pytest.mark.parallel(3)
def test_more_time_ranks_than_steps_are_refused_on_every_rank(world):
    """None is left waiting."""
    st = SpaceTime(None, world)
    for nsteps in (world.size - 1, 0):
        with pytest.raises(InputError, match=f"{world.size} time ranks for {nsteps} time steps"):
            st.slab(nsteps)
    assert world.allreduce(1) == world.size


# -- communicators -----------------------------------------------------------------------------------------------------
@pytest.mark.parallel([1, 4])
def test_communicators(world):
    """Of plain mpi4py."""
    check_communicators(world)


@pytest.mark.parallel(4)
def test_communicators_of_firedrake():
    """Of its ensemble: the same."""
    pytest.importorskip("firedrake")
    check_communicators(MPI.COMM_WORLD)


def check_communicators(world):
    """Space and time cross in one rank; consecutive ranks share space; the reversed one runs from last to first."""
    for grid in (*grids(world.size), None, "auto"):
        st = SpaceTime(grid, world)
        expected = grid if isinstance(grid, tuple) else (1, world.size)
        assert (st.space_size, st.time_size) == expected
        assert (st.space_comm.size, st.time_comm.size) == expected
        assert world.rank == st.time_comm.rank * st.space_size + st.space_comm.rank
        assert st.space_comm.allgather(world.rank) == [
            st.time_comm.rank * st.space_size + i for i in range(st.space_size)
        ]
        assert st.time_comm.allgather(world.rank) == [
            i * st.space_size + st.space_comm.rank for i in range(st.time_size)
        ]
        assert st.reversed_time_comm.size == st.time_size
        assert st.reversed_time_comm.rank == st.time_size - 1 - st.time_comm.rank
        assert world.allreduce(int(st.is_root)) == 1


# -- sums and norms --------------------------------------------------------------------------------------------------
@pytest.mark.parallel([1, 3])
def test_sum_over_time_is_the_same_on_every_rank(world):
    """To the bit, for arrays of any order, strided, reversed or of no dimension, which it leaves as they are."""
    for grid in grids(world.size):
        st = SpaceTime(grid, world)
        rng = np.random.default_rng(st.time_comm.rank)
        base = rng.standard_normal((4, 6)) * 10.0 ** rng.integers(-8, 8, (4, 6))
        for array in (base, base.T, base[::-1], base[:, ::2], np.asfortranarray(base), base[0, 0:1].reshape(())):
            before = array.copy()
            total = st.sum_over_time(array)
            assert total.shape == array.shape
            np.testing.assert_array_equal(array, before)
            parts = np.array(st.time_comm.allgather(before))
            np.testing.assert_allclose(total, parts.sum(axis=0), rtol=1e-12, atol=1e-14 * abs(parts).max())
            assert len({t.tobytes() for t in st.time_comm.allgather(total)}) == 1


@pytest.mark.parallel([1, 3])
def test_point_norms(world):
    """Squared norms of whole states, the same on all ranks of a group, for any block: strided, reversed, empty."""
    for grid in grids(world.size):
        st = SpaceTime(grid, world)
        rank, sizes = st.space_comm.rank, [5 + 3 * i for i in range(st.space_size)]
        begin = sum(sizes[:rank])
        whole = np.random.default_rng(1).standard_normal((6, sum(sizes)))
        local = np.ascontiguousarray(whole[:, begin : begin + sizes[rank]])
        for rows in (slice(None), slice(None, None, -1), slice(1, None, 2), slice(0, 0)):
            norms = st.point_norms(local[rows])
            assert norms.shape == (len(whole[rows]),)
            np.testing.assert_allclose(norms, (whole[rows] ** 2).sum(axis=1), rtol=1e-14)
            assert len({n.tobytes() for n in st.space_comm.allgather(norms)}) == 1
            # a state's norm does not depend on the block it is in
            for i, row in enumerate(local[rows]):
                assert st.point_norms(row[None])[0] == norms[i]
        assert st.point_norms(local.astype(np.float32)).dtype == float


@pytest.mark.parallel([1, 3])
def test_gather_in_order_is_concatenation():
    """Uneven and empty parts, one or more numbers a point; what comes out has the bits of the parts."""
    comm = MPI.COMM_WORLD
    whole = np.random.default_rng(0).standard_normal((10, 3))
    for bounds in (split_steps(10, comm.size), [0, *[10] * comm.size], [*[0] * comm.size, 10]):
        part = whole[bounds[comm.rank] : bounds[comm.rank + 1]]
        np.testing.assert_array_equal(gather_in_order(part, comm), whole)
        np.testing.assert_array_equal(gather_in_order(part[:, 1], comm), whole[:, 1])
        assert gather_in_order(part[:0], comm).shape == (0, 3)

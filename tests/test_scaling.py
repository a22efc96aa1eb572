"""Virtual ranks: their clocks against formulas, their schedule against real runs of the same solver on real ranks."""

import itertools
import math
import os
import random
import subprocess
import sys

import numpy as np
import pytest
from mpi4py import MPI

pytest.importorskip("greenlet")

from hypothesis import given, settings
from hypothesis import strategies as st

from pint_fem.all_at_once.grids import Bounds
from pint_fem.collective import consistent_across_ranks
from pint_fem.errors import InputError
from pint_fem.kernels.lanes.widths import cut
from pint_fem.mgrit import split_steps
from pint_fem.scaling.communicator import communicators
from pint_fem.scaling.costs import Calibration, Kernel
from pint_fem.scaling.model import Model, Solve
from pint_fem.scaling.network import Network
from pint_fem.scaling.world import DeadlockError, World
from tests.scaling_traces import (
    CONFIGS,
    PARADIAG,
    Halve,
    HalveLanes,
    calibration,
    paradiag_real_and_predicted,
    planned_calibration,
    real_and_predicted,
)

NETWORK = Network(1e-3, 1e6, "for tests")


def on_ranks(size, program, network=NETWORK, row_bytes=None):
    """Results and the world of ``program(comm)`` on virtual ranks."""
    world = World(size, network)
    comms = communicators(world, row_bytes)
    return world.run(lambda rank: program(comms[rank])), world


# -- the virtual machine -----------------------------------------------------------------------------------------------
def test_message_arrives_after_latency_and_bytes():
    def program(comm):
        buffer = np.full(125, float(comm.rank))
        if comm.rank == 0:
            comm.world.charge(2.0)
            comm.Send(buffer, 1, tag=3)
        elif comm.rank == 1:
            comm.world.charge(0.5)
            comm.Recv(buffer, 0, tag=3)
        return buffer[0]

    results, world = on_ranks(2, program)
    assert results == [0.0, 0.0]
    assert world.clocks == [2.0, pytest.approx(2.0 + 1e-3 + 1000 / 1e6)]
    assert world.work == [2.0, 0.5]
    assert world.counts["messages", 3] == 1
    assert world.counts["bytes", 3] == 1000


def test_rows_stand_for_states():
    """A number of a message stands for a state's bytes, those of norms do not."""

    def program(comm):
        if comm.rank == 0:
            comm.Send(np.zeros(2), 1, tag=1)
        else:
            comm.Recv(np.zeros(2), 0, tag=1)
        before = comm.world.clocks[comm.rank]
        comm.Allgatherv(np.zeros(1), [np.zeros(2), [1, 1], [0, 1], MPI.DOUBLE])
        return comm.world.clocks[comm.rank] - before

    results, world = on_ranks(2, program, row_bytes=[7e5, 5e5])
    assert world.counts["bytes", 1] == 1e6
    assert results[1] == pytest.approx(1e-3 + 16 / 1e6)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_collectives_are_those_of_mpi(size):
    def program(comm):
        me, out = comm.rank, {}
        out["allgather"] = comm.allgather(me) == list(range(size))
        out["bcast"] = comm.bcast(me, root=size - 1) == size - 1
        least = np.array([me, -me])
        comm.Allreduce(MPI.IN_PLACE, least, op=MPI.MIN)
        out["Allreduce"] = least.tolist() == [0, 1 - size]
        counts = [r + 1 for r in range(size)]
        places = [sum(counts[:r]) for r in range(size)]
        whole = np.empty(sum(counts))
        comm.Allgatherv(np.full(me + 1, float(me)), [whole, counts, places, MPI.DOUBLE])
        expected = np.repeat(np.arange(size), counts)
        out["Allgatherv"] = (whole == expected).all()
        on_root = np.empty(sum(counts)) if me == 0 else None
        comm.Gatherv(np.full(me + 1, float(me)), None if me else [on_root, counts, places, MPI.DOUBLE])
        out["Gatherv"] = me > 0 or (on_root == expected).all()
        part = np.empty(me + 1)
        comm.Scatterv(None if me else [2 * on_root, counts, places, MPI.DOUBLE], part)
        out["Scatterv"] = (part == 2 * me).all()
        total = np.zeros(2)
        comm.Reduce(np.array([me, 1.0]), total)
        comm.Bcast(total)
        out["Reduce"] = total.tolist() == [sum(range(size)), size]
        back = comm.Split(0, -me)
        out["Split"] = (back.rank, back.size) == (size - 1 - me, size) and back.allgather(me) == [*range(size)][::-1]
        out["group"] = back.group.Translate_ranks([0], comm.group) == [size - 1]
        halves = comm.Split(me % 2, me)
        out["halves"] = halves.allgather(me) == list(range(me % 2, size, 2))
        return [name for name, right in out.items() if not right]

    assert on_ranks(size, program)[0] == [[]] * size


def test_collective_ends_after_the_last_and_a_broadcast_after_its_root():
    def program(comm):
        comm.world.charge(float(comm.rank))
        comm.Barrier()
        after = comm.world.clocks[comm.rank]
        comm.world.charge(10.0 if comm.rank == 1 else 0.0)
        comm.bcast(None, root=0)
        return after, comm.world.clocks[comm.rank]

    results, _ = on_ranks(4, program)
    barrier = 3 + 2e-3
    assert [a for a, _ in results] == [pytest.approx(barrier)] * 4
    sent = barrier + 2e-3 + 64 / 1e6
    assert [b for _, b in results] == [pytest.approx(x) for x in (sent, barrier + 10, sent, sent)]


@settings(max_examples=30)
@given(st.integers(1, 6), st.builds(random.Random, st.integers(0, 2**32 - 1)))
def test_clocks_never_go_back_and_work_is_conserved(size, draws):
    """Random programs that do not deadlock: rounds of work, a ring of messages or a collective."""
    rounds = [(draws.choice(["ring", "allgather", "bcast"]), [draws.random() for _ in range(size)]) for _ in range(5)]

    def program(comm):
        seen = [comm.world.clocks[comm.rank]]
        for what, work in rounds:
            comm.world.charge(work[comm.rank])
            seen.append(comm.world.clocks[comm.rank])
            if what == "ring":
                request = comm.Isend(np.zeros(1), (comm.rank + 1) % size, tag=0)
                comm.Recv(np.zeros(1), (comm.rank - 1) % size, tag=0)
                request.Wait()
            else:
                getattr(comm, what)(1)
            seen.append(comm.world.clocks[comm.rank])
        return seen

    results, world = on_ranks(size, program)
    assert all(a <= b for seen in results for a, b in itertools.pairwise(seen))
    total = sum(sum(work) for _, work in rounds)
    assert sum(world.work) == pytest.approx(total)
    assert max(world.clocks) >= max(world.work)
    assert max(world.clocks) <= total + 5 * (3e-3 + 1e-3)


def test_deadlock_is_detected_and_named():
    def crossed(comm):
        comm.Recv(np.zeros(1), 1 - comm.rank, tag=4)
        comm.Send(np.zeros(1), 1 - comm.rank, tag=4)

    with pytest.raises(DeadlockError, match=r"2 of 2 ranks wait: rank 0 waits for a message from rank 1 with tag 4"):
        on_ranks(2, crossed)

    def absent(comm):
        if comm.rank != 1:
            comm.Barrier()

    with pytest.raises(DeadlockError, match=r"2 of 3 .* wait: .* barrier, where 2 of 3 have come \(rank 1 have not\)"):
        on_ranks(3, absent)

    def different(comm):
        comm.Barrier() if comm.rank else comm.allgather(0)

    with pytest.raises(DeadlockError, match=r"rank 1 calls barrier where others .* call allgather"):
        on_ranks(2, different)

    def unheard(comm):
        if comm.rank == 0:
            comm.Send(np.zeros(1), 1, tag=2)

    with pytest.raises(DeadlockError, match="rank 0 to rank 1 with tag 2 is never received"):
        on_ranks(2, unheard)


def test_error_of_a_rank_is_raised():
    def program(comm):
        if comm.rank == 2:
            raise ValueError("on rank 2")
        comm.Barrier()

    with pytest.raises(ValueError, match="on rank 2"):
        on_ranks(3, program)


# -- costs -------------------------------------------------------------------------------------------------------------
def test_kernels_on_lanes_take_the_least_time():
    """By hand, and as exhaustive search over all numbers of calls of each width does."""
    kernel = Kernel((1, 8, 16), (1.0, 3.0, 5.0), lanes=True)
    assert [kernel(n) for n in (1, 2, 3, 4, 8, 9, 11, 16, 17, 19, 24, 32)] == [1, 2, 3, 3, 3, 4, 5, 5, 6, 8, 8, 10]
    wide = Kernel((1, 4, 8), (1.0, 1.5, 4.5), lanes=True)  # eight lanes are slower than twice four
    for count in range(1, 41):
        pairs = itertools.product(range(count + 1), range(count // 4 + 2))
        assert wide(count) == min(singles + 1.5 * fours for singles, fours in pairs if singles + 4 * fours >= count)
    assert kernel.scaled(2.0, per_state=0.5, per_call=0.25)(24) == 2 * 8 + 24 * 0.5 + 2 * 0.25


def test_other_kernels_are_linear_between_sizes():
    plain = Kernel((1, 4), (1.0, 2.5))
    assert [plain(n) for n in (1, 2, 4, 6)] == [1.0, 1.5, 2.5, 3.5]
    assert Kernel.constant(0.5)(6) == Kernel.constant(0.5, lanes=True)(6) == 3.0
    assert plain.scaled(2.0, per_state=0.5)(2) == 4.0


def test_states_are_divided_among_calls():
    """Widths and numbers of states of the calls: of the fastest width first, the rest by the least time."""
    seconds = {1: 1.0, 8: 3.0, 16: 5.0}
    assert cut(1, seconds) == [(1, 1)]
    assert cut(16, seconds) == [(16, 16)]
    assert cut(45, seconds) == [(16, 32), (16, 13)] or cut(45, seconds) == [(16, 32), (8, 5), (8, 8)]
    for count in range(1, 50):
        calls = cut(count, seconds)
        assert sum(n for _, n in calls) == count
        assert all(n <= w or n % w == 0 for w, n in calls)


@pytest.mark.parametrize(
    ("text", "latency", "bandwidth"),
    [("2us,12GB/s", 2e-6, 12e9), (" 1.5 ms , 100 MB/s", 1.5e-3, 1e8), ("0ns,1B/s", 0, 1)],
)
def test_network_is_read(text, latency, bandwidth):
    network = Network.parse(text)
    assert (network.latency, network.bandwidth) == (pytest.approx(latency), bandwidth)


@pytest.mark.parametrize("text", ["", "2us", "2us,0GB/s", "fast", "2us;3GB/s", "-1us,3GB/s"])
def test_bad_network_is_refused(text):
    with pytest.raises(InputError, match="2us,12GB/s"):
        Network.parse(text)


def test_calibration_is_kept_as_json():
    c = calibration(0.3, 8, 0.1, slowdown={1: 1.0, 2: 1.2}, extras={"forcing": 0.5})
    again = Calibration.from_json(c.to_json())
    assert (again.kernels, again.slowdown, again.network, again.extras) == (c.kernels, c.slowdown, c.network, c.extras)
    assert again.to_json() == c.to_json()
    for text in ("", "[]", '{"problem": "x"}', '{"work": {}}'):
        with pytest.raises(InputError, match="not a calibration"):
            Calibration.from_json(text)


# -- the solver on virtual ranks ---------------------------------------------------------------------------------------
def test_bounds_share_what_follows_from_them():
    bounds = Bounds.make(split_steps(100, 7))
    assert Bounds.make(bounds) is bounds
    assert bounds.coarsened(8) is bounds.coarsened(8)
    assert bounds.coarsened(8) == tuple(b // 8 for b in bounds)
    assert bounds.layout(3) is bounds.layout(3)
    assert [x.tolist() for x in bounds.layout(3)] == [(3 * np.diff(bounds)).tolist(), [3 * b for b in bounds[:-1]]]
    assert bounds.increase
    assert not any(Bounds(b).increase for b in ([0, 5, 3], [1, 4], [0, 1.5], [0]))


@pytest.mark.parametrize("solves", [1, 3])
def test_one_rank_takes_the_serial_sum(solves):
    """P = 1: the sum of all kernels, norms and overhead, whatever the network."""
    c = calibration(0.5, lanes=True, norm=0.01, overhead={"state": 0.125, "adjoint": 0.0625})
    said = Model(c, {"coarsening": (4, 4), "levels": 3}, nsteps=64).run(
        *[s for _ in range(solves) for s in (Solve("state", "nested", 2), Solve("adjoint", "guess", 1))]
    )
    n = said.counts
    states = {kind: sum(m for (k, _), m in n.items() if k == kind) for kind in ("step", "adjoint", "step sweep")}
    expected = states["step"] * 0.625 + states["adjoint"] * 1.0625 + states["step sweep"] * 0.5
    expected += sum(m for (k, _), m in n.items() if k == "adjoint sweep") * 1.0 + n["norm", 0] * 0.01
    assert said.seconds == pytest.approx(expected, rel=1e-12)
    assert said.work == [pytest.approx(said.seconds)]


def test_serial_stepping_is_a_chain():
    """Rank after rank: the time does not depend on the number of ranks, on a free network."""
    c = calibration(0.5, lanes=True)
    for ranks in (1, 2, 4):
        said = Model(c, {"levels": 1}, (1, ranks), nsteps=64).run(Solve("state"))
        assert said.seconds == pytest.approx(32.0)
        assert said.counts["step sweep", 0] == 64


def test_work_is_the_same_on_any_number_of_ranks():
    """Conservation: as many states are stepped on all ranks together, and no rank is done before its work."""
    c, options = calibration(1.0), {"coarsening": (4, 2), "levels": 3, "relax": "FCF"}
    alone = Model(c, options, nsteps=64).run(Solve("state", "nested", 2), Solve("adjoint", "guess", 1))
    for ranks in (2, 3, 8, 64):
        said = Model(c, options, (1, ranks), nsteps=64).run(Solve("state", "nested", 2), Solve("adjoint", "guess", 1))
        for kind, level in alone.counts:
            if kind in ("step", "adjoint"):
                assert said.counts[kind, level] == alone.counts[kind, level]
        charged = sum(n * {"step": 1.0, "adjoint": 2.0}.get(kind, 0.0) for (kind, _), n in said.counts.items())
        assert sum(said.work) == pytest.approx(charged)
        assert max(said.work) <= said.seconds
        assert said.seconds <= alone.seconds


def test_two_level_cycle_by_hand():
    """One V-cycle with F-relaxation, m = 4, a rank an interval, free messages: a chain of coarse steps between."""
    ranks, m = 8, 4
    options = {"levels": 2, "coarsening": m, "relax": "F", "residual": "none", "max_it": 1, "start": "guess"}
    said = Model(calibration(1.0), options, (1, ranks), nsteps=ranks * m).run(Solve("state", "guess", 1))
    # F-relaxation m - 1, residual 1, coarse right-hand side 1, the chain, F-relaxation m - 1
    assert said.seconds == pytest.approx((m - 1) + 1 + 1 + ranks + (m - 1))


def test_coarse_steps_by_hand():
    """The chain of coarse steps takes as many times as long; nothing else does."""
    options = {"levels": 2, "coarsening": 4, "relax": "F", "residual": "none", "max_it": 1, "start": "guess"}
    made = lambda n: Model(calibration(1.0), {**options, "coarse_steps": n}, (1, 8), nsteps=32)
    run = lambda n: made(n).run(Solve("state", "guess"))
    assert run(3).seconds - run(1).seconds == pytest.approx((1 + 8) * 2)  # and the coarse right-hand side


@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize("kind", [Halve, HalveLanes])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_schedule_is_that_of_a_real_run(config, kind):
    """Every call, message, peer and byte of a real trace, on every rank, forwards and backwards."""
    real, said = real_and_predicted(config, kind)
    assert said == real


@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize("kind", [Halve, HalveLanes])
def test_paradiag_is_that_of_a_real_run(kind):
    """Calls, solves, transforms, transposes with what they send, and messages, on every rank."""
    real, said = paradiag_real_and_predicted(kind)
    assert said == real
    assert any(name == "transpose" for _, name, *_ in said)


def test_paradiag_by_hand():
    """On ranks that divide everything, free messages: shares of transforms, solves and steps, factors once."""
    c = calibration(1.0, paradiag=PARADIAG)  # 100 unknowns of 8 bytes, 64 steps
    nsteps, size, its = 64, 100, 2
    options = {"time_solver": "paradiag", "alpha": 1e-4}
    stretch = nsteps * math.log2(nsteps) / (50 * math.log2(50))
    alone = Model(c, options, nsteps=nsteps).run(Solve("state", "nested", its))
    expected = its * (nsteps + size * 0.75 * stretch + 33 * 4.0) + 1 + 33 * 7.0
    assert alone.seconds == pytest.approx(expected)
    again = Model(c, options, nsteps=nsteps).run(Solve("state", "nested", its), Solve("state", "guess", 1))
    assert again.seconds - alone.seconds == pytest.approx(2 * nsteps + size * 0.75 * stretch + 33 * 4.0)
    four = Model(c, options, (1, 4), nsteps=nsteps).run(Solve("state", "nested", its))
    assert sum(four.work) > alone.work[0]  # packing
    columns, rows = 32, 9  # of the first three ranks; of the last
    assert four.seconds >= its * (16 + columns * 0.75 * stretch + rows * 4.0) + rows * 7.0
    assert four.bytes_per_rank < alone.bytes_per_rank / 3
    little = Model(c, {**options, "memory": 1e-6}, nsteps=nsteps).run(Solve("state", "nested", its))
    assert little.counts["factor", 0] == its * 33 - (its - 1)  # one is kept
    with pytest.raises(InputError, match="2 space ranks"):
        Model(c, options, (2, 1))
    with pytest.raises(InputError, match="did you mean 'alpha'"):
        Model(c, {"time_solver": "paradiag", "alhpa": 1.0})


def test_paradiag_on_lanes_by_hand():
    """Solves and transforms to a tolerance take the time of single precision where alpha permits it; those of an
    inexact Hessian action do not.
    """
    c = calibration(0.0, paradiag=PARADIAG | {"factor": 0.0, "single": 0.25})
    nsteps, size = 64, 100
    iteration = size * 0.75 * nsteps * math.log2(nsteps) / (50 * math.log2(50)) + 33 * 4.0
    for alpha, factor in ((1e-4, 0.25), (1e-6, 1.0)):
        model = Model(c, {"time_solver": "paradiag", "alpha": alpha}, nsteps=nsteps)
        assert model.run(Solve("state", "nested", 2)).seconds == pytest.approx(2 * factor * iteration)
        inexact = model.run(Solve("tangent", "nested", 2), Solve("adjoint", "transposed", 2)).seconds
        assert inexact == pytest.approx(2 * (2 * iteration + 33 * 1.0))


@pytest.mark.starts_mpi
def test_schedule_is_that_of_a_real_run_on_eight_ranks():
    """The same on ranks of their own."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("OMPI_COMM_", "PMIX_", "PMI_"))}
    command = ["mpiexec", "-n", "8", sys.executable, "-m", "tests.scaling_traces"]
    done = subprocess.run(command, env=clean, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(2 * len(CONFIGS) + 2), "alike"]


@pytest.mark.parallel([1, 3])
def test_consistency_across_ranks():
    comm = MPI.COMM_WORLD
    assert consistent_across_ranks(comm, True, (1, 2), (True, False))
    assert not consistent_across_ranks(comm, comm.rank != comm.size - 1)
    assert consistent_across_ranks(comm, True, None if comm.rank == 0 else (5,))
    assert consistent_across_ranks(comm, True, None)
    for different in ((comm.rank,), tuple(range(comm.rank))):
        assert consistent_across_ranks(comm, True, different) == (comm.size == 1)


def test_grid_and_options_are_checked():
    with pytest.raises(InputError, match="grid 1x65 for 64 steps"):
        Model(calibration(), grid=(1, 65))
    with pytest.raises(InputError, match="coarsenin"):
        Model(calibration(), {"coarsenin": 3})


def test_memory_is_counted_in_states():
    c = calibration()
    alone = Model(c, {"coarsening": (4, 4), "levels": 3}).run(Solve("state"))
    four = Model(c, {"coarsening": (4, 4), "levels": 3}, (1, 4)).run(Solve("state"))
    assert alone.bytes_per_rank > 2 * 65 * c.state_bytes
    assert 3 < alone.bytes_per_rank / four.bytes_per_rank < 4.5
    two = Model(c.with_changes(kernels={1: c.kernels[1], 2: c.kernels[1]}), {"levels": 1}, (2, 1)).run(Solve("state"))
    assert math.isclose(two.bytes_per_rank, Model(c, {"levels": 1}).run(Solve("state")).bytes_per_rank / 2)


def test_a_control_gradient_is_reduced_and_broadcast():
    """Two messages with the bytes of the control, one after the other."""

    def seconds(nbytes):
        model = Model(planned_calibration(control_bytes=nbytes), {"levels": 1}, (1, 2), network=Network(0.0, 1e3))
        return model.run(Solve("adjoint"), task="derivative").seconds

    assert seconds(3e3) - seconds(0.0) == pytest.approx(2 * 3.0)

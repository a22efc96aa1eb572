"""The model of solvers in space: its limits, the growth of its terms, and what it leaves as measured."""

import math

import pytest

pytest.importorskip("greenlet")

from pint_fem.errors import InputError
from pint_fem.scaling.costs import Calibration, Kernel
from pint_fem.scaling.network import Network
from pint_fem.scaling.space import (
    SOLVERS,
    assumption,
    exchange_seconds,
    factor_share,
    interface_unknowns,
    solver_of,
    space_kernels,
    work_of_rank,
)

FREE, SLOW = Network(0.0, 1e30, "free"), Network(1e-3, 1e6, "slow")
LANES = Kernel((1, 8, 16), (1.0, 4.0, 7.0), lanes=True)
KINDS = {"step": [LANES], "adjoint": [LANES.scaled(1.5)]}


def case(kind, dimension=3, measured=(1,), network=FREE, **more):
    """A cube or square of 100 unknowns along a side."""
    kernels = {q: {k: [each.scaled(1 / q) for each in levels] for k, levels in KINDS.items()} for q in measured}
    given = dict(space_solver=kind, dimension=dimension, space_iterations=10.0, stages=2, network=network) | more
    return Calibration("test", "none", 100**dimension, 64, kernels, **given)


@pytest.mark.parametrize("dimension", [1, 2, 3])
@pytest.mark.parametrize("kind", SOLVERS)
def test_kernels_are_those_that_were_measured(kind, dimension):
    c = case(kind, dimension, measured=(1, 2))
    for ranks in (1, 2):
        assert space_kernels(c, ranks, SLOW) == c.kernels[ranks]


@pytest.mark.parametrize("dimension", [2, 3])
@pytest.mark.parametrize("kind", SOLVERS)
def test_times_do_not_grow_with_ranks_where_messages_are_free(kind, dimension):
    """But for the dense interface system of a direct solver."""
    c = case(kind, dimension)
    times = [space_kernels(c, p, FREE)["step"][0](8) for p in (1, 2, 4, 8, 64)]
    if kind == "replicated":  # 8 states: those of one, two, four and eight ranks each
        assert times == pytest.approx([times[0], *(c.kernels[1]["step"][0](8 // p) for p in (2, 4, 8, 8))])
    elif kind == "substructuring":
        assert times[1] < times[0]
    else:
        assert times == sorted(times, reverse=True)


@pytest.mark.parametrize("kind", SOLVERS)
def test_a_call_takes_its_latencies_at_least(kind):
    c, net = case(kind), Network(1.0, 1e30, "latency")
    latencies = {
        "replicated": 2 * 63,  # to and from each of the others
        "substructuring": 2 * 2 * 6,  # two all-gathers a stage, by doubling
        "multigrid": 2 * 10 * (6 * 6 + 1 + 3 * 6),  # exchanges on six levels, a product, two reductions, a gather
    }
    levels = round(math.log2(100)) - 1
    assert levels == 6
    if kind in latencies:
        assert exchange_seconds(c, 64, net) == pytest.approx((latencies[kind], 0.0), abs=1e-20)
        assert min(k.seconds[0] for k in space_kernels(c, 64, net)["step"]) >= latencies[kind]
    assert exchange_seconds(c, 1, net) == (0.0, 0.0)


def test_latency_is_paid_once_for_a_block_but_by_a_krylov_method_of_one_state():
    per_state = {}
    for kind in SOLVERS:
        free, slow = (space_kernels(case(kind), 8, net)["step"][0] for net in (FREE, Network(1e-2, 1e30, "latency")))
        more = [slow.seconds[i] - free.seconds[i] for i in (0, 2)]
        per_state[kind] = more[1] / more[0]
    assert per_state == pytest.approx({"replicated": 1, "substructuring": 1, "multigrid": 1, "subdomains": 16})


@pytest.mark.parametrize(
    ("dimension", "ranks", "planes"), [(2, 4, 2 * 100), (3, 8, 3 * 100**2), (3, 27, 2 * 3 * 100**2)]
)
def test_interfaces_are_planes_between_cubes(dimension, ranks, planes):
    assert interface_unknowns(100**dimension, dimension, ranks) == pytest.approx(planes)
    assert interface_unknowns(100**dimension, dimension, 1) == 0
    # twice the unknowns along a side: a surface has 2^(D-1) times as many
    larger = interface_unknowns(200**dimension, dimension, ranks)
    assert larger == pytest.approx(2 ** (dimension - 1) * planes)


def test_factors_of_parts():
    """By nested dissection n^(4/3) in three dimensions, n log n in two, n in one: parts of equal size."""
    for dimension, entries in ((3, lambda n: n ** (4 / 3)), (2, lambda n: n * math.log(n)), (1, lambda n: n)):
        for ranks in (1, 8, 64):
            expected = entries(1e6 / ranks) / entries(1e6)
            assert factor_share(1e6, dimension, ranks) == pytest.approx(expected)


def test_interface_and_factor_as_measured():
    """The number of interface unknowns is scaled to the measured one, the entries are those that are recorded."""
    c = case("substructuring", measured=(1, 2), space={"interface": 15_000.0, "factor entries": 3e9})
    assert work_of_rank(c, 2) == pytest.approx(2 * 3e9 * 2 ** (-4 / 3) + 15_000.0**2 / 2)
    at8 = 15_000.0 * (8 ** (1 / 3) - 1) / (2 ** (1 / 3) - 1)
    assert work_of_rank(c, 8) == pytest.approx(2 * 3e9 / 16 + at8**2 / 8)
    a, b = exchange_seconds(c, 8, SLOW)
    assert (a, b) == pytest.approx((2 * 2 * 3 * 1e-3, 2 * 8 * 4 * at8 / 1e6))


def test_a_direct_solver_has_a_fastest_number_of_ranks():
    """The interfaces, which all ranks gather, grow with the ranks; on a faster network it is larger."""
    c, best = case("substructuring", space={"factor entries": 6 * 100**4.0}), []
    for bandwidth in (1e8, 1e9):
        net = Network(0.0, bandwidth, "given")
        times = [space_kernels(c, 2**k, net)["step"][0](1) for k in range(16)]
        best.append(times.index(min(times)))
        assert times[best[-1] :] == sorted(times[best[-1] :])
    assert 0 < best[0] < best[1] < 15


def test_surfaces_of_multigrid_shrink_more_slowly_than_parts():
    c = case("multigrid", space={"levels": 1})
    own = [100**3 / p for p in (8, 64)]
    work = [work_of_rank(c, p) - n for p, n in zip((8, 64), own, strict=True)]
    assert work == pytest.approx([6 * n ** (2 / 3) for n in own])
    bytes_of = [exchange_seconds(c, p, Network(0.0, 1.0, "bytes"))[1] for p in (8, 64)]
    # six exchanges in single precision and one in double, of six faces, and two reductions
    assert bytes_of == pytest.approx([2 * 10 * ((4 * 6 + 8) * 6 * n ** (2 / 3) + 8 * 2) for n in own])


def test_coarse_levels_have_an_unknown_on_each_rank():
    """So that work does not vanish with more ranks than unknowns."""
    c = case("multigrid", space={"levels": 4})
    assert work_of_rank(c, 10**9) == pytest.approx(4 * (1 + 6))


@pytest.mark.parametrize("kind", ["replicated", "substructuring", "multigrid"])
def test_measured_exchanges_are_replaced_by_those_of_the_network(kind):
    """What was measured on a slow network and is predicted for a free one loses its messages, and is never negative."""
    net = Network(1e-5, 1e9, "measured")
    exact = case(kind)
    at = {q: {k: list(v) for k, v in space_kernels(exact, q, net).items()} for q in (1, 2)}
    c = case(kind, network=net).with_changes(kernels=at)
    for ranks in (4, 16):
        for network in (FREE, SLOW, net):
            expected, found = (space_kernels(x, ranks, network)["adjoint"][0].seconds for x in (exact, c))
            assert found == pytest.approx(expected)
    short = c.with_changes(network=Network(1e3, 1.0, "slower than measured"))
    assert 0 <= min(space_kernels(short, 16, FREE)["step"][0].seconds) < 1e-12


def test_old_records_have_the_solver_that_their_iterations_tell():
    c = case("", space_iterations=0.0)
    assert (solver_of(c), solver_of(c.with_changes(space_iterations=3.0))) == ("replicated", "subdomains")
    assert Calibration.from_json(case("multigrid", space={"levels": 3}).to_json()).space == {"levels": 3}
    with pytest.raises(InputError, match="space_solver 'magic': give one of replicated, substructuring"):
        space_kernels(case("magic"), 4, FREE)


@pytest.mark.parametrize(
    ("kind", "words"),
    [("replicated", "whole systems"), ("substructuring", "dense inverse"), ("multigrid", "iterations with multigrid")],
)
def test_the_assumption_names_the_solver(kind, words):
    assert words in assumption(case(kind, measured=(1, 2)))

"""The planner: the fastest of all grids and solvers, and what it refuses."""

import math

import pytest

pytest.importorskip("greenlet")

from pint_fem.commands import demo_arguments
from pint_fem.errors import InputError
from pint_fem.scaling.costs import Kernel, load
from pint_fem.scaling.network import Network
from pint_fem.scaling.planner import cycles_of, describe, least_time, plan, predict
from pint_fem.scaling.space import assumption, space_kernels, volume
from tests.scaling_traces import FAST, MENU
from tests.scaling_traces import planned_calibration as calibration


def test_plan_finds_the_fastest():
    """As exhaustive search does; bounds only spare runs."""
    c = calibration()
    made = plan(c, 16)
    every = [predict(c, {"levels": 1}, (s, 1), (0, 0)) for s in (1, 2, 4, 8, 16)]
    for options in MENU:
        every += [predict(c, options, (s, 16 // s), cycles_of(c, options, 1e-6)) for s in (1, 2, 4, 8)]
    assert made.best.seconds == min(choice.seconds for choice in every)
    assert [a.seconds for a in made.alternatives] == sorted(a.seconds for a in made.alternatives)
    assert "--grid" in demo_arguments(made.best)


def test_plan_takes_time_ranks_where_space_ranks_are_slow_and_serial_where_there_are_few():
    slow = Network(1e-4, 1e10, "slow")
    assert plan(calibration(), 1).best.solver == "serial"
    many = plan(calibration(space_iterations=100.0), 32, network=slow).best
    assert many.solver == "mgrit"
    assert many.grid[1] > many.grid[0]
    quick = plan(calibration(space_iterations=0.01), 32).best
    assert quick.grid[0] > 1
    whole = plan(calibration(space_iterations=0.0), 32).best  # ranks in space share states of a call only
    assert whole.grid[0] < whole.grid[1]


def test_space_ranks_share_the_states_of_a_call_where_each_has_the_whole_factor():
    """One state takes no less time on more ranks, twice as many states on twice as many ranks as long."""
    c = calibration(space_iterations=0.0)
    for ranks in (4, 64):
        for kind, levels in space_kernels(c, ranks, FAST).items():
            for kernel, measured in zip(levels, c.kernels[2][kind], strict=True):
                assert kernel(1) > measured(1)
                for size in measured.sizes:
                    if size > 2:
                        assert kernel(size * ranks // 2) > measured(size)
    assert "its share of the states" in assumption(c)
    assert "5 Krylov" in assumption(calibration())


def test_least_time_is_a_bound():
    c = calibration()
    for options in MENU:
        cycles = cycles_of(c, options, 1e-6)
        work, chain = least_time(c, options, 1, cycles)
        for ranks in (1, 2, 8, 32):
            assert predict(c, options, (1, ranks), cycles).seconds >= max(work / ranks, chain) * (1 - 1e-12)


def test_the_chain_of_coarse_steps_by_hand():
    """Sixteen coarse steps of a second, in nested iteration and in each of the cycles, forwards and back."""
    tables = [Kernel.constant(0.0), Kernel.constant(1.0)]
    c = calibration(norm=0.0, overhead={}, extras={}, kernels={1: {"step": tables, "adjoint": tables}})
    _, chain = least_time(c, {"levels": 2, "coarsening": 8}, 1, (3, 4), nsteps=128)
    assert chain == (1 + 3) * 16 + (1 + 4) * 16
    options = {"levels": 2, "coarsening": [8], "relax": "F", "coarse_steps": 3}
    assert least_time(c, options, 1, (3, 4), nsteps=128)[1] == 3 * chain
    assert describe(options) == "8 F, 3 steps"


def test_subdomains_overlap_on_all_sides():
    """Ten by ten unknowns and two layers around them."""
    assert volume(400, 4, 2) == 14**2


def test_plan_refuses_what_was_not_counted():
    with pytest.raises(InputError, match=r"rtol 0\.5: cycles were counted for 1e-06"):
        plan(calibration(), 4, rtol=0.5)
    with pytest.raises(InputError, match="no calibration 'nothing'"):
        plan("nothing", 4)
    with pytest.raises(InputError, match="0 ranks"):
        plan(calibration(), 0)


def test_space_model_is_the_measured_one_where_it_was_measured():
    c = calibration()
    two = c.kernels[2]
    assert space_kernels(c, 2, FAST)["step"] == two["step"]
    free = Network(0.0, 1e30, "free")
    ratio = volume(10000, 8, 3) / volume(10000, 2, 3)
    assert space_kernels(c, 8, free)["step"][0](1) == pytest.approx(ratio * two["step"][0](1))
    slow = Network(1.0, 1e30, "slow")
    # five iterations a stage, two reductions over three doublings and an exchange
    seconds = [space_kernels(c, 8, network)["step"][0](1) for network in (slow, free)]
    assert seconds[0] - seconds[1] == pytest.approx(5 * (2 * 3 + 2))


def test_unmeasured_space_ranks_are_left_alone():
    c = calibration()
    c = c.with_changes(kernels={1: c.kernels[1]})
    made = plan(c, 8)
    assert {choice.grid[0] for choice in [made.best, *made.alternatives]} == {1}
    assert "has not measured two" in made.assumptions[0]


def test_plan_takes_paradiag_where_it_is_fastest():
    """Waves: the only one beside serial stepping; its factors are made once, in the first solve."""
    costs = {"solve": 4e-2, "solve transposed": 4e-2, "factor": 1e-1, "factor bytes": 1e6, "fft": 1e-5, "ifft": 1e-5,
             "few fft": 1e-5, "few ifft": 1e-5, "fft columns": 100, "fft steps": 256, "pack": 1e-10}  # fmt: skip
    options = {"time_solver": "paradiag", "alpha": 1e-4}
    cycles = [{"options": options, "rtol": 1e-6, "state": 2, "adjoint": 2}]
    c = calibration(paradiag=costs, cycles=cycles)
    c = c.with_changes(kernels={1: c.kernels[1]})
    made = plan(c, 128)
    assert made.best.solver == "paradiag"
    assert made.best.grid == (1, 128)
    assert "--time-solver paradiag -paradiag_alpha 0.0001" in demo_arguments(made.best)
    assert least_time(c, options, 1, (2, 2))[1] == 0
    assert plan(c.with_changes(paradiag={}), 128).best.solver == "serial"
    assert plan(c, 2).best.solver == "serial"


def test_options_are_compared_by_what_they_mean():
    """The order of keys, tuples for lists, one factor for a list of one and defaults make no difference."""
    c = load("heat-source")
    entry = next(e for e in c.cycles if "coarsening" in e["options"])
    expected, options = cycles_of(c, entry["options"], entry["rtol"]), entry["options"]
    assert expected is not None
    other_order = dict(reversed(options.items()))
    assert list(other_order) != list(options)
    tuples = {k: tuple(v) if isinstance(v, list) else v for k, v in other_order.items()}
    for same in (other_order, tuples, {**tuples, "rtol": entry["rtol"], "monitor": True}):
        assert cycles_of(c, same, entry["rtol"]) == expected
    assert cycles_of(c, {**options, "relax": "FCFCFCF"}, entry["rtol"]) is None


@pytest.mark.parametrize(("ranks", "experiments"), [(1, 4), (8, 8), (6, 4), (16, 3), (32, 4)])
def test_experiments_divide_over_groups(ranks, experiments):
    """As exhaustive search over all numbers of groups does; the sum over the groups counts."""
    c, net = calibration(), Network(1e-5, 1e9, "given")
    made = plan(c, ranks, network=net, experiments=experiments)
    times = {}
    for groups in range(1, min(ranks, experiments) + 1):
        one = plan(c, ranks // groups, network=net).best
        nbytes = c.state_bytes / one.grid[0]
        added = 0 if groups == 1 else (groups - 1) * 1e-5 + nbytes / 1e9 + math.ceil(math.log2(groups)) * 1e-5
        added += nbytes / 1e9 if groups > 1 else 0
        times[groups] = -(-experiments // groups) * one.seconds + added
    assert made.best.seconds == pytest.approx(min(times.values()))
    *_, groups = made.best.grid
    assert times[groups] == pytest.approx(min(times.values()))
    assert math.prod(made.best.grid) <= ranks
    if ranks <= experiments and experiments % ranks == 0:
        assert made.best.grid == (1, 1, ranks)
        assert made.best.efficiency == pytest.approx(1, abs=0.05)
    assert f"--grid {'x'.join(map(str, made.best.grid))} " in demo_arguments(made.best)
    assert made.best.bytes_per_rank > 0


def test_groups_are_slowed_down_by_all_ranks():
    """The ranks of all groups share the memory of a machine."""
    c = calibration().with_changes(slowdown={1: 1.0, 4: 2.0})
    assert plan(c, 4, experiments=4).best.seconds == pytest.approx(2 * plan(c, 1).best.seconds, rel=1e-3)
    with pytest.raises(InputError, match="0 experiments: give at least 1"):
        plan(c, 4, experiments=0)

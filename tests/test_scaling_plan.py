"""The planner, scaling curves and the published experiment."""

import json

import numpy as np
import pytest

pytest.importorskip("greenlet")

from pint_fem.errors import InputError
from pint_fem.scaling import choices, published
from pint_fem.scaling.__main__ import arguments, main
from pint_fem.scaling.costs import Calibration, Kernel, bundled, load
from pint_fem.scaling.inversions import serial_inversion
from pint_fem.scaling.model import Model, Solve
from pint_fem.scaling.network import Network
from pint_fem.scaling.planner import cycles_of, least_time, plan, predict
from pint_fem.scaling.report import report
from pint_fem.scaling.space import assumption, kernels, volume
from pint_fem.scaling.strong import Curve, crossover, opponents, strong, weak
from tests.pictures import assert_drawn

FAST = Network(1e-6, 1e10, "for tests")
MENU = [{"levels": 2, "coarsening": [16], "relax": "FCF"}, {"levels": 3, "coarsening": [8, 4], "relax": "F"}]


def calibration(**changes) -> Calibration:
    """256 steps; blocks half as dear as single steps; cycles and an inversion as if counted."""
    block, single = Kernel((1, 8, 16), (1e-2, 4e-2, 8e-2), 0), Kernel.constant(1e-2)
    one = {"step": [block], "adjoint": [block], "sweep": [single], "adjoint sweep": [single]}
    two = {kind: [k.scaled(0.6) for k in levels] for kind, levels in one.items()}
    work = {1: one, 2: two}
    cycles = [
        {"kind": kind, "start": "nested", "options": options, "rtol": 1e-6, "cycles": n, "steps": 256, "unknowns": 1000}
        for options, n in zip(MENU, (2, 3), strict=True)
        for kind in ("state", "adjoint")
    ]
    inversions = [
        {"options": options, "inexact": False, "steps": 256, "unknowns": 1000,
         "solves": [["value", [["state", "nested", 1]], 3], ["derivative", [["adjoint", "guess", 1]], 2],
                    ["hessian", [["tangent", "nested", 1], ["adjoint", "nested", 1]], 3]],
         "counts": {"values": 3, "gradients": 2, "hessians": 3}}
        for options in ({"levels": 1}, MENU[0])
    ]  # fmt: skip
    opponent = {"value": 0.1, "gradient": 0.2, "hessian": 1.0}
    c = Calibration("test", "none", 10000, 256, work, network=FAST, cycles=cycles, inversions=inversions,
                    opponent=opponent, space_iterations=5.0)  # fmt: skip
    return c.with_changes(**changes)


def test_plan_finds_the_fastest():
    """As exhaustive search does; bounds only spare runs."""
    c = calibration()
    made = plan(c, 16)
    every = [predict(c, {"levels": 1}, (s, 1), (0, 0))[0] for s in (1, 2, 4, 8, 16)]
    for options in MENU:
        every += [predict(c, options, (s, 16 // s), cycles_of(c, options, 1e-6))[0] for s in (1, 2, 4, 8)]
    assert made.best.seconds == min(choice.seconds for choice in every)
    assert [a.seconds for a in made.alternatives] == sorted(a.seconds for a in made.alternatives)
    assert "--grid" in made.best.arguments


def test_plan_takes_time_ranks_where_space_ranks_are_slow_and_serial_where_there_are_few():
    slow = Network(1e-4, 1e10, "slow")
    assert plan(calibration(), 1).best.solver == "serial"
    many = plan(calibration(space_iterations=100.0), 32, network=slow).best
    assert many.solver == "mgrit"
    assert many.grid[1] > many.grid[0]
    quick = plan(calibration(space_iterations=0.01), 32).best
    assert quick.grid[0] > 1
    whole = plan(calibration(space_iterations=0.0), 32).best  # systems that every rank solves
    assert whole.grid[0] <= 2


def test_more_space_ranks_do_not_solve_systems_faster_that_each_solves_whole():
    c = calibration(space_iterations=0.0)
    for ranks in (4, 64):
        for kind, levels in kernels(c, ranks, FAST).items():
            for kernel, measured in zip(levels, c.work[2][kind], strict=True):
                assert all(a > b for a, b in zip(kernel.seconds, measured.seconds, strict=True))
    assert "none is faster" in assumption(c)
    assert "5 Krylov" in assumption(calibration())


def test_least_time_is_a_bound():
    c = calibration()
    for options in MENU:
        cycles = cycles_of(c, options, 1e-6)
        work, chain = least_time(c, options, 1, cycles)
        for ranks in (1, 2, 8, 32):
            assert predict(c, options, (1, ranks), cycles)[0].seconds >= max(work / ranks, chain) * (1 - 1e-12)


def test_plan_refuses_what_was_not_counted():
    with pytest.raises(InputError, match=r"rtol 0\.5: cycles were counted for 1e-06"):
        plan(calibration(), 4, rtol=0.5)
    with pytest.raises(InputError, match="no calibration 'nothing'"):
        plan("nothing", 4)
    with pytest.raises(InputError, match="0 ranks"):
        plan(calibration(), 0)


def test_space_model_is_the_measured_one_where_it_was_measured():
    c = calibration()
    two = c.work[2]
    assert kernels(c, 2, FAST)["step"] == two["step"]
    free = Network(0.0, 1e30, "free")
    ratio = volume(10000, 8, 3) / volume(10000, 2, 3)
    assert kernels(c, 8, free)["sweep"][0](1) == pytest.approx(ratio * two["sweep"][0](1))
    slow = Network(1.0, 1e30, "slow")
    # five iterations a stage, two reductions over three doublings and an exchange
    assert kernels(c, 8, slow)["sweep"][0](1) - kernels(c, 8, free)["sweep"][0](1) == pytest.approx(5 * (2 * 3 + 2))


def test_unmeasured_space_ranks_are_left_alone():
    c = calibration()
    c = c.with_changes(work={1: c.work[1]})
    made = plan(c, 8)
    assert {choice.grid[0] for choice in [made.best, *made.alternatives]} == {1}
    assert "has not measured two" in made.assumptions[0]


def test_curves_and_crossover():
    c = calibration()
    ranks = [1, 2, 4, 8, 16]
    ours = strong(c, MENU[1], (3, 3), ranks)
    serial, taped = opponents(c, ranks)
    assert ours.ranks == ranks
    assert set(ours.seconds) == {"state", "gradient", "hessian", "inversion"}
    alone = Model(c, MENU[1]).run(Solve("state", "nested", 3))
    assert ours.seconds["state"][0] == pytest.approx(alone.seconds)
    assert serial.seconds["state"] == sorted(serial.seconds["state"], reverse=True)
    assert taped.seconds["gradient"] == [pytest.approx(0.3 * 256)] * 5
    assert "inversion" not in taped.seconds  # our optimiser's Hessian actions are not what a tape is best at
    assert ours.inversions == [MENU[0]] * 5
    # serial inversion: 3 states, 2 gradients' adjoints, 3 Hessian actions of two sweeps each
    assert serial.seconds["inversion"][0] == pytest.approx((3 + 2 + 6) * 2.56, rel=0.01)
    line = lambda *seconds: Curve("", [1, 2, 4, 8], {"state": list(seconds)})
    assert crossover(line(8, 4, 2, 1), line(3, 3, 3, 3), "state") == pytest.approx(8 / 3)
    assert crossover(line(8, 8, 8, 8), line(3, 3, 3, 3), "state") is None
    assert crossover(line(2, 1, 1, 1), line(3, 3, 3, 3), "state") == 1
    flat = weak(c, lambda p: (MENU[1], (1, 1)), 32, [1, 2, 4])
    assert len(flat.seconds["gradient"]) == 3
    assert all(0 < e <= 1 for e in flat.efficiency)


def test_published_experiment():
    """XBraid's: crossover near 256 processes, 10 to 15 cycles; the counted cycles are among them."""
    cycles = published.count_on_modes(published.xbraid(10).options, "backward Euler", start="skip", rtol=1e-9, modes=8)
    assert 10 <= cycles <= 15
    ups = published.speedups(published.xbraid(cycles), [16, 128, 256, 512])
    ours = Curve("", [p for p, *_ in ups], {"state": [s for _, s, _ in ups]})
    serial = Curve("", ours.ranks, {"state": [s * r for _, s, r in ups]})
    assert 128 <= crossover(ours, serial, "state") <= 512
    assert all(np.diff([r for *_, r in ups]) > 0)


def test_choices_are_compared():
    """Each choice gains alone, and ours lose by each that is missing; splits are those that were run."""
    rows = choices.study([64], block=0.4, menu=((16, 4, 4),))
    (ours,), best = rows["ours"], rows["ours"][0].points[-1]
    assert [p for p, *_ in ours.points] == [8, 16, 32, 64]
    for row in rows["without"]:
        assert row.points[0][2] <= best[2] * (1 + 1e-12), row.name
    published_, *alone = rows["alone"]
    assert all(row.points[0][2] > published_.points[0][2] for row in alone)
    space, name = ours.where[64]
    assert 64 % space == 0
    assert name == "16x4x4"
    steps, error = published.equal_accuracy()
    assert published._error("SDIRK2", steps) <= error < published._error("SDIRK2", steps - 16)
    # the first orders of accuracy are one and two
    ratios = [published._error(t, 512) / published._error(t, 1024) for t in ("backward Euler", "SDIRK2")]
    assert ratios == pytest.approx([2, 4], rel=0.05)


def test_modes_are_solved():
    """Nested iteration and SDIRK2 need fewer cycles, a neighbouring solution fewer still."""
    options, common = {"levels": 3, "coarsening": (8, 4), "relax": "FCF"}, dict(rtol=1e-8, nsteps=512, modes=8)
    count = lambda tableau, start, **more: published.count_on_modes(options, tableau, start=start, **common, **more)
    euler, sdirk = count("backward Euler", "skip"), count("SDIRK2", "skip")
    assert sdirk < euler
    assert count("SDIRK2", "nested") <= sdirk
    assert count("SDIRK2", "guess", nearby=1e-4) < count("SDIRK2", "guess")


@pytest.mark.parametrize("name", bundled("evolution"))
def test_bundled_calibrations_are_whole(name):
    c = load(name)
    assert c.problem == name
    assert c.width == 8
    assert 1 in c.work
    assert all(cycles_of(c, e["options"], e["rtol"]) for e in c.cycles)
    assert {e["rtol"] for e in c.cycles} == {1e-6, 1e-9}
    for counted in c.inversions:
        n = {task: sum(n for what, _, n in counted["solves"] if what == task) for task in ("value", "hessian")}
        assert n["hessian"] >= counted["counts"]["hessians"]  # a number of cycles is tried first
        assert n["value"] >= counted["counts"]["values"]
        assert counted["reason"] == "gradient tolerance"
    assert serial_inversion(c)
    assert len({json.dumps(counted["options"]) for counted in c.inversions}) == len(c.inversions) > 1
    assert c.notes  # how it was measured
    made = plan(c, 2, nsteps=64)
    assert made.best.seconds > 0


@pytest.mark.parametrize("name", bundled("layers"))
def test_bundled_networks_are_whole(name):
    pytest.importorskip("torch")
    from pint_fem.scaling.layers import predict_training

    c = load(name)
    assert (c.problem, c.nsteps) == (name, int(name.split("-")[1]))
    assert c.notes
    assert c.opponent["step"] > 0
    for entry in c.cycles:
        assert 0 < entry["gradient error"] < 0.1
        said = predict_training(c, entry["options"], 2, iterations=entry["iterations"])
        assert 0 < said.seconds <= sum(said.busy) + 1


def test_plan_takes_paradiag_where_it_is_fastest():
    """Waves: the only one beside serial stepping; its factors are made once, in the first solve."""
    costs = {"solve": 4e-2, "solve transposed": 4e-2, "factor": 1e-1, "factor bytes": 1e6, "fft": 1e-5, "ifft": 1e-5,
             "few fft": 1e-5, "few ifft": 1e-5, "fft columns": 100, "fft steps": 256, "pack": 1e-10}  # fmt: skip
    options = {"time_solver": "paradiag", "alpha": 1e-4}
    cycles = [{"kind": k, "options": options, "rtol": 1e-6, "cycles": 2} for k in ("state", "adjoint")]
    c = calibration(paradiag=costs, cycles=cycles)
    c = c.with_changes(work={1: c.work[1]})
    made = plan(c, 128)
    assert made.best.solver == "paradiag"
    assert made.best.grid == (1, 128)
    assert "--time-solver paradiag -paradiag_alpha 0.0001" in made.best.arguments
    assert least_time(c, options, 1, (2, 2))[1] == 0
    assert plan(c.with_changes(paradiag={}), 128).best.solver == "serial"
    assert plan(c, 2).best.solver == "serial"
    ours = strong(c, options, (2, 2), [1, 4])
    work = 256 / 4  # steps of the residual and frequencies of a rank
    assert ours.seconds["hessian"][1] > 2 * 2 * (work / 2 * 4e-2 + work * 1e-2 / 2)
    gap = ours.seconds["gradient"][0] - ours.seconds["hessian"][0]
    assert gap == pytest.approx(129 * 0.1, rel=1e-2)  # factors


def test_command_line(capsys):
    main(["plan", "heat-source", "--ranks", "4", "--network", "2us,12GB/s", "--steps", "64"])
    text = capsys.readouterr().out
    assert "predicted" in text
    assert "assumed" in text
    assert "--grid" in text
    for argv, message in ((["nothing"], "give one of plan"), (["plan", "--network", "fast"], "2us,12GB/s")):
        with pytest.raises(InputError, match=message):
            main(argv)
    assert arguments(["report", "--ranks", "64"]).ranks == 64


def test_report_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(published, "speedups", lambda setting, ranks: [(32, 2.0, 0.5), (64, 1.0, 1.2)])
    monkeypatch.setattr("pint_fem.scaling.report.load", lambda name: calibration())
    report(tmp_path, largest=16, names=["test"], choices=False)
    text = (tmp_path / "report.txt").read_text()
    assert "PREDICTED" in text
    assert "crossover" in text
    for name in ("strong_test.png", "cycle_test.png"):
        assert_drawn(tmp_path / name)
    assert json.loads((tmp_path / "report.json").read_text())
    capsys.readouterr()


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

"""Scaling of this project's problems as predicted for the report: curves, the published experiment, records."""

import json

import numpy as np
import pytest

pytest.importorskip("greenlet")

from pint_fem.scaling.costs import load as load_calibration
from pint_fem.scaling.model import Model, Solve
from pint_fem.scaling.planner import cycles_of, plan
from tests.benchmarks.scaling import choices, published
from tests.benchmarks.scaling.inversions import serial_inversion
from tests.benchmarks.scaling.records import Record, load, names, save
from tests.benchmarks.scaling.report import report
from tests.benchmarks.scaling.strong import Curve, baselines, crossover, strong, weak
from tests.pictures import assert_drawn
from tests.scaling_traces import MENU, planned_calibration


def calibration(**changes) -> Record:
    """That of the planner's tests, with inversions as if counted and pyadjoint as if timed."""
    inversions = [
        {"options": options, "inexact": False, "steps": 256, "unknowns": 1000,
         "solves": [["value", [["state", "nested", 1]], 3], ["derivative", [["adjoint", "guess", 1]], 2],
                    ["hessian", [["tangent", "nested", 1], ["adjoint", "nested", 1]], 3]],
         "counts": {"values": 3, "gradients": 2, "hessians": 3}}
        for options in ({"levels": 1}, MENU[0])
    ]  # fmt: skip
    baseline = {"value": 0.1, "gradient": 0.2, "hessian": 1.0}
    record = Record(**vars(planned_calibration()), inversions=inversions, baseline=baseline)
    return record.with_changes(**changes)


def test_curves_and_crossover():
    c = calibration()
    ranks = [1, 2, 4, 8, 16]
    ours = strong(c, MENU[1], (3, 3), ranks)
    serial, taped = baselines(c, ranks)
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


@pytest.mark.parametrize("name", names("evolution"))
def test_records_are_whole(name):
    c = load(name)
    assert c.problem == name
    assert c.kernels[1]["step"][0].lanes
    assert 1 in c.kernels
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


@pytest.mark.parametrize("name", names("layers"))
def test_records_of_networks_are_whole(name):
    pytest.importorskip("torch")
    from tests.benchmarks.scaling.layer_model import predict_training

    c = load(name)
    assert (c.problem, c.nsteps) == (name, int(name.split("-")[-1]))
    assert c.notes
    assert c.baseline["step"] > 0
    for entry in c.gradient_errors:
        assert 0 < entry["error"] < 0.1
        said = predict_training(c, entry["options"], 2, iterations=entry["iterations"])
        assert 0 < said.seconds <= sum(said.work) + 1


def test_report_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(published, "speedups", lambda setting, ranks: [(32, 2.0, 0.5), (64, 1.0, 1.2)])
    monkeypatch.setattr("tests.benchmarks.scaling.report.load", lambda name: calibration())
    report(tmp_path, largest=16, names=["test"], choices=False)
    text = (tmp_path / "report.txt").read_text()
    assert "PREDICTED" in text
    assert "crossover" in text
    for name in ("strong_test.png", "cycle_test.png"):
        assert_drawn(tmp_path / name)
    assert json.loads((tmp_path / "report.json").read_text())
    capsys.readouterr()


def test_factors_of_paradiag_are_made_once():
    """A gradient includes the first solve's factors, the Hessian action after it does not."""
    costs = {"solve": 4e-2, "solve transposed": 4e-2, "factor": 1e-1, "factor bytes": 1e6, "fft": 1e-5, "ifft": 1e-5,
             "few fft": 1e-5, "few ifft": 1e-5, "fft columns": 100, "fft steps": 256, "pack": 1e-10}  # fmt: skip
    options = {"time_solver": "paradiag", "alpha": 1e-4}
    c = calibration(paradiag=costs)
    ours = strong(c, options, (2, 2), [1, 4])
    work = 256 / 4  # steps of the residual and frequencies of a rank
    assert ours.seconds["hessian"][1] > 2 * 2 * (work / 2 * 4e-2 + work * 1e-2 / 2)
    gap = ours.seconds["gradient"][0] - ours.seconds["hessian"][0]
    assert gap == pytest.approx(129 * 0.1, rel=1e-2)  # factors


def test_a_record_is_written_as_it_is_read(tmp_path, monkeypatch):
    for name in ("CALIBRATIONS", "COUNTED"):
        monkeypatch.setattr(f"tests.benchmarks.scaling.records.{name}", tmp_path / name)
        (tmp_path / name).mkdir()
    for record in (calibration(), calibration(problem="heat-source")):
        save(record)
        assert load(record.problem).inversions == json.loads(json.dumps(record.inversions))
    assert load("test").kernels == calibration().kernels
    assert load("heat-source").kernels == load_calibration("heat-source").kernels  # of the package
    assert [path.stem for path in (tmp_path / "CALIBRATIONS").iterdir()] == ["test"]
    assert names() == ["heat-source", "test"]

"""Training steps on virtual ranks: the schedule of a real network's sweeps, and costs by hand."""

import pytest
from mpi4py import MPI

pytest.importorskip("greenlet")
pytest.importorskip("torch")

import torch

from pint_fem.all_at_once.trace import Trace
from pint_fem.errors import InputError
from pint_fem.resnet import Dense, Grid, LayerParallelResNet
from pint_fem.scaling.costs import Kernel
from pint_fem.scaling.network import Network
from tests.benchmarks.scaling import training, training_table
from tests.benchmarks.scaling.layer_model import predict_training
from tests.benchmarks.scaling.records import Record
from tests.scaling_traces import events

BATCH, LAYERS = 8, 50
CONFIGS = [
    ({"levels": 2, "coarsening": 8, "relax": "F"}, (2, 1)),
    ({"levels": 3, "coarsening": 4, "relax": "FCF"}, (1, 2)),
    ({"levels": 1}, (1, 1)),
]


def calibration(**changes) -> Record:
    """A step 1 s, backwards 2 s, gradients half a second a layer."""
    work = {
        "step": [Kernel.constant(1.0)],
        "adjoint": [Kernel.constant(2.0)],
        "gradients": [Kernel.constant(0.5)],
    }
    c = Record("net", "none", 8 * BATCH, LAYERS, {1: work}, control_bytes=8.0 * 72, kind="layers",
                    network=Network(0.0, 1e30, "free"))  # fmt: skip
    return c.with_changes(**changes)


@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize(("options", "iterations"), CONFIGS)
def test_training_step_is_that_of_a_real_network(options, iterations):
    """Every call, message, peer and byte of both sweeps, on every rank, and messages with parameters."""
    comm = MPI.COMM_WORLD
    net = LayerParallelResNet(
        torch.nn.Linear(2, 8), Dense(8), LAYERS, torch.nn.Linear(8, 2), grid=Grid(comm=comm), mgrit=options,
        forward_iterations=iterations[0], backward_iterations=iterations[1], dtype=torch.float64,
    )  # fmt: skip
    trace = Trace(comm)
    net.sweeps.set_trace(trace)
    generator = torch.Generator().manual_seed(0)
    net(torch.rand(BATCH, 2, generator=generator, dtype=torch.float64)).square().sum().backward()
    said = predict_training(calibration(), options, comm.size, iterations=iterations, trace=True)
    assert events(said.traces[comm.rank]) == events(trace.events)
    # sums of parameters, and of slopes backwards, over the intervals that a rank begins and another ends
    strides, inner = net.sweeps.strides[1:], net.sweeps.bounds[1:-1]
    sums = sum((b % s != 0) + 2 * ((LAYERS - b) % s != 0) for s in strides for b in inner)
    assert said.counts["messages", 43] == sums
    assert said.counts["step", 0] > 0


def test_step_by_hand():
    """Serial: sums. Two levels, a rank an interval, free messages: chains of coarse steps."""
    serial = predict_training(calibration(), {"levels": 1}, 1)
    assert serial.seconds == pytest.approx(LAYERS * 3.5)
    around = predict_training(calibration(extras={"around": 7.0}), {"levels": 1}, 1)
    assert around.seconds == pytest.approx(LAYERS * 3.5 + 7)
    beside = calibration(overhead={"state": 0.1, "adjoint": 0.2, "call": 3.0})
    said = predict_training(beside, {"levels": 1}, 1)
    assert said.seconds == pytest.approx(LAYERS * (3.5 + 0.1 + 0.2))  # no relaxation
    half = dict(iterations=(1, 1), nlayers=16)
    block = predict_training(beside, {"levels": 2, "coarsening": 8, "relax": "F"}, 1, **half)
    work = {"step": 1.1, "adjoint": 2.2, "calls": 3.0}
    assert block.seconds == pytest.approx(8.0 + sum(n * work.get(kind, 0.0) for (kind, _), n in block.counts.items()))
    # nested iteration, a cycle's correction: F-relaxations of two intervals, there and back; residuals
    assert 2 * 2 * 7 <= block.counts["calls", 0] <= 2 * (2 * 7 + 2)
    m, ranks = 8, 8
    said = predict_training(
        calibration(), {"levels": 2, "coarsening": m, "relax": "F"}, ranks, iterations=(1, 1), nlayers=m * ranks
    )
    # the chain of the coarse network; then each rank follows its left neighbour at the distance of a step, as nobody
    # waits for norms: F-relaxation, residual, right-hand side and step of the coarse level, F-relaxation, residual
    one = ranks + (m - 1) + 3 + (m - 1) + 1
    assert said.seconds == pytest.approx(3 * one + 0.5 * m)
    work = sum(n * {"step": 1.0, "adjoint": 2.0}[kind] for (kind, _), n in said.counts.items() if kind != "messages"
               and kind in ("step", "adjoint"))  # fmt: skip
    assert sum(said.work) == pytest.approx(work + 0.5 * m * ranks)
    with pytest.raises(InputError, match="at most one rank per layer"):
        predict_training(calibration(), {"levels": 1}, LAYERS + 1)


def test_plan_and_curve_are_the_fastest(monkeypatch, tmp_path, capsys):
    """As exhaustive search finds; on many ranks among the two that were fastest before."""
    entries = [
        {"options": {"levels": 2, "coarsening": [m], "relax": "F"}, "iterations": [2, 1], "error": m / 1e3}
        for m in (2, 5, 10)
    ]
    c = calibration(gradient_errors=entries, baseline={"step": 3.5 * LAYERS, "threads": 1}, notes=["for tests"])
    seconds = lambda entry, p: predict_training(c, entry["options"], p, iterations=(2, 1)).seconds
    every = {p: min(seconds(entry, p) for entry in entries) for p in (1, 2, 4, 8, 16, 32)}
    curve = training.strong_training(c, every)
    assert [x.seconds for x in curve.best] == [pytest.approx(s) for s in every.values()]
    assert all(x.speedup == pytest.approx(3.5 * LAYERS / x.seconds) for x in curve.best)
    assert curve.first(1.5) is next(x for x in curve.best if x.speedup >= 1.5)
    found = training.plan_training(c, 8)
    assert len(found) == len(entries)
    assert found[0].seconds == pytest.approx(min(every[p] for p in (1, 2, 4, 8)))
    pays = training.crossover(c, curve)
    assert pays.speedup >= 1 > min(3.5 * LAYERS / seconds(entry, pays.ranks - 1) for entry in entries)
    assert pays.ranks not in every, "between two powers of two"
    assert training.crossover(c.with_changes(baseline={"step": 1e-9}), curve.__class__([])) is None
    monkeypatch.setattr(training, "MANY", 4)
    few = training.strong_training(c, every)
    assert [x.seconds for x in few.best][:3] == [x.seconds for x in curve.best][:3]
    assert all(x.seconds >= y.seconds for x, y in zip(few.best, curve.best, strict=True))
    data, claim = training_table.training(c, tmp_path, print, 8, None)
    assert len(data["best"]) == 4
    assert "measured" in capsys.readouterr().out
    assert "over serial torch" in claim

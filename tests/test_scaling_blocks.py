"""Costs of convolutions and transformer blocks for the performance model, measured with a few small layers."""

from dataclasses import replace

import pytest

pytest.importorskip("greenlet")
pytest.importorskip("torch")

import torch

from pint_fem.errors import InputError
from tests.benchmarks.scaling import block_costs
from tests.benchmarks.scaling.block_costs import BLOCKS, SIZES, calibrate_blocks, count_block_errors, least
from tests.benchmarks.scaling.layer_model import predict_training

SMALL = {"conv": dict(width=4, batch=4, size=4), "transformer": dict(width=8, batch=2, size=4)}


def cases(kind):
    """Two depths of one network."""
    case = next(c for c in BLOCKS.values() if c.kind == kind)
    return {f"{kind}-{n}": replace(case, nlayers=n, few={}, menu=case.menu[1:2], **SMALL[kind]) for n in (8, 16)}


@pytest.mark.parametrize("kind", ["conv", "transformer"])
def test_a_record_of_each_depth(monkeypatch, kind):
    """Kernels, serial steps in proportion to the depth, the size of a state; a prediction near the sum of its parts."""
    monkeypatch.setattr(block_costs, "MEASURED", {"conv": 8, "transformer": 8})
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    said = []
    shallow, deep = calibrate_blocks(cases(kind), repeats=2, progress=said.append)
    assert [c.problem for c in (shallow, deep)] == [f"{kind}-8", f"{kind}-16"]
    assert [c.nsteps for c in (shallow, deep)] == [8, 16]
    around = shallow.extras["around"]
    assert deep.baseline["step"] - around == pytest.approx(2 * (shallow.baseline["step"] - around))
    assert deep.baseline["form"] in ("eager", "stacked", "compiled")
    values = 4 * 4 * 4 * 4 if kind == "conv" else 2 * 4 * 8
    assert 8 * deep.unknowns == 4 * values
    parameters = 4 * 4 * 9 + 4 if kind == "conv" else 8 * 2 + 8 * 24 + 24 + 8 * 8 + 8 + 2 * (8 * 16) + 16 + 8
    assert deep.control_bytes == 4 * parameters
    serial = predict_training(deep, {"levels": 1}, 1).seconds
    one = sum(deep.kernels[1][name][0](1) for name in ("step", "adjoint", "gradients"))
    rest = deep.overhead["state"] + deep.overhead["adjoint"]
    assert 16 * (one - deep.kernels[1]["gradients"][0](1)) <= serial <= 1.01 * (16 * (one + rest) + around)
    assert len(said) == 3


@pytest.mark.parametrize("kind", ["conv", "transformer"])
def test_errors_of_gradients_are_counted(kind):
    """Two intervals are exact after two cycles each way, and not after one."""
    (case, _) = cases(kind).values()
    case = replace(case, menu=({"levels": 2, "coarsening": [4], "relax": "F"},))
    (exact,), (other,) = count_block_errors(case, (2, 2)), count_block_errors(case, (1, 1))
    assert exact["error"] < 1e-12 < other["error"] < 0.5
    assert exact["iterations"] == [2, 2]


def test_seconds_of_calls_are_consistent():
    assert block_costs._consistent([1.0, 3.0, 3.0]) == (1.0, 2.0, 3.0)
    assert block_costs._consistent([4.0, 3.0, 5.0]) == (3.0, 3.0, 5.0)
    assert len(SIZES) == 3
    assert least(lambda: sum(range(20000)), 3) > 0
    with pytest.raises(InputError, match="give one of conv, transformer"):
        calibrate_blocks({"a": replace(BLOCKS["mnist-conv-64"], kind="dense")})

"""Batches of several sizes share memory, and sweeps that fell back to sequential stepping are told from cycles."""

import math

import numpy as np
import pytest
import torch

from pint_fem.mgrit import MGRIT, SolveResult, SolverFailure
from pint_fem.resnet import Adaptive
from pint_fem.resnet.iterations import Iterations
from tests.limits import time_limit
from tests.test_resnet_training import peaks_network, problem


@pytest.mark.parallel([1, 3])
@time_limit(60)
def test_a_shorter_last_batch_and_an_evaluation():
    """Both batches' memory comes back before the next one needs some; values are those of each batch alone."""
    net, x, _ = peaks_network(8, count=20)
    with torch.no_grad():
        alone = [net(x[:n]) for n in (10, 7)]
    for _ in range(2):
        losses = [net(x[:n]).square().sum() for n in (10, 7)]
        for loss in losses:
            loss.backward()
        del loss, losses
        with torch.no_grad():
            for n, expected in ((7, alone[1]), (10, alone[0])):
                torch.testing.assert_close(net(x[:n]), expected, rtol=0, atol=1e-12)


def test_memory_is_used_again_by_shape():
    sweeps = peaks_network(8)[0].sweeps
    ten, seven = (sweeps.trajectory((n, 4), float) for n in (10, 7))
    sweeps.recycle(ten)
    sweeps.recycle(seven)
    assert sweeps.trajectory((7, 4), float).U is seven.U
    assert sweeps.trajectory((10, 4), float).U is ten.U


@pytest.mark.parallel([1, 3])
@time_limit(60)
def test_the_one_shot_residual_of_cycles_that_failed_is_that_of_sequential_stepping(monkeypatch):
    """No residual was computed, and the values are those of the sequential sweep."""
    p = problem(8, levels=2, mgrit={"on_divergence": "serial"})
    value, gradient = p.value(p.x0), p.gradient(p.x0)
    q = problem(8, levels=2, mgrit={"on_divergence": "serial"})

    def fails(solver, U, *_):
        solver.prepare(U.shape[1:], U.dtype)
        raise SolverFailure("cycles failed")

    monkeypatch.setattr(MGRIT, "_iterate", fails)
    found, slope, residual = q.advance(q.x0)
    assert [r.reason for r in q.net.results.values()] == ["serial"] * 2
    assert residual == 0.0
    assert found == pytest.approx(value, rel=1e-8)
    np.testing.assert_allclose(slope, gradient, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("result", "relative"),
    [
        (SolveResult(True, "serial"), 0.0),
        (SolveResult(True, "exact", [0.0]), 0.0),
        (SolveResult(True, "its"), math.nan),
        (SolveResult(True, "its", [2.0, 0.5], 1, 4.0), 0.125),
        (SolveResult(False, "diverged", [1.0], 0, 0.0), math.inf),
        (SolveResult(True, "rtol", [0.0], 0, 0.0), 0.0),
    ],
    ids=lambda r: getattr(r, "reason", ""),
)
def test_relative_residuals(result, relative):
    assert result.relative_residual == pytest.approx(relative, nan_ok=True)


@pytest.mark.parametrize(
    ("result", "serial", "ratio"),
    [
        (SolveResult(True, "serial"), True, math.inf),
        (SolveResult(True, "exact", [0.0]), False, 0.0),
        (SolveResult(True, "its", [1.0, 0.1, 0.01, 0.001, 1e-4], 4, 1.0), False, 0.01),
    ],
    ids=["serial", "exact", "its"],
)
def test_a_sweep_without_residuals_is_judged(result, serial, ratio):
    sweeps = Iterations(2, Adaptive(every=1))
    asked = []
    sweeps.begin()
    sweeps.end(result, lambda x: asked.append(x) or x)
    assert asked == [pytest.approx(ratio)]  # all groups are asked, whatever happened in this one
    assert sweeps.serial is serial

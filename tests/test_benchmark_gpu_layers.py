"""The benchmark on a GPU, whose code is run on a CPU with a few small blocks; only CUDA graphs are left out."""

import json
import time

import pytest

pytest.importorskip("torch")

import torch

from pint_fem.errors import InputError
from problems.block_networks import KINDS, ParallelAttentionBlock, block_problem
from tests.benchmarks import gpu_layers
from tests.benchmarks.gpu_layers import BUDGET, CASES, TINY, Result, main, measure, run

SMALL = list(TINY)


@pytest.mark.parametrize("case", SMALL, ids=KINDS)
def test_a_case_is_measured_and_its_gradients_are_those_of_the_loop(case):
    """Errors are relative to autograd of the plain loop; a wrong sign or factor would be 1 and more."""
    found = measure(case, device="cpu", repeats=1, deadline=float("inf"), exact=True, backend="eager")
    assert set(found.serial) == {"eager", "stacked", "compiled"}
    assert set(found.parallel) == {"m = 4, 2 + 1"}
    assert found.errors["to the tolerance"] < 1e-5
    assert 1e-4 < found.errors["m = 4, 2 + 1"] < 0.1
    assert max(found.errors[form] for form in found.serial) < 1e-5
    assert found.ratio == pytest.approx(min(found.serial.values()) / found.parallel["m = 4, 2 + 1"])
    assert not found.notes
    assert f"{found.ratio:.2f} = fastest serial / layer-parallel" in found.lines()[0]


def test_wrong_gradients_end_the_measurement(monkeypatch):
    """Of the layer-parallel network, and of a serial form."""
    how = dict(device="cpu", repeats=1, deadline=float("inf"), exact=False, backend="eager")
    parallel = gpu_layers._parallel

    def wrong(problem, *args):
        problem.blocks = [block.requires_grad_() for block in problem.blocks[::-1]]
        return parallel(problem, *args)

    monkeypatch.setattr(gpu_layers, "_parallel", wrong)
    with pytest.raises(ArithmeticError, match="m = 4, 2 \\+ 1: gradient error"):
        measure(SMALL[0], **how)
    monkeypatch.setattr(gpu_layers, "_parallel", parallel)
    monkeypatch.setitem(gpu_layers.LIMITS, "exact", -1.0)
    with pytest.raises(ArithmeticError, match="eager: gradient error"):
        measure(SMALL[0], **how)


def test_the_budget_interrupts_what_takes_longer(monkeypatch):
    """A case that would sleep for a minute; the one before it is whole, the one after it is named."""
    said = []

    def slow(case, *, into, **how):
        into.serial["eager"] = 2.0
        if case is SMALL[1]:
            try:
                time.sleep(60)
            except Exception:  # what an interrupted compilation might do
                time.sleep(60)
        return into

    monkeypatch.setattr(gpu_layers, "measure", slow)
    start = time.perf_counter()
    found = run(tuple(SMALL), said.append, device="cpu", budget=0.3, repeats=1)
    assert time.perf_counter() - start < 10
    assert [r.case for r in found] == [str(SMALL[0]), str(SMALL[1])]
    assert not found[0].notes
    assert found[1].notes == ["stopped by the budget of 0.3 s"]
    assert said[-1] == f"{SMALL[2]}: not measured, the budget of 0.3 s is spent"


def test_no_time_left_keeps_what_was_measured():
    found = measure(SMALL[0], device="cpu", repeats=5, deadline=0.0, exact=False)
    assert found.parallel
    assert found.notes == [f"{form} loop: no time left" for form in ("eager", "stacked", "compiled")]
    assert found.ratio is None


def test_program(monkeypatch, capsys, tmp_path):
    """Skipped without a GPU; on a CPU a table and a file; the budget is under four minutes."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([]) == 0
    assert capsys.readouterr().out.startswith("skipped: there is no GPU")
    out = tmp_path / "gpu.json"
    small = ["--device", "cpu", "--tiny", "--kinds", "dense", "--repeats", "1", "--backend", "eager"]
    assert main([*small, "--out", str(out)]) == 0
    (result,) = json.loads(out.read_text())["results"]
    assert result["ratio"] > 0
    assert result["case"] in capsys.readouterr().out
    assert BUDGET < 240
    assert {case.depth for case in CASES} == {1024, 4096}
    assert {case.width for case in CASES} == {8, 64}
    assert str(Result("a").ratio) == "None"


def test_attention_is_that_of_torch():
    """Products and a softmax, and torch's fused function."""
    torch.manual_seed(0)
    block, fused = ParallelAttentionBlock(8), ParallelAttentionBlock(8, fused=True)
    fused.load_state_dict(block.state_dict())
    u = torch.randn(2, 5, 8)
    assert torch.allclose(block(u), fused(u), rtol=1e-5, atol=1e-6)


def test_problems_that_are_refused():
    with pytest.raises(InputError, match="give one of"):
        block_problem("recurrent", 4, 8)
    with pytest.raises(InputError, match="multiple of 4"):
        block_problem("conv", 4, 6)
    before = torch.get_rng_state()
    a, b = (block_problem("conv", 2, 4, seed=3) for _ in range(2))
    assert torch.equal(a.blocks[1].first.weight, b.blocks[1].first.weight)
    assert not torch.equal(a.blocks[0].first.weight, a.blocks[1].first.weight)
    assert torch.equal(before, torch.get_rng_state())

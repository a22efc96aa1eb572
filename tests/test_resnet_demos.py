"""The demos of networks run from a command line, stop and go on, and agree with their serial copies."""

import json
import sys

import pytest

pytest.importorskip("torch", reason="pint_fem.resnet needs torch (pip install 'pint_fem[resnet]')")

import torch
from mpi4py import MPI

from demos import network_training, resnet_mnist, resnet_peaks, transformer_text
from demos.network_blocks import AttentionBlock, CharacterEmbedding, CharacterLogits, ConvolutionBlock, normalisation
from demos.network_training import learning_rate
from pint_fem.errors import InputError
from tests.mnist_files import small_mnist
from tests.pictures import assert_drawn


def demo(monkeypatch, main, *arguments):
    """Run a demo in this process, on all ranks."""
    monkeypatch.setattr(sys, "argv", ["demo", *map(str, arguments)])
    main()


@pytest.mark.parallel([1, 3])
def test_demo_of_peaks(tmp_path, monkeypatch, capsys):
    """Curves, picture and summary; beside the serial copy."""
    out, ranks = MPI.COMM_WORLD.bcast(tmp_path), MPI.COMM_WORLD.size
    small = ["--layers", 8, "--coarsening", 2, "--samples", 200, "--epochs", 2, "--batch", 50, "--classes", 2]
    demo(monkeypatch, resnet_peaks.main, *small, "--out", out, "--grid", f"1x{ranks}", "--compare-serial")
    if MPI.COMM_WORLD.rank == 0:
        summary = json.loads((out / "summary.json").read_text())
        assert summary["grid"] == {"data": 1, "layers": ranks}
        assert len(summary["curve"]) == len(summary["serial"]["curve"]) == 2
        assert summary["curve"][-1]["loss"] == pytest.approx(summary["serial"]["curve"][-1]["loss"], rel=0.02)
        printed = capsys.readouterr().out
        assert "serial torch" in printed
        written, after = printed.splitlines()[-2:]
        assert written.startswith(f"written: {out}: checkpoint/ (")
        assert written.endswith("curves.png, peaks.png, summary.json")
        assert after.startswith("next: open peaks.png")
        for name in ("peaks.png", "curves.png"):
            assert_drawn(out / name, panels=2)


@pytest.mark.parallel([1, 3])
def test_demo_of_mnist_goes_on_from_its_checkpoint(tmp_path, monkeypatch, capsys):
    """An epoch and one more from the checkpoint, then a network half as deep first; without data: what to do."""
    folder = MPI.COMM_WORLD.bcast(tmp_path)
    with pytest.raises(InputError, match="make mnist"):
        demo(monkeypatch, resnet_mnist.main, "--data", folder / "nowhere", "--out", folder)
    if MPI.COMM_WORLD.rank == 0:
        small_mnist(folder)
    MPI.COMM_WORLD.Barrier()
    small = ["--data", folder, "--network", "single", "--layers", 8, "--channels", 2, "--batch", 20]
    small += ["--out", folder / "out"]
    demo(monkeypatch, resnet_mnist.main, *small, "--epochs", 1)
    demo(monkeypatch, resnet_mnist.main, *small, "--epochs", 2)
    how = ["--multilevel", 2, "--mode", "adaptive", "--smoothness", 1e-4]
    demo(monkeypatch, resnet_mnist.main, *small, "--epochs", 1, *how)
    if MPI.COMM_WORLD.rank == 0:
        assert "going on after epoch 1" in capsys.readouterr().out
        assert [depth for depth, _ in json.loads((folder / "out" / "summary.json").read_text())["levels"]] == [4, 8]


def interrupted_run(monkeypatch, main, *arguments):
    """A run that stops after its first checkpoint, in the evaluation of the second epoch."""
    count, evaluate = [], network_training.accuracy

    def accuracy(*args, **kwargs):
        count.append(1)
        if len(count) == 2:
            raise RuntimeError("interrupted")
        return evaluate(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(network_training, "accuracy", accuracy)
        with pytest.raises(RuntimeError, match="interrupted"):
            demo(patch, main, *arguments)


def run_twice(monkeypatch, main, folder, *small):
    """Summaries, on the first rank, of a run beside its serial copy and of one that is interrupted and goes on."""
    demo(monkeypatch, main, *small, "--out", folder / "whole", "--compare-serial")
    interrupted_run(monkeypatch, main, *small, "--out", folder / "parts")
    demo(monkeypatch, main, *small, "--out", folder / "parts")
    if MPI.COMM_WORLD.rank:
        return None
    return [json.loads((folder / name / "summary.json").read_text()) for name in ("whole", "parts")]


@pytest.mark.parallel([1, 2])
def test_three_stages_are_the_serial_network(tmp_path, monkeypatch, capsys):
    """Sweeps to the tolerance of float32: the losses of all batches are those of plain torch, also of a run that has
    been interrupted; statistics of BatchNorm go on, too.
    """
    folder, ranks = MPI.COMM_WORLD.bcast(tmp_path), MPI.COMM_WORLD.size
    if MPI.COMM_WORLD.rank == 0:
        small_mnist(folder)
    MPI.COMM_WORLD.Barrier()
    small = ["--data", folder, "--layers", 8, "--channels", 2, "--batch", 20, "--epochs", 2]
    found = run_twice(monkeypatch, resnet_mnist.main, folder, *small, "--mode", "exact", "--grid", f"1x{ranks}")
    if MPI.COMM_WORLD.rank == 0:
        whole, parts = found
        assert len(whole["losses"]) == 6
        assert whole["losses"] == pytest.approx(whole["serial"]["losses"], rel=1e-4)
        assert whole["serial"]["gap_in_points"] == pytest.approx(0, abs=5.1)  # one of 20 images
        assert parts["losses"] == pytest.approx(whole["losses"], rel=1e-6)
        assert len(whole["adaptive"]) == 3
        assert "going on after epoch 1" in capsys.readouterr().out
        assert_drawn(folder / "whole" / "curves.png", panels=2)


@pytest.mark.parallel([1, 2])
def test_stages_grow_in_depth(tmp_path, monkeypatch):
    """A block in each stage for each rank, then twice as many, which begin with a smaller loss; with regularisation."""
    folder, ranks = MPI.COMM_WORLD.bcast(tmp_path), MPI.COMM_WORLD.size
    if MPI.COMM_WORLD.rank == 0:
        small_mnist(folder)
    MPI.COMM_WORLD.Barrier()
    small = ["--data", folder, "--layers", 6 * ranks, "--channels", 2, "--batch", 20, "--epochs", 2, "--norm", "group"]
    how = ["--multilevel", 2, "--smoothness", 1e-4, "--tikhonov", 1e-4, "--mode", "serial"]
    demo(monkeypatch, resnet_mnist.main, *small, *how, "--out", folder / "out")
    if MPI.COMM_WORLD.rank == 0:
        (shallow, first), (deep, second) = json.loads((folder / "out" / "summary.json").read_text())["levels"]
        assert (shallow, deep) == (3 * ranks, 6 * ranks)
        assert second[0]["loss"] < first[0]["loss"]


def test_depth_is_distributed_over_the_stages(monkeypatch):
    """The first stages get a block more; channels are doubled while images are halved."""
    monkeypatch.setattr(sys, "argv", ["demo", "--layers", "8", "--channels", "3"])
    parts = resnet_mnist.staged_network(resnet_mnist.arguments(), 28, 8)
    assert [len(stage) for stage in parts["blocks"]] == [3, 3, 2]
    assert parts["h"] == pytest.approx(2 / 3)
    u = parts["opening"](torch.zeros(1, 1, 28, 28))
    shapes = [tuple(u.shape[1:])]
    for transition in parts["transitions"]:
        u = transition(u)
        shapes.append(tuple(u.shape[1:]))
    assert shapes == [(3, 14, 14), (6, 7, 7), (12, 4, 4)]
    assert parts["closing"](u).shape == (1, 10)


@pytest.mark.parametrize(
    ("program", "wrong", "match"),
    [
        (resnet_mnist, ["--layers", 2], "at least 3"),
        (resnet_mnist, ["--activation", "tanh"], "--network single"),
        (resnet_mnist, ["--layers", 9, "--multilevel", 2], "a multiple of 6"),
        (transformer_text, ["--steps", 7, "--every", 2], "multiple of --every 2"),
        (transformer_text, ["--width", 10, "--heads", 4], "multiple of --heads 4"),
        (transformer_text, ["--dropout", 1], "a share below 1"),
        (transformer_text, ["--text", "no-such-file"], "no-such-file"),
    ],
)
def test_options_that_do_not_fit_are_refused(tmp_path, monkeypatch, program, wrong, match):
    with pytest.raises(InputError, match=match):
        demo(monkeypatch, program.main, *wrong, "--out", tmp_path)


@pytest.mark.parallel([1, 2])
def test_transformer_is_the_serial_network(tmp_path, monkeypatch, capsys):
    """Sweeps to the tolerance of float32: the losses with dropout are those of plain torch; texts before and after."""
    folder, ranks = MPI.COMM_WORLD.bcast(tmp_path), MPI.COMM_WORLD.size
    small = ["--blocks", 6, "--width", 8, "--heads", 2, "--length", 12, "--batch", 3, "--steps", 6, "--every", 2]
    small += ["--sample", 15, "--coarsening", 2, "--mode", "exact", "--grid", f"1x{ranks}"]
    text = folder / "text.txt"
    if MPI.COMM_WORLD.rank == 0:
        text.write_text(30 * "to be, or not to be: that is the question\n")
    found = run_twice(monkeypatch, transformer_text.main, folder, *small, "--text", text)
    if MPI.COMM_WORLD.rank == 0:
        whole, parts = found
        assert len(whole["losses"]) == 6
        assert whole["losses"] == pytest.approx(whole["serial"]["losses"], rel=1e-4)
        assert parts["losses"] == pytest.approx(whole["losses"], rel=1e-6)
        assert "going on after epoch 1" in capsys.readouterr().out
        for sample in whole["samples"].values():
            assert sample.startswith("to be, or not to")
            assert len(sample) == 16 + 15
            assert set(sample) <= set(text.read_text())
        assert whole["samples"]["after"] in (folder / "whole" / "samples.txt").read_text()
        assert_drawn(folder / "whole" / "curves.png", panels=2)


def test_attention_does_not_see_what_comes_later():
    """The logits up to a place are the same whatever follows; the blocks together begin with the size of the state."""
    torch.manual_seed(0)
    depth = 16
    blocks = [AttentionBlock(8, 2, depth, 0.0) for _ in range(depth)]
    opening, closing = CharacterEmbedding(5, 12, 8, 0.0), CharacterLogits(5, 8)
    codes = torch.randint(5, (4, 10))
    u = first = opening(codes)
    for block in blocks:
        u = block(u)
    logits = closing(u)
    assert logits.shape == (4, 5, 10)
    assert 0.05 < float(((u - first).norm() / first.norm()).detach()) < 2
    other = codes.clone()
    other[:, 6:] = (other[:, 6:] + 1) % 5
    v = opening(other)
    for block in blocks:
        v = block(v)
    changed = closing(v) - logits
    assert changed[:, :, :6].abs().max() < 1e-6
    assert changed[:, :, 6:].abs().amax(dim=(0, 1)).min() > 1e-3


def test_normalisation_of_the_blocks():
    """Groups divide the channels; a block of zero convolutions changes nothing."""
    assert [normalisation("group", c).num_groups for c in (1, 2, 6, 8, 9, 12)] == [1, 2, 2, 4, 1, 4]
    assert isinstance(normalisation("batch", 3), torch.nn.BatchNorm2d)
    block = ConvolutionBlock(3)
    torch.nn.init.zeros_(block.conv2.weight)
    assert torch.equal(block(torch.randn(2, 3, 5, 5)), torch.zeros(2, 3, 5, 5))


def test_steps_of_the_optimiser():
    """Corners of the schedules, and torch's own one-cycle rule of so many steps that its rounding does not count."""
    cycle = lambda done: learning_rate("one-cycle", 0.5, done, 4)
    assert [cycle(t) for t in (0, 0.5, 1, 2.5, 4)] == pytest.approx([0.02, 0.26, 0.5, 0.25, 0])
    wave = lambda done: learning_rate("cosine", 0.5, done, 4)
    assert [wave(t) for t in (0, 0.9, 1, 2, 3.999)] == pytest.approx([0.5, 0.5, 0.25 * (1 + 0.5**0.5), 0.25, 0.0732233])
    steps = 4000
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    rule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.5, total_steps=steps + 1, pct_start=0.25, final_div_factor=1e9
    )
    for step in range(steps):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(cycle(4 * step / steps), abs=5e-4)
        optimizer.step()
        rule.step()


def test_full_batch_demo(tmp_path, monkeypatch, capsys):
    """The package's own optimiser from the command line."""
    small = ["--layers", 8, "--coarsening", 2, "--samples", 60, "--max-iterations", 3, "--classes", 2, "--width", 4]
    demo(monkeypatch, resnet_peaks.main, *small, "--optimizer", "lbfgs", "--out", tmp_path)
    assert "residual factors" in capsys.readouterr().out

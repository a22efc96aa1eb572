"""Data sets are read or refused with a reason; the demos run from a command line, stop and go on."""

import gzip
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="pint_fem.resnet needs torch (pip install 'pint_fem[resnet]')")

import torch
from mpi4py import MPI
from torch import nn

from demos import resnet_mnist, resnet_peaks
from pint_fem.errors import InputError
from pint_fem.resnet import Dense, Grid, LayerParallelResNet
from problems.classification import (
    digits,
    mnist,
    peaks,
    peaks_class,
    peaks_function,
    read_idx,
    shared_loader,
)
from tests.limits import time_limit
from tests.pictures import assert_drawn

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def write_idx(path, values):
    """Unsigned bytes as an IDX file, compressed if the name ends with ``.gz``."""
    values = np.ascontiguousarray(values, dtype="u1")
    raw = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape) + values.tobytes()
    path.write_bytes(gzip.compress(raw) if path.name.endswith(".gz") else raw)


def small_mnist(folder, *, end="", size=12):
    """Four files of MNIST's kind: the images' mean brightness tells the label."""
    rng = np.random.default_rng(0)
    for images, labels, count in ((*NAMES[:2], 60), (*NAMES[2:], 20)):
        y = np.arange(count) % 10
        x = np.clip(25 * y[:, None, None] + rng.integers(0, 25, (count, size, size)), 0, 255)
        write_idx(folder / (images + end), x)
        write_idx(folder / (labels + end), y)
    return folder


@pytest.mark.parametrize("end", ["", ".gz"])
def test_mnist_raw_or_compressed(tmp_path, end):
    data, test = mnist(small_mnist(tmp_path, end=end)), mnist(tmp_path, "test", count=7)
    assert data.tensors[0].shape == (60, 1, 12, 12)
    assert data.tensors[0].dtype == torch.float32
    assert len(test) == 7
    raw = read_idx(tmp_path / (NAMES[0] + end))
    assert np.allclose(data.tensors[0][:, 0].numpy() * 0.3081 + 0.1307, raw / 255, atol=1e-6)
    assert data.tensors[1].tolist() == [n % 10 for n in range(60)]


def test_idx_of_other_types(tmp_path):
    """Big-endian numbers are turned round."""
    values = np.arange(-3, 3, dtype=">i4").reshape(2, 3)
    (tmp_path / "x").write_bytes(bytes([0, 0, 0x0C, 2, 0, 0, 0, 2, 0, 0, 0, 3]) + values.tobytes())
    assert np.array_equal(read_idx(tmp_path / "x"), values)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "no IDX file"),
        (b"<html>", "no IDX file"),
        (bytes([0, 0, 8, 3, 0, 0]), "ends within its header"),
        (bytes([0, 0, 8, 1, 0, 0, 0, 9, 1, 2]), r"\(9,\) values of 1 bytes \(9\), has 2"),
        (bytes([0, 0, 8, 2, 255, 255, 255, 255, 255, 255, 255, 255]), "has 0"),
        (gzip.compress(bytes([0, 0, 8, 1, 0, 0, 0, 1, 7]), mtime=0)[:-6], "cannot be read|damaged"),
    ],
)
def test_damaged_files_are_refused(tmp_path, content, match):
    (tmp_path / "f").write_bytes(content)
    with pytest.raises(InputError, match=match):
        read_idx(tmp_path / "f")


def test_absent_and_mixed_up_files(tmp_path):
    with pytest.raises(InputError, match="make mnist"):
        mnist(tmp_path)
    small_mnist(tmp_path)
    write_idx(tmp_path / NAMES[1], np.arange(10))
    with pytest.raises(InputError, match="do not fit"):
        mnist(tmp_path)
    write_idx(tmp_path / NAMES[1], np.arange(60))
    with pytest.raises(InputError, match="a label is 59"):
        mnist(tmp_path)


def test_peaks_is_its_formula():
    """Known extrema of MATLAB's peaks, and balanced classes on the right side of their thresholds."""
    assert peaks_function(-0.0093, 1.5814) == pytest.approx(8.1062, abs=1e-4)
    assert peaks_function(0.2283, -1.6255) == pytest.approx(-6.5511, abs=1e-4)
    for classes in (2, 5):
        points, labels = (t.numpy() for t in peaks(203, classes).tensors)
        assert np.ptp(np.bincount(labels, minlength=classes)) <= 1
        assert np.array_equal(peaks_class(points, classes), labels)
        assert np.abs(points).max() <= 3
    value = peaks_function(*peaks(50, 2).tensors[0].numpy().T)
    assert np.array_equal(value > 0, peaks(50, 2).tensors[1].numpy() == 1)
    with pytest.raises(InputError, match="2 or 5"):
        peaks(10, 3)


def test_digits_are_split():
    pytest.importorskip("sklearn", reason="the small digits are scikit-learn's")
    data, test = digits("train"), digits("test")
    assert (len(data), len(test)) == (1437, 360)
    assert data.tensors[0].shape[1:] == (1, 8, 8)
    assert abs(float(data.tensors[0].mean())) < 0.01


@pytest.mark.parallel([1, 4])
def test_groups_share_the_samples():
    """Ranks with the same layers' neighbours see the same batches; groups see each sample once."""
    comm = MPI.COMM_WORLD
    grid = Grid((2, 2) if comm.size == 4 else (1, 1))
    data = torch.utils.data.TensorDataset(torch.arange(24))
    loader = shared_loader(data, 5, grid, seed=2)
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        seen = [n for (x,) in loader for n in x.tolist()]
        assert len(set(map(tuple, grid.layer_comm.allgather(seen)))) == 1
        assert sorted(n for part in grid.data_comm.allgather(seen) for n in part) == list(range(24))


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
        assert "serial torch" in capsys.readouterr().out
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
    small = ["--data", folder, "--layers", 8, "--channels", 2, "--batch", 20, "--out", folder / "out"]
    demo(monkeypatch, resnet_mnist.main, *small, "--epochs", 1)
    demo(monkeypatch, resnet_mnist.main, *small, "--epochs", 2)
    how = ["--multilevel", 2, "--mode", "adaptive", "--smoothness", 1e-4]
    demo(monkeypatch, resnet_mnist.main, *small, "--epochs", 1, *how)
    if MPI.COMM_WORLD.rank == 0:
        assert "going on after epoch 1" in capsys.readouterr().out
        assert [depth for depth, _ in json.loads((folder / "out" / "summary.json").read_text())["levels"]] == [4, 8]


def test_full_batch_demo(tmp_path, monkeypatch, capsys):
    """The package's own optimiser from the command line."""
    small = ["--layers", 8, "--coarsening", 2, "--samples", 60, "--max-iterations", 3, "--classes", 2, "--width", 4]
    demo(monkeypatch, resnet_peaks.main, *small, "--optimizer", "lbfgs", "--out", tmp_path)
    assert "residual factors" in capsys.readouterr().out


def test_imports_without_firedrake_and_without_torch():
    """pint_fem.resnet leaves Firedrake alone, pint_fem and its MGRIT core leave torch alone."""
    code = "import sys, pint_fem.resnet, problems.classification; sys.exit('firedrake' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)
    block = "import sys; sys.modules['torch'] = None\n"
    code = block + "import pint_fem, pint_fem.mgrit, pint_fem.optimize, pint_fem.cli\ntry:\n import pint_fem.resnet\n"
    code += "except ImportError as e:\n assert 'pint_fem[resnet]' in str(e), e\nelse:\n sys.exit(1)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


@pytest.mark.parallel([1, 3])
@time_limit(30)
def test_sizes_that_cannot_fit_are_refused():
    """Before anything is allocated: 2 (10^6)^2 numbers of 4 bytes a layer are 8 TB, 10^12 points 100 TB."""
    ends = nn.Linear(2, 4), nn.Linear(4, 2)
    for layer, count in ((Dense(4), 10**12), (Dense(10**6), 8)):
        with pytest.raises(InputError, match=rf"parameters and gradients of {count} layers need at least .* TB"):
            LayerParallelResNet(ends[0], layer, count, ends[1], mgrit={"coarsening": 2})
    with pytest.raises(InputError, match=r"1000000000000 points of peaks need at least 100 TB"):
        peaks(10**12)


def test_a_fifo_is_no_data(tmp_path):
    """Reading it would block."""
    os.mkfifo(tmp_path / "images")
    with time_limit(30), pytest.raises(InputError, match="images is a FIFO"):
        read_idx(tmp_path / "images")

"""Data sets are read or refused with a reason; training loops refuse batches that differ."""

import gzip
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="pint_fem.resnet needs torch (pip install 'pint_fem[resnet]')")

import torch
from mpi4py import MPI
from torch import nn

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
from tests.mnist_files import NAMES, small_mnist, write_idx

ROOT = Path(__file__).resolve().parent.parent


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

"""Classification data: MNIST from its IDX files, "peaks" from its formula, the small digits of scikit-learn."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import torch
from mpi4py import MPI
from torch.utils.data import DataLoader, Dataset, DistributedSampler, TensorDataset

from pint_fem import files
from pint_fem.capacity import require_memory
from pint_fem.errors import InputError
from pint_fem.resnet.grid import Grid

__all__ = ["digits", "mnist", "peaks", "peaks_function", "read_idx", "shared_loader"]

_TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_MNIST = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
_LARGEST = 2**31


def read_idx(path: str | Path) -> np.ndarray:
    """Read an IDX file (the format of MNIST), compressed by gzip or not.

    The file begins with two zero bytes, a byte for the type and one for the number of dimensions, the dimensions as
    big-endian 32-bit numbers, then the values (Y. LeCun, C. Cortes, C. J. C. Burges).

    Raises
    ------
    InputError
        Naming the file, where it cannot be read, is no IDX file, or its size is not that of its header.
    """
    path = Path(path)
    files.require_regular(path, "IDX file", links=True)
    try:
        raw = path.read_bytes()
        if raw[:2] == b"\x1f\x8b":
            raw = gzip.decompress(raw)
    except (OSError, EOFError, gzip.BadGzipFile) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    except Exception as error:  # zlib's own
        raise InputError(f"{path}: damaged: {error}") from error
    if len(raw) < 4 or raw[:2] != b"\x00\x00" or raw[2] not in _TYPES or not 1 <= raw[3] <= 8:
        raise InputError(f"{path}: no IDX file: it begins with {raw[:4].hex(' ')}; give one of MNIST's, raw or gzipped")
    ndim = raw[3]
    if len(raw) < 4 + 4 * ndim:
        raise InputError(f"{path}: ends within its header")
    shape = struct.unpack(f">{ndim}I", raw[4 : 4 + 4 * ndim])
    kind, size = np.dtype(_TYPES[raw[2]]), int(np.prod(shape, dtype=object))
    if size > _LARGEST or len(raw) != 4 + 4 * ndim + size * kind.itemsize:
        given, needed = len(raw) - 4 - 4 * ndim, size * kind.itemsize
        raise InputError(f"{path}: declares {shape} values of {kind.itemsize} bytes ({needed}), has {given}")
    values = np.frombuffer(raw, kind, offset=4 + 4 * ndim).reshape(shape)
    return values.astype(kind.newbyteorder("="))


def _find(folder: Path, name: str) -> Path:
    """A file of MNIST under one of the names in use."""
    spellings = [name, name.replace("-idx", ".idx")]
    for spelling in [s + end for s in spellings for end in ("", ".gz")]:
        if (folder / spelling).is_file():
            return folder / spelling
    raise InputError(
        f"{folder}: no {name} or {name}.gz there; 'make mnist' fetches MNIST into data/mnist, or name its folder"
    )


def mnist(folder: str | Path, part: str = "train", *, count: int | None = None) -> TensorDataset:
    """The handwritten digits of MNIST.

    Parameters
    ----------
    folder
        Of the standard IDX files, raw or gzipped.
    part
        ``"train"`` (60,000 images) or ``"test"`` (10,000).
    count
        Number of images, the first ones; default: all.

    Returns
    -------
    TensorDataset
        Images ``(n, 1, 28, 28)``, float32, with mean 0 and deviation 1 over the training set, and labels 0 to 9.

    Raises
    ------
    InputError
        Where a file is absent or damaged, or images and labels do not fit each other.
    """
    if part not in _MNIST:
        raise InputError(f"part {part!r} of MNIST: give 'train' or 'test'")
    paths = [_find(Path(folder), name) for name in _MNIST[part]]
    images, labels = map(read_idx, paths)
    if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels) or not len(images):
        raise InputError(f"{paths[0]}: images {images.shape} and labels {labels.shape} do not fit each other")
    if labels.max() > 9:
        raise InputError(f"{paths[1]}: a label is {labels.max()}: MNIST's are 0 to 9")
    images, labels = images[:count], labels[:count]
    x = (torch.from_numpy(images.astype(np.float32)).unsqueeze(1) / 255 - 0.1307) / 0.3081
    return TensorDataset(x, torch.from_numpy(labels.astype(np.int64)))


def digits(part: str = "train") -> TensorDataset:
    """The 1,797 small digits of scikit-learn: ``"test"`` for every fifth image, ``"train"`` for the others.

    Images are ``(n, 1, 8, 8)``, float32, with mean 0 and deviation about 1, labels 0 to 9.

    Raises
    ------
    InputError
        Where scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise InputError("the small digits are scikit-learn's: pip install scikit-learn") from None
    data = load_digits()
    test = np.arange(len(data.target)) % 5 == 0
    chosen = test if part == "test" else ~test
    x = torch.from_numpy((data.images[chosen].astype(np.float32) - 4.88) / 6.02).unsqueeze(1)
    return TensorDataset(x, torch.from_numpy(data.target[chosen].astype(np.int64)))


def peaks_function(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    r"""MATLAB's peaks, :math:`3 (1-x)^2 e^{-x^2-(y+1)^2} - 10 (x/5 - x^3 - y^5) e^{-x^2-y^2} - e^{-(x+1)^2-y^2}/3`."""
    return (
        3 * (1 - x) ** 2 * np.exp(-(x**2) - (y + 1) ** 2)
        - 10 * (x / 5 - x**3 - y**5) * np.exp(-(x**2) - y**2)
        - np.exp(-((x + 1) ** 2) - y**2) / 3
    )


_THRESHOLDS = {2: (0.0,), 5: (-1.5, -0.3, 0.3, 1.5)}


def peaks(count: int, classes: int = 5, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> TensorDataset:
    """Random points in ``[-3, 3]^2``, classified by the value of :func:`peaks_function`.

    Five classes (Haber and Ruthotto, arXiv:1705.03341) are bounded by the values -1.5, -0.3, 0.3 and 1.5, two by 0.

    Parameters
    ----------
    count
        Number of points, distributed evenly over the classes, at least one in each.
    classes
        2 or 5.
    seed, dtype
        Of the random points ``(count, 2)``.

    Raises
    ------
    InputError
        On another number of classes, or too few points.
    """
    if classes not in _THRESHOLDS:
        raise InputError(f"peaks with {classes!r} classes: give 2 or 5")
    if not isinstance(count, int) or count < classes:
        raise InputError(f"{count!r} points of peaks: give a whole number, at least {classes}")
    require_memory(MPI.COMM_SELF, 100 * count, f"{count} points of peaks", "give fewer")
    rng = np.random.default_rng(seed)
    sizes = np.bincount(np.arange(count) % classes, minlength=classes)
    found = [np.empty((0, 2)) for _ in range(classes)]
    while any(len(f) < n for f, n in zip(found, sizes, strict=True)):
        points = rng.uniform(-3, 3, (4 * count, 2))
        label = peaks_class(points, classes)
        found = [np.concatenate([f, points[label == c]]) for c, f in enumerate(found)]
    points = np.concatenate([f[:n] for f, n in zip(found, sizes, strict=True)])
    order = rng.permutation(count)
    labels = np.repeat(np.arange(classes), sizes)[order]
    return TensorDataset(torch.from_numpy(points[order]).to(dtype), torch.from_numpy(labels))


def peaks_class(points: np.ndarray, classes: int = 5) -> np.ndarray:
    """Classes ``(n,)`` of points ``(n, 2)``, by the value of :func:`peaks_function`."""
    return np.digitize(peaks_function(points[:, 0], points[:, 1]), _THRESHOLDS[classes])


def shared_loader(data: Dataset, batch_size: int, grid: Grid, *, shuffle: bool = True, seed: int = 0) -> DataLoader:
    """A ``DataLoader`` with the same batches on ranks that share the layers, and other samples for each data group.

    Parameters
    ----------
    data
        The whole set, on every rank.
    batch_size
        Of a group.
    grid
        The process grid.
    shuffle, seed
        Shuffle by the seed and the number of the epoch: call ``loader.sampler.set_epoch(epoch)``.
    """
    comm = grid.data_comm
    sampler = DistributedSampler(data, comm.size, comm.rank, shuffle=shuffle, seed=seed, drop_last=False)
    return DataLoader(data, batch_size=batch_size, sampler=sampler)

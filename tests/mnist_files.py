"""Small files of the kind of MNIST's."""

import gzip
import struct

import numpy as np

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

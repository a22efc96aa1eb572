"""What a picture in a file shows: that it is not blank, by its pixels."""

import numpy as np
from matplotlib.image import imread


def assert_drawn(path, *, panels: int = 1, colours: int = 20):
    """At least so many panels, each with text or a frame and something in colour, and so many colours in all.

    A panel is a range of columns; what is blank has white pixels only, what is empty no pixel in colour.
    """
    pixels = np.rint(255 * imread(path)[..., :3]) if path.suffix == ".png" else imread(path)[..., :3].astype(float)
    assert min(pixels.shape[:2]) > 200
    coloured = np.ptp(pixels, axis=2) > 40
    dark = pixels.max(axis=2) < 100
    for columns in np.array_split(np.arange(pixels.shape[1]), panels):
        assert dark[:, columns].mean() > 1e-3, f"{path}: no axes, no text"
        assert coloured[:, columns].mean() > 1e-3, f"{path}: nothing is drawn"
    assert len(np.unique(pixels[::2, ::2].reshape(-1, 3), axis=0)) >= colours, f"{path}: hardly any colours"

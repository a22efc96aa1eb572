"""What the pictures of the site share: the style of the demos on a light or on a dark page, and one way of saving."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

from demos.style import POSITIVE, SIGNED, Theme

__all__ = ["POSITIVE", "SIGNED", "Theme", "plt", "save"]


def save(fig, path):
    """Write a figure by the ending of its path, with the same bytes each time, and close it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"Date": None, "Creator": None} if path.suffix == ".svg" else None
    fig.savefig(path, dpi=150, metadata=metadata)
    plt.close(fig)

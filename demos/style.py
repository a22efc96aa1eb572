"""One style for all pictures: a palette that is safe for colour-blind readers, with light and dark surroundings.

The colours are those of Okabe and Ito (https://jfly.uni-koeln.de/color); they differ in lightness as well as in hue, so
that they are told apart in grey, too. Signed fields have the map :data:`SIGNED`, positive ones :data:`POSITIVE`, whose
lightness is monotone.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import matplotlib as mpl

__all__ = ["COLOURS", "POSITIVE", "SIGNED", "Theme", "use"]

SIGNED, POSITIVE = "RdBu_r", "viridis"
"""Colour maps of fields with both signs and of positive fields."""
COLOURS = {
    "light": {
        "blue": "#0072B2",
        "orange": "#D55E00",
        "green": "#009E73",
        "purple": "#AA4499",
        "yellow": "#C99700",
        "sky": "#56B4E9",
        "wine": "#882255",
        "grey": "#6E7781",
    },
    "dark": {
        "blue": "#56B4E9",
        "orange": "#F28E2B",
        "green": "#2CC5A0",
        "purple": "#DF8FBE",
        "yellow": "#F0E442",
        "sky": "#9AD0F5",
        "wine": "#FF9DA7",
        "grey": "#A5ADB7",
    },
}
"""The palette on a light and on a dark page, in the order in which lines take it."""
_TEXT = {"light": "#1f2328", "dark": "#e6edf3"}
_GRID = {"light": "#d0d7de", "dark": "#3d444d"}
_PAGE = {"light": "#ffffff", "dark": "#14181e"}


class Theme:
    """Colours and settings of pictures on a light or on a dark page.

    Parameters
    ----------
    dark
        Whether the page is dark.

    Attributes
    ----------
    blue, orange, green, purple, yellow, sky : str
        The palette.
    text, grid, page : str
        Colours of text and axes, of grids, and of the page.
    """

    def __init__(self, dark: bool = False):
        name = "dark" if dark else "light"
        self.dark = dark
        self._palette = COLOURS[name]
        self.blue, self.orange, self.green, self.purple, self.yellow, self.sky, *_ = self._palette.values()
        self.text, self.grid, self.page = _TEXT[name], _GRID[name], _PAGE[name]

    def settings(self) -> dict[str, Any]:
        """Settings of matplotlib."""
        return {
            "axes.prop_cycle": mpl.cycler(color=list(self._palette.values())),
            "axes.edgecolor": self.text,
            "axes.facecolor": "none",
            "axes.labelcolor": self.text,
            "axes.spines.right": False,
            "axes.spines.top": False,
            "axes.titlecolor": self.text,
            "axes.titlelocation": "left",
            "axes.titlesize": 11,
            "figure.facecolor": "none",
            "font.size": 10,
            "grid.color": self.grid,
            "legend.frameon": False,
            "legend.labelcolor": self.text,
            "savefig.facecolor": "none",
            "svg.hashsalt": "pint_fem",
            "text.color": self.text,
            "xtick.color": self.text,
            "ytick.color": self.text,
        }

    def used(self) -> AbstractContextManager[None]:
        """A context in which matplotlib draws with these settings."""
        return mpl.rc_context(self.settings())


def use() -> None:
    """Draw all that follows in this process for a light page, on white: files of the demos, and windows."""
    white = {name: "white" for name in ("axes.facecolor", "figure.facecolor", "savefig.facecolor")}
    mpl.rcParams.update(Theme().settings() | white | {"axes.titlelocation": "center"})

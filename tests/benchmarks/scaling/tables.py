"""Lines and tables on the screen and in a file."""

from __future__ import annotations

from collections.abc import Sequence

from pint_fem.cli import say as on_screen

__all__ = ["Text", "powers", "table"]


class Text:
    """Lines on the screen and in a file."""

    def __init__(self):
        self.lines: list[str] = []

    def __call__(self, line: str = "") -> None:
        """Say a line."""
        on_screen(line)
        self.lines.append(line)


def powers(largest: int) -> list[int]:
    """Powers of two up to a number."""
    out = [1]
    while 2 * out[-1] <= largest:
        out.append(2 * out[-1])
    return out


def table(say, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as they need; words to the left."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    left = {i for i in range(len(head)) if any(" " in row[i] for row in rows)}
    for row in [head, *rows]:
        say(
            "  "
            + "  ".join(
                x.ljust(w) if i in left else x.rjust(w) for i, (x, w) in enumerate(zip(row, widths, strict=True))
            )
        )

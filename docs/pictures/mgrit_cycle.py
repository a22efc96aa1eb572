"""A V-cycle and an F-cycle of MGRIT in space-time, by the steps that the solver takes."""

import style  # noqa: F401 (makes the demos importable)

from demos.draw_cycle import write


def draw(path, dark):
    """The figure of the solver's page."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, dark=dark)

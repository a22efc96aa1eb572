"""Options of the ParaDiag solver, checked when they are made."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

from pint_fem.mgrit.option_strings import parse_options
from pint_fem.mgrit.options import MGRITOptions

__all__ = ["SHARED", "ParaDiagOptions", "parse_paradiag_options"]

SHARED = (
    "rtol",
    "atol",
    "rtol_of",
    "time_norm",
    "dtol",
    "stagnation",
    "on_divergence",
    "monitor",
    "view",
    "trace",
)
"""Options that mean the same for MGRIT."""
_OWN = ("alpha", "max_it", "memory")


@dataclass(frozen=True)
class ParaDiagOptions(MGRITOptions):
    """Options of :class:`~pint_fem.paradiag.solver.ParaDiag`: its own, and those of MGRIT for stopping and showing.

    Parameters
    ----------
    alpha
        Between 0 and 1. An iteration contracts by ``alpha/(1 - alpha)``; its round-off is about ``1e-16/alpha``.
    memory
        Gigabytes of factors that a rank keeps; frequencies beyond them are factored anew at each solve.
    max_it
        Largest number of iterations.
    rtol, atol, rtol_of, time_norm, dtol, stagnation, on_divergence, monitor, view, trace
        See :class:`~pint_fem.mgrit.options.MGRITOptions`; norms are over all points.

    Raises
    ------
    ValueError
        On a value out of range, naming the option, what was given and what would do.
    """

    alpha: float = 1e-4
    memory: float = 4.0
    max_it: int = 20
    levels: int | None = 1
    residual: str = "full"

    def __post_init__(self):
        try:
            super().__post_init__()
        except ValueError as error:
            raise ValueError(_named(error)) from None
        for name, ends in (("alpha", (0, 1)), ("memory", (0, float("inf")))):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not ends[0] < value < ends[1]:
                wanted = "a number between 0 and 1, such as 1e-4" if name == "alpha" else "a positive number (of GB)"
                raise ValueError(f"paradiag {name} {value!r}: give {wanted}")

    @classmethod
    def make(cls, options: ParaDiagOptions | Mapping | None = None, **changes) -> ParaDiagOptions:
        """From options, a dictionary of them or nothing; an unknown name is refused with the nearest known one."""
        base = options if isinstance(options, cls) else cls()
        given = changes if options is base or options is None else {**options, **changes}
        known = (*_OWN, *SHARED)
        for name in given:
            if name not in known and not (name in ("levels", "start") and name in changes):
                near = difflib.get_close_matches(str(name), known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
                raise ValueError(f"unknown paradiag option {name!r}: {hint}")
        return super().make(base, **given)


def parse_paradiag_options(strings: Mapping[str, str]) -> dict:
    """Values of options given as strings, as in :func:`~pint_fem.mgrit.option_strings.parse_options`.

    Raises
    ------
    ValueError
        On a value that cannot be read, naming the option.
    """
    out = {}
    for name, text in strings.items():
        try:
            out |= {name: float(text)} if name in ("alpha", "memory") else parse_options({name: text})
        except (TypeError, ValueError) as error:
            own = f"paradiag {name} {text!r}: give a number"
            raise ValueError(own if name in ("alpha", "memory") else _named(error)) from None
    return out


def _named(error: Exception) -> str:
    return str(error).replace("mgrit ", "paradiag ", 1)

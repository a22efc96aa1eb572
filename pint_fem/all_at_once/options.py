"""Options for stopping and reporting that every solver of all time steps has, checked when they are made.

A solver's own options derive from :class:`SolverOptions`: they are made from dictionaries, where an unknown name is
refused with the nearest option, and from strings as PETSc's options database has them.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from math import inf
from typing import TYPE_CHECKING, Any, ClassVar, TypeGuard

from pint_fem.all_at_once.grids import is_integer

if TYPE_CHECKING:
    from typing import Self

__all__ = ["SHARED", "STARTS", "SolverOptions", "is_number", "unknown_option"]

STARTS = ("auto", "guess", "skip", "nested")
"""First guesses of a solve."""
_TRUE, _FALSE = ("", "1", "true", "yes", "on"), ("0", "false", "no", "off")


@dataclass(frozen=True)
class SolverOptions:
    """Options of a solver of all time steps for stopping and reporting.

    Parameters
    ----------
    rtol, rtol_of
        Stop when the residual is at most ``rtol`` times the norm of the ``"trajectory"``, or of the ``"first"``
        residual.
    atol
        Stop when the residual is at most ``atol``.
    time_norm
        1, 2 or ``"inf"`` over the points.
    dtol
        A residual ``dtol`` times the first one is divergence.
    stagnation
        A reduction per iteration slower than this factor, over the last five, is stagnation where at that rate the
        tolerance is out of reach; ``None``: continue.
    max_it
        Largest number of iterations.
    on_divergence
        ``"report"``, or ``"serial"``: step sequentially where iterations diverge, stagnate, fail or run out, and print
        a line about it.
    monitor
        Print one line per iteration on the first rank.
    view
        Print a description of the solver before the first solve.
    trace
        File for a Chrome trace of all solves, written by the solver's ``write_trace``; empty: none.

    Raises
    ------
    ValueError
        On a value out of range, naming the option, what was given and what would do.
    """

    rtol: float = 1e-8
    rtol_of: str = "trajectory"
    atol: float = 0.0
    time_norm: int | str = 2
    dtol: float = 1e4
    stagnation: float | None = 0.97
    max_it: int = 50
    on_divergence: str = "report"
    monitor: bool = False
    view: bool = False
    trace: str = ""

    # first guess, number of levels and points of the residual of solvers without such options; not annotated, as they
    # would count as options
    start, levels, residual = "auto", 1, "full"
    #: Name of the solver in messages.
    solver: ClassVar[str] = "solver"
    #: The values that an option may have.
    choices: ClassVar[dict[str, Sequence]] = {
        "rtol_of": ("trajectory", "first"),
        "time_norm": (1, 2, "inf"),
        "on_divergence": ("report", "serial"),
        "monitor": (False, True),
        "view": (False, True),
    }
    #: The least value of options that are whole numbers.
    counts: ClassVar[dict[str, int]] = {"max_it": 1}
    #: Options that are real numbers.
    numbers: ClassVar[Sequence[str]] = ("rtol", "atol", "dtol", "stagnation")
    #: Options that may be ``None``.
    optional: ClassVar[Sequence[str]] = ("stagnation",)
    #: What a message about a string that cannot be read proposes, where that is no number.
    proposals: ClassVar[dict[str, str]] = {"monitor": "give true or false", "view": "give true or false"}

    def __post_init__(self) -> None:
        for name, choices in self.choices.items():
            value = getattr(self, name)
            if not any(value == c and isinstance(value, str) == isinstance(c, str) for c in choices):
                raise self._error(name, f"give one of {', '.join(map(repr, choices))}")
        for name, least in self.counts.items():
            value = getattr(self, name)
            if value is None and name in self.optional:
                continue
            if not is_integer(value) or value < least:
                raise self._error(name, f"give a whole number of at least {least}")
        for name in ("rtol", "atol"):
            value = getattr(self, name)
            if not is_number(value) or not 0 <= value < inf:
                raise self._error(name, "give a number of at least 0")
        if not is_number(self.dtol) or self.dtol <= 1:
            raise self._error("dtol", "give a number above 1")
        if self.stagnation is not None and (not is_number(self.stagnation) or not 0 < self.stagnation < inf):
            raise self._error("stagnation", "give a positive factor, such as 0.97, or None")
        if not isinstance(self.trace, str):
            raise self._error("trace", "give the name of a file")

    def _error(self, name: str, proposal: str) -> ValueError:
        """The error about an option's value, with what would do instead."""
        return ValueError(f"{self.solver} {name} {getattr(self, name)!r}: {proposal}")

    @classmethod
    def names(cls) -> list[str]:
        """Names of the options that a user may give, those of this solver first."""
        shared = {f.name for f in fields(SolverOptions)}
        return sorted((f.name for f in fields(cls) if f.repr), key=lambda name: name in shared)

    @classmethod
    def make(cls, options: Self | Mapping | None = None, **changes: Any) -> Self:
        """Options from options, a dictionary of them or nothing, with changes.

        Raises
        ------
        ValueError
            On an unknown name, proposing the nearest option, and on a bad value.
        """
        base = options if isinstance(options, cls) else None
        given = {**(options or {}), **changes} if base is None else changes  # type: ignore[dict-item]
        for name in given:
            if name not in (cls.names() if base is None else vars(base)):
                raise unknown_option(cls.solver, name, cls.names())
        if base is None:
            return cls(**given)
        unchanged = all(getattr(base, name) == value for name, value in given.items())
        return base if unchanged else replace(base, **given)

    @classmethod
    def parse(cls, strings: Mapping[str, str]) -> dict[str, Any]:
        """Values of options given as strings, as PETSc's options database has them.

        ``none`` is ``None``, and a flag without a value is true. Lists, where an option is one, are separated by commas
        (``8,4``), a level's C-points by colons (``0:5:9:16,2``).

        Parameters
        ----------
        strings
            Strings by names without prefix, such as ``{"coarsening": "8,4", "level_1_relax": "F", "monitor": ""}``.

        Returns
        -------
        dict
            For :meth:`make`, which refuses unknown names.

        Raises
        ------
        ValueError
            On a value that cannot be read, naming the option.
        """
        out = {}
        for name, text in strings.items():
            try:
                out[name] = cls._parsed(name, str(text or "").strip())
            except ValueError:
                proposal = next((p for option, p in cls.proposals.items() if name.endswith(option)), "give a number")
                raise ValueError(f"{cls.solver} {name} {text!r}: {proposal}") from None
        return out

    @classmethod
    def _parsed(cls, name: str, text: str) -> Any:
        """One option's value; the text of an unknown option stays as it is."""
        if text.lower() == "none":
            return None
        if cls.choices.get(name) == (False, True):
            if text.lower() not in _TRUE + _FALSE:
                raise ValueError
            return text.lower() in _TRUE
        if name in cls.counts:
            return int(text)
        if name in cls.numbers:
            return float(text)
        return int(text) if name == "time_norm" and text.isdigit() else text

    @property
    def is_fixed(self) -> bool:
        """Whether the number of iterations is given rather than a tolerance."""
        return self.rtol == self.atol == 0


SHARED = tuple(f.name for f in fields(SolverOptions) if f.name != "max_it")
"""Options that have the same meaning, and the same default, for all solvers."""


def unknown_option(
    solver: str, name: object, names: Sequence[str], *, prefix: str = "", listed: str = "options"
) -> ValueError:
    """The error about an unknown option, with the nearest one or a list of all.

    Parameters
    ----------
    solver
        Name of the solver in the message.
    name
        What was given.
    names
        The options that there are, without the prefix.
    prefix
        What the option begins with.
    listed
        What the options are called where all of them are listed.
    """
    near = difflib.get_close_matches(str(name).removeprefix(prefix), names, n=1)
    hint = f"did you mean {prefix + near[0]!r}?" if near else f"the {listed} are {', '.join(names)}"
    return ValueError(f"unknown {solver} option {name!r}: {hint}")


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is a real number, other than NaN; booleans are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value

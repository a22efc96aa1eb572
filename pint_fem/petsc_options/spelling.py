"""Misspelt prefixes of this package's command line options, which nothing would read.

Options with one dash belong to PETSc's database, which takes any name. Those of this package begin with ``mgrit_``,
``paradiag_``, ``pint_`` or ``kkt_``; the rest of a name is checked where the options are read. Refused here are names
with a misspelt prefix, such as ``-mgri_levels`` or ``-MGRIT_levels``. All other names are left to PETSc.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from pint_fem.errors import InputError

__all__ = ["PREFIXES", "distance", "meant", "nearest", "refuse_near_misses", "require_prefix"]

PREFIXES = ("mgrit_", "paradiag_", "pint_", "kkt_")


def distance(a: str, b: str) -> int:
    """Number of insertions, deletions, substitutions and exchanges of neighbours between two words (Damerau, 1964)."""
    rows = [list(range(len(b) + 1))]
    for i, x in enumerate(a, 1):
        row = [i]
        for j, y in enumerate(b, 1):
            best = min(rows[-1][j] + 1, row[-1] + 1, rows[-1][j - 1] + (x != y))
            if i > 1 and j > 1 and x == b[j - 2] and a[i - 2] == y:
                best = min(best, rows[-2][j - 2] + 1)
            row.append(best)
        rows.append(row)
    return rows[-1][-1]


def nearest(name: str, names: Iterable[str], most: int = 1) -> str | None:
    """The nearest of some names to a misspelt one; ``None`` where its distance is more than ``most``."""
    found = min(names, key=lambda k: distance(name, k), default=None)
    return found if found is not None and distance(name, found) <= most else None


def meant(name: str) -> str | None:
    """The name with one of this package's prefixes that a name was meant to be, given without leading dashes; ``None``
    for a name with such a prefix and for all others.
    """
    if name.startswith(PREFIXES):
        return None
    plain = name.replace("-", "_")
    head, _, rest = plain.partition("_")
    for prefix in PREFIXES:
        word = prefix[:-1]
        if head.lower() == word or distance(head.lower(), word) <= max(1, len(word) // 4):
            return prefix + rest
        if plain.lower().startswith(word) and not rest:
            return prefix + plain[len(word) :]
    return None


def require_prefix(options_prefix: str) -> str:
    """Require a prefix that can stand before this package's options, and complete it by an underscore.

    Parameters
    ----------
    options_prefix
        Prefix of one functional's options, such as ``"heat_"`` for ``-heat_mgrit_rtol``; ``""`` for none.

    Raises
    ------
    InputError
        If it is no name of an option, or is one of this package's prefixes or nearly one.
    """
    if not isinstance(options_prefix, str) or not re.fullmatch(r"([A-Za-z]\w*)?", options_prefix):
        raise InputError(f"options_prefix {options_prefix!r}: give letters, digits and underscores, such as 'heat_'")
    prefix = options_prefix if not options_prefix or options_prefix.endswith("_") else f"{options_prefix}_"
    if prefix.startswith(PREFIXES) or meant(prefix) is not None:
        raise InputError(
            f"options_prefix {options_prefix!r} could be taken for {', '.join(PREFIXES)}: give another one"
        )
    return prefix


def refuse_near_misses(names: Iterable[str], options_prefix: str = "") -> None:
    """Require that no name of an option has a misspelt prefix.

    Parameters
    ----------
    names
        Names in PETSc's database or on a command line, without leading dashes.
    options_prefix
        Prefix of one functional's options, behind which names are checked as well.

    Raises
    ------
    InputError
        The first such name and what was meant.
    """
    for name in names:
        before = options_prefix if name.startswith(options_prefix) else ""
        better = meant(name.removeprefix(before))
        if better is not None:
            raise InputError(f"unknown option '-{name}': did you mean '-{before}{better}'?")

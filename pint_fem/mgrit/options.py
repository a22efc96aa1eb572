"""Options of the MGRIT solver, checked when they are made."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace

__all__ = ["MGRITOptions"]


@dataclass(frozen=True)
class MGRITOptions:
    """Options of :class:`~pint_fem.mgrit.solver.MGRIT`.

    Parameters
    ----------
    levels
        Number of levels; ``None``: as many as ``coarsening`` allows with at least 4 steps on the coarsest, at most 3.
        1 is sequential time stepping.
    coarsening
        Factor from each level to the next; the last one repeats.
    relax
        ``"F"`` or ``"FCF"`` for each level but the coarsest; the last one repeats. One string is used on all levels.
    rtol
        Stop when the C-point residual is at most ``rtol`` times the norm of the trajectory's C-points.
    atol
        Stop when the C-point residual is at most ``atol``.
    max_it
        Largest number of cycles.
    dtol
        A residual ``dtol`` times the first one is divergence.
    monitor
        Print a line a cycle on the first rank.

    Raises
    ------
    ValueError
        On a value out of range, naming the option, what was given and what would do.
    """

    levels: int | None = None
    coarsening: Sequence[int] = (8, 4)
    relax: str | Sequence[str] = "FCF"
    rtol: float = 1e-8
    atol: float = 0.0
    max_it: int = 50
    dtol: float = 1e4
    monitor: bool = False

    def __post_init__(self):
        set_ = lambda name, value: object.__setattr__(self, name, value)
        factors = _as_tuple(self.coarsening)
        if not factors or any(not _is_int(m) or m < 2 for m in factors):
            raise ValueError(f"mgrit coarsening {self.coarsening!r}: give whole numbers of at least 2, such as (8, 4)")
        set_("coarsening", tuple(int(m) for m in factors))
        relax = _as_tuple(self.relax)
        if not relax or any(r not in ("F", "FCF", "FCFCF") for r in relax):
            raise ValueError(f"mgrit relax {self.relax!r}: give 'F', 'FCF' or 'FCFCF', or one of them a level")
        set_("relax", relax)
        if self.levels is not None and (not _is_int(self.levels) or self.levels < 1):
            raise ValueError(f"mgrit levels {self.levels!r}: give a whole number of at least 1")
        for name in ("rtol", "atol"):
            value = getattr(self, name)
            if not _is_number(value) or not 0 <= value < float("inf"):
                raise ValueError(f"mgrit {name} {value!r}: give a number of at least 0")
        if self.rtol == self.atol == 0 and not _is_int(self.max_it):
            raise ValueError("mgrit rtol and atol are both 0: give one of them, or a whole number max_it")
        if not _is_int(self.max_it) or self.max_it < 1:
            raise ValueError(f"mgrit max_it {self.max_it!r}: give a whole number of at least 1")
        if not _is_number(self.dtol) or self.dtol <= 1:
            raise ValueError(f"mgrit dtol {self.dtol!r}: give a number above 1")
        if self.monitor not in (False, True):
            raise ValueError(f"mgrit monitor {self.monitor!r}: give True or False")

    @classmethod
    def make(cls, options: MGRITOptions | Mapping | None = None, **changes) -> MGRITOptions:
        """From options, a dictionary of them or nothing; an unknown name is refused with the nearest known one."""
        base = options if isinstance(options, cls) else cls()
        given = dict(changes) if isinstance(options, cls) or options is None else {**options, **changes}
        known = [f.name for f in fields(cls)]
        for name in given:
            if name not in known:
                near = difflib.get_close_matches(str(name), known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
                raise ValueError(f"unknown mgrit option {name!r}: {hint}")
        return replace(base, **given)

    def factors(self, nsteps: int) -> tuple[int, ...]:
        """Coarsening factors used for ``nsteps`` steps.

        Raises
        ------
        ValueError
            If the levels asked for leave a level without a step.
        """
        factor = lambda i: self.coarsening[min(i, len(self.coarsening) - 1)]
        chosen, n = [], nsteps
        if self.levels is None:
            while len(chosen) < 2 and n // factor(len(chosen)) >= 4:
                n //= factor(len(chosen))
                chosen.append(factor(len(chosen)))
            if chosen:
                return tuple(chosen)
        for i in range((self.levels or 2) - 1):
            n //= factor(i)
            chosen.append(factor(i))
            if n < 1:
                raise ValueError(
                    f"mgrit coarsening {'x'.join(map(str, chosen))} exceeds the {nsteps} time steps: "
                    "give smaller factors, fewer levels, or levels=1 for sequential stepping"
                )
        return tuple(chosen)

    def scheme(self, index: int) -> str:
        """Relaxation of level ``index``."""
        return self.relax[min(index, len(self.relax) - 1)]


def _as_tuple(value) -> tuple:
    return tuple(value) if isinstance(value, Iterable) and not isinstance(value, str) else (value,)


def _is_int(value) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, bool)


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value

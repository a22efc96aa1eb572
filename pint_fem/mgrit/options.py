"""Options of the MGRIT solver, checked when they are made."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from math import inf

from pint_fem.all_at_once.grids import check_coarsening, is_integer

__all__ = ["MGRITOptions"]

_PER_LEVEL = ("relax", "c_weight", "coarsening")
_CHOICES = {
    "cycle": ("V", "F"),
    "start": ("auto", "guess", "skip", "nested"),
    "coarse_solver": ("sequential", "gathered", "relax", "paradiag"),
    "storage": ("all", "C"),
    "residual": ("C", "full", "none"),
    "check": ("auto", "relaxed", "cycle"),
    "rtol_of": ("trajectory", "first"),
    "time_norm": (1, 2, "inf"),
    "on_divergence": ("report", "serial"),
    "monitor": (False, True),
    "view": (False, True),
}
_READ_WITH = (
    ("f_cycles", "cycle", ("F",)),
    ("coarse_sweeps", "coarse_solver", ("relax", "paradiag")),
    ("nested_cycles", "start", ("nested", "auto")),
)
"""Options that are read with some values of another one only."""
_COUNTS = {"levels": 1, "f_cycles": 0, "nested_cycles": 1, "coarse_sweeps": 1, "max_it": 1}
_MOST_SWEEPS = 10_000
_MAY_BE_NONE = ("levels", "f_cycles", "stagnation")
_MOST_LEVELS = 64
"""No hierarchy of steps numbered by 64 bits has more levels."""


@dataclass(frozen=True)
class MGRITOptions:
    """Options of :class:`~pint_fem.mgrit.solver.MGRIT`.

    Parameters
    ----------
    levels
        Number of levels; ``None``: as many as ``coarsening`` allows with at least 4 steps on the coarsest, at most 3.
        1 is sequential time stepping.
    coarsening
        Factor from each level to the next, or the C-points by their numbers on the level (from 0 on); the last one
        repeats.
    cycle
        ``"V"`` or ``"F"``.
    f_cycles
        With ``cycle="F"``: only that many cycles are F-cycles, then V; ``None``: all (XBraid's FMG with ``nfmg = -1``).
    start
        First guess: ``"guess"`` takes the one given, ``"skip"`` solves the coarsest level and interpolates (XBraid's
        skip of the first down-cycle), ``"nested"`` does nested iteration: a V-cycle on each level on the way up.
        ``"auto"`` is ``"guess"`` here; finite element sweeps without an earlier solution take it as ``"nested"``.
    nested_cycles
        V-cycles on each level of nested iteration.
    relax
        ``"F"``, ``"FCF"``, ``"FCFCF"`` ..., or the number of FC-sweeps before the last F, for each level but the
        coarsest; the last one repeats. One string is used on all levels.
    c_weight
        Weight of C-relaxation, for each level; the last one repeats.
    coarse_solver
        ``"sequential"``, ``"gathered"`` (on the first rank), ``"relax"``, which needs a coarsening factor for the
        coarsest level too, or ``"paradiag"``: iterations of an alpha-circulant solve, for propagators that have one.
    coarse_sweeps
        FC-sweeps of ``coarse_solver="relax"``, iterations of ``"paradiag"``.
    storage
        ``"all"`` points of the finest level, or ``"C"``-points only: then ``U`` has a row for each own C-point.
    residual
        Norm over the ``"C"``-points, where the residual is after relaxation, or the ``"full"`` one of all points
        computed anew; ``"none"``: do ``max_it`` cycles without looking.
    check
        Look at the residual after the relaxation that begins a cycle (``"relaxed"``, as XBraid) or before it
        (``"cycle"``, as PyMGRIT). Then its propagator calls are those of the next C-relaxation. ``"auto"`` is
        ``"relaxed"`` here; finite element sweeps take it as ``"cycle"``, which ends sooner where few cycles do.
    time_norm
        1, 2 or ``"inf"`` over the points.
    rtol, rtol_of
        Stop when the residual is at most ``rtol`` times the norm of the ``"trajectory"`` at the C-points, or of the
        ``"first"`` residual.
    atol
        Stop when the residual is at most ``atol``.
    max_it
        Largest number of cycles.
    dtol
        A residual ``dtol`` times the first one is divergence.
    stagnation
        A reduction slower than this factor a cycle, over the last five, is stagnation where at that rate the tolerance
        is out of reach; ``None``: go on.
    on_divergence
        ``"report"``, or ``"serial"``: step sequentially where cycles diverge, stagnate, fail or run out, and say so.
    monitor
        Print a line a cycle on the first rank.
    view
        Print the hierarchy before the first solve.
    trace
        File for a Chrome trace of all solves, written by ``MGRIT.write_trace``; empty: none.

    Raises
    ------
    ValueError
        On a value out of range, naming the option, what was given and what would do.
    """

    levels: int | None = None
    coarsening: int | Sequence = (8, 4)
    cycle: str = "V"
    f_cycles: int | None = None
    start: str = "auto"
    nested_cycles: int = 1
    relax: str | int | Sequence = "FCF"
    c_weight: float | Sequence[float] = 1.0
    coarse_solver: str = "sequential"
    coarse_sweeps: int = 1
    storage: str = "all"
    residual: str = "C"
    check: str = "auto"
    time_norm: int | str = 2
    rtol: float = 1e-8
    rtol_of: str = "trajectory"
    atol: float = 0.0
    max_it: int = 50
    dtol: float = 1e4
    stagnation: float | None = 0.97
    on_divergence: str = "report"
    monitor: bool = False
    view: bool = False
    trace: str = ""
    #: Options that were given for one level: name and level.
    of_levels: tuple[tuple[str, int], ...] = field(default=(), repr=False, compare=False)

    def __post_init__(self):
        set_ = lambda name, value: object.__setattr__(self, name, value)
        set_("coarsening", check_coarsening(self.coarsening))
        set_("relax", tuple(_scheme(r, self.relax) for r in _as_tuple(self.relax, "relax")))
        weights = _as_tuple(self.c_weight, "c_weight")
        if any(not _is_number(w) or not 0 < w < inf for w in weights):
            raise ValueError(f"mgrit c_weight {self.c_weight!r}: give positive numbers, such as 1.0")
        set_("c_weight", tuple(float(w) for w in weights))
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if not any(value == c and isinstance(value, str) == isinstance(c, str) for c in choices):
                raise ValueError(f"mgrit {name} {value!r}: give one of {', '.join(map(repr, choices))}")
        for name, least in _COUNTS.items():
            value = getattr(self, name)
            if value is None and name in _MAY_BE_NONE:
                continue
            if not is_integer(value) or value < least:
                raise ValueError(f"mgrit {name} {value!r}: give a whole number of at least {least}")
        for name in ("rtol", "atol"):
            value = getattr(self, name)
            if not _is_number(value) or not 0 <= value < inf:
                raise ValueError(f"mgrit {name} {value!r}: give a number of at least 0")
        if not _is_number(self.dtol) or self.dtol <= 1:
            raise ValueError(f"mgrit dtol {self.dtol!r}: give a number above 1")
        if self.stagnation is not None and (not _is_number(self.stagnation) or not 0 < self.stagnation < inf):
            raise ValueError(f"mgrit stagnation {self.stagnation!r}: give a positive factor, such as 0.97, or None")
        if not isinstance(self.trace, str):
            raise ValueError(f"mgrit trace {self.trace!r}: give the name of a file")

    @classmethod
    def make(cls, options: MGRITOptions | Mapping | None = None, **changes) -> MGRITOptions:
        """From options, a dictionary of them or nothing; an unknown name is refused with the nearest known one.

        Dictionaries may be nested: ``{"coarse": {"solver": "relax"}}`` is ``{"coarse_solver": "relax"}``, and
        ``{"level_1": {"relax": "F"}}`` (also ``level_1_relax``) changes an option of one level.
        """
        if isinstance(options, cls) and all(
            getattr(options, name, changes) == value for name, value in changes.items()
        ):
            return options
        base = options if isinstance(options, cls) else cls()
        given = dict(changes) if isinstance(options, cls) or options is None else {**_flat(options), **changes}
        known = [f.name for f in fields(cls) if f.name != "of_levels" or isinstance(options, cls)]
        levels: dict[str, dict[int, object]] = {}
        for name in list(given):
            level, rest = _level_of(name)
            if rest in _PER_LEVEL and level < _MOST_LEVELS:
                levels.setdefault(rest, {})[level] = given.pop(name)
            elif rest in _PER_LEVEL:
                raise ValueError(f"mgrit option {name!r}: no hierarchy has a level {level}; level 0 is the finest")
            elif name not in known:
                prefix, choices = ("", known) if level < 0 else (f"level_{level}_", _PER_LEVEL)
                near = difflib.get_close_matches(str(name if level < 0 else rest), choices, n=1)
                hint = f"{'known' if level < 0 else 'those of one level'} are {', '.join(choices)}"
                if near:
                    hint = f"did you mean {prefix + near[0]!r}?"
                raise ValueError(f"unknown mgrit option {name!r}: {hint}")
        made = replace(base, **given)
        for name, changed in levels.items():
            values = list(getattr(made, name))
            values += [values[-1]] * (max(changed) + 2 - len(values))  # what the last one stood for goes on
            for level, value in changed.items():
                values[level] = value
            made = replace(made, **{name: values})
        if levels:
            named = {(name, level) for name, changed in levels.items() for level in changed}
            made = replace(made, of_levels=tuple(sorted({*made.of_levels, *named})))
        if not isinstance(options, cls):
            made._refuse_unread({**given, **levels})
        return made

    def _refuse_unread(self, given: Mapping) -> None:
        """Raise on options that these options leave without an effect, unless they have their defaults."""
        for name, selector, values in _READ_WITH:
            changed = name in given and getattr(self, name) != getattr(type(self), name)
            if changed and getattr(self, selector) not in values:
                raise ValueError(
                    f"mgrit {name} {given[name]!r} has no effect with {selector} {getattr(self, selector)!r}: "
                    f"give {selector} {' or '.join(map(repr, values))}, or leave {name} out"
                )
        if self.levels is None or self.levels == 1:  # lists go on serving where a run is repeated sequentially
            return
        for name in _PER_LEVEL:
            if name in given and isinstance(given[name], (list, tuple)) and len(getattr(self, name)) > self.levels:
                raise ValueError(f"mgrit {name} {given[name]!r} for {self.levels} levels: give at most one for each")

    def refuse_missing_levels(self, count: int) -> None:
        """Raise on options of one level that a hierarchy of ``count`` levels has not.

        Raises
        ------
        ValueError
            Naming the option and the nearest one that there is.
        """
        last = count - 1 - (self.coarse_solver != "relax")  # the coarsest level is stepped through
        for name, level in self.of_levels:
            if level > last:
                near = f"did you mean 'level_{last}_{name}'?" if last >= 0 else f"give {name!r} and more levels"
                numbers = "level 0 only" if count == 1 else f"levels 0 to {count - 1}"
                what = "is stepped through" if level == count - 1 else "is none of them"
                raise ValueError(
                    f"mgrit option 'level_{level}_{name}': there are {numbers}, and {level} {what}; {near}"
                )

    @property
    def is_fixed(self) -> bool:
        """Whether the number of cycles is given rather than a tolerance."""
        return self.residual == "none" or self.rtol == self.atol == 0

    def factors(self, nsteps: int) -> tuple:
        """Coarsening (factors, or tuples of C-points) used for ``nsteps`` steps, for each level but the coarsest.

        Raises
        ------
        ValueError
            If the levels asked for leave a level without a step, or an option is for a level that there is not.
        """
        chosen, n = [], nsteps
        if self.levels is None:
            while len(chosen) < 2 and _coarser(n, self.coarsen(len(chosen))) >= 4:
                n = _coarser(n, self.coarsen(len(chosen)))
                chosen.append(self.coarsen(len(chosen)))
            if chosen:
                self.refuse_missing_levels(len(chosen) + 1)
                return tuple(chosen)
        self.refuse_missing_levels(self.levels or 2)
        for i in range((self.levels or 2) - 1):
            n = _coarser(n, self.coarsen(i))
            chosen.append(self.coarsen(i))
            if n < 1:
                raise ValueError(
                    f"mgrit coarsening {'x'.join(map(str, chosen))} exceeds the {nsteps} time steps: "
                    "give smaller factors, fewer levels, or levels=1 for sequential stepping"
                )
        return tuple(chosen)

    def coarsen(self, index: int):
        """Coarsening from level ``index`` to the next."""
        return self.coarsening[min(index, len(self.coarsening) - 1)]

    def scheme(self, index: int) -> str:
        """Relaxation of level ``index``."""
        return self.relax[min(index, len(self.relax) - 1)]

    def sweeps(self, index: int) -> int:
        """Its number of FC-sweeps."""
        return self.scheme(index).count("C")

    def weight(self, index: int) -> float:
        """Weight of C-relaxation on level ``index``."""
        return self.c_weight[min(index, len(self.c_weight) - 1)]


def _coarser(n: int, m) -> int:
    return n // m if is_integer(m) else len(m) - 1


def _scheme(r, given) -> str:
    if is_integer(r) and r > _MOST_SWEEPS:
        raise ValueError(f"mgrit relax {given!r}: give at most {_MOST_SWEEPS} FC-sweeps; 1 or 2 are usual")
    if is_integer(r) and r >= 0:
        return "F" + "CF" * int(r)
    if not isinstance(r, str) or r != "F" + "CF" * r.count("C"):
        raise ValueError(
            f"mgrit relax {given!r}: give 'F', 'FCF', 'FCFCF' ... or a number of FC-sweeps, or one of them a level"
        )
    return r


def _flat(options: Mapping, prefix: str = "") -> dict:
    flat = {}
    for name, value in options.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{name}_"))
        else:
            flat[f"{prefix}{name}" if prefix else name] = value
    return flat


def _level_of(name) -> tuple[int, str]:
    """``level_1_relax`` as ``(1, "relax")``."""
    parts = str(name).split("_", 2)
    if len(parts) == 3 and parts[0] == "level" and parts[1].isdigit():
        return int(parts[1]), parts[2]
    return -1, ""


def _as_tuple(value, name: str) -> tuple:
    items = tuple(value) if isinstance(value, Iterable) and not isinstance(value, str) else (value,)
    if not items:
        raise ValueError(f"mgrit {name} {value!r}: give at least one")
    return items


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value

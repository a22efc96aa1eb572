"""Options of the MGRIT solver, checked when they are made."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from typing import Any, ClassVar

from pint_fem.all_at_once.grids import Coarsening, check_coarsening, is_integer
from pint_fem.all_at_once.options import STARTS, SolverOptions, is_number, unknown_option

__all__ = ["MGRITOptions"]

_PER_LEVEL = ("relax", "c_weight", "coarsening")
_READ_WITH = (
    ("f_cycles", "cycle", ("F",)),
    ("coarse_sweeps", "coarse_solver", ("relax", "paradiag")),
    ("nested_cycles", "start", ("nested", "auto")),
)
"""Options that are read with some values of another one only."""
_MOST_SWEEPS = 10_000
ROUGH = 1e-4  # the smallest tolerance of solves in single precision
_MOST_LEVELS = 64
"""No hierarchy of steps numbered by 64 bits has more levels."""


@dataclass(frozen=True)
class MGRITOptions(SolverOptions):
    """Options of :class:`~pint_fem.mgrit.solver.MGRIT`: those for stopping and reporting of
    :class:`~pint_fem.all_at_once.options.SolverOptions`, whose iterations are cycles, and its own.

    Parameters
    ----------
    levels
        Number of levels; ``None``: as many as ``coarsening`` allows with at least 4 steps on the coarsest, at most 3.
        1 is sequential time stepping.
    coarsening
        Factor from each level to the next, or the C-points by their numbers on the level (from 0 on); the last one
        repeats.
    cycle
        ``"V"``, ``"F"``, or ``"none"``: sequential steps, exactly; with ``storage="C"`` the coarsening says which
        states are stored.
    f_cycles
        With ``cycle="F"``: only that many cycles are F-cycles, then V; ``None``: all (XBraid's FMG with ``nfmg = -1``).
    start
        First guess: ``"guess"`` takes the one given, ``"skip"`` solves the coarsest level and interpolates (XBraid's
        skip of the first down-cycle), ``"nested"`` does nested iteration: a V-cycle on each level on the way up.
        ``"auto"`` is ``"guess"`` here; sweeps without an earlier solution take it as ``"nested"``.
    nested_cycles
        V-cycles on each level of nested iteration.
    relax
        ``"F"``, ``"FCF"``, ``"FCFCF"`` ..., or the number of FC-sweeps before the last F, for each level but the
        coarsest; the last one repeats. One string is used on all levels.
    c_weight
        Weight of C-relaxation, for each level; the last one repeats.
    coarse_steps
        Steps of the coarse levels' integrator for each of their intervals: for evolutions, whose propagators are made
        here. Two make the coarse level's error four times as small for integrators of order two.
    precision
        Of F-relaxation in sweeps of linear evolutions with constant operators: ``"double"``, or single precision for
        solves with a tolerance ``rtol`` of at least 1e-3 (``"auto"``) or 1e-4 (``"single"``), if the measured error of
        the steps of an interval is a tenth of that at most. Residuals, C-points and the coarsest level are in double
        precision in any case.
    coarse_solver
        ``"sequential"``, ``"gathered"`` (on the first rank), ``"relax"``, which needs a coarsening factor for the
        coarsest level too, or ``"paradiag"``: iterations of an alpha-circulant solve, for propagators that have one.
    coarse_sweeps
        FC-sweeps of ``coarse_solver="relax"``, iterations of ``"paradiag"``.
    storage
        ``"all"`` points of the finest level, or ``"C"``-points only: then ``U`` has a row for each own C-point.
    residual
        Norm over the ``"C"``-points, where the residual is after relaxation, or the ``"full"`` one of all points
        computed anew; ``"none"``: do ``max_it`` cycles without a residual.
    check
        Evaluate the residual after the relaxation that begins a cycle (``"relaxed"``, as XBraid) or before it
        (``"cycle"``, as PyMGRIT). Then its propagator calls are those of the next C-relaxation. ``"auto"`` is
        ``"relaxed"`` here; sweeps take it as ``"cycle"``, which ends sooner where few cycles do.
    rtol, rtol_of, atol, time_norm, dtol, stagnation, max_it, on_divergence, monitor, view, trace
        Those of :class:`~pint_fem.all_at_once.options.SolverOptions`; the trajectory's norm is that of its C-points.

    Raises
    ------
    ValueError
        On a value out of range, naming the option, what was given and what would do.
    """

    levels: int | None = None  # type: ignore[assignment]
    coarsening: int | Sequence = (8, 4)
    cycle: str = "V"
    f_cycles: int | None = None
    start: str = "auto"
    nested_cycles: int = 1
    relax: str | int | Sequence = "FCF"
    c_weight: float | Sequence[float] = 1.0
    coarse_steps: int = 1
    precision: str = "auto"
    coarse_solver: str = "sequential"
    coarse_sweeps: int = 1
    storage: str = "all"
    residual: str = "C"
    check: str = "auto"
    #: Options that were given for one level: name and level.
    of_levels: tuple[tuple[str, int], ...] = field(default=(), repr=False, compare=False)

    solver: ClassVar[str] = "mgrit"
    choices: ClassVar[dict[str, Sequence]] = SolverOptions.choices | {
        "cycle": ("V", "F", "none"),
        "start": STARTS,
        "coarse_solver": ("sequential", "gathered", "relax", "paradiag"),
        "precision": ("auto", "single", "double"),
        "storage": ("all", "C"),
        "residual": ("C", "full", "none"),
        "check": ("auto", "relaxed", "cycle"),
    }
    counts: ClassVar[dict[str, int]] = SolverOptions.counts | {
        "levels": 1,
        "f_cycles": 0,
        "nested_cycles": 1,
        "coarse_steps": 1,
        "coarse_sweeps": 1,
    }
    optional: ClassVar[Sequence[str]] = ("levels", "f_cycles", "stagnation")
    proposals: ClassVar[dict[str, str]] = SolverOptions.proposals | {
        "coarsening": "give whole numbers such as 8,4, or a level's C-points such as 0:4:8"
    }

    def __post_init__(self) -> None:
        set_ = lambda name, value: object.__setattr__(self, name, value)
        set_("coarsening", check_coarsening(self.coarsening))
        set_("relax", tuple(_scheme(r, self.relax) for r in _as_tuple(self.relax, "relax")))
        weights = _as_tuple(self.c_weight, "c_weight")
        if any(not is_number(w) or not 0 < w < inf for w in weights):
            raise self._error("c_weight", "give positive numbers, such as 1.0")
        set_("c_weight", tuple(float(w) for w in weights))
        super().__post_init__()
        if self.precision == "single" and self.rtol < ROUGH:
            raise self._error(
                "precision", f"give an rtol of at least {ROUGH:g} with it (it is {self.rtol:g}), or leave it out"
            )

    @classmethod
    def make(cls, options: MGRITOptions | Mapping | None = None, **changes: Any) -> MGRITOptions:
        """Options from options, a dictionary of them or nothing, with changes.

        Dictionaries may be nested: ``{"coarse": {"solver": "relax"}}`` is ``{"coarse_solver": "relax"}``, and
        ``{"level_1": {"relax": "F"}}`` (also ``level_1_relax``) changes an option of one level.

        Raises
        ------
        ValueError
            On an unknown name, proposing the nearest option, on a bad value, and on an option in a dictionary that the
            others leave without an effect.
        """
        base = options if isinstance(options, cls) else None
        given = {**_flat(options or {}), **changes} if base is None else changes  # type: ignore[arg-type]
        plain: dict[str, Any] = {}
        of_one_level: dict[str, dict[int, Any]] = {}
        for name, value in given.items():
            level, rest = _level_of(name)
            if level < 0:
                plain[name] = value
            elif rest not in _PER_LEVEL:
                raise unknown_option(
                    cls.solver, name, _PER_LEVEL, prefix=f"level_{level}_", listed="those of one level"
                )
            elif level >= _MOST_LEVELS:
                raise ValueError(f"mgrit option {name!r}: no hierarchy has a level {level}; level 0 is the finest")
            else:
                of_one_level.setdefault(rest, {})[level] = value
        made = super().make(base, **plain)
        for name, changed in of_one_level.items():
            values = list(getattr(made, name))
            values += [values[-1]] * (max(changed) + 2 - len(values))  # the last one repeats on the levels below
            for level, value in changed.items():
                values[level] = value
            added = {(name, level) for level in changed}
            replaced: dict[str, Any] = {name: values, "of_levels": tuple(sorted({*made.of_levels, *added}))}
            made = replace(made, **replaced)
        if base is None:
            made._refuse_unread(plain | of_one_level)
        return made

    @classmethod
    def _parsed(cls, name: str, text: str) -> Any:
        level, rest = _level_of(name)
        if level >= 0:
            value = cls._parsed(rest, text)
            return value[0] if isinstance(value, list) and len(value) == 1 else value
        if name not in _PER_LEVEL or text.lower() == "none":
            return super()._parsed(name, text)
        items = text.split(",")
        if name == "c_weight":
            return [float(item) for item in items]
        if name == "relax":
            return [int(item) if item.strip().isdigit() else item.strip() for item in items]
        points = [tuple(int(c) for c in item.split(":")) for item in items]
        return [c[0] if len(c) == 1 else c for c in points]

    def _refuse_unread(self, given: Mapping) -> None:
        """Raise on given options that the others leave without an effect, unless they have their defaults."""
        for name, selector, values in _READ_WITH:
            changed = name in given and getattr(self, name) != getattr(type(self), name)
            if changed and getattr(self, selector) not in values:
                raise ValueError(
                    f"mgrit {name} {given[name]!r} has no effect with {selector} {getattr(self, selector)!r}: "
                    f"give {selector} {' or '.join(map(repr, values))}, or leave {name} out"
                )
        if self.levels is None or self.levels == 1:  # sequentially, lists for more levels are accepted
            return
        for name in _PER_LEVEL:
            if name in given and isinstance(given[name], (list, tuple)) and len(getattr(self, name)) > self.levels:
                raise ValueError(f"mgrit {name} {given[name]!r} for {self.levels} levels: give at most one for each")

    def refuse_missing_levels(self, count: int) -> None:
        """Refuse options of a level that a hierarchy of ``count`` levels lacks.

        Raises
        ------
        ValueError
            Naming the option and the nearest valid one.
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
        return self.residual == "none" or super().is_fixed

    def factors(self, nsteps: int) -> tuple:
        """Coarsening (factors, or tuples of C-points) used for ``nsteps`` steps, for each level but the coarsest.

        Raises
        ------
        ValueError
            If there are so many levels that one has no step, or an option is for a level that there is not.
        """
        chosen: list[Coarsening] = []
        n = nsteps
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

    def coarsen(self, index: int) -> Coarsening:
        """Coarsening from level ``index`` to the next."""
        return _of_level(self.coarsening, index)

    def scheme(self, index: int) -> str:
        """Relaxation of level ``index``."""
        return _of_level(self.relax, index)

    def sweeps(self, index: int) -> int:
        """Number of FC-sweeps in the relaxation of level ``index``."""
        return self.scheme(index).count("C")

    def weight(self, index: int) -> float:
        """Weight of C-relaxation on level ``index``."""
        return _of_level(self.c_weight, index)


def _of_level(values: Any, index: int) -> Any:
    """The entry of a level in an option, which is a tuple once it is checked; the last one holds for all below."""
    return values[min(index, len(values) - 1)]


def _coarser(n: int, m: Coarsening) -> int:
    return n // m if isinstance(m, int) else len(m) - 1


def _scheme(r: object, given: Any) -> str:
    if is_integer(r) and r > _MOST_SWEEPS:
        raise ValueError(f"mgrit relax {given!r}: give at most {_MOST_SWEEPS} FC-sweeps; 1 or 2 are usual")
    if is_integer(r) and r >= 0:
        return "F" + "CF" * int(r)
    if not isinstance(r, str) or r != "F" + "CF" * r.count("C"):
        raise ValueError(
            f"mgrit relax {given!r}: give 'F', 'FCF', 'FCFCF' ... or a number of FC-sweeps, or one of them per level"
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


def _level_of(name: object) -> tuple[int, str]:
    """``level_1_relax`` as ``(1, "relax")``."""
    parts = str(name).split("_", 2)
    if len(parts) == 3 and parts[0] == "level" and parts[1].isdigit():
        return int(parts[1]), parts[2]
    return -1, ""


def _as_tuple(value: Any, name: str) -> tuple:
    items = tuple(value) if isinstance(value, Iterable) and not isinstance(value, str) else (value,)
    if not items:
        raise ValueError(f"mgrit {name} {value!r}: give at least one")
    return items

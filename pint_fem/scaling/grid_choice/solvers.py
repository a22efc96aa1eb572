"""The time solver that a functional uses on a number of ranks in time, with its cycles, before any sweep is solved.

``time_solver="auto"`` decides by measured times of a step and the spectrum (:mod:`pint_fem.sweeps.automatic`); the same
rule is applied here for each grid, with its own kernels. Options of MGRIT that are given are kept. Cycles are those of
:class:`~pint_fem.theory.model_residuals.ModelResiduals`, or :data:`CYCLES` where no theory applies.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pint_fem.errors import InputError
from pint_fem.evolution.evolution import Evolution
from pint_fem.mgrit.options import MGRITOptions
from pint_fem.paradiag.options import ParaDiagOptions
from pint_fem.scaling.costs import Kernel
from pint_fem.scaling.grid_choice.shapes import SolverUse
from pint_fem.sweeps.automatic import decide
from pint_fem.sweeps.predictions.ratios import MOST_CYCLES, candidates, mgrit_ratios, paradiag_rate, paradiag_ratio
from pint_fem.sweeps.selection import KINDS, has_shape, mgrit_options
from pint_fem.theory.costs import rounded
from pint_fem.theory.model_residuals import ModelResiduals
from pint_fem.theory.spectrum import Spectrum

__all__ = ["CYCLES", "SolverRule", "solver_rule"]

CYCLES = 4
"""Cycles of a sweep that are assumed where no theory applies."""


class _Residuals(ModelResiduals):
    """Residuals that are evaluated once for each configuration."""

    def __init__(self, spectrum: Spectrum, evolution: Evolution):
        super().__init__(spectrum, evolution)
        object.__setattr__(self, "_found", {})

    def of(self, m: int, coarse_steps: int, relax: str, cycles: int) -> Any:
        """Relative residuals as :meth:`ModelResiduals.of`."""
        key = m, coarse_steps, relax, cycles
        if key not in self._found:  # type: ignore[attr-defined]
            self._found[key] = super().of(*key)  # type: ignore[attr-defined]
        return self._found[key]  # type: ignore[attr-defined]


@dataclass
class SolverRule:
    """What solves the sweeps of an evolution.

    Attributes
    ----------
    kind : str
        ``time_solver`` as given.
    nsteps, mgrit : int, MGRITOptions
        Fine steps; MGRIT's options as given.
    tolerances : list of float
        Relative tolerances of the solves.
    has_shape : bool
        Whether options of MGRIT that decide on the work of a cycle are given.
    residuals, rate : ModelResiduals, float, or None
        A-priori residuals of MGRIT and the contraction of ParaDiag; ``None`` where no theory applies.
    """

    kind: str
    nsteps: int
    mgrit: MGRITOptions
    tolerances: list[float] = field(default_factory=lambda: [1e-8])
    has_shape: bool = False
    residuals: ModelResiduals | None = None
    rate: float | None = None

    def on(self, time: int, kernel: Kernel) -> SolverUse:
        """The solver on ``time`` ranks in time, with the kernel of a step."""
        seconds = rounded({n: kernel(n) for n in kernel.sizes})
        if self.kind == "paradiag":
            return SolverUse("paradiag", ratio=self._paradiag(seconds, time))
        if self.kind == "auto" and not self.has_shape and self.residuals is not None:
            if not candidates(self.nsteps, time):
                return SolverUse("serial")
            times = mgrit_ratios(seconds, self.nsteps, time, self.residuals, self.tolerances)
            chosen = decide(times, self._paradiag(seconds, time), self.mgrit)
            if chosen.kind == "paradiag":
                return SolverUse("paradiag", ratio=self._paradiag(seconds, time))
            return SolverUse("serial") if chosen.kind == "serial" else self._mgrit(chosen.mgrit)
        return SolverUse("serial") if self.kind == "serial" else self._mgrit(self.mgrit)

    def menu(self) -> list[dict]:
        """Options of MGRIT with the cycles of a state and an adjoint sweep by theory, for each tolerance, as ``cycles``
        of :class:`~pint_fem.scaling.costs.Calibration`; those that are given, or all that ``"auto"`` chooses from.
        """
        if self.residuals is None or self.kind in ("serial", "paradiag"):
            return []
        if self.kind == "mgrit" or self.has_shape:
            use = self._mgrit(self.mgrit)
            return [
                {"options": dict(use.options), "rtol": rtol, "state": use.cycles[0], "adjoint": use.cycles[1]}
                for rtol in self.tolerances
                if use.kind == "mgrit"
            ]
        out = []
        for made in candidates(self.nsteps, 1):
            cycles = self.residuals.cycles(made.m, made.coarse_steps, made.relax, self.tolerances, MOST_CYCLES)
            options = {"levels": 2, "coarsening": [made.m], "relax": made.relax, "coarse_steps": made.coarse_steps}
            for rtol, count in zip(self.tolerances, cycles, strict=True):
                if math.isfinite(count):
                    out.append({"options": options, "rtol": rtol, "state": int(count), "adjoint": int(count)})
        return out

    def _paradiag(self, seconds: Mapping[int, float], time: int) -> float:
        return paradiag_ratio(seconds, self.rate, time, self.tolerances)

    def _mgrit(self, options: MGRITOptions) -> SolverUse:
        """MGRIT with given options and the cycles of its two finest levels."""
        factors = options.factors(self.nsteps)
        if not factors:
            return SolverUse("serial")
        cycles = float(CYCLES)
        if self.residuals is not None and isinstance(factors[0], int):
            relax = "F" if options.scheme(0) == "F" else "FCF"
            found = self.residuals.cycles(factors[0], options.coarse_steps, relax, self.tolerances, MOST_CYCLES)
            cycles = sum(min(n, MOST_CYCLES) for n in found) / len(found)
        names = ("coarsening", "relax", "coarse_steps", "cycle", "start", "coarse_solver")
        made = {name: getattr(options, name) for name in names} | {"levels": len(factors) + 1}
        count = max(0, math.ceil(cycles))
        return SolverUse("mgrit", made, (count, count))


def solver_rule(
    evolution: Evolution, found: Spectrum | None, parameters: Mapping | None, prefix: str = ""
) -> SolverRule:
    """The rule of an evolution from the ``solver_parameters`` of its functional and PETSc's options.

    Parameters
    ----------
    evolution
        The problem.
    found
        Its spectrum, ``None`` where there is none.
    parameters
        With the entries ``time_solver``, ``typical_rtol``, ``mgrit`` and ``paradiag``.
    prefix
        Prefix of the options in PETSc's database.

    Raises
    ------
    InputError
        On an unknown time solver or a bad option of MGRIT.
    """
    given = dict(parameters or {})
    kind = given.get("time_solver", "mgrit")
    if kind not in KINDS:
        raise InputError(f"time_solver {kind!r}: give one of {', '.join(map(repr, KINDS))}")
    mgrit, typical = mgrit_options(given.get("mgrit"), f"{prefix}mgrit_"), given.get("typical_rtol")
    rtol = mgrit.rtol if 0 < mgrit.rtol < 1 else 1e-8
    tolerances = [rtol, math.sqrt(rtol)] if typical is None else [max(typical, rtol)]
    rule = SolverRule(kind, evolution.nsteps, mgrit, tolerances, has_shape(given.get("mgrit"), f"{prefix}mgrit_"))
    if found is not None:
        alpha = (given.get("paradiag") or {}).get("alpha", ParaDiagOptions().alpha)
        rule.residuals, rule.rate = _Residuals(found, evolution), paradiag_rate(evolution, float(alpha))
    return rule

"""Options of the ParaDiag solver, checked when they are made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import ClassVar

from pint_fem.all_at_once.options import SolverOptions, is_number

__all__ = ["SINGLE", "ParaDiagOptions"]

SINGLE = 2e-5
"""Smallest ``alpha`` for which iterations are in single precision by default."""


@dataclass(frozen=True)
class ParaDiagOptions(SolverOptions):
    """Options of :class:`~pint_fem.paradiag.solver.ParaDiag`: those for stopping and reporting of
    :class:`~pint_fem.all_at_once.options.SolverOptions`, with norms over all points, and its own.

    Parameters
    ----------
    alpha
        Between 0 and 1. An iteration contracts by ``alpha/(1 - alpha)``; its round-off is about ``1e-16/alpha``, in
        single precision ``6e-8/alpha``.
    memory
        Gigabytes of factors that a rank keeps; frequencies beyond them are factored anew at each solve.
    precision
        Of transforms and solves of an iteration, where several frequencies are solved at once: ``"single"``,
        ``"double"``, or ``"auto"``: single in solves to a tolerance where ``alpha`` is at least :data:`SINGLE`, else
        double. Residuals and solutions are in double precision in any case.
    max_it
        Largest number of iterations.
    rtol, rtol_of, atol, time_norm, dtol, stagnation, on_divergence, monitor, view, trace
        Those of :class:`~pint_fem.all_at_once.options.SolverOptions`.

    Raises
    ------
    ValueError
        On a value out of range, naming the option, what was given and what would do.
    """

    alpha: float = 1e-4
    memory: float = 4.0
    precision: str = "auto"
    max_it: int = 20

    solver: ClassVar[str] = "paradiag"
    choices: ClassVar[dict[str, Sequence]] = {**SolverOptions.choices, "precision": ("auto", "single", "double")}
    numbers: ClassVar[Sequence[str]] = (*SolverOptions.numbers, "alpha", "memory")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, largest, proposal in (
            ("alpha", 1, "give a number between 0 and 1, such as 1e-4"),
            ("memory", inf, "give a positive number (of GB)"),
        ):
            value = getattr(self, name)
            if not is_number(value) or not 0 < value < largest:
                raise self._error(name, proposal)

    @property
    def precision_for_tolerances(self) -> str:
        """The precision of solves to a tolerance."""
        if self.precision != "auto":
            return self.precision
        return "single" if self.alpha >= SINGLE else "double"

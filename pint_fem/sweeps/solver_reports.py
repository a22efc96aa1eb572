"""Reports of time solvers: a-priori estimates of convergence, and traces of their work and messages."""

from __future__ import annotations

from functools import cached_property

from irksome.tableaux.ButcherTableaux import ButcherTableau

from pint_fem.all_at_once.trace import Trace
from pint_fem.collective import collectively
from pint_fem.evolution.evolution import Evolution
from pint_fem.logs import logger
from pint_fem.mgrit.options import MGRITOptions
from pint_fem.paradiag.options import ParaDiagOptions
from pint_fem.propagators import CoefficientPropagator
from pint_fem.propagators.base import FEPropagator
from pint_fem.propagators.linear import LinearPropagator
from pint_fem.spacetime import SpaceTime
from pint_fem.sweeps.selection import estimate_lines
from pint_fem.theory.estimates import mgrit_estimate
from pint_fem.theory.two_level import ConvergenceEstimate

__all__ = ["SolverReports"]


class SolverReports:
    """Reports of :class:`~pint_fem.sweeps.time_solvers.TimeSolvers`, whose attributes these are."""

    evolution: Evolution
    spacetime: SpaceTime
    propagators: list[FEPropagator]
    options: MGRITOptions | ParaDiagOptions
    trace: Trace | None
    reported: bool
    _mgrit: MGRITOptions
    _coarse_steps: int
    _coarse_tableau: ButcherTableau | None

    @cached_property
    def estimates(self) -> list[ConvergenceEstimate] | None:
        """A-priori convergence estimate of each pair of MGRIT levels, empty for one level (collective over space).

        ``None`` where there is none: for evolutions that are not linear, a user's propagators, and coarser meshes on
        coarse levels. Where operators depend on controls, they are those of the first control.
        """
        if len(self.propagators) == 1:
            return []
        kinds = (LinearPropagator, CoefficientPropagator)
        fits = all(type(p) in kinds and p.evolution is self.evolution for p in self.propagators)
        options = MGRITOptions.make(self._mgrit, coarse_steps=self._coarse_steps)
        return mgrit_estimate(self.evolution, options, self._coarse_tableau) if fits else None

    def report_estimates(self) -> None:
        """Log the a-priori estimates or their warnings once, before the first solve (collective)."""

        def report() -> None:
            for text in self._solvers_in_space() if self.options.view else ():
                if self.spacetime.is_root:
                    logger.info("%s", text)
            for level, text in estimate_lines(self.evolution, self.options, self.estimates or []):
                if self.spacetime.is_root:
                    logger.log(level, text)

        if not self.reported:
            self.reported = True
            collectively(self.spacetime.comm, "theory", report)

    def _solvers_in_space(self) -> list[str]:
        """A line for each matrix of a linear propagator's stages."""
        found = []
        for level, propagator in enumerate(self.propagators):
            for h, factor in getattr(propagator, "factors", {}).items() if propagator.is_linear else ():
                found.append(f"level {level}, stages with a_ii dt = {h:.3g}: {factor.description}")
        return found

    def write_trace(self) -> None:
        """Write the work and messages of all sweeps so far to the file of the option ``trace``, if there is one
        (collective); an ``InputError`` on every rank where it cannot be written.
        """
        if self.trace is not None:
            work = self.trace.write if self.spacetime.space_comm.rank == 0 else lambda path: None
            collectively(self.spacetime.comm, "", work, self.options.trace)

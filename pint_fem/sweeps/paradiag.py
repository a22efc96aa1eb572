"""ParaDiag behind the interface of the other sweeps: solvers that share their factors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from pint_fem.all_at_once.levels import Level
from pint_fem.errors import FAILURES
from pint_fem.evolution.evolution import Evolution
from pint_fem.paradiag.circulant import AlphaCirculant
from pint_fem.paradiag.distributed_systems import distributed_system
from pint_fem.paradiag.eliminated import Coupling, eliminated_system
from pint_fem.paradiag.options import ParaDiagOptions
from pint_fem.paradiag.solver import ParaDiag
from pint_fem.paradiag.systems import ProjectedSystem, ShiftedSteps
from pint_fem.propagators.base import FEPropagator
from pint_fem.propagators.linear import LinearPropagator
from pint_fem.sweeps.averaged_systems import AveragedSystems
from pint_fem.theory.estimates import paradiag_contraction

__all__ = ["CoarsestParaDiag", "ParaDiagSweeps", "frequency_systems", "judgement"]


def frequency_systems(propagator: FEPropagator, options: ParaDiagOptions, parameters: Mapping) -> ShiftedSteps:
    """The solves of the frequencies of a linear propagator.

    Parameters
    ----------
    propagator, options
        The step; how much memory factors may take.
    parameters
        PETSc options of the shifted systems; default: a direct solver.

    Raises
    ------
    ValueError
        If the propagator has no constant operators.
    """
    if not isinstance(propagator, LinearPropagator):
        raise ValueError(
            "mgrit coarse_solver 'paradiag' wants an evolution that is linear with constant operators; "
            "give 'sequential'"
        )
    dirk, dt, fields = propagator.dirk, propagator.dt, propagator.fields
    parts = {a: propagator.shifted_parts(a * dt) for a in dict.fromkeys(dirk.diagonal)}
    if fields is None:
        systems = {a: distributed_system(some, parameters) for a, some in parts.items()}
    else:
        coupling = Coupling(fields.matrices["G"], fields.matrices["X"], fields.a, fields.b)
        systems = {a: eliminated_system(coupling, a * dt, some, parameters) for a, some in parts.items()}
    nullspace = propagator.evolution.nullspace
    if nullspace is not None:
        systems = {a: ProjectedSystem(system, nullspace) for a, system in systems.items()}
    return ShiftedSteps(dirk.A, dirk.b, systems, 1e9 * options.memory)


def judgement(evolution: Evolution, options: ParaDiagOptions) -> tuple[str, bool]:
    """What theory says of ParaDiag before it runs, and whether that is a warning; every rank in space calls it."""
    rate = paradiag_contraction(evolution, options.alpha)
    if rate is None:
        return "theory: none for this evolution; ParaDiag uses operators averaged in time and reports its factor", False
    text = f"theory: an iteration of ParaDiag contracts by {rate:.3g} (alpha {options.alpha:g})"
    if rate < 0.5:
        return text, False
    return f"warning: {text[8:]}, as modes grow over the {evolution.nsteps} steps; use 'mgrit' or 'serial'", True


class ParaDiagSweeps:
    """Makes solvers in the place of :class:`~pint_fem.mgrit.MGRIT`.

    Parameters
    ----------
    options
        Of ParaDiag.
    systems
        What the solvers share.
    """

    def __init__(self, options: ParaDiagOptions, systems: ShiftedSteps | AveragedSystems):
        self.options, self.systems = options, systems

    def __call__(self, steps: Sequence, nsteps: int, **given) -> ParaDiag:
        """A solver for the bound steps ``steps[0]``; ``given`` as for MGRIT, whose hierarchy is left out."""
        for unused in ("transfers", "linear", "options"):
            given.pop(unused, None)
        (step,) = steps
        solve = self.systems.solve_transposed if step.transposed else self.systems.solve
        return ParaDiag(step, nsteps, solve, options=self.options, backwards=step.transposed, **given)


class CoarsestParaDiag:
    """Solves the coarsest level of MGRIT by iterations of ParaDiag (``coarse_solver="paradiag"``): no chain of ranks.

    Parameters
    ----------
    systems
        Of the level's propagator.
    alpha
        Of the circulant.
    transposed
        Of an adjoint sweep.
    """

    def __init__(self, systems: ShiftedSteps, alpha: float, *, transposed: bool):
        self._solve = systems.solve_transposed if transposed else systems.solve
        self.alpha, self._transposed = alpha, transposed
        self._circulant: AlphaCirculant | None = None
        self._level: Level | None = None

    def __call__(self, level: Level, iterations: int) -> None:
        """Improve ``level.U`` for ``level.G``, on every rank of the level's communicator."""
        if self._level is not level:
            self._level = level
            self._circulant = AlphaCirculant(
                level.nsteps, self.alpha, self._guarded, level.U[0].size, comm=level.comm, bounds=level.bounds,
                backwards=self._transposed, trace=level.trace,
            )  # fmt: skip
        r = np.empty_like(level.G)
        for _ in range(iterations):
            level.phi_of_all(level.U, r)
            r += level.G
            r -= level.U[1:]
            level.U[1:] += self._circulant(r)
        level.exchange(level.U)

    def _guarded(self, k: int, mu: complex, r: np.ndarray) -> np.ndarray:
        try:
            return self._solve(k, mu, r)
        except FAILURES as error:
            if np.isfinite(r).all() or not isinstance(error, Exception):
                self._level.note(f"frequency {k}", error)
            return np.full_like(r, np.nan)

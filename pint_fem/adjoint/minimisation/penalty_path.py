r"""Bounds on the state: a sequence of penalties, each minimised from the minimiser of the last.

The minimiser of a functional with :class:`~pint_fem.misfits.state_bounds.StateBounds` for a large factor
:math:`\gamma` is hard to find from afar: Newton's method converges in a neighbourhood that shrinks as :math:`\gamma`
grows. The path of minimisers :math:`z_\gamma` is continuous, so that each is a good first guess for the next [1].

References
----------
[1] M. Hintermüller, K. Kunisch, Path-following methods for a class of constrained minimization problems in function
    space, SIAM J. Optim. 17 (2006) 159-187.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mpi4py import MPI

from pint_fem.adjoint.minimisation.bounds_and_constraints import Controls
from pint_fem.collective import collectively, ending_all_ranks, require_same
from pint_fem.errors import InputError
from pint_fem.misfits.state_bounds import StateBounds
from pint_fem.optimize.argument_checks import check
from pint_fem.optimize.records import TrustRegionResult

if TYPE_CHECKING:
    from pint_fem.adjoint.functional import ControlFunctional

__all__ = ["PenaltyPath", "PenaltyRecord", "follow_penalty"]


@dataclass(frozen=True)
class PenaltyRecord:
    """One penalty of a path.

    Attributes
    ----------
    gamma : float
        The factor.
    violation : float
        The largest violation of a bound at a point and a step.
    value : float
        The functional with the penalty at its minimiser.
    iterations, hessian_calls : int
        Iterations and Hessian actions of the minimisation.
    converged : bool
        Whether it has converged.
    """

    gamma: float
    violation: float
    value: float
    iterations: int
    hessian_calls: int
    converged: bool

    def __str__(self) -> str:
        """One line."""
        state = "" if self.converged else ", not converged"
        return (
            f"gamma {self.gamma:9.3e}: largest violation {self.violation:9.3e}, J {self.value:.9e}, "
            f"{self.iterations} iterations{state}"
        )


@dataclass(frozen=True)
class PenaltyPath:
    """The minimisations of a path.

    Attributes
    ----------
    history : list of PenaltyRecord
        One for each factor.
    result : TrustRegionResult
        That of the last one.
    """

    history: list[PenaltyRecord]
    result: TrustRegionResult

    @property
    def control(self) -> object:
        """The controls found: those of the last result."""
        return self.result.control

    @property
    def converged(self) -> bool:
        """Whether all minimisations have converged."""
        return all(record.converged for record in self.history)


def follow_penalty(
    functional: ControlFunctional, state_bounds: StateBounds, *, last: float = 1e8, factor: float = 10.0,
    violation: float = 0.0, start: Controls | None = None, gtol_rel: float = 1e-6, gtol_abs: float = 0.0,
    monitor: Callable[[str], object] | None = None, **options: Any,
) -> PenaltyPath:  # fmt: skip
    """Minimise a functional for larger and larger penalties of bounds on the state (collective).

    Begins with the ``gamma`` that `state_bounds` has, and multiplies it until it is `last` or the bounds are satisfied.
    A minimisation that does not converge ends the path. Afterwards `state_bounds` has the last factor.

    Parameters
    ----------
    functional : TimeParallelReducedFunctional
        The functional, with `state_bounds` among its misfits.
    state_bounds : StateBounds
        The bounds.
    last : float
        The largest factor, finite.
    factor : float
        The ratio of one factor to the last, > 1.
    violation : float
        The path ends where the largest violation is no larger.
    start : Function, EnsembleFunction or list of these, optional
        First controls; default: those of the functional.
    gtol_rel, gtol_abs : float
        All minimisations end at a gradient of norm ``max(gtol_abs, gtol_rel * |gradient at the start of the first|)``.
    monitor : callable, optional
        Called with the lines of all minimisations and one for each factor, on the first rank only.
    **options
        Options of ``functional.minimize_active_set``, such as ``bounds=``, ``preconditioner=``.

    Returns
    -------
    PenaltyPath

    Raises
    ------
    InputError
        On every rank: options out of range, a functional without these bounds, and what ``minimize_active_set`` raises.
    """
    comm = functional.spacetime.comm
    with ending_all_ranks(comm):
        collectively(comm, "", _check, functional, state_bounds, last, factor, violation)
        gammas = _factors(state_bounds.gamma, last, factor)
        require_same(comm, gammas=gammas, violation=float(violation))
        history: list[PenaltyRecord] = []
        for gamma in gammas:
            state_bounds.gamma = gamma
            functional.update_data()
            result = functional.minimize_active_set(
                start, gtol_rel=gtol_rel if not history else 0.0, gtol_abs=gtol_abs, monitor=monitor, **options
            )
            if not history:
                gtol_abs = max(gtol_abs, gtol_rel * result.history[0].gradient_norm)
            start = result.control
            observed = functional.problem.observations(result.x, state_bounds)
            found = comm.allreduce(float(observed[1:, 1].max(initial=0.0)), op=MPI.MAX)
            history.append(
                PenaltyRecord(
                    gamma, found, result.value, result.iterations, result.hessian_calls, result.converged
                )
            )  # fmt: skip
            if monitor is not None and functional.spacetime.is_root:
                monitor(str(history[-1]))
            if found <= violation or not result.converged:
                break
        return PenaltyPath(history, result)


def _factors(first: float, last: float, factor: float) -> list[float]:
    """The factors from the first to the last one, which ends the list whatever the ratio."""
    gammas = [float(first)]
    while gammas[-1] * factor < last * (1 - 1e-9):
        gammas.append(gammas[-1] * factor)
    return [*gammas, float(last)] if gammas[-1] < last else gammas


def _check(functional: Any, state_bounds: object, last: float, factor: float, violation: float) -> None:
    if not isinstance(state_bounds, StateBounds):
        raise InputError(f"follow_penalty: {type(state_bounds).__name__} given: give the StateBounds of the functional")
    if not functional.problem.has_misfit(state_bounds):
        raise InputError("follow_penalty: the functional has no such bounds: give them among its misfits")
    check("last", last, "a finite number > 0", lambda v: 0 < v < math.inf)
    check("factor", factor, "a finite number > 1", lambda v: 1 < v < math.inf)
    check("violation", violation, "a number >= 0", lambda v: 0 <= v)

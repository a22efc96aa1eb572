r"""The choice between KKT systems and conjugate gradients with sweeps, by estimated steps and measured times.

Conjugate gradients for a Hessian :math:`\beta R + G^T Q G` take about :math:`\frac12 \sqrt{\kappa} \ln(2 / \epsilon)`
steps to reduce the residual by :math:`\epsilon`, with the condition number :math:`\kappa` relative to the
regularisation. The Rayleigh quotient of the gradient is an estimate of it from one product with the Hessian. A step is
that product again; a KKT system is a factorisation and some solves with the circulant system, of which one is timed.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from firedrake.petsc import PETSc

from pint_fem.adjoint.minimisation.kkt.preconditioner import KKTPreconditioner, by_active_sets, require_kkt_problem
from pint_fem.adjoint.problem import ReducedProblem
from pint_fem.adjoint.riesz import ControlInner
from pint_fem.collective import all_ranks, collectively
from pint_fem.errors import InputError, SolverFailure

if TYPE_CHECKING:
    from pint_fem.adjoint.functional import ControlFunctional

__all__ = ["choose_kkt", "kkt_systems"]

FEW = 12
"""Steps of conjugate gradients that are taken without a further estimate."""
ITERATIONS = 15
"""Solves with the circulant system for a KKT system, about."""
GTOL_REL = 1e-6
"""The trust region's default tolerance."""
_SOLVED = 1e-6
"""Relative residual of a solve above which a regularisation is singular."""


def kkt_systems(functional: ControlFunctional, options: Mapping) -> KKTPreconditioner:
    """The KKT systems of a functional (collective).

    Raises
    ------
    InputError
        On every rank, where there are none, or an option does not go with them; the message is the reason.
    """
    for name in ("constraints", "inexact", "preconditioner"):
        if options.get(name) is not None:
            raise InputError(f"method 'kkt' does not go with {name}=: use 'trust-region'")
    prefix = f"{functional.evolution.options_prefix}kkt_"
    krylov = [name for name in PETSc.Options().getAll() if name.startswith((f"{prefix}ksp_", f"{prefix}pc_"))]
    if krylov:
        raise InputError(
            f"-{krylov[0]}: pint_fem.kkt.petsc.solve_kkt reads it, but not the method 'kkt'; give gtol_rel= or gtol="
        )
    inner = functional.inner
    if by_active_sets(functional, options) and inner.weights is None:  # they take a diagonal inner product
        inner = ControlInner(functional.layout, "lumped")
    make = lambda: KKTPreconditioner(functional, inner=inner)
    try:
        return collectively(functional.spacetime.comm, "", make)
    except InputError as error:
        raise InputError(f"method 'kkt': {str(error).removeprefix(': ')}; use 'trust-region' or 'auto'") from error


def choose_kkt(
    functional: ControlFunctional, start: np.ndarray, options: Mapping
) -> tuple[KKTPreconditioner | None, str, dict]:
    """The KKT systems where they are faster than conjugate gradients, the reason for or against them, and options with
    which conjugate gradients take as many steps as estimated (collective).

    Parameters
    ----------
    functional, start, options
        What is minimised, first controls ``(layout.size,)`` and options of the minimiser.
    """
    if not functional.evolution.stepwise:
        return None, "no control has one value per step", {}
    if options.get("bounds") is not None and options.get("l1") is None:
        return None, "within bounds the trust region takes less time where many controls are at them", {}
    if not functional.problem.is_quadratic:
        return None, "as J is not a quadratic function of the controls", {}
    try:
        if options.get("l1") is not None:
            return kkt_systems(functional, options), "as l1= is given", {}
        collectively(functional.spacetime.comm, "", require_kkt_problem, functional)
        steps, action = _conjugate_gradients(functional, start, options)
        if steps <= FEW:
            return None, f"as conjugate gradients take about {steps:.0f} steps", _preconditioned(functional)
        begin = time.perf_counter()
        systems = kkt_systems(functional, options)
        _circulant_solve(systems)  # factorises
        made = time.perf_counter() - begin
        seconds = np.array([steps * action, made + ITERATIONS * _circulant_solve(systems)])
    except (InputError, SolverFailure) as error:
        reason = str(error).removeprefix("method 'kkt': ").removesuffix("; use 'trust-region' or 'auto'")
        return None, f"as there is no KKT system: {reason}", {}
    reduced, kkt = functional.spacetime.comm.bcast(seconds)
    compared = f"about {reduced:.2g} s for {steps:.0f} steps of conjugate gradients, {kkt:.2g} s for the KKT system"
    if kkt < reduced:
        return systems, f"as the misfits are the same at all steps and it is faster: {compared}", {}
    systems.release()
    return None, f"as the KKT system is not faster: {compared}", _preconditioned(functional)


def _conjugate_gradients(functional: ControlFunctional, z: np.ndarray, options: Mapping) -> tuple[float, float]:
    """The estimated number of steps, the same on all ranks, and the seconds of one (collective)."""
    problem, inner = functional.problem, functional.inner
    assert isinstance(problem, ReducedProblem)
    g = inner.primal(problem.derivative(z))
    begin = time.perf_counter()
    product = problem.hessian_action(z, g)
    seconds = time.perf_counter() - begin
    weight = problem.layout.pairing(problem.regularisation.hessian(z, g), g)
    value = problem.layout.pairing(product, g)  # zero where the start is the minimiser
    quotient = value / weight if weight > 0 else np.inf if value > 0 else 1.0
    tolerance = max(float(options.get("gtol_rel", GTOL_REL)), 1e-12)
    return 0.5 * np.sqrt(max(quotient, 1.0)) * np.log(2 / min(tolerance, 0.5)), seconds


def _preconditioned(functional: ControlFunctional) -> dict:
    """The option for the regularisation as preconditioner; none where it is singular, as that of a boundary integral
    for values in the domain (collective).
    """
    layout, mass = functional.layout, ControlInner(functional.layout, "L2")
    try:
        product = ControlInner(layout, [functional._second_derivative(c) for c in functional.evolution.controls])
        # static controls, which come first, are the same on all ranks in time
        dual = np.random.default_rng(functional.spacetime.space_comm.rank).standard_normal(layout.size)
        x, y = product.primal(dual), mass.primal(dual)
        if not all_ranks(functional.spacetime.comm, bool(np.isfinite(x).all())):
            return {}
        rest = mass.primal(product.dual(x) - dual)
        accurate = 0 < layout.pairing(dual, x) < np.inf and mass.inner(rest, rest) <= _SOLVED**2 * mass.inner(y, y)
    except (InputError, SolverFailure):  # on all ranks
        accurate = False
    return {"preconditioner": "regularisation"} if accurate else {}


def _circulant_solve(systems: KKTPreconditioner) -> float:
    """Seconds of a solve with the circulant system (collective)."""
    slab, size = systems.kkt.model.slab, systems.kkt.model.control_size
    begin = time.perf_counter()
    systems.kkt.solve(c=np.ones((slab.k, size)), ends=False)
    return time.perf_counter() - begin

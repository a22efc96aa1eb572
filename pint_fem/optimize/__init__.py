"""Minimisers of functions that are given by their values, derivatives and inner product.

They need numpy and mpi4py only; ``scipy_minimize`` and ``ScipyResult`` are loaded, with scipy, on their first use.
"""

import importlib
from typing import TYPE_CHECKING

from pint_fem.optimize.active_set.method import minimize_active_set
from pint_fem.optimize.active_set.records import ActiveSetRecord
from pint_fem.optimize.composite_step.method import minimize_composite_step
from pint_fem.optimize.composite_step.protocol import ConstrainedProblem, KKTReport
from pint_fem.optimize.composite_step.records import CompositeStepRecord, CompositeStepResult
from pint_fem.optimize.constraints import AffineConstraints
from pint_fem.optimize.lbfgs import InverseLBFGS
from pint_fem.optimize.one_shot.method import minimize_one_shot
from pint_fem.optimize.one_shot.records import OneShotRecord, OneShotResult
from pint_fem.optimize.preconditioners import LimitedMemoryPreconditioner
from pint_fem.optimize.protocol import (
    Checkpoint,
    GaussNewtonProblem,
    InexactProblem,
    NonFiniteError,
    OneShotProblem,
    Preconditioner,
    Problem,
)
from pint_fem.optimize.records import CGStop, IterationRecord, StopReason, TrustRegionResult
from pint_fem.optimize.trust_region.bounded import minimize_bounded
from pint_fem.optimize.trust_region.inexact import InexactOptions
from pint_fem.optimize.trust_region.multipliers import minimize_bounded_constrained
from pint_fem.optimize.trust_region.newton_cg import minimize_trust_region

if TYPE_CHECKING:
    from pint_fem.optimize.scipy_methods.adapter import ScipyResult, scipy_minimize

__all__ = [
    "ActiveSetRecord",
    "AffineConstraints",
    "CGStop",
    "Checkpoint",
    "CompositeStepRecord",
    "CompositeStepResult",
    "ConstrainedProblem",
    "GaussNewtonProblem",
    "InexactOptions",
    "InexactProblem",
    "InverseLBFGS",
    "IterationRecord",
    "KKTReport",
    "LimitedMemoryPreconditioner",
    "NonFiniteError",
    "OneShotProblem",
    "OneShotRecord",
    "OneShotResult",
    "Preconditioner",
    "Problem",
    "ScipyResult",
    "StopReason",
    "TrustRegionResult",
    "minimize_active_set",
    "minimize_bounded",
    "minimize_bounded_constrained",
    "minimize_composite_step",
    "minimize_one_shot",
    "minimize_trust_region",
    "scipy_minimize",
]


def __getattr__(name: str) -> object:
    if name in ("ScipyResult", "scipy_minimize"):
        return getattr(importlib.import_module("pint_fem.optimize.scipy_methods.adapter"), name)
    raise AttributeError(f"module 'pint_fem.optimize' has no attribute {name!r}")

"""Optimisers that see a reduced functional only through its value, derivatives and inner product."""

from pint_fem.optimize.inexact import InexactOptions
from pint_fem.optimize.preconditioners import LimitedMemoryPreconditioner
from pint_fem.optimize.protocol import (
    Checkpoint,
    GaussNewtonProblem,
    InexactProblem,
    NonFiniteError,
    Preconditioner,
    Problem,
)
from pint_fem.optimize.records import IterationRecord, StopReason, TrustRegionResult
from pint_fem.optimize.steihaug import CGStop
from pint_fem.optimize.trust_region import minimize_trust_region

__all__ = [
    "CGStop",
    "Checkpoint",
    "GaussNewtonProblem",
    "InexactOptions",
    "InexactProblem",
    "IterationRecord",
    "LimitedMemoryPreconditioner",
    "NonFiniteError",
    "Preconditioner",
    "Problem",
    "StopReason",
    "TrustRegionResult",
    "minimize_trust_region",
]

"""Optimisers that see a reduced functional only through its value, derivatives and inner product."""

from pint_fem.optimize.trust_region import (
    CGStop,
    IterationRecord,
    NonFiniteError,
    Problem,
    StopReason,
    TrustRegionResult,
    minimize_trust_region,
)

__all__ = [
    "CGStop",
    "IterationRecord",
    "NonFiniteError",
    "Problem",
    "StopReason",
    "TrustRegionResult",
    "minimize_trust_region",
]

"""The memory that any optimisation requires for its trajectories."""

from __future__ import annotations

from pint_fem.evolution.evolution import Evolution
from pint_fem.kernels.arrays import own_size
from pint_fem.spacetime import Slab

__all__ = ["least_bytes"]


def least_bytes(evolution: Evolution, slab: Slab, m: int = 1) -> int:
    """Bytes that any optimisation requires on a rank with a slab's steps of which every ``m``-th point is stored.

    They are those of state, adjoint, a sweep and its right-hand side at the stored points, and of three vectors of the
    controls that have one value per step.
    """
    rows = slab.k // m + 1
    stepwise = sum(own_size(control.function_space()) for control in evolution.stepwise)
    return 8 * (4 * rows * evolution.state_size + 3 * slab.k * stepwise)

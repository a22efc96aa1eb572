"""What a reduced problem has computed for one control: trajectories, how accurately they are solved, values."""

from __future__ import annotations

import numpy as np

from pint_fem.all_at_once.stopping import SolveResult
from pint_fem.sweeps.sweeps import Sweeps

__all__ = ["Evaluation", "relative_residual"]


class Evaluation:
    """What is known at a control.

    Attributes
    ----------
    z : ndarray or None
        The control.
    U, L : ndarray, shape (k + 1, n)
        State and adjoint, or first guesses of them; at the C-points with ``storage="C"``.
    state, adjoint : SolveResult or None
        How they were solved for this control; the adjoint for this state.
    controls : ndarray or None
        What of the gradient came with the adjoint's right-hand side.
    readings : list of ndarray or None
        What misfits have observed of the state, where it is not stored at all points.
    """

    def __init__(self, sweeps: Sweeps):
        self.U, self.L = sweeps.new_slab(), sweeps.new_slab()
        self.reset(sweeps.initial)

    def reset(self, initial: np.ndarray) -> None:
        """Forget everything: solves start cold."""
        self.U[:], self.L[:] = initial, 0
        self.cold = {"state": True, "adjoint": True}  # no solution yet to start from
        self.move_to(None)

    def move_to(self, z: np.ndarray | None) -> None:
        """Another control; the trajectories are first guesses."""
        self.z = None if z is None else z.copy()
        self.state: SolveResult | None = None
        self.rtol = {"state": np.inf, "adjoint": np.inf}  # tolerances reached
        self.state_changed()

    def state_changed(self) -> None:
        """What follows from the state is not known any more."""
        self.adjoint: SolveResult | None = None
        self.rtol["adjoint"] = np.inf
        self.value = self.gradient = self.controls = self.readings = None
        self.parts: dict[str, float] = {}

    def start_from(self, other: Evaluation) -> None:
        """Take another point's trajectories as first guesses."""
        self.U[:], self.L[:] = other.U, other.L
        self.cold = dict(other.cold)


def relative_residual(result: SolveResult) -> float:
    """Last residual of a solve relative to the trajectory; 0 for sequential ones, infinite where none was computed."""
    residual = result.relative_residual
    return np.inf if np.isnan(residual) else residual

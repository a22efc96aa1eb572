"""Residuals of a solve and their norms over time, looked at every cycle or all behind a fixed number of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pint_fem.mgrit.failures import Failures
from pint_fem.mgrit.grids import Bounds
from pint_fem.mgrit.norms import gather_in_order, norm_over_time
from pint_fem.mgrit.trace import Trace

__all__ = ["Residuals"]


class Residuals:
    """Norms of residuals and trajectories of the finest level, the same on every rank.

    Parameters
    ----------
    failures
        Of the solver; values that are not finite are raised there.
    kind
        Norm over time: 1, 2 or ``"inf"``.
    trace
        Gets the work; ``None``: nobody does.
    """

    def __init__(self, failures: Failures, kind: int | str, trace: Trace | None):
        self.failures, self.kind, self.trace = failures, kind, trace
        self._all: np.ndarray | None = None

    def squares(self, block: np.ndarray) -> np.ndarray:
        """Squared norms of own states, to be gathered with others later; not collective over time."""
        begin = self.trace.now() if self.trace else 0.0
        squares = self.failures.squares(block)
        self._worked(begin)
        return squares

    def norms(self, *blocks: tuple[np.ndarray, Bounds | None]) -> list[float]:
        """Norms over time (collective): one for each block of own states, which is given with the bounds that say how
        many each rank has (``None``: they are counted).

        Raises
        ------
        SolverFailure
            On every rank, if one is not finite.
        """
        begin = self.trace.now() if self.trace else 0.0
        places = blocks[0][1]
        squares = [self.failures.squares(block) for block, _ in blocks]
        if all(at is places for _, at in blocks):
            norms = self._gathered(np.stack(squares, axis=1), places)
        else:
            norms = [self._gathered(each, at) for each, (_, at) in zip(squares, blocks, strict=True)]
        self._worked(begin)
        return self._finite(norms)

    def norms_of(self, squares: Sequence[np.ndarray], places: Bounds) -> list[float]:
        """Norms over time of :meth:`squares` of states at the same points, all in one message (collective).

        Raises
        ------
        SolverFailure
            On every rank, if one is not finite.
        """
        begin = self.trace.now() if self.trace else 0.0
        norms = self._gathered(np.stack(squares, axis=1), places)
        self._worked(begin)
        return self._finite(norms)

    def _gathered(self, squares: np.ndarray, places: Bounds | None) -> np.ndarray:
        return norm_over_time(gather_in_order(squares, self.failures.comm, places), self.kind)

    def _finite(self, norms) -> list[float]:
        if not np.isfinite(norms).all():
            self.failures.raise_unless(False)
        return [float(norm) for norm in norms]

    def _worked(self, begin: float) -> None:
        if self.trace:
            self.trace.work("norm", 0, begin, sweep=self.failures.name)

    def at_all_points(self, U: np.ndarray) -> np.ndarray:
        """``Phi(U) + G - U`` at all own points, computed anew (messages to the neighbours)."""
        fine = self.failures.levels[0]
        if self._all is None or (self._all.shape[1:], self._all.dtype) != (U.shape[1:], U.dtype):
            self._all = np.empty((fine.k, *U.shape[1:]), U.dtype)
        fine.phi_of_all(U, self._all)
        if fine.G is not None:
            self._all += fine.G
        self._all -= U[1:]
        return self._all

"""Residuals of a solve and their norms over time, looked at every cycle or all behind a fixed number of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from pint_fem.all_at_once.failures import Failures
from pint_fem.all_at_once.grids import Bounds
from pint_fem.all_at_once.norms import gather_in_order, norm_over_time

__all__ = ["Residuals"]


class Residuals:
    """Norms of residuals and trajectories of the finest level, the same on every rank.

    Parameters
    ----------
    failures
        Of the solver; values that are not finite are raised there.
    kind
        Norm over time: 1, 2 or ``"inf"``.
    """

    def __init__(self, failures: Failures, kind: int | str):
        self.failures, self.kind = failures, kind
        self._all: np.ndarray | None = None

    @contextmanager
    def timed(self) -> Iterator[None]:
        """What is done within is the work of a look at the residual, for the trace."""
        trace = self.failures.levels[0].trace
        begin = trace.now() if trace else 0.0
        yield
        if trace:
            trace.work("norm", 0, begin, sweep=self.failures.name)

    def squares(self, block: np.ndarray) -> np.ndarray:
        """Squared norms of own states, for :meth:`norms`; not collective over time."""
        return self.failures.squares(block)

    def norms(self, squares: Sequence[np.ndarray], places: Bounds | None) -> list[float]:
        """Norms over time of own states' :meth:`squares` (collective): all blocks have as many states, which the bounds
        say of each rank (``None``: they are counted), and go in one message.

        Raises
        ------
        SolverFailure
            On every rank, if one is not finite.
        """
        local = squares[0] if len(squares) == 1 else np.stack(squares, axis=1)
        norms = norm_over_time(gather_in_order(local, self.failures.comm, places), self.kind)
        if not np.isfinite(norms).all():
            self.failures.raise_unless(False)
        return np.atleast_1d(norms).tolist()

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

"""Solves of the frequencies whose failures reach all ranks: a failed solution is NaN, and the failure is noted."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pint_fem.all_at_once.callbacks import returned_block
from pint_fem.errors import FAILURES, is_numerical
from pint_fem.paradiag.circulant import BlockSolve, FrequencySolve

__all__ = ["GuardedBlocks", "GuardedSolve"]

Note = Callable[[str, BaseException], None]


class GuardedSolve:
    """The solve of one frequency.

    Parameters
    ----------
    solve
        ``(k, mu, r) -> v``.
    note
        Takes where a failure has happened, and the exception.

    Attributes
    ----------
    members : int
        States of a batch that the right-hand side of a frequency has, one after another.
    """

    def __init__(self, solve: FrequencySolve, note: Note):
        self._solve, self._note, self.members = solve, note, 1

    def __call__(self, k: int, mu: complex, r: np.ndarray) -> np.ndarray:
        """Solve for a frequency; a failure becomes NaN, which the residual's norm carries to every rank."""
        try:
            rows = r.reshape(self.members, -1)
            solve = lambda row: returned_block("solve(k, mu, r)", self._solve, row.shape, k, mu, row)
            return solve(r) if self.members == 1 else np.concatenate([solve(row) for row in rows])
        except FAILURES as error:
            if np.isfinite(r).all() or not isinstance(error, Exception):
                self._note(f"frequency {k}", error)
            return np.full_like(r, np.nan)


class GuardedBlocks:
    """The solves of all frequencies of a rank.

    Parameters
    ----------
    blocks
        Solves for several frequencies at once, with the batch of a frequency's right-hand sides.
    solve
        The guarded solve of one frequency, which finds out which frequency has failed.
    note
        Takes where a failure has happened, and the exception.
    """

    def __init__(self, blocks: BlockSolve, solve: GuardedSolve, note: Note):
        self._blocks, self._solve, self._note = blocks, solve, note

    @property
    def available(self) -> bool:
        """Whether there are such solves."""
        return self._blocks.available

    def __call__(self, frequencies: range, mu: np.ndarray, rows: np.ndarray, out: np.ndarray) -> None:
        """Write the solutions for frequencies to ``out``; those that fail are NaN."""
        batch = len(rows), self._solve.members, -1
        try:
            self._blocks(frequencies, mu, rows.reshape(batch), out.reshape(batch))
        except FAILURES as error:
            if is_numerical(error):
                for k, row, solution in zip(frequencies, rows, out, strict=True):
                    solution[...] = self._solve(k, complex(mu[k]), row.astype(complex))
            else:
                self._note(f"frequencies {frequencies.start} to {frequencies.stop - 1}", error)
                out[...] = np.nan

r"""The alpha-circulant preconditioner of all steps at once, diagonalised in time by a scaled Fourier transform.

All steps of a linear evolution, :math:`u_{i+1} - \Phi u_i = g_i`, are the system :math:`A u = b`, block lower
bidiagonal. :math:`P_\alpha` is :math:`A` with :math:`-\alpha \Phi` in its corner: the last step feeds the first one.
With

.. math::
   v_i = \alpha^{i/N} w_i , \qquad \hat v_k = \sum_{i<N} v_i\, e^{-2 \pi \mathrm{i}\, k i / N} , \qquad
   \mu_k = \alpha^{1/N} e^{-2 \pi \mathrm{i}\, k / N}

the system :math:`P_\alpha w = r` falls apart into :math:`(I - \mu_k \Phi)\, \hat v_k = \hat r_k`, one for each
frequency, and those of ``k`` and ``N - k`` are conjugate: ``N//2 + 1`` are solved (McDonald, Pestana, Wathen, SISC
40(2), 2018; Gander, Wu, Numer. Math. 143, 2019).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
import scipy.fft

from pint_fem.all_at_once.trace import Trace
from pint_fem.paradiag.distribution import TimeTransposes

__all__ = ["AlphaCirculant", "FrequencySolve", "shifts"]

FrequencySolve = Callable[[int, complex, np.ndarray], np.ndarray]
r"""``(k, mu, r) -> v`` with :math:`(I - \mu \Phi) v = r`, complex ``(n,)`` arrays; ``k`` tells frequencies apart."""


def shifts(nsteps: int, alpha: float) -> np.ndarray:
    r""":math:`\mu_k` for ``k = 0 .. N//2``.

    Parameters
    ----------
    nsteps
        ``N``.
    alpha
        Between 0 and 1.

    Returns
    -------
    ndarray of complex, shape (N//2 + 1,)
    """
    k = np.arange(nsteps // 2 + 1)
    return alpha ** (1 / nsteps) * np.exp(-2j * np.pi * k / nsteps)


@lru_cache(maxsize=8)
def _shared_shifts(nsteps: int, alpha: float) -> np.ndarray:
    mu = shifts(nsteps, alpha)
    mu.flags.writeable = False
    return mu


class AlphaCirculant:
    r"""Applies :math:`P_\alpha^{-1}`.

    Parameters
    ----------
    nsteps, alpha
        ``N`` and :math:`\alpha`.
    solve
        The solve of one frequency.
    size
        Local unknowns of a state.
    comm, bounds
        Time communicator and step bounds of its ranks.
    backwards
        See :class:`~pint_fem.paradiag.distribution.TimeTransposes`.
    trace
        Takes the times of transforms, messages and solves.
    transposes
        What maps between the layouts.

    Attributes
    ----------
    mu : ndarray of complex, shape (N//2 + 1,)
        The shifts :math:`\mu_k`.
    transposes : TimeTransposes
        Maps between the layouts.
    """

    def __init__(
        self,
        nsteps: int,
        alpha: float,
        solve: FrequencySolve,
        size: int,
        *,
        comm,
        bounds: Sequence[int],
        backwards: bool = False,
        trace: Trace | None = None,
        transposes: Callable[..., TimeTransposes] = TimeTransposes,
    ):
        self.nsteps, self.alpha, self._solve, self._trace = nsteps, alpha, solve, trace
        self.mu = _shared_shifts(nsteps, alpha)
        self.transposes = transposes(comm, bounds, len(self.mu), size, backwards=backwards)
        lo, hi = bounds[comm.rank], bounds[comm.rank + 1]
        self._scale = alpha ** (np.arange(lo, hi) / nsteps)[:, None]

    @property
    def own(self) -> range:
        """Frequencies that this rank solves for."""
        return self.transposes.own

    def __call__(self, r: np.ndarray) -> np.ndarray:
        r""":math:`P_\alpha^{-1} r` of the own steps, ``(k, n)`` (collective)."""
        transposes = self.transposes
        columns = self._transposed(transposes.to_columns, r * self._scale)
        spectrum = self._timed("fft", self.rfft, columns)
        rows = self._transposed(transposes.to_frequencies, spectrum)
        rows = self._timed("frequencies", self._solve_all, rows, states=len(rows))
        spectrum = self._transposed(transposes.from_frequencies, rows)
        columns = self._timed("fft", self.irfft, spectrum)
        w = self._transposed(transposes.from_columns, columns)
        w /= self._scale
        return w

    def _solve_all(self, rows: np.ndarray) -> np.ndarray:
        for k, row in zip(self.own, rows, strict=True):
            row[...] = self._solve(k, complex(self.mu[k]), row)
        return rows

    def _timed(self, name: str, work: Callable, *args, **facts):
        if self._trace is None:
            return work(*args)
        begin = self._trace.now()
        out = work(*args)
        self._trace.work(name, 0, begin, **facts)
        return out

    def _transposed(self, work: Callable, array: np.ndarray) -> np.ndarray:
        if self._trace is None:
            return work(array)
        begin, self.transposes.sent = self._trace.now(), 0
        out = work(array)
        self._trace.work("transpose", 0, begin, sent=self.transposes.sent)
        return out

    def rfft(self, columns: np.ndarray) -> np.ndarray:
        """Transform of all steps, ``(N, c) -> (N//2 + 1, c)``."""
        if not columns.shape[1]:
            return np.empty((len(columns) // 2 + 1, 0), complex)
        return scipy.fft.rfft(columns, axis=0)

    def irfft(self, spectrum: np.ndarray) -> np.ndarray:
        """Its inverse."""
        if not spectrum.shape[1]:
            return np.empty((self.nsteps, 0))
        return scipy.fft.irfft(spectrum, self.nsteps, axis=0, overwrite_x=True)

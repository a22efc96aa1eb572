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
from functools import lru_cache, partial
from typing import Protocol

import numpy as np
from mpi4py import MPI
from numpy.typing import DTypeLike

from pint_fem.all_at_once.trace import Trace, timed
from pint_fem.collective import all_ranks
from pint_fem.paradiag.distribution import TimeTransposes
from pint_fem.paradiag.lane_kernels import WIDTHS, lane_kernels
from pint_fem.paradiag.transforms import TimeTransform, time_transform

try:
    import scipy.fft as fft
except ImportError:  # the algebra does without scipy
    rfft, irfft = np.fft.rfft, np.fft.irfft
else:
    rfft, irfft = fft.rfft, partial(fft.irfft, overwrite_x=True)

__all__ = ["AlphaCirculant", "BlockSolve", "FrequencySolve", "shifts"]

FrequencySolve = Callable[[int, complex, np.ndarray], np.ndarray]
r"""``(k, mu, r) -> v`` with :math:`(I - \mu \Phi) v = r`, complex ``(n,)`` arrays; ``k`` numbers the frequency."""


class BlockSolve(Protocol):
    """Solves for several frequencies at once."""

    @property
    def available(self) -> bool:
        """Whether it can be called."""

    def __call__(self, frequencies: range, mu: np.ndarray, rows: np.ndarray, out: np.ndarray) -> None:
        """Write the solutions for some frequencies to ``out``.

        Parameters
        ----------
        frequencies
            Their numbers ``k``.
        mu
            The numbers of all frequencies, ``(N//2 + 1,)``.
        rows, out
            Right-hand sides and solutions, ``(frequencies, batch, n)``, whose type is the precision.
        """


def shifts(nsteps: int, alpha: float) -> np.ndarray:
    r"""The shifts :math:`\mu_k` of the frequencies ``k`` from 0 to ``N//2``.

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
    r"""The preconditioner :math:`P_\alpha^{-1}` of the steps of all ranks.

    Parameters
    ----------
    nsteps, alpha
        ``N`` and :math:`\alpha`.
    solve
        The solve of one frequency.
    blocks
        Solves for several frequencies at once, which are used instead of ``solve`` where they are available; transforms
        are then those of :mod:`~pint_fem.paradiag.transforms`.
    size
        Local unknowns of a state.
    comm, bounds
        Time communicator and step bounds of its ranks.
    backwards
        Whether ``comm`` is another communicator in reverse order, where ranks have the same frequencies.
    trace
        Records transforms, messages and solves.
    transposes
        Class of the maps between the layouts.

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
        comm: MPI.Comm,
        bounds: Sequence[int],
        blocks: BlockSolve | None = None,
        backwards: bool = False,
        trace: Trace | None = None,
        transposes: Callable[..., TimeTransposes] = TimeTransposes,
    ):
        self.nsteps, self.alpha, self._solve, self._trace = nsteps, alpha, solve, trace
        if blocks is not None and not all_ranks(comm, lane_kernels("f", WIDTHS["f"][-1]) is not None):
            blocks = None  # a rank without a compiler: all have the same precision
        self._blocks = blocks
        self.mu = _shared_shifts(nsteps, alpha)
        self.transposes = transposes(comm, bounds, len(self.mu), size, backwards=backwards)
        lo, hi = bounds[comm.rank], bounds[comm.rank + 1]
        self._memory: dict[str, np.ndarray] = {}
        self._scale = alpha ** (np.arange(lo, hi) / nsteps)[:, None]

    @property
    def own(self) -> range:
        """Frequencies that this rank solves for."""
        return self.transposes.own

    def __call__(self, r: np.ndarray, *, single: bool = False) -> np.ndarray:
        r""":math:`P_\alpha^{-1} r` of the own steps, ``(k, n)`` (collective); arguments as for :meth:`add`."""
        w = np.zeros(r.shape)
        self.add(r, w, single=single)
        return w

    def add(self, r: np.ndarray, U: np.ndarray, *, single: bool = False) -> None:
        r"""Add :math:`P_\alpha^{-1} r` to the states of the own steps, ``(k, n)`` (collective).

        Parameters
        ----------
        r, U
            Residuals and states of the own steps, ``(k, n)``, or states ``(k, *state)`` of as many numbers.
        single
            Transform and solve in single precision, where several frequencies are solved at once: round-off is then
            about :math:`10^{-7}/\alpha`, relative to the result. All ranks have to give the same.
        """
        if self._blocks is not None and self._blocks.available:
            r, kind = np.ascontiguousarray(r, dtype=float), "f" if single else "d"
            if U.flags.c_contiguous and U.dtype == float:
                self._add_by_blocks(r, U, kind)
            else:
                w = np.zeros(r.shape)
                self._add_by_blocks(r, w, kind)
                U += w.reshape(U.shape)
            return
        transposes = self.transposes
        columns = self._transposed(transposes.to_columns, r * self._scale)
        with timed(self._trace, "fft", 0):
            spectrum = self.rfft(columns)
        rows = self._transposed(transposes.to_frequencies, spectrum)
        with timed(self._trace, "frequencies", 0, states=len(rows)):
            for k, row in zip(self.own, rows, strict=True):
                row[...] = self._solve(k, complex(self.mu[k]), row)
        spectrum = self._transposed(transposes.from_frequencies, rows)
        with timed(self._trace, "fft", 0):
            columns = self.irfft(spectrum)
        w = self._transposed(transposes.from_columns, columns)
        w /= self._scale
        U += w.reshape(U.shape)

    def _add_by_blocks(self, r: np.ndarray, U: np.ndarray, kind: str) -> None:
        """Add the result to C-contiguous states, with all own frequencies solved at once in a precision."""
        transposes, transform = self.transposes, self.transform(kind)
        scale, inverse = self._scale[:, 0], 1 / self._scale[:, 0]
        alone = transform is not None and transposes.comm.size == 1
        if alone:  # scaled by the transform
            columns = self._transposed(transposes.to_columns, r)
        else:
            scaled = self._buffer("scaled", r.shape, np.dtype(kind))
            np.multiply(r, self._scale, out=scaled, casting="same_kind")
            columns = self._transposed(transposes.to_columns, scaled)
        with timed(self._trace, "fft", 0):
            if transform is None:
                spectrum = self.rfft(columns)
            else:
                shape = len(self.mu), columns.shape[1]
                spectrum = self._buffer("spectrum", shape, transform.complex)
                transform.forward(columns, spectrum, scale if alone else None)
        rows = self._transposed(transposes.to_frequencies, spectrum)
        with timed(self._trace, "frequencies", 0, states=len(rows)):
            solutions = self._buffer("solutions", rows.shape, rows.dtype)
            self._blocks(self.own, self.mu, rows, solutions)
        spectrum = self._transposed(transposes.from_frequencies, solutions)
        with timed(self._trace, "fft", 0):
            if alone:
                transform.backward(spectrum, U, inverse)
                columns = U
            elif transform is None:
                columns = self.irfft(spectrum)
            else:
                columns = self._buffer("columns", (self.nsteps, spectrum.shape[1]), np.dtype(kind))
                transform.backward(spectrum, columns)
        w = self._transposed(transposes.from_columns, columns)
        if transform is None:
            U += (w * inverse[:, None]).reshape(U.shape)
        elif not alone:
            transform.add(w, U, inverse)

    def transform(self, kind: str) -> TimeTransform | None:
        """The kernels of transforms in a precision, ``"f"`` or ``"d"``, if there are any."""
        return time_transform(self.nsteps, kind)

    def _buffer(self, name: str, shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
        """An array that is allocated once: new memory costs about as much as a transform."""
        array = self._memory.get(name)
        if array is None or array.shape != shape or array.dtype != dtype:
            array = self._memory[name] = np.empty(shape, dtype)
        return array

    def _transposed(self, work: Callable, array: np.ndarray) -> np.ndarray:
        """Change the layout of an array; the trace records the bytes sent."""
        self.transposes.sent = 0
        begin = self._trace.now() if self._trace else 0.0
        out = work(array)
        if self._trace:
            self._trace.work("transpose", 0, begin, sent=self.transposes.sent)
        return out

    def rfft(self, columns: np.ndarray) -> np.ndarray:
        """Transform of all steps, ``(N, c) -> (N//2 + 1, c)``."""
        if not columns.shape[1]:
            return np.empty((len(columns) // 2 + 1, 0), np.result_type(columns, np.complex64))
        return rfft(columns, axis=0).astype(np.result_type(columns, np.complex64), copy=False)

    def irfft(self, spectrum: np.ndarray) -> np.ndarray:
        """Inverse transform of all steps, ``(N//2 + 1, c) -> (N, c)``."""
        if not spectrum.shape[1]:
            return np.empty((self.nsteps, 0), spectrum.real.dtype)
        return irfft(spectrum, self.nsteps, axis=0).astype(spectrum.real.dtype, copy=False)

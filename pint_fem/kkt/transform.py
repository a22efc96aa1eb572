r"""The skew-circulant transform in time, which diagonalises the shift by one step whose sign changes at the end.

With :math:`x_0 = -x_N` the shift :math:`x_{n} \mapsto x_{n-1}` has the eigenvalues

.. math::
   \mu_k = e^{-\mathrm{i} \pi (2 k + 1) / N} , \qquad
   \hat x_k = \sum_{n=1}^{N} x_n\, e^{-\mathrm{i} \pi (2 k + 1) n / N} ,

and its transpose has the conjugate ones with the same transform: forward and adjoint equations are diagonal together
(Bini, Latouche, Meini, Numerical Methods for Structured Markov Chains, 2005, section 2.4). For real sequences the
numbers of ``k`` and ``N - 1 - k`` are conjugate, so that half of them are computed. For even ``N`` those of even ``k``
are one complex transform of length ``N/2``,

.. math::
   \hat x_{2 j} = \sum_{m=0}^{N/2 - 1} (y_m - \mathrm{i}\, y_{m + N/2})\, e^{-\mathrm{i} \pi m / N}
                  e^{-2 \pi \mathrm{i}\, j m / (N/2)} \, e^{-\mathrm{i} \pi (4 j + 1)/N} , \qquad y_m = x_{m+1} .
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.fft
from mpi4py import MPI

from pint_fem.paradiag.distribution import TimeTransposes

__all__ = ["SkewCirculant"]


class SkewCirculant:
    """The transform of the steps of all ranks.

    Parameters
    ----------
    nsteps
        ``N``, at least 1.
    size
        Numbers of a step on this rank.
    comm, bounds
        Time communicator, and the bounds of its ranks' steps, ``(comm.size + 1,)``.

    Attributes
    ----------
    mu : ndarray of complex, shape (ceil(N/2),)
        The eigenvalues of the shift that belong to the frequencies.
    own : range
        Frequencies of this rank.
    multiplicity : ndarray, shape (ceil(N/2),)
        2 for each frequency that stands for a conjugate one as well, else 1.
    """

    def __init__(self, nsteps: int, size: int, *, comm: MPI.Comm, bounds: Sequence[int]):
        self.nsteps, self.size = nsteps, size
        count = (nsteps + 1) // 2
        # the numbers k of the frequencies
        k = 2 * np.arange(count) if nsteps % 2 == 0 else np.arange(count)
        self._angles = np.pi * (2 * k + 1) / nsteps
        self.mu = np.exp(-1j * self._angles)
        self.multiplicity = np.full(count, 2)
        if nsteps % 2:
            self.multiplicity[-1] = 1  # mu = -1
        self.transposes = TimeTransposes(comm, bounds, count, size)
        self.own = self.transposes.own

    def phases(self, step: int) -> np.ndarray:
        r"""The factors :math:`e^{-\mathrm{i} \pi (2 k + 1) n / N}` of step ``n``, ``(ceil(N/2),)``."""
        return np.exp(-1j * self._angles * step)

    def weights(self, step: int) -> np.ndarray:
        """The numbers ``w`` for which the real part of ``sum_k w_k x_k`` over all frequencies is ``x`` of a step."""
        return self.multiplicity / self.nsteps * np.exp(1j * self._angles * step)

    def forward(self, rows: np.ndarray, *, single: bool = False) -> np.ndarray:
        """Transform the own steps, ``(k, size)``, to the own frequencies, ``(frequencies, size)`` (collective).

        Parameters
        ----------
        rows
            Real numbers.
        single
            Whether it is done in single precision.
        """
        real = np.dtype(np.float32 if single else np.float64)
        columns = self.transposes.to_columns(np.ascontiguousarray(rows, real))
        spectrum = self._forward(columns)
        return self.transposes.to_frequencies(spectrum)

    def backward(self, spectrum: np.ndarray) -> np.ndarray:
        """The inverse of :meth:`forward` in the precision of its argument: own steps, ``(k, size)`` (collective)."""
        columns = self._backward(self.transposes.from_frequencies(np.ascontiguousarray(spectrum)))
        return self.transposes.from_columns(columns)

    def _forward(self, columns: np.ndarray) -> np.ndarray:
        """Transform of all steps of some unknowns, ``(N, c) -> (ceil(N/2), c)``."""
        N, kind = self.nsteps, np.result_type(columns, np.complex64)
        if not columns.shape[1]:
            return np.empty((len(self.mu), 0), kind)
        if N % 2:
            x = columns * self._twist(N, kind)
            spectrum = scipy.fft.fft(x, axis=0, overwrite_x=True)[: len(self.mu)]
        else:
            x = np.empty((N // 2, columns.shape[1]), kind)
            x.real, x.imag = columns[: N // 2], -columns[N // 2 :]
            x *= self._twist(N // 2, kind)
            spectrum = scipy.fft.fft(x, axis=0, overwrite_x=True)
        spectrum *= self.mu[:, None].astype(kind)
        return spectrum

    def _backward(self, spectrum: np.ndarray) -> np.ndarray:
        """The inverse transform of some unknowns, ``(ceil(N/2), c) -> (N, c)``."""
        N, kind = self.nsteps, spectrum.dtype
        out = np.empty((N, spectrum.shape[1]), spectrum.real.dtype)
        if not spectrum.shape[1]:
            return out
        x = spectrum * self.mu.conj()[:, None].astype(kind)
        if N % 2:
            whole = np.concatenate([x, x[: N // 2][::-1].conj()])
            whole = scipy.fft.ifft(whole, axis=0, overwrite_x=True)
            whole *= self._twist(N, kind).conj()
            out[:] = whole.real
        else:
            x = scipy.fft.ifft(x, axis=0, overwrite_x=True)
            x *= self._twist(N // 2, kind).conj()
            out[: N // 2], out[N // 2 :] = x.real, -x.imag
        return out

    def _twist(self, count: int, kind: np.dtype) -> np.ndarray:
        r"""The factors :math:`e^{-\mathrm{i} \pi m / N}`, ``(count, 1)``."""
        return np.exp(-1j * np.pi * np.arange(count) / self.nsteps)[:, None].astype(kind)

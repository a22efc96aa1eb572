r"""Spectral form of linear inverse problems with Gaussian prior and noise.

With the prior covariance :math:`\Gamma = A^{-1}`, the noise covariance :math:`N` and a weight :math:`\alpha` of the
prior, the mean and the covariance of the posterior are

.. math::
    z = m_0 + W^T (\alpha + \Lambda)^{-1} \beta(r), \qquad
    \mathrm{Cov} = \alpha^{-1} \big(\Gamma - W^T S\, (\alpha + \Lambda)^{-1} W\big), \qquad r = d - y_0 - F m_0 ,

for any :math:`\alpha` once the eigenvalues :math:`\Lambda` of the misfit's Hessian relative to the prior are computed.
They are those of a dense matrix in the smaller one of two spaces.

* *Data space.* With reduced rows :math:`F = Q C` (:mod:`pint_fem.inverse.reduction`) and :math:`Q^T N^{-1} Q = T T^T`,
  :math:`T^T C\, \Gamma\, C^T T = U \Lambda U^T`; then :math:`W = U^T T^T C\, \Gamma`, :math:`S = I` and
  :math:`\beta = U^T T^{-1} Q^T N^{-1} r`.
* *Parameter space.* :math:`F^T N^{-1} F\, V = A V \Lambda` with :math:`V^T A V = I`; then :math:`W = V^T`,
  :math:`S = \Lambda` and :math:`\beta = V^T F^T N^{-1} r`.

The vectors of :math:`W` are divided by columns among all ranks; matrices of the smaller space are on all of them.

Sources: A. Tarantola, Inverse Problem Theory, SIAM 2005, section 3.2; T. Bui-Thanh, O. Ghattas, J. Martin, G. Stadler,
SIAM J. Sci. Comput. 35(6), 2013, for the prior-preconditioned Hessian.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import numpy as np
from scipy.linalg import cholesky, eigh, solve_triangular

from pint_fem.collective import on_first_rank
from pint_fem.inverse.inference.data_covariance import DataCovariance
from pint_fem.inverse.laws.noise import Noise
from pint_fem.inverse.laws.priors import Prior
from pint_fem.inverse.partition import Partition

if TYPE_CHECKING:
    from pint_fem.inverse.map import ParameterToObservable

__all__ = ["DataSpace", "MisfitMatrix", "ParameterSpace", "Spectrum"]


class Spectrum(ABC):
    r"""Eigenvalues and vectors of an inverse problem.

    Attributes
    ----------
    lam, scale : ndarray, shape (modes,)
        :math:`\Lambda` and :math:`S`.
    """

    lam: np.ndarray
    scale: np.ndarray

    @abstractmethod
    def beta(self, r: np.ndarray) -> np.ndarray:
        """:math:`\\beta` of several data vectors ``(k, m)``, ``(k, modes)`` (collective)."""

    @abstractmethod
    def expand(self, c: np.ndarray) -> np.ndarray:
        """:math:`W^T c` for several vectors ``(k, modes)``, primal vectors ``(k, layout.size)`` (collective)."""

    @abstractmethod
    def contract(self, g: np.ndarray) -> np.ndarray:
        """:math:`W g` for several dual vectors ``(k, layout.size)``, ``(k, modes)`` (collective)."""

    @abstractmethod
    def squares(self, weights: np.ndarray) -> np.ndarray:
        """:math:`\\sum_i w_i W_i^2` in each entry, ``(layout.size,)`` (collective)."""


class _DenseModes(Spectrum):
    """Modes stored by columns, those of this rank's part of a parameter vector.

    Attributes
    ----------
    W : ndarray, shape (modes, own)
    """

    W: np.ndarray
    partition: Partition

    def expand(self, c: np.ndarray) -> np.ndarray:
        """:math:`W^T c`, ``(k, layout.size)`` (collective)."""
        return self.partition.spread(c @ self.W)

    def contract(self, g: np.ndarray) -> np.ndarray:
        """:math:`W g`, ``(k, modes)`` (collective)."""
        return self.partition.layout.spacetime.sum_over_grid(g[:, self.partition.own] @ self.W.T)

    def squares(self, weights: np.ndarray) -> np.ndarray:
        """:math:`\\sum_i w_i W_i^2`, ``(layout.size,)`` (collective)."""
        return self.partition.spread((weights @ self.W**2)[None])[0]


class DataSpace(_DenseModes):
    """The spectrum in the space of reduced readings, for static controls and initial conditions.

    Parameters
    ----------
    F
        The map.
    prior, noise
        Prior of the controls and noise of the readings.
    """

    def __init__(self, F: ParameterToObservable, prior: Prior, noise: Noise):
        rows, covariance = F.reduced, DataCovariance(F, prior)
        self.partition, self._rows, self._noise = F.partition, rows, noise

        def factored() -> tuple[np.ndarray, ...]:
            M = rows.gram(noise, len(noise.variance()))
            T = cholesky(0.5 * (M + M.T), lower=True, check_finite=False)
            G = T.T @ covariance.G @ T
            lam, U = eigh(0.5 * (G + G.T), driver="evd", check_finite=False)
            return T, np.maximum(lam, 0.0), U

        self._T, self.lam, self._U = on_first_rank(F.spacetime.comm, "posterior", factored)
        self.scale = np.ones(len(self.lam))
        self.W = (self._T @ self._U).T @ covariance.D

    def beta(self, r: np.ndarray) -> np.ndarray:
        """:math:`U^T T^{-1} Q^T N^{-1} r`, ``(k, modes)``."""
        b = self._rows.contract(self._noise.inverse(r))
        return solve_triangular(self._T, b.T, lower=True, check_finite=False).T @ self._U


class ParameterSpace(_DenseModes):
    """The spectrum in the space of the controls, for few static ones.

    Parameters
    ----------
    F
        The map.
    prior, noise
        Prior of the controls and noise of the readings.
    """

    def __init__(self, F: ParameterToObservable, prior: Prior, noise: Noise):
        self.partition = partition = F.partition
        self._F, self._noise = F, noise
        comm, own = F.spacetime.comm, len(partition.own)
        matrix = MisfitMatrix(F, noise)
        ends, mine = matrix.ends, matrix.mine
        sizes = np.diff(ends)
        A = np.zeros((int(ends[-1]),) * 2)
        for rank, size in enumerate(sizes):
            for first in range(0, size, _UNITS):
                count = min(_UNITS, size - first)
                units = np.zeros((count, own))
                if rank == comm.rank:
                    units[:, first : first + count] = np.eye(count)
                A[ends[rank] + first : ends[rank] + first + count, mine] = prior.precision(partition.spread(units))[
                    :, partition.own
                ]
        A, H = comm.allreduce(A), matrix.whole()

        def factored() -> tuple[np.ndarray, np.ndarray]:
            return eigh(H, 0.5 * (A + A.T), driver="gvd", check_finite=False)

        lam, V = on_first_rank(comm, "posterior", factored)
        self.lam = np.maximum(lam, 0.0)
        self.scale, self.misfit_matrix = self.lam, matrix
        self.W = np.ascontiguousarray(V.T[:, mine])

    def beta(self, r: np.ndarray) -> np.ndarray:
        """:math:`V^T F^T N^{-1} r`, ``(k, modes)``."""
        return self.contract(self._F.transposed_product(self._noise.inverse(r)))


class MisfitMatrix:
    """The matrix :math:`F^T N^{-1} F` for few static controls, its rows divided among all ranks (collective).

    Parameters
    ----------
    F, noise
        As for :class:`ParameterSpace`.

    Attributes
    ----------
    ends : ndarray of int
        Where the rows of each rank end among all, beginning with 0.
    mine : slice
        The rows of this rank.
    rows : ndarray, shape (own, all)
    """

    def __init__(self, F: ParameterToObservable, noise: Noise):
        self._partition = partition = F.partition
        self._comm = F.spacetime.comm
        comm, own = self._comm, len(partition.own)
        self.ends = ends = np.cumsum([0, *comm.allgather(own)])
        self.mine = mine = slice(int(ends[comm.rank]), int(ends[comm.rank + 1]))
        order = np.argsort(np.concatenate(F.spacetime.time_comm.allgather(F.numbers)), kind="stable")
        columns = noise.whitened(np.ascontiguousarray(partition.columns(F.rows)[order].T))  # (own, m)
        H = np.zeros((int(ends[-1]),) * 2)
        H[mine, mine] = 0.5 * (columns @ columns.T)
        for rank, size in enumerate(np.diff(ends)):  # of a product with another rank's columns each has one half
            other = columns if rank == comm.rank else np.empty((size, columns.shape[1]))
            comm.Bcast(other, root=rank)
            if comm.rank < rank:
                H[mine, ends[rank] : ends[rank] + size // 2] = columns @ other[: size // 2].T
            elif comm.rank > rank:
                H[mine.start + own // 2 : mine.stop, ends[rank] : ends[rank + 1]] = columns[own // 2 :] @ other.T
        H = comm.allreduce(H)
        self.rows = H[mine] + H[:, mine].T

    def whole(self) -> np.ndarray:
        """The whole matrix on every rank (collective)."""
        return self.rows if self._comm.size == 1 else np.concatenate(self._comm.allgather(self.rows))

    def product(self, z: np.ndarray) -> np.ndarray:
        """The products with controls ``(k, layout.size)``, dual vectors of the same shape (collective)."""
        own = z[:, self._partition.own]
        if self._comm.size > 1:
            own = np.concatenate(self._comm.allgather(own), axis=1)
        return self._partition.spread(own @ self.rows.T)


_UNITS = 256
"""Unit vectors whose products with the prior's precision are computed at once."""

r"""Impulse responses of sensors: adjoints of all lags, and what they are to the loads of a step.

For steps with a constant derivative, :math:`u_{n+1} = \Phi u_n + G z_n`, a sensor with the functional :math:`h` reads

.. math::
    h^T u_n = h^T \Phi^n u_0 + \sum_{i < n} (G^T \lambda_{n-1-i})^T z_i, \qquad \lambda_j = (\Phi^T)^j h :

the response depends on the lag :math:`j` only, so that one adjoint sweep per sensor gives the readings of all times for
all controls (S. Henneking, S. Venkat, V. Dobrev, J. Camier, T. Kolev, M. Fernando, A.-A. Gabriel, O. Ghattas,
arXiv:2504.16344). Sensors are independent right-hand sides of one sweep: lanes of the kernels on a core.

Here a sweep is a sequence of blocks of lags. The transposed step computes the adjoints of the loads of its stages on
the way, from which the responses to controls follow by products with sparse matrices.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from mpi4py import MPI

from pint_fem.propagators.linear import LinearPropagator

__all__ = ["GROUP", "LagBlock", "lags_of_block", "sequential_responses"]

GROUP = 32
"""Sensors whose adjoints are computed together: the most lanes that kernels take."""
_NUMBERS = 140_000
"""Numbers, about, of a sensor's adjoints in a block of lags: a group's arrays then have some 30 MB."""
_LAGS = 2, 64
"""Least and largest number of lags of a block."""


def lags_of_block(comm: MPI.Comm, n: int) -> int:
    """Lags of a block for states of ``n`` own unknowns: a power of two that depends on the largest ``n`` of the ranks
    in space only (collective over space).
    """
    fitting = max(_LAGS[0], _NUMBERS // max(1, comm.allreduce(n, op=MPI.MAX)))
    return min(_LAGS[1], 1 << (fitting.bit_length() - 1))


class LagBlock(NamedTuple):
    """Adjoints of some sensors at consecutive lags, in arrays that the next block overwrites.

    Attributes
    ----------
    first : int
        The first lag ``j``.
    adjoints : ndarray, shape (sensors, lags, n)
        :math:`\\lambda_j`.
    stages : ndarray, shape (stages, sensors, lags, n)
        Adjoints of the right-hand sides of the stages of the transposed step from :math:`\\lambda_j`.
    """

    first: int
    adjoints: np.ndarray
    stages: np.ndarray


def sequential_responses(propagator: LinearPropagator, sources: np.ndarray, lags: int) -> Iterator[LagBlock]:
    """Yield the adjoints of sensors at the lags ``0 .. lags - 1`` by one transposed step after another (collective over
    space).

    Parameters
    ----------
    propagator
        The steps.
    sources
        Functionals of the sensors, ``(sensors, n)``.
    lags
        Number of lags.
    """
    count, n = sources.shape
    most = lags_of_block(propagator.evolution.V.mesh().comm, n)
    adjoints = np.empty((count, most + 1, n))
    stages = np.empty((propagator.dirk.stages, count, most, n))
    adjoints[:, 0] = sources
    for first in range(0, lags, most):
        block = min(most, lags - first)
        start = adjoints[:, 0].copy()
        propagator.transposed_with_stages(start, adjoints[:, 1 : block + 1], stages[:, :, :block])
        yield LagBlock(first, adjoints[:, :block], stages[:, :, :block])
        adjoints[:, 0] = adjoints[:, block]

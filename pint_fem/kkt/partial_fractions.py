r"""The KKT system of a frequency where all its matrices are functions of one pencil, as a sum of shifted solves.

Let state and control be such that, on the free unknowns,

.. math::
   M = m \otimes M_0, \quad K = k_0 \otimes M_0 + k_1 \otimes K_0, \quad Q = q \otimes M_0 + q_1 \otimes K_0, \quad
   F R_k^{-1} F^T = c_k \otimes M_0

with small matrices for the fields of the state and symmetric :math:`M_0, K_0`. In the eigenvectors of :math:`K_0 x =
\kappa M_0 x` the system of stages, end and their multipliers is a small one that is linear in :math:`\kappa`,
:math:`L_0 + \kappa L_1` (:mod:`~pint_fem.kkt.scheme`). What is required of its inverse, the end :math:`u` and its
multiplier :math:`\lambda` as functions of the right-hand sides :math:`a` and :math:`b`, is a rational function

.. math::
   T(\kappa) = T_\infty + \kappa\, T_1 + \sum_j \frac{p_j q_j^T}{\kappa - y_j} , \qquad T_1 = 0 \text{ for } q_1 = 0 ,

whose poles :math:`y_j` are the finite eigenvalues of the small pencil, and whose residues have rank one. Each term is
one solve with :math:`K_0 - y_j M_0`. For one field and backward Euler there are two poles, :math:`\mathrm{Re}\,a \pm
\mathrm{i} s` in the notation of Wu and Liu (SISC 42, 2020), and :math:`2 s` for ``s`` stages. With left and right
eigenvectors :math:`x_j, z_j` the residue of the inverse at :math:`y_j` is :math:`z_j x_j^T / (x_j^T L_1 z_j)`. The sum
is compared with the function at points of the positive axis, more of them near the poles.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.linalg import eig

from pint_fem.errors import SolverFailure
from pint_fem.evolution.tableaux import DIRK
from pint_fem.kkt.scheme import StageCoefficients

__all__ = ["FieldCoefficients", "PartialFractions", "partial_fractions"]

_POINTS = np.concatenate([[0.0], np.logspace(-9, 0, 28)])
"""Points at which the sum is compared with the function, relative to the largest eigenvalue of the pencil."""
_NEAR = np.array([-2.0, -0.5, 0.0, 0.5, 2.0])
"""Further points, by their distance to the real part of each pole, in units of its imaginary part."""
_ACCURATE = 1e-4
"""Largest error of the sum relative to the function's size at a point."""
_EACH = 1e-5
"""Largest error of an entry relative to itself, where one of them grows at infinity."""
_INVERTIBLE = 1e12
"""Largest condition number of what is inverted."""


class FieldCoefficients(NamedTuple):
    """The small matrices ``(fields, fields)`` that multiply :math:`M_0` and :math:`K_0`.

    Attributes
    ----------
    m, k0, k1, q, c, q1 : ndarray, shape (fields, fields)
        Of ``M``, of the two parts of ``K``, of the misfit's second derivative, of :math:`F R^{-1} F^T`, and of the part
        of the misfit's second derivative with :math:`K_0`, by default none.
    """

    m: np.ndarray
    k0: np.ndarray
    k1: np.ndarray
    q: np.ndarray
    c: np.ndarray
    q1: np.ndarray | float = 0.0


class PartialFractions(NamedTuple):
    r"""The sums of all frequencies, with ``p`` fields and ``r`` poles.

    Attributes
    ----------
    poles : ndarray of complex, shape (frequencies, r)
        The poles.
    inputs, outputs : ndarray of complex, shape (frequencies, r, 3 p)
        Rows ``q`` and columns ``p`` of the residues: ``a``, ``b`` and the load of all fields; ``u``, multiplier and
        what the transposed load is applied to, of all fields.
    constant, linear : ndarray of complex, shape (frequencies, 3 p, 3 p)
        The matrices :math:`T_\infty` and :math:`T_1`.
    """

    poles: np.ndarray
    inputs: np.ndarray
    outputs: np.ndarray
    constant: np.ndarray
    linear: np.ndarray


def small_pencil(dirk: DIRK, dt: float, fields: FieldCoefficients, c: np.ndarray, mu: complex) -> tuple:
    r"""The matrices :math:`L_0` and :math:`L_1` of a frequency, and the rows of the end among the unknowns.

    Unknowns are stages, end, and the multipliers of their equations; :math:`\kappa` is multiplied by ``dt`` and ``K``
    divided by it.
    """
    of, s, p = StageCoefficients.of(dirk), dirk.stages, len(fields.m)
    size, one = (s + 1) * p, np.eye(p)
    C0, C1, B = np.zeros((size, size), complex), np.zeros((size, size), complex), np.zeros((size, p))
    rows = [slice(i * p, (i + 1) * p) for i in range(s + 1)]
    for i, a in enumerate(dirk.diagonal):
        C0[rows[i], rows[i]] += fields.m + a * dt * fields.k0
        C1[rows[i], rows[i]] += a * fields.k1
        for j in range(i):
            C0[rows[i], rows[j]] -= of.w[i, j] * fields.m
        C0[rows[i], rows[s]] -= mu * of.w0[i] * fields.m
        C0[rows[s], rows[i]] -= of.e[i] * one
        B[rows[i]] = a * dt * one
    C0[rows[s], rows[s]] += (1 - mu * of.e0) * one
    L0, L1 = np.zeros((2 * size, 2 * size), complex), np.zeros((2 * size, 2 * size), complex)
    L0[:size, :size], L0[size:, size:] = C0, C0.conj().T
    L1[:size, :size], L1[size:, size:] = C1, C1.conj().T
    L0[:size, size:] = B @ c @ B.T
    L0[size:, :size][rows[s], rows[s]] = -fields.q
    L1[size:, :size][rows[s], rows[s]] = -np.asarray(fields.q1) / dt
    end = np.arange(s * p, size)
    return L0, L1, np.concatenate([end, size + end])


def partial_fractions(
    dirk: DIRK, dt: float, fields: FieldCoefficients, scale: np.ndarray, mu: np.ndarray, largest: float
) -> PartialFractions:
    r"""The sums of all frequencies.

    Parameters
    ----------
    dirk, dt
        The method and the time step.
    fields
        The coefficients; ``c`` is that of the weight 1.
    scale
        Factors of ``c``, one per frequency.
    mu
        Eigenvalues of the shift, one per frequency.
    largest
        About the largest eigenvalue of :math:`K_0 x = \kappa M_0 x`.

    Raises
    ------
    SolverFailure
        If the function has double poles, or the sum is not accurate.
    """
    found = [_one(dirk, dt, fields, fields.c * s, complex(m), largest * dt) for s, m in zip(scale, mu, strict=True)]
    count = max(len(poles) for poles, *_ in found)
    p = len(fields.m)
    out = PartialFractions(
        np.ones((len(mu), count), complex) * -1 / dt, np.zeros((len(mu), count, 3 * p), complex),
        np.zeros((len(mu), count, 3 * p), complex), np.array([constant for *_, constant, _ in found]),
        dt * np.array([linear for *_, linear in found]),
    )  # fmt: skip
    for k, (poles, inputs, outputs, *_) in enumerate(found):
        r = len(poles)
        out.poles[k, :r], out.inputs[k, :r], out.outputs[k, :r] = poles / dt, inputs / dt, outputs
    return out


def _one(dirk: DIRK, dt: float, fields: FieldCoefficients, c: np.ndarray, mu: complex, largest: float) -> tuple:
    """Poles, inputs, outputs, constant and linear part of a frequency, in units of ``1/dt``."""
    # equal sizes of misfit and control: multipliers in other units
    unit = np.sqrt(max(np.abs(fields.q).max(), np.abs(fields.q1).max(), 1e-300) / max(np.abs(c).max(), 1e-300))
    L0, L1, end = small_pencil(dirk, dt, fields._replace(q=fields.q / unit, q1=fields.q1 / unit), c * unit, mu)
    poles, left, right, at_infinity = _simple_poles(L0, L1)
    p = len(fields.m)
    rows = _rows_of_the_ends(dirk, dt, end, len(L0), np.abs(c).any(axis=0))
    inputs, outputs = left @ rows[0] * np.repeat([1, 1 / unit, 1], p), right @ rows[1] * np.repeat([1, unit, unit], p)
    units = np.outer(np.repeat([1, unit, unit], p), np.repeat([1, 1 / unit, 1], p))
    points = np.concatenate([largest * _POINTS, *(y.real + y.imag * _NEAR for y in poles)])
    points = np.concatenate([points[(points >= 0) & (points <= largest)], [0.5 * largest, largest]])
    T = rows[1].T @ np.linalg.solve(L0 + points[:, None, None] * L1, rows[0][None]) * units
    terms = np.einsum("ij,jo,jq->ioq", 1 / (points[:, None] - poles), outputs, inputs)
    constant, linear = T[-1] - terms[-1], np.zeros_like(T[0])
    if at_infinity is not None:
        # the other parts, which may be large where poles are, are those for which the sum is right at the last point
        constant[:p, p : 2 * p] = at_infinity[np.ix_(end[:p], end[p:])] * units[:p, p : 2 * p]
    if np.any(fields.q1):  # the multiplier of a state that does not fall at infinity grows there
        grows = slice(p, 2 * p), slice(p)
        linear[grows] = ((T[-1] - terms[-1] - T[-2] + terms[-2]) / (points[-1] - points[-2]))[grows]
        constant = constant - points[-1] * linear
    # a load and what its transpose is applied to are in stages only; what does not vanish of them is found below
    constant[:p, 2 * p :] = constant[2 * p :, p:] = 0
    if p == 1 and not np.any(fields.q1):
        constant[p:, 2 * p :] = constant[2 * p :] = 0
    size = np.abs(T).max(axis=(1, 2))
    error = np.abs(constant + points[:, None, None] * linear + terms - T).max(axis=(1, 2))
    accurate = (error <= _ACCURATE * size).all()
    if p == 1 and np.any(fields.q1):  # small values between large terms
        each = np.s_[:, : 2 * p, : 2 * p]
        difference = np.abs(constant + points[:, None, None] * linear + terms - T)[each]
        accurate &= (difference <= _EACH * np.abs(T[each]))[T[each] != 0].all()
    if not accurate:
        raise SolverFailure(
            f"the KKT system of the frequency mu = {mu:.3g} is no sum of simple fractions: error "
            f"{(error / size).max():.1e}"
        )
    return poles, inputs, outputs, constant, linear


def _simple_poles(L0: np.ndarray, L1: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
    """The finite eigenvalues ``y`` of ``L0 + y L1``, left and right vectors of its inverse's residues, by rows, and the
    inverse at infinity, ``None`` where it is not finite.
    """
    U, sizes, Vh = np.linalg.svd(L1)
    r, whole = np.linalg.matrix_rank(L1), U.conj().T @ L0 @ Vh.conj().T
    kernel = whole[r:, r:]
    if np.linalg.cond(kernel) < _INVERTIBLE:
        # unknowns of the kernel of L1 are eliminated: infinite eigenvalues, which are multiple, make finite ones
        # inaccurate
        inverse, root = np.linalg.inv(kernel), np.sqrt(sizes[:r])
        rows, columns = -inverse @ whole[r:, :r], -whole[:r, r:] @ inverse
        y, left, right = eig(-(whole[:r, :r] + whole[:r, r:] @ rows) / np.outer(root, root), left=True)
        left, right = left.conj().T / root, right / root[:, None]
        left, right = np.hstack([left, left @ columns]) @ U.conj().T, (Vh.conj().T @ np.vstack([right, rows @ right])).T
        at_infinity = Vh[r:].conj().T @ inverse @ U[:, r:].conj().T
    else:
        y, left, right = eig(L0, -L1, left=True)
        left, right, at_infinity = left.conj().T, right.T, None
    slopes = np.einsum("ji,ik,jk->j", left, L1, right)
    # as many as the rank of L1, those of largest slope: infinite ones have none
    finite = np.flatnonzero(np.isfinite(y))
    chosen = finite[np.argsort(-np.abs(slopes[finite]))][:r]
    chosen = chosen[np.lexsort((y[chosen].real.round(9), -np.sign(y[chosen].imag)))]
    y, left, right, slopes = y[chosen], left[chosen], right[chosen], slopes[chosen]
    y = y - np.einsum("ji,jik,jk->j", left, L0 + y[:, None, None] * L1, right) / slopes
    root = np.sqrt(slopes)[:, None]
    return y, left / root, right / root, at_infinity


def _rows_of_the_ends(
    dirk: DIRK, dt: float, end: np.ndarray, size: int, loaded: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    r"""Columns of the right-hand sides ``a`` (in the equation of the end), ``b`` (in that of its multiplier) and the
    load (in those of all stages), and of the results ``u``, the multiplier, and :math:`\sum_i h_i \Lambda_i`; the last
    ones for fields that have a load.
    """
    p = len(loaded)
    given, taken = np.zeros((2, size, 3 * p))
    given[end, np.arange(2 * p)] = taken[end, np.arange(2 * p)] = 1
    for i, a in enumerate(dirk.diagonal):
        own = np.arange(i * p, (i + 1) * p)
        given[own, np.arange(2 * p, 3 * p)] = taken[size // 2 + own, np.arange(2 * p, 3 * p)] = a * dt * loaded
    return given, taken

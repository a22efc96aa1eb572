r"""The spectrum of a linear evolution, over which convergence bounds of time-parallel solvers are evaluated.

For :math:`M \dot u + K u = f` a step maps an eigenvector of :math:`K x = \kappa M x` (free degrees of freedom only) to
:math:`R(-\Delta t\, \kappa)` times itself. Symmetric ``K`` has real, skew-symmetric imaginary :math:`\kappa`, and their
range is all that the two-level bound requires: it is a maximum over a curve. For another ``K`` it requires the boundary
of a region, as the bound (a sum of moduli of analytic functions, where ``R`` has no pole) is subharmonic in
:math:`\kappa`.

*Damped waves*, a symmetric positive part of ``K`` on some fields and a skew-symmetric coupling with the field that the
evolution eliminates (:mod:`~pint_fem.evolution.fields`), are not normal. For an eigenvector's part ``a`` there, and
:math:`s = a^* K_a a / a^* M_a a` and :math:`\omega^2 = -a^* G X a / a^* M_a a`,

.. math::  \kappa^2 - s \kappa + \omega^2 = 0 ,

so that the ranges of damping and frequency, those of two symmetric pencils, hold all eigenvalues. The bound is that of
the pairs with damping ``s`` and frequency :math:`\omega` (:mod:`~pint_fem.theory.block_modes`), a bound of norms in
the energy's inner product where the damping is uniform.

On several ranks in space the ends come from Lanczos iteration with distributed products; nothing is gathered.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from firedrake import assemble
from firedrake.petsc import PETSc

from pint_fem.errors import is_numerical
from pint_fem.evolution.evolution import Evolution
from pint_fem.evolution.fields import Fields
from pint_fem.kernels.arrays import boundary_rows
from pint_fem.kernels.direct import is_finite
from pint_fem.kernels.factor import is_symmetric
from pint_fem.kernels.lanczos import ACCURACY, NotPositive, Pencil

__all__ = ["Spectrum", "spectrum"]

FACTORED = 6_000
"""Unknowns up to which the smallest eigenvalue is computed, by a factorisation; above it 0 is used, a lower bound."""

DENSE = 800
"""Unknowns up to which all eigenvalues of a general ``K`` are computed."""


@dataclass(frozen=True)
class Spectrum:
    r"""Where the :math:`\kappa` of :math:`K x = \kappa M x` lie.

    Attributes
    ----------
    kind : str
        ``"parabolic"`` (real), ``"wave"`` (imaginary), ``"damped wave"`` or ``"general"``.
    low, high : float
        Ends of the range: of :math:`\kappa`, of :math:`|\kappa|` for waves, of the damping of damped ones, of the real
        part in general. 1/time.
    region : ndarray or None
        ``"general"``: the eigenvalues above the real axis, or corners of a convex region that holds them.
    estimate : str
        Origin of the region where it need not hold all eigenvalues; empty where it does.
    frequency : float
        Largest :math:`\omega` of damped waves.
    """

    kind: str
    low: float
    high: float
    region: np.ndarray | None = None
    estimate: str = ""
    frequency: float = 0.0

    @property
    def note(self) -> str:
        """Restriction of the validity of bounds over this spectrum; empty where there is none."""
        if self.kind == "general":
            return self.estimate or "mode by mode, of an operator that is not normal"
        return self.estimate

    def pairs(self, dt: float, per_decade: int = 48) -> tuple[np.ndarray, np.ndarray]:
        r"""Values of :math:`\Delta t\, s` and :math:`\Delta t\, \omega` that cover those of damped waves.

        Parameters
        ----------
        dt
            Step size, > 0.
        per_decade
            Frequencies per factor of ten.

        Returns
        -------
        tuple of ndarray
            Dampings and frequencies, ``(count,)`` each.
        """
        low, high = self.low * dt, self.high * dt
        count = 1 if high <= low * (1 + 1e-6) else 2 + int(8 * np.log10(high / low))
        s, w = np.geomspace(low, high, count), _logarithmic(0.0, max(self.frequency * dt, 1e-12), per_decade)
        w = np.unique(np.concatenate([w, np.clip(s / 2, w[0], w[-1])]))  # there a pair is furthest from normal
        return tuple(x.ravel() for x in np.meshgrid(s, w, indexing="ij"))

    def sample(self, dt: float, per_decade: int = 128) -> np.ndarray:
        r"""Values of :math:`\Delta t\, \kappa` that cover the spectrum.

        Parameters
        ----------
        dt
            Step size, > 0.
        per_decade
            Values per factor of ten. With ``128`` and ``12 m``, whichever is more, the bound is within 1 percent of
            its supremum for coarsening ``m``: between steps it turns by ``m``.

        Returns
        -------
        ndarray
            Real for ``"parabolic"``, else complex.
        """
        if self.kind == "damped wave":
            s, w = self.pairs(dt)
            return s / 2 + np.sqrt((s**2 / 4 - w**2).astype(complex))
        if self.kind == "general":
            return dt * (_boundary(self.region, per_decade) if self.estimate else self.region)
        parts = []
        for sign, low, high in ((-1, -self.high, -self.low), (1, self.low, self.high)):
            if high > 0:
                parts.append(sign * _logarithmic(max(low, 0.0) * dt, high * dt, per_decade))
        values = np.concatenate(parts) if parts else np.zeros(1)
        return 1j * values if self.kind == "wave" else values


def _logarithmic(low: float, high: float, per_decade: int) -> np.ndarray:
    """Log-spaced values with both ends; from ``1e-6`` on, as slower modes make no error, where ``low`` is less."""
    low = max(low, min(1e-6, 1e-6 * high))
    return np.geomspace(low, high, 2 + int(per_decade * np.log10(high / low))) if low < high else np.array([high])


def _boundary(corners: np.ndarray, per_decade: int) -> np.ndarray:
    """Points on the upper boundary of the convex hull of some numbers and their conjugates, dense at its corners."""
    corners = np.concatenate([corners, corners.real.min(keepdims=True), corners.real.max(keepdims=True)])
    chain: list[complex] = []
    for p in sorted(set(corners.tolist()), key=lambda z: (z.real, z.imag)):
        while len(chain) > 1 and ((chain[-1] - chain[-2]).conjugate() * (p - chain[-2])).imag >= 0:
            chain.pop()
        chain.append(p)
    t = np.geomspace(1e-8, 0.5, 8 * per_decade)
    t = np.concatenate([[0.0], t, 1 - t, [1.0]])
    chain.append(complex(chain[-1].real))
    return np.concatenate([a + t * (b - a) for a, b in pairwise(chain)])


class _Operators(Pencil):
    """The pencil of ``M`` and ``K`` on the free degrees of freedom; fixed ones have the eigenvalue 0."""

    def __init__(self, evolution: Evolution):
        mass, stiffness, *_ = evolution.affine_parts
        M = assemble(mass, mat_type="aij").petscmat
        K = M.duplicate() if stiffness.empty() else assemble(stiffness, mat_type="aij").petscmat
        if not (is_finite(M) and is_finite(K)) or not is_symmetric(M) or M.getDiagonal().min()[1] <= 0:
            raise NotPositive
        fixed = boundary_rows(evolution.bcs, evolution.V)
        rows = (fixed + M.getOwnershipRange()[0]).astype(PETSc.IntType)
        M.zeroRowsColumns(rows, diag=1.0)
        K.zeroRowsColumns(rows, diag=0.0)
        super().__init__(M, fixed)
        self.K = K

    def matrix(self, A: PETSc.Mat, *, free: bool = False):
        """A PETSc matrix as a scipy matrix, or its rows and columns of the free degrees of freedom (one rank)."""
        from scipy.sparse import csr_matrix

        indptr, indices, data = A.getValuesCSR()
        S = csr_matrix((data, indices, indptr), shape=A.getSize())
        if free:
            kept = np.setdiff1d(np.arange(self.size), self.fixed)
            S = S[kept][:, kept]
        return S.tocsc()


def spectrum(evolution: Evolution) -> Spectrum | None:
    """Region that holds the eigenvalues of a linear evolution (collective over space).

    Symmetric and skew-symmetric ``K``: the largest eigenvalue by Lanczos iteration, at most 1 percent too large; the
    smallest by shift and invert on one rank with up to ``FACTORED`` unknowns, else the lower bound 0. Waves: from 0.
    Waves that are damped everywhere: the ranges of damping and frequency. General ``K``: all eigenvalues on one rank
    with up to ``DENSE`` unknowns, else the convex hull of Ritz values, an estimate.

    Parameters
    ----------
    evolution
        The problem.

    Returns
    -------
    Spectrum or None
        ``None`` where the evolution is not linear with constant operators for given controls, or ``M`` not symmetric
        positive definite.
    """
    if evolution.affine_parts is None:
        return None
    try:
        return _damped_wave(_fields(evolution)) or _spectrum(_Operators(evolution))
    except (NotPositive, np.linalg.LinAlgError):
        return None


def _fields(evolution: Evolution) -> Fields | None:
    """The blocks of the operators at the values that controls have."""
    fields = evolution.fields
    if fields is None or not evolution.has_controlled_operators:
        return fields
    M, K = (assemble(form, mat_type="aij").petscmat for form in evolution.affine_parts[:2])
    return fields.with_operators(M, K)


def _damped_wave(fields: Fields | None) -> Spectrum | None:
    """Ranges of damping and frequency; ``None`` where nothing damps somewhere, or the system is no such wave."""
    if fields is None or not fields.is_wave:
        return None
    pencil = Pencil(fields.part(0.0), fields.fixed)
    low, high = pencil.ends(pencil.product(fields.damping()))
    if low <= ACCURACY * high:
        return None
    frequency = max(pencil.ends(pencil.product(fields.stiffness()))[1], 0.0) ** 0.5
    uniform = high <= low * (1 + 1e-6)
    note = "" if uniform else "an estimate from the ranges of damping and frequency of an operator that is not normal"
    return Spectrum("damped wave", low if uniform else low * (1 - ACCURACY), high, estimate=note, frequency=frequency)


def _spectrum(ops: _Operators) -> Spectrum:
    """Region of a symmetric, a skew-symmetric or a general ``K``."""
    K, alone = ops.K, ops.comm.size == 1
    if is_symmetric(K):
        low, high = ops.ends(ops.product(K))
        smallest = _smallest(ops, max(abs(low), abs(high))) if alone and ops.size <= FACTORED else None
        return Spectrum("parabolic", min(low, 0.0) if smallest is None else smallest, max(high, 0.0))
    KT = K.transpose(PETSc.Mat())
    symmetric = KT.copy()
    symmetric.axpy(1.0, K)
    if symmetric.norm(PETSc.NormType.INFINITY) <= 1e-13 * K.norm(PETSc.NormType.INFINITY):
        forward, back = ops.product(K), ops.product(KT)
        return Spectrum("wave", 0.0, max(ops.ends(lambda x: back(ops.solve_mass(forward(x))))[1], 0.0) ** 0.5)
    few = alone and ops.size <= DENSE
    values = _all(ops) if few else _hull(ops)
    estimate = "" if few else "an estimate from Ritz values of an operator that is not normal"
    values = values[values.imag >= 0]
    return Spectrum("general", float(values.real.min()), float(values.real.max()), values, estimate)


def _smallest(ops: _Operators, scale: float) -> float | None:
    """Smallest eigenvalue of symmetric ``K`` by shift and invert; ``None`` where that does not converge."""
    from scipy.linalg import eigh
    from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh, splu

    K, M = ops.matrix(ops.K, free=True), ops.matrix(ops.M, free=True)
    n, sigma = K.shape[0], -1e-6 * scale
    if n <= 100:
        return float(eigh(K.toarray(), M.toarray(), eigvals_only=True, subset_by_index=[0, 0])[0]) if n else 0.0
    symmetric = dict(permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options={"SymmetricMode": True})
    try:
        while sigma > -10 * scale:
            factor = splu((K - sigma * M).tocsc(), **symmetric)
            if (factor.U.diagonal() > 0).all():  # Sylvester: no eigenvalue is left of the shift
                inverse = LinearOperator((n, n), matvec=factor.solve, dtype=float)
                start = 1 + 0.5 * np.cos(np.arange(n) ** 2)
                nearest = eigsh(
                    K, 1, M, sigma, "LM", start, OPinv=inverse, tol=0.1 * ACCURACY, return_eigenvectors=False
                )
                return float(nearest[0])
            sigma *= 10
    except RuntimeError as error:  # ARPACK's are such
        if not is_numerical(error) and not isinstance(error, ArpackError):
            raise
    return None


def _all(ops: _Operators) -> np.ndarray:
    """All eigenvalues, by dense algebra."""
    from scipy.linalg import cho_factor, cho_solve, eigvals

    M, K = (ops.matrix(A, free=True).toarray() for A in (ops.M, ops.K))
    return eigvals(cho_solve(cho_factor(M), K)).astype(complex)


def _hull(ops: _Operators) -> np.ndarray:
    """Ritz values of ``M^{-1} K``, which fill its numerical range, and on one rank the converged ones of its inverse,
    which resolve the slow modes.
    """
    product = ops.product(ops.K)
    values, _ = ops.ritz(lambda x: ops.solve_mass(product(x)))
    slow = np.zeros(1)
    if ops.comm.size == 1 and ops.size <= FACTORED:
        from scipy.sparse.linalg import splu

        K, M = ops.matrix(ops.K), ops.matrix(ops.M)
        sigma = -1e-6 * np.abs(values).max()
        try:
            factor = splu((K - sigma * M).tocsc())
        except RuntimeError as error:
            if not is_numerical(error):  # singular
                raise
        else:
            inverse, residuals = ops.ritz(lambda x: factor.solve(M @ x))
            slow = sigma + 1 / inverse[residuals <= 0.1 * np.abs(inverse)]
    return np.concatenate([values, slow])

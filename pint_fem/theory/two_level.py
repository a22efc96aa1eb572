r"""Two-level convergence bounds of MGRIT from the eigenvalues of a fine and a coarse propagator.

With eigenvalues :math:`\lambda` of the fine and :math:`\mu` of the coarse propagator, coarsening ``m`` and
:math:`N_c` coarse steps, the error at the C-points contracts at least by (Dobrev, Kolev, Petersson, Schroder, SISC
39(5), 2017)

.. math::
   \text{F:}\quad |\lambda^m - \mu| \frac{1 - |\mu|^{N_c}}{1 - |\mu|}, \qquad
   \text{FCF:}\quad |\lambda|^m |\lambda^m - \mu| \frac{1 - |\mu|^{N_c - 1}}{1 - |\mu|}.

C-relaxation with weight :math:`\omega` (Sugiyama, Schroder, Southworth, Friedhoff, arXiv:2107.02290). With the shift
:math:`L` by one C-point the coarse correction is :math:`(\lambda^m - \mu) L (I - \mu L)^{-1}` and each C-relaxation
:math:`a + b L`, :math:`a = 1 - \omega`, :math:`b = \omega \lambda^m`. All are lower triangular Toeplitz matrices, and
so is their product, with the symbol

.. math::
   f(\zeta) = (\lambda^m - \mu)\, \zeta\, \frac{(a + b \zeta)^\nu}{1 - \mu \zeta}
            = (\lambda^m - \mu) \sum_j c_j \zeta^{j+1}, \qquad
   c_j = \mu\, c_{j-1} + \tbinom{\nu}{j} a^{\nu-j} b^j .

Its 2-norm is at most the geometric mean of its 1- and its :math:`\infty`-norm, both :math:`|\lambda^m - \mu| \sum_{j <
N_c} |c_j|`, which is a finite sum and a geometric one, as :math:`c_j = \mu^{j-\nu} (a \mu + b)^\nu` from
:math:`j = \nu` on; and at most, where :math:`|\mu| < 1`, :math:`\max |f|` over the unit circle, which it tends to with
:math:`N_c`. For real eigenvalues that maximum is at :math:`\zeta = \pm 1`.

The bounds hold for normal propagators, in the norm in which their eigenvectors are orthogonal (the mass norm, for
finite elements), and for an exact solve of the coarse level: a V-cycle on more levels may be slower.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from pint_fem.mgrit.cycle import exact_termination

__all__ = ["ConvergenceEstimate", "expected_iterations", "two_level_bound", "two_level_estimate", "two_level_factors"]


def two_level_factors(
    fine: ArrayLike, coarse: ArrayLike, m: int, coarse_steps: float = math.inf, relax: str = "F", weight: float = 1.0
) -> np.ndarray:
    """Bound of the factor by which a two-level cycle multiplies the error of each mode.

    Parameters
    ----------
    fine, coarse
        Eigenvalues of the fine and the coarse propagator, in the same order.
    m
        Coarsening factor.
    coarse_steps
        Number of coarse steps ``Nc``; may be infinite where ``|coarse| < 1``.
    relax
        ``"F"``, ``"FCF"`` or ``F(CF)^nu`` written out.
    weight
        Weight of C-relaxation.

    Returns
    -------
    ndarray
        The least number for infinitely many steps where eigenvalues are real, or C-relaxation has weight 1. Elsewhere,
        and for finitely many steps, an upper bound only.

    Raises
    ------
    ValueError
        On another relaxation, coarsening, number of steps or weight.
    """
    nu = _c_relaxations(relax)
    _check(m, coarse_steps, weight)
    power, mu = np.broadcast_arrays(np.asarray(fine) ** m, np.asarray(coarse))
    size, a, b = np.abs(mu), 1 - weight, weight * power
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        total, c = np.zeros(mu.shape), np.zeros_like(mu * b)
        for j in range(nu + 1):
            c = mu * c + math.comb(nu, j) * a ** (nu - j) * b**j
            if j < min(nu, coarse_steps):
                total = total + np.abs(c)
        head = np.abs(c)  # of the terms that are geometric
        total = total + np.where(head == 0, 0, head * _geometric(size, max(coarse_steps - nu, 0)))
        on_circle = np.maximum(np.abs(a + b) ** nu / np.abs(1 - mu), np.abs(a - b) ** nu / np.abs(1 + mu))
        real = (np.imag(power) == 0) & (np.imag(mu) == 0) & (size < 1)
        total = np.where(real, np.minimum(total, on_circle), total)
        gap = np.abs(power - mu)
        return np.where(gap == 0, 0, gap * total)  # a mode that both conserve (lam = mu = 1) has no error


def two_level_bound(
    fine: ArrayLike, coarse: ArrayLike, m: int, coarse_steps: float = math.inf, relax: str = "F", weight: float = 1.0
) -> float:
    """Largest bound of a two-level cycle's error factor over all modes; parameters as in :func:`two_level_factors`."""
    return float(np.max(two_level_factors(fine, coarse, m, coarse_steps, relax, weight)))


def expected_iterations(factor: float, tolerance: float) -> float:
    """Number of cycles that reduce the error by ``tolerance`` where each reduces it by ``factor``.

    Returns
    -------
    float
        At least one; infinite for a factor of one and more.

    Raises
    ------
    ValueError
        On a tolerance that is not between 0 and 1, or a negative factor.
    """
    if not 0 < tolerance < 1 or not factor >= 0:
        raise ValueError(f"factor {factor!r}, tolerance {tolerance!r}: give a factor of at least 0, 0 < tolerance < 1")
    if factor >= 1:
        return math.inf
    if factor == 0:
        return 1
    return max(1, math.ceil(math.log(tolerance) / math.log(factor) * (1 - 1e-12)))


@dataclass(frozen=True)
class ConvergenceEstimate:
    """A-priori estimate of the convergence of MGRIT between two levels.

    Attributes
    ----------
    m : int
        Coarsening factor.
    relax : str
        Relaxation scheme.
    weight : float
        Weight of C-relaxation.
    factor : float
        Two-level bound: largest factor by which a cycle multiplies a mode's error.
    where : complex
        Mode of the worst case.
    exact_after : float
        Cycles after which two levels are exact for any propagators: ``ceil(Nc/(1+nu))``; ``Nc`` with a weight other
        than 1.
    tolerance : float
        Reduction of the error that ``iterations`` refers to.
    where_is : str
        Meaning of ``where``: ``"dt*kappa"``, or ``"lam"`` for the eigenvalue of the fine propagator.
    warning : str
        Why the method may not converge, with what to use instead; empty where the bound is below one.
    note : str
        Restriction of the bound's validity, or empty.
    """

    m: int
    relax: str
    weight: float
    factor: float
    where: complex
    exact_after: float
    tolerance: float
    where_is: str = "lam"
    warning: str = ""
    note: str = ""

    @property
    def converges(self) -> bool:
        """Whether the bound is below one."""
        return self.factor < 1

    @property
    def iterations(self) -> float:
        """Number of cycles that reduce the error by ``tolerance`` according to the bound."""
        return min(expected_iterations(self.factor, self.tolerance), self.exact_after)

    def __str__(self) -> str:
        weight = f" with weight {self.weight:g}" if self.weight != 1 and self.relax != "F" else ""
        count = self.iterations
        cycles = f"{count:.0f} cycle{'s' * (count != 1)}" if math.isfinite(count) else "no number of cycles"
        text = (
            f"two-level bound {self.factor:.3g} for m = {self.m}, {self.relax}-relaxation{weight} (worst at "
            f"{self.where_is} = {_short(self.where)}): {cycles} for {self.tolerance:g}"
        ) + (f" ({self.note})" if self.note else "")
        return f"{text}\n  {self.warning}" if self.warning else text


def two_level_estimate(
    fine: ArrayLike,
    coarse: ArrayLike,
    m: int,
    coarse_steps: float = math.inf,
    relax: str = "FCF",
    *,
    tolerance: float = 1e-8,
    weight: float = 1.0,
    modes: ArrayLike | None = None,
    alternatives: Mapping[str, float] | None = None,
    factors: np.ndarray | None = None,
) -> ConvergenceEstimate:
    """Estimate the convergence of two levels from the eigenvalues of their propagators.

    Parameters
    ----------
    fine, coarse, m, coarse_steps, relax, weight
        As in :func:`two_level_factors`.
    tolerance
        Required reduction of the error.
    modes
        Values of ``dt * kappa`` that belong to the eigenvalues, for ``where``.
    alternatives
        Bounds of other choices, by what a user gives to obtain them: a warning names those below one. Default: it
        names what often helps.
    factors
        Bounds of the modes where they do not follow from eigenvalues (:mod:`~pint_fem.theory.block_modes`); default:
        :func:`two_level_factors`.

    Returns
    -------
    ConvergenceEstimate

    Raises
    ------
    ValueError
        On values out of range, or no eigenvalue.
    """
    fine, coarse = np.broadcast_arrays(np.atleast_1d(fine), np.atleast_1d(coarse))
    if not fine.size:
        raise ValueError("no eigenvalues: give at least one of each propagator")
    if factors is None:
        factors = two_level_factors(fine, coarse, m, coarse_steps, relax, weight)
    worst = int(np.argmax(factors))
    factor = float(factors.flat[worst])
    exact_after = exact_termination(coarse_steps, _c_relaxations(relax), weight)
    where = (fine if modes is None else np.atleast_1d(modes)).flat[worst].item()
    expected_iterations(factor, tolerance)  # raises on a tolerance out of range
    warning = ""
    if not factor < 1:
        warning = _warning(factor, fine.flat[worst], coarse.flat[worst], m, relax, exact_after, alternatives)
    where_is = "lam" if modes is None else "dt*kappa"
    return ConvergenceEstimate(m, relax, float(weight), factor, where, exact_after, tolerance, where_is, warning)


def _warning(factor, lam: np.ndarray, mu, m, relax, exact_after, alternatives) -> str:
    """Why the bound is not below one, and what to use instead."""
    keeps, waves = abs(lam) ** m, abs(np.imag(lam)) > 1e-8 * abs(lam)
    everywhere = "an L-stable integrator on all levels, such as SDIRK2() or BackwardEuler()"
    undamped = keeps > 0.5 and not waves and lam.real < 0
    if keeps > 0.5 and waves:
        cause = f"undamped waves: |lam| = {abs(lam):.4f}, so that coarse steps must have their phase"
        if relax != "F":
            cause += f" and C-relaxation helps little (|lam|^m = {keeps:.2f})"
    elif undamped:
        cause = f"the finer level's integrator does not damp stiff modes (lam = {_short(lam)})"
    elif keeps <= 1 and abs(mu) > keeps:
        damps = "amplifies" if abs(mu) > 1 else "does not damp"
        cause = f"the coarse integrator {damps} stiff modes (mu = {_short(mu)}, {m} fine steps give {_short(lam**m)})"
    else:
        cause = f"a coarse step is too far from {m} fine ones (mu = {_short(mu)}, lam^m = {_short(lam**m)})"
    if alternatives is None:
        better = [] if waves else ["an L-stable coarse_tableau such as SDIRK2() or BackwardEuler()"]
        better = [everywhere] if undamped else better
        better += ["relax='FCF'"] if relax == "F" and keeps < 0.9 else []
        better += ["smaller coarsening"]
    else:
        best = sorted((bound, what) for what, bound in alternatives.items() if bound < 1)[:3]
        better = [f"{what} (bound {bound:.2g})" for bound, what in best]
        better += [everywhere] if undamped else []
    better += ["time_solver='paradiag' (alpha-circulant, for constant operators)"] if waves else []
    use = ", ".join([*better, "time_solver='serial' (sequential, as levels=1)"])
    finite = f" before cycle {exact_after:.0f}, where it is exact" if math.isfinite(exact_after) else ""
    return f"MGRIT need not converge{finite} (bound {factor:.3g}): {cause}; use {use}"


def _geometric(x: np.ndarray, count: float) -> np.ndarray:
    """``1 + x + ... + x^(count-1)`` for ``x >= 0``, accurate where ``x`` is near 1."""
    if count == 0:
        return np.zeros_like(x)
    log = np.log(x)
    return np.where(x == 1, count, np.expm1(count * log) / np.expm1(log))


def _c_relaxations(relax: str) -> int:
    """Number ``nu`` of C-relaxations of a scheme ``F(CF)^nu``."""
    nu = str(relax).count("C")
    if relax != "F" + nu * "CF":
        raise ValueError(f"no bound for relaxation {relax!r}: give 'F', 'FCF', 'FCFCF' ...")
    return nu


def _check(m, coarse_steps, weight) -> None:
    """Raise a ``ValueError`` on a coarsening, a number of coarse steps or a weight out of range."""
    if not hasattr(m, "__index__") or m < 1:
        raise ValueError(f"coarsening m = {m!r}: give a whole number of at least 1")
    if not coarse_steps >= 1:
        raise ValueError(f"coarse_steps {coarse_steps!r}: give at least 1")
    if not 0 < weight < math.inf:
        raise ValueError(f"weight {weight!r}: give a positive number, such as 1.0")


def _short(z: complex) -> str:
    """A real or complex number with three digits."""
    z = complex(z)
    return f"{z.real:.3g}" if abs(z.imag) <= 1e-12 * abs(z) else f"{z:.3g}"

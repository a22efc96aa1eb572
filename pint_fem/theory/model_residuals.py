r"""Residuals of MGRIT on two levels, mode by mode, for data that are equally strong on all scales.

The two-level bound (:mod:`~pint_fem.theory.two_level`) is a maximum over all modes. How many cycles a solve takes
depends on the modes of the solution, too, most of which converge faster. For a mode with eigenvalues
:math:`\lambda` and :math:`\mu` of a fine and a coarse step, the shift :math:`L` by one C-point and the right-hand side
:math:`g` that is propagated to the C-points, solution and residuals at these are

.. math::
   u = (I - \lambda^m L)^{-1} g, \qquad r_k = T^{k+1} (\lambda^m L)^{\nu k}\, g, \qquad
   T = (\lambda^m - \mu)\, L\, (I - \mu L)^{-1},

after nested iteration (:math:`k = 0`) and ``k`` cycles with :math:`\nu` C-relaxations. All operators are lower
triangular Toeplitz matrices. The right-hand sides are those of a source that is constant in time, and of an impulse at
the beginning, as of an adjoint; their energy is the same in each interval of :math:`\log |\kappa|`. The relative
residual is the larger one of both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from irksome.tableaux.ButcherTableaux import ButcherTableau

from pint_fem.evolution.evolution import Evolution
from pint_fem.evolution.tableaux import DIRK, Repeated
from pint_fem.theory.spectrum import Spectrum
from pint_fem.theory.stability import dirk_stability

__all__ = ["ModelResiduals", "relative_residuals"]

_MODES = 300
"""Modes of a spectrum, at most, about."""
_STEPS = 256
"""Coarse steps, at most: residuals of more are nearly the same."""


def relative_residuals(
    fine: np.ndarray, coarse: np.ndarray, rhs: np.ndarray, c_relaxations: int, cycles: int
) -> np.ndarray:
    r"""Norms of the residual after nested iteration and after each cycle, relative to that of the solution.

    Parameters
    ----------
    fine, coarse
        :math:`\lambda^m` and :math:`\mu` of each mode, ``(modes,)``.
    rhs
        Right-hand sides at the C-points, ``(modes, coarse steps)``.
    c_relaxations, cycles
        C-relaxations in a cycle, and number of cycles.

    Returns
    -------
    ndarray
        ``(1 + cycles,)``.
    """
    fine, coarse = fine[:, None], coarse[:, None]
    count, later = rhs.shape[1], np.arange(rhs.shape[1] - 1)
    transform = lambda x: np.fft.fft(x, 2 * count)
    first = np.zeros((len(fine), 1))
    power = lambda x: x ** np.arange(count)
    kernel = transform(np.concatenate([first, (fine - coarse) * coarse**later], axis=1))

    def convolved(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
        return np.fft.ifft(transform(x) * kernel)[:, :count]

    scale, residual = np.linalg.norm(convolved(rhs, transform(power(fine)))), convolved(rhs, kernel)
    found = [np.linalg.norm(residual)]
    for _ in range(cycles):
        for _ in range(c_relaxations):
            residual = np.concatenate([first, fine * residual[:, :-1]], axis=1)
        residual = convolved(residual, kernel)
        found.append(np.linalg.norm(residual))
    return np.array(found) / scale


@dataclass(frozen=True)
class ModelResiduals:
    """Relative residuals of an evolution's sweeps.

    Attributes
    ----------
    spectrum, evolution
        The problem.
    coarse_tableau : ButcherTableau or None
        Integrator of the coarse level; default: the evolution's.
    """

    spectrum: Spectrum
    evolution: Evolution
    coarse_tableau: ButcherTableau | None = None

    def of(self, m: int, coarse_steps: int, relax: str, cycles: int) -> np.ndarray:
        """Relative residuals after nested iteration and after each cycle, ``(1 + cycles,)``.

        Parameters
        ----------
        m, coarse_steps, relax
            Steps in an interval, those of the coarse integrator for it, and the relaxation, ``"F"`` or ``"FCF"``.
        cycles
            Number of cycles.
        """
        ev = self.evolution
        modes = self.spectrum.sample(ev.dt, 24)
        modes = modes[:: 1 + len(modes) // _MODES]
        modes = modes[np.abs(modes) > 0]
        tableau = self.coarse_tableau or ev.tableau
        own, coarse = DIRK(ev.tableau), DIRK(Repeated(tableau, coarse_steps) if coarse_steps > 1 else tableau)
        fine, mu = dirk_stability(own.A, own.b, -modes) ** m, dirk_stability(coarse.A, coarse.b, -m * modes)
        shape = len(modes), min(max(ev.nsteps // m, 2), _STEPS)
        impulse = np.zeros(shape)
        impulse[:, 0] = 1
        constant = np.broadcast_to(((1 - fine) / modes)[:, None], shape)
        with np.errstate(all="ignore"):  # modes that grow
            found = [relative_residuals(fine, mu, g, relax.count("C"), cycles) for g in (constant, impulse)]
        return np.max(found, axis=0)

    def cycles(self, m: int, coarse_steps: int, relax: str, tolerances: Sequence[float], most: int) -> list[float]:
        """Number of cycles to each relative residual; infinite for more than ``most`` cycles."""
        residuals = self.of(m, coarse_steps, relax, most)
        below = [np.flatnonzero(residuals <= tolerance) for tolerance in tolerances]
        return [float(found[0]) if len(found) else np.inf for found in below]

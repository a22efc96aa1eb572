r"""A sliding window for controls with one value per step: the values of the last steps from the readings up to now.

At the point :math:`n` the values of the steps :math:`n - l, \dots, n - 1` are estimated from the readings after the
window's start, with the values of earlier steps held at their last estimates. These are subtracted from the readings,
and what is left, :math:`r`, depends on the window's values only:

.. math::
    c = (G_w + \alpha N_w)^{-1} r, \qquad z_i = m_i + \Gamma_1 C^T A_i^T c, \qquad G_w = \sum_{i=n-l}^{n-1} A_i K A_i^T

with the reduced responses of :mod:`pint_fem.inverse.per_step.covered_responses`. With constant operators :math:`A_i`
depends on the lag only, so that the matrix is the same wherever the window is, if the readings come at the same times
after its start. It is factored once, or once for each phase where sensors do not read in each step, and each shift
takes one solve with it and small products. No field is computed before it is asked for.

The covariance is that of the window's values for given earlier ones: it does not contain the uncertainty of these,
which is small where the window is longer than the sensors' memory. A window over all steps gives the posterior itself.

Source: C. V. Rao, J. B. Rawlings, J. H. Lee, Constrained linear state estimation: a moving horizon approach, Automatica
37(10), 2001, with the filtered past fixed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.linalg import cho_factor, cho_solve

from pint_fem.all_at_once.grids import is_integer
from pint_fem.collective import on_first_rank, require_same
from pint_fem.errors import InputError
from pint_fem.inverse.per_step.covered_responses import covered_responses

if TYPE_CHECKING:
    from pint_fem.inverse.posterior import GaussianPosterior

__all__ = ["SlidingWindow"]

_KEPT = 8
"""Factored matrices that are kept: those of all phases where sensors read in every eighth step at least."""
_SAME_TIME = 1e-9
"""Difference of two shares of a step that is round-off of the times of readings."""


class SlidingWindow:
    """Estimates of the last steps' controls from readings up to a point that moves.

    Static controls and the initial condition are held at the prior's mean.

    Parameters
    ----------
    posterior
        A posterior of controls of which at least one has a value per step: its map, prior, noise, weight of the prior
        and, by default, readings are used.
    steps
        Length of the window.

    Attributes
    ----------
    now : int
        The point up to which readings were used; 0 at first.

    Raises
    ------
    InputError
        On every rank, if no control has a value per step, or the length is not a whole number of at least 1.
    """

    def __init__(self, posterior: GaussianPosterior, steps: int):
        F = posterior.F
        self._comm = F.spacetime.comm
        require_same(self._comm, steps=steps)
        if not is_integer(steps) or steps < 1:
            raise InputError(f"window: steps = {steps!r}: give a whole number of at least 1")
        if F.steps is None:
            raise InputError("window: no control has a value per step: use posterior(), whose controls are static")
        self._posterior, self.steps, self.now = posterior, int(steps), 0
        self._responses, _ = covered_responses(F, posterior.prior, np.zeros((0, F.layout.static_size)))
        self._columns, self._table = F.steps.columns, F.table
        self._nsteps = F.layout.slab.nsteps
        self._coefficients = np.zeros((self._nsteps, len(self._responses.K)))  # A_i^T c of all steps
        self._residual = posterior.data - F.predict(posterior.prior.mean)  # without the steps before the window
        self._data = posterior.data
        self._numbers = np.zeros(0, dtype=int)
        self._solver: _Solver | None = None
        self._solvers: list[_Solver] = []

    @property
    def first(self) -> int:
        """The first step of the window."""
        return max(0, self.now - self.steps)

    def advance(self, point: int, data: Any = None) -> SlidingWindow:
        """Move the window, step by step, to end at a later point, and return it (collective).

        Parameters
        ----------
        point
            The point, at most the number of steps; readings in the steps up to it are used.
        data
            Readings ``(m,)``, of which those of later steps are not read; default: those of the posterior.

        Raises
        ------
        InputError
            On every rank, if the point is not after ``now``, or readings up to it are not finite.
        """
        require_same(self._comm, point=point)
        if not is_integer(point) or not self.now < point <= self._nsteps:
            raise InputError(
                f"window: point {point!r}: give a whole number from {self.now + 1} to {self._nsteps}, as the window is "
                f"at {self.now}"
            )
        if data is not None:
            self._read(data, int(point))
        for now in range(self.now + 1, int(point) + 1):
            self._move(now)
        return self

    def _read(self, data: Any, point: int) -> None:
        """Take readings of the steps from now on."""
        given = np.array(data, dtype=float).ravel()
        new = self._table.point > self.now if self.now else np.ones(self._table.size, dtype=bool)
        used = new & (self._table.point <= point)
        if given.shape != self._data.shape or not np.isfinite(given[used]).all():
            raise InputError(
                f"window: readings of shape {given.shape}: give {len(self._data)} numbers, finite up to point {point}"
            )
        require_same(self._comm, readings=given[used])
        self._residual[used] += given[used] - self._data[used]
        self._data = np.where(used, given, self._data)

    def _move(self, now: int) -> None:
        """Move the window by one step, and estimate its values."""
        if now > self.steps:
            self._fix(now - self.steps - 1)
        self.now = now
        point, first = self._table.point, self.first
        self._numbers = np.flatnonzero((point > first) & (point <= now))
        solver = _Solver(self._posterior, self._responses, self._numbers, first, now)
        cached = next((other for other in self._solvers if other.is_same(solver)), None)
        if cached is None:
            solver.factor()
            self._solvers = [solver, *self._solvers[: _KEPT - 1]]
        self._solver = solver if cached is None else cached
        c = self._solver.solve(self._residual[self._numbers])
        for A, coefficients in zip(self._solver.A, self._coefficients[first:now], strict=True):
            coefficients[:] = A.T @ c

    def _fix(self, step: int) -> None:
        """Hold the value of a step, and subtract what it contributes to later readings."""
        self._residual -= self._responses.contributions(step, self._responses.K @ self._coefficients[step])

    # -- results -------------------------------------------------------------------------------------------------------
    @property
    def x(self) -> np.ndarray:
        """The estimates of the window's steps, the last ones of the steps before it, and the prior's mean for those
        after it, a flat vector ``(layout.size,)`` (collective).
        """
        x = np.array(self._posterior.prior.mean)
        moved = self._columns.rows((self._coefficients @ self._responses.D)[None])
        self._columns.put_steps(x[None], self._columns.steps(x[None]) + moved)
        return x

    @property
    def mean(self) -> Any:
        """As :attr:`x`: a function, or a list with one for each control (collective)."""
        return self._posterior._functions(self.x)

    def variance(self) -> np.ndarray:
        """The variance of each entry for given values of the controls before the window, ``(layout.size,)``: zero for
        what is held fixed, that of the prior for steps after the window (collective).
        """
        D, posterior = self._responses.D, self._posterior
        out = posterior.prior.variance()
        out[: self._columns.layout.static_size] = 0.0
        known = np.zeros((self._nsteps, D.shape[1]))
        if self._solver is not None:
            for i, H in enumerate(self._solver.reductions()):
                known[self.first + i] = np.einsum("ij,ij->j", D, H @ D)
        steps = self._columns.steps(out[None]) - self._columns.rows(known[None])
        slab = self._columns.layout.slab
        steps[:, : max(0, min(slab.hi, self.first) - slab.lo)] = 0.0
        self._columns.put_steps(out[None], np.maximum(steps, 0.0))
        return out / posterior.alpha

    def standard_deviation(self) -> Any:
        """The square root of :meth:`variance`, as :attr:`mean` (collective)."""
        return self._posterior._functions(np.sqrt(self.variance()))

    @property
    def predicted(self) -> np.ndarray:
        """The readings at :attr:`x`, also later ones, ``(m,)`` (collective)."""
        return self._posterior.F.predict(self.x)


class _Solver:
    """The factored matrix of a window's readings.

    Parameters
    ----------
    posterior
        Noise and weight of the prior.
    responses
        Reduced responses.
    numbers
        The readings in the window.
    first, now
        The window's first step and its end.
    """

    def __init__(self, posterior: GaussianPosterior, responses, numbers: np.ndarray, first: int, now: int):
        self._responses, self._comm, self._alpha = responses, posterior.F.spacetime.comm, posterior.alpha
        table, noise = posterior.F.table, posterior.noise
        mask = np.zeros(table.size, dtype=bool)
        mask[numbers] = True
        self._noise = noise.restricted(mask)
        self._key = now - first, table.sensor[numbers], table.point[numbers] - first
        self._theta, self._place = table.theta[numbers], (numbers, first, now)
        if not responses.invariant:
            self._key += (np.array(first),)
        self.A: list[np.ndarray] = []

    def is_same(self, other: _Solver) -> bool:
        """Whether another window has the same matrix."""
        if not all(np.array_equal(a, b) for a, b in zip(self._key, other._key, strict=True)):
            return False
        if not np.allclose(self._theta, other._theta, rtol=0, atol=_SAME_TIME):
            return False
        if self._noise.is_diagonal:
            return np.array_equal(self._noise.variance(), other._noise.variance())
        units = np.eye(len(self._theta))
        return np.array_equal(self._noise.covariance(units), other._noise.covariance(units))

    def factor(self) -> None:
        """Factor the matrix; the noise of its readings is independent of that of earlier ones (collective)."""
        numbers, first, now = self._place
        self.A = [self._responses.of_readings(numbers, i) for i in range(first, now)]

        def factored():
            if not len(numbers):
                return None
            G = sum(A @ self._responses.K @ A.T for A in self.A)
            return cho_factor(0.5 * (G + G.T) + self._alpha * self._noise.covariance(np.eye(len(numbers))))

        self._factor = on_first_rank(self._comm, "window", factored)

    def solve(self, r: np.ndarray) -> np.ndarray:
        """``(G_w + alpha N_w)^{-1} r``, the same on all ranks (collective)."""
        if self._factor is None:
            return r
        return on_first_rank(self._comm, "window", cho_solve, self._factor, r)

    def reductions(self) -> list[np.ndarray]:
        """Of each step of the window the matrix :math:`A_i^T (G_w + \\alpha N_w)^{-1} A_i`."""
        if self._factor is None:
            return [np.zeros((len(self._responses.K),) * 2) for _ in self.A]
        return [A.T @ cho_solve(self._factor, A) for A in self.A]

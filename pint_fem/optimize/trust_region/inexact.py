r"""How accurate a problem is asked for: inexact J, gradients and Hessian products that do not spoil convergence.

A J that comes from an iterative solver costs what its accuracy costs. The trust-region method converges if the
accuracy follows the run [1, 2]. Here :math:`x_k` is the iterate, :math:`\Delta_k` the radius, :math:`g_k` the computed
gradient with estimated error :math:`e^g_k`, :math:`\mathrm{pred}_k` the reduction promised by the model and
:math:`e_k, e_k^+` are the errors of J at :math:`x_k` and :math:`x_k + s_k`.

**Gradient** [1, 2]. :math:`e^g_k \le \kappa_g \min(|g_k|, \gamma \Delta_k)`. As the right-hand side needs the
gradient, it is computed, checked with its own norm, and asked for again, tighter, until the condition holds. The
theory admits any constant :math:`\gamma`; the curvature :math:`|(d, H d)|/(d, d)` of the first direction of the run
makes both lengths gradients, so the unit of J does not matter. After a rejected step the smaller radius may ask for a
better gradient at the same point; the conjugate gradient path then starts anew.

**Objective** [2]. The computed reduction :math:`\mathrm{cred}_k` differs from the actual one by no more than
:math:`\theta_k = \sigma_k \,(\eta \min(\mathrm{pred}_k/\sigma_k, r_k))^{1/\omega}` with :math:`\omega \in (0, 1)`,
a forcing sequence :math:`r_k \to 0` and :math:`\eta < \min(1/4, 1 - 3/4)`, the radius being reduced below
:math:`\rho = 1/4` and enlarged above :math:`3/4`; :math:`\sigma_k`, the largest reduction promised so far, is the unit
of J. Half of :math:`\theta_k` goes to each of the two points, so :math:`J(x_k)` is asked for again, tighter, when the
promise is known. Since :math:`\theta_k \le \eta\,\mathrm{pred}_k`, computed and actual ratio differ by less than
:math:`\eta` at every :math:`k`, not only in the limit; the exponent covers estimates that are wrong by a constant. A
step is accepted only if the reduction is certain: :math:`\mathrm{cred}_k - e_k - e_k^+ > \eta_0 \mathrm{pred}_k`.

**Hessian products** [3, 4]. Product :math:`j` of conjugate gradients that stop at :math:`|r_j| \le \tau` has relative
error at most :math:`\kappa_H\,\tau/|r_j| < \kappa_H`: the smaller the residual, the coarser the product. As
:math:`\alpha_j H d_j` is the difference of two residuals, the true residual of the step drifts from the computed one by
no more than about :math:`\kappa_H \tau (1 + |r_{j+1}|/|r_j|)` an iteration. If the error could be a quarter of
:math:`(d_j, H d_j)`, the product is asked for again, tighter. The error of a product spoils the symmetry the usual
formula for the prediction rests on: see :mod:`pint_fem.optimize.trust_region.steihaug` for the one used instead.

A problem may offer instead a *model*: a self-adjoint operator within a given relative error of the Hessian, the same
one for all products of an iterate. Conjugate gradients then need no more iterations than with exact products, and the
prediction needs no correction. Its error is to be at most :math:`\kappa_M` times the tolerance of conjugate gradients
relative to :math:`|g_k|`, so that it spoils the Newton step no more than their early end does. Any bounded self-adjoint
model leads to a minimum [1, 2]; an error that is larger than estimated costs iterations.

**The end.** The run has converged when :math:`|g_k| + e^g_k` is within the gradient tolerance :math:`\epsilon`. No
gradient is asked for below :math:`0.1\,\epsilon`, and no J below :math:`\eta` times the reduction the model promises
where the gradient has the norm :math:`\epsilon`, :math:`\mathrm{pred}_k\,(\epsilon/|g_k|)^2`, or below `value_rtol`.
An accuracy that was asked for and missed is not asked for again at the same point, and what follows is:
reductions within the errors of J do not count (the gradient has to fall instead), and a gradient less than twice its
error ends the run.

**Estimates that are wrong.** Two answers at one point must agree within their errors. If they differ by a factor more,
estimates of that kind are multiplied by it from then on; each later comparison may raise it, or halve it.

References
----------
[1] D. P. Kouri, M. Heinkenschloss, D. Ridzal, B. G. van Bloemen Waanders, A trust-region algorithm with adaptive
    stochastic collocation for PDE optimization under uncertainty, SISC 35 (2013) A1847-A1879.
[2] D. P. Kouri, M. Heinkenschloss, D. Ridzal, B. G. van Bloemen Waanders, Inexact objective function evaluations in a
    trust-region algorithm for PDE-constrained optimization under uncertainty, SISC 36 (2014) A3011-A3029.
[3] J. van den Eshof, G. L. G. Sleijpen, Inexact Krylov subspace methods for linear systems, SIMAX 26 (2004) 125-153.
[4] V. Simoncini, D. B. Szyld, Theory of inexact Krylov subspace methods and applications to scientific computing,
    SISC 25 (2003) 454-477.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pint_fem.optimize.argument_checks import check, is_count
from pint_fem.optimize.evaluator import Estimate, Evaluator, ExactOracle, Gradient, Point
from pint_fem.optimize.trust_region.acceptance import is_wild

__all__ = ["InexactOptions", "InexactOracle"]

_EPS = float(np.finfo(float).eps)

# The next question is tighter than the condition by this, as the gradient that answers it may be smaller.
_MARGIN = 0.5

# Accuracy of J at the first guess relative to J, before any reduction is known.
_FIRST_RTOL = 0.1

# Share of the gradient tolerance no gradient needs to be more accurate than.
_FINAL_SHARE = 0.1

# How often J is asked for at a point to learn how wrong its estimates are.
_VALUE_TRIES = 3

# Share of a curvature its error may have, and how often a product is asked for again to get there.
_CURVATURE_SHARE, _CURVATURE_TRIES = 0.25, 3


@dataclass(frozen=True, kw_only=True)
class InexactOptions:
    """How accurate J, gradients and Hessian products have to be.

    Parameters
    ----------
    kappa_grad : float
        Error of the gradient relative to its norm (and to the radius); in (0, 1). The gradient falls by no more than
        about this factor an iteration.
    eta : float
        Error of the computed reduction relative to the predicted one; in (0, 1/4).
    omega : float
        Exponent that tightens this as the predictions fall; in (0, 1).
    forcing : float
        The forcing sequence is ``forcing**k`` times the largest prediction; in (0, 1).
    kappa_hess : float
        Share of CG's residual tolerance left to the error of a Hessian product; in (0, 1). Larger ones make products
        cheaper, but cost CG iterations where the Hessian is ill-conditioned.
    kappa_model : float
        Error of a model of the Hessian relative to CG's tolerance over |g|; in (0, 1].
    max_tightenings : int
        How often a gradient is asked for again at most.

    Raises
    ------
    ValueError
        A number outside its range.
    """

    kappa_grad: float = 0.1
    eta: float = 0.1
    omega: float = 0.9
    forcing: float = 0.8
    kappa_hess: float = 0.01
    kappa_model: float = 1.0
    max_tightenings: int = 8

    def __post_init__(self):
        """Check the ranges."""
        for name in ("kappa_grad", "omega", "forcing", "kappa_hess"):
            check(name, getattr(self, name), "a number in (0, 1)", lambda v: 0 < v < 1)
        check("eta", self.eta, "a number in (0, 0.25)", lambda v: 0 < v < 0.25)
        check("kappa_model", self.kappa_model, "a number in (0, 1]", lambda v: 0 < v <= 1)
        check("max_tightenings", self.max_tightenings, "an integer >= 1", is_count(1))


_MEMORY = ("unit", "stiffness", "value_factor", "gradient_factor")


class InexactOracle(ExactOracle):
    """As much accuracy as convergence needs, of those functions of the problem that offer a choice."""

    inexact = True

    def __init__(self, evaluator: Evaluator, options: InexactOptions, value_rtol: float):
        super().__init__(evaluator)
        self.options, self.value_rtol = options, value_rtol

        def offers(name: str) -> bool:
            return callable(getattr(evaluator.problem, f"{name}_within", None))

        self.chooses_value, self.chooses_gradient = offers("value"), offers("gradient")
        self.chooses_hessian = offers(evaluator.action_name)
        self._make_model = getattr(evaluator.problem, evaluator.model_name, None)
        self._model: Callable[[np.ndarray], np.ndarray] | None = None
        self.final = 0.0  # gradient norm the run ends at
        self.unit = 0.0  # sigma_k
        self.stiffness = math.inf  # gamma, not known before the first Hessian product
        self.value_factor = self.gradient_factor = 1.0  # what estimates are multiplied by

    def aim(self, tolerance: float) -> None:
        """Hear the norm of the gradient at which the run ends."""
        self.final = tolerance

    # -- the gradient -------------------------------------------------------------------------------------------------
    def _allowed(self, norm: float, radius: float | None) -> float:
        """Largest error of a gradient of this norm in a ball of this radius (none yet: no bound)."""
        bound = norm if radius is None else min(norm, self.stiffness * radius)
        return max(self.options.kappa_grad * bound, _FINAL_SHARE * self.final)

    def gradient(
        self,
        x: np.ndarray,
        iteration: int,
        last_good: np.ndarray,
        *,
        guess: float = math.inf,
        radius: float | None = None,
    ) -> Gradient:
        """The gradient at x, asked for until its error is small against its norm and the radius."""
        if not self.chooses_gradient:
            return super().gradient(x, iteration, last_good)
        asked, before, scale = self._allowed(guess, radius), None, guess if math.isfinite(guess) else 0.0
        for _ in range(1 + self.options.max_tightenings):
            raw = max(asked / self.gradient_factor, _EPS * scale)
            g, norm, estimate = self.evaluator.gradient_within(x, raw, iteration, last_good)
            if before is not None:
                change = g - before[0]
                change = math.sqrt(max(self.inner(change, change), 0.0))
                self.gradient_factor = _factor(self.gradient_factor, change - 8 * _EPS * norm, before[1] + estimate)
            answer = Gradient(g, norm, self.gradient_factor * raw, self.gradient_factor * estimate)
            # An answer to no question at all is a scale for the next one, no more.
            if math.isfinite(raw) and (answer.error <= self._allowed(norm, radius) or estimate > raw):
                break
            before, scale = (g, estimate), norm
            # A norm below the error says only that the gradient is no larger than twice the error.
            asked = max(_MARGIN * self._allowed(max(norm, answer.error), radius), _FINAL_SHARE * self.final)
            asked = asked if math.isfinite(asked) else 0.0
        return answer

    def refined(self, point: Point, iteration: int, radius: float) -> Point:
        """The same point with a gradient accurate enough for a ball of this radius."""
        old = point.gradient
        if old.error <= self._allowed(old.norm, radius) or old.error > old.asked:
            return point
        return Point(point.x, point.value, self.gradient(point.x, iteration, point.x, guess=old.norm, radius=radius))

    # -- the objective ------------------------------------------------------------------------------------------------
    def _first_value(self, x: np.ndarray) -> Estimate:
        if not self.chooses_value:
            return super()._first_value(x)
        first = self._value(x, math.inf)
        scale = max(abs(first.value), first.error if math.isfinite(first.error) else 0.0)
        return self._value(x, _FIRST_RTOL * scale, scale, first) if math.isfinite(scale) else first

    def _value(self, x: np.ndarray, asked: float, scale: float = 0.0, before: Estimate | None = None) -> Estimate:
        """J, of about the size `scale`, within `asked`; compared with the answer `before` at the same point."""
        for _ in range(_VALUE_TRIES):
            raw = max(asked / self.value_factor, _EPS * scale)
            value, estimate = self.evaluator.value_within(x, raw)
            if before is not None and math.isfinite(value):
                change = abs(value - before.value) - self.value_rtol * abs(value)
                self.value_factor = _factor(self.value_factor, change, before.error / self.value_factor + estimate)
            answer = Estimate(value, self.value_factor * raw, self.value_factor * estimate)
            if not answer.error > asked or estimate > raw:
                break
            before = answer
        return answer

    def compare(self, point: Point, trial: np.ndarray, predicted: float, iteration: int) -> tuple[Point, Estimate]:
        """J at the iterate and at the trial point, accurate enough to judge the predicted reduction."""
        if not self.chooses_value:
            return super().compare(point, trial, predicted, iteration)
        o, current = self.options, point.value
        unit, theta = max(self.unit, predicted), 0.0
        if 0 < predicted < math.inf:
            theta = unit * (o.eta * min(predicted / unit, o.forcing**iteration)) ** (1 / o.omega)
            theta = max(theta, o.eta * predicted * min(1.0, self.final / point.gradient.norm) ** 2)
        asked = max(0.5 * theta, self.value_rtol * abs(current.value))
        if asked < current.error <= current.asked:
            better = self._value(point.x, asked, abs(current.value), current)
            if not math.isfinite(better.value):  # no better J is to be had here
                better = Estimate(current.value, asked, current.error)
            point = Point(point.x, better, point.gradient)
        factor, answer = self.value_factor, self._value(trial, asked, abs(point.value.value))
        if math.isfinite(answer.value) and not is_wild(point.value, answer, predicted):
            self.unit = unit
        else:  # nothing is learned where the step went too far
            self.value_factor = factor
        return point, answer

    # -- the Hessian --------------------------------------------------------------------------------------------------
    def start_path(self, x: np.ndarray, target: float) -> None:
        """Products at x are wanted next; CG will stop at the residual `target` relative to |g|."""
        if callable(self._make_model):
            self.model_rtol = max(self.options.kappa_model * target, 4 * _EPS)
            self._model = self._make_model(x, self.model_rtol)

    def curvature(
        self, x: np.ndarray, d: np.ndarray, dd: float, iteration: int, target: float
    ) -> tuple[np.ndarray, float, float]:
        """H d, (d, H d) and the relative error asked for; `dd` is (d, d), `target` the CG tolerance over |r_j|."""
        if self._model is not None:
            h, curvature = self.evaluator.model_curvature(self._model, x, d, iteration)
            rtol = 0.0  # exact for the model
        elif not self.chooses_hessian:
            h, curvature, rtol = super().curvature(x, d, dd, iteration, target)
        else:
            rtol = max(self.options.kappa_hess * target, 4 * _EPS)
            h, curvature = self.evaluator.curvature(x, d, iteration, rtol)
            for _ in range(_CURVATURE_TRIES):
                size = math.sqrt(dd * self.inner(h, h))
                if rtol * size <= _CURVATURE_SHARE * abs(curvature):
                    break
                rtol = min(max(0.5 * _CURVATURE_SHARE * abs(curvature) / size, 0.01 * rtol), 0.5 * rtol)
                h, curvature = self.evaluator.curvature(x, d, iteration, rtol)
        if self.stiffness == math.inf and curvature != 0:
            self.stiffness = abs(curvature) / dd
        return h, curvature, rtol

    # -- the checkpoint -----------------------------------------------------------------------------------------------
    def memory(self) -> dict[str, float]:
        """What it has learned, for a checkpoint."""
        return {name: getattr(self, name) for name in _MEMORY}

    def recall(self, memory: dict[str, float]) -> None:
        """Take back what `memory` gave."""
        for name in _MEMORY:
            setattr(self, name, memory[name])


def _factor(last: float, change: float, errors: float) -> float:
    """What estimates with this sum have to be multiplied by to allow for this change, forgetting the last slowly.

    Two answers that agree may share an error, so they say little against what was learned before.
    """
    return max(1.0, 0.5 * last, change / errors if 0 < errors < math.inf else 1.0)

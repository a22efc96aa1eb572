r"""The accuracy of inexact J, gradients and Hessian products that does not impair the convergence of a trust region.

A J that comes from an iterative solver costs what its accuracy costs. The trust-region method converges if the accuracy
is adapted to the run [1, 2]. Here :math:`x_k` is the iterate, :math:`\Delta_k` the radius, :math:`g_k` the computed
gradient with estimated error :math:`e^g_k`, :math:`\mathrm{pred}_k` the reduction predicted by the model and
:math:`e_k, e_k^+` are the errors of J at :math:`x_k` and :math:`x_k + s_k`.

**Gradient** [1, 2]. :math:`e^g_k \le \kappa_g \min(|g_k|, \gamma \Delta_k)`. As the right-hand side contains the
gradient, it is computed, checked with its own norm, and computed again more accurately until the condition holds. The
theory admits any constant :math:`\gamma`; the curvature :math:`|(d, H d)|/(d, d)` of the first direction of the run
makes both lengths gradients, so the unit of J does not matter. After a rejected step the smaller radius may require a
better gradient at the same point; the conjugate gradient path then starts anew.

**Objective** [2]. The computed reduction :math:`\mathrm{cred}_k` differs from the actual one by no more than
:math:`\theta_k = \sigma_k \,(\eta \min(\mathrm{pred}_k/\sigma_k, r_k))^{1/\omega}` with :math:`\omega \in (0, 1)`, a
forcing sequence :math:`r_k \to 0` and :math:`\eta < \min(1/4, 1 - 3/4)`, the radius being reduced below :math:`\rho =
1/4` and enlarged above :math:`3/4`; :math:`\sigma_k`, the largest reduction predicted so far, is the unit of J. Half of
:math:`\theta_k` goes to each of the two points, so :math:`J(x_k)` is computed again, more accurately, when the
prediction requires it. Since :math:`\theta_k \le \eta\,\mathrm{pred}_k`, computed and actual ratio differ by less than
:math:`\eta` at every :math:`k`, not only in the limit; the exponent covers estimates that are wrong by a constant. A
step is accepted only if the reduction is certain: :math:`\mathrm{cred}_k - e_k - e_k^+ > \eta_0 \mathrm{pred}_k`.

**Hessian products** [3, 4]. Product :math:`j` of conjugate gradients that stop at :math:`|r_j| \le \tau` has relative
error at most :math:`\kappa_H\,\tau/|r_j| < \kappa_H`: the smaller the residual, the coarser the product. As
:math:`\alpha_j H d_j` is the difference of two residuals, the true residual of the step drifts from the computed one by
no more than about :math:`\kappa_H \tau (1 + |r_{j+1}|/|r_j|)` an iteration. If the error could be a quarter of
:math:`(d_j, H d_j)`, the product is computed again, more accurately. The error of a product spoils the symmetry the
usual formula for the prediction rests on: the one used instead is in :mod:`pint_fem.optimize.trust_region.steihaug`.

A problem may offer instead a *model*: a self-adjoint operator within a given relative error of the Hessian, the same
one for all products of an iterate. Conjugate gradients then need no more iterations than with exact products, and the
prediction needs no correction. Its error is to be at most :math:`\kappa_M` times the tolerance of conjugate gradients
relative to :math:`|g_k|`, so that it spoils the Newton step no more than their early end does. Any bounded self-adjoint
model leads to a minimum [1, 2]; an error that is larger than estimated costs iterations.

**The end.** The run has converged when :math:`|g_k| + e^g_k` is within the gradient tolerance :math:`\epsilon`. No
tolerance of a gradient is below :math:`0.1\,\epsilon`, and none of J below :math:`\eta` times the reduction that the
model predicts where the gradient has the norm :math:`\epsilon`, :math:`\mathrm{pred}_k\,(\epsilon/|g_k|)^2`, or below
`value_rtol`. A tolerance that was missed is not requested again at the same point. Then reductions within the errors of
J do not count (the gradient has to fall instead), and a gradient less than twice its error ends the run.

**Estimates that are wrong.** Two results at one point must agree within their errors. If they differ by a factor more,
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

from pint_fem.optimize.argument_checks import check, check_count
from pint_fem.optimize.guarded_problem import GuardedProblem
from pint_fem.optimize.oracle import Estimate, ExactOracle, Gradient, Iterate
from pint_fem.optimize.trust_region.acceptance import error_exceeds_scale

__all__ = ["InexactOptions", "InexactOracle"]

_EPS = float(np.finfo(float).eps)

# The next tolerance is smaller than the condition by this factor, as the more accurate gradient may be smaller.
_MARGIN = 0.5

# Accuracy of J at the first guess relative to J, before any reduction is predicted.
_FIRST_RTOL = 0.1

# No gradient has to be more accurate than this share of the gradient tolerance.
_FINAL_SHARE = 0.1

# How often J is evaluated at a point to correct its error estimates.
_VALUE_TRIES = 3

# Share of a curvature that its error may have, and how often a product is repeated more accurately to that end.
_CURVATURE_SHARE, _CURVATURE_TRIES = 0.25, 3


@dataclass(frozen=True, kw_only=True)
class InexactOptions:
    """The accuracy required of J, gradients and Hessian products.

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
        Error of a model of the Hessian relative to CG's tolerance over ``|g|``; in (0, 1].
    max_tightenings : int
        How often a gradient is computed again, more accurately, at most.

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

    def __post_init__(self) -> None:
        """Check types and ranges."""
        for name in ("kappa_grad", "omega", "forcing", "kappa_hess"):
            check(name, getattr(self, name), "a number in (0, 1)", lambda v: 0 < v < 1)
        check("eta", self.eta, "a number in (0, 0.25)", lambda v: 0 < v < 0.25)
        check("kappa_model", self.kappa_model, "a number in (0, 1]", lambda v: 0 < v <= 1)
        check_count("max_tightenings", self.max_tightenings, 1)


_STATE = ("unit", "stiffness", "value_factor", "gradient_factor")


class InexactOracle(ExactOracle):
    """J, gradients and products no more accurate than convergence requires, where the problem offers the choice.

    Parameters
    ----------
    problem : GuardedProblem
        The problem; methods of :class:`~pint_fem.optimize.protocol.InexactProblem` that it lacks are exact.
    options : InexactOptions
        The accuracies.
    value_rtol : float
        Smallest relative tolerance of J.
    hessian : {"newton", "gauss-newton"}
        The form whose products `curvature` returns.
    """

    inexact = True

    def __init__(self, problem: GuardedProblem, options: InexactOptions, value_rtol: float, hessian: str = "newton"):
        super().__init__(problem, hessian)
        self.options, self.value_rtol = options, value_rtol
        # methods whose accuracy can be chosen, else None
        self._value_within, self._gradient_within, self._action_within = (
            getattr(problem, f"{name}_within", None) for name in ("value", "gradient", self.action_name)
        )
        self._make_model = getattr(problem, self.model_name, None)
        self._model: Callable[[np.ndarray], np.ndarray] | None = None
        self.final = 0.0  # norm of the gradient at which the run ends
        self.unit = 0.0  # sigma_k
        self.stiffness = math.inf  # gamma, infinite before the first Hessian product
        self.value_factor = self.gradient_factor = 1.0  # factors that correct error estimates

    def set_final_norm(self, norm: float) -> None:
        """Set the norm of the gradient at which the run ends."""
        self.final = norm

    # -- the gradient -------------------------------------------------------------------------------------------------
    def _allowed(self, norm: float, radius: float | None) -> float:
        """Largest error of a gradient of this norm in a ball of this radius (None: no bound)."""
        bound = norm if radius is None else min(norm, self.stiffness * radius)
        return max(self.options.kappa_grad * bound, _FINAL_SHARE * self.final)

    def gradient(
        self, x: np.ndarray, iteration: int, last_good: np.ndarray, *,
        guess: float = math.inf, radius: float | None = None,
    ) -> Gradient:  # fmt: skip
        """The gradient at x, repeated more accurately until its error is small against its norm and the radius."""
        if self._gradient_within is None:
            return super().gradient(x, iteration, last_good)
        tolerance, before, scale = self._allowed(guess, radius), None, guess if math.isfinite(guess) else 0.0
        for _ in range(1 + self.options.max_tightenings):
            raw = max(tolerance / self.gradient_factor, _EPS * scale)
            g, estimate = self._gradient_within(x, raw)
            norm = self.problem.gradient_norm(g, iteration, last_good)
            if before is not None:
                change = g - before[0]
                change = math.sqrt(max(self.inner(change, change), 0.0))
                self.gradient_factor = _factor(self.gradient_factor, change - 8 * _EPS * norm, before[1] + estimate)
            found = Gradient(g, norm, self.gradient_factor * raw, self.gradient_factor * estimate)
            # A gradient computed to an infinite tolerance only gives the scale of the next one.
            if math.isfinite(raw) and (found.error <= self._allowed(norm, radius) or estimate > raw):
                break
            before, scale = (g, estimate), norm
            # A norm below the error means only that the gradient is no larger than twice the error.
            tolerance = max(_MARGIN * self._allowed(max(norm, found.error), radius), _FINAL_SHARE * self.final)
            tolerance = tolerance if math.isfinite(tolerance) else 0.0
        return found

    def refined(self, iterate: Iterate, iteration: int, radius: float) -> Iterate:
        """The iterate with a gradient accurate enough for a ball of this radius."""
        old, x = iterate.gradient, iterate.x
        if old.error <= self._allowed(old.norm, radius) or old.error > old.tolerance:
            return iterate
        return Iterate(x, iterate.value, self.gradient(x, iteration, x, guess=old.norm, radius=radius))

    # -- the objective ------------------------------------------------------------------------------------------------
    def _first_value(self, x: np.ndarray) -> Estimate:
        if self._value_within is None:
            return super()._first_value(x)
        first = self._value(x, math.inf)
        scale = max(abs(first.value), first.error if math.isfinite(first.error) else 0.0)
        return self._value(x, _FIRST_RTOL * scale, scale, first) if math.isfinite(scale) else first

    def _value(self, x: np.ndarray, tolerance: float, scale: float = 0.0, before: Estimate | None = None) -> Estimate:
        """J, of about the size `scale`, within `tolerance`; compared with the estimate `before` at the same point."""
        for _ in range(_VALUE_TRIES):
            raw = max(tolerance / self.value_factor, _EPS * scale)
            value, estimate = self._value_within(x, raw)
            if before is not None and math.isfinite(value):
                change = abs(value - before.value) - self.value_rtol * abs(value)
                self.value_factor = _factor(self.value_factor, change, before.error / self.value_factor + estimate)
            found = Estimate(value, self.value_factor * raw, self.value_factor * estimate)
            if not found.error > tolerance or estimate > raw:
                break
            before = found
        return found

    def compare(
        self, iterate: Iterate, trial: np.ndarray, predicted: float, iteration: int
    ) -> tuple[Iterate, Estimate]:
        """The iterate and J at the trial point, both accurate enough for the reductions to be compared."""
        if self._value_within is None:
            return super().compare(iterate, trial, predicted, iteration)
        o, current = self.options, iterate.value
        unit, theta = max(self.unit, predicted), 0.0
        if 0 < predicted < math.inf:
            theta = unit * (o.eta * min(predicted / unit, o.forcing**iteration)) ** (1 / o.omega)
            theta = max(theta, o.eta * predicted * min(1.0, self.final / iterate.gradient.norm) ** 2)
        tolerance = max(0.5 * theta, self.value_rtol * abs(current.value))
        if tolerance < current.error <= current.tolerance:
            better = self._value(iterate.x, tolerance, abs(current.value), current)
            if not math.isfinite(better.value):  # J cannot be computed more accurately here
                better = Estimate(current.value, tolerance, current.error)
            iterate = Iterate(iterate.x, better, iterate.gradient)
        factor, found = self.value_factor, self._value(trial, tolerance, abs(iterate.value.value))
        if math.isfinite(found.value) and not error_exceeds_scale(iterate.value, found, predicted):
            self.unit = unit
        else:  # estimates where the step went too far are not compared with others
            self.value_factor = factor
        return iterate, found

    # -- the Hessian --------------------------------------------------------------------------------------------------
    def start_path(self, x: np.ndarray, target: float) -> None:
        """Make the model at x for conjugate gradients that stop at the residual `target` relative to |g|."""
        if callable(self._make_model):
            self.model_rtol = max(self.options.kappa_model * target, 4 * _EPS)
            self._model = self._make_model(x, self.model_rtol)

    def curvature(
        self, x: np.ndarray, d: np.ndarray, dd: float, iteration: int, target: float
    ) -> tuple[np.ndarray, float, float]:
        """H d, (d, H d) and the relative error allowed; `dd` is (d, d), `target` the CG tolerance over |r_j|."""
        if self._model is not None:
            h = self._model(d)
            curvature, rtol = self.problem.curvature(d, h, iteration, x), 0.0  # exact for the model
        elif self._action_within is None:
            h, curvature, rtol = super().curvature(x, d, dd, iteration, target)
        else:
            rtol = max(self.options.kappa_hess * target, 4 * _EPS)
            h, curvature = self._product_within(x, d, iteration, rtol)
            for _ in range(_CURVATURE_TRIES):
                size = math.sqrt(dd * self.inner(h, h))
                if rtol * size <= _CURVATURE_SHARE * abs(curvature):
                    break
                rtol = min(max(0.5 * _CURVATURE_SHARE * abs(curvature) / size, 0.01 * rtol), 0.5 * rtol)
                h, curvature = self._product_within(x, d, iteration, rtol)
        if self.stiffness == math.inf and curvature != 0:
            self.stiffness = abs(curvature) / dd
        return h, curvature, rtol

    def _product_within(self, x: np.ndarray, d: np.ndarray, iteration: int, rtol: float) -> tuple[np.ndarray, float]:
        h = self._action_within(x, d, rtol)
        return h, self.problem.curvature(d, h, iteration, x)

    # -- the checkpoint -----------------------------------------------------------------------------------------------
    def state(self) -> dict[str, float]:
        """The numbers from which accuracies are derived, for a checkpoint."""
        return {name: getattr(self, name) for name in _STATE}

    def restore(self, state: dict[str, float]) -> None:
        """Set the numbers that :meth:`state` returned."""
        for name in _STATE:
            setattr(self, name, state[name])


def _factor(last: float, change: float, errors: float) -> float:
    """The factor by which estimates with the sum `errors` have to be multiplied to allow for `change`.

    It decreases slowly from the last one: two results that agree may share an error, so agreement is weak evidence.
    """
    return max(1.0, 0.5 * last, change / errors if 0 < errors < math.inf else 1.0)

r"""Matrix-free trust-region Newton-CG (Steihaug-Toint) in a Hilbert space.

Minimise :math:`J` on a space with inner product :math:`(a, b)` and norm :math:`|a|`. With the Riesz representatives
:math:`g` of :math:`J'(x)` and :math:`H` of :math:`J''(x)` (or of a Gauss-Newton form in its place), iteration
:math:`k` minimises approximately the model

.. math:: m(s) = J(x) + (g, s) + \tfrac12 (s, H s) \quad\text{subject to}\quad |s| \le \Delta

and compares the reduction of J with that of the model,

.. math:: \rho = \frac{J(x) - J(x + s)}{J(x) - m(s)}:

the step is accepted if :math:`\rho > \eta`; :math:`\Delta` becomes :math:`|s|/4` if :math:`\rho < 1/4` and doubles if
:math:`\rho > 3/4` and the step ends on the boundary [1, Alg. 4.1]. Iterates, steps and radius are measured in the
problem's own norm, so a good inner product is the preconditioner: iteration counts then do not depend on the mesh.

The model is minimised by conjugate gradients from :math:`p_0 = 0, r_0 = g, d_0 = -g` [2; 1, Alg. 7.2],

.. math::
    \alpha_j = \frac{(r_j, r_j)}{(d_j, H d_j)}, \quad p_{j+1} = p_j + \alpha_j d_j, \quad
    r_{j+1} = r_j + \alpha_j H d_j, \quad d_{j+1} = -r_{j+1} + \frac{(r_{j+1}, r_{j+1})}{(r_j, r_j)} d_j,

until the residual is small, :math:`|r_j| \le \min(1/2, \sqrt{|g|/|g_0|})\,|g|` (superlinear convergence, [3]; other
choices in :mod:`pint_fem.optimize.trust_region.forcing`), or the path :math:`p_0, p_1, \dots` leaves the ball, or
:math:`(d_j, H d_j) \le 0`; in the last two cases it is followed to the boundary. A part :math:`\tau d_j` of the path
lowers the model by :math:`\tau (r_j, r_j) - \tfrac12 \tau^2 (d_j, H d_j)`, so the prediction costs no Hessian action.
As :math:`|p_j|` grows with :math:`j` [2, Thm 2.1], the step for a smaller radius is the same path cut earlier: the
directions are stored, and the retry after a rejected step needs no Hessian action.

Differences of J below its own accuracy carry no information: if both reductions are below
:math:`\varepsilon \max(|J(x)|, |J(x+s)|)`, :math:`\rho = 1` is used [4, Sec. 17.4.2], and the run ends if such a step
lowers neither J nor the norm of the gradient.

The iteration itself is in :mod:`~pint_fem.optimize.trust_region.iteration`, the path in
:mod:`~pint_fem.optimize.trust_region.steihaug`, inexact evaluations in
:mod:`~pint_fem.optimize.trust_region.inexact`, a preconditioner built from earlier products in
:mod:`~pint_fem.optimize.preconditioners`, and the continuation of an interrupted run in
:mod:`~pint_fem.optimize.restart`.

References
----------
[1] J. Nocedal, S. J. Wright, Numerical Optimization, 2nd ed., Springer 2006.
[2] T. Steihaug, The conjugate gradient method and trust regions in large scale optimization, SINUM 20 (1983) 626-637.
[3] S. C. Eisenstat, H. F. Walker, Choosing the forcing terms in an inexact Newton method, SISC 17 (1996) 16-32.
[4] A. R. Conn, N. I. M. Gould, P. L. Toint, Trust-Region Methods, SIAM 2000.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast

import numpy as np

from pint_fem.errors import InputTypeError
from pint_fem.optimize.argument_checks import check, check_choice
from pint_fem.optimize.guarded_problem import GuardedProblem
from pint_fem.optimize.oracle import ExactOracle, Iterate
from pint_fem.optimize.protocol import Checkpoint, Preconditioner, Problem
from pint_fem.optimize.ranks import on_all_ranks
from pint_fem.optimize.records import IterationRecord, TrustRegionResult
from pint_fem.optimize.trust_region.forcing import CHOICES
from pint_fem.optimize.trust_region.inexact import InexactOptions, InexactOracle
from pint_fem.optimize.trust_region.iteration import NewtonOptions, TrustRegionRun
from pint_fem.optimize.trust_region.steihaug import SteihaugPath

__all__ = ["minimize_trust_region"]

_KIND = "trust region 1"


def _forcing_choice(cg_rtol: float | None, cg_forcing: str | float) -> str | float:
    """The forcing term: `cg_rtol` where it is given, else `cg_forcing`."""
    if cg_rtol is not None:
        if cg_forcing != "superlinear":
            raise ValueError(f"cg_rtol = {cg_rtol} and cg_forcing = {cg_forcing!r} are refused: give one of them")
        return cg_rtol
    if isinstance(cg_forcing, str):
        check_choice("cg_forcing", cg_forcing, CHOICES)
    else:
        check("cg_forcing", cg_forcing, f"a number in (0, 1), or one of {CHOICES}", lambda v: 0 < v < 1)
    return cg_forcing


@on_all_ranks
def minimize_trust_region(
    problem: Problem,
    x0: np.ndarray,
    *,
    gtol_rel: float = 1e-6,
    gtol_abs: float = 0.0,
    max_it: int = 50,
    initial_radius: float | None = None,
    max_radius: float = math.inf,
    min_radius: float = 0.0,
    eta: float = 1e-4,
    hessian: str = "newton",
    cg_max_it: int = 100,
    cg_rtol: float | None = None,
    cg_forcing: str | float = "superlinear",
    preconditioner: Preconditioner | str | None = None,
    preconditioner_memory: int = 8,
    value_rtol: float = 1e-12,
    inexact: InexactOptions | None = None,
    checkpoint: Checkpoint | None = None,
    monitor: Callable[[str], object] | None = None,
    callback: Callable[[np.ndarray, IterationRecord], object] | None = None,
) -> TrustRegionResult:
    """Minimise a function by trust-region Newton-CG in the problem's inner product.

    An iteration costs one value, a Hessian action for each CG iteration (none after a rejected step) and, if its step
    is accepted, one gradient. Lengths are in the problem's norm. With several processes call it on all of them with
    the same options, which are compared; a `callback` that returns true on any of them stops all.

    Parameters
    ----------
    problem : Problem
        J, its derivatives and the inner product.
    x0 : ndarray, shape (n,)
        First guess; not modified.
    gtol_rel, gtol_abs : float
        Converged when ``|g| <= max(gtol_abs, gtol_rel * |g at x0|)``; the estimated error of an inexact g is added to
        ``|g|``.
    max_it : int
        Most steps to try, accepted or not.
    initial_radius : float, optional
        First radius, a length in the space of x. By default 10 times the Cauchy step (to the minimiser of the model
        along -g, or as long if the curvature is negative); its Hessian action is the first of CG.
    max_radius : float
        No step is longer; may be infinite.
    min_radius : float
        Stop at or below this radius, or if a step is below the round-off of x.
    eta : float
        Accept a step if actual over predicted reduction exceeds this; 0 <= eta < 1/4.
    hessian : {"newton", "gauss-newton"}
        Model J by its Hessian or by the problem's Gauss-Newton form (``problem.gauss_newton_action(x, v)``).
    cg_max_it : int
        Most CG iterations at an iterate; also the number of vectors stored (twice as many with a preconditioner that is
        updated).
    cg_rtol : float, optional
        Residual of CG relative to ``|g|``, a number instead of `cg_forcing`.
    cg_forcing : {"superlinear", "eisenstat-walker-1", "eisenstat-walker-2"} or float
        Residual of CG relative to ``|g|`` by a rule of :mod:`pint_fem.optimize.trust_region.forcing`; "superlinear" is
        ``min(0.5, sqrt(|g| / |g at x0|))``.
        Where g is inexact, CG does not go below its error.
    preconditioner : callable or "limited-memory", optional
        An approximate inverse Hessian for CG, ``preconditioner(r)``, self-adjoint and positive definite in the
        problem's inner product; its method ``update(pairs)``, if it has one, is called after each accepted step.
        "limited-memory" is :class:`~pint_fem.optimize.preconditioners.LimitedMemoryPreconditioner`.
    preconditioner_memory : int
        Most pairs (d, H d) passed to ``update``.
    value_rtol : float
        Relative accuracy of J. Where J comes from an iterative solver, about the tolerance of that solver. With
        `inexact`, the smallest relative tolerance of J.
    inexact : InexactOptions, optional
        Evaluate a problem that has ``value_within``, ``gradient_within`` or ``hessian_action_within``
        (:class:`~pint_fem.optimize.protocol.InexactProblem`) no more accurately than convergence requires. By default
        those methods are not used.
    checkpoint : Checkpoint, optional
        ``checkpoint.save`` stores the state after the first guess and each iteration. If ``checkpoint.load()`` returns
        one, the run continues from there as if it had not stopped, given the same problem and options; then only the
        shape of `x0` is used.
    monitor : callable, optional
        Called with a header and one line for the first guess and each iteration; ``print``, on one process.
    callback : callable, optional
        ``callback(x, record)`` after each iteration, accepted or not, with a copy of the iterate; a true result stops.

    Returns
    -------
    TrustRegionResult

    Raises
    ------
    ValueError
        An option outside its range (InputTypeError, which is a TypeError as well, where its type is wrong), a problem
        without the Gauss-Newton action that `hessian` requires, `x0` or a derivative of the wrong shape, an indefinite
        inner product or preconditioner, the checkpoint of another kind of run.
    NonFiniteError
        A FloatingPointError: J at `x0`, a gradient or a Hessian action is not finite. It carries the last good
        iterate as ``x``. A J that is not finite at a trial point is no error, nor is a gradient there whose inner
        product with itself overflows: the radius is reduced.
    """
    options = NewtonOptions(
        gtol_rel=gtol_rel, gtol_abs=gtol_abs, max_it=max_it, initial_radius=initial_radius, max_radius=max_radius,
        min_radius=min_radius, eta=eta, hessian=hessian, cg_max_it=cg_max_it, cg_rtol=cg_rtol,
        preconditioner=preconditioner, preconditioner_memory=preconditioner_memory, value_rtol=value_rtol,
        checkpoint=checkpoint, monitor=monitor, callback=callback,
    )  # fmt: skip
    cg_forcing = _forcing_choice(cg_rtol, cg_forcing)
    if not isinstance(inexact, InexactOptions | None):
        raise InputTypeError(f"inexact = {inexact!r} is refused: give InexactOptions(...) or None")
    guarded = cast(GuardedProblem, problem)  # by the decorator
    if inexact is None:
        oracle = ExactOracle(guarded, hessian)
    else:
        oracle = InexactOracle(guarded, inexact, value_rtol, hessian)
    x0 = np.array(x0, dtype=np.float64)
    run = TrustRegionRun(oracle, options, x0, _KIND)

    def path_at(iterate: Iterate, iteration: int, tolerance: float) -> SteihaugPath:
        return SteihaugPath(
            oracle, iterate, tolerance=tolerance, max_it=cg_max_it, iteration=iteration,
            preconditioner=run.preconditioner, keep_products=run.learns,
            follow_gradient=cg_forcing == "eisenstat-walker-1",
        )  # fmt: skip

    return run.minimise(x0, path_at, cg_forcing)

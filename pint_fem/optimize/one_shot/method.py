r"""Simultaneous optimisation: the design changes while state and adjoint are still being solved for.

One iteration is one iteration of the state solver and of the adjoint solver (one MGRIT cycle each) at the current
design, from where the last one left them, and mostly a preconditioned design update: the One-shot method [1]

.. math::
    u \leftarrow G(u, x), \qquad \lambda \leftarrow G_u^T \lambda + J_u^T, \qquad x \leftarrow x - \tau B g, \quad
    g = J_x + G_x^T \lambda,                                                                             \tag{1}

B an approximation of the inverse Hessian from limited-memory pairs (:mod:`pint_fem.optimize.lbfgs`) upon a
preconditioner or the identity, which is the inverse of the regularisation's Hessian where that is the inner product.
State and adjoint are solved to their tolerance only once, simultaneously with the optimisation.

**Errors of the gradient.** With solvers that contract by :math:`\varrho` a cycle, a step s leaves an error of
:math:`\varrho\,|S s|` in the state, S its derivative by the design, and the adjoint follows with one more:

.. math::
    \delta u_{k+1} = \varrho\,(\delta u_k + S s_k), \quad
    \delta \lambda_{k+1} = \varrho\,(\delta \lambda_k + S_\lambda s_k) + c\,\delta u_{k+1}, \quad
    |\delta g| \le \kappa r,                                                                             \tag{2}

r the relative residual of both. The coupled iteration (1) descends on the doubly augmented Lagrangian
:math:`\tfrac\alpha2 |G - u|^2 + \tfrac\beta2 |L_u|^2 + L` if :math:`B^{-1}` dominates
:math:`\alpha G_x^T G_x + \beta L_{ux}^T L_{ux} + L_{xx}`, where
:math:`\sqrt{\alpha\beta}(1 - \varrho) > 1 + \tfrac\beta2 |L_{uu}|` [2]: for precise sensors :math:`|L_{uu}| \gg 1`, and
that is a step as short in all directions as the stiffest one allows. The same descent costs a few cycles, by (2):
each further one at a design divides :math:`\delta g` by :math:`1/\varrho`, and the number that makes it negligible
is logarithmic in the condition of the Hessian. So B here is the Newton-like operator of the reduced problem, and
the error is measured, and bounded so that direction, acceptance and pairs remain valid:

* **Hold.** While the design stands still, :math:`g, r` become :math:`g', r'`. An error proportional to the residual
  has, whatever the signs in which the solvers' errors fall,

  .. math:: \kappa \le |g' - g| / (r - r') .                                                             \tag{3}

  The largest of the last few quotients with :math:`r' \le r/2` where the design is held long enough is taken. The
  design is held until, with :math:`d = -B g`,

  .. math:: e = \kappa r \le \theta |g| \quad\text{and}\quad e |d| \le \tfrac12 |(g, d)| .               \tag{4}

  The first makes :math:`-g`, the second d a direction of descent of the true J. At the first design and after a step
  that was rejected without a pair it is held at least once, so that too small a :math:`\kappa` is detected. The error
  of J is measured in the same way.
* **Accept.** The step s from x is accepted if J falls, :math:`J^+ \le J + \delta (g, s)` up to the errors of both.
  Where these exceed a tenth of :math:`|(g, s)|`, as they do near the optimum, the error being linear and the reduction
  quadratic in small quantities, the reduction is that of the trapezoidal rule,

  .. math:: \tfrac12 [(g, s) + (g^+, s)] \le \delta (g, s) .                                             \tag{5}

  This is the approximate Wolfe condition [3]: the same for a quadratic J, in terms of gradients only.
* **Update B.** Both accepted and rejected steps are pairs for B, if their curvature is at least twice the error that
  those of both gradients cause in it. A rejected one is only shortened where J is huge at its end, and no quadratic:
  that curvature does not describe J near x. A gradient that lags behind the design shows less curvature than there is,
  and would make the next step too long. The pairs are made conjugate: for a quadratic J each new step is then the
  minimiser over all directions so far, without a line search, and with accurate gradients the run ends after as many
  designs as conjugate gradients take iterations, and one. A pair that is refused halves :math:`\theta`; accepted ones
  increase it.
* **Try again.** After a rejected step that gave a pair, the next one starts from x with the better B, no longer than
  the last: the solvers need not go back to x. Otherwise x is evaluated again, as an inaccurate gradient there may be
  the reason, with :math:`\theta` halved, and the step from there is shortened towards the zero of the slope. For short
  steps the conditions hold as J is differentiable, and the solvers are perturbed less, so this terminates. At the third
  rejection in succession x is solved accurately. Ten steps that lower neither J by more than its accuracy nor |g| end
  the run.

So, as far as :math:`\kappa` is right, every step is one of a descent method with an inexact gradient of relative error
below one half, which converges as the exact one does [4]. The end is checked by an accurate J and g; if g is above its
tolerance, they are a measurement of :math:`\kappa`, and the run continues from there.

References
----------
[1] S. Günther, N. R. Gauger, J. B. Schroder, A non-intrusive parallel-in-time approach for simultaneous optimization
    with unsteady PDEs, arXiv:1801.06356.
[2] A. Hamdi, A. Griewank, Properties of an augmented Lagrangian for design optimization, Optim. Methods Softw. 25
    (2010) 645-664.
[3] W. W. Hager, H. Zhang, A new conjugate gradient method with guaranteed descent and an efficient line search, SIAM
    J. Optim. 16 (2005) 170-192.
[4] R. G. Carter, On the global convergence of trust region algorithms using inexact gradient information, SIAM J.
    Numer. Anal. 28 (1991) 251-265.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast

import numpy as np

from pint_fem.optimize.argument_checks import check, check_callable, check_checkpoint, check_count, check_stopping
from pint_fem.optimize.guarded_problem import GuardedProblem
from pint_fem.optimize.lbfgs import InverseLBFGS
from pint_fem.optimize.one_shot.inexact_evaluations import InexactEvaluations
from pint_fem.optimize.one_shot.iteration import Run
from pint_fem.optimize.one_shot.records import OneShotRecord, OneShotResult, header
from pint_fem.optimize.one_shot.restart import restore, save
from pint_fem.optimize.protocol import Checkpoint, OneShotProblem, Problem
from pint_fem.optimize.ranks import on_all_ranks
from pint_fem.optimize.records import StopReason

__all__ = ["minimize_one_shot"]


@on_all_ranks
def minimize_one_shot(
    problem: OneShotProblem | Problem,
    x0: np.ndarray,
    *,
    gtol_rel: float = 1e-6,
    gtol_abs: float = 0.0,
    residual_tol: float = 1e-6,
    max_it: int = 200,
    accuracy: float = 0.3,
    hold_max_it: int = 50,
    initial_step: float | None = None,
    memory: int = 10,
    value_rtol: float = 1e-12,
    preconditioner: Callable[[np.ndarray], np.ndarray] | None = None,
    checkpoint: Checkpoint | None = None,
    monitor: Callable[[str], object] | None = None,
    callback: Callable[[np.ndarray, OneShotRecord], object] | None = None,
) -> OneShotResult:
    """Minimise a function while its state and adjoint are being solved for.

    An iteration is one ``problem.advance``. Without that method it is an accurate value and gradient, nothing is held,
    and this is L-BFGS with a backtracking line search. With several processes call it on all of them with the same
    options, which are compared; a `callback` that returns true on any of them stops all.

    Parameters
    ----------
    problem : Problem
        With ``advance`` (:class:`~pint_fem.optimize.protocol.OneShotProblem`); ``value`` and ``gradient`` accurate;
        Hessians are not used.
    x0 : ndarray, shape (n,)
        First guess; not modified.
    gtol_rel, gtol_abs : float
        Converged when ``|g| <= max(gtol_abs, gtol_rel * |g at x0|)``, accurate, and the residual is within
        `residual_tol`. The gradient at x0 is the first one within `accuracy`.
    residual_tol : float
        Largest relative residual of state and adjoint at the end.
    max_it : int
        Most iterations after the first.
    accuracy : float
        Error of g relative to ``|g|`` up to which a step is accepted or rejected and the next one computed; in
        (0, 1/2). With a small one the solvers are run to that accuracy at every design.
    hold_max_it : int
        Most iterations at one design without halving the residual. If g is not accurate by then, the step is rejected.
    initial_step : float, optional
        Length of the first step in the problem's norm. By default ``|J| / |g|``, with which the linear model loses all
        of J, or 1 if J is zero.
    memory : int
        Most pairs in the L-BFGS operator, two vectors each. As many as conjugate gradients would take iterations lead
        to about as many designs; fewer pairs to several times as many.
    value_rtol : float
        Relative accuracy of an accurate J.
    preconditioner : callable, optional
        An approximate inverse Hessian, self-adjoint and positive definite in the inner product; B is an update of a
        multiple of it. An example is the inverse of the regularisation's Hessian, which is the identity, the default,
        where that Hessian is the inner product.
    checkpoint : Checkpoint, optional
        ``checkpoint.save`` stores the state after each iteration; if ``checkpoint.load()`` returns one, the run
        continues from there as if it had not stopped, given the same problem, options and iterates of the solvers.
    monitor : callable, optional
        Called with a header and a line for each iteration; ``print``, on one process.
    callback : callable, optional
        ``callback(x, record)`` after each iteration with a copy of the last accepted design; a true result stops.

    Returns
    -------
    OneShotResult

    Raises
    ------
    ValueError
        An option outside its range (InputTypeError, which is a TypeError as well, where its type is wrong), an array of
        the wrong shape, a negative residual.
    NonFiniteError
        A FloatingPointError: J is not finite at the first or at an accepted design, or a gradient anywhere. It carries
        the last good design as ``x``. A J that is not finite at a new design is no error, nor is a gradient whose inner
        product with itself overflows: the step is shortened.
    """
    check_stopping(gtol_rel, gtol_abs, max_it)
    check("residual_tol", residual_tol, "a number >= 0", lambda v: v >= 0)
    check("accuracy", accuracy, "a number in (0, 0.5)", lambda v: 0 < v < 0.5)
    check_count("hold_max_it", hold_max_it, 2)
    if initial_step is not None:
        check("initial_step", initial_step, "a finite number > 0, or None", lambda v: 0 < v < math.inf)
    check_count("memory", memory, 0)
    check("value_rtol", value_rtol, "a number in [0, 1)", lambda v: 0 <= v < 1)
    check_callable("preconditioner", preconditioner)
    check_checkpoint(checkpoint)
    check_callable("monitor", monitor)
    check_callable("callback", callback)

    solvers = InexactEvaluations(cast(GuardedProblem, problem))  # by the decorator
    run = Run(
        solvers,
        np.array(x0, dtype=np.float64),
        InverseLBFGS(solvers.inner, memory=memory, conjugate=True, preconditioner=preconditioner),
        gtol_rel=gtol_rel, gtol_abs=gtol_abs, residual_tol=residual_tol, accuracy=accuracy, hold_max_it=hold_max_it,
        initial_step=initial_step, value_rtol=value_rtol,
    )  # fmt: skip
    if monitor is not None:
        monitor(header())
    history = (None if checkpoint is None else restore(checkpoint, run)) or []
    reason, iteration = run.reason, len(history) - 1
    for iteration in range(len(history), max_it + 1):
        if reason is not None:
            break
        history.append(run.iterate(iteration))
        reason = run.reason
        if checkpoint is not None:
            save(checkpoint, run, history)
        if monitor is not None:
            monitor(str(history[-1]))
        stopped = callback is not None and callback(run.x.copy(), history[-1])
        if stopped and reason is not StopReason.GRADIENT:
            reason = StopReason.CALLBACK

    end = run.end(iteration)
    if reason is not StopReason.GRADIENT and run.within(end):
        reason = StopReason.GRADIENT
    return OneShotResult(
        run.x,
        end.value,
        end.norm,
        len(history) - 1,
        reason is StopReason.GRADIENT,
        reason or StopReason.MAX_IT,
        history,
        run.residual,
        solvers.problem.advance_calls,
        solvers.problem.value_calls,
        solvers.problem.gradient_calls,
    )

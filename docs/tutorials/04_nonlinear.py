r"""
A nonlinear problem
===================

Three drops of a bacterial culture were put on a nutrient plate of 3 cm x 3 cm, at unknown places and in unknown
amounts. A camera reads the density of the growing colonies at four times. We find the *initial density* from these
readings.

The density :math:`u` as a part of the largest possible one spreads and grows logistically (Fisher's equation), with no
flux through the edge:

.. math::

   \partial_t u - D \Delta u = r\, u\, (1 - u), \qquad u(0) = a^2 .

It is the first problem here whose *steps* are nonlinear. This tutorial shows what multigrid reduction in time (MGRIT)
does there, what goes wrong with a careless control, what a minimisation costs, and how *inexact* sweeps save most of
it.
"""

# %%
# The control: an initial condition that stays positive
# -----------------------------------------------------
# ``initial`` takes a function or, as here, an expression of controls, with exact derivatives. Why not the density
# itself? A trial point of the minimiser with a *negative* density somewhere would grow to minus infinity, as :math:`u
# (1 - u)` drives it away from zero: steps fail, J has no value there, and the minimiser rejects one trial point after
# another. The square keeps every trial point meaningful. (Another remedy is ``bounds=(0, None)``,
# :doc:`/howto/bounds`.)
#
# *What could go wrong:* the derivative of :math:`a^2` vanishes at :math:`a = 0`, so zero is a bad first guess.

import matplotlib.pyplot as plt
import numpy as np
from firedrake import *
from irksome import Dt

import pint_fem as pf

st = pf.SpaceTime()
width, final_time = 3.0, 12.0  # cm, h
diffusion, growth = 5e-3, 0.25  # cm2/h, 1/h


def colonies(cells, steps):
    """The evolution of the density with the root of its initial value as control."""
    V = FunctionSpace(st.mesh(RectangleMesh, cells, cells, width, width), "CG", 1)
    u, v, a = Function(V), TestFunction(V), Function(V, name="root of the initial density")
    F = (Dt(u) - growth * u * (1 - u)) * v * dx + diffusion * inner(grad(u), grad(v)) * dx
    return pf.Evolution(F, u, tableau=pf.SDIRK2(), dt=final_time / steps, nsteps=steps, control=a, initial=a**2)


# %%
# Readings
# --------
# The camera has 10 x 10 pixels and a noise of 0.02. ``"serial"`` steps one step after the other, which is the reference
# and, on one rank, the fastest solver for a problem of this size.

lines, times, noise = np.linspace(0.15, 2.85, 10), np.array([3.0, 6.0, 9.0, 12.0]), 0.02  # cm, h
points = [[x, y] for x in lines for y in lines]


def true_root(V):
    """Three drops with densities of 0.3, 0.2 and 0.1."""
    x, y = SpatialCoordinate(V.mesh())
    drop = lambda p, q, height: height * exp(-((x - p) ** 2 + (y - q) ** 2) / 0.3**2)
    return Function(V).interpolate(sqrt(drop(0.8, 0.9, 0.3) + drop(2.1, 1.1, 0.2) + drop(1.5, 2.2, 0.1)))


# %%
# As before, a finer discretisation makes them.

serial = {"time_solver": "serial"}
fine, nothing = colonies(28, 48), pf.PointSensors(points, times, np.zeros((len(times), len(points))))
simulated = pf.TimeParallelReducedFunctional(fine, nothing, spacetime=st, solver_parameters=serial)
exact = simulated.readings(nothing, true_root(fine.V))
readings = exact + noise * np.random.default_rng(seed=3).standard_normal(exact.shape)
if st.is_root:
    print(f"{readings.size} readings; highest density {readings.max():.2f}")

# %%
# All steps at once, although they are nonlinear
# ----------------------------------------------
# MGRIT writes the steps :math:`u_{n+1} = \Phi(u_n)` as one system for all :math:`n` and iterates: relax on the fine
# steps, solve for every fourth state with coarse steps, correct. It is a full approximation scheme: coarse levels step
# with states, not with corrections, so that nothing has to be linearised. The solution is a fixed point whatever the
# coarse steps are; these decide the speed only.
#
# ``monitor`` prints the residual of each cycle. One evaluation of J shows the contraction, and that the limit is the
# result of stepping.

evolution = colonies(20, 24)
V, (a,) = evolution.V, evolution.sought
sensors = pf.PointSensors(points, times, readings, weight=1 / noise**2)
regularisation = 20.0 * (0.3**2 * inner(grad(a), grad(a)) + a**2) * dx  # details of 0.3 cm
options = {"coarsening": 4, "levels": 2, "rtol": 1e-9}
guess = Function(V).assign(0.05)  # a density of 0.0025 everywhere


# %%
# One functional for each of the two solvers:


def functional(solver):
    """J with a time solver."""
    return pf.TimeParallelReducedFunctional(
        evolution, sensors, regularisation=regularisation, spacetime=st, solver_parameters=solver
    )


stepping, watched = functional(serial), functional({"mgrit": options | {"monitor": True}})
by_steps, by_mgrit = stepping(guess), watched(guess)
if st.is_root:
    print(f"J = {by_steps:.8e} by stepping, {by_mgrit:.8e} by MGRIT")
assert abs(by_mgrit - by_steps) < 1e-7 * by_steps

# %%
# The first cycles reduce the residual by a factor of some 100 each: diffusion and growth are smooth in time, and SDIRK2
# is accurate with the coarse steps of 2 h, too. The third cycle is exact up to round-off: with relaxation FCF two
# levels end after half as many cycles as there are coarse steps, here six.
#
# *What could go wrong:* coarse steps so long that a stage of theirs has no solution; then give fewer levels or a
# smaller ``coarsening``. For linear evolutions a bound is computed before the first solve; for nonlinear ones the
# monitor is what tells.
#
# The Taylor test
# ---------------
# J is not quadratic, so test the gradient *and* the Hessian: the remainders are of second and third order.

from firedrake.adjoint import taylor_to_dict

direction = Function(V).interpolate(true_root(V) - guess)
remainders = taylor_to_dict(stepping, guess, direction)
assert min(remainders["R1"]["Rate"]) > 1.9
assert min(remainders["R2"]["Rate"]) > 2.8

# %%
# Minimisation with inexact sweeps
# --------------------------------
# Far from the minimum a rough J and a rough gradient lead to as good a step as accurate ones. ``inexact=True`` requests
# from each sweep the accuracy that the convergence theory of trust regions needs, and estimates the error from
# residuals: a J whose error is a small part of the predicted reduction, a gradient with an error below a tenth of its
# norm. The tolerances follow the run; ``rtol`` is the smallest that a sweep may be asked for.
#
# The last five columns of the monitor are the tolerances and the estimated errors. A ratio that is not near 1 means a
# model that does not fit over the length of the step; the radius shrinks then. ``initial_radius`` spares the first
# rejections: :math:`|a|` in L2 is of the order of 0.2.

J = functional({"mgrit": options})
result = J.minimize_trust_region(
    start=guess, inexact=True, preconditioner="limited-memory", initial_radius=0.2, gtol_rel=2e-3, monitor=print
)
assert result.converged
assert result.iterations <= 20
result

# %%
# *Negative curvature* in the first iterations is no failure: J is not convex far from the minimum, and the step follows
# the direction to the edge of the trust region. The J found is that of stepping, to the error that was allowed:

found = result.control
density, truth = (Function(V, name="density").interpolate(f**2) for f in (found, true_root(V)))
left = np.sum((J.readings(sensors, found) - readings) ** 2) / (2 * noise**2)
error, checked = errornorm(truth, density) / norm(truth), stepping(found)
if st.is_root:
    print(f"J = {result.value:.6f}, by stepping {checked:.6f}, estimated error {result.value_error:.1e}")
    print(f"misfit {left:.0f} for {readings.size} readings; relative error of the initial density {100 * error:.0f}%")
assert abs(checked - result.value) < 1e-3 * checked
assert 0.8 < left / (readings.size / 2) < 1.2
assert error < 0.5

# %%
# What it costs
# -------------
# A value of J is one sweep over all steps, a gradient another, a product with the Hessian two. A nonlinear state sweep
# solves systems by Newton's method; the adjoint, tangent and second-order sweeps are linear and use its Jacobians. A
# sweep to nine digits takes three cycles, as printed above; most of the inexact ones take one, as each starts from the
# last trajectory and is asked for one or two digits. The solvers count them:

(leaf,) = J.problem.leaves
cycles = leaf.sweeps.counts["cycles"]
sweeps = sum(count for name, count in leaf.sweeps.counts.items() if name != "cycles")
if st.is_root:
    print(f"{result.value_calls} values, {result.gradient_calls} gradients, {result.hessian_calls} Hessian products")
    print(f"{sweeps} sweeps by {cycles} cycles")
assert cycles < 1.5 * sweeps

# %%
# The history has what the monitor printed. Tolerances of the gradient fall with the gradient, those of J with the
# predicted reductions: accuracy is paid for where it is used.

history = result.history
if st.is_root:
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    n = [record.iteration for record in history]
    axes[0].semilogy(n, [record.value for record in history], "o-", label="J")
    axes[0].semilogy(n, [record.value_tolerance for record in history], "s--", label="tolerance of J")
    axes[1].semilogy(n, [record.gradient_norm for record in history], "o-", label="gradient's norm")
    axes[1].semilogy(n, [record.gradient_tolerance for record in history], "s--", label="tolerance of the gradient")
    for ax, title in zip(axes, ("Functional", "Gradient"), strict=True):
        ax.set(title=title, xlabel="iteration", ylabel="without unit", xticks=n[::4])
        ax.legend()

# %%
# Pictures
# --------
# The initial density found beside the true one, and the plate at the end. All ranks are in time, so that the first one
# has the whole mesh and draws.

from firedrake.pyplot import tripcolor

final = J.state(found, times=final_time)
# sphinx_gallery_thumbnail_number = 2
if st.is_root:
    figure, axes = plt.subplots(1, 3, figsize=(12.5, 3.8), layout="constrained")
    panels = (truth, "True initial density", 0.3), (density, f"Found, error {100 * error:.0f}%", 0.3)
    for ax, (f, title, most) in zip(axes, (*panels, (final, "After 12 h", 1.0)), strict=True):
        shown = tripcolor(f, axes=ax, cmap="cividis", vmin=0, vmax=most)
        ax.set(title=title, xlabel="x in cm", ylabel="y in cm", aspect="equal")
        figure.colorbar(shown, ax=ax, label="part of the largest density", shrink=0.8)
    plt.show()

# %%
# Places and amounts are found; the smallest drop, which the noise hides at first, has the largest relative error. Try
# ``mpiexec -n 2 python docs/tutorials/04_nonlinear.py``: MGRIT divides its cycles among the ranks, while ``"serial"``
# makes each rank wait for the one before.
#
# What to change next
# -------------------
# * A source as the unknown: add ``- q * v * dx`` to ``F`` and ``q`` to the controls. Several controls at once are a
#   list, ``control=[a, q]``.
# * State and control iterated at the same time, without a nonlinear solve in each evaluation:
#   ``J.minimize_newton_kkt()`` for controls with one value per step (tutorial 5).
# * Reading the monitor: :doc:`/howto/monitor`. A Taylor test with wrong orders: :doc:`/howto/taylor-test`.
# * Bounds instead of the square: :doc:`/howto/bounds`. Long runs: :doc:`/howto/checkpoints`, :doc:`/howto/memory`.
# * How many ranks in time pay: :doc:`/howto/process-grid`. You come from XBraid or PyMGRIT:
#   :doc:`/howto/from-xbraid-pymgrit`; from PyTorch: :doc:`/howto/from-torchbraid`.

r"""
Optimal control in time
=======================

A brass rod is heated along its length by a heater whose power can be chosen at each place and in each second. Which
power brings the rod from the temperature of the room to a given temperature profile, soon, and keeps it there? That is
an optimal control problem: the unknown is not a constant or a field, but a field *for each time step*.

This tutorial poses the problem, solves it by two methods that find the same control (the KKT system of all time steps,
and a trust region on the reduced functional), shows what the weight of the control does, and adds bounds, because no
heater cools and none has unlimited power. It takes about an hour to read and to try, and 20 seconds to run:

.. code-block:: bash

   python docs/tutorials/05_optimal_control.py

You should have seen :doc:`01_heat_source`, which explains evolutions and misfits.
"""

# %%
# 1. The rod, and what is to happen
# ---------------------------------
#
# The temperature rise :math:`u(x, t)` above the surroundings, in kelvin, satisfies for :math:`0 < x < 0.4` m
#
# .. math::
#    c\, \partial_t u - k\, \partial_{xx} u + h\, u = q(x, t), \qquad u = 0 \text{ at both ends}, \qquad u(x, 0) = 0 .
#
# The rod has a cross section of 1 cm\ :sup:`2`, so that all coefficients are given per metre of length: the heat
# capacity :math:`c = 320` J/(K m), the conductivity :math:`k = 0.011` W m/K, the loss to the air :math:`h = 0.8`
# W/(K m), and the control :math:`q`, the power of the heater, in W/m. The wanted profile is a plateau of 10 K in the
# middle of the rod:
#
# .. math::
#    J(q) = \frac12 \int_0^T\!\! \int (u - u_d)^2 \, dx\, dt + \frac{\beta}{2} \int_0^T\!\! \int q^2\, dx\, dt .
#
# The second term is the price of power. Without it the problem has no solution that a heater could produce: a step
# from 0 to 10 K in no time takes infinite power.
import matplotlib.pyplot as plt
import numpy as np
from firedrake import *
from irksome import Dt

import pint_fem as pf

BLUE, ORANGE, GREEN, BLACK = "#0072B2", "#D55E00", "#009E73", "#222222"  # told apart by colour-blind readers, too
st = pf.SpaceTime()  # all processes share the time steps; on one process this changes nothing
mesh = st.mesh(IntervalMesh, 40, 0.4)
V = FunctionSpace(mesh, "CG", 1)

# %%
# The equation is written as Irksome takes it: a weak form with ``Dt(u)``. The control is a function in ``V``; that it
# has a value *in each step* is said where the evolution is made, by ``per_step=True``. Then the 60 steps of 2 s have
# 60 functions as unknowns, 41 numbers each.
c, k, h = 320.0, 0.011, 0.8
STEPS, T = 60, 120.0
u, v, q = Function(V, name="temperature"), TestFunction(V), Function(V, name="heater")
(x,) = SpatialCoordinate(mesh)
F = (c * Dt(u) * v + k * inner(grad(u), grad(v)) + h * u * v - q * v) * dx
target = 5.0 * (tanh((x - 0.1) / 0.02) - tanh((x - 0.3) / 0.02))


# %%
# A small function poses the problem for a weight :math:`\beta`, as several weights are compared below.
# ``RunningMisfit`` is an integral over time of a functional of the state; the regularisation is a functional of the
# control, which for one value per step is summed over the steps with the weight ``dt`` as well.
#
# ``time_solver="serial"`` steps through the 60 steps one after another. For a rod with 41 unknowns on one process this
# is the fastest; with many processes give ``"auto"``, which measures and then chooses
# (:doc:`09-cluster`).
def pose(beta):
    rod = pf.Evolution(
        F, u, tableau=pf.SDIRK2(), dt=T / STEPS, nsteps=STEPS, control=q, per_step=True,
        bcs=DirichletBC(V, 0, "on_boundary"),
    )  # fmt: skip
    return pf.TimeParallelReducedFunctional(
        rod, pf.RunningMisfit(0.5 * (u - target) ** 2 * dx), regularisation=0.5 * beta * q**2 * dx, spacetime=st,
        solver_parameters={"time_solver": "serial"},
    )  # fmt: skip


# %%
# 2. State, adjoint and control at once: the KKT method
# -----------------------------------------------------
#
# The evolution is linear and ``J`` is quadratic, so that the minimiser is the solution of *one* linear system: the
# state equation of all steps, the adjoint equation of all steps, and "the gradient is zero" in all steps (the
# Karush-Kuhn-Tucker conditions). ``J.minimize("kkt")`` solves it. Its preconditioner is the same system with the end of
# time connected to its beginning, which a Fourier transform over the steps splits into one small system for each
# frequency.
J = pose(beta=1e-4)
result = J.minimize("kkt")
print(result)
print(result.choice)
assert result.converged
assert result.iterations == 1

# %%
# **What to expect.** One iteration, and the norm of the gradient has fallen by more than the required factor of
# :math:`10^{-6}`. The last printed line has the number of KKT systems that were solved, and that of the inner
# iterations "for the ends of time": what is left to iterate on are the first and the last state, which the Fourier
# transform had connected. There are some ten of them.
#
# **What could go wrong.** If a misfit or control does not have the structure that the method requires (a misfit at the
# last step only, a control that does not depend on time), the call raises an error that names the reason;
# ``J.minimize("auto")`` takes another method instead, and ``result.choice`` has the reason.
#
# The control comes back as a Firedrake function for each step. ``J.state`` returns the temperatures; with
# ``times=`` it returns those of some times.
control = result.control
powers = np.array([f.dat.data_ro for f in control.subfunctions])  # (steps, unknowns); on one process all steps
assert powers.shape == (STEPS, 41)
shown = [4.0, 12.0, 30.0, 120.0]
profiles = J.state(control, times=shown)


# %%
# Numbers of a piecewise linear function are its values at the vertices. We sort them along the rod once, and draw the
# temperatures at four times, and the power of the heater as a picture over place and time.
xs = Function(V).interpolate(x).dat.data_ro.copy()
order = np.argsort(xs)
cm, goal = 100 * xs[order], Function(V).interpolate(target).dat.data_ro[order]


def picture(ax, values, **style):
    """Draw a control over place and time; the value of a step fills the time of the step."""
    edges = np.linspace(0, T, STEPS + 1)
    image = ax.pcolormesh(cm, edges, np.vstack([values[:, order], values[-1:, order]]), shading="gouraud", **style)
    ax.set(xlabel="place $x$ [cm]", ylabel="time $t$ [s]")
    return image


# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
for f, time, style in zip(profiles, shown, (":", "-.", "--", "-"), strict=True):
    left.plot(cm, f.dat.data_ro[order], style, color=BLUE, label=f"{time:g} s")
left.plot(cm, goal, color=ORANGE, lw=3, alpha=0.5, label="wanted")
left.set(xlabel="place $x$ [cm]", ylabel="temperature rise $u$ [K]", title="Temperature of the rod")
left.legend()
image = picture(right, powers, cmap="PuOr_r", vmin=-abs(powers).max(), vmax=abs(powers).max())
fig.colorbar(image, ax=right, label="power $q$ [W/m]")
right.set_title("Control without bounds")
plt.show()

# %%
# After 12 seconds the rod is at its profile, and stays there. The right picture has a strong pulse at the beginning,
# then only what conduction and the air take away. The pulse exceeds 700 W/m, and beside the plateau the power is
# *negative*: the "heater" would have to cool. Section 5 forbids both.
print(f"power: {powers.min():.0f} to {powers.max():.0f} W/m")
assert powers.max() > 700
assert powers.min() < -50

# %%
# 3. The trust region, beside it
# ------------------------------
#
# The other way eliminates the state: :math:`J(q)` is a function of the control alone, its gradient costs one sweep
# forward and one backward in time, and each product with its Hessian two more sweeps. ``J.minimize_trust_region`` is
# Newton's method with conjugate gradients (CG) on that *reduced* functional. It makes no assumption: the evolution may
# be nonlinear, misfits and controls of any kind.
J = pose(beta=1e-4)
reduced = J.minimize_trust_region(cg_max_it=500, monitor=print)
difference = abs(reduced.x - result.x).max() / abs(result.x).max()
print(f"largest difference of the two controls, relative: {difference:.1e}")
assert reduced.converged
assert difference < 1e-4
assert abs(reduced.value / result.value - 1) < 1e-8

# %%
# **How to read the monitor.** ``J`` is the functional and ``|g|`` the norm of its gradient; ``radius`` is how far the
# method trusts its quadratic model, ``|step|`` how far it went, ``ratio`` the actual over the predicted reduction of
# ``J``. Here ``J`` *is* quadratic, so that the radius is without limit and the ratio is 1. ``CG`` is the number of CG
# steps in each iteration, each of them two sweeps over all time steps: that is what the method costs. The first
# iterations solve Newton's equation roughly and the last ones accurately, as the accuracy of the last alone counts.
#
# Both methods found the same control. They differ in how their cost depends on the weight:
weights, kkt_steps, cg_steps, tracking, energy = (1e-2, 1e-3, 1e-4, 1e-5), [], [], [], []
for beta in weights:
    J = pose(beta)
    found = J.minimize("kkt", gtol_rel=1e-6)
    kkt_steps.append(int(found.choice.split(" iterations for")[0].split()[-1]))
    squares = sum(assemble(f**2 * dx) for f in found.control.subfunctions) * T / STEPS
    energy.append(squares)
    tracking.append(2 * found.value - beta * squares)
    cg_steps.append(pose(beta).minimize_trust_region(gtol_rel=1e-6, cg_max_it=500).hessian_calls)
    print(f"beta {beta:7.0e}: KKT {kkt_steps[-1]:3d} iterations, reduced {cg_steps[-1]:4d} CG steps")

# %%
# An iteration of the KKT method is not a sweep, so do not compare the two columns with each other, but each with
# itself: the left one stays, the right one grows as the price of power falls. The reason: where control is cheap, the
# reduced Hessian has eigenvalues between :math:`\beta` (rapidly varying controls, which hardly change the state) and
# :math:`\beta + O(1)`, and CG takes more steps for a larger ratio of these.
# On 64 x 64 cells with 128 steps the KKT method takes 1.5 s and the reduced one 7.2 s at :math:`\beta = 10^{-4}`, and
# 1.1 s and 78 s at :math:`10^{-8}` (one core, backward Euler; ``python -m tests.benchmarks.optimal_control``).
assert max(kkt_steps) <= 15
assert cg_steps[-1] > 5 * cg_steps[0]

# %%
# 4. What the weight does
# -----------------------
#
# The weight decides how much power one accepts for how much accuracy. Each :math:`\beta` is a point of a curve: no
# control is better in both. This is the choice to be made with the person who pays for the heater; the bend of the
# curve is a good first guess.
fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
left.loglog(weights, cg_steps, "o-", color=ORANGE, label="CG steps of the trust region")
left.loglog(weights, kkt_steps, "s-", color=BLUE, label="KKT iterations")
left.set(xlabel=r"weight $\beta$ [K$^2$ m$^2$/W$^2$]", ylabel="number", title="Cost and weight")
left.invert_xaxis()
left.legend()
right.loglog(np.sqrt(energy), np.sqrt(tracking), "D-", color=GREEN)
for a, b, beta in zip(np.sqrt(energy), np.sqrt(tracking), weights, strict=True):
    right.annotate(rf"$\beta = 10^{{{np.log10(beta):.0f}}}$", (a, b), (6, 2), textcoords="offset points", fontsize=9)
right.set(
    xlabel=r"norm of the control [W (s/m)$^{1/2}$]", ylabel=r"distance from the profile [K (m s)$^{1/2}$]",
    title="Accuracy and power",
)  # fmt: skip
for axis in (right.xaxis, right.yaxis):
    axis.set_minor_formatter("")
right.margins(x=0.25, y=0.1)
plt.show()
assert all(np.diff(tracking) < 0)
assert all(np.diff(energy) > 0)

# %%
# **What could go wrong.** A weight of 0 is no small weight: the problem then has no minimiser, and CG goes on until
# its limit. If CG reports its maximum number of iterations, raise ``cg_max_it``, or the weight.
#
# 5. Bounds
# ---------
#
# A real heater gives between 0 and, say, 150 W/m. ``bounds=(0, 150)`` holds for all values of the control in all steps.
# With bounds the trust region *projects* its steps onto the allowed range. ``J.minimize("kkt", bounds=...)`` is the
# primal-dual active-set method: it guesses which values are at a bound (the *active sets*), solves a KKT system for the
# others, corrects the guess, and repeats.
LOW, HIGH = 0.0, 150.0
bounded = pose(1e-3).minimize_trust_region(bounds=(LOW, HIGH))
active_set = pose(1e-3).minimize("kkt", bounds=(LOW, HIGH))
print(bounded)
print(active_set)
assert bounded.converged
assert active_set.converged
assert active_set.hessian_calls < bounded.hessian_calls
assert abs(bounded.value / active_set.value - 1) < 1e-6
assert bounded.x.min() >= LOW
assert bounded.x.max() <= HIGH

# %%
# The same minimum from two methods that have little in common is a good check of both. Here the active sets are found
# with fewer products with the Hessian. Where *more* values are at their bounds, as with a weight of :math:`10^{-4}`,
# the KKT system of all values describes those that are left less well, and the active-set method loses its advantage.
# ``J.minimize("auto", bounds=...)`` takes the projected trust region therefore, and prints so.
#
# The size of the gradient alone does not show that a bounded control is optimal. The conditions are: where the control
# is inside its bounds the gradient is zero; at the lower bound the gradient is not negative (less power would be
# better, but is not allowed), and at the upper one not positive.
J = pose(1e-3)
J(bounded.control)
derivative = np.array([f.dat.data_ro for f in J.derivative().subfunctions])[:, order]
values = np.array([f.dat.data_ro for f in bounded.control.subfunctions])[:, order]
at_low, at_high = values <= LOW + 1e-6, values >= HIGH - 1e-6
inside = ~(at_low | at_high)
scale = abs(derivative).max()
print(f"at the lower bound {at_low.mean():.0%}, at the upper {at_high.mean():.0%} of all values")
print(f"largest derivative inside the bounds, relative: {abs(derivative[inside]).max() / scale:.1e}")
assert 0.4 < at_low.mean() < 0.7
assert 0.01 < at_high.mean() < 0.1
assert abs(derivative[inside]).max() < 1e-5 * scale
assert derivative[at_low].min() > -1e-5 * scale
assert derivative[at_high].max() < 1e-5 * scale

# %%
# Active sets say more about a control than its values do: where the heater is at its limit, a stronger heater would
# help, and where it is off, a cooler would.
fig, ax = plt.subplots(figsize=(6, 3.6), layout="constrained")
image = picture(ax, np.array([f.dat.data_ro for f in bounded.control.subfunctions]), cmap="YlOrBr", vmin=LOW)
fig.colorbar(image, ax=ax, label="power $q$ [W/m]")
middle = (np.arange(STEPS) + 0.5) * T / STEPS
for which, colour, hatch in ((at_low, BLUE, "///"), (at_high, ORANGE, "xxx")):
    ax.contourf(cm, middle, which.astype(float), levels=[0.5, 1.5], colors="none", hatches=[hatch])
    ax.contour(cm, middle, which.astype(float), levels=[0.5], colors=[colour], linewidths=1.5)
ax.set_title("Active sets: off (///), at full power (xxx)")
plt.show()

# %%
# The same at three places: in the middle of the plateau, near its edge and at its edge.
fig, ax = plt.subplots(figsize=(6, 3.0), layout="constrained")
for place, style in ((20.0, "-"), (14.0, "--"), (10.0, ":")):
    column = values[:, abs(cm - place).argmin()]
    ax.stairs(column, np.arange(STEPS + 1) * T / STEPS, ls=style, baseline=None, color=BLACK, label=f"{place:g} cm")
ax.axhline(LOW, color=BLUE, lw=1)
ax.axhline(HIGH, color=ORANGE, lw=1)
ax.set(xlabel="time $t$ [s]", ylabel="power $q$ [W/m]", title="Power at three places, with its bounds")
ax.legend()
plt.show()


# %%
# In the first seconds the whole plateau is heated with full power; beside it the rod is not heated at all. How much
# later is the rod at its profile than without bounds, with the same weight?
def distance(functional, control):
    states = functional.state(control)[1:]
    return np.array([np.sqrt(assemble((f - target) ** 2 * dx)) for f in states])


curves = {"without bounds": (distance(J, pose(1e-3).minimize("kkt").control), BLUE, "-")}
curves["0 to 150 W/m"] = (distance(J, bounded.control), ORANGE, "--")
curves["no control"] = (np.full(STEPS, np.sqrt(assemble(target**2 * dx))), BLACK, ":")

# %%
fig, ax = plt.subplots(figsize=(6, 3.2), layout="constrained")
times = np.arange(1, STEPS + 1) * T / STEPS
for name, (curve, colour, style) in curves.items():
    ax.plot(times, curve, style, color=colour, label=name)
    print(f"{name}: {curve[4]:.2f} after 10 s, {curve[29]:.2f} after 60 s")
ax.set(xlabel="time $t$ [s]", ylabel=r"distance from the profile [K m$^{1/2}$]", title="How soon the rod is there")
ax.set_ylim(0)
ax.legend()
plt.show()
at = {name: curve for name, (curve, _, _) in curves.items()}
assert at["without bounds"][29] < 0.6 * at["0 to 150 W/m"][29]
assert at["0 to 150 W/m"][29] < 0.25 * at["no control"][29]

# %%
# The bounded curve rises slowly after 40 s: heat flows out of the plateau into the rest of the rod, which stays warmer
# than wanted, and no heater can take it away. A stronger heater would change the first seconds, not this.
#
# **Do not be surprised** by the last seconds: the control falls to zero, and the rod leaves its profile. Power in the
# last step has no time left in which it could pay for itself. If the end matters, add
# ``pf.TerminalMisfit(w * (u - target) ** 2 * dx)`` with a weight ``w``, or choose a longer time and use its first part
# only.

# %%
# 6. What to change next
# ----------------------
#
# * **Fewer heaters.** Controls may be numbers: ``R = FunctionSpace(mesh, "R", 0)``, a list ``control=[q1, q2, q3]``,
#   and ``q1 * shape1(x) * v * dx`` in the form. A bound for each: :doc:`/howto/bounds`.
# * **A budget.** "No more than 2 kJ in all" is an integral constraint: :doc:`/howto/constraints`.
# * **Only the end counts.** ``pf.TerminalMisfit`` in place of, or beside ``RunningMisfit``; the trust region takes
#   both.
# * **A long run.** ``checkpoint="run.h5"`` continues where a run was ended: :doc:`/howto/checkpoints`.
# * **A functional of your own.** Verify its derivatives before you trust a minimiser: :doc:`/howto/taylor-test`.
# * **More steps than one processor takes.** ``mpiexec -n 4 python your_program.py``: :doc:`/howto/process-grid`.
# * **Ready problems** with heaters at edges, a membrane and a nonlinear reaction: ``demos/heat_control.py``,
#   ``demos/wave_control.py``, ``demos/reaction_control.py``.

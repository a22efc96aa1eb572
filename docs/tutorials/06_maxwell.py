r"""
Maxwell's equations: a current from probes
==========================================

An electric current flows in a closed box. Probes read the electric field at 64 places; nobody has seen the current.
This tutorial poses Maxwell's equations for the fields E and B in UFL, recovers the current with its standard deviation,
and solves the equations for all time steps at once in two regimes that could not be more different:

* in a box whose filling *conducts*, waves die away at once, and multigrid in time (MGRIT) converges;
* in an empty *cavity* they ring for ever. There MGRIT does not converge, you are told so before it tries, and ParaDiag
  takes its place.

.. code-block:: bash

   python docs/tutorials/06_maxwell.py

It takes 20 seconds to run and an hour to read. You should have seen :doc:`01_heat_source`.
"""

# %%
# 1. E and B
# ----------
#
# In the plane, with E in the plane and B across it, lengths in units of the box and times in what light takes for that
# length,
#
# .. math::
#    \partial_t E + \sigma E = \nabla \times B - J(x)\, s(t), \qquad \partial_t B = -\operatorname{rot} E, \qquad
#    n \times E = 0 \text{ on the walls}.
#
# The time course s of the current is known, its shape J, a vector field, is not. E belongs to the space N1curl, which
# has continuous tangential components and nothing else, as the physics has; B to DG of one degree less, so that the
# second equation holds exactly, at every point.
import matplotlib.pyplot as plt
import numpy as np
from firedrake import *
from irksome import Dt

import pint_fem as pf

BLUE, ORANGE, GREEN, BLACK = "#0072B2", "#D55E00", "#009E73", "#222222"  # told apart by colour-blind readers, too
st = pf.SpaceTime()


def rotation(v):
    """The rotation of a vector field in the plane, a number."""
    return v[1].dx(0) - v[0].dx(1)


# %%
# A function makes the evolution on a mesh, as we need it in both regimes and on two meshes. ``eliminate=1`` is the
# point that makes it fast: B (field 1 of the mixed space) is eliminated from each step, and a symmetric positive
# definite system for E is left, which is factored once for all steps.
#
# ``pf.time_function`` is the time t that the solver sets in each step; a ``Constant`` would be frozen at its first
# value.
def evolution(cells, steps, sigma, final_time, tableau):
    mesh = st.mesh(UnitSquareMesh, cells, cells)
    W = FunctionSpace(mesh, "N1curl", 2) * FunctionSpace(mesh, "DG", 1)
    u, t, J = Function(W), pf.time_function(mesh), Function(VectorFunctionSpace(mesh, "CG", 1), name="current")
    (E, B), (v, c), s = split(u), TestFunctions(W), (t - 0.3 * final_time) / (0.1 * final_time)
    pulse = -np.sqrt(2 * np.e) * s * exp(-(s**2))  # at most 1; its integral is zero: no charge is left behind
    F = inner(Dt(E) + sigma * E, v) - B * rotation(v) + (Dt(B) + rotation(E)) * c + inner(pulse * J, v)
    return pf.Evolution(
        F * dx, u, tableau=tableau, dt=final_time / steps, nsteps=steps, control=J, t=t, eliminate=1,
        bcs=DirichletBC(W.sub(0), as_vector([0, 0]), "on_boundary"),
    )  # fmt: skip


# %%
# The hidden current is a loop. It makes a magnetic field in its middle and none far away.
def true_current(J):
    x, y = SpatialCoordinate(J.function_space().mesh())
    bell = 8 * exp(-((x - 0.4) ** 2 + (y - 0.55) ** 2) / 0.04)
    return Function(J.function_space()).interpolate(bell * as_vector([-(y - 0.55), x - 0.4]))


# %%
# 2. Probes and readings
# ----------------------
#
# 64 probes read both components of E at 16 times. They are *not* at vertices or on edges of the meshes: the normal
# component of E jumps there, so that its value would be a matter of chance.
PROBES = np.array([((i + 0.47) / 8, (j + 0.47) / 8) for i in range(8) for j in range(8)])


def sensors(final_time, readings, weight):
    """One misfit for each component of E, which is field 0 of the state."""
    times = final_time * np.arange(1, 17) / 16
    given = dict(weight=weight, field=0)
    return [pf.PointSensors(PROBES, times, readings[..., i], component=i, **given) for i in (0, 1)]


# %%
# Readings are made on a finer mesh with more steps. (With the same mesh one would only see that the solver inverts
# itself.) Then noise of 4% of the largest reading is added.
def made_readings(sigma, final_time, tableau):
    fine = evolution(16, 96, sigma, final_time, tableau)
    probes = sensors(final_time, np.zeros((16, 64, 2)), 1.0)
    functional = pf.TimeParallelReducedFunctional(
        fine, probes, spacetime=st, solver_parameters={"time_solver": "serial"}
    )
    clean = np.stack([functional.readings(p, true_current(fine.control)) for p in probes], axis=-1)
    noise = 0.04 * abs(clean).max()
    return clean + noise * np.random.default_rng(3).standard_normal(clean.shape), noise


# %%
# The functional is the mean squared misfit in units of the noise, 1/2 where a current explains the readings, and a
# regularisation that prefers smooth and small currents.
CELLS, STEPS = 12, 80


def pose(sigma, final_time, tableau, data, noise, solver):
    ev = evolution(CELLS, STEPS, sigma, final_time, tableau)
    J = ev.control
    smooth = 0.5 * 1e-3 * (0.1 * inner(grad(J), grad(J)) + inner(J, J)) * dx
    misfits = sensors(final_time, data, weight=1 / (noise**2 * data.size))
    return pf.TimeParallelReducedFunctional(ev, misfits, regularisation=smooth, spacetime=st, solver_parameters=solver)


# %%
# 3. A box that conducts: MGRIT
# -----------------------------
#
# With :math:`\sigma = 80` waves die within a time of 1/80, and what is left diffuses. Two levels, four steps to a
# coarse one; the option ``monitor`` prints a line for each cycle.
lossy = dict(sigma=80.0, final_time=0.4, tableau=pf.SDIRK2())
data, noise = made_readings(**lossy)
mgrit = {"time_solver": "mgrit", "mgrit": {"levels": 2, "coarsening": 4, "monitor": True, "rtol": 1e-8}}
J = pose(**lossy, data=data, noise=noise, solver=mgrit)
truth = true_current(J.evolution.control)
value = J(truth)
print(f"J at the true current: {value:.3f}")
assert 0.4 < value < 0.7

# %%
# **What to expect.** Before the first cycle the two-level bound is computed from the spectrum of the problem. Each
# cycle then reduces the residual by more than that. J is a little over 1/2, as the mesh has an error, too.
#
# Now the inverse problem. The evolution is linear with constant operators, so that one adjoint sweep per probe gives
# the matrix of the map from currents to readings, and dense algebra the rest: the current, its standard deviation, and
# the weight of the regularisation, which is chosen so that the readings are most probable (``"evidence"``).
F = J.parameter_to_observable()
posterior = F.posterior(noise=noise, alpha=data.size).choose("evidence")
found = posterior.mean
error = errornorm(truth, found) / norm(truth)
print(f"weight {posterior.alpha / data.size:.2g}, squared residual {posterior.misfit():.0f} of {data.size} readings")
print(f"relative error of the current: {error:.1%}")
assert error < 0.35
assert 0.7 < posterior.misfit() / data.size < 1.4

# %%
# To draw vector fields, evaluate them on a grid of points.
grid = np.array([((i + 0.5) / 16, (j + 0.5) / 16) for j in range(16) for i in range(16)])
at_grid = VertexOnlyMesh(J.evolution.control.function_space().mesh(), grid)


def on_grid(field, space):
    """Values of a field, or a part of the state, on the grid."""
    return Function(space(at_grid, "DG", 0)).interpolate(field).dat.data_ro


def arrows(ax, field, title, largest):
    """Draw a vector field as arrows over its size."""
    where, values = (on_grid(f, VectorFunctionSpace) for f in (SpatialCoordinate(at_grid), field))
    levels = np.linspace(0, largest, 13)
    image = ax.tricontourf(*where.T, np.hypot(*values.T), levels=levels, cmap="YlOrBr", extend="max")
    ax.quiver(*where.T, *values.T, scale=16 * largest, width=0.006, color=BLACK, zorder=3)
    ax.set(xlabel="$x$ [box lengths]", ylabel="$y$ [box lengths]", title=title, aspect="equal")
    return image


# %%
# Left the truth, in the middle what the probes (dots) say about it, right how far that is uncertain, on a scale of its
# own.
fig, axes = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
deviation = posterior.standard_deviation()
image = arrows(axes[0], truth, "True current", 1.2)
arrows(axes[1], found, "Recovered current", 1.2)
axes[1].plot(*PROBES.T, ".", color=BLUE, ms=4)
fig.colorbar(image, ax=axes[:2], label="size of the current [scaled]", shrink=0.8)
image = arrows(axes[2], deviation, "Standard deviation", 0.24)
fig.colorbar(image, ax=axes[2], label="of the components [scaled]", shrink=0.8)
plt.show()
uncertain = norm(deviation) / norm(truth)
print(f"relative error {error:.1%}, expected by the standard deviation {uncertain:.1%}")
assert 0.3 < error / uncertain < 3

# %%
# 4. A cavity: why MGRIT does not converge
# ----------------------------------------
#
# Now nothing conducts, and the time steps are those of the implicit midpoint rule, which keeps the energy exactly.
# Let us try MGRIT all the same.
cavity = dict(sigma=0.0, final_time=1.5, tableau=pf.ImplicitMidpoint())
data, noise = made_readings(**cavity)
J = pose(**cavity, data=data, noise=noise, solver=mgrit)
truth = true_current(J.evolution.control)
by_mgrit = J(truth)

# %%
# **What happened.** Read the warning above the cycles first: the bound is far above 1, "undamped waves: coarse steps
# must have their phase". The residual then *grows*, cycle after cycle, until at cycle 10 it is zero all of a sudden.
# That is no convergence. With FCF-relaxation 2 k coarse intervals are exact after k cycles whatever the coarse steps
# are, and there are 20: the solver has stepped through all steps one after another, ten times over. With 1,000 coarse
# steps it would have taken 500 cycles, or reported that it does not converge (``pf.SolverFailure``; with
# ``"on_divergence": "serial"`` it steps sequentially instead).
#
# Why? A wave of frequency :math:`\omega` is turned by the angle :math:`\omega\, dt` in a step. The midpoint rule turns
# it by :math:`2 \arctan(\omega\, dt/2)` instead, so that one large step turns it by another angle than four small ones,
# and a coarse grid corrects a wave by one of a wrong phase. In the box that conducts such waves are damped before they
# disturb anything; here all of them live for ever.
k = np.linspace(0.01, 2.0, 100)  # omega dt
fine, coarse = 4 * 2 * np.arctan(k / 2), 2 * np.arctan(4 * k / 2)
fig, ax = plt.subplots(figsize=(6, 3.2), layout="constrained")
ax.plot(k, fine, color=BLUE, label="four fine steps")
ax.plot(k, coarse, "--", color=ORANGE, label="one coarse step")
ax.plot(k, 4 * k, ":", color=BLACK, label="exact")
ax.set(xlabel=r"$\omega\, dt$", ylabel="angle [rad]", title="Phase of a wave, implicit midpoint", ylim=(0, 6.5))
ax.legend()
plt.show()

# %%
# 5. ParaDiag
# -----------
#
# ParaDiag does not coarsen. It connects the end of time to its beginning with a small factor :math:`\alpha`,
# :math:`u_0 \to u_0 + \alpha u_N`: then a scaled Fourier transform over the steps makes one system for each frequency
# of the whole space-time problem, *with the right phase of each wave*. What the connection adds is corrected by
# iterating, and an iteration contracts by :math:`\alpha/(1 - \alpha)`, whatever the waves do.
paradiag = {"time_solver": "paradiag", "paradiag": {"monitor": True, "alpha": 1e-4}}
J = pose(**cavity, data=data, noise=noise, solver=paradiag)
truth = true_current(J.evolution.control)
value = J(truth)
print(f"J at the true current: {value:.3f}")
assert 0.4 < value < 0.9

# %%
# **What to expect.** No warning, and three iterations: each line has a residual a hundred to a thousand times smaller
# than the one before. **What could go wrong.** With a smaller alpha fewer iterations are required, but round-off is
# amplified by 1/alpha. And operators that depend on time or on the state have no such transform: an error names the
# term, and sequential stepping remains (``"serial"``).
#
# Is it the same as stepping? Compare E at the end, of ParaDiag and of sequential stepping.
stepping = pose(**cavity, data=data, noise=noise, solver={"time_solver": "serial"})
ends = [f.state(true_current(f.evolution.control), times=cavity["final_time"]) for f in (J, stepping)]
electric = [u.subfunctions[0].dat.data_ro for u in ends]
difference = np.linalg.norm(electric[0] - electric[1]) / np.linalg.norm(electric[1])
print(f"relative difference of E from sequential stepping: {difference:.1e}")
assert difference < 1e-6
assert abs(value / by_mgrit - 1) < 1e-6

# %%
# The recovery does not depend on the regime: the same two lines.
posterior = J.parameter_to_observable().posterior(noise=noise, alpha=data.size).choose("evidence")
error = errornorm(truth, posterior.mean) / norm(truth)
print(f"relative error of the current: {error:.1%}, squared residual {posterior.misfit():.0f} of {data.size}")
assert error < 0.35

# %%
# The energy shows the difference of the two regimes at a glance: in the cavity it stays when the current has ended.
fig, ax = plt.subplots(figsize=(6, 3.2), layout="constrained")
left = {}
for regime, name, colour, style in ((cavity, "cavity", BLUE, "-"), (lossy, "conducting", ORANGE, "--")):
    J = pose(**regime, data=data, noise=noise, solver={"time_solver": "serial"})
    energy = np.array([0.5 * assemble(inner(u, u) * dx) for u in J.state(true_current(J.evolution.control))])
    ax.plot(np.arange(STEPS + 1) / STEPS, energy / energy.max(), style, color=colour, label=name)
    left[name] = energy[-1] / energy[3 * STEPS // 4]
    print(f"{name}: in the last quarter the energy changes by the factor {left[name]:.6f}")
ax.set(xlabel="time [final time]", ylabel="energy [its maximum]", title="Energy of the fields")
ax.legend()
plt.show()
assert abs(left["cavity"] - 1) < 1e-3
assert left["conducting"] < 0.7


# %%
# And the fields themselves: B in colours, E as arrows, while the current flows and long after.
def fields(ax, u, title):
    """Draw B and E of a state, each in units of its largest value on the grid."""
    where, E, B = (
        on_grid(SpatialCoordinate(at_grid), VectorFunctionSpace),
        *(
            on_grid(part, space)
            for part, space in zip(u.subfunctions, (VectorFunctionSpace, FunctionSpace), strict=True)
        ),
    )
    levels = np.linspace(-1, 1, 15)
    image = ax.tricontourf(*where.T, B / abs(B).max(), levels=levels, cmap="PuOr")
    ax.quiver(*where.T, *(E / abs(E).max()).T, scale=20, width=0.006, color=BLACK, zorder=3)
    ax.set(xlabel="$x$ [box lengths]", ylabel="$y$ [box lengths]", title=title, aspect="equal")
    return image


# %%
fig, axes = plt.subplots(1, 2, figsize=(8, 3.6), layout="constrained")
for ax, (regime, name) in zip(axes, ((lossy, "conducting"), (cavity, "cavity")), strict=True):
    J = pose(**regime, data=data, noise=noise, solver={"time_solver": "serial"})
    at_grid = VertexOnlyMesh(J.evolution.control.function_space().mesh(), grid)
    u = J.state(true_current(J.evolution.control), times=0.9 * regime["final_time"])
    image = fields(ax, u, f"{name}, at 0.9 of the final time")
fig.colorbar(image, ax=axes, label="B [its maximum]", shrink=0.8)
plt.show()

# %%
# 6. Which solver for which problem
# ---------------------------------
#
# ========================================  =====================================================================
# problem                                   time solver
# ========================================  =====================================================================
# diffusion, damped waves, nonlinear        ``"mgrit"``, with an L-stable method such as ``pf.SDIRK2()``
# undamped waves, constant operators        ``"paradiag"``
# few processes, or none of the above       ``"serial"``: the same kernels and derivatives, no iteration
# you do not want to decide                 ``"auto"``: measures a step, predicts the cycles, chooses, prints why
# ========================================  =====================================================================
#
# ``problems/README.md`` has a table of contraction factors from no losses to eddy currents, beside their bounds
# (``python -m tests.benchmarks.maxwell_table``).
#
# 7. What to change next
# ----------------------
#
# * **Your readings.** Files, missing values, other noise: :doc:`/howto/data-and-noise`.
# * **A permittivity instead of a current.** A control in the operators: :doc:`02_coefficient`, and
#   ``demos/maxwell_permittivity_inversion.py``, a ground-penetrating radar.
# * **Where should the probes be?** ``F.choose_sensors(8)``: :doc:`03_posterior`.
# * **Three dimensions.** N1curl and RT on tetrahedra: ``demos/maxwell_box_inversion.py``.
# * **More time steps than fit in the memory.** :doc:`/howto/memory`.
# * **What the monitor's lines mean in full.** :doc:`/howto/monitor`.

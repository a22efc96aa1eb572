r"""
A conductivity from few sensors
===============================

A disc cut from a drill core, 10 cm across, hides an inclusion of ore that conducts heat better than the rock around it.
Six heaters on the rim are switched on in turn, one experiment each, and twelve thermocouples read the temperature
rise :math:`u_e` in K. From these readings we find the conductivity :math:`k(x)`, a *coefficient* of the equation:

.. math::

   \varrho c\, \partial_t u_e - \nabla \cdot (k \nabla u_e) = 0, \qquad
   k\, \partial_n u_e = f_e - \eta\, u_e \text{ on the rim,} \qquad u_e = 0 \text{ at } t = 0.

The temperature is no linear function of :math:`k`, so that J is not quadratic, and there is more to decide than in
:doc:`01_heat_source`: how to write a positive unknown, how to regularise an edge, and what to do when the minimiser does
not converge.
"""

# sphinx_gallery_thumbnail_number = 2

# %%
# The mesh, and the logarithm as the control
# ------------------------------------------
# A conductivity has to stay positive. We write :math:`k = k_0 e^m` with the known conductivity :math:`k_0` of the rock
# and the control :math:`m`: no bound is needed, ``m = 0`` is the rock, and a factor of 2 is 0.69 upwards and downwards.
#
# ``st.mesh`` takes a function of your own, too, as long as it passes ``comm`` and ``distribution_parameters`` on.

import matplotlib.pyplot as plt
import numpy as np
from firedrake import *
from irksome import Dt

import pint_fem as pf

st = pf.SpaceTime()
radius = 0.05  # m


def disc(level, **where):
    """A disc around zero, in metres."""
    mesh = UnitDiskMesh(level, **where)
    mesh.coordinates.assign(radius * mesh.coordinates)
    return mesh


# %%
# The equation is a function again, as the simulated laboratory uses it on a finer mesh. ``heater`` is the heat flux
# through the rim, a function that differs between the experiments.

heat_capacity, rock = 2.2e6, 2.0  # J/(m3 K), W/(m K)
cooling = 20.0  # heat transfer at the rim, W/(m2 K)
final_time, steps = 1600.0, 16  # s


def evolution(V, steps):
    """The heat equation with the log-conductivity as control; the heat flux through the rim is data."""
    u, m, heater, v = Function(V), Function(V, name="log conductivity"), Function(V, name="heater"), TestFunction(V)
    F = heat_capacity * Dt(u) * v * dx + rock * exp(m) * inner(grad(u), grad(v)) * dx + (cooling * u - heater) * v * ds
    return pf.Evolution(F, u, tableau=pf.SDIRK2(), dt=final_time / steps, nsteps=steps, control=m), heater


# %%
# Several experiments
# -------------------
# :class:`~pint_fem.Experiments` takes one evolution and, for each experiment, a dictionary with what differs and the
# misfit. The operators of all six are the same, so that they share one assembly and one factorisation for each
# conductivity, and their sweeps are solved at once.

angles = np.arange(6) * np.pi / 3
rim, ring = 0.93 * radius, 0.45 * radius  # m
points = [[rim * np.cos(a), rim * np.sin(a)] for a in angles + np.pi / 6]
points += [[ring * np.cos(a), ring * np.sin(a)] for a in angles]
times = np.arange(200.0, 1601.0, 200.0)  # s
noise = 0.05  # K


def experiments(plate, heater, readings):
    """Six heaters of 2 kW/m2 on arcs of the rim, each with the readings of all sensors."""
    V, pairs = heater.function_space(), []
    x, y = SpatialCoordinate(V.mesh())
    for a, values in zip(angles, readings, strict=True):
        distance = (x - radius * np.cos(a)) ** 2 + (y - radius * np.sin(a)) ** 2
        flux = Function(V).interpolate(2000 * exp(-distance / 0.015**2))
        pairs.append(({heater: flux}, pf.PointSensors(points, times, values, weight=1 / noise**2)))
    return pf.Experiments(plate, pairs)


# %%
# The laboratory simulates the readings with a finer mesh and twice as many steps, and adds noise of 0.05 K. The
# inclusion conducts three times as well as the rock.
#
# ``"time_solver": "auto"`` measures a step and predicts which solver is the fastest: on one rank and 16 steps that is
# stepping one step after the other, on many ranks and steps multigrid in time. Results are the same up to the
# tolerance.

auto = {"time_solver": "auto"}


def true_log_factor(V):
    """The inclusion, a disc with a radius of 1.2 cm."""
    x, y = SpatialCoordinate(V.mesh())
    inside = (x - 0.015) ** 2 + (y - 0.010) ** 2 < 0.012**2
    return Function(V, name="truth").interpolate(conditional(inside, ln(3.0), 0.0))


fine = FunctionSpace(st.mesh(disc, 5), "CG", 1)
laboratory = experiments(*evolution(fine, 2 * steps), np.zeros((len(angles), len(times), len(points))))
simulated = pf.TimeParallelReducedFunctional(laboratory, spacetime=st, solver_parameters=auto)
exact = np.array([simulated.readings(sensors, true_log_factor(fine)) for sensors in laboratory.misfits])
readings = exact + noise * np.random.default_rng(seed=3).standard_normal(exact.shape)

# %%
# Is there information in the readings?
# -------------------------------------
# Before any inversion compare the readings with those of the homogeneous rock. Here the misfit of ``m = 0`` is many
# times half the number of readings, so the inclusion shows. If the two were nearly equal, no regularisation could find
# it: more power, less noise or other places of the sensors would be needed.

V = FunctionSpace(st.mesh(disc, 4), "CG", 1)
plate, heater = evolution(V, steps)
(m,) = plate.controls
tests, truth = experiments(plate, heater, readings), true_log_factor(V)


def misfit_of(J, m):
    """The misfit of all experiments."""
    differences = [J.readings(sensors, m) - d for sensors, d in zip(tests.misfits, readings, strict=True)]
    return np.sum(np.square(differences)) / (2 * noise**2)


# %%
# A smooth conductivity: H1
# -------------------------
# With a P1 control the squared gradient is the usual first choice. A weight without dimension, because
# :math:`\int |\nabla m|^2` is none in the plane: 30 lets a slope of :math:`m` from 0 to 1 across the disc cost as
# much as one reading that is off by five standard deviations. The small second term fixes the mean where readings do not.

smooth = [15.0 * inner(grad(m), grad(m)) * dx, 5.0 * m**2 * dx]
J = pf.TimeParallelReducedFunctional(tests, regularisation=smooth, spacetime=st, solver_parameters=auto)
before = misfit_of(J, Function(V))
if st.is_root:
    print(f"homogeneous rock: misfit {before:.0f}, half the number of readings is {readings.size / 2:.0f}")
assert before > 4 * readings.size / 2

# %%
# For coefficients a gradient smaller by a factor of 1,000 is enough: what remains changes the picture by less than the
# noise does.

options = {"preconditioner": "limited-memory", "gtol_rel": 1e-3, "monitor": print}
stopped = J.minimize_trust_region(max_it=2, **options)
assert not stopped.converged
stopped

# %%
# When it does not converge
# -------------------------
# ``max_it=2`` was too few, and ``result.converged`` and ``result.message`` say so. Always look at them: a result that
# has not converged is returned as well. What helps depends on the message and on the monitor's columns:
#
# * *maximum iterations*, and J still falls: continue from there, as in the next cell.
# * Many steps are *rejected*, or conjugate gradients stop at *negative curvature*: J is far from quadratic. Begin with
#   a larger weight of the regularisation and continue with smaller ones; or give ``hessian="gauss-newton"``.
# * *maximum iterations* under ``CG stop``: the problem is ill-conditioned. Give a preconditioner, or more
#   regularisation.
# * *radius too small* or *round-off*: the derivative does not fit J. Do a Taylor test (:doc:`/howto/taylor-test`); a
#   kink in the residual, such as ``max_value``, is a frequent reason.

result = J.minimize_trust_region(start=stopped.control, **options)
h1 = result.control
h1_misfit, h1_error = misfit_of(J, h1), errornorm(truth, h1) / norm(truth)
if st.is_root:
    print(f"H1: misfit {h1_misfit:.0f}, relative error {100 * h1_error:.0f}%")
assert result.converged
assert 0.85 < h1_misfit / (readings.size / 2) < 1.15
assert h1_error < 0.6

# %%
# An inclusion with an edge: total variation
# ------------------------------------------
# H1 spreads every edge. :class:`~pint_fem.TotalVariation`, :math:`w \int \sqrt{|\nabla m|^2 + \varepsilon}`, charges a
# jump by its height times its length, however sharp it is. Choose :math:`\sqrt\varepsilon` well below the gradient of an
# edge, here :math:`\ln 3` over a cell of 3 mm, some 400 per metre; and :math:`w` so that the misfit stays at the noise.
#
# J is less smooth now, and a start far away costs rejected steps. Starting from the smooth result avoids most of them:
# this *continuation* from an easy to a hard problem is the remedy that works most often.

edges = [pf.TotalVariation(m, weight=2e3, smoothing=10.0**2), 5.0 * m**2 * dx]
K = pf.TimeParallelReducedFunctional(tests, regularisation=edges, spacetime=st, solver_parameters=auto)
result = K.minimize_trust_region(start=h1, gtol_rel=1e-2, monitor=print)
tv = result.control
tv_misfit, tv_error = misfit_of(K, tv), errornorm(truth, tv) / norm(truth)
if st.is_root:
    print(f"total variation: misfit {tv_misfit:.0f}, relative error {100 * tv_error:.0f}%")
assert result.converged
assert 0.85 < tv_misfit / (readings.size / 2) < 1.15
assert tv_error < h1_error

# %%
# Pictures
# --------
# All ranks are in time, so that the first one has the whole mesh and draws.

from firedrake.pyplot import tripcolor


def draw(ax, f, title, **limits):
    """The colours of a field, sensors as dots and heaters as triangles."""
    shown = tripcolor(f, axes=ax, **limits)
    ax.plot(*np.transpose(points), ".", color="white", mec="black")
    ax.plot(1.06 * radius * np.cos(angles), 1.06 * radius * np.sin(angles), "^", color="C1", mec="black")
    ax.set(title=title, xlabel="x in m", aspect="equal", xticks=[-0.05, 0, 0.05], yticks=[-0.05, 0, 0.05])
    return shown


# %%
# One of the experiments, as the thermocouples and the heaters see it.

warm = J.state(h1, times=final_time, evolution=tests.evolutions[0])
if st.is_root:
    figure, ax = plt.subplots(figsize=(5, 4), layout="constrained")
    shown = draw(ax, warm, "First heater after 1,600 s", cmap="inferno", vmin=0)
    ax.set_ylabel("y in m")
    figure.colorbar(shown, label="temperature rise in K")

# %%
# The conductivity :math:`k_0 e^m` is a field of its own, interpolated for the picture.

fields = [Function(V).interpolate(rock * exp(f)) for f in (truth, h1, tv)]
if st.is_root:
    figure, axes = plt.subplots(1, 3, figsize=(12, 4), layout="constrained")
    names = ["Truth", f"H1, error {100 * h1_error:.0f}%", f"Total variation, error {100 * tv_error:.0f}%"]
    for ax, f, name in zip(axes, fields, names, strict=True):
        shown = draw(ax, f, name, cmap="cividis", vmin=1.5, vmax=6.5)
    axes[0].set_ylabel("y in m")
    figure.colorbar(shown, ax=axes, label="conductivity in W/(m K)", extend="both")
    plt.show()

# %%
# Twelve sensors determine where the inclusion is and how much heat it carries; neither its exact outline nor its peak.
# The same program runs on several ranks: ``mpiexec -n 2`` shares the time steps, and with
# ``pf.SpaceTime("1x1x2")`` two groups of ranks share the experiments instead.
#
# What to change next
# -------------------
# * Limits on both sides instead of the logarithm: ``bounds=`` (:doc:`/howto/bounds`).
# * Sweeps by multigrid in time, solved only as accurately as needed: ``inexact=True`` (:doc:`04_nonlinear` shows how).
# * Continue a long run after an interruption: :doc:`/howto/checkpoints`. Many large experiments: :doc:`/howto/memory`.
# * What each column of the monitor means: :doc:`/howto/monitor`. More time ranks: :doc:`/howto/process-grid`.
# * A source instead of a coefficient has a posterior: :doc:`03_posterior`.

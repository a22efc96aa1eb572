r"""
A heat source in ten steps
==========================

A square plate of aluminium, 20 cm wide, lies in a frame that keeps its edge at room temperature. Two spots inside
produce heat at a constant, unknown rate. Twenty-five thermocouples read the temperature for one minute; we find the
source from their readings.

The temperature rise :math:`u(x, t)` in K follows from the source :math:`q(x)` in MW/m\ :sup:`3` by

.. math::

   \varrho c\, \partial_t u - \nabla \cdot (k \nabla u) = q, \qquad u = 0 \text{ at } t = 0 \text{ and on the edge,}

and we minimise, with the noise's standard deviation :math:`\sigma` and a weight :math:`\alpha`,

.. math::

   J(q) = \frac{1}{2 \sigma^2} \sum_{r, s} \big(u(x_s, t_r) - d_{rs}\big)^2
          + \frac{\alpha}{2} \int \ell^2 |\nabla q|^2 + q^2 \, dx .

You know Firedrake; nothing about parallelism in time is needed. The program takes a few seconds on one core::

    python docs/tutorials/01_heat_source.py
"""

# sphinx_gallery_thumbnail_number = 2

# %%
# 1. The process grid and the mesh
# --------------------------------
# :class:`~pint_fem.SpaceTime` divides the MPI ranks of the program into *ranks in space*, which share a mesh as usual,
# and *ranks in time*, which share the time steps. Without arguments all ranks are in time. ``st.mesh`` takes any
# function of Firedrake that makes a mesh, and its arguments.
#
# *What could go wrong:* a mesh made without ``st.mesh`` lives on all ranks. On one rank that is the same, on several
# ranks it is refused with a message that names the remedy.

import matplotlib.pyplot as plt
import numpy as np
from firedrake import *
from irksome import Dt

import pint_fem as pf

st = pf.SpaceTime()
width = 0.2  # m
mesh = st.mesh(RectangleMesh, 32, 32, width, width)

# %%
# 2. The evolution, in UFL with ``Dt``
# ------------------------------------
# The residual is written as for Irksome: ``Dt(u)`` is the time derivative, ``v`` the test function. It is a function
# here because step 5 uses the equation on a finer mesh, too. With powers in MW, lengths in m and times in s all numbers
# are of moderate size, which keeps weights and tolerances readable.

heat_capacity = 2.43  # density times specific heat of aluminium, MJ/(m3 K)
conductivity = 2.0e-4  # of an aluminium alloy, MW/(m K)


def heat_equation(u, v, q):
    """Residual of the temperature rise."""
    return heat_capacity * Dt(u) * v * dx + conductivity * inner(grad(u), grad(v)) * dx - q * v * dx


# %%
# 3. The control
# --------------
# The unknown is a plain Firedrake function. Its name appears in messages. Its value is the first guess, and it stays as
# it is: the package copies what you give, and returns new functions.

V = FunctionSpace(mesh, "CG", 1)
u, q = Function(V, name="temperature rise"), Function(V, name="source")

# %%
# 4. The integrator and the time steps
# ------------------------------------
# ``tableau`` is any diagonally implicit Butcher tableau of Irksome. :func:`~pint_fem.SDIRK2` is of second order and
# damps what it does not resolve; it is the usual choice for diffusion. The slowest mode of this plate decays within
# :math:`\varrho c\, L^2 / (2 \pi^2 k) \approx 25` s, so 128 steps in 60 s are plenty.
#
# The value of ``u`` is the initial condition. ``control=q`` names the unknown: every other function in the residual
# would be data.

final_time, steps = 60.0, 128  # s
edge = DirichletBC(V, 0, "on_boundary")
plate = pf.Evolution(
    heat_equation(u, TestFunction(V), q), u,
    tableau=pf.SDIRK2(), dt=final_time / steps, nsteps=steps, control=q, bcs=edge,
)  # fmt: skip

# %%
# 5. Readings with noise
# ----------------------
# A test with known truth is the first thing to do with any inverse problem. The "laboratory" has a finer mesh and twice
# as many steps: readings of the same discretisation would be fitted better than any measured ones. A misfit
# :class:`~pint_fem.PointSensors` knows points, times and values; ``J.readings`` returns what its sensors would read, so
# a first functional with values of zero serves to simulate.


def true_source(x, y):
    """Two spots of 5 and 3 MW/m3."""
    spot = lambda a, b, radius: exp(-((x - a) ** 2 + (y - b) ** 2) / radius**2)
    return 5 * spot(0.07, 0.13, 0.025) + 3 * spot(0.14, 0.07, 0.03)


lines = width / 6 * np.arange(1, 6)  # m
points = [[x, y] for x in lines for y in lines]
times = np.arange(3.0, 61.0, 3.0)  # s
nothing = pf.PointSensors(points, times, np.zeros((len(times), len(points))))

fine = FunctionSpace(st.mesh(RectangleMesh, 48, 48, width, width, diagonal="right"), "CG", 1)
w, truth = Function(fine), Function(fine).interpolate(true_source(*SpatialCoordinate(fine.mesh())))

# %%
# The noise has a standard deviation of 0.1 K. On several ranks each one calls the same random generator with the same
# seed: readings have to be the same on all ranks, and the package refuses them where they are not.

laboratory = pf.Evolution(
    heat_equation(w, TestFunction(fine), truth), w, tableau=pf.SDIRK2(), dt=final_time / (2 * steps), nsteps=2 * steps,
    control=truth, bcs=DirichletBC(fine, 0, "on_boundary"),
)  # fmt: skip
exact = pf.TimeParallelReducedFunctional(laboratory, nothing, spacetime=st).readings(nothing, truth)
noise = 0.1  # K
readings = exact + noise * np.random.default_rng(seed=3).standard_normal(exact.shape)
if st.is_root:
    print(f"warmest reading {readings.max():.1f} K, noise {noise} K")

# %%
# 6. The misfit
# -------------
# The weight :math:`1/\sigma^2` makes the misfit dimensionless: at a source that explains the readings up to their noise
# it is about half their number, here 250. That is the first check of any result. Masked entries of ``readings`` would
# be missing readings; :doc:`/howto/data-and-noise` has other observations and noise that differs.

misfit = pf.PointSensors(points, times, readings, weight=1 / noise**2)

# %%
# 7. The functional
# -----------------
# The regularisation is a UFL functional of the control. Its numbers have a meaning: :math:`\ell = 2` cm is the size of
# details below which the regularisation decides rather than the readings, and :math:`\alpha` weighs the source's square
# against the misfit. :doc:`Tutorial 3 <03_posterior>` lets the readings choose it.
#
# ``J`` is a reduced functional of pyadjoint: ``J(q)`` solves for the state in all steps, ``J.derivative()`` for the
# adjoint.

alpha, length = 3e3, 0.02  # per (MW/m3)^2 m2, m
regularisation = 0.5 * alpha * (length**2 * inner(grad(q), grad(q)) + q**2) * dx
J = pf.TimeParallelReducedFunctional(plate, misfit, regularisation=regularisation, spacetime=st)
at_zero = J(q)
if st.is_root:
    print(f"J = {at_zero:.0f} without a source")
assert at_zero > 1000 * readings.size / 2  # far above the noise: the readings have something to tell

# %%
# 8. The Taylor test
# ------------------
# The derivative is that of the discrete problem, so that :math:`|J(q + \epsilon h) - J(q) - \epsilon J'(q) h|` falls by
# the factor 4 each time :math:`\epsilon` is halved: the order is 2. Test every functional of your own before you
# minimise it.
#
# *What could go wrong:* orders near 1 mean a wrong derivative; orders that get lost for small :math:`\epsilon` mean
# remainders below the tolerance of the solves, and a longer direction ``h`` helps (:doc:`/howto/taylor-test`).

from firedrake.adjoint import taylor_test

h = Function(V).interpolate(true_source(*SpatialCoordinate(mesh)))
order = taylor_test(J, Function(V), h)
assert abs(order - 2) < 1e-3

# %%
# 9. Minimisation
# ---------------
# A trust-region method of Newton's kind takes products with the Hessian, two sweeps over all steps each. ``inexact``
# solves every sweep only as accurately as convergence requires, and ``"limited-memory"`` learns a preconditioner of the
# conjugate gradients from their own products.
#
# The monitor prints a line per iteration: J, the norm of its gradient, the step and the ratio of the actual to the
# predicted reduction, which should be near 1. This J is quadratic, so that a few iterations suffice
# (:doc:`/howto/monitor` explains every column).

result = J.minimize_trust_region(inexact=True, preconditioner="limited-memory", monitor=print)
source = result.control
assert result.converged
assert result.iterations <= 12
result

# %%
# *Expect* a misfit of about half the number of readings. Far above it the model or the weights are wrong; far below it
# the regularisation is too weak and the noise is fitted.

left = np.sum((J.readings(misfit, source) - readings) ** 2) / (2 * noise**2)
error = errornorm(h, source) / norm(h)
power, true_power = assemble(source * dx), assemble(h * dx)
if st.is_root:
    print(f"misfit {left:.0f} for {readings.size} readings; relative error of the source {100 * error:.0f}%")
    print(f"power per metre of thickness: {1e3 * power:.2f} kW/m, truly {1e3 * true_power:.2f} kW/m")
assert 0.85 < left / (readings.size / 2) < 1.05
assert error < 0.2
assert abs(power - true_power) < 0.05 * true_power

# %%
# 10. Pictures
# ------------
# ``source`` is a Firedrake function on ``mesh``. All ranks are in time here, so that the first rank has the whole mesh
# and draws with Firedrake's own functions; with several ranks in space write a file for ParaView instead,
# ``VTKFile("source.pvd", comm=st.space_comm).write(source)``.

from firedrake.pyplot import tripcolor


def draw(ax, f, title, **options):
    """Colours of a field with the sensors as dots."""
    shown = tripcolor(f, axes=ax, **options)
    ax.plot(*np.transpose(points), ".", color="white", mec="black")
    ax.set(title=title, xlabel="x in m", ylabel="y in m", aspect="equal", xticks=[0, 0.1, 0.2], yticks=[0, 0.1, 0.2])
    return shown


# %%
# The plate after one minute, with the sensors as dots. ``J.state`` returns the temperature at any times of the steps.

warm = J.state(source, times=final_time)
if st.is_root:
    figure, ax = plt.subplots(figsize=(5, 4), layout="constrained")
    shown = draw(ax, warm, "Temperature rise after 60 s", cmap="inferno", vmin=0)
    figure.colorbar(shown, label="temperature rise in K")

# %%
# The two spots are found at their places with nearly their heights: heat has spread by
# :math:`\sqrt{4 k t / \varrho c} \approx 14` cm within the minute, and what the readings tell of details below a few
# centimetres is lost in the noise.

if st.is_root:
    figure, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    limits = {"cmap": "cividis", "vmin": -0.5, "vmax": 5.5}
    shown = draw(axes[0], h, "True source", **limits)
    draw(axes[1], source, f"Found from 25 sensors, error {100 * error:.0f}%", **limits)
    figure.colorbar(shown, ax=axes, label="source in MW/m³")

# %%
# Readings of one sensor beside the fitted temperature: the differences should look like noise, without a trend.

fitted = J.readings(misfit, source)
if st.is_root:
    figure, ax = plt.subplots(figsize=(6, 3.2), layout="constrained")
    for s, colour, marker in ((8, "C0", "o"), (17, "C1", "s")):
        ax.plot(times, fitted[:, s], color=colour, label=f"fitted, sensor {s}")
        ax.plot(times, readings[:, s], marker, color=colour, ms=4, label=f"read, sensor {s}")
    ax.set(title="Two of the sensors", xlabel="time in s", ylabel="temperature rise in K")
    ax.legend()

# %%
# The same on several ranks in time
# ---------------------------------
# Nothing in the program changes::
#
#     mpiexec -n 2 python docs/tutorials/01_heat_source.py
#     mpiexec -n 4 python docs/tutorials/01_heat_source.py
#
# The 128 steps are divided among the ranks, and every sweep is solved for all steps at once by multigrid in time. J at a
# given source is the same for every number of time ranks; contributions to the gradient are added in another order, so
# that the minimum found agrees to the accuracy requested from the sweeps: the first nine digits of the J printed below.
# For ranks in space as well give ``pf.SpaceTime("2x2")``, two in space times two in time. A problem as small as this
# one does not become faster by that: :doc:`/howto/process-grid` describes when it pays.

if st.is_root:
    print(f"{st.time_size} ranks in time: J = {result.value:.9g}")
    plt.show()

# %%
# What to change next
# -------------------
# * Negative sources make no sense here: ``bounds=(0, None)`` (:doc:`/howto/bounds`), or a given total power
#   (:doc:`/howto/constraints`).
# * ``J.minimize()`` chooses the method itself; for a linear problem with few sensors it is the map from sources to
#   readings, from which the whole posterior follows (:doc:`03_posterior`).
# * Readings that are missing, correlated or averages over an area: :doc:`/howto/data-and-noise`.
# * A source that varies in time: ``per_step=True`` (tutorial 5). An unknown conductivity: :doc:`02_coefficient`.
# * Long runs: :doc:`/howto/checkpoints` and :doc:`/howto/memory`.
# * You have this problem in pyadjoint or hIPPYlib already: :doc:`/howto/from-pyadjoint`, :doc:`/howto/from-hippylib`.

r"""
Your own propagator, in numpy
=============================

The solver at the core of this package knows nothing of finite elements. It requires numpy and mpi4py and one method of
yours: *take these states one step on*. This tutorial solves all time steps of two problems at once by MGRIT (multigrid
reduction in time): a rod of your own discretisation, where theory predicts the convergence, and the Lorenz system,
where chaos sets a limit to what any method parallel in time can do. Then it computes a gradient by a backward sweep
of the same solver. Nothing here imports Firedrake.

.. code-block:: bash

   python docs/tutorials/07_numpy_propagator.py
   mpiexec -n 2 python docs/tutorials/07_numpy_propagator.py

Both print the same numbers. Reading and trying takes an hour, running some seconds.
"""

# %%
# 1. A propagator
# ---------------
#
# MGRIT solves :math:`u_{n+1} = \Phi_n(u_n) + g_n` for all :math:`n = 0, \dots, N - 1` at once, for a *propagator*
# :math:`\Phi` that you write. It is any object with one method, ``step(steps, u, out)``:
#
# * ``u`` has the shape ``(k, *state)``: not one state but a *block* of k states, because the solver advances many parts
#   of the time axis side by side. You may read it, not change it.
# * ``steps`` are their numbers, a ``range``: where :math:`\Phi_n` depends on :math:`n`, ``steps[i]`` is that of
#   ``u[i]``.
# * Write the results to ``out``, in place: ``out[...] = ...``. Nothing is returned.
#
# First a rod of 31 points, heated in its middle: backward Euler for :math:`\partial_t u = \partial_{xx} u + f`.
import logging
import sys

had_firedrake = "firedrake" in sys.modules  # from another tutorial in the same process
import matplotlib.pyplot as plt
import numpy as np
from mpi4py import MPI
from scipy.optimize import minimize

import pint_fem as pf
from pint_fem.mgrit import check, split_steps
from pint_fem.theory import two_level_bound, two_level_estimate

BLUE, ORANGE, GREEN, BLACK = "#0072B2", "#D55E00", "#009E73", "#222222"  # told apart by colour-blind readers, too
comm = MPI.COMM_WORLD
POINTS = 31
A = 32**2 * (2 * np.eye(POINTS) - np.eye(POINTS, k=1) - np.eye(POINTS, k=-1))
assert had_firedrake or "firedrake" not in sys.modules


# %%
class Heat:
    """One step of backward Euler, of length ``dt``, for a block of states."""

    def __init__(self, dt):
        self.inverse = np.linalg.inv(np.eye(POINTS) + dt * A)  # symmetric

    def step(self, steps, u, out):
        out[...] = u @ self.inverse


# %%
# Multigrid requires a propagator on each level. A coarse one steps over ``m`` fine steps at once, cheaply and not
# exactly: the natural choice is the same method with ``m`` times the step. Its error does not show in the result, as
# the coarse levels only *correct* the fine one; it decides how fast the iteration converges.
#
# Before you solve anything, let ``check`` try your propagators (XBraid users know this as ``braid_TestAll``): do they
# write all of ``out``, leave ``u`` alone, return the same for a state whatever block it is in? It prints a line for
# each of these, and returns a report.
N, m, T = 256, 8, 0.5
heat = [Heat(T / N), Heat(m * T / N)]
report = check(heat, N, np.ones(POINTS), coarsening=m)
assert report.passed

# %%
# **What to expect.** Nothing has failed. Two lines deserve attention. ``coarse step against those of level 0`` is how
# far one coarse step is from eight fine ones, for a state with all frequencies: 7%. And ``step, block against single``
# notes that a matrix product of numpy may round a row differently in another block, so that results on other numbers
# of ranks agree to round-off, not bit by bit. Elementwise steps, such as the Lorenz system's below, are bitwise
# identical; for matrix products the attribute ``block`` fixes the size of blocks (:class:`~pint_fem.Propagator`).
#
# **What could go wrong.** ``out = u @ self.inverse`` instead of ``out[...] =`` binds a name and writes nothing: the
# line ``step writes all of out`` would be the first to fail.

# %%
# 2. The estimate before the solve
# --------------------------------
#
# For a linear propagator with orthogonal eigenvectors the error of each mode shrinks in every cycle by a factor that
# follows from two numbers: the eigenvalue :math:`\lambda` of the fine step and :math:`\mu` of the coarse one. Here they
# are known: :math:`\lambda = 1/(1 + \kappa\, dt)` for the eigenvalues :math:`\kappa` of the matrix.
kappa = np.linalg.eigvalsh(A)
fine, coarse = 1 / (1 + kappa * T / N), 1 / (1 + kappa * m * T / N)
estimate = two_level_estimate(fine, coarse, m, N // m, "FCF", tolerance=1e-8)
if comm.rank == 0:
    print(estimate)
assert estimate.converges

# %%
# 3. The solve, and what the monitor prints
# -----------------------------------------
#
# Each rank owns a part of the time axis and has the rows of its own points in ``U``: one row more than it has steps, as
# row 0 is the initial value on the first rank, and on the others a place for the last state of their left neighbour.
# On one rank that is simply all ``N + 1`` points. ``local_rows`` is the number; ``slab`` below are the numbers of the
# own steps. ``G`` has a row for each own step: for backward Euler :math:`g_n = \Phi(dt\, f(t_{n+1}))`.
options = {"coarsening": m, "relax": "FCF", "rtol": 1e-8, "monitor": True}
solver = pf.MGRIT(heat, N, options=options, comm=comm, linear=True)
bounds = split_steps(N, comm.size)
slab = np.arange(bounds[comm.rank], bounds[comm.rank + 1])
U = np.zeros((solver.local_rows, POINTS))
x = np.arange(1, POINTS + 1) / (POINTS + 1)
source = np.exp(-100 * (x - 0.5) ** 2)
G = np.cos(8 * np.pi * (slab + 1) / N)[:, None] * (T / N * source @ heat[0].inverse)
result = solver.solve(U, G)

# %%
# A line for each cycle: the norm of the residual :math:`\Phi(U_n) + g_n - U_{n+1}` over all steps, the same relative to
# the norm of the solution (which is what ``rtol`` refers to), and the factor since the last line. **What to expect:**
# the factor settles below the bound of the estimate; it is a bound for the worst mode, and this solution contains
# little of it. **What could go wrong:** a factor near 1 means that coarse steps are no good approximation of ``m`` fine
# ones. The solve then ends with ``result.converged == False`` and ``result.message`` has the reason; nothing is raised,
# so *check it*, or give ``"on_divergence": "serial"``.
if comm.rank == 0:
    print(result)
    print(f"factor per cycle: observed {result.factor:.4f}, bound {estimate.factor:.4f}")
assert result.converged
assert result.factor < estimate.factor


# %%
# The answer is that of stepping one step after another, to the tolerance: MGRIT changes how the equations are solved,
# not what they are. To see it we step through all steps on every rank.
def sequential(propagator, first, count, g=None):
    """All states, one step after another."""
    states = np.empty((count + 1, *first.shape))
    states[0] = first
    for n in range(count):
        propagator.step(range(n, n + 1), states[n : n + 1], states[n + 1 : n + 2])
        states[n + 1] += 0 if g is None else g[n]
    return states


loads = np.concatenate(comm.allgather(G))
exact = sequential(heat[0], np.zeros(POINTS), N, loads)
error = abs(U[1:] - exact[slab + 1]).max() / abs(exact).max()
error = comm.allreduce(error, op=MPI.MAX)
if comm.rank == 0:
    print(f"largest difference from sequential stepping, relative: {error:.1e}")
assert error < 1e-7

# %%
# How good would other choices be? The bounds cost nothing, so draw them: by the coarsening factor, for both
# relaxations. FCF costs twice the work of F per cycle on the fine level and contracts more strongly.
factors = (2, 4, 8, 16, 32, 64)
by_m = {
    relax: [two_level_bound(fine, 1 / (1 + kappa * f * T / N), f, N // f, relax) for f in factors]
    for relax in ("F", "FCF")
}
if comm.rank == 0:
    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    cycles = np.arange(len(result.residuals))
    left.semilogy(cycles, result.residuals, "o-", color=BLUE, label="observed")
    left.semilogy(cycles, result.residuals[0] * estimate.factor**cycles, "--", color=BLACK, label="bound")
    left.set(xlabel="cycle", ylabel="norm of the residual [K]", title=f"Heat, {N} steps, m = {m}")
    left.legend()
    for (relax, bound), colour, mark in zip(by_m.items(), (ORANGE, BLUE), "os", strict=True):
        right.semilogx(factors, bound, f"{mark}-", base=2, color=colour, label=f"{relax}-relaxation")
    right.set(xlabel="coarsening factor $m$", ylabel="bound per cycle", title="A-priori estimate", ylim=(0, None))
    right.legend()
    plt.show()
assert by_m["FCF"][2] < 0.2 < by_m["F"][2] < 0.3

# %%
# 4. A nonlinear problem: Lorenz
# ------------------------------
#
# The same solver takes any step. The Lorenz system has three unknowns and is *chaotic*: two trajectories that differ by
# :math:`\varepsilon` differ by about :math:`\varepsilon\, e^{0.9\, t}` later, until they have nothing in common.


class Lorenz:
    """One step of the classical Runge-Kutta method of order 4."""

    def __init__(self, dt):
        self.dt = dt

    @staticmethod
    def rate(u):
        x, y, z = u[..., 0], u[..., 1], u[..., 2]
        return np.stack([10 * (y - x), x * (28 - z) - y, x * y - 8 / 3 * z], axis=-1)

    def step(self, steps, u, out):
        f, h = self.rate, self.dt
        k1 = f(u)
        k2 = f(u + h / 2 * k1)
        k3 = f(u + h / 2 * k2)
        k4 = f(u + h * k3)
        out[...] = u + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


# %%
# We solve from the same initial value up to four final times with steps of 1/128, and coarse steps eight times as long.
# A nonlinear problem deserves a better first guess than zero: ``"start": "skip"`` steps through the coarse level first
# and takes that. ``"stagnation": None`` and a large ``dtol`` let the solver continue where it makes no progress; by
# default it would stop and report that.
DT, M, START = 1 / 128, 8, np.array([5.0, 5.0, 25.0])
lorenz = {"coarsening": M, "relax": "FCF", "start": "skip", "max_it": 200, "stagnation": None, "dtol": 1e99}


def solve(final_time, start=START, cycles=None):
    """Solve up to a time, to 1e-9 or by a number of cycles; return the result and all states, on all ranks."""
    steps = round(final_time / DT)
    solver = pf.MGRIT([Lorenz(DT), Lorenz(M * DT)], steps, options=lorenz, comm=comm)
    U = np.empty((solver.local_rows, 3))
    U[0] = start
    result = solver.solve(U, rtol=1e-9 if cycles is None else None, cycles=cycles)
    return result, np.concatenate(comm.allgather(U if comm.rank == 0 else U[1:]))


# %%
horizons, runs = (4, 8, 16, 32), {}
exact = sequential(Lorenz(DT), START, round(32 / DT))
for time in horizons:
    result, states = runs[time] = solve(time)
    error = np.linalg.norm(states - exact[: len(states)], axis=1).max()
    if comm.rank == 0:
        print(f"t <= {time:2d}: {result.cycles:3d} cycles, residual {result.relative_residual:.0e}, error {error:.0e}")
    assert result.converged

# %%
# All runs converge, but their number of cycles grows with the final time, and for long times the residual does not fall
# at all in the first cycles. Why? The coarse steps have an error, and chaos amplifies it along the time axis. A
# correction that is computed at the beginning is of no use at the end before all that lies between is accurate. To see
# it, stop after 0, 1, 2, ... cycles and compare with sequential stepping at each time.
cycles = runs[16][0].cycles
steps16 = round(16 / DT)
stopped = [solve(16, cycles=k)[1] for k in range(cycles + 1)]
errors = np.array([np.linalg.norm(states - exact[: steps16 + 1], axis=1) for states in stopped])
accurate = [16.0 if (row < 1e-3).all() else DT * np.argmax(row >= 1e-3) for row in errors]
if comm.rank == 0:
    print("accurate to 1e-3 up to t =", " ".join(f"{t:.1f}" for t in accurate))

# %%
# Left the residuals of the four runs, right the error of the run up to 16, cycle by cycle.
if comm.rank == 0:
    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for time, colour, style in zip(horizons, (BLUE, GREEN, ORANGE, BLACK), ("-", "--", "-.", ":"), strict=True):
        left.semilogy(runs[time][0].residuals, style, color=colour, label=f"$t \\leq {time}$")
    left.set(xlabel="cycle", ylabel="norm of the residual", title="Lorenz: residuals")
    left.legend()
    edges = np.linspace(0, 16, errors.shape[1] + 1), np.arange(-0.5, cycles + 1)
    image = right.pcolormesh(*edges, np.log10(errors + 1e-16), cmap="cividis", vmin=-12, vmax=1.5)
    fig.colorbar(image, ax=right, label=r"$\log_{10}$ of the error")
    right.set(xlabel="time $t$ of the Lorenz system", ylabel="cycle", title="Error after each cycle, $t \\leq 16$")
    plt.show()

# %%
# The iteration becomes right *from the left to the right*: the dark region is accurate, and its edge moves by about one
# unit of time per cycle. (That is more than is guaranteed: after k cycles with FCF-relaxation the first 2 k coarse
# intervals are exact whatever the propagators, here k/8 units of time.)
assert all(np.diff(accurate) >= 0)
assert all(t >= 2 * k * M * DT for k, t in enumerate(accurate[:-1]))
assert runs[4][0].cycles < runs[8][0].cycles < runs[16][0].cycles < runs[32][0].cycles

# %%
# **Does it pay?** Count. A cycle steps once through the coarse level, which is sequential: 1/8 of the sequential work,
# however many ranks there are. With k cycles and the first guess the time is therefore at least (k + 1)/8 of that of
# sequential stepping.
limits = {time: (runs[time][0].cycles + 1) / M for time in horizons}
if comm.rank == 0:
    for time, limit in limits.items():
        print(f"t <= {time:2d}: at least {limit:.2f} of the time of sequential stepping, on any number of ranks")
assert limits[4] < 1 < limits[16]

# %%
# So for short times there is something to gain, and for long ones nothing; a larger m makes coarse steps cheaper and
# worse. What helps is to require less:
#
# * *Windows.* Four solves over 4 units of time, one after another, take fewer cycles each than all at once: 4 to 7
#   instead of 15, on a quarter of the steps.
# * *Statistics instead of a trajectory.* Beyond :math:`t \approx 40` no trajectory in double precision is right, as
#   :math:`10^{-16} e^{0.9 \cdot 40} \approx 0.4`. Averages are well defined.
#
# There is a trap even where the solver converges: the *residual* is small, the *error* is the residual amplified. In
# the table the errors at :math:`t \le 32` are a thousand times larger than at 8, though all rows have a residual
# below 1e-9. That is no fault of the solver: a change of the initial value by 1e-12 does the same to sequential
# stepping.
nearby = sequential(Lorenz(DT), START + 1e-12, round(32 / DT))
apart = np.linalg.norm(nearby - exact, axis=1)
windows = [solve(4, start=exact[round(first / DT)])[0].cycles for first in (0, 4, 8, 12)]
if comm.rank == 0:
    print(f"cycles of four windows: {windows}, of all at once: {cycles}")
    print(f"two starts 1e-12 apart are {apart[steps16]:.0e} apart at t = 16, up to {apart.max():.0e} before t = 32")
assert max(windows) < cycles
assert apart[steps16] > 1e-9
assert apart.max() > 0.1


# %%
# 5. A backward sweep, and a gradient
# -----------------------------------
#
# Where does a trajectory begin, if only :math:`x` is measured, at 16 times and with noise? That is the data
# assimilation of weather forecasts in small: minimise over the initial value :math:`u_0`
#
# .. math::  J(u_0) = \frac12 \sum_j \big(x(t_j) - d_j\big)^2 .
#
# Its gradient is :math:`\lambda_0` of the *adjoint* evolution, which runs backwards in time and is linear, even where
# the forward one is not:
#
# .. math::  \lambda_N = j_N'(u_N), \qquad \lambda_n = \Phi_n'(u_n)^T \lambda_{n+1} + j_n'(u_n) .
#
# That is again of the form that MGRIT solves, with step :math:`i` from point :math:`N - i` to :math:`N - i - 1`.
# Required is the derivative of a step. For Runge-Kutta it follows from the chain rule, stage by stage:
class LorenzWithDerivative(Lorenz):
    """The step, and its derivative: a 3 x 3 matrix for each state."""

    def matrix(self, u):
        f, h, eye = self.rate, self.dt, np.eye(3)
        k1 = f(u)
        k2 = f(u + h / 2 * k1)
        k3 = f(u + h / 2 * k2)
        K1 = slope(u)
        K2 = slope(u + h / 2 * k1) @ (eye + h / 2 * K1)
        K3 = slope(u + h / 2 * k2) @ (eye + h / 2 * K2)
        K4 = slope(u + h * k3) @ (eye + h * K3)
        return eye + h / 6 * (K1 + 2 * K2 + 2 * K3 + K4)

    def tangent(self, steps, u, du, out):
        out[...] = np.einsum("kij,kj->ki", self.matrix(u), du)

    def adjoint(self, steps, u, lam, out):
        out[...] = np.einsum("kij,ki->kj", self.matrix(u), lam)


# %%
def slope(u):
    """Derivative of the rate, ``(k, 3, 3)``."""
    x, y, z = u[..., 0], u[..., 1], u[..., 2]
    one = np.ones_like(x)
    rows = [[-10 * one, 10 * one, 0 * one], [28 - z, -one, -x], [y, x, -8 / 3 * one]]
    return np.moveaxis(np.array(rows), (0, 1), (-2, -1))


# %%
# The names ``tangent`` and ``adjoint`` are those that ``check`` knows: it compares the tangent with differences of
# steps, which have to agree to second order, and the adjoint with the tangent. Make an error in ``slope`` to see it.
# All messages of the package go through the logger ``pint_fem``; here we show four of the 57 lines only.
logger = logging.getLogger("pint_fem")
logger.setLevel("WARNING")
report = check([LorenzWithDerivative(DT), LorenzWithDerivative(M * DT)], 256, START, coarsening=M)
logger.setLevel("INFO")
if comm.rank == 0:
    print("\n".join(line for line in report.lines if "order" in line or "against tangent" in line))
assert report.passed


# %%
# The adjoint's propagator has the states at the points of its level, and steps backwards through them.
class Backward:
    """Steps of the adjoint evolution along given states ``u_0 .. u_N``."""

    def __init__(self, propagator, states):
        self.propagator, self.states = propagator, states

    def step(self, steps, u, out):
        n = len(self.states) - 2 - np.asarray(steps)
        self.propagator.adjoint(steps, self.states[n], u, out)


# %%
# On several ranks the backward sweep begins where the forward one ends. A communicator with the ranks in reversed order
# gives every rank the same part of the time axis in both sweeps.
WINDOW, EVERY = 2.0, 16
STEPS = round(WINDOW / DT)
back, ends = comm.Split(key=-comm.rank), [STEPS - b for b in reversed(split_steps(STEPS, comm.size))]
own = np.arange(ends[back.rank], ends[back.rank + 1])
observed = np.arange(EVERY, STEPS + 1, EVERY)
readings = exact[observed, 0] + 0.2 * np.random.default_rng(1).standard_normal(len(observed))


# %%
def value_and_gradient(start):
    """J and its gradient, the same on every rank."""
    states = solve(WINDOW, start)[1]
    slopes = np.zeros_like(states)  # j_n'(u_n)
    slopes[observed, 0] = states[observed, 0] - readings
    levels = [Backward(LorenzWithDerivative(DT), states), Backward(LorenzWithDerivative(M * DT), states[::M])]
    solver = pf.MGRIT(levels, STEPS, options=lorenz, comm=back, bounds=ends, linear=True)
    W = np.empty((solver.local_rows, 3))
    W[0] = slopes[STEPS]
    solver.solve(W, slopes[STEPS - 1 - own], rtol=1e-9)
    return 0.5 * (slopes**2).sum(), comm.bcast(W[-1].copy(), root=0)  # point 0 is the first rank's


# %%
# Never trust a gradient that you have not compared with differences of ``J`` (:doc:`/howto/taylor-test`). The error of
# a central difference falls with the square of its width, until round-off (and here the tolerance of the solves) takes
# over.
guess = START + np.array([1.0, -1.0, 2.0])
value, gradient = value_and_gradient(guess)
direction, width = np.array([0.6, -0.5, 0.4]), 1e-4
plus, minus = (value_and_gradient(guess + sign * width * direction)[0] for sign in (1, -1))
difference = (plus - minus) / (2 * width)
if comm.rank == 0:
    print(f"derivative {gradient @ direction:.6f}, central difference {difference:.6f}")
assert abs(difference / (gradient @ direction) - 1) < 1e-4

# %%
# Now any optimiser does. All ranks have the same value and gradient, so each of them can call scipy by itself.
found = minimize(value_and_gradient, guess, jac=True, method="L-BFGS-B")
curves = [solve(WINDOW, initial)[1][:, 0] for initial in (guess, found.x)]  # collective: outside of the next `if`
if comm.rank == 0:
    print(f"{found.nit} iterations, {found.nfev} evaluations: J {value:.2f} -> {found.fun:.3f}")
    print("first guess", guess, "found", found.x.round(2), "true", START)
assert found.success
assert found.fun < 1.0
assert np.linalg.norm(found.x - START) < 0.5 * np.linalg.norm(guess - START)

# %%
if comm.rank == 0:
    fig, ax = plt.subplots(figsize=(7, 3.2), layout="constrained")
    for curve, name, colour, style in zip(curves, ("first guess", "found"), (ORANGE, BLUE), ("--", "-"), strict=True):
        ax.plot(np.arange(STEPS + 1) * DT, curve, style, color=colour, label=name)
    ax.plot(observed * DT, readings, "o", color=BLACK, ms=4, label="readings")
    ax.set(xlabel="time $t$", ylabel="$x$", title="Lorenz: initial value from 16 readings of $x$")
    ax.legend()
    plt.show()

# %%
# **What could go wrong.** Over a longer window ``J`` has many local minima and a gradient of size
# :math:`e^{0.9\,t}`: a correct gradient of a function that nobody can minimise. Forecasters take short windows for this
# reason, too.
#
# 6. What to change next
# ----------------------
#
# * **Your own step.** Replace ``Heat`` or ``Lorenz`` by a class of yours; first ``check``, then solve with
#   ``"monitor": True`` (:doc:`/howto/monitor`).
# * **More levels.** ``[Heat(h), Heat(8 * h), Heat(32 * h)]`` with ``"coarsening": (8, 4)``: the sequential part becomes
#   1/32 of the steps.
# * **Less memory.** ``"storage": "C"`` keeps every m-th state only: :doc:`/howto/memory`.
# * **You have code for another library of this kind.** :doc:`/howto/from-xbraid-pymgrit`.
# * **States of torch tensors.** Give ``U`` as a tensor, and the propagators get tensors, on a GPU as well;
#   :doc:`08_network` uses this.
# * **Finite elements.** For a problem in UFL none of this has to be written: :doc:`01_heat_source`.

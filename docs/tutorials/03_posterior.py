r"""
A posterior, and where to put sensors
=====================================

Something is discharged at the bottom of a lake, 2 km long and 1 km wide, at an unknown place and a constant rate
:math:`q(x)` in mg/(l h). Six stations measure its concentration :math:`u` in mg/l for a day, with noise. We ask not only
for the most probable discharge, but how certain it is, how strongly to regularise, and where a further station should
be. All of it follows from one matrix.

The concentration is carried by the flow :math:`w`, spreads and decays:

.. math::

   \partial_t u + w \cdot \nabla u - D \Delta u + \lambda u = q, \qquad u = 0 \text{ at } t = 0 \text{ and where water
   flows in.}

It is *linear* in :math:`q`, with *constant operators*, and the readings are finitely many numbers. Where this is so,
the readings are :math:`d = F q + \eta` with a matrix :math:`F`, and with Gaussian noise :math:`\eta \sim N(0, \sigma^2
I)` and a Gaussian prior with covariance :math:`\Gamma / \alpha` the posterior is Gaussian, too:

.. math::

   \bar q = \operatorname{arg\,min} \frac{|F q - d|^2}{2 \sigma^2} + \frac{\alpha}{2} |q|^2_{\Gamma^{-1}}, \qquad
   \operatorname{Cov} = \Big(\frac{F^T F}{\sigma^2} + \alpha\, \Gamma^{-1}\Big)^{-1} .
"""

# sphinx_gallery_thumbnail_number = 2

# %%
# The evolution
# -------------
# Lengths in km, times in h. The water flows along the lake, fastest in the middle.

import matplotlib.pyplot as plt
import numpy as np
from firedrake import *
from irksome import Dt

import pint_fem as pf

st = pf.SpaceTime()
final_time = 24.0  # h
diffusion, decay, speed = 5e-3, 0.02, 0.08  # km2/h, 1/h, km/h


def lake(cells, steps):
    """The evolution of the concentration with the discharge as control."""
    V = FunctionSpace(st.mesh(RectangleMesh, 2 * cells, cells, 2.0, 1.0), "CG", 1)
    u, q, v, y = Function(V), Function(V, name="discharge"), TestFunction(V), SpatialCoordinate(V.mesh())[1]
    flow = as_vector((4 * speed * y * (1 - y), 0))
    F = (Dt(u) + inner(flow, grad(u)) + decay * u - q) * v * dx + diffusion * inner(grad(u), grad(v)) * dx
    inflow = DirichletBC(V, 0, 1)
    return pf.Evolution(F, u, tableau=pf.SDIRK2(), dt=final_time / steps, nsteps=steps, control=q, bcs=inflow)


# %%
# Readings
# --------
# As in :doc:`01_heat_source`, a finer discretisation makes the readings: every hour, with a noise of 0.004 mg/l.

stations = [[0.5, 0.25], [0.5, 0.75], [1.1, 0.3], [1.1, 0.7], [1.7, 0.25], [1.7, 0.75]]  # km
times, noise = np.arange(1.0, 25.0), 0.004  # h, mg/l


def true_discharge(V):
    """Two places, with at most 0.10 and 0.06 mg/(l h)."""
    x, y = SpatialCoordinate(V.mesh())
    place = lambda a, b, radius: exp(-((x - a) ** 2 + (y - b) ** 2) / radius**2)
    return Function(V, name="truth").interpolate(0.10 * place(0.75, 0.6, 0.18) + 0.06 * place(1.35, 0.3, 0.15))


# %%
# ``J.readings`` returns what the stations would read for a discharge; the values given here do not matter.

fine, nothing = lake(30, 192), pf.PointSensors(stations, times, np.zeros((len(times), len(stations))))
simulated = pf.TimeParallelReducedFunctional(fine, nothing, spacetime=st)
exact = simulated.readings(nothing, true_discharge(fine.V))
readings = exact + noise * np.random.default_rng(seed=4).standard_normal(exact.shape)
if st.is_root:
    print(f"{readings.size} readings up to {readings.max():.2f} mg/l, noise {noise} mg/l")

# %%
# The map
# -------
# Responses of a system with constant operators depend on the lag of time only, so that one adjoint sweep per *sensor*
# gives the rows of all its readings: six sweeps make this matrix, not 144. ``F`` is a linear operator of scipy, divided
# among the ranks in time; no further sweep is needed for anything below.
#
# *What could go wrong:* where an operator depends on time, on the state or on the control, there is no such map, and an
# :class:`~pint_fem.InputError` names what to use instead: the trust region of :doc:`02_coefficient`.

evolution = lake(20, 96)
V, q = evolution.V, evolution.controls[0]
J = pf.TimeParallelReducedFunctional(evolution, pf.PointSensors(stations, times, readings), spacetime=st)
F = J.parameter_to_observable()
truth = true_discharge(V)
mismatch = np.abs(F.predict(truth) - exact.ravel()).max()
if st.is_root:
    print(f"readings and controls: {F.shape}; largest error of the discretisation {mismatch:.4f} mg/l")
assert mismatch < noise  # otherwise refine: an error of the model is no noise

# %%
# The prior
# ---------
# A prior states what is plausible before there are readings. :class:`~pint_fem.BilaplacianPrior` has two coefficients;
# in the plane they follow from the standard deviation :math:`s` and the correlation length :math:`\rho` of the field:
# :math:`\delta = \sqrt{2/\pi} / (s \rho)`, :math:`\gamma = \rho^2 \delta / 8`. We expect rates of some 0.04 mg/(l h) and
# patches of some 0.4 km. ``robin`` keeps the deviation near the shore close to that inside.

deviation, correlation = 0.04, 0.4  # mg/(l h), km
delta = np.sqrt(2 / np.pi) / (deviation * correlation)
prior = pf.BilaplacianPrior(gamma=correlation**2 * delta / 8, delta=delta, robin=True)

# %%
# The posterior
# -------------
# ``posterior.mean`` and ``posterior.standard_deviation()`` are Firedrake functions. ``degrees_of_freedom`` is the number
# of combinations of the discharge that the readings determine: of 144 readings and 861 unknowns fewer than twenty. All
# else comes from the prior, and the standard deviation shows where.

posterior = F.posterior(prior=prior, noise=noise)
mean, std = posterior.mean, posterior.standard_deviation()
inside = np.mean(np.abs(truth.dat.data_ro - mean.dat.data_ro) < 2 * std.dat.data_ro)
if st.is_root:
    print(f"{posterior.degrees_of_freedom():.1f} combinations determined; squared residual {posterior.misfit():.0f}")
    print(f"the truth is within two standard deviations at {100 * inside:.0f}% of the nodes")
assert 10 < posterior.degrees_of_freedom() < 20
assert 0.75 < posterior.misfit() / readings.size < 1.1
assert inside > 0.9

# %%
# *Expect* the squared residual to be about the number of readings less the combinations determined, and the truth within
# two standard deviations nearly everywhere. Where readings and prior are as assumed, both hold; a squared residual far
# above means that the model or the noise is not the one that you gave.
#
# Functionals have a mean and a deviation, too: the total discharge is known far better than its place.

total, true_total = posterior.functional(q * dx), assemble(truth * dx)
if st.is_root:
    print(f"total {total.mean:.4f} +- {total.standard_deviation:.4f}, truly {true_total:.4f} mg/(l h) km2")
assert abs(total.mean - true_total) < 2 * total.standard_deviation

# %%
# Pictures of the mean and of the standard deviation
# --------------------------------------------------
# Near the stations and upstream of them the deviation is small. Behind the last stations, near the right end, it is that
# of the prior: nothing that is discharged there passes a station.

from firedrake.pyplot import tripcolor


def draw(ax, f, title, **options):
    """Colours of a field with the stations as dots."""
    shown = tripcolor(f, axes=ax, **options)
    ax.plot(*np.transpose(stations), "o", color="white", mec="black", ms=5)
    ax.set(title=title, xlabel="x in km", ylabel="y in km", aspect="equal")
    return shown


# %%
# The colour scale of the rates has zero in its middle, as the mean of a Gaussian may be negative. For discharges alone
# ``F.minimize(bounds=(0, None))`` finds the most probable one that is not, by products with the same matrix.

if st.is_root:
    figure, axes = plt.subplots(3, 1, figsize=(6, 8.5), layout="constrained", sharex=True)
    rates = {"cmap": "PuOr_r", "vmin": -0.1, "vmax": 0.1}
    draw(axes[0], truth, "True discharge", **rates)
    shown = draw(axes[1], mean, "Posterior mean", **rates)
    figure.colorbar(shown, ax=axes[:2], label="discharge in mg/(l h)")
    shown = draw(axes[2], std, "Posterior standard deviation", cmap="cividis", vmin=0)
    figure.colorbar(shown, ax=axes[2], label="deviation in mg/(l h)")

# %%
# The weight of the regularisation
# --------------------------------
# :math:`\alpha` multiplies the prior's precision, so that 1 is the prior as stated and :math:`\alpha = 4` one of half the
# standard deviation. ``posterior.choose`` finds it from the readings: *evidence* makes the readings most probable;
# *discrepancy* lets the squared residual be the number of readings; the *L-curve* is the corner of size over misfit;
# *gcv* needs no knowledge of the noise. Each takes milliseconds, as the spectrum of the problem is known.

methods = ("evidence", "discrepancy", "l-curve", "gcv")
chosen = {method: posterior.choose(method) for method in methods}
errors = {method: errornorm(truth, other.mean) / norm(truth) for method, other in chosen.items()}
if st.is_root:
    for method, other in chosen.items():
        print(f"{method:12} alpha = {other.alpha:6.2f}, relative error of the mean {100 * errors[method]:.0f}%")
assert 1 < chosen["evidence"].alpha < 20
assert max(errors.values()) < 0.7

# %%
# They agree within a factor of 20, and the error of the mean hardly depends on it. *Evidence* and *gcv* are good first
# choices. The discrepancy principle regularises too much: it does not count that a fit also explains part of the noise.
# The curve shows why the corner is not sharp here: the misfit changes little over four decades.

curve = posterior.curve(np.geomspace(1e-3, 1e4, 200))
if st.is_root:
    figure, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    ax.loglog(curve.misfit, curve.size, color="0.4")
    for (method, other), marker in zip(chosen.items(), "osD^", strict=True):
        ax.loglog(other.misfit(), other.size(), marker, ms=8, label=f"{method}, α = {other.alpha:.3g}")
    ax.loglog(posterior.misfit(), posterior.size(), "k*", ms=12, label="the prior as stated, α = 1")
    ax.set(title="L-curve", xlabel="squared residual, in variances of the noise", ylabel="squared size, in the prior")
    ax.legend()

# %%
# Samples
# -------
# A mean is smoother than any discharge that the posterior holds for plausible. Samples show what varies: they agree
# where the stations see, and differ elsewhere. The same seed gives the same samples on any number of ranks in time.

samples = posterior.samples(3, seed=1)
if st.is_root:
    figure, axes = plt.subplots(3, 1, figsize=(6, 8.5), layout="constrained", sharex=True)
    for number, (ax, sample) in enumerate(zip(axes, samples, strict=True)):
        shown = draw(ax, sample, f"Sample {number + 1} of the posterior", **rates)
    figure.colorbar(shown, ax=axes, label="discharge in mg/(l h)", extend="both")

# %%
# Where sensors should be
# -----------------------
# The standard deviation does not depend on the values of the readings, so that places of sensors can be compared before
# there are any. A second map has the six stations and 18 candidates. ``choose_sensors`` adds one after another, here so
# that the variance integrated over the lake (``"A"``, in L2) becomes least; ``"D"`` maximises the information instead.

candidates = [[x, y] for x in (0.35, 0.65, 0.95, 1.25, 1.55, 1.85) for y in (0.2, 0.5, 0.8)]  # km
places = stations + candidates
everywhere = pf.PointSensors(places, times, np.zeros((len(times), len(places))))
G = pf.TimeParallelReducedFunctional(evolution, everywhere, spacetime=st).parameter_to_observable()
choice = G.choose_sensors(6, "A", prior=prior, noise=noise, inner_product="L2")

# %%
# The criterion as a number with a meaning: the root of the variance's mean over the lake.

area = 2.0  # km2
typical = lambda value: np.sqrt(value / area)  # mg/(l h)
now = choice.value(range(len(stations)))
if st.is_root:
    print(f"typical deviation: without sensors {typical(choice.values[0]):.4f}, with the stations {typical(now):.4f}")
    print(f"with the best six of all places {typical(choice.values[-1]):.4f} mg/(l h)")
assert choice.values[-1] < now < choice.values[0]

# %%
# What a further sensor would bring
# ---------------------------------
# ``choice.value`` is the criterion of any set of sensors: that of the stations and one candidate, for each candidate.
# A further station is worth most where it sees what no other one sees.

gains = [now - choice.value([*range(len(stations)), len(stations) + c]) for c in range(len(candidates))]
best = int(np.argmax(gains))
after = typical(now - gains[best])
if st.is_root:
    print(f"best further station at {candidates[best]} km: typical deviation {typical(now):.4f} -> {after:.4f} mg/(l h)")
assert min(gains) > 0
assert max(gains) > 2 * min(gains)

# %%
# The picture has the candidates with areas in proportion to what they would bring, over the present deviation.

if st.is_root:
    figure, ax = plt.subplots(figsize=(7, 4), layout="constrained")
    shown = draw(ax, std, "What a further station would bring", cmap="cividis", vmin=0)
    ax.scatter(*np.transpose(candidates), s=300 * np.array(gains) / max(gains), color="C1", edgecolor="black")
    ax.plot(*candidates[best], "k+", ms=10)
    figure.colorbar(shown, label="present deviation in mg/(l h)", shrink=0.8)
    plt.show()

# %%
# What to change next
# -------------------
# * Readings as they come in, ``posterior.stream()``, and other readings of the same stations,
#   ``posterior.with_data(readings)``, take milliseconds.
# * Noise that differs between stations or is correlated: ``noise=`` takes deviations and covariances
#   (:doc:`/howto/data-and-noise`).
# * Discharges that are not negative: :doc:`/howto/bounds`. A known total: :doc:`/howto/constraints`.
# * Maps that do not fit the memory, ``rows="file"``: :doc:`/howto/memory`; a map for another day, ``F.save``.
# * You know the vocabulary of hIPPYlib: :doc:`/howto/from-hippylib`.
# * ``mpiexec -n 2`` divides the sensors among the ranks; more in :doc:`/howto/process-grid`.

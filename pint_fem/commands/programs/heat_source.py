"""Recover the heat source of a plate, with its standard deviation, from 16 sensors that read the temperature 8 times.

    python heat_source.py                    (mpiexec -n 2 python heat_source.py: two ranks share the work)

Readings are made here, by the same model from a known source with 1% noise, so that the answer can be compared with the
truth. For readings of your own replace ``readings``, an array (times, sensors), and delete what uses ``truth``.
"""

from pathlib import Path

import numpy as np
from firedrake import *
from irksome import Dt

import pint_fem as pf

# the process grid, all ranks in time, and the mesh on it
st = pf.SpaceTime()
mesh = st.mesh(UnitSquareMesh, 24, 24)
V = FunctionSpace(mesh, "CG", 1)
x, y = SpatialCoordinate(mesh)

# the evolution in UFL: the heat equation with the source q, cold edges, from t = 0 to 0.5
u, v, q = Function(V), TestFunction(V), Function(V, name="source")
F = Dt(u) * v * dx + inner(grad(u), grad(v)) * dx - q * v * dx
cold = DirichletBC(V, 0, "on_boundary")
heat = pf.Evolution(F, u, tableau=pf.SDIRK2(), dt=1 / 128, nsteps=64, control=q, bcs=cold)

# what is observed, and the prior: its precision is the second derivative of the regularisation
points = [[a, b] for a in (0.2, 0.4, 0.6, 0.8) for b in (0.2, 0.4, 0.6, 0.8)]
times = np.arange(1, 9) / 16
sensors = pf.PointSensors(points, times, np.zeros((8, 16)))
smooth = (1e-3 * inner(grad(q), grad(q)) + 1e-2 * q**2) / 2 * dx
J = pf.TimeParallelReducedFunctional(heat, sensors, regularisation=smooth, spacetime=st)

# the map from sources to readings, one adjoint sweep per sensor; readings of a known source; the posterior
A = J.parameter_to_observable()
truth = Function(V).interpolate(10 * exp(-60 * ((x - 0.35) ** 2 + (y - 0.6) ** 2)))
exact = A.predict(truth)
noise = 0.01 * np.abs(exact).max()
readings = exact + noise * np.random.default_rng(seed=1).standard_normal(exact.shape)
posterior = A.posterior(noise=noise).with_data(readings).choose("evidence")
source, deviation = posterior.mean, posterior.standard_deviation()

error = errornorm(truth, source) / norm(truth)
within = np.mean(np.abs(truth.dat.data_ro - source.dat.data_ro) <= 2 * deviation.dat.data_ro)
if st.is_root:
    print(f"{V.dim()} unknowns in space, {heat.nsteps} steps, {exact.size} readings")
    print(f"relative L2 error of the recovered source {error:.3f}")
    print(f"the true source is within two standard deviations at {100 * within:.0f}% of the nodes")

    try:
        import matplotlib as mpl
    except ImportError:
        print("no picture: pip install 'pint_fem[plots]'")
    else:
        mpl.use("Agg")
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(1, 3, figsize=(12, 4), layout="constrained")
        both = np.concatenate([truth.dat.data_ro, source.dat.data_ro])
        shown = {"true source": truth, "recovered source": source, "standard deviation": deviation}
        for axis, (name, f) in zip(axes, shown.items(), strict=True):
            limits = {} if f is deviation else {"vmin": both.min(), "vmax": both.max()}
            colours = tripcolor(f, axes=axis, cmap="viridis", **limits)
            axis.plot(*np.transpose(points), "o", color="white", markeredgecolor="black", markersize=4)
            axis.set(title=name, xlabel="x", aspect="equal")
            figure.colorbar(colours, ax=axis)
        axes[0].set_ylabel("y")
        figure.savefig(Path(__file__).with_name("heat_source.png"), dpi=120)

"""A heat problem with every kind of control that the map to readings has, some with one value per step."""

import numpy as np
from firedrake import (
    DirichletBC,
    Function,
    FunctionSpace,
    SpatialCoordinate,
    TestFunction,
    cos,
    dot,
    dx,
    grad,
    sin,
)
from irksome import Dt

import pint_fem as pf
from tests.heat import TABLEAUX
from tests.meshes import square

KINDS = ("source", "strength", "amplitude", "wall", "initial")
STEPWISE = ("strength", "amplitude", "wall")
POINTS = np.array([[0.3, 0.3], [0.7, 0.6], [0.45, 0.8]])


def functional(
    st, wanted=KINDS, *, n=4, steps=8, dt=0.02, tableau="SDIRK2", weight=50.0, homogeneous=False, terms=True
):
    """Readings of three sensors between the steps and at different times for two groups, some of them missing."""
    mesh = square(n, st.space_comm)
    V, D, R = FunctionSpace(mesh, "CG", 1), FunctionSpace(mesh, "DG", 0), FunctionSpace(mesh, "R", 0)
    x, y = SpatialCoordinate(mesh)
    u, v, t = Function(V), TestFunction(V), pf.time_function(mesh)
    f = {
        "source": Function(V, name="source"),
        "strength": Function(D, name="strength"),
        "amplitude": Function(R, name="amplitude"),
        "wall": Function(V, name="wall"),
        "initial": Function(V, name="initial").interpolate(x * y * (1 - x)),
    }
    load = f["source"] * cos(3 * t) + f["strength"] * (1 + x) + f["amplitude"] * (x * sin(7 * t) + y)
    if not homogeneous:
        load += sin(5 * t) * x
    form = Dt(u) * v * dx + dot(grad(u), grad(v)) * dx - load * v * dx
    bcs = [DirichletBC(V, f["wall"] if homogeneous else f["wall"] + y, 1), DirichletBC(V, 0, 2)]
    ev = pf.Evolution(
        form, u, tableau=TABLEAUX[tableau](), dt=dt, nsteps=steps, control=[f[name] for name in wanted],
        per_step=[f[name] for name in STEPWISE if name in wanted], t=t, bcs=bcs, initial=f["initial"],
    )  # fmt: skip
    times = dt * np.concatenate([[0.0, 0.4], np.arange(1, steps - 1) - 0.3, [steps - 1]])
    data = np.ma.masked_array(np.cos(np.arange(3 * len(times))).reshape(-1, 3), mask=False)
    data[1, 0] = data[4, 2] = np.ma.masked
    misfits = [
        pf.PointSensors(POINTS, times, data, weight=weight),
        pf.PointSensors(POINTS[:1] + 0.1, times[2::2], data[2::2, :1], weight=weight),
    ]
    static = sum(0.5 * (i + 2) * c**2 * dx for i, c in enumerate(c for c in ev.controls if c not in ev.stepwise))
    stepwise = [0.5 * (i + 1) * (c**2 + (0.1 * dot(grad(c), grad(c)) if c is f["wall"] else 0)) * dx
                for i, c in enumerate(ev.stepwise)]  # fmt: skip
    regularisation = [*([static] if static else []), *stepwise] if terms else []
    return pf.TimeParallelReducedFunctional(
        ev, misfits, regularisation=regularisation, spacetime=st, solver_parameters={"time_solver": "serial"}
    )


def vectors(J, count, seed=0):
    """Parameter vectors that do not depend on the number of ranks in time, ``(count, layout.size)``."""
    layout, out = J.layout, np.empty((count, J.layout.size))
    for i, control in enumerate(layout.evolution.controls):
        stepwise = control in layout.evolution.stepwise
        part = layout.part(out, control)
        steps = range(layout.slab.lo, layout.slab.hi) if stepwise else [-1]
        rank = layout.spacetime.space_comm.rank
        for row, n in enumerate(steps):
            drawn = np.random.default_rng((seed, i, n + 1, rank)).standard_normal((count, part.shape[-1]))
            if stepwise:
                part[:, row] = drawn
            else:
                part[...] = drawn
    return out


def swept(J, z):
    """The readings by a sweep, ``(m,)``, in the order of the map."""
    found = []
    for misfit in J.problem.misfits:
        observed = J.problem.observations(z, misfit)
        found.append(misfit.readings(observed)[misfit.present])
    return np.concatenate(found)

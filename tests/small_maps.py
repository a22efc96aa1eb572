"""A small linear inverse problem with two kinds of controls, and its readings by a sweep of the state."""

import numpy as np
from firedrake import (
    Constant,
    DirichletBC,
    Function,
    FunctionSpace,
    SpatialCoordinate,
    TestFunction,
    cos,
    dx,
    grad,
    inner,
)
from irksome import Dt

import pint_fem as pf
from tests.meshes import square

STEPS, DT = 8, 0.02
POINTS = np.array([[0.3, 0.3], [0.7, 0.6], [0.45, 0.8], [0.2, 0.55]])
TIMES = DT * np.array([0.5, 2.0, 4.3, 7.0, 8.0])
DATA = 0.1 * np.random.default_rng(1).standard_normal((len(TIMES), len(POINTS)))
SERIAL = {"time_solver": "serial"}


def posed(
    st,
    *,
    conductivity=1.0,
    control=None,
    initial=None,
    points=POINTS,
    times=TIMES,
    data=DATA,
    weight=400.0,
    steps=STEPS,
    tableau=pf.SDIRK2,
    solver=SERIAL,
    n=4,
    regularise=True,
):
    """Heat with a source ``q cos(5 t) + q`` and an unknown initial condition, read at points at times between steps.

    ``control`` and ``initial`` are functions to be shared with another problem, or an expression of ``control``.
    """
    mesh = square(n, st.space_comm)
    V = FunctionSpace(mesh, "CG", 1) if control is None else control.function_space()
    u, v, t = Function(V), TestFunction(V), pf.time_function(mesh)
    q = Function(V, name="source") if control is None else control
    start = Function(V, name="start") if initial is None else initial
    x, y = SpatialCoordinate(mesh)
    kappa = Constant(conductivity)
    F = Dt(u) * v * dx + kappa * inner(grad(u), grad(v)) * dx - (q * cos(5 * t) + q + x * y) * v * dx
    controls = [q, start] if isinstance(start, Function) else q
    ev = pf.Evolution(
        F, u, tableau=tableau(), dt=DT, nsteps=steps, control=controls, t=t, bcs=DirichletBC(V, y, 1), initial=start
    )
    sensors = pf.PointSensors(points, times, data[: len(times), : len(points)], weight=weight)
    forms = [f**2 * dx + 0.1 * inner(grad(f), grad(f)) * dx for f in (controls if isinstance(controls, list) else [q])]
    J = pf.TimeParallelReducedFunctional(
        ev, sensors, regularisation=forms if regularise else (), spacetime=st, solver_parameters=solver
    )
    J.conductivity, J.sensors = kappa, sensors
    return J


def a_control(layout, seed=3):
    """A control vector that depends on the numbering of the unknowns on the ranks in space only."""
    z = np.zeros(layout.size)
    for number, control in enumerate(layout.evolution.controls):
        first, _ = control.function_space().dof_dset.layout_vec.getOwnershipRange()
        part = layout.part(z, control)
        part[...] = np.cos(seed + number + 0.7 * (first + np.arange(part.shape[-1])))
    return z


def swept(J, z):
    """The readings at a control by a sweep of the state."""
    misfit = J.problem.misfits[0]
    return misfit.readings(J.problem.observations(z, misfit)).ravel()

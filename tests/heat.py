"""A heat problem with every kind of term, a control and a direction: what several test files differentiate."""

import numpy as np
from firedrake import (
    Constant,
    DirichletBC,
    Function,
    FunctionSpace,
    SpatialCoordinate,
    TestFunction,
    cos,
    dot,
    ds,
    dx,
    grad,
    sin,
)
from irksome import Dt

import pint_fem as pf

TABLEAUX = {"BE": pf.BackwardEuler, "midpoint": pf.ImplicitMidpoint, "SDIRK2": pf.SDIRK2}


def heat(mesh, *, linear=True, per_step=False, steps=16, dt=4e-3, tableau="SDIRK2"):
    """Time-dependent boundary values on one side, a Neumann and a Robin side; source and initial value."""
    V = FunctionSpace(mesh, "CG", 1)
    u, v, q, t = Function(V), TestFunction(V), Function(V), pf.time_function(mesh)
    x, y = SpatialCoordinate(mesh)
    kappa = 1 if linear else 1 + u**2 + 0.3 * q**2
    source = q if linear else q * (1 + u)
    F = Dt(u) * v * dx + kappa * dot(grad(u), grad(v)) * dx + u * v * ds(3) - (source + sin(5 * t) * x) * v * dx
    u.interpolate(x * y)
    q.interpolate(1 + x)
    bcs = [DirichletBC(V, y * cos(t), 1)]
    return pf.Evolution(
        F, u, tableau=TABLEAUX[tableau](), dt=dt, nsteps=steps, control=q, per_step=per_step, t=t, bcs=bcs
    )


def point_and_direction(rf):
    """A control and a direction that do not depend on the grid."""
    x, y = SpatialCoordinate(rf.evolution.V.mesh())
    pair = []
    # constants, as each number in an expression would be a kernel of its own
    for expression in (lambda n: 1 + x * Constant(np.cos(n)), lambda n: 3 * cos(3 * x * y + Constant(0.1 * n))):
        f = rf.function(rf.array(rf.controls[0].control))
        parts = f.subfunctions if rf.evolution.per_step else [f]
        for i, part in enumerate(parts):
            part.interpolate(expression(rf.problem.sweeps.slab.lo + i if rf.evolution.per_step else 0))
        pair.append(f)
    return pair

"""Maxwell problems that several test files share."""

import numpy as np
from firedrake import Function, SpatialCoordinate, UnitCubeMesh, UnitSquareMesh, as_vector, cos, curl, pi, sin

import pint_fem as pf
from problems.maxwell import B, E, Medium, Walls, perfect_conductor, residual, state_space

SERIAL = {"distribution_parameters": {"partitioner_type": "simple"}}


def box(dim, n, **kwargs):
    """A mesh of the unit square or cube."""
    return UnitSquareMesh(n, n, **SERIAL, **kwargs) if dim == 2 else UnitCubeMesh(n, n, n, **SERIAL, **kwargs)


def mode(dim, x, t):
    """``(E, B)`` of a cavity mode in vacuum at time ``t``, and its frequency."""
    if dim == 2:
        w = pi * 5**0.5
        shape = cos(pi * x[0]) * cos(2 * pi * x[1])
        electric = as_vector((-2 * pi * cos(pi * x[0]) * sin(2 * pi * x[1]), pi * sin(pi * x[0]) * cos(2 * pi * x[1])))
        return float(np.sin(w * t) / w) * electric, float(np.cos(w * t)) * shape, w
    w = pi * 3**0.5
    waves = [[cos(pi * x[j]) if i == j else sin(pi * x[j]) for j in range(3)] for i in range(3)]
    electric = as_vector([a * f * g * h for a, (f, g, h) in zip((1, 1, -2), waves, strict=True)])
    return float(np.cos(w * t)) * electric, float(-np.sin(w * t) / w) * curl(electric), w


def cavity(dim, n, *, degree=1, tableau=None, dt=0.01, steps=16, regions=None, walls=None, eliminate=B, comm=None):
    """A cavity that starts in a mode; ``None`` regions: vacuum."""
    mesh = box(dim, n, **({"comm": comm} if comm else {}))
    V, walls = state_space(mesh, degree), walls or Walls()
    u, medium = Function(V), Medium(mesh, *([regions] if regions else []))
    electric, magnetic, _ = mode(dim, SpatialCoordinate(mesh), 0.0)
    u.subfunctions[E].interpolate(electric)
    u.subfunctions[B].interpolate(magnetic)
    form = residual(u, medium, walls=walls)
    tableau = tableau or pf.ImplicitMidpoint()
    conditions = perfect_conductor(V, walls)
    evolution = pf.Evolution(form, u, tableau=tableau, dt=dt, nsteps=steps, bcs=conditions, eliminate=eliminate)
    return evolution, medium

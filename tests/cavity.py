"""An electromagnetic cavity without losses, driven by a current: waves that no time integrator here damps."""

from firedrake import (
    FiniteElement,
    Function,
    FunctionSpace,
    SpatialCoordinate,
    TestFunctions,
    as_vector,
    cos,
    dx,
    inner,
    pi,
    sin,
    split,
    triangle,
)
from irksome import Dt

import pint_fem as pf
from tests.meshes import square


def cavity(comm, *, n=6, steps=32, dt=None, tableau=None, t=None):
    """Transverse electric: ``E`` in N1curl, ``B`` in DG0, all units one; the control is the current's shape, its course
    is ``cos(2 t)`` with ``t`` and constant without. CFL number one by default."""
    mesh = square(n, comm)
    N = FunctionSpace(mesh, FiniteElement("N1curl", triangle, 1))
    V = N * FunctionSpace(mesh, "DG", 0)
    u, J = Function(V), Function(N)
    (E, B), (w, q) = split(u), TestFunctions(V)
    rot = lambda f: f[1].dx(0) - f[0].dx(1)
    time = pf.time_function(mesh) if t else None
    s = cos(2 * time) if t else 1
    F = inner(Dt(E), w) * dx + Dt(B) * q * dx - B * rot(w) * dx + rot(E) * q * dx - s * inner(J, w) * dx
    x, y = SpatialCoordinate(mesh)
    u.subfunctions[0].interpolate(as_vector([sin(pi * y), sin(2 * pi * x)]))
    u.subfunctions[1].interpolate(cos(pi * x) * cos(pi * y))
    J.interpolate(as_vector([y * (1 - x), sin(3 * x * y)]))
    return pf.Evolution(F, u, tableau=tableau or pf.ImplicitMidpoint(), dt=dt or 1 / n, nsteps=steps, control=J, t=time)

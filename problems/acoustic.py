r"""The first-order equations of acoustics below a free surface, for the pressure p and the velocity v.

.. math::
    \frac{1}{\rho c^2} (\partial_t p + \sigma p) + \nabla \cdot v &= f , \\
    \rho\, \partial_t v + \nabla p &= 0 ,

with the wave speed :math:`c(x)`, a constant density :math:`\rho` and a damping rate :math:`\sigma(x)` that is zero but
in an absorbing layer. p is continuous of degree k, and v is discontinuous of degree k - 1: the gradients of p lie in
the space of v, so that the second equation holds pointwise, and the mass matrix of v is block-diagonal. The divergence
is tested weakly,

.. math::
    \int \frac{1}{\rho c^2} (\partial_t p + \sigma p)\, w - v \cdot \nabla w \; dx
    + \int_{\text{walls}} \frac{1}{\rho c}\, p\, w \; ds = \int f\, w \; dx ,

so that the energy :math:`\frac12 \int p^2/(\rho c^2) + \rho |v|^2` changes by damping, walls and load only. An
*absorbing wall* has the impedance of a plane wave that leaves at right angles, :math:`n \cdot v = p/(\rho c)`; a *free
surface* has :math:`p = 0`; a boundary that is neither is rigid, :math:`n \cdot v = 0`.

Units: kilometres, seconds and kilometres per second; the density is 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import ufl
from firedrake import (
    DirichletBC,
    Function,
    FunctionSpace,
    TestFunctions,
    VectorFunctionSpace,
    ds,
    dx,
    grad,
    inner,
    split,
)
from irksome import Dt

from pint_fem.errors import InputError

__all__ = ["P", "V", "energy", "free_surface", "residual", "state_space"]

#: Numbers of the fields in the mixed state.
P, V = 0, 1
_SOURCE_DEGREE = 6
"""Polynomial degree of a source up to which its integrals are exact."""


def state_space(mesh, degree: int = 2):
    """The mixed space of (p, v).

    Raises
    ------
    InputError
        On a mesh that is not of triangles or tetrahedra, or a degree below 1.
    """
    if mesh.ufl_cell().cellname not in ("triangle", "tetrahedron"):
        raise InputError(f"acoustics on {mesh.ufl_cell()}: give a mesh of triangles or tetrahedra")
    if degree < 1:
        raise InputError(f"degree = {degree}: give at least 1")
    return FunctionSpace(mesh, "CG", degree) * VectorFunctionSpace(mesh, "DG", degree - 1)


def residual(u: Function, speed, *, source=None, damping=None, walls: Sequence[int] = ()) -> ufl.Form:
    r"""Semi-discrete residual, to be stepped by Irksome or by ``pint_fem``.

    Parameters
    ----------
    u
        State in :func:`state_space`.
    speed
        Wave speed c, in UFL; it may contain controls.
    source
        Load f of the first equation, in UFL; ``None`` for none.
    damping
        Rate :math:`\sigma`, in UFL; ``None`` for none.
    walls
        Numbers of the boundary's absorbing parts.

    Returns
    -------
    ufl.Form
        Linear in the test function; contains ``Dt(u)``.
    """
    pressure, velocity = split(u)
    w, r = TestFunctions(u.function_space())
    degree = u.function_space().sub(P).ufl_element().embedded_superdegree
    inside, wall = dx(degree=2 * degree + 1), ds(tuple(walls), degree=2 * degree + 1)
    rate = Dt(pressure) if damping is None else Dt(pressure) + damping * pressure
    form = rate * w / speed**2 * inside
    form += (inner(Dt(velocity) + grad(pressure), r) - inner(velocity, grad(w))) * inside
    if source is not None:
        form -= source * w * dx(degree=degree + _SOURCE_DEGREE)
    if len(walls):
        form += pressure * w / speed * wall
    return form


def free_surface(space, parts: Sequence[int]) -> list[DirichletBC]:
    """The conditions on parts of the boundary that are free: no pressure."""
    return [DirichletBC(space.sub(P), 0, tuple(parts))] if len(parts) else []


def energy(u: Function, speed) -> ufl.Form:
    """Energy of a state."""
    pressure, velocity = split(u)
    degree = u.function_space().sub(P).ufl_element().embedded_superdegree
    return 0.5 * (pressure**2 / speed**2 + inner(velocity, velocity)) * dx(degree=2 * degree + 1)

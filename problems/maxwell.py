r"""Maxwell's equations in a box with walls, for the fields E and B.

.. math::
    \epsilon\, \partial_t E + \sigma E &= \nabla \times (\mu^{-1} B) - J , \\
    \partial_t B &= -\nabla \times E ,

with :math:`\epsilon, \mu, \sigma` constant in each region. E is in N1curl of degree k. In space B is in RT of degree k,
in the plane (transverse electric: E in the plane, B across it) B is in DG of degree k - 1. Both hold the curls of
N1curl, so that the second equation holds pointwise: div B stays what it was, to the last digits.

Walls: *perfect conductors*, :math:`n \times E = 0`, or *impedance* walls, where a tangential field loses the power of a
plane wave that leaves at right angles (Silver and Mueller), :math:`n \times \mu^{-1} B = -Y E_t`, :math:`Y =
\sqrt{\epsilon/\mu}`; a wall that is neither is a perfect magnetic conductor.

Units: lengths in the box's side, times in what light takes for it in vacuum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import ufl
from firedrake import (
    DirichletBC,
    FacetNormal,
    Function,
    FunctionSpace,
    SpatialCoordinate,
    TestFunctions,
    as_vector,
    conditional,
    cross,
    curl,
    ds,
    dx,
    inner,
    split,
    sqrt,
)
from irksome import Dt

from pint_fem.errors import InputError

__all__ = [
    "VACUUM",
    "B",
    "E",
    "Medium",
    "Region",
    "Walls",
    "energy",
    "perfect_conductor",
    "residual",
    "state_space",
    "tangential",
]

#: Numbers of the fields in the mixed state.
E, B = 0, 1


@dataclass(frozen=True)
class Region:
    """A part of the box and what is in it.

    Attributes
    ----------
    name : str
    where : callable
        UFL condition of the coordinates, or ``None`` for all that later regions leave.
    epsilon, mu : float
        Permittivity and permeability relative to vacuum, positive.
    sigma : float
        Conductivity, not negative; fields in a conductor decay at the rate :math:`\\sigma/\\epsilon`.
    """

    name: str
    where: Callable | None = None
    epsilon: float = 1.0
    mu: float = 1.0
    sigma: float = 0.0

    def __post_init__(self):
        if not (self.epsilon > 0 and self.mu > 0 and self.sigma >= 0):
            raise InputError(
                f"region {self.name!r}: epsilon = {self.epsilon:g}, mu = {self.mu:g}, sigma = {self.sigma:g}; "
                "give positive epsilon and mu and a sigma of at least 0"
            )


VACUUM = (Region("vacuum"),)


@dataclass(frozen=True)
class Walls:
    """Numbers of the boundary's parts; those in neither are perfect magnetic conductors."""

    conductor: Sequence[int] | str = "on_boundary"
    impedance: Sequence[int] = ()


class Medium:
    """The regions' constants as functions that are constant in each cell.

    Parameters
    ----------
    mesh
        Region borders should be on its facets.
    regions
        Where they overlap, the last one counts.

    Attributes
    ----------
    epsilon, mu, sigma : Function
    admittance
        That of impedance walls, :math:`\\sqrt{\\epsilon/\\mu}`.
    """

    def __init__(self, mesh, regions: Sequence[Region] = VACUUM):
        x, cells = SpatialCoordinate(mesh), FunctionSpace(mesh, "DG", 0)
        for name in ("epsilon", "mu", "sigma"):
            value = ufl.as_ufl(float(getattr(regions[0], name)))
            for region in regions[1:]:
                value = conditional(region.where(x), float(getattr(region, name)), value)
            setattr(self, name, Function(cells, name=name).interpolate(value))
        self.admittance = sqrt(self.epsilon / self.mu)
        self.lossless = not any(region.sigma for region in regions)


def state_space(mesh, degree: int = 1):
    """The mixed space of (E, B).

    Raises
    ------
    InputError
        On a mesh that is neither of triangles nor of tetrahedra, or a degree below 1.
    """
    dim = mesh.geometric_dimension
    if mesh.ufl_cell().cellname not in ("triangle", "tetrahedron") or dim != mesh.topological_dimension:
        raise InputError(f"Maxwell on {mesh.ufl_cell()} in {dim} dimensions: give a mesh of triangles or tetrahedra")
    if degree < 1:
        raise InputError(f"degree = {degree}: give at least 1")
    magnetic = FunctionSpace(mesh, "DG", degree - 1) if dim == 2 else FunctionSpace(mesh, "RT", degree)
    return FunctionSpace(mesh, "N1curl", degree) * magnetic


def tangential(n, v):
    """``n x v``: a number in the plane, a vector in space."""
    return n[0] * v[1] - n[1] * v[0] if len(n) == 2 else cross(n, v)


def residual(u: Function, medium, *, current=None, walls: Walls | None = None, degree: int | None = None) -> ufl.Form:
    """Semi-discrete residual, to be stepped by Irksome or by ``pint_fem``.

    Parameters
    ----------
    u
        State in :func:`state_space`.
    medium
        :class:`Medium` on its mesh, or an object with the same attributes, whose ``epsilon`` and ``sigma`` may contain
        controls.
    current
        The impressed current J, a vector in UFL; ``None`` for none.
    walls
        Those of perfect conductors want :func:`perfect_conductor` besides.
    degree
        Quadrature degree of all but the load; default: as estimated.

    Returns
    -------
    ufl.Form
        Linear in the test function; contains ``Dt(u)``. Rows are weighted so that :math:`\\frac12 \\int \\epsilon E^2 +
        B^2/\\mu` is the energy.
    """
    electric, magnetic = split(u)
    v, c = TestFunctions(u.function_space())
    epsilon, mu, sigma = medium.epsilon, medium.mu, medium.sigma
    form = (
        inner(epsilon * Dt(electric) + sigma * electric, v)
        - inner(magnetic / mu, curl(v))
        + inner((Dt(magnetic) + curl(electric)) / mu, c)
    ) * dx(degree=degree)
    if current is not None:
        form += inner(current, v) * dx
    if walls is not None and len(walls.impedance):
        n = FacetNormal(u.function_space().mesh().unique())
        loss = medium.admittance * inner(tangential(n, electric), tangential(n, v))
        form += loss * ds(tuple(walls.impedance))
    return form


def perfect_conductor(space, walls: Walls) -> list[DirichletBC]:
    """The conditions on the perfectly conducting walls: no tangential E."""
    if not len(walls.conductor):
        return []
    zero = as_vector([0] * space.mesh().unique().geometric_dimension)
    return [DirichletBC(space.sub(E), zero, walls.conductor)]


def energy(u: Function, medium: Medium) -> ufl.Form:
    """Energy of a state."""
    electric, magnetic = split(u)
    return 0.5 * (medium.epsilon * inner(electric, electric) + inner(magnetic, magnetic) / medium.mu) * dx

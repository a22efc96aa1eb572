r"""Carry a drop of one phase through another: optimal control of a reaction-diffusion equation with two stable states.

.. math::
    \partial_t u - D \Delta u + u^3 - u = q, \qquad \partial_n u = 0 \text{ on the boundary,}

is the equation of Schlögl (Nagumo, Allen and Cahn). Its stable states are -1 and 1, with fronts of width
:math:`\sqrt{2 D}` in between. Without a control a drop of the phase 1 of radius r in the phase -1 shrinks,
:math:`r^2(t) = r_0^2 - 2 D t`, and vanishes. The target is the drop with its first radius and shape, which moves from
the left to the right:

.. math::
    J(q) = \tfrac12 \int_0^T \!\! \int (u - u_d)^2 \, dx\, dt + \tfrac12 \int (u(T) - u_d(T))^2 \, dx
    + \tfrac{\beta}{2} \int_0^T \!\! \int q^2 \, dx\, dt .

The control of fronts: Buchholz, Engel, Kammann and Tröltzsch, Comput. Optim. Appl. 56, 2013.
"""

from __future__ import annotations

from dataclasses import dataclass

from firedrake import (
    Function,
    FunctionSpace,
    SpatialCoordinate,
    UnitSquareMesh,
    dx,
    grad,
    inner,
    max_value,
    min_value,
    sqrt,
    tanh,
)

from pint_fem.spacetime import SpaceTime
from problems.control import Bounds, ControlForms, ControlProblem, checked_bounds, pose, require_positive

__all__ = ["ReactionControl", "reaction_control", "reaction_control_forms", "target"]

DIFFUSION = 4e-3
RADIUS = 0.2
START, END = (0.3, 0.4), (0.7, 0.6)
"""Places of the drop's centre in the beginning and in the end."""
FINAL_TIME = 4.0
_DEGREE = 4
"""Of the quadrature of the misfit: the target is no polynomial, and serial and parallel functionals are to be one."""


@dataclass(frozen=True)
class ReactionControl:
    """Settings of the problem.

    Attributes
    ----------
    cells : int
        Squares along a side.
    steps, integrator : int, str
        Time steps and a name of :func:`pint_fem.evolution.named_tableau`.
    regularisation : float
        The weight beta of the control's square.
    bounds : pair or None
        Lower and upper bound of the control.

    Raises
    ------
    InputError
        If a value is out of range.
    """

    cells: int = 24
    steps: int = 48
    integrator: str = "BackwardEuler"
    regularisation: float = 1e-2
    bounds: Bounds | None = None

    def __post_init__(self):
        require_positive(cells=self.cells, steps=self.steps, regularisation=self.regularisation)
        checked_bounds(self.bounds)


def target(x, t):
    """Return the state that is tracked: the drop rests in the first and the last quarter of the time.

    Parameters
    ----------
    x, t
        UFL coordinates and time.
    """
    moved = max_value(0.0, min_value(1.0, 2 * t / FINAL_TIME - 0.5))
    centre = [a + moved * (b - a) for a, b in zip(START, END, strict=True)]
    distance = sqrt((x[0] - centre[0]) ** 2 + (x[1] - centre[1]) ** 2 + 1e-12)
    return tanh((RADIUS - distance) / sqrt(2 * DIFFUSION))


def reaction_control_forms(settings: ReactionControl, spacetime: SpaceTime) -> ControlForms:
    """Return the forms of the problem on a mesh of a process grid."""
    mesh = spacetime.mesh(UnitSquareMesh, settings.cells, settings.cells)
    V, x, beta = FunctionSpace(mesh, "CG", 1), SpatialCoordinate(mesh), settings.regularisation
    square = lambda u, t: 0.5 * (u - target(x, t)) ** 2 * dx(degree=_DEGREE)
    return ControlForms(
        V=V,
        controls=(Function(V, name="control"),),
        mass=lambda rate, v: rate * v * dx,
        rest=lambda u, v, controls: (
            (DIFFUSION * inner(grad(u), grad(v)) - controls[0] * v) * dx + (u**3 - u) * v * dx(degree=_DEGREE)
        ),
        running=square,
        terminal=lambda u: square(u, FINAL_TIME),
        regularisation=lambda controls: 0.5 * beta * controls[0] ** 2 * dx,
        initial=target(x, 0.0),
        final_time=FINAL_TIME,
        linear=False,
        target=lambda t: target(x, t),
    )


def reaction_control(
    spacetime: SpaceTime, settings: ReactionControl = ReactionControl(), *, solver_parameters: dict | None = None
) -> ControlProblem:
    """Pose the problem on a process grid.

    Parameters
    ----------
    spacetime
        Process grid.
    settings
        Of the problem.
    solver_parameters
        Of :class:`~pint_fem.adjoint.TimeParallelReducedFunctional`.

    Raises
    ------
    InputError
        On every rank, on a bad value.
    """
    forms = reaction_control_forms(settings, spacetime)
    given = dict(steps=settings.steps, integrator=settings.integrator, bounds=settings.bounds)
    return pose(forms, spacetime, **given, solver_parameters=solver_parameters)

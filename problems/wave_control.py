r"""Bring a membrane to rest by a force: optimal control of the undamped wave equation.

The displacement u and the velocity w of a unit membrane that is clamped at its edges follow

.. math::
    \partial_t u = w, \qquad \partial_t w - \Delta u = \chi(x)\, q(x, t), \quad u(0) = u_0, \; w(0) = 0 ,

both in P1, by implicit midpoint steps, which keep the energy :math:`E = \frac12 \int |\nabla u|^2 + w^2` where the
force q is zero. The force acts on the whole membrane, or on a strip at its left edge; and

.. math::
    J(q) = \int_0^T E\, dt + \gamma E(T) + \frac{\beta}{2} \int_0^T \!\! \int q^2 \, dx\, dt .

With ``tracking="L2"`` the squares of displacement and velocity, :math:`\frac12 \int u^2 + w^2`, stand for E.
"""

from __future__ import annotations

from dataclasses import dataclass

from firedrake import (
    DirichletBC,
    Function,
    FunctionSpace,
    SpatialCoordinate,
    UnitSquareMesh,
    as_vector,
    conditional,
    dx,
    exp,
    grad,
    inner,
)

from pint_fem.errors import InputError
from pint_fem.spacetime import SpaceTime
from problems.control import Bounds, ControlForms, ControlProblem, checked_bounds, pose, require_positive

__all__ = ["REGIONS", "TRACKING", "WaveControl", "wave_control", "wave_control_forms"]

FINAL_TIME = 3.0
"""The period of the slowest vibration is sqrt(2)."""
REGIONS = ("all", "strip")
STRIP = 0.25
"""Width of the strip on which the force acts."""
TRACKING = ("energy", "L2")


@dataclass(frozen=True)
class WaveControl:
    """Settings of the problem.

    Attributes
    ----------
    cells : int
        Squares along a side; a multiple of 4 for the strip, which ends at edges of cells.
    steps, integrator : int, str
        Time steps and a name of :func:`pint_fem.evolution.named_tableau`.
    regularisation : float
        The weight beta of the force's square.
    bounds : pair or None
        Lower and upper bound of the force.
    region : {"all", "strip"}
        Where the force acts.
    tracking : {"energy", "L2"}
        What is to be small at all steps and at the end.
    terminal : float
        The weight gamma of the last state; zero for none.

    Raises
    ------
    InputError
        If a value is out of range.
    """

    cells: int = 24
    steps: int = 128
    integrator: str = "ImplicitMidpoint"
    regularisation: float = 0.5
    bounds: Bounds | None = None
    region: str = "all"
    tracking: str = "energy"
    terminal: float = 1.0

    def __post_init__(self):
        for value, known, name in ((self.region, REGIONS, "region"), (self.tracking, TRACKING, "tracking")):
            if value not in known:
                raise InputError(f"{name} {value!r}: give one of {', '.join(known)}")
        if self.region == "strip" and self.cells % 4:
            raise InputError(f"cells {self.cells}: give a multiple of 4, so that the strip ends at edges of cells")
        if not 0 <= self.terminal < float("inf"):
            raise InputError(f"weight of the last state {self.terminal}: give zero or a positive number")
        require_positive(cells=self.cells, steps=self.steps, regularisation=self.regularisation)
        checked_bounds(self.bounds)


def wave_control_forms(settings: WaveControl, spacetime: SpaceTime) -> ControlForms:
    """Return the forms of the problem on a mesh of a process grid."""
    mesh = spacetime.mesh(UnitSquareMesh, settings.cells, settings.cells)
    V, x = FunctionSpace(mesh, "CG", 1), SpatialCoordinate(mesh)
    W, beta = V * V, settings.regularisation
    acts = 1.0 if settings.region == "all" else conditional(x[0] < STRIP, 1.0, 0.0)

    def size(u):
        if settings.tracking == "energy":
            return 0.5 * (inner(grad(u[0]), grad(u[0])) + u[1] ** 2) * dx
        return 0.5 * (u[0] ** 2 + u[1] ** 2) * dx

    edge = 16 * x[0] * (1 - x[0]) * x[1] * (1 - x[1])  # zero at the edges, 1 in the middle
    bump = edge * exp(-((x[0] - 0.4) ** 2 + (x[1] - 0.6) ** 2) / (2 * 0.1**2))
    return ControlForms(
        V=W,
        controls=(Function(V, name="force"),),
        mass=lambda rate, v: (rate[0] * v[0] + rate[1] * v[1]) * dx,
        rest=lambda u, v, controls: (
            (inner(grad(u[0]), grad(v[1])) - u[1] * v[0]) * dx - acts * controls[0] * v[1] * dx(degree=2)
        ),
        running=lambda u, t: size(u),
        terminal=(lambda u: settings.terminal * size(u)) if settings.terminal else None,
        regularisation=lambda controls: 0.5 * beta * controls[0] ** 2 * dx,
        initial=as_vector((bump, 0 * x[0])),
        final_time=FINAL_TIME,
        shown=lambda u: u[0],
        bcs=tuple(DirichletBC(W.sub(i), 0, "on_boundary") for i in range(2)),
    )


def wave_control(
    spacetime: SpaceTime, settings: WaveControl = WaveControl(), *, solver_parameters: dict | None = None
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
    forms = wave_control_forms(settings, spacetime)
    given = dict(steps=settings.steps, integrator=settings.integrator, bounds=settings.bounds)
    return pose(forms, spacetime, **given, solver_parameters=solver_parameters)

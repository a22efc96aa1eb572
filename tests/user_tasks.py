"""Tasks in ten other physics as users pose them, and the plain Firedrake loop of each.

A task's residual is a function of the fields, their rates, the controls and the time, so that the evolution (rates by
Irksome's ``Dt``) and the loop (difference quotients of a Runge-Kutta stage) have the equations in common and nothing
else: the loop is written with ``firedrake.solve`` and its derivatives are those of a serial pyadjoint tape.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from firedrake import (
    DirichletBC,
    ExtrudedMesh,
    FacetNormal,
    Function,
    FunctionSpace,
    IcosahedralSphereMesh,
    Identity,
    MixedVectorSpaceBasis,
    PeriodicUnitSquareMesh,
    SpatialCoordinate,
    TestFunctions,
    UnitIntervalMesh,
    UnitSquareMesh,
    VectorFunctionSpace,
    VectorSpaceBasis,
    as_vector,
    assemble,
    cos,
    div,
    dot,
    dS,
    ds,
    ds_t,
    dx,
    exp,
    grad,
    inner,
    jump,
    pi,
    sin,
    solve,
    split,
    sym,
    tr,
)
from irksome import Dt

import pint_fem as pf

__all__ = ["TASKS", "Task", "loop", "pose"]

GAMMA = 1 - 2**-0.5
SCHEMES = {
    "BackwardEuler": (pf.BackwardEuler, [[1.0]], [1.0]),
    "ImplicitMidpoint": (pf.ImplicitMidpoint, [[0.5]], [1.0]),
    "SDIRK2": (pf.SDIRK2, [[GAMMA, 0.0], [1 - GAMMA, GAMMA]], [1 - GAMMA, GAMMA]),
}
NEWTON = {
    "snes_rtol": 1e-11,
    "snes_atol": 1e-13,
    "snes_linesearch_type": "basic",
    "ksp_type": "preonly",
    "pc_type": "lu",
    "pc_factor_mat_solver_type": "mumps",
    "mat_mumps_icntl_24": 1,
}


def partitioned(make: Callable, *args, comm, **options):
    """A mesh that is distributed in the same way in each group of ranks in space."""
    return make(*args, comm=comm, distribution_parameters={"partitioner_type": "simple"}, **options)


class Task(NamedTuple):
    """A task.

    Attributes
    ----------
    V
        The state's space.
    residual
        ``residual(fields, rates, controls, t)``, a 1-form.
    start
        Sets the values of a function of ``V`` to the initial ones.
    spaces, values, directions
        Of the controls: spaces, and expressions to take derivatives at and along.
    running, terminal
        Functionals of the fields and the time, or ``None``.
    regularisation
        Of the controls.
    scheme, dt, steps
        The integrator.
    conditions
        ``conditions(controls, t)``: pairs of a space and a value with a part of the boundary.
    initial
        Number of the control that is the initial condition, or ``None``.
    stepwise
        Whether the control has a value in each step.
    moving
        Whether the residual, the conditions or the functionals depend on time.
    nullspace
        Of the stages' systems.
    parameters
        Options of the functional.
    """

    V: object
    residual: Callable
    start: Callable
    spaces: list
    values: list
    directions: list
    regularisation: Callable
    running: Callable | None = None
    terminal: Callable | None = None
    scheme: str = "BackwardEuler"
    dt: float = 0.05
    steps: int = 4
    conditions: Callable = lambda controls, t: []
    initial: int | None = None
    stepwise: bool = False
    moving: bool = False
    nullspace: object = None
    parameters: dict = {"mgrit": {"rtol": 1e-12, "coarsening": (2,)}}  # noqa: RUF012


def fields(u) -> list:
    """The fields of a state, mixed or not."""
    return list(split(u)) if len(u.function_space()) > 1 else [u]


def pose(task: Task, spacetime: pf.SpaceTime, propagator=None, **more) -> pf.TimeParallelReducedFunctional:
    """The task as the README poses one; ``more`` arguments of the evolution."""
    mesh = task.V.mesh()
    u, controls = Function(task.V), [Function(space) for space in task.spaces]
    t = pf.time_function(mesh) if task.moving else None
    task.start(u)
    residual = task.residual(fields(u), [Dt(field) for field in fields(u)], controls, t)
    if task.initial is not None:
        more["initial"] = controls[task.initial]
    if task.nullspace is not None:
        more["nullspace"] = task.nullspace
    evolution = pf.Evolution(
        residual, u, tableau=SCHEMES[task.scheme][0](), dt=task.dt, nsteps=task.steps, control=controls, t=t,
        per_step=task.stepwise, bcs=[DirichletBC(*condition) for condition in task.conditions(controls, t)], **more,
    )  # fmt: skip
    misfits = []
    if task.running is not None:
        misfits.append(pf.RunningMisfit(task.running(fields(u), t)))
    if task.terminal is not None:
        misfits.append(pf.TerminalMisfit(task.terminal(fields(u), t)))
    return pf.TimeParallelReducedFunctional(
        evolution, misfits, regularisation=task.regularisation(controls), spacetime=spacetime,
        solver_parameters=task.parameters, **({} if propagator is None else {"propagator": propagator}),
    )  # fmt: skip


def loop(task: Task, controls: list) -> float:
    """``J`` by a loop over the steps; ``controls`` has a list of functions, one for each step, in the place of a
    control with a value in each step.
    """
    _, A, b = SCHEMES[task.scheme]
    V, dt = task.V, task.dt
    t = pf.time_function(V.mesh()) if task.moving else None
    u = Function(V)
    task.start(u)
    if task.initial is not None:
        u.assign(controls[task.initial])
    J = 0.0 if task.stepwise else assemble(task.regularisation(controls))
    for n in range(task.steps):
        z, rates = [controls[0][n]] if task.stepwise else controls, []
        for row in A:
            h = dt * row[len(rates)]
            W, U = Function(V).assign(u), Function(V)
            for a, rate in zip(row, rates, strict=False):
                W.assign(W + dt * a * rate)
            U.assign(W)
            if t is not None:
                t.assign((n + sum(row)) * dt)
            quotient = [(new - old) / h for new, old in zip(fields(U), fields(W), strict=True)]
            # values as functions: the tape takes derivatives of interpolation, and of conditions by functions
            bcs = [DirichletBC(W, Function(W).interpolate(g), part) for W, g, part in task.conditions(z, t)]
            solve(
                task.residual(fields(U), quotient, z, t) == 0, U, bcs=bcs, solver_parameters=NEWTON,
                nullspace=task.nullspace, transpose_nullspace=task.nullspace,
            )  # fmt: skip
            rates.append(Function(V).assign((U - W) / h))
        new = Function(V).assign(u)
        for weight, rate in zip(b, rates, strict=True):
            new.assign(new + dt * weight * rate)
        u = new
        if t is not None:
            t.assign((n + 1) * dt)
        if task.running is not None:
            J += dt * assemble(task.running(fields(u), t))
        if task.stepwise:
            J += dt * assemble(task.regularisation(z))
    return J if task.terminal is None else J + assemble(task.terminal(fields(u), t))


# -- the tasks ---------------------------------------------------------------------------------------------------------
def shallow_water(comm) -> Task:
    """Rotating linear shallow water over a ridge, on a periodic mesh: velocity and height at the start are sought."""
    mesh = partitioned(PeriodicUnitSquareMesh, 4, 4, comm=comm)
    V = FunctionSpace(mesh, "RT", 1) * FunctionSpace(mesh, "DG", 0)
    x, y = SpatialCoordinate(mesh)
    w, phi = TestFunctions(V)
    depth = 1 + 0.3 * cos(2 * pi * x)

    def residual(state, rates, controls, t):
        (u, h), (u_t, h_t) = state, rates
        waves = inner(u_t, w) + 2 * (u[0] * w[1] - u[1] * w[0]) - h * div(w)
        return (waves + h_t * phi + depth * div(u) * phi) * dx

    value = Function(V, name="start")
    value.subfunctions[0].project(as_vector((sin(2 * pi * y), 0 * x)))
    value.subfunctions[1].interpolate(cos(2 * pi * x))
    direction = Function(V)
    direction.subfunctions[0].project(as_vector((cos(2 * pi * x), sin(2 * pi * x))))
    direction.subfunctions[1].interpolate(sin(2 * pi * (x + y)))
    return Task(
        V, residual, lambda u: None, [V], [value], [direction], lambda z: 1e-2 * inner(z[0], z[0]) * dx,
        # pyadjoint integrates derivatives with the degrees estimated for them, not with the functional's: give one
        running=lambda s, t: (s[1] - sin(2 * pi * x)) ** 2 * dx(degree=6), terminal=lambda s, t: inner(s[0], s[0]) * dx,
        scheme="ImplicitMidpoint", initial=0, parameters={"time_solver": "paradiag", "paradiag": {"rtol": 1e-12}},
    )  # fmt: skip


def elastodynamics(comm) -> Task:
    """A clamped plate in velocities and displacements: a shear modulus and the traction at its end are sought."""
    mesh = partitioned(UnitSquareMesh, 4, 2, comm=comm)
    Q, R = VectorFunctionSpace(mesh, "CG", 1), FunctionSpace(mesh, "R", 0)
    V = Q * Q
    x, y = SpatialCoordinate(mesh)
    w, e = TestFunctions(V)

    def residual(state, rates, controls, t):
        (v, d), (v_t, d_t), (mu, pull) = state, rates, controls
        stress = 2 * mu * sym(grad(d)) + 0.5 * tr(grad(d)) * Identity(2)
        return (inner(v_t, w) + inner(stress, sym(grad(w))) + inner(d_t - v, e)) * dx - inner(pull, w) * ds(2)

    return Task(
        V, residual, lambda u: None, [R, Q], [1.3, as_vector((sin(3 * y), x - y))], [0.4, as_vector((y, cos(x)))],
        lambda z: 1e-2 * z[0] ** 2 * dx + 1e-3 * inner(z[1], z[1]) * ds(2),
        running=lambda s, t: inner(s[1] - as_vector((x, 0)), s[1] - as_vector((x, 0))) * ds(2),
        scheme="ImplicitMidpoint", dt=0.1,
        conditions=lambda z, t: [(V.sub(0), as_vector((0.0, 0.0)), 1), (V.sub(1), as_vector((0.0, 0.0)), 1)],
    )  # fmt: skip


def cahn_hilliard(comm) -> Task:
    """Phase separation as a system of concentration and chemical potential: a mobility field is sought."""
    mesh = partitioned(UnitSquareMesh, 4, 4, comm=comm)
    P1, Q = FunctionSpace(mesh, "CG", 1), FunctionSpace(mesh, "DG", 0)
    V = P1 * P1
    x, y = SpatialCoordinate(mesh)
    q, w = TestFunctions(V)

    def residual(state, rates, controls, t):
        (c, m), (c_t, _), (mobility,) = state, rates, controls
        potential = m * w - (c**3 - c) * w - 0.05 * inner(grad(c), grad(w))
        return (c_t * q + exp(mobility) * inner(grad(m), grad(q)) + potential) * dx

    return Task(
        V, residual, lambda u: u.subfunctions[0].interpolate(0.6 * cos(pi * x) * cos(2 * pi * y)), [Q],
        [0.3 * x - y], [sin(5 * x * y)], lambda z: 1e-2 * z[0] ** 2 * dx,
        running=lambda s, t: (s[0] - x) ** 2 * dx, terminal=lambda s, t: s[1] ** 2 * dx, dt=0.02,
    )  # fmt: skip


def upwind_advection(comm) -> Task:
    """Discontinuous elements on quadrilaterals, upwind: the field that enters is sought; its strength and the data
    change in time.
    """
    mesh = partitioned(UnitSquareMesh, 4, 4, comm=comm, quadrilateral=True)
    V, Q = FunctionSpace(mesh, "DQ", 1), FunctionSpace(mesh, "CG", 1)
    x, y = SpatialCoordinate(mesh)
    (v,), n, wind = TestFunctions(V), FacetNormal(mesh), as_vector((1.0, 0.3))
    out = 0.5 * (dot(wind, n) + abs(dot(wind, n)))

    def residual(state, rates, controls, t):
        (u,), (u_t,), (entering,) = state, rates, controls
        inside = u_t * v * dx - u * dot(wind, grad(v)) * dx
        facets = jump(v) * (out("+") * u("+") - out("-") * u("-")) * dS
        return inside + facets + v * out * u * ds + v * (dot(wind, n) - out) * entering * (1 + sin(3 * t)) * ds

    return Task(
        V, residual, lambda u: u.interpolate(x * y), [Q], [cos(2 * y) + x], [sin(3 * y)],
        lambda z: 1e-2 * z[0] ** 2 * ds, running=lambda s, t: (s[0] - sin(t) * x) ** 2 * dx, scheme="SDIRK2",
        moving=True,
    )  # fmt: skip


def navier_stokes(comm) -> Task:
    """Flow in a box that a lid drives: the viscosity is sought. The pressure has a constant too many."""
    mesh = partitioned(UnitSquareMesh, 3, 3, comm=comm)
    V, R = VectorFunctionSpace(mesh, "CG", 2) * FunctionSpace(mesh, "CG", 1), FunctionSpace(mesh, "R", 0)
    x, _ = SpatialCoordinate(mesh)
    w, q = TestFunctions(V)

    def residual(state, rates, controls, t):
        (u, p), (u_t, _), (viscosity,) = state, rates, controls
        flow = inner(u_t + dot(grad(u), u), w) + exp(viscosity) * inner(grad(u), grad(w))
        return (flow - p * div(w) - q * div(u)) * dx

    return Task(
        V, residual, lambda u: None, [R], [-1.2], [0.7], lambda z: 1e-3 * z[0] ** 2 * dx,
        running=lambda s, t: inner(s[0], s[0]) * dx, terminal=lambda s, t: 1e-2 * inner(grad(s[1]), grad(s[1])) * dx,
        dt=0.1,
        conditions=lambda z, t: [
            (V.sub(0), as_vector((0.0, 0.0)), (1, 2, 3)), (V.sub(0), as_vector((4 * x * (1 - x), 0 * x)), 4)
        ],
        nullspace=MixedVectorSpaceBasis(V, [V.sub(0), VectorSpaceBasis(constant=True, comm=comm)]),
    )  # fmt: skip


def p_laplacian(comm) -> Task:
    """A regularised p-Laplacian with p = 4 and quadratic elements: a load in discontinuous linear ones is sought."""
    mesh = partitioned(UnitSquareMesh, 4, 4, comm=comm)
    V, Q = FunctionSpace(mesh, "CG", 2), FunctionSpace(mesh, "DG", 1)
    x, y = SpatialCoordinate(mesh)
    (v,) = TestFunctions(V)

    def residual(state, rates, controls, t):
        (u,), (u_t,), (f,) = state, rates, controls
        return (u_t * v + (0.1 + inner(grad(u), grad(u))) * inner(grad(u), grad(v)) - f * v) * dx

    return Task(
        V, residual, lambda u: u.interpolate(x * (1 - x)), [Q], [5 * cos(3 * x) * y], [x - y],
        lambda z: 1e-3 * z[0] ** 2 * dx, terminal=lambda s, t: (s[0] - y) ** 2 * dx, scheme="SDIRK2",
        conditions=lambda z, t: [(V, 0.0, (1, 2))],
    )  # fmt: skip


def allen_cahn_on_a_sphere(comm) -> Task:
    """A reaction on a closed surface, an immersed manifold without a boundary: the start is sought."""
    mesh = partitioned(IcosahedralSphereMesh, 1.0, 1, comm=comm)
    V = FunctionSpace(mesh, "CG", 1)
    x, y, z = SpatialCoordinate(mesh)
    (v,) = TestFunctions(V)

    def residual(state, rates, controls, t):
        (u,), (u_t,) = state, rates
        return (u_t * v + 0.1 * inner(grad(u), grad(v)) + (u**3 - u) * v) * dx

    return Task(
        V, residual, lambda u: None, [V], [0.5 * x + y * z], [sin(3 * x) - z],
        lambda q: 1e-2 * inner(grad(q[0]), grad(q[0])) * dx, terminal=lambda s, t: (s[0] - z) ** 2 * dx, initial=0,
        dt=0.1,
    )  # fmt: skip


def extruded_column(comm) -> Task:
    """Heat in extruded layers that conduct upwards only half as well: the temperature below and the flux above."""
    base = partitioned(UnitIntervalMesh, 4, comm=comm)
    mesh = ExtrudedMesh(base, 3, layer_height=1 / 3)
    V = FunctionSpace(mesh, "CG", 1)
    x, y = SpatialCoordinate(mesh)
    (v,) = TestFunctions(V)

    def residual(state, rates, controls, t):
        (u,), (u_t,), (_, flux) = state, rates, controls
        return (u_t * v + u.dx(0) * v.dx(0) + 0.5 * u.dx(1) * v.dx(1)) * dx - flux * v * ds_t

    return Task(
        V, residual, lambda u: u.interpolate(y), [V, V], [sin(3 * x), cos(2 * x)], [x, 1 - x * x],
        lambda z: 1e-2 * z[0] ** 2 * dx + 1e-2 * z[1] ** 2 * dx, running=lambda s, t: (s[0] - x) ** 2 * dx,
        scheme="SDIRK2", conditions=lambda z, t: [(V, z[0], "bottom")],
    )  # fmt: skip


def channel(comm) -> Task:
    """Stokes flow through a channel: how much enters in each step, a number in a boundary value of one field."""
    mesh = partitioned(UnitSquareMesh, 3, 3, comm=comm)
    V, R = VectorFunctionSpace(mesh, "CG", 2) * FunctionSpace(mesh, "CG", 1), FunctionSpace(mesh, "R", 0)
    _, y = SpatialCoordinate(mesh)
    w, q = TestFunctions(V)

    def residual(state, rates, controls, t):
        (u, p), (u_t, _) = state, rates
        return (inner(u_t, w) + inner(grad(u), grad(w)) - p * div(w) - q * div(u)) * dx

    return Task(
        V, residual, lambda u: None, [R], [[0.2, 0.8, -0.3, 1.0]], [[1.0, -0.5, 0.3, 0.2]],
        lambda z: 1e-2 * z[0] ** 2 * dx, running=lambda s, t: (s[0][0] - y) ** 2 * ds(2) + s[1] ** 2 * ds(1),
        conditions=lambda z, t: [
            (V.sub(0), as_vector((4 * z[0] * y * (1 - y), 0 * y)), 1), (V.sub(0), as_vector((0.0, 0.0)), (3, 4))
        ],
        stepwise=True, dt=0.1,
    )  # fmt: skip


def stirred_tank(comm) -> Task:
    """Quadratic elements on quadrilaterals: the wind, a vector field, and the conductivity, a number, are sought; the
    source and a boundary value change in time.
    """
    mesh = partitioned(UnitSquareMesh, 3, 3, comm=comm, quadrilateral=True)
    V, Q, R = FunctionSpace(mesh, "CG", 2), VectorFunctionSpace(mesh, "CG", 1), FunctionSpace(mesh, "R", 0)
    x, y = SpatialCoordinate(mesh)
    (v,) = TestFunctions(V)

    def residual(state, rates, controls, t):
        (u,), (u_t,), (wind, kappa) = state, rates, controls
        return (u_t * v + dot(wind, grad(u)) * v + kappa * inner(grad(u), grad(v)) - cos(5 * t) * x * v) * dx

    return Task(
        V, residual, lambda u: u.interpolate(x * y), [Q, R], [as_vector((y, sin(3 * x))), 0.5],
        [as_vector((cos(3 * y), x)), 0.2], lambda z: 1e-2 * inner(z[0], z[0]) * dx + 1e-2 * z[1] ** 2 * dx,
        running=lambda s, t: (s[0] - x * t) ** 2 * dx, scheme="SDIRK2", moving=True,
        conditions=lambda z, t: [(V, sin(2 * t) * y, 1)],
    )  # fmt: skip


TASKS = (
    shallow_water, elastodynamics, cahn_hilliard, upwind_advection, navier_stokes, p_laplacian, allen_cahn_on_a_sphere,
    extruded_column, channel, stirred_tank,
)  # fmt: skip

r"""The heat source problem the ordinary way: plain Firedrake, a loop over the steps on one pyadjoint tape, serial in
time.

The opponent of :mod:`problems.heat_source`: the same discrete problem, value for value, with none of ``pint_fem``'s
solvers. What a careful user does is done here: the operator is factorised once (``constant_jacobian``, CHOLMOD), a
step is one solve a stage, the inner product of the controls is the prior's, with a factor of its own, and the
optimiser uses it.

Stages by their values: :math:`(M + h K) U = M W + h q`, then :math:`W \leftarrow (1 - c) W + c U`, which after the
last stage is the new state:

=================  =============================================  ===========================
integrator         h                                              c after each stage
=================  =============================================  ===========================
BackwardEuler      dt                                             1
ImplicitMidpoint   dt/2                                           2
SDIRK2             :math:`\gamma` dt                              :math:`(1-\gamma)/\gamma`, 1
=================  =============================================  ===========================
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from firedrake import (
    COMM_SELF,
    Constant,
    DirichletBC,
    Function,
    FunctionSpace,
    LinearVariationalProblem,
    LinearVariationalSolver,
    RieszMap,
    SpatialCoordinate,
    TestFunction,
    TrialFunction,
    UnitSquareMesh,
    assemble,
    cos,
    ds,
    dx,
    exp,
    grad,
    inner,
    interpolate,
    pi,
    sin,
)
from firedrake.adjoint import Control, ReducedFunctional
from pyadjoint.tape import stop_annotating

from pint_fem.errors import InputError
from pint_fem.propagators.tape import recording
from problems.heat_readings import NOISE, READINGS
from problems.meshfile import locate, read_mesh
from problems.plate import (
    BOUNDARIES,
    CONVECTION,
    FINAL_TIME,
    HOLE_1,
    KAPPA,
    MESH,
    OUTER_EDGE,
    REGIONS,
    RHO_C,
    boundary_conditions,
)
from problems.readings import Readings, read_readings

__all__ = [
    "SCHEMES",
    "SQUARE_TIME",
    "SerialSource",
    "control_with_prior",
    "serial_heat_source",
    "serial_square",
    "square_functionals",
]

_GAMMA = 1 - 1 / np.sqrt(2)
#: Stage length over dt, and c after each stage.
SCHEMES = {
    "BackwardEuler": (1.0, (1.0,)),
    "ImplicitMidpoint": (0.5, (2.0,)),
    "SDIRK2": (_GAMMA, ((1 - _GAMMA) / _GAMMA, 1.0)),
}
_DIRECT = {"ksp_type": "preonly", "pc_type": "cholesky", "pc_factor_mat_solver_type": "cholmod"}

#: Time interval of :func:`serial_square`.
SQUARE_TIME = 0.2


@dataclass
class SerialSource:
    """A recorded tape.

    Attributes
    ----------
    rf : ReducedFunctional
        Of the source; its control's Riesz map is the prior's.
    q : Function
        The control, with the value at which the tape was recorded (zero).
    steps : int
    seconds : float
        Time to build the solvers and record the tape.
    """

    rf: ReducedFunctional
    q: Function
    steps: int
    seconds: float


def _trajectory(
    mass, stiffness, load, V: FunctionSpace, bcs, *, dt: float, steps: int, integrator: str
) -> Iterator[tuple[int, Function]]:
    """Step from zero; yield ``(0, u), (1, u), ..., (steps, u)``.

    ``mass(w, v)``, ``stiffness(w, v)`` and ``load(v)`` make UFL forms.
    """
    if integrator not in SCHEMES:
        raise InputError(f"unknown integrator {integrator!r}: give one of {', '.join(SCHEMES)}")
    length, weights = SCHEMES[integrator]
    h, w, v = Constant(length * dt), TrialFunction(V), TestFunction(V)
    u, solvers = Function(V, name="state"), []
    W = u
    for c in weights:
        # combinations of stages go into the right-hand side's form: on the tape that is cheaper than an assignment
        U = Function(V)
        equation = LinearVariationalProblem(
            mass(w, v) + h * stiffness(w, v), mass(W, v) + h * load(v), U, bcs=bcs, constant_jacobian=True
        )
        solvers.append(LinearVariationalSolver(equation, solver_parameters=_DIRECT))
        W = U if c == 1 else (1 - c) * W + c * U
    yield 0, u
    for n in range(1, steps + 1):
        for solver in solvers:
            solver.solve()
        u.assign(W)
        yield n, u


def control_with_prior(q: Function, prior) -> Control:
    """The control with the prior's inner product, factorised once."""
    a, b = TrialFunction(q.function_space()), TestFunction(q.function_space())
    return Control(q, riesz_map=RieszMap(prior(a, b), constant_jacobian=True, solver_parameters=_DIRECT))


def serial_heat_source(
    *,
    mesh: str | Path = MESH,
    readings: str | Path | Readings = READINGS,
    steps: int = 512,
    integrator: str = "SDIRK2",
    alpha: float = 1e-4,
    beta: float = 1e-5,
    noise: float = NOISE,
    comm=COMM_SELF,
) -> SerialSource:
    """Record the problem of :func:`problems.heat_source.heat_source`, with the same arguments.

    Parameters
    ----------
    mesh, readings, steps, integrator, alpha, beta, noise
        As there.
    comm
        Communicator of the mesh.

    Raises
    ------
    InputError
        On a bad file or integrator.
    """
    start = time.perf_counter()
    data = read_readings(readings, FINAL_TIME)
    plate = read_mesh(mesh, comm, REGIONS, BOUNDARIES)
    sensors = locate(data.points, plate, data.sensors)
    V, at_sensors, as_given = (
        FunctionSpace(plate, "CG", 1),
        FunctionSpace(sensors, "DG", 0),
        FunctionSpace(sensors.input_ordering, "DG", 0),
    )
    q, d = Function(V, name="source"), Function(as_given)
    values, there = np.ma.filled(data.values, 0.0), 1.0 - np.ma.getmaskarray(data.values)
    sigma = noise * np.abs(values).max()
    weight = 1 / (sigma**2 * there.sum())
    prior = lambda a, b: (alpha * inner(grad(a), grad(b)) + beta * a * b) * dx

    # reading r lies between the points before[r] and before[r] + 1, at theta of the way
    place = data.times * steps / FINAL_TIME
    before = np.clip(np.ceil(place - 1e-9), 1, steps).astype(int) - 1
    theta = place - before
    theta[np.abs(theta - 1) < 1e-9] = 1.0
    wanted = set(before + 1) | set(before[theta < 1])

    with recording() as tape:
        trajectory = _trajectory(
            lambda w, v: sum(RHO_C[r] * w * v * dx(r) for r in REGIONS),
            lambda w, v: (
                sum(KAPPA[r] * inner(grad(w), grad(v)) * dx(r) for r in REGIONS)
                + CONVECTION * w * v * ds((OUTER_EDGE, HOLE_1))
            ),
            lambda v: q * v * dx,
            V,
            boundary_conditions(V),
            dt=FINAL_TIME / steps,
            steps=steps,
            integrator=integrator,
        )
        seen, J = {}, assemble(0.5 * prior(q, q))
        for n, u in trajectory:
            if n not in wanted:
                continue
            seen[n] = assemble(interpolate(u, at_sensors))
            for r in np.flatnonzero(before == n - 1):
                with stop_annotating():
                    d.dat.data_wo[:] = values[r]
                    target = assemble(interpolate(d, at_sensors))
                    d.dat.data_wo[:] = there[r]
                    present = 1 if there[r].all() else assemble(interpolate(d, at_sensors))
                predicted = seen[n] if theta[r] == 1 else theta[r] * seen[n] + (1 - theta[r]) * seen[n - 1]
                J += assemble(0.5 * weight * present * (predicted - target) ** 2 * dx)
    rf = ReducedFunctional(J, control_with_prior(q, prior), tape=tape)
    return SerialSource(rf, q, steps, time.perf_counter() - start)


def square_functionals(V: FunctionSpace) -> dict[str, Callable]:
    """What :func:`serial_square` and its time-parallel twin are made of.

    Returns
    -------
    dict
        UFL functionals ``misfit(u)`` (at one time) and ``regularisation(q)``; expressions ``control()`` and
        ``direction()``.
    """
    x, y = SpatialCoordinate(V.mesh())
    # in the space of the state: the target's own quadrature degree would be 18, and the tape assembles it at every step
    target = Function(V, name="target").interpolate(sin(pi * x) * sin(pi * y) * exp(x - y))
    return {
        "misfit": lambda u: 0.5 * (u - target) ** 2 * dx,
        "regularisation": lambda q: 0.5e-3 * q**2 * dx,
        "control": lambda: 10 * cos(2 * x) * sin(3 * y),
        "direction": lambda: x * cos(pi * y),
    }


def serial_square(*, n: int = 64, steps: int = 256, integrator: str = "BackwardEuler", comm=COMM_SELF) -> SerialSource:
    """Record a plain problem for timing: P1 on an ``n x n`` unit square, ``sum_n dt misfit(u_n) +
    regularisation(q)``.
    """
    start = time.perf_counter()
    mesh = UnitSquareMesh(n, n, comm=comm)
    V, dt = FunctionSpace(mesh, "CG", 1), SQUARE_TIME / steps
    forms = square_functionals(V)
    q = Function(V, name="source")
    with recording() as tape:
        trajectory = _trajectory(
            lambda w, v: w * v * dx,
            lambda w, v: inner(grad(w), grad(v)) * dx,
            lambda v: q * v * dx,
            V,
            [DirichletBC(V, 0, "on_boundary")],
            dt=dt,
            steps=steps,
            integrator=integrator,
        )
        J = assemble(forms["regularisation"](q))
        for k, u in trajectory:
            if k:
                J += assemble(dt * forms["misfit"](u))
    rf = ReducedFunctional(J, control_with_prior(q, lambda a, b: a * b * dx), tape=tape)
    return SerialSource(rf, q, steps, time.perf_counter() - start)

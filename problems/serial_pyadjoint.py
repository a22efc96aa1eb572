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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    elem_mult,
    exp,
    grad,
    inner,
    interpolate,
    pi,
    sin,
)
from firedrake.adjoint import Control, ReducedFunctional
from firedrake.mesh import MeshGeometry
from pyadjoint import AdjFloat
from pyadjoint.tape import stop_annotating
from ufl.core.expr import Expr

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
from problems.priors import prior_of
from problems.readings import Readings, read_readings

__all__ = [
    "DIRECT",
    "DIRECT_MIXED",
    "NODES",
    "SCHEMES",
    "SQUARE_TIME",
    "SerialSource",
    "add_squares",
    "control_with_prior",
    "reading_places",
    "serial_heat_source",
    "serial_square",
    "square_functionals",
    "trajectory",
]

_GAMMA = 1 - 1 / np.sqrt(2)
#: Stage length over dt, and c after each stage.
SCHEMES = {
    "BackwardEuler": (1.0, (1.0,)),
    "ImplicitMidpoint": (0.5, (2.0,)),
    "SDIRK2": (_GAMMA, ((1 - _GAMMA) / _GAMMA, 1.0)),
}
#: Time of each stage in its step.
NODES = {"BackwardEuler": (1.0,), "ImplicitMidpoint": (0.5,), "SDIRK2": (_GAMMA, 1.0)}
#: PETSc options of symmetric positive definite systems on one rank.
DIRECT = {"ksp_type": "preonly", "pc_type": "cholesky", "pc_factor_mat_solver_type": "cholmod"}
#: PETSc options of mixed systems, which Cholesky's method does not factor.
DIRECT_MIXED = {"mat_type": "aij", "ksp_type": "preonly", "pc_type": "lu", "pc_factor_mat_solver_type": "umfpack"}

#: Time interval of :func:`serial_square`.
SQUARE_TIME = 0.2


@dataclass
class SerialSource:
    """A recorded tape.

    Attributes
    ----------
    rf : ReducedFunctional
        Of the controls, whose Riesz maps are the priors'.
    q : Function or list of Function
        The controls, with the values at which the tape was recorded.
    steps : int
    seconds : float
        Time to build the solvers and record the tape.
    """

    rf: ReducedFunctional
    q: Function | list[Function]
    steps: int
    seconds: float


def trajectory(
    mass: Callable,
    stiffness: Callable,
    load: Callable,
    V: FunctionSpace,
    bcs: Sequence[DirichletBC],
    *,
    dt: float,
    steps: int,
    integrator: str,
    course: Callable[[float], float] | None = None,
    constant: bool = True,
    parameters: Mapping[str, Any] = DIRECT,
    initial: Expr | None = None,
) -> Iterator[tuple[int, Function]]:
    """Step from zero, or from ``initial``; yield ``(0, u), (1, u), ..., (steps, u)``, on the tape that is being
    recorded.

    Parameters
    ----------
    mass, stiffness
        Make the bilinear forms ``mass(w, v)`` and ``stiffness(w, v)``.
    load
        Makes the linear form ``load(v)``; with ``course`` that is multiplied by the time course.
    V, bcs
        Space of the state and its boundary conditions, with values that do not depend on time.
    dt, steps, integrator
        Step size, number of steps, and a name in :data:`SCHEMES`.
    course
        Time course of the load, a function of the time.
    constant
        Whether the operators depend on no control, so that their factors stay when the tape is evaluated again.
    parameters
        PETSc options of the stages' systems; by default for symmetric positive definite ones.
    initial
        The state at first, in UFL, without controls; default: zero.

    Raises
    ------
    InputError
        On an unknown integrator.
    """
    if integrator not in SCHEMES:
        raise InputError(f"unknown integrator {integrator!r}: give one of {', '.join(SCHEMES)}")
    length, weights = SCHEMES[integrator]
    h, w, v = Constant(length * dt), TrialFunction(V), TestFunction(V)
    u, solvers, courses = Function(V, name="state"), [], []
    if initial is not None:
        with stop_annotating():
            u.interpolate(initial)
    W = u
    for c in map(float, weights):  # UFL does not take numpy's numbers before vectors
        # combinations of stages go into the right-hand side's form: on the tape that is cheaper than an assignment.
        # The time course's value is a function of R that each step assigns
        U, s = Function(V), 1 if course is None else Function(FunctionSpace(V.mesh().unique(), "R", 0))
        equation = LinearVariationalProblem(
            mass(w, v) + h * stiffness(w, v), mass(W, v) + h * s * load(v), U, bcs=bcs, constant_jacobian=constant
        )
        solvers.append(LinearVariationalSolver(equation, solver_parameters=parameters))
        courses.append(s)
        W = U if c == 1 else (1 - c) * W + c * U
    yield 0, u
    for n in range(1, steps + 1):
        for solver, s, node in zip(solvers, courses, NODES[integrator], strict=True):
            if course is not None:
                s.assign(course((n - 1 + node) * dt))
            solver.solve()
        u.assign(W)
        yield n, u


def reading_places(times: np.ndarray, steps: int, final_time: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the step at whose start, or after it, each reading is, ``(nt,)`` counted from 0, and how far behind its
    start in steps, in (0, 1].
    """
    place = times * steps / final_time
    before = np.clip(np.ceil(place - 1e-9), 1, steps).astype(int) - 1
    theta = place - before
    theta[np.abs(theta - 1) < 1e-9] = 1.0
    return before, theta


def add_squares(
    J: AdjFloat,
    states: Iterable[tuple[int, Function]],
    data: Readings,
    weight: float,
    sensors: MeshGeometry,
    *,
    steps: int,
    final_time: float,
    observed: Callable = lambda u: u,
    space: Callable = FunctionSpace,
) -> AdjFloat:
    """Add the weighted squares of the readings' residuals to a functional, on the tape that is being recorded.

    Parameters
    ----------
    J
        The functional so far.
    states
        Numbers and states of all points, of :func:`trajectory`.
    data, weight, sensors
        Readings, the weight of each square, and the ``VertexOnlyMesh`` of the sensors.
    steps, final_time
        Of the trajectory.
    observed, space
        The observed part of a state, and what makes its space on the sensors: ``VectorFunctionSpace`` for vectors.
    """
    at_sensors, as_given = space(sensors, "DG", 0), space(sensors.input_ordering, "DG", 0)
    values, there = np.ma.filled(data.values, 0.0), 1.0 - np.ma.getmaskarray(data.values)
    # reading r lies between the points before[r] and before[r] + 1, at theta of the way
    before, theta = reading_places(data.times, steps, final_time)
    needed, seen, d = set(before + 1) | set(before[theta < 1]), {}, Function(as_given)

    def on_sensors(numbers):
        with stop_annotating():
            d.dat.data_wo[:] = numbers[: len(d.dat.data_ro)]  # points as given are all on the first rank
            return assemble(interpolate(d, at_sensors))

    for n, u in states:
        if n not in needed:
            continue
        seen[n] = assemble(interpolate(observed(u), at_sensors))
        for r in np.flatnonzero(before == n - 1):
            w = float(theta[r])  # UFL does not take numpy's numbers before vectors
            residual = (seen[n] if w == 1 else w * seen[n] + (1 - w) * seen[n - 1]) - on_sensors(values[r])
            if not there[r].all():
                present = on_sensors(there[r])
                residual = elem_mult(present, residual) if present.ufl_shape else present * residual
            J += assemble(0.5 * float(weight) * inner(residual, residual) * dx)
    return J


def control_with_prior(q: Function, prior) -> Control:
    """The control with the prior's inner product, factorised once."""
    a, b = TrialFunction(q.function_space()), TestFunction(q.function_space())
    return Control(q, riesz_map=RieszMap(prior(a, b), constant_jacobian=True, solver_parameters=DIRECT))


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
    V = FunctionSpace(plate, "CG", 1)
    q = Function(V, name="source")
    there = 1.0 - np.ma.getmaskarray(data.values)
    sigma = noise * np.abs(np.ma.filled(data.values, 0.0)).max()
    weight = 1 / (sigma**2 * there.sum())
    prior = prior_of(alpha, beta)
    with recording() as tape:
        states = trajectory(
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
        J = assemble(0.5 * prior(q, q))
        J = add_squares(J, states, data, weight, sensors, steps=steps, final_time=FINAL_TIME)
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
        states = trajectory(
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
        for k, u in states:
            if k:
                J += assemble(dt * forms["misfit"](u))
    rf = ReducedFunctional(J, control_with_prior(q, lambda a, b: a * b * dx), tape=tape)
    return SerialSource(rf, q, steps, time.perf_counter() - start)

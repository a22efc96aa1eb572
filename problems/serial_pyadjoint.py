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
from contextlib import contextmanager
from dataclasses import dataclass, field
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
from firedrake.adjoint import Control, ReducedFunctional, continue_annotation, pause_annotation
from firedrake.petsc import PETSc
from pyadjoint import MinimizationProblem, TAOSolver, Tape, get_working_tape, set_working_tape
from pyadjoint.optimization.tao_solver import TAOConvergenceError
from pyadjoint.tape import annotate_tape, stop_annotating

from pint_fem.errors import InputError
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
from problems.readings import read_readings

__all__ = [
    "SQUARE_TIME",
    "SerialHeatSource",
    "SerialResult",
    "minimise",
    "serial_heat_source",
    "serial_square",
    "square_functionals",
]

_GAMMA = 1 - 1 / np.sqrt(2)
#: Stage length over dt, and c after each stage.
_SCHEMES = {
    "BackwardEuler": (1.0, (1.0,)),
    "ImplicitMidpoint": (0.5, (2.0,)),
    "SDIRK2": (_GAMMA, ((1 - _GAMMA) / _GAMMA, 1.0)),
}
_DIRECT = {"ksp_type": "preonly", "pc_type": "cholesky", "pc_factor_mat_solver_type": "cholmod"}

#: Time interval of :func:`serial_square`.
SQUARE_TIME = 0.2


@dataclass
class SerialHeatSource:
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


@contextmanager
def _recording() -> Iterator[Tape]:
    """A tape of its own, on which everything inside is recorded; what was the working tape before is so again
    afterwards.
    """
    before, annotating, tape = get_working_tape(), annotate_tape(), Tape()
    set_working_tape(tape)
    continue_annotation()
    try:
        yield tape
    finally:
        set_working_tape(before)
        (continue_annotation if annotating else pause_annotation)()


def _trajectory(
    mass, stiffness, load, V: FunctionSpace, bcs, *, dt: float, steps: int, integrator: str
) -> Iterator[tuple[int, Function]]:
    """Step from zero; yield ``(0, u), (1, u), ..., (steps, u)``.

    ``mass(w, v)``, ``stiffness(w, v)`` and ``load(v)`` make UFL forms.
    """
    if integrator not in _SCHEMES:
        raise InputError(f"unknown integrator {integrator!r}: give one of {', '.join(_SCHEMES)}")
    length, weights = _SCHEMES[integrator]
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


def _control(q: Function, prior) -> Control:
    """The control with the prior's inner product, factorised once."""
    a, b = TrialFunction(q.function_space()), TestFunction(q.function_space())
    return Control(q, riesz_map=RieszMap(prior(a, b), constant_jacobian=True, solver_parameters=_DIRECT))


def serial_heat_source(
    *,
    mesh: str | Path = MESH,
    readings: str | Path = READINGS,
    steps: int = 512,
    integrator: str = "SDIRK2",
    alpha: float = 1e-4,
    beta: float = 1e-5,
    noise: float = NOISE,
    comm=COMM_SELF,
) -> SerialHeatSource:
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
    sigma = noise * np.abs(data.values).max()
    weight = 1 / (sigma**2 * data.values.size)
    prior = lambda a, b: (alpha * inner(grad(a), grad(b)) + beta * a * b) * dx

    # reading r lies between the points before[r] and before[r] + 1, at theta of the way
    place = data.times * steps / FINAL_TIME
    before = np.clip(np.ceil(place - 1e-9), 1, steps).astype(int) - 1
    theta = place - before
    theta[np.abs(theta - 1) < 1e-9] = 1.0
    wanted = set(before + 1) | set(before[theta < 1])

    with _recording() as tape:
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
                    d.dat.data_wo[:] = data.values[r]
                    target = assemble(interpolate(d, at_sensors))
                predicted = seen[n] if theta[r] == 1 else theta[r] * seen[n] + (1 - theta[r]) * seen[n - 1]
                J += assemble(0.5 * weight * (predicted - target) ** 2 * dx)
    rf = ReducedFunctional(J, _control(q, prior), tape=tape)
    return SerialHeatSource(rf, q, steps, time.perf_counter() - start)


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


def serial_square(
    *, n: int = 64, steps: int = 256, integrator: str = "BackwardEuler", comm=COMM_SELF
) -> SerialHeatSource:
    """Record a plain problem for timing: P1 on an ``n x n`` unit square, ``sum_n dt misfit(u_n) +
    regularisation(q)``.
    """
    start = time.perf_counter()
    mesh = UnitSquareMesh(n, n, comm=comm)
    V, dt = FunctionSpace(mesh, "CG", 1), SQUARE_TIME / steps
    forms = square_functionals(V)
    q = Function(V, name="source")
    with _recording() as tape:
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
    rf = ReducedFunctional(J, _control(q, lambda a, b: a * b * dx), tape=tape)
    return SerialHeatSource(rf, q, steps, time.perf_counter() - start)


@dataclass
class SerialResult:
    """What :func:`minimise` found.

    Attributes
    ----------
    control : Function
    value, gradient_norm : float
        At ``control``; the norm is the prior's.
    iterations, evaluations, gradients, hessians : int
        Calls of the reduced functional.
    seconds : float
    converged : bool
    """

    control: Function
    value: float
    gradient_norm: float
    iterations: int
    evaluations: int
    gradients: int
    hessians: int
    seconds: float
    converged: bool


_METHODS = {
    "lmvm": {"tao_type": "lmvm"},
    "nls": {
        "tao_type": "nls",
        "tao_nls_ksp_type": "cg",
        "tao_nls_pc_type": "python",
        "tao_nls_pc_python_type": "pyadjoint.optimization.tao_solver.RieszMapPC",
        "tao_nls_ksp_rtol": 1e-4,
    },
}


@dataclass
class _Counts:
    evaluations: int = 0
    gradients: int = 0
    hessians: int = 0
    history: list = field(default_factory=list)


def minimise(
    serial: SerialHeatSource,
    *,
    method: str = "lmvm",
    gttol: float = 1e-8,
    max_it: int = 200,
    printer: Callable[[str], object] | None = print,
    callback: Callable[[Function], object] | None = None,
    parameters: dict | None = None,
) -> SerialResult:
    """Recover the source with pyadjoint's own ``TAOSolver``.

    Parameters
    ----------
    serial
        A recorded problem.
    method
        ``"lmvm"``: limited-memory BFGS that starts from the prior's inverse. ``"nls"``: Newton-CG, preconditioned by
        it.
    gttol
        Stop when the gradient's norm has fallen by this factor.
    max_it
        Largest number of iterations.
    printer
        Gets a line an iteration.
    callback
        Gets the source of each iteration.
    parameters
        More PETSc options of TAO.
    """
    rf, counts = serial.rf, _Counts()
    start = time.perf_counter()
    before = rf.eval_cb_post, rf.derivative_cb_post, rf.hessian_cb_post

    def count(name, result=None):
        setattr(counts, name, getattr(counts, name) + 1)
        return result

    rf.eval_cb_post = lambda *_: count("evaluations")
    rf.derivative_cb_post = lambda checkpoint, derivatives, controls: count("gradients", derivatives)
    rf.hessian_cb_post = lambda *_: count("hessians")
    options = {
        **_METHODS[method],
        "tao_gatol": 0.0,
        "tao_grtol": 0.0,
        "tao_gttol": gttol,
        "tao_max_it": max_it,
        **(parameters or {}),
    }
    comm = serial.q.function_space().mesh().comm
    # TAO's quasi-Newton matrix keeps 5 pairs by default, which costs 10 times the iterations here; it ignores the
    # solver's options prefix
    database, pairs = PETSc.Options(), "tao_lmvm_mat_lmvm_hist_size"
    given = database.hasName(pairs)
    if not given:
        database[pairs] = max_it
    try:
        solver = TAOSolver(MinimizationProblem(rf), options, comm=comm)
    finally:
        if not given:
            database.delValue(pairs)

    def monitor(tao):
        if printer is not None:
            if not counts.history:
                printer(f"{'it':>4} {'J':>16} {'|g|':>10} {'J calls':>8} {'seconds':>8}")
            iteration, value, norm, *_ = tao.getSolutionStatus()
            counts.history.append(iteration)
            printer(
                f"{iteration:4d} {value:16.9e} {norm:10.3e} {counts.evaluations:8d} {time.perf_counter() - start:8.1f}"
            )
        if callback is not None:
            q = Function(serial.q.function_space())
            q._ad_from_petsc(tao.getSolution())
            callback(q)

    solver.tao.setMonitor(monitor)
    rf.controls[0].update(serial.q.copy(deepcopy=True))  # start there, wherever the tape was evaluated last
    converged = True
    try:
        with stop_annotating():
            solver.solve()
    except (
        TAOConvergenceError,
        AttributeError,
    ) as error:  # AttributeError: this pyadjoint does not find this petsc4py's names of reasons
        if solver.tao.getConvergedReason() > 0:
            raise
        converged = False
        if printer is not None:
            printer(f"  not converged, TAO's reason {solver.tao.getConvergedReason()} ({error})")
    finally:
        rf.eval_cb_post, rf.derivative_cb_post, rf.hessian_cb_post = before
    q = Function(serial.q.function_space(), name="source")
    q._ad_from_petsc(solver.x)
    iterations, value, norm, *_ = solver.tao.getSolutionStatus()
    return SerialResult(
        q,
        value,
        norm,
        iterations,
        counts.evaluations,
        counts.gradients,
        counts.hessians,
        time.perf_counter() - start,
        converged,
    )

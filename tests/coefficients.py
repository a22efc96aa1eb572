"""Evolutions with coefficients that are sought, posed once for ``pint_fem`` and once as a plain Firedrake loop on a
pyadjoint tape: what the tests of coefficients compare.

A :class:`Problem` has its residual as a Python function of rates, fields and test functions. With ``Dt(u)`` it is the
residual of an :class:`~pint_fem.evolution.Evolution`; with ``(U - W)/h`` it is a stage of a Runge-Kutta method, which
the serial loop solves by Firedrake's ``solve``. All forms have an explicit quadrature degree, as pyadjoint estimates
the degree of each derivative anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import ufl
from firedrake import (
    Constant,
    DirichletBC,
    FacetNormal,
    FiniteElement,
    Function,
    FunctionSpace,
    Measure,
    SpatialCoordinate,
    TestFunction,
    TestFunctions,
    TrialFunction,
    TrialFunctions,
    VectorFunctionSpace,
    as_vector,
    assemble,
    avg,
    cos,
    div,
    exp,
    grad,
    inner,
    jump,
    lhs,
    pi,
    rhs,
    sin,
    solve,
    split,
    sqrt,
    sym,
    triangle,
)
from firedrake.adjoint import Control, ReducedFunctional
from irksome import Dt
from mpi4py import MPI
from pyadjoint.enlisting import Enlist

import pint_fem as pf
from pint_fem.kernels.arrays import get
from pint_fem.propagators.tape import recording
from problems.serial_pyadjoint import NODES, SCHEMES
from tests.meshes import square

__all__ = [
    "DIRECT", "TABLEAUX", "Problem", "acoustics", "assert_same", "assert_same_as_serial", "conduction", "elastic",
    "facet_diffusion", "heat", "heating_experiments", "maxwell", "point_and_direction", "pressure_waves",
    "results", "serial_functional",
    "time_parallel",
]  # fmt: skip

TABLEAUX = {"BackwardEuler": pf.BackwardEuler, "ImplicitMidpoint": pf.ImplicitMidpoint, "SDIRK2": pf.SDIRK2}
DIRECT = {"mat_type": "aij", "ksp_type": "preonly", "pc_type": "lu", "pc_factor_mat_solver_type": "mumps"}
DEGREE = 4
"""Quadrature degree of all forms."""


@dataclass
class Problem:
    """An initial value problem with controls, independent of the time integrator.

    Attributes
    ----------
    V : FunctionSpace
        Of the state; mixed where there are several fields.
    controls : list of Function
    residual : callable
        ``residual(rates, fields, tests, t)``: a UFL form for each field, each argument a sequence with one entry per
        field, ``t`` the time. The form of field ``i`` contains the test function ``i`` only.
    running, terminal : callable
        UFL functionals of the fields at one time.
    regularisation : callable
        UFL functional of the controls.
    start : list
        Expression of each field's initial value.
    values, directions : list
        Expressions of the controls and of their directions.
    conditions : callable
        ``conditions(spaces, t)``: the Dirichlet conditions on the fields' spaces.
    dt, steps
    moves : bool
        Whether the residual or a boundary value depends on time.
    eliminate : int or None
    """

    V: object
    controls: list[Function]
    residual: Callable
    running: Callable
    terminal: Callable
    regularisation: Callable
    start: list
    values: list
    directions: list
    conditions: Callable = lambda spaces, t: []
    dt: float = 0.02
    steps: int = 6
    moves: bool = False
    eliminate: int | None = None

    @property
    def mixed(self) -> bool:
        """Whether the state has several fields."""
        return len(self.V) > 1

    @property
    def spaces(self) -> list:
        """The space of each field."""
        return [self.V.sub(i) for i in range(len(self.V))] if self.mixed else [self.V]

    def fields(self, u) -> Sequence:
        """The fields of a state's function."""
        return split(u) if self.mixed else (u,)

    def initial(self) -> Function:
        """The initial state."""
        u = Function(self.V)
        # the parts of a vector are no fields, although pyadjoint records them as such
        for part, expression in zip(u.subfunctions if self.mixed else (u,), self.start, strict=True):
            part.interpolate(expression)
        return u


def time_parallel(
    problem: Problem | list[Problem], st, integrator: str, **solver_parameters
) -> pf.TimeParallelReducedFunctional:
    """The functional of a problem, or of several experiments with the same controls; with the integrator ``"leapfrog"``
    by leapfrog.
    """
    several = isinstance(problem, list)
    posed = [_posed(p, integrator) for p in (problem if several else [problem])]
    first = problem[0] if several else problem
    evolutions, misfits = ([p[i] for p in posed] for i in (0, 1))
    return pf.TimeParallelReducedFunctional(
        evolutions if several else evolutions[0],
        misfits if several else misfits[0],
        regularisation=first.regularisation(first.controls),
        spacetime=st,
        solver_parameters=solver_parameters,
        **({"propagator": pf.leapfrog} if integrator == "leapfrog" else {}),
    )


def _posed(problem: Problem, integrator: str) -> tuple[pf.Evolution, list]:
    """The evolution and the misfits."""
    V = problem.V
    u, v = problem.initial(), TestFunctions(V) if problem.mixed else (TestFunction(V),)
    t = pf.time_function(V.mesh().unique()) if problem.moves else None
    fields, spaces = problem.fields(u), problem.spaces
    tableau = TABLEAUX["ImplicitMidpoint" if integrator == "leapfrog" else integrator]()
    evolution = pf.Evolution(
        sum(problem.residual([Dt(f) for f in fields], fields, v, t)), u, tableau=tableau, dt=problem.dt,
        nsteps=problem.steps, control=problem.controls, t=t, bcs=problem.conditions(spaces, t),
        eliminate=problem.eliminate,
    )  # fmt: skip
    return evolution, [pf.RunningMisfit(problem.running(fields)), pf.TerminalMisfit(problem.terminal(fields))]


def serial_functional(problem: Problem | list[Problem], integrator: str) -> ReducedFunctional:
    """The same functional on a tape of plain Firedrake: a loop over the steps of each experiment, a ``solve`` for each
    stage.
    """
    experiments = problem if isinstance(problem, list) else [problem]
    controls = experiments[0].controls
    for control, value in zip(controls, experiments[0].values, strict=True):
        control.interpolate(value)
    with recording() as tape:
        J = assemble(experiments[0].regularisation(controls))
        for one in experiments:
            trajectory = _leapfrog(one) if integrator == "leapfrog" else _runge_kutta(one, integrator)
            for fields in trajectory:
                J += assemble(one.dt * one.running(fields))
                last = fields
            J += assemble(one.terminal(last))
    return ReducedFunctional(J, Enlist([Control(c) for c in controls]).delist(), tape=tape)


def _runge_kutta(problem: Problem, integrator: str):
    """Yield the fields after each step; the stages of a step are solved for their values."""
    u, V, (length, weights) = problem.initial(), problem.V, SCHEMES[integrator]
    trials = TrialFunctions(V) if problem.mixed else (TrialFunction(V),)
    tests = TestFunctions(V) if problem.mixed else (TestFunction(V),)
    spaces, h = problem.spaces, Constant(length * problem.dt)
    for n in range(problem.steps):
        W = u
        for c, node in zip(weights, NODES[integrator], strict=True):
            t, U = Constant((n + node) * problem.dt), Function(V)
            rates = [(new - old) / h for new, old in zip(trials, problem.fields(W), strict=True)]
            stage = sum(problem.residual(rates, trials, tests, t))
            solve(lhs(stage) == rhs(stage), U, bcs=problem.conditions(spaces, t), solver_parameters=DIRECT)
            W = Function(V).assign(U if c == 1 else float(1 - c) * W + float(c) * U)
        u = W
        yield problem.fields(u)


def _leapfrog(problem: Problem):
    """Yield the fields ``(a, b)`` after each step of leapfrog: half a step of ``b``, the step of ``a``, half a step of
    ``b``, loads at the midpoint (the formulas of :mod:`pint_fem.propagators.leapfrog`).
    """
    spaces, h = [problem.V.sub(i).collapse() for i in (0, 1)], Constant(problem.dt / 2)
    a, b = (Function(space).interpolate(start) for space, start in zip(spaces, problem.start, strict=True))
    trials, tests = [TrialFunction(V) for V in spaces], [TestFunction(V) for V in spaces]

    def solved(index, old, fields, t):
        """The field after ``h``, with the given fields where it is not sought."""
        rates = [ufl.zero(*V.value_shape) for V in spaces]
        rates[index] = (trials[index] - old) / h
        form, new = problem.residual(rates, fields, tests, t)[index], Function(spaces[index])
        conditions = problem.conditions(spaces, t) if index == 0 else []
        solve(lhs(form) == rhs(form), new, bcs=conditions, solver_parameters=DIRECT)
        return new

    for n in range(problem.steps):
        t = Constant((n + 0.5) * problem.dt)
        half = solved(1, b, [a, trials[1]], t)
        mean = solved(0, a, [trials[0], half], t)
        a = Function(spaces[0]).assign(2.0 * mean - a)
        b = solved(1, half, [a, trials[1]], t)
        yield a, b


# -- comparison --------------------------------------------------------------------------------------------------------
def point_and_direction(problem: Problem | list[Problem]) -> tuple[list[Function], list[Function]]:
    """Functions with the values and the directions of the controls."""
    problem = problem[0] if isinstance(problem, list) else problem
    spaces = [c.function_space() for c in problem.controls]
    both = [
        [Function(Q).interpolate(e) for Q, e in zip(spaces, given, strict=True)]
        for given in (problem.values, problem.directions)
    ]
    return both[0], both[1]


def results(rf, z: list[Function], dz: list[Function]) -> tuple[float, list[np.ndarray], list[np.ndarray]]:
    """``J``, its gradient and its Hessian action, own values for each control."""
    one = lambda functions: functions[0] if len(functions) == 1 else functions
    J = float(rf(one(z)))
    gradient, action = Enlist(rf.derivative()), Enlist(rf.hessian(one(dz)))
    return J, [get(g) for g in gradient], [get(h) for h in action]


def assert_same(ours, theirs, comm) -> None:
    """``J`` and the gradient to 1e-8, the Hessian action to 1e-7, relative, for each control by itself."""
    size = lambda array: np.sqrt(comm.allreduce(float(np.vdot(array, array)), op=MPI.SUM))
    assert abs(ours[0] - theirs[0]) <= 1e-8 * abs(theirs[0]), (ours[0], theirs[0])
    for name, a, b, tolerance in (("gradient", ours[1], theirs[1], 1e-8), ("Hessian", ours[2], theirs[2], 1e-7)):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            apart, norm = size(x - y), size(y)
            assert norm > 0, f"{name} by control {i} is zero: the comparison would be empty"
            assert apart <= tolerance * norm, f"{name} by control {i}: relative difference {apart / norm:.1e}"


def assert_same_as_serial(
    problem: Problem | list[Problem], st, integrator: str, *solvers: dict, theirs=None
) -> list[pf.TimeParallelReducedFunctional]:
    """Compare the functional with the tape for each of some ``solver_parameters``; return the functionals."""
    z, dz = point_and_direction(problem)
    theirs = results(serial_functional(problem, integrator), z, dz) if theirs is None else theirs
    made = []
    for parameters in solvers:
        rf = time_parallel(problem, st, integrator, **parameters)
        assert_same(results(rf, z, dz), theirs, st.space_comm)
        made.append(rf)
    return made


# -- problems ----------------------------------------------------------------------------------------------------------
def _space(mesh, name: str):
    """A space of controls: ``"P1"``, ``"P2"``, ``"DG0"``, ``"R"``."""
    return FunctionSpace(mesh, "R", 0) if name == "R" else FunctionSpace(mesh, name.rstrip("012"), int(name[-1]))


def _measures(mesh, *names: str) -> list[Measure]:
    """Measures with the quadrature degree of all forms here."""
    return [Measure(name, mesh, metadata={"quadrature_degree": DEGREE}) for name in names]


def _controls(mesh, spaces: Sequence[str]):
    """Controls with values and directions; those of numbers are constants."""
    x, y = SpatialCoordinate(mesh)
    controls = [Function(_space(mesh, name), name=f"q{i}") for i, name in enumerate(spaces)]
    pairs = [
        (Constant(0.4 + 0.1 * i), Constant(0.7 - 0.2 * i))
        if name == "R"
        else (0.5 + 0.3 * x * y + 0.2 * sin(4 * x + i), cos(3 * x - 2 * y + i))
        for i, name in enumerate(spaces)
    ]
    return controls, [p[0] for p in pairs], [p[1] for p in pairs]


def _size(dx, weight=0.05):
    """The controls' regularisation, which is not quadratic."""
    return lambda controls: sum(weight * (c**2 / 2 + c**4 / 12) * dx for c in controls)


def heat(
    st, term: Callable, controls: Sequence[str] = ("P1",), *, state: str = "P1", n: int = 4, steps: int = 6,
    walls: str = "time-dependent", zero: bool = False, discontinuous: bool = False, moves: bool = False,
) -> Problem:  # fmt: skip
    """Heat conduction, with the terms of the controls made by ``term``.

    Parameters
    ----------
    term
        ``term(rate, u, v, t, controls, dx, ds, x)``: the form of the controls' terms, with all of capacity and
        conduction.
    controls
        Name of each control's space.
    state
        ``"P1"`` or ``"P2"``.
    walls
        Dirichlet values on one side: ``"none"``, ``"homogeneous"``, ``"inhomogeneous"`` or ``"time-dependent"``.
    zero
        Neither initial value, nor source, nor boundary values: the state is zero.
    discontinuous
        The state is in DG1.
    moves
        Whether ``term`` depends on ``t``.
    """
    mesh = square(n, st.space_comm)
    V = FunctionSpace(mesh, "DG", 1) if discontinuous else _space(mesh, state)
    x = SpatialCoordinate(mesh)
    dx, ds = _measures(mesh, "dx", "ds")
    functions, values, directions = _controls(mesh, controls)
    load = 0.0 if zero else 1 + 2 * x[0]
    wall = {
        "none": lambda t: None,
        "homogeneous": lambda t: 0,
        "inhomogeneous": lambda t: 0.5 + x[1],
        "time-dependent": lambda t: x[1] * cos(9 * t),
    }[walls]

    def residual(rates, fields, tests, t):
        (rate,), (u,), (v,) = rates, fields, tests
        form = term(rate, u, v, t, functions, dx, ds, x)
        return (form if zero else form - load * v * dx,)

    return Problem(
        V, functions, residual,
        running=lambda fields: ((fields[0] - x[0] * x[1]) ** 2 * (1 + fields[0] ** 2)) * dx,
        terminal=lambda fields: fields[0] ** 2 / 2 * dx - fields[0] * x[1] * dx,
        regularisation=_size(dx), start=[0.0 * x[0] if zero else sin(3 * x[0]) * x[1]],
        values=values, directions=directions, steps=steps,
        conditions=lambda spaces, t: [] if walls == "none" else [DirichletBC(spaces[0], wall(t), 1)],
        moves=moves or walls == "time-dependent",
    )  # fmt: skip


def heating_experiments(st, term: Callable, count: int) -> list[Problem]:
    """Several experiments of :func:`heat` with one log-conductivity: other sources, starts, wall values and misfits."""
    first = heat(st, term)
    (dx,), x = _measures(first.V.mesh(), "dx"), SpatialCoordinate(first.V.mesh())

    def experiment(i: int) -> Problem:
        residual = lambda rates, fields, tests, t: (
            first.residual(rates, fields, tests, t)[0] - i * cos(i * x[1] + t) * tests[0] * dx,
        )
        return replace(
            first, residual=residual, start=[sin((3 + i) * x[0]) * x[1]],
            running=lambda fields: (fields[0] - (1 + i) * x[0] * x[1]) ** 2 * dx,
            conditions=lambda spaces, t: [DirichletBC(spaces[0], x[1] * cos(9 * t + i), 1)],
        )  # fmt: skip

    return [experiment(i) for i in range(count)]


def conduction(slope: Callable) -> Callable:
    """``term`` of :func:`heat` with the conductivity ``slope(q)``."""
    return lambda rate, u, v, t, q, dx, ds, x: (rate * v + slope(q[0]) * inner(grad(u), grad(v))) * dx


def elastic(st, controls=("DG0",), *, n: int = 4) -> Problem:
    """Creep: a vector in P1, stiffness exponential in the control, clamped on one side."""
    mesh = square(n, st.space_comm)
    V, x = VectorFunctionSpace(mesh, "CG", 1), SpatialCoordinate(mesh)
    (dx,) = _measures(mesh, "dx")
    functions, values, directions = _controls(mesh, controls)

    def residual(rates, fields, tests, t):
        (rate,), (u,), (v,) = rates, fields, tests
        stiffness = exp(functions[0]) * inner(sym(grad(u)), sym(grad(v))) + 0.5 * div(u) * div(v)
        return ((inner(rate, v) + stiffness - inner(as_vector((x[1], -1)), v)) * dx,)

    return Problem(
        V, functions, residual,
        running=lambda fields: inner(fields[0], fields[0]) * dx, terminal=lambda fields: fields[0][1] * x[0] * dx,
        regularisation=_size(dx), start=[as_vector((x[0] * x[1], x[0] ** 2))], values=values, directions=directions,
        conditions=lambda spaces, t: [DirichletBC(spaces[0], as_vector((0, 0)), 1)],
    )  # fmt: skip


def maxwell(st, *, eliminate: int | None = None, controls=("DG0", "P1"), n: int = 4, dt: float = 0.05) -> Problem:
    """``E`` in N1curl and ``B`` in DG0; permittivity and conductivity of the medium are sought at once; a perfect
    conductor on one side, an absorbing wall on another, a current with a course.
    """
    mesh = square(n, st.space_comm)
    N = FunctionSpace(mesh, FiniteElement("N1curl", triangle, 1))
    V, x, normal = N * FunctionSpace(mesh, "DG", 0), SpatialCoordinate(mesh), FacetNormal(mesh)
    dx, ds = _measures(mesh, "dx", "ds")
    functions, values, directions = _controls(mesh, controls)
    rot, along = lambda f: f[1].dx(0) - f[0].dx(1), lambda f: normal[0] * f[1] - normal[1] * f[0]

    def residual(rates, fields, tests, t):
        (rate_e, rate_b), (electric, magnetic), (v, c) = rates, fields, tests
        epsilon, sigma = exp(functions[0]), exp(functions[1]) - 0.5
        current = cos(6 * t) * as_vector((x[1], 1 - x[0]))
        first = (inner(epsilon * rate_e + sigma * electric - current, v) - magnetic * rot(v)) * dx
        first += sqrt(epsilon) * along(electric) * along(v) * ds(2)
        return first, (rate_b + rot(electric)) * c * dx

    return Problem(
        V, functions, residual,
        running=lambda fields: (inner(fields[0], fields[0]) * (1 + x[0]) + fields[1] ** 2) * dx,
        terminal=lambda fields: (fields[1] - x[0]) ** 2 * dx,
        regularisation=_size(dx), start=[as_vector((0 * x[0], sin(pi * x[0]))), cos(pi * x[0]) * x[1]],
        values=values, directions=directions, dt=dt,
        conditions=lambda spaces, t: [DirichletBC(spaces[0], as_vector((0, 0)), 1)],
        moves=True, eliminate=eliminate,
    )  # fmt: skip


def acoustics(
    st, *, eliminate: int | None = None, control: str = "DG0", where: str = "mass", n: int = 4, dt: float = 0.04
) -> Problem:
    """First-order acoustics, velocity in RT and pressure in DG0, the wave speed ``c = exp(q)`` sought, with a damping
    layer: ``where`` the speed is, beside the rate of the pressure (``"mass"``) or the divergence (``"stiffness"``).
    """
    mesh = square(n, st.space_comm)
    V, x = FunctionSpace(mesh, "RT", 1) * FunctionSpace(mesh, "DG", 0), SpatialCoordinate(mesh)
    (dx,) = _measures(mesh, "dx")
    functions, values, directions = _controls(mesh, (control,))

    def residual(rates, fields, tests, t):
        (rate_w, rate_p), (w, p), (v, r) = rates, fields, tests
        square_of_speed = exp(2 * functions[0])
        mass, stiffness = (1 / square_of_speed, 1) if where == "mass" else (1, square_of_speed)
        first = (inner(rate_w + x[0] ** 2 * w, v) - p * div(v)) * dx
        return first, (mass * rate_p + stiffness * div(w) - sin(7 * t) * x[0] * x[1]) * r * dx

    return Problem(
        V, functions, residual,
        running=lambda fields: (fields[1] ** 2 * (1 + x[1]) + inner(fields[0], fields[0])) * dx,
        terminal=lambda fields: (fields[1] - x[0]) ** 2 * dx,
        regularisation=_size(dx), start=[as_vector((0 * x[0], 0 * x[0])), sin(pi * x[0]) * x[1]],
        values=values, directions=directions, dt=dt, moves=True, eliminate=eliminate,
    )  # fmt: skip


def pressure_waves(st, *, n: int = 4, dt: float = 0.02) -> Problem:
    """First-order acoustics, pressure in P1 and velocity in DG0, which is eliminated; the wave speed ``c = exp(q)`` is
    beside the rate and the damping of the pressure.
    """
    mesh = square(n, st.space_comm)
    V, x = FunctionSpace(mesh, "CG", 1) * VectorFunctionSpace(mesh, "DG", 0), SpatialCoordinate(mesh)
    (dx,) = _measures(mesh, "dx")
    functions, values, directions = _controls(mesh, ("P1",))

    def residual(rates, fields, tests, t):
        (rate_p, rate_w), (p, w), (r, v) = rates, fields, tests
        slowness = exp(-2 * functions[0])
        first = slowness * (rate_p + x[0] ** 2 * p) * r - inner(w, grad(r)) - sin(7 * t) * x[0] * x[1] * r
        return first * dx, inner(rate_w + grad(p), v) * dx

    return Problem(
        V, functions, residual,
        running=lambda fields: (fields[0] ** 2 * (1 + x[1]) + inner(fields[1], fields[1])) * dx,
        terminal=lambda fields: (fields[0] - x[0]) ** 2 * dx,
        regularisation=_size(dx), start=[sin(pi * x[0]) * x[1], as_vector((0 * x[0], 0 * x[0]))],
        values=values, directions=directions, dt=dt, moves=True, eliminate=1,
    )  # fmt: skip


def facet_diffusion(rate, u, v, t, q, dx, ds, x):
    """``term`` of :func:`heat` for DG1: interior penalty, the conductivity ``exp(q)`` on cells and facets."""
    normal, dS = FacetNormal(dx.ufl_domain()), _measures(dx.ufl_domain(), "dS")[0]
    kappa = exp(q[0])
    form = (rate * v + kappa * inner(grad(u), grad(v))) * dx
    form += (
        40 * avg(kappa) * inner(jump(u), jump(v))
        - inner(avg(kappa * grad(u)), jump(v, normal))
        - inner(jump(u, normal), avg(kappa * grad(v)))
    ) * dS
    return form

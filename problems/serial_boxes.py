r"""The source problems in a box the ordinary way: plain Firedrake, a loop over the steps on one pyadjoint tape.

The baselines of :mod:`problems.heat_box` and :mod:`problems.maxwell_box`: the same discrete problems, value for value,
with none of ``pint_fem``'s solvers; stages as in :mod:`problems.serial_pyadjoint`. What a careful user does is done
here: the operators are assembled and their solvers set up once (``constant_jacobian``), a step is one solve a stage,
all ranks share each state, and B is eliminated: it is the curl of a potential A in the space of E, so that a stage is

.. math::
    (\varepsilon + h \sigma) E + h^2\, \nabla \times \mu^{-1} \nabla \times E
    = \varepsilon W_E + h\, \nabla \times (\mu^{-1} \nabla \times W_A) - h s J , \qquad A = W_A - h E .

On one rank and meshes of moderate size systems are solved by a factorisation, otherwise by conjugate gradients with
multigrid, algebraic for heat, and for E geometric with patches around vertices.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from firedrake import (
    DirichletBC,
    Function,
    FunctionSpace,
    LinearVariationalProblem,
    LinearVariationalSolver,
    SpatialCoordinate,
    TestFunction,
    TrialFunction,
    VectorFunctionSpace,
    assemble,
    curl,
    dx,
    inner,
)
from firedrake.adjoint import Control, ReducedFunctional
from ufl import replace

from pint_fem.errors import InputError
from pint_fem.propagators.tape import recording
from pint_fem.spacetime import SpaceTime
from problems import heat_box, maxwell_box
from problems.box import box_hierarchy, first_readings
from problems.heat_box_setting import (
    bilinear_forms,
    boundary_conditions,
    initial_temperature,
)
from problems.maxwell import E, Medium, state_space
from problems.maxwell_box_setting import SETTING, antenna_functionals
from problems.maxwell_setting import signal
from problems.meshfile import locate
from problems.priors import prior_of
from problems.readings import Readings, misfit_weight, read_readings
from problems.serial_pyadjoint import DIRECT, NODES, SCHEMES, SerialSource, add_squares, reading_places, trajectory

__all__ = ["serial_heat_box", "serial_maxwell_box", "standard_solver"]

FACTORED = 40_000
"""Unknowns up to which systems are factored on one rank."""
_RTOL = 1e-11


def standard_solver(V, *, algebraic: bool) -> dict:
    """Return PETSc options that a Firedrake user would choose for symmetric positive definite systems in space.

    Parameters
    ----------
    V
        Space of the unknowns.
    algebraic
        Whether algebraic multigrid serves, as for heat; otherwise it is geometric with patches.
    """
    if V.mesh().comm.size == 1 and V.dim() <= FACTORED:
        return dict(DIRECT)
    iterations = {"ksp_type": "cg", "ksp_rtol": _RTOL}
    if algebraic:
        return iterations | {"pc_type": "gamg"}
    star = {"ksp_type": "chebyshev", "ksp_max_it": 2, "pc_type": "python", "pc_python_type": "firedrake.ASMStarPC"}
    return iterations | {"pc_type": "mg", "mg_levels": star, "mg_coarse": {"pc_type": "lu"}}


def serial_heat_box(
    spacetime: SpaceTime, *, refine: int, elements: str, readings: str | Path | Readings, steps: int, integrator: str,
    alpha: float, beta: float, noise: float, first_steps: int | None = None,
) -> SerialSource:  # fmt: skip
    """Record the problem of :func:`problems.heat_box.heat_box`, with the same arguments, on a grid without ranks in
    time.

    Raises
    ------
    InputError
        On a bad file or integrator.
    """
    start, setting = time.perf_counter(), heat_box
    data = read_readings(readings, setting.FINAL_TIME, setting.COLUMNS)
    weight, dt = misfit_weight(data, noise), setting.FINAL_TIME / steps
    taken = steps if first_steps is None else first_steps
    data = first_readings(data, taken * dt)
    mesh = box_hierarchy(spacetime, setting.CELLS, refine)[-1]
    V = FunctionSpace(mesh, "CG", heat_box.DEGREES[elements])
    q, prior = Function(FunctionSpace(mesh, "CG", 1), name="source"), prior_of(alpha, beta)
    with recording() as tape:
        states = trajectory(
            lambda w, v: bilinear_forms(w, v)[0],
            lambda w, v: bilinear_forms(w, v)[1],
            lambda v: q * v * dx,
            V,
            boundary_conditions(V),
            dt=dt,
            steps=taken,
            integrator=integrator,
            parameters=standard_solver(V, algebraic=True),
            initial=initial_temperature(SpatialCoordinate(mesh)),
        )
        J = assemble(0.5 * prior(q, q))
        sensors = locate(data.points, mesh, data.sensors)
        J = add_squares(J, states, data, weight, sensors, steps=taken, final_time=taken * dt)
    return SerialSource(ReducedFunctional(J, Control(q), tape=tape), q, taken, time.perf_counter() - start)


def serial_maxwell_box(
    spacetime: SpaceTime, *, refine: int, degree: int, readings: str | Path | Readings, steps: int, integrator: str,
    alpha: float, beta: float, noise: float, first_steps: int | None = None,
) -> SerialSource:  # fmt: skip
    """Record the problem of :func:`problems.maxwell_box.maxwell_box`, with the same arguments, on a grid without ranks
    in time.

    Raises
    ------
    InputError
        On a bad file or integrator.
    """
    start, given = time.perf_counter(), SETTING
    if integrator not in SCHEMES:
        raise InputError(f"serial comparison with integrator {integrator!r}: give one of {', '.join(SCHEMES)}")
    data = read_readings(readings, given.final_time, maxwell_box.COLUMNS)
    weight, dt = float(misfit_weight(data, noise)), given.final_time / steps
    taken = steps if first_steps is None else first_steps
    data = first_readings(data, taken * dt)
    mesh = box_hierarchy(spacetime, maxwell_box.CELLS, refine)[-1]
    J, prior = Function(VectorFunctionSpace(mesh, "CG", 1), name="current"), prior_of(alpha, beta)
    before, theta = reading_places(data.times, taken, taken * dt)
    table, seen = data.values.reshape(len(data.times), -1), {}
    needed = set(before + 1) | set(before[theta < 1])
    observed = Function(FunctionSpace(mesh, "N1curl", degree))
    antennas = antenna_functionals(observed, mesh, data.points)
    with recording() as tape:
        functional = assemble(0.5 * prior(J, J))
        for n, u in _maxwell_states(mesh, degree, J, dt=dt, steps=taken, integrator=integrator):
            if n not in needed:
                continue
            seen[n] = [assemble(replace(form, {observed: u})) for form in antennas]
            for r in (before == n - 1).nonzero()[0]:
                for s, new in enumerate(seen[n]):
                    w = float(theta[r])
                    at = new if w == 1 else w * new + (1 - w) * seen[n - 1][s]
                    functional += 0.5 * weight * (at - float(table[r, s])) ** 2
    rf = ReducedFunctional(functional, Control(J), tape=tape)
    return SerialSource(rf, J, taken, time.perf_counter() - start)


def _maxwell_states(
    mesh, degree: int, J: Function, *, dt: float, steps: int, integrator: str
) -> Iterator[tuple[int, Function]]:
    """Step from zero; yield the numbers of the points and E, on the tape that is being recorded."""
    given, (length, weights), nodes = SETTING, SCHEMES[integrator], NODES[integrator]
    spaces = state_space(mesh, degree)
    electric, potential = (Function(spaces.sub(E).collapse(), name=name) for name in ("E", "A"))
    N, medium, h = electric.function_space(), Medium(mesh, given.regions), float(length * dt)
    w, v = TrialFunction(N), TestFunction(N)
    system = ((medium.epsilon + h * medium.sigma) * inner(w, v) + h**2 / medium.mu * inner(curl(w), curl(v))) * dx
    bcs = [DirichletBC(N, 0, given.walls.conductor)]
    stages, (W_E, W_A) = [], (electric, potential)
    for c in map(float, weights):
        # the time course's value is a function of R that each stage assigns
        U, s = Function(N), Function(FunctionSpace(mesh, "R", 0))
        load = (medium.epsilon * inner(W_E, v) + h / medium.mu * inner(curl(W_A), curl(v)) - h * s * inner(J, v)) * dx
        equation = LinearVariationalProblem(system, load, U, bcs=bcs, constant_jacobian=True)
        stages.append((LinearVariationalSolver(equation, solver_parameters=standard_solver(N, algebraic=False)), s))
        W_E, W_A = (1 - c) * W_E + c * U if c != 1 else U, W_A - c * h * U
    yield 0, electric
    for n in range(1, steps + 1):
        for (solver, s), node in zip(stages, nodes, strict=True):
            s.assign(float(signal((n - 1 + node) * dt, given)))
            solver.solve()
        electric.assign(W_E)
        potential.assign(W_A)
        yield n, electric

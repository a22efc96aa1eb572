r"""The Maxwell source problem the ordinary way: plain Firedrake, a loop over the steps on one pyadjoint tape.

The opponent of :mod:`problems.maxwell_source`: the same discrete problem, value for value, with none of ``pint_fem``'s
solvers; stages as in :mod:`problems.serial_pyadjoint`. What a careful user does is done here: the operator of the mixed
system is factored once, a step is one solve a stage, and the control's inner product is the prior's.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
from firedrake import (
    COMM_SELF,
    Constant,
    FacetNormal,
    Function,
    FunctionSpace,
    LinearVariationalProblem,
    LinearVariationalSolver,
    TestFunctions,
    TrialFunctions,
    VectorFunctionSpace,
    assemble,
    curl,
    ds,
    dx,
    inner,
    split,
    sqrt,
)
from firedrake.adjoint import ReducedFunctional

from pint_fem.errors import InputError
from pint_fem.propagators.tape import recording
from problems.maxwell import E, Medium, perfect_conductor, state_space, tangential
from problems.maxwell_readings import COLUMNS, NOISE, readings_file
from problems.maxwell_setting import CELLS, box_mesh, setting, signal
from problems.maxwell_source import ALPHA, BETA, DEGREE
from problems.meshfile import locate
from problems.priors import prior_of
from problems.readings import Readings, read_readings
from problems.serial_pyadjoint import DIRECT_MIXED, NODES, SCHEMES, SerialSource, add_squares, control_with_prior

__all__ = ["serial_maxwell_source"]


def serial_maxwell_source(
    *, regime: str = "lossy", cells: int = CELLS, degree: int = DEGREE, readings: str | Path | Readings | None = None,
    steps: int | None = None, integrator: str | None = None, alpha: float | None = None, beta: float | None = None,
    noise: float = NOISE, comm=COMM_SELF,
) -> SerialSource:  # fmt: skip
    """Record the problem of :func:`problems.maxwell_source.maxwell_source`, with the same arguments.

    Raises
    ------
    InputError
        On a bad file or integrator.
    """
    start, given = time.perf_counter(), setting(regime)
    alpha = ALPHA[regime] if alpha is None else alpha
    beta = BETA[regime] if beta is None else beta
    integrator, steps = integrator or given.integrator, given.steps if steps is None else steps
    if integrator not in SCHEMES:
        raise InputError(f"serial comparison with integrator {integrator!r}: give one of {', '.join(SCHEMES)}")
    data = read_readings(readings or readings_file(regime), given.final_time, COLUMNS)
    mesh = box_mesh(cells, comm)
    probes = locate(data.points, mesh, data.sensors)
    V, medium = state_space(mesh, degree), Medium(mesh, given.regions)
    J = Function(VectorFunctionSpace(mesh, "CG", 1), name="current")
    there = 1.0 - np.ma.getmaskarray(data.values)
    sigma = noise * np.abs(np.ma.filled(data.values, 0.0)).max()
    weight = 1 / (sigma**2 * there.sum())
    prior = prior_of(alpha, beta)
    with recording() as tape:
        functional = assemble(0.5 * prior(J, J))
        states = _trajectory(V, medium, given, J, dt=given.final_time / steps, steps=steps, integrator=integrator)
        of_E = dict(observed=lambda u: split(u)[E], space=VectorFunctionSpace)
        length = dict(steps=steps, final_time=given.final_time)
        functional = add_squares(functional, states, data, weight, probes, **length, **of_E)
    rf = ReducedFunctional(functional, control_with_prior(J, prior), tape=tape)
    return SerialSource(rf, J, steps, time.perf_counter() - start)


def _trajectory(V, medium: Medium, given, J: Function, *, dt: float, steps: int, integrator: str):
    """Step from zero; yield ``(0, u), (1, u), ..., (steps, u)``."""
    (length, weights), nodes = SCHEMES[integrator], NODES[integrator]
    h, w, v = Constant(length * dt), TrialFunctions(V), TestFunctions(V)
    mass = lambda a: (medium.epsilon * inner(a[0], v[0]) + inner(a[1], v[1]) / medium.mu) * dx
    stiffness = (
        medium.sigma * inner(w[0], v[0]) - inner(w[1] / medium.mu, curl(v[0])) + inner(curl(w[0]) / medium.mu, v[1])
    ) * dx
    if given.walls.impedance:
        n = FacetNormal(V.mesh().unique())
        loss = sqrt(medium.epsilon / medium.mu) * inner(tangential(n, w[0]), tangential(n, v[0]))
        stiffness += loss * ds(tuple(given.walls.impedance))
    u, solvers, course = Function(V, name="state"), [], []
    W, bcs = u, perfect_conductor(V, given.walls)
    for c in weights:
        # the signal's value is a number on the tape: a function of R that each step assigns
        U, s = Function(V), Function(FunctionSpace(V.mesh().unique(), "R", 0))
        load = mass(split(W)) if isinstance(W, Function) else mass(tuple(W))
        equation = LinearVariationalProblem(
            mass(w) + h * stiffness, load - h * s * inner(J, v[0]) * dx, U, bcs=bcs, constant_jacobian=True
        )
        solvers.append(LinearVariationalSolver(equation, solver_parameters=DIRECT_MIXED))
        course.append(s)
        c = float(c)
        old, new = split(W) if isinstance(W, Function) else W, split(U)
        W = U if c == 1 else tuple((1 - c) * a + c * b for a, b in zip(old, new, strict=True))
        last = (1 - c, c, U)
    yield 0, u
    for n in range(1, steps + 1):
        for solver, s, node in zip(solvers, course, nodes, strict=True):
            s.assign(float(signal((n - 1 + node) * dt, given)))
            solver.solve()
        a, c, U = last
        u.assign(U if c == 1 else a * u + c * U)
        yield n, u

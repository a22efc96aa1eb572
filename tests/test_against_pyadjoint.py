"""Converged, the time-parallel functional is the discrete problem that a serial pyadjoint tape of the same steps
differentiates.
"""

from dataclasses import replace

import numpy as np
import pytest
from firedrake import (
    COMM_SELF,
    Constant,
    DirichletBC,
    Function,
    FunctionSpace,
    LinearVariationalProblem,
    LinearVariationalSolver,
    NonlinearVariationalProblem,
    NonlinearVariationalSolver,
    SpatialCoordinate,
    TestFunction,
    TrialFunction,
    assemble,
    dx,
    exp,
    grad,
    inner,
)
from firedrake.adjoint import Control, ReducedFunctional
from irksome import Dt

import pint_fem as pf
from pint_fem.propagators import FormPropagator
from pint_fem.propagators.tape import recording
from problems.heat_source import heat_source
from problems.plate import FINAL_TIME
from problems.readings import read_readings
from problems.serial_minimise import minimise
from problems.serial_pyadjoint import serial_heat_source
from tests.heat_readings import some_readings
from tests.meshes import square

STEPS, DT = 9, 0.02


def relative(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def assert_same(ours, theirs):
    """``(J, gradient, Hessian action)`` of both, as numbers and arrays."""
    assert relative(ours[0], theirs[0]) < 1e-8
    assert relative(ours[1], theirs[1]) < 1e-8
    assert relative(ours[2], theirs[2]) < 1e-7


def at(V, values):
    f = Function(V)
    f.dat.data_wo[:] = values
    return f


@pytest.mark.parametrize(
    "integrator",
    ["SDIRK2", *(pytest.param(name, marks=pytest.mark.grid) for name in ("BackwardEuler", "ImplicitMidpoint"))],
)
def test_heat_source(integrator, tmp_path):
    assert_same_heat_source(some_readings(tmp_path / "readings.csv", 22), integrator)


def test_heat_source_with_missing_readings(tmp_path):
    """One in three, and one sensor's and one time's altogether."""
    read = read_readings(some_readings(tmp_path / "readings.csv", 22), FINAL_TIME)
    missing = np.random.default_rng(0).uniform(size=read.values.shape) < 1 / 3
    missing[1], missing[:, 3] = True, True
    values = np.ma.MaskedArray(np.where(missing, 1e9, read.values), missing)
    assert_same_heat_source(replace(read, values=values), "BackwardEuler")


def assert_same_heat_source(readings, integrator):
    mgrit = {"rtol": 1e-12, "coarsening": (4,)}
    ours = heat_source(
        pf.SpaceTime("1x1", comm=COMM_SELF), readings=readings, steps=8, integrator=integrator,
        solver_parameters={"mgrit": mgrit},
    ).rf  # fmt: skip
    theirs = serial_heat_source(readings=readings, steps=8, integrator=integrator)
    results, rng = [], np.random.default_rng(0)
    z, dz = 10 * rng.standard_normal((2, theirs.q.function_space().dim()))
    for rf in (ours, theirs.rf):
        V = rf.controls[0].control.function_space()
        J = float(rf(at(V, z)))
        results.append((J, rf.derivative().dat.data_ro.copy(), rf.hessian(at(V, dz)).dat.data_ro.copy()))
    assert np.array_equal(
        ours.evolution.V.mesh().coordinates.dat.data_ro, theirs.q.function_space().mesh().coordinates.dat.data_ro
    )
    assert_same(*results)


def test_opponent_descends(tmp_path):
    """The optimiser starts at the recorded control, prints a line an iteration and lowers the functional."""
    readings, lines = some_readings(tmp_path / "readings.csv", 11), []
    serial = serial_heat_source(readings=readings, steps=4, integrator="BackwardEuler")
    first = float(serial.rf(serial.q))
    result = minimise(serial, max_it=3, printer=lines.append)
    assert not result.converged
    assert result.iterations == 3
    assert len([line for line in lines if line.split()[0].isdigit()]) == 4
    assert result.value < 0.1 * first
    assert relative(float(serial.rf(result.control)), result.value) < 1e-12


def test_nonlinear():
    """Conductivity that depends on state and control, through Newton's method on every step."""
    mesh = square(5, COMM_SELF)
    V = FunctionSpace(mesh, "CG", 1)
    x, y = SpatialCoordinate(mesh)
    u, v, q = Function(V), TestFunction(V), Function(V)
    flux = lambda w: (1 + w**2 + 0.1 * q**2) * inner(grad(w), grad(v)) * dx - q * exp(-w) * v * dx
    bcs = DirichletBC(V, 0.3 * y, 1)
    running, terminal = lambda w: (w - x) ** 2 * (1 + w**2) * dx, lambda w: w**4 * dx
    regularisation = lambda z: (1e-2 * inner(grad(z), grad(z)) + 1e-3 * z**4) * dx
    start = Function(V).interpolate(x * y)
    evolution = pf.Evolution(
        Dt(u) * v * dx + flux(u), u, tableau=pf.BackwardEuler(), dt=DT, nsteps=STEPS, control=q, bcs=bcs, initial=start
    )
    ours = pf.TimeParallelReducedFunctional(
        evolution,
        [pf.RunningMisfit(running(u)), pf.TerminalMisfit(terminal(u))],
        regularisation=regularisation(q),
        spacetime=pf.SpaceTime("1x1", comm=COMM_SELF),
        solver_parameters={"mgrit": {"rtol": 1e-12, "coarsening": (3,)}},
    )
    assert all(isinstance(p, FormPropagator) for p in ours.problem.sweeps.propagators)
    q.interpolate(1 + x)
    with recording() as tape:
        U, W = Function(V), start.copy(deepcopy=True)
        problem = NonlinearVariationalProblem((U - W) / Constant(DT) * v * dx + flux(U), U, bcs=bcs)
        newton = {
            "snes_rtol": 1e-13,
            "snes_atol": 1e-14,
            "snes_stol": 0,
            "snes_max_it": 8,
            "ksp_type": "preonly",
            "pc_type": "lu",
        }
        newton |= {"snes_convergence_test": "skip", "snes_linesearch_type": "basic"}
        solver = NonlinearVariationalSolver(problem, solver_parameters=newton)
        J = assemble(regularisation(q))
        for _ in range(STEPS):
            solver.solve()
            W.assign(U)
            J += assemble(DT * running(W))
        J += assemble(terminal(W))
    theirs = ReducedFunctional(J, Control(q), tape=tape)
    z, dz = Function(V).interpolate(2 - y), Function(V).interpolate(x - 2 * x * y)
    assert_same(*[
        (float(rf(z)), rf.derivative().dat.data_ro.copy(), rf.hessian(dz).dat.data_ro.copy()) for rf in (ours, theirs)
    ])  # fmt: skip


def test_one_control_a_step():
    """The tape has a control for each step, ours is one function of space and time."""
    spacetime = pf.SpaceTime("1x1", comm=COMM_SELF)
    mesh = square(5, spacetime.space_comm)
    V, Q = FunctionSpace(mesh, "CG", 1), FunctionSpace(mesh, "DG", 0)
    x, y = SpatialCoordinate(mesh)
    u, v, w, q = Function(V), TestFunction(V), TrialFunction(V), Function(Q)
    bcs = DirichletBC(V, 0, 1)
    running, regularisation = lambda u: (u - x * y) ** 2 * dx, lambda z: 1e-2 * z**2 * dx
    evolution = pf.Evolution(
        Dt(u) * v * dx + inner(grad(u), grad(v)) * dx - q * v * dx, u,
        tableau=pf.BackwardEuler(), dt=DT, nsteps=STEPS, control=q, per_step=True, bcs=bcs,
    )  # fmt: skip
    ours = pf.TimeParallelReducedFunctional(
        evolution,
        pf.RunningMisfit(running(u)),
        regularisation=regularisation(q),
        spacetime=spacetime,
        solver_parameters={"mgrit": {"rtol": 1e-12, "coarsening": (3,)}},
    )
    controls = [Function(Q) for _ in range(STEPS)]
    with recording() as tape:
        U, W, qn, J = Function(V), Function(V), Function(Q), 0.0
        problem = LinearVariationalProblem(
            w * v * dx + DT * inner(grad(w), grad(v)) * dx,
            W * v * dx + DT * qn * v * dx,
            U,
            bcs=bcs,
            constant_jacobian=True,
        )
        solver = LinearVariationalSolver(problem)
        for control in controls:
            qn.assign(control)
            solver.solve()
            W.assign(U)
            J += assemble(DT * running(W)) + assemble(DT * regularisation(control))
    theirs = ReducedFunctional(J, [Control(control) for control in controls], tape=tape)
    rng = np.random.default_rng(1)
    z, dz = rng.standard_normal((2, STEPS, Q.dim()))
    ensemble = [ours.controls[0].control.copy() for _ in range(2)]
    for f, values in zip(ensemble, (z, dz), strict=True):
        for part, row in zip(f.subfunctions, values, strict=True):
            part.dat.data_wo[:] = row
    rows = lambda functions: np.array([f.dat.data_ro for f in functions])
    a = float(ours(ensemble[0])), rows(ours.derivative().subfunctions), rows(ours.hessian(ensemble[1]).subfunctions)
    b = (
        float(theirs([at(Q, row) for row in z])),
        rows(theirs.derivative()),
        rows(theirs.hessian([at(Q, row) for row in dz])),
    )
    assert_same(a, b)

"""The map from controls with one value per step to readings: products by FFT, beside static ones."""

import numpy as np
import pytest
from firedrake import (
    Constant,
    DirichletBC,
    Function,
    FunctionSpace,
    LinearVariationalProblem,
    LinearVariationalSolver,
    SpatialCoordinate,
    TestFunction,
    TrialFunction,
    VertexOnlyMesh,
    assemble,
    cos,
    dot,
    dx,
    grad,
    interpolate,
    sin,
)
from mpi4py import MPI

import pint_fem as pf
from pint_fem.inverse.per_step import toeplitz
from tests.ranks import cases
from tests.step_controls import KINDS, POINTS, functional, swept, vectors

COMM = MPI.COMM_WORLD


@pytest.mark.parallel([1, 2, 3])
@pytest.mark.parametrize("tableau", cases(["BE", "SDIRK2", "midpoint"], on_ranks=["SDIRK2"]))
def test_products_are_the_readings_of_the_sweeps_and_their_adjoint(tableau, monkeypatch):
    """Fields, reals and boundary values with one value per step, loads that depend on time, beside a static source and
    the initial condition; readings between steps, at different times for two groups of sensors, some missing.
    """
    monkeypatch.setattr(toeplitz, "_WORK", 1)  # one vector after another
    for grid in ["1x1", (1, COMM.size), (COMM.size, 1)][int(COMM.size > 1) : 1 + min(2, COMM.size)]:
        st = pf.SpaceTime(grid)
        J = functional(st, tableau=tableau)
        F, z = J.parameter_to_observable(), vectors(J, 3)
        y, Y = F.product(z), np.random.default_rng(1).standard_normal((2, F.shape[0]))
        expected = np.array([swept(J, zi) for zi in z])
        np.testing.assert_allclose(y + F.offset, expected, rtol=0, atol=1e-12 * np.abs(expected).max())
        for g, w in zip(F.transposed_product(Y), Y, strict=True):
            assert J.layout.pairing(g, z[0]) == pytest.approx(w @ y[0], rel=0, abs=1e-13 * np.abs(w) @ np.abs(y[0]))
        np.testing.assert_allclose(F @ z[0], y[0], rtol=0, atol=1e-13)


@pytest.mark.parallel([1, 2])
@pytest.mark.parametrize("wanted", [("amplitude",), ("wall",), ("strength", "initial")])
def test_products_for_one_kind_of_control(wanted):
    """Ranks in time without a column among them, as for one real number."""
    J = functional(pf.SpaceTime(), wanted, steps=5)
    F, z = J.parameter_to_observable(), vectors(J, 1)
    expected = swept(J, z[0]) - F.offset
    np.testing.assert_allclose(F.product(z)[0], expected, rtol=0, atol=1e-12 * np.abs(expected).max())
    w = np.cos(np.arange(F.shape[0]))
    g = F.transposed_product(w[None])[0]
    assert J.layout.pairing(g, z[0]) == pytest.approx(w @ expected, rel=0, abs=1e-12 * np.abs(expected).max())


def test_products_are_those_of_the_dense_matrix():
    """By the formula of a reading's row, response by response."""
    J = functional(pf.SpaceTime("1x1", comm=MPI.COMM_SELF), ("wall", "amplitude", "strength"), steps=6)
    F, layout = J.parameter_to_observable(), J.layout
    F_dense = np.zeros(F.shape)
    steps = F.steps.columns.steps(F_dense)  # of one rank, in the order of a step's controls
    rows = np.zeros(steps.shape)
    for r, (s, n, theta) in enumerate(zip(F.table.sensor, F.table.point, F.table.theta, strict=True)):
        for term in F.steps.terms:
            for i in range(n):
                rows[r, i] += theta * term.weights[i] * term.responses[s, n - 1 - i]
                if i <= n - 2:
                    rows[r, i] += (1 - theta) * term.weights[i] * term.responses[s, n - 2 - i]
    F.steps.columns.put_steps(F_dense, rows)
    scale = np.abs(F_dense).max()
    assert scale > 0
    assert len(F.steps.terms) == 5  # what is the same in all steps; x sin(7 t) and y in two stages
    np.testing.assert_allclose(F @ np.eye(layout.size), F_dense, rtol=0, atol=1e-13 * scale)
    np.testing.assert_allclose(F.T @ np.eye(F.shape[0]), F_dense.T, rtol=0, atol=1e-13 * scale)


def test_products_are_the_readings_of_a_plain_loop():
    """Backward Euler by Firedrake's own solver, step by step; sensors between the nodes and between the steps."""
    J = functional(pf.SpaceTime("1x1", comm=MPI.COMM_SELF), tableau="BE", steps=6)
    F, z, ev = J.parameter_to_observable(), vectors(J, 1)[0], J.evolution
    values = dict(zip((c.name() for c in ev.controls), J.layout.parts(z), strict=True))
    assert set(values) == set(KINDS)
    V, dt = ev.V, ev.dt
    x, y = SpatialCoordinate(V.mesh())
    own = {c.name(): Function(c.function_space()) for c in ev.controls}
    t, u, new = Constant(0.0), Function(V), Function(V)
    a, v = TrialFunction(V), TestFunction(V)
    load = own["source"] * cos(3 * t) + own["strength"] * (1 + x) + own["amplitude"] * (x * sin(7 * t) + y)
    load += sin(5 * t) * x
    bcs = [DirichletBC(V, own["wall"] + y, 1), DirichletBC(V, 0, 2)]
    problem = LinearVariationalProblem(a * v * dx + dt * dot(grad(a), grad(v)) * dx, (u + dt * load) * v * dx, new, bcs)
    solver = LinearVariationalSolver(problem, solver_parameters={"ksp_type": "preonly", "pc_type": "lu"})
    u.dat.data[:] = values["initial"]
    own["source"].dat.data[:] = values["source"]
    places = np.concatenate([POINTS, POINTS[:1] + 0.1])
    P0 = FunctionSpace(VertexOnlyMesh(V.mesh(), places), "DG", 0)
    inputs = FunctionSpace(P0.mesh().input_ordering, "DG", 0)
    read = lambda: assemble(interpolate(assemble(interpolate(u, P0)), inputs)).dat.data_ro.copy()
    at_points = [read()]
    for n in range(ev.nsteps):
        t.assign((n + 1) * dt)
        for name in ("strength", "amplitude", "wall"):
            own[name].dat.data[:] = values[name][n]
        solver.solve()
        u.assign(new)
        at_points.append(read())
    at_points, table = np.array(at_points), F.table
    n, s, theta = table.point, table.sensor, table.theta
    expected = theta * at_points[n, s] + (1 - theta) * at_points[n - 1, s]
    np.testing.assert_allclose(F.predict(z), expected, rtol=0, atol=1e-12 * np.abs(expected).max())


@pytest.mark.parallel([1, 2])
def test_a_saved_map_is_loaded_on_another_number_of_ranks(tmp_path):
    path = COMM.bcast(tmp_path / "map.h5")
    made = functional(pf.SpaceTime(), steps=5).parameter_to_observable()
    made.save(path)
    J = functional(pf.SpaceTime("1x1", comm=MPI.COMM_SELF), steps=5)
    F, z = J.parameter_to_observable(load=path), vectors(J, 1)
    expected = swept(J, z[0])
    np.testing.assert_allclose(F.predict(z[0]), expected, rtol=0, atol=1e-12 * np.abs(expected).max())
    made.spacetime.comm.barrier()

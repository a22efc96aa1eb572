"""Nullspaces of the stages' systems: against pseudo-inverses, against serial pyadjoint, and what is refused."""

import numpy as np
import pytest
from firedrake import (
    COMM_WORLD,
    Function,
    FunctionSpace,
    Identity,
    MixedVectorSpaceBasis,
    SpatialCoordinate,
    TestFunction,
    TestFunctions,
    UnitSquareMesh,
    VectorFunctionSpace,
    VectorSpaceBasis,
    as_vector,
    cos,
    div,
    ds,
    dx,
    exp,
    grad,
    inner,
    pi,
    sin,
    sym,
    tr,
)
from firedrake.petsc import PETSc
from mpi4py import MPI

import pint_fem as pf
import pint_fem.kernels.factor
from pint_fem.errors import InputError
from pint_fem.kernels.factor import Factor
from pint_fem.kernels.nullspace import Nullspace
from pint_fem.kernels.regularity import is_singular
from pint_fem.mgrit import SolverFailure
from pint_fem.propagators import FormPropagator, LinearPropagator, TapePropagator
from tests.limits import time_limit
from tests.solves import solutions
from tests.test_user_problems import GRIDS, by_hand, distance, rows, with_values
from tests.user_tasks import Task, navier_stokes, partitioned, pose


# -- algebra -----------------------------------------------------------------------------------------------------------
def singular_matrix(n, rank_loss, comm):
    """A matrix with random, different nullspaces on both sides: dense, as PETSc's matrix, and own rows."""
    rng = np.random.default_rng(5)
    A = rng.standard_normal((n, n)) + n * np.eye(n)
    U, s, VT = np.linalg.svd(A)
    s[n - rank_loss :] = 0
    dense = U @ np.diag(s) @ VT
    start = n * comm.rank // comm.size
    stop = n * (comm.rank + 1) // comm.size
    local = stop - start
    csr = (np.arange(local + 1) * n, np.tile(np.arange(n), local), dense[start:stop].ravel())
    matrix = PETSc.Mat().createAIJ(((local, n), (local, n)), csr=[x.astype(t) for x, t in zip(csr, (
        PETSc.IntType, PETSc.IntType, float), strict=True)], comm=comm)  # fmt: skip
    right, left = VT[n - rank_loss :, start:stop], U[:, n - rank_loss :].T[:, start:stop]
    return dense, matrix, Nullspace(right.copy(), left.copy(), comm), slice(start, stop)


@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize("parameters", [{}, {"ksp_type": "gmres", "pc_type": "jacobi", "ksp_rtol": 1e-13}])
@pytest.mark.parametrize("rank_loss", [1, 2])
@time_limit(60)
def test_solves_are_those_of_the_pseudo_inverse(parameters, rank_loss):
    dense, matrix, nullspace, own = singular_matrix(17, rank_loss, COMM_WORLD)
    factor = Factor(matrix, parameters, symmetric=False, nullspace=nullspace)
    rhs = np.random.default_rng(1).standard_normal((8, 17))
    for transposed in (False, True):
        wanted = rhs @ np.linalg.pinv(dense.T if transposed else dense).T
        b, x = matrix.createVecs()
        b.array[:] = rhs[0, own]
        factor.solve(b, x, transposed=transposed)
        np.testing.assert_allclose(x.array_r, wanted[0, own], atol=1e-10)
        found = solutions(factor, rhs[:, own], transposed=transposed)
        np.testing.assert_allclose(found, wanted[:, own], atol=1e-10)


@pytest.mark.parallel([1, 3])
@time_limit(60)
def test_what_counts_as_singular(monkeypatch):
    """Bad units do not make a matrix singular, a missing rank does, also in such units."""
    for loss, singular in ((0, False), (1, True)):
        _, matrix, _, own = singular_matrix(17, loss, COMM_WORLD)
        for scales in (np.ones(17), 10.0 ** np.linspace(-12, 12, 17)):
            scaled, vec = matrix.copy(), matrix.createVecRight()
            vec.array[:] = scales[own]
            scaled.diagonalScale(vec, vec)
            for kernels in (True, False):
                with monkeypatch.context() as patched:
                    if not kernels:
                        patched.setattr(pint_fem.kernels.factor, "kernels", lambda: None)
                    factor = Factor(scaled, {}, symmetric=False)
                assert is_singular(factor.matrix, factor.solve_regular) == singular


# -- finite elements ---------------------------------------------------------------------------------------------------
def constant_pressure(V, index=1):
    """The basis of a constant field of a mixed space."""
    parts = [V.sub(i) for i in range(len(V))]
    parts[index] = VectorSpaceBasis(constant=True, comm=V.comm)
    return MixedVectorSpaceBasis(V, parts)


def stokes(comm, **more) -> Task:
    """Enclosed Stokes flow that an unknown force drives; the functional contains the pressure itself."""
    mesh = partitioned(UnitSquareMesh, 3, 3, comm=comm)
    Q = VectorFunctionSpace(mesh, "CG", 1)
    V = VectorFunctionSpace(mesh, "CG", 2) * FunctionSpace(mesh, "CG", 1)
    x, y = SpatialCoordinate(mesh)
    w, q = TestFunctions(V)

    def residual(state, rates, controls, t):
        (u, p), (u_t, _), (f,) = state, rates, controls
        return (inner(u_t - f, w) + 0.1 * inner(grad(u), grad(w)) - p * div(w) - q * div(u)) * dx

    given = {
        "conditions": lambda z, t: [(V.sub(0), as_vector((0.0, 0.0)), (1, 2, 3)),
                                    (V.sub(0), as_vector((x * (1 - x), 0 * x)), 4)],
        "nullspace": constant_pressure(V),
    } | more  # fmt: skip
    return Task(
        V, residual, lambda u: None, [Q], [as_vector((y, sin(3 * x)))], [as_vector((x * y, cos(y)))],
        lambda z: 1e-3 * inner(z[0], z[0]) * dx, running=lambda s, t: (s[1] - x) ** 2 * dx + inner(s[0], s[0]) * dx,
        steps=4, **given,
    )  # fmt: skip


def potential(comm) -> Task:
    """A pure Neumann problem beside a transport equation: Joule heating by a current that is given all around."""
    mesh = partitioned(UnitSquareMesh, 4, 4, comm=comm)
    P = FunctionSpace(mesh, "CG", 1)
    V = P * P
    x, y = SpatialCoordinate(mesh)
    w, q = TestFunctions(V)

    def residual(state, rates, controls, t):
        (c, phi), (c_t, _), (k,) = state, rates, controls
        current = exp(k) * (1 + c**2) * grad(phi)
        heat = c_t * w + 0.1 * inner(grad(c), grad(w)) - inner(current, grad(phi)) * w
        # pyadjoint integrates derivatives with the degrees estimated for them, not with that of the residual: give one
        return (heat + inner(current, grad(q))) * dx(degree=6) - cos(pi * x) * q * ds(3)

    return Task(
        V, residual, lambda u: u.subfunctions[0].interpolate(y), [P], [x - y], [sin(3 * x)],
        lambda z: 1e-2 * z[0] ** 2 * dx, running=lambda s, t: (s[0] - x) ** 2 * dx + s[1] ** 2 * dx, steps=4,
        nullspace=constant_pressure(V),
    )  # fmt: skip


def internal_waves(comm) -> Task:
    """An enclosed, stratified flow: the buoyancy's rate depends on the velocity only."""
    mesh = partitioned(UnitSquareMesh, 3, 3, comm=comm)
    B = FunctionSpace(mesh, "DG", 1)
    V = VectorFunctionSpace(mesh, "CG", 2) * FunctionSpace(mesh, "CG", 1) * B
    x, y = SpatialCoordinate(mesh)
    w, q, r = TestFunctions(V)

    def residual(state, rates, controls, t):
        (u, p, b), (u_t, _, b_t), (heat,) = state, rates, controls
        flow = inner(u_t, w) - b * w[1] + 0.01 * inner(grad(u), grad(w)) - p * div(w) - q * div(u)
        return (flow + (b_t + u[1] - heat) * r) * dx

    return Task(
        V, residual, lambda u: u.subfunctions[2].interpolate(x * y), [B], [x - y], [sin(3 * x)],
        lambda z: 1e-2 * z[0] ** 2 * dx, running=lambda s, t: s[2] ** 2 * dx + s[1] ** 2 * dx, steps=4,
        conditions=lambda z, t: [(V.sub(0), as_vector((0.0, 0.0)), "on_boundary")], nullspace=constant_pressure(V),
    )  # fmt: skip


def numbers(rf, task):
    """``J``, gradient, tangent and Hessian action of the time-parallel functional."""
    z, dz = ([with_values(*pair) for pair in zip(task.spaces, given, strict=True)] for given in (
        task.values, task.directions))  # fmt: skip
    one = lambda functions: functions if len(functions) > 1 else functions[0]
    listed = lambda found: found if isinstance(found, (list, tuple)) else [found]
    J = float(rf(one(z)))
    return J, rows(listed(rf.derivative())), float(rf.tlm(one(dz))), rows(listed(rf.hessian(one(dz))))


def serial_numbers(task, h=1.0):
    """The same by serial pyadjoint. Its tangent equations leave out nullspaces: the Hessian action is the central
    difference of two gradients, exact to round-off for a quadratic functional.
    """
    J, gradient, _ = by_hand(task, second=False)
    dz = [with_values(*pair) for pair in zip(task.spaces, task.directions, strict=True)]

    def gradient_at(s):
        values = [with_values(*pair) for pair in zip(task.spaces, task.values, strict=True)]
        for value, d in zip(values, dz, strict=True):
            value.assign(value + s * d)
        return np.concatenate(by_hand(task._replace(values=values), second=False)[1])

    gradient, tangent = np.concatenate(gradient), 0.0
    tangent = gradient @ rows(dz) if _real(task) else task.V.mesh().comm.allreduce(gradient @ rows(dz))
    return J, gradient, tangent, (gradient_at(h) - gradient_at(-h)) / (2 * h)


def _real(task):
    return all(space.ufl_element().family() == "Real" for space in task.spaces)


def assert_same(ours, theirs, comm, hessian=1e-8):
    for a, b in zip(ours[::2], theirs[::2], strict=False):
        assert abs(a - b) <= 1e-9 * abs(b)
    assert distance(ours[1], theirs[1], comm) <= 1e-8
    assert distance(ours[3], theirs[3], comm) <= hessian


OPTIONS = {
    "mgrit": {"mgrit": {"rtol": 1e-12, "coarsening": (2,)}},
    "paradiag": {"time_solver": "paradiag", "paradiag": {"rtol": 1e-12}},
    "serial": {"time_solver": "serial"},
}


@pytest.mark.slow_on_ranks
@pytest.mark.parallel([1, 3])
@time_limit(200)
def test_enclosed_stokes_flow():
    """Linear and form propagators; MGRIT, ParaDiag and sequential stepping; a functional of the pressure."""
    for grid in GRIDS[MPI.COMM_WORLD.size][:1]:
        st = pf.SpaceTime(grid)
        task = stokes(st.space_comm)
        theirs = serial_numbers(task)
        for kind, solver in (
            (LinearPropagator, "mgrit"), (LinearPropagator, "paradiag"), (FormPropagator, "serial")
        ):  # fmt: skip
            ours = numbers(pose(task._replace(parameters=OPTIONS[solver]), st, propagator=kind), task)
            assert_same(ours, theirs, st.space_comm)


@time_limit(200)
def test_tapes_have_nullspaces_in_all_directions():
    """pyadjoint's own tangent equations have none."""
    st = pf.SpaceTime(GRIDS[MPI.COMM_WORLD.size][0])
    task = stokes(st.space_comm)._replace(steps=2, parameters=OPTIONS["serial"])
    ours, theirs = (numbers(pose(task, st, propagator=kind), task) for kind in (TapePropagator, LinearPropagator))
    assert_same(ours, theirs, st.space_comm)


@pytest.mark.parallel([1, 3])
@time_limit(200)
def test_navier_stokes_with_the_pressure_observed():
    for grid in GRIDS[MPI.COMM_WORLD.size][-1:]:
        st = pf.SpaceTime(grid)
        task = navier_stokes(st.space_comm)
        task = task._replace(terminal=lambda s, t: 1e-2 * s[1] ** 2 * dx, steps=4)
        theirs = serial_numbers(task, 1e-3)
        for solver in ("mgrit", "paradiag"):
            ours = numbers(pose(task._replace(parameters=OPTIONS[solver]), st), task)
            assert_same(ours, theirs, st.space_comm, hessian=1e-5)


@time_limit(200)
def test_a_potential_with_fluxes_given_all_around():
    """By direct and iterative solvers; the matrix is not symmetric."""
    for grid in GRIDS[MPI.COMM_WORLD.size]:
        st = pf.SpaceTime(grid)
        task = potential(st.space_comm)
        theirs = serial_numbers(task, 1e-3)
        for solver in ({}, {"ksp_type": "gmres", "ksp_rtol": 1e-13}):
            assert_same(numbers(pose(task, st, solver_parameters=solver), task), theirs, st.space_comm, hessian=1e-5)


@time_limit(200)
def test_internal_waves_with_the_buoyancy_eliminated():
    """Eliminated or not, by MGRIT or ParaDiag."""
    for grid in GRIDS[MPI.COMM_WORLD.size]:
        st = pf.SpaceTime(grid)
        task = internal_waves(st.space_comm)
        theirs = serial_numbers(task)
        for eliminate, solver in ((2, "mgrit"), (2, "paradiag"), (None, "serial")):
            rf = pose(task._replace(parameters=OPTIONS[solver]), st, eliminate=eliminate)
            assert_same(numbers(rf, task), theirs, st.space_comm)


@time_limit(100)
def test_a_singular_stage_matrix_is_named():
    """On every rank, linear at construction, nonlinear at the first evaluation."""
    for grid in GRIDS[MPI.COMM_WORLD.size]:
        st = pf.SpaceTime(grid)
        named = r"the stage matrix is singular: give nullspace=.*of field 1"
        with pytest.raises(InputError, match=named):
            pose(stokes(st.space_comm, nullspace=None), st)
        task = navier_stokes(st.space_comm)._replace(nullspace=None)
        rf = pose(task, st)
        with pytest.raises(SolverFailure, match=named):
            rf(rf.controls[0].control)


@time_limit(100)
def test_bases_that_do_not_fit_are_refused():
    st = pf.SpaceTime(GRIDS[MPI.COMM_WORLD.size][0])
    task = stokes(st.space_comm)
    for nullspace, message in (
        (constant_pressure(task.V, 0), "stage matrix times a vector of it is not zero"),
        (VectorSpaceBasis(constant=True, comm=st.space_comm), "stage matrix times a vector of it is not zero"),
        ("constant", "nullspace is a str: give Firedrake's VectorSpaceBasis"),
        (constant_pressure(stokes(st.space_comm).V), "on another space"),
    ):
        with pytest.raises(InputError, match=message):
            pose(task._replace(nullspace=nullspace), st)


@pytest.mark.parallel([1, 3])
@time_limit(100)
def test_rigid_motions_reach_multigrid():
    """``near_nullspace`` changes the preconditioner, not the result."""
    st = pf.SpaceTime(GRIDS[MPI.COMM_WORLD.size][0])
    mesh = partitioned(UnitSquareMesh, 6, 6, comm=st.space_comm)
    V = VectorFunctionSpace(mesh, "CG", 1)
    x, y = SpatialCoordinate(mesh)
    v = TestFunction(V)
    motions = [Function(V).interpolate(as_vector(m)) for m in ((1, 0 * x), (0 * x, 1), (-y, x))]

    def residual(state, rates, controls, t):
        (d,), (d_t,), (f,) = state, rates, controls
        stress = 2 * sym(grad(d)) + tr(grad(d)) * Identity(2)
        return (inner(d_t - f, v) + inner(stress, sym(grad(v)))) * dx

    task = Task(
        V, residual, lambda u: None, [V], [as_vector((y, x))], [as_vector((x, y))],
        lambda z: 1e-3 * inner(z[0], z[0]) * dx, running=lambda s, t: inner(s[0], s[0]) * dx, steps=4, dt=1.0,
        conditions=lambda z, t: [(V, as_vector((0.0, 0.0)), 1)],
    )  # fmt: skip
    wanted = numbers(pose(task, st), task)
    gamg = {"ksp_type": "cg", "pc_type": "gamg", "ksp_rtol": 1e-13}
    rf = pose(task, st, near_nullspace=VectorSpaceBasis(motions), solver_parameters=gamg)
    (factor,) = rf.problem.sweeps.propagators[0].factors.values()
    assert len(factor.ksp.getOperators()[1].getNearNullSpace().getVecs()) == 3
    assert_same(numbers(rf, task), wanted, st.space_comm)

"""Steps at zero, and steps that have no numbers: matrices that are not finite, types of solvers that PETSc lacks."""

import numpy as np
import pytest
from firedrake import (
    Constant,
    DirichletBC,
    Function,
    FunctionSpace,
    NonlinearVariationalProblem,
    NonlinearVariationalSolver,
    TestFunction,
    assemble,
    dx,
    grad,
    inner,
    sqrt,
)
from firedrake.petsc import PETSc
from irksome import Dt
from mpi4py import MPI

import pint_fem as pf
from pint_fem.errors import InputError, SolverFailure
from pint_fem.kernels.arrays import get, put
from pint_fem.kernels.direct import is_finite, with_finite_entries
from tests.limits import time_limit
from tests.meshes import square

STEPS = 8
GRIDS = ["1x3", "3x1"] if MPI.COMM_WORLD.size == 3 else ["1x1"]


def posed(grid, residual, parameters=None, **options):
    """Evolution from zero with a source that is sought, and its functional with misfit ``(u - 0.05)^2``."""
    st = pf.SpaceTime(grid)
    mesh = square(4, st.space_comm)
    V = FunctionSpace(mesh, "CG", 1)
    u, v, q = Function(V), TestFunction(V), Function(V)
    ev = pf.Evolution(
        residual(Dt(u), u, q, v), u, tableau=pf.BackwardEuler(), dt=1 / STEPS, nsteps=STEPS, control=q,
        bcs=DirichletBC(V, 0, "on_boundary"), solver_parameters=parameters,
    )  # fmt: skip
    return pf.TimeParallelReducedFunctional(
        ev, pf.RunningMisfit((u - 0.05) ** 2 * dx), spacetime=st, solver_parameters=options
    )


def warming(rate, u, q, v):
    return (rate * v + (1 + u**2) * inner(grad(u), grad(v)) - q * v) * dx(degree=4)


def plain(V, z) -> float:
    """The functional of ``warming`` by a loop of plain Firedrake."""
    q, u, U, v = Function(V), Function(V), Function(V), TestFunction(V)
    put(q, z)
    problem = NonlinearVariationalProblem(warming((U - u) * STEPS, U, q, v), U, bcs=DirichletBC(V, 0, "on_boundary"))
    solver = NonlinearVariationalSolver(problem, solver_parameters={"snes_rtol": 1e-11, "snes_atol": 1e-14})
    J = 0.0
    for _ in range(STEPS):
        solver.solve()
        u.assign(U)
        J += assemble((u - 0.05) ** 2 * dx) / STEPS
    return float(J)


@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("solver", [{"time_solver": "serial"}, {"mgrit": {"coarsening": (2,), "rtol": 1e-12}}])
@time_limit(60)
def test_a_state_that_is_exactly_zero(solver, grid):
    """Without a source ``J = 0.05^2`` exactly; its derivatives are those of differences of plain Firedrake's."""
    rf = posed(grid, warming, **solver)
    z, comm = np.zeros(rf.layout.size), rf.spacetime.space_comm
    dz = get(Function(rf.evolution.V).assign(1.0))
    assert rf.problem.value(z) == pytest.approx(0.05**2, rel=1e-14)
    values = [plain(rf.evolution.V, k * 0.02 * dz) for k in (-2, -1, 0, 1, 2)]
    first = np.dot(values, [1 / 12, -2 / 3, 0, 2 / 3, -1 / 12]) / 0.02
    second = np.dot(values, [-1 / 12, 4 / 3, -5 / 2, 4 / 3, -1 / 12]) / 0.02**2
    along = lambda g: comm.allreduce(float(g @ dz))
    assert along(rf.problem.derivative(z)) == pytest.approx(first, rel=1e-7)
    assert along(rf.problem.hessian_action(z, dz)) == pytest.approx(second, rel=1e-6)
    rf.problem.value(dz)
    assert rf.problem.value(z) == pytest.approx(0.05**2, rel=1e-14)


@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("solver", ["serial", "mgrit", "paradiag"])
@time_limit(60)
def test_an_infinite_jacobian(solver, grid):
    """``sqrt(u)`` at zero: bytes are counted, the state (zero) is found, its derivative does not exist."""
    rf = posed(grid, lambda rate, u, q, v: warming(rate, u, q, v) + sqrt(u) * v * dx, time_solver=solver)
    assert rf.memory().petsc["factors"] > 0
    z = np.zeros(rf.layout.size)
    assert rf.problem.value(z) == pytest.approx(0.05**2, rel=1e-14)
    with pytest.raises(SolverFailure, match="infinite or NaN"):
        rf.problem.derivative(z)
    with pytest.raises(SolverFailure, match="infinite or NaN"):
        rf.problem.value(z - 1.0)  # the root of a negative temperature
    assert rf.problem.value(z) == pytest.approx(0.05**2, rel=1e-14)


@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("solver", ["serial", "mgrit", "paradiag", "auto"])
@time_limit(60)
def test_operators_that_are_not_finite(solver, grid):
    heat = lambda k: lambda rate, u, q, v: (rate * v + Constant(k) * inner(grad(u), grad(v)) - q * v) * dx
    for k in (np.nan, np.inf):
        with pytest.raises((InputError, SolverFailure), match=r"infinite or NaN|not finite"):
            posed(grid, heat(k), time_solver=solver)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_matrices_that_are_not_finite_are_noticed(bad):
    matrix = PETSc.Mat().createAIJ((2, 2), csr=([0, 2, 4], [0, 1, 0, 1], [1.0, 2.0, bad, 4.0]), comm=MPI.COMM_SELF)
    assert not is_finite(matrix)
    like = with_finite_entries(matrix)
    assert is_finite(like)
    assert like.getInfo()["nz_used"] == 4


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"ksp_type": "nosuch"}, "ksp_type 'nosuch' .* 'nash'"),
        ({"ksp_type": "gmress"}, "ksp_type 'gmress' .* 'gmres'"),
        ({"pc_type": "fieldsplit", "fieldsplit_0": {"pc_type": "ilux"}}, "fieldsplit_0_pc_type 'ilux' .* 'ilu'"),
        ({"pc_type": "lu", "pc_factor_mat_solver_type": "mump"}, "mat_solver_type 'mump' .* 'mumps'"),
        ({"pc_type": "lu", "sub": {"pc_type": "qr", "pc_factor_mat_solver_type": "umfpack"}}, "'umfpack' is unknown"),
        ({"snes_type": "newton"}, "snes_type 'newton' .* 'newtonls'"),
        ({"pc_type": "lu", "pc_factor_mat_ordering_type": "nnd"}, "mat_ordering_type 'nnd' .* 'nd'"),
    ],
)
@time_limit(60)
def test_unknown_types_are_named(parameters, message):
    """On every rank, before a step, in one line with a name near it."""
    with pytest.raises(InputError, match=message) as info:
        posed(GRIDS[-1], warming, parameters)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize("prefix", ["pint_", "pint_form_", "mgrit_", "paradiag_"])
@time_limit(60)
def test_unknown_types_on_the_command_line_are_named(prefix):
    database, name = PETSc.Options(), f"{prefix}ksp_type"
    database[name] = "gmress"
    try:
        with pytest.raises(InputError, match=rf"-{name} 'gmress' .* 'gmres'"):
            posed(GRIDS[-1], warming, time_solver="paradiag" if prefix == "paradiag_" else "mgrit")
    finally:
        database.delValue(name)

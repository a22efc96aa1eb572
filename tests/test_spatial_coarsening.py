"""Spatial coarsening between time levels: the transfers, whole sweeps through them, what refuses to work."""

from itertools import pairwise, product
from types import SimpleNamespace

import numpy as np
import pytest
from firedrake import (
    Constant,
    DirichletBC,
    Function,
    FunctionSpace,
    MeshHierarchy,
    MixedFunctionSpace,
    SpatialCoordinate,
    TestFunction,
    TestFunctions,
    TrialFunction,
    UnitCubeMesh,
    UnitSquareMesh,
    VectorFunctionSpace,
    as_vector,
    assemble,
    div,
    dot,
    dx,
    grad,
    inner,
    sin,
    split,
)
from firedrake.adjoint import taylor_test
from irksome import Dt
from mpi4py import MPI

import pint_fem as pf
from pint_fem.errors import InputError
from pint_fem.kernels.arrays import boundary_rows, get, like_subspace, own_size, put
from pint_fem.propagators import FormPropagator, LinearPropagator
from pint_fem.propagators.mesh_transfers import mesh_transfer
from pint_fem.propagators.spatial import SpatialLevels, coarse_evolution
from pint_fem.sweeps.steps import LinearStep
from pint_fem.sweeps.sweeps import Sweeps
from problems import maxwell as maxwell_equations
from tests.heat import heat, point_and_direction

SIMPLE = {"partitioner_type": "simple"}


def meshes(n=4, refinements=2, comm=MPI.COMM_WORLD):
    return MeshHierarchy(UnitSquareMesh(n, n, comm=comm, distribution_parameters=SIMPLE), refinements)


def alone():
    return pf.SpaceTime("1x1", comm=MPI.COMM_SELF)


def functional(
    st, *, n=4, refinements=2, linear=True, per_step=False, steps=16, tableau="SDIRK2", space=True, **options
):
    mesh = meshes(n, refinements, st.space_comm)[-1]
    ev = heat(mesh, linear=linear, per_step=per_step, steps=steps, tableau=tableau)
    target = sin(SpatialCoordinate(ev.V.mesh())[0])
    misfits = [pf.RunningMisfit((ev.u - target) ** 2 * dx), pf.TerminalMisfit(5 * ev.u**2 * dx)]
    mgrit = {"levels": 3, "coarsening": 2, "rtol": 1e-13} | options
    parameters = {"mgrit": mgrit, "spatial_coarsening": space}
    return pf.TimeParallelReducedFunctional(
        ev, misfits, regularisation=1e-3 * ev.control**2 * dx, spacetime=st, solver_parameters=parameters
    )


def nonlinear(st, **options):
    small = {"n": 2, "refinements": 1, "linear": False, "steps": 8, "tableau": "BE", "levels": 2}
    return functional(st, **(small | options))


def dual(g):
    """Values of a derivative."""
    return np.array([get(part) for part in g.subfunctions])


# -- transfers ---------------------------------------------------------------------------------------------------------
def interpolated(V):
    """A function that is linear in space on any space of nodal values."""
    x, y = SpatialCoordinate(V.mesh())
    expression = 1 + 2 * x - 3 * y
    return Function(V).interpolate(as_vector((expression, -expression)) if V.value_shape else expression)


SPACES = {
    "CG1": lambda mesh: FunctionSpace(mesh, "CG", 1),
    "CG2": lambda mesh: FunctionSpace(mesh, "CG", 2),
    "CG3": lambda mesh: FunctionSpace(mesh, "CG", 3),
    "DG1": lambda mesh: FunctionSpace(mesh, "DG", 1),
    "vector": lambda mesh: VectorFunctionSpace(mesh, "CG", 1),
}


@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize(
    ("kind", "apart"),
    [
        *(("CG1", 1), ("CG2", 1), ("DG1", 1), ("vector", 2)),
        *(pytest.param(*case, marks=pytest.mark.slow_on_ranks) for case in (("CG3", 1), ("vector", 1), ("CG1", 2))),
    ],
)
def test_interpolation_and_averages(kind, apart):
    """P keeps linear functions, R P keeps constants, and R too; boundary values are injected, corrections vanish
    there.
    """
    hierarchy = meshes()
    V, W = SPACES[kind](hierarchy[-1]), SPACES[kind](hierarchy[-1 - apart])
    transfer, fine, coarse = mesh_transfer(V, W), get(interpolated(V)), get(interpolated(W))
    assert np.allclose(transfer.prolong(coarse[None])[0], fine, rtol=0, atol=1e-13)
    one = np.ones((1, len(coarse)))
    assert np.allclose(transfer.restrict(transfer.prolong(one)), 1, rtol=0, atol=1e-13)
    bcs = [DirichletBC(V, 0, 1), DirichletBC(V, 0, 4)] if kind != "DG1" else []
    fixed = mesh_transfer(V, W, bcs)
    rows = boundary_rows(bcs, V)
    coarse_rows = boundary_rows([DirichletBC(W, 0, bc.sub_domain) for bc in bcs], W)
    assert np.allclose(fixed.restrict(np.ones((1, len(fine)))), 1, rtol=0, atol=1e-13)
    rng = np.random.default_rng(0)
    assert (fixed.prolong(rng.standard_normal((1, len(coarse))))[0, rows] == 0).all()
    zero_there = rng.standard_normal((1, len(fine)))
    zero_there[0, rows] = 0
    assert (fixed.restrict(zero_there)[0, coarse_rows] == 0).all()
    if kind in ("CG1", "CG2", "vector"):  # a fine node stands at the place of each coarse one
        assert np.allclose(fixed.restrict(fine[None])[0, coarse_rows], coarse[coarse_rows], rtol=0, atol=1e-13)


@pytest.mark.parallel([1, 3])
def test_mixed_space_goes_block_by_block():
    hierarchy = meshes()
    V, W = (FunctionSpace(mesh, "CG", 2) * FunctionSpace(mesh, "DG", 0) for mesh in (hierarchy[2], hierarchy[1]))
    fine, coarse = Function(V), Function(W)
    for f in (fine, coarse):
        x, y = SpatialCoordinate(f.function_space().mesh().unique())
        f.sub(0).interpolate(x**2 - x * y + 1)
        f.sub(1).assign(7.0)
    transfer = mesh_transfer(V, W)
    assert np.allclose(transfer.prolong(get(coarse)[None])[0], get(fine), rtol=0, atol=1e-13)
    assert np.allclose(transfer.restrict(np.ones((1, own_size(V)))), 1, rtol=0, atol=1e-13)


@pytest.mark.parallel([1, 3])
def test_transposes():
    """(R u, w) = (u, R^T w) and the same for P: over all ranks, with boundary conditions."""
    hierarchy = meshes()
    V, W = (FunctionSpace(mesh, "CG", 2) for mesh in (hierarchy[2], hierarchy[1]))
    t = mesh_transfer(V, W, [DirichletBC(V, 0, (1, 3))])
    rng = np.random.default_rng(MPI.COMM_WORLD.rank)
    u, w = rng.standard_normal((11, own_size(V))), rng.standard_normal((11, own_size(W)))
    total = lambda a, b: MPI.COMM_WORLD.allreduce(np.vdot(a, b))
    for down, up in ((t.restrict, t.restrict_transposed), (t.prolong_transposed, t.prolong)):
        left, right = total(down(u), w), total(u, up(w))
        assert abs(left - right) <= 1e-13 * np.sqrt(total(u, u) * total(w, w))
    adjoint = t.transposed
    assert np.array_equal(adjoint.restrict(u), t.prolong_transposed(u))
    assert np.array_equal(adjoint.prolong(w), t.restrict_transposed(w))


FIELDS = {
    "Maxwell": ((("N1curl", 1), ("DG", 0)), 2, 0),
    "Maxwell, degree 2": ((("N1curl", 2), ("DG", 1)), 2, 0),
    "Maxwell 3-D": ((("N1curl", 1), ("RT", 1)), 3, 0),
    "Darcy": ((("RT", 1), ("DG", 0)), 2, 0),
    "BDM": ((("BDM", 1), ("DG", 0)), 2, 0),
}


ON_RANKS = {2: ("Maxwell", "Maxwell, degree 2", "Maxwell 3-D"), 3: ("Darcy", "BDM", "Maxwell 3-D")}
"""Fields that are transferred between meshes on several ranks."""


def mixed(kind, refinements=1, comm=MPI.COMM_WORLD):
    """The mixed space on the two finest meshes, and its conditions on one side."""
    elements, dim, field = FIELDS[kind]
    if dim == 2:
        hierarchy = meshes(3, refinements, comm)
    else:
        hierarchy = MeshHierarchy(UnitCubeMesh(2, 1, 1, comm=comm, distribution_parameters=SIMPLE), refinements)
    V, W = (MixedFunctionSpace([FunctionSpace(mesh, *e) for e in elements]) for mesh in hierarchy[-1:-3:-1])
    return V, W, [DirichletBC(V.sub(field), as_vector([0] * dim), 1)]


@pytest.mark.parallel([1, 2, 3])
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=() if kind in ON_RANKS.get(MPI.COMM_WORLD.size, FIELDS) else pytest.mark.grid)
        for kind in FIELDS
    ],
)
def test_moments(kind):
    """Restriction keeps fields that are constant, and P the same ones; corrections vanish under a condition, residuals
    that are zero there stay zero; transposes are exact.
    """
    V, W, bcs = mixed(kind)
    constant = as_vector([2.0, -1.0, 0.5][: V.mesh().unique().geometric_dimension])
    fields = []
    for space in (V, W):
        f = Function(space)
        for part in f.subfunctions:
            part.interpolate(constant if part.function_space().value_shape else Constant(3.0))
        fields.append(get(f))
    fine, coarse = fields
    free = mesh_transfer(V, W)
    assert np.abs(free.prolong(coarse[None])[0] - fine).max(initial=0) < 1e-13
    assert np.abs(free.restrict(fine[None])[0] - coarse).max(initial=0) < 1e-13
    t = mesh_transfer(V, W, bcs)
    rows = boundary_rows(bcs, V)
    coarse_rows = boundary_rows([DirichletBC(like_subspace(W, bc), 0, bc.sub_domain) for bc in bcs], W)
    rng = np.random.default_rng(MPI.COMM_WORLD.rank)
    u, w = rng.standard_normal((3, own_size(V))), rng.standard_normal((3, own_size(W)))
    assert (t.prolong(w)[:, rows] == 0).all()
    inside = u.copy()
    inside[:, rows] = 0
    assert (t.restrict(inside)[:, coarse_rows] == 0).all()
    if kind != "Maxwell, degree 2":  # of lowest degree: the sum of a coarse moment's parts
        assert np.abs(t.restrict(fine[None])[0] - coarse)[coarse_rows].max(initial=0) < 1e-13
    total = lambda a, b: MPI.COMM_WORLD.allreduce(np.vdot(a, b))
    for down, up in ((t.restrict, t.restrict_transposed), (t.prolong_transposed, t.prolong)):
        left, right = total(down(u), w), total(u, up(w))
        assert abs(left - right) <= 1e-13 * np.sqrt(total(u, u) * total(w, w))


@pytest.mark.parallel([1, 3])
def test_bits_of_a_state_do_not_depend_on_its_place():
    """One state among others, at each place of a block and alone."""
    hierarchy = meshes()
    V, W = (FunctionSpace(mesh, "CG", 2) for mesh in (hierarchy[2], hierarchy[1]))
    t = mesh_transfer(V, W, [DirichletBC(V, 0, 1)])
    rng = np.random.default_rng(1)
    for block_map, space in ((t.restrict, V), (t.prolong, W), (t.restrict_transposed, W), (t.prolong_transposed, V)):
        block = rng.standard_normal((19, own_size(space)))
        whole = block_map(block)
        for first in range(8):
            assert np.array_equal(block_map(block[first:]), whole[first:])
            assert np.array_equal(block_map(block[first : first + 1]), whole[first : first + 1])


# -- coarse evolutions -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("linear", [True, False])
def test_coarse_evolution_is_the_one_posed_by_hand(linear):
    """Steps of the coarsened evolution against those of the same problem written on the coarser mesh."""
    hierarchy = meshes(2, 2, MPI.COMM_SELF)
    made, posed = coarse_evolution(heat(hierarchy[2], linear=linear), 2), heat(hierarchy[0], linear=linear)
    assert made.V == posed.V
    assert np.allclose(get(made.initial), get(posed.initial), atol=1e-14)
    kind = LinearPropagator if linear else FormPropagator
    rng = np.random.default_rng(0)
    u, z = rng.standard_normal((2, made.state_size)), rng.standard_normal(made.control_size)
    data = pf.propagators.StepData(np.array([0.1, 0.7]), z, u)
    out = [np.empty_like(u) for _ in range(2)]
    for ev, o in zip((made, posed), out, strict=True):
        kind(ev, stride=2).step(data, u, o)
    assert np.abs(out[0] - out[1]).max() < 1e-12


def test_data_constants_and_controls_go_to_the_coarser_mesh():
    """Coefficients are injected; a control's values too, in time step by time step."""
    hierarchy = meshes(2, 1, MPI.COMM_SELF)
    V, Q = FunctionSpace(hierarchy[1], "CG", 1), FunctionSpace(hierarchy[1], "DG", 0)
    u, v, data, q = Function(V), TestFunction(V), Function(V), Function(Q)
    x, y = SpatialCoordinate(V.mesh())
    data.interpolate(1 + x - 2 * y)
    F = Dt(u) * v * dx + data * dot(grad(u), grad(v)) * dx - q * v * dx
    ev = pf.Evolution(
        F, u, tableau=pf.BackwardEuler(), dt=0.1, nsteps=4, control=q, bcs=DirichletBC(V, data, "on_boundary")
    )
    levels = SpatialLevels(ev, ["FCF"], [1])
    coarse = levels.evolutions[1]
    X, Y = SpatialCoordinate(coarse.V.mesh())
    expected = Function(coarse.V).interpolate(1 + X - 2 * Y)
    boundary = Function(coarse.V)
    coarse.bcs[0].apply(boundary)
    rows = boundary_rows(coarse.bcs, coarse.V)
    assert np.allclose(get(boundary)[rows], get(expected)[rows], atol=1e-13)
    mass = assemble(coarse.linear_operators()[1], mat_type="aij").petscmat
    by_hand = assemble(
        (1 + X - 2 * Y) * dot(grad(TestFunction(coarse.V)), grad(TrialFunction(coarse.V))) * dx, mat_type="aij"
    ).petscmat
    assert (mass - by_hand).norm() < 1e-12
    z = np.array([np.full(own_size(Q), value) for value in (2.0, -1.0, 0.5)])
    assert np.allclose(levels.controls(1, z), [[value] * coarse.control_size for value in (2.0, -1.0, 0.5)])
    put(q, np.arange(own_size(Q), dtype=float))
    injected = Function(coarse.control.function_space())
    put(injected, levels.controls(1, get(q)))
    assert abs(assemble(injected * dx) - assemble(q * dx)) < 1e-12  # DG0: mean values of the cells


# -- whole sweeps ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("make", [functional, nonlinear])
def test_adjoint_is_the_transpose_of_the_tangent(make):
    """Whole solves: (g, dU) with dU driven by dz against (gradient of g's adjoint, dz)."""
    rf = make(alone())
    m, h = point_and_direction(rf)
    sweeps, (z, dz) = rf.problem.sweeps, (rf.array(f) for f in (m, h))
    U, dU, L = (sweeps.new_slab() for _ in range(3))
    sweeps.state(z, U)
    sweeps.tangent(z, U, dz, dU)
    g = np.random.default_rng(0).standard_normal(U.shape)
    sweeps.adjoint(z, U, g, L)
    left, right = np.vdot(g[1:], dU[1:]), np.vdot(sweeps.control_gradient(z, U, L), dz)
    assert abs(left - right) <= 1e-11 * np.linalg.norm(g) * np.linalg.norm(dU)
    assert all(result.converged and result.cycles > 1 for _, result in sweeps.results)


@pytest.mark.parametrize("levels", [2, 3])
def test_a_cycle_with_the_adjoints_transfers_is_the_transpose(levels):
    """With the transfers of the adjoint sweep and the parts of a cycle in reverse order, errors of the adjoint go
    through it by the transpose K^T of what a cycle does to the residuals: (w, K r) = (K^T w, r) at the points 1..N-1.
    """
    ev, m = heat(meshes(comm=MPI.COMM_SELF)[-1]), 2
    sweeps = Sweeps(ev, alone(), options={"levels": levels, "coarsening": m}, spatial_coarsening=True)
    fine, N, rng = sweeps.propagators[0], ev.nsteps, np.random.default_rng(0)

    def one_cycle(solver, U, transposed):
        options = {"levels": levels, "coarsening": m, "residual": "none", "max_it": 1, "check": "relaxed"}
        steps = [level.propagator for level in solver.levels]
        flags = {"transfers": solver.transfers, "linear": True, "transposed": transposed}
        pf.MGRIT(steps, N, options=options, **flags).solve(U, start="guess")
        return U

    r, w = (rng.standard_normal((N - 1, ev.state_size)) for _ in range(2))
    e = np.zeros((N + 1, ev.state_size))
    fine.sweep(e[:N], r)
    fine.sweep(e[N - 1 :], None)
    one_cycle(sweeps.solvers.tangent, e, False)
    Phi_e = np.empty_like(e[1:])
    fine.apply(e[:-1], Phi_e)
    Kr = (e[1:] - Phi_e)[:-1]
    lam = np.zeros((N + 1, ev.state_size))  # backwards in time
    lam[1:N] = w[::-1]
    KTw = one_cycle(sweeps.solvers.adjoint, lam, True)[1:N][::-1]
    assert np.linalg.norm(Kr) > 1e-4 * np.linalg.norm(r)
    assert abs(np.vdot(w, Kr) - np.vdot(KTw, r)) <= 1e-12 * np.linalg.norm(w) * np.linalg.norm(r)


@pytest.mark.parametrize(("make", "per_step"), [(functional, False), (functional, True), (nonlinear, True)])
def test_same_discrete_problem(make, per_step):
    """J, gradient and Hessian action are those of sequential stepping; the gradient passes a Taylor test."""
    results = []
    for options in ({"space": None, "levels": 1}, {"rtol": 1e-12}):
        rf = make(alone(), per_step=per_step, steps=12 if make is functional else 6, **options)
        m, h = point_and_direction(rf)
        results.append([np.array(float(rf(m))), dual(rf.derivative()), dual(rf.hessian(h))])
    for a, b in zip(*results, strict=True):
        assert np.abs(a - b).max() <= 1e-10 * np.abs(b).max()
    assert taylor_test(rf, m, h) > 1.95


CORNERS = [("BE", 4, 1e-3, 3), ("SDIRK2", 4, 2e-3, 2)]
CONTRACTIONS = product(["BE", "SDIRK2"], [2, 4], [1e-3, 2e-3], [2, 3])


@pytest.mark.parametrize(
    ("tableau", "m", "dt", "levels"),
    [pytest.param(*c, marks=() if c in CORNERS else pytest.mark.grid) for c in CONTRACTIONS],
)
def test_heat_contracts(tableau, m, dt, levels):
    """16x16, 8x8, 4x4 cells and 32-64 steps: each cycle halves the residual at least, state and adjoint alike."""
    ev = heat(meshes(comm=MPI.COMM_SELF)[-1], tableau=tableau, dt=dt, steps=64 if m == 4 else 32)
    for transposed, history in residuals(ev, levels=levels, coarsening=m, max_it=8):
        factors = [b / a for a, b in pairwise(history) if b > 1e-13 * history[0]]
        assert len(factors) > 3, transposed
        assert max(factors[1:]) < 0.5, transposed


def residuals(ev, *, seed=0, space=True, **options):
    """Residuals of a homogeneous tangent and adjoint solve from a random guess."""
    options = {"rtol": 0.0, "start": "guess", "check": "cycle"} | options
    sweeps = Sweeps(ev, alone(), options=options, spatial_coarsening=space)
    for transposed, solver in ((False, sweeps.solvers.tangent), (True, sweeps.solvers.adjoint)):
        U = np.random.default_rng(seed).standard_normal((ev.nsteps + 1, ev.state_size))
        U[0] = 0
        yield transposed, solver.solve(U).residuals


def test_what_the_coarse_mesh_does_not_see_decays_with_the_fine_steps():
    """Backward Euler, P1, mesh width h, natural boundary: the least frequency without a place on the coarser mesh has
    the eigenvalue 3/h^2, so the factor is at least about (1 + 3 dt/h^2)^-m, and not much more with small steps.
    """
    mesh = meshes(8, 1, MPI.COMM_SELF)[-1]
    V = FunctionSpace(mesh, "CG", 1)
    u, v, q = Function(V), TestFunction(V), Function(V)
    F = Dt(u) * v * dx + dot(grad(u), grad(v)) * dx - q * v * dx
    for ratio in (0.05, 0.2):
        ev = pf.Evolution(F, u, tableau=pf.BackwardEuler(), dt=ratio / 16**2, nsteps=128, control=q)
        expected = (1 + 3 * ratio) ** -2
        for _, history in residuals(ev, levels=2, coarsening=2, max_it=12):
            assert 0.6 * expected < (history[-1] / history[-5]) ** 0.25 < 1.25 * expected


@pytest.mark.parallel(3)
@pytest.mark.parametrize(("make", "per_step"), [(functional, True), (nonlinear, True)])
def test_same_bits_on_three_time_ranks(make, per_step):
    """On two: below, where two ranks share the meshes."""
    many = pf.SpaceTime()
    results = []
    for st in (many, alone()):
        rf = make(st, per_step=per_step, rtol=1e-6)
        J = rf(point_and_direction(rf)[0])
        rf.derivative()
        results.append((rf.problem, J, [r.residuals for _, r in rf.problem.sweeps.results]))
    (a, Ja, ra), (b, Jb, rb) = results
    lo, hi = a.sweeps.slab.lo, a.sweeps.slab.hi
    assert (Ja, ra) == (Jb, rb)
    assert np.array_equal(a.U, b.U[lo : hi + 1])
    assert np.array_equal(a.L, b.L[lo : hi + 1])


@pytest.mark.parallel(4)
def test_meshes_shared_by_two_ranks():
    """P_space = 2 and two time ranks: J and J' of one rank, and the bits of one time rank."""
    check_shared_meshes(functional)


@pytest.mark.parallel(2)
def test_nonlinear_on_meshes_shared_by_two_ranks():
    check_shared_meshes(nonlinear)


def check_shared_meshes(make):
    many = pf.SpaceTime((2, MPI.COMM_WORLD.size // 2))
    found = []
    for st in (many, pf.SpaceTime((2, 1), comm=many.space_comm), alone()):
        rf = make(st, rtol=1e-11, steps=6 if make is functional else 4)
        m, h = point_and_direction(rf)
        found.append((rf, float(rf(m)), h._ad_dot(rf.derivative())))
    (a, Ja, da), (b, Jb, _), (_, J, d) = found
    assert abs(Ja - J) <= 1e-9 * J
    assert abs(da - d) <= 1e-8 * abs(d)
    assert Ja == Jb
    slab = a.problem.sweeps.slab
    assert np.array_equal(a.problem.U, b.problem.U[slab.lo : slab.hi + 1])


# -- whole sweeps of Maxwell's equations and a mixed heat equation --------------------------------------------------
def maxwell(mesh, *, steps, sigma=20.0, dt=0.05):
    """Fields in a lossy box with conducting walls; the control is the current."""
    V = maxwell_equations.state_space(mesh)
    u, current = Function(V), Function(FunctionSpace(mesh, "N1curl", 1))
    medium = SimpleNamespace(epsilon=Constant(1.0), mu=Constant(1.0), sigma=Constant(sigma))
    bcs = maxwell_equations.perfect_conductor(V, maxwell_equations.Walls())
    residual = maxwell_equations.residual(u, medium, current=current)
    return pf.Evolution(residual, u, tableau=pf.SDIRK2(), dt=dt, nsteps=steps, control=current, bcs=bcs)


def darcy(mesh, *, steps, dt=4e-3):
    """Heat in mixed form, with a flux that takes a short time to follow the gradient; the control is the source."""
    V = FunctionSpace(mesh, "RT", 1) * FunctionSpace(mesh, "DG", 0)
    u, q = Function(V), Function(V.sub(1).collapse())
    (w, p), (v, r) = split(u), TestFunctions(V)
    F = inner(w + Dt(w) / 100, v) * dx - p * div(v) * dx + (Dt(p) + div(w) - q) * r * dx
    return pf.Evolution(F, u, tableau=pf.BackwardEuler(), dt=dt, nsteps=steps, control=q)


def moments_problem(kind, st, *, space, steps, m, **options):
    """A functional of one of them; the observed field of Maxwell's equations is E."""
    if kind == "Maxwell 3-D":
        mesh = UnitCubeMesh(2, 2, 2, comm=st.space_comm, distribution_parameters=SIMPLE)
        ev = maxwell(MeshHierarchy(mesh, 1)[-1], steps=steps, sigma=10.0, dt=0.1)
    else:
        ev = {"Maxwell": maxwell, "Darcy": darcy}[kind](meshes(6, 1, st.space_comm)[-1], steps=steps)
    seen = split(ev.u)[1 if kind == "Darcy" else 0]
    mgrit = {"levels": 2, "coarsening": m, "rtol": 1e-9} | options
    rf = pf.TimeParallelReducedFunctional(
        ev, [pf.RunningMisfit(inner(seen, seen) * dx)], spacetime=st,
        solver_parameters={"mgrit": mgrit, "spatial_coarsening": space},
    )  # fmt: skip
    x = SpatialCoordinate(ev.V.mesh().unique())
    q = Function(ev.control.function_space())
    q.interpolate(as_vector([x[1], 1 - x[0], x[0] * x[1]][: len(x)]) if q.ufl_shape else 1 + x[0] * x[1])
    return rf, q


CYCLES = {"Maxwell": (64, 8, 7), "Darcy": (64, 4, 13), "Maxwell 3-D": (256, 8, 26)}
"""Steps, m and the cycles in which state and adjoint converge."""


def check_moments_problem(kind, st):
    steps, m, most = CYCLES[kind]
    (serial, q), (rf, z) = (
        moments_problem(kind, st, space=space, steps=steps, m=m, **options)
        for space, options in ((None, {"levels": 1}), (True, {"max_it": most}))
    )
    values = [float(f(x)) for f, x in ((serial, q), (rf, z))]
    assert abs(values[1] - values[0]) <= 1e-8 * abs(values[0])
    g, h = (get(f.derivative()) for f in (serial, rf))
    total = lambda a: st.space_comm.allreduce(float(np.vdot(a, a)))
    assert total(g - h) <= 1e-14 * total(g)
    results = [result for _, result in rf.problem.sweeps.results]
    assert all(result.converged and 1 < result.cycles <= most for result in results)


@pytest.mark.parallel([1, 2])
@pytest.mark.parametrize("kind", ["Maxwell", "Darcy"])
def test_moments_converge_to_the_same_discrete_problem(kind):
    """On one rank, and on two of them in time, then in space: J and gradient are those of sequential stepping."""
    for grid in {"1x1"} if MPI.COMM_WORLD.size == 1 else ("1x2", "2x1"):
        check_moments_problem(kind, pf.SpaceTime(grid))


def test_moments_in_three_dimensions_converge_to_the_same_discrete_problem():
    check_moments_problem("Maxwell 3-D", alone())


# -- evolutions by hand, refusals --------------------------------------------------------------------------------------
def test_evolutions_by_hand():
    """Evolutions of the coarse levels posed by the user give the iterates of those coarsened here."""
    histories = []
    for by_hand in (False, True):
        hierarchy = meshes(comm=MPI.COMM_SELF)
        ev = heat(hierarchy[-1])
        coarse = {"spatial_coarsening": [1, 2]}
        if by_hand:
            coarse = {"coarse_evolutions": [heat(hierarchy[k]) for k in (1, 0)]}
        sweeps = Sweeps(ev, alone(), options={"levels": 3, "coarsening": 2}, **coarse)
        U = sweeps.new_slab()
        histories.append(sweeps.state(get(ev.control), U).residuals)
    assert len(histories[0]) > 3
    assert np.allclose(*histories, rtol=1e-6)


def test_meshes_of_the_levels():
    hierarchy = meshes(2, 2, MPI.COMM_SELF)
    ev = heat(hierarchy[-1])
    on = lambda coarsening: [
        hierarchy.meshes.index(e.V.mesh()) for e in SpatialLevels(ev, ["FCF"] * 3, coarsening).evolutions
    ]
    assert on(None) == on(False) == on(0) == [2, 2, 2, 2]
    assert on(True) == [2, 1, 0, 0]
    assert on([0, 1]) == [2, 2, 1, 1]
    assert on(2) == [2, 0, 0, 0]


BAD = {
    "no hierarchy": (r"the mesh has no hierarchy; build MeshHierarchy", True, {}),
    "too short": (r"by 3 meshes: the hierarchy has 2 below", [1, 3], {}),
    "decreasing": (r"\[1, 0\]: give True, or for each coarse level", [1, 0], {}),
    "text": (r"'yes': give True", "yes", {}),
    "fraction": (r"0.5: give True", 0.5, {}),
    "F": (r"relax 'F' on level 0 with spatial coarsening.*give 'FCF'", True, {"relax": "F"}),
    "F below": (r"relax 'F' on level 1", True, {"relax": ["FCF", "F"]}),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input(kind):
    match, space, options = BAD[kind]
    st = pf.SpaceTime()
    if kind == "no hierarchy":
        mesh = UnitSquareMesh(2, 2, comm=st.space_comm)
        with pytest.raises(InputError, match=match):
            Sweeps(heat(mesh), st, options={"levels": 3, "coarsening": 2}, spatial_coarsening=space)
        return
    with pytest.raises(InputError, match=match):
        functional(st, n=2, space=space, **options)


def test_bad_coarse_evolutions():
    hierarchy = meshes(2, 1, MPI.COMM_SELF)
    ev, coarse = heat(hierarchy[1]), heat(hierarchy[0])
    make = lambda given, **kwargs: Sweeps(
        ev, alone(), options={"levels": 2, "coarsening": 2}, coarse_evolutions=given, **kwargs
    )
    with pytest.raises(InputError, match="give one Evolution to each"):
        make([coarse, coarse])
    with pytest.raises(InputError, match="not both"):
        make([coarse], spatial_coarsening=True)
    with pytest.raises(InputError, match=r"dt = 0\.008"):
        make([heat(hierarchy[0], dt=8e-3)])
    with pytest.raises(InputError, match="on a mesh of a MeshHierarchy and on a coarser one"):
        make([heat(UnitSquareMesh(2, 2, comm=MPI.COMM_SELF))])
    make([coarse])


def test_spaces_that_do_not_fit_are_refused():
    hierarchy = meshes(2, 1, MPI.COMM_SELF)
    spaces = lambda *element: [FunctionSpace(mesh, *element) for mesh in reversed(hierarchy.meshes)]
    with pytest.raises(InputError, match="same element"):
        mesh_transfer(spaces("CG", 2)[0], spaces("CG", 1)[1])
    with pytest.raises(InputError, match="same element"):
        mesh_transfer(spaces("N1curl", 1)[0], spaces("RT", 1)[1])
    with pytest.raises(InputError, match="reals"):
        mesh_transfer(*spaces("R", 0))
    with pytest.raises(InputError, match="on a mesh of a MeshHierarchy and on a coarser one"):
        mesh_transfer(*reversed(spaces("N1curl", 1)))


def test_f_relaxation_alone_stalls():
    """Why it is refused: the residual of a fine mesh mode that the coarser one does not see never shrinks."""
    ev = heat(meshes(4, 1, MPI.COMM_SELF)[-1])
    space = SpatialLevels(ev, ["FCF"], True)
    propagators = [
        LinearStep(LinearPropagator(e, stride=s), transposed=False)
        for e, s in zip(space.evolutions, (1, 2), strict=True)
    ]
    reduction = {}
    for relax in ("F", "FCF"):
        options = {"levels": 2, "coarsening": 2, "relax": relax, "max_it": 6, "rtol": 0.0, "check": "relaxed"}
        U = np.random.default_rng(0).standard_normal((ev.nsteps + 1, ev.state_size))
        history = pf.MGRIT(propagators, ev.nsteps, options=options, transfers=space.transfers).solve(U).residuals
        reduction[relax] = history[-1] / history[1]
    assert reduction["FCF"] < 1e-3
    assert reduction["F"] > 0.1

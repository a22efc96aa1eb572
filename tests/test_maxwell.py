"""Maxwell's equations: orders in time and space against cavity modes, energy, divergence; elimination of a field,
leapfrog; conditions on sub-spaces; probes of components.
"""

import numpy as np
import pytest
from firedrake import (
    DirichletBC,
    Function,
    FunctionSpace,
    MeshHierarchy,
    SpatialCoordinate,
    TestFunction,
    TestFunctions,
    TrialFunction,
    UnitSquareMesh,
    VectorFunctionSpace,
    as_vector,
    assemble,
    cos,
    curl,
    div,
    ds,
    dx,
    exp,
    grad,
    inner,
    sin,
    split,
)
from irksome import Dt

import pint_fem as pf
from pint_fem.errors import InputError
from pint_fem.evolution.fields import sparse_solution
from pint_fem.kernels.arrays import get, put
from pint_fem.propagators import (
    FormPropagator,
    LinearPropagator,
    StepData,
    TapePropagator,
    coarse_evolution,
    make_propagator,
    mesh_transfer,
)
from pint_fem.propagators.choice import leapfrog
from pint_fem.propagators.leapfrog import LeapfrogPropagator, stable_step
from problems.maxwell import B, E, Medium, Region, Walls, energy, perfect_conductor, residual, state_space
from tests.maxwell import box, cavity, mode
from tests.test_propagators import all_results, assert_close, block

LOSSY = (
    Region("host", sigma=3.0),
    Region("block", lambda x: x[0] < 0.5, epsilon=2.0, mu=1.5, sigma=7.0),
)
MIXED = Walls(conductor=(1, 3), impedance=(2,))


def swept(propagator, steps):
    """The trajectory from the evolution's initial state."""
    ev = propagator.evolution
    U = np.zeros((steps + 1, ev.state_size))
    U[0] = get(ev.initial)
    propagator.sweep(U, None)
    return U


def error(ev, state, dim, t):
    """L2 error against the mode, both fields."""
    f, mesh = Function(ev.V), ev.V.mesh().unique()
    put(f, state)
    electric, magnetic, _ = mode(dim, SpatialCoordinate(mesh), t)
    parts = (f.subfunctions[E] - electric, f.subfunctions[B] - magnetic)
    return assemble(sum(inner(p, p) * dx(degree=6) for p in parts)) ** 0.5


@pytest.mark.parametrize(("dim", "degree", "sizes"), [(2, 1, (8, 16)), (2, 2, (4, 8)), (3, 1, (3, 6))])
def test_order_in_space(dim, degree, sizes):
    errors = []
    for n in sizes:
        ev, _ = cavity(dim, n, degree=degree, dt=0.3 / 64, steps=64)
        errors.append(error(ev, swept(LinearPropagator(ev), 64)[-1], dim, 0.3))
    assert np.log2(errors[0] / errors[1]) > degree - 0.15


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("scheme", ["midpoint", "SDIRK2", "leapfrog"])
def test_order_in_time(dim, scheme):
    """End states for N, 2N, 4N steps by Richardson's ratio, on a fixed mesh."""
    ends, n = [], 4 if dim == 2 else 2
    for steps in (24, 48, 96):
        tableau = pf.SDIRK2() if scheme == "SDIRK2" else pf.ImplicitMidpoint()
        ev, _ = cavity(dim, n, tableau=tableau, dt=0.5 / steps, steps=steps)
        propagator = LeapfrogPropagator(ev) if scheme == "leapfrog" else LinearPropagator(ev)
        ends.append(swept(propagator, steps)[-1])
    rate = np.log2(np.linalg.norm(ends[0] - ends[1]) / np.linalg.norm(ends[1] - ends[2]))
    assert abs(rate - 2) < 0.15


@pytest.mark.parametrize("dim", [2, 3])
def test_energy_and_divergence(dim):
    """Over 1,000 midpoint steps in a cavity of two media: energy to 1e-11, div B to 1e-12."""
    regions = (Region("vacuum"), Region("dielectric", lambda x: x[0] < 0.5, epsilon=2.0, mu=1.5))
    ev, medium = cavity(dim, 4 if dim == 2 else 2, dt=0.02, steps=1000, regions=regions)
    U, f = swept(LinearPropagator(ev), 1000), Function(ev.V)
    energies = []
    for state in U[::100]:
        put(f, state)
        energies.append(assemble(energy(f, medium)))
        if dim == 3:
            put(f, state - U[0])  # the initial value's own divergence is that of its interpolation
            assert assemble(div(f.subfunctions[B]) ** 2 * dx) ** 0.5 < 1e-12
    assert np.ptp(energies) < 1e-11 * energies[0]


def test_losses():
    """Conductors and impedance walls take energy away, perfect conductors do not."""
    lost = {}
    for name, regions, walls in (
        ("cavity", None, Walls()),
        ("conductor", (Region("all", sigma=2.0),), Walls()),
        ("impedance", None, Walls((1, 3), (2, 4))),
    ):
        ev, medium = cavity(2, 8, dt=0.02, steps=50, regions=regions, walls=walls)
        U, f, energies = swept(LinearPropagator(ev), 50), Function(ev.V), []
        for state in U:
            put(f, state)
            energies.append(assemble(energy(f, medium)))
        assert (np.diff(energies) < 1e-12 * energies[0]).all()
        lost[name] = 1 - energies[-1] / energies[0]
    assert abs(lost["cavity"]) < 1e-11
    assert abs(lost["conductor"] - (1 - np.exp(-2.0))) < 0.15  # half of the energy is electric, on average
    assert lost["impedance"] > 0.5


# -- the same discrete step, however it is computed -------------------------------------------------------------------
def driven(dim=2, n=3, *, tableau=None, per_step=False, eliminate=B):
    """Two media with losses, all kinds of walls, inhomogeneous tangential E that depends on time, a current."""
    mesh = box(dim, n)
    V, t = state_space(mesh), pf.time_function(mesh)
    u, current = Function(V), Function(VectorFunctionSpace(mesh, "CG", 1))
    x = SpatialCoordinate(mesh)
    form = residual(u, Medium(mesh, LOSSY), current=sin(3 * t) * current, walls=MIXED)
    moving = as_vector([sin(2 * t) * x[1], *([x[0]] * (dim - 1))])
    bcs = [*perfect_conductor(V, Walls((1,))), DirichletBC(V.sub(E), moving, 3)]
    u.subfunctions[E].interpolate(as_vector([x[1], *([x[0] * x[1]] * (dim - 1))]))
    return pf.Evolution(
        form, u, tableau=tableau or pf.SDIRK2(), dt=0.05, nsteps=6, control=current, per_step=per_step, t=t, bcs=bcs,
        eliminate=eliminate,
    )  # fmt: skip


@pytest.mark.parametrize(("tableau", "per_step"), [(pf.SDIRK2, True), (pf.ImplicitMidpoint, False)])
def test_eliminated_full_and_form_agree(tableau, per_step):
    """The form propagator is held to the tape elsewhere, for boundary values in sub-spaces below."""
    ev, whole = (driven(tableau=tableau(), per_step=per_step, eliminate=e) for e in (B, None))
    data, du, dz, lam, _ = block(ev, 2)
    reference = all_results(FormPropagator(whole), data, du, dz, lam)
    assert isinstance(make_propagator(ev), LinearPropagator)
    assert ev.fields.symmetric
    for propagator in (LinearPropagator(ev), LinearPropagator(whole)):
        assert_close(all_results(propagator, data, du, dz, lam), reference, 1e-10)


def test_tape_of_a_mixed_state():
    """One midpoint step, its transpose and the control's, by plain Firedrake and pyadjoint."""
    ev, whole = (driven(tableau=pf.ImplicitMidpoint(), n=2, eliminate=e) for e in (B, None))
    data, _, _, lam, _ = block(ev, 1)
    results = []
    for p in (LinearPropagator(ev), TapePropagator(whole)):
        out, back = np.empty_like(lam), np.empty_like(lam)
        p.step(data, data.u, out)
        p.adjoint(data, lam, back)
        results.append([out, back, p.control_adjoint(data, lam)])
    assert_close(*results, 1e-10)


@pytest.mark.parallel(3)
@pytest.mark.parametrize("dim", [2, 3])
def test_elimination_in_space_parallel(dim):
    ev, whole = (driven(dim, 3 if dim == 2 else 2, eliminate=e) for e in (B, None))
    data, du, dz, lam, _ = block(ev, 2)
    assert_close(*(all_results(LinearPropagator(e), data, du, dz, lam) for e in (ev, whole)), 1e-10)


def test_one_state_is_a_block_of_one():
    ev = driven()
    p, U = LinearPropagator(ev), np.zeros((4, ev.state_size))
    for transposed in (False, True):
        U[0] = np.random.default_rng(0).standard_normal(ev.state_size)
        blocks, again = U.copy(), U.copy()
        p.sweep(U, None, transposed=transposed)
        apply = p.apply_transposed if transposed else p.apply
        for i in range(3):
            apply(blocks[i : i + 1], blocks[i + 1 : i + 2])
        assert np.array_equal(U, blocks)
        apply(U[:-1], again[1:])
        assert np.array_equal(U, again)


def test_sparse_solution():
    """The curl of N1curl in RT has two entries in a column's face; what is not sparse is refused."""
    mesh = box(3, 2)
    V, W = FunctionSpace(mesh, "N1curl", 1), FunctionSpace(mesh, "RT", 1)
    mass = assemble(inner(TrialFunction(W), TestFunction(W)) * dx, mat_type="aij").petscmat
    D = assemble(inner(curl(TrialFunction(V)), TestFunction(W)) * dx, mat_type="aij").petscmat
    X = sparse_solution(mass, D)
    assert X.getInfo()["nz_used"] == 3 * W.dim()  # three edges bound a face
    f = Function(V).interpolate(as_vector([cos(3 * x) for x in SpatialCoordinate(mesh)]))
    x, y = X.createVecs()
    x.array[:] = get(f)
    X.mult(x, y)
    g = Function(W)
    put(g, y.array_r)
    assert assemble(inner(g - curl(f), g - curl(f)) * dx) ** 0.5 < 1e-12
    C = FunctionSpace(mesh, "CG", 1)
    mass, D = (
        assemble(form * dx, mat_type="aij").petscmat
        for form in (TrialFunction(C) * TestFunction(C), div(TrialFunction(W)) * TestFunction(C))
    )
    assert sparse_solution(mass, D) is None


def acoustics(eliminate, tableau):
    """p in DG1, velocity in RT2; either can be the field that is left, as far as matrices stay sparse."""
    mesh = UnitSquareMesh(3, 3)
    V = FunctionSpace(mesh, "RT", 2) * FunctionSpace(mesh, "DG", 1)
    u, q = Function(V), Function(FunctionSpace(mesh, "DG", 0))
    w, p = split(u)
    a, b = TestFunctions(V)
    F = (inner(Dt(w), a) + 2 * inner(w, a) - p * div(a) + Dt(p) * b + div(w) * b - q * b) * dx
    return pf.Evolution(F, u, tableau=tableau, dt=0.05, nsteps=4, control=q, eliminate=eliminate)


def test_elimination_is_not_maxwells():
    """Acoustics with a source in the equation of the field that is eliminated."""
    ev, whole = (acoustics(e, pf.SDIRK2()) for e in (1, None))
    data, du, dz, lam, _ = block(ev, 2)
    assert_close(*(all_results(LinearPropagator(e), data, du, dz, lam) for e in (ev, whole)), 1e-10)


def test_elimination_refused():
    with pytest.raises(InputError, match="depend on the other fields only"):
        LinearPropagator(acoustics(0, pf.SDIRK2()))
    for wrong in (2, -1, True, "E"):
        with pytest.raises(InputError, match="number of a field"):
            acoustics(wrong, pf.SDIRK2())
    with pytest.raises(InputError, match="boundary condition"):
        cavity(2, 2, eliminate=E)


# -- leapfrog ---------------------------------------------------------------------------------------------------------
def test_leapfrog_conserves_and_is_refused_beyond_cfl():
    """Its own energy is constant: E^2 + B^2 - |dt/2 curl E|^2 at whole steps; beyond the limit it is not taken."""
    ev, _ = cavity(2, 4, dt=0.02, steps=400)
    limit = stable_step(ev)
    f, values = Function(ev.V), []
    for state in swept(LeapfrogPropagator(ev), 400)[::40]:
        put(f, state)
        electric, magnetic = f.subfunctions
        rate = curl(electric)
        values.append(assemble((inner(electric, electric) + magnetic**2 - (0.01 * rate) ** 2) * dx))
    assert np.ptp(values) < 1e-11 * values[0]
    at = lambda dt: cavity(2, 4, dt=dt, steps=4)[0]
    growth = LeapfrogPropagator(at(0.99 * limit))
    U = np.random.default_rng(0).standard_normal((400, ev.state_size))
    growth.sweep(U, None)
    assert np.abs(U).max() < 100
    with pytest.raises(InputError, match="not stable"):
        LeapfrogPropagator(at(1.05 * limit))
    with pytest.raises(InputError, match="eliminate"):
        LeapfrogPropagator(cavity(2, 2, eliminate=None)[0])
    assert isinstance(leapfrog(at(0.5 * limit), stride=8), LinearPropagator)


@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize("per_step", [False, True])
def test_leapfrog_derivatives(per_step):
    """Affine and exactly transposed, with time-dependent boundary values and a current."""
    ev = driven(per_step=per_step)
    ev = pf.Evolution(
        ev.residual, ev.u, tableau=ev.tableau, dt=0.02, nsteps=6, control=ev.control, per_step=per_step, t=ev.t,
        bcs=ev.bcs, eliminate=B,
    )  # fmt: skip
    p, comm = LeapfrogPropagator(ev), ev.V.mesh().comm
    data, du, dz, lam, _ = block(ev, 3)
    base, tangent, adjoint, moved = (np.empty_like(du) for _ in range(4))
    p.step(data, data.u, base)
    p.tangent(data, du, dz, tangent)
    p.adjoint(data, lam, adjoint)
    p.step(StepData(data.t, data.z + dz), data.u + du, moved)
    assert_close([moved - base], [tangent], 1e-11)
    both = comm.allreduce(np.array([
        np.vdot(lam, tangent), np.vdot(adjoint, du) + np.vdot(p.control_adjoint(data, lam), dz)
    ]))  # fmt: skip
    assert abs(both[0] - both[1]) < 1e-11 * abs(both[0])


# -- conditions on sub-spaces -----------------------------------------------------------------------------------------
def test_conditions_on_components():
    """One component of a vector fixed, with a control in its boundary value; the tape is the reference."""
    mesh = UnitSquareMesh(3, 3)
    V, Q = VectorFunctionSpace(mesh, "CG", 1), FunctionSpace(mesh, "CG", 1)
    u, v, q, t = Function(V), TestFunction(V), Function(Q), pf.time_function(mesh)
    x, y = SpatialCoordinate(mesh)
    F = inner(Dt(u), v) * dx + inner(grad(u), grad(v)) * dx + inner(u[0], v[1]) * dx
    for value, control in (((1 + t) * y, None), (q * (1 + x), q)):
        bcs = [DirichletBC(V.sub(1), value, 1), DirichletBC(V.sub(0), 0, 2)]
        given = dict(tableau=pf.SDIRK2(), dt=0.1, nsteps=3, t=t, bcs=bcs)
        if control is None:
            current = Function(V)
            ev = pf.Evolution(F - inner(current, v) * dx, u, control=current, **given)
        else:
            ev = pf.Evolution(F, u, control=q, **given)
        data, du, dz, lam, fixed = block(ev, 2)
        assert len(fixed) == 8
        reference = all_results(TapePropagator(ev), data, du, dz, lam)
        for kind in (LinearPropagator, FormPropagator):
            assert_close(all_results(kind(ev), data, du, dz, lam), reference, 1e-10)


def test_control_in_tangential_field():
    """A control in a boundary value of one field of a mixed state."""
    mesh = box(2, 3)
    V, Q = state_space(mesh), VectorFunctionSpace(mesh, "CG", 1)
    u, q = Function(V), Function(Q)
    F = residual(u, Medium(mesh, LOSSY))
    bcs = [DirichletBC(V.sub(E), as_vector((q[0], 2 * q[1])), 1), *perfect_conductor(V, Walls((2,)))]
    evs = [
        pf.Evolution(F, u, tableau=pf.SDIRK2(), dt=0.1, nsteps=3, control=q, bcs=bcs, eliminate=e) for e in (B, None)
    ]
    data, du, dz, lam, _ = block(evs[0], 2)
    reference = all_results(TapePropagator(evs[1]), data, du, dz, lam)
    for p in (*map(LinearPropagator, evs), FormPropagator(evs[0])):
        assert_close(all_results(p, data, du, dz, lam), reference, 1e-10)


def test_conditions_on_another_space_are_refused():
    mesh = box(2, 2)
    V = state_space(mesh)
    u = Function(V)
    with pytest.raises(InputError, match="not on the state's space"):
        pf.Evolution(
            residual(u, Medium(mesh)), u, tableau=pf.SDIRK2(), dt=0.1, nsteps=2,
            bcs=DirichletBC(state_space(mesh, 2).sub(E), as_vector((0, 0)), 1),
        )  # fmt: skip


def test_coarse_evolution_keeps_sub_space_conditions():
    mesh = MeshHierarchy(UnitSquareMesh(2, 2), 1)[-1]
    V = VectorFunctionSpace(mesh, "CG", 1)
    u, v = Function(V), TestFunction(V)
    F = (inner(Dt(u), v) + inner(grad(u), grad(v))) * dx
    ev = pf.Evolution(F, u, tableau=pf.SDIRK2(), dt=0.1, nsteps=3, bcs=DirichletBC(V.sub(1), 0, 1))
    coarse = coarse_evolution(ev)
    assert len(LinearPropagator(coarse).bc_rows) == 3
    transfer = mesh_transfer(ev.V, coarse.V, ev.bcs, coarse.bcs)
    fixed = LinearPropagator(ev).bc_rows
    assert not transfer.prolong(np.ones((1, coarse.state_size)))[0][fixed].any()


# -- currents with a time course --------------------------------------------------------------------------------------
def test_time_courses_of_static_controls():
    """Two time courses in one operator, a moving one is not separable."""
    mesh = UnitSquareMesh(3, 3)
    V, Q = FunctionSpace(mesh, "CG", 1), FunctionSpace(mesh, "DG", 0)
    u, v, q, t = Function(V), TestFunction(V), Function(Q), pf.time_function(mesh)
    x, y = SpatialCoordinate(mesh)
    for course, terms in ((sin(5 * t) + x * cos(t) ** 2, 2), (exp(-((x - t) ** 2) * 40), None)):
        F = (Dt(u) * v + inner(grad(u), grad(v)) - course * q * v - y * sin(t) * v) * dx + u * v * ds(1)
        ev = pf.Evolution(F, u, tableau=pf.SDIRK2(), dt=0.05, nsteps=40, control=q, t=t, bcs=DirichletBC(V, t, 2))
        assert isinstance(make_propagator(ev), FormPropagator if terms is None else LinearPropagator)
        data, du, dz, lam, _ = block(ev, 3)
        if terms:
            assert len(ev.control_operators[0].terms) == terms
            both = [all_results(kind(ev), data, du, dz, lam) for kind in (LinearPropagator, FormPropagator)]
            assert_close(*both, 1e-10)


# -- probes -----------------------------------------------------------------------------------------------------------
@pytest.mark.parallel([1, 3])
def test_probes_of_components():
    """What probes read is the component's value there; gradients are transposes."""
    ev = driven(n=4)
    comm = ev.V.mesh().comm
    st = pf.SpaceTime((comm.size, 1), comm=comm)
    points = np.array([(0.21, 0.33), (0.6, 0.7), (0.9, 0.15)])
    times = ev.dt * np.array([1, 2.5, 6])
    x, y = SpatialCoordinate(ev.V.mesh().unique())
    f = Function(ev.V)
    f.subfunctions[E].interpolate(as_vector((1 + 2 * y, 3 - 2 * x)))  # N1curl of lowest degree holds it
    f.subfunctions[B].interpolate(7.0 + 0 * x)
    slab = st.slab(ev.nsteps)
    U = np.tile(get(f), (slab.k + 1, 1))
    px, py = points.T
    for field, component, expected in ((E, 0, 1 + 2 * py), (E, 1, 3 - 2 * px), (B, None, np.full(3, 7.0))):
        probes = pf.PointSensors(points, times, np.zeros((3, 3)), field=field, component=component)
        probes.bind(ev, st, slab)
        assert np.allclose(probes.readings(probes.read(U)), expected[None], atol=1e-12)
        dU = np.random.default_rng(0).standard_normal(U.shape)
        both = comm.allreduce(np.vdot(probes.gradient(U), dU)), probes.directional(U, dU).sum()
        assert abs(both[0] - both[1]) < 1e-11 * abs(both[1])
    for field, component in ((None, 0), (2, 0), (E, None), (E, 2), (B, 0)):
        with pytest.raises(InputError, match="PointSensors"):
            pf.PointSensors(points, times, np.zeros((3, 3)), field=field, component=component).bind(ev, st, slab)


# -- multigrid --------------------------------------------------------------------------------------------------------
STAR = {
    "ksp_type": "cg",
    "ksp_rtol": 1e-12,
    "pc_type": "mg",
    "mg_levels_ksp_type": "chebyshev",
    "mg_levels_ksp_max_it": 2,
    "mg_levels_pc_type": "python",
    "mg_levels_pc_python_type": "firedrake.ASMStarPC",
    "mg_coarse_pc_type": "cholesky",
}


def on_hierarchy(refinements, dt, parameters):
    """A cavity with losses on the finest of some meshes."""
    mesh = MeshHierarchy(UnitSquareMesh(4, 4), refinements)[-1]
    V = state_space(mesh)
    u = Function(V)
    return pf.Evolution(
        residual(u, Medium(mesh, LOSSY), walls=MIXED), u, tableau=pf.ImplicitMidpoint(), dt=dt, nsteps=2,
        bcs=perfect_conductor(V, MIXED), eliminate=B, solver_parameters=parameters,
    )  # fmt: skip


def test_star_multigrid():
    """Same states as by factorisation; iterations hardly grow with refinement and step."""
    counts = []
    for refinements, dt in ((1, 0.1), (2, 0.1), (2, 10.0)):
        direct, iterative = (LinearPropagator(on_hierarchy(refinements, dt, p)) for p in (None, STAR))
        u = np.random.default_rng(0).standard_normal((2, direct.evolution.state_size))
        u[:, direct.bc_rows] = 0
        out = np.zeros((2, *u.shape))
        direct.apply(u, out[0])
        iterative.apply(u, out[1])
        assert_close([out[1]], [out[0]], 1e-9)
        (factor,) = iterative.factors.values()
        counts.append(factor.ksp.getIterationNumber())
        smoother = factor.ksp.getPC().getMGSmoother(refinements)
        assert type(smoother.getPC().getPythonContext()).__name__ == "ASMStarPC"  # as the options choose
    assert min(counts) > 0
    assert max(counts) <= min(counts) + 2
    assert max(counts) < 20


def test_multigrid_without_hierarchy_is_refused():
    ev = cavity(2, 4)[0]
    ev.solver_parameters = STAR
    with pytest.raises(InputError, match="MeshHierarchy"):
        LinearPropagator(ev)

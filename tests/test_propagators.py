"""The three propagators agree in step, tangent, adjoint and second order; derivatives pass dot-product and Taylor
tests.
"""

import numpy as np
import pytest
import ufl
from firedrake import (
    COMM_WORLD,
    DirichletBC,
    Function,
    FunctionSpace,
    SpatialCoordinate,
    TestFunction,
    TestFunctions,
    UnitSquareMesh,
    VectorFunctionSpace,
    as_vector,
    assemble,
    div,
    dot,
    ds,
    dx,
    exp,
    grad,
    inner,
    sin,
    split,
)
from irksome import Dt
from irksome.tableaux.ButcherTableaux import ButcherTableau

import pint_fem.kernels.factor
from pint_fem.evolution import SDIRK2, BackwardEuler, Evolution, ImplicitMidpoint, time_function
from pint_fem.kernels.arrays import put
from pint_fem.kernels.lanes.structures import scratch
from pint_fem.propagators import FormPropagator, LinearPropagator, StepData, TapePropagator, make_propagator

TABLEAUX = {"BE": BackwardEuler, "midpoint": ImplicitMidpoint, "SDIRK2": SDIRK2}


def heat(tableau, *, linear=True, per_step=False, comm=None, n=5):
    mesh = UnitSquareMesh(
        n, n, distribution_parameters={"partitioner_type": "simple"}, **({"comm": comm} if comm else {})
    )
    V, Q = FunctionSpace(mesh, "CG", 1), FunctionSpace(mesh, "DG", 0)
    u, v, q, t = Function(V), TestFunction(V), Function(Q), time_function(mesh)
    x, y = SpatialCoordinate(mesh)
    kappa = 1 + x if linear else 1 + u**2 + 0.1 * q**2
    F = Dt(u) * v * dx + kappa * dot(grad(u), grad(v)) * dx + 0.5 * u * v * ds(1) - (q + sin(3 * t) * y) * v * dx
    bcs = [DirichletBC(V, 0.1 + t * y, 2)]
    u.interpolate(sin(x) * y)
    return Evolution(F, u, tableau=TABLEAUX[tableau](), dt=0.05, nsteps=12, control=q, per_step=per_step, t=t, bcs=bcs)


def block(ev, k, seed=0):
    rng = np.random.default_rng(seed)
    n, nz = ev.state_size, ev.control_size
    fixed = LinearPropagator(ev).bc_rows if ev.linear_operators() else FormPropagator(ev).bc_rows
    zshape = (k, nz) if ev.per_step else (nz,)
    data = StepData(ev.time(np.arange(k)), rng.standard_normal(zshape), rng.standard_normal((k, n)))
    return data, rng.standard_normal((k, n)), rng.standard_normal(zshape), rng.standard_normal((k, n)), fixed


def all_results(propagator, data, du, dz, lam):
    """Everything a propagator computes."""
    out = [np.empty_like(du) for _ in range(4)]
    propagator.step(data, data.u, out[0])
    propagator.tangent(data, du, dz, out[1])
    propagator.tangent(data, du, None, out[2])
    propagator.adjoint(data, lam, out[3])
    return [*out, propagator.control_adjoint(data, lam), *propagator.second_order(data, du, dz, lam)]


def assert_close(a, b, tolerance):
    for x, y in zip(a, b, strict=True):
        assert np.abs(x - y).max() <= tolerance * max(1.0, np.abs(y).max())


@pytest.mark.parametrize(
    ("tableau", "per_step"), [("BE", False), ("midpoint", True), ("SDIRK2", False), ("SDIRK2", True)]
)
def test_linear_form_and_tape_agree(tableau, per_step):
    ev = heat(tableau, per_step=per_step)
    data, du, dz, lam, _ = block(ev, 2)
    reference = all_results(TapePropagator(ev), data, du, dz, lam)
    assert_close(all_results(FormPropagator(ev), data, du, dz, lam), reference, 1e-10)
    assert_close(all_results(LinearPropagator(ev), data, du, dz, lam), reference, 1e-10)
    assert isinstance(make_propagator(ev), LinearPropagator)


@pytest.mark.parametrize("tableau", TABLEAUX)
def test_form_and_tape_agree_nonlinear(tableau):
    ev = heat(tableau, linear=False)
    data, du, dz, lam, _ = block(ev, 2)
    reference = all_results(TapePropagator(ev), data, du, dz, lam)
    assert_close(all_results(FormPropagator(ev), data, du, dz, lam), reference, 1e-10)
    assert isinstance(make_propagator(ev), FormPropagator)


@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("tableau", TABLEAUX)
def test_taylor_and_transpose(tableau, linear):
    ev = heat(tableau, linear=linear)
    p = make_propagator(ev, stride=2)
    data, du, dz, lam, _ = block(ev, 2)
    base, tangent, adjoint = (np.empty_like(du) for _ in range(3))
    p.step(data, data.u, base)
    p.tangent(data, du, dz, tangent)
    p.adjoint(data, lam, adjoint)
    forward = np.vdot(lam, tangent)
    assert abs(forward - np.vdot(adjoint, du) - np.vdot(p.control_adjoint(data, lam), dz)) <= 1e-11 * abs(forward)
    remainders = []
    for eps in (1e-2, 5e-3, 2.5e-3):
        shifted = np.empty_like(base)
        p.step(StepData(data.t, data.z + eps * dz), data.u + eps * du, shifted)
        remainders.append(np.abs(shifted - base - eps * tangent).max())
    if linear:
        assert max(remainders) < 1e-11
    else:
        assert np.log2(np.divide(remainders[:-1], remainders[1:])).min() > 1.95


def test_second_order_is_the_derivative_of_the_adjoint():
    ev = heat("SDIRK2", linear=False)
    p = make_propagator(ev)
    data, du, dz, lam, _ = block(ev, 2)
    su, sz = p.second_order(data, du, dz, lam)
    eps, ends = 1e-5, []
    for sign in (1, -1):
        moved = StepData(data.t, data.z + sign * eps * dz, data.u + sign * eps * du)
        out = np.empty_like(lam)
        p.adjoint(moved, lam, out)
        ends.append((out, p.control_adjoint(moved, lam)))
    assert np.abs((ends[0][0] - ends[1][0]) / (2 * eps) - su).max() < 1e-7 * np.abs(su).max()
    assert np.abs((ends[0][1] - ends[1][1]) / (2 * eps) - sz).max() < 1e-7 * np.abs(sz).max()


def test_a_state_has_the_same_bits_in_every_block():
    ev = heat("SDIRK2", n=24)
    p = LinearPropagator(ev)
    u = np.random.default_rng(1).standard_normal((75, ev.state_size))
    whole, parts = np.empty_like(u), np.empty_like(u)
    p.apply(u, whole)
    for a, b in ((0, 2), (2, 3), (3, 11), (11, 27), (27, 28), (28, 60), (60, 75)):
        p.apply(u[a:b], parts[a:b])
    assert np.array_equal(whole, parts)
    p.sweep(steps := np.concatenate([u[:1], parts[:3]]), None)
    assert np.array_equal(steps[1], whole[0])  # one step after another


def test_results_do_not_depend_on_what_the_work_memory_holds():
    """All programs of a process share it: each writes what it reads, whatever another one has left there."""
    ev = heat("SDIRK2")
    p = LinearPropagator(ev)
    given = block(ev, 21)[:4]
    wanted = all_results(p, *given)
    scratch(0).view(float)[:] = np.nan
    found = all_results(p, *given)
    assert all(np.array_equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parallel([1, 2])
@pytest.mark.parametrize(("lanes", "steps"), [(70, 3), (3, 50)])
@pytest.mark.parametrize("transposed", [False, True])
def test_many_steps_in_a_call_are_single_steps(lanes, steps, transposed, monkeypatch):
    """More states than ranks in space exchange at a time; without a compiler, to round-off."""
    ev = heat("SDIRK2", comm=COMM_WORLD)
    p = LinearPropagator(ev)
    rng = np.random.default_rng(COMM_WORLD.rank)
    u, added = rng.standard_normal((lanes, ev.state_size)), rng.standard_normal((lanes, steps, ev.state_size))
    out = np.empty_like(added)
    p.advance(u, out, added, transposed=transposed)
    one = np.empty_like(u)
    for i in range(steps):
        (p.apply_transposed if transposed else p.apply)(out[:, i - 1] if i else u, one)
        assert np.array_equal(one + added[:, i], out[:, i])
    monkeypatch.setattr(pint_fem.kernels.factor, "kernels", lambda: None)
    again = np.empty_like(out)
    LinearPropagator(ev).advance(u, again, added, transposed=transposed)
    assert_close([again], [out], 1e-12)


UNEQUAL = np.array([[0.25, 0], [0.25, 0.5]]), np.array([0.5, 0.5]), np.array([0.25, 0.75])
"""``A``, ``b`` and ``c`` of a method of order 2 with another diagonal entry in each stage."""


@pytest.mark.parametrize(("tableau", "order"), [("BE", 1), ("midpoint", 2), ("SDIRK2", 2), ("unequal", 2)])
def test_order_in_time(tableau, order):
    """u' = -A u from a smooth state: end values for N, 2N, 4N steps give the order by Richardson's ratio."""
    A, b, c = UNEQUAL
    methods = TABLEAUX | {"unequal": lambda: ButcherTableau(A, b, None, c, 2, None, None)}
    mesh = UnitSquareMesh(6, 6)
    V = FunctionSpace(mesh, "CG", 1)
    x, y = SpatialCoordinate(mesh)
    ends = []
    for steps in (8, 16, 32):
        u, v = Function(V).interpolate(x * (1 - x) * y * (1 - y)), TestFunction(V)
        F = Dt(u) * v * dx + 0.1 * dot(grad(u), grad(v)) * dx
        ev = Evolution(F, u, tableau=methods[tableau](), dt=0.4 / steps, nsteps=steps)
        U = np.empty((steps + 1, ev.state_size))
        U[0] = u.dat.data_ro
        LinearPropagator(ev).sweep(U, None)
        ends.append(U[-1].copy())
    rate = np.log2(np.linalg.norm(ends[0] - ends[1]) / np.linalg.norm(ends[1] - ends[2]))
    assert abs(rate - order) < 0.15


def test_vector_valued_state():
    mesh = UnitSquareMesh(4, 4)
    V = VectorFunctionSpace(mesh, "CG", 1)
    u, v, q = Function(V), TestFunction(V), Function(V)
    F = inner(Dt(u), v) * dx + inner(grad(u), grad(v)) * dx - inner(q, v) * dx
    ev = Evolution(F, u, tableau=SDIRK2(), dt=0.1, nsteps=3, control=q, bcs=DirichletBC(V, (0, 0), "on_boundary"))
    data, du, dz, lam, _ = block(ev, 2)
    assert_close(
        all_results(LinearPropagator(ev), data, du, dz, lam), all_results(TapePropagator(ev), data, du, dz, lam), 1e-10
    )


def advection(tableau, *, size=1.0, linear=True):
    """Not symmetric, inhomogeneous Dirichlet values on a part of the boundary; the same on a domain of any size."""
    mesh = UnitSquareMesh(5, 4, distribution_parameters={"partitioner_type": "simple"})
    mesh.coordinates.dat.data[:] *= size
    V, Q = FunctionSpace(mesh, "CG", 2), FunctionSpace(mesh, "CG", 1)
    u, v, q, t = Function(V), TestFunction(V), Function(Q), time_function(mesh)
    x, y = SpatialCoordinate(mesh) / size
    flow = size * as_vector((1 + y, -2 * x))
    diffusion = 0.1 * size**2 * (1 if linear else 1 + u**2)
    F = ((1 + x) * Dt(u) * v + dot(flow, grad(u)) * v + diffusion * dot(grad(u), grad(v)) - q * v) * dx
    u.interpolate(x * y)
    bcs = [DirichletBC(V, y + sin(t), 1), DirichletBC(V, 1, 4)]
    return Evolution(F, u, tableau=TABLEAUX[tableau](), dt=0.05, nsteps=12, control=q, t=t, bcs=bcs)


@pytest.mark.parametrize("linear", [True, False])
def test_units_do_not_matter(linear):
    """A micrometre-sized domain in metres: small entries beside unit boundary rows, small residuals."""
    results = []
    for size in (1.0, 1e-6):
        ev = advection("BE", size=size, linear=linear)
        data, du, dz, lam, _ = block(ev, 2)
        results.append(all_results(make_propagator(ev), data, du, dz, lam))
    assert_close(*results, 1e-9)


@pytest.mark.parametrize("tableau", TABLEAUX)
def test_nonsymmetric_operators(tableau):
    steady = advection(tableau)
    assert isinstance(make_propagator(steady), LinearPropagator)
    data, du, dz, lam, _ = block(steady, 2)
    reference = all_results(TapePropagator(steady), data, du, dz, lam)
    assert_close(all_results(LinearPropagator(steady), data, du, dz, lam), reference, 1e-10)
    assert_close(all_results(FormPropagator(steady), data, du, dz, lam), reference, 1e-10)
    p, U = LinearPropagator(steady), np.zeros((4, steady.state_size))  # three steps
    U[0] = lam[0]
    blocks = U.copy()
    p.sweep(U, None, transposed=True)
    for i in range(3):
        p.apply_transposed(blocks[i : i + 1], blocks[i + 1 : i + 2])
    assert_close([U], [blocks], 1e-12)


@pytest.mark.parallel(2)
@pytest.mark.parametrize(("make", "tableau"), [(advection, "BE"), (heat, "SDIRK2")])
def test_agreement_in_space_parallel(make, tableau):
    problem = make(tableau)
    data, du, dz, lam, _ = block(problem, 2)
    reference = all_results(TapePropagator(problem), data, du, dz, lam)
    assert_close(all_results(LinearPropagator(problem), data, du, dz, lam), reference, 1e-10)
    assert_close(all_results(FormPropagator(problem), data, du, dz, lam), reference, 1e-10)


@pytest.mark.parallel([1, 3])
def test_indefinite_operator():
    """M - c dt I with c dt > 1 on the constants: symmetric, not definite, in one and two space ranks."""
    mesh = UnitSquareMesh(4, 4, distribution_parameters={"partitioner_type": "simple"})
    V = FunctionSpace(mesh, "CG", 1)
    u, v, q = Function(V), TestFunction(V), Function(V)
    F = (Dt(u) * v - 50 * u * v + inner(grad(u), grad(v)) - q * v) * dx
    ev = Evolution(F, u, tableau=BackwardEuler(), dt=0.1, nsteps=4, control=q)
    data, du, dz, lam, _ = block(ev, 2)
    linear, form = (all_results(kind(ev), data, du, dz, lam) for kind in (LinearPropagator, FormPropagator))
    assert_close(linear, form, 1e-10)


def test_moving_control_operator_needs_the_form_propagator():
    """A scalar factor that depends on time does not (see test_maxwell)."""
    ev = advection("BE")
    x, _ = SpatialCoordinate(ev.V.mesh())
    F = ufl.replace(ev.residual, {ev.control: ev.control * exp(-((8 * (x - 2 * ev.t)) ** 2))})
    moving = Evolution(F, ev.u, tableau=ev.tableau, dt=ev.dt, nsteps=12, control=ev.control, t=ev.t, bcs=ev.bcs)
    assert isinstance(make_propagator(moving), FormPropagator)
    data, du, dz, lam, _ = block(moving, 2)
    reference = all_results(TapePropagator(moving), data, du, dz, lam)
    results = all_results(FormPropagator(moving), data, du, dz, lam)
    # quadrature of the bell: UFL estimates another degree for the tangent's form than for the residual's
    assert_close(results[1:2], reference[1:2], 1e-4)
    assert_close([*results[:1], *results[2:]], [*reference[:1], *reference[2:]], 1e-10)


def test_mixed_state():
    """Acoustics as a first-order system: p in DG0, velocity in RT; midpoint keeps the energy."""
    mesh = UnitSquareMesh(4, 4)
    V = FunctionSpace(mesh, "RT", 1) * FunctionSpace(mesh, "DG", 0)
    u, q = Function(V), Function(FunctionSpace(mesh, "DG", 0))
    w, p = split(u)
    a, b = TestFunctions(V)
    F = (inner(Dt(w), a) - p * div(a) + Dt(p) * b + div(w) * b - q * b) * dx
    ev = Evolution(F, u, tableau=ImplicitMidpoint(), dt=0.05, nsteps=4, control=q)
    data, du, dz, lam, _ = block(ev, 2)
    linear = LinearPropagator(ev)
    assert_close(all_results(linear, data, du, dz, lam), all_results(FormPropagator(ev), data, du, dz, lam), 1e-10)
    U = np.zeros((101, ev.state_size))
    U[0] = du[0]
    linear.sweep(U, None)
    energies = []
    for state in (U[0], U[-1]):
        put(u, state)
        energies.append(assemble((inner(u.sub(0), u.sub(0)) + u.sub(1) ** 2) * dx))
    assert abs(energies[1] - energies[0]) < 1e-11 * energies[0]

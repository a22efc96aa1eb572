"""The time-parallel reduced functional: derivatives, invariance under the process grid, theory bounds, warm starts."""

from itertools import pairwise

import numpy as np
import pytest
import scipy.linalg
from firedrake import (
    Function,
    FunctionSpace,
    SpatialCoordinate,
    TestFunction,
    assemble,
    cos,
    dot,
    ds,
    dx,
    grad,
    inner,
    sin,
)
from firedrake.adjoint import (
    MinimizationProblem,
    TAOSolver,
    continue_annotation,
    get_working_tape,
    pause_annotation,
    taylor_test,
    taylor_to_dict,
)
from irksome import Dt
from mpi4py import MPI

import pint_fem as pf
from pint_fem.evolution.tableaux import DIRK
from pint_fem.mgrit import SolverFailure
from pint_fem.propagators import LinearPropagator
from pint_fem.theory import dirk_stability, two_level_bound
from tests.heat import TABLEAUX, heat, point_and_direction
from tests.meshes import square


def functional(
    st, *, linear=True, per_step=False, steps=22, tableau="SDIRK2", n=6, riesz_map="L2", solver=None, **options
):
    """A heat problem with every kind of term; 22 steps and m = 4, 2 make uneven intervals and slabs."""
    mesh = square(n, st.space_comm)
    ev = heat(mesh, linear=linear, per_step=per_step, steps=steps, dt=0.01, tableau=tableau)
    u, q, t, x = ev.u, ev.control, ev.t, SpatialCoordinate(mesh)[0]
    target = sin(x) * cos(t)
    misfits = [
        pf.RunningMisfit((inner(u - target, u - target) + (0 if linear else u**4)) * dx),
        pf.TerminalMisfit(5 * u**2 * dx),
        pf.PointSensors([[0.3, 0.3], [0.7, 0.6]], np.array([0.004, 0.053, 0.1, 0.22]) * steps / 22, np.ones((4, 2))),
    ]
    regularisation = 1e-3 * (inner(grad(q), grad(q)) + (0 if linear else q**4) + q**2) * dx
    mgrit = {"coarsening": (4, 2), "levels": 3, "rtol": 1e-13} | options
    return pf.TimeParallelReducedFunctional(
        ev,
        misfits,
        regularisation=regularisation,
        spacetime=st,
        solver_parameters=solver or {"mgrit": mgrit},
        riesz_map=riesz_map,
    )


def check_derivatives(rf):
    m, h = point_and_direction(rf)
    rates = taylor_to_dict(rf, m, h)
    assert min(rates["R1"]["Rate"]) > 1.95
    if rates["R2"]["Residual"][0] > 1e-11 * abs(rf(m)):  # a quadratic functional has no third-order remainder
        assert min(rates["R2"]["Rate"]) > 2.9
    rf(m)
    assert abs(h._ad_dot(rf.derivative()) - rf.tlm(h)) <= 1e-10 * abs(rf.tlm(h))


@pytest.mark.parametrize("tableau", ["BE", "midpoint"])
def test_derivatives_of_other_integrators(tableau):
    options = {"levels": 1} if tableau == "midpoint" else {}
    check_derivatives(functional(pf.SpaceTime("1x1", comm=MPI.COMM_SELF), tableau=tableau, **options))


def small(st, linear, per_step):
    return functional(st, linear=linear, per_step=per_step, steps=22 if linear else 10, n=6 if linear else 3)


@pytest.mark.parametrize("per_step", [False, True])
@pytest.mark.parametrize("linear", [True, False])
def test_derivatives(linear, per_step):
    """Taylor remainders of order 2 and 3, and the tangent against the adjoint; grids: also test_controls."""
    check_derivatives(small(pf.SpaceTime("1x1"), linear, per_step))


@pytest.mark.parallel(4)
@pytest.mark.parametrize(("linear", "per_step"), [(True, True), (False, False)])
def test_derivatives_on_a_grid(linear, per_step):
    check_derivatives(small(pf.SpaceTime("2x2"), linear, per_step))


@pytest.mark.parallel(3)
@pytest.mark.parametrize("per_step", [False, True])
def test_same_bits_for_every_number_of_time_ranks(per_step):
    """States, adjoints, residual histories and J against one time rank, at P_space = 1 and 2."""
    size = MPI.COMM_WORLD.size
    for space in [1]:
        many = pf.SpaceTime((space, size // space))
        one = pf.SpaceTime((space, 1), comm=many.space_comm)
        results = []
        for st in (many, one):
            rf = functional(st, per_step=per_step, rtol=1e-6, n=4)
            J = rf(point_and_direction(rf)[0])
            rf.derivative()
            results.append((rf, J, [r.residuals for _, r in rf.problem.sweeps.results]))
        (a, Ja, ra), (b, Jb, rb) = results
        lo, hi = a.problem.sweeps.slab.lo, a.problem.sweeps.slab.hi
        assert Ja == Jb
        assert ra == rb
        assert np.array_equal(a.problem.U, b.problem.U[lo : hi + 1])
        assert np.array_equal(a.problem.L, b.problem.L[lo : hi + 1])


@pytest.mark.parallel(3)
def test_all_grids_find_the_same_minimum():
    values = []
    for grid in ("1x3", "3x1"):
        rf = functional(pf.SpaceTime(grid), rtol=1e-11, n=4)
        result = rf.minimize_trust_region(gtol_rel=1e-8)
        assert result.converged
        q = rf.function(result.x)
        values.append([result.value, assemble(q * dx), assemble(q**2 * dx)])
    alone = functional(pf.SpaceTime("1x1", comm=MPI.COMM_SELF), levels=1, n=4)
    result = alone.minimize_trust_region(gtol_rel=1e-8)
    q = alone.function(result.x)
    reference = [result.value, assemble(q * dx), assemble(q**2 * dx)]
    assert np.allclose(values, reference, rtol=1e-6)


@pytest.mark.parametrize("relax", ["F", "FCF"])
@pytest.mark.parametrize("m", [2, 4, 8])
@pytest.mark.parametrize("tableau", ["BE", "SDIRK2"])
def test_observed_factors_lie_under_the_bound(tableau, m, relax):
    """Error of each iterate at the C-points in the mass norm, state and adjoint, against the two-level bound."""
    mesh = square(8, MPI.COMM_SELF)
    V = FunctionSpace(mesh, "CG", 1)
    u, v, q = Function(V), TestFunction(V), Function(V)
    N, dt = 64, 2e-3
    F = Dt(u) * v * dx + dot(grad(u), grad(v)) * dx + u * v * ds - q * v * dx
    ev = pf.Evolution(F, u, tableau=TABLEAUX[tableau](), dt=dt, nsteps=N, control=q)
    M, K = (assemble(form, mat_type="aij").petscmat[:, :] for form in ev.linear_operators())
    dirk, z = DIRK(ev.tableau), -dt * scipy.linalg.eigh(K, M, eigvals_only=True)
    R = lambda z: dirk_stability(dirk.A, dirk.b, z)
    bound = two_level_bound(R(z), R(m * z), m, N // m, relax)
    sup = -np.logspace(-5, 5, 20001)
    assert bound <= two_level_bound(R(sup), R(m * sup), m, relax=relax) * (1 + 1e-6)
    forward, coarse = (LinearPropagator(ev, stride=s) for s in (1, m))

    class Step:
        def __init__(self, propagator, transposed):
            apply = propagator.apply_transposed if transposed else propagator.apply
            self.step = lambda steps, u, out: apply(u, out)

    rng = np.random.default_rng(m)
    for transposed in (False, True):
        weight = np.linalg.inv(M) if transposed else M  # adjoints live in the dual space
        exact = np.zeros((N + 1, ev.state_size))
        exact[0] = rng.standard_normal(ev.state_size)
        forward.sweep(exact, None, transposed=transposed)
        size = np.sqrt(np.einsum("ki,ij,kj->", exact[::m], weight, exact[::m]))
        guess, errors = rng.standard_normal(exact.shape), []
        guess[0] = exact[0]
        for cycles in range(1, 8):
            U = guess.copy()
            options = {"coarsening": m, "relax": relax, "rtol": 0.0, "max_it": cycles}
            pf.MGRIT([Step(forward, transposed), Step(coarse, transposed)], N, options=options).solve(U)
            e = (U - exact)[::m]
            errors.append(np.sqrt(np.einsum("ki,ij,kj->", e, weight, e)))
        observed = [b / a for a, b in pairwise(errors) if b > 1e-10 * size]
        assert observed
        assert max(observed) <= bound * (1 + 1e-8)


def test_warm_start_and_memory_of_values():
    rf = functional(pf.SpaceTime("1x1", comm=MPI.COMM_SELF), rtol=1e-9)
    m, h = point_and_direction(rf)
    J = rf(m)
    cold = rf.problem.sweeps.results[-1][1].cycles
    counts = dict(rf.problem.sweeps.counts)
    assert rf(m) == J
    assert rf.problem.sweeps.counts == counts  # the same control: nothing is solved again
    rf.derivative()
    rf.derivative()
    assert rf.problem.sweeps.counts["adjoint"] == 1
    rf(Function(m.function_space()).assign(m + 1e-6 * h))
    assert rf.problem.sweeps.results[-1][1].cycles < cold


def test_a_state_of_higher_accuracy_has_a_value_and_a_gradient_of_its_own():
    st = pf.SpaceTime("1x1", comm=MPI.COMM_SELF)
    loose, exact = (functional(st).problem for _ in range(2))
    z = np.ones(loose.layout.size)
    first, slope = loose.value(z, rtol=1e-2), loose.derivative(z, rtol=1e-2)
    value, g = exact.value(z), exact.derivative(z)
    assert abs(first - value) > 1e-8 * abs(value)
    assert np.abs(slope - g).max() > 1e-8 * np.abs(g).max()
    assert loose.value(z) == pytest.approx(value, rel=1e-11)
    np.testing.assert_allclose(loose.derivative(z), g, rtol=0, atol=1e-10 * np.abs(g).max())


def test_pyadjoint_taylor_test():
    rf = functional(pf.SpaceTime("1x1", comm=MPI.COMM_SELF))
    assert taylor_test(rf, *point_and_direction(rf)) > 1.95


def test_sensors_reproduce_a_linear_trajectory():
    """u = a t + b x: linear in time and space, so readings between steps are exact, and the misfit of exact data is
    zero.
    """
    mesh = square(4, MPI.COMM_SELF)
    V = FunctionSpace(mesh, "CG", 1)
    x, _ = SpatialCoordinate(mesh)
    u, v, q = Function(V).interpolate(x), TestFunction(V), Function(V)
    q.assign(2.0)
    ev = pf.Evolution((Dt(u) - q) * v * dx, u, tableau=pf.BackwardEuler(), dt=0.1, nsteps=10, control=q)
    points, times = np.array([[0.31, 0.2], [0.77, 0.9], [0.5, 0.5]]), np.array([0.05, 0.1, 0.333, 1.0])
    data = 2 * times[:, None] + points[:, 0]
    rf = pf.TimeParallelReducedFunctional(
        ev, pf.PointSensors(points, times, data), spacetime=pf.SpaceTime("1x1", comm=MPI.COMM_SELF)
    )
    assert rf(q) < 1e-15
    (sensors,) = rf.problem.misfits
    assert np.allclose(sensors.readings(rf.problem.observations(rf.array(q), sensors)), data, atol=1e-9)
    shifted = pf.TimeParallelReducedFunctional(
        ev, pf.PointSensors(points, times, data + 0.5, weight=3.0), spacetime=pf.SpaceTime("1x1", comm=MPI.COMM_SELF)
    )
    assert abs(shifted(q) - 1.5 * 12 * 0.25) < 1e-8


@pytest.mark.slow_on_ranks
@pytest.mark.parallel([1, 3])
def test_tao(capsys):
    """pyadjoint's TAOSolver on the space communicator finds the trust region's minimum."""
    st = pf.SpaceTime()
    rf = functional(st, rtol=1e-11, n=4)
    best = rf.minimize_trust_region(gtol_rel=1e-9).value
    rf = functional(st, rtol=1e-11, n=4)
    options = {"tao_type": "lmvm", "tao_gatol": 1e-9, "tao_grtol": 0.0, "tao_gttol": 0.0, "tao_max_it": 200}
    solution = TAOSolver(MinimizationProblem(rf), options, comm=st.space_comm).solve()
    assert abs(rf(solution) - best) < 1e-8 * best


def test_minimum_is_put_into_the_control_and_annotation_is_off():
    rf = functional(pf.SpaceTime("1x1", comm=MPI.COMM_SELF), linear=False, steps=4, n=3, levels=1)
    continue_annotation()
    try:
        result = rf.minimize_trust_region(max_radius=10.0)
    finally:
        pause_annotation()
    assert not get_working_tape().get_blocks()
    assert rf(rf.controls[0].control) == result.value


def test_a_failed_sweep_leaves_nothing_behind():
    rf = functional(pf.SpaceTime("1x1", comm=MPI.COMM_SELF))
    m = point_and_direction(rf)[0]
    rf(m)
    reference = rf.derivative().dat.data_ro.copy()
    again = functional(pf.SpaceTime("1x1", comm=MPI.COMM_SELF))
    again(point_and_direction(again)[0])
    step = again.problem.sweeps.solvers.adjoint.levels[0].propagator
    healthy = step._apply
    step._apply = lambda *args: 1 / 0
    with pytest.raises(SolverFailure, match=r"adjoint: level 0.*ZeroDivisionError"):
        again.derivative()
    step._apply = healthy
    assert np.allclose(again.derivative().dat.data_ro, reference, rtol=1e-10)

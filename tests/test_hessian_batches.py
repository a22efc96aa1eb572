"""Hessian actions on several directions: serial pyadjoint, dense algebra, differences of gradients, single actions.

The directions of a batch differ in size by many orders of magnitude, and one of them is zero.
"""

import gc
import tracemalloc
from functools import partial

import numpy as np
import pytest
from firedrake import Function, FunctionSpace, SpatialCoordinate, TestFunction, TrialFunction, assemble, dx, grad, inner
from irksome import Dt
from mpi4py import MPI

import pint_fem as pf
from pint_fem import capacity
from pint_fem.adjoint.memory_estimate import bytes_per_direction
from pint_fem.adjoint.minimisation.objective import Objective
from pint_fem.errors import InputError, SolverFailure
from pint_fem.kernels.arrays import get
from pint_fem.misfits.base import Misfit
from pint_fem.sweeps.steps import LinearStep
from tests.limits import time_limit
from tests.meshes import square
from tests.nonlinear import burgers, tape_functional
from tests.nonlinear import functional as nonlinear_functional
from tests.ranks import cases
from tests.test_controls import functional as controls
from tests.test_memory import bytes_of_arrays
from tests.test_parametrised import Posed as Parametrised
from tests.test_reduced_functional import functional
from tests.test_spatial_coarsening import functional as spatial
from tests.test_sums import Experiments, point

COMM = MPI.COMM_WORLD
LAST = COMM.rank == COMM.size - 1
SIZES = (1.0, 0.0, 1e-9, 1e9)
ROUND_OFF = 1e-13


def alone():
    return pf.SpaceTime("1x1", comm=MPI.COMM_SELF)


def grid():
    return pf.SpaceTime((1, COMM.size))


def relative(a, b):
    return np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-300)


def directions(rf, sizes=SIZES):
    """Vectors that are the same on every grid for static controls; copies are the owner's."""
    n = rf.layout.size
    made = [size * np.cos(1.3 * i + np.arange(n) ** 1.1) for i, size in enumerate(sizes)]
    for v in made:
        rf.layout.share(v)
    return made


def current(rf):
    return rf.array([c.control for c in rf.controls])


# -- expected values from elsewhere ------------------------------------------------------------------------------------
@pytest.mark.parametrize("solver", ["mgrit", "serial"])
def test_nonlinear_actions_are_those_of_serial_pyadjoint(solver):
    posed = burgers(3, 6)
    given = {"mgrit": {"coarsening": (2,), "rtol": 1e-12}} if solver == "mgrit" else {"time_solver": "serial"}
    ours, theirs = nonlinear_functional(posed, **given), tape_functional(posed)
    V = posed.evolution.control.function_space()
    q = Function(V).interpolate(posed.control)
    h = Function(V).interpolate(posed.direction)
    ours(q)
    theirs(q)
    theirs.derivative()
    some = [Function(V).assign(size * f) for size, f in ((1.0, h), (1e-6, q), (1e5, q + h))]
    for mine, direction in zip(ours.hessian_actions(some), some, strict=True):
        assert relative(get(mine), get(theirs.hessian(direction))) < 1e-7


@pytest.mark.slow_on_ranks
@pytest.mark.parallel([1, 3])
@time_limit(120)
def test_a_sum_of_experiments_with_several_controls_is_that_of_one_tape():
    posed = Experiments(grid(), levels=2)
    J = posed.functional(0, regularisation=posed.prior(posed.q, posed.k)) + 2 * posed.functional(1)
    theirs, _ = posed.tape((1.0, 2.0))
    z, first = point(posed)
    _, second = point(posed, seed=2)
    J(z)
    theirs(z)
    theirs.derivative()
    found = J.hessian_actions([first, second])
    for direction, action in zip((first, second), found, strict=True):
        for a, b in zip(action, theirs.hessian(direction), strict=True):
            np.testing.assert_allclose(get(a), get(b), rtol=1e-6, atol=1e-8)


def dense_heat(N=6, dt=0.05):
    """Backward Euler for heat with an unknown source, its running misfit, and the matrix of its Hessian."""
    mesh = square(3, MPI.COMM_SELF)
    V = FunctionSpace(mesh, "CG", 1)
    u, v, q = Function(V), TestFunction(V), Function(V)
    F = Dt(u) * v * dx + inner(grad(u), grad(v)) * dx - q * v * dx
    ev = pf.Evolution(F, u, tableau=pf.BackwardEuler(), dt=dt, nsteps=N, control=q)
    w = TrialFunction(V)
    M, K = (assemble(form).petscmat[:, :] for form in (w * v * dx, inner(grad(w), grad(v)) * dx))
    S, n = M + dt * K, V.dim()
    source, D, H = np.linalg.solve(S, dt * M), np.zeros((n, n)), np.zeros((n, n))
    for _ in range(N):
        D = np.linalg.solve(S, M @ D) + source
        H += dt * D.T @ M @ D
    return ev, 0.5 * (u - 1) ** 2 * dx, H


@pytest.mark.parametrize("solver", [
    {"mgrit": {"coarsening": (3,), "rtol": 1e-12}},
    {"mgrit": {"coarsening": (3,), "rtol": 1e-12, "storage": "C"}},
    {"time_solver": "serial"},
    {"time_solver": "paradiag", "paradiag": {"rtol": 1e-12}},
])  # fmt: skip
def test_all_unit_vectors_give_the_dense_hessian(solver):
    ev, form, H = dense_heat()
    rf = pf.TimeParallelReducedFunctional(ev, pf.RunningMisfit(form), spacetime=alone(), solver_parameters=solver)
    rf(ev.control)
    rf.derivative()
    counts = dict(rf.problem.sweeps.counts)
    actions = rf.problem.hessian_actions(current(rf), list(np.eye(len(H))))
    np.testing.assert_allclose(actions, H, rtol=0, atol=1e-10 * np.abs(H).max())
    now = rf.problem.sweeps.counts
    assert [now[kind] - counts[kind] for kind in ("state", "tangent", "adjoint")] == [0, 1, 1]


@pytest.mark.slow_on_ranks
@pytest.mark.parallel([1, 3])
def test_an_initial_expression_agrees_with_differences_of_gradients():
    """Pyadjoint has no Hessian of such an interpolation: central differences of its gradients."""
    posed = Parametrised(pf.SpaceTime((1, COMM.size)))
    J, theirs = posed.functional(levels=2), posed.tape()
    z, dz = posed.point()
    other = [Function(c.function_space()).assign(0.3 * c) for c in z]
    J(z)
    for direction, action in zip((dz, other), J.hessian_actions([dz, other]), strict=True):
        ends = []
        for step in (1e-4, -1e-4):
            theirs([c.copy(deepcopy=True).assign(c + step * d) for c, d in zip(z, direction, strict=True)])
            ends.append([get(g) for g in theirs.derivative()])
        for mine, plus, minus in zip(action, *ends, strict=True):
            np.testing.assert_allclose(get(mine), (plus - minus) / 2e-4, rtol=1e-5, atol=1e-6)


# -- single actions ----------------------------------------------------------------------------------------------------
def linear(st, **options):
    return functional(st, steps=24, n=3, **options)


def nonlinear(st, per_step=False, n=3, **parameters):
    posed = burgers(n, 8, tableau="SDIRK2", degree=1, comm=st.space_comm, per_step=per_step)
    return nonlinear_functional(posed, st, **({"mgrit": {"coarsening": (2,), "rtol": 1e-12}} | parameters))


def initial(st, nonlinear=False, **mgrit):
    """The initial condition is the only control: no step has a direction."""
    mesh = square(4, st.space_comm)
    V = FunctionSpace(mesh, "CG", 1)
    u, v, u0 = Function(V), TestFunction(V), Function(V).interpolate(SpatialCoordinate(mesh)[0])
    F = Dt(u) * v * dx + (1 + (u**2 if nonlinear else 0)) * inner(grad(u), grad(v)) * dx(degree=4)
    ev = pf.Evolution(F, u, tableau=pf.BackwardEuler(), dt=0.02, nsteps=12, control=u0, initial=u0)
    misfits = [pf.RunningMisfit((u - 1) ** 2 * dx), pf.TerminalMisfit(u**4 * dx(degree=4))]
    return pf.TimeParallelReducedFunctional(
        ev, misfits, spacetime=st, solver_parameters={"mgrit": {"coarsening": (3,), "rtol": 1e-13} | mgrit}
    )


PARADIAG = {"time_solver": "paradiag", "paradiag": {"rtol": 1e-12}}
KRYLOV = {"mgrit": {"coarsening": (4,), "relax": "F", "rtol": 1e-12}, "krylov": {"ksp_type": "fgmres"}}
KINDS = {
    "mgrit": linear,
    "serial": partial(linear, levels=1),
    "C-points": partial(linear, storage="C"),
    "nested": partial(linear, start="nested"),
    "F-cycles and relaxed coarsest level": partial(linear, cycle="F", coarse_solver="relax", coarse_sweeps=4),
    "gathered": partial(linear, coarse_solver="gathered"),
    "coarsest by ParaDiag": partial(linear, coarse_solver="paradiag", coarse_sweeps=3),
    "L2": partial(linear, solver={"mgrit": {"coarsening": (4, 2), "rtol": 1e-13}, "norm": "L2"}),
    "krylov": partial(functional, steps=96, n=3, solver=KRYLOV),
    "paradiag": partial(linear, solver=PARADIAG),
    "a control in each step": partial(linear, per_step=True),
    "all kinds": partial(controls, n=2, steps=12),
    "all kinds, C-points": partial(
        controls, n=2, steps=12, solver={"mgrit": {"coarsening": (3,), "rtol": 1e-13, "storage": "C"}}
    ),
    "initial condition": initial,
    "initial condition, C-points": partial(initial, storage="C"),
    "nonlinear, initial condition": partial(initial, nonlinear=True),
    "nonlinear, initial condition, C-points": partial(initial, nonlinear=True, storage="C"),
    "coarser meshes": partial(spatial, n=2, refinements=1),
    "nonlinear": nonlinear,
    "nonlinear, serial": partial(nonlinear, time_solver="serial"),
    "nonlinear, C-points": partial(nonlinear, mgrit={"coarsening": (2,), "rtol": 1e-12, "storage": "C"}),
    "nonlinear, paradiag": partial(nonlinear, **PARADIAG),
    "nonlinear, krylov": partial(nonlinear, krylov={"ksp_type": "fgmres"}),
    "nonlinear, a control in each step": partial(nonlinear, per_step=True),
    "misfits of fourth order": partial(linear, linear=False),
}


ON_RANKS = [("C-points", "time"), ("paradiag", "time"), ("all kinds", "space"), ("nonlinear", "space")]


@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize(("kind", "ranks"), cases([(kind, "time") for kind in KINDS], on_ranks=ON_RANKS))
def test_each_action_is_that_of_a_single_one(kind, ranks):
    """Of a tiny, a zero and a huge direction, too; a batch of one is a single action."""
    rf = KINDS[kind](grid() if ranks == "time" else pf.SpaceTime((COMM.size, 1)))
    p, z, some = rf.problem, current(rf), directions(rf)
    p.derivative(z)
    single = [p.hessian_action(z, v) for v in some]
    many = p.hessian_actions(z, some)
    members = p.sweeps.results[-1][1].members
    assert [m.converged for m in members] == ([] if "serial" in kind else [True] * len(some))
    scale = np.sqrt(COMM.allreduce([np.sum(h**2) for h in single], op=_ADD))
    error = np.sqrt(COMM.allreduce([np.sum((a - b) ** 2) for a, b in zip(many, single, strict=True)], op=_ADD))
    assert (error <= 1e-10 * scale).all()
    assert not many[1].any()
    (one,) = p.hessian_actions(z, some[:1])
    assert np.sqrt(COMM.allreduce(np.sum((one - single[0]) ** 2))) <= 1e-10 * scale[0]


_ADD = MPI.Op.Create(lambda a, b, _: np.add(a, b), commute=True)


@pytest.mark.parametrize("kind", ["all kinds", "nonlinear"])
def test_gauss_newton_and_a_tolerance_of_its_own(kind):
    rf = KINDS[kind](alone())
    p, z, some = rf.problem, current(rf), directions(rf)
    p.derivative(z)
    for given in ({"gauss_newton": True}, {"rtol": 1e-4}):
        many = p.hessian_actions(z, some, **given)
        single = [p.hessian_action(z, v, **given) for v in some]
        bound = 1e-2 if "rtol" in given else 1e-10
        assert all(relative(a, b) <= bound for a, b in zip(many, single, strict=True))
    if kind == "nonlinear":
        assert relative(p.hessian_actions(z, some, gauss_newton=True)[0], p.hessian_action(z, some[0])) > 1e-6


@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize("kind", cases(["mgrit", "all kinds", "nonlinear", "paradiag"], on_ranks=["mgrit", "paradiag"]))
def test_symmetric_actions(kind):
    """As single ones, and ``(H v, w) = (H w, v)`` to round-off for members of one batch, however few cycles."""
    solver = {"time_solver": "paradiag", "paradiag": {"alpha": 0.1, "rtol": 1e-12}}
    rf = linear(grid(), solver=solver) if kind == "paradiag" else KINDS[kind](grid())
    p, z, some = rf.problem, current(rf), directions(rf, (1.0, 1e-6, 1e3))
    p.derivative(z)
    exact, errors = p.hessian_action(z, some[0]), []
    for cycles in (1, 2):
        many, residual = p.symmetric_actions(z, some, cycles)
        for a, v in zip(many, some, strict=True):
            b, own = p.symmetric_action(z, v, cycles)
            assert relative(a, b) <= 1e-11
            assert own <= residual * (1 + 1e-9)
        pair = rf.layout.pairing
        assert p.sweeps.solvers.transposed_adjoint._rows.ndim == 2  # the batch's array is freed
        scale = np.sqrt(abs(pair(many[0], some[0]) * pair(many[1], some[1])))
        assert abs(pair(many[0], some[1]) - pair(many[1], some[0])) <= 1e-12 * scale
        errors.append(COMM.allreduce(np.sum((many[0] - exact) ** 2)) / COMM.allreduce(np.sum(exact**2)))
    assert errors[0] > 1e-20  # not converged: the symmetry is no accident


# -- ranks -------------------------------------------------------------------------------------------------------------
@pytest.mark.parallel([2, 3])
@pytest.mark.parametrize("kind", ["mgrit", "serial", "C-points", "paradiag", "nonlinear"])
def test_same_bits_for_every_number_of_time_ranks(kind):
    """Of tangents and adjoints of a batch; a static control's derivative is a sum over the ranks."""
    found = []
    for st in (alone(), grid()):
        rf = KINDS[kind](st)
        p, sweeps, z = rf.problem, rf.problem.sweeps, current(rf)
        some = [p.layout.steps(v) for v in directions(rf)]
        p.derivative(z)
        steps, dU, L = p.layout.steps(z), sweeps.new_slab(len(some)), sweeps.new_slab(len(some))
        sweeps.tangent(steps, p.U, some, dU)
        source = p._trajectories.hessian(p._cache.latest, steps, some, dU, second=kind == "nonlinear")
        sweeps.adjoint(steps, p.U, source.rows, L, cold=True)
        found.append((dU, L, sweeps.stored[0]))
    (U1, L1, _), (U2, L2, own) = found
    assert np.array_equal(U1[own], U2)
    assert np.array_equal(L1[own], L2)


@pytest.mark.parallel([1, 2])
@pytest.mark.parametrize("where", ["apply", "hessian", "control_forcing", "second_order"])
def test_a_failure_on_one_rank_reaches_all(monkeypatch, where):
    """In a step, a misfit's products, a right-hand side; afterwards all is as before."""
    rf = nonlinear(grid()) if where == "second_order" else linear(grid())
    p, z, some = rf.problem, current(rf), directions(rf)
    before = p.hessian_actions(z, some)

    def fails(original, *args, **kwargs):
        out = original(*args, **kwargs)
        if LAST:
            raise ZeroDivisionError("planted")
        return out

    with monkeypatch.context() as patch:
        if where == "apply":
            step = p.sweeps.solvers.tangent.levels[0].propagator
            patch.setattr(step, "_apply", partial(fails, step._apply))
        else:
            thing = p.misfits[0] if where == "hessian" else p.sweeps.propagators[0]
            patch.setattr(thing, where, partial(fails, getattr(thing, where)))
        with pytest.raises(SolverFailure, match="planted"):
            p.hessian_actions(z, some)
    assert all(np.array_equal(a, b) for a, b in zip(p.hessian_actions(z, some), before, strict=True))


@pytest.mark.parallel([1, 2])
def test_what_is_refused():
    rf = linear(grid())
    q = rf.function(current(rf))
    rf(q)
    rf.derivative()
    for given, text in (
        ([], "list of directions is empty"),
        (q, "give a list of directions"),
        (None, "give a list of directions"),
        ([q, 3.0], "given is a float"),
        ([q, Function(FunctionSpace(q.function_space().mesh(), "DG", 0))], "the control lives in"),
        ([q, [q, q]], "2 controls given"),
    ):
        with pytest.raises(InputError, match=text):
            rf.hessian_actions(given)
    for at_once in (0, -1, 1.5, True, "2"):
        with pytest.raises(InputError, match="give a whole number of at least 1"):
            rf.hessian_actions([q], at_once=at_once)
    with pytest.raises(InputError, match=r"direction 1 of shape \(3,\)"):
        rf.problem.hessian_actions(current(rf), [current(rf), np.ones(3)])
    if COMM.size > 1:
        other = rf.function(current(rf) + 1e-3 * COMM.rank)
        with pytest.raises(InputError, match="direction 1 differs between ranks in time"):
            rf.hessian_actions([q, other])
        with pytest.raises(InputError, match="number of directions is not the same on all ranks"):
            rf.hessian_actions([q] * (1 + COMM.rank))
        with pytest.raises(InputError, match="at_once is not the same on all ranks"):
            rf.hessian_actions([q, q], at_once=1 + COMM.rank)
        with pytest.raises(InputError, match=r"list of directions is empty|number of directions"):
            rf.hessian_actions([q] if COMM.rank else [])


def test_a_guess_of_another_magnitude_is_zero_for_its_member_alone():
    """Round-off of a huge guess is larger than the solution: that member starts from zero, the others from theirs."""
    rf = linear(alone(), solver=PARADIAG)
    p, sweeps, z = rf.problem, rf.problem.sweeps, current(rf)
    some = [p.layout.steps(v) for v in directions(rf, (1.0, 1.0))]
    steps, exact = p.layout.steps(z), sweeps.new_slab(2)
    p.derivative(z)
    sweeps.tangent(steps, p.U, some, exact)
    for far in ([1], [0, 1]):
        guess = exact.copy()
        guess[1:, far] = 1e22
        guess[1:, 0] *= 1 + 1e-9
        result = sweeps.tangent(steps, p.U, some, guess, cold=False)
        assert relative(guess, exact) < 1e-9
        scale = np.linalg.norm(exact[:, 1])
        assert result.members[1].residuals[0] < scale
        if far == [1]:
            assert result.members[0].residuals[0] < 1e-6 * scale


@pytest.mark.parametrize(("intervals", "members"), [(2, 5), (5, 2), (1, 3), (3, 3)])
@pytest.mark.parametrize("transposed", [False, True])
def test_steps_of_a_batch_have_the_bits_of_single_ones(intervals, members, transposed):
    """Strided rows of intervals; one call for each, for several steps in a row, and for a whole sweep."""
    propagator = linear(alone()).problem.sweeps.propagators[0]
    step, n, m = LinearStep(propagator, transposed=transposed), propagator.evolution.state_size, 4
    rng = np.random.default_rng(0)
    U, G = rng.standard_normal((2, intervals * m + 1, members, n))
    one, several, swept = U.copy(), U.copy(), U.copy()
    rows = slice(0, (intervals - 1) * m + 1, m)
    step.step(range(0, intervals * m, m), U[rows], one[1:][rows])
    inner = lambda array, first: array[first : first + intervals * m].reshape(intervals, m, members, n)[:, : m - 1]
    step.advance(0, m, several[rows], inner(several, 1), inner(G, 0))
    step.sweep(0, swept, G[:-1])
    for b in range(members):
        u = np.ascontiguousarray(U[:, b])
        for i in range(len(u) - 1):
            out = np.empty((1, n))
            step.step(range(i, i + 1), u[i : i + 1], out)
            if i % m == 0:
                assert np.array_equal(one[i + 1, b], out[0])
            u[i + 1] = out[0] + G[i, b]
            if (i + 1) % m == 0:
                assert np.array_equal(several[i + 1, b], U[i + 1, b])  # C-points stay
                following = u[i + 1].copy()
                u[i + 1] = U[i + 1, b]
            else:
                assert np.array_equal(several[i + 1, b], u[i + 1])
                following = u[i + 1]
            if i < m:
                assert np.array_equal(swept[i + 1, b], following)


# -- the public method -------------------------------------------------------------------------------------------------
def test_functions_of_each_control_and_riesz_representatives():
    """Cofunctions or functions as ``hessian`` returns them, with factors of ``J`` and of a minimiser."""
    for rf in (controls(alone(), n=2, steps=12), -3 * linear(alone())):
        z = rf.function(current(rf))
        rf(z)
        some = [rf.function(v) for v in directions(rf, (1.0, 2.0))]
        for riesz in (False, True):
            for direction, action in zip(some, rf.hessian_actions(some, apply_riesz=riesz), strict=True):
                expected = rf.hessian(direction, apply_riesz=riesz)
                pairs = zip(action, expected, strict=True) if isinstance(action, list) else [(action, expected)]
                for a, b in pairs:
                    assert type(a) is type(b)
                    parts = zip(a.subfunctions, b.subfunctions, strict=True)
                    assert all(relative(get(x), get(y)) < 1e-10 for x, y in parts)
    whole, rf.scale = get(rf.hessian(some[0])), 0.5
    dst, _ = rf.controls[0].assign_numpy(rf.function(z := current(rf)), z, 0)  # as a minimiser of pyadjoint does
    rf(dst)
    (half,) = rf.hessian_actions(some[:1])
    assert relative(get(half), 0.5 * whole) < 1e-12


def test_an_objective_has_representatives_of_several_actions():
    """What minimisers with several constraints call once for the curvatures of all normals."""
    rf = controls(alone(), n=2, steps=12)
    objective, z, some = Objective(rf.problem, rf.inner), current(rf), directions(rf)
    counts = dict(rf.problem.sweeps.counts)
    for found, v in zip(objective.hessian_actions(z, some), some, strict=True):
        assert relative(found, objective.hessian_action(z, v)) < 1e-10
    assert rf.problem.sweeps.counts["tangent"] - counts["tangent"] == 1 + len(some)


class Quartic(Misfit):
    """A user's misfit that knows nothing of batches: the sum of fourth powers of all coefficients."""

    def values(self, U):
        return (U[1:] ** 4).sum(axis=1)

    def directional(self, U, dU):
        return (4 * U[1:] ** 3 * dU[1:]).sum(axis=1)

    def _own(self, rows):
        rows[0] *= not self.slab.is_first
        return rows

    def gradient(self, U):
        return self._own(4 * U**3)

    def hessian(self, U, dU):
        assert dU.shape == U.shape
        assert dU.flags.c_contiguous
        return self._own(12 * U**2 * dU)


def test_a_misfit_of_the_user_is_called_for_each_member():
    ev, form, _ = dense_heat()
    rf = pf.TimeParallelReducedFunctional(
        ev, [Quartic(), pf.RunningMisfit(form)], spacetime=alone(), solver_parameters={"time_solver": "serial"}
    )
    z, (v, w) = 2.0 + current(rf), directions(rf, (1.0, 3.0))
    p = rf.problem
    for direction, action in zip((v, w), p.hessian_actions(z, [v, w]), strict=True):
        ends = [p.derivative(z + step * direction) for step in (1e-4, -1e-4)]
        assert relative(action, (ends[0] - ends[1]) / 2e-4) < 1e-6


# -- work and memory ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["mgrit", "all kinds", "nonlinear"])
def test_directions_in_several_batches(kind):
    """``at_once`` limits the members; what they are in changes nothing but the number of sweeps."""
    rf = KINDS[kind](alone())
    p, z = rf.problem, current(rf)
    some = directions(rf, [1.0] * 7)
    p.derivative(z)
    whole = p.hessian_actions(z, some)
    for at_once, sweeps in ((1, 7), (3, 3), (7, 1), (20, 1)):
        counts = dict(p.sweeps.counts)
        parts = p.hessian_actions(z, some, at_once=at_once)
        assert all(relative(a, b) < 1e-10 for a, b in zip(parts, whole, strict=True))
        assert p.sweeps.counts["tangent"] - counts["tangent"] == sweeps
        assert p.sweeps.counts["adjoint"] - counts["adjoint"] == sweeps


def test_batches_fit_the_memory(monkeypatch):
    """Half of a machine, less what an evaluation takes by formula, divided by the bytes of a direction."""
    rf = linear(alone())
    p, z, some = rf.problem, current(rf), directions(rf, [1.0] * 7)
    p.derivative(z)
    p.hessian_actions(z, some)  # work vectors of kernels are there
    estimate = rf.memory()
    each = bytes_per_direction(p, estimate)
    for memory, sweeps in ((2 * (estimate.peak() + 3 * each) + 1, 3), (1000, 7)):
        monkeypatch.setattr(capacity, "machine_memory", lambda memory=memory: memory)
        del vars(p)["_most_members"]
        before = p.sweeps.counts["tangent"]
        p.hessian_actions(z, some)
        assert p.sweeps.counts["tangent"] - before == sweeps


@pytest.mark.parallel([1, 2])
def test_items_that_fit_are_those_of_all_ranks_of_a_machine(monkeypatch):
    monkeypatch.setattr(capacity, "machine_memory", lambda: 1000 * COMM.size)
    assert capacity.most_items(COMM, 100, 20) == 20
    assert capacity.most_items(COMM, 100, 200) == 2
    assert capacity.most_items(COMM, 600, 10) == 1
    assert capacity.most_items(COMM, 0, 0) == 500
    monkeypatch.setattr(capacity, "_limit", lambda: 300 if LAST else None)  # all have what the last rank has
    assert capacity.most_items(COMM, 100, 20) == 2


@pytest.mark.parametrize("kind", ["mgrit", "C-points", "nonlinear"])
def test_bytes_of_a_direction_are_those_of_the_formula(kind):
    """Measured by the growth of the peak with the number of directions."""
    if kind == "nonlinear":
        rf = nonlinear(alone(), n=10)
    else:
        rf = functional(alone(), steps=64, n=12, **({"storage": "C"} if kind == "C-points" else {}))
    p, z, some = rf.problem, current(rf), directions(rf, [1.0] * 12)
    p.derivative(z)
    p.hessian_actions(z, some)
    each, peaks = bytes_per_direction(p, rf.memory()), []
    tracemalloc.start()
    try:
        for count in (4, 12):
            p.derivative(1.01 * z)  # work arrays are those of single sweeps again
            p.derivative(z)
            gc.collect()
            kept, now = bytes_of_arrays(), tracemalloc.get_traced_memory()[0]
            tracemalloc.reset_peak()
            p.hessian_actions(z, some[:count])
            peaks.append(kept + tracemalloc.get_traced_memory()[1] - now)
    finally:
        tracemalloc.stop()
    measured = (peaks[1] - peaks[0]) / 8
    assert 0.6 * each <= measured <= 1.15 * each, (measured, each)


def test_members_of_a_nonlinear_batch_cost_what_single_actions_do():
    """Triangular solves with the cached linearisations, and none of the members' results stays."""
    rf = nonlinear(alone(), time_solver="serial")
    p, z, some = rf.problem, current(rf), directions(rf, [1.0, 2.0, 3.0])
    p.derivative(z)
    propagator = p.sweeps.propagators[0]
    p.hessian_actions(z, some)  # the memory is estimated once
    p.hessian_action(z, some[0])
    before = propagator.counts["solve"]
    for v in some[1:]:
        p.hessian_action(z, v)
    single = (propagator.counts["solve"] - before) / 2
    before = propagator.counts["solve"], propagator.counts["jacobian"], propagator.counts["newton"]
    p.hessian_actions(z, [2 * v for v in some])
    assert (propagator.counts["solve"] - before[0]) / 3 <= single
    assert (propagator.counts["jacobian"], propagator.counts["newton"]) == before[1:]
    for step in p.sweeps.solvers.linearisations:
        assert set(step.tangents) <= {0}
        assert {member for _, member in step.adjoints} <= {0}

"""Active sets for the control of a heat equation in time: dense algebra with its matrices, and the trust region."""

import numpy as np
import pytest
from firedrake import Function, FunctionSpace, SpatialCoordinate, TestFunction, TrialFunction, assemble, dx, grad, inner
from irksome import Dt
from mpi4py import MPI

import pint_fem as pf
from tests.meshes import square
from tests.ranks import cases
from tests.test_active_set import coordinate_descent, textbook

DT, STEPS, WEIGHT = 0.05, 7, 0.02


def control_of_heat(st, *, misfits=(), n=3, steps=STEPS, alpha=WEIGHT, nonlinear=0.0):
    """Backward Euler for a heated plate, a control per step, a target that the state is to follow."""
    mesh = square(n, st.space_comm)
    V = FunctionSpace(mesh, "CG", 1)
    u, q, v, x = Function(V), Function(V, name="q"), TestFunction(V), SpatialCoordinate(mesh)
    d = Function(V).interpolate(x[0] * (1 - 2 * x[1]))
    form = Dt(u) * v * dx + inner(grad(u), grad(v)) * dx + (u + nonlinear * u**3 - q) * v * dx
    ev = pf.Evolution(form, u, tableau=pf.BackwardEuler(), dt=DT, nsteps=steps, control=q, per_step=True)
    terms = [pf.RunningMisfit(0.5 * inner(u - d, u - d) * dx), *(m(u) for m in misfits)]
    return pf.TimeParallelReducedFunctional(
        ev, terms, regularisation=0.5 * alpha * q**2 * dx, spacetime=st, riesz_map="lumped",
        solver_parameters={"time_solver": "serial"},
    )  # fmt: skip


class Dense:
    """The same problem by numpy: ``J(z) = 1/2 z.H z - b.z + constant`` of all steps' controls, ``u = S z``."""

    def __init__(self, n=3, steps=STEPS, alpha=WEIGHT):
        mesh = square(n, MPI.COMM_SELF)
        V = FunctionSpace(mesh, "CG", 1)
        u, v, x = TrialFunction(V), TestFunction(V), SpatialCoordinate(mesh)
        M, K = (assemble(a).M.values for a in (u * v * dx, inner(grad(u), grad(v)) * dx + u * v * dx))
        d = Function(V).interpolate(x[0] * (1 - 2 * x[1])).dat.data_ro
        self.size, self.steps = len(M), steps
        Phi = np.linalg.solve(M + DT * K, M)
        self.S = np.zeros((steps, self.size, steps, self.size))
        for m in range(steps):
            power = DT * Phi
            for i in range(m, steps):
                self.S[i, :, m] = power
                power = Phi @ power
        self.S = self.S.reshape(steps * self.size, -1)
        mass = DT * np.kron(np.eye(steps), M)
        self.H = self.S.T @ mass @ self.S + alpha * mass
        self.b = self.S.T @ mass @ np.tile(d, steps)
        self.nodal = np.diag(M) * M.sum() / np.trace(M)
        self.w = DT * np.tile(self.nodal, steps)

    def own(self, J, z):
        """The part of a vector of all steps that belongs to this rank in time."""
        slab = J.layout.slab
        return z.reshape(self.steps, self.size)[slab.lo : slab.hi].ravel()


@pytest.fixture(scope="module")
def dense():
    return Dense()


def bounds_in_time(dense):
    """Lower and upper bounds that vary from step to step and from node to node."""
    step = np.repeat(np.arange(dense.steps), dense.size)
    node = np.tile(np.arange(dense.size), dense.steps)
    return -0.1 - 0.05 * step, 0.2 + 0.03 * np.cos(step) + 0.01 * (node % 3)


CASES = {"bounds": 0.0, "bounds and L1": 5e-3, "L1": 5e-3}


@pytest.mark.parallel([1, 2, 3])
@pytest.mark.parametrize("name", cases(CASES, on_ranks=["bounds and L1"]))
def test_as_many_steps_as_the_textbook_takes(dense, name):
    """The minimiser and the number of active-set steps of dense algebra, for any number of ranks in time; with L1 the
    factor that Stadler takes, the inverse of the regularisation's, as others make the textbook iteration cycle.
    """
    J, l1 = control_of_heat(pf.SpaceTime()), CASES[name]
    c = 1 / WEIGHT if l1 else 1.0
    lower, upper = (np.full(len(dense.b), s * np.inf) for s in (-1, 1)) if name == "L1" else bounds_in_time(dense)
    factors = np.full(len(dense.b), l1)
    x, systems = textbook(dense.H, dense.b, dense.w, lower, upper, factors, np.zeros(len(dense.b)), c)
    bounds = None if name == "L1" else [J.function(dense.own(J, side)) for side in (lower, upper)]
    result = J.minimize_active_set(
        bounds=bounds, l1=l1 or None, prox_step=c, gtol_rel=1e-9, cg_rtol=1e-10, cg_max_it=300
    )
    assert result.converged
    np.testing.assert_allclose(result.x, dense.own(J, x), atol=1e-8)
    assert result.iterations == systems >= 2
    last = result.history[-1]
    for found, expected in ((last.at_lower, x == lower), (last.at_upper, x == upper), (last.at_zero, (x == 0))):
        assert found == (expected.sum() if l1 or found is not last.at_zero else 0)
    assert not any(record.globalised for record in result.history)
    if name == "bounds and L1":
        assert min(last.at_lower, last.at_upper, last.at_zero, last.free) > 0


@pytest.mark.parallel([1, 2, 3])
@pytest.mark.parametrize("name", cases(CASES, on_ranks=["bounds and L1"]))
def test_default_options(dense, name):
    """The minimiser of dense algebra in few steps without a trust region, with L1 as well."""
    J, l1 = control_of_heat(pf.SpaceTime()), CASES[name]
    lower, upper = (np.full(len(dense.b), s * np.inf) for s in (-1, 1)) if name == "L1" else bounds_in_time(dense)
    factors = np.full(len(dense.b), l1)
    x, systems = textbook(dense.H, dense.b, dense.w, lower, upper, factors, np.zeros(len(dense.b)), 1 / WEIGHT)
    bounds = None if name == "L1" else [J.function(dense.own(J, side)) for side in (lower, upper)]
    result = J.minimize_active_set(bounds=bounds, l1=l1, gtol_rel=1e-8)
    assert result.converged
    np.testing.assert_allclose(result.x, dense.own(J, x), atol=1e-7)
    assert result.iterations <= systems + 2  # conjugate gradients are not exact
    assert not any(record.globalised for record in result.history)


def test_the_trust_region_finds_the_same(dense):
    lower, upper = bounds_in_time(dense)
    J = control_of_heat(pf.SpaceTime())
    bounds = [J.function(side) for side in (lower, upper)]
    result = J.minimize_active_set(bounds=bounds, gtol_rel=1e-9)
    other = control_of_heat(pf.SpaceTime()).minimize_trust_region(bounds=bounds, gtol_rel=1e-9)
    assert result.converged
    assert other.converged
    np.testing.assert_allclose(result.x, other.x, atol=1e-7)
    np.testing.assert_allclose(J.controls[0].control.subfunctions[0].dat.data_ro, result.x[: dense.size])
    assert result.history[0].gradient_norm == other.history[0].gradient_norm


def test_numbers_lists_and_none(dense):
    """One-sided bounds by numbers, a list for each control, an infinite bound."""
    upper = np.full(len(dense.b), 0.2)
    x = coordinate_descent(dense.H, dense.b, dense.w, -np.inf * upper, upper, 0 * upper)
    for bounds in ((None, 0.2), ([None], [0.2]), (-np.inf, 0.2)):
        J = control_of_heat(pf.SpaceTime())
        result = J.minimize_active_set(bounds=bounds, l1=[None], gtol_rel=1e-9)
        assert result.converged
        np.testing.assert_allclose(result.x, x, atol=1e-7)


@pytest.mark.parallel([1, 2])
def test_an_evolution_that_is_not_linear(dense):
    """By the trust region: the first-order conditions, and the minimiser of the other method."""
    J = control_of_heat(pf.SpaceTime(), nonlinear=20.0)
    result = J.minimize_active_set(bounds=(-0.1, 0.2), l1=5e-3, gtol_rel=1e-8)
    assert result.converged
    assert all(record.globalised for record in result.history[1:])
    g = J.inner.primal(J.problem.derivative(result.x))
    y = result.x - g
    shrunk = np.sign(y) * np.maximum(np.abs(y) - 5e-3, 0)
    np.testing.assert_allclose(result.x, np.clip(shrunk, -0.1, 0.2), atol=1e-7)
    sides = control_of_heat(pf.SpaceTime(), nonlinear=20.0).minimize_trust_region(bounds=(-0.1, 0.2), gtol_rel=1e-8)
    mine = J.minimize_active_set(start=J.function(0 * result.x), bounds=(-0.1, 0.2), gtol_rel=1e-8)
    np.testing.assert_allclose(mine.x, sides.x, atol=1e-6)


@pytest.mark.parallel([1, 2])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bounds": (np.nan, 1.0)}, "no value"),
        ({"bounds": (1.0, 0.0)}, "no value"),
        ({"bounds": (0.0, 1.0, 2.0)}, "pair"),
        ({"l1": -1.0}, "l1 is negative"),
        ({"l1": [1.0, 2.0]}, "l1: 2 values for 1 controls"),
        ({"bounds": ([0.0, 0.0], None)}, "bounds: 2 values for 1 controls"),
        ({"preconditioner": "much"}, "preconditioner"),
    ],
)
def test_bad_arguments(arguments, message):
    """Refused on every rank before anything is solved."""
    J = control_of_heat(pf.SpaceTime())
    with pytest.raises(pf.InputError, match=message):
        J.minimize_active_set(**arguments)
    assert all(evaluation.z is None for evaluation in J.problem.evaluations)


@pytest.mark.parallel([1, 3])
def test_a_file_continues_the_run(dense, tmp_path_factory):
    comm = MPI.COMM_WORLD
    path = comm.bcast(str(tmp_path_factory.mktemp("run") / "run.h5"))
    options = dict(bounds=(-0.1, 0.2), l1=5e-3, gtol_rel=1e-9)
    whole = control_of_heat(pf.SpaceTime()).minimize_active_set(**options)
    control_of_heat(pf.SpaceTime()).minimize_active_set(checkpoint=path, max_it=2, **options)
    again = control_of_heat(pf.SpaceTime()).minimize_active_set(checkpoint=path, **options)
    np.testing.assert_array_equal(again.x, whole.x)
    assert [r.free for r in again.history] == [r.free for r in whole.history]
    with pytest.raises(pf.InputError):
        control_of_heat(pf.SpaceTime()).minimize_active_set(checkpoint=path, bounds=(-0.1, 0.2), l1=6e-3)

"""scipy's minimisers on problems with their own inner product, alone and on several processes."""

import math

import numpy as np
import pytest
from mpi4py import MPI
from scipy.optimize import minimize

from pint_fem.optimize import NonFiniteError
from pint_fem.optimize.guarded_problem import GuardedProblem
from pint_fem.optimize.scipy_methods import run as scipy_run
from pint_fem.optimize.scipy_methods.adapter import _EuclideanView, scipy_minimize
from pint_fem.optimize.trust_region.bounded import minimize_bounded
from tests.test_bounded import Distributed, box_problem
from tests.test_trust_region import (
    Smooth,
    bowl,
    mass_matrix,
    minimize_trust_region,
    pairs,
    quadratic,
    random_quadratic,
    random_spd,
    rosenbrock,
)

GRADIENTS = ("CG", "BFGS", "L-BFGS-B", "TNC", "SLSQP")
HESSIANS = ("Newton-CG", "trust-ncg", "trust-krylov", "trust-constr")
# Tight enough for every method to reach 1e-5 in x.
TIGHT = {
    "CG": {"gtol": 1e-9, "maxiter": 2000},
    "BFGS": {"gtol": 1e-8, "maxiter": 2000},
    "L-BFGS-B": {"ftol": 1e-16, "gtol": 1e-9, "maxiter": 2000},
    "TNC": {"ftol": 1e-16, "gtol": 1e-11, "maxfun": 2000},
    "SLSQP": {"ftol": 1e-16, "maxiter": 1000},
    "Newton-CG": {"xtol": 1e-10, "maxiter": 500},
    "trust-ncg": {"gtol": 1e-9, "maxiter": 500},
    "trust-krylov": {"gtol": 1e-9, "maxiter": 500},
    "trust-constr": {"gtol": 1e-9, "xtol": 1e-14, "maxiter": 2000},
}


def with_weights(problem, w):
    """The same J in the product sum w a b."""
    problem.M, problem.M_inverse, problem.weights = np.diag(w), np.diag(1 / w), w
    return problem


# --- the minimiser ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", GRADIENTS + HESSIANS)
def test_rosenbrock(method):
    """At (1, ..., 1), in a product with weights."""
    problem = with_weights(rosenbrock(4), np.array([1.0, 4.0, 0.25, 2.0]))
    result = scipy_minimize(problem, np.full(4, 0.5), method, options=TIGHT[method])
    np.testing.assert_allclose(result.x, 1, atol=1e-5)
    assert result.fun == pytest.approx(0, abs=1e-9)
    np.testing.assert_array_equal(result.jac, problem.gradient(result.x))


@pytest.mark.parametrize("method", ["L-BFGS-B", "SLSQP", "trust-ncg", "trust-krylov"])
def test_quadratic_in_a_mass_matrix_product(method):
    """With `dual` a product that is not diagonal is right too: g is M^-1 J', dual(g) = M g."""
    problem, H = random_quadratic()
    b = -problem.df(np.zeros(12))
    problem.dual = lambda g: problem.M @ g
    result = scipy_minimize(problem, np.ones(12), method, options=TIGHT[method])
    np.testing.assert_allclose(result.x, np.linalg.solve(H, b), atol=1e-6)


def test_iterations_are_those_of_the_problems_geometry():
    """J(x) = |x - t|^2 w / 2 is a sphere in its own product: one iteration for weights over eight decades."""
    w, t = np.geomspace(1e-4, 1e4, 10), np.linspace(-1, 1, 10)
    problem = Smooth(lambda x: 0.5 * w @ (x - t) ** 2, lambda x: w * (x - t), lambda x: np.diag(w), n=10)
    radii = {"initial_trust_radius": 1e3, "max_trust_radius": 1e4, "gtol": 1e-8}
    result = scipy_minimize(with_weights(problem, w), np.zeros(10), "trust-ncg", options=radii)
    np.testing.assert_allclose(result.x, t, atol=1e-9)
    assert result.nit == 1


def test_scaling_and_dual_agree_with_scipy_on_the_plain_problem():
    """With ones for weights scipy is asked exactly what it would be asked directly."""
    problem = bowl()
    direct = minimize(problem.f, np.zeros(6), jac=problem.df, method="L-BFGS-B", options=TIGHT["L-BFGS-B"])
    result = scipy_minimize(bowl(), np.zeros(6), "L-BFGS-B", options=TIGHT["L-BFGS-B"])
    np.testing.assert_array_equal(result.x, direct.x)
    assert (result.nfev, result.nit) == (direct.nfev, direct.nit)


@pytest.mark.parametrize("method", ["L-BFGS-B", "TNC", "SLSQP", "trust-constr"])
def test_bounds(method):
    """The KKT point found by the bounded minimiser; no point asked for is out of bounds."""
    problem, lower, upper, x = box_problem(0, n=10)
    problem.weights = np.diag(problem.M).copy()
    seen, f = [], problem.f
    problem.f = lambda y: seen.append(y.copy()) or f(y)
    result = scipy_minimize(problem, x + 0.01, method, lower=lower, upper=upper, options=TIGHT[method])
    assert all((lower <= y).all() and (y <= upper).all() for y in seen)
    np.testing.assert_allclose(result.x, x, atol=1e-3 if method == "trust-constr" else 1e-5)
    np.testing.assert_allclose(minimize_bounded(problem, x, lower, upper, gtol_abs=1e-9).x, x, atol=1e-7)


def test_gauss_newton_action_is_used():
    """And the Hessian is not."""
    problem = with_weights(bowl(), np.full(6, 2.0))
    problem.gauss_newton_action = lambda x, v: v
    problem.hessian_action = None
    result = scipy_minimize(problem, np.zeros(6), "trust-ncg", hessian="gauss-newton", options={"gtol": 1e-8})
    np.testing.assert_allclose(problem.df(result.x), 0, atol=1e-7)


def test_methods_are_known_in_any_case():
    """As in scipy; the default is trust-krylov."""
    a = scipy_minimize(bowl(), np.zeros(6), "TRUST-KRYLOV")
    np.testing.assert_array_equal(a.x, scipy_minimize(bowl(), np.zeros(6)).x)


@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize("unit", [1e-12, 1e9])
@pytest.mark.parametrize("method", GRADIENTS + HESSIANS)
def test_the_unit_of_the_objective_does_not_matter(method, unit):
    """Without options every method ends where the trust region does, at a gradient smaller by 1e-6: scipy's default
    tolerances are absolute, and a gradient of 1e-11 is below all of them at the start.
    """
    problem = bowl()
    f, df, d2f = problem.f, problem.df, problem.d2f
    problem.f, problem.df, problem.d2f = (lambda x, g=g: unit * g(x) for g in (f, df, d2f))
    expected = minimize_trust_region(bowl(), np.full(6, 2.0), gtol_rel=1e-9).x
    local = Distributed(problem, np.linspace(1, 2, 6), MPI.COMM_WORLD, 2)
    result = scipy_minimize(local, np.full(6, 2.0)[local.part], method, comm=MPI.COMM_WORLD)
    x = local.whole(result.x)
    np.testing.assert_allclose(x, expected, atol=1e-4)
    if method != "trust-constr":
        assert result.success
        assert np.linalg.norm(df(x)) <= 4e-6 * np.linalg.norm(df(np.full(6, 2.0)))
    assert result.fun == pytest.approx(unit * f(x), rel=1e-12)


def test_given_tolerances_are_scipys_in_a_scaled_unit():
    """A tolerance of the caller's replaces the fall of the gradient; `gtol_rel` adds it again."""
    problem = with_weights(rosenbrock(4), np.ones(4))
    f, df = problem.f, problem.df
    problem.f, problem.df = (lambda x, g=g: 1e-9 * g(x) for g in (f, df))
    norm = lambda result: np.linalg.norm(df(result.x)) / np.linalg.norm(df(np.full(4, 0.5)))
    loose = scipy_minimize(problem, np.full(4, 0.5), "L-BFGS-B", options={"gtol": 1e-2})
    assert 1e-6 < norm(loose) < 1e-1
    assert norm(scipy_minimize(problem, np.full(4, 0.5), "L-BFGS-B", gtol_rel=1e-3)) < 1e-3
    assert norm(scipy_minimize(problem, np.full(4, 0.5), "L-BFGS-B", gtol_rel=1e-9, options={"maxiter": 200})) < 1e-9
    with pytest.raises(ValueError, match="gtol_rel"):
        scipy_minimize(problem, np.zeros(4), gtol_rel=0.0)


@pytest.mark.parametrize("method", ["CG", "BFGS", "L-BFGS-B", "TNC", "SLSQP", "trust-ncg", "trust-krylov"])
def test_an_objective_that_fails_at_a_trial_point_shortens_the_step(method):
    """J of inf outside a ball about the start that holds the minimum at 0; no gradient is asked for there."""
    asked = []
    problem = Smooth(
        lambda x: float(np.sum(np.cosh(x))) if np.abs(x).max() < 1.2 else math.inf,
        lambda x: asked.append(np.abs(x).max()) or np.sinh(x),
        lambda x: np.diag(np.cosh(x)),
        n=3,
    )
    result = scipy_minimize(problem, np.array([1.0, -0.8, 0.3]), method)
    np.testing.assert_allclose(result.x, 0, atol=1e-4)
    assert max(asked) < 1.2


# --- calls -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["L-BFGS-B", "trust-ncg", "Newton-CG"])
def test_nothing_is_computed_twice_at_one_point(method):
    """Values, gradients and Hessian actions with the same arguments are remembered while the point stays."""
    problem, seen = rosenbrock(3), []
    for name in ("value", "gradient", "hessian_action"):
        function = getattr(problem, name)
        setattr(problem, name, lambda *args, n=name, f=function: seen.append((n, *map(bytes, args))) or f(*args))
    scipy_minimize(problem, np.zeros(3), method, options=TIGHT[method])
    assert len(seen) > 20
    assert not any(a == b for a, b in pairs(seen))
    for name in ("value", "gradient"):
        points = [call[1] for call in seen if call[0] == name]
        assert len(set(points)) == len(points)


def test_a_point_that_is_moved_in_place_is_another_one():
    """What is stored belongs to the values of a point, not to its array."""
    view = _EuclideanView(GuardedProblem(rosenbrock(2)), np.zeros(2), MPI.COMM_SELF, "hessian_action", None)
    y = np.zeros(2)
    before = view.value(y), view.gradient(y).copy()
    y += 1
    assert (before[0], view.value(y)) == (rosenbrock(2).f(np.zeros(2)), 0.0)
    np.testing.assert_allclose(view.gradient(y), 0, atol=1e-14)
    assert np.linalg.norm(before[1]) > 1


def test_callback_gets_local_iterates_and_stops():
    """All methods, those included that let StopIteration through."""
    for method in GRADIENTS + HESSIANS:
        iterates = []
        problem = with_weights(rosenbrock(4), np.full(4, 9.0))
        result = scipy_minimize(
            problem, np.full(4, 0.5), method, callback=lambda x, seen=iterates: seen.append(x) or len(seen) == 2
        )
        assert len(iterates) == 2, method
        assert not result.success
        np.testing.assert_allclose(result.x, iterates[-1], atol=1e-14)
        assert result.fun == problem.f(result.x)


def test_first_guess_is_not_modified():
    """Nor do results share memory with the problem's."""
    x0 = np.zeros(6)
    problem = bowl()
    memory = np.empty(6)

    def reused(x, df=problem.df):
        memory[:] = df(x)
        return memory

    problem.gradient = reused
    result = scipy_minimize(problem, x0, "L-BFGS-B")
    memory[:] = math.nan
    assert not x0.any()
    assert np.isfinite(result.jac).all()


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"method": "Nelder-Mead"}, "method = 'Nelder-Mead'"),
        ({"method": "trust-exact"}, "trust-exact"),
        ({"method": None}, "method"),
        ({"method": "trust-ncg", "lower": 0.0}, "has no bounds"),
        ({"bounds": [(0, 1)]}, "lower and upper"),
        ({"constraints": ()}, "AffineConstraints"),
        ({"jac": True}, "jac is set"),
        ({"hessian": "full"}, "hessian"),
        ({"hessian": "gauss-newton"}, "trust-krylov needs gauss_newton_action"),
        ({"callback": 1}, "callback"),
        ({"method": "SLSQP", "lower": 1.0, "upper": 0.0}, "lower exceeds upper"),
        ({"method": "SLSQP", "lower": math.nan}, "lower exceeds upper"),
        ({"method": "SLSQP", "lower": np.zeros(5)}, "shapes"),
    ],
)
def test_bad_arguments_are_refused(options, says):
    """Before J is asked for."""
    problem = bowl()
    problem.f = None
    with pytest.raises(ValueError, match=says):
        scipy_minimize(problem, np.zeros(6), **options)


@pytest.mark.parametrize("weights", [np.ones(5), np.zeros(6), -np.ones(6), np.full(6, math.nan)])
def test_bad_weights_are_refused(weights):
    """Shape and sign."""
    problem = bowl()
    problem.weights = weights
    with pytest.raises(ValueError, match="weights of shape"):
        scipy_minimize(problem, np.zeros(6))


def test_a_product_that_weights_do_not_describe_is_refused():
    """A mass matrix without `dual`, or wrong weights: scipy would be told a wrong derivative."""
    problem = quadratic(np.eye(9), np.ones(9), mass_matrix(np.linspace(0, 1, 9)))
    with pytest.raises(ValueError, match=r"give the problem dual\(g\)"):
        scipy_minimize(problem, np.zeros(9))
    problem.weights = lambda: problem.M.sum(axis=1)
    with pytest.raises(ValueError, match=r"give the problem dual\(g\)"):
        scipy_minimize(problem, np.zeros(9))
    problem.dual = lambda g: problem.M @ g
    np.testing.assert_allclose(scipy_minimize(problem, np.zeros(9), options={"gtol": 1e-9}).x, 1, atol=1e-7)


@pytest.mark.parametrize("what", ["gradient", "hessian_action"])
def test_not_finite_is_refused(what):
    """As by the other minimisers, with the point."""
    problem = bowl()
    setattr(problem, what, lambda *args: np.full(6, math.nan))
    with pytest.raises(NonFiniteError, match="not finite") as caught:
        scipy_minimize(problem, np.zeros(6))
    np.testing.assert_array_equal(caught.value.x, np.zeros(6))


def test_a_method_that_breaks_down_gives_the_best_point(monkeypatch):
    """trust-krylov divides 0 by 0 where its Krylov space is complete: the problem is not asked for the outcome."""
    asked = []

    def broken(fun, x0, hessp, jac, **_):
        fun(x0 + 1)
        fun(x0)
        fun(np.full_like(x0, math.nan))
        hessp(x0, jac(x0))
        hessp(x0, np.full_like(x0, math.nan))

    monkeypatch.setattr(scipy_run, "minimize", broken)
    problem = bowl()
    for name in ("value", "hessian_action"):
        function = getattr(problem, name)
        setattr(problem, name, lambda *args, f=function: asked.append(args) or f(*args))
    result = scipy_minimize(problem, np.full(6, 0.5))
    assert len(asked) == 4  # the first guess, before scipy
    assert np.isfinite(asked[3][1]).all()
    assert not result.success
    assert "direction that is not finite" in result.message
    assert result.fun == min(problem.f(np.full(6, 0.5)), problem.f(np.full(6, 1.5)))
    np.testing.assert_array_equal(result.jac, problem.gradient(result.x))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_trust_krylov_on_the_identity(scale):
    """A Krylov space of one direction; the minimum is found, whatever the method says of itself."""
    problem = quadratic(scale * np.eye(5), scale * np.arange(5.0), np.eye(5))
    result = scipy_minimize(problem, np.zeros(5), "trust-krylov", options={"gtol": 1e-12 * scale})
    assert result.fun == pytest.approx(-15.0 * scale, rel=1e-6)


# --- several processes -----------------------------------------------------------------------------------------------


@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize("method", ["trust-ncg", "trust-krylov", "L-BFGS-B", "SLSQP"])
@pytest.mark.parametrize("name", ["rosenbrock", "quadratic"])
def test_processes_take_the_path_of_one(method, name):
    """The global vector is the serial one: x, J and the counts agree with those of scipy on one process."""
    comm = MPI.COMM_WORLD
    w = np.geomspace(0.5, 3, 7)
    rng = np.random.default_rng(4)
    H, b = random_spd(7, rng), rng.standard_normal(7)
    make = {"rosenbrock": lambda: rosenbrock(7), "quadratic": lambda: quadratic(H, b, np.eye(7))}[name]
    alone, local = Distributed(make(), w, MPI.COMM_SELF, 3), Distributed(make(), w, comm, 3)
    serial = scipy_minimize(alone, np.zeros(7), method, options=TIGHT[method])
    result = scipy_minimize(local, np.zeros(7)[local.part], method, comm=comm, options=TIGHT[method])
    np.testing.assert_array_equal(local.whole(result.x), serial.x)
    np.testing.assert_array_equal(local.whole(result.jac), serial.jac)
    assert (result.nit, result.nfev, result.njev, result.fun) == (serial.nit, serial.nfev, serial.njev, serial.fun)


@pytest.mark.parallel(3)
def test_one_process_decides(monkeypatch):
    """scipy runs on the first only, so that nothing in it that is not the same on all can part them."""
    comm, runs = MPI.COMM_WORLD, []
    monkeypatch.setattr(scipy_run, "minimize", lambda *args, **kwargs: runs.append(1) or minimize(*args, **kwargs))
    w, seen = np.ones(7), []
    local = Distributed(rosenbrock(7), w, comm, 3)
    result = scipy_minimize(
        local, np.zeros(7)[local.part], comm=comm, callback=lambda x: seen.append(x) or len(seen) == 3
    )
    assert comm.allgather(len(runs)) == [1, 0, 0]
    assert len(seen) == 3
    np.testing.assert_allclose(result.x, seen[-1], atol=1e-14)


@pytest.mark.parallel(3)
@pytest.mark.parametrize("fault", ["scipy", "gradient", "value"])
def test_errors_are_raised_on_all_processes(fault):
    """scipy's own, which the first process alone would see, and those of the problem."""
    comm = MPI.COMM_WORLD
    local = Distributed(rosenbrock(7), np.ones(7), comm, 3)
    error, options = {"scipy": ValueError, "gradient": NonFiniteError, "value": NonFiniteError}[fault], {}
    if fault == "scipy":
        options["options"] = {"initial_trust_radius": -1.0}
        error = ValueError if comm.rank == 0 else RuntimeError
    elif fault == "gradient":
        local.gradient = lambda x: np.full(x.shape, math.nan if comm.rank == comm.size - 1 else 0.0)
    else:
        local.value = lambda x: 1 / 0
    with pytest.raises(error) as caught:
        scipy_minimize(local, np.zeros(7)[local.part], comm=comm, **options)
    if fault == "scipy" and comm.rank > 0:
        assert isinstance(caught.value.__cause__, ValueError)
    if fault == "value":
        assert isinstance(caught.value.__cause__.__cause__, ZeroDivisionError)
    assert comm.allgather(comm.rank) == [0, 1, 2]  # no message is left over


class Copies:
    """A problem on R^6 whose process r holds entries lo to hi of x, of which it owns some."""

    def __init__(self, comm, held, owned, exchange):
        """Hold the entries `held`, own the mask `owned` of them."""
        self.comm, self.held, self.owned, self.problem = comm, held, owned, bowl()
        if exchange:
            self.update_copies = self._update_copies

    def whole(self, x):
        """All entries from their owners; copies have to agree."""
        out = np.full(6, math.nan)
        for held, owned, part in self.comm.allgather((self.held, self.owned, x)):
            out[held[owned]] = part[owned]
        assert np.isfinite(out).all()
        np.testing.assert_array_equal(x, out[self.held])
        return out

    def _update_copies(self, x):
        out = np.full(6, math.nan)
        for held, owned, part in self.comm.allgather((self.held, self.owned, x)):
            out[held[owned]] = part[owned]
        x[:] = out[self.held]

    def value(self, x):
        """J."""
        return self.problem.f(self.whole(x))

    def gradient(self, x):
        """Copies too."""
        return self.problem.df(self.whole(x))[self.held]

    def hessian_action(self, x, v):
        """Copies too."""
        return (self.problem.d2f(self.whole(x)) @ self.whole(v))[self.held]

    def inner(self, a, b):
        """Every entry once."""
        return sum(self.comm.allgather(float(a[self.owned] @ b[self.owned])))


@pytest.mark.parallel(2)
@pytest.mark.parametrize("method", ["L-BFGS-B", "trust-ncg"])
@pytest.mark.parametrize("layout", ["replicated", "overlapping"])
def test_copies_follow_their_owners(method, layout):
    """A control that every process holds, and one whose parts overlap."""
    comm = MPI.COMM_WORLD
    if layout == "replicated":
        problem = Copies(comm, np.arange(6), np.full(6, comm.rank == 0), False)
    else:
        held = [np.arange(4), np.arange(2, 6)][comm.rank]
        problem = Copies(comm, held, [held < 4, held >= 4][comm.rank], True)
    expected = scipy_minimize(bowl(), np.zeros(6), method, options=TIGHT[method])
    result = scipy_minimize(problem, np.zeros(problem.held.size), method, comm=comm, options=TIGHT[method])
    np.testing.assert_array_equal(problem.whole(result.x), expected.x)


@pytest.mark.parallel(2)
def test_layouts_that_cannot_be_are_refused_on_all_processes():
    """Copies without an exchange; copies that are counted twice; bounds that cross on one process."""
    comm = MPI.COMM_WORLD
    held = [np.arange(4), np.arange(2, 6)][comm.rank]
    problem = Copies(comm, held, [held < 4, held >= 4][comm.rank], False)
    with pytest.raises(ValueError, match="update_copies"):
        scipy_minimize(problem, np.zeros(4), comm=comm)
    replicated = Copies(comm, np.arange(6), np.full(6, comm.rank == 0), False)
    replicated.inner = lambda a, b: float(a @ b)
    del replicated.owned
    replicated.whole = lambda x: x
    with pytest.raises(ValueError, match="owned"):
        scipy_minimize(replicated, np.zeros(6), comm=comm)
    with pytest.raises(ValueError, match="lower exceeds upper"):
        scipy_minimize(
            Copies(comm, np.arange(6), np.full(6, comm.rank == 0), False), np.zeros(6), "L-BFGS-B",
            comm=comm, lower=0.0, upper=np.full(6, 1.0 - 2 * (comm.rank == 0)),
        )  # fmt: skip


@pytest.mark.parallel([1, 3])
def test_hessian_actions_are_kept_within_a_bound(monkeypatch):
    """On the first process up to the bound and on the others not at all; J's minimiser is the same without any."""
    comm, n, kept = MPI.COMM_WORLD, 64, []
    curvature = np.logspace(0, 4, n)
    own = np.array_split(np.arange(n), comm.size)[comm.rank]

    class Bowl:
        def value(self, x):
            return comm.allreduce(0.5 * float(curvature[own] @ (x - 1) ** 2))

        def gradient(self, x):
            return curvature[own] * (x - 1)

        def hessian_action(self, x, v):
            return curvature[own] * v

        def inner(self, a, b):
            return comm.allreduce(float(a @ b))

    class Watched(scipy_run.HessianActions):
        def at(self, y, p, compute):
            out = super().at(y, p, compute)
            kept.append(sum(a.nbytes for a in self._stored.values()))
            return out

    monkeypatch.setattr(scipy_run, "HessianActions", Watched)
    for bound in (0, 5 * 8 * n):
        monkeypatch.setattr(scipy_run, "ACTIONS_NBYTES", bound)
        kept.clear()
        result = scipy_minimize(Bowl(), np.zeros(len(own)), "trust-krylov", comm=comm, options=TIGHT["trust-krylov"])
        np.testing.assert_allclose(result.x, 1, atol=1e-6)
        if comm.rank == 0:
            assert len(kept) > 10
        assert max(kept, default=0) <= bound

"""Minimisation on the map from controls to readings: against dense algebra and scipy on matrices of forward sweeps, and
against the trust region by sweeps; what ``minimize`` chooses, and when it makes the map anew.
"""

import logging
from dataclasses import dataclass

import numpy as np
import pytest
import scipy.optimize
from firedrake import (
    Constant,
    DirichletBC,
    Function,
    FunctionSpace,
    SpatialCoordinate,
    TestFunction,
    TrialFunction,
    assemble,
    dot,
    dx,
    grad,
    inner,
    sin,
)
from irksome import Dt
from mpi4py import MPI

import pint_fem as pf
from pint_fem.adjoint.minimisation import method_choice
from pint_fem.adjoint.minimisation.map_problem import MapFunctional
from pint_fem.adjoint.minimisation.method_choice import MapWork
from pint_fem.errors import InputError
from pint_fem.inverse.map import ParameterToObservable
from problems.maxwell_source import maxwell_source
from tests.meshes import square

POINTS = np.array([[0.3, 0.2], [0.7, 0.4], [0.5, 0.9], [0.2, 0.7]])
TIMES = np.array([0.03, 0.05, 0.07, 0.11, 0.16, 0.2])
READINGS = 0.2 + 0.3 * np.sin(np.arange(24.0)).reshape(6, 4)
ALPHA, BETA = 1e-2, 3e-2


@dataclass
class Posed:
    """A functional and what it is made of."""

    J: pf.TimeParallelReducedFunctional
    sensors: pf.PointSensors
    kappa: Constant
    load: Function
    size: Constant
    q: Function
    forms: list


def posed(
    st,
    *,
    few=False,
    quartic=False,
    coupled=False,
    per_step=False,
    nonlinear=False,
    weight=200.0,
    spacetime_options=None,
):
    """Heat with a source field, the initial condition and a real strength as controls."""
    mesh = square(3, st.space_comm)
    V, R = FunctionSpace(mesh, "CG", 1), FunctionSpace(mesh, "R", 0)
    x, y = SpatialCoordinate(mesh)
    u, v, t = Function(V), TestFunction(V), pf.time_function(mesh)
    Q = FunctionSpace(mesh, "DG", 0) if few else V
    q, u0, strength = Function(Q, name="q"), Function(V, name="u0"), Function(R, name="strength")
    load, kappa, size = Function(V, name="load"), Constant(0.4), Constant(BETA)
    load.interpolate(0.3 + x)
    k = kappa * (1 + u**2) if nonlinear else kappa
    f = q * (1 + sin(20 * t)) + strength * x * y + load
    F = Dt(u) * v * dx + k * dot(grad(u), grad(v)) * dx - f * v * dx
    ev = pf.Evolution(
        F, u, tableau=pf.SDIRK2(), dt=0.02, nsteps=10, control=[q, strength] if few else [q, u0, strength], t=t,
        bcs=[DirichletBC(V, 0, 1)], initial=u0, per_step=[q] if per_step else False,
    )  # fmt: skip
    forms = [
        0.5 * (ALPHA * inner(grad(q), grad(q)) + size * q * q) * dx,
        0.5 * BETA * (u0 * u0 + 0.1 * inner(grad(u0), grad(u0))) * dx,
        0.5 * BETA * (strength - 1) ** 2 * dx,
    ]
    if few:
        del forms[1]
    if coupled:
        forms.append(0.5 * BETA * (q - u0) ** 2 * dx)
    if quartic:
        forms.append(0.25 * BETA * q**4 * dx)
    sensors = pf.PointSensors(POINTS.copy(), TIMES.copy(), READINGS.copy(), weight=weight)
    options = spacetime_options or {"time_solver": "serial"}
    J = pf.TimeParallelReducedFunctional(
        ev, sensors, regularisation=forms, spacetime=st, solver_parameters=options, riesz_map="L2"
    )
    return Posed(J, sensors, kappa, load, size, q, forms)


def dense(p):
    """Predictions at zero, their derivative by one forward sweep per unit control, and the precision and the derivative
    at zero of the regularisation from Firedrake's own matrices: on one process.
    """
    J, n = p.J, p.J.layout.size
    sweep = lambda z: J.problem.misfits[0].readings(J.problem.observations(z, p.sensors)).ravel()
    zero = sweep(np.zeros(n))
    F = np.stack([sweep(row) - zero for row in np.eye(n)], axis=1)
    A, b = np.zeros((n, n)), np.zeros(n)
    a, v = TrialFunction(p.q.function_space()), TestFunction(p.q.function_space())
    of_q = ALPHA * inner(grad(a), grad(v)) + float(p.size) * a * v
    of_u0 = BETA * (a * v + 0.1 * inner(grad(a), grad(v)))
    numbers = [np.rint(part).astype(int) for part in J.layout.parts(np.arange(n, dtype=float))]
    for i, form in zip(numbers[:2], (of_q, of_u0), strict=True):
        A[np.ix_(i, i)] = assemble(form * dx).petscmat[:, :]
    A[numbers[2], numbers[2]], b[numbers[2]] = BETA, -BETA
    return F, zero, A, b


def root_system(F, zero, A, b, data, weight):
    """Matrix and right-hand side of least squares whose residual's half square is ``J`` but for a constant."""
    L = np.linalg.cholesky(A)
    rows = np.concatenate([np.sqrt(weight) * F, L.T])
    return rows, np.concatenate([np.sqrt(weight) * (data - zero), -np.linalg.solve(L, b)])


@pytest.fixture(scope="module")
def reference():
    """The dense matrices, by sweeps on this process."""
    return dense(posed(pf.SpaceTime("1x1", comm=MPI.COMM_SELF)))


def local_in_time(ranks):
    return pf.SpaceTime(f"1x{ranks}") if ranks > 1 else pf.SpaceTime("1x1", comm=MPI.COMM_SELF)


@pytest.mark.parallel([1, 3])
def test_without_bounds_the_minimiser_is_the_posteriors_mean(reference):
    F, zero, A, b = reference
    p = posed(local_in_time(MPI.COMM_WORLD.size))
    result = p.J.minimize("map")
    rows, rhs = root_system(F, zero, A, b, READINGS.ravel(), 200.0)
    expected = np.linalg.lstsq(rows, rhs, rcond=None)[0]
    assert result.success
    assert result.nit <= 2
    np.testing.assert_allclose(result.x, expected, rtol=0, atol=1e-9 * np.abs(expected).max())
    assert result.value == pytest.approx(p.J.problem.value(result.x), rel=1e-10)
    assert result.choice == "map, as given"
    np.testing.assert_array_equal(p.J.array([c.control for c in p.J.controls]), result.x)
    np.testing.assert_array_equal(p.J.array(result.control), result.x)
    p.J.minimize("map")
    again = p.J.minimize("map")  # from the minimiser itself, whose gradient is round-off
    assert again.success
    assert again.nit == 0


@pytest.mark.parallel([1, 3])
def test_bounds_as_scipys_least_squares_on_the_matrix_of_sweeps(reference):
    F, zero, A, b = reference
    p = posed(local_in_time(MPI.COMM_WORLD.size))
    rows, rhs = root_system(F, zero, A, b, READINGS.ravel(), 200.0)
    free = np.linalg.lstsq(rows, rhs, rcond=None)[0]
    positive = p.J.minimize("map", bounds=(0, None))
    expected, _ = scipy.optimize.nnls(rows, rhs)
    assert 3 < (expected == 0).sum() < len(expected) - 3
    assert positive.success
    assert (positive.x >= 0).all()
    np.testing.assert_allclose(positive.x, expected, rtol=0, atol=1e-7 * np.abs(expected).max())
    most = 0.4 * np.abs(free).max()
    result = p.J.on_map().minimize(bounds=(-most, most))
    expected = scipy.optimize.lsq_linear(rows, rhs, (-most, most), method="bvls", tol=1e-14).x
    assert (np.abs(expected) > 0.999 * most).any()
    np.testing.assert_allclose(result.x, expected, rtol=0, atol=1e-7 * np.abs(expected).max())


@pytest.mark.parallel([1, 3])
def test_constraints_and_bounds_satisfy_the_conditions_of_first_order(reference):
    F, zero, A, b = reference
    p = posed(local_in_time(MPI.COMM_WORLD.size))
    H = 200.0 * F.T @ F + A
    g0 = 200.0 * F.T @ (zero - READINGS.ravel()) + b
    c = np.zeros(len(b))
    p.J.layout.part(c, p.q)[:] = assemble(TestFunction(p.q.function_space()) * dx).dat.data_ro
    wanted = -0.3
    constraint = [(p.q * dx, wanted)]
    result = p.J.minimize("map", constraints=constraint)
    kkt = np.block([[H, c[:, None]], [c[None], np.zeros((1, 1))]])
    expected = np.linalg.solve(kkt, np.append(-g0, wanted))[:-1]
    assert result.success
    assert result.hessian_calls <= 2
    np.testing.assert_allclose(result.x, expected, rtol=0, atol=1e-8 * np.abs(expected).max())

    both = p.J.minimize("map", constraints=constraint, bounds=(-1.0, None))
    x, g = both.x, H @ both.x + g0
    assert both.success
    assert (x >= -1.0).all()
    assert c @ x == pytest.approx(wanted, abs=1e-7)
    held = x == -1.0
    assert 0 < held.sum() < len(x) - 3
    multiplier = (c[~held] @ g[~held]) / (c[~held] @ c[~held])
    rest = g - multiplier * c
    assert np.abs(rest[~held]).max() < 1e-6 * np.abs(g0).max()
    assert (rest[held] > 0).all()


@pytest.mark.parallel([1, 3])
def test_the_same_minimiser_as_by_sweeps():
    same_as_by_sweeps(pf.SpaceTime(f"1x{MPI.COMM_WORLD.size}"))


@pytest.mark.parallel(2)
def test_the_same_minimiser_as_by_sweeps_on_ranks_in_space():
    same_as_by_sweeps(pf.SpaceTime("2x1"))


def same_as_by_sweeps(st):
    """Source, initial condition and a real number; with a quartic regularisation, bounds and a constraint."""
    p = posed(st, quartic=True, weight=20.0)
    start = p.J.function(0.1 * np.ones(p.J.layout.size))
    norm = lambda z: np.sqrt(p.J.inner.inner(z, z))
    for given in ({}, {"bounds": (0, None)}, {"constraints": [(p.q * dx, 0.2)]}):
        a = p.J.minimize("map", start=start, gtol_rel=1e-11, **given)
        b = p.J.minimize_trust_region(start, gtol_rel=1e-11, **given)
        assert a.success
        assert b.success
        assert norm(a.x - b.x) <= 1e-8 * norm(b.x), given
    quadratic = posed(st, weight=20.0).J.minimize("map").x
    assert norm(p.J.minimize("map").x - quadratic) > 1e-3 * norm(quadratic)  # the quartic term counts


@pytest.mark.parallel([1, 2])
def test_the_same_minimiser_as_by_sweeps_for_lossy_maxwell():
    rf = maxwell_source(
        pf.SpaceTime(), regime="lossy", cells=8, degree=1, steps=32, solver_parameters={"time_solver": "serial"}
    ).rf
    start = rf.function(np.zeros(rf.layout.size))
    a = rf.minimize("map", start=start)
    b = rf.minimize_trust_region(start, gtol_rel=1e-11, cg_max_it=400)
    assert b.success
    d = a.x - b.x
    assert rf.inner.inner(d, d) <= 1e-16 * rf.inner.inner(b.x, b.x)


@pytest.mark.parallel([1, 2])
@pytest.mark.parametrize("kind", ["coupled", "per_step"])
def test_coupled_controls_and_controls_with_one_value_per_step(kind):
    st = pf.SpaceTime(f"1x{MPI.COMM_WORLD.size}")
    p = posed(st, **{kind: True})
    start, primal = p.J.function(np.zeros(p.J.layout.size)), p.J.inner.primal
    norm = lambda dual: np.sqrt(p.J.inner.inner(primal(dual), primal(dual)))
    g0 = p.J.problem.derivative(np.zeros(p.J.layout.size))
    slope = lambda result: p.J.problem.derivative(result.x)  # by sweeps

    free = p.J.minimize("map", start=start)
    assert free.success
    assert norm(slope(free)) <= 1e-9 * norm(g0)
    assert (free.nit <= 2) == (kind == "per_step")  # there is a posterior

    bounded = p.J.minimize("map", start=start, bounds=(-1.0, None))
    g, held = slope(bounded), bounded.x == -1.0
    assert bounded.success
    assert (bounded.x >= -1.0).all()
    assert (g[held] >= 0).all()
    assert st.comm.allreduce(held.sum()) > 3
    assert norm(np.where(held, 0.0, g)) <= 1e-8 * norm(g0)

    constrained = p.J.minimize("map", start=start, constraints=[(p.q * dx, 0.2)])
    g, c = slope(constrained), np.zeros(p.J.layout.size)
    one = assemble(TestFunction(p.q.function_space()) * dx).dat.data_ro
    p.J.layout.part(c, p.q)[...] = one * (0.02 if kind == "per_step" else 1.0)
    assert constrained.success
    assert p.J.layout.pairing(c, constrained.x) == pytest.approx(0.2, rel=1e-9)
    multiplier = p.J.layout.pairing(g, primal(c)) / p.J.layout.pairing(c, primal(c))
    assert abs(multiplier) * norm(c) > 1e-5 * norm(g0)
    assert norm(g - multiplier * c) <= 1e-9 * norm(g0)


@pytest.mark.parallel([1, 2])
def test_derivatives_on_the_map_are_those_of_sweeps():
    p = posed(pf.SpaceTime(f"1x{MPI.COMM_WORLD.size}"), quartic=True)
    F, sweeps = p.J.parameter_to_observable(), p.J.problem
    unreduced = p.J.on_map(F).problem  # 24 readings of 4 sensors hardly depend on each other
    F.reduced  # noqa: B018
    on_map = p.J.on_map(F).problem
    assert (unreduced.misfit._reduced, on_map.misfit._reduced) == (None, F.reduced)
    rng = np.random.default_rng(3)
    z, a, b = (rng.standard_normal(p.J.layout.size) for _ in range(3))
    assert on_map.value(z) == pytest.approx(sweeps.value(z), rel=1e-11)
    assert on_map.parts == pytest.approx(sweeps.parts, rel=1e-11)
    assert on_map.tangent_value(z, a) == pytest.approx(sweeps.tangent_value(z, a), rel=1e-10)
    close = lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-11 * np.abs(y).max())
    close(on_map.derivative(z), sweeps.derivative(z))
    close(unreduced.derivative(z), sweeps.derivative(z))
    close(unreduced.hessian_action(z, a), on_map.hessian_action(z, a))
    for found, dz in zip(on_map.hessian_actions(z, [a, b]), (a, b), strict=True):
        close(found, sweeps.hessian_action(z, dz))
        close(on_map.hessian_action(z, dz), found)


@pytest.mark.parallel([1, 2, 3])
def test_the_matrix_of_few_controls_has_the_products_of_sweeps():
    p = posed(pf.SpaceTime({1: "1x1", 2: "2x1", 3: "1x3"}[MPI.COMM_WORLD.size]), few=True)
    rng = np.random.default_rng(5)
    z, dz = (p.J.function(np.zeros(p.J.layout.size)) for _ in range(2))
    for f in (z, dz):
        for part in f:
            x = SpatialCoordinate(part.function_space().mesh())[0]
            part.interpolate(x**2 + Constant(rng.standard_normal()))
    z, dz = p.J.array(z), p.J.array(dz)
    expected, F = p.J.problem.hessian_action(z, dz), p.J.parameter_to_observable()
    close = lambda x: np.testing.assert_allclose(x, expected, rtol=0, atol=1e-11 * np.abs(expected).max())
    first = p.J.on_map(F).problem
    for _ in range(12):
        close(first.hessian_action(z, dz))
    assert first.misfit._matrix is not None
    close(np.array(first.hessian_actions(z, [2 * dz, dz]))[1])
    matrix = F.default_posterior.spectrum.misfit_matrix
    second = p.J.on_map(F).problem
    close(second.hessian_action(z, dz))
    assert second.misfit._matrix is matrix
    np.testing.assert_allclose(matrix.whole(), matrix.whole().T, rtol=0, atol=1e-12 * np.abs(matrix.whole()).max())


@pytest.fixture
def builds(monkeypatch):
    """How often rows of a map are computed."""
    counted, build = [], ParameterToObservable._build

    def counting(self):
        counted.append(self)
        build(self)

    monkeypatch.setattr(ParameterToObservable, "_build", counting)
    return counted


CHANGES = {
    "readings": (lambda p: p.sensors.data.__imul__(1.5), 0),
    "weight": (lambda p: setattr(p.sensors, "weight", 90.0), 0),
    "load": (lambda p: p.load.assign(0.3), 0),
    "regularisation": (lambda p: p.size.assign(0.2), 0),
    "conductivity": (lambda p: p.kappa.assign(0.7), 1),
    "sensors": (lambda p: p.sensors.points.__isub__(0.05), 1),
    "times": (lambda p: p.sensors.times.__isub__(0.01), 1),
}


@pytest.mark.parallel([1, 2])
@pytest.mark.parametrize("what", CHANGES)
def test_new_data_use_the_map_again_unless_it_depends_on_them(what, builds):
    p = posed(pf.SpaceTime(f"1x{MPI.COMM_WORLD.size}"))
    before = p.J.minimize("map")
    assert len(builds) == 1
    change, anew = CHANGES[what]
    change(p)
    p.J.update_data()
    result = p.J.minimize("map")
    assert len(builds) == 1 + anew
    norm = lambda z: np.sqrt(p.J.inner.inner(z, z))
    assert norm(result.x - before.x) > 1e-3 * norm(before.x)
    expected = p.J.minimize_trust_region(gtol_rel=1e-11, start=p.J.function(0 * result.x))
    assert norm(result.x - expected.x) <= 1e-8 * norm(expected.x)
    p.J.minimize("map")
    assert len(builds) == 1 + anew


def test_data_that_have_not_been_read_again_change_nothing(builds):
    p = posed(pf.SpaceTime("1x1", comm=MPI.COMM_SELF))
    before = p.J.minimize("map")
    p.sensors.data *= 2
    F = p.J.parameter_to_observable()
    start = p.J.function(0 * before.x)
    np.testing.assert_allclose(F.minimize(start=start).x, before.x, rtol=0, atol=1e-8)
    p.J.update_data()
    after = p.J.minimize_trust_region(start, gtol_rel=1e-11)
    np.testing.assert_allclose(F.minimize(start=start).x, after.x, rtol=0, atol=1e-8 * np.abs(after.x).max())
    rows = p.J.on_map().F.rows
    assert rows is builds[0].rows


@pytest.mark.parallel([1, 2])
def test_auto_says_what_it_chose_and_why(monkeypatch, caplog):
    p = posed(pf.SpaceTime(f"1x{MPI.COMM_WORLD.size}"))
    zero = p.J.function(np.zeros(p.J.layout.size))
    with caplog.at_level(logging.INFO, "pint_fem"):
        found = p.J.minimize(start=zero)
    assert found.choice.startswith("map, by measured times of a step: 4 sensors over 11 steps, 24 readings")
    assert (f"minimize auto: {found.choice}" in caplog.text) == (MPI.COMM_WORLD.rank == 0)
    assert p.J.minimize(start=zero).choice == "map, which has been made before"
    p = posed(p.J.spacetime)
    monkeypatch.setattr(method_choice, "SWEEPS", 0)
    other = p.J.minimize(start=zero, gtol_rel=1e-10)
    assert other.choice.startswith("trust-region, by measured times")
    assert other.gradient_calls > 2
    np.testing.assert_allclose(other.x, found.x, rtol=0, atol=1e-8 * np.abs(found.x).max())


@pytest.mark.parallel([1, 2])
def test_auto_sweeps_where_there_is_no_map(monkeypatch, tmp_path):
    st = pf.SpaceTime(f"1x{MPI.COMM_WORLD.size}")
    p = posed(st, nonlinear=True)
    with pytest.raises(InputError, match=r"linear evolution with constant operators.*minimize_trust_region"):
        p.J.minimize("map")
    result = p.J.minimize(max_it=1, bounds=(0, None))
    assert result.choice.startswith("trust-region, as there is no map: the steps are not those of a linear evolution")
    p = posed(st)
    doubled = (2 * p.J).minimize(gtol_rel=1e-9)
    assert doubled.choice.startswith("trust-region, as there is no map: the functional is a sum")
    z = p.J.minimize("map").x
    np.testing.assert_allclose(p.J.array(doubled.control), z, rtol=0, atol=1e-6 * np.abs(z).max())
    path = st.comm.bcast(str(tmp_path / "run.h5"))
    with pytest.raises(InputError, match="a run on the map has none"):
        p.J.minimize("map", checkpoint=path)
    assert p.J.minimize(checkpoint=path, max_it=1).choice.startswith("trust-region, as checkpoint= is given")
    monkeypatch.setattr("pint_fem.capacity.machine_memory", lambda: 1000)
    assert p.J.minimize(max_it=1).choice.startswith("trust-region, as the map does not fit the memory: 24 rows")


@pytest.mark.parallel([1, 2])
def test_refusals_on_every_rank():
    st = pf.SpaceTime(f"1x{MPI.COMM_WORLD.size}")
    p = posed(st)
    with pytest.raises(InputError, match=r"method = 'newton': give one of 'auto', 'kkt', 'map'"):
        p.J.minimize("newton")
    with pytest.raises(InputError, match="one-shot takes cycles"):
        p.J.on_map().minimize_one_shot()
    with pytest.raises(InputError, match="bounds"):
        p.J.minimize("map", bounds=(0,))
    F = p.J.parameter_to_observable()
    F.functions = None
    with pytest.raises(InputError, match=r"use posterior\(prior=...\)"):
        F.minimize()
    with pytest.raises(InputError, match="its map has no minimize"):
        MapFunctional(2 * p.J, p.J.parameter_to_observable())
    if st.comm.size > 1:
        with pytest.raises(InputError, match="method is not the same on all ranks"):
            p.J.minimize(["map", "auto"][st.comm.rank])


def test_scipy_and_monitors_work_on_the_map():
    p = posed(pf.SpaceTime("1x1", comm=MPI.COMM_SELF))
    best, lines = p.J.minimize("map", monitor=(lines := []).append), lines
    assert lines[0].split()[:2] == ["it", "J"]
    assert len(lines) == best.nit + 2
    counts = dict(p.J.problem.sweeps.counts)
    result = p.J.on_map().minimize_scipy(p.J.function(0 * best.x), method="trust-krylov")
    assert result.fun == pytest.approx(best.value, rel=1e-8)
    assert p.J.problem.sweeps.counts == counts  # no sweep
    one_shot = posed(pf.SpaceTime("1x1", comm=MPI.COMM_SELF), spacetime_options={"mgrit": {"levels": 1}}).J.minimize(
        "one-shot", max_it=2
    )
    assert one_shot.nit <= 2


def test_estimates_of_time_and_memory_count_what_is_computed():
    work = MapWork(sensors=6, readings=60, lags=100, unknowns=1000, stepwise=0, ranks=2, space_ranks=1)
    step = {1: 1.0, 4: 2.0}
    # 3 sensors of a rank are one block of 4; rows, then dense matrices of 60 modes
    products = (3 * 10 * 100 * 1000 + 3 * 100 * 1000 + 4 * 60**2 * 1000 / 2 + 5 * 60**3) / method_choice.RATE
    assert work.seconds(step) == pytest.approx(100 * 2.0 + products)
    assert work.nbytes == 8 * ((60 + 120) * 1000 / 2 + 4 * 60**2)
    assert work._replace(unknowns=7).modes == 7
    assert work._replace(readings=6000).modes == 120
    assert work._replace(readings=600, stepwise=3).modes == 600

"""Convergence theory: closed bounds against exact error propagation, spectra against known ones, estimates against
runs.
"""

import math

import numpy as np
import pytest
import scipy.linalg
from firedrake import (
    DirichletBC,
    Function,
    FunctionSpace,
    SpatialCoordinate,
    TestFunction,
    TestFunctions,
    UnitIntervalMesh,
    VectorFunctionSpace,
    assemble,
    div,
    dot,
    dx,
    grad,
    inner,
    sin,
    split,
)
from irksome import Dt
from mpi4py import MPI

from pint_fem.evolution import SDIRK2, BackwardEuler, Evolution, ImplicitMidpoint
from pint_fem.evolution.tableaux import DIRK
from pint_fem.mgrit import MGRIT, MGRITOptions
from pint_fem.spacetime import SpaceTime
from pint_fem.sweeps.sweeps import Sweeps
from pint_fem.theory import estimates
from pint_fem.theory import spectrum as spectrum_module
from pint_fem.theory.block_modes import block_factors, damped_wave
from pint_fem.theory.estimates import mgrit_estimate
from pint_fem.theory.spectrum import Spectrum, spectrum
from pint_fem.theory.stability import dirk_stability, runge_kutta_matrix
from pint_fem.theory.two_level import (
    expected_iterations,
    two_level_bound,
    two_level_estimate,
    two_level_factors,
)
from tests.meshes import square

TABLEAUX = {"BE": BackwardEuler, "SDIRK2": SDIRK2, "midpoint": ImplicitMidpoint}
WEIGHTS = [0.6, 1.0, 1.3, 1.8]


def scheme(nu):
    return "F" + "CF" * nu


def error_propagation(lam, mu, m, coarse_steps, nu=0, weight=1.0):
    """Matrix of one two-level cycle on the errors of one mode at the C-points behind the first, and its 2-norm."""
    eye, shift = np.eye(coarse_steps), np.eye(coarse_steps, k=-1)
    fine, coarse = eye - lam**m * shift, eye - mu * shift
    E = (eye - np.linalg.solve(coarse, fine)) @ np.linalg.matrix_power(eye - weight * fine, nu)
    return E, float(np.linalg.norm(E, 2))


def stability(name, z):
    dirk = DIRK(TABLEAUX[name]())
    return dirk_stability(dirk.A, dirk.b, z)


def in_disk(rng, n):
    return np.sqrt(rng.uniform(0, 1, n)) * np.exp(2j * np.pi * rng.uniform(0, 1, n))


# -- bounds and exact error propagation ------------------------------------------------------------------------------
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("nu", [0, 1, 2, 3])
@pytest.mark.parametrize("real", [True, False])
def test_bounds_dominate_exact_norms(real, nu, weight):
    """For arbitrary eigenvalues, growing ones among them, and any number of steps."""
    rng = np.random.default_rng(nu)
    for _ in range(60):
        m, steps = int(rng.integers(1, 6)), int(rng.integers(1, 40))
        lam, mu = rng.uniform(-1.1, 1.1, 2) if real else in_disk(rng, 2)
        _, norm = error_propagation(lam, mu, m, steps, nu, weight)
        assert norm <= two_level_bound(lam, mu, m, steps, scheme(nu), weight) * (1 + 1e-12)


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("nu", [0, 1, 2, 3])
@pytest.mark.parametrize("real", [True, False])
def test_bounds_are_sharp_for_many_steps(real, nu, weight):
    """Real eigenvalues with any weight, complex ones with weight 1: what the norms of larger and larger matrices tend
    to.
    """
    if not real and weight != 1:
        return
    rng = np.random.default_rng(nu)
    for _ in range(10):
        lam, mu = rng.uniform(-0.9, 0.9, 2) if real else 0.9 * in_disk(rng, 2)
        bound = two_level_bound(lam, mu, 2, relax=scheme(nu), weight=weight)
        norms = [error_propagation(lam, mu, 2, steps, nu, weight)[1] for steps in (50, 200)]
        assert norms[0] <= norms[1] <= bound * (1 + 1e-12)
        assert norms[1] >= 0.99 * bound
        # the defect shrinks with the square of the number of steps, unless it is round-off already
        assert bound - norms[1] <= (bound - norms[0]) / 8 + 1e-12 * bound


@pytest.mark.parametrize(("nu", "weight"), [(0, 1.0), (1, 1.0), (1, 1.3), (2, 0.7), (3, 1.0)])
def test_error_propagation_is_what_the_solver_does(nu, weight):
    """One cycle on errors that are unit vectors gives the columns of the matrix."""
    lam, mu, m, steps = 0.83, 0.41, 3, 7

    class Step:
        def __init__(self, factor):
            self.factor = factor

        def step(self, _, u, out):
            out[...] = self.factor * u

    U = np.zeros((m * steps + 1, steps))
    U[m::m] = np.eye(steps)  # the solution is zero
    options = dict(coarsening=m, relax=scheme(nu), c_weight=weight, residual="none", max_it=1)
    MGRIT([Step(lam), Step(mu)], m * steps, options=options).solve(U)
    E, _ = error_propagation(lam, mu, m, steps, nu, weight)
    np.testing.assert_allclose(U[m::m], E, rtol=0, atol=1e-15)


@pytest.mark.parametrize(("nu", "weight"), [(0, 1.0), (1, 1.0), (2, 1.0), (1, 1.3), (2, 0.8)])
@pytest.mark.parametrize("steps", [1, 5, 8])
def test_exact_after(steps, nu, weight):
    """The power of the error propagation vanishes then and not before."""
    lam, mu, m = 0.97, -0.6, 2
    after = two_level_estimate(lam, mu, m, steps, scheme(nu), weight=weight).exact_after
    assert after == (math.ceil(steps / (1 + nu)) if weight == 1 else steps)
    E, _ = error_propagation(lam, mu, m, steps, nu, weight)
    assert abs(np.linalg.matrix_power(E, after)).max() == 0
    assert abs(np.linalg.matrix_power(E, after - 1)).max() > 0
    assert two_level_estimate(lam, mu, m, math.inf, scheme(nu)).exact_after == math.inf


def test_over_relaxation_helps_heat():
    """Weight 1.3 saves a tenth to a fifth of backward Euler's factor (Sugiyama et al., arXiv:2107.02290)."""
    z = -np.logspace(-4, 6, 2001)
    for m in (2, 4, 16):
        R = stability("BE", z), stability("BE", m * z)
        plain, weighted = (two_level_bound(*R, m, relax="FCF", weight=w) for w in (1.0, 1.3))
        assert 0.75 * plain < weighted < 0.9 * plain


def test_factors_of_modes_and_of_nearly_undamped_ones():
    """One number a mode; the geometric sum stays accurate for |mu| next to 1."""
    np.testing.assert_allclose(two_level_factors([0.5, 1.0], [0.3, 1.0], 2), [0.05 / 0.7, 0])
    for mu in (1 - 1e-15, 1.0, 1 + 1e-15):
        assert two_level_bound(-1.0, mu, 1, 1000) == pytest.approx(2000, rel=1e-9)
    assert two_level_bound(0.5, 0.0, 2, relax="FCF") == pytest.approx(0.5**4)
    assert two_level_bound(0.5, 0.3, 2, 1, "FCF") == 0  # one coarse step: the C-relaxation is the solution


def test_expected_iterations():
    assert expected_iterations(0.1, 1e-8) == 8
    assert expected_iterations(0.5, 0.1) == 4
    assert expected_iterations(0.0, 1e-8) == expected_iterations(1e-12, 1e-8) == 1
    assert expected_iterations(1.0, 0.5) == expected_iterations(7.0, 0.5) == math.inf
    for factor, tolerance in ((0.5, 0), (0.5, 1), (-0.1, 0.5), (math.nan, 0.5)):
        with pytest.raises(ValueError, match="tolerance"):
            expected_iterations(factor, tolerance)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (dict(relax="CF"), "relaxation"),
        (dict(m=0), "m = 0"),
        (dict(coarse_steps=0), "coarse_steps 0"),
        (dict(weight=-1), "weight -1"),
        (dict(tolerance=2), "tolerance 2"),
        (dict(fine=[], coarse=[]), "no eigenvalues"),
    ],
)
def test_bad_input(change, match):
    with pytest.raises(ValueError, match=match):
        two_level_estimate(**{**dict(fine=0.5, coarse=0.2, m=2), **change})


# -- estimates from eigenvalues ---------------------------------------------------------------------------------------
def test_estimate_of_heat():
    z = np.logspace(-4, 4, 2001)
    judged = two_level_estimate(stability("BE", -z), stability("BE", -8 * z), 8, 64, "F", tolerance=1e-6, modes=z)
    assert judged.converges
    assert judged.factor == pytest.approx(0.2489, abs=2e-4)  # supremum of the formula of Dobrev et al. (2017)
    assert judged.iterations == math.ceil(math.log(1e-6) / math.log(judged.factor))
    assert 0.1 < judged.where < 1
    assert judged.warning == ""
    assert "0.249" in str(judged)
    assert "dt*kappa" in str(judged)
    few = two_level_estimate(stability("BE", -z), stability("BE", -8 * z), 8, 4, "F", tolerance=1e-6)
    assert few.iterations == few.exact_after == 4


@pytest.mark.parametrize("relax", ["F", "FCF"])
@pytest.mark.parametrize("coarse", ["BE", "midpoint"])
def test_undamped_waves_do_not_converge(coarse, relax):
    """|lam| = 1: bounds of 1.3-1.6 for backward Euler, above 100 for Crank-Nicolson at Nc = 64."""
    m, steps, z = 4, 64, 1j * np.logspace(-4, 3, 4001)
    judged = two_level_estimate(stability("midpoint", z), stability(coarse, m * z), m, steps, relax, modes=z)
    assert not judged.converges
    assert 1.2 < judged.factor < 1.7 if coarse == "BE" else judged.factor > 100
    assert "undamped waves" in judged.warning
    assert "serial" in judged.warning
    assert "SDIRK2" not in judged.warning
    assert judged.iterations == judged.exact_after  # only by finite termination
    assert judged.warning in str(judged)


@pytest.mark.parametrize(("fine", "relax"), [("SDIRK2", "F"), ("BE", "F"), ("midpoint", "F"), ("midpoint", "FCF")])
def test_midpoint_on_coarse_levels_of_heat_does_not_converge(fine, relax):
    z = np.logspace(-4, 6, 2001)
    judged = two_level_estimate(stability(fine, -z), stability("midpoint", -8 * z), 8, 64, relax, modes=z)
    assert not judged.converges
    assert judged.where > 10  # stiff
    assert "stiff" in judged.warning
    assert "SDIRK2" in judged.warning
    assert ("relax='FCF'" in judged.warning) == (relax == "F" and fine != "midpoint")


def test_a_warning_names_alternatives_that_converge_only():
    given = dict(fine=0.1, coarse=-0.99, m=2, coarse_steps=64, relax="F")
    judged = two_level_estimate(**given, alternatives={"first": 0.2, "second": 1.3})
    assert "first (bound 0.2)" in judged.warning
    assert "second" not in judged.warning
    assert "serial" in two_level_estimate(**given, alternatives={}).warning


@pytest.mark.parametrize("kind", ["parabolic", "wave"])
@pytest.mark.parametrize("fine", TABLEAUX)
@pytest.mark.parametrize("coarse", TABLEAUX)
def test_samples_are_dense_enough(kind, fine, coarse):
    """The bound over the samples is within 1 percent of the one over many more."""
    found = Spectrum(kind, 0.3, 3e5)
    for m, relax in ((2, "FCF"), (8, "F"), (64, "FCF")):
        bounds = []
        for per_decade in (max(128, 12 * m), 8_000):
            z = -found.sample(1e-2, per_decade)
            bounds.append(two_level_bound(stability(fine, z), stability(coarse, m * z), m, 32, relax))
        assert 0.99 * bounds[1] <= bounds[0] <= bounds[1] * (1 + 1e-2)


def test_stability_functions_of_matrices():
    """SDIRK2: ``(1 + (1 - 2 g) z)/(1 - g z)^2`` with a matrix that is not normal for ``z``."""
    g, eye = 1 - math.sqrt(0.5), np.eye(2)
    Z = -damped_wave([2.0, 0.3], [1.1, 4.0])
    inverse = np.linalg.inv(eye - g * Z)
    np.testing.assert_allclose(
        runge_kutta_matrix([[g, 0], [1 - g, g]], [1 - g, g], Z), (eye + (1 - 2 * g) * Z) @ inverse @ inverse, rtol=1e-12
    )


@pytest.mark.parametrize("weight", [1.0, 1.4])
@pytest.mark.parametrize("nu", [0, 1, 2])
def test_factors_of_damped_waves_are_norms_of_their_error_propagation(nu, weight):
    """Against the matrix of a cycle on the errors of a pair at the C-points, of two fields each."""
    m, steps, Z = 4, 120, damped_wave([0.5, 0.4, 0.02], [0.3, 1.0, 0.2])
    fine, coarse = (runge_kutta_matrix([[1.0]], [1.0], -h * Z) for h in (1, m))
    found = block_factors(fine, coarse, m, steps, scheme(nu), weight)
    for Phi, Psi, bound in zip(fine, coarse, found, strict=True):
        eye, shift = np.eye(2 * steps), np.eye(steps, k=-1)
        F, C = eye - np.kron(shift, np.linalg.matrix_power(Phi, m)), eye - np.kron(shift, Psi)
        E = (eye - np.linalg.solve(C, F)) @ np.linalg.matrix_power(eye - weight * F, nu)
        norm = np.linalg.norm(E, 2)
        assert norm <= bound <= 1.05 * norm


# -- spectra ---------------------------------------------------------------------------------------------------------
def heat(n=8, tableau="SDIRK2", *, comm=MPI.COMM_SELF, dt=1e-2, nsteps=128, reaction=0.0, advection=0.0, free=False):
    mesh = square(n, comm)
    V = FunctionSpace(mesh, "CG", 1)
    u, v = Function(V), TestFunction(V)
    x, y = SpatialCoordinate(mesh)
    u.interpolate(sin(3 * x) * y * (1 - y) + x)
    F = Dt(u) * v * dx + dot(grad(u), grad(v)) * dx - sin(5 * x * y) * v * dx
    if reaction:
        F += reaction * u * v * dx
    if advection:
        F += advection * u.dx(0) * v * dx
    bcs = () if free else DirichletBC(V, 0, "on_boundary")
    return Evolution(F, u, tableau=TABLEAUX[tableau](), dt=dt, nsteps=nsteps, bcs=bcs)


def wave(mesh, tableau="midpoint", *, damping=0.0, fixed=False):
    W = FunctionSpace(mesh, *(("CG", 1) if mesh.geometric_dimension == 1 else ("RT", 1))) * FunctionSpace(mesh, "DG", 0)
    w, (tau, q) = Function(W), TestFunctions(W)
    s, p = split(w)
    if mesh.geometric_dimension == 1:
        F = (Dt(s) * tau - p * tau.dx(0) + Dt(p) * q + s.dx(0) * q + damping * s * tau) * dx
    else:
        F = (inner(Dt(s), tau) - p * div(tau) + Dt(p) * q + div(s) * q + damping * inner(s, tau)) * dx
    bcs = DirichletBC(W.sub(0), 0, "on_boundary") if fixed else ()
    return Evolution(F, w, tableau=TABLEAUX[tableau](), dt=0.02, nsteps=64, bcs=bcs)


def dense_eigenvalues(ev):
    """Of K x = kappa M x on the free degrees of freedom, all at once."""
    M, K = (assemble(form, mat_type="aij").petscmat[:, :] for form in ev.linear_operators())
    free = np.setdiff1d(np.arange(len(M)), np.concatenate([bc.nodes for bc in ev.bcs]) if ev.bcs else [])
    return scipy.linalg.eigvals(K[np.ix_(free, free)], M[np.ix_(free, free)])


def test_laplacian_on_the_unit_square():
    """2 pi^2 from above with order 2; the largest within 1 percent and at most rounded up."""
    errors = []
    for n in (4, 8, 16, 32):
        found = spectrum(heat(n))
        assert found.kind == "parabolic"
        errors.append(found.low - 2 * math.pi**2)
        if n < 32:
            kappa = dense_eigenvalues(heat(n)).real
            assert found.low == pytest.approx(kappa.min(), rel=1e-3)
            assert kappa.max() * (1 - 1e-6) <= found.high <= 1.01 * kappa.max()
    rates = np.log2(np.array(errors[:-1]) / errors[1:])
    assert all(e > 0 for e in errors)
    assert rates == pytest.approx(2, abs=0.15)


@pytest.mark.parametrize("n", [4, 16])
def test_shifted_laplacians(n):
    """A constant keeps still without conditions; growing modes are found; both for few (dense) and many unknowns."""
    assert spectrum(heat(n, free=True)).low == pytest.approx(0, abs=1e-6 * n**2 * 40)
    plain, shifted = spectrum(heat(n)), spectrum(heat(n, reaction=-100.0))
    assert shifted.low == pytest.approx(plain.low - 100, rel=2e-2)
    assert shifted.low < -70
    sample = shifted.sample(1e-2)
    assert sample.min() == pytest.approx(shifted.low * 1e-2)
    assert sample.max() == pytest.approx(shifted.high * 1e-2)


def test_all_modes_growing_and_none_moving():
    found = spectrum(heat(4, reaction=-1e5))
    assert found.low < -9e4
    assert found.high == 0
    mesh = UnitIntervalMesh(4, comm=MPI.COMM_SELF)
    V = FunctionSpace(mesh, "CG", 1)
    u, v = Function(V), TestFunction(V)
    ev = Evolution(Dt(u) * v * dx - v * dx, u, tableau=SDIRK2(), dt=0.1, nsteps=16)
    assert spectrum(ev).sample(ev.dt).tolist() == [0.0]
    (judged,) = mgrit_estimate(ev, dict(levels=2, coarsening=2))
    assert judged.factor == 0
    assert judged.iterations == 1


@pytest.mark.parametrize("n", [3, 20, 100])
def test_waves_on_an_interval(n):
    """CG1 x DG0 on an interval: omega^2 = 6/h^2 (1 - cos t)/(2 + cos t), at most 12/h^2."""
    found = spectrum(wave(UnitIntervalMesh(n, comm=MPI.COMM_SELF)))
    assert found.kind == "wave"
    assert found.low == 0
    top = math.sqrt(12) * n
    assert top * (1 - 1e-3) <= found.high <= 1.01 * top
    sample = found.sample(0.02)
    assert abs(sample.real).max() == 0
    assert abs(sample).max() == pytest.approx(0.02 * found.high)


def test_waves_between_fixed_ends():
    """As on an interval, without the mode ``t = pi``, which moves the ends."""
    n = 10
    found, t = spectrum(wave(UnitIntervalMesh(n, comm=MPI.COMM_SELF), fixed=True)), math.pi * (1 - 1 / n)
    assert found.kind == "wave"
    top = n * math.sqrt(6 * (1 - math.cos(t)) / (2 + math.cos(t)))
    assert top * (1 - 1e-6) <= found.high <= 1.01 * top


def test_waves_on_a_square():
    ev = wave(square(4, MPI.COMM_SELF))
    kappa = dense_eigenvalues(ev)
    assert abs(kappa.real).max() < 1e-9
    found = spectrum(ev)
    assert found.kind == "wave"
    assert kappa.imag.max() * (1 - 1e-6) <= found.high <= 1.01 * kappa.imag.max()


def inside(points, boundary):
    """Whether points of the upper half plane lie under a boundary that is concave, up to 1 percent of its size."""
    order = np.argsort(boundary.real, kind="stable")
    x, size = boundary.real[order], abs(boundary).max()
    top = np.array([boundary.imag[abs(boundary.real - p.real) <= 0.01 * size].max(initial=-1) for p in points])
    return (
        (points.imag <= top + 0.01 * size) & (points.real >= x[0] - 0.01 * size) & (points.real <= x[-1] + 0.01 * size)
    )


@pytest.mark.parametrize(
    "make",
    [lambda: heat(8, advection=30.0), lambda: wave(square(4, MPI.COMM_SELF), damping=3.0)],
    ids=["advection", "damped waves"],
)
def test_general_operators(make, monkeypatch):
    """All eigenvalues where there are few, else an estimate that says so, whose hull holds them."""
    ev = make()
    kappa = dense_eigenvalues(ev)
    upper = kappa[kappa.imag >= 0]
    found = spectrum(ev)
    assert found.kind == "general"
    assert not found.estimate
    distances = abs(found.region[:, None] - upper)
    assert max(distances.min(axis=0).max(), distances.min(axis=1).max()) <= 1e-6 * abs(kappa).max()
    monkeypatch.setattr(spectrum_module, "DENSE", 0)
    estimate = spectrum(ev)
    assert "Ritz" in estimate.estimate
    assert inside(upper, estimate.sample(1.0)).all()
    judged = [mgrit_estimate(ev, dict(levels=2, coarsening=4))[0]]
    monkeypatch.undo()
    judged.append(mgrit_estimate(ev, dict(levels=2, coarsening=4))[0])
    assert judged[0].factor >= 0.9 * judged[1].factor
    assert "estimate" in str(judged[0])
    assert "not normal" in str(judged[1])


def test_a_boundary_is_a_convex_hull():
    """Corners of a rectangle above the axis, from the axis to the axis, inner points left out."""
    found = Spectrum("general", 1.0, 3.0, np.array([1 + 1j, 3 + 1j, 2 + 0.5j, 1.5 + 0j]), "by hand")
    z = found.sample(2.0)
    assert z.real.min() == 2
    assert z.real.max() == 6
    on_edge = (abs(z.imag - 2) < 1e-12) | (abs(z.real - 2) < 1e-12) | (abs(z.real - 6) < 1e-12)
    assert on_edge.all()
    assert min(abs(z - 2)) == min(abs(z - 6)) == 0


def test_no_theory():
    """Nonlinear, a mass matrix that is singular or not symmetric, unevenly spaced C-points: none. One level: nothing to
    say.
    """
    mesh = square(2, MPI.COMM_SELF)
    V = FunctionSpace(mesh, "CG", 1)
    u, v = Function(V), TestFunction(V)
    common = dict(tableau=SDIRK2(), dt=0.1, nsteps=16)
    nonlinear = Evolution(Dt(u) * v * dx + (1 + u**2) * dot(grad(u), grad(v)) * dx, u, **common)
    skewed = Evolution(Dt(u) * (v + v.dx(0)) * dx + dot(grad(u), grad(v)) * dx, u, **common)
    W = VectorFunctionSpace(mesh, "CG", 2) * V
    w, (tau, q) = Function(W), TestFunctions(W)
    s, p = split(w)
    stokes = (inner(Dt(s), tau) + inner(grad(s), grad(tau)) - p * div(tau) - q * div(s)) * dx
    for ev in (nonlinear, skewed, Evolution(stokes, w, **common)):
        assert spectrum(ev) is None
        assert mgrit_estimate(ev, dict(levels=2, coarsening=4)) is None
        assert mgrit_estimate(ev, dict(levels=1)) == []
    assert mgrit_estimate(heat(2, nsteps=16), dict(levels=2, coarsening=[(0, 3, 8, 16)])) is None


def test_one_level_computes_nothing(monkeypatch):
    monkeypatch.setattr(estimates, "spectrum", None)
    assert mgrit_estimate(heat(2), MGRITOptions(levels=1)) == []


# -- estimates of evolutions, and runs ---------------------------------------------------------------------------------
def test_estimates_are_the_bounds_over_all_eigenvalues():
    """On three levels, with another integrator on the coarse ones, weights and relaxation of their own."""
    ev = heat(8, "BE", dt=3e-3, nsteps=130)
    kappa = dense_eigenvalues(ev).real
    options = MGRITOptions(levels=3, coarsening=(4, 2), relax=("F", "FCF"), c_weight=(1.0, 1.3), rtol=1e-5)
    judged = mgrit_estimate(ev, options, SDIRK2())
    z = -ev.dt * kappa
    exact = [
        two_level_bound(stability("BE", z), stability("SDIRK2", 4 * z), 4, 32, "F"),
        two_level_bound(stability("SDIRK2", 4 * z), stability("SDIRK2", 8 * z), 2, 16, "FCF", 1.3),
    ]
    assert [(v.m, v.relax, v.weight, v.tolerance) for v in judged] == [(4, "F", 1.0, 1e-5), (2, "FCF", 1.3, 1e-5)]
    assert [v.exact_after for v in judged] == [32, 16]
    for v, bound in zip(judged, exact, strict=True):
        assert bound * (1 - 1e-3) <= v.factor <= bound * 1.1  # samples lie between eigenvalues as well


@pytest.mark.parametrize("relax", ["F", "FCF"])
@pytest.mark.parametrize("tableau", ["BE", "SDIRK2"])
def test_runs_lie_under_the_estimate(tableau, relax):
    """Observed factors of a real heat problem under the bound; enough cycles are expected, and not many times more."""
    ev = heat(8, tableau, dt=2e-3)
    options = dict(levels=2, coarsening=4, relax=relax, rtol=1e-8)
    (judged,) = mgrit_estimate(ev, options)
    assert judged.converges
    sweeps = Sweeps(ev, SpaceTime((1, 1), comm=MPI.COMM_SELF), options=options)
    result = sweeps.state(None, sweeps.new_slab())
    residuals = [r for r in result.residuals if r > 1e-12 * result.scale]
    assert len(residuals) > 2
    # the norm of the residual is not the mass norm: the factors hold in the mean, up to its constant
    assert (residuals[-1] / residuals[0]) ** (1 / (len(residuals) - 1)) <= judged.factor
    assert result.last_factor <= judged.factor
    assert result.cycles <= judged.iterations <= 3 * result.cycles


@pytest.mark.parametrize(("relax", "coarse"), [("F", ImplicitMidpoint), ("FCF", None)])
def test_midpoint_heat_is_warned_of(relax, coarse):
    """The warning names SDIRK2 with the bound that it gives, and with that it converges."""
    ev = heat(8, "SDIRK2" if coarse else "midpoint", dt=0.5)
    options = MGRITOptions(levels=2, coarsening=4, relax=relax)
    (judged,) = mgrit_estimate(ev, options, coarse and coarse())
    assert not judged.converges
    assert "stiff" in judged.warning
    assert "SDIRK2" in judged.warning
    if coarse:
        (better,) = mgrit_estimate(ev, MGRITOptions(levels=2, coarsening=4, relax="FCF"), SDIRK2())
        assert better.converges
        assert f"coarse_tableau=SDIRK2() with relax='FCF' (bound {better.factor:.2g})" in judged.warning


def test_alternatives_are_what_their_own_estimates_are():
    """Each bound that a warning may name is that of the options it names, smaller coarsening with its own steps."""
    ev, common = heat(8, "SDIRK2", dt=0.05, nsteps=24), dict(levels=2)
    pair = estimates.LevelPair(spectrum(ev), ev, 1, 24, "F", 1.0, is_first=True)
    found = pair.alternatives(ImplicitMidpoint(), 6)
    of = lambda tableau, m=6, relax="F": mgrit_estimate(ev, common | dict(coarsening=m, relax=relax), tableau)[0].factor
    assert found == pytest.approx(
        {
            "relax='FCF'": of(ImplicitMidpoint(), relax="FCF"),
            "coarse_tableau=SDIRK2()": of(SDIRK2()),
            "coarse_tableau=SDIRK2() with relax='FCF'": of(SDIRK2(), relax="FCF"),
            "coarse_tableau=BackwardEuler()": of(BackwardEuler()),
            "coarse_tableau=BackwardEuler() with relax='FCF'": of(BackwardEuler(), relax="FCF"),
            "coarsening 2": of(ImplicitMidpoint(), m=2),
        }
    )


def test_waves_are_warned_of():
    (judged,) = mgrit_estimate(wave(square(4, MPI.COMM_SELF)), dict(levels=2, coarsening=4))
    assert not judged.converges
    assert "undamped waves" in judged.warning
    assert "serial" in judged.warning
    assert judged.where.real == 0


@pytest.mark.parallel([1, 3])
def test_spectra_on_several_ranks_in_space():
    """The largest as on one rank, the smallest safe, the same estimate on every rank; nothing is gathered."""
    world = MPI.COMM_WORLD
    alone, shared = heat(12), heat(12, comm=world)
    found, reference = spectrum(shared), spectrum(alone)
    assert found.high == pytest.approx(reference.high, rel=0.01)
    assert found.low == pytest.approx(reference.low if world.size == 1 else 0, rel=1e-3)
    options = dict(levels=3, coarsening=(4, 2))
    judged = mgrit_estimate(shared, options)
    assert world.allgather(judged) == [judged] * world.size
    for a, b in zip(judged, mgrit_estimate(alone, options), strict=True):
        assert b.factor * (1 - 1e-3) <= a.factor
        assert a.factor <= 0.0116 * 1.01  # the supremum over all spectra
    mesh = lambda comm: square(6, comm)
    assert spectrum(wave(mesh(world))).high == pytest.approx(spectrum(wave(mesh(MPI.COMM_SELF))).high, rel=0.01)
    general = spectrum(heat(12, comm=world, advection=30.0))
    assert general.high == pytest.approx(spectrum(heat(12, advection=30.0)).high, rel=0.1)
    assert bool(general.estimate) == (world.size > 1)
    assert world.allgather(general.high) == [general.high] * world.size

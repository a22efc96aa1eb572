"""ParaDiag on finite elements: rates, derivatives, other solvers, options, the choice by theory."""

import numpy as np
import pytest
from firedrake import (
    DirichletBC,
    Function,
    FunctionSpace,
    SpatialCoordinate,
    TestFunction,
    dx,
    grad,
    inner,
    pi,
    sin,
    split,
)
from firedrake.adjoint import taylor_to_dict
from firedrake.petsc import PETSc
from irksome import Dt
from mpi4py import MPI

import pint_fem as pf
from pint_fem.errors import InputError
from pint_fem.mgrit import MGRITOptions
from pint_fem.paradiag import ParaDiag, ParaDiagOptions
from pint_fem.propagators import LinearPropagator
from pint_fem.sweeps.sweeps import Sweeps
from tests.cavity import cavity
from tests.heat import heat, point_and_direction
from tests.logs import logged
from tests.meshes import square

ALONE = dict(comm=MPI.COMM_SELF)


def posed_heat(st, *, n=6, **given):
    mesh = square(n, st.space_comm)
    return heat(mesh, **({"steps": 22, "dt": 0.01} | given))


def functional(evolution, st, **parameters):
    u = evolution.u
    linear = (sum(f[0] for f in split(u)[:1]) if u.ufl_shape else u) * dx
    misfits = [pf.RunningMisfit(inner(u, u) * dx + linear), pf.TerminalMisfit(5 * inner(u, u) * dx)]
    return pf.TimeParallelReducedFunctional(evolution, misfits, spacetime=st, solver_parameters=parameters)


def paradiag(**options):
    return {"time_solver": "paradiag", "paradiag": {"rtol": 1e-13} | options}


def values(rf, per_step=False):
    """J, its derivative and a Hessian action as arrays of the own values."""
    z = rf.array([c.control for c in rf.controls])
    return rf.problem.value(z), rf.problem.derivative(z), rf.problem.hessian_action(z, np.cos(np.arange(z.size)))


# -- rates -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("alpha", [0.1, 0.01])
def test_rates_without_losses_and_of_heat(alpha):
    """State and adjoint of the cavity contract by at most ``alpha/(1 - alpha)``, and nearly by that; heat, which
    forgets, much faster."""
    st = pf.SpaceTime()
    rf = functional(cavity(st.space_comm, steps=40), st, **paradiag(alpha=alpha, rtol=1e-10))
    values(rf)
    for _, result in rf.problem.sweeps.results:
        ratios = np.array(result.residuals[2:]) / result.residuals[1:-1]
        # modes are orthogonal in the mass norm, coefficients are not: up to a few percent in a single iteration
        assert ratios.max() <= 1.1 * alpha / (1 - alpha)
        assert np.exp(np.log(ratios).mean()) == pytest.approx(alpha / (1 - alpha), rel=0.1)
    heat = posed_heat(st, steps=40, dt=0.1)
    rf = functional(heat, st, **paradiag(alpha=alpha, rtol=1e-12, precision="double"))
    values(rf)
    for _, result in rf.problem.sweeps.results:
        assert result.residuals[2] <= 1e-3 * alpha * result.residuals[1]


@pytest.mark.parametrize(("n", "steps", "cfl"), [(4, 64, 1.0), (4, 256, 0.5), (8, 64, 4.0), (3, 1024, 2.0)])
def test_at_most_four_iterations_without_losses(n, steps, cfl):
    """alpha = 1e-4 to 1e-8 relative residual, whatever the number of steps, the mesh and the frequency."""
    st = pf.SpaceTime("1x1", **ALONE)
    rf = functional(cavity(st.space_comm, n=n, steps=steps, dt=cfl / n), st, time_solver="paradiag")
    assert rf.problem.sweeps.options.alpha == 1e-4
    rf.problem.derivative(rf.array(rf.controls[0].control))
    for _, result in rf.problem.sweeps.results:
        assert result.residuals[-1] <= 1e-8 * result.scale
        assert result.cycles <= 4


@pytest.mark.parametrize("tableau", ["BE", "SDIRK2", "midpoint"])
def test_heat_in_one_and_in_two_iterations(tableau):
    """alpha = 1e-7: an error below 1e-6 after one iteration, below 1e-12 after two, forwards and backwards, with
    moving boundary values."""
    st = pf.SpaceTime("1x1", **ALONE)
    ev = posed_heat(st, tableau=tableau, steps=64)
    exact, rf = (functional(ev, st, **p) for p in ({"time_solver": "serial"}, paradiag(alpha=1e-7)))
    z = rf.array(rf.controls[0].control)
    exact.problem.derivative(z)
    U, L = exact.problem.U, exact.problem.L
    gradient = sum(m.gradient(U) for m in rf.problem.misfits)
    for cycles, error in ((1, 1e-6), (2, 1e-12)):
        V, W = rf.problem.sweeps.new_slab(), rf.problem.sweeps.new_slab()
        rf.problem.sweeps.state(z, V, cold=True, cycles=cycles)
        rf.problem.sweeps.adjoint(z, U, gradient, W, cold=True, cycles=cycles)
        assert np.linalg.norm(V - U) <= error * np.linalg.norm(U)
        assert np.linalg.norm(W - L) <= error * np.linalg.norm(L)


# -- derivatives -------------------------------------------------------------------------------------------------------
@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize("kind", ["heat", "heat, a control a step", "cavity"])
def test_derivatives(kind):
    """Taylor remainders, and value, gradient and Hessian action of MGRIT and of sequential stepping."""
    st = pf.SpaceTime()
    ev = cavity(st.space_comm, n=3, steps=20, t=True) if kind == "cavity" else posed_heat(st, per_step="a " in kind)
    rf = functional(ev, st, **paradiag())
    if kind != "cavity":
        m, h = point_and_direction(rf)
        rates = taylor_to_dict(rf, m, h)
        assert min(rates["R1"]["Rate"]) > 1.95
        assert max(rates["R2"]["Residual"]) <= 1e-9 * abs(rf(m))  # J is quadratic
        assert abs(h._ad_dot(rf.derivative()) - rf.tlm(h)) <= 1e-11 * abs(rf.tlm(h))
    others = [functional(ev, st, mgrit={"levels": 1})]
    if kind != "cavity":
        others.append(functional(ev, st, mgrit={"rtol": 1e-13, "coarsening": (4, 2), "levels": 3}))
    J, g, H = values(rf)
    for other in others:
        J2, g2, H2 = values(other)
        assert J == pytest.approx(J2, rel=1e-11)
        np.testing.assert_allclose(g, g2, rtol=0, atol=1e-10 * np.abs(g2).max(initial=1e-300))
        np.testing.assert_allclose(H, H2, rtol=0, atol=1e-10 * np.abs(H2).max(initial=1e-300))


@pytest.mark.parallel([1, 3])
def test_adjoint_identity():
    """``<dU, g> = <dz, Phi_z^T L>`` to 1e-12: the solves transpose each other, the factors being shared."""
    st = pf.SpaceTime()
    for ev in (cavity(st.space_comm, n=4, steps=24), posed_heat(st)):
        rf = functional(ev, st, **paradiag(rtol=1e-15, stagnation=None, max_it=5))
        sweeps, z = rf.problem.sweeps, rf.array(rf.controls[0].control)
        rng = np.random.default_rng(3)
        g = rng.standard_normal((ev.nsteps + 1, ev.state_size))[sweeps.slab.lo : sweeps.slab.hi + 1]
        dz, dU, L = np.cos(np.arange(z.size)), sweeps.new_slab(), sweeps.new_slab()
        sweeps.tangent(z, rf.problem.U, dz, dU, cycles=5)
        sweeps.adjoint(z, rf.problem.U, g, L, cold=True, cycles=5)
        left = MPI.COMM_WORLD.allreduce(float(np.vdot(dU[1:], g[1:])))
        right = float(rf.layout.gradient(sweeps.control_gradient(z, rf.problem.U, L), L[0]) @ dz)
        assert left == pytest.approx(right, rel=1e-12)
        systems = sweeps.solvers.tangent._frequency_solve.__self__
        assert systems is sweeps.solvers.adjoint._frequency_solve.__self__
        own = len(sweeps.solvers.tangent.circulant(ev.state_size).own)
        assert systems.factorisations == systems.kept == own * ev.dirk.stages


# -- grids -------------------------------------------------------------------------------------------------------------
@pytest.mark.parallel(3)
def test_same_bits_for_every_number_of_time_ranks():
    """States, adjoints, residuals and J, on one rank in space and on two."""
    size = MPI.COMM_WORLD.size
    for space in [1, 2] if size % 2 == 0 else [1]:
        many = pf.SpaceTime((space, size // space))
        one = pf.SpaceTime((space, 1), comm=many.space_comm)
        results = []
        for st in (many, one):
            rf = functional(posed_heat(st), st, **paradiag(rtol=1e-8))
            J = rf(point_and_direction(rf)[0])
            rf.derivative()
            results.append((rf, J, [r.residuals for _, r in rf.problem.sweeps.results]))
        (a, Ja, ra), (b, Jb, rb) = results
        lo, hi = a.problem.sweeps.slab.lo, a.problem.sweeps.slab.hi
        for X, Y in ((a.problem.U, b.problem.U), (a.problem.L, b.problem.L)):
            assert np.array_equal(X, Y[lo : hi + 1])
        assert Ja == Jb
        assert ra == rb


def test_real_equivalent_of_petsc_is_the_complex_factor():
    """With PETSc options for the systems, here on one rank."""
    st = pf.SpaceTime("1x1", **ALONE)
    for ev in (cavity(st.space_comm, n=3, steps=12), posed_heat(st, n=3, steps=12)):
        results = []
        for options in ({"precision": "double"}, {"ksp_type": "preonly", "pc_type": "lu"}):
            rf = functional(ev, st, **paradiag(alpha=1e-2, rtol=1e-6, **options))
            results.append((values(rf), [r.residuals for _, r in rf.problem.sweeps.results]))
        (mine, ra), (petsc, rb) = results
        np.testing.assert_allclose(np.concatenate(ra), np.concatenate(rb), rtol=1e-6, atol=1e-12)
        for x, y in zip(mine, petsc, strict=True):
            np.testing.assert_allclose(x, y, rtol=0, atol=1e-9 * np.abs(y).max())


def test_memory_of_factors():
    """What has no room is factored at each solve, to the same bits; the rest once."""
    st, results = pf.SpaceTime("1x1", **ALONE), []
    for memory in (4.0, 5e-5):
        rf = functional(posed_heat(st), st, **paradiag(memory=memory))
        results.append(values(rf))
        systems = rf.problem.sweeps.solvers.tangent._frequency_solve.__self__
        iterations = rf.problem.sweeps.counts["cycles"]
        assert systems.bytes <= 1e9 * memory
        factored = systems.kept + (24 - systems.kept) * iterations  # 12 frequencies, two stages
        assert systems.factorisations == factored
        assert (systems.kept < 24) == (memory == 5e-5)
    assert all(np.array_equal(a, b) for a, b in zip(*results, strict=True))


# -- other uses --------------------------------------------------------------------------------------------------------
@pytest.mark.parallel([1, 3])
def test_coarsest_level_of_mgrit():
    """One alpha-circulant iteration there instead of stepping: the same solution, at most one cycle more a sweep."""
    st, results = pf.SpaceTime(), []
    for options in ({}, {"coarse_solver": "paradiag"}):
        rf = functional(posed_heat(st), st, mgrit={"coarsening": (4,), "levels": 2, "rtol": 1e-12} | options)
        results.append((values(rf), rf.problem.sweeps.counts["cycles"]))
    (a, cycles), (b, same) = results
    assert cycles <= same <= cycles + 4  # four sweeps
    for x, y in zip(a, b, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-9 * np.abs(y).max(initial=1e-300))
    assert "1 alpha-circulant iteration" in rf.problem.sweeps.solvers.view()


def test_choice_by_theory():
    """With given options of MGRIT. Heat: MGRIT. A cavity: ParaDiag. Nonlinear: MGRIT. One line each, on the first rank
    only.
    """
    st = pf.SpaceTime()
    cases = (
        (posed_heat(st, steps=64), MGRITOptions, "auto: mgrit, as MGRIT's two-level bound is 0.0"),
        (cavity(st.space_comm, n=3, steps=64), ParaDiagOptions, "ParaDiag contracts by 0.0001 (alpha 0.0001)"),
        (posed_heat(st, n=2, linear=False, steps=64), MGRITOptions, "no theory"),
        (posed_heat(st, n=2, steps=6), MGRITOptions, "auto: serial, 6 steps are too few"),
    )
    for ev, kind, words in cases:
        with logged() as lines:
            rf = functional(ev, st, time_solver="auto", mgrit={"rtol": 1e-6, "coarsening": (8, 4)})
        assert type(rf.problem.sweeps.options) is kind
        assert rf.problem.sweeps.options.rtol == 1e-6
        assert len(lines) == (MPI.COMM_WORLD.rank == 0)
        assert all(words in line for line in lines)


def test_theory_is_printed_before_the_first_solve(log_lines):
    """With a monitor; modes that grow beyond ``1/alpha`` warn in any case."""
    st = pf.SpaceTime("1x1", **ALONE)
    rf = functional(cavity(st.space_comm, n=3, steps=8), st, **paradiag(monitor=True))
    rf(rf.controls[0].control)
    assert log_lines[0].startswith("theory: an iteration of ParaDiag contracts by 0.0001")


def test_options_from_the_database():
    """PETSc's on top of the dictionary's; those of its own solvers are left to the shifted systems."""
    given = {"paradiag_alpha": "1e-2", "paradiag_rtol": "1e-5", "paradiag_pc_type": "lu"}
    database = PETSc.Options()
    for name, value in given.items():
        database[name] = value
    try:
        st = pf.SpaceTime("1x1", **ALONE)
        rf = functional(posed_heat(st, n=2), st, **paradiag(alpha=1e-6, max_it=9))
    finally:
        for name in given:
            database.delValue(name)
    options = rf.problem.sweeps.options
    assert (options.alpha, options.rtol, options.max_it) == (1e-2, 1e-5, 9)
    assert "ParaDiag" in rf.problem.sweeps.solvers.view()
    assert "alpha 0.01" in rf.problem.sweeps.solvers.view()


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (dict(time_solver="fft"), "give one of 'mgrit', 'paradiag', 'serial', 'auto'"),
        (paradiag(alpha=2), "paradiag alpha 2"),
        (paradiag(alhpa=2), "did you mean 'alpha'"),
        (dict(paradiag=3), "give a dictionary"),
        (paradiag() | dict(krylov={}), "krylov accelerates MGRIT"),
    ],
)
def test_bad_options(parameters, message):
    st = pf.SpaceTime("1x1", **ALONE)
    with pytest.raises(InputError, match=message):
        functional(posed_heat(st, n=2), st, **parameters)


@pytest.mark.parallel(3)
def test_optimisation():
    """Trust region with exact and with inexact solves, and one iteration between updates: MGRIT's minimiser."""
    st = pf.SpaceTime()
    u = (ev := posed_heat(st, n=4)).u
    misfit, q = pf.RunningMisfit((u - 0.3) ** 2 * dx), ev.control
    minima = []
    for parameters, options in (
        ({"mgrit": {"rtol": 1e-10}}, {}),
        (paradiag(rtol=1e-10), {}),
        (paradiag(rtol=1e-10), {"inexact": True}),
    ):
        rf = pf.TimeParallelReducedFunctional(
            ev, misfit, regularisation=1e-3 * q**2 * dx, spacetime=st, solver_parameters=parameters
        )
        minima.append(rf.minimize_trust_region(gtol_rel=1e-7, **options).x)
    for x in minima[1:]:
        np.testing.assert_allclose(x, minima[0], rtol=0, atol=1e-5 * np.abs(minima[0]).max())


@pytest.mark.parallel(3)
@pytest.mark.parametrize("kind", ["nonlinear", "moving coefficient"])
def test_averaged_operators(kind):
    """Nonlinear evolutions and coefficients that move in time: J, gradient and Hessian action of sequential stepping;
    it contracts by about the deviation from the average, faster where that is small, and warm solves keep the
    factors."""
    st, rates = pf.SpaceTime(), []
    for size in (1.0, 0.01):
        mesh = square(3, st.space_comm)
        V = FunctionSpace(mesh, "CG", 1)
        u, v, q, t = Function(V), TestFunction(V), Function(V), pf.time_function(mesh)
        x, y = SpatialCoordinate(mesh)
        kappa = 1 + size * (u**2 if kind == "nonlinear" else 0.5 * sin(8 * t))
        F = Dt(u) * v * dx + kappa * inner(grad(u), grad(v)) * dx - q * v * dx
        u.interpolate(sin(pi * x) * y)
        q.interpolate(5 + x)
        ev = pf.Evolution(F, u, tableau=pf.SDIRK2(), dt=0.02, nsteps=12, control=q, t=t, bcs=DirichletBC(V, 0, (1, 2)))
        exact = values(functional(ev, st, time_solver="serial"))
        rf = functional(ev, st, **paradiag(rtol=1e-12, max_it=40))
        assert rf.problem.sweeps.solvers.transposed_adjoint is None  # iterations are not those of one linear map
        for mine, reference in zip(values(rf), exact, strict=True):
            np.testing.assert_allclose(mine, reference, rtol=0, atol=1e-9 * np.abs(reference).max(initial=1e-300))
        kinds = {kind: result for kind, result in rf.problem.sweeps.results}
        rates.append(kinds["adjoint"].factor)
        before = rf.problem.sweeps.solvers.averaged.updates
        z = rf.array(rf.controls[0].control)
        rf.problem.derivative(1.001 * z)
        assert rf.problem.sweeps.solvers.averaged.updates == before
    assert rates[0] < 0.4
    assert rates[1] < 0.05 * rates[0] + 2e-3


def test_what_sweeps_are_made_of():
    """The solvers are ParaDiag on the linear propagator; a factory that is none is refused."""
    st = pf.SpaceTime("1x1", **ALONE)
    ev = posed_heat(st, n=2)
    sweeps = Sweeps(ev, st, time_solver="paradiag")
    assert isinstance(sweeps.solvers.adjoint, ParaDiag)
    assert isinstance(sweeps.propagators[0], LinearPropagator)

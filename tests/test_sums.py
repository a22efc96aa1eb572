"""Sums and multiples of functionals, and several evolutions that share controls, against one tape of all of them."""

import firedrake as fd
import numpy as np
import pytest
from firedrake import Function, FunctionSpace, TestFunction, assemble, dx, exp, grad, inner, solve
from firedrake.adjoint import Control, ReducedFunctional, minimize, taylor_to_dict
from irksome import Dt
from mpi4py import MPI

import pint_fem as pf
from pint_fem.errors import InputError
from pint_fem.kernels.arrays import get
from pint_fem.propagators.tape import recording
from tests.limits import time_limit
from tests.meshes import square
from tests.ranks import cases

on_grids = pytest.mark.parametrize("grid", cases(["time"], on_ranks=["time", "space"]))


def grid_of(name):
    size = MPI.COMM_WORLD.size
    return pf.SpaceTime((1, size) if name == "time" else (size, 1))


class Experiments:
    """Two heat experiments with an unknown source q and conductivity exp(k): other starts, steps and data."""

    def __init__(self, st, *, levels=1, linear=False):
        mesh = square(3, st.space_comm)
        self.st, self.V = st, FunctionSpace(mesh, "CG", 1)
        self.x = fd.SpatialCoordinate(mesh)
        R = FunctionSpace(mesh, "R", 0)
        self.q, self.k = Function(self.V, name="q").interpolate(self.x[0]), Function(R, name="k").assign(0.2)
        self.wind = Function(R, name="wind").assign(0.5)  # of the second experiment only
        self.linear = linear
        self.solver = {"mgrit": {"levels": levels, "rtol": 1e-12} | ({"coarsening": 2} if levels > 1 else {})}
        self.bcs = lambda: fd.DirichletBC(self.V, 0, (1, 2))
        self.steps = [(6, 1 / 12), (4, 1 / 6)]

    def residual(self, i, u, v, q, k, wind):
        kappa = 1 if self.linear else exp(k) * (1 + u**2)
        F = (kappa * inner(grad(u), grad(v)) - q * v) * dx(degree=4)
        return F + (wind * u.dx(1) * v if i else k * v) * dx(degree=4)

    def start(self, i):
        return Function(self.V).interpolate(self.x[i] * (1 - self.x[0]))

    def misfit(self, i, u):
        return (u - 0.1 * self.x[1 - i]) ** 2 * dx(degree=4)

    def prior(self, q, k):
        return (1e-2 * q**2 + 1e-2 * k**2) * dx(degree=4)

    def evolution(self, i, controls=None):
        u, v = Function(self.V).assign(self.start(i)), TestFunction(self.V)
        N, dt = self.steps[i]
        wind = self.wind if not self.linear else fd.Constant(0.5)
        F = Dt(u) * v * dx(degree=4) + self.residual(i, u, v, self.q, self.k, wind)
        controls = controls or ([self.q, self.k], [self.q, *([] if self.linear else [self.k, self.wind])])[i]
        return pf.Evolution(F, u, tableau=pf.BackwardEuler(), dt=dt, nsteps=N, control=controls, bcs=self.bcs())

    def functional(self, i, **options):
        ev = self.evolution(i)
        misfit = pf.RunningMisfit(self.misfit(i, ev.u)) if i == 0 else pf.TerminalMisfit(self.misfit(i, ev.u))
        options = {"spacetime": self.st, "solver_parameters": self.solver} | options
        return pf.TimeParallelReducedFunctional(ev, misfit, **options)

    def tape(self, weights):
        """Both experiments by backward Euler, as one functional of serial pyadjoint."""
        controls = [Function(f.function_space()).assign(f) for f in (self.q, self.k, self.wind)]
        q, k, wind = controls
        with recording() as tape:
            J = assemble(self.prior(q, k))
            for i, weight in enumerate(weights):
                N, dt = self.steps[i]
                u, old, v = Function(self.V), self.start(i), TestFunction(self.V)
                u.assign(old)
                for _ in range(N):
                    F = (u - old) / dt * v * dx(degree=4) + self.residual(i, u, v, q, k, wind)
                    solve(F == 0, u, bcs=self.bcs(), solver_parameters={"snes_atol": 1e-14, "snes_rtol": 1e-14})
                    old = Function(self.V).assign(u)
                    if i == 0:
                        J += weight * dt * assemble(self.misfit(i, u))
                J += 0 if i == 0 else weight * assemble(self.misfit(i, u))
            theirs = ReducedFunctional(J, [Control(c) for c in controls], tape=tape)
        return theirs, controls


def point(posed, seed=0):
    """Values of q, k and the wind, and a direction, the same on any number of ranks."""
    x = posed.x
    values = [
        Function(posed.V).interpolate(fd.sin(3 * x[0] + seed) + x[1]),
        *(Function(posed.k.function_space()).assign(v) for v in (0.3, 0.8)),
    ]
    direction = [
        Function(posed.V).interpolate(fd.cos(2 * x[1] + seed)),
        *(Function(posed.k.function_space()).assign(v) for v in (0.7, -0.4)),
    ]
    return values, direction


@pytest.mark.slow_on_ranks
@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize(
    ("grid", "way"),
    cases(
        [("time", "sum"), ("time", "several evolutions")], on_ranks=[("time", "sum"), ("space", "several evolutions")]
    ),
)
@time_limit(120)
def test_value_and_derivatives_are_those_of_one_tape(grid, way):
    """J1 + 2 J2 with q and k in both and the wind in one: J, gradient, tangent and Hessian action of serial
    pyadjoint's tape of both loops.
    """
    posed = Experiments(grid_of(grid), levels=2 if grid == "time" else 1)
    if way == "sum":
        J = posed.functional(0, regularisation=posed.prior(posed.q, posed.k)) + 2 * posed.functional(1)
        weights = (1.0, 2.0)
    else:
        evs = [posed.evolution(i) for i in (0, 1)]
        misfits = [pf.RunningMisfit(posed.misfit(0, evs[0].u)), [pf.TerminalMisfit(posed.misfit(1, evs[1].u))]]
        J = pf.TimeParallelReducedFunctional(
            evs, misfits, regularisation=posed.prior(posed.q, posed.k), spacetime=posed.st,
            solver_parameters=posed.solver,
        )  # fmt: skip
        weights = (1.0, 1.0)
    z, dz = point(posed)
    theirs, _ = posed.tape(weights)
    assert J(z) == pytest.approx(theirs(z), rel=1e-9)
    mine, other = J.derivative(), theirs.derivative()
    for a, b in zip(mine, other, strict=True):
        np.testing.assert_allclose(get(a), get(b), rtol=1e-7, atol=1e-9)
    slope = sum(float(a @ b) for a, b in zip(map(get, mine), map(get, dz), strict=True))
    slope = posed.st.space_comm.allreduce(slope)
    assert J.tlm(dz) == pytest.approx(slope, rel=1e-9)
    for a, b in zip(J.hessian(dz), theirs.hessian(dz), strict=True):
        np.testing.assert_allclose(get(a), get(b), rtol=1e-6, atol=1e-8)


@time_limit(60)
def test_arithmetic():
    """Values and gradients of combinations are those combinations of values and gradients."""
    posed = Experiments(grid_of("time"))
    J1, J2 = posed.functional(0), posed.functional(1)
    z, _ = point(posed)
    one, two = J1(z[:2]), J2(z)
    for J, value in (
        (2 * J1, 2 * one), (J1 * np.float64(3), 3 * one), (np.float64(3) * J1, 3 * one), (-J1, -one),
        (J1 / 4, one / 4), (J1 - J1, 0.0), (J1 + J1, 2 * one),
    ):  # fmt: skip
        assert J(z[:2]) == pytest.approx(value, rel=1e-12, abs=1e-14)
    for J, value in ((J1 - 0.5 * J2, one - 0.5 * two), (sum([J1, J2]), one + two), (2 * (J1 + J2) / 2, one + two)):
        assert J(z) == pytest.approx(value, rel=1e-12)
        g1, g2 = [get(g) for g in J1.derivative()], [get(g) for g in J2.derivative()]
        weight = -0.5 if value < one else 1.0
        np.testing.assert_allclose(get(J.derivative()[0]), g1[0] + weight * g2[0], atol=1e-12)
        np.testing.assert_allclose(get(J.derivative()[2]), weight * g2[2], atol=1e-12)
    assert [c.control.name() for c in (J1 + J2).controls] == ["q", "k", "wind"]
    for wrong in (lambda: J1 + 1.0, lambda: J1 * J2, lambda: J1 + "J2"):
        with pytest.raises(TypeError, match=r"unsupported operand|finite numbers|functional"):
            wrong()


@pytest.mark.slow_on_ranks
@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize("grid", cases(["time"], on_ranks=["space"]))
@time_limit(120)
def test_minimisers_find_the_minimum_of_the_tape(grid):
    """Linear experiments: the trust region, one-shot, scipy's and pyadjoint's minimisers end at one J, whose gradient
    on the tape is small.
    """
    posed = Experiments(grid_of(grid), linear=True)
    J = posed.functional(0, regularisation=posed.prior(posed.q, posed.k)) + posed.functional(1)
    assert J.problem.is_quadratic
    result = J.minimize_trust_region(gtol_rel=1e-9)
    assert result.converged
    found = J.function(result.x)
    best = J(found)
    theirs, _ = posed.tape((1.0, 1.0))
    wind = Function(posed.k.function_space()).assign(0.5)
    assert theirs([*found, wind]) == pytest.approx(best, rel=1e-8)
    slopes = [np.abs(get(g)).max(initial=0) for g in theirs.derivative()[:2]]
    assert posed.st.comm.allreduce(max(slopes), op=MPI.MAX) < 1e-8
    start = [Function(posed.V).interpolate(posed.x[0]), Function(posed.k.function_space()).assign(0.2)]
    one_shot = J.minimize_one_shot(start, gtol_rel=1e-6)
    assert J(J.function(one_shot.x)) == pytest.approx(best, rel=1e-8)
    assert J(J.function(J.minimize_scipy(start, "L-BFGS-B").x)) == pytest.approx(best, rel=1e-6)
    assert J(minimize(J, options={"ftol": 1e-14, "gtol": 1e-9})) == pytest.approx(best, rel=1e-6)
    bounded = J.minimize_trust_region(start, bounds=([None, 0.3], [0.5, None]), gtol_rel=1e-8)
    assert bounded.converged
    q, k = J.function(bounded.x)
    assert float(k) == 0.3
    assert q.dat.data_ro.max(initial=0.5) <= 0.5
    assert bounded.value > best


@time_limit(60)
def test_a_control_with_a_value_a_step_is_shared():
    """The gradient of the sum in each step, by central differences of J."""
    st = grid_of("time")
    mesh = square(2, st.space_comm)
    V, R = FunctionSpace(mesh, "CG", 1), FunctionSpace(mesh, "R", 0)
    a = Function(R, name="a").assign(0.5)

    def functional(load, steps=4, dt=0.1, per_step=True):
        u, v = Function(V), TestFunction(V)
        F = (Dt(u) * v + inner(grad(u), grad(v)) - a**2 * load * v) * dx
        ev = pf.Evolution(F, u, tableau=pf.BackwardEuler(), dt=dt, nsteps=steps, control=a, per_step=per_step)
        return pf.TimeParallelReducedFunctional(
            ev, pf.RunningMisfit((u - 1) ** 2 * dx), spacetime=st, solver_parameters={"time_solver": "serial"}
        )

    x = fd.SpatialCoordinate(mesh)
    J = functional(x[0]) + 3 * functional(x[1])
    z = np.array([0.3, 0.5, 0.2, 0.9])
    assert J.problem.layout.size == 4
    g = J.problem.derivative(z)
    for i in range(4):
        e = 1e-5 * np.eye(4)[i]
        assert g[i] == pytest.approx((J.problem.value(z + e) - J.problem.value(z - e)) / 2e-5, rel=1e-6)
    assert min(taylor_to_dict(J, J.function(z), J.function(np.ones(4)))["R1"]["Rate"]) > 1.9
    for other in (functional(x[0], steps=5), functional(x[0], dt=0.2)):
        with pytest.raises(InputError, match="different steps"):
            J + other
    with pytest.raises(InputError, match="'a' is static in one evolution"):
        J + functional(x[0], per_step=False)


@pytest.mark.parallel([1, 3])
@time_limit(120)
def test_inexact_solves_and_checkpoints_of_sums(tmp_path):
    """The minimiser of exact solves; a run that was interrupted takes the iterations of one that was not."""
    posed, path = Experiments(grid_of("time"), levels=2, linear=True), MPI.COMM_WORLD.bcast(f"{tmp_path}/sum.h5")
    J1, J2 = (posed.functional(i, regularisation=posed.prior(posed.q, posed.k) if i == 0 else None) for i in (0, 1))
    J, start = J1 + 2 * J2, [posed.q, posed.k]
    exact = J.minimize_trust_region(start, gtol_rel=1e-8)
    inexact = J.minimize_trust_region(start, gtol_rel=1e-8, inexact=True)
    assert inexact.converged
    assert inexact.value == pytest.approx(exact.value, rel=1e-9)
    options = dict(cg_max_it=2, gtol_rel=1e-12, inexact=True)
    J.problem.invalidate()
    whole = J.minimize_trust_region(start, max_it=4, **options)
    for most in (2, 4):
        J.problem.invalidate()
        result = J.minimize_trust_region(start, max_it=most, checkpoint=path, **options)
    assert result.iterations == whole.iterations == 4
    assert result.value == pytest.approx(whole.value, rel=1e-10)
    with pytest.raises(InputError, match="weights"):
        (J1 + 3 * J2).minimize_trust_region(start, max_it=4, checkpoint=path, **options)


@pytest.mark.parallel([1, 3])
@time_limit(60)
def test_what_sums_refuse():
    """By name: functionals on other grids, forms that do not belong to one evolution."""
    posed = Experiments(grid_of("time"))
    J = posed.functional(0) + posed.functional(1)
    with pytest.raises(InputError, match="finite numbers"):
        np.inf * J
    evs = [posed.evolution(0), posed.evolution(1)]
    misfits = [pf.RunningMisfit(posed.misfit(i, ev.u)) for i, ev in enumerate(evs)]
    make = lambda *args, **options: pf.TimeParallelReducedFunctional(*args, spacetime=posed.st, **options)
    with pytest.raises(InputError, match="a list with 2 entries"):
        make(evs, misfits[0])
    with pytest.raises(InputError, match="give an Evolution or a list"):
        make([], [])
    k_and_wind = posed.evolution(0, [posed.k]), posed.evolution(1, [posed.wind])
    with pytest.raises(InputError, match="no evolution has all of"):
        make(k_and_wind, misfits, regularisation=posed.k * posed.wind * dx)
    if MPI.COMM_WORLD.size == 3:
        other = Experiments(pf.SpaceTime("3x1"))
        with pytest.raises(InputError, match=r"process grids \(1, 3\) and \(3, 1\)"):
            posed.functional(0) + other.functional(0)
    assert str(J.memory())


@pytest.mark.parallel([1, 3])
@on_grids
@time_limit(120)
def test_bounds_and_an_integral_constraint_together(grid):
    """First-order conditions at what is found: q no less than its bound exactly, its integral as given, and J' a
    multiple of the integral's derivative between the bounds, no smaller on them.
    """
    posed = Experiments(grid_of(grid), linear=True)
    J = posed.functional(0, regularisation=posed.prior(posed.q, posed.k))
    least, total = 0.1, 0.15
    result = J.minimize_trust_region(bounds=([least, None], None), constraints=[(posed.q * dx, total)], gtol_rel=1e-8)
    assert result.converged
    q, k = J.function(result.x)
    assert assemble(q * dx) == pytest.approx(total, abs=1e-7)
    assert J([q, k]) == pytest.approx(result.value, rel=1e-8)
    slope, _ = J.derivative()
    weight = get(assemble(TestFunction(posed.V) * dx))
    values, prices = get(q), get(slope) / weight
    comm = posed.st.space_comm
    values, prices = (np.concatenate(comm.allgather(a)) for a in (values, prices))
    assert (values >= least).all()
    assert 1 <= (values == least).sum() < len(values) - 2
    price = prices[values > least].mean()
    scale = np.abs(prices).max()
    np.testing.assert_allclose(prices[values > least], price, atol=1e-4 * scale)
    assert (prices[values == least] >= price - 1e-4 * scale).all()
    with pytest.raises(ValueError, match="within the bounds, and never"):
        J.minimize_trust_region(bounds=([least, None], None), constraints=[(posed.q * dx, -1.0)])


@on_grids
@time_limit(60)
def test_what_is_a_control_of_one_evolution_and_data_of_another_is_refused(grid):
    """In a residual, as an initial condition, in its expression, in a misfit and in a regularisation; with a copy of
    the control, whose value stays, the sum has that of its terms.
    """
    posed = Experiments(grid_of(grid), linear=True)
    q, m = posed.q, Function(posed.V, name="m").assign(1.0)

    def heat(source, control, initial):
        u, v = Function(posed.V), TestFunction(posed.V)
        F = (Dt(u) * v + inner(grad(u), grad(v)) - source * v) * dx
        return pf.Evolution(
            F, u, tableau=pf.BackwardEuler(), dt=0.1, nsteps=4, control=control, initial=initial, bcs=posed.bcs()
        )

    def of(ev, target=0, **options):
        misfit = pf.TerminalMisfit((ev.u - target) ** 2 * dx)
        return pf.TimeParallelReducedFunctional(
            ev, misfit, spacetime=posed.st, solver_parameters=posed.solver, **options
        )

    zero = Function(posed.V)
    first = heat(q, q, zero)
    J = of(first)
    for other in (
        of(heat(q * m, m, zero)),
        of(heat(m, m, q)),
        of(heat(m, m, 2 * q)),
        of(heat(m, m, zero), q),
        of(heat(m, m, zero), regularisation=(q - m) ** 2 * dx),
    ):
        for terms in ((J, other), (other, J), (2 * other, J)):
            with pytest.raises(InputError, match="'q' is a control of one evolution and data of another"):
                terms[0] + terms[1]
    second = heat(q * m, m, zero)
    with pytest.raises(InputError, match="'q' is a control of one evolution and data of another"):
        pf.TimeParallelReducedFunctional(
            [first, second], [pf.TerminalMisfit(ev.u**2 * dx) for ev in (first, second)], spacetime=posed.st,
            solver_parameters=posed.solver,
        )  # fmt: skip
    apart = of(heat(q.copy(deepcopy=True) * m, m, zero))
    assert float((J + apart)([q, m])) == pytest.approx(float(J(q)) + float(apart(m)), rel=1e-12)


@pytest.mark.parallel([1, 3])
@on_grids
@time_limit(60)
def test_the_constant_part_of_a_constraint_counts(grid):
    """The integral of ``3 q - d`` is as given with ``d`` of integral 1/2, for one ``q``, also within bounds, and for
    one in each of four steps of 1/8, where it is summed with these; what moves is no such functional.
    """
    st = grid_of(grid)
    mesh = square(3, st.space_comm)
    V, t = FunctionSpace(mesh, "CG", 1), pf.time_function(mesh)
    d = Function(V, name="d").interpolate(fd.SpatialCoordinate(mesh)[0])
    for per_step in (False, True):
        q, u, v = Function(V, name="q"), Function(V, name="u"), TestFunction(V)
        F = (Dt(u) * v + inner(grad(u), grad(v)) - q * v) * dx
        options = {"tableau": pf.BackwardEuler(), "dt": 0.125, "nsteps": 4, "control": q, "per_step": per_step, "t": t}
        J = pf.TimeParallelReducedFunctional(
            pf.Evolution(F, u, **options), pf.TerminalMisfit((u - 2) ** 2 * dx), regularisation=0.1 * q**2 * dx,
            spacetime=st, solver_parameters={"mgrit": {"levels": 1, "rtol": 1e-12}},
        )  # fmt: skip
        constraints = [((3 * q - d) * dx, 0.7)]
        for more in ({}, {"bounds": (-9, 9)}) if not per_step else ({},):
            found = J.function(J.minimize_trust_region(constraints=constraints, gtol_rel=1e-8, **more).x)
            if per_step:
                total = st.time_comm.allreduce(sum(0.125 * assemble(f * dx) for f in found.subfunctions))
                assert total == pytest.approx((0.7 + 0.5 * 0.5) / 3, rel=1e-7)
            else:
                assert assemble(found * dx) == pytest.approx((0.7 + 0.5) / 3, rel=1e-7)
        for wrong in ([(t * q * dx, 1.0)], [((q - u) * dx, 1.0)]):
            with pytest.raises(InputError, match="state u or the time t"):
                J.minimize_trust_region(constraints=wrong)
        with pytest.raises(InputError, match="a list of pairs"):
            J.minimize_trust_region(constraints=(q * dx, 1.0))

"""Readings of averages, fluxes and other linear functionals: against plain Firedrake, and serial pyadjoint."""

import numpy as np
import pytest
from firedrake import (
    COMM_SELF,
    COMM_WORLD,
    Constant,
    DirichletBC,
    FacetNormal,
    Function,
    FunctionSpace,
    RelabeledMesh,
    SpatialCoordinate,
    TestFunction,
    assemble,
    avg,
    conditional,
    derivative,
    dot,
    dS,
    ds,
    dx,
    exp,
    grad,
    inner,
    lt,
    solve,
    split,
)
from firedrake.adjoint import Control, ReducedFunctional
from irksome import Dt

import pint_fem as pf
from pint_fem.collective import on_first_rank
from pint_fem.errors import InputError
from pint_fem.kernels.arrays import get
from pint_fem.misfits.functional_rows import FunctionalRows
from pint_fem.propagators.tape import recording
from tests.heat import heat, point_and_direction
from tests.meshes import square
from tests.taylor import check_orders

STEPS, DT = 6, 0.02
TIMES = DT * np.array([0.0, 0.4, 2.0, 3.7, 6.0])
POINT, THETA = np.array([1, 1, 2, 4, 6]), np.array([0.0, 0.4, 1.0, 0.7, 1.0])
"""The point at the end of the step of each reading time, and its share."""
SERIAL = {"time_solver": "serial"}
EXACT = {"snes_type": "ksponly", "ksp_type": "preonly", "pc_type": "lu"}


class Heat:
    """Heat with a source, a region and a flux through a wall of fixed temperature."""

    def __init__(self, comm):
        self.mesh = square(6, comm)
        inside = Function(FunctionSpace(self.mesh, "DG", 0))
        x, y = SpatialCoordinate(self.mesh)
        inside.interpolate(conditional(lt(x + y, 0.8), 1.0, 0.0))
        self.mesh = RelabeledMesh(self.mesh, [inside], [7])
        self.x, self.y = SpatialCoordinate(self.mesh)
        self.pose()

    def pose(self):
        mesh = self.mesh
        self.V = self.Q = FunctionSpace(mesh, "CG", 1)
        self.kappa, self.u = Constant(0.7), Function(self.V)
        self.u.interpolate(self.x * self.y)
        self.bcs = [DirichletBC(self.V, self.x + 0.2, 2)]

    def residual(self, rate, u, q):
        v = TestFunction(self.V)
        return (rate[0] * v + self.kappa * dot(grad(u), grad(v)) - (1 + 5 * self.x) * q * v) * dx

    def functionals(self, u):
        x, y, n = self.x, self.y, FacetNormal(self.mesh)
        area = assemble(Constant(1.0) * dx(7, domain=self.mesh))
        return [
            u / area * dx(7),
            -self.kappa * dot(grad(u), n) * ds(2),
            avg(x * u) * dS,
            conditional(lt(x, 0.5), u, 0) * dx + 2 * u * y * ds(3),
        ]


class Waves(Heat):
    """A mixed state: a displacement and its rate."""

    def pose(self):
        self.Q = FunctionSpace(self.mesh, "CG", 1)
        self.V = self.Q * self.Q
        self.kappa, self.u = Constant(0.7), Function(self.V)
        self.u.subfunctions[0].interpolate(self.x * self.y)
        self.bcs = [DirichletBC(self.V.sub(1), 0.3, 2)]

    def residual(self, rate, u, q):
        r, v = split(TestFunction(self.V))
        w, p = split(u)
        return ((rate[0] - p) * r + rate[1] * v + self.kappa * inner(grad(w), grad(v)) - q * v) * dx

    def functionals(self, u):
        w, p = split(u)
        n = FacetNormal(self.mesh)
        return [w * dx(7), -self.kappa * dot(grad(w), n) * ds(2), p * dx + w * ds(1), self.x * u[1] * ds]


PROBLEMS = {"heat": Heat, "waves": Waves}
DATA = np.random.default_rng(1).standard_normal((5, 4))
MISSING = np.zeros((5, 4), dtype=bool)
MISSING[2, 1], MISSING[:3, 3] = True, True
WEIGHTS = np.random.default_rng(2).uniform(0.5, 2, (5, 4))


def parts_of(u):
    """The fields of a state, by itself where there is one."""
    return split(u) if len(u.function_space()) > 1 else [u]


def functional(posed, st, *, solver=SERIAL, values=None):
    q = Function(posed.Q, name="q")
    F = posed.residual([Dt(part) for part in parts_of(posed.u)], posed.u, q)
    ev = pf.Evolution(F, posed.u, tableau=pf.BackwardEuler(), dt=DT, nsteps=STEPS, control=q, bcs=posed.bcs)
    values = np.ma.MaskedArray(DATA, MISSING) if values is None else values
    observations = pf.LinearObservations(posed.functionals(posed.u), TIMES, values, weight=WEIGHTS)
    return pf.TimeParallelReducedFunctional(ev, observations, spacetime=st, solver_parameters=solver)


def stepped(posed, q):
    """Values of the functionals at all points, by a loop over the steps."""
    old, u = Function(posed.V).assign(posed.u), Function(posed.V)
    parts = [(a - b) / DT for a, b in zip(parts_of(u), parts_of(old), strict=True)]
    out = [[assemble(f) for f in posed.functionals(old)]]
    for _ in range(STEPS):
        solve(posed.residual(parts, u, q) == 0, u, bcs=posed.bcs, solver_parameters=EXACT)
        out.append([assemble(f) for f in posed.functionals(u)])
        old.assign(u)
    return out


def source(posed, which=0):
    x, y = posed.x, posed.y
    return Function(posed.Q).interpolate([1 + x + 3 * y**2, x * y - 0.3, (x - y) ** 2][which])


def by_pyadjoint(kind):
    """J, its derivatives along two directions, and the functionals' values at all points, on one rank."""
    serial = PROBLEMS[kind](COMM_SELF)
    q = source(serial)
    with recording() as tape:
        y, J = stepped(serial, q), 0.0
        for r, (n, theta) in enumerate(zip(POINT, THETA, strict=True)):
            for s in np.flatnonzero(~MISSING[r]):
                predicted = theta * y[n][s] + (1 - theta) * y[n - 1][s]
                J += 0.5 * WEIGHTS[r, s] * (predicted - DATA[r, s]) ** 2
        gradient = get(ReducedFunctional(J, Control(q), tape=tape).derivative(apply_riesz=False))
    slopes = [float(gradient @ get(source(serial, i))) for i in (1, 2)]
    return float(J), slopes, np.array([[float(value) for value in row] for row in y])


@pytest.mark.parallel([1, 2, 3])
@pytest.mark.parametrize("kind", PROBLEMS)
def test_value_gradient_and_predictions_are_those_of_serial_pyadjoint(kind):
    """On one rank, three in time and two in space."""
    st = pf.SpaceTime("2x1" if COMM_WORLD.size == 2 else None)
    J, slopes, y = on_first_rank(COMM_WORLD, "pyadjoint", by_pyadjoint, kind)
    posed = PROBLEMS[kind](st.space_comm)
    rf = functional(posed, st, solver={"mgrit": {"coarsening": 2, "rtol": 1e-13}})
    z, dz, dw = (rf.array(source(posed, i)) for i in range(3))
    p = rf.problem
    assert p.value(z) == pytest.approx(J, rel=1e-10)
    for d, slope in zip((dz, dw), slopes, strict=True):
        assert rf.layout.pairing(p.derivative(z), d) == pytest.approx(slope, rel=1e-9)
        assert p.tangent_value(z, d) == pytest.approx(slope, rel=1e-9)
    (observations,) = p.misfits
    expected = THETA[:, None] * y[POINT] + (1 - THETA)[:, None] * y[POINT - 1]
    found = observations.predicted(p.observations(z, observations))
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)
    # second derivatives: symmetric, and of several directions at once those of each
    actions = p.hessian_actions(z, [dz, dw])
    for action, d in zip(actions, (dz, dw), strict=True):
        np.testing.assert_allclose(action, p.hessian_action(z, d), rtol=0, atol=1e-11 * np.abs(action).max())
    both = [rf.layout.pairing(action, d) for action, d in zip(actions, (dw, dz), strict=True)]
    assert both[0] == pytest.approx(both[1], rel=1e-10)


@pytest.mark.parallel([1, 2])
@pytest.mark.parametrize("kind", PROBLEMS)
def test_impulses_are_the_derivatives_of_the_functionals(kind):
    """Assembled by Firedrake with a test function; entries that boundary conditions fix are included."""
    st = pf.SpaceTime((COMM_WORLD.size, 1))
    posed = PROBLEMS[kind](st.space_comm)
    rf = functional(posed, st)
    (observations,) = rf.problem.misfits
    assert observations.sensors == 4
    expected = [get(assemble(derivative(f, posed.u, TestFunction(posed.V)))) for f in posed.functionals(posed.u)]
    np.testing.assert_allclose(observations.impulses([3, 0, 1, 2]), np.roll(expected, 1, axis=0), rtol=0, atol=1e-14)
    np.testing.assert_array_equal(observations.present, ~MISSING)
    n, theta = observations.points_and_shares()
    np.testing.assert_array_equal(n, POINT)
    np.testing.assert_allclose(theta, THETA, rtol=0, atol=1e-12)
    assert rf.memory().arrays() > 0


@pytest.mark.parallel(3)
@pytest.mark.parametrize("kind", PROBLEMS)
def test_bits_do_not_depend_on_the_number_of_time_ranks(kind):
    states = np.random.default_rng(0).standard_normal((STEPS + 1, PROBLEMS[kind](COMM_SELF).V.dim()))
    found = []
    for st in (pf.SpaceTime("1x3"), pf.SpaceTime("1x1", comm=COMM_SELF)):
        (misfit,) = functional(PROBLEMS[kind](st.space_comm), st).problem.misfits
        slab = misfit.slab
        U = states[slab.lo : slab.hi + 1]
        last = slab.k + slab.is_last
        found.append((slab, misfit.values(U), misfit.gradient(U)[:last], misfit.readings(misfit.read(U))))
    (own, *three), (_, *one) = found
    np.testing.assert_array_equal(three[0], one[0][own.lo : own.hi])
    np.testing.assert_array_equal(three[1], one[1][own.lo : own.lo + len(three[1])])
    np.testing.assert_array_equal(three[2], one[2])


def test_taylor_orders():
    """In a nonlinear problem, where no remainder vanishes."""
    st = pf.SpaceTime("1x1", comm=COMM_SELF)
    ev = heat(square(4, COMM_SELF), linear=False, steps=4, dt=0.05)
    n = FacetNormal(ev.V.mesh())
    observations = pf.LinearObservations([ev.u * dx, dot(grad(ev.u), n) * ds(2)], [0.07, 0.2], np.ones((2, 2)))
    rf = pf.TimeParallelReducedFunctional(ev, observations, spacetime=st, solver_parameters=SERIAL)
    check_orders(rf, *point_and_direction(rf))


@pytest.mark.filterwarnings("ignore:changed after the functional was made")
def test_data_are_read_again_when_told():
    """Coefficients of the functionals, readings, their times: as of a functional that is made anew."""
    st, posed = pf.SpaceTime("1x1", comm=COMM_SELF), Heat(COMM_SELF)
    rf = functional(posed, st)
    z = rf.array(source(posed))
    values = [rf.problem.value(z)]
    posed.kappa.assign(1.3)
    assert rf.problem.value(z) == values[0]
    assert any("constant" in name for name in rf.update_data())
    values.append(rf.problem.value(z))
    assert values[1] == pytest.approx(functional(posed, st).problem.value(z), rel=1e-13)
    (observations,) = rf.problem.misfits
    observations.data = DATA + 1.0
    rf.update_data()
    values.append(rf.problem.value(z))
    assert values[2] == pytest.approx(functional(posed, st, values=DATA + 1.0).problem.value(z), rel=1e-13)
    observations.times = TIMES[:2]
    with pytest.raises(InputError, match=r"give \(times, functionals\) = \(2, 4\)"):
        rf.update_data()
    observations.data, observations.weight = DATA[:2], 1.0
    rf.update_data()
    values.append(rf.problem.value(z))
    assert len(set(values)) == 4
    with pytest.raises(AttributeError):
        observations.functionals = ()


def test_averages_of_large_states_are_taken_relative_to_the_mean_of_the_readings():
    """Differences of 1e-9 between readings and states of 1e5, to all their digits."""
    st = pf.SpaceTime("1x1", comm=COMM_SELF)
    ev = heat(square(4, COMM_SELF), steps=2)
    _, y = SpatialCoordinate(ev.V.mesh())
    observations = pf.LinearObservations([ev.u * dx, 2 * ev.u * y * dx], [ev.dt], [[1e5, 1e5]])
    rf = pf.TimeParallelReducedFunctional(ev, observations, spacetime=st, solver_parameters=SERIAL)
    (own,) = rf.problem.misfits
    U = np.full((3, ev.state_size), 1e5 + 2.0**-30)
    assert own.values(U).sum() == pytest.approx(2.0**-60, rel=1e-10)


def refused(change):
    """What a functional of heat raises with changed functionals."""
    st, posed = pf.SpaceTime("1x1", comm=COMM_SELF), Heat(COMM_SELF)
    q, t = Function(posed.V), pf.time_function(posed.mesh)
    ev = pf.Evolution(
        posed.residual([Dt(posed.u)], posed.u, q), posed.u,
        tableau=pf.BackwardEuler(), dt=DT, nsteps=STEPS, control=q, t=t,
    )  # fmt: skip
    functionals = change(posed.u, q, t, posed)
    data = np.zeros((1, len(functionals) if isinstance(functionals, list) else 1))
    observations = pf.LinearObservations(functionals, [DT], data)
    pf.TimeParallelReducedFunctional(ev, observations, spacetime=st, solver_parameters=SERIAL)


@pytest.mark.parametrize(("change", "words"), [
    (lambda u, q, t, p: u * dx, "give functionals as a list"),
    (lambda u, q, t, p: [], "give functionals as a list"),
    (lambda u, q, t, p: [u * dx, u], "functional 1 is not a UFL functional"),
    (lambda u, q, t, p: [u * TestFunction(p.V) * dx], "functional 0 is not a UFL functional"),
    (lambda u, q, t, p: [u * dx, u**2 * dx], "functional 1 is not linear in the state u"),
    (lambda u, q, t, p: [abs(u) * dx], "functional 0 is not linear"),
    (lambda u, q, t, p: [(u - p.x) * dx], "functional 0 has the value -0.5 for the state zero"),
    (lambda u, q, t, p: [q * u * dx], "functional 0 contains a control"),
    (lambda u, q, t, p: [u * dx + q * dx], "functional 0 contains a control"),
    (lambda u, q, t, p: [t * u * dx], "functional 0 contains the time t"),
    (lambda u, q, t, p: [pf.time_function(p.mesh) * u * dx], "contains the Function 't' beside"),
    (lambda u, q, t, p: [Dt(u) * dx], r"functional 0 contains Dt\(u\)"),
    (lambda u, q, t, p: [Function(p.V) * dx], "functional 0 does not contain the evolution's state u"),
    (lambda u, q, t, p: [Constant(0.0) * u * dx], "functional 0 is zero for all states"),
    (lambda u, q, t, p: [Constant(np.nan) * u * dx], "functional 0 is not finite for all states"),
])
def test_refused(change, words):
    with pytest.raises(InputError, match=words):
        refused(change)


def test_terms_that_cancel_are_no_constant_part():
    refused_not = lambda u, q, t, p: [(u + p.x) * dx - p.x * dx]
    refused(refused_not)


@pytest.mark.parallel(3)
def test_functionals_that_differ_between_ranks_are_refused():
    st = pf.SpaceTime()
    ev = heat(square(4, st.space_comm), steps=3)
    observations = pf.LinearObservations([(1 + (COMM_WORLD.rank == 1)) * ev.u * dx], [ev.dt], [[0.0]])
    with pytest.raises(InputError, match="the functionals of LinearObservations"):
        pf.TimeParallelReducedFunctional(ev, observations, spacetime=st, solver_parameters=SERIAL)


class Alike(Heat):
    """Functionals of the same form with other data, also shared ones and such that only look the same."""

    def pose(self):
        self.early = Function(FunctionSpace(self.mesh, "CG", 1)).interpolate(2 - self.y)  # before the state
        super().pose()

    def functionals(self, u):
        a, b, c = map(Constant, (0.5, -1.5, 2.5))
        short, long = Constant((1.0, 3.0)), Constant((2.0, -1.0, 4.0))
        f, g = (Function(self.V).interpolate(e) for e in (self.x, self.y**2))
        h = Function(FunctionSpace(self.mesh, "DG", 0)).interpolate(self.x)
        self.given = [a, b, c, short, long, f, g, h, self.early]
        return [
            a * u * dx + b * u * ds(2),
            b * u * dx + c * u * ds(2),  # b was the second one
            c * u * dx + a * u * ds(2),  # in the other order
            a * u * dx + a * u * ds(2),
            *(w[0] * u * dx for w in (short, long)),
            *(w * u * dx for w in (f, g, h, self.early)),
            g * u * dx(7),
        ]


@pytest.mark.parallel([1, 2])
@pytest.mark.filterwarnings("ignore:changed after the functional was made")
def test_functionals_of_one_form_have_their_own_data():
    """Rows are those of Firedrake one by one, also after the data have changed."""
    posed = Alike(COMM_WORLD)
    forms = posed.functionals(posed.u)
    q, st = Function(posed.Q), pf.SpaceTime((COMM_WORLD.size, 1))
    ev = pf.Evolution(
        posed.residual([Dt(posed.u)], posed.u, q), posed.u,
        tableau=pf.BackwardEuler(), dt=DT, nsteps=STEPS, control=q, bcs=posed.bcs,
    )  # fmt: skip
    observations = pf.LinearObservations(forms, [DT], np.zeros((1, len(forms))))
    rf = pf.TimeParallelReducedFunctional(ev, observations, spacetime=st, solver_parameters=SERIAL)
    for factor in (1.0, -0.7):
        for datum in posed.given:
            datum.assign(datum * factor if isinstance(datum, Function) else factor * datum.dat.data_ro)
        rf.update_data()
        expected = [get(assemble(derivative(f, posed.u, TestFunction(posed.V)))) for f in forms]
        found = rf.problem.misfits[0].impulses(range(len(forms)))
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-15)


def test_functionals_that_differ_in_data_are_compiled_once():
    ev = heat(square(4, COMM_SELF), steps=2).private()
    rows, places = FunctionalRows(ev), [(0.1, 0.2), (0.6, 0.7), (0.9, 0.4)]
    x = SpatialCoordinate(ev.V.mesh())
    for place in places:
        rows.row(exp(-inner(x - Constant(place), x - Constant(place))) * ev.posed.u * dx, "a functional")
    assert rows.forms == 1
    with pytest.raises(InputError, match="another one is zero for all states"):
        rows.row(Constant(0.0) * ev.posed.u * dx, "another one")
    rows.row(Constant(1.0) * ev.posed.u * dx, "another one")
    assert rows.forms == 2
    with pytest.raises(InputError, match="a third one is not finite"):
        rows.row(Constant(np.inf) * ev.posed.u * dx, "a third one")

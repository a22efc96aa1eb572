"""What a user owns is never written to, and is read at one moment: when a functional is made, or told to read again."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import ufl
from firedrake import (
    Cofunction,
    Constant,
    DirichletBC,
    Function,
    FunctionSpace,
    SpatialCoordinate,
    TestFunction,
    UnitSquareMesh,
    VertexOnlyMesh,
    assemble,
    cos,
    dx,
    grad,
    inner,
    interpolate,
    sin,
    solve,
)
from firedrake.adjoint import taylor_test, taylor_to_dict
from irksome import Dt
from mpi4py import MPI
from pyadjoint.tape import stop_annotating

import pint_fem as pf
from pint_fem.errors import InputError
from pint_fem.kernels.arrays import get
from pint_fem.propagators import FormPropagator, LinearPropagator, TapePropagator, make_propagator
from tests.limits import time_limit
from tests.meshes import square
from tests.ranks import cases

GRIDS = {1: ["1x1"], 3: ["3x1", "1x3"]}[MPI.COMM_WORLD.size]
STEPS, STEP = 4, 0.1
SOLVERS = {
    "serial": {"time_solver": "serial"},
    "mgrit": {"time_solver": "mgrit", "mgrit": {"coarsening": 2, "rtol": 1e-13}},
    "C-points": {"time_solver": "mgrit", "mgrit": {"coarsening": 2, "rtol": 1e-13, "storage": "C"}},
    "paradiag": {"time_solver": "paradiag", "paradiag": {"rtol": 1e-12}},
}


class Posed:
    """Heat with data of all kinds, and its functional by a plain loop over the steps."""

    def __init__(self, grid: str, *, linear: bool = True, mesh=None):
        self.st = pf.SpaceTime(grid)
        self.mesh = mesh or square(3, self.st.space_comm)
        V, R = FunctionSpace(self.mesh, "CG", 1), FunctionSpace(self.mesh, "R", 0)
        x, y = SpatialCoordinate(self.mesh)
        self.V, self.linear = V, linear
        self.strength, self.strength_at = cos, np.cos  # of the point source in time, in UFL and as a number
        self.u, self.q, self.t = Function(V, name="u"), Function(V, name="q"), pf.time_function(self.mesh, 0.3)
        self.q.interpolate(1 + x)
        self.data = {
            "initial": Function(V, name="initial").interpolate(x * y),
            "conductivity": Function(V, name="conductivity").interpolate(1 + x * y),
            "load": Function(V, name="load").interpolate(y),
            "factor": Constant(0.7, name="factor"),
            "number": Function(R, name="number").assign(0.4),
            "wall": Function(V, name="wall").interpolate(y),
            "target": Function(V, name="target").interpolate(x),
            "weight": Function(R, name="weight").assign(1e-2),
            "source": self.point_source(0.6, 0.4),
        }
        self.readings = np.array([[0.1, 0.2], [0.3, 0.5]])
        self.bcs = [DirichletBC(V, self.data["wall"], 1), DirichletBC(V, self.data["number"] * cos(self.t), 2)]

    def point_source(self, *place: float) -> Cofunction:
        sensors = VertexOnlyMesh(self.mesh, [place])
        one = Function(FunctionSpace(sensors, "DG", 0).dual())
        one.dat.data_wo[:] = 1.0
        source = assemble(interpolate(TestFunction(self.V), one))
        source.rename("source")
        return source

    def residual(self, rate, u, t, q):
        """Of ``Dt(u)``, or of a difference in its place, without the point source."""
        d, v = self.data, TestFunction(self.V)
        kappa = d["conductivity"] if self.linear else d["conductivity"] * (1 + u**2)
        load = q + sin(t) * d["load"] + d["factor"]
        return (rate * v + kappa * inner(grad(u), grad(v)) - load * v) * dx

    def misfit(self, u):
        return (u - self.data["target"]) ** 2 * (1 if self.linear else 1 + u**2) * dx

    def regularisation(self, q):
        return self.data["weight"] * (q**2 + q**4) * dx

    def evolution(self, control) -> pf.Evolution:
        F = self.residual(Dt(self.u), self.u, self.t, self.q) - self.strength(self.t) * self.data["source"]
        return pf.Evolution(
            F, self.u, tableau=pf.BackwardEuler(), dt=STEP, nsteps=STEPS, control=control, t=self.t, bcs=self.bcs,
            initial=self.data["initial"],
        )  # fmt: skip

    def functional(self, kind=make_propagator, solver="serial", **options) -> pf.TimeParallelReducedFunctional:
        ev = self.evolution(self.q)
        self.sensors = pf.PointSensors([[0.3, 0.3], [0.7, 0.6]], [2 * STEP, 4 * STEP], self.readings)
        return pf.TimeParallelReducedFunctional(
            ev, [pf.RunningMisfit(self.misfit(self.u)), self.sensors], regularisation=self.regularisation(self.q),
            spacetime=self.st, solver_parameters=SOLVERS[solver] | options, propagator=kind,
        )  # fmt: skip

    def reference(self) -> float:
        """``J`` at the value of ``q`` by Firedrake's own solver, a step after the other."""
        with stop_annotating():
            old, u, t = Function(self.V).assign(self.data["initial"]), Function(self.V), Function(self.t)
            source = Cofunction(self.V.dual())  # Firedrake assembles no sums with weights that are no numbers
            F = self.residual((u - old) / STEP, u, t, self.q) - source
            walls = [DirichletBC(self.V, self.data["wall"], 1), DirichletBC(self.V, self.data["number"] * cos(t), 2)]
            sensors = VertexOnlyMesh(self.mesh, [[0.3, 0.3], [0.7, 0.6]])
            ordered = FunctionSpace(sensors.input_ordering, "DG", 0)
            J, readings = assemble(self.regularisation(self.q)), iter(self.readings)
            u.assign(old)
            for n in range(1, STEPS + 1):
                t.assign(n * STEP)
                source.assign(self.strength_at(n * STEP) * self.data["source"])
                solve(F == 0, u, bcs=walls, solver_parameters={"snes_rtol": 1e-13, "snes_atol": 1e-13})
                J += STEP * assemble(self.misfit(u))
                if n % 2 == 0:
                    at = assemble(interpolate(u, FunctionSpace(sensors, "DG", 0)))
                    seen = assemble(interpolate(at, ordered)).dat.data_ro
                    rows = next(readings)[: len(seen)]  # all of them are on the first rank in space
                    J += 0.5 * self.st.space_comm.allreduce(float(((seen - rows) ** 2).sum()), op=MPI.SUM)
                old.assign(u)
        return J

    def everything(self) -> list[np.ndarray]:
        """Values of all that the user owns."""
        owned = [self.u, self.q, self.t, *self.data.values()]
        values = [np.array(f.dat.data_ro) if isinstance(f, Constant) else get(f) for f in owned]
        return [*values, self.readings.copy()]

    def change(self, name: str) -> None:
        x, y = SpatialCoordinate(self.mesh)
        if name == "readings":
            self.readings[:, 1] += 0.3
        elif name == "source":
            self.data["source"].assign(self.point_source(0.2, 0.7))
        elif name in ("factor", "number", "weight"):
            self.data[name].assign(1.7 * float(self.data[name]))
        else:
            self.data[name].interpolate(self.data[name] + 0.2 + x * y)


CHANGES = ["initial", "conductivity", "load", "factor", "number", "wall", "target", "weight", "source", "readings"]
CASES = {
    "linear, serial": (LinearPropagator, True, "serial"),
    "linear, mgrit": (LinearPropagator, True, "mgrit"),
    "linear, C-points": (LinearPropagator, True, "C-points"),
    "linear, paradiag": (LinearPropagator, True, "paradiag"),
    "form, serial": (FormPropagator, False, "serial"),
    "form, mgrit": (FormPropagator, False, "mgrit"),
    "form, paradiag": (FormPropagator, False, "paradiag"),
    "tape, serial": (TapePropagator, False, "serial"),
}
on_cases = pytest.mark.parametrize("case", cases(CASES, on_ranks=["linear, mgrit", "form, mgrit"]))


def direction(posed) -> Function:
    x, y = SpatialCoordinate(posed.mesh)
    return Function(posed.V).interpolate(cos(3 * x) * y)


@pytest.mark.slow_on_ranks
@pytest.mark.parallel([1, 3])
@on_cases
@time_limit(300)
def test_what_a_user_owns_stays(case):
    """Taylor remainders in the user's own function, ``J`` by a plain loop, and all values after as before.

    Second derivatives by tapes are slow, and held to those of forms in test_propagators.
    """
    kind, linear, solver = CASES[case]
    for grid in GRIDS:
        posed = Posed(grid, linear=linear)
        J, h, before = posed.functional(kind, solver), direction(posed), posed.everything()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert J(posed.q) == pytest.approx(posed.reference(), rel=1e-10)
            if kind is TapePropagator:
                assert taylor_test(J, posed.q, h) > 1.95
            else:
                rates = taylor_to_dict(J, posed.q, h)
                assert min(rates["R1"]["Rate"]) > 1.95
                assert min(rates["R2"]["Rate"]) > 2.9
        J(posed.q)
        assert J.tlm(h) == pytest.approx(h._ad_dot(J.derivative()), rel=1e-9)
        if solver == "serial":
            J.minimize_trust_region(max_it=2)
            assert J.controls[0].control is not posed.q
        assert all(map(np.array_equal, before, posed.everything()))


def results(J, posed) -> list:
    found = [float(J(posed.q)), get(J.derivative())]
    slow = isinstance(J.problem.sweeps.propagators[0], TapePropagator)
    return found if slow else [*found, get(J.hessian(direction(posed)))]


def assert_same(a: list, b: list, tolerance: float = 1e-9) -> None:
    for x, y in zip(a, b, strict=True):
        assert np.abs(x - y).max(initial=0) <= tolerance * max(1, np.abs(y).max(initial=0))


@pytest.mark.slow_on_ranks
@pytest.mark.parallel([1, 3])
@on_cases
@time_limit(300)
def test_data_are_read_when_asked_for(case):
    """A change of any datum is ignored and warned of once; then ``J`` is a plain loop's, and all is a fresh one's."""
    kind, linear, solver = CASES[case]
    for grid in GRIDS:
        posed = Posed(grid, linear=linear)
        J = posed.functional(kind, solver)
        other = None if kind is TapePropagator else posed.functional(kind, solver)
        old = results(J, posed)
        changes = CHANGES if kind is not TapePropagator else ["conductivity", "wall"]
        if solver not in ("serial", "mgrit"):
            changes = ["conductivity", "load", "number", "readings"]
        for name in changes:
            posed.change(name)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                assert_same(results(J, posed), old)  # from what is cached
                J.problem.invalidate()
                assert_same(results(J, posed), old)
            label = "PointSensors" if name == "readings" else name
            assert [label in str(w.message) for w in caught] == [True] * posed.st.is_root
            assert any(label in text for text in J.update_data())
            old = results(J, posed)
            if name in ("conductivity", "source", "readings"):
                assert old[0] == pytest.approx(posed.reference(), rel=1e-9)
        assert_same(old, results(posed.functional(kind, solver), posed))
        if kind is TapePropagator:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            first = results(other, posed)  # another functional of the same data has not read them
        assert abs(first[0] - old[0]) > 1e-3
        other.update_data()
        assert_same(results(other, posed), old)


def test_new_data_cost_no_factorisation():
    posed = Posed("1x1")
    J = posed.functional(LinearPropagator, "mgrit")
    results(J, posed)
    made = [(p, *p.factors.values()) for p in J.problem.sweeps.propagators]
    for name in ("readings", "load", "factor", "wall", "initial", "target", "source", "weight"):
        posed.change(name)
        assert len(J.update_data()) == 1  # not what has been read again before
        results(J, posed)
    now = [(p, *p.factors.values()) for p in J.problem.sweeps.propagators]
    assert all(a is b for before, after in zip(made, now, strict=True) for a, b in zip(before, after, strict=True))
    posed.change("conductivity")
    J.update_data()
    assert J.problem.sweeps.propagators[0] is not made[0][0]


@pytest.mark.parallel([1, 3])
@time_limit(200)
def test_data_on_coarser_meshes():
    for grid in GRIDS:
        st = pf.SpaceTime(grid)
        posed = Posed(grid, mesh=st.mesh_hierarchy(1, UnitSquareMesh, 2, 2)[-1])
        J = posed.functional(LinearPropagator, "mgrit", spatial_coarsening=True)
        old = results(J, posed)
        for name in ("conductivity", "load", "wall"):
            posed.change(name)
        assert len(J.update_data()) == 3
        new, cycles = results(J, posed), J.problem.sweeps.results[-1][1].cycles
        fresh = posed.functional(LinearPropagator, "mgrit", spatial_coarsening=True)
        assert_same(new, results(fresh, posed))
        assert abs(new[0] - old[0]) > 1e-3
        assert cycles == fresh.problem.sweeps.results[-1][1].cycles  # coarse levels have the new data, too
        assert new[0] == pytest.approx(posed.reference(), rel=1e-9)


@pytest.mark.parametrize("kind", [LinearPropagator, FormPropagator])
def test_data_beside_a_control_are_read_again(kind):
    """Twice the profile of what heats plate and wall: ``J``, quadratic in it, and its gradient are four times as
    large.
    """
    mesh = square(3, MPI.COMM_SELF)
    V, (_, y) = FunctionSpace(mesh, "CG", 1), SpatialCoordinate(mesh)
    u, v, profile = Function(V), TestFunction(V), Function(V, name="profile").interpolate(1 + y)
    level = Function(FunctionSpace(mesh, "R", 0), name="level").assign(0.7)
    ev = pf.Evolution(
        inner(Dt(u), v) * dx + inner(grad(u), grad(v)) * dx - profile * level * v * dx, u, tableau=pf.SDIRK2(),
        dt=STEP, nsteps=STEPS, control=level, bcs=DirichletBC(V, profile * level, 1),
    )  # fmt: skip
    J = pf.TimeParallelReducedFunctional(
        ev, pf.TerminalMisfit(inner(u, u) * dx), propagator=kind, solver_parameters=SOLVERS["serial"]
    )
    before = [float(J(level)), get(J.derivative())[0]]
    profile.assign(2 * profile)
    J.update_data()
    assert [float(J(level)), get(J.derivative())[0]] == pytest.approx([4 * number for number in before], rel=1e-10)


@pytest.mark.parallel([1, 3])
@time_limit(100)
def test_new_readings_in_place_of_an_array():
    for grid in GRIDS:
        posed = Posed(grid)
        J = posed.functional()
        J(posed.q)
        posed.readings = posed.readings + 1.0
        posed.sensors.data = posed.readings
        J.update_data()
        assert J(posed.q) == pytest.approx(posed.reference(), rel=1e-10)
        posed.sensors.data = posed.readings[:1]
        with pytest.raises(InputError, match="readings have shape"):
            J.update_data()


@time_limit(100)
def test_a_misfit_of_two_functionals():
    """Serial and MGRIT with the same misfit objects, on slabs that differ where there are two ranks in time; new
    readings reach both.
    """
    for grid in GRIDS:
        posed = Posed(grid)
        first = posed.functional()
        shared = [pf.RunningMisfit(posed.misfit(posed.u)), posed.sensors]
        ev, st = first.evolution, posed.st
        alone = pf.SpaceTime((st.space_size, 1), comm=st.space_comm)
        pair = [
            pf.TimeParallelReducedFunctional(ev, shared, spacetime=where, solver_parameters=SOLVERS["serial"])
            for where in (st, alone)
        ]
        constant = assemble(posed.regularisation(posed.q))
        for _ in range(2):
            expected = posed.reference() - constant
            assert [float(J(posed.q)) for J in pair] == pytest.approx([expected] * 2, rel=1e-10)
            posed.readings = posed.readings + 0.5
            posed.sensors.data = posed.readings
            for J in pair:
                assert J.update_data() == ["what is given to PointSensors"]


@time_limit(100)
def test_what_cannot_be_read_again_is_refused():
    for grid in GRIDS:
        st = pf.SpaceTime(grid)
        posed = Posed(grid, mesh=st.mesh(UnitSquareMesh, 3, 3))  # it moves
        J = posed.functional()
        before = J(posed.q)
        posed.bcs[0].set_value(5.0)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert J(posed.q) == before
        assert len(caught) == posed.st.is_root
        with pytest.raises(InputError, match="set_value"):
            J.update_data()
        posed.mesh.coordinates.assign(2 * posed.mesh.coordinates)
        with pytest.raises(InputError, match="coordinates of the mesh"):
            J(posed.q)


# -- time ------------------------------------------------------------------------------------------------------------
def growth(grid: str, rate, *, misfit=None, **given) -> pf.TimeParallelReducedFunctional:
    """``u' = rate(t) + q`` from zero without diffusion, and the misfit ``misfit(u)`` of it."""
    st = pf.SpaceTime(grid)
    mesh = square(2, st.space_comm)
    V, t = FunctionSpace(mesh, "DG", 0), pf.time_function(mesh)
    u, v, q = Function(V), TestFunction(V), Function(V)
    ev = pf.Evolution(
        (Dt(u) - rate(t) - q) * v * dx, u, tableau=pf.BackwardEuler(), dt=0.25, nsteps=4, control=q,
        **{name: make(t) for name, make in given.items()},
    )  # fmt: skip
    return pf.TimeParallelReducedFunctional(
        ev, pf.RunningMisfit(misfit(u, t) * dx), spacetime=st, solver_parameters={"time_solver": "serial"}
    )


@time_limit(100)
def test_time_in_a_misfit_only():
    """``u`` is zero: the sum of ``dt t_n^2`` is ``(1 + 4 + 9 + 16) / 64``, whether ``t`` is given or found; likewise a
    misfit that is not quadratic.
    """
    for grid in GRIDS:
        for given in ({}, {"t": lambda t: t}):
            J = growth(grid, lambda t: 0, misfit=lambda u, t: (u - t) ** 2, **given)
            assert J(Function(J.evolution.control)) == pytest.approx(30 / 64, rel=1e-12)
            J = growth(grid, lambda t: 0, misfit=lambda u, t: (u - t) ** 2 + u**4, **given)
            assert J(Function(J.evolution.control)) == pytest.approx(30 / 64, rel=1e-12)


@time_limit(100)
def test_time_in_the_residual_is_found():
    """Backward Euler for ``u' = 2 t``: ``u_n = dt^2 n (n + 1)``, and ``dt`` times their sum is ``40 dt^3``."""
    for grid in GRIDS:
        J = growth(grid, lambda t: 2 * t, misfit=lambda u, t: u)
        assert J(Function(J.evolution.control)) == pytest.approx(40 / 64, rel=1e-12)


class Timed:
    """Heat with the time in the residual, a boundary value, the initial condition and the misfit, from ``t = 0.3``."""

    def __init__(self, grid: str, make_time, *, power: int):
        self.st = pf.SpaceTime(grid)
        mesh = self.st.mesh(UnitSquareMesh, 3, 3)
        self.mesh, self.V = mesh, FunctionSpace(mesh, "CG", 1)
        self.t, (x, y) = make_time(mesh), SpatialCoordinate(mesh)
        self.u, self.q = Function(self.V, name="u"), Function(self.V, name="q").interpolate(1 + x * y)
        v, t = TestFunction(self.V), self.t
        self.rest = lambda u, v: (inner(grad(u), grad(v)) + u**power * v - sin(3 * t) * self.q * v) * dx
        self.F = Dt(self.u) * v * dx + self.rest(self.u, v)
        self.bcs, self.initial = [DirichletBC(self.V, x * cos(t), 1)], t * (x + y)
        self.j = lambda u: inner(u - t * x, u - t * x) * dx

    def functional(self, solver: str) -> pf.TimeParallelReducedFunctional:
        ev = pf.Evolution(
            self.F, self.u, tableau=pf.BackwardEuler(), dt=STEP, nsteps=STEPS, control=self.q, t=self.t, t0=0.3,
            initial=self.initial, bcs=self.bcs,
        )  # fmt: skip
        misfits = pf.RunningMisfit(self.j(self.u))
        return pf.TimeParallelReducedFunctional(ev, misfits, spacetime=self.st, solver_parameters=SOLVERS[solver])

    def reference(self) -> float:
        """The functional by a loop over the steps that assigns the user's own time."""
        with stop_annotating():
            u, v, old, J = Function(self.V), TestFunction(self.V), Function(self.V), 0.0
            old.interpolate(ufl.replace(self.initial, {self.t: Constant(0.3)}))
            for n in range(STEPS):
                self.t.assign(0.3 + (n + 1) * STEP)
                solve((u - old) / STEP * v * dx + self.rest(u, v) == 0, u, bcs=self.bcs)
                old.assign(u)
                J += STEP * assemble(self.j(u))
        return J


@pytest.mark.slow_on_ranks
@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize(
    ("power", "solver"),
    cases([(p, s) for p in (1, 3) for s in ("serial", "mgrit")], on_ranks=[(1, "mgrit"), (3, "serial")]),
)
@time_limit(200)
def test_a_constant_given_as_time(power, solver):
    """The same numbers as with a time function, and a plain loop's; the user's ``Constant`` is not written to."""
    kinds = (lambda mesh: pf.time_function(mesh, 0.7), lambda mesh: Constant(0.7, name="moment"))
    for grid in GRIDS:
        by_function, by_constant = (Timed(grid, kind, power=power) for kind in kinds)
        J = by_constant.functional(solver)
        assert_same(results(J, by_constant), results(by_function.functional(solver), by_function))
        assert float(by_constant.t) == 0.7
        assert not J.update_data()
        assert J(by_constant.q) == pytest.approx(by_constant.reference(), rel=1e-9)
        by_constant.bcs[0].set_value(5.0)
        with pytest.raises(InputError, match="set_value"):
            J.update_data()


def test_a_constant_is_no_time_for_a_step_of_the_users_own():
    posed = Timed("1x1", lambda mesh: Constant(0.0), power=1)
    ev = posed.functional("serial").evolution
    assert "8 steps" not in repr(ev)
    assert "4 steps of dt = 0.1 by BackwardEuler()" in repr(ev)
    with pytest.raises(InputError, match="time_function"):
        TapePropagator(ev, one_step=lambda u: u)


def named(mesh, name):
    return Function(FunctionSpace(mesh, "R", 0), name=name)


REFUSED = {
    "another time function in the misfit": lambda u, t: (u - pf.time_function(u.function_space().mesh())) ** 2,
    "a constant named t": lambda u, t: (u - Constant(0.0, name="t")) ** 2,
    "a real number named time": lambda u, t: (u - named(u.function_space().mesh(), "time")) ** 2,
    "a rate": lambda u, t: Dt(u) ** 2,
}


@pytest.mark.parametrize("misfit", REFUSED.values(), ids=REFUSED)
@time_limit(60)
def test_frozen_times_and_rates_in_misfits_are_refused(misfit):
    with pytest.raises(InputError, match=r"pint_fem.time_function|contains Dt"):
        growth(GRIDS[0], lambda t: t, misfit=misfit)


@time_limit(60)
def test_frozen_times_in_residuals_are_refused():
    mesh = UnitSquareMesh(2, 2)
    V = FunctionSpace(mesh, "DG", 0)
    u, v, t = Function(V), TestFunction(V), pf.time_function(mesh)
    given = dict(tableau=pf.BackwardEuler(), dt=0.25, nsteps=4)
    for other in (Constant(0.0, name="t"), named(mesh, "t"), pf.time_function(mesh)):
        with pytest.raises(InputError, match="keep its value in all steps"):
            pf.Evolution((Dt(u) - other) * v * dx, u, t=t, **given)
    with pytest.raises(InputError, match="keep its value in all steps"):
        pf.Evolution((Dt(u) - Constant(0.0, name="t")) * v * dx, u, **given)
    q = Function(V)
    ev = pf.Evolution((Dt(u) - q * t) * v * dx, u, t=t, control=q, **given)
    for form in (q**2 * t * dx, Dt(q) ** 2 * dx):
        with pytest.raises(InputError, match=r"time function t|contains Dt"):
            pf.TimeParallelReducedFunctional(
                ev, pf.TerminalMisfit(u**2 * dx), regularisation=form, solver_parameters=SOLVERS["serial"]
            )


# -- derivatives in time of second order ------------------------------------------------------------------------------
@time_limit(60)
def test_second_derivatives_in_time_are_refused():
    mesh = UnitSquareMesh(2, 2)
    V = FunctionSpace(mesh, "CG", 1)
    u, v = Function(V), TestFunction(V)
    given = dict(tableau=pf.ImplicitMidpoint(), dt=0.25, nsteps=4)
    for rate in (Dt(u, 2), Dt(Dt(u)), Dt(u, 3), Dt(grad(u)[0], 2) + Dt(u)):
        with pytest.raises(InputError, match="first order in a mixed state"):
            pf.Evolution((rate * v + inner(grad(u), grad(v))) * dx, u, **given)


# -- loads that are no integrals --------------------------------------------------------------------------------------
@pytest.mark.slow_on_ranks
@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize(
    "kind", cases([LinearPropagator, FormPropagator, TapePropagator], on_ranks=[LinearPropagator, FormPropagator])
)
@time_limit(200)
def test_strength_of_a_point_source_as_control(kind):
    """A control that multiplies a cofunction: ``J`` by a plain loop, derivative by differences of it."""
    for grid in GRIDS:
        posed = Posed(grid)
        strength = Function(FunctionSpace(posed.mesh, "R", 0), name="strength").assign(0.8)
        posed.strength = lambda t, strength=strength: 2 * strength
        posed.strength_at = lambda t, strength=strength: 2 * float(strength)
        ev = posed.evolution(strength)
        J = pf.TimeParallelReducedFunctional(
            ev, [pf.RunningMisfit(posed.misfit(posed.u)), pf.PointSensors(
                [[0.3, 0.3], [0.7, 0.6]], [2 * STEP, 4 * STEP], posed.readings)],
            spacetime=posed.st, solver_parameters=SOLVERS["serial"], propagator=kind,
        )  # fmt: skip
        constant = assemble(posed.regularisation(posed.q))
        assert J(strength) == pytest.approx(posed.reference() - constant, rel=1e-10)
        slope, ends = float(J.derivative(apply_riesz=True)), []
        for value in (0.9, 0.7):  # J is quadratic: central differences are exact
            strength.assign(value)
            ends.append(posed.reference())
        assert slope == pytest.approx((ends[0] - ends[1]) / 0.2, rel=1e-8)


@time_limit(60)
def test_other_forms_that_are_no_integrals_are_refused():
    mesh = UnitSquareMesh(2, 2)
    V = FunctionSpace(mesh, "CG", 1)
    u, v = Function(V), TestFunction(V)
    load = Function(FunctionSpace(VertexOnlyMesh(mesh, [[0.4, 0.4]]), "DG", 0).dual())
    given = dict(tableau=pf.BackwardEuler(), dt=0.25, nsteps=4)
    with pytest.raises(InputError, match="assemble it"):
        pf.Evolution(Dt(u) * v * dx + interpolate(v, load), u, **given)


# -- steps of a user's own --------------------------------------------------------------------------------------------
@time_limit(300)
def test_a_step_of_the_users_own():
    """A step in the user's functions, or in those of the evolution it is handed: J of the evolution's own step."""
    posed = Posed("1x1")
    posed.strength = lambda t: 0
    expected = results(posed.functional(FormPropagator), posed)[:2]

    def step(u, t, q, bcs):
        def one_step(u0):
            u1 = Function(posed.V)
            t.assign(t + STEP)
            walls = [DirichletBC(posed.V, posed.data["wall"], 1)]
            level = Function(posed.V).interpolate(posed.data["number"] * cos(t))
            walls.append(DirichletBC(posed.V, level, 2))
            solve(posed.residual((u1 - u0) / STEP, u1, t, q) == 0, u1, bcs=walls)
            return u1

        return one_step

    before = posed.everything()
    for functions in (lambda ev: (posed.u, posed.t, posed.q), lambda ev: (ev.u, ev.t, ev.control)):
        J = posed.functional(
            lambda ev, functions=functions, **given: TapePropagator(ev, one_step=step(*functions(ev), ev.bcs), **given)
        )
        assert_same([float(J(posed.q)), get(J.derivative())], expected)
        assert all(map(np.array_equal, before, posed.everything()))

"""Experiments divided over groups of ranks: the numbers of one rank, errors on all ranks, files for every grid."""

from functools import cache

import firedrake as fd
import numpy as np
import pytest
from firedrake import Function, FunctionSpace, TestFunction, dot, dx, exp, grad
from irksome import Dt
from mpi4py import MPI

import pint_fem as pf
from pint_fem.adjoint.minimisation.objective import Objective
from pint_fem.errors import InputError, SolverFailure
from pint_fem.kernels.arrays import get
from pint_fem.optimize.guarded_problem import GuardedProblem
from tests.limits import time_limit
from tests.meshes import square

WORLD = MPI.COMM_WORLD
GRIDS = {2: ["1x1x2"], 4: ["1x2x2", "2x1x2"]}.get(WORLD.size, [])
on_grids = pytest.mark.parametrize("grid", GRIDS)
# Groups without ranks in time or space show what concerns the groups: four ranks run what concerns time and space, too.
on_one_grid = pytest.mark.parametrize("grid", GRIDS[-1:])


def on_grids_with(name, given, also):
    """Two ranks run all combinations of grids and values; four ranks some of them, the others are in the long grids."""
    cases = [
        pytest.param(grid, value, marks=() if WORLD.size == 2 or (grid, value) in also else pytest.mark.grid)
        for grid in GRIDS
        for value in given
    ]
    return pytest.mark.parametrize(("grid", name), cases)


ROUND_OFF = 1e-12


class Heating:
    """Some experiments with one plate: other sources of heat, starts and readings; an unknown source, conductivity or
    source with one value per step.
    """

    def __init__(self, st, experiments=3, unknown="source", *, levels=1, steps=8, rtol=1e-13, other=lambda i: 0.0,
                 variation=False):
        self.st, self.unknown = st, unknown
        mesh = square(5, st.space_comm)
        self.V, self.x = FunctionSpace(mesh, "CG", 1), fd.SpatialCoordinate(mesh)
        self.q = Function(self.V, name="q").interpolate(self.x[0] + 0.5)
        self.gain = fd.Constant(0.3, name="gain")  # a datum of the regularisation
        self.evolutions = [self.evolution(i, steps, other(i)) for i in range(experiments)]
        misfits = [[self.misfit(i, ev)] for i, ev in enumerate(self.evolutions)]
        mgrit = {"levels": levels, "rtol": rtol} | ({"coarsening": 2} if levels > 1 else {})
        forms = [self.gain * (self.q**2 + dot(grad(self.q), grad(self.q))) * dx]
        if variation:
            forms.append(pf.TotalVariation(self.q, weight=0.1, smoothing=0.1))
        self.J = pf.TimeParallelReducedFunctional(
            self.evolutions, misfits, regularisation=forms, spacetime=st, solver_parameters={"mgrit": mgrit}
        )

    def evolution(self, i, steps, amount):
        u, v, (x, y) = Function(self.V), TestFunction(self.V), self.x
        u.interpolate(x * y + 0.1 * i)
        load = Function(self.V, name="load").interpolate(fd.sin((i + 1) * x) + y)
        heat = (exp(self.q) if self.unknown == "conductivity" else 1) * dot(grad(u), grad(v))
        source = load * v if self.unknown == "conductivity" else (load + self.q) * v
        strange = fd.Constant(amount)  # of a term that can make the steps of one experiment fail
        form = Dt(u) * v * dx + heat * dx - source * dx + strange * u**3 * v * dx
        return pf.Evolution(
            form if amount else Dt(u) * v * dx + heat * dx - source * dx, u, tableau=pf.BackwardEuler(), dt=0.02,
            nsteps=steps, control=self.q, per_step=self.unknown == "steps", bcs=fd.DirichletBC(self.V, 0.0, 1),
        )  # fmt: skip

    def misfit(self, i, ev):
        return pf.RunningMisfit(50 * (ev.u - 0.2 * self.x[0] * (i + 1)) ** 2 * dx)

    def vector(self, seed):
        """Own values of a control that is the same function on every grid."""
        layout, x = self.J.layout, self.x
        out = np.empty(layout.size)
        part = layout.part(out, self.q)
        f = Function(self.V)
        for n, row in enumerate(np.atleast_2d(part), start=layout.slab.lo if part.ndim == 2 else 0):
            row[:] = get(f.interpolate(0.3 * fd.sin(3 * x[0] + fd.Constant(seed + n)) + 0.2 * x[1]))
        return out

    def numbers(self):
        """J, its slope by a gradient and by a tangent sweep, curvatures, and the norm of the gradient."""
        P, z, dz = self.J.problem, self.vector(0), self.vector(1)
        pair = self.J.layout.pairing
        value, g = P.value(z), P.derivative(z)
        actions = P.hessian_actions(z, [dz, z])
        out = [value, pair(g, dz), P.tangent_value(z, dz), pair(P.hessian_action(z, dz), dz)]
        out += [pair(P.hessian_action(z, dz, gauss_newton=True), z), pair(actions[0], z), pair(actions[1], z)]
        return np.array([*out, pair(g, self.J.inner.primal(g)), *P.parts.values()])


def alone(*args, **options):
    """The same problem on one rank, which every rank solves by itself."""
    return Heating(pf.SpaceTime("1x1", comm=MPI.COMM_SELF), *args, **options)


@cache
def numbers_alone(**given):
    """Those of one rank, for all grids."""
    return alone(**given).numbers()


@pytest.mark.parallel([2, 4])
@on_grids_with(
    "unknown", ["source", "conductivity", "steps"], [("1x2x2", "steps"), ("2x1x2", "conductivity"), ("2x1x2", "steps")]
)
@time_limit(300)
def test_value_and_derivatives_are_those_of_one_rank(grid, unknown):
    """Three experiments on two groups: J, gradient, tangent, and Hessian actions, one by one and several at once."""
    st, given = pf.SpaceTime(grid), dict(unknown=unknown, steps=4 if unknown == "conductivity" else 8)
    mine, theirs = Heating(st, **given).numbers(), numbers_alone(**given)
    np.testing.assert_allclose(mine, theirs, rtol=ROUND_OFF)
    assert len({numbers.tobytes() for numbers in WORLD.allgather(mine)}) == 1
    if st.space_size == st.time_size == 1:  # the same sums in the same order
        assert mine[0] == theirs[0]


@pytest.mark.parallel([2, 4])
@on_one_grid
@time_limit(300)
def test_each_group_has_its_own_experiments_only(grid):
    """In contiguous, nearly equal parts; the sum of the counts of sweeps is that of one rank."""
    posed = Heating(pf.SpaceTime(grid), 5)
    groups = posed.st.experiments_comm.allgather([posed.evolutions.index(p.evolution) for p in posed.J.problem.leaves])
    assert [e for own in groups for e in own] == list(range(5))
    assert {len(own) for own in groups} <= {5 // len(groups), -(-5 // len(groups))}
    assert posed.J.problem.evolutions == posed.evolutions
    first = groups[posed.st.experiments_comm.rank][0]
    assert f"{len(posed.J.problem.leaves)} of 5 experiments (from number {first})" in str(posed.J)
    assert f"grid {grid}" in str(posed.J)


@pytest.mark.parallel([2, 4])
@on_grids_with("method", ["exact", "inexact", "scipy", "one-shot"], [("1x2x2", "one-shot"), ("2x1x2", "inexact")])
@time_limit(400)
def test_minimisation_is_that_of_one_rank(grid, method):
    """The minimiser and the number of iterations."""

    def run(posed):
        start = posed.J.function(posed.vector(0))
        if method == "scipy":
            result = posed.J.minimize_scipy(start, gtol_rel=1e-9)
        elif method == "one-shot":
            result = posed.J.minimize_one_shot(start, gtol_rel=1e-6)
        else:
            result = posed.J.minimize_trust_region(start, inexact=method == "inexact", gtol_rel=1e-9)
        pair = posed.J.layout.pairing
        return [posed.J.problem.value(result.x), pair(result.x, result.x)], getattr(result, "iterations", 0)

    given = dict(levels=2, rtol=1e-12) if method in ("inexact", "one-shot") else {}
    (mine, count), (theirs, other) = run(Heating(pf.SpaceTime(grid), **given)), run(alone(**given))
    np.testing.assert_allclose(mine, theirs, rtol=1e-8 if method == "one-shot" else 1e-10)
    assert abs(count - other) <= (2 if method == "one-shot" else 0)


@pytest.mark.parallel([2, 4])
@on_grids_with("variation", [False, True], [("2x1x2", True)])
@time_limit(300)
def test_a_nonlinear_minimisation_is_that_of_one_rank(grid, variation):
    given = dict(unknown="conductivity", steps=4, variation=variation)
    posed = Heating(pf.SpaceTime(grid), **given), alone(**given)
    runs = [one.J.minimize_trust_region(gtol_rel=1e-7) for one in posed]
    assert runs[0].iterations == runs[1].iterations
    assert runs[0].value == pytest.approx(runs[1].value, rel=1e-10)


# -- errors ------------------------------------------------------------------------------------------------------------
@pytest.mark.parallel([2, 4])
@on_one_grid
@time_limit(300)
def test_a_failure_in_one_group_is_raised_on_all_ranks(grid):
    """The steps of the last experiment blow up at a large control: the cause names the experiment, and the trial point
    is rejected on all ranks.
    """
    posed = Heating(pf.SpaceTime(grid), 3, steps=4, other=lambda i: -1.0 if i == 2 else 0.0)
    bad = 1e3 * posed.vector(0) ** 2 + 1e3
    which = "experiment 2 of 3|experiments 1 to 2 of 3" if posed.st.experiments_size > 1 else "sweep"
    for call in (posed.J.problem.value, posed.J.problem.derivative):
        with pytest.raises(SolverFailure, match=which):
            call(bad)
    assert np.isfinite(posed.J.problem.value(posed.vector(0)))
    guarded = GuardedProblem(Objective(posed.J.problem, posed.J.inner))
    assert guarded.value(bad) == np.inf
    assert "level 0, steps 0..0" in str(guarded.failure)


@pytest.mark.parallel([2, 4])
@on_one_grid
@time_limit(300)
def test_an_exception_in_one_group_is_raised_on_all_ranks(grid):
    """Of the user's own code, with its cause; and a collective call after it still matches."""
    posed = Heating(pf.SpaceTime(grid))
    last = posed.st.experiments_comm.rank == posed.st.experiments_size - 1

    def strange(*_):
        if last:
            raise KeyError("of the user")

    for leaf in posed.J.problem.leaves:
        leaf.sweeps.on_sweep = strange
    with pytest.raises(KeyError if last else RuntimeError, match="of the user"):
        posed.J.problem.value(posed.vector(0))
    assert WORLD.allreduce(1) == WORLD.size


@pytest.mark.parallel([2, 4])
@on_grids_with("unknown", ["source", "steps"], [("1x2x2", "steps")])
@time_limit(300)
def test_controls_that_differ_between_groups_are_refused(grid, unknown):
    posed = Heating(pf.SpaceTime(grid), unknown=unknown)
    other = (1 + 1e-3 * posed.st.experiments_comm.rank) * posed.vector(0)
    P = posed.J.problem
    for call in (lambda: P.value(other), lambda: P.hessian_action(posed.vector(0), other)):
        with pytest.raises(InputError, match="differs between"):
            call()


@pytest.mark.parallel([2, 4])
@time_limit(300)
def test_grids_that_do_not_fit_are_refused():
    """More groups than experiments, and one evolution on groups: the messages have what would do."""
    st = pf.SpaceTime((1, 1, WORLD.size))
    said = f"has {WORLD.size} groups of ranks for 1 experiment: .* such as 1x{WORLD.size}x1"
    with pytest.raises(InputError, match=said):
        Heating(st, 1)
    posed = Heating(st, WORLD.size)
    ev = posed.evolutions[0]
    with pytest.raises(InputError, match=f"one evolution on the grid .* such as 1x{WORLD.size}"):
        pf.TimeParallelReducedFunctional(ev, posed.misfit(0, ev), spacetime=st)
    alone = pf.SpaceTime((1, WORLD.size))
    with pytest.raises(InputError, match="a sum of functionals on process grids"):
        posed.J + Heating(alone, WORLD.size).J


@pytest.mark.parallel(2)
@on_grids
@time_limit(300)
def test_a_bad_misfit_of_one_experiment_is_refused_on_all_ranks(grid):
    posed = Heating(pf.SpaceTime(grid))
    misfits = [posed.misfit(i, ev) for i, ev in enumerate(posed.evolutions)]
    with pytest.raises(InputError, match="misfits: give RunningMisfit"):
        pf.TimeParallelReducedFunctional(posed.evolutions, [*misfits[:2], []], spacetime=posed.st)


# -- states ------------------------------------------------------------------------------------------------------------
@pytest.mark.parallel([2, 4])
@on_grids
@time_limit(300)
def test_states_and_adjoints_of_all_experiments_are_on_all_ranks(grid, tmp_path):
    """At given times; the points of a rank are those of its group's experiments."""
    posed, other = Heating(pf.SpaceTime(grid)), alone()
    J, V = posed.J, posed.V
    values, theirs = J.function(posed.vector(0)), other.J.function(other.vector(0))
    J(values), other.J(theirs)
    folder = WORLD.bcast(str(tmp_path))
    for ev, ev1 in zip(posed.evolutions, other.evolutions, strict=True):
        pairs = [(J.state(times=0.06, evolution=ev), other.J.state(times=0.06, evolution=ev1))]
        pairs += [(J.adjoint(times=0.1, evolution=ev), other.J.adjoint(times=0.1, evolution=ev1))]
        for a, b in pairs:
            assert a.function_space() == V
            square_norms = fd.assemble(a**2 * dx), fd.assemble(b**2 * dx)
            assert square_norms[0] == pytest.approx(square_norms[1], rel=1e-11)
        own = J.own_times(ev)
        assert len(J.state(evolution=ev)) == len(own)
        in_group = posed.st.group.time_comm.allreduce(len(own))
        mine = ev in [leaf.evolution for leaf in J.problem.leaves]
        assert in_group == (ev.nsteps + 1 if mine else 0)
        path = J.write(None, f"{folder}/u{posed.evolutions.index(ev)}.pvd", [0.0, 0.16], evolution=ev)
        assert path.is_file()


@pytest.mark.parallel([2, 4])
@on_one_grid
@time_limit(300)
def test_final_states_of_all_experiments_are_on_all_ranks(grid):
    posed = Heating(pf.SpaceTime(grid))
    finals = [Function(posed.V) for _ in posed.evolutions]
    misfits = [posed.misfit(i, ev) for i, ev in enumerate(posed.evolutions)]
    J = pf.TimeParallelReducedFunctional(
        posed.evolutions, misfits, spacetime=posed.st, final_state=finals, solver_parameters={"mgrit": {"levels": 1}}
    )
    J(J.function(posed.vector(0)))
    for ev, final in zip(posed.evolutions, finals, strict=True):
        np.testing.assert_array_equal(get(final), get(J.state(times=float(ev.time(ev.nsteps)), evolution=ev)))


@pytest.mark.parallel([2, 4])
@on_one_grid
@time_limit(300)
def test_readings_of_all_experiments_are_on_all_ranks(grid):
    """The state at the sensors."""
    posed = Heating(pf.SpaceTime(grid))
    points, times = np.array([[0.3, 0.4], [0.7, 0.6]]), [0.04, 0.16]
    sensors = [pf.PointSensors(points, times, np.zeros((2, 2))) for _ in posed.evolutions]
    J = pf.TimeParallelReducedFunctional(
        posed.evolutions, sensors, spacetime=posed.st, solver_parameters={"mgrit": {"levels": 1}}
    )
    J(J.function(posed.vector(0)))
    other, z = alone(), None
    other.J(other.J.function(other.vector(0)))
    for ev, one, theirs in zip(posed.evolutions, sensors, other.evolutions, strict=True):
        expected = [[u.at(p) for p in points] for u in other.J.state(times=times, evolution=theirs)]
        np.testing.assert_allclose(J.readings(one, z), expected, rtol=1e-10)
        if posed.st.experiments_comm.rank != J.problem.group_of(ev):
            with pytest.raises(InputError, match="they are on the ranks of group"):
                J.problem.observations(posed.vector(0), one)
        else:
            own = J.problem.observations(posed.vector(0), one).shape[1]  # a sensor is on one rank in space
            assert posed.st.space_comm.allreduce(own) == 2
    with pytest.raises(InputError, match="give a misfit of one of the experiments"):
        J.readings(pf.PointSensors(points, times, np.zeros((2, 2))))


# -- data --------------------------------------------------------------------------------------------------------------
@pytest.mark.parallel([2, 4])
@on_one_grid
@time_limit(300)
def test_data_are_read_again_in_all_groups(grid):
    """Of one experiment and of the regularisation; the names are returned on all ranks."""
    posed, other = Heating(pf.SpaceTime(grid)), alone()
    for one in (posed, other):
        one.J.problem.value(one.vector(0))
        one.gain.assign(0.7)
        load = next(f for f in one.evolutions[2].residual.coefficients() if f.name() == "load")
        load.assign(2.0)
    if WORLD.rank == 0:
        with pytest.warns(UserWarning, match="changed after the functional was made"):
            old = posed.J.problem.value(posed.vector(1))
    else:
        old = posed.J.problem.value(posed.vector(1))
    changed = posed.J.update_data()
    assert {name.split()[-1] for name in changed if "load" in name} == {"'load'"}
    assert len(changed) == 2
    other.J.update_data()
    new = posed.J.problem.value(posed.vector(1))
    assert new == pytest.approx(other.J.problem.value(other.vector(1)), rel=ROUND_OFF)
    assert new != old


# -- checkpoints -------------------------------------------------------------------------------------------------------
@pytest.mark.parallel([2, 4])
@on_grids_with("inexact", [False, True], [("1x2x2", False), ("2x1x2", False)])
@time_limit(400)
def test_a_run_continues_on_another_grid(grid, inexact, tmp_path):
    """From one rank to groups and back: the iterates of a run without interruption, and with inexact solves, whose
    iterates depend on which experiments are iterated at once, its minimiser. With several ranks in space the numbering
    of unknowns is another, and the message says so.
    """
    folder = WORLD.bcast(str(tmp_path))
    options = dict(inexact=True, gtol_rel=1e-9) if inexact else dict(inexact=False, cg_max_it=3, gtol_rel=1e-12)
    some, all_of_them = (1, 50) if inexact else (2, 5)

    def run(where, most, path=None):
        posed = alone(levels=2) if where == "alone" else Heating(pf.SpaceTime(where), levels=2)
        return posed.J.minimize_trust_region(checkpoint=path, max_it=most, **options)

    whole = run("alone", all_of_them)
    for first, then in (("alone", grid), (grid, "alone")):
        path = f"{folder}/{first}.h5"
        if first != "alone" or WORLD.rank == 0:
            run(first, some, path)
        WORLD.barrier()
        if then != "alone" or WORLD.rank == 0:
            if grid[0] != "1":
                with pytest.raises(InputError, match="space ranks: the file has"):
                    run(then, all_of_them, path)
            else:
                result = run(then, all_of_them, path)
                assert result.value == pytest.approx(whole.value, rel=1e-10)
                assert result.converged == inexact
                assert inexact or result.iterations == whole.iterations == all_of_them
        WORLD.barrier()


@pytest.mark.parallel(2)
@time_limit(300)
def test_files_of_other_experiments_are_refused_on_all_ranks(tmp_path):
    """Another datum of the last experiment, another weight of the regularisation, another number of experiments."""
    path = WORLD.bcast(str(tmp_path)) + "/run.h5"
    st = pf.SpaceTime("1x1x2")
    Heating(st).J.minimize_trust_region(checkpoint=path, max_it=1)

    def changed():
        posed = Heating(st)
        next(f for f in posed.evolutions[2].residual.coefficients() if f.name() == "load").assign(3.0)
        posed.J.update_data()
        return posed

    def weighted():
        posed = Heating(st)
        posed.gain.assign(0.31)
        posed.J.update_data()
        return posed

    fewer = lambda: Heating(st, 2)
    cases = (changed, "coefficient"), (weighted, "regularisation at a fixed control"), (fewer, "experiments")
    for make, what in cases:
        with pytest.raises(InputError, match=f"is of another .*{what}"):
            make().J.minimize_trust_region(checkpoint=path, max_it=3)
    assert WORLD.allreduce(1) == 2

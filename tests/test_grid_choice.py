"""The process grid by measurement: predicted times by hand, the same choice on all ranks, failures and budgets."""

import time

import numpy as np
import pytest
from firedrake import DirichletBC, Function, FunctionSpace, TestFunction, UnitSquareMesh, dx, grad, inner
from irksome import Dt
from mpi4py import MPI

pytest.importorskip("greenlet")

import pint_fem as pf
from pint_fem.errors import InputError, SolverFailure
from pint_fem.evolution import BackwardEuler, Evolution
from pint_fem.scaling.costs import Calibration, Kernel
from pint_fem.scaling.grid_choice import choose_grid, kernels, measured_costs, measurement
from pint_fem.scaling.grid_choice.shapes import Measured, SolverUse, all_shapes, joint, least_seconds, seconds_of
from pint_fem.scaling.network import Network
from pint_fem.scaling.planner import plan, predict
from pint_fem.spacetime import SpaceTime

COMM = MPI.COMM_WORLD
SERIAL, MGRIT = {"time_solver": "serial"}, {"time_solver": "mgrit"}


def heat(spacetime, nonlinear=False, steps=16, cells=6):
    """Heat, or a nonlinear reaction, on a square."""
    simple = {"partitioner_type": "simple"}
    mesh = UnitSquareMesh(cells, cells, comm=spacetime.space_comm, distribution_parameters=simple)
    V = FunctionSpace(mesh, "CG", 1)
    u, q, v = Function(V), Function(V), TestFunction(V)
    F = Dt(u) * v * dx + inner(grad(u), grad(v)) * dx - q * v * dx + (u**3 * v * dx if nonlinear else 0)
    return Evolution(F, u, tableau=BackwardEuler(), dt=0.1, nsteps=steps, control=q, bcs=DirichletBC(V, 0, 1))


# -- predicted times ---------------------------------------------------------------------------------------------------
def measured(experiments=1, step=(1.0, 4.0), update=None, network=None, spaces=(1,)):
    """Seconds of one state, and of eight at once, for 32 steps; the adjoint takes twice as long."""
    one = Kernel((1, 8), step, lanes=True)
    tables = {"step": [one], "adjoint": [one.scaled(2.0)]}
    scaled = {d: {k: [each.scaled(1 / d) for each in v] for k, v in tables.items()} for d in spaces}
    c = Calibration("here", "none", 1000, 32, scaled, network=network or Network(0.0, 1e30, "free"))
    return Measured(c, experiments, True, update or {})


@pytest.mark.parametrize(("ranks", "steps", "experiments"), [(1, 4, 1), (6, 2, 3), (8, 4, 4), (12, 100, 5)])
def test_all_shapes(ranks, steps, experiments):
    """By exhaustive search."""
    every = range(1, ranks + 1)
    expected = {
        (d, t, e) for d in every for t in every for e in every if d * t * e == ranks and t <= steps and e <= experiments
    }
    found = all_shapes(ranks, steps, experiments)
    assert set(found) == expected
    assert len(found) == len(expected)


def test_sequential_stepping_by_hand():
    serial = SolverUse("serial")
    for shape in ((1, 1, 1), (1, 4, 1)):
        assert seconds_of(measured(), shape, serial) == pytest.approx(32 * 3)
        assert least_seconds(measured(), shape, serial) == pytest.approx(32 * 3)
    assert seconds_of(measured(spaces=(1, 4)), (4, 1, 1), serial) == pytest.approx(32 * 3 / 4)


def test_experiments_are_solved_at_once_or_one_after_another():
    """Eight take four seconds at once; two groups have four each, in a call for eight."""
    serial, many = SolverUse("serial"), measured(experiments=8)
    assert seconds_of(many, (1, 1, 1), serial) == pytest.approx(32 * 3 * 4)
    assert seconds_of(many, (1, 1, 8), serial) == pytest.approx(32 * 3)
    many.shares_operators = False
    assert seconds_of(many, (1, 1, 1), serial) == pytest.approx(32 * 3 * 8)
    assert seconds_of(many, (1, 1, 4), serial) == pytest.approx(32 * 3 * 2)
    kernel = many.costs.kernels[1]["step"][0]
    assert [joint(kernel, 3)(n) for n in (1, 2, 8, 16)] == pytest.approx([kernel(3 * n) for n in (1, 2, 8, 16)])


def test_controls_and_groups_add_their_own_seconds():
    serial, net = SolverUse("serial"), Network(0.5, 1e3, "slow")
    alone = seconds_of(measured(), (1, 1, 1), serial)
    assert seconds_of(measured(update={1: 7.0}), (1, 1, 1), serial) == pytest.approx(alone + 7)
    many = measured(experiments=2, network=net)
    groups = seconds_of(many, (1, 1, 2), serial)
    assert groups == pytest.approx(alone + 0.5 + 8 + 0.5 + 8)  # all to all, then gathered: 8,000 bytes each


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 4, 1), (2, 2, 1), (1, 2, 2)])
def test_least_seconds_are_a_bound(shape):
    use = SolverUse("mgrit", {"levels": 2, "coarsening": [8], "relax": "F"}, (1, 2))
    for own in (measured(spaces=(1, 2)), measured(experiments=4, spaces=(1, 2), update={1: 1.0})):
        assert 0 < least_seconds(own, shape, use) <= seconds_of(own, shape, use) * (1 + 1e-12)


def test_paradiag_takes_its_ratio_of_sequential_stepping():
    use = SolverUse("paradiag", ratio=0.25)
    assert seconds_of(measured(), (1, 4, 1), use) == pytest.approx(32 * 3 / 4)


# -- measurements on all ranks -----------------------------------------------------------------------------------------
def same_on_all_ranks(found):
    """The choice, which has to be equal everywhere and use all ranks."""
    assert all(other == found for other in COMM.allgather(found))
    assert np.prod(found.shape) == COMM.size
    assert found.why.startswith(f"grid auto: {found.grid}")
    pf.SpaceTime(found.grid).free()
    return found


@pytest.mark.parallel([1, 2, 4])
@pytest.mark.parametrize("nonlinear", [False, True])
def test_choice_on_all_ranks(nonlinear):
    given = dict(experiments=2, solver_parameters=MGRIT)
    found = same_on_all_ranks(choose_grid(lambda st: heat(st, nonlinear), **given))
    if COMM.size == 1:
        assert found.seconds == {}
        return
    assert found.shape == next(iter(found.seconds))
    assert list(found.seconds.values()) == sorted(found.seconds.values())
    assert all(0 < seconds < 60 for seconds in found.seconds.values())
    if not nonlinear:
        assert "solves systems of 49 unknowns whole" in found.why
        assert {shape[0] for shape in found.seconds} == {1}


@pytest.mark.parallel([2, 4])
def test_experiments_first_where_they_divide():
    """Sequential stepping gains nothing from ranks in time, and by groups a little less than their number."""
    given = {"step": [Kernel((1, 8), (1.0, 8.0), lanes=True)], "adjoint": [Kernel((1, 8), (1.0, 8.0), lanes=True)]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measurement, "step_kernels", lambda *args, **more: given)
        found = same_on_all_ranks(choose_grid(heat, experiments=8, solver_parameters=SERIAL))
        assert found.shape == (1, 1, COMM.size)
        assert found.seconds[found.shape] == pytest.approx(16 * 2 * 8 / COMM.size, rel=0.01)


@pytest.mark.parallel([2, 4])
@pytest.mark.parametrize("gain", [0.5, 2.0])
def test_ranks_in_space_where_they_pay(gain, monkeypatch):
    """A step on ``d`` ranks in space takes ``gain^log2(d)`` of the time on one; all systems are large."""

    def step_kernels(comm, propagator, most):
        seconds = gain ** np.log2(propagator.evolution.V.mesh().comm.size)
        return {kind: [Kernel((1, 8), (seconds, 8 * seconds), lanes=True)] for kind in ("step", "adjoint")}

    monkeypatch.setattr(measurement, "step_kernels", step_kernels)
    monkeypatch.setattr(measurement, "REDUNDANT", 10)
    found = same_on_all_ranks(choose_grid(heat, solver_parameters=SERIAL))
    assert found.shape == ((COMM.size, 1, 1) if gain < 1 else (1, COMM.size, 1))
    assert found.seconds[found.shape] == pytest.approx(16 * 2 * min(1.0, gain ** np.log2(COMM.size)), rel=0.01)


@pytest.mark.parallel([2])
def test_more_ranks_than_steps():
    """All others are in space."""
    found = same_on_all_ranks(choose_grid(lambda st: heat(st, steps=1), solver_parameters=SERIAL))
    assert found.shape == (COMM.size, 1, 1)
    assert found.why.startswith(f"grid auto: {COMM.size}x1, the only one that may pay")


@pytest.mark.parallel([2])
def test_nothing_is_measured_where_there_is_one_grid(monkeypatch):
    """Small systems and one experiment."""
    monkeypatch.setattr(measurement, "make_propagator", None)
    found = same_on_all_ranks(choose_grid(heat, solver_parameters=SERIAL))
    assert (found.shape, found.seconds) == ((1, COMM.size, 1), {})
    assert "2 in space (every rank in space solves systems of 49 unknowns whole)" in found.left_out


@pytest.mark.parallel([2])
@pytest.mark.parametrize("error", [ValueError("nowhere"), SolverFailure("singular"), InputError("no such file")])
def test_a_rank_that_fails_alone_leaves_all_ranks_in_time(error):
    """Where it poses the problem, and where it takes a step: no rank waits, all have the reason."""

    def pose(spacetime):
        made = heat(spacetime)
        if COMM.rank == COMM.size - 1:
            raise error
        return made

    found = same_on_all_ranks(choose_grid(pose, solver_parameters=SERIAL))
    assert (found.shape, found.seconds) == ((1, COMM.size, 1), {})
    assert str(error) in found.why
    actions = kernels._block_actions

    def fails(propagator, size):
        made, steps = actions(propagator, size)
        return (made, steps) if COMM.rank else ({name: lambda: _raise(error) for name in made}, 1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_block_actions", fails)
        found = same_on_all_ranks(choose_grid(heat, experiments=2, solver_parameters=SERIAL))
    assert found.shape == (1, COMM.size, 1)
    assert str(error) in found.why


def _raise(error):
    raise error


@pytest.mark.parallel([2])
def test_an_exit_on_one_rank_ends_all():
    def pose(spacetime):
        if COMM.rank == 0:
            raise SystemExit(3)
        return None

    with pytest.raises(SystemExit):
        choose_grid(pose)


@pytest.mark.parallel([2])
@pytest.mark.parametrize(
    ("posing", "first", "words"),
    [
        (1e-9, 1, "2 in space (0.1 s of measurements are over)"),
        (1.0, 2, "1 in space (0.1 s of measurements are over)"),
        (0.1, 2, "1 in space (posing and factoring would take about 4.9 s)"),
    ],
)
def test_measurements_end_with_their_budget(posing, first, words, monkeypatch):
    """What has begun is completed, and what was left out is said; the first is that of the quickest factorisation."""
    monkeypatch.setattr(measurement, "REDUNDANT", 10)
    monkeypatch.setattr(measurement, "POSING", posing)

    def slow(spacetime):
        time.sleep(0.2)
        return heat(spacetime)

    budget = 0.1 if "over" in words else 4.0
    found = same_on_all_ranks(choose_grid(slow, solver_parameters=SERIAL, budget=budget))
    assert {shape[0] for shape in found.seconds} == {first}
    assert words in found.left_out


@pytest.mark.parallel([2])
def test_without_virtual_ranks(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    found = choose_grid(heat)
    assert found.shape == (1, COMM.size, 1)
    assert "pip install greenlet" in found.why


@pytest.mark.parallel([1, 2])
@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"experiments": 0}, "experiments 0: give a whole number"),
        ({"experiments": 2.0}, r"experiments 2\.0"),
        ({"budget": -1.0}, r"budget -1\.0: give a positive number"),
        ({"pose": "heat"}, "pose 'heat': give a function"),
    ],
)
def test_bad_arguments(given, words):
    with pytest.raises(InputError, match=words):
        choose_grid(**{"pose": heat} | given)


@pytest.mark.parallel([2])
def test_arguments_that_differ_between_ranks():
    with pytest.raises(InputError, match="experiments is not the same on all ranks"):
        choose_grid(heat, experiments=1 + COMM.rank)


@pytest.mark.parallel([2])
def test_what_is_posed_has_an_evolution():
    """The fallback names what pose returned; an object with an evolution, or with several, will do."""
    assert "pose returns NoneType: return an Evolution" in choose_grid(lambda st: None).why

    class Several:
        def __init__(self, spacetime):
            self.evolutions = [heat(spacetime), None]

    assert choose_grid(Several, experiments=2, solver_parameters=SERIAL).seconds


# -- plans for more ranks ----------------------------------------------------------------------------------------------
@pytest.mark.parallel([1, 2])
def test_costs_are_those_of_a_plan(monkeypatch):
    """Kernels as measured, the cycles of all options that the time solver chooses from, and the solver in space."""
    monkeypatch.setattr(measurement, "REDUNDANT", 10)
    made = measured_costs(heat, solver_parameters={"time_solver": "auto", "mgrit": {"rtol": 1e-6}})
    assert all(other == made for other in COMM.allgather(made))
    assert sorted(made.kernels) == [1, 2][: COMM.size]
    assert (made.unknowns, made.nsteps, made.dimension, made.space_solver) == (49, 16, 2, "replicated")
    assert {entry["rtol"] for entry in made.cycles} == {1e-6, 1e-3}
    least = {entry["rtol"]: min(e["state"] for e in made.cycles if e["rtol"] == entry["rtol"]) for entry in made.cycles}
    assert 0 <= least[1e-3] <= least[1e-6]
    assert plan(made, 8, rtol=1e-6).best.seconds <= predict(made, {"levels": 1}, (1, 1), (0, 0)).seconds


@pytest.mark.parallel([2])
def test_costs_of_a_problem_that_cannot_be_posed():
    def pose(spacetime):
        if COMM.rank:
            raise InputError("no such file")
        return heat(spacetime)

    with pytest.raises(InputError, match="no such file"):
        measured_costs(lambda st: pose(SpaceTime("1x1", MPI.COMM_SELF)))


# -- a network ---------------------------------------------------------------------------------------------------------
@pytest.mark.parallel([2])
def test_measured_network():
    found = kernels.measured_network(COMM)
    assert COMM.allgather(found) == [found] * COMM.size
    assert 1e-8 < found.latency < 1.0
    assert 1e5 < found.bandwidth < 1e12

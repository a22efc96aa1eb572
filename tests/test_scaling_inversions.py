"""Whole inversions as the model adds them up, beside real ones."""

from collections import Counter

import pytest
from mpi4py import MPI

pytest.importorskip("greenlet")

from pint_fem.scaling.calibrate import Case, calibrate, kernel_tables
from pint_fem.scaling.costs import Calibration, Kernel
from pint_fem.scaling.model import Model, Solve
from pint_fem.scaling.network import Network
from pint_fem.scaling.timing import Measured
from pint_fem.scaling.validation import Comparison, compare
from problems.heat_square import square
from tests.benchmarks.scaling.inversions import best_inversion, count_inversion, inversion_seconds, serial_inversion
from tests.benchmarks.scaling.records import Record
from tests.scaling_traces import FREQUENCY_LANES, events

STEPS = 40
MGRIT = {"levels": 3, "coarsening": [4, 2], "relax": "FCF"}
PARADIAG = {"time_solver": "paradiag", "alpha": 1e-4}


def calibration(**changes) -> Record:
    """A millisecond a state, half of it on lanes."""
    one = [Kernel((1, 8), (1e-3, 4e-3), lanes=True)]
    work = {"step": one, "adjoint": one}
    costs = {"solve": 1e-3, "solve transposed": 1e-3, "factor": 0.5, "factor bytes": 1e4, "pack": 0.0, "fft steps": 40,
             "fft columns": 64, "fft": 1e-6, "ifft": 1e-6, "few fft": 1e-6, "few ifft": 1e-6}  # fmt: skip
    c = Record("test", "none", 36, STEPS, {1: work}, network=Network(1e-6, 1e10, "fast"), stages=2,
               paradiag=costs | FREQUENCY_LANES)  # fmt: skip
    return c.with_changes(**changes)


def counted(options, **solver):
    """An inversion, and the functional that was minimised."""
    made = []

    def pose(grid, steps, parameters):
        kind = "paradiag" if "time_solver" in options else "mgrit"
        parameters = {**parameters, kind: {**parameters[kind], **solver}}
        made.append(square(steps, "SDIRK2", size=5, spacetime=grid, **parameters))
        return made[-1]

    return count_inversion(pose, STEPS, options, gtol=1e-6, rtol=1e-9), made[-1]


@pytest.mark.parametrize("options", [{"levels": 1}, MGRIT, PARADIAG], ids=["serial", "mgrit", "paradiag"])
def test_whole_inversion_is_that_of_a_real_trace(options):
    """Every call on every level, of all solves of an optimisation."""
    found, rf = counted(options, trace="t")
    tasks = [(task, [Solve(*s) for s in solves]) for task, solves, n in found["solves"] for _ in range(n)]
    model = Model(calibration(), options, nsteps=STEPS)
    said = model.run_all(tasks, trace=True)
    real = Counter({what: n for what, n in events(rf.problem.sweeps.solvers.trace.events).items() if what[0] == "work"})
    assert real == Counter({what: n for what, n in events(said.traces[0]).items() if what[0] == "work"})
    assert found["inexact"] == (options != {"levels": 1})
    assert found["counts"]["hessians"] == sum(n for task, _, n in found["solves"] if task == "hessian") > 1
    assert found["reason"] == "gradient tolerance"
    # on one rank, tasks that come again take as long
    assert inversion_seconds(calibration(), found, (1, 1)) == pytest.approx(said.seconds)


def inversion(options, *solves):
    """As if counted."""
    counts = {"values": 2, "gradients": 3, "hessians": 5}
    return {"options": options, "inexact": False, "solves": solves, "counts": counts, "steps": STEPS, "unknowns": 36}


def test_inversions_are_sums():
    """By hand: sequential sweeps of 40 ms, the optimiser's vectors, and factors once."""
    serial = inversion({"levels": 1}, ["value", [["state", "nested", 0]], 2],
                       ["hessian", [["tangent", "nested", 0], ["adjoint", "nested", 0]], 5])  # fmt: skip
    c = calibration(inversions=[serial])
    assert serial_inversion(c) is serial
    assert best_inversion(c, 4) is None
    assert inversion_seconds(c, serial, (1, 1)) == pytest.approx((2 + 2 * 5) * 0.040, rel=1e-3)
    more = c.with_changes(extras={"optimiser": 1.0})
    vectors = inversion_seconds(more, serial, (1, 1)) - inversion_seconds(c, serial, (1, 1))
    assert vectors == pytest.approx(4 * 5 + 2 * 3)
    # a solve without iterations makes no factors
    first = ["value", [["state", "nested", 0]], 1]
    one, three = (inversion(PARADIAG, first, ["value", [["state", "nested", 2]], n]) for n in (1, 3))
    factors = 21 * 2 * 0.5  # of 40 real steps' frequencies, of two stages
    once, thrice = (inversion_seconds(c, counted, (1, 1)) for counted in (one, three))
    nothing = inversion_seconds(c, inversion(PARADIAG, first), (1, 1))
    assert thrice - once == pytest.approx((once - nothing - factors) * 2)
    free = c.with_changes(paradiag={**c.paradiag, "factor": 0.0})
    assert once - inversion_seconds(free, one, (1, 1)) == pytest.approx(factors)


@pytest.mark.parametrize("ranks", [1, 2, 8])
@pytest.mark.parametrize("nbytes", [1e4, 2e9])
def test_the_fastest_inversion_is_found(ranks, nbytes):
    """As exhaustive search does; of 42 large factors a rank keeps two, and eight ranks a good part."""
    some = [inversion(o, ["value", [["state", "nested", n]], 7]) for o, n in ((MGRIT, 3), (PARADIAG, 2), (MGRIT, 2))]
    c = calibration(inversions=[inversion({"levels": 1}), *some])
    c = c.with_changes(paradiag={**c.paradiag, "factor bytes": nbytes, "factor": 0.05})
    best = best_inversion(c, ranks)
    seconds = [inversion_seconds(c, counted, (1, ranks)) for counted in some]
    assert best.seconds == min(seconds)
    assert best.options == some[seconds.index(best.seconds)]["options"]
    assert best.grid == (1, ranks)


@pytest.mark.parallel([1, 2])
def test_a_problem_is_calibrated_and_validated():
    """What is measured is positive, kept as JSON, and enough for the model; validation uses the same kernels."""
    comm = MPI.COMM_WORLD
    pose = lambda grid, steps, parameters: square(steps, "SDIRK2", size=5, spacetime=grid, **parameters)
    made = comm.bcast(calibrate(Case("square", pose, STEPS, [PARADIAG]), comm=comm, repeats=2, small=STEPS))
    assert Calibration.from_json(made.to_json()).to_json() == made.to_json()
    assert sorted(made.kernels) == [1, 2][: comm.size]
    assert sorted(made.slowdown) == [1, 2][: comm.size]
    assert all(s > 0 for kinds in made.kernels.values() for levels in kinds.values() for k in levels for s in k.seconds)
    assert all(made.paradiag[part] > 0 for part in ("solve", "solve transposed", "factor", "fft", "pack"))
    assert made.notes
    for options in (MGRIT, PARADIAG, {"levels": 1}) if comm.size == 1 else (MGRIT, PARADIAG):
        rows = compare(made, pose, options, STEPS, comm=comm, repeats=2)
        assert [row.task for row in rows] == ["state", "adjoint", "gradient"]
        assert all(min(row.measured, row.slower, row.predicted) > 0 for row in rows)
        assert all(row.ranks == comm.size for row in rows)


def test_tables_of_kernels_by_hand():
    """By kind and level; on lanes and between sizes."""
    seconds = {("step", 0, 1): 1.0, ("step", 0, 8): 2.0, ("step", 1, 1): 3.0, ("step", 1, 8): 5.0}
    seconds["adjoint", 0, 1] = 0.5
    tables = kernel_tables(seconds)
    assert [[kernel(n) for n in (1, 2, 8, 9)] for kernel in tables["step"]] == [[1, 2, 2, 3], [3, 5, 5, 8]]
    assert [kernel(8) for kernel in tables["adjoint"]] == [4.0]
    (plain, _), _ = kernel_tables(seconds, lanes=False).values()
    assert [plain(n) for n in (1, 8, 15)] == [1.0, 2.0, 3.0]


def test_a_slower_machine_is_taken_out():
    """By hand: in the second round all takes twice as long; the dear kernel counts for more."""
    each = lambda *seconds: Measured(seconds[0], seconds[0], seconds)
    found = {"state": each(1.1, 2.2, 1.1), "a": each(0.1, 0.2, 0.1), "b": each(0.03, 0.06, 0.03)}
    row = Comparison.of("state", 2, 64, (3, 3), found, {"a": (0.1, 0.9), "b": (0.02, 0.1)}, 1.0)
    assert row.measured == 1.1
    assert row.slower == pytest.approx(0.9 + 0.1 * 1.5)
    assert row.error == pytest.approx(1.05 / 1.1 - 1)
    assert row.predicted == pytest.approx(1.05)

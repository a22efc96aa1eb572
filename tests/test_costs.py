"""Predicted times of sweeps by counting, residuals of the model by dense algebra, and the choice of the time solver."""

import math

import numpy as np
import pytest
from mpi4py import MPI

import pint_fem as pf
from pint_fem.sweeps import automatic
from pint_fem.sweeps.predictions import ratios
from pint_fem.theory.costs import TwoLevel, block_seconds, fastest, mgrit_seconds, rounded, sequential_seconds
from pint_fem.theory.model_residuals import ModelResiduals, relative_residuals
from pint_fem.theory.spectrum import spectrum
from tests.logs import logged
from tests.test_paradiag import functional, posed_heat

SECONDS = {1: 1.0, 8: 2.0, 16: 3.0, 32: 5.0}


@pytest.mark.parametrize(
    ("count", "expected"),
    [(1, 1), (2, 2), (5, 2), (9, 3), (16, 3), (17, 4), (24, 5), (25, 5), (32, 5), (33, 6), (40, 7), (64, 10), (96, 15)],
)
def test_time_of_a_block(count, expected):
    """The cheapest calls for some states: of 17, one of 16 and one alone; of 24, one of 32 costs as 16 and 8."""
    assert block_seconds(SECONDS, count) == expected


def test_widest_calls_are_not_always_the_best():
    assert block_seconds({1: 1.0, 8: 2.0, 16: 5.0}, 32) == 8.0


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("relax", ["F", "FCF", "FCFCF"])
@pytest.mark.parametrize("cycles", [0, 1, 3])
def test_time_of_a_solve_by_counting_calls(ranks, relax, cycles):
    """Every call of the algorithm, as it is written in the literature, one after another."""
    steps, m, coarse_steps = 96, 4, 3
    own, total = math.ceil(24 / ranks), 0.0
    step = lambda: block_seconds(SECONDS, own)
    f_relaxation = lambda: sum(step() for _ in range(m - 1))
    coarse = lambda: sum(SECONDS[1] for _ in range(24 * coarse_steps))
    total += f_relaxation() + step()  # the right-hand side at the C-points
    total += coarse() + f_relaxation() + step()  # interpolation, residual
    for _ in range(cycles):
        for sweep in range(relax.count("C")):
            total += step() if sweep else 0.0  # C-relaxation: the first by the residual
            total += f_relaxation()
        total += step()  # residual to be restricted
        total += coarse_steps * step()  # a coarse step from each C-point
        total += coarse() + f_relaxation() + step()
    if relax == "F":  # the residual of the last cycle is that to be restricted
        total -= cycles * step()
    options = TwoLevel(m, coarse_steps, relax)
    assert mgrit_seconds(SECONDS, steps, ranks, options, cycles) == pytest.approx(total, rel=1e-14)


def test_time_of_sequential_stepping():
    assert sequential_seconds(SECONDS, 96) == 96


def test_rounded_times():
    """Times that differ by a few percent are the same."""
    assert rounded({1: 2e-3, 8: 4e-3}) == {1: 1.0, 8: 2.0}
    assert rounded({1: 1.0, 8: 2.1}) == rounded({1: 1.0, 8: 1.9})
    assert rounded({1: 1.0, 8: 2.3})[8] == pytest.approx(2**1.25)


def test_the_canonical_options_unless_others_are_clearly_faster():
    a, b, c = TwoLevel(16, 2), TwoLevel(8, 2), TwoLevel(32, 2)
    assert fastest({a: 1.0, b: 0.9, c: 0.95}, [a, c]) == a
    assert fastest({a: 1.0, b: 0.8, c: 0.95}, [a, c]) == b
    assert fastest({b: 1.0, c: 1.1}, [a, c]) == c
    assert fastest({b: 1.0, c: 1.0}, [a]) == b


@pytest.mark.parametrize("nu", [0, 1, 2])
@pytest.mark.parametrize(("fine", "coarse"), [(0.9, 0.85), (0.999 + 0.02j, 0.98 + 0.1j), (0.1, -0.2)])
def test_residuals_of_the_model(fine, coarse, nu):
    """Two levels for one mode with dense matrices: coarse problem, correction, relaxation as in the algorithm."""
    count, m = 20, 4
    rng = np.random.default_rng(1)
    g = rng.standard_normal(count) + 1j * rng.standard_normal(count)
    shift = np.eye(count, k=-1)
    A, B = np.eye(count) - fine**m * shift, np.eye(count) - coarse * shift
    u, expected = np.linalg.solve(B, g), []
    for _ in range(5):
        expected.append(np.linalg.norm(g - A @ u) / np.linalg.norm(np.linalg.solve(A, g)))
        for _ in range(nu):
            u = g + fine**m * shift @ u
        u = u + np.linalg.solve(B, g - A @ u)
    found = relative_residuals(np.array([fine**m]), np.array([coarse]), g[None], nu, 4)
    np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-14)


@pytest.mark.parametrize(("m", "coarse_steps", "relax"), [(8, 1, "F"), (8, 2, "F"), (8, 2, "FCF"), (16, 2, "F")])
def test_predicted_cycles_are_those_of_real_sweeps(m, coarse_steps, relax):
    """Of a heat equation to 1e-2 .. 1e-8: as many as the adjoint of point-like data takes, or one more or fewer."""
    st = pf.SpaceTime("1x1", comm=MPI.COMM_SELF)
    ev = posed_heat(st, n=8, steps=128)
    given = dict(levels=2, coarsening=m, coarse_steps=coarse_steps, relax=relax, max_it=12)
    sweeps = functional(ev, st, mgrit=given).problem.sweeps
    G, L = sweeps.new_slab(), sweeps.new_slab()
    G[-1] = np.random.default_rng(0).standard_normal(G.shape[1])
    tolerances = [1e-2, 1e-4, 1e-6, 1e-8]
    own = sweeps.evolution
    predicted = ModelResiduals(spectrum(own), own).cycles(m, coarse_steps, relax, tolerances, 12)
    for tolerance, cycles in zip(tolerances, predicted, strict=True):
        L[...] = 0
        assert abs(sweeps.adjoint(None, L, G, L, cold=True, rtol=tolerance).cycles - cycles) <= 1


def choose(monkeypatch, st, seconds, **options):
    """The functional of a heat equation that is chosen for times of a step, and the lines about it."""
    monkeypatch.setattr(automatic, "measured_seconds", lambda *given: seconds)
    monkeypatch.setattr(ratios, "PARADIAG", 1e3)
    with logged() as lines:
        rf = functional(posed_heat(st, n=4, steps=256), st, time_solver="auto", **options)
    return rf, lines


@pytest.mark.parallel([1, 3])
def test_choice_by_times_of_a_step(monkeypatch):
    """Cheap blocks: MGRIT, with the value of sequential stepping; blocks as expensive as their states: sequential."""
    st = pf.SpaceTime()
    rf, lines = choose(monkeypatch, st, {1: 1.0, 8: 1.0, 16: 1.0, 32: 1.0}, mgrit={"rtol": 1e-10})
    solvers = rf.problem.sweeps.solvers
    assert solvers.kind == "mgrit"
    assert len(solvers.propagators) == 2
    assert len(lines) == (MPI.COMM_WORLD.rank == 0)
    assert all("auto: mgrit, m = " in line and "of sequential stepping" in line for line in lines)
    assert len(set(MPI.COMM_WORLD.allgather(solvers.view().split("memory")[0]))) == 1
    slow, lines = choose(monkeypatch, st, {1: 1.0, 8: 8.0, 16: 16.0, 32: 32.0})
    assert slow.problem.sweeps.solvers.kind == "serial"
    assert all("auto: serial" in line for line in lines)
    z = np.ones(rf.layout.size)
    assert rf.problem.value(z) == pytest.approx(slow.problem.value(z), rel=1e-8)


def test_given_options_are_kept(monkeypatch):
    """Those that shape cycles leave no choice but that of the solver; others do."""
    st = pf.SpaceTime("1x1", comm=MPI.COMM_SELF)
    cheap = {1: 1.0, 8: 1.0, 16: 1.0, 32: 1.0}
    for name, value in (("coarsening", (8, 4)), ("relax", "F"), ("levels", 3), ("level_0_relax", "F")):
        rf, _ = choose(monkeypatch, st, cheap, mgrit={name: value})
        assert len(rf.problem.sweeps.solvers.propagators) == 3
    rf, _ = choose(monkeypatch, st, cheap, mgrit={"max_it": 9})
    assert rf.problem.sweeps.options.max_it == 9
    assert len(rf.problem.sweeps.solvers.propagators) == 2


def test_cheap_iterations_of_paradiag_are_chosen(monkeypatch):
    st = pf.SpaceTime("1x1", comm=MPI.COMM_SELF)
    monkeypatch.setattr(automatic, "measured_seconds", lambda *given: {1: 1.0, 8: 8.0})
    monkeypatch.setattr(ratios, "PARADIAG", 0.1)
    monkeypatch.setattr(ratios, "LEAST", 0.1)
    with logged() as lines:
        rf = functional(posed_heat(st, n=4, steps=64), st, time_solver="auto")
    assert rf.problem.sweeps.solvers.kind == "paradiag"
    assert "about 0.25 of sequential stepping" in lines[0]  # three iterations to 1e-8 and two to 1e-4, each by 6e-4


def test_coarse_steps_are_shown():
    st = pf.SpaceTime("1x1", comm=MPI.COMM_SELF)
    rf = functional(posed_heat(st, n=4, steps=64), st, mgrit={"coarse_steps": 3})
    assert "3 steps of the integrator" in rf.problem.sweeps.solvers.view()
    plain = functional(posed_heat(st, n=4, steps=64), st, mgrit={})
    assert "of the integrator" not in plain.problem.sweeps.solvers.view()


def test_looser_solves_take_less():
    """The tolerance of most solves decides on the number of cycles."""
    st = pf.SpaceTime("1x1", comm=MPI.COMM_SELF)
    ev = posed_heat(st, n=8, steps=128).private()
    model = ModelResiduals(spectrum(ev), ev)
    loose, tight = (ratios.mgrit_ratios(SECONDS, 128, 1, model, [rtol]) for rtol in (1e-2, 1e-9))
    assert all(loose[o] < tight[o] for o in tight)
    assert min(loose.values()) < 0.7 * min(tight.values())


@pytest.mark.parametrize("bad", [0, 1.0, -1e-2, "loose", True])
def test_typical_tolerances_out_of_range(bad):
    st = pf.SpaceTime("1x1", comm=MPI.COMM_SELF)
    with pytest.raises(pf.InputError, match=r"typical_rtol .*: give a number between 0 and 1"):
        functional(posed_heat(st, n=2, steps=8), st, time_solver="auto", typical_rtol=bad)


@pytest.mark.parallel([1, 2])
def test_measured_times(monkeypatch):
    """The same on all ranks, relative to one state; once for a size of problem; the propagator is used afterwards."""
    monkeypatch.setattr(automatic, "_SECONDS", {})
    st = pf.SpaceTime()
    ev = posed_heat(st, n=4, steps=64).private()
    made = automatic.MadePropagator()
    found = automatic.measured_seconds(ev, st, made)
    assert found is not None
    assert set(found) == {1, 8, 16, 32}
    assert found[1] == 1.0
    assert all(other == found for other in MPI.COMM_WORLD.allgather(found))
    first = made.made
    assert made(ev, stride=1) is first
    assert made(ev, stride=1) is not first
    assert automatic.measured_seconds(ev, st, made) is found
    assert made.made is None


def test_candidates():
    """Equal intervals, at least four and as many as ranks."""
    assert {o.m for o in ratios.candidates(64, 1)} == {4, 8, 16}
    assert {o.m for o in ratios.candidates(64, 8)} == {4, 8}
    assert {o.m for o in ratios.candidates(24, 1)} == {4}
    assert not ratios.candidates(30, 1)
    assert all(o.coarse_steps < o.m for o in ratios.candidates(256, 1))


@pytest.mark.parametrize(
    ("rate", "ranks", "expected"), [(1e-4, 1, 3.0), (1e-4, 4, 0.75), (0.6, 1, np.inf), (None, 1, np.inf)]
)
def test_iterations_of_paradiag(monkeypatch, rate, ranks, expected):
    """One to 1e-2, two to 1e-8, each of which takes eight times as long as steps in blocks of eight."""
    monkeypatch.setattr(ratios, "PARADIAG", 8.0)
    assert ratios.paradiag_ratio({1: 2.0, 8: 4.0}, rate, ranks, [1e-2, 1e-8]) == pytest.approx(expected)


def test_iterations_of_paradiag_take_at_least_a_multiple_of_a_sweep():
    """However cheap blocks are, transforms remain."""
    assert ratios.paradiag_ratio({1: 1.0, 32: 0.0}, 1e-4, 2, [1e-2]) == ratios.LEAST / 2

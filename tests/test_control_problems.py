"""The ready problems of optimal control: derivatives, the same problem on a serial tape, ranks, and known answers."""

from argparse import ArgumentTypeError, Namespace
from dataclasses import replace

import numpy as np
import pytest
from firedrake import COMM_SELF, Constant, Function, assemble, dx

import pint_fem as pf
from demos.control_pictures import Course, Row, active_runs, plot_controls, plot_rows
from demos.control_report import courses, tracking
from demos.control_run import bounds, settings_of
from pint_fem.kernels.arrays import get, put
from problems.compare_control import formula
from problems.count_calls import count_calls
from problems.heat_control import HEATERS, HeatControl, heat_control, heat_control_forms, target
from problems.reaction_control import ReactionControl, reaction_control, reaction_control_forms
from problems.serial_control import record
from problems.wave_control import WaveControl, wave_control, wave_control_forms
from tests.pictures import assert_drawn
from tests.taylor import check_orders

PROBLEMS = {
    "heat": (heat_control, heat_control_forms, HeatControl(cells=4, steps=4)),
    "wave": (wave_control, wave_control_forms, WaveControl(cells=4, steps=4, region="strip")),
    "reaction": (reaction_control, reaction_control_forms, ReactionControl(cells=5, steps=4)),
}
SERIAL = {"time_solver": "serial"}


def alone():
    return pf.SpaceTime("1x1", comm=COMM_SELF)


def posed(name, spacetime=None, solver=SERIAL, **settings):
    pose, _, given = PROBLEMS[name]
    return pose(spacetime or alone(), replace(given, **settings), solver_parameters=solver)


def vectors(rf):
    """A control and a direction that do not depend on the number of ranks in time: smooth in space, by step."""
    from problems.compare_control import _places

    steps = np.arange(rf.layout.slab.lo, rf.layout.slab.hi)
    of = lambda direction: rf.layout.join(
        [formula(_places(q), steps, i, direction=direction) for i, q in enumerate(rf.evolution.controls)]
    )
    return of(False), of(True)


def relative(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def test_derivatives_of_the_nonlinear_problem():
    """Orders 2 and 3 of the remainders of Taylor's expansion."""
    rf = posed("reaction").rf
    z, dz = vectors(rf)
    check_orders(rf, rf.function(3 * z), rf.function(5 * dz))


@pytest.mark.parametrize("name", ["heat", "wave"])
def test_derivatives_of_quadratic_problems(name):
    """Taylor's expansion ends with the second derivative, for a step of any length."""
    of = posed(name).rf.problem
    assert of.is_quadratic
    z, dz = vectors(posed(name).rf)
    J, slope, curvature = of.value(z), of.derivative(z) @ dz, of.hessian_action(z, dz) @ dz
    for step in (1.0, -10.0):
        expected = J + step * slope + 0.5 * step**2 * curvature
        assert of.value(z + step * dz) == pytest.approx(expected, rel=1e-11)
        assert abs(0.5 * step**2 * curvature) > 1e-6 * J


@pytest.mark.parametrize("name", PROBLEMS)
def test_same_as_a_serial_tape(name):
    """Acceptance: J and gradient to 1e-8, a Hessian action to 1e-7 of those of pyadjoint."""
    pose, forms, settings = PROBLEMS[name]
    rf = pose(alone(), settings, solver_parameters=SERIAL).rf
    serial = record(forms(settings, alone()), steps=settings.steps, integrator=settings.integrator)
    rows = lambda z: [part[n] for n in range(settings.steps) for part in rf.layout.parts(z)]

    def on_tape(z):
        made = [Function(q.function_space()) for q in serial.q]
        for f, row in zip(made, rows(z), strict=True):
            put(f, row)
        return made

    z, dz = vectors(rf)
    assert rf.problem.value(z) == pytest.approx(float(serial.rf(on_tape(z))), rel=1e-10)
    ours = (rf.problem.derivative(z), rf.problem.hessian_action(z, dz))
    theirs = (serial.rf.derivative(), serial.rf.hessian(on_tape(dz)))
    for a, b in zip(ours, theirs, strict=True):
        assert relative(np.concatenate(rows(a)), np.concatenate([get(f) for f in b])) < 1e-10


@pytest.mark.parallel(2)
@pytest.mark.parametrize("name", PROBLEMS)
def test_ranks(name):
    """Two ranks in time give the numbers of one bit for bit where steps are sequential, two in space to round-off."""
    one = posed(name).rf
    z, dz = vectors(one)
    J = one.problem.value(z)
    expected = one.problem.derivative(z), one.problem.hessian_action(z, dz)
    for grid in ("1x2", "2x1"):
        rf = posed(name, pf.SpaceTime(grid)).rf
        own, direction = vectors(rf)
        found = rf.problem.value(own), rf.problem.derivative(own), rf.problem.hessian_action(own, direction)
        if grid == "1x2":
            assert found[0] == J
            slab = slice(rf.layout.slab.lo, rf.layout.slab.hi)
            for a, b in zip(found[1:], expected, strict=True):
                for x, y in zip(rf.layout.parts(a), one.layout.parts(b), strict=True):
                    np.testing.assert_array_equal(x, y[slab])
        else:
            assert found[0] == pytest.approx(J, rel=1e-10)
            for a, b in zip(found[1:], expected, strict=True):
                assert rf.layout.pairing(a, direction) == pytest.approx(one.layout.pairing(b, dz), rel=1e-8)


# -- known answers -----------------------------------------------------------------------------------------------------
def test_a_plate_without_heat_stays_cold():
    """J at zero is half the square of the target, summed over the steps by a loop."""
    problem = posed("heat")
    mesh = problem.evolution.V.mesh()
    x, dt = problem.forms.V.mesh().coordinates, problem.evolution.dt
    squares = [assemble(0.5 * target(x, Constant(n * dt)) ** 2 * dx(domain=mesh, degree=4)) for n in range(1, 5)]
    z = np.zeros(problem.rf.layout.size)
    assert problem.rf.problem.value(z) == pytest.approx(dt * sum(squares), rel=1e-12)
    assert tracking(problem, z) == pytest.approx(squares, rel=1e-12)


def test_heat_is_balanced():
    """Integrated over the plate: du/dt + 1.5 u = q/2 for each heater of length 1/2; backward Euler steps by hand."""
    problem = posed("heat", integrator="BackwardEuler")
    dt, powers = problem.evolution.dt, np.arange(1.0, 17.0).reshape(4, 4)  # by heater and step
    assert len(HEATERS) == len(problem.evolution.controls) == 4
    z = problem.rf.layout.join([row[:, None] for row in powers])
    heat, expected = 0.0, []
    for n in range(4):
        heat = (heat + dt * powers[:, n].sum() / 2) / (1 + 1.5 * dt)
        expected.append(heat)
    states = np.concatenate([block for _, block in problem.rf.problem.states(z)])
    u = Function(problem.evolution.V)
    found = []
    for row in states[1:]:
        put(u, row)
        found.append(assemble(u * dx))
    assert found == pytest.approx(expected, rel=1e-12)


def test_energy_of_a_free_membrane():
    """Midpoint steps keep it, for as long as no force acts."""
    problem = posed("wave", steps=16)
    energy = tracking(problem, np.zeros(problem.rf.layout.size))
    assert energy == pytest.approx(np.full(16, energy[0]), rel=1e-11)
    assert energy[0] > 0.1


def test_a_force_beside_the_strip_does_nothing():
    problem = posed("wave", cells=8)
    Q = problem.evolution.controls[0].function_space()
    x = get(Function(Q).interpolate(Q.mesh().coordinates[0]))
    rows = np.tile(np.where(x > 0.26, 1.0, 0.0), (4, 1))
    of = problem.rf.problem
    z = rows.ravel()
    assert of.value(z) == pytest.approx(of.value(0 * z) + _regularisation(of, z), rel=1e-12)
    whole = posed("wave", cells=8, region="all").rf.problem
    assert abs(whole.value(z) - whole.value(0 * z) - _regularisation(whole, z)) > 1e-3


def _regularisation(of, z):
    of.value(z)
    return of.parts["regularisation"]


@pytest.mark.parametrize("name", PROBLEMS)
def test_what_is_tracked_adds_up_to_the_misfit(name):
    problem = posed(name)
    z = vectors(problem.rf)[0]
    of = problem.rf.problem
    running = problem.evolution.dt * tracking(problem, z).sum()
    of.value(z)
    states = of.states(z)
    u = Function(problem.evolution.V)
    for _, block in states:
        put(u, block[-1])
    terminal = 0.0 if problem.forms.terminal is None else assemble(problem.forms.terminal(u))
    assert running + terminal == pytest.approx(of.parts["misfit"], rel=1e-11)


# -- minimisers --------------------------------------------------------------------------------------------------------
def test_minimiser_within_bounds():
    """It is that of TAO's Newton method for bounds, and the report's active sets are where values are at them."""
    problem = posed("heat", steps=12)
    result = problem.rf.minimize("trust-region", bounds=problem.bounds, gtol_rel=1e-9)
    assert result.converged
    counts = count_calls(problem, "bntl", 1e-10, lambda line: None)
    assert counts.converged
    assert counts.hessians > 0
    assert result.value == pytest.approx(counts.value, rel=1e-9)
    found = courses(problem, result.x)
    for course, part in zip(found, problem.rf.layout.parts(result.x), strict=True):
        assert course.is_number
        np.testing.assert_array_equal(course.low, part[:, 0])
        np.testing.assert_array_equal(course.at_lower, part[:, 0] <= 1e-6 * 0.8)
        np.testing.assert_array_equal(course.at_upper, part[:, 0] >= 0.8 * (1 - 1e-6))
        assert 0 <= part.min()
        assert part.max() <= 0.8
    assert 0.2 < np.mean([course.at_lower for course in found]) < 1
    assert 0 < np.mean([course.at_upper for course in found]) < 0.5


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("heat", {"bounds": None}),
        ("heat", {}),
        ("wave", {"region": "all", "terminal": 0.0}),
        ("wave", {"region": "all", "bounds": (-2.0, 2.0)}),
        ("reaction", {"regularisation": 1e-2, "steps": 6}),
    ],
)
def test_kkt_systems_find_the_minimiser_of_the_trust_region(name, settings):
    problem = posed(name, **{"steps": 8, **settings})
    given = {} if problem.bounds is None else {"bounds": problem.bounds}
    start = problem.rf.function(np.zeros(problem.rf.layout.size))
    found = {}
    for method in ("trust-region", "kkt"):
        found[method] = problem.rf.minimize(method, start=start, gtol_rel=1e-9, max_it=40, **given)
        assert found[method].converged
    one, other = found.values()
    assert other.value == pytest.approx(one.value, rel=1e-9)
    assert relative(other.x, one.x) < 1e-5
    if problem.rf.problem.is_quadratic:  # the trust region's products are those of the reduced functional
        assert other.hessian_calls <= one.hessian_calls


@pytest.mark.parametrize(("name", "part"), [("wave", 0.3), ("reaction", 0.2)])
def test_control_reaches_what_it_is_for(name, part):
    """The mean of what is tracked falls to less than a part of that without a control."""
    problem = posed(name, regularisation=1e-2, steps=8, **({"region": "all"} if name == "wave" else {}))
    result = problem.rf.minimize("trust-region", gtol_rel=1e-4, max_it=20)
    assert result.converged
    free = tracking(problem, 0 * result.x).mean()
    assert tracking(problem, result.x).mean() < part * free


def test_calls_without_bounds_are_counted():
    """Of a quadratic functional Newton's method takes as many gradients as evaluations, and products in between."""
    problem = posed("heat", bounds=None)
    counts = {name: count_calls(problem, name, 1e-9, lambda line: None) for name in ("lmvm", "nls")}
    assert counts["lmvm"].hessians == 0 < counts["nls"].hessians
    assert counts["lmvm"].value == pytest.approx(counts["nls"].value, rel=1e-9)
    assert all(c.converged and c.gradients == c.evaluations > 1 for c in counts.values())


# -- settings ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (HeatControl, {"cells": 6}, "cells 6: give a multiple of 4"),
        (HeatControl, {"bounds": (1.0, 0.0)}, "bounds 1.0, 0.0: give a lower bound below"),
        (HeatControl, {"regularisation": 0.0}, "regularisation 0.0: give a positive number"),
        (WaveControl, {"region": "left"}, "region 'left': give one of all, strip"),
        (WaveControl, {"tracking": "l2"}, "tracking 'l2': give one of energy, L2"),
        (WaveControl, {"region": "strip", "cells": 5}, "cells 5: give a multiple of 4"),
        (WaveControl, {"terminal": -1.0}, "weight of the last state -1.0: give zero or a positive number"),
        (ReactionControl, {"steps": 0}, "steps 0: give a positive number"),
    ],
)
def test_bad_settings_are_refused(kind, settings, message):
    with pytest.raises(pf.InputError, match=message):
        kind(**settings)


def test_bounds_on_the_command_line():
    assert bounds("0,0.8") == (0.0, 0.8)
    assert bounds("-1,") == (-1.0, None)
    assert bounds("none") is None
    for text in ("1", "2,1", "a,b", "1,2,3"):
        with pytest.raises(ArgumentTypeError, match=text):
            bounds(text)


def test_settings_are_the_options_that_are_given():
    """No bounds are a choice; what is not given is the default."""
    options = Namespace(cells=8, steps=None, integrator=None, regularisation=None, bounds=None, out="elsewhere")
    assert settings_of(HeatControl, options) == HeatControl(cells=8, bounds=None)


# -- pictures ----------------------------------------------------------------------------------------------------------
def test_runs_of_active_steps():
    assert active_runs(np.array([True, True, False, True])) == [(0, 2), (3, 4)]
    assert active_runs(np.zeros(3, dtype=bool)) == []


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn, as matplotlib has them."""
    from demos import control_pictures

    kept, close = [], control_pictures.plt.close
    monkeypatch.setattr(control_pictures.plt, "close", kept.append)
    yield kept
    for fig in kept:
        close(fig)


def test_picture_of_numbers(tmp_path, figures):
    """Values in their steps, bounds as lines, active steps in colour, and what is tracked below."""
    edges, power = np.linspace(0, 1, 5), np.array([0.0, 0.5, 1.0, 1.0])
    course = Course("left heater", power, power, power, (power == 0).astype(float), (power == 1).astype(float))
    tracked = {"with control": np.arange(1.0, 5.0), "without control": np.full(4, 4.0)}
    given = dict(bounds=(0.0, 1.0), quantity="power", tracked_quantity="energy")
    plot_controls(tmp_path / "control.png", edges, [course], tracked, **given)
    upper, lower = figures[0].axes
    assert upper.get_title(loc="left") == "left heater"
    stairs, *spans = upper.patches
    np.testing.assert_array_equal(stairs.get_data().values, power)
    assert [(span.get_x(), span.get_x() + span.get_width()) for span in spans] == [(0.0, 0.25), (0.5, 1.0)]
    assert [line.get_ydata()[0] for line in upper.lines] == [0.0, 1.0]
    assert [line.get_label() for line in lower.lines] == list(tracked)
    np.testing.assert_array_equal(lower.lines[0].get_xydata(), np.stack([edges[1:], tracked["with control"]], axis=1))
    assert lower.get_ylabel() == "energy"
    assert_drawn(tmp_path / "control.png")


def test_picture_of_a_field(tmp_path, figures):
    """Its least and largest values, and fractions of the active sets."""
    edges, low, high = np.linspace(0, 1, 4), np.array([-1.0, -0.5, 0.0]), np.array([0.0, 1.0, 0.5])
    course = Course("force", low, high, high, np.array([0.3, 0.0, 0.0]), np.array([0.0, 0.4, 0.0]))
    given = dict(bounds=(-1.0, 1.0), quantity="force", tracked_quantity="energy")
    plot_controls(tmp_path / "control.png", edges, [course], {"with control": np.array([1.0, 0.1, 1e-3])}, **given)
    band, active, tracked = figures[0].axes
    np.testing.assert_array_equal([s.get_data().values for s in band.patches], [low, high])
    np.testing.assert_array_equal([s.get_data().values for s in active.patches], [course.at_lower, course.at_upper])
    assert tracked.get_yscale() == "log"
    assert_drawn(tmp_path / "control.png")


def test_picture_of_rows(tmp_path, figures):
    """One scale for the rows of one quantity, active sets in three colours, heaters in the row of the state."""
    x, y = np.meshgrid(np.linspace(0, 1, 30), np.linspace(0, 1, 30))
    images = [x * y, 2 * x]
    rows = [Row("target", images, "u"), Row("state", [3 * x, y], "u"), Row("active set", [np.sign(x - 0.5)] * 2, "")]
    heater = np.array([[0.25, 0.0], [0.75, 0.0]]), np.array([0.0, 2.0])
    given = dict(edges=[heater], edge_quantity="power")
    plot_rows(tmp_path / "states.png", [0.0, 0.5], rows, (0, 1, 0, 1), **given)
    axes = np.array(figures[0].axes[:6]).reshape(3, 2)
    assert [line[0].get_ylabel() for line in axes] == ["target", "state", "active set"]
    assert [ax.get_title() for ax in axes[0]] == ["t = 0.00", "t = 0.50"]
    limits = {ax.images[0].get_clim() for ax in axes[:2].flat}
    assert len(limits) == 1
    assert limits.pop()[1] == pytest.approx(3, abs=0.2)
    assert [len(ax.lines) for ax in axes.flat] == [0, 0, 2, 2, 0, 0]
    shown = [ax.lines[1].get_color() for ax in axes[1]]
    assert shown[0] != shown[1]
    np.testing.assert_array_equal(axes[1, 0].lines[0].get_xydata(), heater[0])
    assert_drawn(tmp_path / "states.png", panels=2, colours=100)

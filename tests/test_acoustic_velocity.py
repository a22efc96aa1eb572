"""Acoustics and the inversion for the wave speed: energy, exact solutions, filters, derivatives, serial pyadjoint."""

from dataclasses import replace

import numpy as np
import pytest
from firedrake import (
    COMM_SELF,
    COMM_WORLD,
    Function,
    FunctionSpace,
    SpatialCoordinate,
    UnitSquareMesh,
    as_vector,
    assemble,
    cos,
    dx,
    pi,
    sin,
)
from pyadjoint import taylor_to_dict
from scipy.linalg import expm

import pint_fem as pf
from pint_fem.errors import InputError
from pint_fem.kernels.arrays import get, put
from pint_fem.propagators import make_propagator
from problems.acoustic import P, V, energy, free_surface, residual, state_space
from problems.acoustic_readings import NOISE, READINGS, filtered
from problems.acoustic_setting import (
    COLUMNS,
    FINAL_TIME,
    PEAK,
    PEAK_FREQUENCY,
    RECORD_END,
    SHOTS,
    damping,
    filter_width,
    filtered_pulse,
    ground_mesh,
    low_pass,
    ricker,
    shot_shape,
)
from problems.acoustic_velocity import acoustic_velocity
from problems.compare_experiments import formulas
from problems.experiments import ExperimentReadings, read_experiments
from problems.readings import Readings
from problems.serial_acoustic import serial_acoustic_velocity

SMALL = dict(cells=4, degree=1)


def box(n, *, degree=1, speed=1.0, steps=40, dt=0.02, walls=(), **given):
    """A square with a free surface on all sides but the walls; a standing wave at first, if it has none."""
    mesh = UnitSquareMesh(n, n, comm=COMM_SELF)
    space = state_space(mesh, degree)
    u, free = Function(space), tuple(part for part in (1, 2, 3, 4) if part not in walls)
    x = SpatialCoordinate(mesh)
    u.subfunctions[P].interpolate(sin(pi * x[0]) * sin(pi * x[1]))
    return pf.Evolution(
        residual(u, speed, walls=walls, **given), u, tableau=pf.ImplicitMidpoint(), dt=dt, nsteps=steps,
        bcs=free_surface(space, free), eliminate=V,
    )  # fmt: skip


def states(ev):
    """All states of an evolution without loads, ``(steps + 1, n)``."""
    U = np.zeros((ev.nsteps + 1, ev.state_size))
    U[0] = get(ev.initial)
    make_propagator(ev).sweep(U, None)
    return U


def energies(ev, speed=1.0):
    f, found = Function(ev.V), []
    for state in states(ev):
        put(f, state)
        found.append(assemble(energy(f, speed)))
    return np.array(found)


# -- physics ----------------------------------------------------------------------------------------------------------
def test_energy():
    """Midpoint steps keep it; damping and absorbing walls take it away in all steps."""
    kept = energies(box(4, speed=2.0), 2.0)
    assert np.ptp(kept) < 1e-11 * kept[0]
    for given in (dict(damping=1.5), dict(walls=(1, 2))):
        lost = energies(box(4, **given))
        assert (np.diff(lost) < 0).all()
        assert lost[-1] < 0.7 * lost[0]


def test_damped_wave():
    """The amplitudes a, b of a damped standing wave's fields solve a' = -sigma a - w b, b' = w a."""
    sigma, w, T = 1.5, 2**0.5 * pi, 0.8
    found = energies(box(4, degree=2, damping=sigma, steps=80, dt=T / 80))
    a, b = expm(T * np.array([[-sigma, -w], [w, 0.0]])) @ [1.0, 0.0]
    assert abs(found[-1] / found[0] - (a**2 + b**2)) < 5e-3


@pytest.mark.parametrize("degree", [1, 2])
def test_standing_wave(degree):
    """p converges to sin(pi x) sin(pi y) cos(sqrt(2) pi c t) with order degree + 1, both fields as the exact ones."""
    errors, speed, T = [], 1.5, 0.4
    for n, steps in ((6, 128), (12, 128 * 2 ** (degree // 2 + 1))):
        ev = box(n, degree=degree, speed=speed, steps=steps, dt=T / steps)
        f, x = Function(ev.V), SpatialCoordinate(ev.V.mesh().unique())
        put(f, states(ev)[-1])
        w = 2**0.5 * pi * speed
        p, v = f.subfunctions
        gradient = as_vector((cos(pi * x[0]) * sin(pi * x[1]), sin(pi * x[0]) * cos(pi * x[1])))
        apart = p - sin(pi * x[0]) * sin(pi * x[1]) * cos(w * T)
        others = v + pi / w * sin(w * T) * gradient
        errors.append([assemble(e**2 * dx(degree=8)) ** 0.5 for e in (apart, others)])
    rates = np.log2(np.array(errors[0]) / errors[1])
    assert rates[0] > degree + 0.8
    assert rates[1] > degree - 0.2


def test_absorbing_layer():
    """After a shot's waves have left, at most a small part of their largest energy is in the section."""
    mesh = ground_mesh(8, COMM_SELF)
    space, x, t = state_space(mesh, 1), SpatialCoordinate(mesh), pf.time_function(mesh)
    u, shape = Function(space), Function(FunctionSpace(mesh, "CG", 1))
    ev = pf.Evolution(
        residual(u, 2.0, source=ricker(t, 3.0) * shape, damping=damping(x), walls=(1, 2, 3)), u,
        tableau=pf.ImplicitMidpoint(), dt=0.02, nsteps=125, control=shape, t=t, bcs=free_surface(space, (4,)),
        eliminate=V,
    )  # fmt: skip
    rf = pf.TimeParallelReducedFunctional(
        ev, pf.TerminalMisfit(energy(u, 2.0)), spacetime=pf.SpaceTime("1x1", comm=COMM_SELF),
        solver_parameters={"time_solver": "serial"},
    )  # fmt: skip
    at = Function(shape.function_space()).interpolate(shot_shape(x, SHOTS[3]))
    rf(at)
    f, found = Function(space), []
    for state in rf.problem.U:
        put(f, state)
        found.append(assemble(energy(f, 2.0)))
    assert found[-1] < 1e-2 * max(found)
    assert abs(found[-1] - float(rf(at))) < 1e-12 * max(found)


def test_refused():
    with pytest.raises(InputError, match="multiple of 4"):
        ground_mesh(6, COMM_SELF)
    with pytest.raises(InputError, match="degree = 0"):
        state_space(UnitSquareMesh(2, 2, comm=COMM_SELF), 0)
    with pytest.raises(InputError, match="triangles"):
        state_space(UnitSquareMesh(2, 2, quadrilateral=True, comm=COMM_SELF))
    with pytest.raises(InputError, match=r"band = 9 Hz"):
        filter_width(9.0)


# -- filters ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("band", [2.0, 3.0, PEAK_FREQUENCY])
def test_filter_of_a_pulse(band):
    """The filtered samples of a pulse are those of the pulse of the band, to round-off."""
    times = 0.01 * np.arange(400)
    shifted = lambda f: ricker(times - 1.4, f)
    made = low_pass(times, filter_width(band)) @ shifted(PEAK_FREQUENCY)
    assert np.abs(made - (band / PEAK_FREQUENCY) ** 3 * shifted(band)).max() < 1e-12
    assert filtered_pulse(PEAK, PEAK_FREQUENCY) == 1


def simulated(pulse, steps=560):
    """Pressure at three receivers, ``(steps, 3)``, without the noise and the filter of time steps: leapfrog in time is
    not needed, as both pulses are stepped alike.
    """
    mesh = ground_mesh(4, COMM_SELF)
    space, x, t = state_space(mesh, 1), SpatialCoordinate(mesh), pf.time_function(mesh)
    u, shape = Function(space), Function(FunctionSpace(mesh, "CG", 1))
    ev = pf.Evolution(
        residual(u, 2.0, source=pulse(t) * shape, damping=damping(x), walls=(1, 2, 3)), u,
        tableau=pf.ImplicitMidpoint(), dt=0.005, nsteps=steps, control=shape, t=t, bcs=free_surface(space, (4,)),
        eliminate=V,
    )  # fmt: skip
    times = 0.005 * np.arange(1, steps + 1)
    points = np.array([(0.3, -0.2), (1.0, -0.2), (1.6, -0.2)])
    sensors = pf.PointSensors(points, times, np.zeros((steps, 3)), field=P)
    rf = pf.TimeParallelReducedFunctional(
        ev, sensors, spacetime=pf.SpaceTime("1x1", comm=COMM_SELF), solver_parameters={"time_solver": "serial"}
    )
    z = rf.array(Function(shape.function_space()).interpolate(shot_shape(x, (0.6, -0.2))))
    return points, times, sensors.readings(rf.problem.observations(z, sensors))


def test_filtered_readings_are_those_of_the_filtered_pulse():
    band = 2.0
    points, times, raw = simulated(lambda t: ricker(t, PEAK_FREQUENCY))
    *_, expected = simulated(lambda t: filtered_pulse(t, band))
    data = ExperimentReadings(("0",), (Readings(points, times, raw, READINGS, ("a", "b", "c")),), READINGS)
    made = filtered(data, band)
    kept = len(made.readings[0].times)
    assert made.readings[0].times[-1] == pytest.approx(FINAL_TIME)
    assert kept == 360
    assert np.abs(made.readings[0].values - expected[:kept]).max() < 1e-4 * np.abs(expected).max()


def test_filtered_noise():
    """Its standard deviation and the weight of a residual; what filters cannot be applied to."""
    data = read_experiments(READINGS, RECORD_END, COLUMNS, count=len(SHOTS))
    of = data.readings[0]
    noise = np.random.default_rng(0).standard_normal((len(of.times), 4000))
    white = ExperimentReadings(("0",), (Readings(of.points, of.times, noise, READINGS, of.sensors),), READINGS)
    made = filtered(white, 2.0)
    middle = made.readings[0].values[40:-10]
    assert abs(middle.std() - made.gain) < 0.01 * made.gain
    assert filtered(data, PEAK_FREQUENCY).deviation(NOISE) == data.deviation(NOISE)
    assert filtered(data, 2.0).weight(NOISE) == pytest.approx(
        1 / (made.gain * data.deviation(NOISE)) ** 2 / filtered(data, 2.0).count
    )
    uneven = replace(white, readings=(replace(white.readings[0], times=of.times**2),))
    with pytest.raises(InputError, match="evenly spaced"):
        filtered(uneven, 2.0)
    with pytest.raises(InputError, match="record ends too early"):
        filtered(data, 0.2)


# -- the inverse problem ----------------------------------------------------------------------------------------------
def few_readings(every):
    """The shipped readings at few times."""
    data = read_experiments(READINGS, RECORD_END, COLUMNS, count=len(SHOTS))
    some = lambda r: replace(r, times=r.times[every - 1 :: every], values=r.values[every - 1 :: every])
    return replace(data, readings=tuple(some(r) for r in data.readings))


def posed(*, comm=COMM_SELF, time_solver="serial", steps=24, **given):
    return acoustic_velocity(
        pf.SpaceTime((1, comm.size), comm=comm), **SMALL | dict(steps=steps) | given,
        solver_parameters={"time_solver": time_solver, "paradiag": {"rtol": 1e-12}},
    )  # fmt: skip


def test_taylor():
    problem = posed(band=2.0, experiments=[1, 4])
    (control,), (direction,) = formulas([problem.coefficients[0].control])
    found = taylor_to_dict(problem.rf, control, direction)
    assert min(found["R1"]["Rate"]) > 1.9
    assert min(found["R2"]["Rate"]) > 2.9


def test_against_pyadjoint():
    """J, the gradient and a Hessian action of one shot at few times."""
    few = dict(readings=few_readings(30), experiments=[2], steps=4)
    problem, serial, results = posed(**few), serial_acoustic_velocity(**SMALL | few), []
    for rf, q in ((problem.rf, problem.coefficients[0].control), (serial.rf, serial.q)):
        (control,), (direction,) = formulas([q])
        J, g = float(rf(control)), rf.derivative().dat.data_ro.copy()
        results.append((J, g, rf.hessian(direction).dat.data_ro.copy()))
    (J, g, h), (J_serial, g_serial, h_serial) = results
    assert abs(J - J_serial) < 1e-8 * abs(J_serial)
    assert np.linalg.norm(g - g_serial) < 1e-8 * np.linalg.norm(g_serial)
    assert np.linalg.norm(h - h_serial) < 1e-7 * np.linalg.norm(h_serial)


def test_start_and_truth():
    """The truth explains the readings better than the start; the contrast of the true speed is the lens's."""
    problem = posed(band=2.0, experiments=[0, 3], degree=2, steps=60)
    (speed,) = problem.coefficients
    start, truth = (Function(speed.control.function_space()).interpolate(q) for q in (0.0 * speed.truth, speed.truth))
    assert float(problem.rf(truth)) < 0.9 * float(problem.rf(start))
    assert speed.inclusions[0].recovered(speed.factor(speed.truth), start.function_space().mesh()) == pytest.approx(
        speed.inclusions[0].contrast, rel=1e-10
    )


@pytest.mark.parallel(2)
def test_time_ranks_do_not_matter():
    alone, shared = (posed(comm=comm, experiments=[3]).rf for comm in (COMM_SELF, COMM_WORLD))
    found = []
    for rf in (alone, shared):
        (control,), _ = formulas(rf.evolution.controls)
        z = rf.array(control)
        J = rf.problem.value(z)
        found.append((J, rf.problem.derivative(z)))
    assert found[0][0] == found[1][0]
    assert np.allclose(found[0][1], found[1][1], rtol=1e-10, atol=1e-12 * np.abs(found[0][1]).max())

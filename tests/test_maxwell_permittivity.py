"""The inversion of the radar for permittivity and conductivity: its physics, derivatives, and serial pyadjoint."""

import json
from dataclasses import replace

import numpy as np
import pytest
from firedrake import (
    COMM_SELF,
    COMM_WORLD,
    Cofunction,
    Function,
    FunctionSpace,
    SpatialCoordinate,
    TestFunctions,
    assemble,
    dx,
    inner,
)

import pint_fem as pf
from pint_fem.errors import InputError
from pint_fem.kernels.arrays import get
from problems.compare_experiments import formulas
from problems.experiments import read_experiments
from problems.maxwell_permittivity import (
    COLUMNS,
    LOAD_DEGREE,
    NOISE,
    READINGS,
    Soil,
    evolution_of,
    maxwell_permittivity,
)
from problems.maxwell_soil import ANTENNAS, FINAL_TIME, current, receivers_of, soil_mesh, true_controls
from problems.serial_maxwell_permittivity import serial_maxwell_permittivity
from tests.pictures import assert_drawn
from tests.taylor import check_orders
from tests.test_demo import run

SMALL = dict(cells=4, degree=1, steps=6, experiments=[1, 6])


def few_readings():
    """Three receivers at three times of each experiment: the tape of all readings would be long."""
    data = read_experiments(READINGS, FINAL_TIME, COLUMNS, count=len(ANTENNAS))
    few = [
        replace(
            own,
            points=own.points[::6],
            times=own.times[20::20],
            values=own.values[20::20, ::6],
            sensors=own.sensors[::6],
        )
        for own in data.readings
    ]
    return replace(data, readings=tuple(few))


def posed(comm=COMM_SELF, *, solver=None, **more):
    solver = {"time_solver": "serial"} if solver is None else solver
    return maxwell_permittivity(pf.SpaceTime((1, comm.size), comm=comm), **SMALL | more, solver_parameters=solver)


# -- physics -----------------------------------------------------------------------------------------------------------
def states_of(antenna, *, steps=12):
    """Each step's state with the true coefficients, and the rows of the antenna's profile."""
    mesh = soil_mesh(4, COMM_SELF)
    x, amplitude = SpatialCoordinate(mesh), Function(FunctionSpace(mesh, "R", 0))
    soil, tableau = Soil.of_controls(x, *true_controls(x)), pf.ImplicitMidpoint()
    ev = evolution_of(
        mesh, soil, ANTENNAS[antenna], control=amplitude, steps=steps, tableau=tableau, degree=1, amplitude=amplitude
    )
    assert ev.linear_operators() is not None
    J = pf.TimeParallelReducedFunctional(
        ev, pf.RunningMisfit(inner(ev.u, ev.u) * dx), spacetime=pf.SpaceTime("1x1", comm=COMM_SELF),
        solver_parameters={"time_solver": "serial"},
    )  # fmt: skip
    states = np.concatenate([block.copy() for _, block in J.problem.states(np.ones(1))])
    v, _ = TestFunctions(ev.V)
    profile: Cofunction = assemble(inner(current(x, ANTENNAS[antenna]), v) * dx(degree=LOAD_DEGREE))
    return states, get(profile)


def test_antennas_are_reciprocal():
    """An antenna receives of another what that receives of it, in any medium with symmetric operators, at all steps."""
    (first, a), (second, b) = states_of(1), states_of(6)
    there, back = first @ b, second @ a
    assert np.abs(there).max() > 1e-3
    assert np.allclose(there, back, rtol=0, atol=1e-12 * np.abs(there).max())


def test_the_shipped_readings_are_those_of_the_setting():
    data = read_experiments(READINGS, FINAL_TIME, COLUMNS, count=len(ANTENNAS))
    for k, own in enumerate(data.readings):
        assert np.allclose(own.points, receivers_of(k), atol=1e-6)
        assert len(own.times) == 64
    early = np.concatenate([own.values[own.times < 0.5].ravel() for own in data.readings])  # no wave is there yet
    assert np.isclose(early.std(), data.deviation(NOISE), rtol=0.1)
    assert READINGS.stat().st_size < 1e6


# -- derivatives -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("moved", [(1, 0), (0, 1), (1, 1)], ids=["permittivity", "conductivity", "both"])
def test_taylor(moved):
    rf = posed(experiments=[3]).rf
    controls, directions = formulas(rf.evolution.controls)
    check_orders(rf, controls, [h.assign(4 * part * h) for h, part in zip(directions, moved, strict=True)])


@pytest.mark.parametrize("integrator", ["ImplicitMidpoint", pytest.param("SDIRK2", marks=pytest.mark.grid)])
def test_against_pyadjoint(integrator):
    few = SMALL | dict(integrator=integrator, readings=few_readings(), steps=4)
    found = []
    for rf in (posed(**few).rf, serial_maxwell_permittivity(**few).rf):
        controls, directions = formulas([c.control for c in rf.controls])
        value = float(rf(controls))
        vectors = [
            np.concatenate([get(part).ravel() for part in dual]) for dual in (rf.derivative(), rf.hessian(directions))
        ]
        found.append((np.array(value), *vectors))
    for ours, theirs, limit in zip(*found, (1e-8, 1e-8, 1e-7), strict=True):
        assert np.linalg.norm(ours - theirs) < limit * np.linalg.norm(theirs)


@pytest.mark.parallel(2)
def test_time_ranks_do_not_matter():
    results = []
    for comm in (COMM_SELF, COMM_WORLD):
        rf = posed(comm).rf
        controls, directions = formulas(rf.evolution.controls)
        z, dz = (rf.layout.join([get(f) for f in own]) for own in (controls, directions))
        results.append((rf.problem.value(z), rf.problem.derivative(z), rf.problem.hessian_action(z, dz)))
    alone, shared = results
    assert alone[0] == shared[0]
    for ours, theirs in zip(shared[1:], alone[1:], strict=True):
        assert np.allclose(ours, theirs, rtol=1e-10, atol=1e-12 * np.abs(theirs).max())


# -- arguments ---------------------------------------------------------------------------------------------------------
def test_what_does_not_fit_is_refused(tmp_path):
    with pytest.raises(InputError, match="multiple of 4"):
        posed(cells=6)
    with pytest.raises(InputError, match="alpha"):
        posed(alpha_conductivity=-1.0)
    lines = READINGS.read_text().splitlines()
    few = tmp_path / "few.csv"
    few.write_text("\n".join(line for line in lines if not line.startswith("7,")))
    with pytest.raises(InputError, match="experiment 7"):
        posed(readings=few)


def test_bounds_are_those_of_the_permittivity():
    lower, upper = posed(bounds=(0.2, 5.0)).bounds
    assert np.allclose(np.exp([lower[0], upper[0]]), (0.2, 5.0))
    assert lower[1] is None
    assert upper[1] is None


# -- the demo ----------------------------------------------------------------------------------------------------------
@pytest.mark.starts_mpi
def test_demo(tmp_path):
    """Two iterations on a coarse mesh, on two time ranks."""
    small = [
        "--cells",
        4,
        "--degree",
        1,
        "--steps",
        16,
        "--time-solver",
        "serial",
        "--max-iterations",
        2,
        "--no-fields",
    ]
    done = run(2, "--grid", "1x2", *small, "--out", tmp_path, program="maxwell_permittivity_inversion")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["experiments"] == 8
    history = summary["result"]["history"]
    assert history[-1]["J"] < history[0]["J"]
    found = summary["result"]["coefficients"]
    assert found["permittivity"]["inclusions"]["wet lens"]["true_contrast"] == 1.8
    assert found["conductivity"]["inclusions"]["wet lens"]["true_contrast"] == 6.0
    assert "8 experiments" in done.stdout
    for name, panels in (("permittivity.png", 3), ("conductivity.png", 3), ("gathers.png", 4), ("sensors.png", 1)):
        assert_drawn(tmp_path / name, panels=panels)

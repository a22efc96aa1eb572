"""Checks that both source problems in a box have to pass."""

import json
import sys

import numpy as np
import pytest
from firedrake import COMM_SELF, COMM_WORLD
from pyadjoint import taylor_to_dict

import pint_fem as pf
from pint_fem.errors import InputError
from problems.compare_box import points
from problems.compare_serial import apart, together
from tests.pictures import assert_drawn
from tests.test_demo import run

TIGHT = {"time_solver": "serial", "mgrit": {"rtol": 1e-12}}


def assert_same_as_tape(pose, record, settings, *, first_steps):
    """J and gradient of the first steps are those of plain Firedrake and pyadjoint (collective)."""
    settings = settings | dict(alpha=1e-8, beta=1e-8)  # so that the misfit's part is the largest by far
    alone = pf.SpaceTime((COMM_WORLD.size, 1), comm=COMM_WORLD)
    ours = pose(alone, **settings, first_steps=first_steps, solver_parameters=TIGHT)
    theirs = record(alone, **settings, first_steps=first_steps)
    V = ours.evolution.control.function_space()
    z, control = points(V)[0], points(theirs.q.function_space())[0]
    J = float(theirs.rf(control))
    assert abs(float(ours.rf(z)) - J) < 1e-8 * abs(J)
    own = together(ours.spacetime, V, ours.rf.derivative().dat.data_ro)
    other = together(alone, theirs.q.function_space(), theirs.rf.derivative().dat.data_ro)
    if ours.spacetime.is_root:
        assert apart(own, other) < 1e-8


def assert_taylor(problem):
    """The remainders fall with the square of the step, and J is quadratic."""
    rf = problem.rf
    control, direction = points(problem.evolution.control.function_space())
    found = taylor_to_dict(rf, control, direction)
    assert min(found["R1"]["Rate"]) > 1.9
    assert max(found["R2"]["Residual"]) < 1e-9 * abs(float(rf(control)))


def assert_grids_agree(pose, settings, *, inversion=True):
    """J, products with gradient and Hessian, and the inversion on two ranks in space or in time are those of one rank;
    MGRIT solves on all.
    """
    found = []
    for grid, comm in (("1x1", COMM_SELF), ("2x1", COMM_WORLD), ("1x2", COMM_WORLD)):
        solver = {"time_solver": "mgrit", "mgrit": {"rtol": 1e-11, "coarsening": (4,)}}
        problem = pose(pf.SpaceTime(grid, comm=comm), **settings, first_steps=8, solver_parameters=solver)
        rf, space = problem.rf, problem.spacetime.space_comm
        z, dz = (rf.array(f) for f in points(problem.evolution.control.function_space()))
        J, slope = rf.problem.value(z), space.allreduce(float(rf.problem.derivative(z) @ dz))
        curvature = space.allreduce(float(rf.problem.hessian_action(z, dz) @ dz))
        found.append([J, slope, curvature])
        if inversion:
            found[-1].append(rf.minimize_trust_region(gtol_rel=1e-7, inexact=True).value)
    for other in found[1:]:
        np.testing.assert_allclose(other[:3], found[0][:3], rtol=1e-11)
        np.testing.assert_allclose(other[3:], found[0][3:], rtol=1e-6)  # at the minimiser's tolerance


def assert_refused(pose, settings, bad):
    """Each bad value is an ``InputError`` that names the setting."""
    st = pf.SpaceTime("1x1", comm=COMM_SELF)
    for name, value in bad:
        with pytest.raises(InputError, match=name):
            pose(st, **settings | {name: value})


def assert_options(arguments, monkeypatch, capsys, *, most):
    """Help names the options; bad ones are refused before anything is computed; defaults follow from the size."""
    program = "demo.py"
    monkeypatch.setattr(sys, "argv", [program, "--help"])
    with pytest.raises(SystemExit):
        arguments()
    text = capsys.readouterr().out
    assert all(f"--{name}" in text for name in ("refine", "grid", "steps", "storage", "compare-serial", "checkpoint"))
    for words, message in (
        (["--refine", str(most + 1)], "--refine"),
        (["--steps", "0"], "--steps"),
        (["--storage", "some"], "--storage"),
        (["--method", "map", "--gtol", "1e-3"], "--gtol"),
        (["--refines", "1"], "did you mean --refine"),
        (["--sensors", ""], "--sensors"),
    ):
        monkeypatch.setattr(sys, "argv", [program, *words])
        with pytest.raises(InputError, match=message):
            arguments()
    monkeypatch.setattr(sys, "argv", [program, "--refine", str(most), "--compare-serial"])
    opts = arguments()
    assert (opts.storage, opts.time_solver, opts.method) == ("C", "auto", "trust-region")
    assert 0 < opts.compare_serial < opts.steps
    monkeypatch.setattr(sys, "argv", [program, "--refine", "0", "--compare-serial"])
    opts = arguments()
    assert (opts.storage, opts.compare_serial) == ("all", opts.steps)


def run_demo(program, quantity, folder, *options):
    """Run a demo on two ranks in space with the coarsest mesh, and return its summary after checks of what it wrote."""
    small = ["--grid", "2x1", "--refine", 0, "--out", folder, *options]
    done = run(2, *small, program=program)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["grid"] == {"space": 2, "time": 1}
    assert summary["result"]["converged"]
    memory = summary["memory"]
    assert done.stdout.index("memory stated before the run") < done.stdout.index("memory measured")
    # Linux counts a process's pages per core and brings the two figures up to date at different times
    assert memory["measured_peak"] >= 0.97 * memory["process_after_set_up"] > 0
    assert memory["arrays_of_sweeps"] > 0
    assert memory["stated_peak"] < 1.5 * memory["measured_peak"]
    for name, panels in ((f"{quantity}.png", 3), ("sensors.png", 1), ("convergence.png", 2)):
        assert_drawn(folder / name, panels=panels)
    listed = (folder / "fields" / f"{quantity}.pvd").read_text()
    (file,) = (part.split('"')[0] for part in listed.split('file="')[1:])
    assert f"recovered_{quantity}" in (folder / "fields" / file).read_text(errors="ignore")
    assert (folder / "fields" / "state.pvd").exists()
    return summary

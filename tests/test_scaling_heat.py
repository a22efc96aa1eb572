"""The model's tasks are those of the reduced functional: calls, messages and bytes of a real heat problem's trace."""

import pytest
from mpi4py import MPI

pytest.importorskip("greenlet")

from pint_fem.scaling.costs import Calibration, Kernel
from pint_fem.scaling.model import Model, Solve
from pint_fem.spacetime import SpaceTime
from problems.heat_square import field, square
from tests.scaling_traces import FREQUENCY_LANES, events

OPTIONS = {"levels": 3, "coarsening": (4, 2), "relax": "FCF"}
REPEATED = {"levels": 2, "coarsening": 5, "relax": "F", "coarse_steps": 2}


@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize("given", [OPTIONS, REPEATED], ids=["FCF", "coarse_steps"])
def test_gradient_and_hessian_are_those_of_a_real_trace(given):
    comm = MPI.COMM_WORLD
    options = {**given, "trace": "t", "rtol": 1e-6}
    rf = square(40, "SDIRK2", size=5, spacetime=SpaceTime((1, comm.size)), mgrit=options)
    problem, sweeps = rf.problem, rf.problem.sweeps
    z, dz = field(rf, "control"), field(rf, "direction")
    problem.derivative(z)
    problem.hessian_action(z, dz)
    solves = [Solve(kind, "nested", result.cycles) for kind, result in sweeps.results]
    assert [s.kind for s in solves] == ["state", "adjoint", "tangent", "adjoint"]
    one = [Kernel.constant(1.0, lanes=True)]
    work = {"step": one, "adjoint": one}
    calibration = Calibration("square", "none", rf.evolution.V.dim(), 40, {1: work})
    model = Model(calibration, given, (1, comm.size))
    said = model.run_all([("gradient", solves[:2]), ("hessian", solves[2:])], trace=True)
    assert events(said.traces[comm.rank]) == events(sweeps.solvers.trace.events)


@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize("solver", ["mgrit", "paradiag"])
def test_model_of_an_inexact_hessian_is_that_of_a_real_trace(solver):
    """Tangent cycles from zero and their transposes."""
    comm = MPI.COMM_WORLD
    options = OPTIONS if solver == "mgrit" else {"time_solver": "paradiag", "alpha": 1e-4}
    given = {**OPTIONS, "trace": "t"} if solver == "mgrit" else {"alpha": 1e-4, "trace": "t"}
    grid = SpaceTime((1, comm.size))
    rf = square(40, "SDIRK2", size=5, spacetime=grid, **{solver: given}, time_solver=solver)
    problem, sweeps = rf.problem, rf.problem.sweeps
    z, dz = field(rf, "control"), field(rf, "direction")
    problem.derivative(z)
    before = len(sweeps.solvers.trace.events)
    problem.symmetric_action(z, dz, 2)
    start = sweeps.solvers.transposed_adjoint.start
    one = [Kernel.constant(1.0, lanes=True)]
    work = {"step": one, "adjoint": one}
    costs = dict.fromkeys(("solve", "solve transposed", "factor", "factor bytes", "pack"), 1e-3)
    costs |= FREQUENCY_LANES | {"fft steps": 40, "fft columns": 64}
    costs |= dict.fromkeys(("fft", "ifft", "few fft", "few ifft"), 1e-6)
    calibration = Calibration("square", "none", rf.evolution.V.dim(), 40, {1: work}, paradiag=costs, stages=2)
    solves = [Solve("tangent", start, 2), Solve("adjoint", "transposed", 2)]
    said = Model(calibration, options, (1, comm.size)).run(*solves, task="hessian", trace=True)
    assert events(said.traces[comm.rank]) == events(sweeps.solvers.trace.events[before:])

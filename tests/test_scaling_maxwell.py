"""The model's tasks are those of the reduced functional for Maxwell: by MGRIT with losses, by ParaDiag without."""

import numpy as np
import pytest
from mpi4py import MPI

pytest.importorskip("greenlet")

from pint_fem.scaling.actions import solver_parameters
from pint_fem.scaling.costs import Calibration, Kernel
from pint_fem.scaling.model import Model, Solve
from pint_fem.spacetime import SpaceTime
from problems.maxwell_source import maxwell_source
from tests.scaling_traces import FREQUENCY_LANES, PARADIAG, events

STEPS = 32
CASES = {
    "lossy": {"levels": 3, "coarsening": (4, 2), "relax": "FCF"},
    "cavity": {"time_solver": "paradiag", "alpha": 1e-4},
}


@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize("regime", CASES)
def test_gradient_and_hessian_are_those_of_a_real_trace(regime):
    """Every call, transpose, message, peer and byte, on every rank."""
    comm, options = MPI.COMM_WORLD, CASES[regime]
    parameters = solver_parameters(options, trace="t", rtol=1e-3)
    rf = maxwell_source(
        SpaceTime((1, comm.size)), regime=regime, cells=8, degree=1, steps=STEPS, solver_parameters=parameters,
    ).rf  # fmt: skip
    problem, sweeps = rf.problem, rf.problem.sweeps
    z = np.random.default_rng(0).standard_normal(problem.layout.size)
    problem.derivative(z)
    problem.hessian_action(z, 2 * z)
    solves = [Solve(kind, "nested", result.cycles) for kind, result in sweeps.results]
    assert [s.kind for s in solves] == ["state", "adjoint", "tangent", "adjoint"]
    one = [Kernel.constant(1.0, lanes=True)]
    work = {"step": one, "adjoint": one}
    stages = sweeps.propagators[0].dirk.stages
    size = rf.evolution.state_size
    costs = PARADIAG | FREQUENCY_LANES
    calibration = Calibration(regime, "none", size, STEPS, {1: work}, paradiag=costs, stages=stages)
    model = Model(calibration, options, (1, comm.size))
    said = model.run_all([("gradient", solves[:2]), ("hessian", solves[2:])], trace=True)
    assert events(said.traces[comm.rank]) == events(sweeps.solvers.trace.events)
    if model.solver == "paradiag":
        systems = sweeps.solvers.tangent._frequency_solve.__self__
        assert comm.allreduce(systems.factorisations) == said.counts["factor", 0] == stages * (STEPS // 2 + 1)

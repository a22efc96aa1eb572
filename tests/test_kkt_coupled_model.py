"""The coupled systems of a problem: one solve of the KKT system with them is a Newton step to the minimum."""

import numpy as np
import pytest
from mpi4py import MPI

import pint_fem as pf
from pint_fem.errors import InputError
from pint_fem.kkt.coupled.problem import coupled_systems
from tests.kkt_problems import cavity, circulant, convection, model_of
from tests.limits import time_limit

COMM = MPI.COMM_WORLD
GRIDS = {1: "1x1", 2: "2x1", 3: "1x3", 4: "2x2"}


@pytest.mark.parametrize("tableau", ["BE", "midpoint"])
def test_the_derivative_vanishes_after_a_newton_step_of_a_method(tableau):
    """Reduced derivatives by sequential sweeps; all frequencies, the ends of time and two controls together."""
    check_newton_step(convection(pf.SpaceTime("1x1", comm=MPI.COMM_SELF), tableau=tableau).problem)


@pytest.mark.parallel([1, 2, 3, 4])
@time_limit(200)
def test_the_derivative_vanishes_after_a_newton_step_on_a_grid():
    """Ranks in time, in space and in both."""
    check_newton_step(convection(pf.SpaceTime(GRIDS[COMM.size])).problem)


def test_the_derivative_vanishes_after_a_newton_step_for_a_cavity():
    """Mixed state, of which one field is eliminated in the steps."""
    check_newton_step(cavity(pf.SpaceTime("1x1", comm=MPI.COMM_SELF)).problem)


def check_newton_step(problem):
    """The derivative after the step, relative to the one before, is round-off."""
    kkt = circulant(problem, rtol=1e-12)
    layout, z = problem.layout, np.zeros(problem.layout.size)
    g = problem.derivative(z)
    step = kkt.solve(c=-layout.steps(g)).z
    after = problem.derivative(layout.gradient(step, np.zeros(kkt.model.size)))
    size = lambda x: np.sqrt(problem.spacetime.comm.allreduce(float(np.sum(x**2))))
    assert size(after) <= 1e-9 * size(g)
    assert kkt.systems.factorisations == len(kkt.transform.own)


def test_what_the_systems_do_not_have_is_an_input_error():
    alone = pf.SpaceTime("1x1", comm=MPI.COMM_SELF)
    with pytest.raises(InputError, match="boundary values"):
        coupled_systems(model_of(convection(alone, heated_wall=True).problem))
    model = model_of(convection(alone).problem)
    model.propagator.evolution.nullspace = object()
    with pytest.raises(InputError, match="nullspace"):
        coupled_systems(model)

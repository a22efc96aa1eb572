"""The coupled systems of a problem: one solve of the KKT system with them is a Newton step to the minimum."""

import numpy as np
import pytest
from firedrake import (
    DirichletBC,
    Function,
    FunctionSpace,
    SpatialCoordinate,
    TestFunction,
    TrialFunction,
    as_vector,
    dx,
    grad,
    inner,
)
from irksome import Dt
from mpi4py import MPI

import pint_fem as pf
from pint_fem.errors import InputError
from pint_fem.kkt.circulant import CirculantKKT
from pint_fem.kkt.control_weights import ControlWeights
from pint_fem.kkt.coupled_model import coupled_systems
from pint_fem.kkt.model import ControlModel
from pint_fem.kkt.transform import SkewCirculant
from tests.heat import TABLEAUX
from tests.limits import time_limit
from tests.meshes import square

COMM = MPI.COMM_WORLD
GRIDS = {1: "1x1", 2: "2x1", 3: "1x3", 4: "2x2"}


def functional(st, *, tableau="SDIRK2", steps=8, heated_wall=False):
    """Convection of heat with a source that is a field and one that is a number in each step, tracked in H1."""
    mesh = square(5, st.space_comm)
    V, D, R = (FunctionSpace(mesh, *given) for given in (("CG", 1), ("DG", 0), ("R", 0)))
    u, v, f, a, w = Function(V), TestFunction(V), Function(D), Function(R), Function(V)
    x, y = SpatialCoordinate(V.mesh())
    form = Dt(u) * v * dx + inner(0.1 * grad(u) + as_vector([u, -0.3 * u]), grad(v)) * dx
    form -= (f + a * x * y) * v * dx
    u.interpolate(x * (1 - y))
    controls = [f, a, *([w] if heated_wall else [])]
    bcs = [DirichletBC(V, w if heated_wall else 1 + x, 1)]
    ev = pf.Evolution(
        form, u, tableau=TABLEAUX[tableau](), dt=0.1, nsteps=steps, control=controls, per_step=True, bcs=bcs
    )
    e = u - x * y
    misfits = [pf.RunningMisfit((inner(e, e) + 0.1 * inner(grad(e), grad(e))) * dx), pf.TerminalMisfit(e**2 * dx)]
    sizes = [0.5 * weight * c**2 * dx for weight, c in zip((1e-3, 1e-2, 1.0), controls, strict=False)]
    return pf.TimeParallelReducedFunctional(
        ev, misfits, regularisation=sizes, spacetime=st, solver_parameters={"time_solver": "serial"}
    )


def model_of(problem):
    forms = []
    for weight, control in zip((1e-3, 1e-2, 1.0), problem.sweeps.evolution.parameters, strict=False):
        space = control.function_space()
        forms.append(weight * inner(TrialFunction(space), TestFunction(space)) * dx)
    return ControlModel(problem.sweeps, problem.misfits, ControlWeights(problem.sweeps.evolution, forms))


@pytest.mark.parametrize("tableau", ["BE", "midpoint"])
def test_the_derivative_vanishes_after_a_newton_step_of_a_method(tableau):
    """Reduced derivatives by sequential sweeps; all frequencies, the ends of time and two controls together."""
    check_newton_step(pf.SpaceTime("1x1", comm=MPI.COMM_SELF), tableau)


@pytest.mark.parallel([1, 2, 3, 4])
@time_limit(200)
def test_the_derivative_vanishes_after_a_newton_step_on_a_grid():
    """Ranks in time, in space and in both."""
    check_newton_step(pf.SpaceTime(GRIDS[COMM.size]), "SDIRK2")


def check_newton_step(st, tableau):
    """The derivative after the step, relative to the one before, is round-off."""
    problem = functional(st, tableau=tableau).problem
    model = model_of(problem)
    transform = SkewCirculant(model.nsteps, model.size, comm=st.time_comm, bounds=model.slab.bounds)
    systems = coupled_systems(model)
    kkt = CirculantKKT(model, systems, transform, rtol=1e-12)
    layout, z = problem.layout, np.zeros(problem.layout.size)
    g = problem.derivative(z)
    step = kkt.solve(c=-layout.steps(g)).z
    after = problem.derivative(layout.gradient(step, np.zeros(model.size)))
    size = lambda x: np.sqrt(st.comm.allreduce(float(np.sum(x**2))))
    assert size(after) <= 1e-9 * size(g)
    assert systems.factorisations == len(transform.own)


def test_what_the_systems_do_not_have_is_an_input_error():
    alone = pf.SpaceTime("1x1", comm=MPI.COMM_SELF)
    with pytest.raises(InputError, match="boundary values"):
        coupled_systems(model_of(functional(alone, heated_wall=True).problem))
    model = model_of(functional(alone).problem)
    model.propagator.evolution.nullspace = object()
    with pytest.raises(InputError, match="nullspace"):
        coupled_systems(model)

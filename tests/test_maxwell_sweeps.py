"""What Maxwell's evolutions bring (an eliminated field, a current with a time course, probes of components) in what
sweeps can do: storage of C-points, ParaDiag, its theory.
"""

import numpy as np
import pytest
from firedrake import (
    DirichletBC,
    Function,
    SpatialCoordinate,
    VectorFunctionSpace,
    as_vector,
    dx,
    inner,
    sin,
)
from mpi4py import MPI
from scipy.linalg import expm

import pint_fem as pf
from pint_fem.errors import InputError
from pint_fem.paradiag import ParaDiagOptions
from pint_fem.propagators import LinearPropagator
from pint_fem.propagators.choice import leapfrog
from pint_fem.sweeps.frequencies.systems import frequency_systems
from pint_fem.theory.alpha_circulant import block_contraction, contraction
from pint_fem.theory.block_modes import damped_wave
from pint_fem.theory.estimates import paradiag_contraction
from problems.maxwell import B, E, Medium, Region, Walls, perfect_conductor, residual, state_space
from tests.meshes import square

LOSSY = (Region("host", sigma=3.0), Region("block", lambda x: x[0] < 0.5, epsilon=2.0, mu=1.5, sigma=7.0))
ALONE = dict(comm=MPI.COMM_SELF)
MUMPS = {"ksp_type": "preonly", "pc_type": "lu", "pc_factor_mat_solver_type": "mumps"}


def posed(st, *, moving_walls=False, regions=LOSSY, eliminate=B, steps=16, dt=0.05, tableau=pf.SDIRK2, **given):
    """A static current with a time course."""
    mesh = square(3, st.space_comm)
    V, t, x = state_space(mesh), pf.time_function(mesh), SpatialCoordinate(mesh)
    u, current = Function(V), Function(VectorFunctionSpace(mesh, "CG", 1))
    current.interpolate(as_vector([1 + x[1], x[0] * x[1]]))
    form = residual(u, Medium(mesh, regions), current=sin(3 * t) * current)
    bcs = perfect_conductor(V, Walls((1, 3)))
    if moving_walls:
        bcs = [DirichletBC(V.sub(E), as_vector([sin(2 * t) * x[1], x[0]]), 3)]
    ev = pf.Evolution(
        form, u, tableau=tableau(), dt=dt, nsteps=steps, control=current, t=t, bcs=bcs, eliminate=eliminate
    )
    data = 0.1 * sin(t) * as_vector([1, 1, 1])
    times = dt * np.array([1, 2.5, 7, 8.2, 11.5])
    misfits = [
        pf.RunningMisfit(inner(u - data, u - data) * dx),
        pf.PointSensors([(0.3, 0.4), (0.7, 0.6)], times, np.ones((5, 2)), field=E, component=1),
    ]
    propagator = {"propagator": given.pop("propagator")} if "propagator" in given else {}
    return pf.TimeParallelReducedFunctional(ev, misfits, spacetime=st, solver_parameters=given, **propagator)


def numbers(rf):
    z = rf.array([c.control for c in rf.controls])
    dz, p = np.cos(np.arange(z.size)), rf.problem
    return [p.value(z), p.derivative(z), p.hessian_action(z, dz), p.tangent_value(z, dz)]


@pytest.mark.parallel([1, 3])
def test_all_solvers_agree():
    """Value, gradient, Hessian action and tangent as by sequential stepping without elimination; on two ranks, walls
    move.
    """
    moving_walls = MPI.COMM_WORLD.size == 3
    st, alone = pf.SpaceTime(), pf.SpaceTime("1x1", **ALONE)
    reference = numbers(posed(alone, moving_walls=moving_walls, eliminate=None, mgrit=dict(levels=1)))
    exact = dict(coarsening=(4, 2), levels=3, rtol=1e-13)
    for solver in (
        dict(mgrit=exact),
        dict(mgrit=exact | dict(storage="C")),
        dict(mgrit=dict(coarsening=4, levels=2, rtol=1e-13, coarse_solver="paradiag")),
        dict(time_solver="paradiag", paradiag=dict(rtol=1e-13)),
    ):
        rf = posed(st, moving_walls=moving_walls, **solver)
        assert rf.evolution.controls_move
        assert rf.evolution.is_homogeneous != moving_walls
        for found, expected in zip(numbers(rf), reference, strict=True):
            assert np.abs(found - expected).max() <= 1e-11 * np.abs(expected).max(), solver


@pytest.mark.slow_on_ranks
@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize(
    ("tableau", "parameters"), [(pf.ImplicitMidpoint, {}), (pf.SDIRK2, MUMPS)], ids=["default", "mumps"]
)
def test_frequencies_of_the_whole_state_and_of_one_field_are_the_same(tableau, parameters):
    """Solves of ParaDiag and transposed ones, of systems of both fields and of E alone."""
    st = pf.SpaceTime((MPI.COMM_WORLD.size, 1))
    steps = []
    for eliminate in (None, B):
        p = LinearPropagator(posed(st, moving_walls=True, eliminate=eliminate, tableau=tableau).evolution)
        steps.append(frequency_systems(p, ParaDiagOptions(), parameters))
    whole, part = steps
    rng = np.random.default_rng(st.space_comm.rank)
    for k, mu in enumerate(np.exp(-0.05 + 1j * np.linspace(0.0, np.pi, 4))):
        r = rng.standard_normal(p.evolution.state_size) + 1j * rng.standard_normal(p.evolution.state_size)
        x, y = (s.solve(k, complex(mu), r) for s in steps)
        size = st.space_comm.allreduce(np.abs(x).max(), op=MPI.MAX)
        assert np.abs(x - y).max() < 1e-11 * size
        x, y = (s.solve_transposed(k, complex(mu), r) for s in steps)
        size = st.space_comm.allreduce(np.abs(x).max(), op=MPI.MAX)
        assert np.abs(x - y).max() < 1e-11 * size
    assert part.bytes < whole.bytes


@pytest.mark.parametrize("eliminate", [None, B])
@pytest.mark.parametrize("tableau", [pf.ImplicitMidpoint, pf.SDIRK2])
def test_all_frequencies_at_once_are_those_one_after_the_other(eliminate, tableau):
    """Of both fields and of E alone, with moving walls, transposed, in both precisions, for a batch."""
    st = pf.SpaceTime("1x1", **ALONE)
    p = LinearPropagator(posed(st, moving_walls=True, eliminate=eliminate, tableau=tableau).evolution)
    systems = frequency_systems(p, ParaDiagOptions(), {})
    assert systems.has_lanes
    mu, rng = np.exp(-0.05 + 1j * np.linspace(0.0, np.pi, 11)), np.random.default_rng(0)
    shape = 11, 2, p.evolution.state_size
    rows = rng.standard_normal(shape) + 1j * rng.standard_normal(shape)
    for solve, transposed in ((systems.solve, False), (systems.solve_transposed, True)):
        expected = np.array([[solve(k, complex(mu[k]), r) for r in rows[k]] for k in range(11)])
        for dtype, tolerance in ((complex, 1e-11), (np.complex64, 1e-4)):
            found = systems.solve_all(range(11), mu, rows.astype(dtype), transposed=transposed)
            assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


def test_contraction_of_damped_waves():
    """ParaDiag on uniformly damped waves, normal in pairs only: under its bound, the norm of a pair's factor."""
    st, alpha = pf.SpaceTime("1x1", **ALONE), 0.1
    rf = posed(st, regions=(Region("all", sigma=1.0),), time_solver="paradiag", paradiag=dict(alpha=alpha, rtol=1e-11))
    bound = paradiag_contraction(rf.evolution, alpha)
    assert bound < 1.0001 * alpha / (1 - alpha)  # slow modes hardly lose anything
    numbers(rf)
    for _, result in rf.problem.sweeps.results:
        ratio = (result.residuals[-1] / result.residuals[1]) ** (1 / (len(result.residuals) - 2))
        assert 0.5 * bound < ratio < 1.05 * bound
    pair = expm(-0.3 * damped_wave(2.0, 1.05))
    assert block_contraction([pair], alpha, 3) > 1.1 * contraction(np.linalg.eigvals(pair), alpha, 3)  # not normal
    last = alpha * expm(-0.9 * damped_wave(2.0, 1.05))
    expected = np.linalg.norm(last @ np.linalg.inv(np.eye(2) - last), 2)
    assert block_contraction([pair, 0.1 * pair], alpha, 3) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parallel([1, 3])
def test_leapfrog_is_refused_by_paradiag():
    with pytest.raises(InputError, match="leapfrog is none"):
        posed(pf.SpaceTime(), propagator=leapfrog, steps=64, dt=0.01, time_solver="paradiag")

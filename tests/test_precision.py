"""Sweeps whose F-relaxation is in single precision, against sequential stepping in double precision."""

import numpy as np
import pytest
from mpi4py import MPI

import pint_fem as pf
from pint_fem.errors import InputError
from problems.heat_square import field, square

STEPS = 48


def swept(spacetime, **mgrit):
    """The functional and its state from cold, by MGRIT with 4 steps an interval."""
    options = dict(levels=2, coarsening=4, **mgrit)
    rf = square(STEPS, "SDIRK2", size=12, spacetime=spacetime, mgrit=options)
    problem, z = rf.problem, field(rf, "control")
    problem.U[:] = problem.sweeps.initial
    result = problem.sweeps.state(z, problem.U, cold=True)
    return rf, problem.U.copy(), result


def exact():
    rf = square(STEPS, "SDIRK2", size=12, spacetime=pf.SpaceTime("1x1", comm=MPI.COMM_SELF), time_solver="serial")
    rf.problem.U[:] = rf.problem.sweeps.initial
    rf.problem.sweeps.state(field(rf, "control"), rf.problem.U)
    return rf.problem.U


def is_single(rf):
    """Whether the last solve of the state relaxed the finest level in single precision."""
    return bool(rf.problem.sweeps.solvers.state.levels[0].propagator.single)


def test_a_loose_tolerance_uses_single_precision_and_is_met():
    st, U = pf.SpaceTime("1x1", comm=MPI.COMM_SELF), exact()
    rf, rough, _ = swept(st, rtol=1e-3)
    assert is_single(rf)
    double, other, _ = swept(st, rtol=1e-3, precision="double")
    assert not is_single(double)
    distance = np.linalg.norm(rough - other) / np.linalg.norm(U)
    assert 0 < distance < 1e-4  # another arithmetic, whose errors are far below the tolerance
    assert np.linalg.norm(rough - U) <= np.linalg.norm(other - U) + 1e-4 * np.linalg.norm(U)


def test_steps_that_single_precision_ruins_are_in_double_precision():
    """The limit is a tenth of the tolerance for the four steps of an interval."""
    rf, *_ = swept(pf.SpaceTime("1x1", comm=MPI.COMM_SELF), rtol=1e-3)
    problem, p = rf.problem, rf.problem.sweeps.propagators[0]
    u = np.random.default_rng(0).standard_normal((1, p.evolution.state_size))
    single, double = np.empty((1, 1, u.shape[1])), np.empty((1, 1, u.shape[1]))
    p.advance(u, single, single=True)
    p.advance(u, double)
    assert 1e-9 < np.linalg.norm(single - double) / np.linalg.norm(u) < 100 * p.error_of_single_precision < 1e-4
    for error, expected in ((2e-5, True), (3e-5, False), (np.inf, False)):
        vars(p)["error_of_single_precision"] = error
        problem.U[:] = problem.sweeps.initial
        problem.sweeps.state(field(rf, "control"), problem.U, cold=True)
        assert is_single(rf) == expected


def test_a_tight_solve_is_in_double_precision():
    st, U = pf.SpaceTime("1x1", comm=MPI.COMM_SELF), exact()
    rf, found, _ = swept(st, rtol=1e-12)
    assert not is_single(rf)
    assert np.linalg.norm(found - U) < 1e-10 * np.linalg.norm(U)
    # also after a rough one with the same functional
    rf.problem.U[:] = rf.problem.sweeps.initial
    rf.problem.sweeps.state(field(rf, "control"), rf.problem.U, cold=True, rtol=1e-3)
    assert is_single(rf)
    rf.problem.sweeps.state(field(rf, "control"), rf.problem.U, rtol=1e-12)
    assert not is_single(rf)
    assert np.linalg.norm(rf.problem.U - U) < 1e-10 * np.linalg.norm(U)


def test_transposed_cycles_are_in_double_precision_after_a_rough_adjoint():
    """They are the transposes of cycles in double precision, whatever was solved before."""
    rf, *_ = swept(pf.SpaceTime("1x1", comm=MPI.COMM_SELF), rtol=1e-3)
    sweeps, z = rf.problem.sweeps, field(rf, "control")
    source = np.random.default_rng(0).standard_normal(rf.problem.U.shape)
    expected = sweeps.adjoint_by_transposed_cycles(z, rf.problem.U, source, cycles=2)[0].copy()
    sweeps.adjoint(z, rf.problem.U, source, np.zeros_like(source), cold=True)
    assert sweeps.solvers.adjoint.levels[0].propagator.single
    again = sweeps.adjoint_by_transposed_cycles(z, rf.problem.U, source, cycles=2)[0]
    assert np.array_equal(again, expected)


def test_single_precision_is_refused_for_tolerances_that_it_cannot_meet():
    with pytest.raises(InputError, match=r"precision 'single'.*rtol"):
        swept(pf.SpaceTime("1x1", comm=MPI.COMM_SELF), rtol=1e-9, precision="single")


@pytest.mark.parallel([2, 3])
def test_bits_do_not_depend_on_the_ranks_in_time():
    st = pf.SpaceTime()
    _, own, result = swept(st, rtol=1e-3)
    _, whole, alone = swept(pf.SpaceTime("1x1", comm=MPI.COMM_SELF), rtol=1e-3)
    slab = st.slab(STEPS)
    assert np.array_equal(own[1:], whole[slab.lo + 1 : slab.hi + 1])
    assert result.residuals == alone.residuals

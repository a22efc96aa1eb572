"""Nonlinear evolutions by the form propagator: against a serial pyadjoint tape, and what a linearisation saves."""

import numpy as np
import pytest
from firedrake import Function, SpatialCoordinate, as_vector, cos, sin
from mpi4py import MPI

import pint_fem as pf
from tests.nonlinear import burgers, conductivity, functional, tape_functional
from tests.taylor import check_orders

LENGTH = {burgers: 10.0, conductivity: 40.0}  # third-order remainders stay above round-off


def direction(V, scale=1.0):
    x, y = SpatialCoordinate(V.mesh())
    value = scale * sin(3 * x) * cos(2 * y)
    return Function(V).interpolate(as_vector([value, scale * (x - y)]) if V.value_shape else value)


@pytest.mark.parametrize("tableau", ["BackwardEuler", "SDIRK2"])
@pytest.mark.parametrize("make", [burgers, conductivity])
def test_against_the_tape(make, tableau):
    posed = make(4, 4, tableau=tableau)
    mgrit = {"mgrit": {"rtol": 1e-12, "coarsening": (2,)}}
    results = []
    for rf in (functional(posed, **mgrit), functional(posed, time_solver="serial"), tape_functional(posed)):
        V = rf.controls[0].control.function_space()
        z, dz = direction(V), direction(V)
        z.assign(0.5 * z)
        results.append((float(rf(z)), rf.derivative().dat.data_ro.copy(), rf.hessian(dz).dat.data_ro.copy()))
    for ours in results[:2]:
        for a, b in zip(ours, results[2], strict=True):
            assert np.linalg.norm(a - b) <= 1e-8 * np.linalg.norm(b)


@pytest.mark.parallel([1, 4])
@pytest.mark.parametrize("make", [burgers, conductivity])
def test_taylor(make):
    st = pf.SpaceTime({1: "1x1", 4: "2x2"}[MPI.COMM_WORLD.size])
    rf = functional(make(3, 6, comm=st.space_comm), st, mgrit={"rtol": 1e-13, "coarsening": (3,)})
    check_orders(rf, rf.controls[0].control, direction(rf.evolution.V, scale=LENGTH[make]))


def test_a_linearisation_is_computed_once():
    """After a gradient, Hessian actions solve no stage and assemble no Jacobian; a stage is factored once at most, and
    not for a gradient, which Newton's factors are near enough for.
    """
    rf = functional(burgers(4, 8, tableau="SDIRK2"), time_solver="serial")
    z, v = rf.array(rf.controls[0].control), np.cos(np.arange(rf.layout.size))
    rf.problem.value(z)
    counts, stages = rf.problem.sweeps.propagators[0].counts, 2 * 8
    factored = counts["factorisation"]
    rf.problem.derivative(z)
    assert counts["factorisation"] == factored
    before = dict(counts)
    first = rf.problem.hessian_action(z, v)
    for k in range(8):
        rf.problem.hessian_action(z, np.cos(k + np.arange(rf.layout.size) ** 2))
    assert np.allclose(rf.problem.hessian_action(z, v), first, rtol=1e-12, atol=1e-12 * np.abs(first).max())
    for name in ("newton", "jacobian", "derivative"):
        assert counts[name] == before[name]
    assert counts["factorisation"] - before["factorisation"] <= stages


def test_a_linearisation_is_that_of_the_stored_state():
    """Of two states that are stored, derivatives at the earlier one, which is not solved for again."""
    posed = burgers(3, 4)
    problem, fresh = (functional(posed, time_solver="serial").problem for _ in range(2))
    z, v = np.cos(np.arange(problem.layout.size)), np.sin(np.arange(problem.layout.size) ** 2)
    problem.keep_evaluations(2)
    for control in (z, 2 * v):
        problem.derivative(control)
    solved = problem.sweeps.counts["state"]
    found, expected = (p.hessian_action(z, v) for p in (problem, fresh))
    assert problem.sweeps.counts["state"] == solved
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9 * np.abs(expected).max())


@pytest.mark.parametrize("pivot", [0.0, 1e-18, 1e-6])
def test_a_factor_without_pivoting_gives_way(pivot):
    """A pivot that is zero, or would cost all or some digits: UMFPACK takes over for this matrix, plain and transposed,
    and the next one has the same bits as without it.
    """
    from firedrake.petsc import PETSc

    from pint_fem.kernels.direct import default_solver
    from pint_fem.kernels.factors import QUICK
    from pint_fem.kernels.updatable_factor import UpdatableFactor

    bad, good = np.array([[pivot, 1.0], [1.0, 1.0 if pivot else 0.0]]), np.array([[3.0, 1.0], [1.0, 2.0]])
    solver = UpdatableFactor(default_solver(MPI.COMM_SELF, 2), QUICK)
    x, b = (PETSc.Vec().createSeq(2) for _ in range(2))
    b.array[:] = 1, 2

    def factor(entries):
        matrix = PETSc.Mat().createAIJ((2, 2), csr=([0, 2, 4], [0, 1, 0, 1], np.ravel(entries)), comm=MPI.COMM_SELF)
        solver.factor(matrix, None)
        return solver.ksp.getPC().getFactorSolverType()

    solutions = []
    for matrix, package in ((good, "petsc"), (bad, "umfpack"), (good, "petsc")):
        assert factor(matrix) == package
        for transposed in (False, True):
            solver.solve(b, x, transposed=transposed)
            assert np.allclose(x.array, np.linalg.solve(matrix.T if transposed else matrix, [1, 2]), rtol=1e-14)
            solutions.append(x.array.copy())
    assert np.array_equal(solutions[:2], solutions[-2:])

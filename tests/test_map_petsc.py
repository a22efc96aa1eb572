"""The map from controls to readings as a matrix of PETSc, in PETSc's least squares and conjugate gradients."""

import numpy as np
import pytest
from firedrake.petsc import PETSc
from mpi4py import MPI
from scipy.sparse.linalg import lsqr

import pint_fem as pf
from tests.inverse_problems import heat, random_control
from tests.limits import time_limit

COMM = MPI.COMM_WORLD
KINDS = ("source", "amplitude", "initial")


@pytest.mark.parallel([1, 2, 3])
@time_limit(150)
def test_petsc_solves_least_squares_with_the_map():
    """As numpy and scipy do with the dense matrix of one rank; a static control, one per step, initial conditions."""
    grid = (2, 1) if COMM.size == 2 else (1, COMM.size)
    F = heat(pf.SpaceTime(grid), KINDS).parameter_to_observable()
    mat, own = F.petsc_mat(), F.partition.own
    columns = COMM.allreduce(len(own))
    assert mat.getSize() == (12, columns)
    x, y = mat.createVecs()
    assert x.getSizes() == (len(own), columns)
    z = random_control(heat(pf.SpaceTime(grid), KINDS))
    x.array_w[:] = z[own]
    mat.mult(x, y)
    np.testing.assert_allclose(np.concatenate(COMM.allgather(y.array_r.copy())), F @ z, rtol=0, atol=1e-13)
    data = np.cos(np.arange(12.0))
    first, last = y.getOwnershipRange()
    y.array_w[:] = data[first:last]
    mat.multTranspose(y, x)
    np.testing.assert_allclose(x.array_r, (F.T @ data)[own], rtol=0, atol=1e-14)

    # the dense matrix: by products with unit vectors of the matrix of PETSc
    dense, start = np.empty((12, columns)), x.getOwnershipRange()[0]
    for j in range(columns):
        x.array_w[:] = 0.0
        if start <= j < start + len(own):
            x.array_w[j - start] = 1.0
        mat.mult(x, y)
        dense[:, j] = np.concatenate(COMM.allgather(y.array_r.copy()))
    y.array_w[:] = data[first:last]

    ksp = PETSc.KSP().create(comm=COMM)
    ksp.setOperators(mat)
    ksp.setType("lsqr")
    ksp.getPC().setType("none")
    ksp.setTolerances(rtol=1e-30, atol=0, max_it=5)
    x.array_w[:] = 0.0
    ksp.solve(y, x)
    expected = lsqr(dense, data, atol=0, btol=0, conlim=0, iter_lim=5)[0]
    np.testing.assert_allclose(
        x.array_r, expected[start : start + len(own)], rtol=0, atol=1e-9 * np.abs(expected).max()
    )

    normal = PETSc.Mat().createNormal(mat)
    normal.shift(1.0)
    ksp = PETSc.KSP().create(comm=COMM)
    ksp.setOperators(normal)
    ksp.setType("cg")
    ksp.getPC().setType("none")
    ksp.setTolerances(rtol=1e-14, atol=0, max_it=100)
    b = x.duplicate()
    mat.multTranspose(y, b)
    ksp.solve(b, x)
    expected = np.linalg.solve(dense.T @ dense + np.eye(columns), dense.T @ data)
    np.testing.assert_allclose(
        x.array_r, expected[start : start + len(own)], rtol=0, atol=1e-11 * np.abs(expected).max()
    )

"""Solve 1,024 steps of the heat equation on a line at once, by MGRIT on a propagator in numpy, beside one step after
another.

    python heat_in_numpy.py                  (mpiexec -n 2 python heat_in_numpy.py: the ranks share the steps)

The step is yours: any class with ``step(steps, u, out)`` that takes a block of states ``u`` to the next ones. It needs
numpy and mpi4py only.
"""

from pathlib import Path

import numpy as np
from mpi4py import MPI

from pint_fem.mgrit import MGRIT, split_steps

comm, cells, nsteps, m = MPI.COMM_WORLD, 64, 1024, 16
second = (np.diag(np.full(cells - 2, 1.0), 1) + np.diag(np.full(cells - 2, 1.0), -1) - 2 * np.eye(cells - 1)) * cells**2


class BackwardEuler:
    """Steps of length ``dt``: ``u[n+1] = (I - dt A)^{-1} u[n]``."""

    def __init__(self, dt):
        self.inverse = np.linalg.inv(np.eye(cells - 1) - dt * second)

    def step(self, steps, u, out):
        """A block of states ``(k, n)``, one row per state, to the states one step later."""
        out[...] = u @ self.inverse.T


x = np.arange(1, cells) / cells
first = np.sin(np.pi * x) + np.where(np.abs(x - 0.3) < 0.1, 1.0, 0.0)
bounds = split_steps(nsteps, comm.size)  # the steps of each rank
begin, end = bounds[comm.rank], bounds[comm.rank + 1]
fine, coarse = BackwardEuler(0.1 / nsteps), BackwardEuler(0.1 * m / nsteps)
U = np.zeros((end - begin + 1, cells - 1))  # the points of this rank; the first one is the last of the rank before
if comm.rank == 0:
    U[0] = first
solver = MGRIT([fine, coarse], nsteps, options={"coarsening": m, "relax": "FCF", "rtol": 1e-10}, comm=comm)
result = solver.solve(U)

one_by_one = np.empty((nsteps + 1, cells - 1))
one_by_one[0] = first
for n in range(nsteps):
    fine.step([n], one_by_one[n : n + 1], one_by_one[n + 1 : n + 2])
error = comm.allreduce(np.abs(U - one_by_one[begin : end + 1]).max(), MPI.MAX)
if comm.rank == 0:
    print(f"{nsteps} steps of {cells - 1} unknowns, m = {m}, on {comm.size} ranks: {result.cycles} cycles")
    print("residuals relative to the first: " + ", ".join(f"{r / result.residuals[0]:.1e}" for r in result.residuals))
    print(f"largest difference from one step after another: {error:.1e}")
    np.save(Path(__file__).with_name("trajectory.npy"), one_by_one)

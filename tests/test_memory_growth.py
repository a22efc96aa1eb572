"""Nothing grows: evaluations and functionals leave neither PETSc objects nor memory behind, on any grid.

On several ranks in space PETSc keeps what Python drops until all of them clean up. What waits there is counted by
PETSc's own list; memory is the process's resident set.
"""

import ctypes
import gc
import os
import sys
import tempfile

import numpy as np
import pytest
from firedrake import DirichletBC, Function, FunctionSpace, TestFunction, UnitSquareMesh, dx, exp, grad, inner
from firedrake.petsc import PETSc
from irksome import Dt

from pint_fem import Evolution, RunningMisfit, SpaceTime, TimeParallelReducedFunctional
from pint_fem.evolution.tableaux import SDIRK2
from tests.limits import time_limit

STEPS = 8
EVALUATIONS = int(os.environ.get("PINT_FEM_EVALUATIONS", "5"))
"""Evaluations of a case; 500 where memory is to be seen flat in the long run."""
FUNCTIONALS = int(os.environ.get("PINT_FEM_FUNCTIONALS", "8"))

CASES = {
    "linear": {},
    "nonlinear": {},
    "nonlinear, iterative": {"solver": {"ksp_type": "gmres", "pc_type": "jacobi", "ksp_rtol": 1e-12}},
    "nonlinear, serial": {"parameters": {"time_solver": "serial"}},
    "linear, paradiag": {"parameters": {"time_solver": "paradiag", "paradiag": {"memory": 1e-9}}},
    "linear, krylov": {"parameters": {"krylov": {"ksp_type": "fgmres"}}},
}
OFTEN = ("linear", "nonlinear, iterative", "linear, krylov")
"""The others take longer and have the same kinds of solvers and matrices."""


def waiting(comm) -> int:
    """PETSc objects that have been dropped and not been destroyed yet, by ``PetscGarbageView`` (collective)."""
    gc.collect()
    sys.stdout.flush()
    out = os.dup(1)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 1)
        try:
            PETSc.garbage_view(comm)
            ctypes.CDLL(None).fflush(None)
        finally:
            os.dup2(out, 1)
            os.close(out)
        file.seek(0)
        lines = [line.split("|") for line in file.read().decode().splitlines() if line.startswith("|")]
    return comm.allreduce(sum(len(cells) > 1 and cells[1].strip().isdigit() for cells in lines))


def resident() -> float:
    """Memory of this process, MB."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


class Problem:
    """Heat on 4 x 4 cells with a conductivity sought, or a source where the evolution is linear."""

    def __init__(self, grid: str, case: str):
        self.st, given = SpaceTime(grid), CASES[case]
        mesh = self.st.mesh(UnitSquareMesh, 4, 4)
        V = FunctionSpace(mesh, "CG", 1)
        u, v, self.q = Function(V), TestFunction(V), Function(V, name="q")
        if case.startswith("nonlinear"):
            F = Dt(u) * v * dx + exp(self.q) * (1 + u**2) * inner(grad(u), grad(v)) * dx - v * dx
        else:
            F = Dt(u) * v * dx + inner(grad(u), grad(v)) * dx - self.q * v * dx
        self.evolution = Evolution(
            F, u, tableau=SDIRK2(), dt=1 / STEPS, nsteps=STEPS, control=self.q, bcs=DirichletBC(V, 0, 1),
            solver_parameters=given.get("solver"),
        )  # fmt: skip
        self.misfit = RunningMisfit(inner(u - 1, u - 1) * dx)
        self.parameters = {"mgrit": {"levels": 2, "coarsening": 4}, **given.get("parameters", {})}
        self.comm, self.rng = mesh.comm, np.random.default_rng(self.st.space_comm.rank)
        self.direction = Function(V).assign(1.0)

    def functional(self) -> TimeParallelReducedFunctional:
        regularisation = 1e-3 * self.q**2 * dx
        return TimeParallelReducedFunctional(
            self.evolution, self.misfit, regularisation=regularisation, spacetime=self.st,
            solver_parameters=self.parameters,
        )  # fmt: skip

    def evaluate(self, J) -> None:
        self.q.dat.data_wo[...] = 0.1 * self.rng.standard_normal(self.q.dat.data_ro.shape)
        J(self.q)
        J.derivative()
        J.hessian(self.direction)


@pytest.mark.parallel(2)
@time_limit(300)
@pytest.mark.parametrize("case", [c if c in OFTEN else pytest.param(c, marks=pytest.mark.grid) for c in CASES])
def test_evaluations_leave_nothing_behind(case):
    for grid in ["2x1", "1x2"] if case == "linear" else ["2x1"]:
        problem = Problem(grid, case)
        J = problem.functional()
        problem.evaluate(J)
        problem.evaluate(J)
        before, memory = waiting(problem.comm), resident()
        for _ in range(EVALUATIONS):
            problem.evaluate(J)
        left = waiting(problem.comm) - before
        assert left <= 4, f"{left} objects more wait to be destroyed after {EVALUATIONS} evaluations on {grid}"
        assert resident() - memory < 1.0


@pytest.mark.parallel(2)
@time_limit(300)
@pytest.mark.parametrize("case", [pytest.param("linear", marks=pytest.mark.grid), "nonlinear"])
def test_functionals_that_are_dropped_leave_nothing_behind(case):
    grid = "2x1"
    problem, counts, memory = Problem(grid, case), [], []
    for _ in range(FUNCTIONALS):
        J = problem.functional()
        problem.evaluate(J)
        del J
        counts.append(waiting(problem.comm))  # collects cycles, so that all that is dropped waits there
        memory.append(resident())
    half = FUNCTIONALS // 2
    assert max(counts[half:]) <= max(counts[:half])
    assert memory[-1] - memory[half] < 2.0

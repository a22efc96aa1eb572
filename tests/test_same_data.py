"""Ranks that are given other data than each other are refused by name; what one rank gives wrongly is, on all ranks."""

from __future__ import annotations

import numpy as np
import pytest
from firedrake import Constant, Function, FunctionSpace, TestFunction, UnitIntervalMesh, dx, grad, inner
from irksome import Dt
from mpi4py import MPI

import pint_fem as pf
from pint_fem.errors import InputError
from pint_fem.mgrit import MGRIT
from tests.limits import time_limit

GRIDS = ["3x1", "1x3"]
STEPS = 4


class Posed:
    """Heat on a line; what is named in ``other`` differs between ranks."""

    def __init__(self, grid: str, other: str = ""):
        self.rank, self.other = MPI.COMM_WORLD.rank, other
        self.st = pf.SpaceTime(grid)
        mesh = UnitIntervalMesh(6, comm=self.st.space_comm)
        V = FunctionSpace(mesh, "CG", 1)
        u, v, self.q = Function(V), TestFunction(V), Function(V, name="q")
        self.k = Function(FunctionSpace(mesh, "R", 0), name="k").assign(1.0 + self.more("coefficient"))
        self.field = Function(V, name="field").assign(1.0 + 1e-6 * self.more("field"))
        self.factor = Constant(1.0 + self.more("constant"), name="factor")
        F = self.factor * Dt(u) * v * dx + self.k * inner(grad(u), grad(v)) * dx - self.field * self.q * v * dx
        F += 0 if not self.more("number in a form") else 2.0 * u * v * dx
        evolution = pf.Evolution(F, u, tableau=pf.BackwardEuler(), dt=1 / STEPS, nsteps=STEPS, control=self.q)
        self.sensors = pf.PointSensors(
            [[0.3]], [0.5, 1.0], np.array([[0.1], [0.2]]) + 1e-15 * self.more("readings"),
            weight=1.0 + self.more("weight"),
        )  # fmt: skip
        self.J = pf.TimeParallelReducedFunctional(
            evolution, self.sensors, regularisation=(1.0 + self.more("regularisation")) * self.q**2 * dx,
            spacetime=self.st, solver_parameters={"mgrit": {"coarsening": 2, "rtol": 1e-10}},
        )  # fmt: skip

    def more(self, what: str) -> float:
        """One on the second rank where it is what differs."""
        return float(self.rank == 1 and what == self.other)


EVERYWHERE = {
    "coefficient": "the value of the function 'k'",
    "constant": "the value of the constant 'factor'",
    "number in a form": "the form of the residual",
    "readings": "readings of PointSensors",
    "weight": "weight of PointSensors",
    "regularisation": "the form of the regularisation",
}
IN_TIME = {"field": "the value of the function 'field' differs"}  # in space each rank has another part of it


@pytest.mark.parallel(3)
@pytest.mark.parametrize(
    ("grid", "other"), [("1x3", o) for o in EVERYWHERE | IN_TIME] + [("3x1", o) for o in ("constant", "readings")]
)
@time_limit(60)
def test_data_that_differ_between_ranks_are_refused_when_the_functional_is_made(grid, other):
    with pytest.raises(InputError, match=(EVERYWHERE | IN_TIME)[other]):
        Posed(grid, other)


@pytest.mark.parallel(3)
@pytest.mark.parametrize("grid", GRIDS)
@time_limit(60)
def test_data_that_differ_between_ranks_are_refused_when_read_again_and_the_old_ones_stay(grid):
    posed = Posed(grid)
    J, z, more = posed.J, Function(posed.q.function_space()).assign(0.5), 0.5 * posed.rank
    before = J(z)
    posed.k.assign(1 + more)
    with pytest.raises(InputError, match="the value of the function 'k'"):
        J.update_data()
    posed.k.assign(1)
    posed.sensors.data = np.array([[0.1], [0.2]]) + more
    with pytest.raises(InputError, match="readings of PointSensors"):
        J.update_data()
    posed.sensors.data = [[0.1], [0.2]]
    posed.field.assign(2.0 + 1e-13 * posed.rank)  # round-off of another solve
    assert J.update_data() == ["the value of the function 'field'"]
    posed.field.assign(1.0)
    J.update_data()
    assert J(z) == pytest.approx(before, rel=1e-9)
    with pytest.raises(InputError, match="weights of the terms of a sum"):
        J * (1.0 + posed.rank)


@pytest.mark.parallel(3)
@pytest.mark.parametrize("grid", GRIDS)
@time_limit(60)
def test_what_one_rank_gives_wrongly_is_refused_on_all(grid, tmp_path):
    posed, wrong = Posed(grid), MPI.COMM_WORLD.rank == 1
    J, z = posed.J, Function(posed.q.function_space()).assign(0.5)
    J(z)
    paths = [str(tmp_path / "a.pvd"), str(tmp_path / "b.pvd")]
    for calls, match in [
        (lambda: J("x" if wrong else z), "the control lives in"),
        (lambda: J.state(z, times="now" if wrong else [0.5]), "give a number or a list"),
        (lambda: J.state(z, times=[0.5, 1.0] if wrong else [0.5]), "times is not the same"),
        (lambda: J.write(z, paths[wrong]), "path is not the same"),
        (lambda: J.write(z, 3 if wrong else paths[0]), "no name of a file"),
    ]:
        with pytest.raises(InputError, match=match):
            calls()
    for data in ("abc", [[1.0], [2.0, 3.0]]):
        posed.sensors.data = data if wrong else [[0.1], [0.2]]
        for call in (lambda: J(z), J.update_data):
            with pytest.raises(InputError, match="have to be numbers"):
                call()
    posed.sensors.data = [[0.1], [0.2]]
    assert np.isfinite(J(z))


@pytest.mark.parallel(3)
@time_limit(60)
def test_states_of_other_types_on_the_ranks_are_refused():
    class Euler:
        def step(self, steps, u, out):
            out[...] = 0.5 * u

    solver = MGRIT([Euler(), Euler()], 8, options={"coarsening": 4}, comm=MPI.COMM_WORLD)
    U = np.zeros((solver.levels[0].k + 1, 2), np.float32 if MPI.COMM_WORLD.rank == 1 else float)
    with pytest.raises(InputError, match="different types on the ranks"):
        solver.solve(U)

"""The choice of a coarser mesh for the coarse level by ``time_solver="auto"``: where it pays, and why not elsewhere."""

import numpy as np
import pytest
from firedrake import MeshHierarchy, UnitSquareMesh
from mpi4py import MPI

import pint_fem as pf
from pint_fem.sweeps import automatic
from pint_fem.sweeps.predictions import coarser_mesh, ratios
from tests.heat import heat
from tests.logs import logged
from tests.test_paradiag import functional

CHEAP = {1: 1.0, 8: 1.0, 16: 1.0, 32: 1.0}
"""Times of a step by the number of states where blocks are as cheap as one state: coarse solves dominate."""


def chosen(monkeypatch, st, *, seconds=CHEAP, cost=1 / 16, refinements=1, **given):
    """The functional that is chosen for times of a step, the coarser mesh's over the fine one's; and the lines."""
    steps = coarser_mesh._coarser_steps
    monkeypatch.setattr(automatic, "measured_seconds", lambda *given: seconds)
    monkeypatch.setattr(coarser_mesh, "_coarser_steps", lambda *given: (cost, steps(*given)[1]))
    monkeypatch.setattr(ratios, "PARADIAG", 1e3)
    mesh = UnitSquareMesh(4, 4, comm=st.space_comm, distribution_parameters={"partitioner_type": "simple"})
    ev = heat(MeshHierarchy(mesh, refinements)[-1], **({"steps": 256, "dt": 0.02} | given))
    with logged() as lines:
        rf = functional(ev, st, time_solver="auto", mgrit={"rtol": 1e-9})
    monkeypatch.undo()
    return rf, lines


@pytest.mark.parallel([1, 2])
def test_a_coarser_mesh_is_taken_where_coarse_solves_dominate(monkeypatch):
    """With the value and the derivative of sequential stepping, in no more cycles than were counted for the choice."""
    st = pf.SpaceTime()
    rf, lines = chosen(monkeypatch, st)
    solvers = rf.problem.sweeps.solvers
    assert solvers.kind == "mgrit"
    assert [ev.V.dim() for ev in solvers.space.evolutions] == [81, 25]
    assert all("the coarse level on the next coarser mesh: by measured times" in line for line in lines)
    assert "states of 81, 25 unknowns" in solvers.view()
    ev = heat(rf.evolution.V.mesh(), steps=256, dt=0.02)
    serial = functional(ev, st, time_solver="serial")
    z = np.ones(rf.layout.size)
    assert rf.problem.value(z) == pytest.approx(serial.problem.value(z), rel=1e-8)
    difference = rf.problem.derivative(z) - serial.problem.derivative(z)
    assert np.linalg.norm(difference) < 1e-7 * np.linalg.norm(serial.problem.derivative(z))
    assert all(1 <= result.cycles <= ratios.MOST_CYCLES for _, result in rf.problem.sweeps.results)


DECLINED = {
    "blocks as expensive as their states": ({"seconds": {1: 1.0, 8: 8.0}}, "a coarser mesh could not bring it below"),
    "coarse steps as expensive as fine ones": ({"cost": 1.0}, "with a coarser mesh"),
    "steps that are small for the mesh": ({"dt": 1e-4, "cost": 1e-3}, "more than 12 cycles"),
}


@pytest.mark.parametrize("kind", DECLINED)
def test_it_is_declined_with_the_reason(monkeypatch, kind):
    given, why = DECLINED[kind]
    rf, lines = chosen(monkeypatch, pf.SpaceTime("1x1", comm=MPI.COMM_SELF), **given)
    assert not any(rf.problem.sweeps.solvers.space.transfers)
    assert why in lines[0]


def test_without_a_hierarchy_nothing_is_said(monkeypatch):
    rf, lines = chosen(monkeypatch, pf.SpaceTime("1x1", comm=MPI.COMM_SELF), refinements=0)
    assert not any(rf.problem.sweeps.solvers.space.transfers)
    assert "coarser mesh" not in lines[0]


def test_times_are_measured_on_both_meshes():
    mesh = MeshHierarchy(UnitSquareMesh(6, 6, comm=MPI.COMM_SELF), 2)[-1]
    cost, (fine, coarse, _) = coarser_mesh._coarser_steps(heat(mesh), pf.SpaceTime("1x1", comm=MPI.COMM_SELF))
    assert (fine.V.dim(), coarse.V.dim()) == (625, 169)
    assert 0.1 < cost < 0.9

"""Functionals on several ranks in space with the solvers of large systems: those of one rank."""

import json
import subprocess
import sys

import numpy as np
import pytest
from firedrake import (
    COMM_SELF,
    Constant,
    DirichletBC,
    Function,
    FunctionSpace,
    SpatialCoordinate,
    TestFunction,
    UnitSquareMesh,
    as_vector,
    curl,
    dx,
    exp,
    grad,
    inner,
    sin,
)
from irksome import Dt
from mpi4py import MPI

import pint_fem as pf
import pint_fem.kernels.direct
from tests.limits import HANG, patience
from tests.logs import logged
from tests.ranks import program_environment

SOLVERS = {
    "serial": {"time_solver": "serial"},
    "mgrit": {"mgrit": {"levels": 2, "coarsening": 4, "rtol": 1e-12}},
}


def posed(st, kind, solver, **given):
    """A source, a coefficient or a current; values of J, its gradient and a Hessian action along fixed fields."""
    mesh = st.mesh(UnitSquareMesh, 10, 10)
    x = SpatialCoordinate(mesh)
    V = FunctionSpace(mesh, *(("N1curl", 1) if kind == "maxwell" else ("CG", 2 if kind == "coefficient" else 1)))
    u, v, q = Function(V), TestFunction(V), Function(V if kind == "maxwell" else FunctionSpace(mesh, "CG", 1))
    bcs = [] if kind == "maxwell" else DirichletBC(V, 0, (1, 2))
    if kind == "maxwell":
        F = inner(Dt(u), v) * dx + Constant(0.1) * inner(curl(u), curl(v)) * dx - inner(q, v) * dx
        misfit = pf.RunningMisfit(inner(curl(u) - x[0], curl(u) - x[0]) * dx)
    else:
        k, f = (exp(q), sin(3 * x[0])) if kind == "coefficient" else (Constant(1.0), q)
        advection = 4 * u.dx(0) * v if kind == "advection" else 0 * u * v
        F = (Dt(u) * v + k * inner(grad(u), grad(v)) + advection - f * v) * dx
        misfit = pf.RunningMisfit((u - x[0]) ** 2 * dx)
    ev = pf.Evolution(F, u, tableau=pf.SDIRK2(), dt=0.02, nsteps=16, control=q, bcs=bcs, **given)
    J = pf.TimeParallelReducedFunctional(
        ev, misfit, regularisation=1e-3 * inner(q, q) * dx, spacetime=st, solver_parameters=SOLVERS[solver]
    )
    space = q.function_space()
    vector = kind == "maxwell"
    fields = [sin(5 * x[0] + i) * x[1] * 0.3 for i in range(2)]
    z, dz = (Function(space).interpolate(as_vector([f, x[0] * f]) if vector else f) for f in fields)
    value = J(z)
    return J, value, J.derivative(), J.hessian(dz), dz


def numbers(st, *args, **given):
    """The value, and products of gradient and Hessian action with a direction."""
    _, value, gradient, hessian, dz = posed(st, *args, **given)
    pair = lambda g: st.space_comm.allreduce(float(np.dot(g.dat.data_ro.ravel(), dz.dat.data_ro.ravel())))
    return np.array([value, pair(gradient), pair(hessian)])


@pytest.mark.parallel([2, 3])
@pytest.mark.parametrize(
    ("kind", "solver"),
    [*(("source", solver) for solver in SOLVERS), *((k, "serial") for k in ("coefficient", "maxwell", "advection"))],
)
def test_values_are_those_of_one_rank(kind, solver, monkeypatch):
    """By substructuring, by MUMPS where a system is not symmetric, and by the reproducible solvers."""
    expected = numbers(pf.SpaceTime("1x1", comm=COMM_SELF), kind, solver)
    monkeypatch.setattr(pint_fem.kernels.direct, "REDUNDANT", 0)
    st = pf.SpaceTime(space=MPI.COMM_WORLD.size, time=1)
    found = numbers(st, kind, solver)
    same = numbers(st, kind, solver, reproducible=True)
    assert np.allclose(found, expected, rtol=1e-9)
    assert np.allclose(same, expected, rtol=1e-9)
    if kind == "source":
        assert np.array_equal(numbers(st, kind, solver, reproducible=True), same)


@pytest.mark.parallel(4)
def test_bits_do_not_depend_on_ranks_in_time(monkeypatch):
    monkeypatch.setattr(pint_fem.kernels.direct, "REDUNDANT", 0)
    half = MPI.COMM_WORLD.Split(MPI.COMM_WORLD.rank // 2)
    alone = posed(pf.SpaceTime("2x1", comm=half), "source", "mgrit", reproducible=True)
    together = posed(pf.SpaceTime("2x2"), "source", "mgrit", reproducible=True)
    assert alone[1] == together[1]
    assert np.allclose(alone[2].dat.data_ro, together[2].dat.data_ro, rtol=1e-13, atol=0)
    half.Free()


@pytest.mark.parallel(2)
def test_the_view_names_the_solvers(monkeypatch):
    monkeypatch.setattr(pint_fem.kernels.direct, "REDUNDANT", 0)
    monkeypatch.setitem(SOLVERS, "view", {"mgrit": {"levels": 2, "coarsening": 4, "view": True}})
    with logged() as lines:
        posed(pf.SpaceTime("2x1"), "source", "view")
    if MPI.COMM_WORLD.rank == 0:
        found = [line for line in lines if "substructuring on 2 ranks" in line]
        assert any("level 0" in line for line in found)
        assert any("level 1" in line for line in found)


@pytest.mark.starts_mpi
def test_the_benchmark_compares_one_rank_with_two(tmp_path):
    command = [sys.executable, "-m", "tests.benchmarks.space", "--cases", "small", "--steps", "2", "--repeats", "1"]
    command += ["--details", str(tmp_path / "all.json")]
    subprocess.run(["mpiexec", "-n", "2", *command], env=program_environment(), check=True, timeout=HANG * patience())
    found = json.loads((tmp_path / "all.json").read_text())
    assert set(found) == {"cube 8", "square 16"}
    for case in found.values():
        assert case["one"]["J"] == pytest.approx(case["many"]["J"], rel=1e-10)
        assert case["one"]["norm"] == pytest.approx(case["many"]["norm"], rel=1e-8)
        assert case["ratios"]["state"] > 0

"""States and adjoints as functions and files, against a plain Firedrake loop and tapes of what follows a state."""

from pathlib import Path

import firedrake as fd
import numpy as np
import pytest
from firedrake import Function, FunctionSpace, TestFunction, assemble, dx, grad, inner, solve
from firedrake.adjoint import Control, ReducedFunctional
from irksome import Dt
from mpi4py import MPI

import pint_fem as pf
from pint_fem.errors import InputError
from pint_fem.kernels.arrays import get
from pint_fem.propagators.tape import recording
from tests.limits import time_limit
from tests.meshes import square
from tests.ranks import cases

N, STEP = 8, 1 / 16
GRIDS = {1: ["1x1"], 3: ["1x3", "3x1"]}


class Posed:
    """A reaction-diffusion problem with an unknown source, by backward Euler."""

    def __init__(self, st, storage="all", **options):
        mesh = square(3, st.space_comm)
        self.st, self.V = st, FunctionSpace(mesh, "CG", 1)
        self.x = fd.SpatialCoordinate(mesh)
        self.u, v = Function(self.V, name="u"), TestFunction(self.V)
        self.q = Function(self.V, name="q").interpolate(1 + self.x[0])
        self.start = Function(self.V).interpolate(self.x[0] * self.x[1])
        self.bcs = [fd.DirichletBC(self.V, 0, 1)]
        F = (Dt(self.u) * v + self.flux(self.u, v, self.q)) * dx(degree=4)
        self.ev = pf.Evolution(
            F, self.u, tableau=pf.BackwardEuler(), dt=STEP, nsteps=N, control=self.q, bcs=self.bcs, initial=self.start,
            t0=1.0,
        )  # fmt: skip
        misfits = [pf.RunningMisfit(self.running(self.u)), pf.TerminalMisfit(self.terminal(self.u))]
        mgrit = {"coarsening": (2,), "rtol": 1e-12, "storage": storage}
        self.J = pf.TimeParallelReducedFunctional(
            self.ev, misfits, spacetime=st, solver_parameters={"mgrit": mgrit}, **options
        )
        self.z = Function(self.V).interpolate(fd.sin(3 * self.x[0]) + 2)

    def flux(self, u, v, q):
        return (1 + u**2) * inner(grad(u), grad(v)) - q * v

    def running(self, u):
        return (u - 0.2) ** 2 * dx(degree=4)

    def terminal(self, u):
        return u**4 * dx(degree=4)

    def steps(self, start, count):
        """States of a plain loop."""
        old, states = Function(self.V).assign(start), []
        newton = {"snes_rtol": 1e-14, "snes_atol": 1e-14, "snes_linesearch_type": "basic"}
        for _ in range(count):
            u, v = Function(self.V).assign(old), TestFunction(self.V)
            F = ((u - old) / STEP * v + self.flux(u, v, self.z)) * dx(degree=4)
            solve(F == 0, u, bcs=self.bcs, solver_parameters=newton)
            states.append(u)
            old = u
        return states

    def slope_after(self, states, n):
        """dJ/du_n, J's terms of the points from n on by pyadjoint's tape."""
        start = Function(self.V).assign(states[n])
        with recording() as tape:
            J = 0.0 if n == 0 else STEP * assemble(self.running(start))
            for u in self.steps(start, N - n):
                J += STEP * assemble(self.running(u))
                last = u
            J += assemble(self.terminal(last if n < N else start))
            slope = ReducedFunctional(J, Control(start), tape=tape).derivative()
        return slope


def grids():
    return GRIDS[MPI.COMM_WORLD.size]


@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize("storage", cases(["all", "C"], on_ranks=["C"]))
@time_limit(120)
def test_states_and_adjoints_at_given_times(storage):
    """A plain loop's states and the derivatives of what follows them, at C- and F-points, on all ranks in time."""
    for grid in grids():
        posed = Posed(pf.SpaceTime(grid), storage)
        J, z = posed.J, posed.z
        expected = [posed.start, *posed.steps(posed.start, N)]
        times = [1.0, 1 + 3 * STEP, 1 + 4 * STEP, 1.5]
        for f, n in zip(J.state(z, times=times), (0, 3, 4, N), strict=True):
            assert f.function_space() == posed.V
            np.testing.assert_allclose(get(f), get(expected[n]), rtol=1e-9, atol=1e-11)
        assert isinstance(J.state(z, times=1.5), Function)
        for n in (3, 4):
            slope = posed.slope_after(expected, n)
            mine = J.adjoint(z, times=1 + n * STEP, riesz_map=None)
            np.testing.assert_allclose(get(mine), get(slope), rtol=1e-7, atol=1e-10)
            field, w = J.adjoint(z, times=[1 + n * STEP])[0], TestFunction(posed.V)
            np.testing.assert_allclose(get(assemble(field * w * dx)), get(slope), rtol=1e-7, atol=1e-10)


@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize("storage", cases(["all", "C"], on_ranks=["C"]))
@time_limit(120)
def test_own_points_share_the_time_axis(storage):
    """Each point belongs to one rank in time; together they are the loop's trajectory, the adjoints those of the
    given times.
    """
    for grid in grids():
        posed = Posed(pf.SpaceTime(grid), storage)
        J, z = posed.J, posed.z
        expected = [posed.start, *posed.steps(posed.start, N)]
        J(z)
        own, times = J.state(), J.own_times()
        assert len(own) == len(times)
        numbers = np.rint((times - 1) / STEP).astype(int)
        for f, n in zip(own, numbers, strict=True):
            np.testing.assert_allclose(get(f), get(expected[n]), rtol=1e-9, atol=1e-11)
        np.testing.assert_array_equal(np.concatenate(posed.st.time_comm.allgather(numbers)), np.arange(N + 1))
        given = J.adjoint(times=1 + np.arange(N + 1) * STEP)
        for f, n in zip(J.adjoint(), numbers, strict=True):
            np.testing.assert_allclose(get(f), get(given[n]), rtol=1e-12)


def largest_value(file):
    """The largest value of the field in a file of ParaView's, by VTK's own reader."""
    from vtkmodules.util.numpy_support import vtk_to_numpy
    from vtkmodules.vtkIOXML import vtkXMLGenericDataObjectReader

    reader = vtkXMLGenericDataObjectReader()
    reader.SetFileName(str(file))
    reader.Update()
    return vtk_to_numpy(reader.GetOutput().GetPointData().GetArray(0)).max()


@pytest.mark.parallel([1, 3])
@time_limit(120)
def test_files_for_paraview(tmp_path):
    """One list with the times in order and a plain loop's states, of all ranks; with C-points, at given times, too."""
    comm = MPI.COMM_WORLD
    folder = Path(comm.bcast(str(tmp_path)))
    for grid in grids():
        posed = Posed(pf.SpaceTime(grid), "C")
        expected = [posed.start, *posed.steps(posed.start, N)]
        for name, times, count in (("all", None, N + 1), ("some", [1.0, 1 + STEP, 1.5], 3), ("one", 1.5, 1)):
            path = posed.J.write(posed.z, folder / grid / f"{name}.pvd", times=times)
            comm.barrier()
            rows = [line for line in path.read_text().splitlines() if "DataSet" in line]
            assert len(rows) == count
            found = [float(row.split('timestep="')[1].split('"')[0]) for row in rows]
            assert found == sorted(found)
            assert found[-1] == 1.5
            files = [path.parent / row.split('file="')[1].split('"')[0] for row in rows]
            assert all(file.is_file() and file.stat().st_size > 500 for file in files)
            for time, file in zip(found, files, strict=True):
                state = expected[round((time - 1) / STEP)]
                largest = posed.st.space_comm.allreduce(state.dat.data_ro.max(), op=MPI.MAX)
                assert largest_value(file) == pytest.approx(largest, rel=1e-6)
    blocked = folder / "blocked"
    if comm.rank == 0:
        blocked.write_text("a file, no folder")
    comm.barrier()
    with pytest.raises(InputError, match="cannot be written"):
        posed.J.write(posed.z, blocked / "state.pvd")
    with pytest.raises(InputError, match=r"ends with \.pvd"):
        posed.J.write(posed.z, folder / "state.vtu")


@pytest.mark.parallel([1, 3])
@time_limit(120)
def test_u_holds_the_final_state_only_if_asked():
    """By default no function of the user's changes; with final_state=u it is the loop's last state on all ranks."""
    for grid in grids()[:1]:
        posed = Posed(pf.SpaceTime(grid))
        before = get(posed.u)
        posed.J(posed.z)
        np.testing.assert_array_equal(get(posed.u), before)
        for storage in ("all", "C"):
            asked = Posed(posed.st, storage)
            J = pf.TimeParallelReducedFunctional(
                asked.ev, pf.RunningMisfit(asked.running(asked.u)), spacetime=posed.st, final_state=asked.u,
                solver_parameters={"mgrit": {"coarsening": (2,), "rtol": 1e-12, "storage": storage}},
            )  # fmt: skip
            value = J(asked.z)
            expected = get(asked.steps(asked.start, N)[-1])
            np.testing.assert_allclose(get(asked.u), expected, rtol=1e-9, atol=1e-11)
            (2 * J)(asked.q)
            moved = np.abs(get(asked.u) - expected).max(initial=0)
            assert posed.st.comm.allreduce(moved, op=MPI.MAX) > 1e-3
            assert J(asked.z) == pytest.approx(value, rel=1e-12)
            np.testing.assert_allclose(get(asked.u), expected, rtol=1e-9, atol=1e-11)


@time_limit(60)
def test_what_is_refused():
    """Times between points, and functions that evaluations may not change."""
    posed = Posed(pf.SpaceTime("1x1"))
    with pytest.raises(InputError, match=r"time 1\.1 is no point.*near it are 1\.0625 and 1\.125"):
        posed.J.state(posed.z, times=[1.0, 1.1])
    for time in (0.9, 1.6, float("nan")):
        with pytest.raises(InputError, match="is no point"):
            posed.J.adjoint(posed.z, times=time)
    other = Function(FunctionSpace(posed.V.mesh(), "DG", 0))
    for wrong in (posed.q, posed.start, other, 1.0, [posed.u]):
        with pytest.raises(InputError, match="final_state"):
            pf.TimeParallelReducedFunctional(
                posed.ev, pf.RunningMisfit(posed.running(posed.u)), spacetime=posed.st, final_state=wrong
            )


@time_limit(120)
def test_terms_of_a_sum():
    """The state of one of two evolutions, and its adjoint with the term's weight."""
    posed = Posed(pf.SpaceTime())
    u, v = Function(posed.V), TestFunction(posed.V)
    F = (Dt(u) * v + inner(grad(u), grad(v)) - posed.q * v) * dx
    ev = pf.Evolution(F, u, tableau=pf.BackwardEuler(), dt=1 / 4, nsteps=4, control=posed.q)
    solver = {"mgrit": {"coarsening": (2,), "rtol": 1e-12}}
    other = pf.TimeParallelReducedFunctional(
        ev, pf.TerminalMisfit(u**2 * dx), spacetime=posed.st, solver_parameters=solver
    )
    J = posed.J + 3 * other
    with pytest.raises(InputError, match="2 evolutions"):
        J.state(posed.z)
    np.testing.assert_array_equal(
        get(J.state(posed.z, times=1.5, evolution=posed.ev)), get(posed.J.state(posed.z, times=1.5))
    )
    np.testing.assert_allclose(
        get(J.adjoint(posed.z, times=0.5, evolution=ev)), 3 * get(other.adjoint(posed.z, times=0.5)), rtol=1e-12
    )

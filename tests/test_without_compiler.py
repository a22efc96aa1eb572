"""Machines without a compiler, and with narrower vectors: programs of their own with other environments."""

import os
import platform
import subprocess
import sys

import numpy as np
import pytest
from firedrake import COMM_WORLD, dx
from mpi4py import MPI

import pint_fem as pf
from pint_fem.kernels.lanes import compiled as compilation
from pint_fem.kernels.lanes.structures import kernels
from tests.heat import heat
from tests.limits import time_limit
from tests.meshes import square
from tests.test_commands import ROOT

SOLVE = """
import numpy as np
from firedrake import Function, FunctionSpace, dx, grad, inner
import pint_fem as pf
from pint_fem.kernels.lanes.structures import kernels
from tests.heat import heat
from tests.meshes import square

st = pf.SpaceTime()
ev = heat(square(6, st.space_comm), steps=16, dt=0.01)
u, q = ev.u, ev.control
rf = pf.TimeParallelReducedFunctional(
    ev, [pf.RunningMisfit((u - 0.5) ** 2 * dx)], regularisation=1e-3 * inner(grad(q), grad(q)) * dx, spacetime=st,
    solver_parameters={"mgrit": {"coarsening": (4,), "rtol": 1e-13}},
)
J = rf(q)
gradient = rf.derivative()
print("kernels", kernels() is not None)
print("J", repr(float(J)))
print("gradient", repr([float(x) for x in gradient.dat.data_ro]))
"""
BITS = """
import hashlib
import numpy as np
from pint_fem.kernels.lanes.structures import WIDTHS, kernels
from pint_fem.kernels.lanes.lane_steps import LaneSteps
from tests.lane_programs import dense_steps, random_program, states

print("kernels", kernels() is not None)
digest = hashlib.sha256()
for dtype, widths in WIDTHS.items():
    for seed in range(8):
        program = random_program(seed, parts=1 + seed % 2)
        u, added, given = states(seed, 37, 3, program.size)
        expected, _ = dense_steps(program, u, 3, added, given)
        results = []
        for width in widths:
            steps = LaneSteps(program, dtype)
            steps._cut = lambda lanes: [(width, lanes)]
            out = np.empty_like(added)
            steps.run(u, out, added, given)
            results.append(out)
        assert all(np.array_equal(results[0], other) for other in results)
        digest.update(results[0].tobytes())
        error = np.abs(results[0] - expected).max() / np.abs(expected).max()
        assert error < (1e-11 if dtype == np.float64 else 1e-5), error
print("digest", digest.hexdigest())
"""
BROKEN = """
import pyop2.compilation
from pint_fem.kernels.lanes import structures
real = pyop2.compilation.petsctools.get_petscvariables
pyop2.compilation.petsctools.get_petscvariables = lambda: real() | {"CC": "no-such-compiler"}
assert structures.kernels() is None
assert structures.kernels() is None
pyop2.compilation.petsctools.get_petscvariables = real  # Firedrake's own kernels need it
"""


def run(code, **environment):
    """Printed lines by their first words, and standard error."""
    env = {name: value for name, value in os.environ.items() if name != "PINT_FEM_NO_KERNELS"} | environment
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(line.partition(" ")[::2] for line in done.stdout.splitlines()), done.stdout + done.stderr


@pytest.fixture(scope="module")
def compiled():
    """Results where there is a compiler."""
    found, text = run(SOLVE)
    assert found["kernels"] == "True"
    assert "kernels are not compiled" not in text
    return found


def numbers(found):
    """The functional and its gradient."""
    return float(found["J"]), np.array([float(x) for x in found["gradient"].strip("[]").split(",")])


@pytest.mark.parametrize("how", ["switched off", "no compiler"])
def test_petsc_takes_the_place_of_kernels(how, compiled):
    """The same numbers; a compiler that is missing is reported once, kernels that are switched off are not."""
    off = how == "switched off"
    found, text = run(SOLVE, PINT_FEM_NO_KERNELS="1") if off else run(BROKEN + SOLVE)
    assert found["kernels"] == "False"
    assert text.count("kernels are not compiled") == (0 if off else 1)
    J, gradient = numbers(compiled)
    other, other_gradient = numbers(found)
    assert abs(J - other) <= 1e-10 * abs(J)
    assert np.abs(gradient - other_gradient).max() <= 1e-10 * np.abs(gradient).max()


NARROWER = ["", "-mno-avx512f", "-mno-avx512f -mno-avx2 -mno-avx -mno-fma", "-O1", "-O0"]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="flags of another processor")
def test_bits_are_the_same_for_all_widths_with_narrower_vectors():
    """Also without optimisation; results are those of dense algebra, and with AVX2 the same bits as with AVX-512."""
    found = [run(BITS, PYOP2_CFLAGS=flags)[0] for flags in NARROWER]
    assert all(lines["kernels"] == "True" for lines in found)
    assert found[0]["digest"] == found[1]["digest"]


@pytest.mark.parallel([1, 2])
@time_limit(120)
def test_kernels_are_used_on_all_ranks_or_on_none(monkeypatch, caplog):
    """Two ranks in time, of which the second cannot compile: both take PETSc's solvers; states are those of one."""
    results = []
    grids = [pf.SpaceTime((1, COMM_WORLD.size)), pf.SpaceTime("1x1", comm=MPI.COMM_SELF)]
    real = compilation._library
    monkeypatch.setattr(compilation, "_switched_off", False)
    for st in grids:
        missing = COMM_WORLD.rank == COMM_WORLD.size - 1
        if missing or st is grids[1]:
            monkeypatch.setattr(compilation, "_library", lambda *a: None)
        ev = heat(square(4, st.space_comm), steps=16, dt=0.01)
        rf = pf.TimeParallelReducedFunctional(
            ev, [pf.RunningMisfit(ev.u**2 * dx)], spacetime=st, solver_parameters={"mgrit": {"coarsening": (4,)}}
        )
        assert kernels() is None
        factors = [f for p in rf.problem.sweeps.propagators for f in p.factors.values()]
        assert all(f.triangular is None for f in factors)
        results.append((rf(ev.control), rf.derivative().dat.data_ro.copy()))
    assert results[0][0] == results[1][0]
    assert np.allclose(results[0][1], results[1][1], rtol=1e-12)
    told = [record for record in caplog.records if "another rank cannot compile" in record.getMessage()]
    assert len(told) == (COMM_WORLD.size == 2 and COMM_WORLD.rank == 0)
    monkeypatch.setattr(compilation, "_library", real)
    monkeypatch.setattr(compilation, "_switched_off", False)
    assert kernels() is not None

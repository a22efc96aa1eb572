"""Memory of a rank: the formula against what is measured, half with C-points only, and no growth."""

import gc
import json
import os
import subprocess
import sys
import tracemalloc
from functools import partial

import numpy as np
import pytest
from firedrake import UnitSquareMesh, dx, inner, sin
from firedrake.petsc import PETSc

import pint_fem as pf
from tests.heat import heat

NUMPY = np.lib.tracemalloc_domain


def functional(st, storage, *, n=12, steps=128, coarsening=(8, 4), sensors=True, moving=True, **problem):
    mesh = st.mesh(UnitSquareMesh, n, n)
    ev = heat(mesh, steps=steps, **problem)
    data = sin(ev.t) if moving else 1
    misfits = [pf.RunningMisfit(inner(ev.u - data, ev.u - data) * dx)]
    if sensors:
        times = ev.time(np.arange(1, steps + 1, 3))
        misfits.append(pf.PointSensors([(0.3, 0.4), (0.7, 0.6)], times, np.ones((len(times), 2))))
    return pf.TimeParallelReducedFunctional(
        ev, misfits, regularisation=0.1 * ev.control**2 * dx, spacetime=st,
        solver_parameters={"mgrit": dict(storage=storage, coarsening=coarsening, rtol=1e-2)},
    )  # fmt: skip


def evaluate(rf, z):
    p = rf.problem
    p.value(z)
    p.derivative(z)
    return p.hessian_action(z, z)


def bytes_of_arrays() -> int:
    traces = tracemalloc.take_snapshot().filter_traces([tracemalloc.DomainFilter(True, NUMPY)]).traces
    return sum(trace.size for trace in traces)


def measured(make):
    """Formula and measured bytes of arrays at the peak of evaluations."""
    evaluate(small := make(steps=32), np.zeros(small.layout.size))  # tables of compiled code are there
    del small
    tracemalloc.start()
    try:
        rf = make()
        formula = rf.memory()  # before anything is solved
        z = np.asarray(rf.array(rf.controls[0].control))
        evaluate(rf, z)  # what is made once is there
        gc.collect()
        kept, now = bytes_of_arrays(), tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        evaluate(rf, 1.01 * z)
        return formula, kept + tracemalloc.get_traced_memory()[1] - now
    finally:
        tracemalloc.stop()


@pytest.mark.parallel(2)
@pytest.mark.parametrize("per_step", [False, pytest.param(True, marks=pytest.mark.grid)])
def test_arrays_are_those_of_the_formula(per_step):
    """Within 10% and some of Firedrake's own functions, with data that depend on time; C-points about half."""
    peaks = {}
    for storage in ("all", "C"):
        formula, peak = measured(partial(functional, pf.SpaceTime(), storage, per_step=per_step))
        peaks[storage] = peak
        known, few = formula.arrays(), 60 * 8 * 13**2
        assert 0.9 * known <= peak <= 1.1 * known + few, (str(formula), storage)
    if not per_step:  # a control a step is itself as large as a state, and so are its gradients
        assert peaks["C"] <= 0.55 * peaks["all"]


def growth(storage) -> list[tuple]:
    """After 100, 150 and 200 evaluations of value, gradient and Hessian action: bytes of arrays and of everything
    Python allocates, the resident set, and PETSc's objects that Python holds.
    """
    rf = functional(pf.SpaceTime(), storage, n=2, steps=8, coarsening=(2, 2), sensors=False, moving=False)
    z = np.asarray(rf.array(rf.controls[0].control))
    rng, seen = np.random.default_rng(0), []
    tracemalloc.start()
    try:
        for i in range(201):
            evaluate(rf, z + 0.01 * rng.standard_normal(z.size))
            if i in (50, 100, 150, 200):  # the first only for what looking itself allocates: snapshots take megabytes
                gc.collect()
                rss = resident()
                seen.append((bytes_of_arrays(), tracemalloc.get_traced_memory()[0], rss, petsc_objects()))
    finally:
        tracemalloc.stop()
    return seen[1:]


@pytest.mark.parametrize("storage", [pytest.param("all", marks=pytest.mark.grid), "C"])
def test_nothing_grows(storage):
    """In a process of its own: what other tests leave behind is not in its resident set."""
    code = f"from tests.test_memory import growth; import json; print('seen', json.dumps(growth({storage!r})))"
    out = subprocess.run([sys.executable, "-c", code], env=alone(), capture_output=True, text=True, timeout=300)
    assert out.returncode == 0, out.stderr
    line = next(line for line in out.stdout.splitlines() if line.startswith("seen"))
    (arrays, python, rss, objects), between, last = json.loads(line.removeprefix("seen"))
    assert objects > 10  # Python's collector sees them
    assert last[0] <= arrays
    assert last[1] - python <= 100_000  # 500 results are remembered, with their residuals
    # 20 kB an evaluation; allocators take some pages once, what leaks does in either half
    assert min(between[2] - rss, last[2] - between[2]) <= 1 << 20
    assert last[3] <= objects


@pytest.mark.grid
@pytest.mark.parallel(3)
def test_nothing_grows_on_two_ranks():
    """All but the resident set, where ranks send C-points; the solver's messages alone: test_mgrit_features."""
    (arrays, python, _, objects), _, last = growth("C")
    assert last[0] <= arrays
    assert last[1] - python <= 100_000
    assert last[3] <= objects


def alone() -> dict:
    """The environment of a process that is no rank of this run."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("OMPI_", "PMIX_", "PMI_"))} | {"PYTHONPATH": "."}


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def petsc_objects() -> int:
    """That are alive in Python's hands."""
    return sum(isinstance(thing, PETSc.Object) for thing in gc.get_objects())


RUN = """
import sys
import numpy as np
from tests.test_memory import evaluate, functional, resident
import pint_fem as pf

storage = sys.argv[1]
make = lambda steps: functional(pf.SpaceTime(), storage, n=48, steps=steps, sensors=False, moving=False)
evaluate(small := make(32), np.zeros(small.layout.size))  # compiled code is there
del small
open("/proc/self/clear_refs", "w").write("5")  # the peak is the present from now on
before = resident()
rf = make(512)
formula = rf.memory().peak()
evaluate(rf, np.ones(rf.layout.size))
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
print("peak", formula, peak - before)
"""


@pytest.mark.grid
def test_resident_set_is_that_of_the_formula():
    """All that a process takes, PETSc's part included, within 25%, of some 50 MB; C-points less than half."""
    peaks = {}
    for storage in ("all", "C"):
        command = [sys.executable, "-c", RUN, storage]
        out = subprocess.run(command, env=alone(), capture_output=True, text=True, timeout=300)
        assert out.returncode == 0, out.stderr
        formula, peak = map(int, next(x for x in out.stdout.splitlines() if x.startswith("peak")).split()[1:])
        peaks[storage] = peak
        assert peak == pytest.approx(formula, rel=0.25, abs=4 << 20), storage
    assert 2 * peaks["C"] <= peaks["all"]

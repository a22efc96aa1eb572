"""Memory of a rank: the formula against what is measured, half with C-points only, and no growth."""

import gc
import os
import subprocess
import sys
import tracemalloc
from functools import partial

import numpy as np
import pytest
from firedrake import UnitSquareMesh, dx, inner, sin
from mpi4py import MPI

import pint_fem as pf
from tests.heat import heat

NUMPY = np.lib.tracemalloc_domain


def functional(st, storage, *, n=12, steps=256, coarsening=(8, 4), sensors=True, rtol=1e-4, moving=True, **problem):
    mesh = UnitSquareMesh(n, n, comm=st.space_comm, distribution_parameters={"partitioner_type": "simple"})
    ev = heat(mesh, steps=steps, **problem)
    data = sin(ev.t) if moving else 1
    misfits = [pf.RunningMisfit(inner(ev.u - data, ev.u - data) * dx)]
    if sensors:
        times = ev.time(np.arange(1, steps + 1, 3))
        misfits.append(pf.PointSensors([(0.3, 0.4), (0.7, 0.6)], times, np.ones((len(times), 2))))
    return pf.TimeParallelReducedFunctional(
        ev, misfits, regularisation=0.1 * ev.control**2 * dx, spacetime=st,
        solver_parameters={"mgrit": dict(storage=storage, coarsening=coarsening, rtol=rtol)},
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
    evaluate(small := make(steps=16), np.zeros(small.layout.size))  # tables of compiled code are there
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


@pytest.mark.parallel([1, 2])
@pytest.mark.parametrize("per_step", [False, True])
def test_arrays_are_those_of_the_formula(per_step):
    """Within 10%, with data that depend on time, for both storages; C-points take less than half."""
    peaks = {}
    for storage in ("all", "C"):
        formula, peak = measured(partial(functional, pf.SpaceTime(), storage, per_step=per_step))
        peaks[storage] = peak
        assert peak == pytest.approx(formula.arrays(), rel=0.1), (str(formula), storage)
    controls = peaks["C"] if per_step else 2 * peaks["C"]  # a control a step is itself as large as a state
    assert controls <= peaks["all"]

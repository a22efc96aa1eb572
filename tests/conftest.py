"""Settings shared by all tests."""

import os
import time

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("PETSC_OPTIONS", "-options_left no")  # pytest's own flags are no PETSc options

# a worker of pytest-xdist inherits what made its parent a rank: programs that tests start are to be none
if "PYTEST_XDIST_WORKER" in os.environ:
    for name in [n for n in os.environ if n.startswith(("PMIX", "ORTE", "OMPI_APP", "OMPI_MCA_orte_", "OMPI_MCA_ess"))]:
        if name != "OMPI_MCA_orte_execute_quiet":
            del os.environ[name]
    os.environ.pop("OMPI_MCA_pmix", None)

PATIENCE = 120.0
"""Seconds that a rank whose test failed waits for the others."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """A test that fails on some ranks leaves the others waiting in it: tell what failed, and end all of them."""
    report = yield
    if call.when == "call":
        from mpi4py import MPI

        if MPI.COMM_WORLD.size > 1:
            with item.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
                _meet(MPI.COMM_WORLD, report)
    return report


def _meet(world, report) -> None:
    """All ranks are through with the test; who failed waits for ``PATIENCE`` only."""
    request, end = world.Ibarrier(), time.monotonic() + PATIENCE
    if not report.failed:
        return request.Wait()
    print(f"\nFAILED on rank {world.rank} of {world.size}: {report.nodeid}\n{report.longreprtext}", flush=True)
    while not request.Test():
        if time.monotonic() > end:
            print(f"FAILED: other ranks are not through with {report.nodeid}, given up", flush=True)
            world.Abort(1)
        time.sleep(0.01)
    return None

"""Settings shared by all tests."""

import faulthandler
import os
import sys
import threading
from collections import defaultdict
from contextlib import nullcontext
from pathlib import Path

import hypothesis
import numpy as np
import pytest

from tests.limits import HANG, patience

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("PETSC_OPTIONS", "-options_left no")  # pytest's own flags are no PETSc options

# a worker of pytest-xdist inherits what made its parent a rank: programs that tests start are to be none
if "PYTEST_XDIST_WORKER" in os.environ:
    for name in [n for n in os.environ if n.startswith(("PMIX", "ORTE", "OMPI_APP", "OMPI_MCA_orte_", "OMPI_MCA_ess"))]:
        if name != "OMPI_MCA_orte_execute_quiet":
            del os.environ[name]
    os.environ.pop("OMPI_MCA_pmix", None)

# Drawn examples are the same in every run and on every rank. PINT_FEM_RANDOM=7 draws others, from the seed 7.
SEED = os.environ.get("PINT_FEM_RANDOM")
hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None)
hypothesis.settings.register_profile("drawn", derandomize=False, database=None, deadline=None)
hypothesis.settings.load_profile("drawn" if SEED else "fixed")

PATIENCE = 120.0
"""Seconds that a rank whose test failed waits for the others."""
_failed, _timer = pytest.StashKey[str](), pytest.StashKey[threading.Timer]()
_stderr = pytest.StashKey[int]()
"""A copy of standard error that pytest does not capture."""
_files = defaultdict(set)
"""Files with tests for a number of ranks, as pytest collected them."""


@pytest.fixture(params=["numpy", "torch"])
def array_kind(request, monkeypatch):
    """Runs a test as it is, and with tensors in the place of its arrays (``usefixtures``)."""
    if request.param == "torch":
        pytest.importorskip("torch")
        from tests.array_kinds import replacements

        for name, solver in replacements().items():
            if hasattr(request.module, name):
                monkeypatch.setattr(request.module, name, solver)


def pytest_addoption(parser):
    parser.addoption("--files-by-ranks", help="folder: its file N will name the files with tests for N ranks")


def pytest_configure(config):
    config.stash[_stderr] = os.dup(2)
    if SEED:
        hypothesis.core.global_force_seed = int(SEED)


def pytest_report_header(config):
    return f"drawn examples: {f'from the seed PINT_FEM_RANDOM={SEED}' if SEED else 'always the same'}"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """On several ranks, tests that are marked as slow there are left to ``make test-all``, as the long grids are."""
    from mpi4py import MPI

    if MPI.COMM_WORLD.size > 1:
        for item in items:
            if item.get_closest_marker("slow_on_ranks"):
                item.add_marker(pytest.mark.grid)


def pytest_deselected(items):
    """``-m`` takes tests away here; :func:`pytest_collection_finish` sees those that stay."""
    for item in items:
        for mark in item.iter_markers():
            if mark.name.startswith("parallel["):
                _files[mark.name.removeprefix("parallel[").removesuffix("]")].add(item.nodeid.split("::")[0])


def pytest_collection_finish(session):
    folder = session.config.getoption("--files-by-ranks")
    if folder:
        pytest_deselected(session.items)
        Path(folder).mkdir(parents=True, exist_ok=True)
        for ranks, names in _files.items():
            (Path(folder) / ranks).write_text("\n".join(sorted(names)) + "\n")


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop():
    """Loopy proves for each kernel that its accesses are within bounds and its loops can be ordered, in a fifth of the
    time that it takes to make the kernel. All kernels come from Firedrake, whose tests are the place for that.
    """
    if "loopy" in sys.modules:
        import loopy.check

        loopy.check.pre_schedule_checks = lambda t_unit: None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Print what failed on one of several ranks at once: its teardown may wait for ranks that are still in the test.
    Where they do not come to an end within `PATIENCE`, all ranks are ended.
    """
    report = yield
    if report.failed:
        from mpi4py import MPI

        world, text = MPI.COMM_WORLD, f"\n{report.when}: {report.longreprtext}"
        item.stash[_failed] = item.stash.get(_failed, "") + text
        if world.size > 1 and _timer not in item.stash:
            with _uncaptured(item):
                print(f"\nFAILED on rank {world.rank} of {world.size}: {item.nodeid}{text}", flush=True)
            item.stash[_timer] = threading.Timer(PATIENCE, _give_up, [world, item])
            item.stash[_timer].daemon = True
            item.stash[_timer].start()
    return report


def _uncaptured(item):
    capture = item.config.pluginmanager.getplugin("capturemanager")
    return capture.global_and_fixture_disabled() if capture else nullcontext()


def _give_up(world, item):
    with _uncaptured(item):
        print(f"FAILED: other ranks are not through with {item.nodeid}, given up", flush=True)
    world.Abort(1)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item, nextitem):
    """A test that hangs ends its process, which prints where it is; with ``-x`` all ranks stop where one does.

    A test with a limit of its own (:func:`tests.limits.time_limit`) is watched by that one.
    """
    faulthandler.dump_traceback_later(HANG * patience(), exit=True, file=item.config.stash[_stderr])
    try:
        result = yield
    finally:
        faulthandler.cancel_dump_traceback_later()
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    if world.size > 1:
        anywhere = np.zeros(1, dtype=bool)
        world.Allreduce(np.array([_failed in item.stash]), anywhere, op=MPI.LOR)
        if _timer in item.stash:
            item.stash[_timer].cancel()
        if anywhere[0] and item.config.getoption("maxfail"):
            item.session.shouldfail = f"{item.nodeid} failed on a rank"
    return result


@pytest.fixture
def log_lines():
    """A list that gets the messages of the package on this rank."""
    from tests.logs import logged

    with logged() as lines:
        yield lines


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config):
    """On several ranks: collect what Python still holds, and keep one object of PETSc on the common communicator.

    PETSc's clean-up at the end is collective on it, but only on ranks where an object has used it: a rank without one
    would leave the others waiting after the last test.
    """
    if "OMPI_COMM_WORLD_SIZE" not in os.environ or int(os.environ["OMPI_COMM_WORLD_SIZE"]) == 1:
        return
    import ctypes
    import gc

    from firedrake.petsc import PETSc

    gc.collect()
    kept = PETSc.Vec().createMPI((1, None), comm=PETSc.COMM_WORLD)
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(kept))  # never destroyed by Python

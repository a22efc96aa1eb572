"""Memory of maps and posteriors: stated, refused before the sweep, and rows on a disk."""

import tracemalloc

import numpy as np
import pytest
from mpi4py import MPI

import pint_fem as pf
from pint_fem import capacity
from pint_fem.errors import InputError
from pint_fem.inverse.impulse_responses import GROUP, lags_of_block
from pint_fem.inverse.memory import map_bytes
from tests.broken_files import largest_file, shared
from tests.limits import time_limit
from tests.small_maps import SERIAL, a_control, posed

COMM = MPI.COMM_WORLD


@pytest.mark.parallel([1, 2])
@time_limit(100)
def test_rows_on_a_disk_give_the_same_map_and_posterior(tmp_path):
    """The same bits, also of a map that is loaded; nothing is left in the folder."""
    folder, st = shared(tmp_path), pf.SpaceTime()
    F, G = (posed(st).parameter_to_observable(**given) for given in ({}, {"rows": "file", "path": folder}))
    assert isinstance(G.rows.base, np.memmap)
    assert list(folder.iterdir()) == []
    z, y = a_control(F.layout), np.cos(np.arange(F.shape[0]))
    np.testing.assert_array_equal(G @ z, F @ z)
    np.testing.assert_array_equal(G.T @ y, F.T @ y)
    np.testing.assert_array_equal(G.posterior().x, F.posterior().x)
    G.save(folder / "map.h5")
    again = posed(st).parameter_to_observable(load=folder / "map.h5", rows="file", path=folder)
    np.testing.assert_array_equal(again.rows, F.rows)
    COMM.barrier()
    assert [path.name for path in folder.iterdir()] == ["map.h5"]


@pytest.mark.parallel([1, 2])
@time_limit(100)
def test_what_does_not_fit_is_refused_on_all_ranks(tmp_path, monkeypatch):
    """A map before its sweep, with the advice to keep rows on a disk; a posterior before its matrices."""
    folder, J = shared(tmp_path), posed(pf.SpaceTime())
    F = J.parameter_to_observable()
    assert F.shape[0] == 20
    each = 8 * len(F.numbers) * F.rows.shape[1]
    with monkeypatch.context() as small:
        small.setattr(capacity, "machine_memory", lambda: each)
        J.problem.sweeps.counts["state"] = 0
        with pytest.raises(InputError, match=r"20 rows of the map .* need at least .* or rows='file' and path="):
            J.parameter_to_observable()
        with pytest.raises(InputError, match=r"the posterior in the space of \d+ .* need at least"):
            F.posterior()
        assert J.problem.sweeps.counts["state"] == 0
    for given, message in (
        ({"rows": "file"}, "give rows='file' with path=, a folder on a disk"),
        ({"path": folder}, "give rows='file' with path=, a folder on a disk"),
        ({"rows": "disk"}, "rows = 'disk': give 'memory' or 'file'"),
        ({"rows": "file", "path": folder / "nowhere"}, "nowhere, cannot be written: No such file"),
    ):
        with pytest.raises(InputError, match=message):
            J.parameter_to_observable(**given)
    with pytest.raises(InputError, match="cannot be written: File too large"), largest_file(1000, COMM.size - 1):
        J.parameter_to_observable(rows="file", path=folder)


@time_limit(100)
def test_memory_is_what_arrays_take(log_lines):
    """The formula against what numpy allocates while the map is made; printed where view is asked for."""
    points = np.stack(np.meshgrid(np.linspace(0.1, 0.9, 5), np.linspace(0.15, 0.85, 5)), -1).reshape(-1, 2)
    given = dict(points=points, times=0.02 * np.arange(1, 65), data=np.zeros((64, 25)), steps=64, n=24)
    posed(pf.SpaceTime(), **given).parameter_to_observable()  # compiles
    assert not [line for line in log_lines if "memory of a rank" in line]
    J = posed(pf.SpaceTime(), solver=SERIAL | {"mgrit": {"view": True}}, **given)
    J(J.controls[0].control if len(J.controls) == 1 else [c.control for c in J.controls])
    tracemalloc.start()
    F = J.parameter_to_observable()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    parts = map_bytes(F, GROUP, lags_of_block(COMM, F.propagator.evolution.state_size))
    assert parts["rows"] == 8 * 1600 * 2 * 625
    assert 0.9 * sum(parts.values()) < peak < 1.6 * sum(parts.values())
    (line,) = [line for line in log_lines if "memory of a rank for" in line]
    assert "memory of a rank for 1600 rows of the map from controls to readings: rows 16 MB, sweep " in line

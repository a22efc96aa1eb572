"""Maps from controls to readings in files: on other numbers of ranks, of other problems, damaged, not to be written."""

import h5py
import numpy as np
import pytest
from mpi4py import MPI

import pint_fem as pf
from pint_fem.errors import InputError
from tests.broken_files import largest_file, shared
from tests.inverse_problems import heat, random_control, readings_by_sweep
from tests.limits import time_limit
from tests.small_maps import DATA, POINTS, TIMES, a_control, posed, swept

COMM = MPI.COMM_WORLD


@pytest.mark.parallel([1, 2, 3])
@time_limit(100)
def test_a_map_comes_back_on_any_number_of_ranks_in_time(tmp_path):
    """Written on one grid, read on the other one, without a sweep: readings are those of sweeps, products the same."""
    path = shared(tmp_path) / "map.h5"
    sizes = (1, COMM.size) if COMM.size != 2 else (2, 1)
    J = posed(pf.SpaceTime(sizes))
    F = J.parameter_to_observable()
    F.save(path)
    alone = COMM.size == 3  # each rank by itself, which has all rows
    J = posed(pf.SpaceTime("1x1", comm=MPI.COMM_SELF) if alone else pf.SpaceTime(sizes))
    z = a_control(J.layout)
    G = J.parameter_to_observable(load=path)
    assert J.problem.sweeps.counts["adjoint"] == 0
    assert J.problem.sweeps.counts["state"] == 0
    np.testing.assert_allclose(G.predict(z), F.predict(a_control(F.layout)), rtol=0, atol=1e-14)
    np.testing.assert_allclose(G.predict(z), swept(J, z), rtol=0, atol=1e-12)


@pytest.mark.parallel([1, 2])
@time_limit(100)
def test_responses_of_controls_with_one_value_per_step_come_back(tmp_path):
    """With static ones, in several terms and fields; by products with both maps."""
    path, kinds = shared(tmp_path) / "map.h5", ("source", "amplitude", "strength", "initial")
    F = heat(pf.SpaceTime(), kinds).parameter_to_observable()
    F.save(path)
    J = heat(pf.SpaceTime((1, 1), comm=MPI.COMM_SELF), kinds)
    G, y = J.parameter_to_observable(load=path), np.cos(np.arange(F.shape[0]))
    assert J.problem.sweeps.counts["state"] == 0
    z = random_control(J)
    np.testing.assert_allclose(G.predict(z), readings_by_sweep(J, z), rtol=0, atol=1e-11)
    a, b = F.layout.parts(F.T @ y), J.layout.parts(G.T @ y)
    for control, own, whole in zip(F.layout.evolution.controls, a, b, strict=True):
        stepwise = control in F.layout.evolution.stepwise
        part = whole[F.layout.slab.lo : F.layout.slab.hi] if stepwise else whole
        np.testing.assert_allclose(own, part, rtol=0, atol=1e-13 * np.abs(whole).max())


@time_limit(100)
def test_the_map_does_not_contain_readings_weights_and_regularisation(tmp_path):
    """They may be others when a file is loaded, and the posterior is that of the new ones."""
    path, st = tmp_path / "map.h5", pf.SpaceTime()
    posed(st).parameter_to_observable().save(path)
    other = posed(st, data=2 * DATA + 0.1, weight=100.0)
    loaded = other.parameter_to_observable(load=path)
    expected = posed(st, data=2 * DATA + 0.1, weight=100.0).parameter_to_observable().posterior()
    np.testing.assert_array_equal(loaded.data, (2 * DATA + 0.1).ravel())
    np.testing.assert_allclose(loaded.posterior().x, expected.x, rtol=1e-12, atol=1e-14)


@pytest.mark.parallel([1, 2])
@time_limit(150)
def test_a_file_of_another_problem_is_refused_with_the_difference(tmp_path):
    """On all ranks, for another operator, integrator, sensor, time or control."""
    path, st = shared(tmp_path) / "map.h5", pf.SpaceTime()
    posed(st).parameter_to_observable().save(path)
    moved = POINTS.copy()
    moved[2, 0] += 0.01
    cases = [({"conductivity": 2.0}, r"other constants of residual \(\[1.0\], in this run \[2.0\]\);")]
    if COMM.size == 1:
        cases += [
            ({"points": moved}, r"other sensor 2 of misfit 0 \("),
            ({"points": POINTS[:3]}, r"other number of sensors of misfit 0 \(4, in this run 3\), .*, sensor 3 of"),
            ({"times": 0.9 * TIMES}, r"other times of misfit 0 \(\[0.01,"),
            ({"times": TIMES[:3]}, r"other times of misfit 0"),
            ({"tableau": pf.BackwardEuler}, r"other tableau \("),
            ({"steps": 9}, r"other number of steps \(8, in this run 9\);"),
            ({"n": 3}, r"other controls \(\['source\[25\]', 'start\[25\]'\]"),
        ]
    for change, message in cases:
        with pytest.raises(InputError, match=message):
            posed(st, **change).parameter_to_observable(load=path)


@time_limit(100)
def test_files_that_are_damaged_or_are_no_maps(tmp_path):
    path, J = tmp_path / "map.h5", posed(pf.SpaceTime())
    with pytest.raises(InputError, match=r"absent\.h5: there is no such file"):
        J.parameter_to_observable(load=tmp_path / "absent.h5")
    path.write_text("no HDF5")
    with pytest.raises(InputError, match=r"map\.h5 cannot be read .*make the map again"):
        J.parameter_to_observable(load=path)
    F = J.parameter_to_observable()
    F.save(path)
    with h5py.File(path, "r+") as file:
        file["rows/0"][3, 7] += 1e-13
    with pytest.raises(InputError, match="rows/0 is damaged in row 3"):
        J.parameter_to_observable(load=path)
    with h5py.File(path, "r+") as file:
        del file["head"]
        file.attrs["head"] = np.void(b'{"version": 1}')
    with pytest.raises(InputError, match=r"map\.h5 is no map from controls to readings"):
        J.parameter_to_observable(load=path)
    with pytest.raises(InputError, match="there is no such folder"):
        F.save(tmp_path / "nowhere" / "map.h5")


@pytest.mark.parallel(2)
@time_limit(100)
def test_a_save_that_fails_on_one_rank_leaves_the_file_as_it_was(tmp_path):
    path = shared(tmp_path) / "map.h5"
    F = posed(pf.SpaceTime()).parameter_to_observable()
    F.save(path)
    before = path.read_bytes()
    with pytest.raises(InputError, match=r"map\.h5 cannot be written"), largest_file(1000, COMM.size - 1):
        F.save(path)
    COMM.barrier()  # the first rank removes what was begun
    assert path.read_bytes() == before
    assert not path.with_name("map.h5.new").exists()

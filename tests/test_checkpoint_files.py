"""Checkpoint files that are large, old, damaged, of another problem, in use, or cannot be written."""

import json
import os
import re
import stat
from pathlib import Path

import h5py
import numpy as np
import pytest
from firedrake import (
    Constant,
    DirichletBC,
    Function,
    FunctionSpace,
    SpatialCoordinate,
    TestFunction,
    dx,
    grad,
    inner,
)
from irksome import Dt
from mpi4py import MPI

import pint_fem as pf
from pint_fem import files
from pint_fem.adjoint.minimisation import stored_evolution
from pint_fem.adjoint.minimisation.checkpoint import HDF5Checkpoint
from pint_fem.adjoint.minimisation.fingerprint import evolution_numbers
from pint_fem.adjoint.minimisation.objective import Objective
from pint_fem.digests import differences
from tests.broken_files import another_process, largest_file, shared
from tests.limits import time_limit
from tests.meshes import square
from tests.ranks import cases

COMM = MPI.COMM_WORLD


def posed(grid=None, *, conductivity=1.0, load=0.0, mirrored=False, side=1.0, tableau=pf.BackwardEuler, **mgrit):
    """A heat problem whose conductivity (a constant), load (a function) and boundary value differ as asked."""
    st = pf.SpaceTime(grid)
    mesh = square(3, st.space_comm)
    V = FunctionSpace(mesh, "CG", 1)
    u, v, q = Function(V), TestFunction(V), Function(V, name="source")
    x, _ = SpatialCoordinate(mesh)
    f = Function(V).interpolate(load * (1 - x if mirrored else x))
    F = Dt(u) * v * dx + Constant(conductivity) * inner(grad(u), grad(v)) * dx - (q + f) * v * dx
    ev = pf.Evolution(F, u, tableau=tableau(), dt=0.05, nsteps=8, control=q, bcs=DirichletBC(V, side, 1))
    return pf.TimeParallelReducedFunctional(
        ev,
        pf.TerminalMisfit((u - 0.5) ** 2 * dx),
        regularisation=1e-3 * q**2 * dx,
        spacetime=st,
        solver_parameters={"mgrit": {"coarsening": 2, "levels": 2, "rtol": 1e-11} | mgrit},
    )


def kept_by(rf, path) -> HDF5Checkpoint:
    return HDF5Checkpoint(path, Objective(rf.problem, rf.inner))


@time_limit(60)
def test_a_head_of_more_than_64_kibibytes(tmp_path):
    """As of a run of 2,000 iterations: it comes back number by number."""
    rf, path = posed(), shared(tmp_path) / "run.h5"
    history = [[i, 1.0 / (i + 1), np.pi * i, "interior"] for i in range(2000)]
    assert len(json.dumps(history)) > 2**16
    x = np.arange(rf.layout.size, dtype=float)
    kept_by(rf, path).save({"history": history}, {"x": x})
    scalars, vectors = kept_by(rf, path).load()
    assert scalars["history"] == history
    assert np.array_equal(vectors["x"], x)


def made_old(path):
    """Make a file what the first version wrote: the head an attribute, nothing of the evolution, no checksums."""
    with h5py.File(path, "r+") as file:
        head = json.loads(file["head"][()].tobytes())
        del file["head"], file["checks"], head["version"]
        for name in ("forms", "data of the evolution", "tableau", "mesh", "boundary unknowns", "initial condition"):
            del head["problem"][name]
        file.attrs["head"] = np.void(json.dumps(head).encode())


@time_limit(60)
def test_files_of_the_first_version_are_read(tmp_path):
    """A run goes on from one with the same bits; one of another evolution is refused by its residual."""
    path = shared(tmp_path) / "run.h5"
    whole = posed().minimize_trust_region(max_it=4, gtol_rel=1e-12, cg_max_it=1)
    posed().minimize_trust_region(max_it=2, gtol_rel=1e-12, cg_max_it=1, checkpoint=path)
    if COMM.rank == 0:
        made_old(path)
    COMM.barrier()
    with pytest.raises(pf.InputError, match=r"of another evolution: the state in it has a residual"):
        posed(conductivity=10.0).minimize_trust_region(max_it=2, checkpoint=path)
    again = posed().minimize_trust_region(max_it=4, gtol_rel=1e-12, cg_max_it=1, checkpoint=path)
    assert np.array_equal(again.x, whole.x)


@pytest.mark.parallel(3)
@pytest.mark.parametrize("rank", ["first", "last"])
@time_limit(100)
def test_a_save_that_fails_on_one_rank(tmp_path, rank, log_lines, monkeypatch):
    """One line on all ranks, no half-written file, the last one as it was; a run that is to go on does."""
    path, rank = shared(tmp_path) / "run.h5", 0 if rank == "first" else COMM.size - 1
    rf = posed()
    keep = kept_by(rf, path)
    x = np.linspace(0, 1, rf.layout.size)
    keep.save({"number": 1}, {"x": x})
    keep.release()
    before, save = path.read_bytes(), HDF5Checkpoint._save
    alone = posed().minimize_trust_region(max_it=1)

    def limited(self, *args):  # a save alone: Firedrake writes files of its own
        with largest_file(1000, rank):
            save(self, *args)

    monkeypatch.setattr(HDF5Checkpoint, "_save", limited)
    with pytest.raises(pf.InputError, match=r"run\.h5 cannot be written: File too large"):
        keep.save({"number": 2}, {"x": x})
    COMM.barrier()
    assert path.read_bytes() == before
    assert not path.with_name("run.h5.new").exists()
    assert keep.load()[0] == {"number": 1}
    COMM.barrier()
    keep.release()
    other = path.with_name("other.h5")
    with pytest.raises(pf.InputError, match="cannot be written"):
        rf.minimize_trust_region(max_it=1, checkpoint=other)
    rf.problem.invalidate()
    log_lines.clear()
    zero = rf.function(np.zeros(rf.layout.size))
    went_on = rf.minimize_trust_region(zero, max_it=1, checkpoint=other, if_save_fails="continue")
    assert np.array_equal(went_on.x, alone.x)
    lines = [line for line in log_lines if "cannot be written" in line]
    assert len(lines) == (2 if COMM.rank == 0 else 0)
    with pytest.raises(pf.InputError, match=r"if_save_fails = 'never': give 'stop' or 'continue'"):
        rf.minimize_trust_region(checkpoint=other, if_save_fails="never")


@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize("kind", cases(["a FIFO", "a folder", "a symbolic link", "a device"], on_ranks=["a folder"]))
@time_limit(60)
def test_what_is_no_file_is_refused_before_the_run(tmp_path, kind):
    """Nothing is solved, and what is there stays."""
    path = shared(tmp_path) / "run.h5"
    if kind == "a device":
        path = Path("/dev/full")
    elif COMM.rank == 0:
        (path.parent / "target").write_text("mine")
        {"a FIFO": os.mkfifo, "a folder": os.mkdir, "a symbolic link": lambda p: p.symlink_to("target")}[kind](path)
    COMM.barrier()
    rf = posed()
    with pytest.raises(pf.InputError, match=f"{path} is {kind}: give the name of a regular file"):
        rf.minimize_trust_region(checkpoint=path)
    assert rf.problem.sweeps.counts["state"] == 0
    assert not stat.S_ISREG(path.lstat().st_mode)
    COMM.barrier()
    if kind != "a device":
        assert (path.parent / "target").read_text() == "mine"


@pytest.mark.parallel(1)
@time_limit(60)
def test_a_link_in_the_place_of_the_new_file_is_not_followed(tmp_path):
    """It would choose which file is overwritten."""
    (tmp_path / "target").write_text("mine")
    (tmp_path / "run.h5.new").symlink_to("target")
    rf = posed()
    kept_by(rf, tmp_path / "run.h5").save({}, {"x": np.zeros(rf.layout.size)})
    assert (tmp_path / "target").read_text() == "mine"
    assert (tmp_path / "run.h5").is_file()


OTHERS = {
    "conductivity": ({"conductivity": 10.0}, "data of the evolution"),
    "load": ({"load": 1.0}, "data of the evolution"),
    "boundary value": ({"side": 1.5}, "forms|data of the evolution"),
    "tableau": ({"tableau": pf.ImplicitMidpoint}, "tableau"),
}


@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize("named", cases([True, False], on_ranks=[False]))
@time_limit(120)
def test_another_evolution_is_refused(tmp_path, named, monkeypatch):
    """Of a finished run, by name; and by the residual of its trajectory where the names are alike.

    The residual of the old trajectory in the other steps is far above round-off: conductivity 10 for 1 moves a state
    by about nine times dt times a rate of diffusion.
    """
    path = shared(tmp_path) / "run.h5"
    grid, storage = (None, "all") if named else (f"{COMM.size}x1", "C")
    if not named:
        monkeypatch.setattr(stored_evolution, "evolution_numbers", lambda *_: {})
    run = lambda **changes: posed(grid, storage=storage, **changes).minimize_trust_region(
        checkpoint=path, max_it=30, gtol_rel=1e-6
    )
    done = run()
    assert done.converged
    assert np.array_equal(run().x, done.x)
    for changes, names in OTHERS.values():
        if named:
            with pytest.raises(pf.InputError, match=f"of another problem or run: .*({names})"):
                run(**changes)
            continue
        with pytest.raises(pf.InputError, match="of another evolution: the state in it has a residual of") as caught:
            run(**changes)
        found, limit = map(float, re.findall(r"\d\.\d+e[+-]\d+", str(caught.value)))
        assert found > 100 * limit


@pytest.mark.parallel(1)
@time_limit(60)
def test_a_load_with_the_same_values_at_other_places_is_another():
    numbers = [
        evolution_numbers(posed(load=1.0, mirrored=mirrored).problem.sweeps.evolution, MPI.COMM_SELF)
        for mirrored in (False, False, True)
    ]
    assert differences(numbers[0], numbers[1]) == ""
    assert "data of the evolution" in differences(numbers[0], numbers[2])


def test_a_file_that_cannot_be_renamed_leaves_nothing(tmp_path):
    """A folder has the name: it stays, and nothing is left beside it."""
    path = tmp_path / "run.json"
    path.mkdir()
    with pytest.raises(OSError, match="directory"):
        files.write_whole(path, b"new")
    assert list(tmp_path.iterdir()) == [path]


def test_a_damaged_row_has_its_number_in_the_file():
    """That of the rank's first row, and the place behind it."""
    rows = np.arange(12.0).reshape(4, 3)
    expected = files.checksums(rows)
    files.require_checksums("u", rows, expected, 10)
    rows[2, 1] += 1
    with pytest.raises(ValueError, match="u is damaged in row 12: the checksum"):
        files.require_checksums("u", rows, expected, 10)
    with pytest.raises(ValueError, match="u is damaged: the checksum"):
        files.require_checksums("u", rows, expected, None)


@pytest.mark.parallel([1, 3])
@time_limit(60)
def test_one_flipped_byte_is_found(tmp_path):
    """In a vector, the state, the adjoint or the head; nothing of the file is left behind."""
    rf, path = posed(), shared(tmp_path) / "run.h5"
    rf.minimize_trust_region(max_it=1, checkpoint=path)
    with h5py.File(path, "r") as file:
        places = {
            name: (file[name].id.get_offset(), file[name].id.get_storage_size())
            for name in ("vectors/x/0", "vectors/gradient/0", "points/0/U", "points/0/L", "head")
        }
    for name, (offset, size) in places.items():
        COMM.barrier()
        good = path.read_bytes()
        COMM.barrier()
        bad = bytearray(good)
        bad[offset + size // 2] ^= 0x10
        if COMM.rank == 0:
            path.write_bytes(bad)
        COMM.barrier()
        other = posed()
        with pytest.raises(pf.InputError, match=f"{path} cannot be read .*{name}.* is damaged"):
            other.minimize_trust_region(checkpoint=path)
        assert all(point.z is None and not point.L.any() for point in other.problem.evaluations)
        COMM.barrier()
        if COMM.rank == 0:
            path.write_bytes(good)
    COMM.barrier()
    posed().minimize_trust_region(max_it=1, checkpoint=path)


@pytest.mark.parallel([1, 3])
@time_limit(100)
def test_two_runs_do_not_write_one_checkpoint(tmp_path):
    """The second one is refused before it solves anything, and goes on when the first has ended, even if killed."""
    path = shared(tmp_path) / "run.h5"
    holder, pid = another_process(path)
    rf = posed()
    with pytest.raises(pf.InputError, match=rf"is being written by another run \(process {pid} on "):
        rf.minimize_trust_region(checkpoint=path, max_it=1)
    assert rf.problem.sweeps.counts["state"] == 0
    if holder is not None:
        holder.kill()
        holder.wait()
    COMM.barrier()
    rf.minimize_trust_region(checkpoint=path, max_it=1)
    COMM.barrier()
    assert sorted(p.name for p in path.parent.glob("*run.h5*") if p.is_file()) == ["run.h5"]
    assert not list(path.parent.glob(".run.h5.lock"))

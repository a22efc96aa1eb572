"""Optimisations that are killed go on where they were."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from firedrake import SpatialCoordinate, dx
from mpi4py import MPI

import pint_fem as pf
from pint_fem.adjoint.minimisation.checkpoint import HDF5Checkpoint
from pint_fem.adjoint.minimisation.objective import Objective
from tests.heat import heat
from tests.meshes import square
from tests.test_controls import functional as several
from tests.test_reduced_functional import functional

ROOT = Path(__file__).resolve().parent.parent


def shared_folder(tmp_path):
    return Path(MPI.COMM_WORLD.bcast(str(tmp_path), root=0))


def lives(*arguments, ranks=1):
    """Run :mod:`tests.kill_run`; the processes of mpiexec do not inherit this one's as their parent in MPI."""
    launcher = [] if ranks == 1 else ["mpiexec", "-n", str(ranks)]
    return subprocess.run(
        [*launcher, sys.executable, "-m", "tests.kill_run", *map(str, arguments)], cwd=ROOT, env=dict(os.environ),
        capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip


def found(done):
    """What a run that came to its end printed."""
    assert done.returncode == 0, done.stderr + done.stdout
    return json.loads(done.stdout.splitlines()[-1])


def the_same(killed, whole):
    """J, the minimiser and the history, to the last bit."""
    for name in ("J", "x", "history", "reason"):
        assert killed[name] == whole[name]


@pytest.mark.parametrize("kills", [4, pytest.param(10, marks=pytest.mark.grid)])
@pytest.mark.parametrize("method", ["trust-region", "inexact", "one-shot"])
def test_kill_nine_at_random_moments(tmp_path, method, kills):
    """The same bits as without: J, the minimiser and the history; nothing saved is corrupt."""
    whole = found(lives(tmp_path / "whole.h5", method))
    assert whole["reason"] == "gradient tolerance"
    assert whole["events"] > 60
    rng = random.Random(1)
    kills = [rng.randrange(1, whole["events"] // 8) for _ in range(kills)]
    the_same(found(lives(tmp_path / "killed.h5", method, *kills)), whole)


@pytest.mark.starts_mpi
@pytest.mark.parametrize("method", ["trust-region", pytest.param("one-shot", marks=pytest.mark.grid)])
def test_kill_nine_on_two_ranks(tmp_path, method):
    """One of two processes is killed at a random moment, the other by mpiexec; the next life ends as one that is whole.

    Sums over time have other round-off than on one rank, so it is two that say how.
    """
    path = tmp_path / "killed.h5"
    assert lives(path, method, random.Random(method).randrange(5, 30), ranks=2).returncode != 0
    assert path.exists()
    end = found(lives(path, method, ranks=2))
    the_same(end, end["whole"])


def check_restart(path, kind, grid):
    """Stopped by the callback after three iterations; the same end as without."""
    options = {"gtol_rel": 1e-3, "max_it": 100}
    if kind != "one-shot":
        options |= {"cg_max_it": 4, "inexact": kind != "exact"}
    solver = {"time_solver": "paradiag", "paradiag": {"rtol": 1e-11, "alpha": 1e-2}} if kind == "paradiag" else None

    def minimize(**more):
        rf = functional(pf.SpaceTime(grid), n=4, steps=16, rtol=1e-11, solver=solver)
        return (rf.minimize_one_shot if kind == "one-shot" else rf.minimize_trust_region)(**options, **more)

    whole = minimize()
    assert whole.iterations > 3
    stopped = minimize(checkpoint=path, callback=lambda x, r: r.iteration == 3)
    assert stopped.iterations == 3
    resumed = minimize(checkpoint=path)
    assert resumed.converged
    assert resumed.iterations == whole.iterations
    assert np.array_equal(resumed.x, whole.x)
    assert resumed.value == whole.value


@pytest.mark.parallel(3)
@pytest.mark.parametrize("kind", ["exact", "inexact", "one-shot", "paradiag"])
def test_restart(tmp_path, kind):
    """On one rank it is killed, see above."""
    check_restart(shared_folder(tmp_path) / "run.h5", kind, "1x3")


@pytest.mark.parallel(4)
def test_restart_on_a_grid(tmp_path):
    check_restart(shared_folder(tmp_path) / "run.h5", "inexact", "2x2")


@pytest.mark.parallel([1, 4])
def test_round_trip_of_all_kinds_of_controls(tmp_path):
    """Vectors and trajectories come back to the last bit; onto one rank in time, too."""
    size, folder = MPI.COMM_WORLD.size, shared_folder(tmp_path)
    st = pf.SpaceTime({1: "1x1", 4: "2x2"}[size])
    rf = several(st, steps=6, n=3)
    z = np.random.default_rng(3).standard_normal(rf.layout.size)
    rf.layout.share(z)
    rf.problem.derivative(z)
    keep = HDF5Checkpoint(folder / "run.h5", Objective(rf.problem, rf.inner))
    assert keep.load() is None
    keep.save({"a": 1.5}, {"x": z, "y": 2 * z})
    again = several(st, steps=6, n=3)
    scalars, vectors = HDF5Checkpoint(folder / "run.h5", Objective(again.problem, again.inner)).load()
    assert scalars == {"a": 1.5}
    assert np.array_equal(vectors["x"], z)
    assert np.array_equal(vectors["y"], 2 * z)
    assert np.array_equal(again.problem.U[1:], rf.problem.U[1:])
    assert np.array_equal(again.problem.L[1:], rf.problem.L[1:])
    assert np.array_equal(again.problem.derivative(z), rf.problem.derivative(z))
    counts = again.problem.sweeps.counts
    assert counts["state"] == counts["adjoint"] == 0
    fewer = several(pf.SpaceTime((st.space_size, 1), comm=st.space_comm), steps=6, n=3)
    _, vectors = HDF5Checkpoint(folder / "run.h5", Objective(fewer.problem, fewer.inner)).load()
    if st.time_comm.rank == 0:
        part = fewer.layout.part(vectors["x"], fewer.evolution.controls[0])
        assert np.array_equal(part, rf.layout.part(z, rf.evolution.controls[0]))


@pytest.mark.parallel(3)
def test_bad_files(tmp_path):
    folder = shared_folder(tmp_path)
    rf = functional(pf.SpaceTime(), n=3, steps=16)
    objective = Objective(rf.problem, rf.inner)
    x = np.zeros(rf.layout.size)
    with pytest.raises(pf.InputError, match="no such folder"):
        HDF5Checkpoint(folder / "missing" / "run.h5", objective)
    keep = HDF5Checkpoint(folder / "run.h5", objective)
    keep.save({"number": 1}, {"x": x})
    other = functional(pf.SpaceTime(), n=2, steps=16)
    with pytest.raises(pf.InputError, match="of another problem"):
        HDF5Checkpoint(folder / "run.h5", Objective(other.problem, other.inner)).load()
    assert keep.load()[0] == {"number": 1}
    MPI.COMM_WORLD.barrier()
    if MPI.COMM_WORLD.rank == 0:
        (folder / "run.h5").write_bytes((folder / "run.h5").read_bytes()[:300])
    MPI.COMM_WORLD.barrier()
    with pytest.raises(pf.InputError, match=r"run\.h5 cannot be read"):
        keep.load()


@pytest.fixture(scope="module")
def small():
    """Makes functionals that differ as asked."""

    def make(name="q", **options):
        rf = functional(pf.SpaceTime("1x1"), n=2, steps=16, **options)
        rf.evolution.control.rename(name)
        return rf

    return make


def test_another_run_is_refused(tmp_path, small):
    """Method, inner product, bounds, constraints: what differs is said; the run that was kept goes on."""
    rf, other = small(), small(riesz_map="H1")
    q = rf.evolution.control
    runs = {
        "free": lambda **o: rf.minimize_trust_region(**o),
        "H1": lambda **o: other.minimize_trust_region(**o),
        "bounded": lambda **o: rf.minimize_trust_region(bounds=(-1.0, 0.05), **o),
        "half-bounded": lambda **o: rf.minimize_trust_region(bounds=(-np.inf, 0.05), **o),
        "constrained": lambda **o: rf.minimize_trust_region(constraints=[(q * dx, 0.3)], **o),
        "other value": lambda **o: rf.minimize_trust_region(constraints=[(q * dx, 0.4)], **o),
        "other normal": lambda **o: rf.minimize_trust_region(constraints=[((1 + x[0]) * q * dx, 0.3)], **o),
        "one-shot": lambda **o: rf.minimize_one_shot(**o),
    }
    x = SpatialCoordinate(rf.evolution.V.mesh())
    for name in ("free", "bounded", "constrained", "one-shot"):
        runs[name](checkpoint=tmp_path / f"{name}.h5", max_it=1)
        runs[name](checkpoint=tmp_path / f"{name}.h5", max_it=2)
    for kept, name, what in (
        ("free", "H1", "run: inner product: the file has"),
        ("free", "constrained", r"run: constraints: the file has None, this run .*\[0.3\]"),
        ("bounded", "free", "method: the file has trust region within bounds, this run trust region"),
        ("bounded", "half-bounded", "run: bounds: the file has"),
        ("constrained", "free", "run: constraints: .* this run None"),
        ("constrained", "other value", r"run: constraints: .*\[0.3\].* this run .*\[0.4\]"),
        ("constrained", "other normal", r"run: constraints: .*\[0.3\].* this run .*\[0.3\]"),
        ("one-shot", "free", "method: the file has one-shot, this run trust region"),
        ("free", "one-shot", "method: the file has trust region, this run one-shot"),
    ):
        with pytest.raises(pf.InputError, match=what):
            runs[name](checkpoint=tmp_path / f"{kept}.h5", max_it=3)


@pytest.mark.parallel(3)
@pytest.mark.parametrize(("storage", "inexact"), [("C", False), ("all", True)])
def test_another_objective_is_refused(tmp_path, storage, inexact):
    """Data of the misfit or weight of the regularisation; and nothing of the file is left behind."""
    path, steps, runs = shared_folder(tmp_path) / "run.h5", 16, {}
    for name, data, weight in (("own", 1.0, 0.1), ("data", 1.1, 0.1), ("weight", 1.0, 0.11)):
        st = pf.SpaceTime()
        ev = heat(square(2, st.space_comm), steps=steps)
        misfit = pf.RunningMisfit((ev.u - data) ** 2 * dx)
        runs[name] = pf.TimeParallelReducedFunctional(
            ev, misfit, regularisation=weight * ev.control**2 * dx, spacetime=st,
            solver_parameters={"mgrit": {"storage": storage, "coarsening": 2}},
        )  # fmt: skip
    for most in (0, 1, 2):
        runs["own"].minimize_trust_region(checkpoint=path, max_it=most, inexact=inexact)
    for name, what in (("data", "misfit: the file has"), ("weight", "regularisation: the file has")):
        with pytest.raises(pf.InputError, match=f"misfit, data or regularisation: {what}"):
            runs[name].minimize_trust_region(checkpoint=path, max_it=3, inexact=inexact)
        assert all(point.z is None and not point.L.any() for point in runs[name].problem.evaluations)


def test_another_control_of_the_accuracy_is_refused(tmp_path, small):
    """Before trajectories are touched; an estimate that another version did not keep, too."""
    rf = small()
    for kept, says in ((False, "without"), (True, "with")):
        path = tmp_path / f"{says}.h5"
        rf.minimize_trust_region(checkpoint=path, max_it=1, inexact=kept)
        before = rf.problem.U.copy()
        with pytest.raises(pf.InputError, match=f"a run {says} inexact=: continue it likewise"):
            rf.minimize_trust_region(checkpoint=path, max_it=2, inexact=not kept)
        assert np.array_equal(rf.problem.U, before)
    with h5py.File(path, "r+") as file:
        head = json.loads(file["head"][()].tobytes())
        del head["objective"]["cycles"], file["head"]
        file.attrs["head"] = np.void(json.dumps(head).encode())
    with pytest.raises(pf.InputError, match="of another version"):
        rf.minimize_trust_region(checkpoint=path, max_it=2, inexact=True)


def test_only_names_that_were_given_count(tmp_path, small):
    """Firedrake numbers the others by a counter that other functions move."""
    small("function_7").minimize_trust_region(checkpoint=tmp_path / "run.h5", max_it=1)
    small("function_821").minimize_trust_region(checkpoint=tmp_path / "run.h5", max_it=2)
    with pytest.raises(pf.InputError, match=r"controls: the file has \['\[9\]'\], this run \['q\[9\]'\]"):
        small("q").minimize_trust_region(checkpoint=tmp_path / "run.h5", max_it=3)


def test_without_residuals(tmp_path, small):
    """A fixed number of cycles has no accuracy to choose; its solves are kept and come back."""
    rf = small(residual="none", max_it=6)
    for run in (lambda: rf.minimize_trust_region(inexact=True), rf.minimize_one_shot):
        with pytest.raises(pf.InputError, match="chooses accuracy by residuals: give mgrit residual='C' or 'full'"):
            run()
    rf.minimize_trust_region(checkpoint=tmp_path / "run.h5", max_it=1)
    again = small(residual="none", max_it=6)
    resumed = again.minimize_trust_region(checkpoint=tmp_path / "run.h5", max_it=2)
    assert resumed.iterations == 2
    assert np.array_equal(resumed.x, small(residual="none", max_it=6).minimize_trust_region(max_it=2).x)

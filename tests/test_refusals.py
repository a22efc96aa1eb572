"""Sizes that cannot fit, numbers that overflow, meshes that cannot be used and outputs that cannot be written are
refused before a run, in one line on all ranks.
"""

import json
import os
import resource
import shutil
from pathlib import Path

import firedrake as fd
import numpy as np
import pytest

import pint_fem as pf
from demos import heat_source_report
from demos.heat_source_inversion import main
from pint_fem.capacity import machine_memory, readable, require_memory
from pint_fem.mgrit import MGRIT
from pint_fem.optimize import NonFiniteError
from pint_fem.sweeps.memory import least_bytes
from problems.heat_readings import READINGS
from problems.meshfile import read_mesh
from problems.plate import BOUNDARIES, MESH, REGIONS
from tests.broken_files import COMM, largest_file, shared
from tests.limits import time_limit
from tests.ranks import cases
from tests.test_bad_input import Pieces, check, mgrit_database, outcome  # noqa: F401


def spoiled(folder):
    """Readings that overflow or are all zero; a FIFO, a folder."""
    lines = READINGS.read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("sensor")) + 1
    fields = lines[first].split(",")
    large = [*lines[:first], ",".join([*fields[:4], "1e308"]), *lines[first + 1 :]]
    zero = [*lines[:first], *(line.rsplit(",", 1)[0] + ",0.0" for line in lines[first:])]
    small = [*lines[:first], *(line.rsplit(",", 1)[0] + ",1e-200" for line in lines[first:])]
    for name, text in (("large", large), ("zero", zero), ("small", small)):
        (folder / f"{name}.csv").write_text("\n".join(text) + "\n")
    for name in ("fifo", "fifo.msh"):
        os.mkfifo(folder / name)
    (folder / "folder").mkdir()
    return first + 1


REFUSED = {
    "steps": (["--steps", "1000000000"], ["1000000000 time steps", "unknowns", "need at least", "fewer steps"]),
    "steps beyond 64 bits": (["--steps", "1" + 30 * "0"], ["time steps", "need at least"]),
    "sweeps of relaxation": (["-mgrit_relax", "99999999999999"], ["relax", "99999999999999", "at most"]),
    "a level": (["-mgrit_level_999999999999_relax", "F"], ["level", "999999999999"]),
    "a reading": (["--sensors", "@large.csv"], ["large.csv:6", "1e308", "too large"]),
    "zero readings": (["--sensors", "@zero.csv"], ["zero.csv", "all 1536 readings are zero"]),
    "tiny readings": (["--sensors", "@small.csv"], ["small.csv", "variance"]),
    "readings a FIFO": (["--sensors", "@fifo"], ["fifo is a FIFO"]),
    "mesh a FIFO": (["--mesh", "@fifo.msh"], ["fifo.msh is a FIFO"]),
    "trace a FIFO": (["-mgrit_trace", "@fifo"], ["trace", "fifo is a FIFO"]),
    "trace a folder": (["-mgrit_trace", "@folder"], ["trace", "is a folder"]),
    "trace below a file": (["-mgrit_trace", "@large.csv/t.json"], ["trace", "no such folder"]),
    "checkpoint a FIFO": (["--checkpoint", "@fifo"], ["checkpoint", "fifo is a FIFO"]),
    "checkpoint in no folder": (["--checkpoint", "@none/run.h5"], ["checkpoint", "no such folder"]),
    "results below a file": (["--out", "@large.csv/out"], ["--out", "give a folder that can be written"]),
    "results below /proc": (["--out", "/proc/out"], ["--out", "give a folder that can be written"]),
}


@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize("kind", cases(REFUSED, on_ranks=["steps", "a reading", "trace a folder", "checkpoint a FIFO"]))
@time_limit(100)
def test_command_line(kind, tmp_path, capfd, monkeypatch, mgrit_database):  # noqa: F811
    """Within the time of the set-up and without the memory that was asked for; nothing is solved."""
    folder = shared(tmp_path)
    line = COMM.bcast(spoiled(folder) if COMM.rank == 0 else None)
    assert line == 6
    arguments, words = REFUSED[kind]
    arguments = [a.replace("@", f"{folder}/") for a in arguments]
    if "--out" not in arguments:
        arguments += ["--out", f"{folder}/out"]
    if not kind.startswith("steps"):
        arguments += ["--steps", "16", "--method", "trust-region", "--max-iterations", "1"]
    mgrit_database(arguments)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    check(*outcome(main, capfd, monkeypatch, arguments), *words)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kB: what Firedrake loads


@pytest.mark.parallel([1, 3])
@time_limit(60)
def test_memory_of_a_machine_is_that_of_all_its_ranks():
    """What one rank may have, all together may not; the stated least is below what a run takes."""
    each = int(0.6 * machine_memory())
    if COMM.size == 1:
        require_memory(COMM, each, "unknowns", "give fewer")
    with pytest.raises(pf.InputError, match=rf"unknowns need at least .* which has {readable(machine_memory())}"):
        require_memory(COMM, 2 * each if COMM.size == 1 else each, "unknowns", "give fewer")
    rf = Pieces().functional(solver_parameters={"mgrit": {"levels": 1}})
    slab = rf.problem.sweeps.slab
    stated = least_bytes(rf.evolution, slab)
    assert stated == 4 * (slab.k + 1) * rf.evolution.state_size * 8  # bytes of four slabs
    assert stated < rf.memory().arrays()
    assert readable(15_100_000_000_000) == "15.1 TB"


@pytest.mark.parallel([1, 3])
@time_limit(60)
def test_data_and_weights_that_overflow_are_named():
    """Readings, the weight of sensors, data of a UFL misfit, weight of a regularisation."""
    at = ([[0.2, 0.5]], [0.1])
    for values, weight, words in (
        ([[1e308]], 1.0, "sensors: readings as large as 1e\\+308 with weight 1 overflow"),
        ([[1.0]], np.inf, "sensors: weight = inf: give a finite number"),
        ([[1e10]], 1e300, "sensors: readings as large as 1e\\+10 with weight 1e\\+300 overflow"),
    ):
        with pytest.raises(pf.InputError, match=words):
            pf.PointSensors(*at, values, weight=weight)
    for inexact in (False, True):
        p = Pieces()
        large = p.functional(pf.TerminalMisfit((p.u - fd.Constant(1e308)) ** 2 * fd.dx))
        with pytest.raises(NonFiniteError, match=r"J is not finite: misfit (inf|nan), regularisation 0"):
            large.minimize_trust_region(inexact=inexact)
        p = Pieces()
        p.q.assign(1e10)
        heavy = p.functional(regularisation=fd.Constant(1e300) * p.q**2 * fd.dx)
        with pytest.raises(NonFiniteError, match=r"J is not finite: misfit .*, regularisation (inf|nan)"):
            heavy.minimize_trust_region(inexact=inexact)


def moved(path: Path, change) -> Path:
    """The plate's mesh with other coordinates of its nodes."""
    lines = MESH.read_text().split("\n")
    first = lines.index("$Nodes") + 2
    for i in range(first, first + int(lines[first - 1])):
        name, *place = lines[i].split()
        x, y = change(i - first, *map(float, place[:2]))
        lines[i] = f"{name} {x!r} {y!r} 0"
    path.write_text("\n".join(lines))
    return path


def nearest(x, y):
    """Number of the node next to a place."""
    lines = MESH.read_text().split("\n")
    first = lines.index("$Nodes") + 2
    places = np.array([line.split()[1:3] for line in lines[first : first + int(lines[first - 1])]], float)
    return int(np.argmin(np.hypot(*(places - (x, y)).T)))


MESHES = {
    "tangled": (lambda k: lambda i, x, y: (x + 0.3 * (i == k), y), "a tangled mesh"),
    "folded": (lambda k: lambda i, x, y: (abs(x - 1), y), "tangled mesh|without area"),
    "far away": (lambda k: lambda i, x, y: (x + 1e12, y), "coordinates do not resolve the triangles"),
    "huge": (lambda k: lambda i, x, y: (1e200 * x, 1e200 * y), "coordinates do not resolve the triangles"),
    "one huge": (lambda k: lambda i, x, y: (1e30 if i == k else x, y), "coordinates do not resolve the triangles"),
    "flat": (lambda k: lambda i, x, y: (x, 0.0), "coordinates do not resolve|without area"),
    "tiny": (lambda k: lambda i, x, y: (1e-200 * x, 1e-200 * y), "coordinates do not resolve the triangles"),
}


@pytest.mark.parallel(1)
@time_limit(60)
def test_meshes_that_are_tangled_or_far_too_large(tmp_path):
    """With file and reason; mirrored, in metres far from the origin and in nanometres they are read."""
    node = nearest(1.0, 0.2)
    for name, (change, reason) in MESHES.items():
        with pytest.raises(pf.InputError, match=rf"{name}\.msh: .*({reason})"):
            read_mesh(moved(tmp_path / f"{name}.msh", change(node)), COMM, REGIONS, BOUNDARIES)
    mirrored, metres = lambda i, x, y: (-x, y), lambda i, x, y: (1e3 * x + 5e5, 1e3 * y + 5e6)
    for change in (mirrored, metres, lambda i, x, y: (1e-9 * x, 1e-9 * y)):
        read_mesh(moved(tmp_path / "good.msh", change), COMM, REGIONS, BOUNDARIES)


class Half:
    """u' = -u, backward Euler."""

    def step(self, steps, u, out):
        """A block of states."""
        out[...] = u / 2


@pytest.mark.parallel([1, 3])
@time_limit(60)
def test_a_trace_that_cannot_be_written(tmp_path):
    """Before the solve where that can be seen; after it on all ranks, and the last trace stays."""
    path = shared(tmp_path) / "deep" / "t.json"
    make = lambda path: MGRIT([Half(), Half()], 8, options={"coarsening": 2, "trace": str(path)}, comm=COMM)
    with pytest.raises(pf.InputError, match="/dev/full is a device"):
        make("/dev/full")
    solver = make(path)
    U = np.ones((solver.local_rows, 1))
    solver.solve(U)
    solver.write_trace()
    COMM.barrier()
    before = path.read_bytes()
    with largest_file(100, 0), pytest.raises(pf.InputError, match=r"t\.json cannot be written: File too large"):
        solver.write_trace()
    COMM.barrier()
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["t.json"]


@pytest.mark.slow_on_ranks
@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize("axis", cases(["time"], on_ranks=["time", "space"]))
@time_limit(200)
def test_results_that_cannot_be_written(tmp_path, axis, capfd, monkeypatch):
    """The work is done and its summary is there; what is missing is named in one line on all ranks, status 2.

    A run that has ended is read again and reported once more, without a solve. Then the last rank may not write files
    of more than 20 kB, as on a full disk: fields have some 60 kB on each rank, the summary 2 kB.
    """
    folder, grid = shared(tmp_path), f"1x{COMM.size}" if axis == "time" else f"{COMM.size}x1"
    given = ["--grid", grid, "--steps", "8", "--method", "trust-region", "--max-iterations", "1", "--exact"]
    given += ["--checkpoint", f"{folder}/run.h5"]
    arguments = [*given, "--out", f"{folder}/out", "-mgrit_coarsening", "2"]
    code, err = outcome(main, capfd, monkeypatch, arguments)
    assert code == 0, err
    results = [json.loads((folder / "out" / "summary.json").read_text())["result"]]
    COMM.barrier()
    if COMM.rank == 0:
        shutil.rmtree(folder / "out")
    COMM.barrier()
    report = heat_source_report.report

    def limited(*args):  # a report alone: Firedrake writes files of its own
        with largest_file(20_000, COMM.size - 1):
            report(*args)

    monkeypatch.setattr(heat_source_report, "report", limited)
    code, err = outcome(main, capfd, monkeypatch, arguments)
    check(code, err, "the run is complete, but", f"fields in {folder}/out/fields cannot be written: ", "disk")
    results.append(json.loads((folder / "out" / "summary.json").read_text())["result"])
    near = {k: pytest.approx(v, rel=1e-12) if isinstance(v, float) else v for k, v in results[0].items()}
    assert results[1] == near

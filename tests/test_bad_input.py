"""Bad input of every kind, on 1 and 4 ranks: one line on the first rank's stderr, exit status 2 on every rank, no
hang.
"""

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import firedrake as fd
import numpy as np
import pytest
from irksome import Dt, LobattoIIIC, RadauIIA
from mpi4py import MPI

import pint_fem as pf
from demos.heat_source_inversion import main
from pint_fem.cli import run
from pint_fem.evolution import arguments
from problems.heat_readings import READINGS
from problems.plate import MESH
from tests.ranks import cases

ROOT = Path(__file__).resolve().parent.parent
COMM = MPI.COMM_WORLD


def outcome(program, capfd, monkeypatch, arguments=()):
    """Exit status and what this rank wrote to stderr."""
    monkeypatch.setattr(sys, "argv", ["heat_source_inversion.py", *map(str, arguments)])
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(program)
    return stop.value.code, capfd.readouterr().err


def check(code, err, *words):
    """The first rank says it in one line, the others nothing."""
    assert code == 2, err
    if COMM.rank:
        assert err == ""
        return
    lines = [line for line in err.splitlines() if line.strip()]
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0]


def changed(path: Path, old: str, new: str, count: int = 1) -> str:
    text = path.read_text()
    assert old in text
    return text.replace(old, new, count)


def files(folder):
    """Malformed copies of the mesh and the readings."""
    rows = [line for line in READINGS.read_text().splitlines() if not line.startswith("#")]
    header, first, rest = rows[0], rows[1].split(","), rows[2:]

    def csv(row):
        return "\n".join([header, ",".join(row), *rest]) + "\n"

    made = {
        "columns.csv": "\n".join(["sensor,x,y,temperature", *rows[1:]]),
        "nan.csv": csv([*first[:4], "nan"]),
        "text.csv": csv([*first[:4], "warm"]),
        "late.csv": csv([*first[:3], "1.5", first[4]]),
        "negative.csv": csv([*first[:3], "-0.5", first[4]]),
        "missing_row.csv": "\n".join([header, *rest]),
        "hole.csv": changed(READINGS, rows[1], rows[1]).replace(f",{first[1]},{first[2]},", ",0.45,0.8,"),
        "empty.csv": "",
        "notamesh.msh": "this is not a mesh\n",
        "truncated.msh": MESH.read_text()[:20000],
    }
    for name, text in made.items():
        (folder / name).write_text(text)
    return folder


COMMAND_LINE = {
    "unknown option": (["--stepz", "8"], ["--stepz", "--steps"]),
    "word left over": (["fast"], ["fast"]),
    "steps not a number": (["--steps", "many"], ["--steps", "many"]),
    "no steps": (["--steps", "0"], ["--steps", "0"]),
    "negative noise": (["--noise", "-1"], ["--noise"]),
    "tolerance nan": (["--rtol", "nan"], ["--rtol"]),
    "no such method": (["--method", "magic"], ["magic", "trust-region"]),
    "options of another method": (["--exact", "--gtol", "1e-6"], ["--gtol", "--exact", "--method trust-region"]),
    "integrator": (["--integrator", "RK4"], ["RK4", "SDIRK2"]),
    "time solver": (["--time-solver", "magic"], ["magic", "serial"]),
    "grid no grid": (["--grid", "two"], ["two", "SPACExTIME"]),
    "grid of other size": (["--grid", "3x7"], ["21", "ranks"]),
    "more ranks than steps": (["--steps", "2", "--grid", "1x3"], ["3", "2"] if COMM.size == 3 else ["3", "ranks"]),
    "coarsening beyond the steps": (["--steps", "16", "-mgrit_levels", "3", "-mgrit_coarsening", "8,4"], ["8x4", "16"]),
    "coarsening of one": (["-mgrit_coarsening", "1"], ["coarsening"]),
    "mgrit option": (["-mgrit_level", "3"], ["level", "levels"]),
    "mgrit relaxation": (["-mgrit_relax", "CF"], ["relax", "CF"]),
    "mesh missing": (["--mesh", "nowhere.msh"], ["nowhere.msh"]),
    "mesh no mesh": (["--mesh", "@notamesh.msh"], ["notamesh.msh"]),
    "mesh truncated": (["--mesh", "@truncated.msh"], ["truncated.msh"]),
    "mesh a folder": (["--mesh", "@."], ["--mesh"][:0]),
    "readings missing": (["--sensors", "nowhere.csv"], ["nowhere.csv"]),
    "readings empty": (["--sensors", "@empty.csv"], ["empty.csv"]),
    "readings columns": (["--sensors", "@columns.csv"], ["columns.csv:1", "time"]),
    "readings nan": (["--sensors", "@nan.csv"], ["nan.csv:2"]),
    "readings text": (["--sensors", "@text.csv"], ["text.csv:2", "warm"]),
    "readings late": (["--sensors", "@late.csv"], ["late.csv:2", "1.5"]),
    "readings before the start": (["--sensors", "@negative.csv"], ["negative.csv:2"]),
    "reading left out": (["--sensors", "@missing_row.csv"], ["missing_row.csv"]),
    "sensor in a hole": (["--sensors", "@hole.csv"], ["0.45", "0.8"]),
    "out is a file": (["--out", "@nan.csv"], ["--out"]),
}


@pytest.fixture
def mgrit_database():
    """PETSc reads its options from the command line once; put them there and take them away again."""
    put = []

    def insert(arguments):
        database = fd.PETSc.Options()
        for name, value in pairwise(arguments):
            if name.startswith("-mgrit_"):
                database[name[1:]] = value
                put.append(name[1:])

    yield insert
    for name in put:
        fd.PETSc.Options().delValue(name)


@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize(
    "kind",
    cases(COMMAND_LINE, on_ranks=["more ranks than steps", "mgrit relaxation", "readings nan", "out is a file"]),
)
def test_command_line(kind, tmp_path_factory, capfd, monkeypatch, mgrit_database):
    folder = COMM.bcast(str(tmp_path_factory.mktemp("bad")) if COMM.rank == 0 else None)
    if COMM.rank == 0:
        files(Path(folder))
    COMM.barrier()
    arguments, words = COMMAND_LINE[kind]
    arguments = [a.replace("@", folder + "/") for a in arguments]
    if "--out" not in arguments:
        arguments += ["--out", folder + "/out"]
    mgrit_database(arguments)
    check(*outcome(main, capfd, monkeypatch, arguments), *words)


class Pieces:
    """A small well-posed problem to spoil."""

    def __init__(self):
        self.st = pf.SpaceTime()
        self.mesh = self.st.mesh(fd.UnitSquareMesh, 3, 3)
        self.V = fd.FunctionSpace(self.mesh, "CG", 1)
        self.u, self.v, self.q = fd.Function(self.V), fd.TestFunction(self.V), fd.Function(self.V)
        self.F = (
            Dt(self.u) * self.v * fd.dx + fd.inner(fd.grad(self.u), fd.grad(self.v)) * fd.dx - self.q * self.v * fd.dx
        )
        self.options = dict(tableau=pf.BackwardEuler(), dt=0.1, nsteps=8, control=self.q)

    def evolution(self, residual=None, **changes):
        return pf.Evolution(residual or self.F, self.u, **(self.options | changes))

    def functional(self, misfit=None, evolution=None, **options):
        misfit = misfit or pf.TerminalMisfit(self.u**2 * fd.dx)
        return pf.TimeParallelReducedFunctional(evolution or self.evolution(), misfit, spacetime=self.st, **options)


def other_space(p):
    return fd.Function(fd.FunctionSpace(p.mesh, "DG", 0))


API = {
    "negative dt": (lambda p: p.evolution(dt=-0.1), ["-0.1"]),
    "dt nan": (lambda p: p.evolution(dt=float("nan")), ["nan"]),
    "nsteps fraction": (lambda p: p.evolution(nsteps=2.5), ["2.5"]),
    "no Dt": (lambda p: p.evolution(p.u * p.v * fd.dx - p.q * p.v * fd.dx), ["Dt(u)"]),
    "bilinear residual": (lambda p: p.evolution(fd.TrialFunction(p.V) * p.v * fd.dx), ["TestFunction"]),
    "fully implicit tableau": (lambda p: p.evolution(tableau=RadauIIA(2)), ["diagonally implicit"]),
    "another implicit tableau": (lambda p: p.evolution(tableau=LobattoIIIC(2)), ["diagonally implicit"]),
    "time a number": (lambda p: p.evolution(t=0.0), ["time_function"]),
    "time a vector": (lambda p: p.evolution(t=fd.Constant((0.0, 1.0))), ["time_function"]),
    "control not in the residual": (lambda p: p.evolution(control=fd.Function(p.V)), ["control"]),
    "control a number": (lambda p: p.evolution(control=1.0), ["float"]),
    "control squared in a condition": (
        lambda p: p.evolution(bcs=fd.DirichletBC(p.V, p.q**2, 1)),
        ["boundary", "not affine"],
    ),
    "condition on another space": (
        lambda p: p.evolution(bcs=fd.DirichletBC(fd.FunctionSpace(p.mesh, "CG", 2), 0, 1)),
        ["space"],
    ),
    "no control": (lambda p: p.functional(evolution=p.evolution(control=None)), ["control"]),
    "control value in another space": (lambda p: p.functional()(other_space(p)), ["control"]),
    "direction in another space": (lambda p: p.functional().hessian(other_space(p)), ["control"]),
    "misfit without state": (lambda p: p.functional(pf.RunningMisfit(p.q**2 * fd.dx)), ["state"]),
    "misfit a 1-form": (lambda p: p.functional(pf.RunningMisfit(p.u * p.v * fd.dx)), ["functional"]),
    "misfit with control": (lambda p: p.functional(pf.TerminalMisfit(p.u * p.q * fd.dx)), ["regularisation"]),
    "regularisation without control": (lambda p: p.functional(regularisation=p.u**2 * fd.dx), ["regularisation"]),
    "sensor outside": (lambda p: p.functional(pf.PointSensors([[2.0, 0.5]], [0.1], [[0.0]])), ["outside"]),
    "sensor times": (lambda p: p.functional(pf.PointSensors([[0.2, 0.5]], [9.0], [[0.0]])), ["9", "0.8"]),
    "sensor shapes": (lambda p: p.functional(pf.PointSensors([[0.2, 0.5]], [0.1], [[0.0, 1.0]])), ["shape"]),
    "sensor nan": (lambda p: p.functional(pf.PointSensors([[0.2, 0.5]], [0.1], [[np.nan]])), ["finite"]),
    "riesz map": (lambda p: p.functional(riesz_map="H7"), ["H7", "H1"]),
    "solver parameter": (lambda p: p.functional(solver_parameters={"mgritt": {}}), ["mgritt"]),
    "mgrit option": (
        lambda p: p.functional(solver_parameters={"mgrit": {"coarsning": 4}}),
        ["coarsning", "coarsening"],
    ),
    "coarsening beyond the steps": (
        lambda p: p.functional(solver_parameters={"mgrit": {"coarsening": 16, "levels": 2}}),
        ["16", "8"],
    ),
    "grid of another size": (lambda p: pf.SpaceTime((3, 5)), ["15"]),
}


@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize("kind", cases(API, on_ranks=list(API)[::5]))
def test_api(kind, capfd, monkeypatch):
    program, words = API[kind]
    check(*outcome(lambda: program(Pieces()), capfd, monkeypatch), *words)


def test_complex_petsc(capfd, monkeypatch):
    pieces = Pieces()
    monkeypatch.setattr(arguments, "complex_mode", True)
    check(*outcome(pieces.evolution, capfd, monkeypatch), "complex", "real")


@pytest.mark.parallel([1, 3])
def test_error_that_only_one_rank_meets_ends_all(capfd, monkeypatch):
    """A failing solve on one rank is known on all: exit 1, one line that names sweep, level and steps."""

    def fails():
        p = Pieces()
        rf = p.functional(solver_parameters={"mgrit": {"coarsening": 2, "levels": 2}})
        if COMM.rank == COMM.size - 1:
            step = rf.problem.sweeps.propagators[0]
            monkeypatch.setattr(step, "apply_transposed", lambda *args: 1 / 0)
        m = fd.Function(p.V).assign(1.0)
        rf(m)
        for level in rf.problem.sweeps.solvers.adjoint.levels:
            level.propagator._apply = rf.problem.sweeps.propagators[0].apply_transposed
        rf.derivative()

    code, err = outcome(fails, capfd, monkeypatch)
    assert code == 1
    if COMM.rank == 0:
        assert "adjoint" in err
        assert "level" in err
        assert "ZeroDivisionError" in err
        assert len(err.strip().splitlines()) == 1
    else:
        assert err == ""


@pytest.mark.starts_mpi
@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.grid), 2])
def test_whole_program(ranks, tmp_path):
    """As a user starts it: status and stderr of mpiexec itself."""
    env = os.environ | {
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "OMPI_MCA_rmaps_base_oversubscribe": "1",
        "OMPI_MCA_orte_execute_quiet": "1",
    }
    env = {k: v for k, v in env.items() if not k.startswith(("OMPI_COMM", "OMPI_UNIVERSE", "PMIX", "ORTE"))}
    command = ["mpiexec", "-n", str(ranks), sys.executable, "demos/heat_source_inversion.py"]
    done = subprocess.run(
        [*command, "--sensors", "nowhere.csv", "--out", str(tmp_path / "out")],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert [line for line in done.stderr.splitlines() if "nowhere.csv" in line and line.startswith("error:")]
    assert len([line for line in done.stderr.splitlines() if line.startswith("error:")]) == 1

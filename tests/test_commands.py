"""``pint-fem`` as a user starts it, in a folder that is no checkout: what it prints, and its exit status."""

import json
import re
import subprocess
import sys
from math import prod
from pathlib import Path

import pytest
from mpi4py import MPI

from pint_fem.cli import run
from pint_fem.commands import command, demo_arguments
from pint_fem.errors import InputError
from tests.ranks import program_environment

ROOT = Path(__file__).resolve().parent.parent
COMM = MPI.COMM_WORLD
USERS = """
from firedrake import *
from irksome import Dt
import pint_fem as pf

st = pf.SpaceTime()
mesh = st.mesh(UnitSquareMesh, 2, 2)
V = FunctionSpace(mesh, "CG", 1)
u, v, q = Function(V, name="u"), TestFunction(V), Function(V)
F = Dt(u) * v * dx + inner(grad(u), grad(v)) * dx - q * v * dx
number = 3


def evolution():
    return pf.Evolution(F, u, tableau=pf.BackwardEuler(), dt=0.1, nsteps=8, control=q)


def functional():
    options = {"mgrit": {"coarsening": 2}}
    return pf.TimeParallelReducedFunctional(
        evolution(), pf.RunningMisfit(u**2 * dx), solver_parameters=options, spacetime=st
    )


def wrong():
    made = functional()
    step = made.problem.sweeps.propagators[0]
    apply = step.apply_transposed
    step.apply_transposed = lambda *args: 2 * apply(*args)
    return made
"""


def start(folder, *arguments, code="import pint_fem.commands as c; c.main()"):
    """Exit status, stdout and stderr of a program of its own."""
    env = program_environment()
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=folder, env=env | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def users(tmp_path_factory, monkeypatch):
    """The current folder, with a module of the user's."""
    folder = Path(COMM.bcast(str(tmp_path_factory.mktemp("users")) if COMM.rank == 0 else None))
    if COMM.rank == 0:
        (folder / "my_problem.py").write_text(USERS)
    COMM.barrier()
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    yield folder
    sys.modules.pop("my_problem", None)


@pytest.mark.starts_mpi
def test_info(tmp_path):
    code, out, _ = start(tmp_path, "info")
    assert code == 0
    lines = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in out.splitlines())
    import numpy
    from petsc4py import PETSc

    assert lines["numpy"] == numpy.__version__
    assert lines["Python"] == ".".join(map(str, sys.version_info[:3]))
    assert lines["PETSc"] == ".".join(map(str, PETSc.Sys.getVersion()))
    for name, package in {"MUMPS": "mumps", "CHOLMOD": "cholmod", "hypre": "hypre", "PT-Scotch": "ptscotch"}.items():
        assert lines[f"PETSc: {name}"] == ("yes" if PETSc.Sys.hasExternalPackage(package) else "no")


@pytest.mark.starts_mpi
@pytest.mark.parametrize("arguments", [("info",), ("plan", "heat-source", "--ranks", "4")])
def test_without_firedrake(arguments, tmp_path):
    """Neither needs Firedrake, torch or rich; ``info`` reports that PETSc is missing."""
    block = "import sys\nfor name in ('firedrake', 'petsc4py', 'torch', 'rich'): sys.modules[name] = None\n"
    code, out, err = start(tmp_path, *arguments, code=f"{block}import pint_fem.commands as c; c.main()")
    assert code == 0, err
    assert re.search(r"PETSc +not installed" if arguments == ("info",) else "all figures predicted", out)


@pytest.mark.starts_mpi
def test_plan(tmp_path):
    """Its lines are those of the planner."""
    pytest.importorskip("greenlet")
    from pint_fem.scaling.costs import load
    from pint_fem.scaling.network import Network
    from pint_fem.scaling.planner import plan, plan_map

    code, out, _ = start(
        tmp_path, "plan", "heat-source", "--ranks", 4, "--steps", 64, "--network", "2us,12GB/s", "--rtol", 1e-6
    )
    assert code == 0
    made = plan("heat-source", 4, nsteps=64, rtol=1e-6, network=Network.parse("2us,12GB/s"))
    assert f"run: {demo_arguments(made.best)}" in out.splitlines()
    assert out.splitlines()[-1].startswith(f"next: run your program with mpiexec -n {prod(made.best.grid)} ")
    for choice in [made.best, *made.alternatives]:
        assert re.search(rf"{choice.solver} .*{choice.grid[0]} x {choice.grid[1]} .*{choice.seconds:.4g}", out)
    assert out.count("assumed: ") == len(made.assumptions)
    found = plan_map(load("heat-source"), 4, nsteps=64, rtol=1e-6, network=Network.parse("2us,12GB/s"))
    assert f"24 sensors: the whole inversion in {found.seconds:.3g} s" in out
    assert "  4 groups of sensors x 1 in time x 1 in space (1 x 4), sequential steps" in out


@pytest.mark.starts_mpi
def test_quiet_plan_is_the_arguments_of_a_program(tmp_path):
    pytest.importorskip("greenlet")
    code, out, err = start(tmp_path, "plan", "heat-source", "--ranks", 4, "--steps", 64, "--quiet")
    assert (code, err) == (0, "")
    assert re.fullmatch(r"--grid \d+x\d+ --time-solver \w+.*\n", out)


BAD = {
    "no such command": (["plam"], ["plam", "plan"]),
    "no such scaling command": (["scaling", "measure"], ["measure", "calibrate"]),
    "no such problem": (["plan", "nothing"], ["nothing", "heat-source"]),
    "no problem": (["plan"], ["problem"]),
    "network": (["plan", "heat-source", "--network", "fast"], ["fast", "2us,12GB/s"]),
    "ranks": (["plan", "heat-source", "--ranks", "0"], ["--ranks"]),
    "unknown option": (["plan", "heat-source", "--rank", "3"], ["--rank", "--ranks"]),
    "petsc option": (["plan", "heat-source", "-ksp_view"], ["-ksp_view"]),
    "no calibration": (["plan", "my_problem.py"], ["not a calibration"]),
    "tolerance": (["plan", "heat-source", "--rtol", "0.5"], ["0.5", "1e-06"]),
    "infinite tolerance": (["plan", "heat-source", "--rtol", "inf"], ["--rtol", "inf is not positive"]),
    "no colon": (["check", "my_problem"], ["my_problem", "module:name"]),
    "no module": (["check", "your_problem:evolution"], ["your_problem"]),
    "no function": (["check", "my_problem:evolutions"], ["my_problem", "evolutions"]),
    "no evolution": (["check", "my_problem:number"], ["number", "int", "Evolution"]),
    "no case given": (["scaling", "calibrate"], ["--case"]),
    "no case": (["scaling", "calibrate", "--case", "my_problem:number"], ["number", "int", "Case"]),
    "part": (["scaling", "calibrate", "--case", "my_problem:number", "--only", "colour"], ["colour", "cycles"]),
    "plan of no problem": (["plan", "my_problem:number"], ["number", "int", "Case"]),
    "grid of other size": (["scaling", "validate", "--case", "my_problem:number", "--grd", "2x2"], ["--grd", "--grid"]),
    "json": (["scaling", "validate", "--case", "my_problem:number", "--options", "{"], ["--options", "JSON"]),
}


@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize("kind", BAD)
def test_bad_input(kind, users, capfd):
    """Exit status 2 on every rank, and one line on the first."""
    arguments, words = BAD[kind]
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(lambda: command(arguments))
    err = capfd.readouterr().err
    assert stop.value.code == 2, err
    lines = [line for line in err.splitlines() if line.strip()]
    assert len(lines) == (COMM.rank == 0), err
    assert all(word in line for line in lines for word in ["error: ", *words]), err


@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize("name", ["evolution", "functional"])
def test_check_passes(name, users, log_lines, capsys):
    command(["check", f"my_problem:{name}"])
    out = "\n".join(log_lines)
    assert ("passed" in out) == (COMM.rank == 0)
    assert "failed" not in re.sub(r"\b0 failed", "", out)
    assert ("next: pint-fem plan" in capsys.readouterr().out) == (COMM.rank == 0)


def test_check_fails(users, log_lines):
    with pytest.raises(SystemExit) as stop:
        command(["check", "my_problem:wrong"])
    assert stop.value.code == 1
    assert re.search(r"adjoint.*failed", "\n".join(log_lines))


def test_help_names_all_commands(capsys):
    for arguments in ([], ["--help"]):
        command(arguments)
        out = capsys.readouterr().out
        assert all(f"pint-fem {name}" in out for name in ("demo", "plan", "scaling calibrate", "check", "info"))
    with pytest.raises(SystemExit) as stop:
        command(["plan", "--help"])
    assert stop.value.code == 0
    assert "--ranks" in capsys.readouterr().out


def test_a_user_module_that_fails_is_not_bad_input(users):
    """A module that the user's imports is missing: that error is the user's to see."""
    (users / "broken.py").write_text("import nowhere_at_all\n")
    with pytest.raises(ModuleNotFoundError, match="nowhere_at_all"):
        command(["check", "broken:evolution"])


def test_calibrate_and_validate(users, capfd):
    """Costs of the user's problem are measured, completed, and read again."""
    pytest.importorskip("greenlet")
    (users / "my_case.py").write_text(
        "from pint_fem.scaling.calibrate import Case\n"
        "from problems.heat_square import square\n"
        "pose = lambda grid, steps, parameters: square(steps, 'SDIRK2', size=4, spacetime=grid, **parameters)\n"
        "menu = [{'levels': 2, 'coarsening': [4], 'relax': 'FCF'}]\n"
        "case = lambda: Case('mine', pose, 16, menu, rtol=(1e-6,), solver=menu[0])\n"
    )
    with pytest.raises(InputError, match="measure the costs first"):
        command(["scaling", "calibrate", "--case", "my_case:case", "--only", "cycles"])
    command(["scaling", "calibrate", "--case", "my_case:case", "--repeats", "1"])
    first = json.loads((users / "mine.json").read_text())
    assert first["cycles"][0]["options"] == {"levels": 2, "coarsening": [4], "relax": "FCF"}
    assert first["cycles"][0]["state"] >= 1
    (users / "mine.json").write_text(json.dumps(first | {"cycles": []}))
    command(["scaling", "calibrate", "--case", "my_case:case", "--only", "cycles"])
    assert json.loads((users / "mine.json").read_text()) == first
    given = ["--case", "my_case:case", "--steps", "16", "--repeats", "1", "--out", "rows.json"]
    command(["scaling", "validate", *given])
    rows = json.loads((users / "rows.json").read_text())
    assert [row["task"] for row in rows] == ["state", "adjoint", "gradient"]
    command(["plan", "mine.json", "--ranks", "2"])
    assert "mine on 2 ranks" in capfd.readouterr().out

"""The wheel and the source distribution: what is in them, and what works of an installed package, in a folder that
cannot be written, with the core's two requirements alone and with those of networks.
"""

import os
import shutil
import stat
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import mpi4py
import numpy
import pytest

import pint_fem

pytestmark = pytest.mark.starts_mpi

ROOT = Path(__file__).parents[1]
BUILD = "from setuptools import build_meta as b; b.build_sdist('..'); b.build_wheel('..')"
CORE = """
import numpy as np
from mpi4py import MPI
import pint_fem as pf
from pint_fem.all_at_once.grids import split_steps

comm, N, m, dt = MPI.COMM_WORLD, 64, 8, 1 / 64
st = pf.SpaceTime()
assert st.time_size == comm.size and st.space_size == 1

class Euler:  # u' = -u
    def __init__(self, dt):
        self.dt = dt

    def step(self, steps, u, out):
        out[...] = u / (1 + self.dt)

bounds = split_steps(N, comm.size)
lo, hi = bounds[comm.rank], bounds[comm.rank + 1]
exact = (1 + dt) ** -np.arange(lo, hi + 1.0)[:, None]
for name in ("MGRIT", "ParaDiag"):
    U = np.zeros((hi - lo + 1, 1))
    U[0] = lo == 0
    if name == "MGRIT":
        solver = pf.MGRIT([Euler(dt), Euler(m * dt)], N, options={"coarsening": m, "rtol": 1e-12}, comm=st.time_comm)
    else:
        solve = lambda k, mu, r: r / (1 - mu / (1 + dt))
        solver = pf.ParaDiag(Euler(dt), N, solve, options={"alpha": 1e-4, "rtol": 1e-12}, comm=st.time_comm)
    assert solver.solve(U).converged, name
    assert np.abs(U - exact).max() < 1e-10, name

for name in pf.__all__:
    try:
        getattr(pf, name)
    except ModuleNotFoundError as error:
        if comm.rank == 0:
            print(f"{name}: {error}")
    else:
        if comm.rank == 0:
            print(f"{name}: here")
"""
HERE = {
    "DivergedError", "InexactOptions", "InputError", "InputTypeError", "MGRIT", "MGRITOptions", "NonFiniteError",
    "OneShotResult", "ParaDiag", "ParaDiagOptions", "Propagator", "SolveResult", "SolverFailure", "SpaceTime",
    "Transfer", "TrustRegionResult", "minimize_trust_region",
}  # fmt: skip
"""Public names that need numpy and mpi4py only."""
NETWORK = """
import torch
import pint_fem as pf
from pint_fem.resnet import Dense

torch.manual_seed(0)
net = pf.LayerParallelResNet(
    torch.nn.Linear(2, 3), Dense(3, "tanh"), 8, torch.nn.Linear(3, 2), mgrit={"coarsening": 2, "rtol": 1e-10},
    final_time=1.0, seed=0, dtype=torch.float64,
)
loss = net(torch.ones(5, 2, dtype=torch.float64)).square().sum()
loss.backward()
assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in net.parameters())
try:
    pf.Evolution
except ModuleNotFoundError as error:
    print(error)
"""
KERNELS = """
from pint_fem.kernels.lanes.structures import kernels
from pint_fem.kernels.space.compiled import block_kernels
from pint_fem.paradiag.lane_kernels import lane_kernels
from pint_fem.paradiag.transforms import time_transform

for found in (kernels(), block_kernels(8), lane_kernels("d", 8), time_transform(16, "d")):
    assert found is not None
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder with both distributions, built without a network by what is installed here."""
    folder = tmp_path_factory.mktemp("built")
    sources = folder / "sources"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "pint_fem", sources / "pint_fem", ignore=ignored)
    for name in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff"):
        shutil.copy(ROOT / name, sources)
    (sources / "tests").mkdir()
    (sources / "tests" / "test_nothing.py").write_text("")
    subprocess.run([sys.executable, "-c", BUILD], cwd=sources, check=True, capture_output=True, timeout=240)
    return folder


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """The folder of an installed wheel, which cannot be written."""
    folder = tmp_path_factory.mktemp("installed")
    (wheel,) = built.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder)
    inside = [folder, *folder.rglob("*")]
    for path in inside:
        path.chmod(path.stat().st_mode & ~(stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH))
    yield folder
    for path in inside:
        path.chmod(path.stat().st_mode | stat.S_IWUSR)


def sources():
    """Files of the package that a distribution has to have."""
    kinds = ("*.py", "*.c", "*.json", "py.typed")
    files = [path for kind in kinds for path in (ROOT / "pint_fem").rglob(kind)]
    return {path.relative_to(ROOT).as_posix() for path in files}


@pytest.fixture(scope="module")
def only(tmp_path_factory):
    """A folder with numpy and mpi4py as they are installed here, and nothing else."""
    folder = tmp_path_factory.mktemp("only")
    for module in (numpy, mpi4py):
        package = Path(module.__file__).parent
        for found in package.parent.glob(f"{package.name}*"):  # with their libraries
            (folder / found.name).symlink_to(found)
    return folder


def start(code, installed, tmp_path, *arguments, ranks=1, only=None):
    """Run code with the installed package in an empty folder, and return what it prints; ``only`` is the folder of all
    that can be imported beside it and the standard library.
    """
    env = {k: v for k, v in os.environ.items() if not k.startswith(("OMPI_COMM", "PMIX", "ORTE", "PINT_FEM"))}
    path = [installed] if only is None else [installed, only]
    env |= {"PYTHONPATH": os.pathsep.join(map(str, path)), "PYTHONDONTWRITEBYTECODE": "1"}
    env |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    where = f"import pint_fem\nassert pint_fem.__file__.startswith({str(installed)!r}), pint_fem.__file__\n"
    words = [sys.executable, *(["-S"] if only else []), "-c", where + code, *arguments]
    words = words if ranks == 1 else ["mpiexec", "--oversubscribe", "-n", str(ranks), *words]
    done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_has_the_package_and_nothing_else(built):
    (wheel,) = built.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    info = f"pint_fem-{pint_fem.__version__}.dist-info"
    assert {name for name in names if not name.startswith(info)} == sources()
    assert f"{info}/licenses/LICENSE" in names
    assert "pint-fem = pint_fem.commands:main" in zipfile.ZipFile(wheel).read(f"{info}/entry_points.txt").decode()
    metadata = zipfile.ZipFile(wheel).read(f"{info}/METADATA").decode().partition("\n\n")[0]
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra ==" not in line]
    assert [line.split(": ")[1].split(">")[0] for line in required] == ["numpy", "mpi4py"]


def test_the_source_distribution_has_the_package_and_its_pages(built):
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    assert sources() < names
    assert {"LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff", "pyproject.toml"} < names
    assert not [name for name in names if name.startswith(("tests", "demos", "problems", "results"))]


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_core_with_numpy_and_mpi4py_only(ranks, installed, only, tmp_path):
    """MGRIT and ParaDiag have the solution of sequential steps; a name that needs more says what to install."""
    out = start(CORE, installed, tmp_path, ranks=ranks, only=only)
    said = dict(line.split(": ", 1) for line in out.splitlines())
    assert {name for name, text in said.items() if text == "here"} == HERE
    for name, text in said.items():
        if name not in HERE:
            assert text.startswith(f"pint_fem.{name} requires "), text
            assert "install" in text, text
    assert "pint_fem[fem]" in said["Evolution"]
    assert "Firedrake" in said["Evolution"]
    assert "pip install 'pint_fem[resnet]'" in said["LayerParallelResNet"]


def test_the_program_with_numpy_and_mpi4py_only(installed, only, tmp_path):
    """Its demo runs and leaves a program; quiet it prints nothing; other commands name what is missing."""
    command = "import sys; from pint_fem.commands import main; main()"
    out = start(command, installed, tmp_path, "demo", only=only).splitlines()
    assert "largest difference from one step after another" in "".join(out)
    assert out[-2] == f"written: {tmp_path / 'pint_fem_demo'}: heat_in_numpy.py, trajectory.npy"
    assert out[-1].startswith("next: change pint_fem_demo/heat_in_numpy.py and run it: python ")
    assert "install Firedrake" in out[-1]
    assert start(command, installed, tmp_path, "demo", "--quiet", only=only) == ""
    program = tmp_path / "pint_fem_demo" / "heat_in_numpy.py"
    changed = program.read_text().replace("1024", "2048")
    program.write_text(changed)
    for arguments, words in {
        ("demo",): "has been changed",
        ("demo", "heat_source"): "install Firedrake",
        ("plan", "heat-source"): "pint-fem plan requires",
    }.items():
        with pytest.raises(AssertionError) as failed:
            start(command, installed, tmp_path, *arguments, only=only)
        assert words in str(failed.value)
        assert "Traceback" not in str(failed.value)
    assert program.read_text() == changed


def test_networks_without_firedrake(installed, tmp_path):
    pytest.importorskip("torch")
    blocked = ("firedrake", "ufl", "pyop2", "petsc4py", "irksome", "scipy", "matplotlib", "greenlet")
    hidden = f"import sys\nfor name in {blocked}: sys.modules[name] = None\n"
    assert "pint_fem.Evolution requires " in start(hidden + NETWORK, installed, tmp_path)


def test_kernels_are_compiled_from_the_installed_sources(installed, tmp_path):
    start(KERNELS, installed, tmp_path)

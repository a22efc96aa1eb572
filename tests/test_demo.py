"""The demo as a user starts it, small: it converges, writes what it says, and grids agree."""

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from tests.heat_readings import some_readings
from tests.pictures import assert_drawn

pytestmark = pytest.mark.starts_mpi

ROOT = Path(__file__).resolve().parent.parent
MPI_ENV = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
    "OMPI_MCA_mpi_yield_when_idle": "1",
}


def run(ranks, *arguments, program="heat_source_inversion"):
    """Start a demo on some ranks, away from this process's own MPI."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("OMPI_", "PMIX", "ORTE"))} | MPI_ENV
    command = ["mpiexec", "-n", str(ranks), sys.executable, f"demos/{program}.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600, check=True)


@pytest.mark.parametrize("method", ["map", pytest.param("trust-region", marks=pytest.mark.grid)])
def test_beside_serial_pyadjoint(method, tmp_path):
    """Acceptance: J and gradient to 1e-8, a Hessian action to 1e-7, the recovered sources to 1e-4."""
    sensors = some_readings(tmp_path / "readings.csv", 22)
    small = ["--steps", 8, "--sensors", sensors, "--no-fields", "-mgrit_coarsening", "2"]
    run(2, "--grid", "1x2", "--out", tmp_path, "--method", method, *small, "--compare-serial")
    table = json.loads((tmp_path / "summary.json").read_text())["compare_serial"]
    for name, limit in {"J": 1e-8, "gradient": 1e-8, "Hessian action": 1e-7, "recovered source": 1e-4}.items():
        assert table[name]["relative_difference"] < limit, name


@pytest.mark.parametrize("grid", [pytest.param("1x2", marks=pytest.mark.grid), "2x1"])
def test_trust_region(grid, tmp_path):
    space, time = map(int, grid.split("x"))
    steps = ["--method", "trust-region", "--steps", 24, "--gtol", 1e-5, "-mgrit_coarsening", "4"]
    done = run(space * time, "--grid", grid, "--out", tmp_path, *steps)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["grid"] == {"space": space, "time": time}
    assert summary["result"]["converged"]
    assert 0.4 < summary["result"]["misfit"] < 0.5  # the readings are explained up to their noise, which gives 1/2
    assert summary["result"]["relative_source_error"] < 0.45
    assert summary["mgrit"]["largest_observed_factor"] <= summary["mgrit"]["two_level_bound"]
    assert "recovered source" in done.stdout
    for name, panels in (("source.png", 2), ("sensors.png", 1), ("convergence.png", 3)):
        assert_drawn(tmp_path / name, panels=panels)
    listed = (tmp_path / "fields" / "temperature.pvd").read_text()
    files = [part.split('"')[0] for part in listed.split('file="')[1:]]
    times = [float(part.split('"')[0]) for part in listed.split('timestep="')[1:]]
    assert all((tmp_path / "fields" / name).exists() for name in files)
    assert times == sorted(times)
    assert np.isclose(times[-1], 1.0)
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize("grid", [pytest.param("1x2", marks=pytest.mark.grid), "2x1"])
def test_map(grid, tmp_path):
    """The mean is the minimiser: J by a sweep is that of the evidence's parts, and the true source is in the band."""
    space, time = map(int, grid.split("x"))
    done = run(space * time, "--grid", grid, "--out", tmp_path, "--steps", 24, "-mgrit_coarsening", "4")
    summary = json.loads((tmp_path / "summary.json").read_text())
    result, posterior, seconds = summary["result"], summary["posterior"], summary["seconds"]
    assert summary["grid"] == {"space": space, "time": time}
    written, after = done.stdout.splitlines()[-2:]
    names = "fields/ ({} files), l_curve.png, sensors.png, source.png, summary.json"
    count = sum(path.is_file() for path in (tmp_path / "fields").rglob("*"))
    assert written == f"written: {tmp_path}: {names.format(count)}"
    assert after.startswith("next: open source.png")
    assert "\x1b" not in done.stdout + done.stderr  # no status line where there is no terminal
    assert result["converged"]
    assert 0.4 < result["misfit"] < 0.5  # the readings are explained up to their noise, which gives 1/2
    assert np.isclose(posterior["squared_residual"], 2 * posterior["readings"] * result["misfit"], rtol=1e-6)
    assert result["relative_source_error"] < 0.45
    assert posterior["true_within_two_deviations"] > 0.8
    assert set(posterior["alpha"]) == {"discrepancy", "l-curve", "gcv", "evidence", "upre"}
    assert posterior["alpha"]["discrepancy"] > 1  # with the given weight the residual is below the noise
    assert summary["sweeps"]["state"] == 1
    assert summary["sweeps"]["adjoint"] == summary["sweeps"]["tangent"] == 0
    assert np.isclose(seconds["inversion"], seconds["map"] + seconds["posterior"])
    assert "standard deviation" in done.stdout
    for name, panels in (("source.png", 2), ("sensors.png", 2), ("l_curve.png", 2)):
        assert_drawn(tmp_path / name, panels=panels)
    assert not (tmp_path / "convergence.png").exists()
    assert b"standard_deviation" in next((tmp_path / "fields").rglob("source_*.vtu")).read_bytes()


def test_live(tmp_path):
    """The posterior after the last reading is that of all of them, and no window is opened without a display."""
    run(2, "--steps", 24, "--live", "--sensors", some_readings(tmp_path / "r.csv", 12), "--out", tmp_path,
        program="heat_source_live")  # fmt: skip
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["result"]["difference_from_all_readings_at_once"] < 1e-8
    updates = summary["updates"]
    times, deviations = ([update[name] for update in updates] for name in ("time", "mean_standard_deviation"))
    assert times[0] == 0
    assert times == sorted(times)
    assert all(after < before for before, after in pairwise(deviations))
    assert_drawn(tmp_path / "sharpening.png", panels=2)
    assert_drawn(tmp_path / "live.gif", panels=2)
    assert (tmp_path / "live.gif").stat().st_size < 4e6


def test_storage_of_c_points(tmp_path):
    """The report of a run that stores C-points only sees what one of all points does."""
    results = []
    for storage in ("all", "C"):
        more = ["--max-iterations", 1, "--steps", 16, "-mgrit_coarsening", "4", "-mgrit_storage", storage]
        run(1, "--out", tmp_path / storage, "--method", "trust-region", "--exact", *more)
        results.append(json.loads((tmp_path / storage / "summary.json").read_text())["result"])
        listed = (tmp_path / storage / "fields" / "temperature.pvd").read_text()
        times = [float(part.split('"')[0]) for part in listed.split('timestep="')[1:]]
        assert np.allclose(times, np.linspace(0, 1, 17))
    for name in ("J", "misfit", "rms_residual"):
        assert np.isclose(results[1][name], results[0][name], rtol=1e-5), name


@pytest.mark.parametrize(
    ("regime", "solver"), [pytest.param("lossy", "mgrit", marks=pytest.mark.grid), ("cavity", "paradiag")]
)
def test_maxwell_demo(regime, solver, tmp_path):
    """Coarse: 8 x 8 cells of degree 1 and 16 steps; time ranks do not matter: test_maxwell_source."""
    small = ["--regime", regime, "--cells", 8, "--degree", 1, "--steps", 16, "--no-fields"]
    small += ["--time-solver", solver, "--grid", "1x2"]
    done = run(2, *small, "--out", tmp_path, program="maxwell_source_inversion")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["time_solver"] == solver
    assert summary["grid"] == {"space": 1, "time": 2}
    assert summary["result"]["converged"]
    assert "recovered current" in done.stdout
    posterior = summary["posterior"]
    assert np.isclose(posterior["squared_residual"], 2 * posterior["readings"] * summary["result"]["misfit"], rtol=1e-6)
    assert 0 < posterior["mean_standard_deviation"] < 0.1
    for name in ("current.png", "snapshots.png", "field.gif", "sensors.png", "l_curve.png"):
        assert_drawn(tmp_path / name)

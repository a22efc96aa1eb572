"""The demos of optimal control as a user starts them, small: they converge, and write what they say."""

import json

import numpy as np
import pytest

from tests.pictures import assert_drawn
from tests.test_demo import run

pytestmark = pytest.mark.starts_mpi

TRUST_REGION = ["--method", "trust-region", "--time-solver", "serial"]


def test_heat_beside_serial_pyadjoint(tmp_path):
    """Bounds are kept, and serial pyadjoint has the same numbers: J and gradient to 1e-8, a Hessian action to 1e-7."""
    small = ["--cells", 4, "--steps", 4, *TRUST_REGION, "--compare-serial", "--no-fields"]
    done = run(2, "--grid", "1x2", "--out", tmp_path, *small, program="heat_control")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["grid"] == {"space": 1, "time": 2}
    assert summary["values_of_the_control"] == 16
    result = summary["result"]
    assert result["converged"]
    assert result["tracked"]["with control"]["mean"] < 0.4 * result["tracked"]["without control"]["mean"]
    for name in ("left", "bottom", "right", "top"):
        own = result["controls"][f"{name} heater"]
        assert 0 <= own["least"] <= own["largest"] <= 0.8
    assert result["controls"]["top heater"]["at_lower_bound"] > 0.7  # the spot is never there
    table = summary["compare_serial"]
    for name, limit in {"J": 1e-8, "gradient": 1e-8, "Hessian action": 1e-7}.items():
        assert table[name]["relative_difference"] < limit, name
    assert table["end_to_end"]["bntl"]["converged"]
    assert table["end_to_end"]["bntl"]["J"] == pytest.approx(result["J"], rel=1e-8)
    assert "upper one" in done.stdout
    for name in ("control.png", "states.png", "convergence.png", "movie.gif"):
        assert_drawn(tmp_path / name)
    assert not (tmp_path / "fields").exists()


def test_wave(tmp_path):
    """The energy falls, the force stays within its bounds, and ParaView gets state and force."""
    small = ["--cells", 8, "--steps", 16, "--bounds=-2,2", "--time-solver", "serial", "--method", "kkt"]
    run(1, "--out", tmp_path, *small, program="wave_control")
    summary = json.loads((tmp_path / "summary.json").read_text())
    result = summary["result"]
    assert result["converged"]
    assert result["choice"].startswith("kkt")
    free = result["tracked"]["without control"]
    assert free["last"] == pytest.approx(free["mean"], rel=1e-9)  # midpoint steps keep the energy
    assert result["tracked"]["with control"]["last"] < 0.2 * free["last"]
    force = result["controls"]["force"]
    assert -2 <= force["least"] < force["largest"] <= 2
    assert force["at_lower_bound"] + force["at_upper_bound"] > 0.01
    for name, panels in (("control.png", 1), ("states.png", 3), ("convergence.png", 2)):
        assert_drawn(tmp_path / name, panels=panels)
    for name in ("state", "force"):
        listed = (tmp_path / "fields" / f"{name}.pvd").read_text()
        times = [float(part.split('"')[0]) for part in listed.split('timestep="')[1:]]
        assert np.allclose(times, np.linspace(0, 3, 17))


def test_reaction(tmp_path):
    """The drop is carried along; settings are in the summary; quiet, it prints nothing at all."""
    small = ["--cells", 8, "--steps", 8, "--regularisation", 1e-3, "--gtol", 1e-4, *TRUST_REGION, "--no-fields"]
    done = run(1, "--out", tmp_path, *small, "--quiet", program="reaction_control")
    assert (done.stdout, done.stderr) == ("", "")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["settings"]["regularisation"] == 1e-3
    assert summary["settings"]["bounds"] is None
    result = summary["result"]
    assert result["converged"]
    assert result["tracked"]["with control"]["mean"] < 0.1 * result["tracked"]["without control"]["mean"]
    for name, panels in (("control.png", 1), ("states.png", 3)):
        assert_drawn(tmp_path / name, panels=panels)

"""The page on clusters: its script runs, with stand-ins for Slurm, and so does the code on it."""

import os
import re
import shlex
import signal
import stat
import subprocess
import time
from pathlib import Path

import pytest

pytest.importorskip("greenlet")

from pint_fem import commands

ROOT = Path(__file__).resolve().parent.parent
PAGE, SCRIPT = ROOT / "docs" / "tutorials" / "09-cluster.md", ROOT / "docs" / "tutorials" / "two_nodes.sh"
TEXT = PAGE.read_text()
STAND_INS = {
    "srun": 'while [[ "$1" == -* ]]; do shift; done; exec "$@"',
    "scontrol": 'echo "scontrol $*" >> "$CALLS"',
    "python": """echo "python $*" >> "$CALLS"
        echo "threads $OMP_NUM_THREADS" >> "$CALLS"
        ls "$FIREDRAKE_CACHE_DIR" >> "$CALLS"; touch "$FIREDRAKE_CACHE_DIR/kernel.so"; sleep "$SECONDS_OF_RUN\"""",
}


def job(folder, seconds=0, **given):
    """A job of the script, whose programs write their calls to a file."""
    programs = folder / "bin"
    programs.mkdir(exist_ok=True)
    for name, text in STAND_INS.items():
        (programs / name).write_text(f"#!/bin/bash\n{text}\n")
        (programs / name).chmod(stat.S_IRWXU)
    (programs / "activate").touch()
    env = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "SLURM", "FIREDRAKE"))} | {
        "PATH": f"{programs}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "7",
        "SLURM_NNODES": "2", "SHARED": str(folder / "shared"), "TMPDIR": str(folder), "CALLS": str(folder / "calls"),
        "PINT_FEM_VENV": str(folder), "SECONDS_OF_RUN": str(seconds),
    }  # fmt: skip
    return subprocess.Popen(["bash", SCRIPT], env=env | given, stdout=subprocess.PIPE, text=True)


def calls(folder):
    return (folder / "calls").read_text().splitlines() if (folder / "calls").is_file() else []


def test_the_script_is_one_for_two_nodes():
    subprocess.run(["bash", "-n", SCRIPT], check=True)
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", SCRIPT.read_text(), re.M))
    assert options["nodes"] == "2"
    assert options["distribution"] == "block:block"
    assert options["signal"].startswith("B:USR1@")
    assert {"requeue", "exclusive"} <= set(options)
    assert "--distribution=block:block --cpu-bind=cores" in TEXT


def test_a_job_runs_the_demo_and_keeps_its_kernels(tmp_path):
    made = job(tmp_path, GRID="2x32")
    assert made.wait(60) == 0
    first = calls(tmp_path)
    words = shlex.split(first[0])
    assert words[:2] == ["python", "demos/heat_source_inversion.py"]
    assert words[words.index("--grid") + 1] == "2x32"
    assert words[words.index("--checkpoint") + 1] == str(tmp_path / "shared" / "run.h5")
    assert first[1:] == ["threads 1"]
    # the next job, on nodes with empty disks, finds what the first one has compiled
    (tmp_path / "calls").unlink()
    assert job(tmp_path, SLURM_JOB_ID="8").wait(60) == 0
    words = shlex.split(calls(tmp_path)[0])
    assert words[words.index("--grid") + 1] == "auto"
    assert calls(tmp_path)[2] == "kernel.so"


def test_a_job_at_its_time_limit_is_queued_again(tmp_path):
    made = job(tmp_path, seconds=3)
    for _ in range(100):
        if calls(tmp_path):
            break
        time.sleep(0.1)
    made.send_signal(signal.SIGUSR1)
    made.wait(60)
    assert "scontrol requeue 7" in calls(tmp_path)
    assert "goes on from" in made.stdout.read()


PLANS = [line.split("  ")[0] for line in re.findall(r"^pint-fem (plan heat-source .*)$", TEXT, re.M)]


@pytest.mark.parametrize("line", PLANS)
def test_plans_of_the_page(line, capsys):
    """On fewer ranks."""
    commands.command(shlex.split(re.sub(r"--ranks \d+", "--ranks 2", line)))
    assert "all figures predicted" in capsys.readouterr().out


@pytest.mark.parallel([1, 2])
def test_code_of_the_page():
    (block,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    names = {}
    exec(compile(block, "09-cluster.md", "exec"), names)
    assert names["found"].grid == f"1x{names['spacetime'].comm.size}"
    assert names["J"].problem.sweeps.evolution.nsteps == 64


def test_links_of_the_page():
    found = re.findall(r"\]\(([^)#]+)", TEXT)
    assert found
    assert all((PAGE.parent / link).exists() for link in found)
    assert "(docs/tutorials/09-cluster.md)" in (ROOT / "README.md").read_text()

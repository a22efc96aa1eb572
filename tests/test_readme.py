"""The code of the README, of pages of the guide and of the core's page runs, and the numbers of the core's page are
those of the code.
"""

import ast
import itertools
import math
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from demos.draw_cycle import in_turn, one_cycle, rows_of, write
from pint_fem.mgrit import MGRIT, MGRITOptions
from pint_fem.theory import dirk_stability, two_level_bound

ROOT = Path(__file__).resolve().parent.parent
README, PAGE = ROOT / "README.md", ROOT / "pint_fem" / "mgrit" / "README.md"


def blocks(path):
    return re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)


def table(first_cell):
    """Rows of the page's table whose head begins with ``first_cell``, as lists of cells."""
    rest = PAGE.read_text().partition(f"\n| {first_cell} |")[2]
    assert rest, first_cell
    rows = list(itertools.takewhile(lambda line: line.startswith("|"), rest.split("\n")[1:]))
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[1:]]


GUIDE = ROOT / "docs" / "guide"


@cache
def executed(path):
    """What the blocks of a page define, in order; a block that begins with imports begins anew."""
    parts = []
    for number, block in enumerate(blocks(path)):
        names = {} if block.startswith(("from ", "import ")) or not parts else dict(parts[-1])
        exec(compile(block, f"{path.name}, block {number}", "exec"), names)
        parts.append(names)
    return parts


@pytest.mark.parallel([1, 3])
def test_blocks_of_the_readme():
    """The inverse problem is solved by the map, and the network learns in one epoch, on all ranks."""
    inverse, network = executed(README)
    assert inverse["result"].converged
    assert inverse["result"].choice.startswith("map")
    J = inverse["J"]
    assert J.problem.value(inverse["result"].x) < J.problem.value(np.zeros(J.layout.size))
    assert network["loss"].item() < 2.0  # log(10) = 2.3 by chance


@pytest.mark.parallel([1, 3])
def test_blocks_of_the_heat_page():
    """A converged minimisation, then the posterior and its stream: the last law is that of all readings."""
    first, names = executed(GUIDE / "heat.md")
    assert first["result"].converged
    assert first["source"].function_space() == first["V"]
    every, last = names["posterior"], names["law"]
    scale = np.abs(every.x).max(initial=1e-300)
    assert np.allclose(last.x, every.x, rtol=0, atol=1e-8 * scale)
    assert np.allclose(last.variance(), every.variance(), rtol=1e-8)
    assert len(names["samples"]) == 4
    assert names["later"].x.shape == every.x.shape
    assert 0 < names["chosen"].alpha


@pytest.mark.parallel([1, 3])
def test_blocks_of_the_page_on_coefficients():
    """The experiments are solved together, and the sum decreases."""
    names = executed(GUIDE / "coefficients.md")[-1]
    J, result = names["J"], names["result"]
    assert J.problem.value(result.x) < J.problem.value(np.zeros(J.layout.size))
    assert J.problem.terms[0].problem._joint


def test_the_readme_is_a_screen_or_two():
    lines = README.read_text().splitlines()
    assert len(lines) <= 120
    assert all(len(line) <= 110 for line in lines if not line.startswith(("|", "![")))
    picture = ROOT / re.search(r"!\[[^]]*\]\((\S+\.gif)\)", README.read_text())[1]
    assert picture.stat().st_size < 900_000
    with Image.open(picture) as moving:
        assert moving.n_frames > 10


@pytest.mark.parametrize("path", [README, ROOT / "problems" / "README.md", *sorted(GUIDE.glob("*.md"))], ids=str)
def test_links(path):
    """Files that are linked exist, but for pictures that the build of the site draws."""
    found = re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", path.read_text())
    assert all((path.parent / link).exists() for link in found if "_build/" not in link), found
    drawn = re.findall(r"_build/pictures/(\w+)-(?:light|dark)\.svg", path.read_text())
    assert all((ROOT / "docs" / "pictures" / f"{name}.py").is_file() for name in drawn)


# -- the page of the MGRIT core ----------------------------------------------------------------------------------------
@pytest.mark.parallel([1, 3])
def test_block_of_the_core(log_lines):
    """It gives what sequential stepping gives, within the theory's factor a cycle, and prints what the page shows."""
    names = {}
    exec(compile(blocks(PAGE)[0], "page of the core", "exec"), names)
    U, G, step, result = (names[name] for name in ("U", "G", "fine", "result"))
    sequential = np.zeros_like(U)
    for n in range(256):
        sequential[n + 1] = sequential[n] @ step.inverse + G[n]
    assert result.converged
    # the residual is 1e-8 of the trajectory, and a step of the slowest mode keeps less than 0.97
    assert np.abs(U - sequential).max() <= 1e-7 * np.abs(sequential).max()
    assert result.factor <= float(dict(zip(["", *"2 4 8 16 64".split()], table_of_factors()[1], strict=True))["8"])
    printed = [line.split() for line in log_lines]
    shown = re.findall(r"^  mgrit +(\d+) residual (\S+) relative (\S+)", PAGE.read_text(), re.MULTILINE)
    assert int(shown[-1][0]) == result.cycles == len(printed) - 1
    for cycle, *values in shown:
        line = printed[int(cycle)]
        assert np.allclose([float(line[3]), float(line[5])], [float(v) for v in values], rtol=1e-3)


def table_of_factors():
    return table("integrator on both levels, relaxation | m = 2 | 4 | 8 | 16 | 64")


def test_factors_of_the_page():
    """Of heat, rounded: the order of the rows is backward Euler F, FCF, SDIRK2 F, FCF."""
    gamma = 1 - 1 / math.sqrt(2)
    tableaux = {
        "backward Euler": ([[1]], [1]),
        "L-stable SDIRK2": ([[gamma, 0], [1 - gamma, gamma]], [1 - gamma, gamma]),
    }
    z, rows = -np.logspace(-4, 4, 20001), table_of_factors()
    assert len(rows) == 4
    for what, *factors in rows:
        name, relax = what.split(", ")
        R = lambda m, tableau=tableaux[name]: dirk_stability(*tableau, m * z)
        bounds = [two_level_bound(R(1), R(m), m, relax=relax) for m in (2, 4, 8, 16, 64)]
        assert [f"{b:.4f}" for b in bounds] == factors, what


def test_options_of_the_page():
    """All of them, with their defaults."""
    rows = table("option | default | what")
    defaults = {name.strip("`"): ast.literal_eval(value.strip("`")) for name, value, _ in rows}
    assert len(rows) == len(defaults)
    # of_levels is no option: it notes which levels options were given for
    assert set(defaults) == set(MGRITOptions.names())
    assert MGRITOptions(**defaults) == MGRITOptions()


class Decay:
    def __init__(self, dt):
        self.dt = dt

    def step(self, steps, u, out):
        out[...] = u / (1 + self.dt)


def calls(factors, cycles, *, forced=False, **options):
    """Calls of Phi on each level, per step of the level; ``forced``: with restricted right-hand sides."""
    nsteps = 2 * math.prod(factors)
    strides = np.cumprod([1, *factors])
    options = {"coarsening": factors, "rtol": 0, "max_it": cycles, "check": "cycle", **options}
    solver = MGRIT([Decay(0.01 * s) for s in strides], nsteps, options=options, linear=forced)
    U = np.ones((nsteps + 1, 1))
    solver.solve(U, np.ones((nsteps, 1)) if forced else None)
    return np.array([level.phi_calls / level.nsteps for level in solver.levels])


def formula(text, *, nu, m, level, coarsest):
    """A cell of the page's table of costs, as a number."""
    text = text.strip("$").replace(r"\nu", "nu").replace("2L", "2 * L").replace(")(", ") * (")
    text = re.sub(r"\bl \(", "l * (", text)
    return eval(text, {"nu": nu, "m": m, "l": level, "L": coarsest})


@pytest.mark.parametrize("relax", [0, 1, 2])
@pytest.mark.parametrize("factors", [(8, 4), (4, 2, 3)])
def test_costs_of_the_page(factors, relax):
    """Counted, against the table and the text under it."""
    rows, coarsest = table('level | a V-cycle | an F-cycle | once: `start="nested"`'), len(factors)
    assert len(rows) == 3

    def costs(column):
        kinds = [0, *[1] * (coarsest - 1), 2]
        return [
            formula(rows[kind][column], nu=relax, m=[*factors, 1][level], level=level, coarsest=coarsest)
            for level, kind in enumerate(kinds)
        ]

    once = np.eye(coarsest + 1)[0]
    for column, cycle in ((1, "V"), (2, "F")):
        one, two = (calls(factors, k, relax=relax, cycle=cycle) for k in (1, 2))
        assert np.allclose(two - one, costs(column))
        assert np.allclose(one, once + costs(column))
        looked = calls(factors, 1, relax=relax, cycle=cycle, check="relaxed")
        assert np.allclose(looked, one + relax * once)
    nested = calls(factors, 1, relax=relax, start="nested")
    assert np.allclose(nested, once + np.add(costs(1), costs(3)))
    forced = calls(factors, 1, relax=relax, start="nested", forced=True)
    assert np.allclose(forced, nested + 1 - once)


def test_sums_of_the_page():
    """Calls per fine step of ``(8, 4)``, nested, and the break-even for one cycle and for four."""
    per_step = np.array([1, 1 / 8, 1 / 32])
    for relax, each, start in ((1, "2.53 K", "1.44"), (0, "1.41 K", "1.31")):
        assert f"${each} + {start}$" in PAGE.read_text()
        one, two = (per_step @ calls((8, 4), k, relax=relax, start="nested") for k in (1, 2))
        assert f"{two - one:.2f}" == each.split()[0]
        assert f"{2 * one - two:.2f}" == start
    time = lambda ranks, K, gain=2.1: (2.5 * K + 1.38) / (gain * ranks) + (K + 2) / 32
    assert time(2, 1) > 1 > time(3, 1)
    assert time(6, 4) > 1 > time(7, 4)


def test_figure(tmp_path):
    """As a user starts it and in this process the same bytes, small, and the words of the page's figure."""
    started, here = tmp_path / "started.svg", tmp_path / "here.svg"
    env = {k: v for k, v in os.environ.items() if not k.startswith(("OMPI_", "PMIX", "ORTE"))}
    env |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    command = [sys.executable, "demos/draw_cycle.py", "--out", str(started)]
    subprocess.run(command, cwd=ROOT, env=env, capture_output=True, check=True, timeout=60)
    write(here)
    assert started.read_bytes() == here.read_bytes()
    assert here.stat().st_size < 60_000
    words = lambda path: re.findall(r"<text[^>]*>([^<]*)</text>", path.read_text())
    assert len(words(here)) > 30
    assert words(here) == words(PAGE.with_name("cycle.svg"))


def test_levels_of_the_figure():
    """In turn; the first relaxation takes F- and C-steps twice, the residual among them."""
    for kind, levels in (("V", [0, 1, 2, 1, 0]), ("F", [0, 1, 2, 1, 2, 1, 0])):
        grids, stages = one_cycle(kind)
        assert [row[0][1] for row in rows_of(stages)] == levels
        what, index, steps = stages[0]
        assert (what, index) == ("relax", 0)
        assert in_turn(grids[0], steps) == ["F", "C", "F", "C"]
        assert sorted(steps) == sorted(2 * list(range(16)))

"""What the site's pages on MGRIT and its convergence state in numbers is what the code does."""

import itertools
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from demos.draw_cycle import in_turn, one_cycle, rows_of, write
from pint_fem.mgrit import MGRIT
from pint_fem.theory import dirk_stability, two_level_bound

ROOT = Path(__file__).resolve().parent.parent
THEORY = ROOT / "docs" / "theory"
PAGE, CONVERGENCE = THEORY / "mgrit.md", THEORY / "convergence.md"


def blocks(path):
    return re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)


def table(first_cell, page=PAGE):
    """Rows of the page's table whose head begins with ``first_cell``, as lists of cells."""
    rest = page.read_text().partition(f"\n| {first_cell} |")[2]
    assert rest, first_cell
    rows = list(itertools.takewhile(lambda line: line.startswith("|"), rest.split("\n")[1:]))
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[1:]]


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
    assert len(blocks(PAGE)) == 1
    printed = [line.split() for line in log_lines]
    shown = re.findall(r"^  mgrit +(\d+) residual (\S+) relative (\S+)", PAGE.read_text(), re.MULTILINE)
    assert int(shown[-1][0]) == result.cycles == len(printed) - 1
    for cycle, *values in shown:
        line = printed[int(cycle)]
        assert np.allclose([float(line[3]), float(line[5])], [float(v) for v in values], rtol=1e-3)


def table_of_factors():
    return table("integrator on both levels, relaxation | m = 2 | 4 | 8 | 16 | 64", CONVERGENCE)


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

"""The page of the optimisers: its code runs and finds what it says, its tables of options are those of the code."""

import ast
import inspect
import itertools
import math
import os
import re
from dataclasses import asdict
from pathlib import Path

from firedrake import assemble, dx
from mpi4py import MPI

from pint_fem.optimize import InexactOptions, minimize_trust_region

PAGES = Path(__file__).resolve().parent.parent / "docs" / "theory"
PAGE, OPTIONS = PAGES / "optimisers.md", PAGES / "options.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


def test_code(tmp_path, capsys):
    """The blocks one after another; a run that goes on ends where one does that was never stopped, and all optimisers
    in the same minimum.
    """
    names, before = {}, Path.cwd()
    os.chdir(MPI.COMM_WORLD.bcast(str(tmp_path)))
    try:
        for number, block in enumerate(BLOCKS):
            exec(compile(block, f"block {number} of the page", "exec"), names)
            if number == 0:
                assert names["result"].converged
                assert names["k_found"].function_space() == names["R"]
            if number == 1:
                assert names["continued"].converged
                assert names["stopped"].iterations == 1
                assert names["continued"].history[1] == names["stopped"].history[1]
                assert abs(names["continued"].value - names["result"].value) <= 1e-6 * names["result"].value
    finally:
        os.chdir(before)
    best = names["by_ours"]
    size = assemble(best**2 * dx)
    for other in ("by_scipy", "by_tao", "by_trust_krylov"):
        assert assemble((names[other] - best) ** 2 * dx) <= 1e-8 * size, other
    assert names["result"].converged
    found = names["both"].function(names["result"].x)
    assert found.dat.data_ro.min(initial=0.0) >= 0


def table(section, first_cell):
    """Names and default values of a table of the page of options."""
    rest = OPTIONS.read_text().partition(f"\n## {section}\n")[2].partition(f"\n| {first_cell} |")[2]
    rows = list(itertools.takewhile(lambda line: line.startswith("|"), rest.split("\n")[1:]))[1:]
    cells = [[cell.strip().strip("`") for cell in row.strip("|").split("|")] for row in rows]
    return {name: math.inf if value == "inf" else ast.literal_eval(value) for name, value, *_ in cells}


def test_options():
    parameters = inspect.signature(minimize_trust_region).parameters.values()
    assert table("Trust region", "option") == {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    assert table("Inexact sweeps", "inexact option") == asdict(InexactOptions())

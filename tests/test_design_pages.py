"""The design pages: their examples run, and a real run makes the calls that they list."""

import re
import sys
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest
from firedrake import Function, FunctionSpace, SpatialCoordinate, TestFunction, UnitSquareMesh, dx, grad, inner
from irksome import Dt

import pint_fem as pf

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "pint_fem"
DESIGN = ROOT / "docs" / "design"


def test_examples_run():
    """Those of the page on extensions, one after another."""
    names, text = {}, (DESIGN / "extending.md").read_text()
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", text, re.DOTALL)):
        exec(compile(block, f"extending.md block {number}", "exec"), names)
    assert {"FourthPower", "Splitting", "Jacobi", "Gated", "Scaling"} <= set(names)


def trees():
    """Pairs of a function and one of those that it calls, by the indentation of the page's trees, in their order."""
    for tree in re.findall(r"```text\n(.*?)```", (DESIGN / "way-of-a-value.md").read_text(), re.DOTALL):
        callers = {}
        for line in tree.splitlines():
            depth, name = len(line) - len(line.lstrip()), line.split()[0]
            callers = {d: caller for d, caller in callers.items() if d < depth}
            yield (callers[max(callers)] if callers else None), name
            callers[depth] = name


@cache
def calls():
    """For each function of the package the functions that have called it in a run, directly or through others."""
    mesh = UnitSquareMesh(4, 4)
    V = FunctionSpace(mesh, "CG", 1)
    u, v, q, (x, _) = Function(V), TestFunction(V), Function(V, name="q"), SpatialCoordinate(mesh)
    F = Dt(u) * v * dx + inner(grad(u), grad(v)) * dx - q * v * dx
    found = defaultdict(set)

    def profile(frame, event, arg):
        if event != "call" or not frame.f_code.co_filename.startswith(str(PACKAGE)):
            return
        callers, caller = found[name_of(frame.f_code)], frame.f_back
        while caller is not None:
            if caller.f_code.co_filename.startswith(str(PACKAGE)):
                callers.add(name_of(caller.f_code))
            caller = caller.f_back

    @cache
    def name_of(code):
        module = ".".join(Path(code.co_filename).relative_to(PACKAGE).with_suffix("").parts)
        return f"{module}.{code.co_qualname}"

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        heat = pf.Evolution(F, u, tableau=pf.BackwardEuler(), dt=1 / 32, nsteps=32, control=q)
        J = pf.TimeParallelReducedFunctional(
            heat, pf.RunningMisfit((u - x) ** 2 * dx), regularisation=q**2 * dx, spacetime=pf.SpaceTime()
        )
        for _ in range(2):  # the second control begins with the first one's trajectory
            J(q)
            J.derivative()
            J.hessian(q)
            q.assign(1)
    finally:
        sys.setprofile(before)
    return found


@pytest.mark.skipif(sys.version_info < (3, 11), reason="code objects have no qualified names")
def test_a_run_makes_the_calls_of_the_page():
    listed, found = list(trees()), calls()
    assert len(listed) > 50
    missing = [name for _, name in listed if name not in found]
    assert not missing
    assert not [(caller, name) for caller, name in listed if caller is not None and caller not in found[name]]


def test_named_files_exist():
    """Files and modules that the pages name in code font."""
    for page in DESIGN.glob("*.md"):
        for name in re.findall(r"`((?:pint_fem|tests|docs|problems|demos)/[\w/.-]*\w)`", page.read_text()):
            assert (ROOT / name).exists(), f"{page.name}: {name}"
        for name in re.findall(r"`pint_fem\.([\w.]+)`", page.read_text()):
            parts = name.split(".")
            folders = [PACKAGE.joinpath(*parts[: n + 1]) for n in range(len(parts))]
            assert any(f.is_dir() or f.with_suffix(".py").exists() for f in folders), f"{page.name}: {name}"

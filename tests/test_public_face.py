"""What ``import pint_fem`` offers, what it needs for that, and how it is packaged."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import pint_fem

ROOT = Path(__file__).parents[1]


def static_imports():
    """Names that type checkers and editors find, with the modules that they name for them."""
    tree = ast.parse((ROOT / "pint_fem" / "__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
    return {alias.name: node.module for node in block.body for alias in node.names}


def test_type_checkers_see_the_names_that_are_loaded_on_first_use():
    assert static_imports() == pint_fem._MODULE_OF


@pytest.mark.parametrize("name", pint_fem.__all__)
def test_a_public_name_is_there_and_documented(name):
    found = getattr(pint_fem, name)
    assert found.__name__ == name or name == "BackwardEuler"
    assert found.__doc__
    assert name in dir(pint_fem)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'pint_fem' has no attribute 'Evolutoin'"):
        pint_fem.Evolutoin  # noqa: B018


def project():
    return pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text())


def test_the_version_is_written_once():
    assert "version" in project()["project"]["dynamic"]
    assert project()["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "pint_fem.__version__"}
    assert f"\nversion: {pint_fem.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"## {pint_fem.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_core_requires_numpy_and_mpi4py_and_is_typed():
    assert [r.split(">")[0] for r in project()["project"]["dependencies"]] == ["numpy", "mpi4py"]
    assert "py.typed" in project()["tool"]["setuptools"]["package-data"]["pint_fem"]
    assert (ROOT / "pint_fem" / "py.typed").is_file()


FIREDRAKE = {"firedrake", "irksome", "ufl", "pyadjoint", "petsc4py", "petsctools", "h5py"}
EXTRAS = {"torch", "matplotlib", "vtk", "rich", "greenlet", "sklearn"}
EVOLUTION = "from pint_fem import TimeParallelReducedFunctional, PointSensors, check_sweeps"


@pytest.mark.parametrize(
    ("hidden", "program"),
    [(EXTRAS, EVOLUTION), (FIREDRAKE | EXTRAS - {"torch"}, "from pint_fem import LayerParallelResNet")],
    ids=["finite elements", "networks"],
)
def test_a_part_is_imported_where_only_its_own_extra_is_installed(hidden, program):
    text = f"import sys\nfor name in {hidden}: sys.modules[name] = None\n{program}"
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("OMPI_", "PMIX", "ORTE", "PMI"))}
    environment |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    subprocess.run([sys.executable, "-c", text], check=True, env=environment, timeout=120)


def unannotated(tree, inside=None):
    """Public functions and methods, with those of public classes, that lack a type of a parameter or the result."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from unannotated(node, node)
        elif isinstance(node, ast.FunctionDef) and (not node.name.startswith("_") or node.name.startswith("__")):
            given = node.args
            parameters = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
            static = any(ast.unparse(decorator) == "staticmethod" for decorator in node.decorator_list)
            typed = [p.annotation for p in parameters[int(inside is not None and not static) :] if p is not None]
            if None in typed or (node.returns is None and node.name != "__init__"):
                yield f"{inside.name + '.' if inside else ''}{node.name}"


def test_public_functions_have_types():
    files = [path for path in (ROOT / "pint_fem").rglob("*.py") if path.parent.name != "programs"]  # which users copy
    found = {path.name: list(unannotated(ast.parse(path.read_text()))) for path in files}
    assert {name: functions for name, functions in found.items() if functions} == {}

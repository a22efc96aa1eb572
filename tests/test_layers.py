"""The layers of the package: imports go downward only, and files and folders stay small enough to be read."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "pint_fem"
# from the bottom; modules of one layer do not import each other
LAYERS = (
    ("errors", "digests"),
    ("collective",),
    ("communicators", "files", "capacity", "petsc_options"),
    ("all_at_once",),
    ("spacetime",),
    ("kernels", "optimize", "mgrit"),
    ("paradiag",),
    ("cli",),
    ("evolution",),
    ("propagators",),
    ("theory",),
    ("sweeps",),
    ("misfits",),
    ("output",),
    ("adjoint",),
    ("resnet",),
    ("scaling",),
    ("commands",),
)
HEIGHT = {part: height for height, layer in enumerate(LAYERS) for part in layer}
FIREDRAKE = {"kernels", "evolution", "propagators", "theory", "sweeps", "misfits", "adjoint", "output", "spacetime"}
"""Packages that may import Firedrake."""
FILES = sorted(PACKAGE.rglob("*.py"))


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


def imports(path, *, typing=True):
    """Names of all modules that a file imports, those inside functions included."""
    found = set()
    tree = ast.parse(path.read_text())
    skipped = set()
    for node in ast.walk(tree):
        if not typing and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            skipped |= {id(inner) for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name for name in full if name in MODULES} or {node.module}
    return found


def part_of(module):
    return module.split(".")[1] if module.startswith("pint_fem.") else None


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_downward(path):
    own = part_of(module_name(path))
    for module in imports(path):
        assert module.split(".")[0] not in ("problems", "demos", "tests"), f"{path} imports {module}"
        if own is None or not module.startswith("pint_fem"):
            continue
        other = part_of(module)
        assert other is not None, f"{path} imports the package itself: name the module"
        assert other == own or HEIGHT[other] < HEIGHT[own], f"{own} imports {module}, which is not below it"


def test_modules_import_each_other_in_no_circle():
    graph = {
        name: {m for m in imports(path, typing=False) if m in MODULES and m != name and not m.endswith("__init__")}
        for name, path in MODULES.items()
    }
    done, path = set(), []

    def visit(name):
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name in done:
            return
        path.append(name)
        for other in graph[name]:
            visit(other)
        path.pop()
        done.add(name)

    for name in graph:
        visit(name)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_finite_elements_import_firedrake_and_only_networks_torch(path):
    own = part_of(module_name(path))
    roots = {module.split(".")[0] for module in imports(path)}
    if own not in FIREDRAKE | {"scaling", None}:
        inside = {"firedrake", "irksome", "ufl", "pyadjoint"} & roots
        assert not inside or own == "petsc_options", f"{path} imports {inside}"
    if own not in ("resnet", "scaling", None):
        assert "torch" not in roots


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_has_at_most_400_lines_and_begins_with_what_it_is_for(path):
    text = path.read_text()
    assert text.count("\n") <= 400
    assert ast.get_docstring(ast.parse(text)), "a module begins with a sentence on what it computes"


@pytest.mark.parametrize("folder", sorted({path.parent for path in FILES}), ids=lambda f: str(f.relative_to(ROOT)))
def test_a_package_has_at_most_15_files(folder):
    assert len([p for p in folder.glob("*.py") if p.name != "__init__.py"]) <= 15

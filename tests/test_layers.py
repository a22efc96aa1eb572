"""The layers of the package: imports go downward only, and files and folders stay small enough to be read."""

import ast
from collections import Counter
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "pint_fem"
# from the bottom; modules of one layer do not import each other
LAYERS = (
    ("errors", "digests", "progress", "requirements"),
    ("logs",),
    ("collective",),
    ("communicators", "files", "capacity", "petsc_options"),
    ("all_at_once", "array_file"),
    ("meshes",),
    ("spacetime",),
    ("kernels", "optimize", "mgrit"),
    ("paradiag",),
    ("cli",),
    ("evolution",),
    ("propagators",),
    ("theory",),
    ("sweeps",),
    ("misfits",),
    ("inverse", "kkt"),
    ("paraview",),
    ("adjoint",),
    ("resnet",),
    ("scaling",),
    ("commands",),
)
HEIGHT = {part: height for height, layer in enumerate(LAYERS) for part in layer}
FIREDRAKE = {
    *("kernels", "evolution", "propagators", "theory", "sweeps", "misfits", "inverse", "kkt", "adjoint", "paraview"),
    *("meshes", "spacetime"),
}
"""Packages that may import Firedrake."""
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent.name != "programs")
"""Without the programs that ``pint-fem demo`` copies, which are a user's."""


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


@cache
def nodes(path):
    """All nodes of a file's syntax tree, and those that only type checkers see."""
    found = list(ast.walk(ast.parse(path.read_text())))
    typing = [node for node in found if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)]
    return found, {inner for node in typing for inner in ast.walk(node)}


def imports(path, *, typing=True):
    """Names of all modules that a file imports, those inside functions included."""
    found = set()
    every, unseen = nodes(path)
    for node in every:
        if not typing and node in unseen:
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


def misplaced(path):
    """What is wrong with the imports of a file, in words."""
    own = part_of(module_name(path))
    for module in imports(path):
        if module.split(".")[0] in ("problems", "demos", "tests"):
            yield f"{path} imports {module}"
        elif own is not None and module.startswith("pint_fem"):
            other = part_of(module)
            if other is None:
                yield f"{path} imports the package itself: name the module"
            elif other != own and HEIGHT[other] >= HEIGHT[own]:
                yield f"{path} imports {module}, which is not below {own}"


def test_imports_go_downward():
    assert not [words for path in FILES for words in misplaced(path)]


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


def test_only_finite_elements_import_firedrake_and_only_networks_torch():
    wrong = []
    for path in FILES:
        own = part_of(module_name(path))
        roots = {module.split(".")[0] for module in imports(path)}
        if own not in FIREDRAKE | {"scaling", "petsc_options", None}:
            wrong += [f"{path} imports {name}" for name in roots & {"firedrake", "irksome", "ufl", "pyadjoint"}]
        if own not in ("resnet", "scaling", None) and "torch" in roots:
            wrong.append(f"{path} imports torch")
    assert not wrong


def test_a_module_has_at_most_400_lines_and_begins_with_a_sentence_on_what_it_computes():
    texts = {path: path.read_text() for path in FILES}
    assert not [path for path, text in texts.items() if text.count("\n") > 400]
    assert not [path for path in FILES if not ast.get_docstring(nodes(path)[0][0])]


def test_a_package_has_at_most_15_files():
    counts = Counter(path.parent for path in FILES if path.name != "__init__.py")
    assert not {folder: count for folder, count in counts.items() if count > 15}

"""Pages of the API: which members they show, attributes of base classes, and references to names wherever they are.

A docstring may refer to anything of the package by the module that defines it. Such a reference becomes a link where
the object has a page, under whatever name, and plain text where it has none; a name that does not exist is a warning.
"""

import ast
import importlib
import inspect
from functools import cache, cached_property
from pathlib import Path

from numpydoc.docscrape import NumpyDocString
from sphinx.util.nodes import make_refnode

import pint_fem

PACKAGE = Path(pint_fem.__file__).parent


def skip_member(app, what, name, obj, skip, options):
    """Members that are no method or property, or that another package defines, are not shown."""
    if isinstance(obj, property):
        function = obj.fget
    elif isinstance(obj, cached_property):
        function = obj.func
    else:
        function = inspect.unwrap(obj) if callable(obj) and not inspect.isclass(obj) else None
    if function is None or not (getattr(function, "__module__", "") or "").startswith("pint_fem"):
        return True
    return None


def attributes_of(cls):
    """Entries of the section "Attributes" of a class's own docstring."""
    text = vars(cls).get("__doc__") or ""
    return NumpyDocString(inspect.cleandoc(text))["Attributes"] if "Attributes" in text else []


def add_inherited_attributes(app, what, name, obj, options, lines):
    """Append the attributes that the docstrings of base classes describe to those of a class."""
    if what not in ("class", "exception") or not inspect.isclass(obj):
        return
    listed = {n.strip() for entry in attributes_of(obj) for n in entry.name.split(",")}
    added = []
    for base in obj.__mro__[1:]:
        if base.__module__.startswith("pint_fem"):
            for entry in attributes_of(base):
                if not listed & {n.strip() for n in entry.name.split(",")}:
                    added += [f"{entry.name} : {entry.type}" if entry.type else entry.name]
                    added += [f"    {line}" for line in entry.desc]
                    listed |= {n.strip() for n in entry.name.split(",")}
    if not added:
        return
    heads = [i for i, line in enumerate(lines[:-1]) if line.strip() and set(lines[i + 1].strip()) == {"-"}]
    own = next((i for i in heads if lines[i].strip() == "Attributes"), None)
    if own is None:
        lines += ["", "Attributes", "----------", *added]
        return
    end = next((i for i in heads if i > own), len(lines))
    while not lines[end - 1].strip():
        end -= 1
    lines[end:end] = added


# -- references --------------------------------------------------------------------------------------------------------
@cache
def defining_modules():
    """Modules of the package that define a name at their top level, by the name."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        for node in ast.parse(path.read_text()).body:
            targets = getattr(node, "targets", [getattr(node, "target", node)])
            for target in targets:
                name = getattr(target, "name", getattr(target, "id", None))
                if name:
                    found.setdefault(name, []).append(module)
    return found


MISSING = object()


def found_object(dotted):
    """The object with a dotted name, or ``MISSING``."""
    parts = dotted.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:count]))
        except ImportError:
            continue
        for i, name in enumerate(parts[count:]):
            if inspect.isclass(found) and i == len(parts[count:]) - 1 and name in attribute_names(found):
                return found
            found = inspect.getattr_static(found, name, MISSING) if inspect.isclass(found) else getattr(
                found, name, MISSING
            )  # fmt: skip
            if found is MISSING:
                break
        return found
    return MISSING


def attribute_names(cls):
    """Names that the docstrings of a class and its bases list as parameters or attributes, and annotated ones."""
    names = set()
    for base in cls.__mro__:
        if base.__module__.startswith("pint_fem"):
            names |= set(vars(base).get("__annotations__", {}))
            names |= {n.strip() for entry in attributes_of(base) for n in entry.name.split(",")}
    return names


@cache
def page_of(app):
    """Documented names by the identity of their objects."""
    found = {}
    for name in app.env.domains["py"].objects:
        obj = found_object(name)
        if obj is not MISSING and not isinstance(obj, (int, float, str, tuple, type(None))):
            found.setdefault(id(obj), name)
    return found


def resolve(app, env, node, contnode):
    """A link to an object's page, the text alone where it has none, and nothing for a name that does not exist."""
    if node.get("refdomain") != "py":
        return None
    target = node["reftarget"].removesuffix("()")
    context = [node.get("py:module"), ".".join(filter(None, (node.get("py:module"), node.get("py:class"))))]
    head = target.partition(".")[0]
    names = [target, *(f"{place}.{target}" for place in context if place)]
    names += [f"{module}.{target}" for module in defining_modules().get(head, ())]
    domain = env.domains["py"]
    for name in names:
        obj = found_object(name)
        if obj is MISSING:
            continue
        page = page_of(app).get(id(obj))
        if page is None:
            return contnode
        entry = domain.objects[page]
        return make_refnode(app.builder, node["refdoc"], entry.docname, entry.node_id, contnode, page)
    return None


def setup(app):
    """Register with Sphinx."""
    app.connect("autodoc-skip-member", skip_member)
    app.connect("autodoc-process-docstring", add_inherited_attributes, priority=400)  # numpydoc's is 500
    app.connect("missing-reference", resolve)
    return {"parallel_read_safe": True}

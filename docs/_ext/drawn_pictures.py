"""Draws the pictures of the site before its pages are read.

A program ``docs/pictures/NAME.py`` with a function ``draw(path, dark)`` gives ``docs/_build/pictures/NAME-light.svg``
and ``NAME-dark.svg``. A picture is drawn again when its program, the style or the data beside it is newer.
"""

import importlib.util
import sys
from functools import cache
from pathlib import Path

from sphinx.util import logging
from sphinx.util.display import status_iterator

logger = logging.getLogger(__name__)


@cache
def load(program):
    """The module of a program, which may import those beside it."""
    if str(program.parent) not in sys.path:
        sys.path.insert(0, str(program.parent))
    spec = importlib.util.spec_from_file_location(f"pictures_{program.stem}", program)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def draw_pictures(app):
    """All pictures that are missing or older than what they are made from."""
    source, target = Path(app.srcdir) / "pictures", Path(app.srcdir) / "_build" / "pictures"
    target.mkdir(parents=True, exist_ok=True)
    programs = [path for path in sorted(source.glob("*.py")) if "\ndef draw(path, dark" in path.read_text()]
    shared = [path.stat().st_mtime for path in source.iterdir() if path not in programs and path.is_file()]
    wanted = []
    for program in programs:
        newest = max([program.stat().st_mtime, *shared])
        for dark in (False, True):
            path = target / f"{program.stem}-{'dark' if dark else 'light'}.svg"
            if not path.is_file() or path.stat().st_mtime < newest:
                wanted.append((program, path, dark))
    for program, path, dark in status_iterator(wanted, "drawing pictures... ", length=len(wanted),
                                               stringify_func=lambda item: item[1].name):  # fmt: skip
        load(program).draw(path, dark)


def setup(app):
    """Register with Sphinx."""
    app.connect("builder-inited", draw_pictures)
    return {"parallel_read_safe": True}

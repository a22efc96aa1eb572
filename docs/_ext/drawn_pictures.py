"""Draws the pictures of the site before its pages are read, and shows them on light and dark pages.

A program ``docs/pictures/NAME.py`` with a function ``draw(path, dark)`` gives ``docs/_build/pictures/NAME-light.svg``
and ``NAME-dark.svg``. A picture is drawn again when its program, or what is beside the programs, is newer. A build with
``-D plot_gallery=0`` draws none, and puts an empty picture where one is missing. On a page::

    ```{picture} NAME
    :alt: What it shows, for those who do not see it.

    The caption.
    ```
"""

import importlib.util
import os
import sys
from functools import cache
from pathlib import Path

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.util.display import status_iterator
from sphinx.util.docutils import SphinxDirective

FOLDER = "_build/pictures"
EMPTY = '<svg xmlns="http://www.w3.org/2000/svg" width="640" height="360"><title>not drawn</title></svg>\n'


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
    source, target = Path(app.srcdir) / "pictures", Path(app.srcdir) / FOLDER
    target.mkdir(parents=True, exist_ok=True)
    programs = [path for path in sorted(source.glob("*.py")) if "\ndef draw(path, dark" in path.read_text()]
    shared = [path.stat().st_mtime for path in source.glob("*") if path not in programs and path.is_file()]
    wanted = []
    for program in programs:
        newest = max([program.stat().st_mtime, *shared])
        for dark in (False, True):
            path = target / f"{program.stem}-{'dark' if dark else 'light'}.svg"
            if not path.is_file() or path.stat().st_mtime < newest:
                wanted.append((program, path, dark))
    if str(app.config.plot_gallery).lower() in ("0", "false"):
        for _, path, _ in wanted:
            if not path.exists():
                path.write_text(EMPTY)
                os.utime(path, (0, 0))  # older than its program
        return
    shown = lambda item: item[1].name
    for program, path, dark in status_iterator(wanted, "drawing pictures... ", "purple", len(wanted), 0, shown):
        load(program).draw(path, dark)


class Picture(SphinxDirective):
    """Both pictures of a name, of which the theme shows one."""

    required_arguments = 1
    has_content = True
    option_spec = {"alt": directives.unchanged_required, "width": directives.unchanged}  # noqa: RUF012

    def run(self):
        """Make two figures."""
        found = []
        for kind in ("light", "dark"):
            image = nodes.image(uri=f"/{FOLDER}/{self.arguments[0]}-{kind}.svg", alt=self.options.get("alt", ""))
            if "width" in self.options:
                image["width"] = self.options["width"]
            figure = nodes.figure("", image, classes=[f"only-{kind}"])
            if self.content:
                caption = nodes.Element()
                self.state.nested_parse(self.content, self.content_offset, caption)
                figure += nodes.caption("", "", *caption.children[0].children)
            self.set_source_info(figure)
            found.append(figure)
        return found


def setup(app):
    """Register with Sphinx."""
    app.connect("builder-inited", draw_pictures)
    app.add_directive("picture", Picture)
    return {"parallel_read_safe": True}

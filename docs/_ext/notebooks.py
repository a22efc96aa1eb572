"""Notebooks of some tutorials, with their outputs, beside the pages: ``notebooks/NN_name.ipynb``.

They are made from the same programs: sphinx-gallery splits a program into cells, what it leaves of reStructuredText is
translated, jupytext writes the file, and nbclient executes it. A build with ``-D plot_gallery=0`` executes none. A
notebook is made again when its program or this file is newer.
"""

import os
import re
import time
from pathlib import Path

from sphinx.util import logging
from sphinx.util.display import status_iterator

NUMBERS = ("01", "02", "03", "07", "08")
SECONDS = 600
"""Limit of time for a cell."""
logger = logging.getLogger(__name__)


def programs(source):
    """The tutorials that there are notebooks of."""
    return [path for path in sorted((source / "tutorials").glob("[0-9][0-9]_*.py")) if path.name[:2] in NUMBERS]


def markdown(text):
    """Markdown from what sphinx-gallery's translation leaves of reStructuredText."""
    text = re.sub(r"\\ ?:(sup|sub):`([^`]*)`", r"<\1>\2</\1>", text)
    text = re.sub(r":(sup|sub):`([^`]*)`", r"<\1>\2</\1>", text)
    text = re.sub(r":(?:doc|ref):`([^`<]*?)\s*<[^`]*>`", r"*\1*", text)
    text = re.sub(r":(?:doc|ref):`/?([^`]*)`", r"*\1*", text)
    text = re.sub(r":\w+(?::\w+)*:`~[\w.]*\.(\w+)`", r"`\1`", text)
    text = re.sub(r":\w+(?::\w+)*:`([^`]*)`", r"`\1`", text)
    text = re.sub(r"`([^`<\n]+)\s+<(\w+:[^>`]*)>`__?", r"[\1](\2)", text)
    text = re.sub(r"(?<!`)``(?!`)([^`]+)``(?!`)", r"`\1`", text)
    text = re.sub(r"\\begin\{align\}(.*?)\\end\{align\}", r"$$\n\1\n$$", text, flags=re.DOTALL)
    text = re.sub(r"(?<=[^\s:])::$", ":", text, flags=re.M)  # code follows, indented in Markdown too
    return re.sub(r"\\ ", "", text) if "$" not in text else text


def make(program):
    """A notebook without outputs."""
    import nbformat
    from sphinx_gallery.gen_gallery import DEFAULT_GALLERY_CONF
    from sphinx_gallery.notebook import jupyter_notebook
    from sphinx_gallery.py_source_parser import split_code_and_text_blocks

    settings = {**DEFAULT_GALLERY_CONF, "first_notebook_cell": None, "last_notebook_cell": None}
    _, blocks = split_code_and_text_blocks(str(program))
    made = jupyter_notebook(blocks, settings, str(program.parent))
    cells = []
    for cell in made["cells"]:
        text = "".join(cell["source"]).strip()
        if cell["cell_type"] == "markdown":
            cells.append(nbformat.v4.new_markdown_cell(markdown(text)))
        elif text := re.sub(r"^# sphinx_gallery_.*\n?", "", text, flags=re.M).strip():
            cells.append(nbformat.v4.new_code_cell(text))
    metadata = {
        "jupytext": {"formats": "ipynb,py:sphinx"},
        "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
    }
    return nbformat.v4.new_notebook(cells=cells, metadata=metadata)


def execute(notebook, folder):
    """Run all cells, with pictures in the notebook."""
    from nbclient import NotebookClient

    environment = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}
    root = str(folder.parents[1])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, environment.get("PYTHONPATH"))))
    client = NotebookClient(notebook, timeout=SECONDS, resources={"metadata": {"path": str(folder)}})
    client.execute(env=environment)
    for cell in notebook.cells:
        cell.get("metadata", {}).pop("execution", None)  # times of this run


def make_notebooks(app, exception):
    """All notebooks that are missing or older than their programs."""
    if exception is not None or app.builder.name != "html":
        return
    import jupytext

    runs = str(app.config.plot_gallery).lower() not in ("0", "false")
    target = Path(app.outdir) / "notebooks"
    target.mkdir(exist_ok=True)
    wanted = []
    for program in programs(Path(app.srcdir)):
        path = target / f"{program.stem}.ipynb"
        newest = max(program.stat().st_mtime, Path(__file__).stat().st_mtime)
        if not path.is_file() or path.stat().st_mtime < newest:
            wanted.append((program, path))
    for program, path in status_iterator(
        wanted, "making notebooks... ", "purple", len(wanted), 0, lambda item: item[1].name
    ):
        notebook, start = make(program), time.perf_counter()
        if runs:
            execute(notebook, program.parent)
            logger.info(" %.1f s", time.perf_counter() - start)
        jupytext.write(notebook, path)
        if not runs:
            os.utime(path, (0, 0))  # older than its program


def add_links(app):
    """Links to the notebooks on the page of the tutorials, which has been generated."""
    index = Path(app.srcdir) / "tutorials" / "index.rst"
    names = [program.stem for program in programs(Path(app.srcdir))]
    if names and index.is_file():
        links = ", ".join(f'<a href="../notebooks/{name}.ipynb" download>{name}.ipynb</a>' for name in names)
        index.write_text(f"{index.read_text()}\n.. raw:: html\n\n   <p>As notebooks with their outputs: {links}.</p>\n")


def setup(app):
    """Register with Sphinx, after sphinx-gallery."""
    app.connect("builder-inited", add_links, priority=950)
    app.connect("build-finished", make_notebooks)
    return {"parallel_read_safe": True}

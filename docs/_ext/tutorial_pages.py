"""Pages among the tutorials that are no programs are added to the index that sphinx-gallery makes of the programs."""

import re
from pathlib import Path


def add_pages(app):
    """Append the Markdown pages of docs/tutorials to the table of contents of the index that was generated."""
    folder = Path(app.srcdir) / "tutorials"
    pages = [f"/tutorials/{page.stem}" for page in sorted(folder.glob("*.md"))]
    index = folder / "index.rst"
    text = index.read_text()
    links = [page for page in pages if f"   {page}\n" not in text]
    if links:
        listed = "".join(f"\n* :doc:`{page}`" for page in links)
        toctree = "".join(f"\n   {page}" for page in links)
        index.write_text(f"{text}\nAs pages:\n{listed}\n\n.. toctree::\n   :hidden:\n{toctree}\n")


def drop_empty_blocks(app, docname, source):
    """Remove blocks of code that held nothing but settings of sphinx-gallery."""
    if docname.startswith("tutorials/"):
        source[0] = re.sub(r"^\.\. code-block:: Python\n(?: +:\w+:.*\n)*(?:[ \t]*\n)+(?=\S)", "", source[0], flags=re.M)


def setup(app):
    """Register with Sphinx, after sphinx-gallery."""
    app.connect("source-read", drop_empty_blocks)
    app.connect("builder-inited", add_pages, priority=900)
    return {"parallel_read_safe": True}

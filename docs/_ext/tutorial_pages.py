"""Pages among the tutorials that are no programs are added to the index that sphinx-gallery makes of the programs."""

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


def setup(app):
    """Register with Sphinx, after sphinx-gallery."""
    app.connect("builder-inited", add_pages, priority=900)
    return {"parallel_read_safe": True}

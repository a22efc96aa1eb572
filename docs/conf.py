"""The site of pint_fem: `make docs` builds it without network, and a warning is an error.

Tutorials (docs/tutorials/NN_name.py) are executed by sphinx-gallery; ``-D plot_gallery=0`` skips that.
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("PETSC_OPTIONS", "-options_left no")
os.environ.setdefault("MPLBACKEND", "Agg")

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE / "_ext")]

import pint_fem  # noqa: E402

project = "pint_fem"
author = "The pint_fem developers"
copyright = author
version = release = pint_fem.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "numpydoc",
    "myst_parser",
    "sphinx_design",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
    "sphinx-mathjax-offline",  # formulas without network
    "drawn_pictures",
    "tutorial_pages",
    "notebooks",
    "api_pages",
    "option_tables",
]
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}
exclude_patterns = ["_build", "_ext", "_templates", "pictures", "tutorials/GALLERY_HEADER.rst"]
templates_path = ["_templates"]
language = "en"
nitpicky = (
    True  # names of this package have to exist (docs/_ext/api_pages.py); those of other libraries are not looked up
)
nitpick_ignore_regex = [
    ("py:.*", r"(np|numpy|scipy|firedrake|ufl|irksome|pyadjoint|petsc4py|mpi4py|torch|collections|typing|pathlib)\..*"),
    ("py:.*", r"(Cofunction|EnsembleFunction|Function|HierarchyBase|MeshGeometry|Path|PETSc\..*|MPI\..*)"),
    ("py:class", r".*\[.*"),  # parts of annotations such as tuple[int, ...]
]

# -- Markdown ----------------------------------------------------------------------------------------------------------
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "deflist", "attrs_inline"]
myst_heading_anchors = 4
myst_dmath_double_inline = True

# -- API reference -----------------------------------------------------------------------------------------------------
autosummary_generate = True
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
toc_object_entries_show_parents = "hide"
python_maximum_signature_line_length = 80
python_display_short_literal_types = True
autodoc_member_order = "bysource"
numpydoc_show_class_members = False
numpydoc_class_members_toctree = False
numpydoc_validation_checks = set()
add_module_names = False
python_use_unqualified_type_names = True

# -- tutorials ---------------------------------------------------------------------------------------------------------
sphinx_gallery_conf = {
    "examples_dirs": ["tutorials"],
    "gallery_dirs": ["tutorials"],  # pages are made beside the programs (.gitignore names them)
    "filename_pattern": r"/\d\d_",
    "ignore_pattern": r"/(?!\d\d_)[^/]*\.py$",
    "copyfile_regex": r"(?!)",  # no index of ours: the generated one is no input of the next build
    "within_subsection_order": "FileNameSortKey",
    "notebook_extensions": set(),
    "download_all_examples": False,
    "show_signature": False,
    "show_memory": False,
    "remove_config_comments": True,
    "abort_on_example_error": False,
    "write_computation_times": False,
    "plot_gallery": "True",
    "reset_modules": (),
    "reference_url": {},
    "capture_repr": ("_repr_html_",),
    "image_srcset": ["2x"],
}
suppress_warnings = ["config.cache"]

# -- pages -------------------------------------------------------------------------------------------------------------
html_theme = "pydata_sphinx_theme"
html_title = f"pint_fem {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_copy_source = False
html_context = {"default_mode": "auto"}
html_theme_options = {
    "show_toc_level": 2,
    "collapse_navigation": True,
    "navigation_depth": 3,
    "navigation_with_keys": False,
    "show_prev_next": True,
    "header_links_before_dropdown": 6,
    "navbar_end": ["theme-switcher"],
    "footer_start": ["copyright"],
    "footer_end": [],
    "secondary_sidebar_items": ["page-toc"],
}
pygments_style = "a11y-high-contrast-light"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

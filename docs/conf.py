"""How Sphinx builds these pages: `make docs`. Nothing is fetched from the network."""

import re
from importlib import metadata

from dask_nlsq.models import ReadyModel

project, author, copyright = "dask_nlsq", "dask_nlsq developers", "dask_nlsq developers"
release = metadata.version("dask_nlsq")
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.viewcode", "numpydoc"]
exclude_patterns = ["_build"]
templates_path = ["_templates"]
myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3

default_role = "autolink"
autosummary_generate = True
autodoc_typehints = "none"
autodoc_member_order = "bysource"
numpydoc_show_class_members = False
suppress_warnings = ["ref.footnote"]  # a footnote of a formula, which is shown as it stands
numpydoc_attributes_as_param_list = True
nitpick_ignore_regex = [("py:.*", r"(?!dask_nlsq\.).*")]  # other projects' names, and short ones of our own

html_theme = "pydata_sphinx_theme"
html_title = f"dask_nlsq {release}"
html_theme_options = {
    "show_nav_level": 2,
    "navigation_with_keys": False,
    "navbar_align": "left",
    "header_links_before_dropdown": 5,  # up to the reference
}
html_show_sourcelink = False
pages = ("start", "notebooks", "gallery", "how-it-works", "command-line", "configuration", "benchmarks", "limits")
html_sidebars = {page: [] for page in pages}  # which have no pages below them


def readable(app, what, name, obj, options, lines):
    """Docstrings are written for `help`: here formulas stay as they stand, and footnotes of several modules apart."""
    text = "\n".join(lines)
    if what == "module":
        module = name.rpartition(".")[2]
        text = re.sub(r"(?<!:):\n\n(?=    )", "::\n\n", text)
        text = re.sub(r"\[(\d)\](?=_| )", rf"[#{module}-\1]", text)
        text = re.sub(r"^(\w+)\n-+\n", r".. rubric:: \1\n\n", text, flags=re.MULTILINE)
    elif isinstance(obj, ReadyModel) or name.startswith("dask_nlsq.models."):
        text = re.sub(r"^([a-z]\w*(?:, [.\w]+)*) : ", r"* **\1**: ", text, flags=re.MULTILINE)
    text = re.sub(r"(?<!`)\(\*(?=\w)", r"(\\*", text)  # (*map, p) is no emphasis
    lines[:] = text.split("\n")


def without_private(app, what, name, obj, options, signature, returned):
    """Fields that only the package sets are not arguments of a class."""
    return (re.sub(r",? ?\b_\w+.*", ")", signature), returned) if signature else None  # they come last


def of_a_tuple(app, what, name, obj, skip, options):
    """Fields of named tuples say nothing but their number."""
    return True if (getattr(obj, "__doc__", None) or "").startswith("Alias for field number") else None


def setup(app):
    app.connect("autodoc-skip-member", of_a_tuple)
    app.connect("autodoc-process-signature", without_private)
    app.connect("autodoc-process-docstring", readable, priority=100)  # before numpydoc

"""Configuration of the documentation."""

from __future__ import annotations

import os

import lqlora

project = "lqlora"
author = "the lqlora authors"
project_copyright = "the lqlora authors, Apache-2.0"
version = release = lqlora.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "numpydoc",
    "sphinx-mathjax-offline",  # formulas are drawn from files that are built in, not from a server
]
exclude_patterns = ["_build", "jupyter_execute"]

html_theme = "furo"
html_title = f"lqlora {release}"
html_show_sphinx = False
html_static_path = ["_static"]
html_css_files = ["tables.css"]

myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

# Every notebook runs at every build, and an error in one fails the build.
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 1200
nb_merge_streams = True
nb_render_markdown_format = "myst"  # tables in outputs

# tqdm, which transformers imports, asks for Jupyter widgets that a static page cannot show.
os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"

# Types are stated in the docstrings, with shapes and dtypes, which annotations cannot express.
autodoc_typehints = "none"
autodoc_member_order = "bysource"
autosummary_generate = False  # the pages list what they document; summaries only point there
numpydoc_show_class_members = False
numpydoc_class_members_toctree = False
numpydoc_xref_param_type = False


#: Pages whose execution takes minutes; none of the others takes one.
LONGEST = ["explanation/which_weighting", "tutorials/compress_a_language_model"]


def deal_out(_app, _env, docnames):
    """Deal the pages out to the three parts that two processes read one after the other, the longest first.

    In the order of the alphabet the two longest pages come last, one of them after most others.
    """
    docnames.sort(key=lambda name: (name not in LONGEST, name))
    docnames[:] = [name for part in range(3) for name in docnames[part::3]]


def setup(app):
    """Let pages be read, and so executed, in parallel: the one extension that says nothing only adds static files."""
    app.extensions["sphinx-mathjax-offline"].parallel_read_safe = True
    app.connect("env-before-read-docs", deal_out)

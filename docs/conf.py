"""Sphinx: `make docs`. Nothing is fetched, neither while the pages are built nor when they are read."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import inventories

import lightning_sap

project = "lightning-sap"
author = "The lightning-sap authors"
copyright = author
version = release = lightning_sap.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx-mathjax-offline",  # MathJax and its fonts, copied into the pages
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Source"]
intersphinx_mapping = inventories.write(HERE / "_build" / "inventories")
linkcheck_anchors = False  # pages that are made by scripts have them late

html_theme = "furo"
html_title = f"lightning-sap {release}"
html_copy_source = False
html_static_path = ["static"]
html_css_files = ["pages.css"]
copybutton_exclude = ".linenos, .gp, .go"
copybutton_prompt_text = ">>> "

"""Sphinx makes the pages of this folder: `make docs`, into docs/_build."""

project = "gng_d2"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.intersphinx"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "gng_d2"

myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
napoleon_custom_sections = [("Shape", "params_style")]
napoleon_numpy_docstring = False
nitpicky = False
intersphinx_mapping = {}

"""Sphinx: the pages of this directory as a site. `python -m sphinx -n -W docs build/docs`, as tests do.

Every warning is an error, so a link that leads nowhere stops the build."""

project = "megatron-ultraep"
copyright = "the megatron-ultraep authors"
extensions = ["myst_parser"]
html_theme = "furo"
html_title = "megatron-ultraep"
exclude_patterns = ["_build"]

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 4
nitpicky = True

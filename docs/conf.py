"""How Sphinx builds the site: ``make docs``. Its root is the checkout, so that links lead where they do on a forge."""

import pqcad_ao

project = "pqcad_ao"
author = "the authors of pqcad_ao"
copyright = "the authors of pqcad_ao, Apache-2.0"
version = release = pqcad_ao.__version__

root_doc = "docs/index"
include_patterns = ["*.md", "docs/**", "bench/results/README.md", "examples/README.md"]
exclude_patterns = [".venv", ".git", "build", "shared", "tests", "docs/*.py"]

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
myst_heading_anchors = 4  # as forges make them, which links in the pages count on
nb_execution_mode = "off"  # tests/test_docs.py runs the notebook; the site shows what is stored in it

autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
autodoc_class_signature = "separated"
napoleon_google_docstring = True
napoleon_use_rtype = False

highlight_language = "none"  # of blocks that name no language

html_theme = "furo"
html_title = f"pqcad_ao {version}"
html_show_sphinx = False
html_copy_source = False

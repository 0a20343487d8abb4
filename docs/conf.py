"""The site: `python -m sphinx -W -b html docs docs/_build/html`."""

project = "jaxfusion"
author = "the authors of jaxfusion"
html_title = "jaxfusion"
html_theme = "furo"

extensions = [
    "myst_parser", "sphinx.ext.apidoc", "sphinx.ext.autodoc", "sphinx.ext.napoleon",
    "sphinx.ext.viewcode", "sphinx_copybutton",
]
exclude_patterns = ["_build"]
myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]

apidoc_modules = [{
    "path": "../jaxfusion", "destination": "api", "separate_modules": True, "module_first": True,
    "automodule_options": {"members"},
    "exclude_patterns": ["../jaxfusion/hf/modeling_jaxfusion.py"],  # goes along with exports
}]
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "special-members": "__call__",
                           "exclude-members": "parent, name, scope"}  # Linen's own fields
default_role = "code"
napoleon_use_ivar = True
napoleon_use_rtype = False

"""The site: `python -m sphinx -W -b html docs docs/_build/html`."""

import re
from pathlib import Path

from docutils import nodes
from sphinx.transforms import SphinxTransform

project = "jaxfusion"
author = "the authors of jaxfusion"
html_title = "jaxfusion"
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]

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

FIGURE = re.compile(r"[-+<−]?[\d.,]+([-+±%×\[\]\d.,\s]|GiB|MiB|ms|s)*")  # `61.2 [58, 64] ± 1.2`


class Figures(SphinxTransform):
    """Cells with figures do not wrap, and the tables that have them keep their first column."""

    default_priority = 500

    def apply(self):
        """Gives classes, which `_static/site.css` reads."""
        for table in self.document.findall(nodes.table):
            cells = [x for x in table.findall(nodes.entry) if FIGURE.fullmatch(x.astext().strip())]
            for cell in cells:
                cell["classes"].append("figure-cell")
            if 3 * len(cells) > len(list(table.findall(nodes.entry))):
                table["classes"].append("figures")


class DarkPictures(SphinxTransform):
    """A picture `NAME.png` with a `NAME_dark.png` beside it is shown by the reader's theme."""

    default_priority = 500

    def apply(self):
        """Puts the dark picture behind the light one."""
        for image in list(self.document.findall(nodes.image)):
            name = Path(image["uri"])
            dark = name.with_stem(f"{name.stem}_dark")
            if (Path(self.env.srcdir) / self.env.docname).parent.joinpath(dark).is_file():
                other = image.copy()
                other["uri"] = str(dark)
                other["classes"] = [*image["classes"], "only-dark"]
                image["classes"].append("only-light")
                image.parent.insert(image.parent.index(image) + 1, other)


def setup(app):
    """Adds what Markdown cannot say."""
    for transform in (Figures, DarkPictures):
        app.add_transform(transform)

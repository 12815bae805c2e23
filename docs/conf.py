"""The documentation site: Sphinx builds it from the pages of this folder, the README and the docstrings."""

import dataclasses
from typing import Any

from sphinx.application import Sphinx

import torchladder

project = "torchladder"
author = "the torchladder authors"
release = version = torchladder.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "sphinx_copybutton"]
exclude_patterns = ["outputs"]  # of the notebook
highlight_language = "text"  # of blocks that name no language

# Headings have the anchors that GitHub gives them; the notebook shows the outputs that are stored in it.
myst_heading_anchors = 4
nb_execution_mode = "off"

add_module_names = False
autodoc_default_options = {"members": True}
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
napoleon_use_ivar = True
maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_title = "torchladder"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_logo = html_favicon = "_static/logo.svg"
html_copy_source = html_show_copyright = html_show_sphinx = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#0072B2", "color-brand-content": "#0072B2"},
    "dark_css_variables": {"color-brand-primary": "#56B4E9", "color-brand-content": "#56B4E9"},
}


def setup(app: Sphinx) -> None:
    """Mends what the extensions make of this package."""
    app.connect("autodoc-process-docstring", keep_colons, priority=1)  # before Napoleon
    app.connect("autodoc-process-signature", omit_signature)


def keep_colons(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Begins a field's docstring with an empty comment: Napoleon takes its first line, up to a colon, for a type."""
    if what in ("attribute", "data", "property"):
        lines[:0] = ["..", ""]


def omit_signature(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str | None, returns: str | None
) -> tuple[str | None, str | None]:
    """Omits the signature of a class that says nothing, or whose fields follow, each with its bounds and default."""
    inherited = (signature or "").startswith("(*args")  # of a protocol or a torch module
    is_settings = dataclasses.is_dataclass(obj) and "Annotated[" in (signature or "")
    return ("", None) if what == "class" and (inherited or is_settings) else (signature, returns)

"""Settings of Sphinx for the site: pages in Markdown where they stand, docstrings as Markdown.

The folder of sources is the checkout itself (`make site`), so that relative links between pages and
to other files lead to the same places on the site and on a code host. README.md is the root page;
the others stand in its table of contents, those of its table of pages first and in its order.
"""

import re
import shutil
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils import new_document
from myst_parser.parsers.sphinx_ import MystParser
from sphinx.application import Sphinx
from sphinx.ext.napoleon.docstring import GoogleDocstring
from sphinx.util.docutils import SphinxDirective

import residua

project = "residua"
author = "the authors of residua"
version = release = residua.__version__
root_doc = "README"
include_patterns = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "cache/README.md", "docs/*.md"]
exclude_patterns = [".*", "build", "site"]
extensions = ["myst_parser", "sphinx.ext.autodoc"]
highlight_language = "none"  # of indented blocks: commands, trees, formulas

myst_enable_extensions = ["fieldlist"]
myst_heading_anchors = 3  # the anchors of headings that code hosts make

autodoc_default_options = {"members": True, "inherited-members": True, "member-order": "bysource"}
autodoc_class_signature = "mixed"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_title = f"residua {version}"
html_copy_source = False
html_show_sourcelink = False


class MarkdownText(SphinxDirective):
    """Directive whose content is Markdown; docstrings stand in it."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        document = new_document(self.get_source_info()[0], self.state.document.settings)
        MystParser().parse("\n".join(self.content), document)
        return document.children


def write_docstring_as_markdown(
    app: Sphinx, what: Any, name: str, value: Any, options: Any, lines: list[str]
) -> None:
    """Put the docstring `lines` into a `MarkdownText`, sections such as `Args:` as fields."""
    text = list(lines)
    if "Args:" in text:
        text = GoogleDocstring(text).lines()
    lines[:] = [".. markdown-text::", "", *(f"   {line}" for line in text), ""]


def skip_members_of_libraries(
    app: Sphinx, what: Any, name: str, value: Any, skip: bool, options: Any
) -> bool | None:
    """Leave out methods that a class inherits from Python or from other libraries."""
    function = getattr(value, "fget", None) or getattr(value, "func", None) or value
    module = getattr(function, "__module__", None) or ""
    return True if callable(function) and not module.startswith("residua") else None


def append_table_of_contents(app: Sphinx, page: str, source: list[str]) -> None:
    """List all pages below README.md, which names most of them in a table of its own."""
    if page == root_doc:
        tabled = dict.fromkeys(re.findall(r"^\| \[.+?\]\(([\w/-]+)\.md\)", source[0], re.M))
        source[0] += "\n".join(
            [
                "\n```{toctree}",
                ":hidden:",
                ":glob:",
                "",
                *tabled,
                "*/*",
                "CONTRIBUTING",
                "CHANGELOG",
                "```\n",
            ]
        )


def copy_root_page(app: Sphinx, error: Exception | None) -> None:
    """Give the root page the name that servers look for in a folder."""
    if error is None and app.builder.format == "html":
        shutil.copy(Path(app.outdir, f"{root_doc}.html"), Path(app.outdir, "index.html"))


def setup(app: Sphinx) -> None:
    app.add_directive("markdown-text", MarkdownText)
    app.connect("autodoc-process-docstring", write_docstring_as_markdown)
    app.connect("autodoc-skip-member", skip_members_of_libraries)
    app.connect("source-read", append_table_of_contents)
    app.connect("build-finished", copy_root_page)

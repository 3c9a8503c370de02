"""The documentation site: `pip install '.[docs]'`, then `sphinx-build -W docs build/site`."""

import dataclasses
import inspect
import re
import sys
from pathlib import Path

import jax_flashmla

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS))

project = "jax_flashmla"
author = "The jax_flashmla authors"
copyright = f"2026, {author}"
version = release = jax_flashmla.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "markdown_docstrings",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 4
OPTIONAL = ["sparse_attention", "integrations", "scaling"]  # pages of index.md that may be absent
suppress_warnings = [
    "myst.header",  # pages may skip a level, as GitHub lets them
]

autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints = "none"  # docstrings give shapes and dtypes, which annotations cannot
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
default_role = "code"  # single backticks in docstrings

html_theme = "sphinx_book_theme"
html_title = f"jax_flashmla {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {
    "show_toc_level": 2,
    "home_page_in_toc": True,
    "use_download_button": False,
    "use_fullscreen_button": False,
    "show_navbar_depth": 1,
    **{f"navbar_{part}": [] for part in ("start", "center", "end", "persistent")},
}
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True


def _skip(app, what, name, obj, skip, options):
    """Fields of dataclasses and named tuples: the class's docstring describes them."""
    if inspect.isdatadescriptor(obj) and not isinstance(obj, property):
        return True
    if inspect.isclass(obj) and what == "class":  # a field whose default is a dtype
        return True
    return skip


def _signature(app, what, name, obj, options, signature, return_annotation):
    """Of a dataclass, without the defaults that only `dataclasses` understands."""
    if what == "class" and dataclasses.is_dataclass(obj) and signature:
        signature = re.sub(r"<class 'jax\.numpy\.(\w+)'>", r"jnp.\1", signature)
        return signature.replace("<factory>", "..."), return_annotation
    return None


def _read(app, docname, source):
    """Markdown outside of docs/ is no page of the site but a file; absent pages are left out."""

    def outside(match):
        target = (DOCS / docname).parent / match[1]
        return f"](path:{match[1]})" if DOCS not in target.resolve().parents else match[0]

    text = re.sub(r"\]\(((?:\.\./)+[\w./-]+\.md)(?:#[\w-]+)?\)", outside, source[0])
    if docname == "index":
        absent = [name for name in OPTIONAL if not (DOCS / f"{name}.md").exists()]
        text = re.sub(rf"^({'|'.join(absent)})\n", "", text, flags=re.MULTILINE) if absent else text
    if docname.startswith("notebook/") and docname != "notebook/README":  # which lists the entries
        text = f"---\norphan: true\n---\n{text}"
    source[0] = text


def setup(app):
    app.connect("source-read", _read)
    app.connect("autodoc-skip-member", _skip)
    app.connect("autodoc-process-signature", _signature)

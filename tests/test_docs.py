"""The documentation: links lead somewhere, code runs, every public name is in the reference."""

import importlib
import importlib.util
import inspect
import pathlib
import re
import subprocess
import sys

import pytest

import jax_flashmla

ROOT = pathlib.Path(__file__).parents[1]
PAGES = sorted(
    [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "benchmarks").rglob("*.md"),
        *ROOT.glob("S*.md"),
    ]
)
GUIDES = [
    *sorted((ROOT / "docs" / "guides").glob("*.md")),
    *(ROOT / "docs" / f"{name}.md" for name in ("start", "migrating")),
]
REEXPORTING = {  # modules whose names are all meant, wherever they are defined
    f"jax_flashmla.layers{name}" for name in ("", ".checkpoint", ".tensor_reader")
}
PUBLIC = {  # modules that documented code imports from
    name
    for page in PAGES
    for code in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    for name in re.findall(r"from (jax_flashmla[\w.]*) import", code)
} | {"jax_flashmla.layers.linen", *REEXPORTING}


def anchors(page: pathlib.Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        if not linked.exists() or (anchor and anchor not in anchors(linked)):
            broken.append(target)
    assert not broken


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.stem)
def test_code_runs(page, monkeypatch):
    """All Python of a page is one program, which asserts what it shows."""
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    code = "\n".join(blocks)
    assert "assert " in code
    monkeypatch.chdir(ROOT)
    exec(compile(code, str(page), "exec"), {})


@pytest.mark.parametrize("module", sorted(PUBLIC))
def test_every_public_name_is_in_the_reference(module):
    reference = "\n".join(path.read_text() for path in (ROOT / "docs/reference").glob("*.md"))
    documented = set()
    current = ""
    for line in reference.splitlines():
        if named := re.fullmatch(r"\.\. currentmodule:: ([\w.]+)", line):
            current = named[1] + "."
        elif named := re.fullmatch(r"\.\. auto(?:function|class|exception):: ([\w.]+)", line):
            documented.add(named[1] if named[1].startswith("jax_flashmla") else current + named[1])
    assert not {f"{module}.{name}" for name in public_names(module)} - documented


def public_names(module: str) -> set[str]:
    """What `__all__` lists; without one, the module's classes and functions."""
    found = importlib.import_module(module)
    if hasattr(found, "__all__"):
        return set(found.__all__)

    def is_meant(name: str) -> bool:
        defined_in = getattr(getattr(found, name), "__module__", None) or ""
        own = defined_in.startswith("jax_flashmla") if module in REEXPORTING else False
        return not name.startswith("_") and (own or defined_in == module)

    return {name for name in vars(found) if callable(getattr(found, name)) and is_meant(name)}


def test_public_names_are_found():
    assert public_names("jax_flashmla") == set(jax_flashmla.__all__)
    assert {"MLAConfig", "prefill"} <= public_names("jax_flashmla.layers")
    assert {"jax_flashmla", "jax_flashmla.layers.nnx"} < PUBLIC
    assert public_names("jax_flashmla.layers.nnx") == {"MLAttention"}
    assert public_names("jax_flashmla.layers.tensor_reader") == {"StoredTensor", "TensorReader"}


def test_docstrings_become_restructured_text():
    path = ROOT / "docs" / "markdown_docstrings.py"
    spec = importlib.util.spec_from_file_location("markdown_docstrings", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    docstring = """Scores `a * b` of a * b, in name_.

    | a | b |
    |---|---|
    | `x` | y * z |

    - item
      goes on.

        code * here

    >>> 2 * 3

    Args:
        first, second,
            third: of several.

    Returns:
        out: [b] values,
            going on.
        lse: [b].
    """
    assert module.rewrite(inspect.cleandoc(docstring).splitlines()) == [
        r"Scores `a * b` of a \* b, in name\_.",
        "",
        *("", ".. list-table::", "   :header-rows: 1", ""),
        *("   * - a", "     - b", "   * - `x`", r"     - y \* z", "", ""),
        *("- item", "  goes on.", "", "::", "", "    code * here", "", ">>> 2 * 3", ""),
        *("Args:", "    first, second, third: of several.", ""),
        *(":returns: * **out** -- [b] values, going on.", "          * **lse** -- [b].", ""),
    ]


@pytest.mark.skipif(not importlib.util.find_spec("sphinx_book_theme"), reason="needs extra docs")
def test_site_builds_without_warnings(tmp_path):
    site = tmp_path / "site"
    build = ["-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", ROOT / "docs", site]
    for command in (build, [ROOT / "scripts" / "check_site.py", site]):
        done = subprocess.run([sys.executable, "-P", *command], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

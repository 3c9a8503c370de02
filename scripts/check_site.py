"""Checks a built documentation site: links and their anchors, images, and pages that lack a title.

python scripts/check_site.py build/site              # links within the site
python scripts/check_site.py build/site --external   # and those to other sites
"""

from __future__ import annotations

import argparse
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path


class Page(HTMLParser):
    """What a page links to, and what of it can be linked to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.targets: set[str] = set()
        self.anchors: set[str] = set()
        self.headings = 0
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.headings += tag == "h1"
        self.anchors |= {value for name in ("id", "name") if (value := found.get(name))}
        target = found.get("href" if tag in ("a", "link") else "src")
        if target and tag in ("a", "link", "img", "script"):
            self.targets.add(target)


def broken_links(site: Path) -> Iterator[str]:
    """Links within the site that lead nowhere, as "page: target"."""
    pages = {
        path.resolve(): Page(path)
        for path in sorted(site.rglob("*.html"))
        if "_static" not in path.relative_to(site).parts  # the theme's own
    }
    for path, page in pages.items():
        name = path.relative_to(site.resolve())
        if page.headings == 0 and name.name not in ("search.html", "genindex.html"):
            yield f"{name}: has no title"
        for target in sorted(page.targets):
            parts = urllib.parse.urlsplit(target)
            if parts.scheme or parts.netloc:
                continue
            linked = path.parent / urllib.parse.unquote(parts.path) if parts.path else path
            linked = linked.resolve()
            anchor = urllib.parse.unquote(parts.fragment)
            lacks_anchor = anchor and linked in pages and anchor not in pages[linked].anchors
            if lacks_anchor or not linked.exists():
                yield f"{name}: {target}"


def unreachable(site: Path) -> Iterator[str]:
    """Links to other sites that do not answer."""
    targets = {target for path in site.rglob("*.html") for target in Page(path).targets}
    for target in sorted(t for t in targets if t.startswith(("http://", "https://"))):
        request = urllib.request.Request(target, headers={"User-Agent": "check_site"})
        try:
            urllib.request.urlopen(request, timeout=20).close()
        except (OSError, urllib.error.URLError) as error:
            yield f"{target}: {error}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("site", type=Path)
    parser.add_argument("--external", action="store_true", help="ask other sites too")
    arguments = parser.parse_args(argv)
    if not (arguments.site / "index.html").exists():
        parser.error(f"{arguments.site} holds no site")
    broken = [
        *broken_links(arguments.site),
        *(unreachable(arguments.site) if arguments.external else ()),
    ]
    for line in broken:
        print(line)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())

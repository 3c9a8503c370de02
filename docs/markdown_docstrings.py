"""Sphinx extension: docstrings are Markdown with Google's sections; autodoc wants reStructuredText.

Backticks, lists and doctests mean the same in both. What differs is rewritten before napoleon reads
the sections: characters that are markup in one only, tables, indented code, and names of several
arguments that go on in a second line.
"""

import re

CODE = re.compile(r"(`+[^`]*`+)")
RULE = re.compile(r"\s*\|[\s|:-]+\|\s*")


def _escaped(line):
    """Stars, bars and final underscores are themselves, but in backticks and doctests."""
    if line.lstrip().startswith((">>>", "...")):
        return line
    parts = CODE.split(line)
    parts[::2] = [
        re.sub(r"([*|])", r"\\\1", re.sub(r"(\w)_\b(?!\w)", r"\1\\_", p)) for p in parts[::2]
    ]
    return "".join(parts)


def _cells(line):
    return [_escaped(cell.strip()) for cell in line.strip().strip("|").split("|")]


def _table(lines, indent):
    """A Markdown table as a list-table."""
    yield from ("", f"{indent}.. list-table::", f"{indent}   :header-rows: 1", "")
    for line in lines:
        if not RULE.fullmatch(line):
            first, *rest = _cells(line)
            yield f"{indent}   * - {first}"
            yield from (f"{indent}     - {cell}" for cell in rest)
    yield ""


def _indent(line):
    return len(line) - len(line.lstrip())


def _returns(lines):
    """The section of several named results, as a list; napoleon knows one result only."""
    items = []
    for line in filter(str.strip, lines):
        if named := re.fullmatch(r"    (\w+): (.*)", line):
            items.append(f"* **{named[1]}** -- {_escaped(named[2])}")
        elif items and line.startswith("     "):
            items[-1] += " " + _escaped(line.strip())
        else:
            return ["Returns:", *map(_escaped, lines)]
    return [(":returns: " if i == 0 else " " * 10) + item for i, item in enumerate(items)] + [""]


def rewrite(lines):
    """The lines of a docstring as reStructuredText."""
    out, i = [], 0
    while i < len(lines):
        line = lines[i]
        last = next((done for done in reversed(out) if done.strip()), "")
        if line.lstrip().startswith("|") and line.rstrip().endswith("|"):
            end = i
            while end < len(lines) and lines[end].lstrip().startswith("|"):
                end += 1
            out += _table(lines[i:end], " " * _indent(line))
            i = end
            continue
        if line == "Returns:":
            end = i + 1
            while end < len(lines) and (not lines[end].strip() or lines[end].startswith(" ")):
                end += 1
            out += _returns(lines[i + 1 : end])
            i = end
            continue
        follows_blank = bool(out) and not out[-1].strip()
        if line.strip() and follows_blank and last and _indent(line) > _indent(last):
            out += [" " * (_indent(line) - 4) + "::", ""]
            base = _indent(line)
            while i < len(lines) and (not lines[i].strip() or _indent(lines[i]) >= base):
                out.append(lines[i])
                i += 1
            continue
        if re.fullmatch(r"\s*(\w+, )*\w+,", line) and i + 1 < len(lines):
            lines[i + 1] = f"{line} {lines[i + 1].strip()}"
        else:
            out.append(_escaped(line))
        i += 1
    return out


def setup(app):
    def process(app, what, name, obj, options, lines):
        lines[:] = rewrite(list(lines))
        if what == "property" and lines:  # napoleon takes what is before a colon for its type
            lines[0] = lines[0].replace(": ", " \N{EN DASH} ", 1)

    app.connect("autodoc-process-docstring", process, priority=100)  # napoleon has 500
    return {"parallel_read_safe": True}

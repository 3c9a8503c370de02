"""Results as JSON: written after every row, read back to be shown again."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

FIELDS = (
    "hardware", "versions", "commit", "uncommitted_changes", "date", "grid", "dtype", "block_size",
    "method", "ceilings", "limits", "interrupted", "rows", "summary",
)  # fmt: skip


def write(document: dict[str, Any], path: Path) -> None:
    """Replaces the file at once, so that whatever happens one whole document is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".new")
    new.write_text(json.dumps(document, indent=1) + "\n")
    os.replace(new, path)


def read(path: Path) -> dict[str, Any]:
    """A document that `write` wrote.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not such a document.
    """
    try:
        document = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    missing = (
        [name for name in FIELDS if name not in document] if type(document) is dict else FIELDS
    )
    if missing:
        raise ValueError(f"{path} holds no benchmark results: it lacks {', '.join(missing)}")
    return document

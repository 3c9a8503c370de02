"""Results as JSON: written after every shape, read back to be shown again."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from jax_flashmla.bench.operations import OPERATIONS
from jax_flashmla.bench.summary import summarise

FIELDS = (
    "hardware", "versions", "commit", "uncommitted_changes", "date", "operation", "grid", "dtype",
    "block_size", "method", "ceilings", "limits", "interrupted", "shapes", "summary",
)  # fmt: skip


def check_folder(path: Path) -> None:
    """Before anything is measured.

    Raises:
        FileNotFoundError: the folder that `path` is to be written to does not exist.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path} cannot be written: there is no folder {path.parent}")
    if path.is_dir():
        raise IsADirectoryError(f"{path} must be a file, it is a folder")


def write(document: dict[str, Any], path: Path) -> None:
    """Replaces the file at once, so that whatever happens one whole document is there."""
    new = path.with_name(path.name + ".new")
    new.write_text(json.dumps(document, indent=1) + "\n")
    os.replace(new, path)


def read(path: Path) -> dict[str, Any]:
    """A document that `write` wrote, or one of before there were several operations.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not such a document.
    """
    try:
        document = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if type(document) is dict and "grid" in document and "rows" in document:
        operation = OPERATIONS["dense_decode"]
        shapes = [{**operation.defaults, **result} for result in document.pop("rows")]
        document = {"operation": operation.name, **document, "shapes": shapes}
        document["summary"] = summarise(operation, shapes)
    missing = (
        [name for name in FIELDS if name not in document] if type(document) is dict else FIELDS
    )
    if missing:
        raise ValueError(f"{path} holds no benchmark results: it lacks {', '.join(missing)}")
    if document["operation"] not in OPERATIONS:
        raise ValueError(
            f"{path} must be of an operation in {', '.join(OPERATIONS)}, "
            f"got {document['operation']!r}"
        )
    if type(document["shapes"]) is list:  # fields that shapes had not yet
        defaults = OPERATIONS[document["operation"]].defaults
        document["shapes"] = [{**defaults, **result} for result in document["shapes"]]
    return document

"""Goes on with a run that was cut off: the shapes that its file has are not measured again."""

from __future__ import annotations

from typing import Any

from jax_flashmla.bench import document as documents
from jax_flashmla.bench.operations import OPERATIONS
from jax_flashmla.bench.options import Options
from jax_flashmla.bench.shape import Result

SAME = (
    "operation", "grid", "dtype", "block_size", "method", "versions", "xla_flags", "commit",
    "uncommitted_changes",
)  # fmt: skip
SAME_HARDWARE = ("device", "power_limit")  # another card of the kind may do


class OtherRun(ValueError):
    """The file is of a run that this one cannot go on with."""


def measured(
    document: dict[str, Any], options: Options, shapes: tuple[Any, ...]
) -> dict[Any, Result]:
    """The shapes that options.json has already, but for those that failed.

    When and where that run was, and what its shapes' limits follow, is added to
    document["resumed"].

    Args:
        document: of this run, before its first shape.

    Raises:
        OtherRun: the file is of something else; the message says of what.
    """
    if options.json is None or not options.json.exists():
        return {}
    try:
        old = documents.read(options.json)
    except ValueError as error:
        raise OtherRun(str(error)) from None
    for name, before, now in (
        *((name, old.get(name), document[name]) for name in SAME),
        *((n, old["hardware"].get(n), document["hardware"].get(n)) for n in SAME_HARDWARE),
    ):
        if before != now:
            raise OtherRun(
                f"--resume: {options.json} must be of the same {name}, got {before} there and "
                f"{now} now"
            )
    part = {name: old[name] for name in ("date", "hardware", "ceilings", "limits")}
    document["resumed"] = [*old.get("resumed", []), part]
    fields = OPERATIONS[options.operation].fields
    found = {
        tuple(result[name] for name in fields): result
        for result in old["shapes"]
        if "error" not in result
    }
    keys = {shape: tuple(getattr(shape, name) for name in fields) for shape in shapes}
    return {shape: found[key] for shape, key in keys.items() if key in found}

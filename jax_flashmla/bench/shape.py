"""What the benchmark must know of one shape of an operation."""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

Result = dict[str, Any]  # one measured shape as the document has it: its fields, then its numbers


class Shape(Protocol):
    """One shape: a frozen dataclass of integers and strings, which together name it."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def flops(self) -> int:
        """Operations of one call."""

    @property
    def bytes(self) -> int:
        """What one call must read and write, everything once."""

    @property
    def gathered(self) -> dict[int, int]:
        """Of `bytes`, those that are read a row at a time at random places, by bytes of a row."""

    @property
    def cache_bytes(self) -> int:
        """Of what one call reads that the next one must not find in L2."""

    @property
    def facts(self) -> dict[str, Any]:
        """What results keep beside the fields, such as the tokens of all sequences."""

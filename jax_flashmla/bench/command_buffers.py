"""Whether XLA launches a compiled function's custom calls from command buffers (CUDA graphs)."""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

import jax.stages

THUNK = re.compile(r"^(?P<indent> *)\d+: (?P<kind>k\w+)", re.MULTILINE)
# Written once XLA has gathered thunks into command buffers; where it found none to gather, only the
# sequence before that step is there.
DUMPS = ("*thunk_sequence_after_thunk_passes*.txt", "*thunk_sequence.txt")


@dataclass(frozen=True)
class Capture:
    """How XLA's GPU executable launches its custom calls, from its own listing of what it runs."""

    command_buffers: int
    calls_inside: int  # custom calls inside command buffers
    calls_outside: int  # custom calls launched one by one


def parse_thunks(listing: str) -> Capture:
    """Counts in a thunk sequence as XLA dumps it: "<indent><number>: k<Kind> ...", nested."""
    command_buffers, inside, outside = 0, 0, 0
    buffer_indent: int | None = None
    for thunk in THUNK.finditer(listing):
        indent = len(thunk["indent"])
        if buffer_indent is not None and indent <= buffer_indent:
            buffer_indent = None
        if thunk["kind"] == "kCommandBuffer":
            command_buffers += 1
            buffer_indent = indent
        elif thunk["kind"] == "kCustomCall":
            if buffer_indent is None:
                outside += 1
            else:
                inside += 1
    return Capture(command_buffers, inside, outside)


def compile_and_look(
    lowered: jax.stages.Lowered,
) -> tuple[jax.stages.Compiled, Capture | None]:
    """Compiles a lowered function, and reads in XLA's dump how its custom calls are launched.

    Returns:
        The compiled function, and what the dump says; None where XLA lists no thunks, as on a CPU.
    """
    with tempfile.TemporaryDirectory() as folder:
        compiled = lowered.compile(compiler_options={"xla_dump_to": folder})
        for pattern in DUMPS:
            for file in Path(folder).glob(pattern):
                return compiled, parse_thunks(file.read_text())
    return compiled, None

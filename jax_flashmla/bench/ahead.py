"""Compiles the programs of several shapes at once, before any of them is measured.

One after the other, they take most of a run: 0.2 to 2.3 s for the calls of a kernel, 4 s for plain
XLA's. Nothing is measured meanwhile, so that neither what is measured nor what XLA tries out on the
device, to choose among its own kernels, is disturbed: for that XLA has the device to itself,
whichever thread asks.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax.stages

from jax_flashmla.bench.command_buffers import Capture, compile_and_look

THREADS = min(16, os.cpu_count() or 1)
AT_ONCE = 2 * THREADS  # shapes: some take longer to compile, and the last ones leave cores idle

Lowered = Mapping[str, jax.stages.Lowered]  # the programs of one shape, by name


@dataclass(frozen=True)
class Program:
    """A compiled function, or why there is none: calling it raises that."""

    compiled: jax.stages.Compiled | None
    error: Exception | None = None
    capture: Capture | None = None  # how its custom calls are launched, where that was looked at

    def __call__(self, *arguments: Any) -> Any:
        if self.compiled is None:
            assert self.error is not None
            raise self.error
        return self.compiled(*arguments)


Programs = Mapping[str, Program]


def compile_shapes(
    lower: Sequence[Callable[[], Lowered]], *, look_inside: bool = False
) -> list[Programs | Exception]:
    """Lowers the programs of each shape, here, and compiles them in threads meanwhile.

    Args:
        lower: of each shape, lowers its programs.
        look_inside: find out how custom calls are launched too.

    Returns:
        Of each shape its programs, or what lowering them raised.
    """
    found: list[dict[str, Future[Program]] | Exception] = []
    threads = ThreadPoolExecutor(THREADS)
    try:
        for one in lower:
            try:
                lowered = one()
            except Exception as error:  # of this shape, in its turn
                found.append(error)
                continue
            found.append(
                {name: threads.submit(_compile, x, look_inside) for name, x in lowered.items()}
            )
        return [
            programs
            if isinstance(programs, Exception)
            else {name: program.result() for name, program in programs.items()}
            for programs in found
        ]
    finally:
        threads.shutdown(cancel_futures=True)


def _compile(lowered: jax.stages.Lowered, look_inside: bool) -> Program:
    try:
        if look_inside:
            compiled, capture = compile_and_look(lowered)
            return Program(compiled, capture=capture)
        return Program(lowered.compile())
    except Exception as error:
        return Program(None, error)

"""Compiles the programs of several shapes at once, before any of them is measured.

Most of a run's time was compiling: one program after the other, on one core, the device idle. It
still is idle then, so that nothing measured is disturbed, and what XLA tries out on it to choose
among its kernels isn't either: XLA has the device to itself for that, whichever thread asks.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax.stages

from jax_flashmla.bench.command_buffers import Capture, compile_and_look

AT_ONCE = min(16, os.cpu_count() or 1)  # shapes, and threads that compile

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
    threads = ThreadPoolExecutor(AT_ONCE)
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

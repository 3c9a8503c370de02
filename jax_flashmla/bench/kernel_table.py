"""What each kernel of a jitted function takes, from a jax profile."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax


@dataclass(frozen=True)
class KernelTime:
    """One kernel, over all calls: its name, how often a call starts it, microseconds a call."""

    name: str
    launches: float
    us: float


def profile_kernels(run: Callable[[], Any], calls: int, runs: int = 4) -> list[KernelTime]:
    """The kernels of `run`, which dispatches a jitted function of `calls` calls; longest first.

    XLA launches kernels one by one while it is profiled, without command buffers, so that gaps
    between them say nothing; their own times do.

    Returns:
        Empty where the device shows no kernels, as a CPU.
    """
    jax.block_until_ready(run())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(runs):
                jax.block_until_ready(run())
        files = sorted(Path(folder).rglob("*.xplane.pb"))
        profile = jax.profiler.ProfileData.from_file(str(files[-1]))
    found: dict[str, list[float]] = {}
    for plane in profile.planes:
        if not plane.name.startswith("/device:GPU"):
            continue
        for line in plane.lines:
            if line.name.startswith("Stream"):
                for event in line.events:
                    found.setdefault(short_name(event.name), []).append(event.duration_ns / 1e3)
    times = (
        KernelTime(name, len(us) / (runs * calls), sum(us) / (runs * calls))
        for name, us in found.items()
    )
    return sorted(times, key=lambda kernel: -kernel.us)


def short_name(name: str) -> str:
    """A kernel's name without arguments and without the number that XLA tells fusions apart by."""
    name = re.sub(r"\(anonymous namespace\)::|^void |flashmla::sm90::", "", name)
    name = re.sub(r"_\d+$", "", name.partition("(")[0])
    return name if len(name) <= 90 else f"{name[:60]}..{name[-28:]}"

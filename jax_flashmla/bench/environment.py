"""Where and with what a benchmark ran: hardware, driver, versions, commit, date."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax

from jax_flashmla.bench.device import cpu_model

PACKAGES = ("jax_flashmla", "jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "numpy")


def _output(*command: str, cwd: Path | None = None) -> str | None:
    """The command's standard output, or None where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=cwd)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _checkout() -> Path | None:
    """This project's git checkout, if the command runs in it or was installed inside it."""
    for start in (Path.cwd(), Path(__file__).parent):
        top = _output("git", "rev-parse", "--show-toplevel", cwd=start)
        # Not the checkout of a project that merely uses this one.
        if top and (Path(top) / "jax_flashmla" / "bench").is_dir():
            return Path(top)
    return None


def _source(commit: str | None) -> dict[str, Any]:
    checkout = _checkout()
    if commit is not None or checkout is None:
        return {"commit": commit, "uncommitted_changes": None}
    status = _output("git", "status", "--porcelain", "--untracked-files=no", cwd=checkout)
    return {
        "commit": _output("git", "rev-parse", "HEAD", cwd=checkout),
        "uncommitted_changes": None if status is None else bool(status),
    }


def versions() -> dict[str, str]:
    """Of Python and of the packages that matter here, where they are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def describe(device: jax.Device, commit: str | None = None) -> dict[str, Any]:
    """What a reader of the results must know about `device` and the software.

    Args:
        device: where the benchmark runs.
        commit: what to record as the sources' commit; by default git is asked.
    """
    hardware: dict[str, Any] = {"platform": device.platform, "device": device.device_kind}
    if device.platform == "gpu":
        hardware["compute_capability"] = device.compute_capability
        query = "name,driver_version,power.limit,clocks.max.sm,memory.total"
        smi = _output("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader")
        if smi:
            fields = (field.strip() for field in smi.splitlines()[0].split(","))
            hardware |= dict(
                zip(
                    ("name", "driver", "power_limit", "max_sm_clock", "memory"), fields, strict=True
                )
            )
    else:
        hardware["device"] = cpu_model()
    return {
        "hardware": hardware,
        "versions": versions(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        **_source(commit),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }

"""Where and with what a benchmark ran: hardware, driver, versions, commit, date."""

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax


def _output(*command: str) -> str | None:
    """The command's standard output, or None where it is missing or fails."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=20, cwd=Path(__file__).parent
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def describe(device: jax.Device) -> dict[str, Any]:
    """What a reader of the results must know about `device` and the software."""
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
        hardware["device"] = _cpu_model()
    packages = ("jax_flashmla", "jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "numpy")
    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    status = _output("git", "status", "--porcelain", "--untracked-files=no")
    return {
        "hardware": hardware,
        "versions": versions,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "commit": _output("git", "rev-parse", "HEAD"),
        "uncommitted_changes": None if status is None else bool(status),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }

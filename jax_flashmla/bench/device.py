"""Which device runs what, told from compiled programs rather than from intentions."""

from __future__ import annotations

import platform
from pathlib import Path

import jax
import jax.stages

from jax_flashmla import kernel_refusal

DECODE_TARGET = "flashmla_dense_decode_v1"


def platform_of(device: jax.Device) -> str:
    """The platform as lowering rules name it: a "gpu" is "cuda" or "rocm"."""
    if device.platform != "gpu":
        return device.platform
    return "rocm" if "rocm" in device.client.platform_version.lower() else "cuda"


def describe_device(device: jax.Device) -> str:
    """Name, place, and compute capability where there is one."""
    name = cpu_model() if device.platform == "cpu" else device.device_kind
    capability = getattr(device, "compute_capability", None)
    suffix = f", compute capability {capability}" if capability else ""
    return f"{name} ({platform_of(device)}:{device.id}{suffix})"


def cpu_model() -> str:
    """What the host's processor is called; JAX says only "cpu"."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def count_calls(compiled: jax.stages.Compiled, target: str = DECODE_TARGET) -> int:
    """How many custom calls of a target are in a compiled program's HLO."""
    return (compiled.as_text() or "").count(f'custom_call_target="{target}"')


def describe_decode(compiled: jax.stages.Compiled, device: jax.Device) -> str:
    """Which implementation of dense_decode is in a compiled program's HLO."""
    calls = count_calls(compiled)
    if calls:
        return f"{platform_of(device)} kernel, custom call {DECODE_TARGET} x {calls}"
    reason = kernel_refusal(platform_of(device)) or "the kernel was not asked for"
    return f"pure-JAX reference ({reason})"

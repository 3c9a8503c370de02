"""Lists which kernels work on this machine, and the reason for each that does not."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
from typing import Any

import jax

import jax_flashmla
from jax_flashmla.bench import environment
from jax_flashmla.bench.device import describe_device
from jax_flashmla.cli import probes

VARIABLES = ("JAX_", "XLA_", "CUDA_", "NVIDIA_", "LD_LIBRARY_PATH")  # beginnings of their names


def run(*, as_json: bool) -> int:
    """Prints versions, compiled modules, and each device with what operations run on it.

    Args:
        as_json: one JSON object instead of a table, for bug reports: also the hardware, the commit
            and the environment variables that JAX, XLA and CUDA read.

    Returns:
        0; 1 if a small call of an operation fails or is wrong on a device.
    """
    found = describe()
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        _print_table(found)
    return 0 if all(device["right"] for device in found["devices"]) else 1


def describe() -> dict[str, Any]:
    """What `info --json` prints.

    Returns:
        What a benchmark's document says of hardware and software, and "platform" (the operating
        system), "kernels" ({"cpu", "cuda"}: whether they are built and usable), "devices"
        ([{"device", <operation>, ..., "right"}]) and "environment" (variables).
    """
    devices = _devices()
    return {
        **environment.describe(devices[0]),
        "platform": platform.platform(),
        "kernels": {target: _kernels(target) for target in ("cpu", "cuda")},
        "devices": [_on_device(device) for device in devices],
        "environment": {
            name: value for name, value in sorted(os.environ.items()) if name.startswith(VARIABLES)
        },
    }


def _on_device(device: jax.Device) -> dict[str, Any]:
    """What each operation runs there, and whether all were right."""
    ran = {operation: probes.run(operation, device) for operation in probes.PROBES}
    verdicts = {operation: verdict for operation, (verdict, _) in ran.items()}
    right = all(is_right for _, is_right in ran.values())
    return {"device": describe_device(device), **verdicts, "right": right}


def _print_table(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False)
    versions = {**found["versions"]}
    table.add_row("jax_flashmla", jax_flashmla.__version__)
    table.add_row("python", f"{versions.pop('python')} on {found['platform']}")
    versions.pop("jax_flashmla", None)
    for package, version in versions.items():
        table.add_row(package, version)
    table.add_row("CPU kernels", found["kernels"]["cpu"])
    table.add_row("CUDA kernels", found["kernels"]["cuda"])
    for device in found["devices"]:
        table.add_row("device", device["device"])
        for operation in probes.PROBES:
            table.add_row(f"    {operation}", device[operation])
    Console().print(table, highlight=False, markup=False)


def _kernels(target: str) -> str:
    """Whether the kernels for a platform are built, and whether they can run here."""
    if importlib.util.find_spec(f"jax_flashmla._{target}") is None:
        return f"not built: this installation has no module _{target}"
    refusal = jax_flashmla.kernel_refusal(target)
    if refusal is not None:
        return f"built, but not usable: {refusal}"
    try:
        jax.local_devices(backend=target)
    except RuntimeError:
        return f"built; {_no_device(target)}"
    return "built and usable"


def _no_device(target: str) -> str:
    plugins = [name for name in environment.versions() if name.startswith(f"jax-{target}")]
    if target == "cuda" and not plugins:
        return "JAX is installed without CUDA: pip install 'jax[cuda13]'"
    return f"JAX has no {target} device here"


def _devices() -> list[jax.Device]:
    """The default backend's devices, then the CPU's."""
    devices = jax.local_devices()
    if jax.default_backend() != "cpu":
        devices = [*devices, *jax.local_devices(backend="cpu")]
    return devices

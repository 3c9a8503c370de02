"""Says what this installation can do on this machine, and why not what it cannot."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

import jax_flashmla
from jax_flashmla.bench.device import describe_decode, describe_device, platform_of

PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "numpy")


def run(console: Console) -> int:
    """Prints versions, compiled modules, and each device with what dense_decode runs on it."""
    table = Table(show_header=False)
    table.add_row("jax_flashmla", jax_flashmla.__version__)
    table.add_row("python", f"{platform.python_version()} on {platform.platform()}")
    for package in PACKAGES:
        try:
            table.add_row(package, importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            continue
    table.add_row("CPU kernels", _kernels("cpu"))
    table.add_row("CUDA kernels", _kernels("cuda"))
    for device in _devices():
        table.add_row(f"device {platform_of(device)}:{device.id}", describe_device(device))
        table.add_row("    dense_decode", _decode_on(device))
    console.print(table)
    return 0


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
        return f"built; JAX has no {target} device here"
    return "built and usable"


def _devices() -> list[jax.Device]:
    """The default backend's devices, then the CPU's."""
    devices = jax.local_devices()
    if jax.default_backend() != "cpu":
        devices = [*devices, *jax.local_devices(backend="cpu")]
    return devices


def _decode_on(device: jax.Device) -> str:
    """Compiles and runs a small dense_decode there; says what ran, or what went wrong."""
    try:
        with jax.default_device(device):
            q = jnp.ones((1, 1, 16, 576), jnp.bfloat16)
            blocks = jnp.ones((2, 64, 1, 576), jnp.bfloat16)
            block_table = jnp.array([[1, 0]], jnp.int32)
            cache_seqlens = jnp.array([100], jnp.int32)
            arguments = (q, blocks, block_table, cache_seqlens)
            compiled = jax.jit(jax_flashmla.dense_decode).lower(*arguments).compile()
            out, _ = jax.block_until_ready(compiled(*arguments))
            # Every value is 1, so every mean of values is.
            verdict = "" if bool((out == 1).all()) else ", WRONG RESULT"
    except Exception as error:  # whatever fails is the answer to the user's question
        return f"fails: {type(error).__name__}: {error}"
    return describe_decode(compiled, device) + verdict

"""Lists which kernels work on this machine, and the reason for each that does not."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

import jax_flashmla
from jax_flashmla.bench.device import describe_decode, describe_device

PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "numpy")


def run(console: Console) -> int:
    """Prints versions, compiled modules, and each device with what dense_decode runs on it.

    Returns:
        0; 1 if a small dense_decode fails or is wrong on a device.
    """
    table = Table(show_header=False)
    table.add_row("jax_flashmla", jax_flashmla.__version__)
    table.add_row("python", f"{platform.python_version()} on {platform.platform()}")
    for package in PACKAGES:
        if version := _version(package):
            table.add_row(package, version)
    table.add_row("CPU kernels", _kernels("cpu"))
    table.add_row("CUDA kernels", _kernels("cuda"))
    all_right = True
    for device in _devices():
        verdict, is_right = _decode_on(device)
        all_right &= is_right
        table.add_row("device", describe_device(device))
        table.add_row("    dense_decode", verdict)
    console.print(table, highlight=False, markup=False)
    return 0 if all_right else 1


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
    plugins = [name for name in PACKAGES if name.startswith(f"jax-{target}")]
    if target == "cuda" and not any(map(_version, plugins)):
        return "JAX is installed without CUDA: pip install 'jax[cuda13]'"
    return f"JAX has no {target} device here"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> list[jax.Device]:
    """The default backend's devices, then the CPU's."""
    devices = jax.local_devices()
    if jax.default_backend() != "cpu":
        devices = [*devices, *jax.local_devices(backend="cpu")]
    return devices


def _decode_on(device: jax.Device) -> tuple[str, bool]:
    """Compiles and runs a small dense_decode there: what ran or went wrong, and whether right."""
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
            is_right = bool((out == 1).all())
    except Exception as error:  # whatever fails is the answer to the user's question
        return f"fails: {type(error).__name__}: {error}", False
    return describe_decode(compiled, device) + ("" if is_right else ", WRONG RESULT"), is_right

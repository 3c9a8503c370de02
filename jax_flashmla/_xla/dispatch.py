"""Which platform runs the kernels, and why another does not."""

from __future__ import annotations

import functools
import warnings

import jax

from jax_flashmla._xla.modules import missing_module

PLATFORMS = ("cpu", "cuda")


def platform_refusal(platform: str) -> str | None:
    """Why this installation runs no kernels at all on a platform; None where it does.

    Where there is no CUDA device, "cuda" is answered for a machine that has the right one: code is
    lowered here to run there.
    """
    if platform == "cpu":
        return missing_module("cpu")
    if platform != "cuda":
        return f"there are kernels for cpu and cuda, not for {platform}"
    device = local_cuda_device()
    if device is None:
        return None
    if missing := missing_module("cuda"):
        return missing
    if device.compute_capability != "9.0":
        return (
            "the CUDA kernels need compute capability 9.0 (Hopper), got "
            f"{device.compute_capability} ({device.device_kind})"
        )
    return None


def local_cuda_device() -> jax.Device | None:
    try:
        return jax.local_devices(backend="cuda")[0]
    except RuntimeError:
        return None


@functools.cache
def warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)

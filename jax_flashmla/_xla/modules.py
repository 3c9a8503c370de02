"""The compiled modules with the handlers. A CPU-only build has no `_cuda`."""

from __future__ import annotations

import importlib
import pathlib
import re
from types import ModuleType

import jax


def _installed_ffi_version() -> tuple[int, int] | None:
    """The version of XLA's FFI in the installed jaxlib, read off the header that it ships."""
    header = pathlib.Path(jax.ffi.include_dir()) / "xla" / "ffi" / "api" / "c_api.h"
    if not header.is_file():
        return None
    found = dict(re.findall(r"#define XLA_FFI_API_(MAJOR|MINOR) (\d+)", header.read_text()))
    return int(found["MAJOR"]), int(found["MINOR"])


def _load(name: str, platform: str) -> tuple[ModuleType | None, str]:
    """A module with its handlers registered, or None and the reason."""
    try:
        module = importlib.import_module(f"jax_flashmla.{name}")
    except ImportError as error:
        return None, str(error)
    built, installed = module.ffi_api_version(), _installed_ffi_version()
    if installed is not None and (built[0] != installed[0] or built[1] > installed[1]):
        raise ImportError(
            f"jax_flashmla.{name} was built for XLA FFI {built[0]}.{built[1]}, but jaxlib "
            f"{jax.lib.__version__} has {installed[0]}.{installed[1]}: install a newer jaxlib, or "
            "reinstall jax_flashmla from source next to this one"
        )
    for target, handler in module.registrations().items():
        jax.ffi.register_ffi_target(target, handler, platform=platform)
    return module, ""


_cpu, _cpu_missing = _load("_cpu", "cpu")
_cuda, _cuda_missing = _load("_cuda", "CUDA")


def missing_module(platform: str) -> str | None:
    """Why the module of "cpu" or "cuda" cannot be imported; None where it was."""
    module, missing = (_cpu, _cpu_missing) if platform == "cpu" else (_cuda, _cuda_missing)
    return None if module else f"the {platform.upper()} module cannot be imported ({missing})"


def module_of(platform: str) -> ModuleType:
    """The module of "cpu" or "cuda", for what is done outside of XLA.

    Raises:
        ImportError: there is none, and why.
    """
    module = _cpu if platform == "cpu" else _cuda
    if module is None:
        raise ImportError(missing_module(platform))
    return module

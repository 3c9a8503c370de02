"""The tiny models that transformers wrote: those in the repository, and new ones where it is."""

from __future__ import annotations

import importlib.util
import pathlib
import types
import warnings

import numpy as np
import pytest
import safetensors.numpy

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
NAMES = sorted(path.parent.name for path in GOLDEN.glob("*/golden.safetensors"))
_LAYERS_ONLY = ("minicpm3", "youtu", "axk1", "sarvam_mla", "deepseek_v3_wide", "deepseek_v32_wide")
LANGUAGE_MODELS = [name for name in NAMES if name not in _LAYERS_ONLY]
SPARSE = [name for name in NAMES if name in ("deepseek_v32", "deepseek_v32_wide", "glm_moe_dsa")]
SOURCES = ["golden", "live"]


def find(name: str, source: str, scratch: pathlib.Path, seed: int = 1) -> pathlib.Path:
    """The folder of a golden model, or of one that transformers makes in scratch, another seed."""
    if source == "golden":
        return GOLDEN / name
    for package in ("torch", "transformers"):
        pytest.importorskip(package)
    directory = scratch / f"{name}-{seed}"
    if directory.exists():
        return directory
    with warnings.catch_warnings(action="ignore"):  # theirs are not ours to mend
        maker().write(name, directory, seed)
    return directory


def maker() -> types.ModuleType:
    """tests/golden/make_golden.py"""
    spec = importlib.util.spec_from_file_location("make_golden", GOLDEN / "make_golden.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load(directory: pathlib.Path) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(directory / "golden.safetensors")

"""Hugging Face directories for tests: whole or in shards, float8 blocks included."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping

import ml_dtypes
import numpy as np
import safetensors.numpy


def write_checkpoint(
    directory: pathlib.Path,
    tensors: Mapping[str, np.ndarray],
    *,
    config: dict | None = None,
    shards: int = 0,
) -> pathlib.Path:
    """model.safetensors, or so many shards with an index; and config.json if there is one."""
    directory.mkdir(exist_ok=True)
    if config is not None:
        (directory / "config.json").write_text(json.dumps(config))
    contiguous = {name: np.ascontiguousarray(x) for name, x in tensors.items()}
    if not shards:
        safetensors.numpy.save_file(contiguous, directory / "model.safetensors")
        return directory
    names = sorted(contiguous)
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = names[i::shards]  # a layer's tensors end up in several files
        safetensors.numpy.save_file({name: contiguous[name] for name in part}, directory / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def quantise(x: np.ndarray, block: tuple[int, int] = (128, 128)) -> tuple[np.ndarray, np.ndarray]:
    """x [m, n] as float8_e4m3fn and the float32 scales of its blocks, the last ones cut off."""
    m, n = x.shape
    values = np.zeros(x.shape, ml_dtypes.float8_e4m3fn)
    scales = np.zeros((-(-m // block[0]), -(-n // block[1])), np.float32)
    for i, j in np.ndindex(scales.shape):
        rows = slice(i * block[0], (i + 1) * block[0])
        columns = slice(j * block[1], (j + 1) * block[1])
        part = x[rows, columns].astype(np.float32)
        scales[i, j] = np.abs(part).max() / 448  # the largest float8_e4m3fn
        values[rows, columns] = part / scales[i, j]
    return values, scales


def dequantise(
    values: np.ndarray, scales: np.ndarray, block: tuple[int, int] = (128, 128)
) -> np.ndarray:
    """Element by element, in float32."""
    i, j = np.indices(values.shape)
    return values.astype(np.float32) * scales[i // block[0], j // block[1]]

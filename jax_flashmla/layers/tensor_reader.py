"""The tensors of a Hugging Face checkpoint directory, read one at a time."""

from __future__ import annotations

import functools
import json
import math
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors

if TYPE_CHECKING:
    from jax.typing import DTypeLike

_FLOATS = ("F32", "BF16", "F16", "F8_E4M3")
_SCALE_SUFFIX = "_scale_inv"  # of the tensor with the scales of an F8_E4M3 tensor's blocks


class StoredTensor(NamedTuple):
    """What a checkpoint says of a tensor: dtype as safetensors writes it ("BF16"), and shape."""

    dtype: str
    shape: tuple[int, ...]


class TensorReader:
    """Reads tensors of a Hugging Face directory: one model.safetensors, or shards and their index.

    Only headers are read until a tensor is asked for, and files are opened when they are needed.
    Floating-point tensors (float32, bfloat16, float16) are read as they are; float8_e4m3fn ones
    are multiplied by the scales of their blocks, as DeepSeek V3 publishes them: `NAME_scale_inv`
    float32 [ceil(m / 128), ceil(n / 128)] for NAME [m, n], blocks at the right and bottom edges
    cut off. The blocks' size is read from config.json's quantization_config.weight_block_size.

    Args:
        directory: with model.safetensors, or model.safetensors.index.json and the files it names.

    Raises:
        FileNotFoundError: there is no such directory or no safetensors file in it.
        ValueError: a file that is not what it should be.
    """

    def __init__(self, directory: str | pathlib.Path):
        self.directory = pathlib.Path(directory)
        if not self.directory.is_dir():
            raise FileNotFoundError(f"directory must be a folder, got {str(directory)!r}")
        self._block_size = _weight_block_size(self.directory / "config.json")
        index = self.directory / "model.safetensors.index.json"
        single = self.directory / "model.safetensors"
        self._shards: dict[str, _Shard] = {}
        self._file_of: dict[str, str]
        if index.is_file():
            self._file_of = _read_json(index).get("weight_map", {})
            for file in set(self._file_of.values()):
                if pathlib.PurePath(file).name != file:
                    raise ValueError(f"{index} must name files beside it, got {file!r}")
        elif single.is_file():
            self._file_of = dict.fromkeys(self._shard(single.name).names, single.name)
        else:
            found = sorted(p.name for p in self.directory.iterdir())
            raise FileNotFoundError(
                f"{self.directory} must hold model.safetensors or model.safetensors.index.json, "
                f"got {found or 'an empty folder'}"
            )

    def __iter__(self) -> Iterator[str]:
        """The names of all tensors."""
        return iter(self._file_of)

    def __contains__(self, name: str) -> bool:
        return name in self._file_of and name in self._shard(self._file_of[name]).names

    def stored(self, name: str) -> StoredTensor:
        """A tensor's dtype and shape in the file.

        Raises:
            KeyError: there is no such tensor.
        """
        if name not in self:
            raise KeyError(f"{self.directory} has no tensor {name!r}")
        return self._shard(self._file_of[name]).stored(name)

    def read(self, name: str, dtype: DTypeLike) -> jax.Array:
        """A tensor as a `dtype` array on JAX's default device; float8 blocks are dequantised.

        Raises:
            KeyError: there is no such tensor.
            ValueError: it is not one that this class reads, or its scales do not fit.
        """
        if problems := self._problems(name, self.stored(name).shape):
            raise ValueError("; ".join(problems))
        x = self._shard(self._file_of[name]).read(name)
        if x.dtype != ml_dtypes.float8_e4m3fn:
            return jnp.asarray(x).astype(dtype)
        scales = self.read(name + _SCALE_SUFFIX, jnp.float32)
        return _dequantise(jnp.asarray(x), scales, self._block_size, jnp.dtype(dtype))

    def check(
        self, expected: Mapping[str, tuple[int, ...]], *, within: str = "", ignore: str = r"(?!)"
    ) -> None:
        """Compares what is stored with what is expected, from headers alone.

        Args:
            expected: shapes by name.
            within: regular expression that a name's beginning matches where the checkpoint should
                have no other tensors than the expected; everything by default.
            ignore: regular expression of further names, from their beginning, that may be there.

        Raises:
            ValueError: names every tensor that is missing, extra, misshapen or of another dtype.
        """
        problems: list[str] = []
        accounted = set(expected)
        for name, shape in expected.items():
            if name not in self:
                problems.append(f"missing {name} {list(shape)}")
                continue
            problems += self._problems(name, shape)
            if self.stored(name).dtype == "F8_E4M3":
                accounted.add(name + _SCALE_SUFFIX)
        for name in self:
            if name in accounted or not re.match(within, name) or re.match(ignore, name):
                continue
            problems.append(f"extra {name}")
        if problems:
            listed = "\n  ".join(sorted(problems))
            raise ValueError(
                f"{self.directory} does not fit its configuration, {len(problems)} tensors:\n  "
                f"{listed}"
            )

    def _problems(self, name: str, shape: tuple[int, ...]) -> list[str]:
        """What is wrong with a tensor that is there."""
        got = self.stored(name)
        if got.dtype not in _FLOATS:
            return [f"{name} must be of {', '.join(_FLOATS)}, got {got.dtype}"]
        if got.shape != tuple(shape):
            return [f"{name} must have shape {list(shape)}, got {list(got.shape)}"]
        if got.dtype != "F8_E4M3":
            return []
        scales = name + _SCALE_SUFFIX
        if len(shape) != 2:
            return [f"{name} must have rank 2 as F8_E4M3, got {list(shape)}"]
        grid = tuple(-(-n // size) for n, size in zip(shape, self._block_size, strict=True))
        if scales not in self:
            return [f"missing {scales} {list(grid)}"]
        if self.stored(scales) != ("F32", grid):
            dtype, other = self.stored(scales)
            return [f"{scales} must be F32 {list(grid)}, got {dtype} {list(other)}"]
        return []

    def _shard(self, file: str) -> _Shard:
        if file not in self._shards:
            self._shards[file] = _Shard(self.directory / file)
        return self._shards[file]


class _Shard:
    """One safetensors file."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        try:
            self._file = safetensors.safe_open(path, framework="np")
        except FileNotFoundError:
            raise FileNotFoundError(f"{path}, which the index names, is missing") from None
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path} must be a safetensors file: {error}") from None
        self.names = frozenset(self._file.keys())

    def stored(self, name: str) -> StoredTensor:
        tensor = self._file.get_slice(name)
        return StoredTensor(tensor.get_dtype(), tuple(tensor.get_shape()))

    def read(self, name: str) -> np.ndarray:
        dtype, shape = self.stored(name)
        if dtype != "F8_E4M3":
            return self._file.get_tensor(name)
        # safetensors looks for float8 types in numpy, where they are not. The format: the header's
        # length in 8 bytes, the header in JSON, the tensors at the offsets that it gives.
        with self.path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            begin, _ = json.loads(file.read(length))[name]["data_offsets"]
            file.seek(8 + length + begin)
            return np.fromfile(file, ml_dtypes.float8_e4m3fn, math.prod(shape)).reshape(shape)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _dequantise(
    x: jax.Array, scales: jax.Array, block_size: tuple[int, int], dtype: np.dtype
) -> jax.Array:
    """x [m, n] times the scales of its blocks, float32 [ceil(m / size), ceil(n / size)]."""
    m, n = x.shape
    rows = jnp.repeat(scales, block_size[0], axis=0)[:m]
    return (x.astype(jnp.float32) * jnp.repeat(rows, block_size[1], axis=1)[:, :n]).astype(dtype)


def _weight_block_size(config: pathlib.Path) -> tuple[int, int]:
    quantization = _read_json(config).get("quantization_config") if config.is_file() else None
    size = (quantization or {}).get("weight_block_size", (128, 128))
    if len(size) != 2 or not all(isinstance(n, int) and n > 0 for n in size):
        raise ValueError(f"{config}: weight_block_size must be two positive integers, got {size}")
    return tuple(size)


def _read_json(path: pathlib.Path) -> dict:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} must be JSON: {error}") from None

"""The tensors of a Hugging Face checkpoint directory, read one at a time."""

from __future__ import annotations

import functools
import json
import math
import os
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

try:
    import safetensors
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "reading checkpoints needs the package safetensors: pip install 'jax-flashmla[hf]'"
    ) from error

from jax_flashmla import _limits
from jax_flashmla.layers.hf.config import download_first, unwrap
from jax_flashmla.layers.hf.json_object import REQUIRED, read_json, to_int

if TYPE_CHECKING:
    from jax.typing import DTypeLike

_DTYPES = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}
_WEIGHTS = ("F32", "BF16", "F16", "F8_E4M3")
_SCALES = ("F32", "BF16", "F16", "F8_E8M0")
_SCALE_SUFFIX = "_scale_inv"  # of the tensor with the scales of an F8_E4M3 tensor's blocks
# Of caches and activations, which other programs quantise with them.
_UNUSED_SCALES = r"(?:.*\.)?(?:q|k|v|kv|input|output)_scale$"


class StoredTensor(NamedTuple):
    """What a checkpoint says of a tensor: dtype as safetensors writes it ("BF16"), and shape."""

    dtype: str
    shape: tuple[int, ...]


class TensorReader:
    """Reads tensors of a Hugging Face directory: one model.safetensors, or shards and their index.

    Only headers are read until a tensor is asked for, and files are opened when they are needed.
    Floating-point tensors (float32, bfloat16, float16) are read as they are; float8_e4m3fn ones
    are multiplied by the scales of their blocks, as DeepSeek V3 publishes them: `NAME_scale_inv`
    [ceil(m / 128), ceil(n / 128)] for NAME [m, n], blocks at the right and bottom edges cut off;
    float32, bfloat16, float16 or float8_e8m0fnu. The blocks' size is read from config.json's
    quantization_config.weight_block_size.

    Args:
        directory: with model.safetensors, or model.safetensors.index.json and the files it names.

    Attributes:
        block_size: rows and columns of a float8 tensor's blocks.

    Raises:
        FileNotFoundError: there is no such directory or no safetensors file in it.
        TypeError: directory is not a path.
        ValueError: a file that is not what it should be; it names file and key.
    """

    def __init__(self, directory: str | os.PathLike[str]):
        if not isinstance(directory, str | os.PathLike):
            raise TypeError(f"directory must be a path, got {directory!r}")
        self.directory = pathlib.Path(directory)
        if not self.directory.is_dir():
            way = ": pass the folder that it is in" if self.directory.is_file() else ""
            raise FileNotFoundError(
                f"directory must be a folder, got {str(directory)!r}{way}"
                f"{download_first(directory)}"
            )
        self.block_size = _weight_block_size(self.directory / "config.json")
        index = self.directory / "model.safetensors.index.json"
        single = self.directory / "model.safetensors"
        self._shards: dict[str, _Shard] = {}
        self._file_of: dict[str, str]
        if index.is_file():
            self._file_of = _files_by_tensor(index)
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
        if self.stored(name).dtype == "F8_E4M3":
            values, scales = self.read_float8(name)
            return _dequantise(values, scales, self.block_size, jnp.dtype(dtype))
        self._check_stored(name)
        return jnp.asarray(self._array(name)).astype(dtype)

    def read_float8(self, name: str) -> tuple[jax.Array, jax.Array]:
        """A float8 tensor as it is stored, on JAX's default device.

        Returns:
            values: float8_e4m3fn [m, n].
            scales: float32 [ceil(m / block_size[0]), ceil(n / block_size[1])], by which the values
                of a block are to be multiplied.

        Raises:
            KeyError: there is no such tensor.
            ValueError: it is not of float8, or its scales do not fit.
        """
        stored = self.stored(name)
        if stored.dtype != "F8_E4M3":
            raise ValueError(f"{name} must be of F8_E4M3, got {stored.dtype}")
        self._check_stored(name)
        scales = self._array(name + _SCALE_SUFFIX).astype(np.float32)
        return jnp.asarray(self._array(name)), jnp.asarray(scales)

    def check(
        self, expected: Mapping[str, tuple[int, ...]], *, within: str = "", ignore: str = r"(?!)"
    ) -> None:
        """Compares what is stored with what is expected, from headers alone.

        Args:
            expected: shapes by name.
            within: regular expression that a name's beginning matches where the checkpoint should
                have no other tensors than the expected; everything by default.
            ignore: regular expression of further names, from their beginning, that may be there.
                Scales of caches and activations (k_scale, input_scale and their like) always may.

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
            allowed = re.match(ignore, name) or re.match(_UNUSED_SCALES, name)
            if name not in accounted and re.match(within, name) and not allowed:
                problems.append(f"extra {name}")
        if problems:
            listed = "\n  ".join(sorted(problems))
            raise ValueError(
                f"{self.directory} does not fit its configuration, {len(problems)} tensors:\n  "
                f"{listed}"
            )

    def _check_stored(self, name: str) -> None:
        if problems := self._problems(name, self.stored(name).shape):
            raise ValueError("; ".join(problems))

    def _problems(self, name: str, shape: tuple[int, ...]) -> list[str]:
        """What is wrong with a tensor that is there."""
        got = self.stored(name)
        if got.dtype not in _WEIGHTS:
            return [f"{name} must be of {', '.join(_WEIGHTS)}, got {got.dtype}"]
        if got.shape != tuple(shape):
            return [f"{name} must have shape {list(shape)}, got {list(got.shape)}"]
        if got.dtype != "F8_E4M3":
            return []
        scales = name + _SCALE_SUFFIX
        if len(shape) != 2:
            return [f"{name} must have rank 2 as F8_E4M3, got {list(shape)}"]
        grid = tuple(-(-n // size) for n, size in zip(shape, self.block_size, strict=True))
        if scales not in self:
            return [f"missing {scales} {list(grid)}"]
        stored = self.stored(scales)
        if stored.dtype not in _SCALES:
            return [f"{scales} must be of {', '.join(_SCALES)}, got {stored.dtype}"]
        if stored.shape != grid:
            return [f"{scales} must have shape {list(grid)}, got {list(stored.shape)}"]
        return []

    def _array(self, name: str) -> np.ndarray:
        return self._shard(self._file_of[name]).read(name)

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
        except (safetensors.SafetensorError, OSError) as error:
            raise ValueError(f"{path} must be a safetensors file: {error}") from None
        self.names = frozenset(self._file.keys())

    def stored(self, name: str) -> StoredTensor:
        tensor = self._file.get_slice(name)
        return StoredTensor(tensor.get_dtype(), tuple(tensor.get_shape()))

    def read(self, name: str) -> np.ndarray:
        """A tensor of one of _DTYPES, of which safetensors cannot give NumPy the float8 ones."""
        dtype, shape = self.stored(name)
        with self.path.open("rb") as file:
            file.seek(self._begins[name])
            return np.fromfile(file, _DTYPES[dtype], math.prod(shape)).reshape(shape)

    @functools.cached_property
    def _begins(self) -> dict[str, int]:
        """Where in the file each tensor begins.

        The format: the header's length in 8 bytes, the header in JSON, then the tensors, at offsets
        from there that the header gives. safetensors has checked them when it opened the file.
        """
        with self.path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        return {name: 8 + length + header[name]["data_offsets"][0] for name in self.names}


@functools.partial(jax.jit, static_argnums=(2, 3))
def _dequantise(
    x: jax.Array, scales: jax.Array, block_size: tuple[int, int], dtype: np.dtype
) -> jax.Array:
    """x [m, n] times the scales of its blocks, float32 [ceil(m / size), ceil(n / size)]."""
    factors = scales
    for axis, (n, size) in enumerate(zip(x.shape, block_size, strict=True)):
        repeated = jnp.repeat(factors, min(n, size), axis=axis)  # a block may be wider than x
        factors = jax.lax.slice_in_dim(repeated, 0, n, axis=axis)
    return (x.astype(jnp.float32) * factors).astype(dtype)


def _weight_block_size(path: pathlib.Path) -> tuple[int, int]:
    """Of config.json, which need not be there; of the model that it wraps, if it says nothing."""
    if not path.is_file():
        return 128, 128
    whole = read_json(path)
    for config in (whole, unwrap(whole)):
        quantization = config.object("quantization_config")
        size = quantization.get("weight_block_size")
        if size is None:
            continue
        sizes = [to_int(n) or 0 for n in size] if isinstance(size, list) else []
        if len(sizes) != 2 or not all(0 < n <= _limits.INT32_MAX for n in sizes):
            raise quantization.error("weight_block_size", "must be two positive integers", size)
        return sizes[0], sizes[1]
    return 128, 128


def _files_by_tensor(index: pathlib.Path) -> dict[str, str]:
    """The index's weight_map: the file that each tensor is in, beside the index."""
    weight_map = read_json(index).object("weight_map", REQUIRED)
    for name, file in weight_map.values.items():
        beside = isinstance(file, str) and pathlib.PurePath(file).name == file
        if not beside or file in ("", "..") or "\0" in file:
            raise weight_map.error(name, "must name a file beside the index", file)
    return dict(weight_map.values)

"""From the attention weights of a published checkpoint to MLAParams."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

import jax
import jax.numpy as jnp

from jax_flashmla import _checks, _limits
from jax_flashmla.layers.config import MLAConfig
from jax_flashmla.layers.params import MLAParams
from jax_flashmla.layers.tensor_reader import TensorReader

if TYPE_CHECKING:
    from jax.typing import DTypeLike

_T = TypeVar("_T")

# Beside the layer's weights: V3.2's indexer, and the frequencies that old checkpoints store.
_IGNORED = r"indexer\.|rotary_emb\.inv_freq$"


def load_attention(
    checkpoint: TensorReader | str | pathlib.Path,
    config: MLAConfig,
    layers: Iterable[int],
    *,
    dtype: DTypeLike = jnp.bfloat16,
    progress: bool = False,
) -> Iterator[MLAParams]:
    """Loads the attention weights of layers of a Hugging Face directory, one layer at a time.

    All layers are checked at once, from the files' headers, when this is called; a layer's weights
    are read when the iterator comes to it, and put on JAX's default device.

        config = MLAConfig.from_hf(directory)
        params = list(load_attention(directory, config, range(61)))

    Args:
        checkpoint: the directory, or a reader of it. Weights may be float32, bfloat16, float16 or
            float8 in blocks with scales: see `TensorReader`.
        config: the layer.
        layers: which ones, from 0. LongCat's layers have two attentions each: there they are
            2 * layer and 2 * layer + 1, as transformers counts them.
        dtype: of the parameters.
        progress: whether to show a bar on standard error, with rich where it is installed.

    Returns:
        An iterator over MLAParams, in the order of `layers`.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: names every tensor of these layers that is missing, extra, misshapen or of a
            dtype that is not read.
    """
    reader = checkpoint if isinstance(checkpoint, TensorReader) else TensorReader(checkpoint)
    layers = [_checks.check_int("layers", layer, 0, _limits.INT32_MAX) for layer in layers]
    prefixes = _prefixes(reader, layers)
    expected = {
        prefix + name: shape
        for prefix in prefixes
        for name, shape in attention_shapes(config).items()
    }
    within = "|".join(map(re.escape, prefixes)) or r"(?!)"
    reader.check(expected, within=within, ignore=rf"(?:{within})(?:{_IGNORED})")
    return _load(reader, config, prefixes, dtype, progress)


def _prefixes(reader: TensorReader, layers: list[int]) -> list[str]:
    """What the names of each attention's tensors begin with."""
    if any(".self_attn.0." in name for name in reader):
        return [f"model.layers.{i // 2}.self_attn.{i % 2}." for i in layers]
    return [f"model.layers.{i}.self_attn." for i in layers]


def attention_shapes(config: MLAConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of an attention's tensors by name, as a checkpoint stores them: outputs first."""
    hidden, heads, rank = config.hidden_size, config.num_heads, config.q_lora_rank
    queries = heads * (config.qk_nope_head_dim + config.qk_rope_head_dim)
    shapes: dict[str, tuple[int, ...]]
    if rank is None:
        shapes = {"q_proj.weight": (queries, hidden)}
    else:
        shapes = {
            "q_a_proj.weight": (rank, hidden),
            "q_a_layernorm.weight": (rank,),
            "q_b_proj.weight": (queries, rank),
        }
    keys_and_values = heads * (config.qk_nope_head_dim + config.v_head_dim)
    return shapes | {
        "kv_a_proj_with_mqa.weight": (config.d_qk, hidden),
        "kv_a_layernorm.weight": (config.kv_lora_rank,),
        "kv_b_proj.weight": (keys_and_values, config.kv_lora_rank),
        "o_proj.weight": (hidden, heads * config.v_head_dim),
    }


def track(items: Sequence[_T], description: str, progress: bool) -> Iterable[_T]:
    """The items, with a bar while they are gone through, where that is asked for and possible."""
    if not progress:
        return items
    try:
        import rich.console
        import rich.progress
    except ImportError:
        return items
    console = rich.console.Console(stderr=True)
    return rich.progress.track(items, description=description, console=console)


def _load(
    reader: TensorReader, config: MLAConfig, prefixes: list[str], dtype: DTypeLike, progress: bool
) -> Iterator[MLAParams]:
    for prefix in track(prefixes, "attention", progress):
        yield _to_params(
            config, {name: reader.read(prefix + name, dtype) for name in attention_shapes(config)}
        )


def _to_params(config: MLAConfig, tensors: dict[str, jax.Array]) -> MLAParams:
    heads, nope = config.num_heads, config.qk_nope_head_dim

    def per_head(name: str) -> jax.Array:  # [heads * d, inputs] -> [heads, d, inputs]
        return tensors[name].reshape(heads, -1, tensors[name].shape[1])

    def queries(name: str) -> jax.Array:  # -> [inputs, heads, nope + rope]
        return jnp.transpose(per_head(name), (2, 0, 1))

    direct = config.q_lora_rank is None
    w_uk, w_uv = jnp.split(per_head("kv_b_proj.weight"), [nope], axis=1)
    w_o = tensors["o_proj.weight"].reshape(config.hidden_size, heads, config.v_head_dim)
    return MLAParams(
        w_q=queries("q_proj.weight") if direct else None,
        w_dq=None if direct else tensors["q_a_proj.weight"].T,
        q_norm=None if direct else tensors["q_a_layernorm.weight"],
        w_uq=None if direct else queries("q_b_proj.weight"),
        w_dkv=tensors["kv_a_proj_with_mqa.weight"].T,
        kv_norm=tensors["kv_a_layernorm.weight"],
        w_uk=w_uk,
        w_uv=w_uv,
        w_o=jnp.transpose(w_o, (1, 2, 0)),
    )

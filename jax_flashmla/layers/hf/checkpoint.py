"""From the attention weights of a published checkpoint to MLAParams."""

from __future__ import annotations

import operator
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

import jax
import jax.numpy as jnp

from jax_flashmla.layers.config import MLAConfig
from jax_flashmla.layers.hf.tensor_reader import TensorReader
from jax_flashmla.layers.indexer_config import IndexerConfig
from jax_flashmla.layers.params import MLAParams, check_layer

if TYPE_CHECKING:
    from jax.typing import DTypeLike

_T = TypeVar("_T")

# Beside the layer's weights: the frequencies that old checkpoints store.
_IGNORED = r"rotary_emb\.inv_freq$"
_FLOAT32 = "indexer.weights_proj.weight"  # read in float32 whatever the others are read in
_LAYER = re.compile(r"(?P<prefix>(?:.*\.)?)layers\.(?P<layer>\d{1,9})\.self_attn\.(?P<rest>.*)")


def load_attention(
    checkpoint: TensorReader | str | os.PathLike[str],
    config: MLAConfig,
    layers: Iterable[int],
    *,
    dtype: DTypeLike = jnp.bfloat16,
    prefix: str | None = None,
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
        config: the layer. Without an indexer, those of the checkpoint are passed over.
        layers: which ones, from 0. LongCat's layers have two attentions each: there they are
            2 * layer and 2 * layer + 1, as transformers counts them.
        dtype: of the parameters.
        prefix: what the tensors' names have before "layers.0.self_attn.", such as "model." or
            "language_model.model."; found by itself where only one model in the checkpoint has
            latent attention.
        progress: whether to show a bar on standard error, with rich where it is installed.

    Returns:
        An iterator over MLAParams, in the order of `layers`.

    Raises:
        FileNotFoundError: there is no checkpoint.
        TypeError: an argument of another type.
        ValueError: a layer that the checkpoint does not have, or several prefixes to choose from;
            or it names every tensor of these layers that is missing, extra, misshapen or of a
            dtype that is not read.
    """
    check_layer(config, dtype=dtype)
    reader = checkpoint if isinstance(checkpoint, TensorReader) else TensorReader(checkpoint)
    if prefix is None:
        prefix = attention_prefix(reader)
    elif not isinstance(prefix, str):
        raise TypeError(f"prefix must be a string or None, got {prefix!r}")
    attentions = _attentions(reader, prefix, config, layers)
    expected = {
        attention + name: shape
        for attention, of in attentions
        for name, shape in attention_shapes(of).items()
    }
    within = "|".join(re.escape(name) for name, _ in attentions) or r"(?!)"
    ignored = _IGNORED if config.indexer is not None else rf"{_IGNORED}|indexer\."
    reader.check(expected, within=within, ignore=rf"(?:{within})(?:{ignored})")
    return _load(reader, attentions, dtype, progress)


def attention_prefix(reader: TensorReader) -> str:
    """What the names of the tensors of latent attention have before "layers.0.self_attn.".

    Raises:
        ValueError: there is none, or there are several.
    """
    # Only latent attention has such a projection; a tower for images may have layers, too. What
    # predicts several tokens ahead is not the model.
    matches = (_LAYER.fullmatch(name) for name in reader if ".self_attn." in name)
    found = {m["prefix"] for m in matches if m and re.search(r"\bkv_[ab]_proj", m["rest"])}
    prefixes = sorted(prefix for prefix in found if "mtp" not in prefix.split("."))
    if len(prefixes) == 1:
        return prefixes[0]
    if prefixes:
        raise ValueError(
            f"prefix must be one of {prefixes}: several models in {reader.directory} have latent "
            "attention, got None"
        )
    raise ValueError(
        f"{reader.directory} must have latent attention, tensors such as "
        f"model.layers.0.self_attn.kv_b_proj.weight, got {sorted(reader)[:3]} and others"
    )


def _attentions(
    reader: TensorReader, prefix: str, config: MLAConfig, layers: Iterable[int]
) -> list[tuple[str, MLAConfig]]:
    """What the names of each attention's tensors begin with, and its own config."""
    if isinstance(layers, str | bytes) or not isinstance(layers, Iterable):
        raise TypeError(
            f"layers must be the numbers of layers, such as range(3) or [2], got {layers!r}"
        )
    matches = [m for m in map(_LAYER.fullmatch, reader) if m and m["prefix"] == prefix]
    if not matches:
        raise ValueError(
            f"prefix must be one that names in {reader.directory} have before "
            f'"layers.0.self_attn.", got {prefix!r}'
        )
    twice = any(m["rest"].startswith("0.") for m in matches)  # LongCat
    count = (1 + max(int(m["layer"]) for m in matches)) * (2 if twice else 1)
    attentions = []
    for layer in layers:
        try:
            i = -1 if isinstance(layer, bool) else operator.index(layer)
        except TypeError:
            raise TypeError(f"layers must be integers, got {layer!r}") from None
        if not 0 <= i < count:
            raise ValueError(
                f"layers must be between 0 and {count - 1}, as {reader.directory} has "
                f"{count} layers under {prefix!r}, got {layer}"
            )
        place = f"{i // 2}.self_attn.{i % 2}." if twice else f"{i}.self_attn."
        attentions.append((f"{prefix}layers.{place}", config.for_layer(i)))
    return attentions


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
    if config.indexer is not None:
        index = config.indexer
        shapes |= {
            "indexer.wq_b.weight": (index.num_heads * index.head_dim, rank or 0),
            "indexer.wk.weight": (index.head_dim, hidden),
            "indexer.k_norm.weight": (index.head_dim,),
            "indexer.k_norm.bias": (index.head_dim,),
            "indexer.weights_proj.weight": (index.num_heads, hidden),
        }
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
    reader: TensorReader,
    attentions: list[tuple[str, MLAConfig]],
    dtype: DTypeLike,
    progress: bool,
) -> Iterator[MLAParams]:
    def read(name: str) -> jax.Array:
        return reader.read(name, jnp.float32 if name.endswith(_FLOAT32) else dtype)

    for attention, config in track(attentions, "attention", progress):
        names = attention_shapes(config)
        yield _to_params(config, {name: read(attention + name) for name in names})


def _to_params(config: MLAConfig, tensors: dict[str, jax.Array]) -> MLAParams:
    heads, nope = config.num_heads, config.qk_nope_head_dim

    def per_head(name: str) -> jax.Array:  # [heads * d, inputs] -> [heads, d, inputs]
        return tensors[name].reshape(heads, -1, tensors[name].shape[1])

    def queries(name: str) -> jax.Array:  # -> [inputs, heads, nope + rope]
        return jnp.transpose(per_head(name), (2, 0, 1))

    direct = config.q_lora_rank is None
    w_uk, w_uv = jnp.split(per_head("kv_b_proj.weight"), [nope], axis=1)
    w_o = tensors["o_proj.weight"].reshape(config.hidden_size, heads, config.v_head_dim)
    indexer = {} if config.indexer is None else _to_index_params(config.indexer, tensors)
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
        **indexer,
    )


def _to_index_params(config: IndexerConfig, tensors: dict[str, jax.Array]) -> dict[str, jax.Array]:
    w_q = tensors["indexer.wq_b.weight"].T  # [q_lora_rank, heads * head_dim]
    return {
        "index_w_q": w_q.reshape(-1, config.num_heads, config.head_dim),
        "index_w_k": tensors["indexer.wk.weight"].T,
        "index_k_norm": tensors["indexer.k_norm.weight"],
        "index_k_bias": tensors["indexer.k_norm.bias"],
        "index_w_weights": tensors["indexer.weights_proj.weight"].T,
    }

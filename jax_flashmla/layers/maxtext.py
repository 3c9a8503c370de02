"""MaxText's latent attention weights, as its `self_attention` module names them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from jax_flashmla.layers.config import MLAConfig
from jax_flashmla.layers.named_weights import check_weights, split_columns

# What is stored there as it is here.
_DIRECT = {"w_q": "query.kernel"}
_LOW_RANK = {"w_dq": "wq_a.kernel", "q_norm": "q_norm.scale", "w_uq": "wq_b.kernel"}
_ROWS = {"w_dkv": "wkv_a.kernel", "kv_norm": "kv_norm.scale", "w_o": "out.kernel"}
_INDEXER = {
    "index_w_q": "indexer.wq_b.kernel",
    "index_w_k": "indexer.wk.kernel",
    "index_k_norm": "indexer.k_norm.scale",
    "index_k_bias": "indexer.k_norm.bias",
    "index_w_weights": "indexer.weights_proj.kernel",
}
_SAME = _DIRECT | _LOW_RANK | _ROWS | _INDEXER
_KEYS_AND_VALUES = "wkv_b.kernel"  # [kv_lora_rank, heads, nope + v]


def maxtext_shapes(config: MLAConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the layer's arrays there, by their names joined with dots."""
    hidden, heads, rank = config.hidden_size, config.num_heads, config.kv_lora_rank
    nope, queries = config.qk_nope_head_dim, config.qk_nope_head_dim + config.qk_rope_head_dim
    if config.q_lora_rank is None:
        shapes: dict[str, tuple[int, ...]] = {"query.kernel": (hidden, heads, queries)}
    else:
        shapes = {
            "wq_a.kernel": (hidden, config.q_lora_rank),
            "q_norm.scale": (config.q_lora_rank,),
            "wq_b.kernel": (config.q_lora_rank, heads, queries),
        }
    shapes |= {
        "wkv_a.kernel": (hidden, config.d_qk),
        "kv_norm.scale": (rank,),
        "wkv_b.kernel": (rank, heads, nope + config.v_head_dim),
        "out.kernel": (heads, config.v_head_dim, hidden),
    }
    index = config.indexer
    if index is not None:
        shapes |= {
            "indexer.wq_b.kernel": (config.q_lora_rank or 0, index.num_heads, index.head_dim),
            "indexer.wk.kernel": (hidden, index.head_dim),
            "indexer.k_norm.scale": (index.head_dim,),
            "indexer.k_norm.bias": (index.head_dim,),
            "indexer.weights_proj.kernel": (hidden, index.num_heads),
        }
    return shapes


def from_maxtext(config: MLAConfig, weights: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of MLAParams; see `MLAParams.from_maxtext`."""
    if not isinstance(weights, Mapping):
        raise TypeError(
            "weights must be the dict of a layer's self_attention parameters, got "
            f"{type(weights).__name__}"
        )
    arrays = _flatten(weights)
    if config.indexer is None:
        arrays = {name: x for name, x in arrays.items() if not name.startswith("indexer.")}
    check_weights("weights.", arrays, maxtext_shapes(config))
    keys, values = split_columns(arrays[_KEYS_AND_VALUES], config.qk_nope_head_dim)
    fields = {field: jnp.asarray(arrays[name]) for field, name in _SAME.items() if name in arrays}
    return fields | {
        "w_uk": jnp.transpose(keys, (1, 2, 0)),
        "w_uv": jnp.transpose(values, (1, 2, 0)),
    }


def to_maxtext(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Nested as there, from the fields of MLAParams."""
    keys_and_values = jnp.concatenate([fields["w_uk"], fields["w_uv"]], axis=1)
    tree: dict[str, Any] = {}
    _put(tree, _KEYS_AND_VALUES, jnp.transpose(keys_and_values, (2, 0, 1)))
    for field, name in _SAME.items():
        if fields[field] is not None:
            _put(tree, name, fields[field])
    return tree


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        found |= _flatten(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return found


def _put(tree: dict[str, Any], name: str, array: Any) -> None:
    *path, leaf = name.split(".")
    for key in path:
        tree = tree.setdefault(key, {})
    tree[leaf] = array

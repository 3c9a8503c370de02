"""The indexer of a config.json, by the rules of transformers' own models, release 5."""

from __future__ import annotations

from typing import Any

from jax_flashmla.layers.hf.json_object import JsonObject, describe
from jax_flashmla.layers.indexer_config import IndexerConfig

# How each model rotates index queries and keys; indexer_rope_interleave may say otherwise.
_LAYOUTS = {"deepseek_v32": "half", "glm_moe_dsa": "interleaved"}
INDEXED = tuple(_LAYOUTS)
_DEFAULT_HEADS = {"deepseek_v32": 64, "glm_moe_dsa": 32}
_KNOWN = {
    "index_n_heads",
    "index_head_dim",
    "index_topk",
    "index_topk_pattern",
    "index_topk_freq",
    "index_skip_topk_offset",
    "index_share_for_mtp_iteration",  # of layers that predict several tokens ahead
    "indexer_types",
    "indexer_rope_interleave",
}


def read_indexer(hf: JsonObject, model_type: str) -> IndexerConfig | None:
    """The indexer; see `MLAConfig.from_hf` for what is raised. None where a model has none."""
    named = [key for key in map(str, hf) if key.startswith("index") and hf.get(key)]
    if model_type not in _LAYOUTS:
        if named:
            raise NotImplementedError(
                f"{hf.where}: {hf.path}{named[0]} must be absent, as {model_type} has no indexer, "
                f"got {describe(hf.get(named[0]))}"
            )
        return None
    for key in named:
        if key not in _KNOWN:
            raise NotImplementedError(
                f"{hf.where}: {hf.path}{key} must be absent: an indexer is described by "
                f"{sorted(_KNOWN)}, got {describe(hf.get(key))}"
            )
    interleave = hf.boolean("indexer_rope_interleave", _LAYOUTS[model_type] == "interleaved")
    head_dim = hf.integer("index_head_dim", 128)
    fields = {
        "num_heads": hf.integer("index_n_heads", _DEFAULT_HEADS[model_type]),
        "topk": hf.integer("index_topk", 2048),
        "head_dim": head_dim,
        "rope_layout": "interleaved" if interleave else "half",
        "shared": _read_shared(hf),
        "hadamard": not head_dim & (head_dim - 1),
    }
    try:
        return IndexerConfig(**fields)
    except ValueError as error:
        raise ValueError(f"{hf.where}: {error}") from None


def _read_shared(hf: JsonObject) -> tuple[bool, ...]:
    """Which layers reuse the last one's selection: a list, a pattern, or every so many layers."""
    for key in ("indexer_types", "index_topk_pattern"):
        value = hf.get(key)
        if value is not None:
            return _read_types(hf, key, value)
    frequency = max(hf.integer("index_topk_freq", 1, least=0), 1)
    offset = hf.integer("index_skip_topk_offset", 2, least=0)
    if frequency == 1:
        return ()
    layers = range(hf.integer("num_hidden_layers"))
    return tuple(max(i - offset + 1, 0) % frequency != 0 for i in layers)


def _read_types(hf: JsonObject, key: str, value: Any) -> tuple[bool, ...]:
    names = {"full": False, "shared": True}
    letters = {"F": "full", "S": "shared"}
    types = value
    if isinstance(value, str) and key == "index_topk_pattern":
        types = [letters.get(letter, letter) for letter in value]
    if not isinstance(types, list | tuple) or not all(
        isinstance(name, str) and name in names for name in types
    ):
        raise hf.error(key, "must be 'full' or 'shared' for each layer", value)
    count = hf.integer("num_hidden_layers", len(types))
    if len(types) < count:
        raise hf.error(key, f"must be of all num_hidden_layers = {count} layers", value)
    shared = tuple(names[name] for name in types[:count])
    if shared and shared[0]:
        raise hf.error(key, "must begin with 'full': no layer is before the first one", value)
    return shared if any(shared) else ()

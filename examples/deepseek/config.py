"""What a model is, from its config.json."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

from jax_flashmla.layers import MLAConfig

# model_type: how the router scores experts. All rotate and cache as MLAConfig knows them.
SCORING = {
    "deepseek_v2": "softmax",
    "deepseek_v3": "sigmoid",
    "deepseek_v32": "sigmoid",
    "kimi_k2": "sigmoid",
    "glm4_moe_lite": "sigmoid",
    "glm_moe_dsa": "sigmoid",
}
_GROUP_LIMITS = {"greedy": False, "group_limited_greedy": True, "noaux_tc": True}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """A layer of routed and shared experts.

    Args:
        num_experts: routed experts.
        experts_per_token: how many of them a token goes to.
        intermediate_size: columns within an expert.
        shared_size: columns within the shared experts, all together.
        scoring: "sigmoid" (V3; experts are chosen with a bias that their weights do not have) or
            "softmax" (V2).
        num_groups: groups that the experts are in.
        groups_per_token: of these, how many a token's experts may come from.
        normalise: whether a token's weights are made to sum to 1.
        scale: what the weights are multiplied by.
    """

    num_experts: int
    experts_per_token: int
    intermediate_size: int
    shared_size: int
    scoring: str
    num_groups: int
    groups_per_token: int
    normalise: bool
    scale: float

    def __post_init__(self) -> None:
        reachable = self.num_experts // self.num_groups * self.groups_per_token
        if self.num_experts % self.num_groups or reachable < self.experts_per_token:
            raise ValueError(
                f"n_group must divide n_routed_experts = {self.num_experts} into groups of which "
                f"topk_group = {self.groups_per_token} have num_experts_per_tok = "
                f"{self.experts_per_token} experts, got n_group = {self.num_groups}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A whole model; `moe[i]` is None where layer i has an ordinary MLP."""

    attention: MLAConfig
    moe: tuple[MoEConfig | None, ...]
    vocab_size: int
    intermediate_size: int
    rms_norm_eps: float
    tied_embeddings: bool
    max_positions: int
    stop_tokens: frozenset[int]

    @property
    def num_layers(self) -> int:
        return len(self.moe)

    @property
    def index_layers(self) -> int | None:
        """Layers of the cache's index pool; None without an indexer."""
        indexer = self.attention.indexer
        return None if indexer is None else indexer.index_layer(self.num_layers)

    @classmethod
    def from_directory(cls, directory: pathlib.Path) -> ModelConfig:
        """Reads config.json and, for the tokens that end a text, generation_config.json.

        Raises:
            FileNotFoundError: there is no such folder, or no config.json in it.
            NotImplementedError: an architecture or option that this model does not have.
            ValueError: a key that is missing or a value that does not fit.
        """
        if not directory.is_dir():
            raise FileNotFoundError(f"the checkpoint must be a folder, got {str(directory)!r}")
        hf = _unwrap(_read(directory / "config.json"))
        model_type = hf.get("model_type")
        if model_type not in SCORING:
            raise NotImplementedError(
                f"model_type must be one of {sorted(SCORING)}, got {model_type!r}"
            )
        if hf.get("hidden_act", "silu") != "silu":
            raise NotImplementedError(f"hidden_act must be silu, got {hf['hidden_act']!r}")
        if hf.get("mlp_bias"):
            raise NotImplementedError(f"mlp_bias must be false, got {hf['mlp_bias']!r}")
        moe = _read_moe(hf)
        return cls(
            attention=MLAConfig.from_hf(hf),
            moe=tuple(moe if is_sparse else None for is_sparse in _sparse_layers(hf)),
            vocab_size=_integer(hf, "vocab_size"),
            intermediate_size=_integer(hf, "intermediate_size"),
            rms_norm_eps=_number(hf, "rms_norm_eps"),
            tied_embeddings=_boolean(hf, "tie_word_embeddings"),
            max_positions=_integer(hf, "max_position_embeddings"),
            stop_tokens=_stop_tokens(directory, hf),
        )


def _unwrap(hf: dict[str, Any]) -> dict[str, Any]:
    """The language model's part of a configuration that wraps one, as of images and text."""
    if hf.get("model_type") in SCORING:
        return hf
    inner = [hf[key] for key in ("text_config", "language_config") if hf.get(key)]
    return inner[0] if len(inner) == 1 and isinstance(inner[0], dict) else hf


def _stop_tokens(directory: pathlib.Path, hf: dict[str, Any]) -> frozenset[int]:
    """Those of generation_config.json, or config.json's where the former names none."""
    generation = directory / "generation_config.json"
    stop = _read(generation).get("eos_token_id") if generation.is_file() else None
    stop = hf.get("eos_token_id") if stop is None else stop
    ids = [] if stop is None else stop if isinstance(stop, list) else [stop]
    if not all(type(i) is int and i >= 0 for i in ids):
        raise ValueError(f"eos_token_id must be a token's id or a list of ids, got {stop!r}")
    return frozenset(ids)


def _sparse_layers(hf: dict[str, Any]) -> list[bool]:
    """Which layers have experts."""
    layers = _integer(hf, "num_hidden_layers")
    kinds = hf.get("mlp_layer_types")
    if kinds is not None:
        known = isinstance(kinds, list) and all(kind in ("dense", "sparse") for kind in kinds)
        if not known or len(kinds) < layers:
            raise ValueError(
                f"mlp_layer_types must be 'dense' or 'sparse' for each of num_hidden_layers = "
                f"{layers} layers, got {kinds!r}"
            )
        return [kind == "sparse" for kind in kinds[:layers]]
    first, every = _integer(hf, "first_k_dense_replace", least=0), hf.get("moe_layer_freq", 1)
    if isinstance(every, list) and len(every) >= layers and all(x in (0, 1) for x in every):
        return [i >= first and bool(every[i]) for i in range(layers)]
    if type(every) is not int or every < 1:
        raise ValueError(
            "moe_layer_freq must be an integer of at least 1, or a list of 0 or 1 for each of "
            f"num_hidden_layers = {layers} layers, got {every!r}"
        )
    return [i >= first and i % every == 0 for i in range(layers)]


def _read_moe(hf: dict[str, Any]) -> MoEConfig:
    scoring = SCORING[hf["model_type"]]
    method = hf.get("topk_method", "greedy" if scoring == "softmax" else "noaux_tc")
    if method not in _GROUP_LIMITS or (method == "noaux_tc") != (scoring == "sigmoid"):
        raise NotImplementedError(f"{hf['model_type']} has no topk_method {method!r}")
    if hf.get("scoring_func", scoring) != scoring:
        raise NotImplementedError(f"scoring_func must be {scoring}, got {hf['scoring_func']!r}")
    # transformers' defaults: V2 does not normalise, the others do.
    normalise = _boolean(hf, "norm_topk_prob", absent=scoring == "sigmoid")
    if normalise and scoring == "softmax":
        raise NotImplementedError(
            "norm_topk_prob must be false with softmax scores: implementations disagree on it, and "
            "no published model sets it"
        )
    limited = _GROUP_LIMITS[method]
    width = _integer(hf, "moe_intermediate_size")
    shared = hf.get("n_shared_experts")
    return MoEConfig(
        num_experts=_integer(hf, "n_routed_experts"),
        experts_per_token=_integer(hf, "num_experts_per_tok"),
        intermediate_size=width,
        shared_size=width * (0 if shared is None else _integer(hf, "n_shared_experts", least=0)),
        scoring=scoring,
        num_groups=_integer(hf, "n_group") if limited else 1,
        groups_per_token=_integer(hf, "topk_group") if limited else 1,
        normalise=normalise,
        scale=_number(hf, "routed_scaling_factor"),
    )


def _read(path: pathlib.Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must be JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} must be a JSON object, got a {type(found).__name__}")
    return found


def _required(hf: dict[str, Any], key: str) -> Any:
    if hf.get(key) is None:
        raise ValueError(f"config.json must have the key {key}, got only {sorted(hf)}")
    return hf[key]


def _integer(hf: dict[str, Any], key: str, *, least: int = 1) -> int:
    value = _required(hf, key)
    if type(value) is not int or value < least:
        raise ValueError(f"{key} must be an integer of at least {least}, got {value!r}")
    return value


def _number(hf: dict[str, Any], key: str) -> float:
    """A positive one."""
    value = _required(hf, key)
    if type(value) not in (int, float) or not 0 < value < float("inf"):
        raise ValueError(f"{key} must be a positive number, got {value!r}")
    return float(value)


def _boolean(hf: dict[str, Any], key: str, *, absent: bool = False) -> bool:
    """False where it is null, and by default where it is absent."""
    value = hf.get(key, absent)
    if value is not None and type(value) is not bool:
        raise ValueError(f"{key} must be true or false, got {value!r}")
    return bool(value)

"""What a multi-head latent attention layer is: dimensions, rotary embedding, scales."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from jax_flashmla import CacheFormat, _checks, _limits
from jax_flashmla.layers.hf.config import read_fields
from jax_flashmla.layers.rope_config import LongRopeConfig as LongRopeConfig
from jax_flashmla.layers.rope_config import RopeConfig as RopeConfig
from jax_flashmla.layers.rope_config import YarnConfig as YarnConfig
from jax_flashmla.layers.rope_config import check_number, set_numbers

if TYPE_CHECKING:
    from jax.typing import DTypeLike


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class MLAConfig:
    """A multi-head latent attention layer (DeepSeek-V2, arXiv:2405.04434). Static and hashable.

    Args:
        hidden_size: columns of the layer's input and output.
        num_heads: query heads.
        q_lora_rank: rank of the query's down-projection; None if queries are projected directly.
        kv_lora_rank: columns of the latent, a cached value.
        qk_nope_head_dim: columns of a head's query and key without rotary embedding.
        qk_rope_head_dim: columns with it; the key's are shared by all heads. May be 0.
        v_head_dim: columns of a head's value.
        rope: the rotary embedding.
        q_scale: what queries are multiplied by (LongCat). It is part of `sm_scale`.
        kv_scale: what the latent is multiplied by after its norm (LongCat).
        q_norm_eps: epsilon of the RMSNorm after the query's down-projection.
        kv_norm_eps: epsilon of the latent's RMSNorm.

    Raises:
        TypeError, ValueError: a number that no layer can have.
    """

    hidden_size: int
    num_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    rope: RopeConfig
    q_scale: float = 1.0
    kv_scale: float = 1.0
    q_norm_eps: float = 1e-6
    kv_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        for name in (
            "hidden_size",
            "num_heads",
            "q_lora_rank",
            "kv_lora_rank",
            "qk_nope_head_dim",
            "qk_rope_head_dim",
            "v_head_dim",
        ):
            value = getattr(self, name)
            if name != "q_lora_rank" or value is not None:
                least = 0 if name == "qk_rope_head_dim" else 1
                value = _checks.check_int(name, value, least, _limits.INT32_MAX)
                object.__setattr__(self, name, value)
        set_numbers(self, "", ("q_scale", "kv_scale", "q_norm_eps", "kv_norm_eps"))
        if not isinstance(self.rope, RopeConfig):
            raise TypeError(f"rope must be a RopeConfig, got {self.rope!r}")
        if self.rope.layout != "none" and self.qk_rope_head_dim % 2:
            raise ValueError(
                "qk_rope_head_dim must be even, as columns are rotated in pairs, got "
                f"{self.qk_rope_head_dim}"
            )
        longrope = self.rope.longrope
        if longrope is not None and len(longrope.factors) != self.qk_rope_head_dim // 2:
            raise ValueError(
                "rope.longrope.factors must have qk_rope_head_dim / 2 = "
                f"{self.qk_rope_head_dim // 2} numbers, got {len(longrope.factors)}"
            )
        # Each number is in range; their product may not be.
        check_number("sm_scale, which comes from q_scale and rope,", self.sm_scale)
        check_number("the scale of cos and sin, which comes from rope,", self.rope.rotation_scale)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any] | str | os.PathLike[str]) -> MLAConfig:
        """The attention layer of a published model.

        Args:
            config: a Hugging Face configuration: the dict, a config.json, or the folder that holds
                one; or one that wraps such a model as text_config or language_config. Its
                model_type, or without one its architectures, says deepseek_v2, deepseek_v3,
                deepseek_v32 (its attention without the indexer: the same up to index_topk tokens),
                kimi_k2, glm4_moe_lite, longcat_flash or minicpm3. Nulls count as absent keys.

        Raises:
            NotImplementedError: a model or an option that is not supported, and why.
            ValueError: a file that is not a JSON object, a key that is missing, or a value of the
                wrong type or out of range; it names file and key.
            TypeError: config is not of these types.
            OSError: the file is not there or cannot be read.
        """
        where, fields = read_fields(config)
        try:
            return cls(**fields)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: {error}") from None

    @property
    def d_qk(self) -> int:
        """Columns of a cache row: the latent, then the rotary key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def sm_scale(self) -> float:
        """Scale of the scores: (nope + rope)^-0.5, times rope.softmax_scale, times q_scale."""
        width = self.qk_nope_head_dim + self.qk_rope_head_dim
        return width**-0.5 * self.rope.softmax_scale * self.q_scale

    def cache_format(self, dtype: DTypeLike = jnp.bfloat16, block_size: int = 64) -> CacheFormat:
        """The format of the cache that the layer writes and reads.

        A row is [latent after its norm and kv_scale, rotary key after its rotation].

        Args:
            dtype: bfloat16, float16 or float32.
            block_size: tokens of a block.
        """
        return CacheFormat(
            d_qk=self.d_qk, d_v=self.kv_lora_rank, block_size=block_size, dtype=dtype
        )

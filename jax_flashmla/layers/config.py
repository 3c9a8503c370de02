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
from jax_flashmla.layers.indexer_config import IndexerConfig as IndexerConfig
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
        indexer: what chooses the tokens that are attended to; None for a layer that attends to all,
            or to those that an earlier one has selected. It needs q_lora_rank.

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
    indexer: IndexerConfig | None = None

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
        self._check_indexer()
        # Each number is in range; their product may not be.
        check_number("sm_scale, which comes from q_scale and rope,", self.sm_scale)
        check_number("the scale of cos and sin, which comes from rope,", self.rope.rotation_scale)

    def _check_indexer(self) -> None:
        indexer = self.indexer
        if indexer is None:
            return
        if not isinstance(indexer, IndexerConfig):
            raise TypeError(f"indexer must be an IndexerConfig or None, got {indexer!r}")
        if self.q_lora_rank is None:
            raise ValueError(
                "q_lora_rank must be an int with an indexer, which projects its queries from the "
                "query's latent, got None"
            )
        if self.rope.layout != "none" and self.qk_rope_head_dim > indexer.head_dim:
            raise ValueError(
                f"indexer.head_dim must be at least qk_rope_head_dim = {self.qk_rope_head_dim}, "
                f"got {indexer.head_dim}"
            )

    @classmethod
    def from_hf(cls, config: Mapping[str, Any] | str | os.PathLike[str]) -> MLAConfig:
        """The attention layer of a published model.

        Args:
            config: a Hugging Face configuration: the dict, a config.json, or the folder that holds
                one; or one that wraps such a model as text_config or language_config. Its
                model_type, or without one its architectures, says deepseek_v2, deepseek_v3,
                deepseek_v32, kimi_k2, glm_moe_dsa (GLM-5), glm4_moe_lite, longcat_flash, minicpm3,
                youtu, axk1 or sarvam_mla. Nulls count as absent keys.

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

    def for_layer(self, layer: int) -> MLAConfig:
        """That of a layer of the model: without the indexer where the layer has none (IndexShare).

        Args:
            layer: which layer, from 0.
        """
        if self.indexer is None or not self.indexer.is_shared(layer):
            return self
        return dataclasses.replace(self, indexer=None)

    def cache_format(
        self, dtype: DTypeLike = jnp.bfloat16, block_size: int = 64, *, name: str = "dense"
    ) -> CacheFormat:
        """The format of the cache that the layer writes and reads.

        A row is [latent after its norm and kv_scale, rotary key after its rotation].

        Args:
            dtype: bfloat16 or float16; in "dense" also float32.
            block_size: tokens of a block; 64 with an index pool.
            name: "dense", or "v32" for a latent in fp8.

        Raises:
            NotImplementedError: another format.
            ValueError: a format with another number of columns.
        """
        if name not in ("dense", "v32"):
            raise NotImplementedError(f'name must be "dense" or "v32", got {name!r}')
        return CacheFormat(
            name=name, d_qk=self.d_qk, d_v=self.kv_lora_rank, block_size=block_size, dtype=dtype
        )

    def index_format(self, dtype: DTypeLike = jnp.bfloat16) -> CacheFormat | None:
        """The format of the index pool; None without an indexer.

        Keys of 128 columns are stored in fp8, as the models were trained to be served. Others, and
        float32, are stored as they are, and scored in pure JAX: what a small or float32 model is
        compared with.

        Args:
            dtype: that of the cache's rows.
        """
        if self.indexer is None:
            return None
        width = self.indexer.head_dim
        if width != 128 or jnp.dtype(dtype) == jnp.float32:
            return CacheFormat(d_qk=width, d_v=width, block_size=64, dtype=dtype)
        return CacheFormat(name="fp8_index", dtype=dtype)

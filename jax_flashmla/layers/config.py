"""What a multi-head latent attention layer is: dimensions, rotary embedding, scales."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from jax_flashmla import CacheFormat, _checks, _limits

if TYPE_CHECKING:
    from jax.typing import DTypeLike

LAYOUTS = ("interleaved", "deinterleaved", "half", "none")


def _check_positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class YarnConfig:
    """YaRN (Peng et al. 2023, arXiv:2309.00071), with DeepSeek's rule for the softmax scale.

    Args:
        factor: how many times longer the context is than `original_max_positions`.
        original_max_positions: tokens of the context before the extension.
        beta_fast: frequencies of more rotations than this within the original context stay.
        beta_slow: frequencies of fewer are divided by `factor`; between the two, a ramp.
        mscale: cos and sin are scaled by m(mscale) / m(mscale_all_dim), where
            m(s) = 0.1 s ln(factor) + 1; by m(1) if either is 0.
        mscale_all_dim: the softmax scale is multiplied by m(mscale_all_dim)^2; not at all if 0.
        attention_factor: the scale of cos and sin, if it is not to be computed.
        truncate: whether the ramp's ends are rounded outwards to whole pairs of columns.
    """

    factor: float
    original_max_positions: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    attention_factor: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        _check_positive("yarn.factor", self.factor)
        _checks.check_int(
            "yarn.original_max_positions", self.original_max_positions, 1, _limits.INT32_MAX
        )
        if self.beta_fast < self.beta_slow:
            raise ValueError(
                f"yarn.beta_fast must be at least beta_slow = {self.beta_slow}, got "
                f"{self.beta_fast}"
            )

    @property
    def rotation_scale(self) -> float:
        """What cos and sin are multiplied by."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._m(self.mscale) / self._m(self.mscale_all_dim)
        return self._m(1.0)

    @property
    def softmax_scale(self) -> float:
        """What the softmax scale is multiplied by."""
        return self._m(self.mscale_all_dim) ** 2 if self.mscale_all_dim else 1.0

    def _m(self, mscale: float) -> float:
        return 0.1 * mscale * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongRopeConfig:
    """LongRoPE (Ding et al. 2024, arXiv:2402.13753) with one set of factors for all lengths.

    Args:
        factors: what the wavelength of each pair of columns is multiplied by,
            qk_rope_head_dim / 2 numbers.
        attention_factor: the scale of cos and sin.
    """

    factors: tuple[float, ...]
    attention_factor: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """The rotary embedding of the last qk_rope_head_dim columns of queries and keys.

    Args:
        layout: which columns make a pair, and how the rotated ones are stored. "interleaved":
            neighbours, stored as they were (DeepSeek V2). "deinterleaved": neighbours, stored as
            all first ones, then all second ones (DeepSeek V3). "half": column i and i + half,
            stored as they were (MiniCPM3). "none": no rotation (Kimi-Linear). Scores do not depend
            on the order of storage, but a cache must be of one.
        theta: base of the wavelengths.
        yarn: YaRN's extension of the context, or None.
        longrope: LongRoPE's, or None.
    """

    layout: str = "deinterleaved"
    theta: float = 10000.0
    yarn: YarnConfig | None = None
    longrope: LongRopeConfig | None = None

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise ValueError(f"rope.layout must be one of {LAYOUTS}, got {self.layout!r}")
        _check_positive("rope.theta", self.theta)
        if self.yarn is not None and self.longrope is not None:
            raise ValueError("rope must have yarn or longrope, not both")


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
    rope: RopeConfig = RopeConfig()
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
                _checks.check_int(name, value, least, _limits.INT32_MAX)
        for name in ("q_scale", "kv_scale", "q_norm_eps", "kv_norm_eps"):
            _check_positive(name, getattr(self, name))
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

    @classmethod
    def from_hf(cls, config: Mapping[str, Any] | str | os.PathLike[str]) -> MLAConfig:
        """The attention layer of a published model.

        Args:
            config: a Hugging Face configuration: the dict, a config.json, or the folder that holds
                one. Its model_type is deepseek_v2, deepseek_v3, deepseek_v32 (its attention without
                the indexer: the same up to index_topk tokens), kimi_k2, glm4_moe_lite,
                longcat_flash or minicpm3.

        Raises:
            NotImplementedError: a model or an option that is not supported, and why.
            ValueError: a key that is missing or a value that no layer can have.
            OSError: the file cannot be read.
        """
        from jax_flashmla.layers.hf_config import read_hf_config

        return read_hf_config(config)

    @property
    def d_qk(self) -> int:
        """Columns of a cache row: the latent, then the rotary key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def sm_scale(self) -> float:
        """Scale of the scores: (nope + rope)^-0.5, times YaRN's softmax scale, times q_scale."""
        yarn = 1.0 if self.rope.yarn is None else self.rope.yarn.softmax_scale
        return (self.qk_nope_head_dim + self.qk_rope_head_dim) ** -0.5 * yarn * self.q_scale

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

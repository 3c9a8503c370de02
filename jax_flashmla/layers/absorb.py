"""The products of weights that decoding in absorbed form multiplies by, made once."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jax_flashmla import _checks
from jax_flashmla.layers.config import MLAConfig
from jax_flashmla.layers.params import MLAParams, check_params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AbsorbedWeights:
    """The query projection times W_UK, and W_UV times the output projection.

    Args:
        w_q: [inputs, heads, kv_lora_rank + rope], where inputs is q_lora_rank or hidden_size.
        w_o: [heads, kv_lora_rank, hidden_size].
    """

    w_q: jax.Array
    w_o: jax.Array

    def check(self, config: MLAConfig, num_heads: int) -> None:
        """Raises ValueError unless these are of such a layer."""
        inputs = config.q_lora_rank or config.hidden_size
        for name, dims, expected in (
            ("w_q", "[inputs, heads, d_qk]", (inputs, num_heads, config.d_qk)),
            (
                "w_o",
                "[heads, kv_lora_rank, hidden_size]",
                (num_heads, config.kv_lora_rank, config.hidden_size),
            ),
        ):
            _checks.refuse_foreign(f"absorbed.{name}", getattr(self, name), dims)
            got = getattr(self, name).shape
            if got != expected:
                raise ValueError(f"absorbed.{name} must be {expected}, got {got}")


def absorb(config: MLAConfig, params: MLAParams) -> AbsorbedWeights:
    """Multiplies the weights that decoding uses one after the other, in float32.

    A step then has two matrix products less, but as a rule more weights to read: per head
    r * c numbers for (r + c) * nope, and c * hidden for (c + hidden) * v, where r is the query's
    rank (or hidden_size) and c is kv_lora_rank. For DeepSeek V3 that is 3.6 times as many. It pays
    where launching a product costs more than reading its weights, as with small models.

    Args:
        config: the layer.
        params: its parameters; under tensor parallelism also one device's share.

    Returns:
        The products, in the dtype of the output projection.
    """
    if not isinstance(config, MLAConfig):
        raise TypeError(f"config must be an MLAConfig, got {type(config).__name__}")
    if isinstance(params, MLAParams):
        _checks.refuse_foreign("params.w_o", params.w_o, "[heads, v, hidden]")
    # One device's share has fewer heads than the config.
    check_params(config, params, params.w_o.shape[0] if isinstance(params, MLAParams) else 1)
    w_q = params.w_q if config.q_lora_rank is None else params.w_uq
    dtype = params.w_o.dtype
    w_nope, w_rope = jnp.split(w_q.astype(jnp.float32), [config.qk_nope_head_dim], axis=-1)
    w_latent = jnp.einsum("rhd,hdc->rhc", w_nope, params.w_uk.astype(jnp.float32))
    w_o = jnp.einsum(
        "hvc,hvi->hci", params.w_uv.astype(jnp.float32), params.w_o.astype(jnp.float32)
    )
    w_q = jnp.concatenate([w_latent, w_rope], axis=-1)
    return AbsorbedWeights(w_q.astype(dtype), w_o.astype(dtype))

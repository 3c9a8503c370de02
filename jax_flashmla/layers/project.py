"""What prefill and decode have in common: from x to queries and cache rows, and back to hidden."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jax_flashmla import PagedCache, Peers, Slots, _checks, all_reduce_sum
from jax_flashmla.layers.config import MLAConfig
from jax_flashmla.layers.params import MLAParams, check_params
from jax_flashmla.layers.rope import rotate


def check_call(
    config: MLAConfig,
    params: MLAParams,
    x: jax.Array,
    cache: PagedCache,
    slots: Slots,
    heads_axis: str | None,
    context_axis: str | None,
) -> int:
    """Checks what a layer is called with; the number of its heads on this device."""
    if not isinstance(config, MLAConfig):
        raise TypeError(f"config must be an MLAConfig, got {type(config).__name__}")
    num_heads = heads_per_device(config, heads_axis)
    check_params(config, params, num_heads)
    if not isinstance(cache, PagedCache):
        raise TypeError(f"cache must be a PagedCache, got {type(cache).__name__}")
    if not isinstance(slots, Slots):
        raise TypeError(
            f"slots must be the Slots that cache.advance() gave, got {type(slots).__name__}"
        )
    if (cache.format.d_qk, cache.format.d_v, cache.format.h_kv) != (
        config.d_qk,
        config.kv_lora_rank,
        1,
    ):
        raise ValueError(
            f"cache must have config.cache_format()'s d_qk = {config.d_qk}, d_v = "
            f"{config.kv_lora_rank} and h_kv = 1, got {cache.format}"
        )
    ranks = 1 if context_axis is None else _checks.axis_size("context_axis", context_axis)
    shared = 1 if slots.share is None else slots.share.size
    if ranks != shared:
        raise ValueError(
            f"context_axis must be that of cache.advance(), whose slots are of {shared} ranks, got "
            f"{context_axis!r} of {ranks}"
        )
    _checks.refuse_foreign("x", x, "[b, s, hidden_size]")
    b = cache.table.block_table.shape[0]
    if jnp.shape(x) != (b, slots.s_new, config.hidden_size):
        raise ValueError(
            "x must be [b, s, hidden_size] with the cache's b, the slots' s_new and the config's "
            f"hidden_size, ({b}, {slots.s_new}, {config.hidden_size}), got shape {jnp.shape(x)}"
        )
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"x must have a floating dtype, got {x.dtype}")
    return num_heads


def heads_per_device(config: MLAConfig, heads_axis: str | None) -> int:
    """Heads that one device has, where the mesh axis splits them; all of them for None."""
    num_devices = 1 if heads_axis is None else _checks.axis_size("heads_axis", heads_axis)
    if config.num_heads % num_devices:
        raise ValueError(
            f"heads_axis must split num_heads = {config.num_heads} evenly, got {heads_axis!r} of "
            f"{num_devices} devices"
        )
    return config.num_heads // num_devices


def manual_axis(name: str | None) -> str | None:
    """The mesh axis where it is a manual one: inside a `jax.shard_map` over it. Else None."""
    return name if name in jax.sharding.get_abstract_mesh().manual_axes else None


def positions_of(slots: Slots) -> jax.Array:
    """Token positions of a step's rows [b, s_new] int32."""
    return slots.positions[:, None] + jnp.arange(slots.s_new, dtype=jnp.int32)[None, :]


def rms_norm(x: jax.Array, weight: jax.Array, eps: float, scale: float = 1.0) -> jax.Array:
    """scale * weight * x / sqrt(mean(x^2) + eps) over the last axis of x [b, s, n], in float32."""
    wide = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    normed = wide * jax.lax.rsqrt(mean_square + np.float32(eps))
    weight = weight.astype(jnp.float32) * np.float32(scale)
    return (normed * weight[None, None, :]).astype(x.dtype)


def query_inputs(config: MLAConfig, params: MLAParams, x: jax.Array) -> jax.Array:
    """What queries are projected from: x, or its normed down-projection [b, s, q_lora_rank]."""
    if config.q_lora_rank is None:
        return x
    down = jnp.einsum("bsi,ir->bsr", x, params.w_dq.astype(x.dtype))
    return rms_norm(down, params.q_norm, config.q_norm_eps)


def project_queries(
    config: MLAConfig, params: MLAParams, x: jax.Array, positions: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """q_nope [b, s, heads, nope] and q_rope [b, s, heads, rope], the latter rotated."""
    weight = params.w_q if config.q_lora_rank is None else params.w_uq
    inputs = query_inputs(config, params, x)
    q = jnp.einsum("bsr,rhd->bshd", inputs, weight.astype(x.dtype))
    q_nope, q_rope = jnp.split(q, [config.qk_nope_head_dim], axis=-1)
    return q_nope, rotate(config, q_rope, positions)


def project_rows(
    config: MLAConfig, params: MLAParams, x: jax.Array, positions: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The latent [b, s, kv_lora_rank], normed and scaled, and k_rope [b, s, rope], rotated."""
    row = jnp.einsum("bsi,ic->bsc", x, params.w_dkv.astype(x.dtype))
    latent, k_rope = jnp.split(row, [config.kv_lora_rank], axis=-1)
    latent = rms_norm(latent, params.kv_norm, config.kv_norm_eps, config.kv_scale)
    return latent, rotate(config, k_rope[:, :, None, :], positions)[:, :, 0]


def roll_tokens(x: jax.Array, shift: jax.Array) -> jax.Array:
    """x [b, s, ...] with sequence i's tokens moved shift[i] [b] to the right, around the end."""
    s = x.shape[1]
    if s == 1:
        return x
    source = (jnp.arange(s, dtype=jnp.int32)[None, :] - shift[:, None]) % s
    return jnp.take_along_axis(x, source.reshape(*source.shape, *[1] * (x.ndim - 2)), axis=1)


def write_rows(
    cache: PagedCache,
    latent: jax.Array,
    k_rope: jax.Array,
    slots: Slots,
    layer: int | jax.Array | None,
    implementation: str | None,
) -> PagedCache:
    rows = jnp.concatenate([latent, k_rope], axis=-1).astype(cache.format.dtype)
    return cache.write(rows[:, :, None, :], slots, layer=layer, implementation=implementation)


def project_output(
    params: MLAParams, values: jax.Array, heads_axis: str | None, peers: Peers | None = None
) -> jax.Array:
    """[b, s, heads, v] to [b, s, hidden], summed over the devices that share the heads."""
    y = jnp.einsum("bshv,hvi->bsi", values, params.w_o.astype(values.dtype))
    return sum_over_heads(y, heads_axis, peers)


def sum_over_heads(y: jax.Array, heads_axis: str | None, peers: Peers | None) -> jax.Array:
    """y of all devices that share the heads, each of which has its own heads' part."""
    return y if heads_axis is None else all_reduce_sum(y, heads_axis, peers=peers)

"""The decoding loop of a PyTorch server that calls FlashMLA, ported by changing imports.

Before:

    import torch
    from flash_mla import flash_mla_with_kvcache, get_mla_metadata

    tile_scheduler_metadata, num_splits = get_mla_metadata(cache_seqlens, s_q * h_q // h_kv, h_kv)
    for i in range(num_layers):
        o_i, lse_i = flash_mla_with_kvcache(
            q_i, kvcache_i, block_table, cache_seqlens, dv,
            tile_scheduler_metadata, num_splits, causal=True,
        )

After: `decode_step` below. The two calls are the same; around them, arrays are JAX's, the step is
jitted, and the cache is donated so that the new token's row is written in place.

Run it on a CPU (small) or on a Hopper GPU: python examples/port_from_flashmla.py
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jax_flashmla import cache_append, flash_mla_with_kvcache, get_mla_metadata

num_layers, b, s_q, h_q, h_kv, d, dv = 4, 3, 1, 16, 1, 576, 512
block_size, max_blocks, steps = 64, 4, 5


@functools.partial(jax.jit, donate_argnames="kvcache")
def decode_step(
    q: jax.Array,
    new_rows: jax.Array,
    kvcache: tuple[jax.Array, ...],
    block_table: jax.Array,
    cache_seqlens: jax.Array,
) -> tuple[list[jax.Array], tuple[jax.Array, ...]]:
    """One token for each sequence: q and new_rows hold one entry per layer."""
    tile_scheduler_metadata, num_splits = get_mla_metadata(cache_seqlens, s_q * h_q // h_kv, h_kv)
    outs, updated = [], []
    for i in range(num_layers):
        kvcache_i = cache_append(kvcache[i], new_rows[i], block_table, cache_seqlens - s_q)
        o_i, _lse_i = flash_mla_with_kvcache(
            q[i], kvcache_i, block_table, cache_seqlens, dv,
            tile_scheduler_metadata, num_splits, causal=True,
        )  # fmt: skip
        outs.append(o_i)
        updated.append(kvcache_i)
    return outs, tuple(updated)


def naive_attention(q: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """[h_q, d] over [tokens, d], in float64."""
    scores = q @ rows.T * d**-0.5
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights @ rows[:, :dv] / weights.sum(axis=-1, keepdims=True)


def main() -> None:
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32).astype(jnp.bfloat16)

    block_table = rng.permutation(b * max_blocks).astype(np.int32).reshape(b, max_blocks)
    cache_seqlens = np.array([3, 64, 150], np.int32)  # tokens before the first step
    start = [normal(b * max_blocks, block_size, h_kv, d) for _ in range(num_layers)]
    kvcache = tuple(map(jnp.asarray, start))
    worst = 0.0
    for step in range(steps):
        q = normal(num_layers, b, s_q, h_q, d)
        new_rows = normal(num_layers, b, s_q, h_kv, d)
        cache_seqlens = cache_seqlens + s_q
        outs, kvcache = decode_step(q, new_rows, kvcache, block_table, cache_seqlens)
        for i, sequence in np.ndindex(num_layers, b):
            pages = np.asarray(kvcache[i])[block_table[sequence]].reshape(-1, d)
            rows = pages[: cache_seqlens[sequence]].astype(np.float64)
            assert (rows[-1] == new_rows[i, sequence, 0, 0].astype(np.float64)).all()
            expected = naive_attention(q[i, sequence, 0].astype(np.float64), rows)
            got = np.asarray(outs[i][sequence, 0], np.float64)
            worst = max(worst, float(np.abs(got - expected).max()))
        print(f"step {step}: {num_layers} layers, lengths {cache_seqlens.tolist()}")
    print(f"on {jax.devices()[0].device_kind}: worst error {worst:.2g}")
    if worst > 2e-2:  # bfloat16 keeps 8 bits of outputs of about 1
        raise SystemExit("the results do not match")


if __name__ == "__main__":
    main()

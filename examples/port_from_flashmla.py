"""The decoding loops of a PyTorch server that calls FlashMLA, ported by changing imports.

Before, dense, and sparse over an fp8 cache as DeepSeek V3.2 has it:

    import torch
    from flash_mla import flash_mla_with_kvcache, get_mla_metadata

    tile_scheduler_metadata, num_splits = get_mla_metadata(cache_seqlens, s_q * h_q // h_kv, h_kv)
    for i in range(num_layers):
        o_i, lse_i = flash_mla_with_kvcache(
            q_i, kvcache_i, block_table, cache_seqlens, dv,
            tile_scheduler_metadata, num_splits, causal=True,
        )

    tile_scheduler_metadata, num_splits = get_mla_metadata(
        cache_seqlens, s_q * h_q // h_kv, h_kv, h_q, is_fp8_kvcache=True, topk=topk
    )
    for i in range(num_layers):
        o_i, lse_i = flash_mla_with_kvcache(
            q_i, kvcache_i, None, None, dv, tile_scheduler_metadata, num_splits,
            is_fp8_kvcache=True, indices=indices_i,
        )

After: `decode_step` and `sparse_decode_step` below. The calls are the same; around them, arrays are
JAX's, a step is jitted, and the cache is donated so that the new token's row is written in place.

Run it on a CPU (small) or on a Hopper GPU: python examples/port_from_flashmla.py
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jax_flashmla import (
    CacheFormat,
    cache_append,
    dequantise,
    flash_mla_with_kvcache,
    get_mla_metadata,
)

num_layers, b, s_q, h_q, h_kv, d, dv = 4, 3, 1, 16, 1, 576, 512
block_size, max_blocks, steps, topk = 64, 4, 5, 32
fp8_cache = CacheFormat(name="v32", block_size=block_size)  # 656 bytes a token

Caches = tuple[jax.Array, ...]  # one per layer


@functools.partial(jax.jit, donate_argnames="kvcache")
def decode_step(
    q: jax.Array,
    new_rows: jax.Array,
    kvcache: Caches,
    block_table: jax.Array,
    cache_seqlens: jax.Array,
) -> tuple[list[jax.Array], Caches]:
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


@functools.partial(jax.jit, donate_argnames="kvcache")
def sparse_decode_step(
    q: jax.Array,
    new_rows: jax.Array,
    kvcache: Caches,
    block_table: jax.Array,
    cache_seqlens: jax.Array,
    indices: jax.Array,
) -> tuple[list[jax.Array], Caches]:
    """The same over fp8 caches: indices hold each layer's slots [b, s_q, topk], -1 behind them."""
    tile_scheduler_metadata, num_splits = get_mla_metadata(
        cache_seqlens, s_q * h_q // h_kv, h_kv, h_q, is_fp8_kvcache=True, topk=topk
    )
    outs, updated = [], []
    for i in range(num_layers):
        kvcache_i = cache_append(
            kvcache[i], new_rows[i], block_table, cache_seqlens - s_q, format=fp8_cache
        )
        o_i, _lse_i = flash_mla_with_kvcache(
            q[i], kvcache_i, None, None, dv, tile_scheduler_metadata, num_splits,
            is_fp8_kvcache=True, indices=indices[i],
        )  # fmt: skip
        outs.append(o_i)
        updated.append(kvcache_i)
    return outs, tuple(updated)


def naive_attention(q: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """[h_q, d] over [tokens, d], in float64."""
    q, rows = q.astype(np.float64), rows.astype(np.float64)
    scores = q @ rows.T * d**-0.5
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights @ rows[:, :dv] / weights.sum(axis=-1, keepdims=True)


def choose(
    rng: np.random.Generator, block_table: np.ndarray, cache_seqlens: np.ndarray
) -> np.ndarray:
    """In an indexer's place: the newest token and others at random, [num_layers, b, s_q, topk]."""
    indices = np.full((num_layers, b, s_q, topk), -1, np.int32)
    for i, sequence in np.ndindex(num_layers, b):
        length = int(cache_seqlens[sequence])
        others = rng.permutation(length - 1)[: topk - 1]
        block, offset = np.divmod(np.append(length - 1, others), block_size)
        slots = block_table[sequence, block] * block_size + offset
        indices[i, sequence, 0, : len(slots)] = slots
    return indices


def run(sparse: bool) -> float:
    """Decodes; the worst error of any output."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32).astype(jnp.bfloat16)

    block_table = rng.permutation(b * max_blocks).astype(np.int32).reshape(b, max_blocks)
    cache_seqlens = np.array([3, 64, 150], np.int32)  # tokens before the first step
    kvcache: Caches = tuple(
        fp8_cache.allocate(b * max_blocks)
        if sparse
        else jnp.asarray(normal(b * max_blocks, block_size, h_kv, d))
        for _ in range(num_layers)
    )
    if sparse:  # the prompts' rows
        prompt = [normal(b, int(cache_seqlens.max()), h_kv, d) for _ in range(num_layers)]
        start, count = np.zeros(b, np.int32), {"num_new": cache_seqlens, "format": fp8_cache}
        kvcache = tuple(
            cache_append(cache, rows, block_table, start, **count)
            for cache, rows in zip(kvcache, prompt, strict=True)
        )
    worst = 0.0
    for step in range(steps):
        q = normal(num_layers, b, s_q, h_q, d)
        new_rows = normal(num_layers, b, s_q, h_kv, d)
        cache_seqlens = cache_seqlens + s_q
        arguments = (q, new_rows, kvcache, block_table, cache_seqlens)
        if sparse:
            indices = choose(rng, block_table, cache_seqlens)
            outs, kvcache = sparse_decode_step(*arguments, indices)
        else:
            outs, kvcache = decode_step(*arguments)
        for i, sequence in np.ndindex(num_layers, b):
            length = cache_seqlens[sequence]
            if sparse:
                slots = indices[i, sequence, 0]
                stored = np.asarray(kvcache[i]).reshape(-1, 656)[slots[slots >= 0]]
                rows = np.asarray(dequantise(fp8_cache, (jnp.asarray(stored),)))
                assert len(rows) == min(length, topk)
            else:
                rows = np.asarray(kvcache[i])[block_table[sequence]].reshape(-1, d)[:length]
                assert (rows[-1] == new_rows[i, sequence, 0, 0]).all()
            expected = naive_attention(q[i, sequence, 0], rows)
            got = np.asarray(outs[i][sequence, 0], np.float64)
            worst = float(np.maximum(worst, np.abs(got - expected).max()))  # NaN too
        print(f"step {step}: {num_layers} layers, lengths {cache_seqlens.tolist()}")
    return worst


def main() -> None:
    for name, sparse in (("dense", False), ("sparse", True)):
        worst = run(sparse)
        print(f"{name}, on {jax.devices()[0].device_kind}: worst error {worst:.2g}")
        if not worst <= 2e-2:  # bfloat16 keeps 8 bits of outputs of about 1
            raise SystemExit("the results do not match")


if __name__ == "__main__":
    main()

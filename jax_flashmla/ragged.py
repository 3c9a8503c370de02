"""Ragged paged attention as JAX's serving engines call it.

The signature is that of tpu-inference's and ejkernel's `mla_ragged_paged_attention` and, with
`cu_kv_lens` and a ragged list of pages, of sgl-jax's.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jax_flashmla import _checks
from jax_flashmla._ragged_arguments import (
    as_bounds,
    as_scale,
    check_cache,
    check_options,
    check_rows,
)
from jax_flashmla.cache.format import CacheFormat
from jax_flashmla.ops.cache_append import append_packed
from jax_flashmla.ops.dense_decode import decode_packed

_LARGEST_BLOCK = 256  # tokens; larger pages are seen as several blocks


def mla_ragged_paged_attention(
    ql_nope: jax.Array,
    q_pe: jax.Array,
    new_kv_c: jax.Array,
    new_k_pe: jax.Array,
    cache_kv: jax.Array,
    kv_lens: jax.Array,
    page_indices: jax.Array,
    cu_q_lens: jax.Array,
    distribution: jax.Array,
    *,
    sm_scale: float,
    cu_kv_lens: jax.Array | None = None,
    pages_per_seq: int | None = None,
    max_q_len: int | None = None,
    q_scale: float | None = None,
    k_scale: float | None = None,
    v_scale: float | None = None,
    sliding_window: None = None,
    soft_cap: None = None,
    implementation: str | None = None,
    **tuning: Any,
) -> tuple[jax.Array, jax.Array]:
    """Stores a step's new tokens in the paged cache, then attends causally to each sequence's.

    Sequences have any number of new tokens: one where they decode, several in a chunk over a prefix
    or in a whole prompt. Those of sequence i are the packed rows from cu_q_lens[i] to
    cu_q_lens[i + 1], and the last of its kv_lens[i] tokens.

    Called eagerly it donates `cache_kv`: use the cache that it returns. In a jitted step donate the
    step's own argument; the update is in place there too.

    Args:
        ql_nope: [T, n, 512] absorbed queries, in the cache's dtype; columns are a multiple of 128.
            On Hopper 512, any n.
        q_pe: [T, n, 64] rotary part of the queries.
        new_kv_c: [T, 512] latents of the new tokens.
        new_k_pe: [T, 64] their rotary keys.
        cache_kv: [pages, page_size / pack, pack, 640] bfloat16, float16 or float32 (not on Hopper):
            latent, rotary key and zeros. On Hopper page_size is 16, 32, 64, 128 or a multiple of
            256. Of pages that the sequences do not hold, and slots past kv_lens, anything.
        kv_lens: [max_seqs] int32, tokens of each sequence, the new ones included.
        page_indices: [max_seqs * pages_per_seq] int32, pages of each sequence in order; with
            cu_kv_lens [any] the sequences' pages without gaps.
        cu_q_lens: [max_seqs + 1] int32, bounds of each sequence's tokens among the T. Others of the
            T are padding, whose out is 0.
        distribution: [3] int32, how many sequences decode, decode or prefill, and are there at all.
            The last one counts: sequences from there on have no tokens.
        sm_scale: scale of the scores, finite and positive (static).
        cu_kv_lens: [max_seqs + 1] int32, cumulated kv_lens, each rounded up to whole pages.
        pages_per_seq: with cu_kv_lens, the most pages of a sequence (static); by default all of
            page_indices. A small bound saves memory: each group of tokens has a row of them.
        max_q_len: the most new tokens of a sequence (static), T by default; 1 says that this step
            only decodes.
        q_scale, k_scale, v_scale: factors of queries, keys and values (static), 1 by default.
        sliding_window, soft_cap: must be None.
        implementation: as in `dense_decode`.
        tuning: options of the engines' kernels, which have no meaning here: mask_value,
            chunk_prefill_size, num_kv_pages_per_block, num_queries_per_block, decode_batch_size,
            vmem_limit_bytes and debug_mode.

    Returns:
        out: [T, n, 512] in the queries' dtype.
        cache_kv: with the new tokens, whose padding columns are 0.

    Raises:
        TypeError, ValueError: an argument is not as described.
        NotImplementedError: a sliding window, a soft cap, a cache of float8; and as `dense_decode`.
    """
    check_options(tuning, sliding_window=sliding_window, soft_cap=soft_cap)
    latent, rope = check_rows(ql_nope, q_pe, new_kv_c, new_k_pe, cache_kv)
    page_size = check_cache(cache_kv, latent, rope, k_scale)
    kv_lens = _checks.as_int32("kv_lens", kv_lens, "[max_seqs]")
    max_seqs = kv_lens.shape[0]
    page_indices = _checks.as_int32("page_indices", page_indices, "[max_seqs * pages_per_seq]")
    cu_q_lens = as_bounds("cu_q_lens", cu_q_lens, max_seqs)
    distribution = _checks.as_int32("distribution", distribution, "[3]")
    if distribution.shape != (3,):
        raise ValueError(f"distribution must have shape (3,), got {distribution.shape}")
    num_pages = page_indices.shape[0]
    if cu_kv_lens is not None:
        cu_kv_lens = as_bounds("cu_kv_lens", cu_kv_lens, max_seqs)
        if pages_per_seq is None:
            pages_per_seq = num_pages
        _checks.check_int("pages_per_seq", pages_per_seq, 1, num_pages)
    else:
        expected = num_pages // max_seqs if pages_per_seq is None else pages_per_seq
        if num_pages != max_seqs * expected or expected == 0:
            raise ValueError(
                "page_indices must be [max_seqs * pages_per_seq] with kv_lens' max_seqs = "
                f"{max_seqs} (cu_kv_lens says where a ragged list's pages are), got {num_pages}"
            )
        pages_per_seq = expected
    scales = [as_scale("q_scale", q_scale), as_scale("k_scale", k_scale)]
    _checks.check_number("sm_scale", sm_scale)
    _checks.check_implementation(implementation)
    return _step(
        ql_nope,
        q_pe,
        new_kv_c,
        new_k_pe,
        cache_kv,
        kv_lens,
        page_indices,
        cu_q_lens,
        distribution,
        cu_kv_lens,
        page_size=page_size,
        pages_per_seq=pages_per_seq,
        max_q_len=_checks.as_max_q_len(max_q_len, ql_nope.shape[0]),
        sm_scale=float(sm_scale) * scales[0] * scales[1],
        v_scale=as_scale("v_scale", v_scale),
        implementation=implementation,
    )


@functools.partial(
    jax.jit,
    inline=True,
    donate_argnames="cache_kv",
    static_argnames=(
        "page_size",
        "pages_per_seq",
        "max_q_len",
        "sm_scale",
        "v_scale",
        "implementation",
    ),
)
def _step(
    ql_nope: jax.Array,
    q_pe: jax.Array,
    new_kv_c: jax.Array,
    new_k_pe: jax.Array,
    cache_kv: jax.Array,
    kv_lens: jax.Array,
    page_indices: jax.Array,
    cu_q_lens: jax.Array,
    distribution: jax.Array,
    cu_kv_lens: jax.Array | None,
    *,
    page_size: int,
    pages_per_seq: int,
    max_q_len: int,
    sm_scale: float,
    v_scale: float,
    implementation: str | None,
) -> tuple[jax.Array, jax.Array]:
    num_tokens, max_seqs = ql_nope.shape[0], kv_lens.shape[0]
    latent, rope, columns = new_kv_c.shape[1], new_k_pe.shape[1], cache_kv.shape[-1]
    if cu_kv_lens is None:
        pages = page_indices.reshape(max_seqs, pages_per_seq)
    else:
        pages = _gather_pages(page_indices, cu_kv_lens, page_size, pages_per_seq)
    block_size = page_size
    if page_size > _LARGEST_BLOCK and page_size % _LARGEST_BLOCK == 0:
        block_size = _LARGEST_BLOCK
    table = _split_pages(pages, cache_kv.shape[0], page_size // block_size)

    total = jnp.clip(distribution[2], 0, max_seqs)
    bounds = jax.lax.cummax(jnp.clip(cu_q_lens, 0, num_tokens))
    bounds = jnp.minimum(bounds, bounds[total])
    first_new = kv_lens - (bounds[1:] - bounds[:-1])

    one = jnp.ones((), jnp.float32)  # the scale of codes, which 16-bit rows have none of
    padding = jnp.zeros((num_tokens, columns - latent - rope), cache_kv.dtype)
    rows = jnp.concatenate([new_kv_c, new_k_pe, padding], axis=1)[:, None]
    cache_kv = append_packed(
        cache_kv,
        rows,
        bounds,
        table,
        first_new,
        jnp.full(max_seqs, num_tokens, jnp.int32),
        one,
        format=CacheFormat(d_qk=columns, d_v=latent, block_size=block_size, dtype=cache_kv.dtype),
        implementation=implementation,
    )
    out, _ = decode_packed(
        jnp.concatenate([ql_nope, q_pe], axis=2),
        cache_kv,
        table,
        kv_lens,
        bounds,
        kv_scale=one,
        format=CacheFormat(
            d_qk=latent + rope,
            d_v=latent,
            block_size=block_size,
            dtype=cache_kv.dtype,
            row_stride=columns,
        ),
        max_q_len=max_q_len,
        d_v=latent,
        sm_scale=sm_scale,
        causal=True,
        schedule=None,
        implementation=implementation,
    )
    if v_scale != 1:
        out = out * jnp.asarray(v_scale, out.dtype)
    return out, cache_kv


def _gather_pages(
    page_indices: jax.Array, cu_kv_lens: jax.Array, page_size: int, pages_per_seq: int
) -> jax.Array:
    """[max_seqs, pages_per_seq], -1 past a sequence's own."""
    bounds = -(-jnp.maximum(cu_kv_lens, 0) // page_size)
    entry = bounds[:-1, None] + jnp.arange(pages_per_seq, dtype=jnp.int32)[None, :]
    last = jnp.minimum(bounds[1:, None], page_indices.shape[0])
    pages = page_indices[jnp.minimum(entry, page_indices.shape[0] - 1)]
    return jnp.where(entry < last, pages, -1)


def _split_pages(pages: jax.Array, num_pages: int, parts: int) -> jax.Array:
    """[max_seqs, pages_per_seq * parts] blocks, of which a page has so many; -1 out of range."""
    if parts == 1:
        return pages
    in_range = (pages >= 0) & (pages < num_pages)
    first = jnp.where(in_range, pages, 0)[:, :, None] * parts
    blocks = first + jnp.arange(parts, dtype=jnp.int32)[None, None, :]
    return jnp.where(in_range[:, :, None], blocks, -1).reshape(pages.shape[0], -1)

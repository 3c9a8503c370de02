"""Small latent attention layers of every kind, and the same attention done naively in float64.

The naive one is written from DeepSeek-V2's formulas (arXiv:2405.04434, section 2.1 and appendix C):
keys and values of every head, one query at a time, pairs rotated as complex numbers.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

import cases
import naive
import tolerances
from jax_flashmla import BlockAllocator, BlockTable, PagedCache
from jax_flashmla.layers import (
    LongRopeConfig,
    MLAConfig,
    MLAParams,
    RopeConfig,
    YarnConfig,
    decode,
    prefill,
)
from jax_flashmla.layers.rope import inverse_frequencies

BLOCK_SIZE = 8

YARN = YarnConfig(factor=40.0, original_max_positions=16, mscale=0.8, mscale_all_dim=0.5)
V3 = MLAConfig(
    hidden_size=24,
    num_heads=8,
    q_lora_rank=10,
    kv_lora_rank=16,
    qk_nope_head_dim=6,
    qk_rope_head_dim=8,
    v_head_dim=5,
    rope=RopeConfig(layout="deinterleaved", yarn=YARN),
)
LITE = dataclasses.replace(V3, q_lora_rank=None, rope=RopeConfig(layout="interleaved"))
CONFIGS = {
    "v3": V3,
    "v2-lite": LITE,
    "minicpm3": dataclasses.replace(
        V3,
        rope=RopeConfig(
            layout="half",
            longrope=LongRopeConfig(factors=(1.0, 1.5, 2.0, 3.0), attention_factor=1.1),
        ),
    ),
    "longcat": dataclasses.replace(
        V3, q_scale=1.6, kv_scale=0.7, rope=RopeConfig(layout="deinterleaved", theta=1e7)
    ),
    "kimi-linear": dataclasses.replace(LITE, rope=RopeConfig(layout="none")),
    "wide values": dataclasses.replace(V3, v_head_dim=20, q_norm_eps=0.1, kv_norm_eps=0.2),
    "no rope": dataclasses.replace(LITE, qk_rope_head_dim=0, rope=RopeConfig(layout="none")),
}


def make_params(config: MLAConfig, dtype: str = "float32") -> MLAParams:
    """Random parameters, norms too."""
    rng = np.random.default_rng(cases.SEED)

    def array(shape: jax.ShapeDtypeStruct) -> jax.Array:
        scale = 0.5 if len(shape.shape) == 1 else shape.shape[-1] ** -0.5
        mean = 1.0 if len(shape.shape) == 1 else 0.0
        return jnp.asarray(mean + scale * rng.standard_normal(shape.shape), dtype)

    return jax.tree.map(array, MLAParams.shapes(config))


def make_x(config: MLAConfig, b: int, tokens: int, dtype: str = "float32") -> np.ndarray:
    return cases.normal(np.random.default_rng(cases.SEED), (b, tokens, config.hidden_size), dtype)


def make_cache(
    config: MLAConfig,
    rooms: list[int],
    *,
    layers: int = 1,
    dtype: str = "float32",
    block_size: int = BLOCK_SIZE,
    **options: bool,
) -> PagedCache:
    """An empty cache of sequences with room for so many tokens each; unused slots are NaN."""
    allocator = BlockAllocator(num_blocks=32, block_size=block_size)
    sequences = [allocator.allocate(room) for room in rooms]
    table = BlockTable.create(allocator.block_table(sequences, 8), block_size=block_size)
    format = config.cache_format(dtype, block_size)
    cache = PagedCache.create(format, table, num_blocks=32, layers=layers, **options)
    blocks = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), cache.blocks)
    return dataclasses.replace(cache, blocks=blocks)


def cached_rows(cache: PagedCache, sequence: int, layer: int = 0) -> np.ndarray:
    """A sequence's rows in one layer [tokens, d_qk]."""
    blocks, table, seqlens = (np.asarray(x) for x in cache.layer(layer))
    token = np.arange(seqlens[sequence])
    block, offset = np.divmod(token, cache.format.block_size)
    return blocks[table[sequence, block], offset, 0].astype(np.float64)


def naive_layer(
    config: MLAConfig, params: MLAParams, x: np.ndarray, seen: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """One sequence from its first token on: x [tokens, hidden] -> y [tokens, hidden], and the rows
    [tokens, d_qk] that a cache would hold. Tokens attend to those up to themselves, or to the
    `seen` [tokens, tokens]."""
    if seen is None:
        seen = np.tril(np.ones((len(x), len(x)), bool))
    p = jax.tree.map(lambda a: np.asarray(a).astype(np.float64), params)
    x = x.astype(np.float64)
    nope, rank = config.qk_nope_head_dim, config.kv_lora_rank
    if config.q_lora_rank is None:
        q = np.tensordot(x, p.w_q, 1)
    else:
        q = np.tensordot(_norm(x @ p.w_dq, p.q_norm, config.q_norm_eps), p.w_uq, 1)
    down = x @ p.w_dkv
    latent = _norm(down[:, :rank], p.kv_norm, config.kv_norm_eps) * config.kv_scale
    k_rope = naive_rotate(config, down[:, rank:], np.arange(len(x)))

    scale = (nope + config.qk_rope_head_dim) ** -0.5
    yarn = config.rope.yarn
    if yarn is not None and yarn.mscale_all_dim:
        scale *= (0.1 * yarn.mscale_all_dim * math.log(yarn.factor) + 1) ** 2
    y = np.zeros_like(x)
    for h in range(config.num_heads):
        q_rope = naive_rotate(config, q[:, h, nope:], np.arange(len(x)))
        queries = np.concatenate([q[:, h, :nope], q_rope], axis=1) * config.q_scale
        keys = np.concatenate([latent @ p.w_uk[h].T, k_rope], axis=1)
        values = latent @ p.w_uv[h].T
        for i in range(len(x)):
            out, _ = naive.attend(
                queries[i : i + 1], keys[seen[i]], values[seen[i]], sm_scale=scale
            )
            y[i] += out[0] @ p.w_o[h]
    return y, np.concatenate([latent, k_rope], axis=1)


def naive_rotate(config: MLAConfig, x: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """x [tokens, rope], its pairs turned as complex numbers."""
    layout, rope = config.rope.layout, config.rope
    if layout == "none":
        return x
    half = x.shape[1] // 2
    pairs = x[:, :half] + 1j * x[:, half:] if layout == "half" else x[:, ::2] + 1j * x[:, 1::2]
    # Angles are float32: at long positions their rounding is more than any other error.
    angles = positions.astype(np.float32)[:, None] * inverse_frequencies(config)
    scale = 1.0
    if rope.yarn is not None:
        scale = (0.1 * rope.yarn.mscale * math.log(rope.yarn.factor) + 1) / (
            0.1 * rope.yarn.mscale_all_dim * math.log(rope.yarn.factor) + 1
        )
    if rope.longrope is not None:
        scale = rope.longrope.attention_factor
    turned = pairs * scale * np.exp(1j * angles.astype(np.float64))
    if layout == "interleaved":
        return np.stack([turned.real, turned.imag], axis=2).reshape(x.shape)
    return np.concatenate([turned.real, turned.imag], axis=1)


def _norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps) * weight


COMPILED = {
    prefill: jax.jit(prefill, static_argnames=("prefix", "implementation")),
    decode: jax.jit(decode, static_argnames="implementation"),
}


class Run:
    """Sequences of one layer, step by step, held against the naive layer as a whole."""

    def __init__(
        self,
        config: MLAConfig,
        lengths: list[int],
        *,
        dtype: str = "float32",
        tolerance: tolerances.Tolerance = tolerances.F32_LAYER,
        block_size: int = BLOCK_SIZE,
        **options: object,
    ) -> None:
        self.config, self.lengths = config, lengths
        self.tolerance, self.options = tolerance, options
        self.params = make_params(config, dtype)
        self.x = make_x(config, len(lengths), max(lengths), dtype)
        self.cache = make_cache(config, lengths, dtype=dtype, block_size=block_size)
        self.y = np.full(self.x.shape, np.nan, np.float64)

    def step(self, function, num_new: list[int], width: int | None = None, **options) -> None:
        """The next num_new tokens of each sequence, padded to `width`."""
        width = max(num_new) if width is None else width
        at = np.asarray(self.cache.table.cache_seqlens)
        x = np.full((len(at), width, self.x.shape[2]), 7, self.x.dtype)  # padding: finite
        for i, n in enumerate(num_new):
            x[i, :n] = self.x[i, at[i] : at[i] + n]
        cache, slots = self.cache.advance(width, np.array(num_new, np.int32))
        self.cache, y = COMPILED[function](
            self.config,
            self.params,
            jnp.asarray(x),
            cache,
            slots=slots,
            **{**self.options, **options},
        )
        assert y.dtype == x.dtype
        assert np.isfinite(np.asarray(y, np.float32)).all()
        for i, n in enumerate(num_new):
            self.y[i, at[i] : at[i] + n] = np.asarray(y[i, :n], np.float64)

    def check(self) -> None:
        np.testing.assert_array_equal(self.cache.table.cache_seqlens, self.lengths)
        assert self.cache.check() == []
        for i, length in enumerate(self.lengths):
            y, rows = naive_layer(self.config, self.params, self.x[i, :length])
            tolerances.assert_close(f"y[{i}]", self.y[i, :length], y, self.tolerance)
            cached = cached_rows(self.cache, i)
            tolerances.assert_close(f"rows[{i}]", cached, rows, self.tolerance)

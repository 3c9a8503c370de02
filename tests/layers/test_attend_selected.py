"""Attention to selected tokens through gathered rows, against reading the cache in place."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparse_layers
import tolerances
from jax_flashmla.layers import MLAConfig, RopeConfig, Selection, attend, gathered

HEADS, TOPK = 40, 24
CONFIG = MLAConfig(
    hidden_size=64, num_heads=HEADS, q_lora_rank=32, kv_lora_rank=512,
    qk_nope_head_dim=16, qk_rope_head_dim=64, v_head_dim=16, rope=RopeConfig(layout="half"),
)  # fmt: skip


@pytest.mark.parametrize("name", ["v32", "dense"])
@pytest.mark.usefixtures("on_cpu")
def test_gathered_rows_are_the_caches(name, monkeypatch):
    """Of two sequences in the second of three layers, as a chunk of each attends to them."""
    rng = np.random.default_rng(0)
    rooms = [130, 70]
    cache = sparse_layers.make_cache(
        CONFIG, rooms, layers=3, dtype="bfloat16", name=name, pool=False
    )
    cache, slots = cache.advance(130, np.array(rooms, np.int32))
    rows = jnp.asarray(0.1 * rng.standard_normal((2, 130, 1, 576)), jnp.bfloat16)
    cache = cache.write(rows, slots, layer=1)
    table = np.asarray(cache.table.block_table)
    chosen = np.full((2, 9, TOPK), -1, np.int32)
    for i, room in enumerate(rooms):
        tokens = rng.integers(0, room, (9, TOPK - i))
        chosen[i, :, : TOPK - i] = table[i, tokens // 64] * 64 + tokens % 64
    chosen[:, ::2, :3] = [-7, cache.layer(1).num_blocks * 64, 2**31 - 1]  # of no block
    lengths = rng.integers(0, TOPK, (2, 9))
    selection = Selection(jnp.asarray(chosen), jnp.asarray(lengths, jnp.int32))
    q = jnp.asarray(rng.standard_normal((2, 9, HEADS, 576)), jnp.bfloat16)

    def attended(reuse: float) -> np.ndarray:
        monkeypatch.setattr(gathered, "GATHER_REUSE", reuse)
        call = functools.partial(
            attend.attend_selected, CONFIG,
            heads_axis=None, context_axis=None, peers=None, implementation=None,
        )  # fmt: skip
        text = jax.jit(call).lower(q, cache, 1, selection).as_text()
        assert ("sparse_prefill" in text) == (reuse == 0)
        return np.asarray(jax.jit(call)(q, cache, 1, selection))

    tolerances.assert_close("out", attended(0), attended(1e9), tolerances.PREFILL_OUT)


def test_short_chunks_and_few_heads_read_the_cache_in_place():
    cache = sparse_layers.make_cache(CONFIG, [1024], dtype="bfloat16", name="v32", pool=False)
    rows = cache.layer(0)
    width = rows.block_table.shape[1] * 64
    for s, heads, gathers in ((width, 64, True), (1, 64, False), (width, 16, False)):
        q = jax.ShapeDtypeStruct((1, s, heads, 576), jnp.bfloat16)
        slots = jnp.zeros((1, s, gathered.GATHER_REUSE), jnp.int32)
        assert (
            gathered.pays_to_gather(q, Selection(slots, jnp.zeros((1, s), jnp.int32)), rows)
            == gathers
        )

"""A step of a sparse layer over one paged cache: keys and rows are appended, scored, attended."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import index_cases
import naive
import tolerances
from jax_flashmla import (
    BlockTable,
    CacheFormat,
    PagedCache,
    index_scores,
    index_topk,
    sparse_decode,
)
from stored import rounded

ROWS = CacheFormat(name="v32", block_size=64)
B, LAYERS, S_NEW, TOPK, HEADS = 2, 2, 3, 16, 4


def layer_of(cache: PagedCache, i: int | jax.Array) -> tuple[Any, Any, dict[str, Any]]:
    """The index pool's layer, the cache's, and where both lie in their arrays."""
    keys, rows = cache.index_layer(i), cache.layer(i)
    return keys, rows, {"first_block": rows.first_block, "layer_blocks": rows.num_blocks}


@functools.partial(jax.jit, donate_argnames="cache", static_argnames="implementation")
def step(
    cache: PagedCache, inputs: dict[str, jax.Array], implementation: str
) -> tuple[PagedCache, dict[str, jax.Array]]:
    cache, slots = cache.advance(S_NEW, inputs["num_new"])
    schedule = cache.table.schedule(h_q=1)  # for all layers

    def layer(cache: PagedCache, given: dict[str, jax.Array]) -> tuple[PagedCache, dict]:
        i = given["layer"]
        cache = cache.write(given["row"], slots, layer=i)
        cache = cache.write_index(given["key"], slots, layer=i)
        keys, rows, where = layer_of(cache, i)
        table, lengths = cache.table.block_table, cache.table.cache_seqlens
        queries = (given["index_q"], given["weights"], keys.blocks, table, lengths)
        options = {"format": keys.format, "schedule": schedule, "implementation": implementation}
        scores = index_scores(*queries, **options, **where)
        indices, positions = index_topk(
            *queries, topk=TOPK, return_positions=True, **options, **where
        )
        again = index_topk(None, None, None, table, lengths, scores=scores, topk=TOPK, **options)
        out, _ = sparse_decode(given["q"], rows.blocks, indices, format=rows.format, **where)
        return cache, {
            "scores": scores,
            "positions": positions,
            "out": out,
            "same": indices == again,
        }

    return jax.lax.scan(layer, cache, {"layer": jnp.arange(LAYERS), **inputs["layers"]})


def make_inputs(rng: np.random.Generator) -> dict[str, Any]:
    def normal(*shape: int, dtype: Any = jnp.bfloat16) -> jax.Array:
        return jnp.asarray(rng.standard_normal((LAYERS, B, S_NEW, *shape), np.float32)).astype(
            dtype
        )

    layers = {
        "row": normal(1, 576),
        "key": normal(1, 128),
        "index_q": normal(8, 128, dtype=jnp.float8_e4m3fn),
        "weights": normal(8, dtype=jnp.float32),
        "q": normal(HEADS, 576),
    }
    return {"num_new": jnp.asarray(rng.integers(1, S_NEW + 1, B), jnp.int32), "layers": layers}


@pytest.mark.parametrize("implementation", ["kernel", "xla"])
@pytest.mark.usefixtures("on_cpu")
def test_steps_attend_what_was_stored_and_scored(implementation: str) -> None:
    rng = np.random.default_rng(0)
    table = BlockTable.create([[4, 1], [0, 2]])
    cache = PagedCache.create(
        ROWS, table, num_blocks=6, layers=LAYERS, index_format=index_cases.FORMAT
    )
    rows, keys = np.zeros((LAYERS, B, 128, 576)), np.zeros((LAYERS, B, 128, 128))
    lengths = np.zeros(B, int)
    for _ in range(30):
        inputs = make_inputs(rng)
        num_new = np.asarray(inputs["num_new"])
        for name, format, stored in (("row", ROWS, rows), ("key", index_cases.FORMAT, keys)):
            new = np.asarray(inputs["layers"][name])
            for i, s in np.ndindex(LAYERS, B):
                stored[i, s, lengths[s] : lengths[s] + num_new[s]] = rounded(
                    format, new[i, s, : num_new[s], 0]
                )
        lengths += num_new
        cache, got = step(cache, inputs, implementation)
    np.testing.assert_array_equal(cache.table.cache_seqlens, lengths)
    assert lengths.min() > 50
    assert np.asarray(got["same"]).all()
    given = {k: np.asarray(x).astype(np.float64) for k, x in inputs["layers"].items()}
    for i in range(LAYERS):
        visible = np.arange(128) < (lengths[:, None] - np.arange(S_NEW)[::-1])[..., None]
        scores = index_cases.naive_scores(
            given["index_q"][i], given["weights"][i], keys[i], np.ones((B, 128))
        )
        scores = np.where(visible, scores, -np.inf)
        bound = tolerances.Tolerance(absolute=1e-4, relative=1e-5, cosine=1e-11)
        tolerances.assert_close("scores", np.asarray(got["scores"][i]), scores, bound)
        positions = np.asarray(got["positions"][i])
        np.testing.assert_array_equal(positions, index_cases.naive_topk(scores, visible, TOPK))
        attended = rows[i, np.arange(B)[:, None, None], positions]
        out, _ = naive.attend(given["q"][i], attended, d_v=512)
        tolerances.assert_close("out", np.asarray(got["out"][i]), out, tolerances.SPARSE_OUT)

"""Layers with an indexer against transformers: what they select, and chunks of a prompt past topk.

test_parity.py has steps of decoding. In float32 index keys are stored as they are, so that the
selection is transformers' but for scores that rounding (2^-24 of their size) could exchange. In fp8
it is another one; so there the layer is held against naive attention to what it has selected, and
the selection itself against transformers' by how much of it is the same.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import golden_models
import sparse_layers
import tolerances
from jax_flashmla import Slots
from jax_flashmla.layers import MLAConfig, Selection, decode, prefill, select
from jax_flashmla.layers.checkpoint import load_attention

WIDE = golden_models.GOLDEN / "deepseek_v32_wide"
CHUNKS = [20, 27, 33]  # topk = 24: a dense one, one across, one that sees more throughout


def run(directory, dtype: str, *, name: str = "dense", fp8_keys: bool = False, **options):
    """The first layer's output [tokens, n] over CHUNKS, and what it selected [tokens, topk]."""
    config = MLAConfig.from_hf(directory)
    (params,) = load_attention(directory, config, [0], dtype=dtype)
    x = jnp.asarray(golden_models.load(directory)["x"]).astype(dtype)
    cache = sparse_layers.make_cache(config, [len(x)], dtype=dtype, name=name, fp8_keys=fp8_keys)

    @functools.partial(jax.jit, donate_argnames="cache")
    def step(cache, x):
        cache, slots = cache.advance(x.shape[1])
        cache, selection = select(config, params, x, cache, slots=slots, **options)
        cache, y = prefill(config, params, x, cache, slots=slots, selection=selection, **options)
        return cache, y, selection

    outputs, selected = [], []
    for chunk in np.split(np.asarray(x), np.cumsum(CHUNKS)[:-1]):
        cache, y, selection = step(cache, jnp.asarray(chunk)[None])
        outputs.append(np.asarray(y[0], np.float32))
        selected.append(sparse_layers.positions_of_slots(cache, selection.slots)[0])
    return config, params, np.asarray(x), np.concatenate(outputs), np.concatenate(selected)


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("source", golden_models.SOURCES)
@pytest.mark.parametrize("name", ["deepseek_v32", "glm_moe_dsa"])
def test_chunks_select_and_compute_what_transformers_does(name, source, scratch):
    directory = golden_models.find(name, source, scratch)
    golden = golden_models.load(directory)
    *_, y, selected = run(directory, "float32")
    for i, (got, expected) in enumerate(zip(selected, golden["selected"], strict=True)):
        count = min(i + 1, len(expected))
        assert set(got[:count]) == {t for t in expected.tolist() if t <= i}, i
        assert (got[count:] == -1).all()
    tolerances.assert_close("y", y, golden["y"], tolerances.F32_PARITY)


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(
    ("dtype", "name", "tolerance"),
    [
        ("bfloat16", "dense", tolerances.BF16_PARITY),
        ("bfloat16", "v32", tolerances.FP8_PARITY),
    ],
)
def test_fp8_keys_select_almost_the_same(dtype, name, tolerance):
    config, params, x, y, selected = run(WIDE, dtype, name=name, fp8_keys=True)
    expected, _ = sparse_layers.naive_layer(config, params, x, selected)
    tolerances.assert_close("y", y, expected, tolerance)
    reference = golden_models.load(WIDE)["selected"]
    topk = reference.shape[1]
    same = [
        len(set(got.tolist()) & set(want.tolist())) / topk
        for got, want in zip(selected[topk:], reference[topk:], strict=True)
    ]
    assert np.mean(same) > 0.95
    assert min(same) > 0.85


@pytest.mark.usefixtures("on_cpu")
def test_steps_of_several_tokens_compute_what_transformers_does():
    """As they verify drafts: each token sees up to itself, sequences have unequal numbers."""
    directory = golden_models.GOLDEN / "deepseek_v32"
    golden = golden_models.load(directory)
    config = MLAConfig.from_hf(directory)
    (params,) = load_attention(directory, config, [0], dtype="float32")
    x = jnp.asarray(golden["x"])
    cache = sparse_layers.make_cache(config, [80, 80, 80])
    cache, slots = cache.advance(40, np.array([40, 25, 3], np.int32))
    first = jnp.broadcast_to(x[:40], (3, 40, x.shape[1]))
    cache, _ = jax.jit(functools.partial(prefill, config, prefix=False))(
        params, first, cache, slots=slots
    )
    step = jax.jit(functools.partial(decode, config))
    for num_new in ([3, 1, 2], [0, 3, 3], [2, 3, 0]):
        at = np.asarray(cache.table.cache_seqlens)
        cache, slots = cache.advance(3, np.array(num_new, np.int32))
        new = jnp.stack([x[start : start + 3] for start in at])
        cache, y = step(params, new, cache, slots=slots)
        assert np.isfinite(np.asarray(y)).all()
        for i, (start, n) in enumerate(zip(at, num_new, strict=True)):
            expected = golden["y"][start : start + n]
            tolerances.assert_close("y", np.asarray(y[i, :n]), expected, tolerances.F32_PARITY)


@pytest.mark.usefixtures("on_cpu")
def test_without_a_pool_attention_is_dense():
    config = MLAConfig.from_hf(WIDE)
    (params,) = load_attention(WIDE, config, [0], dtype="float32")
    x = golden_models.load(WIDE)["x"]
    cache = sparse_layers.make_cache(config, [80], pool=False)
    cache, slots = cache.advance(80)
    got, y = jax.jit(functools.partial(prefill, config))(params, x[None], cache, slots=slots)
    everything = np.tile(np.arange(80), (80, 1))
    expected, _ = sparse_layers.naive_layer(config, params, x, everything)
    tolerances.assert_close("y", np.asarray(y[0]), expected, tolerances.F32_PARITY)
    assert got.index_blocks is None
    cache, selection = select(config, params, x[None], cache, slots=slots)
    assert selection == Selection(None, None)
    assert isinstance(slots, Slots)

"""A layer of a published architecture against transformers: prefill, then 64 steps of decoding.

Layers with an indexer attend to fewer tokens than there are from step 8 on; see also
test_sparse_parity.py.

Golden files hold what transformers computed; "live" does it now, where torch and transformers are
installed.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import golden_models
import tolerances
from jax_flashmla import BlockAllocator, BlockTable, PagedCache, make_schedule
from jax_flashmla.layers import MLAConfig, absorb, decode, prefill
from jax_flashmla.layers.checkpoint import load_attention

PROMPTS = [16, 7]  # tokens; both sequences are the same one, cut at different places
STEPS = 64
WIDE = golden_models.GOLDEN / "deepseek_v3_wide"  # the only one with the Hopper kernels' widths


def run_layer(directory, x: np.ndarray, dtype: str, **decode_options) -> list[np.ndarray]:
    """The layer's output for each sequence's first PROMPTS[i] + STEPS tokens of x [tokens, n]."""
    config = MLAConfig.from_hf(directory)
    (params,) = load_attention(directory, config, [0], dtype=dtype)
    if decode_options.pop("absorbed", False):
        decode_options["absorbed"] = absorb(config, params)
    block_size = 64 if config.d_qk == 576 or config.indexer is not None else 16
    allocator = BlockAllocator(num_blocks=12, block_size=block_size)
    sequences = [allocator.allocate(n + STEPS) for n in PROMPTS]
    table = BlockTable.create(allocator.block_table(sequences, 6), block_size=block_size)
    cache = PagedCache.create(
        config.cache_format(dtype, block_size),
        table,
        num_blocks=12,
        index_format=config.index_format(dtype),
    )

    x = jnp.asarray(x).astype(dtype)
    padded = jnp.stack([x[: max(PROMPTS)]] * 2)
    cache, slots = cache.advance(max(PROMPTS), np.array(PROMPTS, np.int32))
    cache, y = jax.jit(functools.partial(prefill, config))(params, padded, cache, slots=slots)
    outputs = [[np.asarray(y[i, :n], np.float32)] for i, n in enumerate(PROMPTS)]

    @functools.partial(jax.jit, donate_argnames="cache")
    def step(cache: PagedCache) -> tuple[PagedCache, jax.Array]:
        cache, slots = cache.advance()
        schedule = make_schedule(cache.table.cache_seqlens, h_q=config.num_heads)
        tokens = x[slots.positions][:, None]
        return decode(
            config, params, tokens, cache, slots=slots, schedule=schedule, **decode_options
        )

    for _ in range(STEPS):
        cache, y = step(cache)
        for i, output in enumerate(outputs):
            output.append(np.asarray(y[i], np.float32))
    np.testing.assert_array_equal(cache.table.cache_seqlens, [n + STEPS for n in PROMPTS])
    assert not cache.overflow.any()
    return [np.concatenate(output) for output in outputs]


def check_layer(directory, dtype: str, tolerance: tolerances.Tolerance, **options) -> None:
    golden = golden_models.load(directory)
    for got in run_layer(directory, golden["x"], dtype, **options):
        tolerances.assert_close("y", got, golden["y"][: len(got)], tolerance)


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("source", golden_models.SOURCES)
@pytest.mark.parametrize("name", sorted(set(golden_models.NAMES) - {"deepseek_v32_wide"}))
def test_layer_equals_transformers_in_float32(name, source, scratch):
    check_layer(golden_models.find(name, source, scratch), "float32", tolerances.F32_PARITY)


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("source", golden_models.SOURCES)
@pytest.mark.parametrize("name", sorted(set(golden_models.NAMES) - set(golden_models.SPARSE)))
def test_layer_is_near_transformers_in_bfloat16(name, source, scratch):
    check_layer(golden_models.find(name, source, scratch), "bfloat16", tolerances.BF16_PARITY)


def test_kernels_are_near_transformers_in_bfloat16(kernel):
    check_layer(WIDE, "bfloat16", tolerances.BF16_PARITY, implementation=kernel)


@pytest.mark.usefixtures("on_cpu")
def test_a_step_lowers_for_hopper_whatever_its_projections_widths():
    """Kernels are insisted on where there is attention and a cache; 12 value columns are XLA's."""
    config = MLAConfig.from_hf(WIDE)
    assert config.v_head_dim % 8
    (params,) = load_attention(WIDE, config, [0], dtype="bfloat16")
    table = BlockTable.create(np.array([[0]], np.int32), block_size=64)
    cache = PagedCache.create(config.cache_format("bfloat16", 64), table, num_blocks=1)

    def step(cache: PagedCache, x: jax.Array) -> tuple[PagedCache, jax.Array]:
        cache, slots = cache.advance()
        return decode(config, params, x, cache, slots=slots, implementation="kernel")

    x = jnp.zeros((1, 1, config.hidden_size), jnp.bfloat16)
    text = jax.jit(step).trace(cache, x).lower(lowering_platforms=("cuda",)).as_text()
    for name in ("latent_append", "project", "project_twice", "dense_decode"):
        assert f"flashmla_{name}_v1" in text


@pytest.mark.usefixtures("on_cpu")
def test_precomputed_products_equal_transformers():
    directory = golden_models.GOLDEN / "deepseek_v3"
    check_layer(directory, "float32", tolerances.F32_PARITY, absorbed=True)


def test_steps_reach_past_the_context_before_yarn():
    for name in ("deepseek_v2", "deepseek_v3"):
        config = MLAConfig.from_hf(golden_models.GOLDEN / name)
        assert config.rope.yarn.original_max_positions < min(PROMPTS) + STEPS
        assert config.rope.yarn.softmax_scale > 1.1


def test_golden_files_are_of_this_script():
    maker = golden_models.maker()
    assert sorted(maker.MODELS) == golden_models.NAMES
    for name in golden_models.NAMES:
        golden = golden_models.load(golden_models.GOLDEN / name)
        assert len(golden["x"]) == maker.TOKENS == PROMPTS[0] + STEPS

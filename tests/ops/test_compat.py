"""FlashMLA's names and conventions over ours."""

from __future__ import annotations

import os
import pathlib
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cases
import tolerances
from jax_flashmla import SplitSchedule, flash_mla_with_kvcache, get_mla_metadata, make_schedule

CASE = cases.DecodeCase(4, 2, 300, 6, 2, causal=True, zero_lengths=True, d_qk=80, d_v=64)


@pytest.fixture(scope="module")
def inputs() -> cases.DecodeInputs:
    return cases.make_inputs(CASE)


def metadata_of(inputs: cases.DecodeInputs) -> tuple:
    return get_mla_metadata(inputs.cache_seqlens, CASE.s_q * CASE.h_q // CASE.h_kv, CASE.h_kv)


def expected_of(inputs: cases.DecodeInputs) -> tuple[np.ndarray, np.ndarray]:
    out, lse = cases.naive_decode(CASE, inputs)
    return out, np.where(np.isneginf(lse), np.inf, lse).swapaxes(1, 2)


def test_positional_call_with_flashmlas_conventions(inputs: cases.DecodeInputs) -> None:
    tile_scheduler_metadata, num_splits = metadata_of(inputs)
    out, lse = flash_mla_with_kvcache(
        *inputs.arguments, CASE.d_v, tile_scheduler_metadata, num_splits, None, True
    )
    expected_out, expected_lse = expected_of(inputs)
    assert lse.shape == (CASE.b, CASE.h_q, CASE.s_q)
    assert np.isposinf(expected_lse).any()
    tolerances.assert_decoded((out, lse), (expected_out, expected_lse))


@pytest.mark.parametrize("form", ["schedule", "cuts", "none"])
def test_metadata_passes_through_jit(inputs: cases.DecodeInputs, form: str) -> None:
    metadata, num_splits = jax.jit(
        lambda lengths: get_mla_metadata(lengths, CASE.s_q * CASE.h_q // CASE.h_kv, CASE.h_kv)
    )(inputs.cache_seqlens)
    assert isinstance(metadata, SplitSchedule)
    metadata = {"schedule": metadata, "cuts": metadata.cuts, "none": None}[form]

    @jax.jit
    def decode(arguments: tuple, metadata: object, num_splits: object) -> tuple:
        return flash_mla_with_kvcache(
            *arguments, CASE.d_v, metadata, num_splits, softmax_scale=80**-0.5, causal=True
        )

    got = decode(inputs.arguments, metadata, num_splits)
    tolerances.assert_decoded(got, expected_of(inputs))


def test_metadata_without_arguments_as_later_versions_call_it(inputs: cases.DecodeInputs) -> None:
    metadata, num_splits = get_mla_metadata()
    assert num_splits is None
    out, _ = flash_mla_with_kvcache(*inputs.arguments, CASE.d_v, metadata, causal=True)
    tolerances.assert_close("out", out, expected_of(inputs)[0], tolerances.OUT)


def test_num_splits_counts_the_pieces_of_each_sequence() -> None:
    lengths = np.array([0, 6400, 64, 640, 0], np.int32)
    schedule, num_splits = get_mla_metadata(lengths, 64 * 12, 1)  # 132 // 12 = 11 parts
    assert schedule.num_parts == 11
    # 111 tiles and 5 sequences in 11 parts of about 10.5: 6400 tokens are cut 10 times or 9.
    cuts = np.asarray(schedule.cuts)
    pieces = [1 + sum(1 for i, tile in cuts[1:-1] if i == s and tile > 0) for s in range(5)]
    assert pieces[1] in (10, 11)
    assert num_splits.dtype == jnp.int32
    assert num_splits.tolist() == [0, *np.cumsum(pieces).tolist()]


def test_parts_as_make_schedule_takes_them() -> None:
    lengths = jnp.asarray([100, 200], jnp.int32)
    schedule, _ = get_mla_metadata(lengths, 4 * 128 // 2, 2, num_heads_q=128)
    assert schedule.num_parts == make_schedule(lengths, h_q=128, h_kv=2, s_q=4).num_parts


def wrong_metadata_calls() -> list:
    lengths = np.array([3, 4], np.int32)
    return [
        ((lengths, 0, 1), {}, ValueError, "num_q_tokens_per_head_k must be between 1 .* got 0"),
        (
            (lengths, 4.0, 1),
            {},
            TypeError,
            "num_q_tokens_per_head_k must be a Python int.* got 4.0",
        ),
        ((lengths, None, 1), {}, TypeError, "num_q_tokens_per_head_k must be .* got None"),
        ((lengths, 4, -1), {}, ValueError, "num_heads_k must be between 1 .* got -1"),
        ((lengths, 4, 1, 3), {}, ValueError, "num_heads_q must divide .* = 4, got 3"),
        ((None, 4, 1), {}, TypeError, "cache_seqlens must be an array .* got None"),
        ((lengths, 4, 1), {"is_fp8_kvcache": True}, NotImplementedError, "is_fp8_kvcache must be"),
        ((lengths, 4, 1), {"topk": 64}, NotImplementedError, "topk must be None.* got a int"),
    ]


@pytest.mark.parametrize(("args", "kwargs", "error", "message"), wrong_metadata_calls())
def test_wrong_metadata_calls(args: tuple, kwargs: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        get_mla_metadata(*args, **kwargs)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"is_fp8_kvcache": True}, NotImplementedError, "is_fp8_kvcache must be False"),
        *(
            ({name: np.zeros(3, np.int32)}, NotImplementedError, f"{name} must be None: sparse")
            for name in ("indices", "attn_sink", "topk_length", "extra_k_cache")
        ),
        (
            {"softmax_scale": -1.0},
            ValueError,
            "sm_scale must be finite and positive in float32, got -1.0",
        ),
        ({"causal": 1}, TypeError, "causal must be a Python bool"),
        (
            {"tile_scheduler_metadata": np.zeros((3, 8), np.int32)},
            ValueError,
            r"schedule.cuts must have shape \[num_parts \+ 1, 2\] .* got shape \(3, 8\)",
        ),
        ({"head_dim_v": 81}, ValueError, "d_v must be at most d_qk = 80 .* got 81"),
    ],
)
def test_wrong_decode_calls(
    inputs: cases.DecodeInputs, kwargs: dict, error: type, message: str
) -> None:
    kwargs = {"head_dim_v": 64, "tile_scheduler_metadata": None} | kwargs
    with pytest.raises(error, match=message):
        flash_mla_with_kvcache(*inputs.arguments, **kwargs)


def test_ported_example_runs() -> None:
    path = pathlib.Path(__file__).parents[2] / "examples" / "port_from_flashmla.py"
    example = runpy.run_path(os.fspath(path))
    with jax.default_device(jax.devices("cpu")[0]):
        example["main"]()  # exits with an error where the results do not match

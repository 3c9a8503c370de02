"""FlashMLA's names and conventions over ours."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import runpy
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cases
import sparse_cases
import tolerances
from jax_flashmla import (
    CacheFormat,
    SplitSchedule,
    compat,
    dense_decode,
    flash_mla_with_kvcache,
    get_mla_metadata,
    make_schedule,
    quantise,
)
from sparse_cases import Cache, Problem, SparseCase

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
        ((lengths, 4, 1), {"is_fp8_kvcache": 1}, TypeError, "is_fp8_kvcache must be a Python bool"),
        ((lengths, 4, 1), {"topk": 64}, TypeError, "num_heads_q must be given with topk, got None"),
        ((lengths, 4, 1, 4), {"topk": 0}, ValueError, "topk must be between 1 .* got 0"),
    ]


@pytest.mark.parametrize(("args", "kwargs", "error", "message"), wrong_metadata_calls())
def test_wrong_metadata_calls(args: tuple, kwargs: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        get_mla_metadata(*args, **kwargs)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        (
            {"is_fp8_kvcache": True},
            TypeError,
            "k_cache must have dtype uint8 or float8_e4m3fn with is_fp8_kvcache, got bfloat16",
        ),
        *(
            ({name: np.zeros(3, np.int32)}, ValueError, f"{name} must be None without indices")
            for name in ("attn_sink", "topk_length", "extra_k_cache", "extra_topk_length")
        ),
        (
            {"indices": np.zeros((4, 2, 3), np.int32), "causal": True},
            ValueError,
            "causal must be False with indices, got True",
        ),
        (
            {"softmax_scale": -1.0},
            ValueError,
            "softmax_scale must be finite and positive in float32, got -1.0",
        ),
        ({"causal": 1}, TypeError, "causal must be a Python bool"),
        (
            {"tile_scheduler_metadata": np.zeros((3, 8), np.int32)},
            ValueError,
            r"schedule.cuts must have shape \[num_parts \+ 1, 2\] .* got shape \(3, 8\)",
        ),
        (
            {"tile_scheduler_metadata": (1, 2)},
            TypeError,
            r"tile_scheduler_metadata must be an array \[num_parts \+ 1, 2\], got \(1, 2\)",
        ),
        ({"head_dim_v": 81}, ValueError, "head_dim_v must be between 1 and 80, got 81"),
        ({"k_cache": [1.5]}, TypeError, r"k_cache must be an array .*, got \[1.5\] of type list"),
        (
            {"k_cache": np.zeros((9, 64, 1, 72), jnp.bfloat16)},
            ValueError,
            "k_cache must have q's d_qk = 80 and dtype bfloat16, got shape .* of bfloat16",
        ),
        (
            {"indices": np.zeros((4, 2, 3), np.int32), "extra_k_cache": "x"},
            TypeError,
            "extra_k_cache must be an array .*, got 'x' of type str",
        ),
    ],
)
def test_wrong_decode_calls(
    inputs: cases.DecodeInputs, kwargs: dict, error: type, message: str
) -> None:
    names = ("q", "k_cache", "block_table", "cache_seqlens")
    right = dict(zip(names, inputs.arguments, strict=True))
    right |= {"head_dim_v": 64, "tile_scheduler_metadata": None}
    with pytest.raises(error, match=message):
        flash_mla_with_kvcache(**{**right, **kwargs})


# Sparse attention.


def sparse_call(case: SparseCase) -> tuple[Problem, dict[str, Any]]:
    """A problem, and its arguments under FlashMLA's names."""
    problem = sparse_cases.make_problem(dataclasses.replace(case, first_invalid=True))
    given = problem.arguments
    names = {
        "q": "q",
        "blocks": "k_cache",
        "indices": "indices",
        "attn_sink": "attn_sink",
        "topk_length": "topk_length",
        "extra_blocks": "extra_k_cache",
        "extra_indices": "extra_indices_in_kvcache",
        "extra_topk_length": "extra_topk_length",
    }
    call = {new: given[old] for old, new in names.items() if old in given}
    coded = case.main.name != "dense"
    return problem, {**call, "is_fp8_kvcache": coded, "head_dim_v": 512}


def check_sparse(got: tuple, problem: Problem) -> None:
    out, lse = problem.expected
    assert np.isneginf(lse[0]).all()
    lse = np.where(np.isneginf(lse), np.inf, lse).swapaxes(1, 2)
    tolerances.assert_decoded(got, (out, lse), out=tolerances.SPARSE_OUT)


REST = {"block_table": None, "cache_seqlens": None}


@pytest.mark.parametrize(
    "case",
    [
        SparseCase(Cache("v32", 300, 200, 61), s_q=2, h_q=16, sink=True, lengths="b"),
        SparseCase(Cache("v4", 90, 70, 2), Cache("v4", 80, 9, 73), h_q=8, b=6, lengths="b"),
        SparseCase(Cache("dense", 90, 70, 7), Cache("dense", 9, 5, 1), b=6, lengths="b"),
    ],
    ids=str,
)
@pytest.mark.parametrize("form", ["schedule", "cuts", "none"])
@pytest.mark.usefixtures("on_cpu")
def test_sparse_call_with_flashmlas_conventions(case: SparseCase, form: str) -> None:
    problem, call = sparse_call(case)
    schedule, num_splits = get_mla_metadata(
        np.zeros(case.b, np.int32), case.s_q * case.h_q, 1, case.h_q, True, case.main.topk
    )
    assert (schedule.b, num_splits.shape) == (case.b * case.s_q, (case.b * case.s_q + 1,))
    metadata = {"schedule": schedule, "cuts": schedule.cuts, "none": None}[form]
    got = flash_mla_with_kvcache(**call, **REST, tile_scheduler_metadata=metadata)
    check_sparse(got, problem)


@pytest.mark.usefixtures("on_cpu")
def test_cache_of_float8_is_taken_for_its_bytes() -> None:
    case = SparseCase(Cache("v32", 50, 70, 64), b=3, lengths="b")
    problem, call = sparse_call(case)
    call["k_cache"] = call["k_cache"].view(jnp.float8_e4m3fn)
    run = jax.jit(lambda x: flash_mla_with_kvcache(**{**call, "k_cache": x}, **REST,
                                                   tile_scheduler_metadata=None))  # fmt: skip
    check_sparse(run(call["k_cache"]), problem)


@pytest.mark.usefixtures("on_cpu")
def test_dense_attention_over_an_fp8_cache() -> None:
    format = CacheFormat(name="v32", block_size=16)
    rng = np.random.default_rng(0)
    rows = cases.normal(rng, (4 * 16, 576), "bfloat16", cases.ROW_SCALE)
    (planes,) = quantise(format, rows)
    blocks = planes.reshape(4, 16, 1, 656)
    q = cases.normal(rng, (2, 1, 4, 576), "bfloat16", cases.QUERY_SCALE)
    table, lengths = np.array([[0, 1], [3, 2]], np.int32), np.array([20, 31], np.int32)
    got = flash_mla_with_kvcache(q, blocks, table, lengths, 512, None, is_fp8_kvcache=True)
    out, lse = dense_decode(q, blocks, table, lengths, format=format)
    np.testing.assert_array_equal(got[0], out)
    np.testing.assert_array_equal(got[1], lse.swapaxes(1, 2))


def test_every_block_size_of_v4_is_told_by_its_bytes() -> None:
    for block_size in [*range(1, 300), 576, 1024]:
        format = CacheFormat(name="v4", block_size=block_size)
        assert compat._format_of((5, format.block_bytes), 512, jnp.bfloat16) == format


@pytest.mark.parametrize(
    ("d_qk", "shape"),
    [
        (512, (5, 64, 1, 528)),  # v32_nope or v41
        (512, (5, 64, 1, 584)),  # v4 as FlashMLA strides it
        (512, (5, 64 * 584)),
        (512, (5, 74 * 576)),  # between 72 tokens and 73
        (576, (5, 64, 1, 576)),
        (576, (5, 64, 2, 656)),
        (512, (5, 64, 1, 656)),
        (576, (5, 65 * 576)),
    ],
    ids=str,
)
def test_cache_whose_bytes_do_not_tell_its_format(d_qk: int, shape: tuple) -> None:
    call = {"q": np.zeros((1, 1, 4, d_qk), jnp.bfloat16), "k_cache": np.zeros(shape, np.uint8)}
    indices = np.zeros((1, 1, 3), np.int32)
    message = r"k_cache with is_fp8_kvcache must be .* got shape .*: other formats go to"
    with pytest.raises(ValueError, match=message):
        flash_mla_with_kvcache(
            **call, **REST, head_dim_v=512, tile_scheduler_metadata=None, is_fp8_kvcache=True,
            indices=indices,
        )  # fmt: skip


def test_bytes_without_is_fp8_kvcache() -> None:
    q, cache = np.zeros((1, 1, 4, 576), jnp.bfloat16), np.zeros((5, 64, 1, 656), np.uint8)
    with pytest.raises(TypeError, match="k_cache of uint8 needs is_fp8_kvcache = True"):
        flash_mla_with_kvcache(q, cache, None, None, 512, None)


def test_more_query_tokens_than_a_schedule_holds() -> None:
    lengths = np.zeros(4097, np.int32)
    assert get_mla_metadata(lengths, 4 * 16, 1, 16, True, 64) == (None, None)


def test_ported_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    path = pathlib.Path(__file__).parents[2] / "examples" / "port_from_flashmla.py"
    example = runpy.run_path(os.fspath(path))
    with jax.default_device(jax.devices("cpu")[0]):
        example["main"]()  # exits with an error where the results do not match
    said = capsys.readouterr().out
    assert "dense, on cpu: worst error" in said
    assert "sparse, on cpu: worst error" in said

"""One rank of several that share the tokens of every sequence: `context=` of the operations."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding

import cases
import context_cases
import tolerances
from jax_flashmla import (
    CacheFormat,
    context,
    decode_specs,
    dense_decode,
    dequantise,
    make_schedule,
    merge_lse,
    quantise,
)

HOSTILE = np.array([0, 1, 3, 7, 190], np.int32)


@functools.partial(jax.jit, static_argnames=("size", "max_q_len", "causal", "implementation"))
def decode(
    q: jax.Array, blocks: jax.Array, table: jax.Array, lengths: jax.Array, rank: jax.Array,
    cu_q_lens: jax.Array | None = None, *, size: int, **options: Any,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    s_q = {"s_q": q.shape[1]} if cu_q_lens is None else {
        "cu_q_lens": cu_q_lens, "num_tokens": q.shape[0], "max_q_len": options.get("max_q_len"),
        "causal": options["causal"],
    }  # fmt: skip
    here = (rank, size)
    schedule = make_schedule(
        lengths, h_q=q.shape[-2], h_kv=blocks.shape[2], context=here,
        max_seqlen=table.shape[1] * blocks.shape[1], **s_q,
    )  # fmt: skip
    return dense_decode(
        q, blocks, table, lengths, cu_q_lens=cu_q_lens, context=here, schedule=schedule,
        **options,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Shared:
    """HOSTILE sequences over `size` ranks."""

    size: int
    s_q: int
    h_q: int
    h_kv: int = 1
    causal: bool = True
    block_size: int = 64

    @functools.cached_property
    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """q, keys, and each rank's blocks and table."""
        rng = np.random.default_rng(cases.SEED)
        b, s_k = len(HOSTILE), int(HOSTILE.max())
        keys = cases.normal(rng, (b, s_k, self.h_kv, 576), "bfloat16", cases.ROW_SCALE)
        q = cases.normal(rng, (b, self.s_q, self.h_q, 576), "bfloat16", cases.QUERY_SCALE)
        return q, keys, *context_cases.share_out(keys, HOSTILE, self.size, self.block_size)

    def decode(self, rank: int, implementation: str) -> tuple[jax.Array, jax.Array]:
        q, _, blocks, tables = self.arrays
        return decode(
            q, blocks[rank], tables[rank], HOSTILE, np.int32(rank), size=self.size,
            causal=self.causal, implementation=implementation,
        )  # fmt: skip

    def expect(self, rank: int, size: int) -> tuple[np.ndarray, np.ndarray]:
        q, keys, _, _ = self.arrays
        return context_cases.naive_rank(q, keys, HOSTILE, rank, size, d_v=512, causal=self.causal)


@pytest.mark.parametrize(
    "case",
    [
        Shared(2, 1, 16),
        Shared(3, 4, 5),  # narrow tiles
        Shared(5, 2, 20),  # wide ones; more ranks than some sequences have tokens
        Shared(4, 3, 6, 2, block_size=16),
        Shared(3, 2, 16, causal=False),
    ],
    ids=str,
)
def test_each_rank_attends_to_its_own_tokens(case: Shared, implementation: str) -> None:
    if implementation == "xla" and (case.size, case.s_q) != (3, 4):
        pytest.skip("takes long to compile, and another case has it")
    parts = []
    for rank in range(case.size):
        got = case.decode(rank, implementation)
        if rank in (0, 1, case.size - 1):
            tolerances.assert_decoded(got, case.expect(rank, case.size))
        parts.append(got)
    merged = merge_lse(*(jnp.stack(x) for x in zip(*parts, strict=True)))
    tolerances.assert_decoded(merged, case.expect(0, 1))


@pytest.mark.gpu
@pytest.mark.parametrize("heads_split", [False, True])
@pytest.mark.parametrize("size", [2, 4])
def test_gpus_together_attend_to_all_tokens(size: int, heads_split: bool) -> None:
    devices = jax.devices("cuda")
    if len(devices) < size:
        pytest.skip(f"needs {size} GPUs")
    case = Shared(size, 3, 64)
    q, _, blocks, tables = case.arrays
    mesh = jax.make_mesh((size,), ("t",), axis_types=(AxisType.Auto,), devices=devices[:size])
    specs = decode_specs(context="t", heads="t" if heads_split else None)
    attend = functools.partial(context.dense_decode, axis="t", heads_split=heads_split, causal=True)
    sharded = jax.jit(
        jax.shard_map(attend, mesh=mesh, in_specs=specs.in_specs, out_specs=specs.out_specs)
    )
    arguments = (q, np.concatenate(blocks), np.concatenate(tables, axis=1), HOSTILE)
    placed = [
        jax.device_put(x, NamedSharding(mesh, spec))
        for x, spec in zip(arguments, specs.in_specs, strict=True)
    ]
    tolerances.assert_decoded(sharded(*placed), case.expect(0, 1))


def test_packed_queries(kernel: str) -> None:
    """Of a decoding sequence, one without queries, a chunk, and a prompt of fewer tokens."""
    size, lengths, q_lens = 2, np.array([150, 70, 40, 3], np.int32), (1, 0, 9, 5)
    rng = np.random.default_rng(cases.SEED)
    keys = cases.normal(rng, (4, 150, 1, 576), "bfloat16", cases.ROW_SCALE)
    blocks, tables = context_cases.share_out(keys, lengths, size, 64)
    cu = np.cumsum([0, *q_lens]).astype(np.int32)
    q = cases.normal(rng, (cu[-1] + 2, 16, 576), "bfloat16", cases.QUERY_SCALE)
    for rank in range(size):
        out, lse = decode(
            q, blocks[rank], tables[rank], lengths, np.int32(rank), cu, size=size, max_q_len=9,
            causal=True, implementation=kernel,
        )  # fmt: skip
        for i in range(len(lengths)):
            mine = slice(cu[i], cu[i + 1])
            expected = context_cases.naive_rank(
                q[None, mine], keys[i : i + 1], lengths[i : i + 1], rank, size, d_v=512, causal=True
            )
            got = out[mine], lse[mine]
            tolerances.assert_decoded(got, [x[0] for x in expected])
        np.testing.assert_array_equal(np.asarray(lse[cu[-1] :]), -np.inf)


def test_fp8_caches(kernel: str) -> None:
    """Are attended as the dense cache that they stand for."""
    case, format = Shared(2, 3, 16), CacheFormat(name="v32", block_size=64)
    q, _, blocks, tables = case.arrays
    rank = 1
    (stored,) = quantise(format, np.nan_to_num(blocks[rank][:, :, 0]))
    dense = dequantise(format, (stored,))[:, :, None]
    rest = tables[rank], HOSTILE
    options = {"causal": True, "context": (rank, case.size), "implementation": kernel}
    got = dense_decode(q, stored[:, :, None], *rest, format=format, **options)
    tolerances.assert_decoded(got, dense_decode(q, dense, *rest, **options))


@pytest.mark.usefixtures("on_cpu")
def test_ranks_may_be_mapped() -> None:
    rng = np.random.default_rng(cases.SEED)
    keys = cases.normal(rng, (len(HOSTILE), 190, 1, 24), "float32")
    q = cases.normal(rng, (len(HOSTILE), 3, 4, 24), "float32")
    blocks, tables = context_cases.share_out(keys, HOSTILE, 4, 8)
    got = jax.vmap(
        lambda rank, blocks, table: dense_decode(
            q, blocks, table, HOSTILE, causal=True, context=(rank, 4), d_v=16
        )
    )(np.arange(4), blocks, tables)
    for rank in range(4):
        expected = context_cases.naive_rank(q, keys, HOSTILE, rank, 4, d_v=16, causal=True)
        tolerances.assert_decoded([x[rank] for x in got], expected, **tolerances.F32_DECODE)


@pytest.mark.parametrize(
    ("given", "error", "match"),
    [
        (3, TypeError, r"context must be None or \(rank, size\), got 3"),
        ((0, 2.0), TypeError, "context's size must be a Python int"),
        ((0, 0), ValueError, "context's size must be between 1"),
        ((2, 2), ValueError, "context's rank must be between 0 and 1, got 2"),
        ((0.5, 2), TypeError, "context's rank must be an"),
    ],
)
def test_a_bad_context_is_refused(given: Any, error: type, match: str) -> None:
    case = Shared(2, 1, 16)
    q, _, blocks, tables = case.arrays
    with pytest.raises(error, match=match):
        dense_decode(q, blocks[0], tables[0], HOSTILE, context=given)


@pytest.mark.usefixtures("on_cpu")
def test_one_rank_is_no_context() -> None:
    q, _, blocks, tables = Shared(1, 2, 4).arrays
    run = functools.partial(dense_decode, q, blocks[0], tables[0], HOSTILE, causal=True)
    for x, y in zip(run(context=(0, 1)), run(), strict=True):
        np.testing.assert_array_equal(x, y)

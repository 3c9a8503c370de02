"""Tokens of every sequence shared out over devices: jax_flashmla.context under shard_map."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import cases
import context_cases
import naive
import tolerances
from jax_flashmla import (
    BlockTable,
    CacheFormat,
    PagedCache,
    _limits,
    connect_peers,
    context,
    decode_specs,
    merge_lse,
)
from jax_flashmla.context import ContextAllocator
from parallel import devices_of

pytestmark = pytest.mark.usefixtures("on_cpu")

LENGTHS = np.array([0, 1, 2, 5, 8, 9, 64, 67], np.int32)  # of blocks of 8 tokens
D_V = cases.SMALL_D_V


def mesh_of(**sizes: int) -> jax.sharding.Mesh:
    types = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=types,
                         devices=jax.devices("cpu"))  # fmt: skip


def make_problem(
    s_q: int, h_q: int, batches: int, ranks: int, width: int = 24, dtype: str = "float32"
) -> tuple:
    """q, then blocks and table as `decode_specs` splits them; and the keys, unpaged.

    16-bit keys are small: what each rank sends is rounded, to 2^-9 of it.
    """
    scale = 1.0 if dtype == "float32" else 0.2
    rng = np.random.default_rng(cases.SEED)
    q = cases.normal(rng, (8, s_q, h_q, width), dtype, 2.0)
    keys = cases.normal(rng, (8, int(LENGTHS.max()), 1, width), dtype, scale)
    shares = [
        context_cases.share_out(of, lengths, ranks, 8)
        for of, lengths in zip(np.split(keys, batches), np.split(LENGTHS, batches), strict=True)
    ]
    num_blocks = max(blocks.shape[1] for blocks, _ in shares)
    padded = [
        np.pad(x, [(0, 0), (0, num_blocks - x.shape[1]), *[(0, 0)] * 3], constant_values=np.nan)
        for x, _ in shares
    ]
    blocks = np.stack(padded).reshape(-1, 8, 1, width)  # batch, rank, block
    table = np.concatenate([np.concatenate(tables, axis=1) for _, tables in shares])
    return q, blocks, table, keys


@pytest.mark.parametrize(
    ("sizes", "names"),
    [
        ({"t": 8}, {"context": "t"}),
        ({"t": 8}, {"context": "t", "heads": "t"}),
        ({"x": 2, "t": 2, "y": 2}, {"batch": "x", "context": "t", "heads": "y"}),
    ],
    ids=["tokens", "tokens and heads on one axis", "batch, tokens and heads"],
)
@pytest.mark.parametrize("by_peers", [False, True], ids=["XLA", "peers"])
def test_dense_decode_is_that_of_one_device(
    sizes: dict[str, int], names: dict[str, str], by_peers: bool
) -> None:
    if by_peers and "x" in sizes:
        pytest.skip("one axis is enough")
    mesh = mesh_of(**sizes)
    q, blocks, table, keys = make_problem(3, 8, sizes.get("x", 1), sizes["t"])
    specs = decode_specs(**names)
    decode = functools.partial(
        context.dense_decode, axis="t", heads_split=names.get("heads") == "t", d_v=D_V, causal=True,
        peers=connect_peers(mesh, "t") if by_peers else None,
    )  # fmt: skip
    sharded = jax.jit(
        jax.shard_map(decode, mesh=mesh, in_specs=specs.in_specs, out_specs=specs.out_specs)
    )
    got = sharded(q, blocks, table, LENGTHS)
    results = [naive.dense(*x, d_v=D_V, causal=True) for x in zip(q, keys, LENGTHS, strict=True)]
    expected = [np.stack(x) for x in zip(*results, strict=True)]
    tolerances.assert_decoded(got, expected, **tolerances.F32_DECODE)


def test_packed_queries_on_an_explicit_mesh() -> None:
    """Heads split over the same axis, exchanged over peers."""
    rng = np.random.default_rng(cases.SEED)
    lengths, q_lens = np.array([150, 70, 40, 3], np.int32), (1, 0, 17, 5)
    cu = np.cumsum([0, *q_lens]).astype(np.int32)
    keys = cases.normal(rng, (4, 150, 1, 24), "float32")
    q = cases.normal(rng, (cu[-1] + 2, 8, 24), "float32", 2.0)
    blocks, tables = context_cases.share_out(keys, lengths, 8, 8)
    mesh = jax.make_mesh((8,), ("t",), axis_types=(AxisType.Explicit,), devices=jax.devices("cpu"))

    def local(q: jax.Array, blocks: jax.Array, table: jax.Array) -> tuple[jax.Array, jax.Array]:
        return context.dense_decode(
            q, blocks, table, lengths, axis="t", heads_split=True, d_v=D_V, causal=True,
            cu_q_lens=cu, max_q_len=17, peers=connect_peers(mesh, "t"),
        )  # fmt: skip

    specs = P(None, "t"), P("t"), P(None, "t")
    arguments = q, np.concatenate(blocks), np.concatenate(tables, axis=1)
    placed = [
        jax.device_put(x, NamedSharding(mesh, spec))
        for x, spec in zip(arguments, specs, strict=True)
    ]
    sharded = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P(None, "t"))
    out, lse = (np.asarray(x) for x in jax.jit(sharded)(*placed))
    for i in (0, 2, 3):
        mine = slice(cu[i], cu[i + 1])
        expected = naive.dense(q[mine], keys[i], int(lengths[i]), d_v=D_V, causal=True)
        tolerances.assert_decoded((out[mine], lse[mine]), expected, **tolerances.F32_DECODE)
    assert np.isneginf(lse[cu[-1] :]).all()


def test_sparse_decode_is_that_of_one_device() -> None:
    check_sparse_decode(devices_of("cpu", 8), 24, D_V, "float32")


@pytest.mark.gpu
@pytest.mark.parametrize("size", [2, 4])
def test_sparse_decode_is_that_of_one_gpu(size: int) -> None:
    check_sparse_decode(devices_of("cuda", size), 576, 512, "bfloat16")


def check_sparse_decode(devices: list[jax.Device], width: int, d_v: int, dtype: str) -> None:
    """Of indices that some ranks have none of, with a sink, heads split over the same axis."""
    rng, ranks = np.random.default_rng(cases.SEED), len(devices)
    _, blocks, table, keys = make_problem(1, 8, 1, ranks, width, dtype)
    q = cases.normal(rng, (8, 2, 8, width), dtype, 2.0)
    sink = cases.normal(rng, (8,), "float32")
    chosen = rng.random((8, 2, int(LENGTHS.max()))) < 0.3
    chosen &= np.arange(LENGTHS.max()) < LENGTHS[:, None, None]
    most = -(-int(LENGTHS.max()) // ranks)
    tables, indices = table.reshape(8, ranks, -1), np.full((8, 2, ranks, most), -1, np.int32)
    for i, j, t in np.argwhere(chosen):
        rank, local = t % ranks, t // ranks
        free = int((indices[i, j, rank] >= 0).sum())
        indices[i, j, rank, free] = tables[i, rank, local // 8] * 8 + local % 8
    specs = decode_specs(context="t", heads="t")

    def local(q: jax.Array, blocks: jax.Array, indices: jax.Array, sink: jax.Array) -> tuple:
        return context.sparse_decode(
            q, blocks, indices, axis="t", heads_split=True, attn_sink=sink, d_v=d_v
        )

    mesh = jax.make_mesh((ranks,), ("t",), axis_types=(AxisType.Auto,), devices=devices)
    in_specs = (specs.q, specs.blocks, P(None, None, "t"), P("t"))
    sharded = jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=specs.out_specs)
    arguments = (q, blocks, indices.reshape(8, 2, -1), sink)
    placed = [
        jax.device_put(x, NamedSharding(mesh, spec))
        for x, spec in zip(arguments, in_specs, strict=True)
    ]
    got = jax.jit(sharded)(*placed)
    expected = naive.attend(q, keys[:, None, :, 0], d_v=d_v, mask=chosen, sink=sink)
    bounds = tolerances.F32_DECODE if dtype == "float32" else {"out": tolerances.SPARSE_OUT}
    tolerances.assert_decoded(got, expected, **bounds)


@pytest.mark.parametrize("few", [True, False], ids=["few bytes", "many"])
@pytest.mark.parametrize("by_peers", [False, True], ids=["XLA", "peers"])
@pytest.mark.parametrize("heads_split", [False, True])
def test_what_one_rank_attends_alone_is_its_own(
    heads_split: bool, by_peers: bool, few: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not few:
        monkeypatch.setattr(_limits, "MAX_EXCHANGE_BYTES", 0)
    rng = np.random.default_rng(cases.SEED)
    out = cases.normal(rng, (8, 3, 8, 5), "bfloat16")
    lse = cases.normal(rng, (8, 3, 8), "float32", 30.0)
    owner = np.array([0, 3, 7])
    others = np.arange(8)[:, None] != owner
    lse[others] = -np.inf
    out[others] = np.nan
    lse[:, 2], owner = -np.inf, owner[:2]  # the last is nobody's
    mesh = mesh_of(t=8)
    peers = connect_peers(mesh, "t") if by_peers else None
    merge = functools.partial(context.merge_over, axis="t", heads_split=heads_split, peers=peers)
    spec = P(None, None, "t") if heads_split else P()
    merged = jax.shard_map(
        lambda out, lse: [x[None] for x in merge(out[0], lse[0])],
        mesh=mesh, in_specs=P("t"), out_specs=[spec, spec],
    )  # fmt: skip
    got_out, got_lse = (np.asarray(x)[0] for x in jax.jit(merged)(out, lse))
    np.testing.assert_array_equal(got_out[:2], out[owner, [0, 1]])
    np.testing.assert_array_equal(got_lse[:2], lse[owner, [0, 1]])
    assert (got_out[2] == 0).all()
    assert np.isneginf(got_lse[2]).all()


def test_merging_is_differentiable_and_may_be_mapped() -> None:
    """As merge_lse of all parts is, with heads split and without."""
    rng = np.random.default_rng(cases.SEED)
    parts = cases.normal(rng, (8, 2, 8, 5), "float32"), cases.normal(rng, (8, 2, 8), "float32")

    def loss(out: jax.Array, lse: jax.Array) -> jax.Array:
        return jnp.sum(out**2) + jnp.sum(lse)

    expected = jax.grad(lambda *x: loss(*merge_lse(*x)), argnums=(0, 1))(*parts)
    whole = merge_lse(*parts)
    for heads_split in (False, True):
        merge = functools.partial(context.merge_over, axis="t", heads_split=heads_split)
        spec = P(None, "t") if heads_split else P()
        sharded = jax.shard_map(
            lambda out, lse, merge=merge: merge(out[0], lse[0]),
            mesh=mesh_of(t=8), in_specs=P("t"), out_specs=(spec, spec),
        )  # fmt: skip
        gradient = jax.grad(lambda *x, f=sharded: loss(*f(*x)), argnums=(0, 1))
        for got, want in zip(jax.jit(gradient)(*parts), expected, strict=True):
            tolerances.assert_close("gradient", got, want, tolerances.MERGE)
        mapped = jax.vmap(merge, axis_name="t")(*parts)
        for got, want in zip(mapped, whole, strict=True):
            mine = np.stack(np.split(np.asarray(want), 8, axis=1)) if heads_split else want[None]
            np.testing.assert_allclose(got, np.broadcast_to(mine, got.shape), rtol=1e-5, atol=1e-6)


def test_heads_that_ranks_cannot_share_are_refused() -> None:
    merged = jax.shard_map(
        lambda out, lse: context.merge_over(out, lse, axis="t", heads_split=True),
        mesh=mesh_of(t=8), in_specs=P(), out_specs=P(None, "t"),
    )  # fmt: skip
    with pytest.raises(ValueError, match="axis must split h_q = 6 evenly, got 't' of 8 ranks"):
        merged(np.zeros((2, 6, 4), np.float32), np.zeros((2, 6), np.float32))


def test_ranks_store_their_own_tokens_and_drop_together() -> None:
    """Where one rank has no room for a token, no rank counts it or those after it."""
    allocator = ContextAllocator(2, num_blocks=9, block_size=2)
    seqs = [allocator.allocate(n) for n in (7, 0, 5)]
    table = allocator.block_table(seqs, max_blocks=3)
    table[0, 3:] = [table[0, 3], -1, -1]  # rank 1 has room for tokens 1 and 3 alone: 4 fits, 5 not
    format = CacheFormat(d_qk=2, d_v=1, block_size=2, dtype="float32")
    cache = PagedCache.create(
        format, BlockTable.create(table, [1, 0, 2], block_size=2), num_blocks=18, layers=1
    )
    cache = dataclasses.replace(cache, blocks=jnp.full_like(cache.blocks, jnp.nan))
    specs = cache.specs(context="t")
    rows = np.broadcast_to(np.arange(5.0, dtype=np.float32)[None, :, None, None], (3, 5, 1, 2))
    num_new = np.array([5, 5, 3], np.int32)
    mesh = jax.make_mesh((2,), ("t",), axis_types=(AxisType.Auto,), devices=jax.devices("cpu")[:2])
    step = jax.shard_map(
        lambda cache, rows, num_new: cache.append(rows, num_new=num_new, context_axis="t"),
        mesh=mesh, in_specs=(specs, P(), P()), out_specs=specs,
    )  # fmt: skip
    cache = jax.jit(step)(cache, rows, num_new)
    np.testing.assert_array_equal(cache.table.cache_seqlens, [5, 0, 5])
    np.testing.assert_array_equal(cache.overflow, [1, 5, 0])
    assert cache.check() == ["sequence 0 dropped 1 rows", "sequence 1 dropped 5 rows"]
    blocks = np.asarray(cache.blocks)[:, :, 0, 0].reshape(2, -1, 2)
    expected = np.full_like(blocks, np.nan)
    for i, (first, end) in enumerate([(1, 5), (0, 0), (2, 5)]):
        for t in range(first, end):
            block, offset = divmod(t // 2, 2)
            expected[t % 2, table.reshape(3, 2, 3)[i, t % 2, block], offset] = t - first
    np.testing.assert_array_equal(blocks, expected)


def test_axes_that_cannot_be_split_twice_are_refused() -> None:
    with pytest.raises(ValueError, match="context must be another mesh axis than batch"):
        decode_specs(batch="x", context="x")
    with pytest.raises(ValueError, match="context must be another mesh axis"):
        decode_specs(heads="x", shard_kv_heads=True, context="x")

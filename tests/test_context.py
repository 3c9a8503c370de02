"""Tokens of every sequence shared out over devices: jax_flashmla.context under shard_map."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

import cases
import context_cases
import naive
import tolerances
from jax_flashmla import context, decode_specs

pytestmark = pytest.mark.usefixtures("on_cpu")

LENGTHS = np.array([0, 1, 2, 5, 8, 9, 64, 67], np.int32)  # of blocks of 8 tokens
D_V = cases.SMALL_D_V


def mesh_of(**sizes: int) -> jax.sharding.Mesh:
    types = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=types,
                         devices=jax.devices("cpu"))  # fmt: skip


def make_problem(s_q: int, h_q: int, batches: int, ranks: int) -> tuple:
    """q, then blocks and table as `decode_specs` splits them; and the keys, unpaged."""
    rng = np.random.default_rng(cases.SEED)
    q = cases.normal(rng, (8, s_q, h_q, 24), "float32", 2.0)
    keys = cases.normal(rng, (8, int(LENGTHS.max()), 1, 24), "float32")
    shares = [
        context_cases.share_out(of, lengths, ranks, 8)
        for of, lengths in zip(np.split(keys, batches), np.split(LENGTHS, batches), strict=True)
    ]
    num_blocks = max(blocks.shape[1] for blocks, _ in shares)
    padded = [
        np.pad(x, [(0, 0), (0, num_blocks - x.shape[1]), *[(0, 0)] * 3], constant_values=np.nan)
        for x, _ in shares
    ]
    blocks = np.stack(padded).reshape(-1, 8, 1, 24)  # batch, rank, block
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
def test_dense_decode_is_that_of_one_device(sizes: dict[str, int], names: dict[str, str]) -> None:
    mesh = mesh_of(**sizes)
    q, blocks, table, keys = make_problem(3, 8, sizes.get("x", 1), sizes["t"])
    specs = decode_specs(**names)
    decode = functools.partial(
        context.dense_decode, axis="t", heads_split=names.get("heads") == "t", d_v=D_V, causal=True
    )
    sharded = jax.jit(
        jax.shard_map(decode, mesh=mesh, in_specs=specs.in_specs, out_specs=specs.out_specs)
    )
    got = sharded(q, blocks, table, LENGTHS)
    results = [naive.dense(*x, d_v=D_V, causal=True) for x in zip(q, keys, LENGTHS, strict=True)]
    expected = [np.stack(x) for x in zip(*results, strict=True)]
    tolerances.assert_decoded(got, expected, **tolerances.F32_DECODE)

"""Sequences too long for a reference: tokens over devices against one device with all of them."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import tolerances
from jax_flashmla import Peers, context, decode_specs, dense_decode
from jax_flashmla.bench.processes import put

SHAPES = {"cpu": (8, 24, 16, 8), "gpu": (128, 576, 512, 64)}  # h_q, d_qk, d_v, block_size


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _make_keys(tokens: int, d_qk: int, seed: int) -> jax.Array:
    """Rows [tokens, d_qk], the same on every device of a platform."""
    return jax.random.normal(jax.random.key(seed), (tokens, d_qk), jnp.bfloat16)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _page(keys: jax.Array, rank: int, size: int, block_size: int) -> tuple[jax.Array, jax.Array]:
    """A rank's tokens in blocks of shuffled ids, NaN behind the last, and its table [1, blocks]."""
    mine = keys[rank::size]
    num_blocks = -(-keys.shape[0] // (size * block_size))
    behind = [(0, num_blocks * block_size - mine.shape[0]), (0, 0)]
    mine = jnp.pad(mine, behind, constant_values=jnp.nan)
    ids = jax.random.permutation(jax.random.key(rank), num_blocks).astype(jnp.int32)
    paged = mine.reshape(num_blocks, block_size, 1, -1)
    return jnp.zeros_like(paged).at[ids].set(paged), ids[None]


def _shards(mesh: Mesh, axis: int, parts: list[jax.Array], spec: P) -> jax.Array:
    """One array of each device's own part, which lie one after the other along an axis."""
    shape = list(parts[0].shape)
    shape[axis] *= mesh.size
    return jax.make_array_from_single_device_arrays(tuple(shape), NamedSharding(mesh, spec), parts)


def check_long_context(
    devices: list[jax.Device],
    tokens: int,
    s_q: int,
    *,
    heads_split: bool,
    connect: Callable[[Mesh, str], Peers] | None = None,
) -> None:
    """One sequence's tokens over the devices, each shard of this process against one device."""
    platform, size = devices[0].platform, len(devices)
    h_q, d_qk, d_v, block_size = SHAPES[platform]
    mesh = Mesh(np.array(devices), ("t",))
    peers = connect(mesh, "t") if connect is not None else None
    own = [d for d in devices if d.process_index == jax.process_index()]
    paged = {}
    for device in own:
        with jax.default_device(device):
            paged[device] = _page(
                _make_keys(tokens, d_qk, 1), devices.index(device), size, block_size
            )
    specs = decode_specs(context="t", heads="t" if heads_split else None)
    blocks = _shards(mesh, 0, [paged[d][0] for d in own], specs.blocks)
    table = _shards(mesh, 1, [paged[d][1] for d in own], specs.block_table)
    q = np.asarray(_make_keys(s_q * h_q, d_qk, 2)).reshape(1, s_q, h_q, d_qk)
    lengths = np.array([tokens], np.int32)

    attend = functools.partial(
        context.dense_decode, axis="t", heads_split=heads_split, d_v=d_v, causal=True, peers=peers
    )
    sharded = jax.jit(
        jax.shard_map(attend, mesh=mesh, in_specs=specs.in_specs, out_specs=specs.out_specs)
    )
    placed = put((q, lengths), mesh, (specs.q, specs.cache_seqlens))
    got = sharded(placed[0], blocks, table, placed[1])
    with jax.default_device(own[0]):
        whole, ids = _page(_make_keys(tokens, d_qk, 1), 0, 1, block_size)
        expected = jax.jit(functools.partial(dense_decode, d_v=d_v, causal=True))(
            q, whole, ids, lengths
        )
        out, lse = (np.asarray(x) for x in expected)
    for mine, its_lse in zip(*(x.addressable_shards for x in got), strict=True):
        tolerances.assert_decoded(
            (np.asarray(mine.data), np.asarray(its_lse.data)),
            (out[mine.index], lse[its_lse.index]),
            out=tolerances.TWO_OUTS,
        )
    assert peers is None or not peers.failed()

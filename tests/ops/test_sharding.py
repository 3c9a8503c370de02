"""dense_decode over devices: no communication under shard_map."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import cases
import tolerances
from jax_flashmla import cache_append, decode_specs, dense_decode, export_checks, make_schedule

pytestmark = pytest.mark.usefixtures("on_cpu")

decode = functools.partial(dense_decode, d_v=cases.SMALL_D_V)

COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")


def sharded_problem(batch_shards: int) -> tuple[tuple[np.ndarray, ...], tuple]:
    """Arguments with block ids local to each batch shard, and what they come to."""
    case = cases.small(8, 2, 40, 8, ragged=True)
    q, blocks, tables, lengths, outs, lses = [], [], [], [], [], []
    for shard in range(batch_shards):
        whole = cases.make_inputs(case)
        mine = slice(shard * 8 // batch_shards, (shard + 1) * 8 // batch_shards)
        q.append(whole.q[mine])
        blocks.append(whole.blocks)
        tables.append(whole.block_table[mine])
        lengths.append(whole.cache_seqlens[mine])
        out, lse = cases.naive_decode(case, whole)
        outs.append(out[mine])
        lses.append(lse[mine])
    arguments = tuple(np.concatenate(x) for x in (q, blocks, tables, lengths))
    return arguments, (np.concatenate(outs), np.concatenate(lses))


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=lambda t: t.name)
@pytest.mark.parametrize("layout", ["heads", "batch", "both"])
def test_shard_map_needs_no_communication(layout: str, axis_type: AxisType) -> None:
    batch, heads = {"heads": (1, 8), "batch": (8, 1), "both": (4, 2)}[layout]
    mesh = jax.make_mesh(
        (batch, heads), ("x", "y"), axis_types=(axis_type,) * 2, devices=jax.devices("cpu")
    )
    specs = decode_specs(
        batch="x" if layout != "heads" else None, heads="y" if layout != "batch" else None
    )
    arguments, expected = sharded_problem(batch)
    arguments = [
        jax.device_put(x, NamedSharding(mesh, spec))
        for x, spec in zip(arguments, specs.in_specs, strict=True)
    ]

    def local(*arguments: jax.Array) -> tuple[jax.Array, jax.Array]:
        assert arguments[0].shape == (8 // batch, 2, 8 // heads, 24)
        schedule = make_schedule(arguments[3], h_q=8 // heads, s_q=2)
        return decode(*arguments, schedule=schedule)

    sharded = jax.jit(
        jax.shard_map(
            local, mesh=mesh, in_specs=specs.in_specs, out_specs=specs.out_specs, check_vma=True
        )
    )
    hlo = sharded.lower(*arguments).compile().as_text()
    assert "flashmla_dense_decode_v1" in hlo
    assert not [name for name in COLLECTIVES if name in hlo]
    out, lse = sharded(*arguments)
    tolerances.assert_decoded((out, lse), expected)
    assert out.sharding.is_equivalent_to(NamedSharding(mesh, specs.out), 4)


def test_shard_map_with_the_caches_heads_split() -> None:
    mesh = jax.make_mesh((8,), ("y",), axis_types=(AxisType.Auto,), devices=jax.devices("cpu"))
    case = cases.small(2, 1, 40, 16, 8)
    inputs = cases.make_inputs(case)
    specs = decode_specs(heads="y", shard_kv_heads=True)
    sharded = jax.jit(
        jax.shard_map(decode, mesh=mesh, in_specs=specs.in_specs, out_specs=specs.out_specs)
    )
    hlo = sharded.lower(*inputs.arguments).compile().as_text()
    assert not [name for name in COLLECTIVES if name in hlo]
    tolerances.assert_decoded(sharded(*inputs.arguments), cases.naive_decode(case, inputs))


def test_shard_map_of_appending_and_attending_in_a_loop() -> None:
    """Batch and heads split, the cache replicated over heads: its writes are, too."""
    mesh = jax.make_mesh(
        (4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices("cpu")
    )
    steps = 11
    blocks, table, rows = cases.growing_cache(steps, b=4)
    local_table = table % table.shape[1]  # each shard of x has one sequence and its blocks
    q = cases.normal(np.random.default_rng(1), (4, 1, 6, 24), "bfloat16")
    specs = decode_specs(batch="x", heads="y")

    def local(q: jax.Array, blocks: jax.Array, table: jax.Array, rows: jax.Array) -> tuple:
        def step(carry: jax.Array, row: jax.Array) -> tuple:
            blocks, positions = carry
            blocks = cache_append(blocks, row, table, positions)
            return (blocks, positions + 1), decode(q, blocks, table, positions + 1)

        start = jax.lax.pcast(jnp.zeros(q.shape[0], jnp.int32), "x", to="varying")
        (blocks, _), results = jax.lax.scan(step, (blocks, start), rows)
        return blocks, *results

    by_step = [PartitionSpec(None, *spec) for spec in specs.out_specs]
    sharded = jax.jit(
        jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(specs.q, specs.blocks, specs.block_table, PartitionSpec(None, "x")),
            out_specs=(specs.blocks, *by_step),
        )
    )
    arguments = (q, blocks, local_table, rows)
    hlo = sharded.lower(*arguments).compile().as_text()
    assert not [name for name in COLLECTIVES if name in hlo]
    _, outs, lses = sharded(*arguments)
    for i in range(steps):
        tolerances.assert_decoded((outs[i], lses[i]), cases.attend_growing(rows, q, i + 1))


def test_decode_specs_that_make_no_sense() -> None:
    with pytest.raises(ValueError, match=r"heads must name a mesh axis .* got None"):
        decode_specs(shard_kv_heads=True)
    with pytest.raises(ValueError, match="different mesh axes, got 'x' for both"):
        decode_specs(batch="x", heads="x")


def test_export_of_a_sharded_function() -> None:
    mesh = jax.make_mesh((8,), ("y",), axis_types=(AxisType.Auto,), devices=jax.devices("cpu"))
    specs = decode_specs(heads="y")
    case = cases.small(2, 1, 40, 16)
    inputs = cases.make_inputs(case)
    arguments = [
        jax.device_put(x, NamedSharding(mesh, spec))
        for x, spec in zip(inputs.arguments, specs.in_specs, strict=True)
    ]
    sharded = jax.jit(
        jax.shard_map(decode, mesh=mesh, in_specs=specs.in_specs, out_specs=specs.out_specs)
    )
    exported = jax.export.export(sharded, disabled_checks=export_checks())(*arguments)
    restored = jax.export.deserialize(exported.serialize())
    tolerances.assert_decoded(jax.jit(restored.call)(*arguments), cases.naive_decode(case, inputs))

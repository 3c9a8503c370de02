"""Times one layer's attention with the tokens of its sequences shared out over several GPUs.

    python benchmarks/bench_context.py --json results.json

Shapes are DeepSeek V3's: 576 columns, 512 of a value, bfloat16. A jitted function makes the calls
one after the other, each on queries that depend on the results before, over a cache of random rows
that no L2 holds. On n devices queries' heads are split over them, as under tensor parallelism, or
are the same on each; the results are the same way. What is exchanged goes through XLA's
collectives, or over peer memory (`connect_peers`). One device is `dense_decode` alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_flashmla import (
    Peers,
    connect_peers,
    context,
    decode_specs,
    dense_decode,
    make_schedule,
)
from jax_flashmla.bench import document, environment
from jax_flashmla.bench.measure import METHODS, time_calls

BLOCK_SIZE, D_QK, D_V = 64, 576, 512


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--devices", type=int, nargs="+", metavar="N", help="default: 1, 2, 4 ...")
    parser.add_argument("--platform", help="by default JAX's first")
    parser.add_argument("--tokens", type=int, nargs="+", default=[131072, 524288])
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="sequences")
    parser.add_argument("--heads", type=int, default=128)
    parser.add_argument("--calls", type=int, default=20, help="of a function")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the results here")
    parser.add_argument("--commit", metavar="HASH", help="where git does not know it")
    return parser.parse_args(argv)


def make_cache(batch: int, tokens: int, mesh: Mesh) -> tuple[jax.Array, jax.Array]:
    """Random blocks of each rank, and the ranks' tables of shuffled ids."""
    ranks = mesh.size
    columns = -(-tokens // (ranks * BLOCK_SIZE))
    rng = np.random.default_rng(0)
    tables = [rng.permutation(batch * columns).reshape(batch, columns) for _ in range(ranks)]
    specs = decode_specs(context="t")

    @functools.partial(jax.jit, out_shardings=NamedSharding(mesh, specs.blocks))
    def fill() -> jax.Array:
        shape = (ranks * batch * columns, BLOCK_SIZE, 1, D_QK)
        return jax.random.normal(jax.random.key(1), shape, jnp.bfloat16)

    table = np.concatenate(tables, axis=1).astype(np.int32)
    return fill(), jax.device_put(table, NamedSharding(mesh, specs.block_table))


def make_calls(
    mesh: Mesh,
    batch: int,
    tokens: int,
    heads: int,
    calls: int,
    heads_split: bool,
    peers: Peers | None,
) -> Callable[[], Any]:
    ranks = mesh.size
    blocks, table = make_cache(batch, tokens, mesh)
    specs = decode_specs(context="t", heads="t" if heads_split else None)
    q = jax.device_put(
        jax.random.normal(jax.random.key(2), (batch, 1, heads, D_QK), jnp.bfloat16),
        NamedSharding(mesh, specs.q),
    )
    lengths = jax.device_put(np.full(batch, tokens, np.int32), NamedSharding(mesh, P()))

    def run(q: jax.Array, blocks: jax.Array, table: jax.Array, lengths: jax.Array) -> jax.Array:
        rank = jax.lax.axis_index("t")
        schedule = make_schedule(
            lengths, h_q=heads, max_seqlen=table.shape[1] * BLOCK_SIZE, context=(rank, ranks)
        )
        for _ in range(calls):
            if ranks == 1:
                out, _ = dense_decode(q, blocks, table, lengths, schedule=schedule)
            else:
                out, _ = context.dense_decode(
                    q,
                    blocks,
                    table,
                    lengths,
                    axis="t",
                    heads_split=heads_split,
                    peers=peers,
                    schedule=schedule,
                )
            q = q.at[..., :D_V].add(out * jnp.bfloat16(1e-3))
        return q

    sharded = jax.jit(
        jax.shard_map(run, mesh=mesh, in_specs=(specs.q, *specs.in_specs[1:]), out_specs=specs.q)
    )
    return lambda: sharded(q, blocks, table, lengths)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    available = jax.devices(arguments.platform)
    counts = arguments.devices or [n for n in (1, 2, 4, 8) if n <= len(available)]
    if max(counts) > len(available):
        raise SystemExit(f"bench_context: --devices must be at most {len(available)}, got {counts}")
    method = METHODS[available[0].platform]
    result = {**environment.describe(available[0], arguments.commit), "shapes": []}
    print(json.dumps({**result["hardware"], **result["versions"]}), flush=True)
    for batch in arguments.batch:
        for tokens in arguments.tokens:
            alone = None
            for n in counts:
                mesh = jax.make_mesh(
                    (n,), ("t",), axis_types=(AxisType.Auto,), devices=available[:n]
                )
                connected = connect_peers(mesh, "t") if n > 1 else None
                ways = [(True, None)]
                if connected is not None:
                    ways = [(False, None), (True, None)]
                    if connected.refusal is None:
                        ways += [(False, connected), (True, connected)]
                for heads_split, peers in ways:
                    run = make_calls(
                        mesh, batch, tokens, arguments.heads, arguments.calls, heads_split, peers
                    )
                    timing = time_calls(run, arguments.calls, method)
                    alone = timing.us if n == 1 else alone
                    shape = {
                        "devices": n, "batch": batch, "tokens": tokens, "h_q": arguments.heads,
                        "heads_split": heads_split, "peers": peers is not None,
                        **dataclasses.asdict(timing),
                    }  # fmt: skip
                    result["shapes"].append(shape)
                    times = f", {alone / timing.us:.2f} times one device" if alone else ""
                    print(
                        f"b={batch} tokens={tokens} devices={n} heads_split={heads_split} "
                        f"peers={peers is not None}: "
                        f"{timing.us:,.1f} us{times}",
                        flush=True,
                    )
                    if arguments.json:
                        document.write(result, arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())

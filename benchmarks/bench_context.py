"""Times one layer's attention with the tokens of its sequences shared out over several GPUs.

    python benchmarks/bench_context.py --json results.json

Shapes are DeepSeek V3's: 576 columns, 512 of a value, bfloat16. A jitted function makes the calls
one after the other, each on queries that depend on the results before, over caches of random rows
in turn, that no L2 holds. On n devices queries' heads are split over them, as under tensor
parallelism, or are the same on each; the results are the same way. What is exchanged goes through
XLA's collectives, or over peer memory (`connect_peers`). One device is `dense_decode` alone.

With --processes 2 --process 0 and 1 (and so on), each process has one of the devices.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_flashmla import (
    Peers,
    connect_peers,
    context,
    decode_specs,
    dense_decode,
    make_schedule,
)
from jax_flashmla.bench import document, environment, processes
from jax_flashmla.bench.measure import METHODS, Method, Timing, time_calls
from jax_flashmla.bench.processes import put

BLOCK_SIZE, D_QK, D_V = 64, 576, 512


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--devices", type=int, nargs="+", metavar="N", help="default: 1, 2, 4 ...")
    parser.add_argument("--platform", help="by default JAX's first")
    parser.add_argument("--tokens", type=int, nargs="+", default=[131072, 524288])
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="sequences")
    parser.add_argument("--heads", type=int, default=128)
    parser.add_argument("--calls", type=int, default=20, help="of a function")
    parser.add_argument("--runs", type=int, default=6, help="in a sample of several processes")
    processes.add_arguments(parser)
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the results here")
    parser.add_argument("--commit", metavar="HASH", help="where git does not know it")
    return parser.parse_args(argv)


def make_cache(batch: int, tokens: int, mesh: Mesh, most: int) -> tuple[jax.Array, jax.Array, int]:
    """Random blocks of each rank, the ranks' tables of shuffled ids, and of how many caches."""
    ranks = mesh.size
    columns = -(-tokens // (ranks * BLOCK_SIZE))
    rng = np.random.default_rng(0)
    tables = [rng.permutation(batch * columns).reshape(batch, columns) for _ in range(ranks)]
    specs = decode_specs(context="t")
    num_blocks = batch * columns
    caches = METHODS[mesh.devices.flat[0].platform].caches(num_blocks * BLOCK_SIZE * D_QK * 2)
    caches = min(caches, most)

    @functools.partial(jax.jit, out_shardings=NamedSharding(mesh, specs.blocks))
    def fill() -> jax.Array:
        shape = (ranks * caches * num_blocks, BLOCK_SIZE, 1, D_QK)
        return jax.random.normal(jax.random.key(1), shape, jnp.bfloat16)

    table = np.concatenate(tables, axis=1).astype(np.int32)
    return fill(), put(table, mesh, specs.block_table), caches


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
    blocks, table, caches = make_cache(batch, tokens, mesh, calls)
    specs = decode_specs(context="t", heads="t" if heads_split else None)
    q = np.random.default_rng(2).standard_normal((batch, 1, heads, D_QK), np.float32)
    q = put(q.astype(jnp.bfloat16), mesh, specs.q)
    lengths = put(np.full(batch, tokens, np.int32), mesh, P())

    def run(q: jax.Array, blocks: jax.Array, table: jax.Array, lengths: jax.Array) -> jax.Array:
        rank = jax.lax.axis_index("t")
        schedule = make_schedule(
            lengths, h_q=heads, max_seqlen=table.shape[1] * BLOCK_SIZE, context=(rank, ranks)
        )
        num_blocks = blocks.shape[0] // caches
        layers = [table + np.int32(i * num_blocks) for i in range(caches)]
        for call in range(calls):
            ids = layers[call % caches]
            if ranks == 1:
                out, _ = dense_decode(q, blocks, ids, lengths, schedule=schedule)
            else:
                out, _ = context.dense_decode(
                    q,
                    blocks,
                    ids,
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


def time_one(run: Callable[[], Any], arguments: argparse.Namespace, method: Method) -> Timing:
    """Of several processes by as many runs in each, without rests between the samples."""
    if arguments.processes == 1:
        return time_calls(run, arguments.calls, method)
    times = [us / arguments.calls for us in processes.time_runs(run, arguments.runs)]
    return Timing(statistics.median(times), min(times), max(times), times[-1])


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    processes.join(arguments)
    available = jax.devices(arguments.platform)
    counts = arguments.devices or [n for n in (1, 2, 4, 8) if n <= len(available)]
    if max(counts) > len(available):
        raise SystemExit(f"bench_context: --devices must be at most {len(available)}, got {counts}")
    own = jax.local_devices(backend=arguments.platform)
    method = METHODS[available[0].platform]
    result = {
        **environment.describe(own[0], arguments.commit),
        "processes": arguments.processes,
        "shapes": [],
    }
    print(json.dumps({**result["hardware"], **result["versions"]}), flush=True)
    for batch in arguments.batch:
        for tokens in arguments.tokens:
            alone = None
            for n in counts:
                mesh = Mesh(np.array(available[:n] if n > 1 else own[:1]), ("t",))
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
                    timing = time_one(run, arguments, method)
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

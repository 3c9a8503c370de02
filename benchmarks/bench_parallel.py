"""Times a decoding step of DeepSeek V3's attention layers over several GPUs of one host.

    python benchmarks/bench_parallel.py --json results.json

Tensor parallel: heads are split, and every layer ends in a sum over the devices. It is timed with
`jax.lax.psum`, over peer memory (`connect_peers`), and left out; the difference is what the sum
adds to a layer. Beside it the sums alone, one depending on the other. Data parallel: every device
has its own sequences and all heads, and is held against one device alone.

With --processes 2 --process 0 and 1 (and so on), each process has one of the devices.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_flashmla import BlockTable, PagedCache, Peers, all_reduce_sum, connect_peers
from jax_flashmla.bench import document, environment, processes
from jax_flashmla.bench.command_buffers import compile_and_look
from jax_flashmla.bench.processes import median_of_runs, put
from jax_flashmla.layers import MLAConfig, MLAParams, RopeConfig, YarnConfig, decode

BLOCK_SIZE = 64
HIDDEN = 7168
SUMS = 256  # in one function
CONFIG = MLAConfig(
    hidden_size=HIDDEN,
    num_heads=128,
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    rope=RopeConfig(
        layout="deinterleaved",
        yarn=YarnConfig(factor=40.0, original_max_positions=4096, mscale=1.0, mscale_all_dim=1.0),
    ),
)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--devices", type=int, nargs="+", metavar="N", help="default: all of them")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32, 128], help="sequences")
    parser.add_argument("--tokens", type=int, default=4096, help="of each, the new one included")
    parser.add_argument(
        "--layers", type=int, default=32, help="so that a step outlasts its dispatch"
    )
    parser.add_argument("--parts", nargs="+", default=["sums", "tensor", "data"])
    parser.add_argument("--runs", type=int, default=15, help="of the step, in each of 7 samples")
    processes.add_arguments(parser)
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the results here")
    parser.add_argument("--commit", metavar="HASH", help="where git does not know it")
    return parser.parse_args(argv)


def sharded(mesh: Mesh, specs: Any) -> Any:
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


def time_dispatch(run: Callable[[], Any]) -> float:
    """Microseconds in which the host dispatches a run: no run takes less."""
    start = time.perf_counter()
    outs = [run() for _ in range(3)]
    took = time.perf_counter() - start
    jax.block_until_ready(outs)
    return took / 3 * 1e6


@functools.lru_cache(maxsize=1)
def make_weights(mesh: Mesh, heads: str | None, layers: int) -> list[MLAParams]:
    """Small numbers without a pattern, of each layer's own."""

    def init(seed: jax.Array) -> MLAParams:
        def array(shape: jax.ShapeDtypeStruct) -> jax.Array:
            size = math.prod(shape.shape)
            bits = (jax.lax.iota(jnp.uint32, size) + seed) * np.uint32(2654435761)
            noise = (bits >> 16).astype(jnp.float32) / np.float32(32768) - 1
            scale = np.float32(shape.shape[0] ** -0.5) if len(shape.shape) > 1 else np.float32(1)
            return (noise * scale).astype(shape.dtype).reshape(shape.shape)

        return jax.tree.map(array, MLAParams.shapes(CONFIG, jnp.bfloat16))

    specs = sharded(mesh, MLAParams.specs(CONFIG, heads))
    step = jax.jit(init, out_shardings=specs)
    return [step(np.uint32(i * 7919)) for i in range(layers)]


def make_cache(mesh: Mesh, data: str | None, b: int, tokens: int, layers: int) -> PagedCache:
    """Random rows for all but the last token of each of a device's b sequences."""
    shards = 1 if data is None else mesh.shape[data]
    columns = -(-tokens // BLOCK_SIZE)
    ids = np.random.default_rng(2).permutation(b * columns).astype(np.int32)
    ids = np.tile(ids.reshape(b, columns), (shards, 1))  # count from a device's own first block
    table = BlockTable.create(ids, np.full(b * shards, tokens - 1, np.int32), block_size=BLOCK_SIZE)
    cache = PagedCache.create(CONFIG.cache_format(), table, num_blocks=1, layers=1)
    num_blocks = layers * b * columns * shards
    shape = (num_blocks, *cache.blocks.shape[1:])
    random = jax.jit(
        lambda: jax.random.normal(jax.random.key(1), shape, cache.blocks.dtype),
        out_shardings=NamedSharding(mesh, P(data)),
    )
    table = put(cache.table, mesh, jax.tree.map(lambda _: P(data), cache.table))
    return dataclasses.replace(cache, blocks=random(), table=table, layers=layers)


class Step:
    """All layers on the new tokens, run again and again on a cache that is donated.

    Args:
        heads: the mesh axis that splits heads, or None.
        data: the one that splits sequences, or None.
        sums: "none" leaves the sum over heads out, "psum" and "peers" make it.
    """

    def __init__(
        self,
        mesh: Mesh,
        arguments: argparse.Namespace,
        b: int,
        *,
        heads: str | None = None,
        data: str | None = None,
        sums: str = "psum",
        peers: Peers | None = None,
    ):
        shards = 1 if heads is None else mesh.shape[heads]
        local = dataclasses.replace(CONFIG, num_heads=CONFIG.num_heads // shards)
        config, axis = (local, None) if sums == "none" else (CONFIG, heads)
        specs = MLAParams.specs(CONFIG, heads)
        self.weights = make_weights(mesh, heads, arguments.layers)
        self.cache = make_cache(mesh, data, b, arguments.tokens, arguments.layers)
        rows = b * (1 if data is None else mesh.shape[data])
        x = np.random.default_rng(3).standard_normal((rows, 1, HIDDEN), np.float32)
        self.x = put(x.astype(jnp.bfloat16), mesh, P(data))

        def body(
            weights: list[MLAParams], cache: PagedCache, x: jax.Array
        ) -> tuple[PagedCache, jax.Array]:
            before = cache.table
            cache, slots = cache.advance()
            schedule = cache.table.schedule(h_q=local.num_heads)
            for layer, params in enumerate(weights):
                cache, y = decode(
                    config, params, x, cache, slots=slots, layer=layer, schedule=schedule,
                    heads_axis=axis, peers=peers if sums == "peers" else None,
                )  # fmt: skip
                x = x + y
            return dataclasses.replace(cache, table=before), x

        cache_specs = jax.tree.map(lambda _: P(data), self.cache)
        step = jax.shard_map(
            body,
            mesh=mesh,
            in_specs=([specs] * arguments.layers, cache_specs, P(data)),
            out_specs=(cache_specs, P(data)),
            check_vma=sums != "none",
        )
        jitted: Any = jax.jit(step, donate_argnums=1)
        self._step, self.capture = jitted, None
        if jax.process_count() == 1:  # else processes would compile with different options
            self._step, self.capture = compile_and_look(
                jitted.lower(self.weights, self.cache, self.x)
            )

    def __call__(self) -> jax.Array:
        self.cache, x = self._step(self.weights, self.cache, self.x)
        return x


def same_bits(x: jax.Array) -> bool:
    """Whether this process's copies of a replicated array are equal."""
    first, *others = (np.asarray(s.data).view(np.uint16) for s in x.addressable_shards)
    return all(np.array_equal(first, other) for other in others)


def measure_tensor(mesh: Mesh, b: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Microseconds a layer with each kind of sum."""
    peers = connect_peers(mesh, "model")
    result: dict[str, Any] = {"part": "tensor", "devices": mesh.size, "b": b}
    outs = {}
    for sums in ("none", "psum", "peers"):
        step = Step(mesh, arguments, b, heads="model", sums=sums, peers=peers)
        result[f"{sums}_us"] = median_of_runs(step, arguments.runs) / arguments.layers
        result[f"{sums}_dispatch_us"] = time_dispatch(step) / arguments.layers
        result[f"{sums}_graphs"] = step.capture and dataclasses.asdict(step.capture)
        outs[sums] = step()
        if sums == "peers":
            result["same_bits"] = same_bits(outs[sums])
        del step
    a, b_ = (np.asarray(outs[k].addressable_shards[0].data, np.float32) for k in ("psum", "peers"))
    result["difference"] = float(np.linalg.norm(a - b_) / np.linalg.norm(a))
    result["refusal"], result["failed"] = peers.refusal, peers.failed()
    return result


def measure_sums(mesh: Mesh, b: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Microseconds of a sum of [b, hidden] bfloat16, the mean of SUMS that depend on each other."""
    peers = connect_peers(mesh, "model")
    x = put(np.ones((mesh.size * b, HIDDEN), jnp.bfloat16), mesh, P("model"))
    result: dict[str, Any] = {"part": "sums", "devices": mesh.size, "b": b}
    for sums, chosen in (("psum", None), ("peers", peers)):

        def body(x: jax.Array, chosen: Peers | None = chosen) -> jax.Array:
            for _ in range(SUMS):
                y = all_reduce_sum(x, "model", peers=chosen)
                x = jax.lax.pcast(y, "model", to="varying") * jnp.bfloat16(0.25)
            return x

        run = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=P("model"), out_specs=P("model")))
        result[f"{sums}_us"] = median_of_runs(functools.partial(run, x), arguments.runs) / SUMS
    return result


def measure_data(mesh: Mesh, b: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Microseconds a layer of b sequences on each device, beside one device alone."""
    result: dict[str, Any] = {"part": "data", "devices": mesh.size, "b": b}
    alone = Mesh(np.array(jax.local_devices()[:1]), ("model",))
    step = Step(alone, arguments, b, data="model")
    result["alone_us"] = median_of_runs(step, arguments.runs) / arguments.layers
    del step
    step = Step(mesh, arguments, b, data="model")
    result["together_us"] = median_of_runs(step, arguments.runs) / arguments.layers
    result["of_linear"] = result["alone_us"] / result["together_us"]
    return result


PARTS = {"sums": measure_sums, "tensor": measure_tensor, "data": measure_data}


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    if arguments.json:
        document.check_folder(arguments.json)
    processes.join(arguments)
    devices = jax.devices()
    results: list[dict[str, Any]] = []
    document_of = {
        **environment.describe(jax.local_devices()[0], arguments.commit),
        **{name: getattr(arguments, name) for name in ("layers", "tokens", "processes")},
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "results": results,
    }
    for size in arguments.devices or [len(devices)]:
        mesh = Mesh(np.array(devices[:size]), ("model",))
        for part in arguments.parts:
            for b in arguments.batch:
                results.append(PARTS[part](mesh, b, arguments))
                if arguments.process == 0:
                    print(json.dumps(results[-1]), flush=True)
                    if arguments.json:
                        document.write(document_of, arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())

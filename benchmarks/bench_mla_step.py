"""Times a decoding step of a stack of latent attention layers beside its kernels alone.

    python benchmarks/bench_mla_step.py --json results.json

The layers are DeepSeek V3's: hidden 7168, q_lora_rank 1536, latent 512, 128 + 64 columns of a
query, 128 of a value; x = x + attention(x), 61 times, without norms and MLPs in between. h_q is
128, all heads, and 16, one device's share of eight. Every layer has random bfloat16 weights of its
own (23 GB for 128 heads) and a part of the cache of its own (9.2 GB for 32 sequences of 4096
tokens), so that nothing stays in L2 from one layer to the next.

The step is one jitted function with a donated cache: the new tokens' rows are appended, all layers
attend; it is run again and again on caches of the same lengths. The kernels are one jitted function
too, of as many `dense_decode` calls over the same cache with one schedule. Both are timed as
`jax-flashmla bench` times its shapes. Beside them: the least time that reading the weights and the
cache once takes, at the bandwidth that a plain XLA sum reaches in the same run.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_flashmla import BlockTable, PagedCache, dense_decode, kernel_refusal, make_schedule
from jax_flashmla.bench import document, environment
from jax_flashmla.bench.device import platform_of
from jax_flashmla.bench.measure import METHODS, Method, measure_ceilings, time_calls
from jax_flashmla.layers import MLAConfig, MLAParams, RopeConfig, YarnConfig, decode

BLOCK_SIZE = 64
V3_YARN = YarnConfig(factor=40.0, original_max_positions=4096, mscale=1.0, mscale_all_dim=1.0)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--heads", type=int, nargs="+", default=[128, 16], metavar="H_Q")
    parser.add_argument("--layers", type=int, default=61)
    parser.add_argument("--batch", type=int, default=32, help="sequences")
    parser.add_argument("--tokens", type=int, default=4096, help="of each, the new one included")
    parser.add_argument("--hidden-size", type=int, default=7168)
    parser.add_argument("--q-lora-rank", type=int, default=1536)
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the results here")
    parser.add_argument(
        "--commit", metavar="HASH", help="the sources' commit, to record where git does not know it"
    )
    return parser.parse_args(argv)


def make_weights(config: MLAConfig, layers: int) -> list[MLAParams]:
    init = jax.jit(lambda key: MLAParams.init(config, key, jnp.bfloat16))
    return [init(key) for key in jax.random.split(jax.random.key(0), layers)]


def make_cache(config: MLAConfig, layers: int, batch: int, tokens: int) -> PagedCache:
    """Random rows for all but the last token of each sequence, blocks in random order."""
    columns = -(-tokens // BLOCK_SIZE)
    ids = np.random.default_rng(2).permutation(batch * columns).astype(np.int32)
    table = BlockTable.create(
        ids.reshape(batch, columns), np.full(batch, tokens - 1, np.int32), block_size=BLOCK_SIZE
    )
    cache = PagedCache.create(
        config.cache_format(), table, num_blocks=batch * columns, layers=layers
    )

    @partial(jax.jit, donate_argnums=0)
    def fill(blocks: jax.Array, layer: jax.Array) -> jax.Array:
        shape = (batch * columns, *blocks.shape[1:])
        rows = jax.random.normal(jax.random.fold_in(jax.random.key(1), layer), shape, blocks.dtype)
        return jax.lax.dynamic_update_slice(blocks, rows, (layer * shape[0], 0, 0, 0))

    blocks = cache.blocks
    for layer in range(layers):
        blocks = fill(blocks, jnp.int32(layer))
    return dataclasses.replace(cache, blocks=blocks)


@partial(jax.jit, static_argnums=0, donate_argnames="cache")
def step(
    config: MLAConfig, weights: list[MLAParams], cache: PagedCache, x: jax.Array
) -> tuple[PagedCache, jax.Array]:
    """All layers on the new tokens x [b, 1, hidden]; the cache comes back with its old lengths."""
    before = cache.table
    cache, slots = cache.advance()
    schedule = make_schedule(
        cache.table.cache_seqlens, h_q=config.num_heads, max_seqlen=cache.table.max_seqlen
    )
    for layer, params in enumerate(weights):
        cache, y = decode(config, params, x, cache, slots=slots, layer=layer, schedule=schedule)
        x = x + y
    return dataclasses.replace(cache, table=before), x


@partial(jax.jit, static_argnums=0)
def kernels(config: MLAConfig, cache: PagedCache, q: jax.Array) -> list[jax.Array]:
    """The step's calls of dense_decode alone, on queries q [b, 1, h_q, d_qk]: each layer's lse.

    So out dies at once, as in the step, and all layers' have the same memory.
    """
    cache, _ = cache.advance()
    schedule = make_schedule(
        cache.table.cache_seqlens, h_q=config.num_heads, max_seqlen=cache.table.max_seqlen
    )
    options: dict[str, Any] = {
        "d_v": config.kv_lora_rank,
        "sm_scale": config.sm_scale,
        "causal": True,
        "schedule": schedule,
    }
    return [dense_decode(q, *cache.layer(i), **options)[1] for i in range(cache.layers)]


def measure_heads(heads: int, arguments: argparse.Namespace, method: Method) -> dict[str, Any]:
    config = MLAConfig(
        hidden_size=arguments.hidden_size,
        num_heads=heads,
        q_lora_rank=arguments.q_lora_rank,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        rope=RopeConfig(layout="deinterleaved", yarn=V3_YARN),
    )
    weights = make_weights(config, arguments.layers)
    cache = make_cache(config, arguments.layers, arguments.batch, arguments.tokens)
    x = jax.random.normal(jax.random.key(3), (arguments.batch, 1, config.hidden_size), jnp.bfloat16)
    q = jax.random.normal(jax.random.key(4), (arguments.batch, 1, heads, config.d_qk), jnp.bfloat16)
    kernel_timing = time_calls(lambda: kernels(config, cache, q), 1, method)

    def run() -> jax.Array:
        nonlocal cache
        cache, y = step(config, weights, cache, x)
        return y

    step_timing = time_calls(run, 1, method)
    if not bool(jnp.isfinite(run()).all()):
        raise AssertionError("the step's result is not finite")
    row_bytes = config.d_qk * jnp.dtype(cache.format.dtype).itemsize
    return {
        "h_q": heads,
        "step": dataclasses.asdict(step_timing),
        "kernels": dataclasses.asdict(kernel_timing),
        "kernels_share": kernel_timing.us / step_timing.us,
        "weight_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(weights)),
        "cache_bytes": arguments.layers * arguments.batch * arguments.tokens * row_bytes,
    }


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures every number of heads, printing a line for each; the document for --json."""
    (device,) = jnp.zeros(()).devices()  # the default one
    if refusal := kernel_refusal(platform_of(device)):
        raise SystemExit(f"nothing to measure: {refusal}")
    method = METHODS[device.platform]
    names = ("layers", "batch", "tokens", "hidden_size", "q_lora_rank")
    result = {
        **environment.describe(device, arguments.commit),
        **{name: getattr(arguments, name) for name in names},
        "dtype": "bfloat16",
        "method": {
            "samples": method.samples,
            "sample_seconds": method.sample_seconds,
            "rest_seconds": method.rest_seconds,
            "warm_seconds": method.warm_seconds,
        },
        "ceilings": dataclasses.asdict(measure_ceilings(device, method)),
        "steps": [],
    }
    print(json.dumps({**result["hardware"], **result["versions"]}), flush=True)
    read_gbs = result["ceilings"]["read_gbs"]
    for heads in arguments.heads:
        step = measure_heads(heads, arguments, method)
        step["read_once_us"] = (step["weight_bytes"] + step["cache_bytes"]) / read_gbs / 1e3
        result["steps"].append(step)
        print(
            f"h_q={heads}: step {step['step']['us']:,.0f} us, its kernels alone "
            f"{step['kernels']['us']:,.0f} us ({step['kernels_share']:.0%}), weights and cache "
            f"read once {step['read_once_us']:,.0f} us",
            flush=True,
        )
        if arguments.json:  # after every head count, so that a crash costs one
            document.write(result, arguments.json)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    if arguments.json:
        try:
            document.check_folder(arguments.json)
        except OSError as error:
            raise SystemExit(f"bench_mla_step: {error}") from None
    run(arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())

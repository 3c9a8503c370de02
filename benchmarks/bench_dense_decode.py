"""Times dense_decode over a grid of shapes and compares it with limits, peers and plain XLA.

    python benchmarks/bench_dense_decode.py --grid targets --json results.json

Each row: N calls over N separate caches in one jitted function (see measure.Method), random data,
random block order, causal, d_qk 576, d_v 512, block_size 64. A row that fails is reported and the
others still run; the exit status is then 1.
"""

import argparse
import dataclasses
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import environment
import jax
import report
from decode_calls import (
    MAX_RELATIVE_ERROR,
    composed_decode,
    make_pool,
    make_q,
    make_tables,
    package_decode,
    relative_error,
)
from measure import METHODS, Method, measure_ceilings, time_calls
from shapes import BLOCK_SIZE, D_QK, D_V, GRIDS, ITEMSIZE, XLA_ROWS, Row, grid, matches, peers

BASELINE_CALLS = 8  # separate caches for the baselines: fewer, because XLA compiles every call


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--grid", choices=sorted(GRIDS), help="default: quick on a GPU, else cpu")
    parser.add_argument(
        "--rows",
        action="append",
        metavar="b=128,h_q=16",
        help="only rows meeting the condition; may be repeated to add rows",
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument(
        "--xla",
        choices=("none", "subset", "all"),
        default="subset",
        help="rows at which plain XLA is timed too; on a CPU subset means all",
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the results here")
    return parser.parse_args(argv)


def row_bytes(row: Row, calls: int) -> int:
    """Device memory that a row needs at once beside the pool: q, every out, split accumulators."""
    q_and_outs = row.b * row.s_q * row.h_q * ITEMSIZE * (D_QK + calls * D_V)
    accumulators = 2 * 132 * row.s_q * row.h_q * 4 * (D_V + 1)
    return q_and_outs + accumulators


def pool_blocks(row: Row, method: Method) -> tuple[int, int]:
    """(calls, blocks of all their caches)."""
    calls = method.calls(row.cached_tokens * D_QK * ITEMSIZE)
    return calls, calls * row.num_blocks


def measure_row(row: Row, pool: jax.Array, method: Method, with_xla: bool) -> dict[str, Any]:
    """Times one row and its baselines; raises where the result is wrong."""
    device = next(iter(pool.devices()))
    calls, _ = pool_blocks(row, method)
    tables = make_tables(row, calls)
    q = make_q(row, pool.dtype, device)
    seqlens, device_tables = jax.device_put((row.seqlens(), tables), device)

    decode = package_decode(row, "kernel")
    out = decode(q, pool, device_tables, seqlens)[-1]
    error = relative_error(out, q, pool, tables[-1], row)
    del out
    if not error <= MAX_RELATIVE_ERROR:
        raise AssertionError(f"wrong result: relative error {error:.1e}")
    timing = time_calls(partial(decode, q, pool, device_tables, seqlens), calls, method)
    result = {
        **dataclasses.asdict(timing),
        "calls": calls,
        "relative_error": error,
        "tflops": row.flops / timing.us / 1e6,
        "gbs": row.bytes / timing.us / 1e3,
    }
    if device.platform == "gpu":
        result["limit_us"] = row.limit_us()
        result["limit_fraction"] = row.limit_us() / timing.us
        if "H200" in device.device_kind and row in peers() and pool.dtype == "bfloat16":
            result["peers"] = peers()[row]
            result["speedup_vs_peers"] = peers()[row]["best_us"] / timing.us
    if with_xla:
        baselines = {"xla": composed_decode()}
        if device.platform == "cpu":
            baselines["reference"] = package_decode(row, "xla")
        few = device_tables[:BASELINE_CALLS]
        for name, baseline in baselines.items():
            try:
                us = time_calls(
                    lambda run=baseline: run(q, pool, few, seqlens), len(few), method
                ).us
            except Exception as error:  # out of memory, most likely: the row's own time stands
                result[f"{name}_error"] = first_line(error)
                continue
            result[f"{name}_us"] = us
            result[f"speedup_vs_{name}"] = us / timing.us
    return result


def first_line(error: Exception) -> str:
    message = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {message[:300]}"


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures the chosen rows, printing each as it is done; returns the document for --json."""
    device = jax.devices()[0]
    if device.platform not in METHODS:
        raise SystemExit(f"nothing to measure on platform {device.platform!r}")
    method = METHODS[device.platform]
    name = arguments.grid or ("quick" if device.platform == "gpu" else "cpu")
    rows = grid(name)
    if arguments.rows:
        try:
            rows = tuple(row for row in rows if any(matches(row, c) for c in arguments.rows))
        except ValueError as error:
            raise SystemExit(str(error)) from None
    if not rows:
        raise SystemExit(f"no row of grid {name!r} meets {arguments.rows}")

    document: dict[str, Any] = environment.describe(device)
    document |= {"grid": name, "dtype": arguments.dtype, "method": dataclasses.asdict(method)}
    print(json.dumps({**document["hardware"], **document["versions"]}), flush=True)
    document["ceilings"] = measure_ceilings(device, method)
    print("ceilings (XLA):", json.dumps(document["ceilings"]), flush=True)

    memory = (device.memory_stats() or {}).get("bytes_limit", 1 << 34)
    block_bytes = BLOCK_SIZE * D_QK * ITEMSIZE

    def needs(row: Row) -> int:
        calls, blocks = pool_blocks(row, method)
        return blocks * block_bytes + row_bytes(row, calls)

    fitting = [row for row in rows if needs(row) < 0.9 * memory]
    most_blocks = max((pool_blocks(row, method)[1] for row in fitting), default=1)
    pool = make_pool(most_blocks, arguments.dtype, device)

    results = document["rows"] = []
    print(report.header(), flush=True)
    for row in rows:
        shape = {**dataclasses.asdict(row), "cached_tokens": row.cached_tokens}
        with_xla = arguments.xla == "all" or (
            arguments.xla == "subset" and (row in XLA_ROWS or device.platform == "cpu")
        )
        try:
            if row not in fitting:
                raise MemoryError(f"needs {needs(row) / 1e9:.1f} GB of {memory / 1e9:.1f} GB")
            measured = measure_row(row, pool, method, with_xla)
        except Exception as error:  # one row's failure must not cost the others
            measured = {"error": first_line(error)}
        results.append({**shape, **measured})
        print(report.line(results[-1]), flush=True)
        document["summary"] = report.summarise(results)
        if arguments.json:  # after every row, so that a crash costs one row
            arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    return document


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
    document = run(arguments)
    print("\n".join(report.summary_lines(document["summary"])))
    return 1 if document["summary"]["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())

"""Times the CPU handler of dense_decode against the jitted pure-JAX reference on the same machine.

    python benchmarks/bench_cpu_dense_decode.py

d_qk 576, d_v 512, block_size 64, equal lengths, bfloat16, the schedule made inside each call. A
ratio is reference time / handler time: above 1 the handler is faster. The first row is the one that
must not fall below 1; the exit status is 1 where it does or where a result is wrong. "einsum" is
what a JAX user writes by hand: gather, then bf16 einsums around a softmax.
"""

import argparse
import sys
from collections.abc import Callable

import environment
import jax
import jax.numpy as jnp
from decode_calls import (
    MAX_RELATIVE_ERROR,
    composed_decode,
    make_pool,
    make_q,
    make_tables,
    package_decode,
    relative_error,
)
from measure import METHODS, Timing, time_calls
from shapes import Row

CALLS = 2  # caches that a timed function reads in turn
ROWS = (
    Row(4, 1, 16, 4096),
    Row(1, 1, 16, 4096),
    Row(4, 1, 1, 4096),
    Row(4, 1, 8, 4096),
    Row(4, 1, 32, 4096),
    Row(4, 1, 128, 1024),
    Row(4, 2, 64, 1024),
    Row(32, 1, 16, 256),
)


def measure(row: Row, device: jax.Device) -> tuple[dict[str, Timing], float]:
    """Time of each implementation, and the handler's error against NumPy."""
    pool = make_pool(CALLS * row.num_blocks, jnp.bfloat16, device)
    tables = make_tables(row, CALLS)
    q, cache_seqlens = make_q(row, jnp.bfloat16, device), jax.device_put(row.seqlens(), device)
    arguments = (q, pool, [jax.device_put(table, device) for table in tables], cache_seqlens)

    functions: dict[str, Callable[..., list[jax.Array]]] = {
        "handler": package_decode(row, "kernel"),
        "reference": package_decode(row, "xla"),
        "einsum": composed_decode(),
    }
    times = {
        name: time_calls(lambda run=run: run(*arguments), CALLS, METHODS["cpu"])
        for name, run in functions.items()
    }
    out = functions["handler"](*arguments)[0]
    return times, relative_error(out, q, pool, tables[0], row)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--first", action="store_true", help="only the row that must hold")
    rows = ROWS[:1] if parser.parse_args(argv).first else ROWS

    device = jax.devices("cpu")[0]
    about = environment.describe(device)
    print(about["hardware"]["device"], about["versions"], about["commit"], about["date"], sep="\n")
    passed = True
    for row in rows:
        times, error = measure(row, device)
        ratio = times["reference"].us / times["handler"].us
        print(
            f"{row!s:40} handler {times['handler'].us / 1e3:8.2f} ms "
            f"{row.flops / times['handler'].us / 1e3:6.1f} GFLOP/s   "
            f"reference {times['reference'].us / 1e3:8.2f} ms, ratio {ratio:5.2f}   "
            f"einsum {times['einsum'].us / 1e3:8.2f} ms, "
            f"ratio {times['einsum'].us / times['handler'].us:5.2f}   error {error:.1e}",
            flush=True,
        )
        passed &= error <= MAX_RELATIVE_ERROR and (row != ROWS[0] or ratio >= 1)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())

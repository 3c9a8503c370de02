"""Writes a grid of `jax-flashmla bench` as the row file of bench_dense_decode.cu.

    python benchmarks/native/rows.py targets --rows h_q=16 > rows.txt

A line of the file: label s_q h_q h_kv num_parts best_us limit_us length..., the lengths of all b
sequences.
best_us is the fastest recorded peer, 0 where none is recorded; limit_us is the H200's limit.
"""

from __future__ import annotations

import argparse
import sys

from jax_flashmla._num_parts import default_num_parts
from jax_flashmla.cli.bench import peers
from jax_flashmla.cli.bench.grids import GRIDS
from jax_flashmla.cli.bench.limits import h200_limits
from jax_flashmla.cli.bench.options import Options
from jax_flashmla.cli.bench.shapes import Row


def line(row: Row) -> str:
    """The row as bench_dense_decode.cu reads it."""
    best_us = peers.recorded().get(row, {}).get("best_us", 0)
    label = f"b{row.b}_s{row.s_q}_h{row.h_q}_k{row.s_k}_{row.lengths}"
    seqlens = row.seqlens()
    num_parts = default_num_parts(
        b=row.b, s_q=row.s_q, h_q=row.h_q, h_kv=1, max_seqlen=int(seqlens.max())
    )
    limit_us = round(h200_limits().us(row), 2)
    numbers = (row.s_q, row.h_q, 1, num_parts, best_us, limit_us, *seqlens)
    return " ".join((label, *map(str, numbers)))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("grid", choices=sorted(GRIDS))
    parser.add_argument("--rows", action="append", default=[], metavar="b=128,h_q=16")
    arguments = parser.parse_args()
    try:
        _, rows = Options(conditions=tuple(arguments.rows)).rows(arguments.grid)
    except ValueError as error:
        parser.error(str(error))
    sys.stdout.writelines(line(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()

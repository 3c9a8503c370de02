"""Writes a grid of `jax-flashmla bench` as the shape file of bench_dense_decode.cu.

    python benchmarks/native/shapes.py targets --shapes h_q=16 > shapes.txt

A line of the file: label s_q h_q h_kv num_parts tile_rows best_us limit_us length..., the
lengths of all b sequences.
best_us is the fastest recorded peer, 0 where none is recorded; limit_us is the H200's limit.
"""

from __future__ import annotations

import argparse
import sys

from jax_flashmla._num_parts import default_split
from jax_flashmla.bench.dense_decode import peers
from jax_flashmla.bench.dense_decode.grids import GRIDS
from jax_flashmla.bench.dense_decode.shapes import Shape
from jax_flashmla.bench.limits import H200
from jax_flashmla.bench.options import Options


def line(shape: Shape) -> str:
    """The shape as bench_dense_decode.cu reads it."""
    best_us = peers.recorded().get(shape, {}).get("best_us", 0)
    label = f"b{shape.b}_s{shape.s_q}_h{shape.h_q}_k{shape.s_k}_{shape.lengths}"
    seqlens = shape.seqlens()
    split = default_split(
        b=shape.b, s_q=shape.s_q, h_q=shape.h_q, h_kv=1, max_seqlen=int(seqlens.max())
    )
    limit_us = round(H200.us(shape), 2)
    numbers = (shape.s_q, shape.h_q, 1, *split, best_us, limit_us, *seqlens)
    return " ".join((label, *map(str, numbers)))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    dense = [name for name, grid in GRIDS.items() if {s.format for s in grid.shapes()} == {"dense"}]
    parser.add_argument("grid", choices=sorted(dense))
    parser.add_argument(
        "--shapes", "--rows", dest="shapes", action="append", default=[], metavar="b=128,h_q=16"
    )
    arguments = parser.parse_args()
    try:
        options = Options(grid=arguments.grid, conditions=tuple(arguments.shapes))
        _, shapes = options.shapes("gpu")
    except ValueError as error:
        parser.error(str(error))
    sys.stdout.writelines(line(shape) + "\n" for shape in shapes)


if __name__ == "__main__":
    main()

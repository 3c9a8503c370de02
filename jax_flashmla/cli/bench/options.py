"""The options of `jax-flashmla bench`. Imports neither JAX nor matplotlib."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from jax_flashmla.cli.bench.grids import GRIDS, LAYERS
from jax_flashmla.cli.bench.shapes import Row, matches

BLOCK_SIZES = (16, 32, 64, 128, 256)
DTYPES = ("bfloat16", "float16")


@dataclass(frozen=True)
class Options:
    """What to measure, and where to leave it."""

    grid: str | None = None  # by default quick on a GPU, cpu on a CPU
    conditions: tuple[str, ...] = ()  # rows that meet none of them are left out
    dtype: str = "bfloat16"
    block_size: int = 64  # tokens of a block
    xla: str = "subset"
    layers: int | None = None  # calls in one jitted function; by default as the method says
    commit: str | None = None
    json: Path | None = None
    plots: Path | None = None
    saved: Path | None = None  # show these results instead of measuring

    def rows(self, default_grid: str) -> tuple[str, tuple[Row, ...]]:
        """The grid's name, and those of its rows that meet a condition.

        Raises:
            ValueError: a condition makes no sense, or no row is left.
        """
        name = self.grid or default_grid
        rows = GRIDS[name]()
        if self.conditions:
            rows = tuple(row for row in rows if any(matches(row, c) for c in self.conditions))
        if not rows:
            raise ValueError(f"no row of grid {name!r} meets --rows {' or '.join(self.conditions)}")
        return name, rows

    def layers_of(self, grid: str) -> int | None:
        """Calls in one jitted function where that is fixed."""
        return LAYERS if self.layers is None and grid == "layers" else self.layers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the benchmark's options."""
    parser.add_argument(
        "--grid", choices=sorted(GRIDS), help="shapes; default: quick on a GPU, cpu on a CPU"
    )
    parser.add_argument(
        "--rows",
        action="append",
        default=[],
        metavar="b=128,h_q=16",
        help="only rows meeting the condition; may be repeated to add rows",
    )
    parser.add_argument("--dtype", choices=DTYPES, default=Options.dtype)
    parser.add_argument(
        "--block-size",
        type=int,
        choices=BLOCK_SIZES,
        default=Options.block_size,
        help="tokens of a cache block, default %(default)s",
    )
    parser.add_argument(
        "--xla",
        choices=("none", "subset", "all"),
        default=Options.xla,
        help="rows at which plain XLA is timed too; on a CPU subset means all",
    )
    parser.add_argument(
        "--layers",
        type=int,
        metavar="N",
        help="make N calls in one jitted function, a cache each, and show whether XLA runs them "
        f"from command buffers; default in grid layers: {LAYERS}",
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the results here")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="draw the results as PNG here")
    parser.add_argument(
        "--from",
        dest="saved",
        type=Path,
        metavar="PATH",
        help="show results saved by --json instead of measuring",
    )
    parser.add_argument(
        "--commit", metavar="HASH", help="the sources' commit, to record where git does not know it"
    )


def from_arguments(arguments: argparse.Namespace) -> Options:
    """The options as parsed.

    Raises:
        ValueError: an option's value makes no sense, alone or beside another's.
    """
    options = Options(
        grid=arguments.grid,
        conditions=tuple(arguments.rows),
        dtype=arguments.dtype,
        block_size=arguments.block_size,
        xla=arguments.xla,
        layers=arguments.layers,
        commit=arguments.commit,
        json=arguments.json,
        plots=arguments.plots,
        saved=arguments.saved,
    )
    if options.layers is not None and options.layers < 1:
        raise ValueError(f"layers must be at least 1, got {options.layers}")
    if options.saved is not None and options != Options(saved=options.saved, plots=options.plots):
        raise ValueError("--from measures nothing: beside it only --plots has a meaning")
    for condition in options.conditions:  # a bad one is told before anything runs
        matches(GRIDS["tiny"]()[0], condition)
    return options

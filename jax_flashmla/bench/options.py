"""The options of `jax-flashmla bench`. Imports neither JAX nor matplotlib."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax_flashmla.bench import document
from jax_flashmla.bench.compare import TOLERANCE
from jax_flashmla.bench.operation import Operation
from jax_flashmla.bench.operations import DEFAULT, OPERATIONS


@dataclass(frozen=True)
class Options:
    """What to measure, and where to leave it."""

    operation: str = DEFAULT
    grid: str | None = None  # by default the operation's for the platform
    conditions: tuple[str, ...] = ()  # shapes that meet none of them are left out
    dtype: str = "bfloat16"
    block_size: int = 64  # tokens of a block
    xla: str = "subset"
    peers: bool = False  # also those that are timed in the same run
    brief: bool = False  # shorter rests, nothing under lasting load
    layers: int | None = None  # calls in one jitted function; by default as the grid says
    commit: str | None = None
    json: Path | None = None
    resume: bool = False  # go on with the run whose file that is
    profile: Path | None = None
    plots: Path | None = None
    saved: Path | None = None  # show these results instead of measuring
    compared: tuple[Path, ...] = ()  # or compare these two: old, new
    tolerance: float = TOLERANCE  # of comparisons: by how much medians may differ

    def shapes(self, platform: str) -> tuple[str, tuple[Any, ...]]:
        """The grid's name, and those of its shapes that meet a condition.

        Raises:
            ValueError: a condition makes no sense, or no shape is left.
        """
        operation = OPERATIONS[self.operation]
        name = self.grid or operation.default_grids[platform]
        shapes = operation.grids[name].shapes()
        if self.conditions:
            shapes = tuple(s for s in shapes if any(matches(s, c) for c in self.conditions))
        if not shapes:
            conditions = " or ".join(self.conditions)
            raise ValueError(f"no shape of grid {name!r} meets --shapes {conditions}")
        return name, shapes

    def layers_of(self, grid: str) -> int | None:
        """Calls in one jitted function where that is fixed."""
        fixed = OPERATIONS[self.operation].grids[grid].layers
        return fixed if self.layers is None else self.layers


def matches(shape: Any, condition: str) -> bool:
    """Whether the shape meets a condition such as "b=128,h_q=16" (all parts must hold).

    Raises:
        ValueError: the condition does not read field=value, or names a field that shapes lack.
    """
    fields = shape.__dataclass_fields__
    for part in condition.split(","):
        field, separator, value = part.partition("=")
        if not separator or field not in fields:
            raise ValueError(
                f"a condition on shapes must read field=value with field in {', '.join(fields)}, "
                f"got {part!r}"
            )
        if str(getattr(shape, field)) != value:
            return False
    return True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the benchmark's options."""
    every = OPERATIONS.values()
    parser.add_argument(
        "--operation",
        choices=sorted(OPERATIONS),
        default=Options.operation,
        help="default %(default)s",
    )
    parser.add_argument(
        "--grid", metavar="NAME", help="which shapes; each operation has grids of its own, below"
    )
    parser.add_argument(
        "--shapes",
        "--rows",
        dest="shapes",
        action="append",
        default=[],
        metavar="b=128,h_q=16",
        help="only shapes meeting the condition; may be repeated to add shapes",
    )
    dtypes = _union(operation.dtypes for operation in every)
    parser.add_argument("--dtype", choices=dtypes, default=Options.dtype)
    parser.add_argument(
        "--block-size",
        type=int,
        choices=_union(operation.block_sizes for operation in every),
        default=Options.block_size,
        help="tokens of a cache block, default %(default)s",
    )
    parser.add_argument(
        "--xla",
        choices=("none", "subset", "all"),
        default=Options.xla,
        help="shapes at which plain XLA is timed too; on a CPU subset means all",
    )
    parser.add_argument(
        "--layers",
        type=int,
        metavar="N",
        help="make N calls in one jitted function, a cache each, and show whether XLA runs them "
        "from command buffers; the grid layers does so by default",
    )
    parser.add_argument(
        "--peers",
        action="store_true",
        help="time a peer beside each shape, in this run: needs PyTorch and sgl-flash-mla, for the "
        "indexer sgl-deep-gemm and sglang-kernel",
    )
    parser.add_argument(
        "--brief",
        action="store_true",
        help="take a third of the time: shorter rests, and no sample under lasting load",
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the results here")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="keep what --json's file has of an earlier run that was cut off, on the same device "
        "and of the same commit, and measure the other shapes",
    )
    parser.add_argument(
        "--profile",
        type=Path,
        metavar="PATH",
        help="write here what each kernel of a call takes, a table a shape, from a jax profile",
    )
    parser.add_argument("--plots", type=Path, metavar="DIR", help="draw the results as PNG here")
    parser.add_argument(
        "--from",
        dest="saved",
        type=Path,
        metavar="PATH",
        help="show results saved by --json instead of measuring",
    )
    parser.add_argument(
        "--compare",
        dest="compared",
        type=Path,
        nargs=2,
        metavar=("OLD", "NEW"),
        help="compare two results of --json; exit status 1 where a shape fails, is missing or "
        "became slower beyond noise: all its samples are slower than the old ones, and the median "
        "is by more than --tolerance",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=Options.tolerance,
        metavar="FRACTION",
        help="of --compare, default %(default)s",
    )
    parser.add_argument(
        "--commit", metavar="HASH", help="the sources' commit, to record where git does not know it"
    )


def grids_by_operation() -> str:
    """The operations with their grids, for the end of --help."""
    lines = ["grids, the default of a platform marked by it:"]
    for name, operation in sorted(OPERATIONS.items()):
        marks: dict[str, str] = {}
        for platform, grid in operation.default_grids.items():
            marks[grid] = f"{marks.get(grid, grid)} ({platform.upper()})"
        lines.append(f"  {name}")
        lines.append(f"      {', '.join(marks.get(grid, grid) for grid in operation.grids)}")
    return "\n".join(lines)


def _union(choices: Iterable[Iterable[Any]]) -> list[Any]:
    return sorted({choice for some in choices for choice in some})


def from_arguments(arguments: argparse.Namespace) -> Options:
    """The options as parsed.

    Raises:
        OSError: the results cannot be written where they are asked for.
        ValueError: an option's value makes no sense, alone or beside another's.
    """
    options = Options(
        operation=arguments.operation,
        grid=arguments.grid,
        conditions=tuple(arguments.shapes),
        dtype=arguments.dtype,
        block_size=arguments.block_size,
        xla=arguments.xla,
        peers=arguments.peers,
        brief=arguments.brief,
        layers=arguments.layers,
        commit=arguments.commit,
        json=arguments.json,
        resume=arguments.resume,
        profile=arguments.profile,
        plots=arguments.plots,
        saved=arguments.saved,
        compared=tuple(arguments.compared or ()),
        tolerance=arguments.tolerance,
    )
    _check(options, OPERATIONS[options.operation])
    return options


def _owners(name: str, value: Any) -> str:
    """Which operations have a grid of that name, for one who asked another for it."""
    owners = [other for other, found in sorted(OPERATIONS.items()) if value in found.grids]
    return f" (a grid of {', '.join(owners)})" if name == "grid" and owners else ""


def _check(options: Options, operation: Operation) -> None:
    """Whatever can be told before anything runs."""
    for name, value, known in (
        ("grid", options.grid, tuple(operation.grids)),
        ("dtype", options.dtype, operation.dtypes),
        ("block-size", options.block_size, operation.block_sizes),
    ):
        if value is not None and value not in known:
            raise ValueError(
                f"--{name} of {operation.name} must be one of {', '.join(map(str, known))}, "
                f"got {value}{_owners(name, value)}"
            )
    if options.layers is not None and options.layers < 1:
        raise ValueError(f"layers must be at least 1, got {options.layers}")
    if options.peers and operation.live_peer is None:
        raise ValueError(f"--peers: none of {operation.name} can be timed beside it")
    if options.saved is not None and options != Options(saved=options.saved, plots=options.plots):
        raise ValueError("--from measures nothing: beside it only --plots has a meaning")
    compared = Options(compared=options.compared, tolerance=options.tolerance)
    if options.compared and options != compared:
        raise ValueError("--compare measures nothing: beside it only --tolerance has a meaning")
    if not 0 <= options.tolerance < math.inf:
        raise ValueError(f"--tolerance must be a fraction of at least 0, got {options.tolerance}")
    if options.resume and options.json is None:
        raise ValueError("--resume needs --json, the file that it goes on with")
    first, *_ = next(iter(operation.grids.values())).shapes()
    for condition in options.conditions:
        matches(first, condition)
    for path in (options.json, options.profile):
        if path is not None:
            document.check_folder(path)
    if options.plots is not None and options.plots.exists() and not options.plots.is_dir():
        raise NotADirectoryError(f"--plots must name a folder, {options.plots} is a file")

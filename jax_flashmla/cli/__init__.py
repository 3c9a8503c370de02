"""The command `jax-flashmla`: `demo` decodes a workload, `bench` times, `info` describes."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence

import jax_flashmla
from jax_flashmla import _interrupt
from jax_flashmla.bench import compare, document
from jax_flashmla.bench import options as bench_options
from jax_flashmla.cli import workload

BAD_USAGE = 2
NEEDS = {  # packages of the extra `cli` that a command needs
    "demo": ("rich",),
    "info": ("rich",),
    "bench": ("rich", "matplotlib"),
}
BENCH = """\
Times an operation over a grid of shapes: N calls over N separate caches in one
jitted function. Compares with the limit model, plain XLA and, on an H100 or
H200, the recorded peers; on a CPU with the pure-JAX reference. A shape that
fails is reported and the others still run. Ctrl-C keeps what was measured."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status.

    0: all went well; 1: a demo step did not match, a shape could not be measured, or became slower
    in a comparison; 2: bad arguments or a missing dependency; 130: interrupted.
    """
    try:
        status = _run(argv)
    except KeyboardInterrupt:  # outside the part of `bench` that keeps what was measured
        print("interrupted", file=sys.stderr)
        status = _interrupt.STATUS
    if status == _interrupt.STATUS:
        _interrupt.leave()
    return status


def _run(argv: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(prog="jax-flashmla", description="Paged MLA decoding in JAX.")
    version = f"jax-flashmla {jax_flashmla.__version__}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(dest="command", required=True)
    demo_parser = commands.add_parser(
        "demo",
        help="decode a ragged workload and check every step",
        description="Fills a paged cache with prompts of ragged lengths, decodes in a jitted step "
        "of several layers, and checks every step against unpaged attention in float32.",
    )
    workload.add_arguments(demo_parser)
    bench_parser = commands.add_parser(
        "bench",
        help="time an operation over a grid of shapes",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=BENCH,
        epilog=bench_options.grids_by_operation(),
    )
    bench_options.add_arguments(bench_parser)
    info_parser = commands.add_parser(
        "info", help="list which kernels work on this machine, and why not others"
    )
    info_parser.add_argument(
        "--json", action="store_true", help="print one JSON object, for bug reports"
    )
    arguments = parser.parse_args(argv)

    if arguments.command == "info" and arguments.json:  # without rich, as scripts may be
        from jax_flashmla.cli import info

        return info.run(as_json=True)
    if arguments.command == "bench" and arguments.compared:
        return _compare(arguments, bench_parser)
    missing = [name for name in NEEDS[arguments.command] if not importlib.util.find_spec(name)]
    if missing:
        print(
            f"jax-flashmla {arguments.command} needs the package {missing[0]}: "
            "pip install 'jax-flashmla[cli]'",
            file=sys.stderr,
        )
        return BAD_USAGE
    # What needs rich or JAX is imported only now, so that --help and bad arguments answer at once.
    from rich.console import Console

    console = Console()
    if arguments.command == "info":
        from jax_flashmla.cli import info

        return info.run(as_json=False)
    if arguments.command == "bench":
        try:
            options = bench_options.from_arguments(arguments)
            saved = document.read(options.saved) if options.saved else None
        except (OSError, ValueError) as error:
            bench_parser.error(str(error))
        if saved is not None:
            from jax_flashmla.bench import report

            return report.show_saved(saved, options.plots, console)
        from jax_flashmla.bench import run

        return run.run(options, console)
    try:
        chosen = workload.from_arguments(arguments)
    except (OSError, ValueError) as error:
        demo_parser.error(str(error))
    from jax_flashmla.cli import demo

    return demo.run(chosen, console)


def _compare(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """`bench --compare`: 1 if a shape of the old results became worse."""
    try:
        options = bench_options.from_arguments(arguments)
        old, new = map(document.read, options.compared)
        comparison = compare.compare(old, new, options.tolerance)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    for line in comparison.lines():
        print(line)
    return 1 if comparison.regressions else 0

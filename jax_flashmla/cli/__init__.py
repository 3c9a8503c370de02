"""The command `jax-flashmla`: `demo` runs a decoding workload, `info` describes an installation."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence

from jax_flashmla.cli import workload

BAD_USAGE = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status.

    0: all went well; 1: a demo step did not match; 2: bad arguments or a missing dependency.
    """
    parser = argparse.ArgumentParser(prog="jax-flashmla", description="Paged MLA decoding in JAX.")
    commands = parser.add_subparsers(dest="command", required=True)
    demo_parser = commands.add_parser(
        "demo",
        help="decode a ragged workload and check every step",
        description="Fills a paged cache with prompts of ragged lengths, decodes in a jitted step "
        "of several layers, and checks every step against unpaged attention in float32.",
    )
    workload.add_arguments(demo_parser)
    commands.add_parser("info", help="say what this installation can do here")
    arguments = parser.parse_args(argv)

    if importlib.util.find_spec("rich") is None:
        print(
            f"jax-flashmla {arguments.command} needs the package rich: "
            "pip install 'jax-flashmla[cli]'",
            file=sys.stderr,
        )
        return BAD_USAGE
    # What needs rich or JAX is imported only now, so that --help and bad arguments answer at once.
    from rich.console import Console

    console = Console()
    if arguments.command == "info":
        from jax_flashmla.cli import info

        return info.run(console)
    try:
        chosen = workload.from_arguments(arguments)
    except (OSError, ValueError) as error:
        demo_parser.error(str(error))
    from jax_flashmla.cli import demo

    return demo.run(chosen, console)

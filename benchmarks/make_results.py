"""Makes the JSON files of benchmarks/results/<card>: several grids in one process.

    python benchmarks/make_results.py benchmarks/results/h100 --peers
    python benchmarks/make_results.py /tmp/results --only layer_step dense_bf16

A grid's file is FOLDER/NAME.json, written after every shape, and is gone on with (`bench --resume`)
where it is there: after Ctrl-C, or whatever ended the process, the same command measures the rest.
Peers are loaded and compile what they need once. A failed shape is measured again by the next call.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from pathlib import Path

from rich.console import Console

from jax_flashmla.bench.operations import OPERATIONS
from jax_flashmla.bench.options import Options
from jax_flashmla.bench.run import run

GRIDS = {  # the order in which they are measured
    "sparse_decode": Options("sparse_decode", "results"),
    "dense_fp8": Options("dense_decode", "fp8", xla="none"),
    "index_topk": Options("index_topk", "indexer"),
    "layer_step": Options("layer_step", "targets"),
    "sparse_prefill": Options("sparse_prefill", "targets"),
    "index_scores": Options("index_scores", "indexer", xla="none"),
    "dense_bf16": Options("dense_decode", "quick"),
}
INTERRUPTED = 130


def main(argv: list[str] | None = None) -> int:
    """Returns the greatest exit status of `jax-flashmla bench` over the grids."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where the files are, or are to be")
    parser.add_argument("--only", nargs="+", choices=GRIDS, default=list(GRIDS), metavar="NAME")
    parser.add_argument("--peers", action="store_true", help="as of `jax-flashmla bench`")
    parser.add_argument("--commit", metavar="HASH", help="as of `jax-flashmla bench`")
    arguments = parser.parse_args(argv)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    console = Console(width=None if sys.stdout.isatty() else 160)
    start, worst = time.perf_counter(), 0
    for name in arguments.only:
        options = GRIDS[name]
        options = dataclasses.replace(
            options,
            brief=True,
            peers=arguments.peers and OPERATIONS[options.operation].live_peer is not None,
            commit=arguments.commit,
            json=arguments.folder / f"{name}.json",
            resume=True,
        )
        status = run(options, console)
        console.print(f"{name}: status {status}, at {time.perf_counter() - start:.0f} s\n")
        worst = max(worst, status)
        if status == INTERRUPTED:
            break
    return worst


if __name__ == "__main__":
    sys.exit(main())

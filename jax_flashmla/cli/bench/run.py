"""Measures a grid of shapes, keeping and showing each row as it is done."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from jax_flashmla import kernel_refusal
from jax_flashmla.cli.bench import document as documents
from jax_flashmla.cli.bench import environment, report
from jax_flashmla.cli.bench.decode_calls import make_pool
from jax_flashmla.cli.bench.grids import XLA_ROWS
from jax_flashmla.cli.bench.limits import limits_of
from jax_flashmla.cli.bench.measure import METHODS, Ceilings, measure_ceilings
from jax_flashmla.cli.bench.options import Options
from jax_flashmla.cli.bench.rows import Setup, first_line, measure_row
from jax_flashmla.cli.bench.shapes import Row
from jax_flashmla.cli.bench.summary import summarise
from jax_flashmla.cli.device import platform_of

USABLE_MEMORY = 0.9  # of what JAX may allocate: the rest is for XLA's own temporaries


def run(options: Options, console: Console) -> int:
    """Measures what the options ask for, then shows and draws it.

    Returns:
        As `report.show`; 1 also if nothing can be measured here, 2 if no row is left to measure.
    """
    (device,) = jnp.zeros(()).devices()  # the default one
    refusal = kernel_refusal(platform_of(device))
    if refusal is not None:
        console.print(f"[red]nothing to measure: {refusal}")
        return 1
    try:
        name, rows = options.rows("quick" if device.platform == "gpu" else "cpu")
    except ValueError as error:
        console.print(f"[red]{error}")
        return 2
    return report.show(measure(name, rows, options, device, console), options.plots, console)


def measure(
    grid: str, rows: tuple[Row, ...], options: Options, device: jax.Device, console: Console
) -> dict[str, Any]:
    """The document of a run, which is also written to options.json after every row.

    Ctrl-C ends it early: the rows measured by then are in the document. It counts as interrupted
    until its last row, so that the file of a run that was killed says so too.
    """
    layers = options.layers_of(grid)
    method = METHODS[device.platform]
    if layers is not None:
        method = dataclasses.replace(method, min_calls=layers, max_calls=layers)
    with console.status("measuring what XLA reaches on this device"):
        ceilings = measure_ceilings(device, method)
    setup = Setup(
        device=device,
        method=method,
        limits=limits_of(device.platform, device.device_kind, ceilings),
        dtype=options.dtype,
        block_size=options.block_size,
        look_inside=layers is not None,
    )
    document = _begin(options, grid, setup, ceilings)
    report.print_setting(document, console)

    memory = (device.memory_stats() or {}).get("bytes_limit", 1 << 34)
    fitting = [row for row in rows if setup.memory(row) < USABLE_MEMORY * memory]
    most_blocks = max((setup.pool_blocks(row) for row in fitting), default=1)
    pool = make_pool(most_blocks, options.block_size, options.dtype, device)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    report.print_plain(console, report.header())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(rows))
        try:
            for row in rows:
                progress.update(task, description=str(row))
                shape = {**dataclasses.asdict(row), "cached_tokens": row.cached_tokens}
                try:
                    if row not in fitting:
                        needed = f"{setup.memory(row) / 1e9:.1f} GB of {memory / 1e9:.1f} GB"
                        raise MemoryError(f"needs {needed}")
                    with_xla = _wants_xla(row, options.xla, device.platform)
                    result = measure_row(row, pool, setup, with_xla=with_xla)
                except Exception as error:  # one row's failure must not cost the others
                    result = {"error": first_line(error)}
                document["rows"].append({**shape, **result})
                document["interrupted"] = len(document["rows"]) < len(rows)
                report.print_plain(progress.console, report.line(document["rows"][-1]))
                _keep(document, options)
                progress.advance(task)
        except KeyboardInterrupt:
            _keep(document, options)
    return document


def _begin(options: Options, grid: str, setup: Setup, ceilings: Ceilings) -> dict[str, Any]:
    """The document before its first row."""
    return {
        **environment.describe(setup.device, options.commit),
        "grid": grid,
        "dtype": options.dtype,
        "block_size": options.block_size,
        "method": dataclasses.asdict(setup.method),
        "ceilings": dataclasses.asdict(ceilings),
        "limits": dataclasses.asdict(setup.limits),
        "interrupted": True,  # until the last row is measured
        "rows": [],
        "summary": summarise([]),
    }


def _keep(document: dict[str, Any], options: Options) -> None:
    document["summary"] = summarise(document["rows"])
    if options.json is not None:
        documents.write(document, options.json)


def _wants_xla(row: Row, which: str, platform: str) -> bool:
    if which == "subset":
        return row in XLA_ROWS or platform == "cpu"
    return which == "all"

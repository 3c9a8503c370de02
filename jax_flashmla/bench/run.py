"""Measures a grid of shapes, keeping and showing each one as it is done."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from jax_flashmla import _interrupt, kernel_refusal
from jax_flashmla.bench import document as documents
from jax_flashmla.bench import environment, live, report
from jax_flashmla.bench.device import platform_of
from jax_flashmla.bench.gather import measure_gather
from jax_flashmla.bench.limits import limits_of
from jax_flashmla.bench.measure import METHODS, Ceilings, measure_ceilings
from jax_flashmla.bench.measure_shape import first_line, measure_shape
from jax_flashmla.bench.operation import Operation
from jax_flashmla.bench.operations import OPERATIONS
from jax_flashmla.bench.options import Options
from jax_flashmla.bench.setup import Setup
from jax_flashmla.bench.summary import summarise

USABLE_MEMORY = 0.9  # of what JAX may allocate: the rest is for XLA's own temporaries


def run(options: Options, console: Console) -> int:
    """Measures what the options ask for, then shows and draws it.

    Returns:
        As `report.show`; 1 also if nothing can be measured here, 2 if no shape is left to measure.
    """
    (device,) = jnp.zeros(()).devices()  # the default one
    refusal = kernel_refusal(platform_of(device))
    if refusal is not None:
        console.print(f"[red]nothing to measure: {refusal}")
        return 1
    peer = None
    try:
        grid, shapes = options.shapes(device.platform)
        if options.peers:
            peer = (OPERATIONS[options.operation].load_peer or live.load)()
    except (ValueError, ImportError) as error:
        console.print(f"[red]{escape(str(error))}")
        return 2
    found = measure(grid, shapes, options, device, console, peer)
    return report.show(found, options.plots, console)


def measure(
    grid: str,
    shapes: tuple[Any, ...],
    options: Options,
    device: jax.Device,
    console: Console,
    peer: live.Torch | None = None,
) -> dict[str, Any]:
    """The document of a run, which is also written to options.json after every shape.

    Ctrl-C ends it early: the shapes measured by then are in the document. It counts as interrupted
    until its last shape, so that the file of a run that was killed says so too.
    """
    operation = OPERATIONS[options.operation]
    layers = options.layers_of(grid)
    method = METHODS[device.platform]
    if options.brief:
        method = method.brief()
    if layers is not None:
        method = dataclasses.replace(method, min_calls=layers, max_calls=layers)
    with console.status("measuring what XLA reaches on this device"):
        ceilings = measure_ceilings(device, method)
        row_bytes = sorted({size for shape in shapes for size in shape.gathered})
        gather_gbs = {size: measure_gather(device, method, size) for size in row_bytes}
        ceilings = dataclasses.replace(ceilings, gather_gbs=gather_gbs)
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
    calls = operation.calls()
    fitting = [s for s in shapes if calls.memory(s, setup) < USABLE_MEMORY * memory]
    pool = calls.make_pool(fitting, setup)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    table = report.ShapeTable(operation, document["limits"])
    report.print_plain(console, table.header())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(shapes))
        try:
            with _interrupt.keeping():
                for shape in shapes:
                    progress.update(task, description=str(shape))
                    try:
                        if shape not in fitting:
                            needed = f"{calls.memory(shape, setup) / 1e9:.1f} GB"
                            raise MemoryError(f"needs {needed} of {memory / 1e9:.1f} GB")
                        with_xla = _wants_xla(shape, operation, options.xla, device.platform)
                        result = measure_shape(
                            operation,
                            shape,
                            pool,
                            setup,
                            with_xla=with_xla,
                            peer=peer,
                            profile=options.profile is not None,
                        )
                    except Exception as error:  # one shape's failure must not cost the others
                        result = {"error": first_line(error)}
                    fields = {**dataclasses.asdict(shape), **shape.facts}
                    document["shapes"].append({**fields, **result})
                    document["interrupted"] = len(document["shapes"]) < len(shapes)
                    report.print_plain(progress.console, table.line(document["shapes"][-1]))
                    _keep(document, options)
                    progress.advance(task)
        except KeyboardInterrupt:
            _keep(document, options)
    return document


def _begin(options: Options, grid: str, setup: Setup, ceilings: Ceilings) -> dict[str, Any]:
    """The document before its first shape."""
    return {
        **environment.describe(setup.device, options.commit),
        "operation": options.operation,
        "grid": grid,
        "dtype": options.dtype,
        "block_size": options.block_size,
        "method": dataclasses.asdict(setup.method),
        "ceilings": dataclasses.asdict(ceilings),
        "limits": dataclasses.asdict(setup.limits),
        "interrupted": True,  # until the last shape is measured
        "shapes": [],
        "summary": summarise(OPERATIONS[options.operation], []),
    }


def _keep(document: dict[str, Any], options: Options) -> None:
    document["summary"] = summarise(OPERATIONS[options.operation], document["shapes"])
    if options.json is not None:
        documents.write(document, options.json)
    if options.profile is not None:
        options.profile.write_text(report.kernel_tables(document))


def _wants_xla(shape: Any, operation: Operation, which: str, platform: str) -> bool:
    if which == "subset":
        return shape in operation.xla_shapes or platform == "cpu"
    return which == "all"

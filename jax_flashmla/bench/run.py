"""Measures a grid of shapes, keeping and showing each one as it is done."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from jax_flashmla import _interrupt, kernel_refusal
from jax_flashmla.bench import document as documents
from jax_flashmla.bench import environment, live, report, resume
from jax_flashmla.bench.ahead import AT_ONCE, Lowered, Programs, compile_shapes
from jax_flashmla.bench.device import platform_of
from jax_flashmla.bench.gather import measure_gather
from jax_flashmla.bench.limits import limits_of
from jax_flashmla.bench.measure import METHODS, Ceilings, measure_ceilings
from jax_flashmla.bench.measure_shape import first_line, measure_shape
from jax_flashmla.bench.operation import Operation
from jax_flashmla.bench.operations import OPERATIONS
from jax_flashmla.bench.options import Options
from jax_flashmla.bench.setup import Setup
from jax_flashmla.bench.shape import Result
from jax_flashmla.bench.stopwatch import Stopwatch
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
    try:
        found = measure(grid, shapes, options, device, console, peer)
    except resume.OtherRun as error:
        console.print(f"[red]{escape(str(error))}")
        return 2
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

    Raises:
        resume.OtherRun: options.resume, and options.json is of another run.
    """
    operation, watch = OPERATIONS[options.operation], Stopwatch()
    layers = options.layers_of(grid)
    method = METHODS[device.platform]
    if options.brief:
        method = method.brief()
    if layers is not None:
        method = dataclasses.replace(method, min_calls=layers, max_calls=layers)
    with console.status("measuring what XLA reaches on this device"), watch("start"):
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
    kept = resume.measured(document, options, shapes) if options.resume else {}
    report.print_setting(document, console)

    memory = (device.memory_stats() or {}).get("bytes_limit", 1 << 34)
    usable = USABLE_MEMORY * memory
    calls = operation.calls()
    todo = [shape for shape in shapes if shape not in kept]
    document |= {"shapes": list(kept.values()), "interrupted": bool(todo)}
    pool = calls.make_pool([s for s in todo if calls.memory(s, setup) < usable], setup)

    def lower(shape: Any) -> Lowered:
        needed = calls.memory(shape, setup)
        if needed >= usable:
            raise MemoryError(f"needs {needed / 1e9:.1f} GB of {memory / 1e9:.1f} GB")
        with_xla = _wants_xla(shape, operation, options.xla, device.platform)
        with jax.default_device(device):
            return calls.programs(shape, pool, setup, with_xla=with_xla)

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    table = report.ShapeTable(operation, document["limits"])
    report.print_plain(console, table.header())
    for result in kept.values():
        report.print_plain(console, table.line(result))
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(shapes), completed=len(kept))
        try:
            with _interrupt.keeping():
                for start in range(0, len(todo), AT_ONCE):
                    batch = todo[start : start + AT_ONCE]
                    progress.update(task, description=f"compiling for {len(batch)} shapes")
                    with watch("compile"):
                        compiled = compile_shapes(
                            [partial(lower, shape) for shape in batch],
                            look_inside=setup.look_inside,
                        )
                    for shape in batch:
                        progress.update(task, description=str(shape))
                        programs = compiled.pop(0)
                        result = _measured(operation, shape, pool, setup, programs, peer, options)
                        watch.add(result.get("wall_seconds", {}))
                        document["wall_seconds"] = watch.seconds
                        kept[shape] = {**dataclasses.asdict(shape), **shape.facts, **result}
                        document["shapes"] = [kept[s] for s in shapes if s in kept]
                        document["interrupted"] = len(kept) < len(shapes)
                        report.print_plain(progress.console, table.line(kept[shape]))
                        _keep(document, options)
                        progress.advance(task)
        except KeyboardInterrupt:
            _keep(document, options)
    return document


def _measured(
    operation: Operation,
    shape: Any,
    pool: Any,
    setup: Setup,
    programs: Programs | Exception,
    peer: live.Torch | None,
    options: Options,
) -> Result:
    """As `measure_shape`; of one that fails, its error, which must not cost the others."""
    try:
        if isinstance(programs, Exception):
            raise programs
        return measure_shape(
            operation,
            shape,
            pool,
            setup,
            programs,
            peer=peer,
            profile=options.profile is not None,
        )
    except Exception as error:
        return {"error": first_line(error)}


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

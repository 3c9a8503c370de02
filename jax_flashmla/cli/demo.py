"""Runs a decoding workload end to end, checks every step, and reports what ran where."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from jax_flashmla import BlockAllocator, BlockTable, CacheFormat, PagedCache
from jax_flashmla.bench.device import describe_decode, describe_device
from jax_flashmla.bench.naive import Errors, step_errors
from jax_flashmla.cli.model import VOCABULARY, init_weights, make_step
from jax_flashmla.cli.workload import Workload

PREFILL_CHUNK = 256  # tokens of each sequence that one prefill call appends
FULL_K, FULL_V = 192, 128  # per head in the multi-head cache that the latent one stands for


@dataclass
class Report:
    """What a run did, step by step."""

    device: str
    attention: str  # which implementation ran
    blocks_used: int = 0
    seconds: list[float] = field(default_factory=list)  # without compiling and checking
    errors: list[Errors] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)  # found by PagedCache.check() at the end


def run(workload: Workload, console: Console) -> int:
    """Decodes, checks, prints. Returns 0 if every step matched and the cache is sound, else 1."""
    format = CacheFormat(dtype=workload.dtype)
    columns = (
        TextColumn("{task.description:>8}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        report = decode(workload, format, progress)
    console.print(_table(workload, format, report))

    bad_steps = [i for i, e in enumerate(report.errors, 1) if not e.acceptable(format.dtype)]
    for fault in report.faults:
        console.print(f"[red]cache: {fault}")
    if bad_steps:
        console.print(
            f"[red]MISMATCH against naive attention in {len(bad_steps)} of {workload.steps} steps, "
            f"first in step {bad_steps[0]}"
        )
    if bad_steps or report.faults:
        return 1
    console.print(f"[green]all {workload.steps} steps match naive unpaged attention in float32")
    return 0


def decode(workload: Workload, format: CacheFormat, progress: Progress) -> Report:
    """Prefills a paged cache, then decodes `workload.steps` tokens of every sequence."""
    lengths = np.asarray(workload.lengths, np.int32)
    max_blocks = -(-workload.max_tokens // format.block_size)
    num_blocks = int((-(-(lengths + workload.steps) // format.block_size)).sum())
    allocator = BlockAllocator(num_blocks, format.block_size)
    sequences = [allocator.allocate(int(n)) for n in lengths]
    ids = allocator.block_table(sequences, max_blocks)
    table = BlockTable.create(ids, block_size=format.block_size)
    cache = PagedCache.create(format, table, num_blocks=num_blocks, layers=workload.layers)
    history_shape = (workload.layers, workload.batch, workload.max_tokens, format.d_qk)
    history = jnp.zeros(history_shape, format.dtype)
    chunks = list(_prompt_chunks(lengths))
    for index, (start, num_new) in enumerate(progress.track(chunks, description="prefill")):
        cache, rows = _append_prompt(cache, workload.seed, index, num_new)
        history = add_rows(history, rows, np.full_like(lengths, start), num_new)

    weights = init_weights(workload, format)
    drawn = np.random.default_rng(workload.seed).integers(VOCABULARY, size=workload.batch)
    tokens = jnp.asarray(drawn, jnp.int32)
    jitted = jax.jit(make_step(workload.heads, format), donate_argnames="cache")
    step = jitted.lower(weights, tokens, cache).compile()
    (device,) = tokens.devices()
    report = Report(describe_device(device), describe_decode(step, device))
    for _ in progress.track(range(workload.steps), description="decode"):
        start_time = time.perf_counter()
        for sequence in sequences:
            allocator.extend(sequence, 1)
        extended = allocator.block_table(sequences, max_blocks)
        if (extended != ids).any():  # a sequence has begun a new block
            ids = extended
            cache = cache.with_table(ids)
        cache, tokens, trace = jax.block_until_ready(step(weights, tokens, cache))
        report.seconds.append(time.perf_counter() - start_time)

        history = add_rows(history, trace.rows, lengths, np.ones_like(lengths))
        lengths = lengths + 1
        attended = (trace.q, trace.out, trace.lse)
        scale = format.d_qk**-0.5
        errors = step_errors(history, lengths, *attended, d_v=format.d_v, sm_scale=scale)
        report.errors.append(jax.device_get(errors))
    report.faults = cache.check()
    report.blocks_used = num_blocks - allocator.num_free
    return report


def _prompt_chunks(lengths: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(first token, int32[b] tokens of each sequence) of each prefill call."""
    for start in range(0, int(lengths.max()), PREFILL_CHUNK):
        yield start, np.clip(lengths - start, 0, PREFILL_CHUNK).astype(np.int32)


@partial(jax.jit, donate_argnames="cache")
def _append_prompt(
    cache: PagedCache, seed: int, index: int, num_new: jax.Array
) -> tuple[PagedCache, jax.Array]:
    """Appends random rows to all layers; returns them too, [layers, b, PREFILL_CHUNK, d_qk]."""
    key = jax.random.fold_in(jax.random.key(seed), index)
    shape = (cache.layers, num_new.shape[0], PREFILL_CHUNK, 1, cache.format.d_qk)
    rows = jax.random.normal(key, shape, cache.format.dtype)
    return cache.append(rows, num_new=num_new), rows[:, :, :, 0]


@partial(jax.jit, donate_argnames="history")
def add_rows(
    history: jax.Array, rows: jax.Array, positions: jax.Array, num_new: jax.Array
) -> jax.Array:
    """Adds cache rows to a plain array of all rows so far.

    Args:
        history: [layers, b, max_tokens, d_qk].
        rows: [layers, b, s_new, d_qk].
        positions: [b] int32, token position of each sequence's first new row.
        num_new: [b] int32, how many of the s_new rows to add.
    """
    b, s_new = rows.shape[1:3]
    step = jnp.arange(s_new)[None]
    token = jnp.where(step < num_new[:, None], positions[:, None] + step, history.shape[2])
    return history.at[:, jnp.arange(b)[:, None], token].set(rows, mode="drop")


def _table(workload: Workload, format: CacheFormat, report: Report) -> Table:
    itemsize = jnp.dtype(format.dtype).itemsize
    full_bytes = workload.heads * (FULL_K + FULL_V) * itemsize
    ratio = full_bytes / format.bytes_per_token
    seconds = statistics.median(report.seconds)
    worst = [
        max((getattr(e, name) for e in report.errors), key=_nan_first) for name in Errors._fields
    ]
    prompts = f"{min(workload.lengths)} to {max(workload.lengths)}"
    table = Table(show_header=False)
    table.add_row("device", report.device)
    table.add_row("attention", report.attention)
    table.add_row(
        "workload",
        f"{workload.batch} sequences, prompts of {prompts} tokens, {workload.steps} steps, "
        f"{workload.layers} layers, {workload.heads} heads, {workload.dtype}",
    )
    table.add_row("blocks", f"{report.blocks_used} of {format.block_size} tokens in use")
    table.add_row(
        "speed",
        f"{workload.batch / seconds:,.0f} tokens/s, {seconds * 1e3:.2f} ms a step "
        "(median; compiling and checking excluded)",
    )
    table.add_row(
        "worst error",
        f"out {worst[0]:.1e} ({worst[1]:.1e} of its row's largest value), "
        f"lse {worst[2]:.1e} of 1 + |lse|",
    )
    table.add_row(
        "cache bytes a token",
        f"{format.bytes_per_token:,} in each layer; full multi-head cache: "
        f"heads x ({FULL_K} + {FULL_V}) x {itemsize} = {full_bytes:,}, {ratio:.1f} times as much",
    )
    return table


def _nan_first(error: float) -> float:
    return float("inf") if np.isnan(error) else float(error)

"""Decodes for a long time with sequences that grow, end, restart, fork and are preempted.

    python scripts/soak.py                  # 100,000 steps on a GPU, 512 on a CPU
    python scripts/soak.py --reruns 200     # one ragged batch 200 times: the bits must be equal

The host's `BlockAllocator` gives and takes blocks between chunks of steps; a chunk is one jitted
loop of `PagedCache.advance`, `write` and `dense_decode`. A cache row depends on the sequence that
wrote it and on its position alone, so at sampled steps every sequence's keys are made anew, without
pages, and attended to in float32: a row that was lost, or written over by another sequence, shows.
Blocks are fewer than all sequences could want, so that some are preempted.

The exit status is 1 if an output was wrong or not finite, if lengths differ between host and
device, if a row was dropped, if a block is not free at the end, or if the memory in use has grown.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_flashmla import (
    BlockAllocator,
    BlockTable,
    CacheFormat,
    OutOfBlocks,
    PagedCache,
    dense_decode,
    make_schedule,
)
from jax_flashmla.bench.naive import step_errors

QUERY_GAIN = 3.0  # standard deviation of the scores: attention is peaked, as in trained models
FORKED = 0.25  # of restarted sequences begin with another one's tokens


@dataclasses.dataclass(frozen=True)
class Size:
    """How much is decoded at once."""

    batch: int
    heads: int
    max_tokens: int  # of a sequence
    chunk: int  # steps between two looks of the host
    prompt: int  # tokens that a restarted sequence has at most

    @property
    def max_blocks(self) -> int:
        return -(-self.max_tokens // CacheFormat.block_size)

    @property
    def num_blocks(self) -> int:
        """Two fifths of what full sequences would take; at least what a chunk of restarts needs."""
        restart = -(-(self.prompt + self.chunk) // CacheFormat.block_size) + 1
        return max(self.batch * self.max_blocks * 2 // 5, self.batch * restart)


class Attended(NamedTuple):
    """The last step of a chunk."""

    q: jax.Array  # [b, heads, d_qk]
    out: jax.Array  # [b, heads, d_v]
    lse: jax.Array  # [b, heads] f32


class Host:
    """Which sequence is in which row of the batch, how long it is, and what its tokens are."""

    def __init__(self, size: Size, seed: int):
        self.size = size
        self.random = np.random.default_rng(seed)
        self.allocator = BlockAllocator(size.num_blocks, CacheFormat.block_size)
        self.sequences = [self.allocator.allocate() for _ in range(size.batch)]
        self.lengths = np.zeros(size.batch, np.int32)  # tokens that are written
        self.ends = self.random.integers(1, size.max_tokens, size.batch)  # tokens to end at
        # Token t of row i was written by the sequence numbered writers[i, t].
        self.writers = np.zeros((size.batch, size.max_tokens), np.int32)
        self.serials = np.arange(size.batch, dtype=np.int32)  # of the sequences, never used again
        self.restarts = self.forks = self.preemptions = 0

    def plan(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[tuple[int, int]]]:
        """Ends, restarts and extends sequences for the next chunk.

        Returns:
            starts [b]: tokens that are written already; prompts [b]: tokens to append first;
            steps [b]: of the chunk, in which the sequence grows; pairs: blocks to copy.
        """
        size = self.size
        for i in np.flatnonzero(self.lengths >= self.ends):
            self._restart(i)
        prompts = np.zeros(size.batch, np.int32)
        steps = np.zeros(size.batch, np.int32)
        pairs: list[tuple[int, int]] = []
        waiting = list(range(size.batch))
        while waiting:
            i = waiting.pop()
            room = int(self.ends[i] - self.lengths[i])
            fresh = self.lengths[i] == 0
            prompts[i] = self.random.integers(min(size.prompt, room)) if fresh else 0
            steps[i] = min(size.chunk, room - int(prompts[i]))
            try:
                pairs += self.allocator.extend(self.sequences[i], int(prompts[i] + steps[i]))
            except OutOfBlocks:
                victim = int(np.argmax(self.allocator.seqlens(self.sequences)))
                self._restart(victim, may_fork=False)
                self.preemptions += 1
                waiting += [j for j in {i, victim} if j not in waiting]
        starts = self.lengths.copy()
        self.lengths = starts + prompts + steps
        for i in range(size.batch):
            self.writers[i, starts[i] : self.lengths[i]] = self.serials[i]
        return starts, prompts, steps, pairs

    def _restart(self, i: int, *, may_fork: bool = True) -> None:
        size = self.size
        self.allocator.free(self.sequences[i])
        self.restarts += 1
        self.serials[i] = self.serials.max() + 1
        self.ends[i] = self.random.integers(1, size.max_tokens + 1)
        parent = int(self.random.integers(size.batch))
        kept = int(self.random.integers(self.lengths[parent] + 1))
        if may_fork and parent != i and kept < self.ends[i] and self.random.random() < FORKED:
            self.sequences[i] = self.allocator.fork(self.sequences[parent])
            self.allocator.truncate(self.sequences[i], kept)
            self.writers[i] = self.writers[parent]
            self.lengths[i] = kept
            self.forks += 1
        else:
            self.sequences[i] = self.allocator.allocate()
            self.lengths[i] = 0


def random_rows(writers: jax.Array, positions: jax.Array, n: int, stream: int) -> jax.Array:
    """Standard normal f32 [..., n] for each (writer, position) of int32 [...]."""

    def one(writer: jax.Array, position: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(stream), writer), position)
        return jax.random.normal(key, (n,))

    flat = jax.vmap(one)(writers.reshape(-1), positions.reshape(-1))
    return flat.reshape(*writers.shape, n)


def cache_rows(writers: jax.Array, positions: jax.Array, format: CacheFormat) -> jax.Array:
    """The cache rows of tokens [b, t] -> [b, t, d_qk]."""
    return random_rows(writers, positions, format.d_qk, stream=0).astype(format.dtype)


def queries(serials: jax.Array, lengths: jax.Array, heads: int, format: CacheFormat) -> jax.Array:
    """[b] -> [b, heads, d_qk]."""
    flat = QUERY_GAIN * random_rows(serials, lengths, heads * format.d_qk, stream=1)
    return flat.astype(format.dtype).reshape(-1, heads, format.d_qk)


@functools.partial(jax.jit, donate_argnames="cache", static_argnames="size")
def append_prompts(
    cache: PagedCache, serials: jax.Array, prompts: jax.Array, size: Size
) -> PagedCache:
    """Appends prompts[i] tokens to sequence i."""
    positions = cache.table.cache_seqlens[:, None] + jnp.arange(size.prompt, dtype=jnp.int32)[None]
    writers = jnp.broadcast_to(serials[:, None], positions.shape)
    rows = cache_rows(writers, positions, cache.format)
    return cache.append(rows[:, :, None], num_new=prompts)


@functools.partial(jax.jit, donate_argnames="cache", static_argnames="size")
def decode_chunk(
    cache: PagedCache, serials: jax.Array, steps: jax.Array, size: Size
) -> tuple[PagedCache, Attended, jax.Array]:
    """Decodes size.chunk steps, of which sequence i grows in the first steps[i].

    Returns:
        The cache, the last step, and how many values of out were not finite in all steps.
    """
    format = cache.format
    shape = (size.batch, size.heads)

    def step(
        i: int | jax.Array, carry: tuple[PagedCache, Attended, jax.Array]
    ) -> tuple[PagedCache, Attended, jax.Array]:
        cache, _, bad = carry
        cache, slots = cache.advance(num_new=(i < steps).astype(jnp.int32))
        rows = cache_rows(serials[:, None], slots.positions[:, None], format)
        cache = cache.write(rows[:, :, None], slots)
        lengths = cache.table.cache_seqlens
        q = queries(serials, lengths, size.heads, format)
        schedule = make_schedule(lengths, h_q=size.heads)
        out, lse = dense_decode(q[:, None], *cache.layer(), d_v=format.d_v, schedule=schedule)
        bad = bad + (~jnp.isfinite(out)).sum(dtype=jnp.int32)
        return cache, Attended(q, out[:, 0], lse[:, 0]), bad

    nothing = Attended(
        jnp.zeros((*shape, format.d_qk), format.dtype),
        jnp.zeros((*shape, format.d_v), format.dtype),
        jnp.zeros(shape, jnp.float32),
    )
    return jax.lax.fori_loop(0, size.chunk, step, (cache, nothing, jnp.int32(0)))


def is_right(host: Host, format: CacheFormat, last: Attended) -> bool:
    """Whether the last step agrees with attention over keys that are made anew."""
    positions = np.broadcast_to(np.arange(host.size.max_tokens, dtype=np.int32), host.writers.shape)
    history = jax.jit(cache_rows, static_argnums=2)(host.writers, positions, format)
    q, out, lse = (x[None] for x in last)
    errors = step_errors(
        history[None], host.lengths, q, out, lse, d_v=format.d_v, sm_scale=format.d_qk**-0.5
    )
    return errors.acceptable(format.dtype)


def memory_in_use() -> int:
    """Bytes of the device, or of JAX's live arrays where the device does not say."""
    stats = jax.devices()[0].memory_stats() or {}
    return stats.get("bytes_in_use", sum(x.nbytes for x in jax.live_arrays()))


def soak(size: Size, format: CacheFormat, steps: int, check_every: int, seed: int) -> list[str]:
    """Decodes; returns what went wrong, a sentence each."""
    host = Host(size, seed)
    table = BlockTable.create(host.allocator.block_table(host.sequences, size.max_blocks))
    cache = PagedCache.create(format, table, num_blocks=size.num_blocks)
    faults: list[str] = []
    memory: list[int] = []
    chunks, checked = -(-steps // size.chunk), 0
    begin = time.perf_counter()
    for chunk in range(chunks):
        starts, prompts, growing, pairs = host.plan()
        cache = cache.copy_blocks(*host.allocator.plan_copies(pairs, size=2 * size.batch))
        cache = cache.with_table(
            host.allocator.block_table(host.sequences, size.max_blocks), starts
        )
        cache = append_prompts(cache, host.serials, prompts, size)
        cache, last, bad = decode_chunk(cache, host.serials, growing, size)
        where = f"step {(chunk + 1) * size.chunk}"
        lengths, overflow, bad = jax.device_get((cache.table.cache_seqlens, cache.overflow, bad))
        if not np.array_equal(lengths, host.lengths):
            faults.append(f"{where}: lengths on the device differ from the allocator's")
        if overflow.any():
            faults.append(f"{where}: {overflow.sum()} rows were dropped")
        if bad:
            faults.append(f"{where}: {bad} values are not finite")
        if chunk % check_every == 0 or chunk == chunks - 1:
            checked += 1
            faults += [f"{where}: {fault}" for fault in cache.check()]
            if not is_right(host, format, last):
                faults.append(f"{where}: wrong against the reference")
            memory.append(memory_in_use())
            print(
                f"{where}: {time.perf_counter() - begin:.0f} s, {host.restarts} restarts, "
                f"{host.forks} forks, {host.preemptions} preemptions, {checked} steps checked, "
                f"{len(faults)} faults, {memory[-1] / 1e6:.1f} MB in use",
                flush=True,
            )
    # The first check compiles; from the second on nothing may be kept.
    if len(memory) > 2 and memory[-1] > memory[1]:
        faults.append(f"memory in use grew from {memory[1]} to {memory[-1]} bytes")
    for sequence in host.sequences:
        host.allocator.free(sequence)
    if host.allocator.num_free != size.num_blocks:
        faults.append(f"{size.num_blocks - host.allocator.num_free} blocks are not free at the end")
    return faults


def rerun(size: Size, format: CacheFormat, reruns: int, seed: int) -> list[str]:
    """Attends to one ragged batch again and again; returns a sentence if any bits differ."""
    random = np.random.default_rng(seed)
    lengths = random.integers(1, size.max_tokens + 1, size.batch).astype(np.int32)
    lengths[0] = size.max_tokens
    table = random.permutation(size.batch * size.max_blocks).astype(np.int32)
    table = table.reshape(size.batch, size.max_blocks)
    blocks = jax.random.normal(
        jax.random.key(seed), (table.size, format.block_size, 1, format.d_qk), format.dtype
    )
    q = queries(np.arange(size.batch, dtype=np.int32), lengths, size.heads, format)[:, None]

    @jax.jit
    def bits(lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
        schedule = make_schedule(lengths, h_q=size.heads)
        out, lse = dense_decode(q, blocks, table, lengths, d_v=format.d_v, schedule=schedule)
        return out.view(jnp.uint16), lse.view(jnp.uint32)

    first = bits(lengths)
    differ = sum(
        not all(bool((x == y).all()) for x, y in zip(first, bits(lengths), strict=True))
        for _ in range(reruns)
    )
    print(f"{reruns} reruns of {size.batch} sequences of 1 to {size.max_tokens} tokens")
    return [f"{differ} of {reruns} reruns have other bits"] if differ else []


def main(argv: list[str] | None = None) -> int:
    on_gpu = jax.default_backend() == "gpu"
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=100_000 if on_gpu else 512)
    parser.add_argument("--batch", type=int, default=64 if on_gpu else 6, help="sequences at once")
    parser.add_argument("--heads", type=int, default=16 if on_gpu else 4)
    parser.add_argument("--max-tokens", type=int, default=4096 if on_gpu else 300)
    parser.add_argument("--chunk", type=int, default=64, help="steps in one jitted loop")
    parser.add_argument("--check-every", type=int, default=50 if on_gpu else 2, help="chunks")
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reruns", type=int, help="only compare the bits of this many reruns")
    arguments = parser.parse_args(argv)
    for name in ("steps", "batch", "heads", "max_tokens", "chunk", "check_every"):
        if getattr(arguments, name) < 1:
            parser.error(f"{name} must be at least 1, got {getattr(arguments, name)}")

    size = Size(
        arguments.batch, arguments.heads, arguments.max_tokens, arguments.chunk, arguments.chunk
    )
    format = CacheFormat(dtype=arguments.dtype)
    print(f"{jax.devices()[0].device_kind}: {size}, {size.num_blocks} blocks, {arguments.dtype}")
    if arguments.reruns is not None:
        faults = rerun(size, format, arguments.reruns, arguments.seed)
    else:
        faults = soak(size, format, arguments.steps, arguments.check_every, arguments.seed)
    print("\n".join([*faults[:20], f"FAILED: {len(faults)} faults"] if faults else ["passed"]))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())

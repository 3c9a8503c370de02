"""How the work of a step is split over a device's multiprocessors."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_flashmla import _checks, _limits
from jax_flashmla._context import as_context
from jax_flashmla._num_parts import default_split
from jax_flashmla._windows import make_windows, window_tokens
from jax_flashmla._xla.operation import Operation
from jax_flashmla.cache.format import CacheFormat
from jax_flashmla.reference.schedule import make_schedule as reference

if TYPE_CHECKING:
    from jax.typing import ArrayLike


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SplitSchedule:
    """A ragged batch cut into parts of equal cost, shared by all layers of a step.

    A pytree with one leaf, whose shape depends only on how many parts there are. A schedule whose
    sequences have since changed length still gives the right answer, only more slowly.

    Attributes:
        cuts: [num_parts + 1, 2] int32, the (sequence, tile of 64 tokens) where each part begins.
        b: the number of sequences it was made for (static).
        tile_rows: query rows that a tile of the Hopper kernel has at most: 64, or 16 in a small
            problem, or 32 in one that is not large over fp8 rows (static).
    """

    cuts: jax.Array
    b: int = dataclasses.field(metadata={"static": True})
    tile_rows: int = dataclasses.field(default=_limits.TILE_ROWS, metadata={"static": True})

    @property
    def num_parts(self) -> int:
        """Parts that the batch is cut into, one for each of the workers that share it."""
        return self.cuts.shape[0] - 1


def make_schedule(
    cache_seqlens: jax.Array,
    *,
    h_q: int,
    h_kv: int = 1,
    s_q: int = 1,
    max_seqlen: int | None = None,
    format: CacheFormat | None = None,
    num_parts: int | None = None,
    batch_invariant: bool = False,
    cu_q_lens: jax.Array | None = None,
    num_tokens: int | None = None,
    max_q_len: int | None = None,
    causal: bool = False,
    context: tuple[ArrayLike, int] | None = None,
    implementation: str | None = None,
) -> SplitSchedule:
    """Splits a ragged batch over the device's multiprocessors, on the device.

    Make it once per step, when the lengths change, and pass it to every layer's `dense_decode`.

    Args:
        cache_seqlens: [b] int32, tokens in each sequence's cache. Negative counts as 0.
        h_q: query heads, as in `dense_decode`.
        h_kv: heads of the cache; divides h_q.
        s_q: query tokens per sequence; not given with cu_q_lens.
        max_seqlen: the most tokens that a sequence's cache has room for, block_table.shape[1] *
            block_size, if that is known. Where it leaves little to do, at most two tiles of 64
            tokens and 16 query rows for each multiprocessor, the Hopper kernel then takes smaller
            tiles of query rows, which is up to 1.6 times as fast. No promise: longer lengths still
            give the right answer, only more slowly. Not used with num_parts or batch_invariant.
        format: of the cache, as in `dense_decode`. Over `v32` and `fp8_row` max_seqlen counts in
            larger problems too, of up to 8 tiles of 64 tokens and 32 query rows for each
            multiprocessor. A schedule fits any format; one made for another may take longer.
        num_parts: parts to cut into. By default as many as fill the local CUDA device, or an H100
            or H200 where there is none: its multiprocessors over the tiles of 64 query rows, or of
            16 or 32 (see max_seqlen). At most 256.
        batch_invariant: cut no sequence. A sequence's results then have the same bits whatever
            else is in the batch, but a long one is a single multiprocessor's work (for each 64
            query rows): fit for batches of at least as many sequences as parts, of like lengths.
            Found by pure JAX on any platform; under `vmap`, where batches become one, the
            promise does not hold.
        cu_q_lens: [b + 1] int32 for packed queries, as in `dense_decode`. The schedule is then for
            their groups of tokens: above 16384 of these it cuts none of them.
        num_tokens: with cu_q_lens, T: how many packed tokens q has, padding included (static).
        max_q_len: with cu_q_lens, as in `dense_decode`.
        causal: with cu_q_lens, as in `dense_decode`.
        context: as in `dense_decode`; max_seqlen is then of the tokens that are here.
        implementation: None for the platform's best, "kernel" to insist on the handler, "xla" for
            pure JAX.

    Returns:
        A SplitSchedule for these b sequences.

    Raises:
        TypeError, ValueError: an argument is not as described.
        NotImplementedError: implementation is "kernel" and the platform has none.
    """
    _check_heads(h_q, h_kv, s_q)
    cache_seqlens = _checks.as_cache_seqlens(cache_seqlens)
    if max_seqlen is not None:
        _checks.check_int("max_seqlen", max_seqlen, 0, _limits.INT32_MAX)
    _checks.check_bool("batch_invariant", batch_invariant)
    _checks.check_bool("causal", causal)
    _checks.check_implementation(implementation)
    if format is not None and not isinstance(format, CacheFormat):
        raise TypeError(f"format must be a CacheFormat or None, got {type(format).__name__}")
    here = as_context(context)
    if here is not None:
        cache_seqlens = here.clamp(cache_seqlens, max_seqlen)
    if num_parts is not None:
        _checks.check_int("num_parts", num_parts, 1, _limits.MAX_PARTS)
    if cu_q_lens is not None:
        cu_q_lens = _checks.as_cu_q_lens(cu_q_lens)
        _checks.as_per_sequence("cache_seqlens", cache_seqlens, cu_q_lens.shape[0] - 1)
        num_tokens = _checks.check_int("num_tokens", num_tokens, 1, _limits.INT32_MAX)
        max_q_len = _checks.as_max_q_len(max_q_len, num_tokens)
        if s_q != 1:
            raise ValueError(f"s_q must not be given with cu_q_lens, got {s_q}")
        s_q = window_tokens(h_q, h_kv, max_q_len)
        cache_seqlens = make_windows(
            cu_q_lens,
            cache_seqlens,
            num_tokens=num_tokens,
            s_q=s_q,
            max_q_len=max_q_len,
            capacity=_limits.INT32_MAX if max_seqlen is None or here else max_seqlen,
            causal=bool(causal),
        ).cache_seqlens
    else:
        for name, value in (("num_tokens", num_tokens), ("max_q_len", max_q_len)):
            if value is not None:
                raise ValueError(f"{name} must be None without cu_q_lens, got {value}")
    if here is not None:
        cache_seqlens = here.count(cache_seqlens)
    return schedule_of_lengths(
        cache_seqlens,
        h_q=h_q,
        h_kv=h_kv,
        s_q=s_q,
        max_seqlen=max_seqlen,
        format=format,
        num_parts=num_parts,
        batch_invariant=batch_invariant,
        implementation=implementation,
    )


def schedule_of_lengths(
    cache_seqlens: jax.Array,
    *,
    h_q: int,
    h_kv: int,
    s_q: int,
    max_seqlen: int | None,
    format: CacheFormat | None = None,
    num_parts: int | None = None,
    batch_invariant: bool = False,
    implementation: str | None,
) -> SplitSchedule:
    """make_schedule of checked arguments, for any number of sequences."""
    b = cache_seqlens.shape[0]
    tile_rows = _limits.TILE_ROWS
    if num_parts is None:
        # Small tiles have other bits, and what is small depends on the batch.
        room = None if batch_invariant else max_seqlen
        num_parts, tile_rows = default_split(
            b=b, s_q=s_q, h_q=h_q, h_kv=h_kv, max_seqlen=room,
            format="dense" if format is None else format.name,
        )  # fmt: skip
    if b > _limits.MAX_BATCH:
        cuts = uncut(b, num_parts)
    elif batch_invariant:
        cuts = _whole_schedule(cache_seqlens, num_parts)
    else:
        (cuts,) = schedule_op(cache_seqlens, num_parts=num_parts, implementation=implementation)
    return SplitSchedule(cuts, b=b, tile_rows=tile_rows)


def uncut(b: int, num_parts: int) -> jax.Array:
    """Cuts, known while tracing, that give as many whole sequences to each part."""
    sequence = np.arange(num_parts + 1, dtype=np.int64) * b // num_parts
    return jnp.asarray(np.stack([sequence, np.zeros_like(sequence)], axis=1).astype(np.int32))


def check_schedule(schedule: Any, b: int, made_for: str | None = None) -> SplitSchedule:
    """A schedule that an operation is given for b sequences, or what else it was made for."""
    if not isinstance(schedule, SplitSchedule):
        raise TypeError(
            f"schedule must be a SplitSchedule from make_schedule, got {type(schedule).__name__}"
        )
    cuts = schedule.cuts
    shape = _checks.check_array("schedule.cuts", cuts, "[num_parts + 1, 2]", _checks.INT32)
    if shape[0] < 2 or shape[1] != 2:
        raise ValueError(
            "schedule.cuts must have shape [num_parts + 1, 2] with num_parts >= 1, got shape "
            f"{cuts.shape}"
        )
    if shape[0] - 1 > _limits.MAX_PARTS:
        raise ValueError(
            f"schedule.cuts must be of at most num_parts = {_limits.MAX_PARTS}, got shape "
            f"{cuts.shape}"
        )
    if schedule.b != b:
        made_for = made_for or f"q's batch of b = {b} sequences"
        raise ValueError(f"schedule must be made for {made_for}, got one made for b = {schedule.b}")
    tile_rows = (_limits.SMALL_TILE_ROWS, _limits.FP8_TILE_ROWS, _limits.TILE_ROWS)
    if schedule.tile_rows not in tile_rows:
        raise ValueError(
            f"schedule.tile_rows must be {_checks.one_of(tile_rows)}, got {schedule.tile_rows!r}"
        )
    return schedule


def _check_heads(h_q: Any, h_kv: Any, s_q: Any) -> None:
    h_kv = _checks.check_int("h_kv", h_kv, 1, _limits.INT32_MAX)
    h_q = _checks.check_int("h_q", h_q, 1, _limits.INT32_MAX)
    _checks.check_int("s_q", s_q, 1, _limits.INT32_MAX)
    if h_q % h_kv:
        raise ValueError(f"h_q must be a multiple of h_kv = {h_kv}, got h_q = {h_q}")


@functools.partial(jax.jit, inline=True, static_argnames="num_parts")
def _whole_schedule(cache_seqlens: jax.Array, num_parts: int) -> jax.Array:
    return reference(cache_seqlens, num_parts, whole=True)


def _batch(
    operands: tuple[jax.Array], dims: tuple[int], *, num_parts: int, implementation: str | None
) -> tuple[list[jax.Array], list[int | None]]:
    # The schedules of n batches are not one schedule of a longer batch. The operations' own rules
    # make the ones that they need, so these are seldom used: the reference, which gives the same
    # cuts, will do.
    del implementation
    one = functools.partial(reference, num_parts=num_parts)
    return [jax.vmap(one, in_axes=dims[0])(operands[0])], [0]


schedule_op = Operation(
    "make_schedule",
    static=("num_parts",),
    results=lambda cache_seqlens, *, num_parts: [((num_parts + 1, 2), jnp.int32)],
    num_results=1,
    reference=lambda cache_seqlens, *, num_parts: [reference(cache_seqlens, num_parts)],
    batch=_batch,
    attributes=lambda *, num_parts: {},
)

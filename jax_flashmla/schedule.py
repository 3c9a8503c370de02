"""How the work of a step is split over a device's multiprocessors."""

from __future__ import annotations

import dataclasses

import jax

from jax_flashmla import _checks, _ffi
from jax_flashmla._num_parts import default_num_parts


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SplitSchedule:
    """A ragged batch cut into parts of equal cost, shared by all layers of a step.

    A pytree with one leaf; its shape depends only on how many parts there are. A schedule whose
    sequences have since changed length still gives the right answer, only more slowly.

    Attributes:
        cuts: [num_parts + 1, 2] int32, the (sequence, tile of 64 tokens) where each part begins.
        b: the number of sequences it was made for (static).
    """

    cuts: jax.Array
    b: int = dataclasses.field(metadata={"static": True})

    @property
    def num_parts(self) -> int:
        return self.cuts.shape[0] - 1


def make_schedule(
    cache_seqlens: jax.Array,
    *,
    h_q: int,
    h_kv: int = 1,
    s_q: int = 1,
    max_seqlen: int | None = None,
    num_parts: int | None = None,
    batch_invariant: bool = False,
    implementation: str | None = None,
) -> SplitSchedule:
    """Splits a ragged batch over the device's multiprocessors, on the device.

    Make it once per step, when the lengths change, and pass it to every layer's `dense_decode`.

    Args:
        cache_seqlens: [b] int32, tokens in each sequence's cache. Negative counts as 0.
        h_q: query heads, as in `dense_decode`.
        h_kv: heads of the cache; divides h_q.
        s_q: query tokens per sequence.
        max_seqlen: the most tokens that a sequence's cache has room for, block_table.shape[1] *
            block_size, if that is known. Where it leaves little to do, at most two tiles of 64
            tokens and 16 query rows for each multiprocessor, the Hopper kernel then takes smaller
            tiles of query rows, which is up to 1.6 times as fast. No promise: longer lengths still
            give the right answer, only more slowly. Not used with num_parts or batch_invariant.
        num_parts: parts to cut into. By default as many as fill the local CUDA device, or an H100
            or H200 where there is none: its multiprocessors over the tiles of 64 query rows, or of
            16 (see max_seqlen). At most 256.
        batch_invariant: cut no sequence. A sequence's results then have the same bits whatever
            else is in the batch, but a long one is a single multiprocessor's work (for each 64
            query rows): fit for batches of at least as many sequences as parts, of like lengths.
            Found by pure JAX on any platform; under `vmap`, where batches become one, the
            promise does not hold.
        implementation: None for the platform's best, "kernel" to insist on the handler, "xla" for
            pure JAX.

    Returns:
        A SplitSchedule for these b sequences.

    Raises:
        TypeError, ValueError: an argument is not as described.
        NotImplementedError: implementation is "kernel" and the platform has none.
    """
    _checks.check_heads(h_q, h_kv, s_q)
    b = _checks.check_make_schedule(cache_seqlens, num_parts, batch_invariant, max_seqlen)
    if num_parts is None:
        # Small tiles have other bits, and what is small depends on the batch.
        room = None if batch_invariant else max_seqlen
        num_parts = default_num_parts(b=b, s_q=s_q, h_q=h_q, h_kv=h_kv, max_seqlen=room)
    _checks.check_implementation(implementation)
    cuts = _ffi.make_schedule(
        cache_seqlens,
        num_parts=int(num_parts),
        batch_invariant=bool(batch_invariant),
        implementation=implementation,
    )
    return SplitSchedule(cuts, b=b)

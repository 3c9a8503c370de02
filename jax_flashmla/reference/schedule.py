"""make_schedule in pure JAX: the same cuts as the handlers'."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from jax_flashmla._limits import CUT_COST, INT32_MAX, SEQUENCE_OVERHEAD, SPLIT_TILE

if TYPE_CHECKING:
    from jaxtyping import Array, Int32


def make_schedule(
    cache_seqlens: Int32[Array, "b"], num_parts: int, *, whole: bool = False
) -> Int32[Array, "cuts 2"]:
    """Cuts a ragged batch into parts, by the plans that csrc/schedule/plan.h describes.

    whole: by the one that cuts no sequence, whatever it costs.
    """
    b = cache_seqlens.shape[0]
    # The handlers count in 64 bits. In 32, a sequence counts for at most 2^30 / b tiles: past
    # 4 million tokens each at b = 16384, cuts are less balanced, and still cover every tile.
    most_tiles = INT32_MAX // (2 * b) - SEQUENCE_OVERHEAD
    tiles = jnp.where(cache_seqlens > 0, (cache_seqlens - 1) // SPLIT_TILE + 1, 0)
    tiles = jnp.minimum(tiles, most_tiles)
    part = jnp.arange(num_parts + 1, dtype=jnp.int32)

    cost = jnp.sum(tiles, dtype=jnp.int32) + SEQUENCE_OVERHEAD * (b - 1)
    stride = jnp.maximum((cost + num_parts - 1) // num_parts, 1)
    units = tiles + SEQUENCE_OVERHEAD
    sequence, offset = _locate(units, _packed_positions(part, stride))
    packed = jnp.stack([sequence, jnp.maximum(offset - SEQUENCE_OVERHEAD, 0)], axis=1)
    whole_cuts, largest = _whole_cuts(units, num_parts)
    if whole:
        return whole_cuts
    packed = jnp.where(largest <= stride + CUT_COST, whole_cuts, packed)
    if b > num_parts:
        cuts = packed
    else:
        uniform_stride = _least_uniform_stride(tiles, num_parts)
        sequence, offset = _locate(_num_pieces(tiles, uniform_stride), part)
        uniform = jnp.stack([sequence, offset * uniform_stride], axis=1)
        cuts = jnp.where(uniform_stride <= stride + SEQUENCE_OVERHEAD, uniform, packed)
    end = jnp.array([b, 0], jnp.int32)
    return jnp.where((cuts[:, :1] == b) | (part[:, None] == num_parts), end, cuts)


def _packed_positions(part: Int32[Array, " cuts"], stride: Int32[Array, ""]) -> Array:
    # Clipped where the product would leave 32 bits: that is past the end of all.
    far = (INT32_MAX - SEQUENCE_OVERHEAD) // stride
    return jnp.where(part > 0, SEQUENCE_OVERHEAD + jnp.minimum(part, far) * stride, 0)


def _locate(units: Int32[Array, " b"], position: Int32[Array, " cuts"]) -> tuple[Array, Array]:
    """The sequence that holds each position, and the position within it."""
    end = jnp.cumsum(units, dtype=jnp.int32)
    sequence = jnp.searchsorted(end, position, side="right").astype(jnp.int32)
    return sequence, position - jnp.where(sequence == 0, 0, end[jnp.maximum(sequence - 1, 0)])


def _whole_cuts(units: Int32[Array, " b"], num_parts: int) -> tuple[Array, Array]:
    """Cuts at the beginnings of sequences, and the units of the largest part between them."""
    b = units.shape[0]
    end = jnp.cumsum(units, dtype=jnp.int32)
    part = jnp.arange(num_parts + 1, dtype=jnp.int32)
    quotient, remainder = jnp.divmod(end[-1], num_parts)
    sequence, before = _locate(units, part * quotient + part * remainder // num_parts)
    after = units[jnp.minimum(sequence, b - 1)] - before
    first = jnp.where(sequence == b, b, jnp.where(before < after, sequence, sequence + 1))
    start = jnp.where(first == 0, 0, end[jnp.maximum(first - 1, 0)])
    return jnp.stack([first, jnp.zeros_like(first)], axis=1), jnp.max(jnp.diff(start))


def _num_pieces(tiles: Int32[Array, " b"], stride: Int32[Array, ""]) -> Array:
    return jnp.where(tiles > 0, (tiles - 1) // stride + 1, 1)


def _least_uniform_stride(tiles: Int32[Array, " b"], num_parts: int) -> Int32[Array, ""]:
    """The least stride that cuts the sequences into at most num_parts pieces."""

    def narrow(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = low + (high - low) // 2
        fits = jnp.sum(_num_pieces(tiles, middle), dtype=jnp.int32) <= num_parts
        return jnp.where(fits, low, jnp.minimum(middle + 1, high)), jnp.where(fits, middle, high)

    high = jnp.maximum(jnp.max(tiles), 1)
    low = jnp.maximum((jnp.sum(tiles, dtype=jnp.int32) + num_parts - 1) // num_parts, 1)
    return jax.lax.fori_loop(0, 32, narrow, (low, high))[1]

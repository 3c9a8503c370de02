"""How a schedule is split if its maker does not say."""

from __future__ import annotations

from typing import NamedTuple

from jax_flashmla import _limits
from jax_flashmla._xla.dispatch import local_cuda_device

_HOPPER_SM_COUNT = 132  # H100 and H200
_SMALL_TILES = 2  # tiles of tokens and SMALL_TILE_ROWS rows for each multiprocessor
_FP8_TILES = 8  # the same, of FP8_TILE_ROWS rows
_V32_TILES = 16  # of TILE_ROWS rows


class Split(NamedTuple):
    num_parts: int
    tile_rows: int


def default_split(
    *, b: int, s_q: int, h_q: int, h_kv: int, max_seqlen: int | None, format: str = "dense"
) -> Split:
    """Parts that fill the local CUDA device, or an H100 or H200 where there is none.

    Smaller tiles of query rows, and so fewer parts, where `max_seqlen` promises a small problem,
    or one that is not large over fp8 rows. Over v32 rows FP8_TILE_ROWS names a kernel of its own,
    whose tiles have TILE_ROWS.
    """

    def row_tiles(rows: int) -> int:
        if h_kv == 1:  # the rows of all query tokens are packed
            return -(-s_q * h_q // rows)
        return s_q * h_kv * -(-h_q // h_kv // rows)

    sm_count = _sm_count()
    tile_rows, tiles = _limits.TILE_ROWS, row_tiles(_limits.TILE_ROWS)
    smaller = [(_limits.SMALL_TILE_ROWS, row_tiles(_limits.SMALL_TILE_ROWS), _SMALL_TILES)]
    few = row_tiles(_limits.FP8_TILE_ROWS)
    if format != "dense" and few > tiles:
        large = (_limits.FP8_TILE_ROWS, tiles, _V32_TILES)
        smaller.append(large if format == "v32" else (_limits.FP8_TILE_ROWS, few, _FP8_TILES))
    if max_seqlen is not None:
        work = b * max(1, -(-max_seqlen // _limits.SPLIT_TILE))  # tiles of tokens
        for rows, count, most in smaller:
            if count <= sm_count and work * count <= most * sm_count:
                tile_rows, tiles = rows, count
                break
    return Split(min(max(1, sm_count // tiles), _limits.MAX_PARTS), tile_rows)


def sparse_num_parts(*, tiles: int, h_q: int, small_tiles: bool) -> int:
    """Parts of sparse_decode's query tokens, which have so many tiles of indices together.

    With small_tiles, in a small problem so few that the Hopper kernel takes tiles of 16 heads: it
    reads that off their number (narrow_rows in csrc/sm90/sparse_decode/launch.cu). Else no more
    than there are tiles: parts without work would take thread blocks of the merge.
    """
    sm_count, small = _sm_count(), -(-h_q // _limits.SMALL_TILE_ROWS)
    few = small_tiles and tiles * small <= _SMALL_TILES * sm_count
    row_tiles = small if few else -(-h_q // _limits.TILE_ROWS)
    most = tiles if not few else _limits.MAX_PARTS
    return max(1, min(sm_count // row_tiles, most, _limits.MAX_PARTS))


def _sm_count() -> int:
    """Multiprocessors of the local CUDA device; a Hopper's where there is none."""
    device = local_cuda_device()
    return _HOPPER_SM_COUNT if device is None else device.core_count

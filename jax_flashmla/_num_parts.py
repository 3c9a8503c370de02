"""How many parts a schedule has if its maker does not say."""

from __future__ import annotations

import jax

from jax_flashmla import _limits

_HOPPER_SM_COUNT = 132  # H100 and H200
_TILE_ROWS = 64  # query rows that one multiprocessor takes at a time
_SMALL_TILE_ROWS = 16  # the same in a small problem, one of at most
_SMALL_TILES = 2  # tiles of tokens and these rows for each multiprocessor


def default_num_parts(*, b: int, s_q: int, h_q: int, h_kv: int, max_seqlen: int | None) -> int:
    """Parts that fill the local CUDA device, or an H100 or H200 where there is none.

    Fewer where `max_seqlen` promises a small problem: the Hopper kernel then takes smaller tiles of
    query rows (`choose_tile_rows` in csrc/sm90/dense_decode/launch.cu).
    """

    def row_tiles(rows: int) -> int:
        if h_kv == 1:  # the rows of all query tokens are packed
            return -(-s_q * h_q // rows)
        return s_q * h_kv * -(-h_q // h_kv // rows)

    sm_count = _sm_count()
    tiles = row_tiles(_TILE_ROWS)
    small_tiles = row_tiles(_SMALL_TILE_ROWS)
    if max_seqlen is not None and small_tiles <= sm_count:
        most = b * max(1, -(-max_seqlen // _limits.SPLIT_TILE)) * small_tiles
        if most <= _SMALL_TILES * sm_count:
            tiles = small_tiles
    return min(max(1, sm_count // tiles), _limits.MAX_PARTS)


def _sm_count() -> int:
    """Multiprocessors of the local CUDA device; a Hopper's where there is none."""
    try:
        return jax.local_devices(backend="cuda")[0].core_count
    except RuntimeError:
        return _HOPPER_SM_COUNT
